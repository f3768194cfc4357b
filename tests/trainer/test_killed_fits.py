"""Fits that are killed: at every operation on their files, at random, with a machine; and what goes on afterwards."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
TINY = [
    "--init", "scratch", "--network.width", "8", "--network.depth", "1", "--network.dropout", "0.2", "--warmup", "2",
    "--batch-size", "32", "--threads", "1", "--lr", "1e-2",
    "--objective.name", "progressive", "--objective.schedule", "2", "1", "--ema", "0.9",
]  # fmt: skip


def killed(store, tmp_path, options: list[str], **plan) -> dict:
    """What tests/trainer/killed.py tells."""
    plan |= {"folder": str(tmp_path / "runs"), "arguments": ["--data", store.uri, *TINY, *options]}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    done = subprocess.run(
        [sys.executable, "-m", "tests.trainer.killed", str(tmp_path / "plan.json")],
        cwd=REPOSITORY, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=1000,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.faults
@pytest.mark.timeout(1100)
def test_a_fit_that_is_killed_at_its_files_ends_with_the_same_bits(make_store, tmp_path):
    options = ["--steps", "4", "--checkpoint-every", "2", "--log-every", "1", "--validate-every", "2"]
    told = killed(make_store(), tmp_path, options, every=2)
    assert told["wrong"] == []
    assert told["killed"] > 50
    assert told["models"] == 4


@pytest.mark.faults
def test_so_does_one_that_is_killed_again_and_again(make_store, tmp_path):
    options = ["--steps", "120", "--checkpoint-every", "10", "--log-every", "1", "--validate-every", "10"]
    told = killed(make_store(), tmp_path, options, blows=12)
    assert told["wrong"] == []
    assert told["killed"] >= 8

"""Fits under torchrun that end with the same bits, and one that a second machine joins and leaves."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.servers import free_ports
from tests.trainer.test_fits_on_ranks import (
    REPOSITORY,
    TINY,
    children,
    fit,
    markers,
    metrics,
    start,
    told_by,
    wait_for_step,
)

APART = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
pytestmark = [pytest.mark.faults, pytest.mark.timeout(300)]


def losses(out: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in metrics(out)]


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_told_to_end_processes_save_after_the_same_step_and_go_on_to_the_same_bits(make_store, tmp_path, parallel):
    store, whole, out = make_store(), tmp_path / "whole", tmp_path / "cut"
    options = ["--parallel", parallel, "--steps", 200, "--log-every", 1, "--checkpoint-every", 50]
    told_by(whole, store, *options, ranks=2)
    process = start(out, store, *options, ranks=2)
    wait_for_step(out, 50, process)
    process.send_signal(signal.SIGTERM)
    _, told = process.communicate(timeout=60)
    assert "saved on a signal" in told
    saved = markers(out)[-1]["step"]
    assert saved < 200
    assert f"going on from step {saved} of 200" in told_by(out, store, *options, ranks=2)
    assert losses(out) == losses(whole)
    for name in ("model.safetensors", "model.json"):
        assert (out / "model" / name).read_bytes() == (whole / "model" / name).read_bytes()


def agent(out: Path, store, port: int, *options) -> subprocess.Popen:
    """One machine's torchrun, of a fit on one machine or two."""
    elastic = [
        "--nnodes=1:2", "--nproc-per-node=1", "--max-restarts=3", "--rdzv-backend=c10d", "--rdzv-id=fit",
        f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-conf=last_call_timeout=3",
    ]  # fmt: skip
    words = ["--data", store.uri, "--out", str(out), *TINY, *map(str, options)]
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *elastic, "-m", "limbeck.trainer", "fit", *words],
        cwd=REPOSITORY, env={**os.environ, "OMP_NUM_THREADS": "1", APART: "1"}, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def wait_for_ranks(out: Path, number: int, first: subprocess.Popen) -> None:
    """Until a checkpoint of so many."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and first.poll() is None:
        if any(marker["world_size"] == number for marker in markers(out)):
            return
        time.sleep(0.02)
    raise AssertionError(first.communicate()[1])


def test_a_machine_joins_and_is_lost_and_the_fit_goes_on(make_store, tmp_path):
    store, whole, out = make_store(), tmp_path / "whole", tmp_path / "elastic"
    options = ["--steps", 6000, "--log-every", 1, "--validate-every", 100, "--checkpoint-every", 100]
    fit(whole, store, *options)
    (port,) = free_ports(1)
    first = agent(out, store, port, *options)
    wait_for_ranks(out, 1, first)
    second = agent(out, store, port, *options)
    wait_for_ranks(out, 2, first)
    for pid in (second.pid, *children(second.pid)):
        os.kill(pid, signal.SIGKILL)
    second.communicate(timeout=10)
    _, told = first.communicate(timeout=200)
    assert first.returncode == 0, told
    assert "going on from step" in told  # once or twice: with both there, either may have had the first rank
    assert markers(out)[-1]["world_size"] == 1
    ours, theirs = losses(out), losses(whole)
    assert [step for step, _ in ours] == [step for step, _ in theirs]
    # Another batch would change a step's loss by tens of percents.
    for (step, here), (_, there) in zip(ours, theirs, strict=True):
        assert here == pytest.approx(there, rel=1e-2), step

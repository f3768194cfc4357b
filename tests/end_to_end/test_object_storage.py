"""The main job over a real S3 server: two producers at once, every byte verified, a student fitted from the bucket."""

import json
import os
import subprocess
import sys

import pytest

from limbeck.diffusion.models import checkpoint

pytest.importorskip("s3fs")

GENERATE = (
    "generate --teacher builtin:digits --count 512 --holdout 128 --solver.steps 4 --states 2 --samples-per-shard 128 "
    "--micro-batch 64 --runner local --with-weights"
)


def start(program, words, environment):
    command, environment = [sys.executable, "-m", program, *words.split()], os.environ | environment
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def run(program, words, environment):
    process = start(program, words, environment)
    out, _ = process.communicate(timeout=120)
    return process.returncode, out


@pytest.mark.timeout(240)
@pytest.mark.parametrize("form", ["parquet", pytest.param("webdataset", marks=pytest.mark.faults)])
def test_the_main_job_on_a_bucket(s3_environment, form, tmp_path):
    store = f"s3://pairs/{form}"
    words = f"{GENERATE} --format {form} --store {store}"
    beside = [start("pipeline", words, s3_environment) for _ in range(2)]
    told = [process.communicate(timeout=180)[0] for process in beside]
    assert [process.returncode for process in beside] == [0, 0], told

    code, out = run("pipeline", f"verify {store} --json", s3_environment)
    assert code == 0, out
    code, out = run("pipeline", f"inspect {store} --json", s3_environment)
    assert code == 0, out
    assert json.loads(out)["manifest"] == 1

    fit = f"fit --data {store} --out {tmp_path}/kd --steps 20 --batch-size 64 --warmup 5 --objective.name knowledge"
    code, out = run("trainer", fit, s3_environment)
    assert code == 0, out
    assert checkpoint.load(tmp_path / "kd" / "model").grids.keys() == {1}


def test_wrong_credentials_are_one_line(s3_environment):
    code, out = run("pipeline", "verify s3://pairs/parquet", s3_environment | {"AWS_SECRET_ACCESS_KEY": "wrong"})
    assert code == 1
    assert len(out.splitlines()) == 1
    assert "wrong" not in out

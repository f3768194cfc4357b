"""Pipelines of each family, all the way: solved, audited, solved again, and students that begin at the teacher."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from limbeck.diffusion.models import checkpoint
from limbeck.storage_schemas.command_line import main
from limbeck.storage_schemas.program import COMMANDS
from tests.diffusion.models.pipelines import save_dit_pipeline, save_unet_pipeline

diffusers = pytest.importorskip("diffusers")

SOLVE = "--count 32 --holdout 16 --samples-per-shard 16 --micro-batch 8 --solver.grid scheduler --solver.steps 4"
SOLVE = [*SOLVE.split(), "--states", "2"]
V = {"clip_sample": False, "prediction_type": "v_prediction"}  # a student of one step can't predict epsilon
FIT = "--steps 4 --batch-size 8 --device cpu --threads 1 --init teacher --validate-every 2 --checkpoint-every 1"
FAMILIES = {
    "unet": lambda folder: save_unet_pipeline(folder, diffusers.DDIMScheduler(**V)),
    "unet of a flow": lambda folder: save_unet_pipeline(folder, diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)),
    "unet of EDM": lambda folder: save_unet_pipeline(folder, diffusers.EDMEulerScheduler()),
    "dit": lambda folder: save_dit_pipeline(folder, diffusers.DDIMScheduler(**V)),
}
HAS_CLASSES = ("dit",)
QUICK = ("unet of a flow", "dit")
"""Those that every `make test` goes all the way with."""


def run(*words):
    assert main(COMMANDS, [str(word) for word in words]) == 0


@pytest.fixture(params=[name if name in QUICK else pytest.param(name, marks=pytest.mark.faults) for name in FAMILIES])
def family(request):
    return request.param


@pytest.fixture
def teacher(family, tmp_path):
    return FAMILIES[family](tmp_path / "pipeline")


@pytest.fixture
def guidance(family):
    return ["--guidance", "3"] if family in HAS_CLASSES else []


def sums(store):
    commits = sorted(store.glob("recipes/*/*/commits/*.json"))
    return {path.name: json.loads(path.read_text())["sha256"] for path in commits}


def test_a_family_is_solved_audited_and_distilled(teacher, guidance, tmp_path):
    store, student = tmp_path / "store", tmp_path / "student"
    run("generate", "--teacher", teacher, "--store", store, "--runner", "local", *SOLVE, *guidance)
    run("verify", store, "--audit", 4, "--teacher", teacher, "--tolerance", 100)
    run("reproduce", store, "--sample", 3, "--teacher", teacher)
    for objective in ("knowledge --objective.distance l2", "progressive --objective.schedule 2 1"):
        out = student / objective.split()[0]
        words = ["--teacher.uri", teacher, "--objective.name", *objective.split(), *FIT.split()]
        run("fit", "--data", store, "--out", out, *words)
        run("sample", out, "--nfe", 1, "--count", 4, "--tensors", out / "samples.safetensors")


@pytest.mark.faults
def test_ray_and_this_machine_solve_the_same_bits(teacher, guidance, tmp_path):
    for runner in ("local", "ray"):
        where = ["--store", tmp_path / runner, "--runner", runner, "--workers", 2]
        run("generate", "--teacher", teacher, *where, *SOLVE, *guidance)
    assert sums(tmp_path / "local") == sums(tmp_path / "ray")


@pytest.mark.faults
def test_a_student_that_is_killed_goes_on_to_the_same_bits(teacher, guidance, tmp_path):
    store = tmp_path / "store"
    run("generate", "--teacher", teacher, "--store", store, "--runner", "local", *SOLVE, *guidance)
    words = ["fit", "--data", str(store), "--teacher.uri", teacher, *FIT.split(), "--steps", "200"]
    killed = tmp_path / "killed"
    process = subprocess.Popen([sys.executable, "-m", "limbeck.trainer", *words, "--out", str(killed)])
    while len(list(killed.glob("checkpoints/*"))) < 2 and process.poll() is None:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    for out in (killed, tmp_path / "whole"):
        run(*words, "--out", out)
    models = [checkpoint.load(out / "model").weights_sha256 for out in (killed, tmp_path / "whole")]
    assert models[0] == models[1]

"""Progressive distillation with the real trainer: killed in every phase, and on Ray under torchrun."""

import json
import os
import shlex
import signal
import sys

import pytest

from limbeck.diffusion.models import checkpoint
from limbeck.storage_schemas.dataset import open_dataset
from limbeck.storage_schemas.store import Store
from tests.pipeline.test_drain import wait_until

pytestmark = [pytest.mark.faults, pytest.mark.timeout(300)]

FIT = ["--fit.steps", 60, "--fit.warmup", 5, "--fit.batch-size", 32, "--fit.threads", 1, "--fit.checkpoint-every", 10]
SMALL = ["--count", 128, "--holdout", 32, "--samples-per-shard", 32, "--micro-batch", 32, *FIT, "--json"]


@pytest.fixture
def progressive(start, tmp_path, monkeypatch):
    """Start the command in a folder of its own, from which the students' paths and so the recipes are the same."""

    def run(name, *words):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        monkeypatch.chdir(folder)
        given = ["--teacher", "builtin:digits", "--store", folder / "store", "--out", "out", *SMALL]
        return start("progressive", *given, *words)

    return run


def ended(process):
    said, _ = process.communicate(timeout=200)
    assert process.returncode == 0, said
    return json.loads(said.splitlines()[-1])


def test_killed_while_it_solves_fits_and_measures_it_ends_with_the_same_students(progressive, commits, tmp_path):
    words = ["--runner", "local", "--steps", 4, "--schedule", 2]
    whole = ended(progressive("whole", *words))
    out = tmp_path / "killed/out"

    def has_promoted():
        path = out / "progressive.json"
        return path.is_file() and "student" in json.loads(path.read_text())["rounds"].get("2", {})

    for happened in (
        lambda: len(commits(tmp_path / "killed/store")) > 1,
        lambda: any((out / "2-step/checkpoints").glob("*.json")),
        has_promoted,
    ):
        driver = progressive("killed", *words)
        wait_until(happened)
        driver.send_signal(signal.SIGKILL)
        driver.communicate()
    found = ended(progressive("killed", *words))
    for steps, facts in whole["rounds"].items():
        assert {name: found["rounds"][steps][name] for name in SAME} == {name: facts[name] for name in SAME}


SAME = ("recipe", "manifest", "student", "teacher", "calls", "error", "teacher_error")


def test_killed_in_its_second_round_from_data_it_ends_with_the_same_students(progressive, tmp_path):
    words = ["--runner", "local", "--start", "data:sklearn:digits", "--steps", 4, "--schedule", 2, 1]
    whole = progressive("whole", *words)  # at the same time
    folder = tmp_path / "killed"

    def commits():
        return list((folder / "store").glob("recipes/*/*/commits/*.json"))

    def has_promoted():
        path = folder / "out/progressive.json"
        return path.is_file() and "student" in json.loads(path.read_text())["rounds"].get("1", {})

    for happened in (
        lambda: len(commits()) > 2 + 5,  # those of the reference, and of the first round
        lambda: any((folder / "out/1-step/checkpoints").glob("*.json")),
        has_promoted,
    ):
        driver = progressive("killed", *words)
        wait_until(happened, seconds=120)
        driver.send_signal(signal.SIGKILL)
        driver.communicate()
    found, expected = ended(progressive("killed", *words))["rounds"], ended(whole)["rounds"]
    for steps, facts in expected.items():
        assert {name: found[steps][name] for name in SAME} == {name: facts[name] for name in SAME}
    second = open_dataset(Store.open(str(folder / "store")), "progressive-1")
    assert (second.manifest.number, second.recipe.chain, second.recipe.solver.grid) == (1, "segment", {"name": "own"})
    assert second.recipe.teacher.weights_sha256 == found["2"]["student"] != found["1"]["student"]
    assert [found[steps]["calls"] for steps in ("2", "1")] == [2 * 128, 2 * 128]
    assert second.recipe.times == open_dataset(Store.open(str(folder / "store")), "progressive-2").recipe.times[::2]


def test_on_ray_under_torchrun_a_round_is_solved_by_actors_and_fitted_by_two_processes(
    progressive, generate, tmp_path, commits
):
    generate(tmp_path / "ray/store", teacher="builtin:digits")  # the reference, for which Ray need not start
    torchrun = shlex.join([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"])
    launch = ["--launch", f"{torchrun} -m limbeck.trainer", "--fit.device", "cpu"]
    words = ["--runner", "ray", "--workers", 2, "--start", "data:sklearn:digits", "--steps", 4, "--schedule", 2]
    found = ended(progressive("ray", *words, *launch))["rounds"]["2"]
    store = Store.open(str(tmp_path / "ray/store"))
    dataset = open_dataset(store, "progressive-2")
    assert dataset.recipe.chain == "segment"
    assert {commit["machine"]["host"] for commit in commits(tmp_path / "ray/store").values()} == {os.uname().nodename}
    student = checkpoint.load(tmp_path / "ray/out/2-step/model")
    assert student.weights_sha256 == found["student"]
    assert found["error"] < found["teacher_error"]

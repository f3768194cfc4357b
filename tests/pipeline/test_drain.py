"""SIGTERM and SIGINT to a driver: what is in flight finishes, nothing is sealed, and the next run goes on there."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from limbeck.storage_schemas.dataset import latest_manifest
from limbeck.storage_schemas.store import Store

SMALL = ["--solver.steps", 4, "--states", 2, "--samples-per-shard", 64, "--micro-batch", 32]
SLOW = "python:strange_teachers:slow_teacher"
TASKS = 30


def line_of_work(store, *words, teacher=SLOW):
    return ["generate", "--teacher", teacher, "--store", store, "--count", TASKS * 64, "--holdout", 0, *SMALL, *words]


def told(out):
    return next(line for line in out.splitlines() if line.startswith("limbeck: "))


def wait_for_commits(commits, store, number):
    wait_until(lambda: len(commits(store)) >= number)


def wait_until(happened, seconds=60):
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("workers", "number"), [(1, signal.SIGTERM), pytest.param(2, signal.SIGINT, marks=pytest.mark.faults)]
)
def test_a_driver_that_is_told_to_stop_lets_tasks_finish(start, generate, commits, tmp_path, workers, number):
    job = start(*line_of_work(tmp_path, "--runner", "local", "--workers", workers), STRANGE_DELAY="0.05")
    wait_for_commits(commits, tmp_path, 2)
    job.send_signal(number)
    out, _ = job.communicate(timeout=60)
    assert job.returncode == 128 + number, out
    done = len(commits(tmp_path))
    assert told(out) == (
        f"limbeck: stopped by {number.name}: {done} of {TASKS} missing tasks are committed, nothing is sealed; "
        "run it again to go on there"
    )
    assert latest_manifest(Store.open(str(tmp_path)), "main") is None
    code, again, _ = generate(tmp_path, teacher=SLOW, count=TASKS * 64, holdout=0)
    assert (code, f"{TASKS - done} of {TASKS} tasks run here" in again) == (0, True)


def test_workers_leave_a_signal_of_the_whole_group_to_the_driver(commits, tmp_path):
    words = map(str, line_of_work(tmp_path, "--runner", "local", "--workers", 2))
    job = subprocess.Popen(
        [sys.executable, "-m", "limbeck.pipeline", *words],
        env=os.environ | {"STRANGE_DELAY": "0.05"},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    wait_for_commits(commits, tmp_path, 2)
    before = len(commits(tmp_path))
    os.killpg(job.pid, signal.SIGINT)
    _, err = job.communicate(timeout=60)
    assert job.returncode == 130, err
    assert len(commits(tmp_path)) > before
    assert "Traceback" not in err
    assert "died" not in err


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.faults)])
def test_a_second_signal_leaves_at_once(start, commits, tmp_path, workers):
    store, teacher = tmp_path / "store", "python:strange_teachers:counted_teacher"
    words = line_of_work(store, "--runner", "local", "--workers", workers, teacher=teacher)
    job = start(*words, STRANGE_DELAY="20", STRANGE_MARKER=str(tmp_path / "marker"))
    loaded = 1 if workers == 1 else 1 + workers  # one worker is the driver itself
    wait_until(lambda: list(store.glob("jobs/*/job.json")) and len(list(tmp_path.glob("pid-*"))) == loaded)
    time.sleep(0.5)
    job.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    job.send_signal(signal.SIGTERM)
    began = time.monotonic()
    out, _ = job.communicate(timeout=60)
    assert "SIGTERM: 0 tasks" not in out
    assert (job.returncode, commits(store)) == (143, {}), out
    assert time.monotonic() - began < 15  # one call of the teacher takes 20 s


@pytest.mark.parametrize(("step", "said"), [("after all commits", "stopped"), ("after the manifest", "stopped")])
def test_a_driver_that_is_told_to_stop_while_it_seals(start, generate, pipeline, tmp_path, step, said):
    """Outside of the solve there is nothing to wait for: it leaves at once, with its last word and its JSON."""
    trap = {"STRANGE_STEPS": step, "STRANGE_SIGNAL": "TERM", "STRANGE_MARKER": str(tmp_path / "blow")}
    store, teacher = tmp_path / "store", "python:strange_teachers:sabotaged_teacher"
    words = ["generate", "--teacher", teacher, "--store", store, "--count", 160, "--holdout", 0, "--runner", "local"]
    job = start(*words, *SMALL, "--json", **trap)
    out, _ = job.communicate(timeout=60)
    assert job.returncode == 128 + signal.SIGTERM, out
    assert told(out).startswith("limbeck: stopped by SIGTERM: what is done is kept")
    outcome = json.loads(next(line for line in out.splitlines() if line.startswith("{")))
    assert (outcome["what"], outcome["dataset"]) == ("stopped", "main")
    (beat,) = store.glob("jobs/*/heartbeat.json")
    assert json.loads(beat.read_bytes())["state"] == said
    sealed = step == "after the manifest"
    assert ("sealed as manifest 1" in pipeline("status", store)[1]) == sealed
    code, again, _ = generate(store, teacher=teacher, holdout=0)
    assert (code, "0 of 3 tasks run here" in again, "nothing to do" in again) == (0, not sealed, sealed)


def test_a_prune_that_is_told_to_stop_lets_the_next_one_begin(generate, pipeline, tmp_path, monkeypatch):
    generate(tmp_path)
    monkeypatch.setattr("limbeck.pipeline.upkeep.prune._sweep", lambda *given: signal.raise_signal(signal.SIGTERM))
    assert pipeline("prune", tmp_path)[0] == 128 + signal.SIGTERM
    monkeypatch.undo()
    assert pipeline("prune", tmp_path)[0] == 0


@pytest.mark.faults
def test_a_task_past_its_deadline_has_its_process_ended(generate, ids_of, tmp_path, monkeypatch):
    monkeypatch.setenv("STRANGE_MARKER", str(tmp_path / "marker"))
    code, _, err = generate(
        *(tmp_path / "store", "--workers", 2, "--straggler-seconds", 2),
        teacher="python:strange_teachers:hanging_teacher",
    )
    assert (code, "train-00000001" in err, "is ended (--straggler-seconds)" in err) == (0, True, True)
    assert ids_of(tmp_path / "store")["train"] == list(range(160))


@pytest.mark.faults
def test_the_only_worker_can_not_be_ended_and_says_so(start, tmp_path):
    words = line_of_work(tmp_path, "--runner", "local", "--straggler-seconds", 1)
    job = start(*words, STRANGE_DELAY="20")
    out, _ = job.communicate(timeout=60)
    assert job.returncode == 1
    assert "takes too long, and the only worker is this process, which can't end itself" in told(out)

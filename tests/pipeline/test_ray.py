"""The same jobs on a real Ray, started once for all tests here."""

import json
import os
import time
from pathlib import Path

import pytest

from limbeck.pipeline.config import ResolveConfig
from limbeck.pipeline.workers.crossing import WorkerDied
from limbeck.pipeline.workers.one_call import run_once

MEMORY = 100 * 2**20


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """A Ray with 2 CPUs on this machine. What its workers see of the environment is what it is now."""
    ray = pytest.importorskip("ray")
    marker = tmp_path_factory.mktemp("ray") / "marker"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STRANGE_MARKER", str(marker))
        patch.setenv("STRANGE_PLANNER", str(os.getpid()))
        patch.setenv("PYTHONPATH", f"{Path(__file__).parent}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
        quiet = {"include_dashboard": False, "log_to_driver": False}
        ray.init(address="local", num_cpus=2, num_gpus=0, object_store_memory=MEMORY, **quiet)
        yield marker
        ray.shutdown()


@pytest.fixture
def ray_generate(generate, cluster):
    return lambda store, *words, **given: generate(store, *words, runner="ray", **given)


def test_two_actors_write_the_same_bytes_as_this_process(ray_generate, generate, hashes, ids_of, tmp_path):
    code, out, _ = ray_generate(tmp_path / "ray", "--workers", 2, teacher="builtin:digits")
    assert (code, "4 of 4 tasks run here" in out) == (0, True)
    generate(tmp_path / "local", teacher="builtin:digits")
    assert hashes(tmp_path / "ray") == hashes(tmp_path / "local")
    assert ids_of(tmp_path / "ray") == {"train": list(range(160)), "holdout": list(range(40))}


def test_an_actor_that_is_killed_in_a_task_is_replaced(ray_generate, generate, hashes, cluster, tmp_path):
    teacher = "python:strange_teachers:killed_teacher"
    code, _, err = ray_generate(tmp_path / "killed", "--workers", 2, teacher=teacher)
    assert (code, "set aside" in err, cluster.exists()) == (0, False, True)
    os.environ["STRANGE_MARKER"] = str(cluster)
    generate(tmp_path / "unharmed", teacher=teacher)
    assert hashes(tmp_path / "killed") == hashes(tmp_path / "unharmed")


def test_a_task_that_raises_is_set_aside_and_the_others_finish(ray_generate, commits, tmp_path):
    code, out, err = ray_generate(tmp_path, teacher="python:strange_teachers:raising_teacher")
    assert (code, "nothing sealed: 1 tasks are missing" in out) == (1, True)
    assert "train-00000001 set aside after 3 attempts: ArithmeticError" in err
    assert sorted(commits(tmp_path)) == ["holdout-00000000", "train-00000000", "train-00000002"]


def test_an_actor_that_can_not_load_its_teacher_ends_the_job_in_one_line(ray_generate, tmp_path):
    code, _, err = ray_generate(tmp_path, teacher="python:strange_teachers:picky_teacher")
    (line,) = [line for line in err.splitlines() if line.startswith("limbeck: ")]
    assert (code, "can't start: RuntimeError: no such accelerator" in line) == (1, True)


@pytest.mark.faults
def test_a_running_cluster_is_joined_by_its_address(cluster, start, ids_of, tmp_path):
    import ray

    address = ray.get_runtime_context().gcs_address
    words = ["--teacher", "builtin:gaussian", "--store", tmp_path, "--count", 160, "--holdout", 0, "--runner", "ray"]
    small = ["--solver.steps", 4, "--samples-per-shard", 64, "--micro-batch", 32]
    job = start("generate", *words, *small, RAY_ADDRESS=address)
    out, _ = job.communicate(timeout=60)
    assert (job.returncode, "3 of 3 tasks run here" in out) == (0, True), out
    assert ids_of(tmp_path)["train"] == list(range(160))
    assert ray.is_initialized()  # and it is left running


@pytest.mark.faults
def test_a_function_runs_once_with_a_workers_resources(cluster):
    import strange_work

    here = ResolveConfig(store="unused", runner="ray")
    number, pid = run_once(strange_work.where, 41, runner=here)
    assert (number, pid != os.getpid()) == (42, True)
    with pytest.raises(WorkerDied, match=r"killed died: .*perhaps out of memory"):
        run_once(strange_work.killed, runner=here)


def test_a_job_without_room_ends_in_one_line_that_says_what_there_is(ray_generate, tmp_path):
    big = ["--ray.num-cpus", 3, "--ray.startup-timeout", 2]
    code, _, err = ray_generate(tmp_path, *big)
    assert code == 1
    assert "0 workers are ready after 2 s, 1 must be: each takes 3 CPU; the cluster has 2 CPU, free are 2 CPU" in err


@pytest.mark.faults
def test_a_task_that_kills_every_actor_is_set_aside(ray_generate, commits, tmp_path):
    code, _, err = ray_generate(tmp_path, "--workers", 2, teacher="python:strange_teachers:deadly_teacher")
    assert (code, "train-00000001 set aside after 3 attempts: its worker died" in err) == (1, True)
    assert sorted(commits(tmp_path)) == ["holdout-00000000", "train-00000000", "train-00000002"]
    (path,) = tmp_path.glob("jobs/*/failures/*.json")
    failure = json.loads(path.read_bytes())
    assert "perhaps out of memory" in failure["error"]
    assert "Worker exit type" in failure["traceback"]
    assert failure["machine"].startswith("Ray node ")


@pytest.mark.faults
def test_an_actor_whose_teacher_ends_the_program_fails_its_task(ray_generate, tmp_path):
    code, out, err = ray_generate(tmp_path, teacher="python:strange_teachers:exiting_teacher")
    assert (code, "nothing sealed: 1 tasks are missing" in out, "calls sys.exit(0)" in err) == (1, True, True), err


@pytest.mark.faults
def test_an_actor_that_answers_nan_decides_nothing(ray_generate, commits, cluster, ids_of, tmp_path):
    cluster.unlink(missing_ok=True)
    teacher = "python:strange_teachers:sick_teacher"
    code, _, err = ray_generate(tmp_path, "--workers", 2, teacher=teacher, count=640)
    assert (code, cluster.exists(), "set aside" in err) == (0, True, False), err
    assert all(not found["quarantined"] for found in commits(tmp_path).values())
    assert ids_of(tmp_path)["train"] == list(range(640))


@pytest.mark.faults
def test_an_actor_past_the_deadline_is_ended_and_its_task_runs_elsewhere(ray_generate, cluster, ids_of, tmp_path):
    cluster.unlink(missing_ok=True)
    words = ["--workers", 2, "--straggler-seconds", 4]
    code, _, err = ray_generate(tmp_path, *words, teacher="python:strange_teachers:hanging_teacher")
    assert (code, "is ended (--straggler-seconds)" in err) == (0, True)
    assert ids_of(tmp_path)["train"] == list(range(160))


@pytest.mark.faults
def test_a_job_starts_a_ray_of_its_own_where_there_is_none(start, ids_of, tmp_path):
    words = ["--solver.steps", 4, "--samples-per-shard", 64, "--micro-batch", 32, "--runner", "ray", "--workers", 2]
    job = start(
        "generate", "--teacher", "builtin:gaussian", "--store", tmp_path, "--count", 160, "--holdout", 0, *words
    )
    out, _ = job.communicate(timeout=60)
    assert (job.returncode, "3 of 3 tasks run here" in out) == (0, True), out
    assert ids_of(tmp_path)["train"] == list(range(160))


@pytest.mark.faults
def test_a_ray_job_whose_driver_is_killed_goes_on_where_it_was(start, generate, pipeline, commits, ids_of, tmp_path):
    teacher = "python:strange_teachers:slow_teacher"
    given = ["--teacher", teacher, "--store", tmp_path, "--count", 400, "--holdout", 40, "--runner", "ray"]
    small = ["--solver.steps", 4, "--states", 2, "--samples-per-shard", 64, "--micro-batch", 32, "--workers", 2]
    job = start("generate", *given, *small, STRANGE_DELAY="0.2")
    deadline = time.monotonic() + 60
    while len(commits(tmp_path)) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    job.kill()
    job.wait()
    time.sleep(5)  # its actors follow their driver; one that ends a task meanwhile has only committed it
    before = commits(tmp_path)
    assert 2 <= len(before) < 8
    code, out, _ = generate(tmp_path, teacher=teacher, count=400)
    assert (code, f"{8 - len(before)} of 8 tasks run here" in out) == (0, True)
    assert {name: commits(tmp_path)[name] for name in before} == before
    assert ids_of(tmp_path) == {"train": list(range(400)), "holdout": list(range(40))}
    assert pipeline("verify", tmp_path)[0] == 0


@pytest.fixture(autouse=True)
def no_ray_address(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)

"""The same jobs on a real Ray, started once for all tests here."""

import os
import time
from pathlib import Path

import pytest

from pipeline.config import RayConfig
from pipeline.ray_runner import _connect
from storage_schemas.errors import UsageError

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
        ray.init(num_cpus=2, num_gpus=0, object_store_memory=MEMORY, include_dashboard=False, log_to_driver=False)
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
    assert (code, err, cluster.exists()) == (0, "", True)
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
    assert (code, err.count("\n")) == (1, 1)
    assert "can't start: RuntimeError: no such accelerator" in err


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
def test_a_task_that_kills_every_actor_is_set_aside(ray_generate, commits, tmp_path):
    code, _, err = ray_generate(tmp_path, "--workers", 2, teacher="python:strange_teachers:deadly_teacher")
    assert (code, "train-00000001 set aside after 3 attempts: its worker died" in err) == (1, True)
    assert sorted(commits(tmp_path)) == ["holdout-00000000", "train-00000000", "train-00000002"]


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


@pytest.mark.parametrize(
    ("workers", "num_cpus", "asked"), [(1, 1.25, 2), (1, 2.5, 3), (3, 0.5, 2), (2, 1.0, 2), (1, 0.0, 1)]
)
def test_a_ray_of_our_own_has_room_for_every_worker(workers, num_cpus, asked):
    ray = FakeRay(gpus=0)
    _connect(ray, RayConfig(num_cpus=num_cpus), workers=workers)
    assert ray.asked["num_cpus"] == asked


def test_a_worker_that_needs_more_gpus_than_there_are_is_refused():
    ray = FakeRay(gpus=0)
    with pytest.raises(UsageError, match=r"takes 1 GPUs, this machine has 0"):
        _connect(ray, RayConfig(num_gpus=1), workers=1)
    assert ray.ended
    _connect(FakeRay(gpus=1), RayConfig(num_gpus=0.5), workers=4)


class FakeRay:
    """What a Ray that starts here is asked for, on a machine with so many GPUs."""

    def __init__(self, *, gpus):
        self.gpus, self.asked, self.ended = gpus, {}, False

    def init(self, **asked):
        self.asked = asked

    def cluster_resources(self):
        return {"GPU": float(self.gpus)} if self.gpus else {}

    def shutdown(self):
        self.ended = True


@pytest.fixture(autouse=True)
def no_ray_address(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)

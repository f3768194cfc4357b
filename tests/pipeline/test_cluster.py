"""What is asked of Ray and what is made of its answers, without a Ray."""

from types import SimpleNamespace

import pytest

from limbeck.pipeline.config import RayConfig
from limbeck.pipeline.workers.cluster import connect, draining_nodes, room, why_gone
from limbeck.storage_schemas.errors import UsageError

DIED = "The actor died unexpectedly before finishing this task.\n\tclass_name: _Worker\n\tip: 10.0.0.7\n"


class NodeDiedError(Exception):
    pass


RAY = SimpleNamespace(exceptions=SimpleNamespace(NodeDiedError=NodeDiedError))


class Preempted(Exception):
    preempted = True


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (
            Exception(
                f"{DIED}The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker "
                "exit detail: Worker unexpectedly exits with a connection error code 2. End of file. Some common "
                "causes include: (1) the process was killed by the OOM killer due to high memory usage"
            ),
            (
                "Worker unexpectedly exits with a connection error code 2. End of file. (perhaps out of memory: see "
                "the machine's kernel log)",
                "process",
            ),
        ),
        (
            Exception(f"{DIED}Worker exit detail: Worker exits with an exit code 1. The process receives a SIGTERM."),
            ("Worker exits with an exit code 1. The process receives a SIGTERM.", "process"),
        ),
        (
            Exception(
                f"{DIED}The actor died because its node has died. Node Id: aeb78a\n\tthe actor's node was terminated "
                "unexpectedly: health check failed due to missing too many heartbeats"
            ),
            ("its node died: health check failed due to missing too many heartbeats", "node"),
        ),
        (Preempted("The actor died because its node has died."), ("its node was preempted", "notice")),
        (NodeDiedError("gone"), ("its node died", "node")),
        (Exception("The actor abc is unavailable: no answer"), ("The actor abc is unavailable: no answer", "process")),
    ],
)
def test_an_actors_error_is_told_in_one_line_with_what_went(error, told):
    assert why_gone(RAY, error) == told


def test_another_versions_inside_is_no_notice():
    assert draining_nodes(SimpleNamespace()) == set()


def test_room_names_what_is_asked_for():
    ray = FakeRay(gpus=1)
    assert room(ray, RayConfig(num_gpus=0.5)) == (
        "each takes 1 CPU, 0.5 GPU; the cluster has 0 CPU, 1 GPU, free are 2 CPU, 0 GPU"
    )


@pytest.mark.parametrize(
    ("workers", "num_cpus", "asked"), [(1, 1.25, 2), (1, 2.5, 3), (3, 0.5, 2), (2, 1.0, 2), (1, 0.0, 1)]
)
def test_a_ray_of_our_own_has_room_for_every_worker(workers, num_cpus, asked):
    ray = FakeRay(gpus=0)
    connect(ray, RayConfig(num_cpus=num_cpus), workers=workers)
    assert (ray.asked["num_cpus"], ray.asked["address"]) == (asked, "local"), "not a cluster that happens to run here"


def test_a_worker_that_needs_more_gpus_than_there_are_is_refused():
    ray = FakeRay(gpus=0)
    with pytest.raises(UsageError, match=r"takes 1 GPUs, this machine has 0"):
        connect(ray, RayConfig(num_gpus=1), workers=1)
    assert ray.ended
    connect(FakeRay(gpus=1), RayConfig(num_gpus=0.5), workers=4)


class FakeRay:
    """What a Ray that starts here is asked for, on a machine with so many GPUs."""

    def __init__(self, *, gpus):
        self.gpus, self.asked, self.ended = gpus, {}, False

    def init(self, **asked):
        self.asked = asked

    def cluster_resources(self):
        return {"GPU": float(self.gpus)} if self.gpus else {}

    def available_resources(self):
        return {"CPU": 2.0}

    def shutdown(self):
        self.ended = True


@pytest.fixture(autouse=True)
def no_ray_address(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)

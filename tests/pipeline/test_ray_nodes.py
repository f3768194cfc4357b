"""A cluster of several nodes on this machine: nodes that go, come and have notice while a job runs on them."""

import os
import re
import signal
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.faults

MEMORY = 80 * 2**20
HEALTH = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_failure_threshold": 3}
SMALL = ["--solver.steps", 4, "--states", 2, "--samples-per-shard", 64, "--micro-batch", 32]


@pytest.fixture
def nodes(tmp_path, monkeypatch):
    """A head without room for workers, and `add(...)` for nodes beside it."""
    utils = pytest.importorskip("ray.cluster_utils")
    monkeypatch.setenv("STRANGE_MARKER", str(tmp_path / "marker"))
    monkeypatch.setenv("STRANGE_DELAY", "0.1")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    head = {"num_cpus": 0, "object_store_memory": MEMORY, "_system_config": HEALTH}
    cluster = utils.Cluster(initialize_head=True, head_node_args=head)
    yield cluster
    cluster.shutdown()


def add(cluster, **resources):
    return cluster.add_node(object_store_memory=MEMORY, **resources)


@pytest.fixture
def begin(start, nodes, tmp_path):
    """A job of 20 tasks of about 0.8 s on the cluster."""

    def run(*words):
        given = ["--teacher", "python:strange_teachers:counted_teacher", "--store", tmp_path / "store", *SMALL]
        size = ["--count", 20 * 64, "--holdout", 0, "--runner", "ray", "--device", "cpu"]
        return start("generate", *given, *size, *words, RAY_ADDRESS=nodes.address)

    return run


@pytest.fixture
def wait_for(commits, tmp_path):
    def wait(number, seconds=90):
        deadline = time.monotonic() + seconds
        while len(commits(tmp_path / "store")) < number:
            assert time.monotonic() < deadline, "it took too long"
            time.sleep(0.05)

    return wait


@pytest.fixture
def is_whole(pipeline, ids_of, tmp_path):
    """The job ended well, every id is there once and every byte is right."""

    def check(job):
        out, _ = job.communicate(timeout=180)
        assert job.returncode == 0, out
        assert ids_of(tmp_path / "store")["train"] == list(range(20 * 64))
        assert pipeline("verify", tmp_path / "store")[0] == 0
        return out

    return check


def loaded(tmp_path, job):
    """Processes that loaded the teacher, but for the driver."""
    return {int(path.name.removeprefix("pid-")) for path in tmp_path.glob("pid-*")} - {job.pid}


def test_a_node_that_is_lost_takes_only_its_share_along(nodes, begin, wait_for, is_whole, tmp_path):
    lost, _ = add(nodes, num_cpus=1), add(nodes, num_cpus=1)
    job = begin("--workers", 2)
    wait_for(4)
    assert len(loaded(tmp_path, job)) == 2
    nodes.remove_node(lost, allow_graceful=False)
    is_whole(job)


def test_a_node_that_joins_gets_a_worker(nodes, begin, wait_for, is_whole, tmp_path):
    add(nodes, num_cpus=1)
    job = begin("--workers", 2)
    wait_for(3)
    assert len(loaded(tmp_path, job)) == 1
    add(nodes, num_cpus=1)
    is_whole(job)
    assert len(loaded(tmp_path, job)) == 2


def test_a_job_outlives_the_only_node_with_workers(nodes, begin, wait_for, is_whole, tmp_path):
    lost = add(nodes, num_cpus=2)
    job = begin("--workers", 2)
    wait_for(4)
    nodes.remove_node(lost, allow_graceful=False)
    time.sleep(3)
    add(nodes, num_cpus=2)
    is_whole(job)
    assert len(loaded(tmp_path, job)) == 4


def test_several_workers_share_a_gpu_and_one_waits(nodes, begin, is_whole, tmp_path):
    add(nodes, num_cpus=4, num_gpus=1)  # so it says: no GPU is touched
    job = begin("--workers", 3, "--ray.num-gpus", 0.5)
    is_whole(job)
    assert len(loaded(tmp_path, job)) == 2


def test_a_node_that_has_notice_ends_what_it_has_and_gets_no_more(nodes, begin, wait_for, is_whole, tmp_path):
    leaving = add(nodes, num_cpus=1)
    job = begin("--workers", 1)
    wait_for(3)
    give_notice(nodes, leaving)
    add(nodes, num_cpus=1)
    out = is_whole(job)
    assert len(loaded(tmp_path, job)) == 2
    assert "died" not in out
    assert "set aside" not in out


def give_notice(nodes, node):
    """What a cloud's preemption notice becomes; `ray drain-node` does the same."""
    from ray._raylet import GcsClient
    from ray.core.generated.autoscaler_pb2 import DrainNodeReason

    reason = DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    deadline = int((time.time() + 60) * 1000)
    accepted, why = GcsClient(address=nodes.address).drain_node(node.node_id, reason, "spot", deadline)
    assert accepted, why


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_driver_on_ray_that_is_told_to_stop(nodes, begin, wait_for, commits, is_whole, tmp_path, number):
    add(nodes, num_cpus=2)
    job = begin("--workers", 2)
    wait_for(4)
    job.send_signal(number)
    out, _ = job.communicate(timeout=180)
    done = len(commits(tmp_path / "store"))
    assert job.returncode == 128 + number, out
    assert f"stopped by {number.name}: {done} of 20 missing tasks are committed, nothing is sealed" in out
    assert not re.search(r"Traceback|received at time|\*\*\*", out), out
    assert f"{20 - done} of 20 tasks run here" in is_whole(begin("--workers", 2))


def test_a_ray_of_the_drivers_own_outlives_a_signal_to_its_group(start, tmp_path, commits, monkeypatch):
    import subprocess
    import sys

    monkeypatch.setenv("STRANGE_DELAY", "0.1")
    given = ["--teacher", "python:strange_teachers:slow_teacher", "--store", tmp_path, *SMALL]
    words = ["generate", *given, "--count", 20 * 64, "--holdout", 0, "--runner", "ray", "--workers", 2]
    job = subprocess.Popen(
        [sys.executable, "-m", "limbeck.pipeline", *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env=os.environ | {"RAY_AUTH_MODE": "disabled"},
    )
    deadline = time.monotonic() + 60
    while len(commits(tmp_path)) < 4 and time.monotonic() < deadline:
        time.sleep(0.05)
    before = len(commits(tmp_path))
    os.killpg(job.pid, signal.SIGINT)
    out, _ = job.communicate(timeout=180)
    assert job.returncode == 130, out
    assert "set aside" not in out
    assert len(commits(tmp_path)) > before
    assert f"{len(commits(tmp_path))} of 20 missing tasks are committed" in out
    assert Path(tmp_path).exists()


def test_a_head_that_dies_ends_the_driver_in_one_line(nodes, begin, wait_for, commits, generate, tmp_path):
    """Ray itself would end the process after 60 s with words of its own; what is committed is gone on with."""
    add(nodes, num_cpus=2)
    job = begin("--workers", 2)
    wait_for(2)
    nodes.head_node.kill_gcs_server(check_alive=False)
    out, _ = job.communicate(timeout=180)
    told = [line for line in out.splitlines() if line.startswith("limbeck: ")]
    assert (job.returncode, len(told), "Traceback" in out, "rpc_client" in out) == (1, 1, False, False), out
    assert re.match(r"limbeck: the head of the Ray cluster at \S+ has not answered for 45 s .*run this again", told[0])
    before = len(commits(tmp_path / "store"))
    words = ["--device", "cpu", "--straggler-seconds", 600]
    code, out, _ = generate(
        tmp_path / "store", *words, teacher="python:strange_teachers:counted_teacher", count=20 * 64, holdout=0
    )
    assert (code, f"{20 - before} of 20 tasks run here" in out) == (0, True), out

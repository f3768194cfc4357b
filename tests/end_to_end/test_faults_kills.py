"""SIGKILL and SIGSTOP at every step of the commit protocol, on real processes, with a folder as the store."""

import os
import signal
import subprocess

import pytest

from limbeck.storage_schemas.commit import list_committed, read_commits
from limbeck.storage_schemas.dataset import open_dataset
from limbeck.storage_schemas.store import Store
from tests import servers
from tests.end_to_end.jobs import COUNT, HOLDOUT, SABOTAGED, wait_for
from tests.exactly_once import assert_exactly_once
from tests.pipeline.sabotage import STEPS_OF_A_DRIVER, STEPS_OF_A_WORKER, marker_of

LEAVES_A_SHARD = ("during the upload", "after the upload")


@pytest.fixture
def struck(jobs, tmp_path):
    """A job that is struck at some steps: its exit code; every blow must have fallen."""

    def run(store, *steps, workers=2, words=(), **environment):
        code = jobs.run(
            store,
            *("--workers", workers, "--max-attempts", 12, *words),
            teacher=SABOTAGED,
            STRANGE_STEPS=",".join(steps),
            STRANGE_MARKER=str(tmp_path / "blow"),
            **environment,
        )
        assert all(marker_of(step, tmp_path / "blow").exists() for step in steps), jobs.told()
        return code

    return run


def assert_whole(store, orphans, blows=1):
    """A killed worker may have had a second task in flight, which may have left another orphan."""
    assert orphans <= len(assert_exactly_once(store, count=COUNT, holdout=HOLDOUT)) <= orphans + blows


@pytest.mark.faults
def test_workers_killed_at_every_step_of_one_job(struck, tmp_path):
    assert struck(tmp_path / "s", *STEPS_OF_A_WORKER) == 0
    assert_whole(tmp_path / "s", orphans=len(LEAVES_A_SHARD), blows=len(STEPS_OF_A_WORKER))


def test_a_driver_killed_before_and_after_it_seals(struck, tmp_path):
    for step in ("after all commits", "after the manifest"):
        assert struck(tmp_path / "s", step, workers=1) == -signal.SIGKILL
    assert struck(tmp_path / "s", workers=1) == 0
    assert_whole(tmp_path / "s", orphans=0, blows=0)


@pytest.mark.faults
@pytest.mark.parametrize("form", ["parquet", "webdataset"])
@pytest.mark.parametrize("step", STEPS_OF_A_WORKER)
def test_a_worker_killed_at_one_step(struck, tmp_path, step, form):
    assert struck(tmp_path / "s", step, words=("--format", form)) == 0
    assert_whole(tmp_path / "s", orphans=step in LEAVES_A_SHARD)


@pytest.mark.faults
def test_workers_and_drivers_killed_at_every_step_on_a_bucket(struck, s3_environment):
    """A put to a bucket is whole or not there, so a kill during the upload is one before it."""
    pytest.importorskip("s3fs")
    store = f"s3://{servers.BUCKET}/killed"
    for step in STEPS_OF_A_DRIVER:
        assert struck(store, step, workers=1, **s3_environment) == -signal.SIGKILL
    steps = [step for step in STEPS_OF_A_WORKER if step != "during the upload"]
    assert struck(store, *steps, words=("--count", 600), **s3_environment) == 0
    orphans = assert_exactly_once(store, count=600, holdout=HOLDOUT)
    assert 1 <= len(orphans) <= 1 + len(steps)


@pytest.mark.faults
def test_a_scratch_disk_that_fills_fails_the_tasks_in_one_line(jobs, tmp_path):
    """A small file system of our own, where this machine lets us mount one."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()

    def inside(size):
        return ["unshare", "-Urm", "sh", "-c", f'mount -t tmpfs -o size={size} none {scratch} && exec "$@"', "sh"]

    if subprocess.run([*inside("48k"), "true"], capture_output=True, check=False).returncode:
        pytest.skip("no user namespaces here: no file system of our own can be mounted")
    # One attempt: a worker that is started while TMPDIR is full takes another folder, as Python's tempfile does.
    words = ["--samples-per-shard", "2048", "--micro-batch", "256", "--max-attempts", "1"]
    given = {"teacher": "python:strange_teachers:filling_teacher", "TMPDIR": str(scratch), "STRANGE_FILLS": "1"}
    assert jobs.run(tmp_path / "s", *words, before=inside("48k"), **given) == 2
    assert jobs.told().splitlines()[-1].startswith(f"limbeck: {scratch}: 57.3 kB are needed, 49.2 kB are free: make")
    assert jobs.run(tmp_path / "s", *words, before=inside("400k"), **given) == 1
    told = [line for line in jobs.told().splitlines() if "nothing sealed" in line]
    assert len(told) == 1
    assert f"the scratch folder {scratch} is full (No space left on device): free it, or set TMPDIR" in told[0]
    assert jobs.run(tmp_path / "s", *words, teacher=given["teacher"]) == 0, "with room again"
    assert assert_exactly_once(tmp_path / "s", count=COUNT, holdout=HOLDOUT) == set()


@pytest.mark.faults
@pytest.mark.parametrize("step", STEPS_OF_A_DRIVER)
def test_a_driver_killed_at_one_step_is_gone_on_with(struck, tmp_path, step):
    assert struck(tmp_path / "s", step) == -signal.SIGKILL
    assert struck(tmp_path / "s") == 0
    assert_whole(tmp_path / "s", orphans=0)


def committed(store):
    store = Store.open(str(store))
    manifest = open_dataset(store).manifest
    tasks = sorted(list_committed(store, manifest.recipe_id, manifest.layout.id))
    return read_commits(store, manifest.recipe_id, manifest.layout.id, tasks)


def test_a_zombie_changes_nothing(jobs, tmp_path):
    """A worker stopped between its upload and its commit; another job does its task and seals; then it goes on."""
    store, step = tmp_path / "s", "after the upload"
    trap = {"STRANGE_STEPS": step, "STRANGE_SIGNAL": "STOP", "STRANGE_MARKER": str(tmp_path / "blow")}
    slow = jobs.start(store, "--workers", 2, teacher=SABOTAGED, **trap)
    wait_for(marker_of(step, tmp_path / "blow").exists)
    zombie = int(marker_of(step, tmp_path / "blow").read_text())
    try:
        assert jobs.run(store, teacher=SABOTAGED) == 0
        before, sealed = committed(store), open_dataset(Store.open(str(store))).manifest
        assert slow.poll() is None, "its driver waits for the stopped worker"
    finally:
        os.kill(zombie, signal.SIGCONT)
    assert slow.wait() == 0, jobs.told()
    assert committed(store) == before
    assert open_dataset(Store.open(str(store))).manifest == sealed
    assert len(assert_exactly_once(store, count=COUNT, holdout=HOLDOUT)) >= 1, "the zombie's shard, committed by nobody"


@pytest.mark.faults
def test_a_zombie_without_a_driver_changes_nothing(jobs, tmp_path):
    store, step = tmp_path / "s", "after the upload"
    trap = {"STRANGE_STEPS": step, "STRANGE_SIGNAL": "STOP", "STRANGE_MARKER": str(tmp_path / "blow")}
    driver = jobs.start(store, "--workers", 2, teacher=SABOTAGED, **trap)
    wait_for(marker_of(step, tmp_path / "blow").exists)
    zombie = int(marker_of(step, tmp_path / "blow").read_text())
    driver.kill()
    try:
        assert jobs.run(store, teacher=SABOTAGED) == 0
        before = committed(store)
    finally:
        os.kill(zombie, signal.SIGCONT)
    wait_for(lambda: not is_running(zombie))
    assert committed(store) == before
    assert len(assert_exactly_once(store, count=COUNT, holdout=HOLDOUT)) >= 1


def is_running(pid):
    """Whether a process that isn't our child is there and not a corpse that waits for its parent."""
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.faults
@pytest.mark.parametrize("drivers", [2, 3])
def test_drivers_at_once_on_one_folder(jobs, tmp_path, drivers):
    beside = [jobs.start(tmp_path / "s", "--workers", 2) for _ in range(drivers)]
    assert [driver.wait() for driver in beside] == [0] * drivers, jobs.told()
    assert_exactly_once(tmp_path / "s", count=COUNT, holdout=HOLDOUT)

"""A driver says that it lives, whatever the store says to that."""

import threading
import time

import pytest

import limbeck.pipeline.job.heartbeat
from limbeck.pipeline.job.heartbeat import Pulse
from limbeck.storage_schemas import paths
from limbeck.storage_schemas.errors import StoreError
from limbeck.storage_schemas.job import Heartbeat
from limbeck.storage_schemas.store import Store


@pytest.fixture
def store(tmp_path):
    return Store.create(str(tmp_path))


def last(store, job="job"):
    data = store.read(paths.heartbeat_path(job))
    return Heartbeat.from_bytes(data, "heartbeat") if data else None


def wait_until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_it_beats_until_its_last_word(store, monkeypatch):
    times = iter(f"2026-01-01T00:{minute // 60:02d}:{minute % 60:02d}+00:00" for minute in range(3600))
    monkeypatch.setattr(limbeck.pipeline.job.heartbeat, "utc_now", lambda: next(times))
    pulse = Pulse(store, every=0.01)
    assert last(store) is None, "a job that has nothing to do leaves nothing"
    pulse.begin("job")
    assert last(store).state == "planning"
    pulse.say("running", found=7)
    said = last(store)
    wait_until(lambda: last(store).at > said.at)
    assert (said.state, last(store).found) == ("running", 7)
    pulse.end("sealed")
    final = last(store)
    assert (final.state, final.found) == ("sealed", 7)
    wait_until(lambda: not any(thread.name == "heartbeat" for thread in threading.enumerate()))
    assert last(store) == final


def test_a_job_that_never_began_says_nothing_at_its_end(store):
    Pulse(store).end("failed")
    assert store.list(paths.JOBS) == []


def test_a_store_that_refuses_it_does_the_job_no_harm(store, monkeypatch):
    refused = []

    def refuse(self, path, data):
        refused.append(path)
        raise (StoreError("full") if len(refused) % 2 else OSError("reset"))

    monkeypatch.setattr(Store, "write", refuse)
    pulse = Pulse(store, every=0.01)
    pulse.begin("job")
    pulse.say("running")
    wait_until(lambda: len(refused) > 5)
    monkeypatch.undo()
    pulse.end("failed")
    assert last(store).state == "failed"


def test_the_next_job_of_a_driver_ends_the_one_before_it(store):
    pulse = Pulse(store, every=3600)
    pulse.begin("first")
    pulse.say("running", found=3)
    pulse.begin("second")
    assert [(last(store, job).state, last(store, job).found) for job in ("first", "second")] == [
        ("ended", 3),
        ("planning", 0),
    ]
    pulse.end("failed")
    assert last(store, "second").state == "refused", "it has checked nothing"
    assert last(store, "first").state == "ended"

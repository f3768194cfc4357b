"""Whoever sleeps between any two steps and wakes hours later breaks nothing: drivers, prunes, a worker's commit.

The protocol is real and the clock is simulated, for the programs and for the storage: it goes on while one sleeps.
"""

import random
import secrets
from datetime import UTC, datetime, timedelta

import fsspec
import pytest

import limbeck.pipeline.upkeep.sweep
from limbeck.pipeline.generate import carry_out
from limbeck.pipeline.upkeep.prune import prune
from limbeck.pipeline.windows import Wanted
from limbeck.storage_schemas.commit import Task
from limbeck.storage_schemas.dataset import open_dataset
from limbeck.storage_schemas.errors import StoreError, UserError
from limbeck.storage_schemas.job import Pin
from limbeck.storage_schemas.manifest import Window
from limbeck.storage_schemas.store import Store
from tests.pipeline.handmade import (
    SIZE,
    Stepper,
    WatchedStore,
    check_served,
    commit_task,
    new_run,
    seal_window,
    solve_by_hand,
)

BEGAN = datetime(2026, 1, 1, tzinfo=UTC)
HOUR = timedelta(hours=1)


class Clock:
    """The time of everybody."""

    def __init__(self):
        self.now = BEGAN

    def sleep(self, hours):
        self.now += hours * HOUR


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()

    class Simulated(datetime):
        @classmethod
        def now(cls, tz=None):
            return clock.now

    monkeypatch.setattr("limbeck.storage_schemas.clock.datetime", Simulated)
    monkeypatch.setattr("fsspec.implementations.memory.datetime", Simulated)
    monkeypatch.setattr("limbeck.pipeline.generate.solve_missing", solve_by_hand)
    monkeypatch.setattr(limbeck.pipeline.upkeep.sweep, "THREADS", 1)
    monkeypatch.setattr("limbeck.pipeline.job.heartbeat.EVERY", 10.0**6)
    return clock


@pytest.fixture
def uri():
    name = secrets.token_hex(6)
    yield f"memory://{name}/store"
    forget(name)


def forget(name):
    files = fsspec.filesystem("memory").store
    for path in [path for path in files if path.startswith(f"/{name}/")]:
        del files[path]


def drive(store, train, dataset):
    return carry_out(new_run(store, 1, dataset=dataset), lambda parent, recipe_id: Wanted(Window(train=train)))


def grows(store):
    """It needs a stale task of nobody's, one that main shows, and new ones."""
    return drive(store, (12, 32), "main")


def begins(store):
    """A dataset that nobody has begun, of the same tasks."""
    return drive(store, (20, 32), "third")


def prunes(store):
    return prune(store, keep=1, grace=timedelta())


ACTORS = [grows, begins, prunes]


def lay_out(uri, clock):
    """main shows tasks 2 and 3 and has a floor that is due; nobody names tasks 0, 1 and 7, of two days ago."""
    forget(uri.split("/")[2])
    clock.now = BEGAN
    store = Store.create(uri)
    seal_window(store, (0, 8), at=BEGAN.isoformat())
    seal_window(store, (8, 16), at=BEGAN.isoformat())
    commit_task(store, Task("train", 7, SIZE), at=BEGAN.isoformat())
    clock.sleep(48)
    assert prunes(store).floors
    clock.sleep(1)
    return store


def check(store, result):
    """Every manifest that is served shows all that it names; a driver has sealed, or was told why not in one line."""
    check_served(store)
    if isinstance(result, Exception):
        assert isinstance(result, UserError), result
        assert "\n" not in str(result)


def check_goes_on(store, clock):
    """What comes after finds nothing in its way: the same datasets, after a last sweep."""
    clock.sleep(30)
    prunes(store)
    clock.sleep(1)
    prunes(store)
    check_served(store)
    for dataset in ("main", "third"):
        assert drive(store, (12, 40), dataset).what in ("sealed", "nothing")
    check_served(store)
    assert {open_dataset(store, name).manifest.window.train for name in ("main", "third")} == {(12, 40)}


DAYS = {
    "two prunes, and a driver of another dataset": lambda store, clock: [
        clock.sleep(3), prunes(store), clock.sleep(3), prunes(store), drive(store, (16, 32), "again"), prunes(store),
    ],
    "a driver that takes the place, and two prunes": lambda store, clock: [
        clock.sleep(3), drive(store, (24, 32), "again"), clock.sleep(2), prunes(store), clock.sleep(2), prunes(store),
    ],
    "a day and a half, two prunes": lambda store, clock: [
        clock.sleep(36), prunes(store), clock.sleep(36), prunes(store),
    ],
    "others move on in the same dataset": lambda store, clock: [
        clock.sleep(3), drive(store, (16, 24), "main"), prunes(store), clock.sleep(3), prunes(store),
        drive(store, (20, 28), "main"), clock.sleep(3), prunes(store), prunes(store),
    ],
}  # fmt: skip


def sleeps_at(uri, clock, act, step, day):
    """Whether `act` has so many steps: it sleeps at the last of them, for the day of others."""
    store = lay_out(uri, clock)
    sleeper = Stepper(uri, act)
    goes_on = sleeper.advance(step)
    if goes_on:
        day(store, clock)
        check_served(store)
    check(store, sleeper.finish())
    return goes_on


EACH = pytest.param(1, marks=[pytest.mark.faults, pytest.mark.timeout(900)])


@pytest.mark.parametrize("stride", [12, EACH])
@pytest.mark.parametrize("day", DAYS.values(), ids=DAYS)
@pytest.mark.parametrize("act", ACTORS)
def test_one_sleeps_at_every_step(uri, clock, act, day, stride):
    step = random.Random(f"{act.__name__} {stride}").randint(1, stride)
    while sleeps_at(uri, clock, act, step, day):
        if step % 10 == 0:
            check_goes_on(Store(uri), clock)
        step += stride
    assert step > 30


def steps_of(uri, clock, act):
    lay_out(uri, clock)
    sleeper, steps = Stepper(uri, act), 1
    while sleeper.advance(1):
        steps += 1
    return steps


def slides(store):
    """Another driver of main, which needs what the first one needs, and more."""
    return drive(store, (16, 36), "main")


@pytest.mark.parametrize("pairs", [4, pytest.param(40, marks=[pytest.mark.faults, pytest.mark.timeout(900)])])
@pytest.mark.parametrize("second", [slides, begins, prunes])
@pytest.mark.parametrize("first", ACTORS)
def test_two_sleep_at_any_pair_of_steps(uri, clock, first, second, pairs):
    rng = random.Random(f"{first.__name__} {second.__name__}")
    most = steps_of(uri, clock, first), steps_of(uri, clock, second)
    for _ in range(pairs):
        store = lay_out(uri, clock)
        sleepers = Stepper(uri, first), Stepper(uri, second)
        for sleeper, steps in zip(sleepers, most, strict=True):
            sleeper.advance(rng.randint(1, steps))
            clock.sleep(rng.choice([2, 13, 30]))
        day = rng.choice(list(DAYS))
        DAYS[day](store, clock)
        check_served(store)
        for sleeper in rng.sample(sleepers, 2):
            check(store, sleeper.finish())
            if rng.random() < 0.5:
                clock.sleep(3)
                prunes(store)
        check_goes_on(store, clock)


def test_a_floor_that_was_written_down_long_before_it_was_taken_counts_from_then(uri, clock):
    """A prune sleeps for two days between noting the times of a floor of one day and sealing it."""
    store = Store.create(uri)
    for train in ((0, 8), (8, 16)):
        seal_window(store, train, at=BEGAN.isoformat())

    def sets_a_floor(store):
        return prune(store, keep=1, grace=24 * HOUR)

    slept = []

    def sleep(operation, path):
        if operation == "put_if_absent" and "/manifests/" in path and not slept:
            slept.append(path)
            clock.sleep(48)

    assert sets_a_floor(WatchedStore(uri, sleep)).floors
    clock.sleep(23)
    assert (prunes(store).swept.files, len(open_dataset(store, number=1).table)) == ({}, 2)
    clock.sleep(2)
    assert prunes(store).swept.files["manifests"] == 1


@pytest.mark.parametrize("ahead", [11 * 60, -11 * 60])
def test_a_clock_that_is_not_the_storages_is_refused(uri, clock, monkeypatch, ahead):
    """Pins and grace go by time: a machine whose clock is ahead would delete what is held."""
    store = lay_out(uri, clock)
    store.write(
        "pins/reader.json",
        Pin(run="reader", dataset="main", number=1, expires_at="2026-01-04T00:00:00+00:00").to_bytes(),
    )
    monkeypatch.setattr("limbeck.storage_schemas.clock.utc", lambda: clock.now + timedelta(seconds=ahead))
    for module in ("limbeck.pipeline.job.driver", "limbeck.pipeline.upkeep.prune"):
        monkeypatch.setattr(f"{module}.utc", lambda: clock.now + timedelta(seconds=ahead))
    told = rf"the clock of this machine is 0:11:00 {'ahead of' if ahead > 0 else 'behind'} that of memory://"
    for act in (prunes, grows):
        with pytest.raises(StoreError, match=told):
            act(store)
    assert store.list("jobs") == []

"""`prune` deletes all that nothing names and nothing else, whatever the others do at any point of it."""

import random
import secrets
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import fsspec
import pytest

import limbeck.pipeline.upkeep.sweep
from limbeck.pipeline.generate import carry_out
from limbeck.pipeline.job.kept import Lapsed, adoptable, check_held
from limbeck.pipeline.job.targets import Place, read_targets
from limbeck.pipeline.upkeep.prune import prune
from limbeck.pipeline.windows import Wanted, grow
from limbeck.storage_schemas import paths
from limbeck.storage_schemas.commit import Task, list_committed, list_records, read_commit
from limbeck.storage_schemas.dataset import Pruned, latest_manifest, latest_number, list_numbers, open_dataset
from limbeck.storage_schemas.errors import StoreError, UserError
from limbeck.storage_schemas.job import Heartbeat, Job, Pin, Prune
from limbeck.storage_schemas.manifest import Window
from limbeck.storage_schemas.shards import Shard
from limbeck.storage_schemas.store import Listed, Store
from tests.forged import relist
from tests.pipeline.handmade import (
    LAYOUT,
    OTHER,
    RECIPE,
    SIZE,
    Stepper,
    WatchedStore,
    ago,
    check_served,
    commit_task,
    make_recipe,
    new_run,
    seal_window,
    solve_by_hand,
)

NOW = datetime.now(UTC).replace(microsecond=0)
WEEK = timedelta(days=7)
PLACE = (RECIPE.id, LAYOUT.id)
OLD = "00000000deadbeef"
"""In the names of old files."""


@pytest.fixture(autouse=True)
def by_hand(monkeypatch):
    """Drivers solve by hand, sweeps go one by one, and files are as old as their name says."""
    monkeypatch.setattr("limbeck.pipeline.generate.solve_missing", solve_by_hand)
    monkeypatch.setattr(limbeck.pipeline.upkeep.sweep, "THREADS", 1)
    monkeypatch.setattr(Store, "list_details", aged(Store.list_details))
    monkeypatch.setattr(Store, "modified", lambda store, path: None)  # the clock is simulated, the storage's isn't


def aged(list_details):
    def listed(store, folder, **hidden):
        return [Listed(it.name, it.size, NOW - timedelta(days=30) if OLD in it.name else NOW)
                for it in list_details(store, folder, **hidden)]  # fmt: skip

    return listed


@pytest.fixture
def uri():
    name = secrets.token_hex(6)
    yield f"memory://{name}/store"
    fsspec.filesystem("memory").rm(f"/{name}", recursive=True)


def prune_at(store, when=NOW, *, keep=1, grace=WEEK, dry_run=False):
    return prune(store, keep=keep, grace=grace, dry_run=dry_run, clock=lambda: when)


def old_store(uri):
    """main: manifests 1 and 2 below the due floor 3, tasks 0, 1 and 7 of nobody; `second` shows tasks 2 and 3 too."""
    store = Store.create(uri)
    month = ago(NOW, days=30)
    for stop in (8, 12, 16):
        seal_window(store, (stop - 8, stop), at=month)
    commit_task(store, Task("train", 7, SIZE), at=month)
    seal_window(store, (8, 16), dataset="second", at=month)
    store.write(f"{paths.shards_folder(*PLACE)}/train-00000002-{OLD}.parquet", b"of an attempt that lost")
    store.write(f"{paths.shards_folder(*PLACE)}/train-00000009-{OLD}.parquet", b"of an attempt that died")
    store.write(paths.pin_path("gone"), pin("gone", 1, ago(NOW, days=1)))
    announce(store, "20260101T000000-00000000", (28, 32), "running", ago(NOW, days=20))
    done = prune_at(store, NOW - timedelta(days=10))
    assert [(it["dataset"], it["manifest"], it["floor"]) for it in done.floors] == [("main", 4, 3)]
    assert done.swept.files == {"orphans": 2}
    store.write(f"{paths.shards_folder(*PLACE)}/train-00000002-{OLD}.parquet", b"of an attempt that lost")
    return store


def test_what_killed_writers_left_in_a_folder_goes_once_it_is_old(tmp_path):
    store = Store.create(str(tmp_path))
    commit_task(store, Task("train", 0, SIZE))
    left = [f"{paths.commits_folder(*PLACE)}/.train-00000000.json.{age:>032}.tmp" for age in (OLD, "1")]
    for path in left:
        (tmp_path / path).write_bytes(b"half a comm")
    assert prune(store, keep=1, grace=WEEK).swept.files == {"unfinished": 1}
    assert [(tmp_path / path).exists() for path in left] == [False, True]


def pin(run, number, expires_at):
    return Pin(run=run, dataset="main", number=number, expires_at=expires_at).to_bytes()


def announce(store, job, train, state, at, recipe=RECIPE):
    document = Job(
        job=job, dataset="main", recipe_id=recipe.id, layout=LAYOUT, window=Window(train=train), parent=0,
        tasks_total=1, tasks_missing=1, runner="local", workers=1, started_at=at,
    )  # fmt: skip
    store.write(paths.job_path(job), document.to_bytes())
    store.write(paths.heartbeat_path(job), Heartbeat(at=at, state=state).to_bytes())


def tasks_of(store):
    return {int(name[-2:]) for name in list_committed(store, *PLACE)}


def shards_of(store):
    return {name[12:14] for name in store.list(paths.shards_folder(*PLACE))}


def test_a_sweep_takes_what_nothing_names_and_nothing_else(uri):
    store = old_store(uri)
    assert tasks_of(store) == {0, 1, 2, 3, 7}
    done = prune_at(store)
    assert done.swept.files == {"commits": 3, "shards": 3, "manifests": 2, "tables": 2, "orphans": 1, "pins": 1}
    assert (tasks_of(store), list_numbers(store, "main")) == ({2, 3}, [3, 4])
    assert len(store.list(paths.shards_folder(*PLACE))) == 2
    assert len([name for name in store.list(paths.manifests_folder("main")) if name.endswith(".parquet")]) == 1
    check_served(store)
    assert (done.floors, done.due_at) == ([], None), "nothing is left that a floor would free"
    before = everything(store)
    again = prune_at(store, NOW + timedelta(days=40))
    assert (again.swept.files, again.floors) == ({}, [])
    assert everything(store) - before == {f"{uri}/prunes/000003.json".split("://")[1]}
    with pytest.raises(Pruned, match=r"manifest 2 of 'main' .* was pruned \(floor 3\): open the latest, 4"):
        open_dataset(store, number=2)


def everything(store):
    root = store.uri.split("://")[1]
    return {path.lstrip("/") for path in fsspec.filesystem("memory").find(f"/{root}")}


def test_a_dry_run_tells_the_same_and_writes_nothing(uri):
    store = old_store(uri)
    store.write(paths.pin_path("reader"), pin("reader", 2, ago(NOW, days=-1)))
    commit_task(store, Task("train", 8, SIZE), at=ago(NOW, hours=2))
    before = everything(store)
    told = prune_at(store, dry_run=True)
    assert everything(store) == before
    assert [paths.task_of(Path(path).stem) for path in told.later.paths] == ["train-00000008"]
    done = prune_at(store)
    assert (told.swept.files, told.swept.bytes) == (done.swept.files, done.swept.bytes)
    files = told.swept.files
    assert len(told.swept.paths) == sum(files.values()) + files["commits"], "a commit lies in two places"
    assert done.floors == [{"dataset": "main", "manifest": 5, "floor": 3}], "it only marks the time"


def test_floors_are_set_only_where_they_free_something_and_one_at_a_time(uri):
    store = Store.create(uri)
    for stop in (8, 12, 16, 20):
        seal_window(store, (stop - 8, stop), at=ago(NOW, days=30))
    seal_window(store, (0, 8), dataset="second", at=ago(NOW, days=30))
    done = prune_at(store, NOW - timedelta(days=9))
    assert done.floors == [{"dataset": "main", "manifest": 5, "floor": 4}]
    waiting = prune_at(store, NOW - timedelta(days=3))
    assert (waiting.floors, waiting.due_at) == ([], ago(NOW, days=2))
    assert tasks_of(store) == {0, 1, 2, 3, 4}
    done = prune_at(store)
    # Tasks 0 and 1 are the second dataset's; manifests 4 and 5 of main show 3 and 4.
    assert (tasks_of(store), done.floors) == ({0, 1, 3, 4}, [])
    check_served(store)


def test_views_are_kept_not_the_manifests_that_set_floors(uri):
    """However often it is pruned, the newest two windows stay."""
    store = Store.create(uri)
    for stop in (8, 12, 16, 20):
        seal_window(store, (stop - 8, stop), at=ago(NOW, days=90))
    for night in range(60, 0, -8):
        commit_task(store, Task("train", 20 + night, SIZE), at=ago(NOW, days=night))
        prune_at(store, NOW - timedelta(days=night) + timedelta(hours=1), keep=2)
        windows = {open_dataset(store, number=it).manifest.window.train for it in list_numbers(store, "main")}
        assert windows >= {(8, 16), (12, 20)}
    assert windows == {(8, 16), (12, 20)}
    check_served(store)


def test_a_store_that_nobody_sealed_is_left_alone(uri):
    store = Store.create(uri)
    commit_task(store, Task("train", 0, SIZE), at=ago(NOW, days=30))
    done = prune_at(store)
    assert (done.swept.files, done.floors, tasks_of(store)) == ({}, [], {0})


def test_pins_and_jobs_hold_what_they_name(uri):
    store = old_store(uri)
    store.write(paths.pin_path("reader"), pin("reader", 1, ago(NOW, days=-1)))
    announce(store, "20260102T000000-00000000", (28, 32), "failed", ago(NOW, days=6))
    prune_at(store)
    assert (tasks_of(store), list_numbers(store, "main")) == ({0, 1, 2, 3, 7}, [1, 3, 4])
    for shard in open_dataset(store, number=1).table:
        open_dataset(store, number=1).read(shard)
    later = NOW + timedelta(days=9)
    prune_at(store, later)  # the pin has expired, the job is silent: the floor of long ago allows it
    assert (tasks_of(store), list_numbers(store, "main")) == ({2, 3}, [3, 4])


@pytest.mark.parametrize("state", ["sealed", "ended", "refused"])
def test_a_job_that_is_over_holds_nothing(uri, state):
    store = old_store(uri)
    announce(store, "20260102T000000-00000000", (28, 32), state, ago(NOW, days=1))
    prune_at(store)
    assert tasks_of(store) == {2, 3}


def test_documents_of_silent_jobs_go_but_for_the_newest(uri):
    store = old_store(uri)
    store.write(paths.failure_path("20260101T000000-00000000", "train-00000007"), b"{}")
    announce(store, "20260102T000000-00000000", (28, 32), "sealed", ago(NOW, days=8))
    announce(store, "20260103T000000-00000000", (28, 32), "sealed", ago(NOW, days=8))
    assert prune_at(store).swept.files["jobs"] == 6, "one has a mark"
    assert store.list(paths.JOBS) == ["20260103T000000-00000000"]


def test_another_recipes_shards_go_with_its_last_manifest_and_its_weights_with_them(uri):
    store = Store.create(uri)
    seal_window(store, (0, 8), at=ago(NOW, days=30))
    store.write(f"{paths.weights_folder(RECIPE.id)}/{OLD}.safetensors", b"weights")
    seal_window(store, (0, 8), at=ago(NOW, days=30), recipe=OTHER)
    prune_at(store, NOW - timedelta(days=10), keep=1)
    done = prune_at(store, keep=1)
    assert done.swept.files == {"commits": 2, "shards": 2, "manifests": 1, "tables": 1, "weights": 1}
    assert not list_committed(store, *PLACE)
    assert store.exists(paths.recipe_path(RECIPE.id)), "small, and it tells what was"
    assert len(list_committed(store, OTHER.id, LAYOUT.id)) == 2
    check_served(store)


def test_a_commit_as_young_as_the_floor_stays(uri):
    store = old_store(uri)
    commit_task(store, Task("train", 8, SIZE), at=ago(NOW, days=10))
    commit_task(store, Task("train", 9, SIZE), at=ago(NOW, days=10, seconds=1))
    prune_at(store)
    assert tasks_of(store) == {2, 3, 8}


def test_one_prune_at_a_time(uri):
    store = old_store(uri)
    lease = Prune(run="other", machine="there", at=ago(NOW, minutes=59))
    store.write(paths.prune_path(9), lease.to_bytes())
    with pytest.raises(StoreError, match=r"another prune of .* is at work on there"):
        prune_at(store)
    assert tasks_of(store) == {0, 1, 2, 3, 7}
    assert prune_at(store, NOW + timedelta(minutes=2)).swept.files["commits"] == 3
    assert store.list(paths.PRUNES) == ["000010.json"]


def test_a_prune_that_was_taken_for_dead_stops(uri):
    old_store(uri)
    minutes = iter(range(0, 10_000, 3))
    taken = []

    def take_over(operation, path):
        if operation == "remove" and not taken:
            taken.append(path)
            rival = Prune(run="other", machine="there", at=ago(NOW, minutes=-90))
            Store(uri).write(paths.prune_path(9), rival.to_bytes())

    store = WatchedStore(uri, take_over)
    with pytest.raises(StoreError, match="was held up"):
        prune(store, keep=1, grace=WEEK, clock=lambda: NOW + timedelta(minutes=next(minutes)))


# What a driver may build on.


def aim_at(train):
    return lambda parent, recipe_id: Wanted(Window(train=train))


def drive(store, train, **options):
    return carry_out(new_run(store, 1, **options), aim_at(train))


def test_a_driver_builds_on_young_commits_and_on_served_ones_but_not_on_stale_ones(uri):
    store = old_store(uri)
    stale = read_commit(store, *PLACE, "train-00000007")
    assert drive(store, (24, 32)).run == 2, "that of task 7 is nobody's: a prune may be deleting it"
    assert drive(store, (8, 16), dataset="third").run == 0, "main serves them"
    prune_at(store)
    assert tasks_of(store) == {2, 3, 6, 7}
    assert not store.exists(stale.path)
    check_served(store)


@pytest.mark.parametrize("state", ["running", "failed", "stopped"])
def test_a_driver_goes_on_with_a_job_of_a_week_that_died_lately(uri, state):
    """Its first commits are older than a floor that came due meanwhile."""
    store = old_store(uri)
    announce(store, "20260102T000000-00000000", (28, 32), state, ago(NOW, days=1))
    assert drive(store, (28, 32), dataset="third").run == 0
    prune_at(store)
    assert tasks_of(store) == {2, 3, 7}


@pytest.mark.parametrize("state", ["planning", "refused", "ended"])
def test_a_job_that_has_not_checked_what_it_builds_on_vouches_for_nothing(uri, state):
    store = old_store(uri)
    announce(store, "20260102T000000-00000000", (28, 32), state, ago(NOW, minutes=1))
    assert drive(store, (28, 32), dataset="third").run == 1


def test_nobody_builds_on_what_a_sweep_may_take_within_ten_minutes(uri):
    """Clocks differ: a driver whose clock is ten minutes behind must not build on what is being deleted."""
    store = Store.create(uri)
    seal_window(store, (0, 8), at=ago(NOW, days=30))
    commit_task(store, Task("train", 7, SIZE), at=ago(NOW, days=30))
    prune_at(store, NOW - WEEK + timedelta(minutes=9))
    assert drive(store, (28, 32), dataset="third").run == 1


def test_a_driver_goes_on_until_shortly_before_the_sweep(uri):
    store = Store.create(uri)
    seal_window(store, (0, 8), at=ago(NOW, days=30))
    commit_task(store, Task("train", 7, SIZE), at=ago(NOW, days=30))
    prune_at(store, NOW - WEEK + timedelta(minutes=20))
    assert drive(store, (28, 32), dataset="third").run == 0


@pytest.mark.parametrize(("kinds", "again"), [(["record_path", "commit_path"], [[5]]), (["record_path"], [])])
def test_a_driver_whose_commits_vanish_before_it_seals_looks_again(uri, monkeypatch, kinds, again):
    """By somebody's hand: a record is put again from its commit, and what has neither is solved again."""
    store = old_store(uri)
    seen = []

    def vanish(run, tasks):
        solve_by_hand(run, tasks)
        seen.append([task.index for task in tasks])
        if len(seen) == 1:
            commit = read_commit(store, *PLACE, tasks[1].name)
            for kind in kinds:
                store.remove(getattr(commit, kind))

    monkeypatch.setattr("limbeck.pipeline.generate.solve_missing", vanish)
    assert drive(store, (16, 24)).run == 2
    assert seen == [[4, 5], *again]
    check_served(store)


def test_a_floor_that_comes_due_and_is_followed_by_another_hides_no_deletion(uri):
    """A prune that began before the job was announced ends, and sets its next floor, while the driver looks."""
    store = old_store(uri)
    commit_task(store, Task("train", 8, SIZE), at=ago(NOW, hours=2))  # so that there is another floor to set
    read = []

    def prune_now(operation, path):
        if path.endswith("train-00000007.json"):
            read.append(path)
        elif len(read) == 1:
            read.append(path)
            assert prune_at(store).floors

    assert not adoptable(WatchedStore(uri, prune_now), "job", Place(*PLACE), ["train-00000007"])
    assert len(read) == 2
    assert 7 not in tasks_of(store)


@pytest.mark.parametrize(
    ("winner", "what", "states"), [((8, 16), "sealed", ["ended", "sealed"]), ((16, 24), "nothing", ["ended"])]
)
def test_each_plan_is_a_job_of_its_own_which_goes_on_with_what_the_last_one_held(
    uri, monkeypatch, winner, what, states
):
    store = old_store(uri)

    def beaten(run, tasks):
        solve_by_hand(run, tasks)
        seal_window(store, winner, at=ago(NOW))
        monkeypatch.setattr("limbeck.pipeline.generate.solve_missing", None)

    monkeypatch.setattr("limbeck.pipeline.generate.solve_missing", beaten)
    known = len(read_targets(store))
    assert drive(store, (16, 24)).what == what
    assert [target.beat.state for target in read_targets(store)[known:]] == states
    check_served(store)


def test_a_job_that_woke_up_while_a_prune_sweeps_stays_known(uri):
    store = old_store(uri)
    name = "20260101T000000-00000000"
    announce(store, "20260102T000000-00000000", (28, 32), "sealed", ago(NOW, days=8))

    def wake(operation, path):
        if operation == "remove" and "/manifests/" in path:
            announce(Store(uri), name, (28, 32), "running", ago(NOW))

    prune_at(WatchedStore(uri, wake))
    assert store.list(paths.JOBS) == [name, "20260102T000000-00000000"]


def test_a_driver_that_was_taken_for_dead_looks_again(uri, monkeypatch):
    store = old_store(uri)
    seen = []

    def sleep_after(run, tasks):
        solve_by_hand(run, tasks)
        seen.append([task.index for task in tasks])
        if len(seen) == 1:  # the machine is suspended, and a prune takes the job for dead
            prune_at(store, datetime.now(UTC) + timedelta(days=8))

    monkeypatch.setattr("limbeck.pipeline.generate.solve_missing", sleep_after)
    asked = []
    watched = WatchedStore(uri, lambda operation, path: asked.append(path))
    assert drive(watched, (16, 24)).run == 2
    assert seen == [[4, 5]]
    read = [path for path in asked if "/commits/train-" in path]
    assert len(read) >= 4, "both are read by the solver, and again when the job knows that it was taken for dead"
    check_served(store)


# Everyone else at every point of a prune, and a prune at every point of everyone else.


def plans(store):
    """A driver that needs a stale task, and new ones."""
    return drive(store, (12, 32))


def seals(store):
    """A driver that grows by what is new."""
    return carry_out(new_run(store, 1), lambda parent, recipe_id: Wanted(grow(parent, recipe_id, count=16, holdout=0)))


def shares(store):
    """A driver that begins a dataset of what others have solved."""
    return drive(store, (8, 20), dataset="third")


def reads(store, number=None):
    """A reader that opens, pins and reads."""
    dataset = open_dataset(store, number=number)
    store.write(paths.pin_path("reader"), pin("reader", dataset.manifest.number, ago(NOW, days=-7)))
    return [dataset.read(shard)["sample_id"].tolist() for shard in dataset.table]


def reads_below_the_floor(store):
    return reads(store, 2)


def prunes_at_once(store):
    return prune_at(store, keep=1, grace=timedelta())


def prunes_twice(store):
    prunes_at_once(store)
    return prunes_at_once(store)


RIVALS = [plans, seals, shares, reads, reads_below_the_floor, prunes_at_once]


def check(store, rival, result):
    """After it all: nothing lies, and the rival has done its part or was told in one line why not."""
    check_served(store)
    if isinstance(result, Exception):
        assert isinstance(result, UserError), result
        assert "\n" not in str(result)
    if rival is plans:
        assert latest_manifest(store, "main").window.train == (12, 32)
    elif rival in (seals, shares):
        assert not isinstance(result, Exception), result
    elif rival in (reads, reads_below_the_floor):
        assert isinstance(result, Pruned) or len(result) == 2, result
    elif rival is prunes_at_once:
        assert not isinstance(result, Exception) or "another prune" in str(result)


def floorless_store(uri):
    """main shows tasks 1 and 2, as its first manifest; task 7 is nobody's yet, of a job that died long ago."""
    store = Store.create(uri)
    seal_window(store, (4, 12), at=ago(NOW, days=30))
    commit_task(store, Task("train", 7, SIZE), at=ago(NOW, days=30))
    return store


def snapshot(uri, make=old_store):
    """A store's files, to lay it out again in no time."""
    store = make(uri)
    return {path: store.read(path) for path in (path.partition("/store/")[2] for path in everything(store))}


def lay_out(uri, files):
    """A store of these files and no other: memory:// looks through all its keys to list a folder."""
    memory = fsspec.filesystem("memory")
    memory.rm(uri.removeprefix("memory:/"), recursive=True)
    memory.pipe({f"{uri.removeprefix('memory:/')}/{path}": data for path, data in files.items()})


EVERY = [3, pytest.param(1, marks=pytest.mark.faults)]
"""Third points in the quick tests, each one in the others."""


def at_every_point(place, act, rival, *, steps, stride=1, make=old_store):
    """`rival` does `steps(k)` operations at the k-th operation of `act` and the rest after it, for every k."""
    files = snapshot(place, make)
    k = 0
    while True:
        lay_out(place, files)
        other = Stepper(place, rival)
        count = iter(range(10**6))

        def hook(operation, path, k=k, count=count, other=other):
            if next(count) == k:
                other.advance(steps(k))

        try:
            outcome = act(WatchedStore(place, hook))
        except UserError as error:
            outcome = error
        result = other.finish()
        check(Store(place), rival, result)
        if act is not prune_at:
            check(Store(place), act, outcome)
        else:
            assert not isinstance(outcome, Exception) or rival is prunes_at_once, outcome
        k += stride
        if next(count) < k:
            return k


ALL = 10**6


@pytest.mark.parametrize("stride", EVERY)
@pytest.mark.parametrize("rival", RIVALS)
def test_everyone_at_every_point_of_a_prune(uri, rival, stride):
    assert at_every_point(uri, prune_at, rival, steps=lambda k: ALL, stride=stride) > 40


@pytest.mark.parametrize("stride", EVERY)
@pytest.mark.parametrize("act", RIVALS)
def test_a_prune_at_every_point_of_everyone(uri, act, stride):
    assert at_every_point(uri, act, prune_at, steps=lambda k: ALL, stride=stride) > 5


@pytest.mark.parametrize("stride", EVERY)
@pytest.mark.parametrize("act", [plans, seals, reads])
def test_floors_set_and_swept_at_once_at_every_point_of_everyone(uri, act, stride):
    """With no grace at all, and two in a row: only heartbeats and pins hold anything."""
    assert at_every_point(uri, act, prunes_twice, steps=lambda k: ALL, stride=stride) > 5


def begins(store):
    """A driver of another dataset, whose next number no floor takes."""
    return drive(store, (12, 32), dataset="third")


@pytest.mark.parametrize("act", [plans, begins])
def test_a_floor_set_and_swept_while_a_driver_builds_on_what_nobody_lists(uri, act):
    """Before its job is known the commit may go, and is made again; from then on it stays."""
    assert at_every_point(uri, act, prunes_twice, steps=lambda k: ALL, make=floorless_store) > 10


@pytest.mark.faults
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("rival", RIVALS)
def test_everyone_half_way_at_every_point_of_a_prune(uri, rival, seed):
    rng = random.Random(seed)
    at_every_point(uri, prune_at, rival, steps=lambda k: rng.randrange(1, 40))


def test_a_prune_that_dies_anywhere_leaves_what_the_next_one_takes(uri):
    class Killed(BaseException):
        pass

    files = snapshot(uri)
    store = Store(uri)
    k = 0
    while True:
        lay_out(uri, files)
        count = iter(range(10**6))

        def hook(operation, path, k=k, count=count):
            if next(count) >= k:
                raise Killed

        try:
            prune_at(WatchedStore(uri, hook))
        except Killed:
            check_served(store)
        else:
            break
        prune_at(store, NOW + timedelta(days=2))
        check_served(store)
        assert (tasks_of(store), list_numbers(store, "main")) == ({2, 3}, [3, 4])
        k += 2
    assert k > 40


def test_the_command(uri, pipeline, monkeypatch):
    store = old_store(uri)
    code, out, _ = pipeline("prune", uri, "--dry-run")
    assert (code, "would delete" in out, f"recipes/{RECIPE.id}" in out) == (0, True, True)
    code, out, _ = pipeline("prune", uri, "--keep-manifests", 1, "--grace", "7d")
    assert code == 0
    assert out.startswith("deleted 3 commits, 2 manifests, ")
    assert latest_number(store, "main") == 4
    code, out, _ = pipeline("prune", uri, "--json")
    assert (code, '"deleted": {}' in out) == (0, True)
    assert make_recipe().id == RECIPE.id


def test_what_an_older_release_listed_by_its_task_stays_when_a_newer_manifest_that_shares_it_goes(uri):
    """A driver gives the commit a record; that one is nobody's later, but the older table still names the task."""
    store = Store.create(uri)
    seal_window(store, (4, 12), at=ago(NOW, days=30))
    relist(store, lambda shard: replace(shard, commit_path=paths.commit_path(*PLACE, shard.task)))
    for record in list_records(store, *PLACE):
        store.remove(f"{paths.records_folder(*PLACE)}/{record}.json")
    check_served(store)
    assert drive(store, (4, 12), dataset="third").run == 0
    assert len(list_records(store, *PLACE)) == 2
    drive(store, (16, 24), dataset="third")
    for days in (9, 18, 27):
        prune_at(store, NOW + timedelta(days=days))
    assert list_numbers(store, "third") != [1, 2], "the shared manifest went"
    check_served(store)


def test_a_stale_shard_of_a_late_worker_gives_way_to_what_stands_for_its_task(uri):
    """The worker gave back one that a prune may take; another driver has put a young one in its place."""
    store = old_store(uri)
    stale = read_commit(store, *PLACE, "train-00000007")
    shards, early = {"train-00000007": Shard.of(stale)}, {"train-00000007": stale.committed_at}
    store.remove(stale.commit_path)
    young = commit_task(store, Task("train", 7, SIZE))
    announce(store, "job", (28, 32), "running", ago(NOW))
    check_held(store, "job", Place(*PLACE), shards, early)
    assert shards == {"train-00000007": Shard.of(young)}
    store.remove(young.commit_path)
    commit_task(store, Task("train", 7, SIZE), at=stale.committed_at)
    with pytest.raises(Lapsed, match="1 commits of this job, such as train-00000007, are gone"):
        check_held(store, "job", Place(*PLACE), shards, early)
    assert shards == {}

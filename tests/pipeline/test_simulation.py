"""None lost, none double: many workers that crash, wake late and lose answers, with drivers that die and overlap."""

import random
import time

import pytest

from limbeck.storage_schemas import store as store_module
from limbeck.storage_schemas.commit import Task, list_committed
from limbeck.storage_schemas.dataset import Dataset, LostRace, latest_manifest, put_recipe, read_shard_table, seal
from limbeck.storage_schemas.layout import Layout
from limbeck.storage_schemas.manifest import ManifestDraft, Window
from limbeck.storage_schemas.recipe import NoiseRecord, Recipe, SolverRecord, TeacherRecord
from limbeck.storage_schemas.shards import Shard, ShardTable
from tests.pipeline.simulation import FATES, Cluster, drive, simulated_store, take

SIZE = 8
RECIPE = Recipe(
    teacher=TeacherRecord(uri="builtin:gaussian", weights_sha256="ab" * 32, model={}),
    solver=SolverRecord(name="ddim", steps=1, frame="sigma", grid={"name": "karras"}),
    times=(1.0, 0.0),
    alphas=(1.0, 1.0),
    sigmas=(1.0, 0.0),
    states=(0, 1),
    noise=NoiseRecord(algorithm="philox4x64-as241", version=1, seed=0),
    sample_shape=(2,),
    micro_batch=SIZE,
    numerics_version=1,
)
LAYOUT = Layout(samples_per_shard=SIZE)


@pytest.mark.parametrize(
    ("workers", "count"),
    [(200, 4_000), pytest.param(10_000, 1_000_000, marks=[pytest.mark.faults, pytest.mark.timeout(1800)])],
)
def test_none_lost_none_double(workers, count, monkeypatch):
    monkeypatch.setattr(store_module.time, "sleep", lambda seconds: None)  # a retry waits in simulated time
    started = time.monotonic()
    store, files = simulated_store(random.Random(1))
    cluster = Cluster(store, RECIPE, LAYOUT, random.Random(2))
    put_recipe(store, RECIPE)
    tasks = [Task("train", index, SIZE) for index in range(count)]

    first = drive(cluster, tasks, workers=workers)
    take(first, count * 2 // 5)
    first.close()  # the driver is killed; what its workers have in flight may still commit
    second = drive(cluster, tasks, workers=workers)
    known = take(second, count * 4 // 5)
    rival = drive(cluster, tasks, workers=workers)  # a cron that overlaps
    told = {"second": {c.task: c for c in known}, "rival": {}}
    while len(told["second"]) < count or len(told["rival"]) < count:
        for name, driver in (("second", second), ("rival", rival)):
            told[name] |= {commit.task: commit for commit in take(driver, 1000)}

    assert told["second"] == told["rival"]
    manifest = sealed_by_both(
        store, [ShardTable.of([Shard.of(commit) for commit in found.values()]) for found in told.values()], count
    )
    cluster.run_out()  # zombies commit an hour after all is sealed
    dataset = Dataset(store, manifest, RECIPE, read_shard_table(store, manifest))
    assert list_committed(store, RECIPE.id, LAYOUT.id) == {task.name for task in tasks} == dataset.table.tasks
    assert dataset.table.table["path"].to_pylist() == [told["rival"][task].path for task in tasks]
    assert {shard.task: shard.sha256 for shard in dataset.table} == {
        task.name: told["second"][task].sha256 for task in tasks
    }
    assert (dataset.ids("train").count, len(dataset.gaps("train"))) == (count * SIZE, 0)
    assert cluster.attempts.keys() == {"well", *FATES}  # all of it happened
    assert min(files.faults["lost"], files.faults["refused"], cluster.late) > 0
    print(
        f"{count} tasks on {workers} workers: {cluster.attempts.total()} attempts {dict(cluster.attempts)}, "
        f"{dict(files.faults)}, {cluster.late} came second, {time.monotonic() - started:.0f} s"
    )


def sealed_by_both(store, tables, count):
    """Two drivers with the same plan seal; one wins, the other finds that there is nothing left to do."""
    window = Window(train=(0, count * SIZE))
    draft = ManifestDraft(
        dataset="main", parent=None, writer="second", recipe_id=RECIPE.id, layout=LAYOUT, window=window
    )
    manifest = seal(store, draft, tables[0])
    with pytest.raises(LostRace):
        seal(store, draft.model_copy(update={"writer": "rival"}), tables[1])
    assert latest_manifest(store, "main") == manifest
    return manifest

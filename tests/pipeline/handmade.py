"""Stores made by hand, a millisecond a shard: tiny shards, and drivers that solve nothing but do all the rest."""

import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime, timedelta
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from limbeck.pipeline.config import GenerateConfig
from limbeck.pipeline.job.prepare import Run
from limbeck.pipeline.producer import LateAttempt, in_time
from limbeck.storage_schemas import paths
from limbeck.storage_schemas.clock import utc, utc_now
from limbeck.storage_schemas.commit import Commit, Task, is_whole, put_commit, read_commit, replace_commit
from limbeck.storage_schemas.dataset import (
    latest_manifest,
    list_numbers,
    open_dataset,
    put_recipe,
    read_shard_table,
    seal,
)
from limbeck.storage_schemas.formats import EncodedShard, encode_shard
from limbeck.storage_schemas.layout import Layout
from limbeck.storage_schemas.manifest import Manifest, ManifestDraft, Window
from limbeck.storage_schemas.recipe import NoiseRecord, Recipe, SolverRecord, TeacherRecord
from limbeck.storage_schemas.record import NO_CONDITION
from limbeck.storage_schemas.shards import SCHEMA, Shard, ShardTable
from limbeck.storage_schemas.store import Store

SIZE = 4
LAYOUT = Layout(samples_per_shard=SIZE)


def make_recipe(seed: int = 0) -> Recipe:
    return Recipe(
        teacher=TeacherRecord(uri="builtin:gaussian", weights_sha256="ab" * 32, model={"process": {"name": "ve"}}),
        solver=SolverRecord(name="ddim", steps=1, frame="sigma", grid={"name": "karras"}),
        times=(80.0, 0.0),
        alphas=(1.0, 1.0),
        sigmas=(80.0, 0.0),
        states=(0, 1),
        noise=NoiseRecord(algorithm="philox", version=1, seed=seed),
        sample_shape=(1,),
        micro_batch=SIZE,
        numerics_version=1,
    )


RECIPE, OTHER = make_recipe(), make_recipe(1)


@cache
def encoded(task: Task, recipe_id: str) -> tuple[EncodedShard, bytes]:
    ids = np.arange(task.start, task.stop)
    columns = {field.name: np.zeros((SIZE, *field.shape), field.numpy_dtype) for field in RECIPE.fields}
    columns |= {"sample_id": ids, "condition": np.full(SIZE, NO_CONDITION)}
    with tempfile.TemporaryDirectory() as folder:
        local = Path(folder) / "shard.parquet"
        shard = encode_shard(local, RECIPE.fields, columns, task=task, recipe_id=recipe_id, layout=LAYOUT)
        return shard, local.read_bytes()


def commit_task(
    store: Store,
    task: Task,
    *,
    recipe: Recipe = RECIPE,
    at: str | None = None,
    put: Callable[[Store, Commit], Commit] = put_commit,
) -> Commit:
    """Upload and commit as a worker does, at a time of its own where `at` is given."""
    shard, data = encoded(task, recipe.id)
    attempt = paths.new_attempt()
    path = paths.shard_path(recipe.id, LAYOUT.id, task.name, attempt, LAYOUT.suffix)
    store.write(path, data)
    commit = Commit(
        split=task.split,
        index=task.index,
        samples_per_shard=SIZE,
        recipe_id=recipe.id,
        layout_id=LAYOUT.id,
        attempt=attempt,
        path=path,
        bytes=shard.bytes,
        sha256=shard.sha256,
        rows=SIZE,
        chunks=shard.chunks,
        seconds=0.0,
        nfe=1,
        machine={},
        committed_at=at or utc_now(),
    )
    return put(store, commit)


def seal_window(
    store: Store, train: tuple[int, int], *, dataset: str = "main", at: str, recipe: Recipe = RECIPE
) -> Manifest:
    """The next manifest of a dataset, with this train window; what its parent lacks is committed at `at`."""
    put_recipe(store, recipe)
    parent = latest_manifest(store, dataset)
    window = Window(train=train)
    continues = parent is not None and parent.recipe_id == recipe.id
    listed = read_shard_table(store, parent) if parent and continues else ShardTable.of([])
    tasks = [task for task in window.tasks(SIZE) if task.name not in listed.tasks]
    there = [read_commit(store, recipe.id, LAYOUT.id, task.name) for task in tasks]
    new = [it or commit_task(store, task, recipe=recipe, at=at) for it, task in zip(there, tasks, strict=True)]
    draft = ManifestDraft(
        dataset=dataset, parent=parent, writer=paths.new_attempt(), recipe_id=recipe.id, layout=LAYOUT, window=window
    )
    return seal(store, draft, listed.plus(ShardTable.of([Shard.of(commit) for commit in new])))


def new_run(store: Store, count: int, *, dataset: str = "main", recipe: Recipe = RECIPE, **options: Any) -> Run:
    """A `generate` on this store, past its preparation."""
    config = GenerateConfig(
        teacher="builtin:gaussian",
        store="memory://x",
        dataset=dataset,
        count=count,
        holdout=0,
        samples_per_shard=SIZE,
        micro_batch=SIZE,
        runner="local",
        **options,
    )
    return Run(config, store, recipe, LAYOUT)


def solve_by_hand(run: Run, tasks: list[Task]) -> None:
    """In place of limbeck.pipeline.job.solving.solve_missing: each task as a worker would do it, without the solve."""
    for task in tasks:
        commit = None
        while commit is None:  # a worker that finds itself late begins again
            with suppress(LateAttempt):
                commit = _work(run, task)
        run.ledger.enter(commit)


def _work(run: Run, task: Task) -> Commit:
    first = read_commit(run.store, run.recipe.id, run.layout.id, task.name)
    if first and is_whole(run.store, first):
        return first
    begun = utc()

    def put(store: Store, commit: Commit) -> Commit:
        in_time(task, begun)
        stands = (replace_commit if first else put_commit)(store, commit)
        in_time(task, begun)
        return stands

    return commit_task(run.store, task, recipe=run.recipe, put=put)


def check_served(store: Store) -> None:
    """Every manifest from its dataset's floor on shows all that it names, byte by byte."""
    for name in store.list(paths.DATASETS):
        latest = latest_manifest(store, name)
        assert latest is not None
        for number in list_numbers(store, name):
            if number >= latest.floor.number:
                dataset = open_dataset(store, name, number)
                assert dataset.ids("train").count == np.diff(dataset.manifest.window.train)[0]
                for shard in dataset.table:
                    dataset.read(shard)


Hook = Callable[[str, str], None]


class WatchedStore(Store):
    """Calls `hook(operation, path)` before each operation."""

    hook: Hook

    def __init__(self, uri: str, hook: Hook) -> None:
        super().__init__(uri)
        self.hook = hook

    def put_if_absent(self, path: str, data: bytes) -> bytes:
        self.hook("put_if_absent", path)
        return super().put_if_absent(path, data)

    def write(self, path: str, data: bytes) -> None:
        self.hook("write", path)
        super().write(path, data)

    def remove(self, path: str) -> None:
        self.hook("remove", path)
        super().remove(path)

    def read(self, path: str, *, most: int | None = None) -> bytes | None:
        self.hook("read", path)
        return super().read(path, most=most)

    def read_ranges(self, path, ranges):  # type: ignore[no-untyped-def]
        self.hook("read_ranges", path)
        return super().read_ranges(path, ranges)

    def list(self, folder: str):  # type: ignore[no-untyped-def]
        self.hook("list", folder)
        return super().list(folder)

    def list_details(self, folder: str):  # type: ignore[no-untyped-def]
        self.hook("list", folder)
        return super().list_details(folder)

    def size(self, path: str) -> int | None:
        self.hook("size", path)
        return super().size(path)

    def modified(self, path: str) -> datetime | None:
        self.hook("modified", path)
        return super().modified(path)


class Stepper:
    """Runs an action in a thread of its own, as many store operations at a time as it is let."""

    def __init__(self, uri: str, action: Callable[[Store], Any]) -> None:
        self._changed = threading.Condition()
        self._permits = self._waiting = 0
        self._done = False
        self.result: Any = None
        store = WatchedStore(uri, self._wait)
        self._thread = threading.Thread(target=self._run, args=(store, action), daemon=True)

    def advance(self, operations: int) -> bool:
        """Let it do so many; whether it still has some to do."""
        with self._changed:
            self._permits += operations
            self._changed.notify_all()
            if not self._thread.ident:
                self._thread.start()
            assert self._changed.wait_for(lambda: self._done or (self._permits == 0 and self._waiting > 0), 60)
            return not self._done

    def finish(self) -> Any:
        """Let it do all the rest; what it returned, or the exception that it raised."""
        self.advance(10**9)
        self._thread.join(60)
        return self.result

    def _run(self, store: Store, action: Callable[[Store], Any]) -> None:
        try:
            self.result = action(store)
        except Exception as error:
            self.result = error
        with self._changed:
            self._done = True
            self._changed.notify_all()

    def _wait(self, operation: str, path: str) -> None:
        with self._changed:
            self._waiting += 1
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._permits > 0)
            self._permits -= 1
            self._waiting -= 1


def ago(now: datetime, **span: float) -> str:
    return (now - timedelta(**span)).isoformat(timespec="seconds")


def listed_table(recipe: Recipe, layout: Layout, tasks: int) -> ShardTable:
    """A table of train shards that are nowhere: planning never looks at them."""
    size = layout.samples_per_shard
    names = [f"train-{index:08d}" for index in range(tasks)]
    folder, suffix = paths.shards_folder(recipe.id, layout.id), layout.suffix
    starts = np.arange(tasks, dtype=np.int64) * size
    columns = {
        "task": names,
        "split": ["train"] * tasks,
        "start": starts,
        "stop": starts + size,
        "path": [f"{folder}/{name}-{index:016x}{suffix}" for index, name in enumerate(names)],
        "bytes": np.full(tasks, 1 << 20),
        "rows": np.full(tasks, size),
        "sha256": [f"{index:064x}" for index in range(tasks)],
        "commit_path": [paths.commit_path(recipe.id, layout.id, name) for name in names],
        "quarantined": [[]] * tasks,
        "commit_sha256": [f"{index:064x}" for index in range(tasks)],
    }
    return ShardTable(pa.table(columns, schema=SCHEMA))


def seal_listed(store: Store, recipe: Recipe, layout: Layout, tasks: int) -> Manifest:
    """Manifest 1 of `main`, which lists so many shards."""
    put_recipe(store, recipe)
    window = Window(train=(0, tasks * layout.samples_per_shard))
    draft = ManifestDraft(dataset="main", parent=None, writer="w", recipe_id=recipe.id, layout=layout, window=window)
    return seal(store, draft, listed_table(recipe, layout, tasks))

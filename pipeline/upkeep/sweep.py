"""The deleting half of `prune`: each kind of file by its own rule, a commit always before its shard."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from itertools import groupby, islice
from threading import Lock
from typing import TypeVar

from pipeline.heartbeat import SKEW, SPARED, age
from pipeline.upkeep.keep import Kept, Place, Target, read_target, read_targets
from storage_schemas import paths
from storage_schemas.commit import list_committed, read_commit
from storage_schemas.dataset import list_numbers, read_manifest
from storage_schemas.job import Pin
from storage_schemas.manifest import Manifest
from storage_schemas.store import Listed, Store

YOUNG = timedelta(hours=24)
"""A file that nothing names is left alone for so long at least: an attempt gives up half a day after its upload."""

BATCH = 256
THREADS = 16
T = TypeVar("T")


@dataclass
class Swept:
    """What went, or would go in a dry run: files by kind, and their paths where `listed`."""

    listed: bool = False
    files: Counter[str] = field(default_factory=Counter)
    bytes: int = 0
    paths: list[str] = field(default_factory=list)
    _lock: Lock = field(default_factory=Lock)

    def add(self, kind: str, path: str, size: int = 0) -> None:
        """Count one file."""
        with self._lock:
            self.files[kind] += 1
            self.bytes += size
            if self.listed:
                self.paths.append(path)


@dataclass
class Sweep:
    """`since`: commits from before this time are stale, None where no sweep is due. `guard` runs before each batch."""

    store: Store
    kept: Kept
    since: str | None
    now: datetime
    grace: timedelta
    dry_run: bool
    guard: Callable[[], None]
    swept: Swept

    def commits(self, place: Place) -> None:
        """Stale commits that nothing names, each read again right before it goes, and then their shards."""
        committed = list_committed(self.store, *place)
        doomed = sorted(name for name in committed if not self.kept.has(place, name))
        self._each(doomed, lambda name: self._commit(place, name))

    def _commit(self, place: Place, name: str) -> None:
        commit = read_commit(self.store, *place, name)
        if commit is not None and self.since and commit.committed_at < self.since:
            self._delete("commits", commit.commit_path)
            self._delete("shards", commit.path, commit.bytes)

    def orphans(self, place: Place) -> None:
        """Old shard files that no commit names: of attempts that died, or lost against another."""
        folder = paths.shards_folder(*place)
        listing = (file for file in self.store.list_details(folder))
        by_task = groupby(listing, key=lambda file: file.name.rpartition("-")[0])
        self._each(((task, list(files)) for task, files in by_task), lambda pair: self._orphans(place, *pair))

    def _orphans(self, place: Place, task: str, files: list[Listed]) -> None:
        # The only file of a task that a manifest lists is the one it lists.
        old = [file for file in files if self._is_old(file)]
        if not old or (len(files) == 1 and task in self.kept.tasks.get(place, ())):
            return
        commit = read_commit(self.store, *place, task)
        folder = paths.shards_folder(*place)
        for file in old:
            if commit is None or commit.path != f"{folder}/{file.name}":
                self._delete("orphans", f"{folder}/{file.name}", file.size)

    def unfinished(self, folder: str) -> None:
        """What killed writers left in a folder store under hidden names."""
        if self.store.protocol == "file":
            for file in self.store.list_details(folder, unfinished=True):
                if self._is_old(file):
                    self._delete("unfinished", f"{folder}/{file.name}", file.size)

    def manifests(self, latest: Manifest, pinned: set[int]) -> None:
        """Manifests below the floor, so that nobody opens them from now on, and old tables that no manifest names."""
        numbers = list_numbers(self.store, latest.dataset)
        below = [number for number in numbers if number < latest.floor.number and number not in pinned]
        gone = below if self.since else []
        left = [read_manifest(self.store, latest.dataset, number) for number in sorted(set(numbers) - set(gone))]
        tables = {manifest.shards.path for manifest in left if manifest}
        self._each(gone, lambda number: self._manifest(latest.dataset, number, tables))
        folder = paths.manifests_folder(latest.dataset)
        for file in self.store.list_details(folder):
            path = f"{folder}/{file.name}"
            if file.name.endswith(".parquet") and path not in tables and self._is_old(file):
                self._delete("tables", path, file.size)

    def _manifest(self, dataset: str, number: int, tables: set[str]) -> None:
        manifest = read_manifest(self.store, dataset, number)
        self._delete("manifests", paths.manifest_path(dataset, number))
        if manifest and manifest.shards.path not in tables:
            self._delete("tables", manifest.shards.path)

    def jobs(self, targets: Sequence[Target]) -> None:
        """Documents of jobs that have been silent for longer than the grace; the newest is left for `status`."""
        newest = max((target.job.job for target in targets), default="")
        patience = max(self.grace, SPARED)
        silent = [it.job.job for it in targets if age(it.beat.at, self.now) > patience and it.job.job != newest]
        self._each(silent, lambda job: self._job(job, patience))

    def _job(self, job: str, patience: timedelta) -> None:
        target = read_target(self.store, job)
        if target and age(target.beat.at, self.now) <= patience:
            return  # its machine was suspended, and woke up
        failures = paths.failures_folder(job)
        for name in self.store.list(failures):
            self._delete("jobs", f"{failures}/{name}")
        for path in (paths.heartbeat_path(job), paths.job_path(job)):
            self._delete("jobs", path)

    def pins(self) -> None:
        """Pins that have expired, each read again right before it goes."""
        self._each(self.store.list(paths.PINS), self._pin)

    def _pin(self, name: str) -> None:
        path = f"{paths.PINS}/{name}"
        data = self.store.read(path)
        if data and not is_held(Pin.from_bytes(data, f"{self.store.uri}/{path}"), self.now):
            self._delete("pins", path)

    def weights(self, recipe_id: str) -> None:
        """A teacher's weights where nothing names the recipe. Its recipe.json stays: it is small and tells what was."""
        folder = paths.weights_folder(recipe_id)
        old = [file for file in self.store.list_details(folder) if self._is_old(file)]
        if old and not any(target.job.recipe_id == recipe_id for target in read_targets(self.store)):
            for file in old:
                self._delete("weights", f"{folder}/{file.name}", file.size)

    def _is_old(self, file: Listed) -> bool:
        return file.modified is not None and self.now - file.modified > max(self.grace, YOUNG)

    def _delete(self, kind: str, path: str, size: int = 0) -> None:
        if not self.dry_run:
            self.store.remove(path)
        self.swept.add(kind, path, size)

    def _each(self, items: Iterable[T], act: Callable[[T], None]) -> None:
        with ThreadPoolExecutor(THREADS) as threads:
            for batch in _batches(items):
                self.guard()
                list(threads.map(act, batch))


def is_held(pin: Pin, now: datetime) -> bool:
    """Whether the reader may still be at it."""
    return datetime.fromisoformat(pin.expires_at) + SKEW > now


def read_pins(store: Store, now: datetime) -> list[Pin]:
    """Pins that hold."""
    names = [f"{paths.PINS}/{name}" for name in store.list(paths.PINS)]
    found = zip(names, store.read_many(names), strict=True)
    pins = [Pin.from_bytes(data, f"{store.uri}/{name}") for name, data in found if data]
    return [pin for pin in pins if is_held(pin, now)]


def places(store: Store) -> list[Place]:
    """Every folder with shards of one recipe in one layout."""
    recipes = store.list(paths.RECIPES)
    folders = ((recipe, name) for recipe in recipes for name in store.list(f"{paths.RECIPES}/{recipe}"))
    return [Place(recipe, name) for recipe, name in folders if name not in paths.NOT_LAYOUTS]


def _batches(items: Iterable[T]) -> Iterator[list[T]]:
    rest = iter(items)
    while batch := list(islice(rest, BATCH)):
        yield batch

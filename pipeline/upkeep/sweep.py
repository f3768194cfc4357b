"""The deleting half of `prune`: each kind of file by its own rule, a commit always before its shard.

Only files with names of our own go. Whatever else lies in a store's folders stays.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from itertools import islice
from threading import Lock
from typing import TypeVar

from limbeck.pipeline.job.heartbeat import SPARED
from limbeck.pipeline.job.kept import Kept
from limbeck.pipeline.job.targets import Place, Target, read_target, read_targets, readable
from limbeck.storage_schemas import paths
from limbeck.storage_schemas.clock import SKEW, age
from limbeck.storage_schemas.commit import Commit, list_committed, list_records
from limbeck.storage_schemas.dataset import list_numbers, read_manifest
from limbeck.storage_schemas.documents import Document
from limbeck.storage_schemas.job import Pin
from limbeck.storage_schemas.layout import SHARD
from limbeck.storage_schemas.manifest import Manifest
from limbeck.storage_schemas.store import Listed, Store

YOUNG = timedelta(hours=24)
"""A file that nothing names is left alone for so long at least: an attempt gives up half a day after its upload."""

BATCH = 256
THREADS = 16
T = TypeVar("T")
D = TypeVar("D", bound=Document)


@dataclass
class Swept:
    """What went, or would go in a dry run: files by kind, and their paths where `listed`."""

    listed: bool = False
    files: Counter[str] = field(default_factory=Counter)
    bytes: int = 0
    paths: list[str] = field(default_factory=list)
    _lock: Lock = field(default_factory=Lock)

    def add(self, kind: str, path: str, size: int = 0) -> None:
        """Count one file; without a kind it is part of one that is counted."""
        with self._lock:
            self.files.update([kind] if kind else [])
            self.bytes += size
            if self.listed:
                self.paths.append(path)


@dataclass
class Sweep:
    """`since`: commits from before this time are stale, None where none are. `guard` runs before each deletion."""

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
        records = list_records(self.store, *place)
        known = {paths.task_of(record) for record in records}
        bare = (task for task in list_committed(self.store, *place) if task not in known)
        doomed = sorted(name for name in (*records, *bare) if not self.kept.has(place, name))
        self._each(doomed, lambda name: self._commit(place, name))

    def _commit(self, place: Place, name: str) -> None:
        task = paths.task_of(name)
        taken = self._read(paths.commit_path(*place, task), Commit)
        path = f"{paths.records_folder(*place)}/{name}.json"
        commit = taken if name == task else self._read(path, Commit)
        if commit is None or not self.since or commit.committed_at >= self.since:
            return
        if taken and taken.attempt == commit.attempt:
            self._delete("commits" if name == task else "", taken.commit_path)
        if name != task:
            self._delete("commits", path)
        self._delete("shards", commit.path, commit.bytes)

    def _read(self, path: str, kind: type[D]) -> D | None:
        return readable(self.store, [path], kind, []).get(path)

    def orphans(self, place: Place) -> None:
        """Old shard files that no commit names: of attempts that died, or lost against another."""
        folder = paths.shards_folder(*place)
        records = list_records(self.store, *place)
        listing = ((SHARD.fullmatch(file.name), file) for file in self.store.list_details(folder))
        old = [(match[1], file) for match, file in listing if match and self._is_old(file)]
        self._each([pair for pair in old if pair[0] not in records], lambda pair: self._orphan(place, *pair))

    def _orphan(self, place: Place, record: str, file: Listed) -> None:
        path = f"{paths.shards_folder(*place)}/{file.name}"
        claim = paths.commit_path(*place, paths.task_of(record))
        unread = list[str]()  # a commit of a release that knew of no records names the file
        commit = readable(self.store, [claim], Commit, unread).get(claim)
        if not unread and (commit is None or commit.path != path):
            self._delete("orphans", path, file.size)

    def unfinished(self, folder: str) -> None:
        """What killed writers left in a folder store under hidden names."""
        if self.store.protocol == "file":
            for file in self.store.list_details(folder, unfinished=True):
                if paths.UNFINISHED.fullmatch(file.name) and self._is_old(file):
                    self._delete("unfinished", f"{folder}/{file.name}", file.size)

    def manifests(self, latest: Manifest, pinned: set[int], floor: int) -> None:
        """Manifests below the floor, so that no one opens them from now on, and old tables that no manifest names."""
        numbers = list_numbers(self.store, latest.dataset)
        gone = [number for number in numbers if number < floor and number not in pinned]
        left = [read_manifest(self.store, latest.dataset, number) for number in sorted(set(numbers) - set(gone))]
        tables = {manifest.shards.path for manifest in left if manifest}
        self._each(gone, lambda number: self._manifest(latest.dataset, number, tables))
        folder = paths.manifests_folder(latest.dataset)
        for file in self.store.list_details(folder):
            path = f"{folder}/{file.name}"
            if paths.TABLE.fullmatch(file.name) and path not in tables and self._is_old(file):
                self._delete("tables", path, file.size)

    def _manifest(self, dataset: str, number: int, tables: set[str]) -> None:
        path = paths.manifest_path(dataset, number)
        manifest = self._read(path, Manifest)
        self._delete("manifests", path)
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
        if target is None or age(target.beat.at, self.now) <= patience:
            return  # its machine was suspended, and woke up
        failures = paths.failures_folder(job)
        for name in self.store.list(failures):
            if paths.COMMIT.fullmatch(name):
                self._delete("jobs", f"{failures}/{name}")
        for path in (paths.job_path(job), paths.heartbeat_path(job), paths.mark_path(job)):
            if path != paths.mark_path(job) or target.is_dead:
                self._delete("jobs", path)

    def pins(self) -> None:
        """Pins that have expired, each read again right before it goes."""
        self._each([name for name in self.store.list(paths.PINS) if name.endswith(".json")], self._pin)

    def _pin(self, name: str) -> None:
        path = f"{paths.PINS}/{name}"
        pin = self._read(path, Pin)
        if pin and not is_held(pin, self.now):
            self._delete("pins", path)

    def weights(self, recipe_id: str) -> None:
        """A teacher's weights where nothing names the recipe. Its recipe.json stays: it is small and tells what was."""
        folder = paths.weights_folder(recipe_id)
        ours = (file for file in self.store.list_details(folder) if file.name.endswith((".json", ".safetensors")))
        old = [file for file in ours if self._is_old(file)]
        if old and not any(target.job.recipe_id == recipe_id for target in read_targets(self.store)):
            for file in old:
                self._delete("weights", f"{folder}/{file.name}", file.size)

    def _is_old(self, file: Listed) -> bool:
        return file.modified is not None and self.now - file.modified > max(self.grace, YOUNG)

    def _delete(self, kind: str, path: str, size: int = 0) -> None:
        if not self.dry_run:
            self.guard()
            self.store.remove(path)
        self.swept.add(kind, path, size)

    def _each(self, items: Iterable[T], act: Callable[[T], None]) -> None:
        with ThreadPoolExecutor(THREADS) as threads:
            for batch in _batches(items):
                list(threads.map(act, batch))


def is_held(pin: Pin, now: datetime) -> bool:
    """Whether the reader may still be at it."""
    return datetime.fromisoformat(pin.expires_at) + SKEW > now


def read_pins(store: Store, now: datetime, unread: list[str]) -> list[Pin]:
    """Pins that hold. The paths of those that can't be read go to `unread`."""
    names = [f"{paths.PINS}/{name}" for name in store.list(paths.PINS) if name.endswith(".json")]
    pins = readable(store, names, Pin, unread)
    return [pin for pin in pins.values() if is_held(pin, now)]


def places(store: Store) -> list[Place]:
    """Every folder with shards of one recipe in one layout."""
    recipes = store.list(paths.RECIPES)
    folders = ((recipe, name) for recipe in recipes for name in store.list(f"{paths.RECIPES}/{recipe}"))
    return [Place(recipe, name) for recipe, name in folders if name not in paths.NOT_LAYOUTS]


def _batches(items: Iterable[T]) -> Iterator[list[T]]:
    rest = iter(items)
    while batch := list(islice(rest, BATCH)):
        yield batch

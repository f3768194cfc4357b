"""Ten thousand workers that crash, in one process: the real protocol over an indexed store, in simulated time.

Real are `dispatch`, `read_commit`, `put_commit`, `list_committed`, `read_commits`, `seal` and what they call. Simulated
are the clock, the solving and the storage, which loses answers and refuses requests as it likes. A worker may crash
before it uploads, before it commits or before it answers; a zombie is taken for dead and commits an hour later.
"""

import hashlib
import heapq
import itertools
import random
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

from limbeck.pipeline.workers.dispatch import Died, Event, Finished, Ready, dispatch
from limbeck.storage_schemas import paths
from limbeck.storage_schemas.commit import Commit, Task, list_committed, put_commit, read_commit, read_commits
from limbeck.storage_schemas.layout import Layout
from limbeck.storage_schemas.recipe import Recipe
from limbeck.storage_schemas.store import Store

LOST, REFUSED = 0.01, 0.01
"""Shares of conditional creates whose answer is lost after they took place, and that fail before."""

Fate = Literal["well", "before upload", "before commit", "before answer", "zombie"]
FATES: dict[Fate, float] = {"before upload": 0.02, "before commit": 0.01, "before answer": 0.01, "zombie": 0.01}
AN_HOUR = 3600.0
EPOCH = datetime(2026, 1, 1, tzinfo=UTC)


class IndexedFiles:
    """What a store asks of fsspec, with an index by folder: fsspec's own memory:// looks at all its keys to list."""

    def __init__(self, rng: random.Random) -> None:
        self.folders: dict[str, dict[str, bytes]] = {}
        self.rng = rng
        self.faults = Counter[str]()

    def pipe_file(self, path: str, data: bytes, mode: str = "overwrite") -> None:
        folder, _, name = path.rpartition("/")
        names = self.folders.setdefault(folder, {})
        if mode == "overwrite":
            names[name] = data
            return
        chance = self.rng.random()
        if chance < REFUSED:
            self.faults["refused"] += 1
            raise TimeoutError("slow down")
        if name in names:
            raise FileExistsError(path)
        names[name] = data
        if chance > 1 - LOST:
            self.faults["lost"] += 1
            raise TimeoutError("the answer was lost")

    def cat_file(self, path: str, start: int | None = None, end: int | None = None) -> bytes:
        folder, _, name = path.rpartition("/")
        try:
            return self.folders[folder][name][start:end]
        except KeyError:
            raise FileNotFoundError(path) from None

    def rm_file(self, path: str) -> None:
        folder, _, name = path.rpartition("/")
        if self.folders.get(folder, {}).pop(name, None) is None:
            raise FileNotFoundError(path)

    def info(self, path: str) -> dict[str, Any]:
        return {"size": len(self.cat_file(path))}

    def ls(self, folder: str, detail: bool = False) -> list[str]:
        if folder not in self.folders:
            raise FileNotFoundError(folder)
        return [f"{folder}/{name}" for name in self.folders[folder]]

    def invalidate_cache(self, path: str) -> None:
        """Nothing is cached."""


def simulated_store(rng: random.Random) -> tuple[Store, IndexedFiles]:
    store, files = Store("memory://simulated"), IndexedFiles(rng)
    store._fs = files
    return store, files


@dataclass
class Cluster:
    """The machines of all drivers: one clock, and what happens when."""

    store: Store
    recipe: Recipe
    layout: Layout
    rng: random.Random
    now: float = 0.0
    attempts: Counter[Fate] = field(default_factory=Counter)
    standing: dict[Task, str] = field(default_factory=dict)
    uploaded: set[str] = field(default_factory=set)
    late: int = 0
    _agenda: list[tuple[float, int, Callable[[], None]]] = field(default_factory=list)
    _order: Iterator[int] = field(default_factory=itertools.count)

    def after(self, seconds: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._agenda, (self.now + seconds, next(self._order), action))

    def step(self) -> None:
        self.now, _, action = heapq.heappop(self._agenda)
        action()

    def run_out(self) -> None:
        """Let everything still going on end, zombies too."""
        while self._agenda:
            self.step()

    def fate(self) -> Fate:
        (fate,) = self.rng.choices(["well", *FATES], [1 - sum(FATES.values()), *FATES.values()])
        self.attempts[fate] += 1
        return fate

    def upload(self, task: Task) -> Commit:
        """An attempt's shard, and the commit that would make it exist."""
        attempt = f"{self.rng.getrandbits(64):016x}"
        path = paths.shard_path(self.recipe.id, self.layout.id, task.name, attempt, self.layout.suffix)
        self.uploaded.add(path)
        self.store.write(path, b"x")
        return Commit(
            split=task.split, index=task.index, samples_per_shard=task.samples_per_shard,
            recipe_id=self.recipe.id, layout_id=self.layout.id, attempt=attempt, path=path,
            bytes=1, sha256=hashlib.sha256(attempt.encode()).hexdigest(), rows=task.samples_per_shard,
            chunks=(), seconds=1.0, nfe=1, machine={},
            committed_at=(EPOCH + timedelta(seconds=self.now)).isoformat(timespec="seconds"),
        )  # fmt: skip

    def commit(self, task: Task, ours: Commit) -> Commit:
        """`put_commit`, holding it to its word: a task has one commit, for ever, and its shard was uploaded."""
        stands = put_commit(self.store, ours)
        assert self.standing.setdefault(task, stands.attempt) == stands.attempt, f"{task.name} has two winners"
        assert stands.path in self.uploaded, f"{task.name} names a shard that nobody uploaded"
        self.late += stands.attempt != ours.attempt
        return stands


class SimulatedFleet:
    """One driver's workers on the cluster, as `dispatch` sees them."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self._numbers = itertools.count()
        self._living: set[int] = set()
        self._inbox = deque[Event]()

    def start(self) -> int:
        worker = next(self._numbers)
        self._living.add(worker)
        self.cluster.after(self.cluster.rng.uniform(5, 50), lambda: self._tell(worker, Ready(worker, None)))
        return worker

    def submit(self, worker: int, task: Task) -> None:
        """The task ends after a minute or so, if its worker lives to see it; what is committed already ends at once."""
        cluster = self.cluster
        stands = read_commit(cluster.store, cluster.recipe.id, cluster.layout.id, task.name)
        if stands is not None:
            cluster.after(0.1, lambda: self._tell(worker, Finished(worker, task, stands)))
        else:
            cluster.after(cluster.rng.expovariate(1 / 60), lambda: self._attempt(worker, task))

    def wait(self) -> Sequence[Event]:
        while not self._inbox:
            self.cluster.step()
        events = list(self._inbox)
        self._inbox.clear()
        return events

    def end(self, worker: int) -> None:
        self._living.discard(worker)

    def room(self) -> str:
        return "as much as you like"

    def close(self) -> None:
        """Some of what runs goes on unseen: nobody hears of it, but it commits."""
        self._living.clear()

    def _attempt(self, worker: int, task: Task) -> None:
        cluster = self.cluster
        if worker not in self._living and cluster.rng.random() < 0.5:
            return
        match cluster.fate():
            case "well":
                self._tell(worker, Finished(worker, task, cluster.commit(task, cluster.upload(task))))
            case "before upload":
                self._die(worker)
            case "before commit":
                cluster.upload(task)
                self._die(worker)
            case "before answer":
                cluster.commit(task, cluster.upload(task))
                self._die(worker)
            case "zombie":
                ours = cluster.upload(task)
                self._die(worker)
                cluster.after(AN_HOUR, lambda: cluster.commit(task, ours))

    def _tell(self, worker: int, event: Event) -> None:
        if worker in self._living:
            self._inbox.append(event)

    def _die(self, worker: int) -> None:
        self._tell(worker, Died(worker, "the node is gone"))
        self._living.discard(worker)


def drive(cluster: Cluster, tasks: Sequence[Task], *, workers: int) -> Iterator[Commit]:
    """A driver: adopts what is committed, has the rest solved, and tells of every commit."""
    store, recipe, layout = cluster.store, cluster.recipe, cluster.layout
    committed = list_committed(store, recipe.id, layout.id)
    yield from read_commits(store, recipe.id, layout.id, [t.name for t in tasks if t.name in committed]).values()
    fleet = SimulatedFleet(cluster)
    try:
        left = [task for task in tasks if task.name not in committed]
        for outcome in dispatch(fleet, left, workers=workers, max_attempts=20, clock=lambda: cluster.now):
            assert isinstance(outcome, Commit), outcome
            yield outcome
    finally:
        fleet.close()


def take(driver: Iterator[Any], count: int) -> list[Any]:
    """The next `count` of what a driver tells."""
    return list(itertools.islice(driver, count))

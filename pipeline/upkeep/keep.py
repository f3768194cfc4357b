"""What a store must keep: one rule for both sides. `prune` deletes none of it, a driver builds on nothing else.

A commit is stale if it is older than the sealing of a floor whose sweep is due. Stale commits are kept where a served
manifest, a pin or a job names them. Age is a fact in the documents, so no clock makes the two sides disagree on it.
"""

from collections.abc import Iterable, Iterator, Sequence, Set
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import NamedTuple

from pipeline.heartbeat import SKEW, SPARED, Pulse, age
from storage_schemas import paths
from storage_schemas.commit import Task, list_committed, read_commits
from storage_schemas.dataset import latest_manifest, list_numbers, read_manifest, read_shard_table
from storage_schemas.errors import StoreError
from storage_schemas.job import Heartbeat, Job
from storage_schemas.manifest import Floor, Manifest
from storage_schemas.shards import Shard
from storage_schemas.store import Store

OVER = ("sealed", "ended", "refused")
"""A job in one of these states has nothing that its manifest doesn't name."""

VOUCHES = ("running", "failed", "stopped")
"""A job in one of these states has checked what it builds on, so others may build on it too."""


BATCH = 4096
"""Commits that are in memory at a time."""


class StaleCommits(StoreError):
    """Commits that a prune may be deleting just now."""


class Lapsed(Exception):
    """What a job holds for committed may be gone, as its message says: it must look again."""


class Place(NamedTuple):
    """Where the shards of one recipe in one layout lie."""

    recipe_id: str
    layout_id: str

    @classmethod
    def of(cls, document: Manifest | Job) -> "Place":
        """Where a manifest's shards or a job's lie."""
        return cls(document.recipe_id, document.layout.id)


@dataclass(frozen=True)
class Target:
    """A job and its last heartbeat."""

    job: Job
    beat: Heartbeat

    def names(self, place: Place, task: str) -> bool:
        """Whether the job's window has this task."""
        if Place.of(self.job) != place:
            return False
        named = Task.parse(task, self.job.layout.samples_per_shard)
        return named.index in self.job.window.task_range(named.split, named.samples_per_shard)


@dataclass(frozen=True)
class Kept:
    """Tasks that must stay: named one by one by manifests, or by a job's window."""

    tasks: dict[Place, set[str]] = field(default_factory=dict)
    targets: tuple[Target, ...] = ()

    def has(self, place: Place, task: str) -> bool:
        """Whether anything names the task."""
        return task in self.tasks.get(place, ()) or any(target.names(place, task) for target in self.targets)

    @property
    def recipes(self) -> set[str]:
        """Ids of the recipes of all that is kept."""
        return {place.recipe_id for place in self.tasks} | {target.job.recipe_id for target in self.targets}


def latest_manifests(store: Store) -> list[Manifest]:
    """The newest manifest of each dataset of the store."""
    found = (latest_manifest(store, dataset) for dataset in store.list(paths.DATASETS))
    return [manifest for manifest in found if manifest]


def due(floors: Iterable[Floor], now: datetime) -> str | None:
    """What was committed before this time is stale: the latest sealing of a floor that is due; None if none is."""
    past = [floor for floor in floors if floor.sweep_at and datetime.fromisoformat(floor.sweep_at) <= now]
    return max((floor.sealed_at for floor in past if floor.sealed_at), default=None)


def served(store: Store, latest: Manifest, floor: int | None = None) -> Iterator[Manifest]:
    """The dataset's manifests from the floor on."""
    for number in list_numbers(store, latest.dataset):
        manifest = read_manifest(store, latest.dataset, number) if number >= (floor or latest.floor.number) else None
        if manifest:
            yield manifest


def name_tasks(store: Store, manifests: Iterable[Manifest]) -> dict[Place, set[str]]:
    """The tasks that these manifests list."""
    tasks: dict[Place, set[str]] = {}
    seen: set[str] = set()
    for manifest in manifests:
        known = tasks.setdefault(Place.of(manifest), set())
        if manifest.shards.path not in seen:
            known |= read_shard_table(store, manifest).tasks
            seen.add(manifest.shards.path)
    return tasks


def read_targets(store: Store) -> list[Target]:
    """Every job whose document is there; one without a heartbeat has its first as of its start."""
    names = store.list(paths.JOBS)
    jobs = store.read_many([paths.job_path(name) for name in names])
    beats = store.read_many([paths.heartbeat_path(name) for name in names])
    return [_target(store, job, beat) for job, beat in zip(jobs, beats, strict=True) if job]


def read_target(store: Store, job: str) -> Target | None:
    """One job, None if its document is not there."""
    document, beat = store.read_many([paths.job_path(job), paths.heartbeat_path(job)])
    return _target(store, document, beat) if document else None


def _target(store: Store, job: bytes, beat: bytes | None) -> Target:
    document = Job.from_bytes(job, f"{store.uri}/{paths.JOBS}")
    first = Heartbeat(at=document.started_at, state="planning")
    return Target(document, Heartbeat.from_bytes(beat, f"{store.uri}/{paths.JOBS}") if beat else first)


def spared(targets: Iterable[Target], now: datetime, grace: timedelta) -> tuple[Target, ...]:
    """Jobs that are at work, or that died or failed so lately that somebody may go on with them."""
    patience = max(grace, SPARED)
    return tuple(it for it in targets if it.beat.state not in OVER and age(it.beat.at, now) < patience)


def adoptable(store: Store, job: str, place: Place, tasks: Sequence[str], now: datetime) -> dict[str, Shard]:
    """Shards of those tasks that are committed. StaleCommits if a prune may be deleting one of the commits.

    `job` is announced in the store already. A prune that has listed the jobs before that began its sweep before now:
    what it may delete is stale now, and was then neither served nor named by a job. The floors are read before the
    commits: should that prune have set another floor by then, what it deleted isn't listed any more.
    """
    latest = latest_manifests(store)
    since = due((manifest.floor for manifest in latest), now + SKEW)
    committed = list_committed(store, *place)
    names = [name for name in tasks if name in committed]
    shards: dict[str, Shard] = {}
    stale: list[str] = []
    for first in range(0, len(names), BATCH):  # a commit is much larger than what is kept of it
        commits = read_commits(store, *place, names[first : first + BATCH])
        shards |= {name: Shard.of(commit) for name, commit in commits.items()}
        stale += [name for name, commit in commits.items() if since and commit.committed_at < since]
    if stale:
        _refuse_unnamed(store, job, place, stale, latest, now)
    return shards


def _refuse_unnamed(
    store: Store, job: str, place: Place, stale: Sequence[str], latest: Sequence[Manifest], now: datetime
) -> None:
    alike = (it for newest in latest for it in served(store, newest) if Place.of(it) == place)
    kept = Kept(name_tasks(store, alike), _vouchers(store, job, [it.floor for it in latest], now))
    names = [name for name in stale if not kept.has(place, name)]
    if names:
        raise StaleCommits(
            f"{len(names)} tasks, such as {names[0]}, have commits that nothing in {store.uri} names any more and "
            f"that a prune may delete: run `python -m pipeline prune {store.uri}` to its end first"
        )


def check_committed(store: Store, place: Place, tasks: Set[str], pulse: Pulse) -> None:
    """Right before sealing: Lapsed if commits that the job holds are gone, or if a prune may take it for dead.

    A prune's deletion whose answer was lost may be tried again when its task was made anew.
    """
    pulse.say("running", found=pulse.beat.found)  # the machine may just have woken up
    if pulse.lapsed:
        raise Lapsed("this job could not be heard of for long")
    gone = tasks - list_committed(store, *place)
    if gone:
        raise Lapsed(f"{len(gone)} commits of this job, such as {min(gone)}, are gone")


def _vouchers(store: Store, job: str, floors: list[Floor], now: datetime) -> tuple[Target, ...]:
    """Jobs that every sweep so far has spared: it spares them for the longest grace of any floor at least."""
    others = [it for it in read_targets(store) if it.job.job != job and it.beat.state in VOUCHES]
    return spared(others, now + SKEW, max(map(grace_of, floors), default=timedelta()))


def grace_of(floor: Floor) -> timedelta:
    """From a floor's sealing to its sweep."""
    if not floor.sealed_at or not floor.sweep_at:
        return timedelta()
    return datetime.fromisoformat(floor.sweep_at) - datetime.fromisoformat(floor.sealed_at)

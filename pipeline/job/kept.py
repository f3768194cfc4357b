"""What a store must keep: one rule for both sides. `prune` deletes none of it, a driver builds on nothing else.

A commit is stale if it is older than the sealing of a floor whose sweep is due, or was due when another was set. Stale
commits are kept where a served manifest, a pin or a job names them. Age is a fact in the documents, so no clock makes
the two sides disagree on it.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from limbeck.pipeline.job.targets import Place, Target, is_lost, vouchers
from limbeck.storage_schemas import paths
from limbeck.storage_schemas.clock import SKEW, age, utc
from limbeck.storage_schemas.commit import COMMIT_WITHIN, Commit, list_records, read_commits
from limbeck.storage_schemas.dataset import latest_manifest, list_numbers, read_manifest, read_shard_table
from limbeck.storage_schemas.manifest import Floor, Manifest
from limbeck.storage_schemas.shards import Shard
from limbeck.storage_schemas.store import Store

BATCH = 4096
"""Commits that are in memory at a time."""


class Lapsed(Exception):
    """What a job holds for committed may be gone, as its message says: it must look again."""


@dataclass(frozen=True)
class Kept:
    """Commits that must stay: named one by one by manifests, or by the tasks of a job's window.

    A commit's name is that of its record, <task>-<attempt>; <task> alone where an older release listed it so.
    """

    commits: dict[Place, set[str]] = field(default_factory=dict)
    targets: tuple[Target, ...] = ()

    def has(self, place: Place, name: str) -> bool:
        """Whether anything names the commit; where an older release listed the task, all of the task's are kept."""
        task, listed = paths.task_of(name), self.commits.get(place, ())
        return name in listed or task in listed or any(target.names(place, task) for target in self.targets)

    @property
    def recipes(self) -> set[str]:
        """Ids of the recipes of all that is kept."""
        return {place.recipe_id for place in self.commits} | {target.job.recipe_id for target in self.targets}


def latest_manifests(store: Store) -> list[Manifest]:
    """The newest manifest of each dataset of the store."""
    found = (latest_manifest(store, dataset) for dataset in store.list(paths.DATASETS))
    return [manifest for manifest in found if manifest]


def is_due(floor: Floor, now: datetime) -> bool:
    """Whether what the floor allows may be deleted."""
    return floor.sweep_at is None or datetime.fromisoformat(floor.sweep_at) <= now


def floor_in_force(floor: Floor, now: datetime) -> int:
    """The lowest number that is served still: until a floor is due, the one before it holds."""
    return floor.number if is_due(floor, now) else floor.swept or 1


def stale_since(floors: Iterable[Floor], now: datetime) -> str | None:
    """What was committed before this time is stale: the latest sealing of a floor that is or was due."""
    times = ((floor.sealed_at if is_due(floor, now) else floor.since) or floor.since for floor in floors)
    return max((time for time in times if time), default=None)


def served(store: Store, latest: Manifest, floor: int) -> Iterator[Manifest]:
    """The dataset's manifests from a number on."""
    for number in list_numbers(store, latest.dataset):
        manifest = read_manifest(store, latest.dataset, number) if number >= floor else None
        if manifest:
            yield manifest


def name_commits(store: Store, manifests: Iterable[Manifest]) -> dict[Place, set[str]]:
    """The commits that these manifests list."""
    commits: dict[Place, set[str]] = {}
    seen: set[str] = set()
    for manifest in manifests:
        known = commits.setdefault(Place.of(manifest), set())
        if manifest.shards.path not in seen:
            known |= read_shard_table(store, manifest).commits
            seen.add(manifest.shards.path)
    return commits


def adoptable(store: Store, job: str, place: Place, tasks: Sequence[str]) -> dict[str, Shard]:
    """Shards of those tasks that are committed. A commit that a prune may be deleting is taken back: solve it again.

    `job` is announced in the store already; without one this changes nothing there.

    A prune that has listed the jobs before that began its sweep before now: what it may delete is stale now, and was
    then neither served nor named by a job. The floors and the other jobs are read before the commits: should that
    prune have set another floor by then, what it deleted isn't listed any more.
    """
    latest, now = latest_manifests(store), utc() + SKEW
    since = stale_since([it.floor for it in latest], now)
    named = _named(store, job, place, latest, now) if since else Kept()  # nothing is stale, and nobody need ask
    written = {file.name: file.modified for file in store.list_details(paths.commits_folder(*place))}
    files = {file.name: file.size for file in store.list_details(paths.shards_folder(*place))}
    records = list_records(store, *place)
    there = [name for name in tasks if f"{name}.json" in written]
    shards: dict[str, Shard] = {}
    for first in range(0, len(there), BATCH):  # a commit is much larger than what is kept of it
        for name, commit in read_commits(store, *place, there[first : first + BATCH]).items():
            if files.get(commit.path.rpartition("/")[2]) != commit.bytes:
                continue  # a late commit of a shard that was pruned: a job that solves it again takes its place
            if named.has(place, _record(commit)) or not _is_stale(commit, since, written[f"{name}.json"]):
                shards[name] = Shard.of(commit)
                if job and _record(commit) not in records:
                    _put_record(store, commit)
            elif job:
                store.remove(commit.commit_path)
    return shards


def _named(store: Store, job: str, place: Place, latest: Sequence[Manifest], now: datetime) -> Kept:
    """What served manifests list at a place, and jobs that have checked what they build on."""
    others = vouchers(store, job)
    alike = (it for newest in latest for it in served(store, newest, floor_in_force(newest.floor, now)))
    return Kept(name_commits(store, (it for it in alike if Place.of(it) == place)), others)


def _is_stale(commit: Commit, since: str | None, written: datetime | None) -> bool:
    """Whether a prune may delete it where nothing names it. One that came late may have been deleted before."""
    is_late = written is not None and age(commit.committed_at, written) > COMMIT_WITHIN
    return since is not None and (commit.committed_at < since or is_late)


def _record(commit: Commit) -> str:
    return f"{commit.task.name}-{commit.attempt}"


def _put_record(store: Store, commit: Commit) -> None:
    """Write the record of a commit of an older release, which knew of no records."""
    data = store.read(commit.commit_path)
    if data is not None and Commit.from_bytes(data, commit.commit_path).attempt == commit.attempt:
        store.put_if_absent(commit.record_path, data)


def check_held(store: Store, job: str, place: Place, shards: dict[str, Shard], early: Mapping[str, str]) -> None:
    """Right before sealing. Lapsed where a prune may delete, or has deleted, what the job holds: it is let go of here.

    early: of shards that came from workers, those that may have been committed before the job was announced, and when.
    """
    if is_lost(store, job):
        shards.clear()
        raise Lapsed("a prune took this job for dead")
    records = list_records(store, *place)
    held = {name: at for name, at in early.items() if name in shards}
    gone = {name for name, shard in shards.items() if shard.commit_name not in records}
    gone |= _let_go(store, job, place, shards, held)
    for name in gone:
        del shards[name]
    if gone:
        raise Lapsed(f"{len(gone)} commits of this job, such as {min(gone)}, are gone")


def _let_go(store: Store, job: str, place: Place, shards: dict[str, Shard], early: Mapping[str, str]) -> set[str]:
    """Stale commits that no job may build on; for the others, `shards` gets what stands for the task now."""
    since = stale_since([it.floor for it in latest_manifests(store)], utc() + SKEW)
    stale = [name for name, at in early.items() if since and at < since]
    standing = adoptable(store, job, place, stale) if stale else {}
    shards |= standing
    return set(stale) - standing.keys()


def next_floor(latest: Manifest, number: int, *, now: datetime, grace: timedelta) -> Floor:
    """The floor at `number` or at the latest's own, whatever is higher, which is due after the grace."""
    before = latest.floor
    return Floor(
        number=max(number, before.number),
        sealed_at=now.isoformat(timespec="seconds"),
        sweep_at=(now + grace).isoformat(timespec="seconds"),
        swept=floor_in_force(before, now),
        since=stale_since([before], now),
        set_by=latest.number + 1,
    )


def grace_of(floor: Floor) -> timedelta:
    """The time from a floor's sealing to its sweep."""
    if not floor.sealed_at or not floor.sweep_at:
        return timedelta()
    return datetime.fromisoformat(floor.sweep_at) - datetime.fromisoformat(floor.sealed_at)

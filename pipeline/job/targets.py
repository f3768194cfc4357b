"""Jobs as the store knows them: which still aim at something, which are dead, and how a prune buries those."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import NamedTuple, TypeVar

from limbeck.pipeline.job.heartbeat import SPARED
from limbeck.pipeline.windows import Goal
from limbeck.storage_schemas import paths
from limbeck.storage_schemas.clock import age
from limbeck.storage_schemas.commit import Task
from limbeck.storage_schemas.dataset import LostRace, latest_manifest, seal_nothing
from limbeck.storage_schemas.documents import Document
from limbeck.storage_schemas.job import Heartbeat, Job, Mark
from limbeck.storage_schemas.log import log
from limbeck.storage_schemas.manifest import Manifest, ManifestDraft
from limbeck.storage_schemas.reading import read_all, read_document
from limbeck.storage_schemas.store import Store

OVER = ("sealed", "ended", "refused")
"""A job in one of these states has nothing that its manifest doesn't name."""

VOUCHES = ("running", "failed", "stopped")
"""A job in one of these states has checked what it builds on, so others may build on it too."""

D = TypeVar("D", bound=Document)


class Place(NamedTuple):
    """Where the shards of one recipe in one layout lie."""

    recipe_id: str
    layout_id: str

    @classmethod
    def of(cls, document: Manifest | Job | Goal) -> "Place":
        """Where the shards of a manifest, a job or a goal lie."""
        return cls(document.recipe_id, document.layout.id)


@dataclass(frozen=True)
class Target:
    """A job, its last heartbeat, and whether a prune has taken it for dead."""

    job: Job
    beat: Heartbeat
    is_dead: bool = False

    def names(self, place: Place, task: str) -> bool:
        """Whether the job's window has this task."""
        if Place.of(self.job) != place:
            return False
        named = Task.parse(task, self.job.layout.samples_per_shard)
        return named.index in self.job.window.task_range(named.split, named.samples_per_shard)

    def is_silent(self, now: datetime, patience: timedelta) -> bool:
        """Whether its driver may be dead: at work by its last word, which is longer ago than that."""
        return self.beat.state not in OVER and age(self.beat.at, now) >= max(patience, SPARED)


def read_targets(store: Store, unread: list[str] | None = None) -> list[Target]:
    """Every job whose document is there. One that can't be read is logged and left; its path goes to `unread`.

    Jobs are listed until no other shows up: a driver announces its next job before it ends the one that this follows.
    """
    known: set[str] = set()
    targets: list[Target] = []
    while new := [name for name in store.list(paths.JOBS) if name not in known]:
        known |= set(new)
        targets += _read(store, new, [] if unread is None else unread)
    return sorted(targets, key=lambda target: target.job.job)


def read_target(store: Store, job: str) -> Target | None:
    """One job, None if its document is not there. StoreError if it can't be read."""
    return next(_read(store, [job], [])) if read_document(store, paths.job_path(job), Job) else None


def _read(store: Store, names: Sequence[str], unread: list[str]) -> Iterator[Target]:
    jobs = readable(store, [paths.job_path(name) for name in names], Job, unread)
    beats = readable(store, [paths.heartbeat_path(job.job) for job in jobs.values()], Heartbeat, [])
    marks = store.read_many([paths.mark_path(job.job) for job in jobs.values()])
    for job, mark in zip(jobs.values(), marks, strict=True):
        first = Heartbeat(at=job.started_at, state="planning")
        yield Target(job, beats.get(paths.heartbeat_path(job.job), first), mark is not None)


def readable(store: Store, many: Sequence[str], kind: type[D], unread: list[str]) -> dict[str, D]:
    """The documents of these paths that can be read. Others are logged and left, and go to `unread`."""
    found, problems = read_all(store, many, kind)
    for problem in problems.values():
        log.warning(problem)
    unread += problems
    return found


def holding(targets: Iterable[Target]) -> tuple[Target, ...]:
    """Jobs that are at work, or that died or failed and that no prune has taken for dead: these may go on."""
    return tuple(target for target in targets if target.beat.state not in OVER and not target.is_dead)


def vouchers(store: Store, job: str) -> tuple[Target, ...]:
    """Other jobs that have checked what they build on, and that no prune has taken for dead."""
    return tuple(it for it in holding(read_targets(store)) if it.job.job != job and it.beat.state in VOUCHES)


def is_lost(store: Store, job: str) -> bool:
    """Whether a prune has taken this job for dead, so that what it held may be gone."""
    return not store.exists(paths.job_path(job)) or store.exists(paths.mark_path(job))


def bury(store: Store, targets: Iterable[Target], *, run: str, now: datetime, patience: timedelta) -> None:
    """See to it that no silent job seals what a prune is about to delete, and that no other job builds on its word.

    The number that it would seal is taken before its mark is written: a prune that dies in between begins again here.
    """
    for target in targets:
        if target.is_silent(now, patience) and not target.is_dead:
            _take_number(store, target.job, run)
            mark = Mark(run=run, at=now.isoformat(timespec="seconds"))
            store.write(paths.mark_path(target.job.job), mark.to_bytes())


def _take_number(store: Store, job: Job, run: str) -> None:
    latest = latest_manifest(store, job.dataset)
    if (latest.number if latest else 0) > job.parent or not store.exists(paths.recipe_path(job.recipe_id)):
        return
    draft = ManifestDraft(
        dataset=job.dataset, parent=latest, writer=run, recipe_id=job.recipe_id, layout=job.layout, window=job.window
    )
    with suppress(LostRace):  # it is taken all the same
        seal_nothing(store, latest, draft)

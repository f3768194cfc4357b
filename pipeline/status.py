"""`status`: how far a job is, running or dead, from what lies in the store."""

import json
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta

from limbeck.pipeline.config import StatusConfig
from limbeck.pipeline.job.targets import Target, read_target
from limbeck.pipeline.windows import Goal
from limbeck.storage_schemas import paths
from limbeck.storage_schemas.clock import age
from limbeck.storage_schemas.commit import Commit, Task, list_committed, read_commits
from limbeck.storage_schemas.dataset import Pruned, latest_number, read_manifest, read_shard_table
from limbeck.storage_schemas.errors import StoreError, shown
from limbeck.storage_schemas.job import Failure, Job
from limbeck.storage_schemas.log import log
from limbeck.storage_schemas.manifest import Manifest
from limbeck.storage_schemas.reading import read_all
from limbeck.storage_schemas.record import SPLITS
from limbeck.storage_schemas.store import Store

RECENT = 64
"""Commits that are read to know how long ago the last one was."""

STALLED = timedelta(minutes=5)
"""A job whose driver has said nothing for so long, though it says every minute that it lives, is called stalled."""


@dataclass(frozen=True)
class Status:
    """Where a job stands. Seconds are as of now; rates are over the time from its start to its last commit.

    `tasks_done` counts also what was committed when the job began; rates and what is to go count only its own time.
    """

    job: str
    dataset: str
    state: str
    tasks_done: int
    tasks: int
    samples_done: int
    samples_per_second: float | None
    seconds_to_go: float | None
    last_commit_age: float | None
    failures: tuple[dict[str, str], ...]
    manifest: int | None


def run_status(config: StatusConfig) -> int:
    """The exit code: 0, whatever the job's."""
    store = Store.open(config.store)
    status = job_status(store, find_job(store, config.job), now=datetime.now(UTC))
    print(json.dumps(asdict(status)) if config.as_json else describe(status))
    return 0


def find_job(store: Store, job: str | None) -> Target:
    """A job and its last heartbeat; the newest job by default, as ids sort by time."""
    jobs = store.list("jobs")
    if not jobs:
        raise StoreError(f"{store.uri} has no job yet: `limbeck generate` makes one")
    if job and job not in jobs:
        raise StoreError(f"{store.uri} has no job {job}: its last is {jobs[-1]}")
    for name in [job] if job else reversed(jobs):
        try:
            target = read_target(store, name)
        except StoreError as error:
            if job:
                raise
            log.warning(f"{error}; it is left alone")
            continue
        if target:
            return target
        log.warning(f"{store.uri}/{paths.job_path(name)} is missing")
    raise StoreError(f"{store.uri} has no job that can be read: restore one, or name another with --job")


def job_status(store: Store, target: Target, *, now: datetime) -> Status:
    """Counts commits of the job's tasks, whatever job made them."""
    job, beat = target.job, target.beat
    total, committed = _needed(store, job)
    done, left = len(committed), total - len(committed)
    own = max(done - beat.found, 0)
    samples = own * job.layout.samples_per_shard
    last = _last_commit(store, job, committed) if own else None
    elapsed = (last - datetime.fromisoformat(job.started_at)).total_seconds() if last else 0.0
    failures = read_failures(store, job.job)
    sealed = _sealed_by(store, job)
    return Status(
        job=job.job,
        dataset=job.dataset,
        state=_state(sealed, target, left, now),
        tasks_done=done,
        tasks=total,
        samples_done=samples,
        samples_per_second=samples / elapsed if elapsed > 0 else None,
        seconds_to_go=elapsed / own * left if own else None,
        last_commit_age=(now - last).total_seconds() if last else None,
        failures=tuple({"task": failure.task, "error": failure.error} for failure in failures),
        manifest=sealed,
    )


def read_failures(store: Store, job: str) -> list[Failure]:
    """What the job has set aside."""
    folder = paths.failures_folder(job)
    found, unread = read_all(store, [f"{folder}/{name}" for name in store.list(folder)], Failure)
    for problem in unread.values():
        log.warning(problem)
    return list(found.values())


def describe(status: Status) -> str:
    """The status in a few lines."""
    rate = f", {status.samples_per_second:.0f} samples/s" if status.samples_per_second else ""
    eta = f", {status.seconds_to_go:.0f} s to go" if status.seconds_to_go else ""
    age = f", last commit {status.last_commit_age:.0f} s ago" if status.last_commit_age is not None else ""
    lines = [
        f"job {status.job} of {status.dataset}: {status.state}",
        f"{status.tasks_done}/{status.tasks} tasks, {status.samples_done} samples{rate}{eta}{age}",
    ]
    lines += [f"set aside {failure['task']}: {failure['error']}" for failure in status.failures]
    return "\n".join(map(shown, lines))


def _needed(store: Store, job: Job) -> tuple[int, list[str]]:
    """How many tasks of its window the job's parent did not list, and which of them are committed, in order.

    All of its window's once the parent was pruned. Nothing here is as long as the window, which may be anything.
    """
    parent = read_manifest(store, job.dataset, job.parent) if job.parent else None
    goal = Goal(job.dataset, parent, job.recipe_id, job.layout, job.window)
    try:
        listed = read_shard_table(store, parent).tasks if parent and goal.continues else frozenset()
    except Pruned:
        listed = frozenset()
    size = job.layout.samples_per_shard
    ranges = {split: job.window.task_range(split, size) for split in SPLITS}
    committed = [Task.parse(name, size) for name in list_committed(store, job.recipe_id, job.layout.id) - listed]
    inside = sorted((task for task in committed if task.index in ranges[task.split]), key=_in_order)
    known = sum(task.index in ranges[task.split] for task in (Task.parse(name, size) for name in listed))
    return sum(map(len, ranges.values())) - known, [task.name for task in inside]


def _in_order(task: Task) -> tuple[int, int]:
    return SPLITS.index(task.split), task.index


def _last_commit(store: Store, job: Job, names: list[str]) -> datetime | None:
    # Tasks are handed out in order, so the latest commits are among the last names.
    recent: dict[str, Commit] = read_commits(store, job.recipe_id, job.layout.id, names[-RECENT:])
    return max((datetime.fromisoformat(commit.committed_at) for commit in recent.values()), default=None)


def _sealed_by(store: Store, job: Job) -> int | None:
    """The number of the manifest that the job sealed."""
    numbers = range(job.parent + 1, latest_number(store, job.dataset) + 1)
    return next((number for number in numbers if _writer(read_manifest(store, job.dataset, number)) == job.job), None)


def _writer(manifest: Manifest | None) -> str | None:
    return manifest.writer if manifest else None


def _state(sealed: int | None, target: Target, left: int, now: datetime) -> str:
    state, at = target.beat.state, target.beat.at
    if sealed:
        return f"sealed as manifest {sealed}"
    if state == "sealed":
        return f"sealed at {at}, a manifest that was pruned since"
    if state == "stopped":
        return f"stopped with {left} tasks missing, at {at}: generate again goes on from here"
    if state == "failed":
        return f"ended with {left} tasks missing, nothing sealed, at {at}"
    if state == "ended":
        return f"ended at {at}: another job made what it asked for, or goes on with it"
    if state == "refused":
        return f"refused at {at}"
    if age(at, now) > STALLED:
        return f"stalled since {at}: it may be dead, generate again goes on from here"
    return "running" if left else "all tasks committed, not sealed"

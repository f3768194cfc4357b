"""`status`: how far a job is, running or dead, from what lies in the store."""

import json
from dataclasses import asdict, dataclass
from datetime import UTC, datetime

from pipeline.config import StatusConfig
from pipeline.plan import Goal, missing_tasks
from storage_schemas import paths
from storage_schemas.commit import Commit, Task, list_committed, read_commits
from storage_schemas.dataset import latest_number, read_manifest, read_shard_table
from storage_schemas.errors import StoreError
from storage_schemas.job import Failure, Job
from storage_schemas.manifest import Manifest
from storage_schemas.store import Store

RECENT = 64
"""Commits that are read to know how long ago the last one was."""

STALLED = 10
"""A job without a commit for this many times its usual interval is called stalled."""

FIRST_SECONDS = 600.0
"""So is one without its first commit for this long: it has no usual interval yet."""


@dataclass(frozen=True)
class Status:
    """Where a job stands. Seconds are as of now; rates are over the time from its start to its last commit."""

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
    status = job_status(store, read_job(store, config.job), now=datetime.now(UTC))
    print(json.dumps(asdict(status)) if config.as_json else told(status))
    return 0


def read_job(store: Store, job: str | None) -> Job:
    """A job's document; the newest job by default, as ids sort by time."""
    jobs = store.list("jobs")
    if not jobs:
        raise StoreError(f"{store.uri} has no job yet: `python -m pipeline generate` makes one")
    if job and job not in jobs:
        raise StoreError(f"{store.uri} has no job {job}: its last is {jobs[-1]}")
    path = paths.job_path(job or jobs[-1])
    data = store.read(path)
    if data is None:
        raise StoreError(f"{store.uri}/{path} is missing: name another job with --job")
    return Job.from_bytes(data, f"{store.uri}/{path}")


def job_status(store: Store, job: Job, *, now: datetime) -> Status:
    """Counts commits of the job's tasks, whoever made them."""
    needed = _needed(store, job)
    committed = list_committed(store, job.recipe_id, job.layout.id)
    left = [task for task in needed if task.name not in committed]
    done = job.tasks_missing - len(left)
    samples = done * job.layout.samples_per_shard
    last = _last_commit(store, job, [task.name for task in needed if task.name in committed]) if done else None
    elapsed = (last - datetime.fromisoformat(job.started_at)).total_seconds() if last else 0.0
    failures = read_failures(store, job.job)
    sealed = _sealed_by(store, job)
    age = (now - last).total_seconds() if last else None
    quiet = (now - (last or datetime.fromisoformat(job.started_at))).total_seconds()
    patience = max(60.0, STALLED * elapsed / done) if done else FIRST_SECONDS
    return Status(
        job=job.job,
        dataset=job.dataset,
        state=_state(sealed, failures, left, stalled=quiet > patience),
        tasks_done=done,
        tasks=job.tasks_missing,
        samples_done=samples,
        samples_per_second=samples / elapsed if elapsed > 0 else None,
        seconds_to_go=elapsed / done * len(left) if done else None,
        last_commit_age=age,
        failures=tuple({"task": failure.task, "error": failure.error} for failure in failures),
        manifest=sealed,
    )


def read_failures(store: Store, job: str) -> list[Failure]:
    """What the job has set aside."""
    folder = paths.failures_folder(job)
    names = store.list(folder)
    found = store.read_many([f"{folder}/{name}" for name in names])
    return [Failure.from_bytes(data, f"{store.uri}/{folder}") for data in found if data is not None]


def told(status: Status) -> str:
    """The status in a few lines."""
    rate = f", {status.samples_per_second:.0f} samples/s" if status.samples_per_second else ""
    eta = f", {status.seconds_to_go:.0f} s to go" if status.seconds_to_go else ""
    age = f", last commit {status.last_commit_age:.0f} s ago" if status.last_commit_age is not None else ""
    lines = [
        f"job {status.job} of {status.dataset}: {status.state}",
        f"{status.tasks_done}/{status.tasks} tasks, {status.samples_done} samples{rate}{eta}{age}",
    ]
    return "\n".join(lines + [f"set aside {failure['task']}: {failure['error']}" for failure in status.failures])


def _needed(store: Store, job: Job) -> list[Task]:
    """The tasks that the job's parent did not list."""
    parent = read_manifest(store, job.dataset, job.parent) if job.parent else None
    goal = Goal(job.dataset, parent, job.recipe_id, job.layout, job.window)
    listed = read_shard_table(store, parent).tasks if parent and goal.continues else frozenset()
    return missing_tasks(goal, listed)


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


def _state(sealed: int | None, failures: list[Failure], left: list[Task], *, stalled: bool) -> str:
    if sealed:
        return f"sealed as manifest {sealed}"
    if not left:
        return "all tasks committed, not sealed"
    if {task.name for task in left} <= {failure.task for failure in failures}:
        return f"ended with {len(left)} tasks missing, nothing sealed"
    return "stalled: it may be dead, generate again goes on from here" if stalled else "running"

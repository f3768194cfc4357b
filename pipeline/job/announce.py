"""A job tells the store what it aims at before it looks at anything there: from then on no prune deletes that."""

from datetime import datetime

from limbeck.pipeline.job.heartbeat import Pulse
from limbeck.pipeline.job.targets import is_lost
from limbeck.storage_schemas import paths
from limbeck.storage_schemas.clock import SKEW, check_clock, utc
from limbeck.storage_schemas.commit import Commit
from limbeck.storage_schemas.dataset import put_recipe
from limbeck.storage_schemas.errors import StoreError
from limbeck.storage_schemas.job import Job
from limbeck.storage_schemas.recipe import Recipe
from limbeck.storage_schemas.store import Store


def new_job() -> str:
    """An id that sorts by time, to the microsecond: 20260131T093000123456-1f2e3d4c."""
    return f"{utc():%Y%m%dT%H%M%S%f}-{paths.new_attempt()[:8]}"


def announce(store: Store, recipe: Recipe, job: Job, pulse: Pulse) -> bool:
    """Put the job's document, and its first heartbeat. Each plan of a driver is a job of its own.

    False where a prune took the driver's job before it for dead, so that what it held may be gone. StoreError where
    this machine's clock is not the storage's: what a job holds goes by time.
    """
    before, began, path = pulse.job, utc(), paths.job_path(job.job)
    put_recipe(store, recipe)  # which a prune needs that would begin the dataset in place of this job
    store.write(path, job.to_bytes())
    try:
        check_clock(store, path, since=began)
    except StoreError:
        store.remove(path)
        raise
    pulse.begin(job.job)
    return not before or not is_lost(store, before)


def is_early(commit: Commit, began: str) -> bool:
    """Whether a commit may be older than a job that began at that time, by clocks that are as far apart as may be."""
    return datetime.fromisoformat(commit.committed_at) < datetime.fromisoformat(began) + 2 * SKEW

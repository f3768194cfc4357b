"""Documents of jobs: what a driver is making, which tasks were set aside, which readers hold manifests."""

from typing import Annotated, Literal

from pydantic import Field

from limbeck.storage_schemas import paths
from limbeck.storage_schemas.documents import Document
from limbeck.storage_schemas.layout import Layout
from limbeck.storage_schemas.manifest import Window
from limbeck.storage_schemas.names import Count, DatasetName, JobName, Positive, RunName, Sha256, TaskName, Text, Time

JobState = Literal["planning", "running", "sealed", "ended", "failed", "stopped", "refused"]


class Job(Document):
    """A plan under way; `status` needs nothing but this and the commits."""

    job: JobName
    dataset: DatasetName
    recipe_id: Sha256
    layout: Layout
    window: Window
    parent: Annotated[Count, Field(description="Number of the manifest that it was planned from, 0 for none.")]
    tasks_total: Count
    tasks_missing: Annotated[Count, Field(description="Tasks of the window that the parent did not list.")]
    runner: Text
    workers: Count
    started_at: Time

    @property
    def own_paths(self) -> tuple[str, ...]:
        """One path, by its name."""
        return (paths.job_path(self.job),)


class Heartbeat(Document):
    """A driver's last word on its job. `found`: tasks of the job that were committed before it began to solve.

    planning -> running (it has checked what it builds on) -> sealed, ended (another job made what was asked), failed,
    stopped; planning -> refused. A job that lost the race to seal has ended: its driver plans again as another.
    """

    at: Time
    state: JobState
    found: Count = 0


class Prune(Document):
    """A run of `prune`: when it last said that it lives, and whether it has ended."""

    run: JobName
    machine: Text
    at: Time
    ended: bool = False


class Mark(Document):
    """A job that a prune has taken for dead: its driver can't seal what it planned, and no job builds on its word."""

    run: JobName
    at: Time


class Failure(Document):
    """A task that was set aside after its last attempt."""

    task: TaskName
    error: Text
    traceback: Text
    attempts: Count
    machine: Text
    failed_at: Time

    @property
    def own_paths(self) -> tuple[str, ...]:
        """One path, by its task, in the folder of its job."""
        return (f"failures/{self.task}.json",)


class Pin(Document):
    """A reader that holds a manifest until `expires_at` (ISO 8601, UTC)."""

    run: RunName
    dataset: DatasetName
    number: Positive
    expires_at: Time

    @property
    def own_paths(self) -> tuple[str, ...]:
        """One path, by its reader."""
        return (paths.pin_path(self.run),)

"""Who is making what, what was set aside and why, and who is reading."""

from typing import Annotated, Literal

from pydantic import Field

from storage_schemas.documents import Document
from storage_schemas.layout import Layout
from storage_schemas.manifest import Window
from storage_schemas.recipe import Sha256

JobState = Literal["planning", "running", "sealed", "ended", "failed", "stopped", "refused"]


class Job(Document):
    """A plan under way; `status` needs nothing but this and the commits."""

    job: str
    dataset: str
    recipe_id: Sha256
    layout: Layout
    window: Window
    parent: Annotated[int, Field(ge=0, description="number of the manifest it was planned from, 0 for none")]
    tasks_total: int
    tasks_missing: Annotated[int, Field(description="tasks of the window that the parent did not list")]
    runner: str
    workers: int
    started_at: str


class Heartbeat(Document):
    """A driver's last word on its job. `found`: tasks of the job that were committed before it began to solve.

    planning -> running (it has checked what it builds on) -> sealed, ended (another job made what was asked), failed,
    stopped; planning -> refused. A job that lost the race to seal is planning again.
    """

    at: str
    state: JobState
    found: int = 0


class Prune(Document):
    """Who prunes, when it last said that it lives, and whether it still does."""

    run: str
    machine: str
    at: str
    ended: bool = False


class Failure(Document):
    """A task that was set aside after its last attempt."""

    task: str
    error: str
    traceback: str
    attempts: int
    machine: str
    failed_at: str


class Pin(Document):
    """A reader that holds a manifest until `expires_at` (ISO 8601, UTC)."""

    run: str
    dataset: str
    number: int
    expires_at: str

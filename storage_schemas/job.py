"""Who is making what, what was set aside and why, and who is reading."""

from typing import Annotated

from pydantic import Field

from storage_schemas.documents import Document
from storage_schemas.layout import Layout
from storage_schemas.manifest import Window
from storage_schemas.recipe import Sha256


class Job(Document):
    """A plan under way; `status` needs nothing but this and the commits."""

    job: str
    dataset: str
    recipe_id: Sha256
    layout: Layout
    window: Window
    parent: Annotated[int, Field(ge=0, description="number of the manifest it was planned from, 0 for none")]
    tasks_total: int
    tasks_missing: int
    runner: str
    workers: int
    started_at: str


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

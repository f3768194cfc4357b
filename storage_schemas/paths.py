"""Where everything lies, relative to the store's root."""

import re
import secrets
from pathlib import PurePosixPath

from limbeck.storage_schemas.errors import CONTROLS, StoreError, shown

STORE = "store.json"
NOT_LAYOUTS = ("recipe.json", "teacher", "conditions", "notes")
"""What else lies in a recipe's folder."""

INDEX = "(?:[0-9]{8}|[1-9][0-9]{8,17})"
"""A task's index in its name: eight digits at least, and as many as it takes."""

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")
RECIPES, DATASETS, JOBS, PINS, PRUNES = "recipes", "datasets", "jobs", "pins", "prunes"

_TASK = f"(?:train|holdout)-{INDEX}"
ATTEMPT_OF_TASK = f"{_TASK}-[0-9a-f]{{16}}"
COMMIT = re.compile(rf"({_TASK})\.json")
RECORD = re.compile(rf"({ATTEMPT_OF_TASK})\.json")
TABLE = re.compile(r"[0-9a-f]{64}\.parquet")
UNFINISHED = re.compile(r"\..+\.[0-9a-f]{32}\.tmp")
"""Names of our own in a store's folders, as SHARD in layout.py. A prune leaves every other file where it is."""


def new_attempt() -> str:
    """A name that no other writer has: 16 hex digits."""
    return secrets.token_hex(8)


def recipe_path(recipe_id: str) -> str:
    """The recipe: how samples are made."""
    return f"recipes/{recipe_id}/recipe.json"


def weights_folder(recipe_id: str) -> str:
    """The teacher's own weights, where generate kept them."""
    return f"recipes/{recipe_id}/teacher"


def notes_folder(recipe_id: str) -> str:
    """What is known of the recipe beside what it is."""
    return f"recipes/{recipe_id}/notes"


def calibration_path(recipe_id: str, sha256: str) -> str:
    """Solver error that was measured before, named by its content."""
    return f"{notes_folder(recipe_id)}/calibration-{sha256[:16]}.json"


def shards_folder(recipe_id: str, layout_id: str) -> str:
    """Shards of one layout; a file here exists only if a commit names it."""
    return f"recipes/{recipe_id}/{layout_id}/shards"


def commits_folder(recipe_id: str, layout_id: str) -> str:
    """Commits of one layout."""
    return f"recipes/{recipe_id}/{layout_id}/commits"


def shard_path(recipe_id: str, layout_id: str, task: str, attempt: str, suffix: str) -> str:
    """A shard under a name of its own attempt."""
    return f"{shards_folder(recipe_id, layout_id)}/{task}-{attempt}{suffix}"


def commit_path(recipe_id: str, layout_id: str, task: str) -> str:
    """The commit of a task that others go on with."""
    return f"{commits_folder(recipe_id, layout_id)}/{task}.json"


def records_folder(recipe_id: str, layout_id: str) -> str:
    """Commits of one layout by their attempts."""
    return f"recipes/{recipe_id}/{layout_id}/records"


def record_path(recipe_id: str, layout_id: str, task: str, attempt: str) -> str:
    """The document that makes a shard exist, under a name that is never used again."""
    return f"{records_folder(recipe_id, layout_id)}/{task}-{attempt}.json"


def listed_paths(recipe_id: str, layout_id: str, task: str, shard: str) -> tuple[str, str]:
    """Where the commit of a shard's path may lie: its record, or the task's commit, which older releases listed."""
    record = f"{records_folder(recipe_id, layout_id)}/{PurePosixPath(shard).stem}.json"
    return record, commit_path(recipe_id, layout_id, task)


def task_of(record: str) -> str:
    """The task in the name of a record, <task>-<attempt>; a task's own name as it is."""
    return "-".join(record.split("-")[:2])


def manifests_folder(dataset: str) -> str:
    """Sealed views of one dataset."""
    return f"datasets/{dataset}/manifests"


def manifest_path(dataset: str, number: int) -> str:
    """Manifest `number`, from 1."""
    return f"{manifests_folder(dataset)}/{number:06d}.json"


def shard_table_path(dataset: str, sha256: str) -> str:
    """A manifest's table of shards, named by its content."""
    return f"{manifests_folder(dataset)}/{sha256}.parquet"


def job_path(job: str) -> str:
    """The job: which driver is making what."""
    return f"jobs/{job}/job.json"


def heartbeat_path(job: str) -> str:
    """The heartbeat: when the job's driver last said that it lives."""
    return f"jobs/{job}/heartbeat.json"


def mark_path(job: str) -> str:
    """The mark that a prune has taken the job for dead."""
    return f"jobs/{job}/dead.json"


def failures_folder(job: str) -> str:
    """Tasks of a job that were set aside."""
    return f"jobs/{job}/failures"


def failure_path(job: str, task: str) -> str:
    """A task that was set aside, and why."""
    return f"{failures_folder(job)}/{task}.json"


def pin_path(run: str) -> str:
    """A reader that holds a manifest."""
    return f"pins/{run}.json"


def prune_path(number: int) -> str:
    """The document of a prune; the last number that is there holds the lease."""
    return f"{PRUNES}/{number:06d}.json"


def is_outside(path: str) -> bool:
    """Whether a path may lead out of the store, or isn't a plain one.

    That is: absolute, with empty parts, `.` or `..`, a drive letter or another scheme, backslashes, control characters.
    """
    return (
        any(part in ("", ".", "..") for part in path.split("/"))
        or "\\" in path
        or _SCHEME.match(path) is not None
        or CONTROLS.search(path) is not None
    )


def join(root: str, path: str) -> str:
    """A path in the store as a full one. Every path goes through here."""
    if is_outside(path):
        raise StoreError(f"{shown(path)!r} is no path in a store: no document names a file outside of it")
    return f"{root}/{path}"

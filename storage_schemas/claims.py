"""What a manifest, its table, a commit and a file say of the same samples, held against each other.

Every reader asks here, and so does `verify`: they believe the same. Nothing is allocated for a number in a document
before that number is held against what it counts.
"""

import re
from collections.abc import Iterator
from itertools import pairwise

import numpy as np

from limbeck.storage_schemas import paths
from limbeck.storage_schemas.commit import Commit, ids_of
from limbeck.storage_schemas.errors import CorruptShard
from limbeck.storage_schemas.layout import FORMATS, Layout
from limbeck.storage_schemas.recipe import NoCondition, Recipe
from limbeck.storage_schemas.record import NO_CONDITION, NO_DATA, Columns
from limbeck.storage_schemas.shards import Shard


def check_commit(shard: Shard, commit: Commit, recipe: Recipe, layout: Layout, *, name: str) -> None:
    """CorruptShard unless a commit is the one that the table lists, of a shard of this recipe and layout."""
    if not shard.lists(commit):
        raise CorruptShard(f"{name} is not what the manifest lists: restore it")
    if problem := _problem(commit, recipe, layout):
        raise CorruptShard(f"{name} {problem}: restore it")


def _problem(commit: Commit, recipe: Recipe, layout: Layout) -> str | None:
    task = commit.task
    path = paths.shard_path(recipe.id, layout.id, task.name, commit.attempt, layout.suffix)
    if (commit.recipe_id, commit.layout_id, commit.samples_per_shard) != (
        recipe.id, layout.id, layout.samples_per_shard,
    ):  # fmt: skip
        return "is of another recipe or layout than its manifest"
    if commit.path != path:
        return f"names {commit.path!r}, not a file of its own task and attempt"
    lost = sorted(commit.quarantined)
    if lost and not (task.start <= lost[0] and lost[-1] < task.stop and all(a < b for a, b in pairwise(lost))):
        return f"has quarantined ids that are not each once in [{task.start}, {task.stop})"
    if commit.rows != task.samples_per_shard - len(lost):
        return f"says {commit.rows} rows of {task.samples_per_shard} samples with {len(lost)} quarantined"
    if not all(re.fullmatch(r"-?[0-9]{1,19}", label) for label in commit.labels):
        return "counts labels that are no integers"
    covers = FORMATS[layout.format].covers(commit, recipe.fields)
    return None if covers else f"has chunks that don't cover its {commit.rows} rows"


def check_integers(recipe: Recipe, commit: Commit, columns: Columns, *, first_row: int = 0) -> None:
    """CorruptShard unless the integers of these rows are ids of the shard and conditions that the recipe has.

    columns: of rows from `first_row` on, sample_id among them.
    """
    ids = columns["sample_id"]
    for name, wrong in (("sample ids", _other_ids(commit, ids, first_row)), *_strays(recipe, columns)):
        if wrong:
            raise CorruptShard(f"{commit.path} holds other {name} than {wrong}: restore the file or generate it again")


def _other_ids(commit: Commit, ids: np.ndarray, first_row: int) -> str | None:
    if np.array_equal(ids, ids_of(commit, first_row, len(ids))):
        return None
    return f"[{commit.task.start}, {commit.task.stop}) without the quarantined"


def _strays(recipe: Recipe, columns: Columns) -> Iterator[tuple[str, str | None]]:
    """Each integer column, and the range that a value of it is outside of."""
    condition = recipe.condition
    labels = (NO_CONDITION, 0) if isinstance(condition, NoCondition) else (0, condition.num_classes)
    ranges = {
        "condition": labels,
        "start_index": (0, recipe.num_steps - 1),
        "data_id": (NO_DATA, 2**63 - 1),
    }
    for name, (low, past) in ranges.items():
        values = columns.get(name, np.empty(0, np.int64))
        if len(values) and not low <= int(values.min()) <= int(values.max()) < past:
            yield f"values of {name}", f"[{low}, {past})"

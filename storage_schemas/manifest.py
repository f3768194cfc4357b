"""A sealed view of a dataset: one recipe, one window per split, and an explicit list of what is missing."""

from collections.abc import Iterator
from typing import Literal, Self

import numpy as np
from pydantic import Field, model_validator

from limbeck.storage_schemas import paths
from limbeck.storage_schemas.canonical import digest
from limbeck.storage_schemas.commit import Task
from limbeck.storage_schemas.documents import SCHEMA_VERSION, Document
from limbeck.storage_schemas.layout import Layout
from limbeck.storage_schemas.names import (
    MOST,
    Count,
    DatasetName,
    JobName,
    Positive,
    Sha256,
    StoredPath,
    TaskName,
    Text,
    Time,
)
from limbeck.storage_schemas.record import SPLITS, Split

Bounds = tuple[Count, Count]


class Window(Document):
    """Ids [start, stop) of each split that readers see."""

    train: Bounds = (0, 0)
    holdout: Bounds = (0, 0)

    @model_validator(mode="after")
    def _runs_forward(self) -> Self:
        for split in SPLITS:
            start, stop = self.bounds(split)
            if not 0 <= start <= stop:
                raise ValueError(f"the {split} window [{start}, {stop}) must have 0 <= start <= stop")
        return self

    def bounds(self, split: Split) -> Bounds:
        """[start, stop) of a split."""
        return self.train if split == "train" else self.holdout

    def task_range(self, split: Split, samples_per_shard: int) -> range:
        """Indices of the tasks that the window touches; an empty window touches none."""
        start, stop = self.bounds(split)
        first = start // samples_per_shard
        return range(first, first if start == stop else -(-stop // samples_per_shard))

    def tasks(self, samples_per_shard: int) -> Iterator[Task]:
        """Every task that the window touches, train first."""
        for split in SPLITS:
            for index in self.task_range(split, samples_per_shard):
                yield Task(split, index, samples_per_shard)


class ShardTableRecord(Document):
    """The table of shards beside the manifest, named by its sha256."""

    path: StoredPath
    sha256: Sha256
    count: Count


def _is_none(value: object) -> bool:
    return value is None


class Floor(Document):
    """The oldest manifest number that is still served. `sealed_at`: when the manifest that raised it was sealed.

    From `sweep_at` on, what only older manifests name may be deleted, and so may what none named at `sealed_at`. Until
    then the floor before it holds: `swept` is its number, and what was committed before `since` is stale already.
    `set_by`: the manifest that raised it. These three are absent from floors of older releases.
    """

    number: Positive = 1
    sealed_at: Time | None = None
    sweep_at: Time | None = None
    swept: Positive | None = Field(default=None, exclude_if=_is_none)
    since: Time | None = Field(default=None, exclude_if=_is_none)
    set_by: Positive | None = Field(default=None, exclude_if=_is_none)

    @model_validator(mode="after")
    def _times_go_together(self) -> Self:
        if (self.sealed_at is None) != (self.sweep_at is None):
            raise ValueError("a floor has the time of its sealing and that of its sweep, or neither")
        return self


class Manifest(Document):
    """Never changes. `writer` is the attempt that sealed it.

    `ticks`: the latest tick of a schedule that each policy of `regenerate` has served. `train_changed_at`: when the
    recipe or the train window last changed.
    """

    schema_version: Literal[2] = SCHEMA_VERSION
    dataset: DatasetName
    number: Positive
    parent_digest: Sha256 | None
    writer: JobName
    recipe_id: Sha256
    layout: Layout
    window: Window
    missing: tuple[TaskName, ...] = ()
    rows: dict[Split, Count]
    shards: ShardTableRecord
    content_digest: Sha256
    floor: Floor = Floor()
    ticks: dict[Text, Text] = Field(default_factory=dict)
    train_changed_at: Time
    sealed_at: Time

    @model_validator(mode="after")
    def _names_its_own(self) -> Self:
        if self.shards.path != paths.shard_table_path(self.dataset, self.shards.sha256):
            raise ValueError("its table of shards is not named by its digest, beside it")
        if self.floor.number > self.number:
            raise ValueError(f"it serves from manifest {self.floor.number} on, which is later")
        if self.rows.keys() != set(SPLITS):
            raise ValueError("it doesn't count the rows of every split")
        return self

    @model_validator(mode="after")
    def _accounts_for_its_tasks(self) -> Self:
        """A window may be as long as it likes; a reader of each of its tasks finds so many in the table."""
        size = self.layout.samples_per_shard
        tasks = [self.window.task_range(split, size) for split in SPLITS]
        asked, listed = sum(map(len, tasks)), self.shards.count + len(self.missing)
        if asked > listed:
            raise ValueError(f"its window has {asked} tasks, it lists and misses {listed}")
        if any(each.stop * size > MOST for each in tasks):
            raise ValueError(f"its last task has ids beyond {MOST}")
        return self

    @property
    def own_paths(self) -> tuple[str, ...]:
        """One path, by its dataset and number."""
        return (paths.manifest_path(self.dataset, self.number),)

    @property
    def digest(self) -> str:
        """sha256 of the canonical JSON: what a child names as its parent."""
        return digest(self.plain())


class ManifestDraft(Document):
    """What a driver wants to seal on top of `parent` (the latest that it planned on)."""

    dataset: DatasetName
    parent: Manifest | None
    writer: JobName
    recipe_id: Sha256
    layout: Layout
    window: Window
    missing: tuple[TaskName, ...] = ()
    ticks: dict[Text, Text] = Field(
        default_factory=dict, description="Ticks newly served; the others of its parent are kept."
    )

    @property
    def number(self) -> int:
        """Parent + 1."""
        return 1 if self.parent is None else self.parent.number + 1

    @property
    def keeps_train(self) -> bool:
        """Whether readers see the same train ids of the same recipe as in the parent."""
        before = self.parent and (self.parent.recipe_id, self.parent.window.train)
        return before == (self.recipe_id, self.window.train)


def content_digest(recipe_id: str, window: Window, gaps: dict[Split, np.ndarray]) -> str:
    """Digest of which samples a reader sees: the recipe, the windows and the id ranges absent from them."""
    return digest(
        {
            "recipe": recipe_id,
            "window": {split: list(window.bounds(split)) for split in SPLITS},
            "gaps": {split: gaps[split].tolist() for split in SPLITS},
        }
    )

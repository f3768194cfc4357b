"""A sealed view of a dataset: one recipe, one window per split, and an explicit list of what is missing."""

from collections.abc import Iterator
from typing import Literal, Self

import numpy as np
from pydantic import Field, model_validator

from storage_schemas.canonical import digest
from storage_schemas.commit import Task
from storage_schemas.documents import SCHEMA_VERSION, Document
from storage_schemas.layout import Layout
from storage_schemas.recipe import Sha256
from storage_schemas.record import SPLITS, Split

Bounds = tuple[int, int]


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

    path: str
    sha256: Sha256
    count: int


class Floor(Document):
    """The oldest manifest number that is still served. `sealed_at`: when the manifest that raised it was sealed.

    From `sweep_at` on, what only older manifests name may be deleted, and so may what none named at `sealed_at`.
    """

    number: int = Field(default=1, ge=1)
    sealed_at: str | None = None
    sweep_at: str | None = None


class Manifest(Document):
    """Never changes. `writer` is the attempt that sealed it.

    `ticks`: the latest tick of a schedule that each policy of `regenerate` has served. `train_changed_at`: when the
    recipe or the train window last changed.
    """

    schema_version: Literal[2] = SCHEMA_VERSION
    dataset: str
    number: int = Field(ge=1)
    parent_digest: Sha256 | None
    writer: str
    recipe_id: Sha256
    layout: Layout
    window: Window
    missing: tuple[str, ...] = ()
    rows: dict[Split, int]
    shards: ShardTableRecord
    content_digest: Sha256
    floor: Floor = Floor()
    ticks: dict[str, str] = Field(default_factory=dict)
    train_changed_at: str
    sealed_at: str

    @property
    def digest(self) -> str:
        """sha256 of the canonical JSON: what a child names as its parent."""
        return digest(self.plain())


class ManifestDraft(Document):
    """What a driver wants to seal on top of `parent` (the latest that it planned on)."""

    dataset: str = Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]*$")
    parent: Manifest | None
    writer: str
    recipe_id: Sha256
    layout: Layout
    window: Window
    missing: tuple[str, ...] = ()
    ticks: dict[str, str] = Field(default_factory=dict, description="newly served; the parent's others are kept")

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

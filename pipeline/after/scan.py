"""One pass over a dataset's shards, several at a time: bytes against checksums, and what an audit must see of the rows.

A shard is read from the store once. Memory: a few shards a thread, and sums of the size of one sample.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import numpy as np

from limbeck.diffusion.recipes.samples import draw_scales
from limbeck.pipeline.after.duplicates import RECORD, Sample, fingerprints
from limbeck.pipeline.after.normality import NoiseSums, noise_sums
from limbeck.pipeline.after.resolve import Stored
from limbeck.storage_schemas.commit import Commit
from limbeck.storage_schemas.dataset import Dataset
from limbeck.storage_schemas.errors import CorruptShard
from limbeck.storage_schemas.formats import PIECE, check_shard, read_shard
from limbeck.storage_schemas.record import NO_CONDITION, Columns, Field, from_storage
from limbeck.storage_schemas.shards import Shard
from limbeck.storage_schemas.store import Store

T = TypeVar("T")

BLOCK_VALUES = 1 << 18
LARGEST = {"float16": 65504.0, "bfloat16": float.fromhex("0x1.fep127"), "float32": float(np.finfo(np.float32).max)}


@dataclass
class Spread:
    """All values of a state so far: how many, how many not finite or at the dtype's largest, and their extent.

    at_low, at_high: how many equal `low`, `high`: a denoiser that clips piles its values up there.
    """

    values: int = 0
    not_finite: int = 0
    saturated: int = 0
    total: float = 0.0
    squares: float = 0.0
    low: float = np.inf
    high: float = -np.inf
    at_low: int = 0
    at_high: int = 0

    @property
    def std(self) -> float:
        """Standard deviation of the finite values."""
        finite = max(1, self.values - self.not_finite)
        return float(np.sqrt(max(0.0, self.squares / finite - (self.total / finite) ** 2)))

    def plus(self, other: "Spread") -> "Spread":
        """The values of both."""
        low, high = min(self.low, other.low), max(self.high, other.high)
        return Spread(
            self.values + other.values,
            self.not_finite + other.not_finite,
            self.saturated + other.saturated,
            self.total + other.total,
            self.squares + other.squares,
            low,
            high,
            sum(part.at_low for part in (self, other) if part.low == low),
            sum(part.at_high for part in (self, other) if part.high == high),
        )


@dataclass
class Findings:
    """What is in the rows of a shard, or of many, that are inside the window."""

    noise: NoiseSums
    rows: int = 0
    states: dict[str, Spread] = field(default_factory=dict)
    labels: dict[int, int] = field(default_factory=dict)
    scales: dict[float, int] = field(default_factory=dict)
    records: np.ndarray = field(default_factory=lambda: np.empty(0, RECORD))
    picked: tuple[Stored, ...] = ()

    def plus(self, other: "Findings") -> "Findings":
        """The rows of both, without their fingerprints, which are too many to keep."""
        return Findings(
            self.noise.plus(other.noise),
            self.rows + other.rows,
            {name: self.states.get(name, Spread()).plus(spread) for name, spread in other.states.items()},
            _summed(self.labels, other.labels),
            _summed(self.scales, other.scales),
            picked=self.picked + other.picked,
        )


@contextmanager
def near(store: Store, path: str) -> Iterator[Store]:
    """A store to read `path` from more than once: the store itself if it is a folder, else scratch with a copy."""
    size = store.size(path)
    if size is None or store.local_path(path):
        yield store
        return
    with TemporaryDirectory(prefix="limbeck-") as scratch:
        copy = Path(scratch) / path
        copy.parent.mkdir(parents=True)
        with open(copy, "wb") as file:
            for offset in range(0, size, PIECE):
                file.write(store.read_range(path, offset, min(PIECE, size - offset)))
        yield Store(scratch)


def scan_shard(dataset: Dataset, shard: Shard, picked: frozenset[Sample]) -> tuple[list[str], Findings | None]:
    """What is wrong with a shard's bytes and ids; and, if nothing is, what an audit must see of its rows."""
    commit = dataset.commit(shard)
    with near(dataset.store, commit.path) as store:
        problems, columns = check_bytes(dataset, commit, store)
        return problems, None if columns is None else _findings(dataset, shard, commit, columns, picked)


def check_bytes(dataset: Dataset, commit: Commit, store: Store) -> tuple[list[str], Columns | None]:
    """What is wrong with a shard's bytes, which `store` holds; and if nothing is, its rows as every reader has them."""
    problems, columns = check_shard(store, commit), None
    if not problems:
        try:
            columns = read_shard(store, commit, dataset.recipe, verify=False)
        except CorruptShard as error:
            problems = [str(error)]
    return [problem.replace(store.uri, dataset.store.uri) for problem in problems], columns


def _findings(dataset: Dataset, shard: Shard, commit: Commit, columns: Columns, picked: frozenset[Sample]) -> Findings:
    recipe, inside = dataset.recipe, dataset.rows_inside(shard)
    rows = {name: column[inside] for name, column in columns.items()}
    scales = draw_scales(recipe, shard.split, rows["sample_id"])
    return Findings(
        noise=noise_sums(from_storage(rows["noise"], recipe.storage_dtype), recipe.sigmas[0], recipe.storage_dtype),
        rows=len(rows["sample_id"]),
        states={field.name: spread(field, rows[field.name]) for field in recipe.fields if not field.is_scalar},
        labels=_counts(rows["condition"]),
        scales=_counts(scales),
        records=fingerprints(shard.split, rows["sample_id"], rows["noise"]),
        picked=tuple(_picked(shard, commit, rows, picked)),
    )


def _counts(values: np.ndarray) -> dict[Any, int]:
    found, counts = np.unique(values, return_counts=True)
    return dict(zip(found.tolist(), counts.tolist(), strict=True))


def _summed(one: dict[T, int], other: dict[T, int]) -> dict[T, int]:
    return {key: one.get(key, 0) + other.get(key, 0) for key in one | other}


def _picked(shard: Shard, commit: Commit, rows: Columns, picked: frozenset[Sample]) -> Iterator[Stored]:
    wanted = [sample.id for sample in picked if sample.split == shard.split]
    for row in np.flatnonzero(np.isin(rows["sample_id"], wanted)):
        copied = {name: column[row].copy() for name, column in rows.items()}
        yield Stored(Sample(shard.split, int(copied["sample_id"])), copied, commit.machine)


def spread(field: Field, stored: np.ndarray) -> Spread:
    """The spread of a state column, a block of rows at a time."""
    total, flat = Spread(), stored.reshape(len(stored), math.prod(field.shape))
    rows = max(1, BLOCK_VALUES // max(1, flat.shape[1]))
    for first in range(0, len(flat), rows):
        total = total.plus(_block_spread(field, flat[first : first + rows]))
    return total


def _block_spread(field: Field, stored: np.ndarray) -> Spread:
    values = from_storage(stored, field.dtype).astype(np.float64)
    finite = values[np.isfinite(values)]
    low, high = (finite.min(), finite.max()) if finite.size else (np.inf, -np.inf)
    return Spread(
        values.size,
        values.size - finite.size,
        int((np.abs(finite) >= LARGEST[field.dtype]).sum()),
        float(finite.sum()),
        float(np.square(finite).sum()),
        float(low),
        float(high),
        int((finite == low).sum()),
        int((finite == high).sum()),
    )


def labels_asked(labels: dict[int, int], num_classes: int | None) -> dict[int, int]:
    """Counts of every label that may occur, in order, and of those that may not."""
    wanted = [NO_CONDITION] if num_classes is None else range(num_classes)
    return {label: labels.get(label, 0) for label in [*wanted, *(set(labels) - set(wanted))]}

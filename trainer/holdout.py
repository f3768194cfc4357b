"""Stored pairs to judge by: the teacher's outputs for noises that no student was fitted on."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from storage_schemas.dataset import Dataset
from storage_schemas.errors import ManifestMismatch
from storage_schemas.record import NO_CONDITION, Split, from_storage

_COLUMNS = ("sample_id", "condition", "noise", "output")


@dataclass(frozen=True)
class Pairs:
    """x_T and the solver's x_0, [n, *sample_shape] in the recipe's solve dtype; condition int64 [n] or None."""

    noise: Tensor
    output: Tensor
    condition: Tensor | None

    def __len__(self) -> int:
        return len(self.noise)


def read_pairs(dataset: Dataset, split: Split, count: int | None, *, at_most: int) -> Pairs:
    """The first `count` pairs of a split, in order of their ids; by default all that there are, up to at_most."""
    have = dataset.ids(split).count
    wanted = min(have, at_most) if count is None else count
    if dataset.recipe.chain != "trajectory":
        raise ManifestMismatch("this dataset holds segments, which have no outputs; evaluate on one of trajectories")
    if wanted > have or have < 2:
        told = f"the dataset has {have} {split} samples, {max(wanted, 2)} are needed"
        raise ManifestMismatch(f"{told}; give a smaller --count, or generate with a larger --{_COUNT_FLAG[split]}")
    stored = _read(dataset, split, wanted)
    columns = {name: from_storage(values, _dtype(dataset, name)) for name, values in stored.items()}
    dtype = getattr(torch, dataset.recipe.solve_dtype)
    condition = torch.from_numpy(columns["condition"].astype(np.int64))
    return Pairs(
        noise=torch.from_numpy(columns["noise"]).to(dtype),
        output=torch.from_numpy(columns["output"]).to(dtype),
        condition=None if (condition == NO_CONDITION).all() else condition,
    )


_COUNT_FLAG = {"train": "count", "holdout": "holdout"}


def _read(dataset: Dataset, split: Split, count: int) -> dict[str, np.ndarray]:
    parts, rows = [], 0
    for shard in dataset.shards(split):
        inside = dataset.rows_inside(shard)
        columns = dataset.read(shard, _COLUMNS)
        parts.append({name: columns[name][inside] for name in _COLUMNS})
        rows += len(parts[-1]["sample_id"])
        if rows >= count:
            break
    return {name: np.concatenate([part[name] for part in parts])[:count] for name in _COLUMNS}


def _dtype(dataset: Dataset, column: str) -> str:
    return next(field.dtype for field in dataset.recipe.fields if field.name == column)

"""Stored pairs to judge by: the teacher's outputs for noises that no student was fitted on."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from limbeck.diffusion.recipes.samples import draw_scales
from limbeck.storage_schemas.dataset import Dataset
from limbeck.storage_schemas.errors import ManifestMismatch
from limbeck.storage_schemas.record import NO_CONDITION, Split, from_storage

_COLUMNS = ("sample_id", "condition", "noise", "output")


@dataclass(frozen=True)
class Pairs:
    """x_T and the solver's x_0, [n, *sample_shape] in the recipe's solve dtype; condition int64 [n] or None.

    guidance: float64 [n], the scale that each was solved at. seed, split and ids say whose they are.
    """

    noise: Tensor
    output: Tensor
    condition: Tensor | None
    guidance: Tensor
    seed: int
    split: Split
    ids: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.noise)

    def parts(self, size: int, device: torch.device) -> Iterator["Pairs"]:
        """`size` samples at a time, on the device."""
        for first in range(0, len(self), size):
            rows = slice(first, first + size)
            yield replace(
                self,
                noise=self.noise[rows].to(device),
                output=self.output[rows].to(device),
                condition=None if self.condition is None else self.condition[rows].to(device),
                guidance=self.guidance[rows].to(device),
                ids=self.ids[rows],
            )


def read_pairs(dataset: Dataset, split: Split, count: int | None, *, at_most: int) -> Pairs:
    """The first `count` pairs of a split, in order of their ids; by default all that there are, up to at_most."""
    have = dataset.ids(split).count
    wanted = min(have, at_most) if count is None else count
    if dataset.recipe.chain != "trajectory":
        raise ManifestMismatch("this dataset holds segments, which have no outputs; evaluate on one of trajectories")
    if wanted > have or have < 2:
        problem = f"the dataset has {have} {split} samples, {max(wanted, 2)} are needed"
        raise ManifestMismatch(f"{problem}; give a smaller --count, or generate with a larger --{_COUNT_FLAG[split]}")
    stored = _read(dataset, split, wanted)
    recipe, ids = dataset.recipe, stored["sample_id"]
    columns = {name: from_storage(values, _dtype(dataset, name)) for name, values in stored.items()}
    dtype = getattr(torch, recipe.solve_dtype)
    condition = torch.from_numpy(columns["condition"].astype(np.int64))
    return Pairs(
        noise=torch.from_numpy(columns["noise"]).to(dtype),
        output=torch.from_numpy(columns["output"]).to(dtype),
        condition=None if (condition == NO_CONDITION).all() else condition,
        guidance=torch.from_numpy(draw_scales(recipe, split, ids)),
        seed=recipe.noise.seed,
        split=split,
        ids=ids,
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

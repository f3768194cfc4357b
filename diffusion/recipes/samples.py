"""What a sample id draws: its noise, label and guidance scale, each a pure function of (seed, split, id)."""

import numpy as np
import torch
from torch import Tensor

from limbeck.diffusion import noise
from limbeck.storage_schemas.recipe import Recipe, UniformLabels
from limbeck.storage_schemas.record import to_storage


def draw_noise(recipe: Recipe, split: str, ids: np.ndarray) -> Tensor:
    """x_T = sigma_T eps: [B, *shape], rounded to the storage dtype before the solve, so that a stored pair is exact."""
    eps = noise.standard_normal(recipe.noise.seed, split, ids, recipe.sample_shape)
    with np.errstate(over="ignore"):
        stored = to_storage(recipe.sigmas[0] * eps, recipe.storage_dtype)
    # bfloat16 is stored as its raw bits
    values = torch.from_numpy(stored.view(np.int16) if recipe.storage_dtype == "bfloat16" else stored)
    if recipe.storage_dtype == "bfloat16":
        values = values.view(torch.bfloat16)
    return values.to(getattr(torch, recipe.solve_dtype))


def draw_labels(recipe: Recipe, split: str, ids: np.ndarray) -> np.ndarray | None:
    """int64 [B], or None for a recipe without conditions."""
    if not isinstance(recipe.condition, UniformLabels):
        return None
    return noise.labels(recipe.noise.seed, split, ids, recipe.condition.num_classes)


def draw_scales(recipe: Recipe, split: str, ids: np.ndarray) -> np.ndarray:
    """The guidance scale of each id: float64 [B]."""
    return noise.guidance_scales(recipe.noise.seed, split, ids, recipe.guidance.scales)

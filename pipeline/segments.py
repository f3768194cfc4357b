"""Segments x_t -> x_t' -> x_t'' that start from noised real images: what a round of progressive distillation fits.

Of each sample the image, the start's place on the grid and the noise are pure functions of (seed, split, id). Both
splits draw from the images that teachers are fitted on, with other noises: of the source's reference half nothing is
ever seen.
"""

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from limbeck.diffusion import noise
from limbeck.diffusion.flow_map import jump_coefficients
from limbeck.diffusion.process import Process, expand
from limbeck.diffusion.solvers import Denoise
from limbeck.storage_schemas.errors import UserError
from limbeck.storage_schemas.images import images_digest, read_images
from limbeck.storage_schemas.recipe import DataStart, Recipe
from limbeck.storage_schemas.record import from_storage, to_storage

_IMAGES = "data:"


@dataclass(frozen=True)
class Images:
    """x_0 float32 [n, *sample_shape] in [-1, 1] and labels int64 [n]."""

    pixels: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True)
class Starts:
    """Where segments begin: index int32 [B] on the grid, which image, int64 [B], its label, and x_t [B, ...]."""

    index: np.ndarray
    data: np.ndarray
    labels: np.ndarray
    x_t: Tensor


def data_start(start: str, *, sample_shape: tuple[int, ...], num_classes: int | None) -> DataStart:
    """`data:IMAGES` with the digest of what is there. ValueError where it is no data for this teacher."""
    uri = start.removeprefix(_IMAGES)
    pixels, labels = read_images(uri, "train")
    if pixels.shape[1:] != sample_shape:
        problem = f"{uri} has images {list(pixels.shape[1:])}, the teacher makes {list(sample_shape)}"
        raise ValueError(f"{problem}: name images that it was fitted on")
    if num_classes is not None and not 0 <= labels.min() <= labels.max() < num_classes:
        odd = labels.min() if labels.min() < 0 else labels.max()
        raise ValueError(f"{uri} has label {odd}, the teacher has {num_classes} classes: name other images")
    return DataStart(images=uri, digest=images_digest(pixels, labels))


@lru_cache(maxsize=1)
def starting_images(start: DataStart) -> Images:
    """The images of a recipe, read once in a process. UserError where they are others here."""
    pixels, labels = read_images(start.images, "train")
    found = images_digest(pixels, labels)
    if found != start.digest:
        problem = f"{start.images} holds images {found[:12]} here, the recipe says {start.digest[:12]}"
        raise UserError(f"{problem}: it changed, or another machine has other files; give all the same")
    return Images(pixels, labels)


def draw_starts(recipe: Recipe, split: str, ids: np.ndarray) -> Starts:
    """x_t = alpha_t x_0 + sigma_t eps at an even index 0, 2, ..., N - 2 of the grid, rounded to the storage dtype.

    Salimans & Ho 2022, algorithm 2: t = i/N with i uniform, of the grid of the student that is to be.
    """
    assert isinstance(recipe.start, DataStart)
    images = starting_images(recipe.start)
    data, place = noise.data_and_place(
        recipe.noise.seed, split, ids, num_data=len(images.pixels), num_places=recipe.num_steps // 2
    )
    index = 2 * place
    alpha, sigma = (_column(np.array(values)[index], recipe) for values in (recipe.alphas, recipe.sigmas))
    eps = noise.standard_normal(recipe.noise.seed, split, ids, recipe.sample_shape)
    with np.errstate(over="ignore"):
        stored = to_storage(alpha * images.pixels[data] + sigma * eps, recipe.storage_dtype)
    x_t = torch.from_numpy(from_storage(stored, recipe.storage_dtype)).to(getattr(torch, recipe.solve_dtype))
    return Starts(index.astype(np.int32), data, images.labels[data], x_t)


def two_steps(
    denoise: Denoise, process: Process, x_t: Tensor, times: Tensor, condition: Tensor | None
) -> tuple[Tensor, int]:
    """(x_t, x_t', x_t'') [3, B, ...] by two ddim steps over times [3, B] (float64), and the network calls of it."""
    states = [x_t]
    for t, s in pairwise(times):
        keep, pull = jump_coefficients(process, t, s)
        x_0 = denoise(states[-1], t, condition)
        states.append(expand(keep, like=x_t) * states[-1] + expand(pull, like=x_t) * x_0)
    return torch.stack(states), (len(states) - 1) * getattr(denoise, "nfe_per_call", 1)


def _column(values: np.ndarray, recipe: Recipe) -> np.ndarray:
    """[B] beside samples [B, ...]."""
    return values.reshape(-1, *[1] * len(recipe.sample_shape))

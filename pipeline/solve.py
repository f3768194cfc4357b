"""From a range of sample ids to the columns of a shard: pure functions of the recipe, the teacher and the ids."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from diffusion import noise
from diffusion.denoiser import Guided
from diffusion.process import Process
from diffusion.solvers import solve
from storage_schemas.commit import Task
from storage_schemas.recipe import NoCondition, Recipe
from storage_schemas.record import NO_CONDITION, Columns, state_column, to_storage

Denoise = Callable[[Tensor, Tensor, Tensor | None], Tensor]


@dataclass(frozen=True)
class Solved:
    """Finite rows of a task as columns, the ids of the others, and the network calls that one sample took."""

    columns: Columns
    quarantined: tuple[int, ...]
    nfe: int


def solve_task(recipe: Recipe, denoise: Denoise, process: Process, task: Task, *, device: torch.device) -> Solved:
    """Every sample of a task, micro-batch by micro-batch, in ascending order of ids."""
    batches = [
        solve_batch(recipe, denoise, process, task.split, ids, device=device)
        for ids in micro_batches(task, recipe.micro_batch)
    ]
    columns = {name: np.concatenate([batch.columns[name] for batch in batches]) for name in batches[0].columns}
    return Solved(columns, sum((batch.quarantined for batch in batches), ()), batches[0].nfe)


def micro_batches(task: Task, size: int) -> Iterator[np.ndarray]:
    """The ids that are solved together, aligned to multiples of `size`: the same whatever the shard's size."""
    for start in range(task.start, task.stop, size):
        yield np.arange(start, start + size, dtype=np.int64)


@torch.no_grad()
def solve_batch(
    recipe: Recipe, denoise: Denoise, process: Process, split: str, ids: np.ndarray, *, device: torch.device
) -> Solved:
    """One micro-batch: x_T, its labels, the solver's states at recipe.states, rounded to the storage dtype."""
    labels = draw_labels(recipe, split, ids)
    condition = None if labels is None else torch.from_numpy(labels).to(device)
    solution = solve(
        denoise,
        process,
        draw_noise(recipe, split, ids).to(device),
        torch.tensor(recipe.times, dtype=torch.float64),
        solver=recipe.solver.name,
        condition=condition,
        keep=recipe.states,
    )
    states = solution.states.to(getattr(torch, recipe.storage_dtype))
    finite = states.isfinite().transpose(0, 1).flatten(1).all(1).cpu().numpy()
    columns = {
        "sample_id": ids,
        "condition": np.full(len(ids), NO_CONDITION, dtype=np.int64) if labels is None else labels,
        **{state_column(k, recipe.num_steps): _bits(x) for k, x in zip(recipe.states, states, strict=True)},
    }
    kept = {name: column[finite] for name, column in columns.items()}
    return Solved(kept, tuple(ids[~finite].tolist()), solution.nfe)


def draw_noise(recipe: Recipe, split: str, ids: np.ndarray) -> Tensor:
    """x_T = sigma_T eps: [B, *shape], rounded to the storage dtype before the solve, so that a stored pair is exact."""
    eps = noise.standard_normal(recipe.noise.seed, split, ids, recipe.sample_shape)
    with np.errstate(over="ignore"):
        stored = to_storage(recipe.sigmas[0] * eps, recipe.storage_dtype)
    return _values(stored, recipe.storage_dtype).to(getattr(torch, recipe.solve_dtype))


def draw_labels(recipe: Recipe, split: str, ids: np.ndarray) -> np.ndarray | None:
    """int64 [B], or None for a recipe without conditions."""
    if isinstance(recipe.condition, NoCondition):
        return None
    return noise.labels(recipe.noise.seed, split, ids, recipe.condition.num_classes)


def denoise_of(recipe: Recipe, denoiser: nn.Module, *, device: torch.device) -> Denoise:
    """The denoiser as the recipe wants it called: compiled, under autocast, guided."""
    network = cast(nn.Module, torch.compile(denoiser)) if recipe.compile else denoiser
    guided: Denoise = network if recipe.guidance.scale == 1 else Guided(network, recipe.guidance.scale)
    return guided if recipe.autocast == "none" else _Autocast(guided, recipe.autocast, device)


class _Autocast:
    """A denoiser under torch.autocast; its nfe_per_call is the inner one's."""

    def __init__(self, denoise: Denoise, dtype: str, device: torch.device) -> None:
        self.denoise = denoise
        self.dtype = getattr(torch, dtype)
        self.device_type = device.type
        self.nfe_per_call = getattr(denoise, "nfe_per_call", 1)

    def __call__(self, x_t: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        with torch.autocast(self.device_type, self.dtype):
            return self.denoise(x_t, t, condition).to(x_t.dtype)


def _values(stored: np.ndarray, dtype: str) -> Tensor:
    """A stored array as a tensor; bfloat16's raw bits are read as what they are."""
    if dtype == "bfloat16":
        return torch.from_numpy(stored.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(stored)


def _bits(state: Tensor) -> np.ndarray:
    """The inverse of _values: [B, ...] on any device to the stored array."""
    if state.dtype == torch.bfloat16:
        return state.view(torch.int16).cpu().numpy().view("<u2")
    return state.cpu().numpy()

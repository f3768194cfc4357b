"""Columns of a shard from a range of sample ids: pure functions of the recipe, the teacher and the ids."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from limbeck.diffusion.denoiser import Guided
from limbeck.diffusion.process import Process
from limbeck.diffusion.recipes.samples import draw_labels, draw_noise, draw_scales
from limbeck.diffusion.solvers import Solution, solve
from limbeck.pipeline.segments import draw_starts, two_steps
from limbeck.storage_schemas.commit import Task, is_sick
from limbeck.storage_schemas.errors import UserError
from limbeck.storage_schemas.recipe import NoCondition, Recipe
from limbeck.storage_schemas.record import NO_CONDITION, SEGMENT_STATES, Columns

Denoise = Callable[[Tensor, Tensor, Tensor | None], Tensor]

ALLOCATORS_SAY = ("out of memory", "can't allocate memory", "not enough memory", "ALLOC_FAILED")
"""Substrings of the RuntimeErrors that torch's CPU allocator, cuBLAS and cuDNN raise when out of memory."""


class OutOfMemory(UserError):
    """A micro-batch that this device, or what others leave of it, has no room for."""


class NotFinite(UserError):
    """So many samples are not finite that it is the worker's doing, or the teacher's, and not the samples'."""


@dataclass(frozen=True)
class Solved:
    """Finite rows of a task as columns, the ids of the others, and the network calls that one sample took."""

    columns: Columns
    quarantined: tuple[int, ...]
    nfe: int


def solve_task(recipe: Recipe, denoise: nn.Module, process: Process, task: Task, *, device: torch.device) -> Solved:
    """Every sample of a task, micro-batch by micro-batch, in ascending order of ids. OutOfMemory if one is too large.

    It is never solved in smaller ones instead: a network's last bits hang on the batch size, which the recipe states.
    NotFinite as soon as too few of the samples are finite to believe the others.
    """
    batches, lost = list[Solved](), tuple[int, ...]()
    for ids in micro_batches(task, recipe.micro_batch):
        batches.append(solve_batch(recipe, denoise, process, task.split, ids, device=device))
        lost += batches[-1].quarantined
        if is_sick(task, lost, recipe.micro_batch):
            raise NotFinite(
                f"{len(lost)} of its first {len(batches) * recipe.micro_batch} samples are not finite: its worker's "
                f"device ({device}) is sick, or the teacher is: look at both, then generate again"
            )
    columns = {name: np.concatenate([batch.columns[name] for batch in batches]) for name in batches[0].columns}
    return Solved(columns, lost, batches[0].nfe)


def micro_batches(task: Task, size: int) -> Iterator[np.ndarray]:
    """The ids that are solved together, aligned to multiples of `size`: the same whatever the shard's size."""
    for start in range(task.start, task.stop, size):
        yield np.arange(start, start + size, dtype=np.int64)


@torch.no_grad()
def solve_batch(
    recipe: Recipe, denoise: nn.Module, process: Process, split: str, ids: np.ndarray, *, device: torch.device
) -> Solved:
    """One micro-batch: where its chains start, its labels, and its states, rounded to the storage dtype."""
    with as_out_of_memory(recipe.micro_batch, device):
        solver = _solve_segments if recipe.chain == "segment" else _solve_trajectories
        scalars, found, nfe = solver(recipe, denoise, process, split, ids, device=device)
        states = found.to(getattr(torch, recipe.storage_dtype))
        finite = states.isfinite().transpose(0, 1).flatten(1).all(1).cpu().numpy()
    names = [field.name for field in recipe.fields if not field.is_scalar]
    columns = {"sample_id": ids, **scalars, **{name: _bits(x) for name, x in zip(names, states, strict=True)}}
    kept = {name: column[finite] for name, column in columns.items()}
    return Solved(kept, tuple(ids[~finite].tolist()), nfe)


def _solve_trajectories(
    recipe: Recipe, denoise: nn.Module, process: Process, split: str, ids: np.ndarray, *, device: torch.device
) -> tuple[Columns, Tensor, int]:
    """Labels; the states [K, B, ...] at recipe.states from x_T; network calls."""
    times = torch.tensor(recipe.times, dtype=torch.float64)
    solution = solve_ids(recipe, denoise, process, split, ids, times, keep=recipe.states, device=device)
    return {"condition": _conditions(draw_labels(recipe, split, ids), len(ids))}, solution.states, solution.nfe


def _solve_segments(
    recipe: Recipe, denoise: nn.Module, process: Process, split: str, ids: np.ndarray, *, device: torch.device
) -> tuple[Columns, Tensor, int]:
    """Labels, places on the grid and images; the three states [3, B, ...] of each segment; network calls."""
    starts = draw_starts(recipe, split, ids)
    labels = None if isinstance(recipe.condition, NoCondition) else starts.labels
    grid = torch.tensor(recipe.times, dtype=torch.float64)
    times = torch.stack([grid[starts.index + step] for step in range(SEGMENT_STATES)])
    states, nfe = two_steps(
        guided(recipe, denoise, draw_scales(recipe, split, ids), device=device),
        process,
        in_memory_format(recipe, starts.x_t.to(device)),
        # MPS knows no float64: there times stay on the CPU.
        times if device.type == "mps" else times.to(device),
        None if labels is None else torch.from_numpy(labels).to(device),
    )
    condition = _conditions(labels, len(ids))
    return {"condition": condition, "start_index": starts.index, "data_id": starts.data}, states, nfe


def _conditions(labels: np.ndarray | None, count: int) -> np.ndarray:
    return np.full(count, NO_CONDITION, dtype=np.int64) if labels is None else labels


def solve_ids(
    recipe: Recipe,
    denoise: nn.Module,
    process: Process,
    split: str,
    ids: np.ndarray,
    times: Tensor,
    *,
    keep: Sequence[int],
    device: torch.device,
    solver: str | None = None,
    dtype: torch.dtype | None = None,
) -> Solution:
    """States of these ids at the indices `keep` of a grid, from their own x_T, with their labels and guidance.

    solver, dtype: the recipe's own by default. denoise: of `denoise_of`.
    """
    labels = draw_labels(recipe, split, ids)
    return solve(
        guided(recipe, denoise, draw_scales(recipe, split, ids), device=device),
        process,
        in_memory_format(recipe, draw_noise(recipe, split, ids).to(device, dtype)),
        times,
        solver=solver or recipe.solver.name,
        condition=None if labels is None else torch.from_numpy(labels).to(device),
        keep=keep,
    )


@contextmanager
def as_out_of_memory(micro_batch: int, device: torch.device) -> Iterator[None]:
    """Turn an allocator's error into OutOfMemory, with the way out. A CPU allocator and cuBLAS raise a RuntimeError."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and not _tells_of_memory(error):
            raise
        raise OutOfMemory(
            f"out of memory on {device} with {micro_batch} samples together: the recipe fixes the micro-batch, it is "
            "never re-batched; run fewer workers a GPU, take a larger one, or make a new recipe with a smaller "
            f"--micro-batch ({_first_line(error)})"
        ) from None


def _tells_of_memory(error: Exception) -> bool:
    return any(words in str(error) for words in ALLOCATORS_SAY)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def in_memory_format(recipe: Recipe, x_T: Tensor) -> Tensor:
    """[B, C, H, W] with channels last in memory where the recipe wants that; every x_t that is made of it keeps it."""
    return x_T.contiguous(memory_format=torch.channels_last) if recipe.channels_last else x_T


def denoise_of(recipe: Recipe, denoiser: nn.Module, *, device: torch.device) -> nn.Module:
    """The denoiser as the recipe wants it: channels last, compiled. `guided` then says how samples call it."""
    if recipe.channels_last:
        # torch's stubs lack the overload; weights of four axes change their place in memory, all others stay.
        denoiser = denoiser.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return _compiled(denoiser, recipe.compile, device) if recipe.compile != "none" else denoiser


def guided(recipe: Recipe, denoiser: nn.Module, scales: np.ndarray, *, device: torch.device) -> Denoise:
    """A denoiser as samples with these guidance scales [B] call it: guided, under autocast.

    What is compiled lies within and never sees a scale, so no scale compiles it again.
    """
    denoise: Denoise = denoiser
    if len(recipe.guidance.scales) > 1:
        each = torch.from_numpy(scales)
        denoise = Guided(denoiser, each if device.type == "mps" else each.to(device))  # MPS knows no float64
    elif not recipe.guidance.is_plain:
        denoise = Guided(denoiser, recipe.guidance.scales[0])
    return denoise if recipe.autocast == "none" else _Autocast(denoise, recipe.autocast, device)


def _compiled(denoiser: nn.Module, mode: str, device: torch.device) -> nn.Module:
    compiled = cast(nn.Module, torch.compile(denoiser, mode=mode, dynamic=False))
    return Graphed(compiled) if mode == "reduce-overhead" and device.type == "cuda" else compiled


class Graphed(nn.Module):
    """A denoiser that torch runs as a CUDA graph, whose answers all lie in one place: each is copied out of it.

    The next call overwrites it, and a solver of several stages or steps may hold on to its answers.
    """

    def __init__(self, compiled: nn.Module) -> None:
        super().__init__()
        self.compiled = compiled
        self.num_classes: int | None = getattr(compiled, "num_classes", None)
        self.told_guidance = bool(getattr(compiled, "told_guidance", False))

    def forward(self, x_t: Tensor, t: Tensor, condition: Tensor | None = None, **given: Tensor) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        return self.compiled(x_t, t, condition, **given).clone()


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


def _bits(state: Tensor) -> np.ndarray:
    """The stored array of a state [B, ...] on any device; bfloat16 as its raw bits."""
    if state.dtype == torch.bfloat16:
        return state.view(torch.int16).cpu().numpy().view("<u2")
    return state.cpu().numpy()

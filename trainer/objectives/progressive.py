"""Progressive distillation: a student takes in one step what its teacher took in two, so that each stage halves them.

In the paper each stage learns from the student before it: `limbeck progressive` makes new data for each
round. Direct progressive distillation is another algorithm: every stage's targets are the first teacher's own states,
so that no error piles up and nothing is generated between stages.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from limbeck.diffusion.flow_map import jump_coefficients
from limbeck.diffusion.process import Process, expand, scales
from limbeck.storage_schemas.dataset import Dataset
from limbeck.storage_schemas.errors import ManifestMismatch
from limbeck.storage_schemas.recipe import Recipe
from limbeck.storage_schemas.record import state_column
from limbeck.trainer.networks.networks import Networks
from limbeck.trainer.objectives.conditioning import conditioning
from limbeck.trainer.objectives.kind import Given, Kind, Stage
from limbeck.trainer.objectives.stored import HalvingOptions, drawn, stored_grids, times_at, times_on
from limbeck.trainer.stream import Batch


@dataclass(frozen=True)
class Progressive:
    """E max(alpha_t^2/sigma_t^2, 1) || x~ - mu_student(x_t, t) ||^2, x~ the x_0 whose DDIM step from x_t is x_s.

    One random segment t -> s of each sample. times: the stage's grid [n + 1]; columns: its states.
    Salimans & Ho 2022, algorithm 2 and eq. 9 (truncated SNR).
    """

    times: tuple[float, ...]
    columns: tuple[str, ...]
    num_uniforms: int = 1

    @cached_property
    def _segments(self) -> Tensor:
        """All (k, k + 1)."""
        return torch.arange(len(self.times)).unfold(0, 2, 1)

    def __call__(self, networks: Networks, batch: Batch) -> Tensor:
        (x_t, x_s), (t, s) = drawn(batch, self.columns, self.times, self._segments, batch.uniforms[:, 0])
        return segment_loss(networks, batch, x_t, x_s, t, s)


@dataclass(frozen=True)
class ProgressiveSegments:
    """The same loss on stored segments t -> t' -> t'', each with a start of its own on the teacher's grid.

    times: that grid [2n + 1], of which the student takes every second point.
    """

    times: tuple[float, ...]
    columns: tuple[str, ...] = ("start_index", "segment_0", "segment_2")
    num_uniforms: int = 0

    def __call__(self, networks: Networks, batch: Batch) -> Tensor:
        start, x_t, x_s = (batch.states[name] for name in self.columns)
        times = times_on(start.device, self.times)
        return segment_loss(networks, batch, x_t, x_s, times[start.long()], times[start.long() + 2])


def segment_loss(networks: Networks, batch: Batch, x_t: Tensor, x_s: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """Mean of max(alpha_t^2/sigma_t^2, 1) (mu_student(x_t, t) - x~)^2; t, s: [B]."""
    student = networks.student
    target = progressive_target(student.process, x_t, x_s, t, s)
    alpha_t, sigma_t = scales(student.process, t, like=x_t)
    weight = (alpha_t / sigma_t).square().clamp(min=1)
    labels, guidance = conditioning(student, batch)
    guess = student(x_t, t, labels, until=s, guidance=guidance)
    return (weight * (guess - target).square()).mean()


def progressive_target(process: Process, x_t: Tensor, x_s: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """x~ = (x_s - (sigma_s/sigma_t) x_t) / (alpha_s - (sigma_s/sigma_t) alpha_t); at sigma_s = 0 it is x_s/alpha_s.

    t, s: [] or [B], s < t. Salimans & Ho 2022, appendix G; float64 coefficients.
    """
    keep, pull = jump_coefficients(process, t, s)
    return expand(1 / pull, like=x_s) * x_s - expand(keep / pull, like=x_t) * x_t


# Least spacing of numbers in [1, 2).
_SPACING = {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float32": 2.0**-23}
# A rounding error is uniform over one spacing, whose mean square over log-uniform mantissas is 3/(8 log 2) spacing^2.
_RELATIVE_RMS = math.sqrt(3 / (8 * math.log(2)) / 12)


def rounding_error(
    process: Process, times: Sequence[float], *, storage_dtype: str, data_rms: float, exact_starts: bool = False
) -> list[float]:
    """Rms of what storage rounding puts into x~ on each segment of a grid: [n].

    The noise is exact: it was rounded before it was solved from. So are all starts of segments that start from data.
    """
    t = torch.tensor(times, dtype=torch.float64)
    size = torch.sqrt((process.alpha(t) * data_rms) ** 2 + process.sigma(t) ** 2)
    error = _SPACING[storage_dtype] * _RELATIVE_RMS * size
    error[0] = 0.0
    keep, pull = jump_coefficients(process, t[:-1], t[1:])
    first = torch.zeros_like(keep) if exact_starts else keep * error[:-1]
    return (torch.hypot(error[1:], first) / pull.abs()).tolist()


def segments_serve(dataset: Dataset) -> str:
    """Why a dataset of segments is refused."""
    steps = dataset.recipe.num_steps
    holds = f"{dataset.store.uri} holds segments of {steps} steps in {dataset.manifest.dataset}"
    return (
        f"{holds}, which serve --objective.name progressive with --objective.schedule {steps // 2}: "
        "fit that, or name another --dataset"
    )


def _stages(options: HalvingOptions, given: Given) -> tuple[Stage, ...]:
    dataset = given.stored
    if dataset.recipe.chain == "trajectory":
        grids = stored_grids(dataset, options.schedule)
        return tuple(_stage(dataset.recipe, indices) for indices in grids.values())
    # A round of progressive distillation: one stage, of a student of half as many steps.
    times, half = dataset.recipe.times, dataset.recipe.num_steps // 2
    if options.schedule != (half,):
        raise ManifestMismatch(segments_serve(dataset))
    return (Stage(f"{half}-step", ProgressiveSegments(times), times[::2]),)


def _stage(recipe: Recipe, indices: Sequence[int]) -> Stage:
    times = times_at(recipe, indices)
    columns = tuple(state_column(index, recipe.num_steps) for index in indices)
    return Stage(f"{len(indices) - 1}-step", Progressive(times, columns), times)


KIND = Kind(
    options=HalvingOptions,
    stages=_stages,
    makes="students of each number of steps in its schedule",
    learns="half as many steps, stage by stage (Salimans & Ho 2022), on the first teacher's own states",
    reads="the schedule's states",
    samples="n jumps",
    # Salimans & Ho 2022 take lr to 0 linearly in every stage and keep no average.
    fit={"decay": "linear", "ema": 0.0},
    reads_segments=True,
)

"""Time grids: float64 [num_steps + 1], descending from t_0 to t_N: from T to exactly 0, unless an option says other.

karras and uniform_logsnr place the points t_0 .. t_{N-1} by their ratio r = sigma/alpha, from r_max down to r_min, and
put 0 after them. r_max is the process's own largest ratio; r_min is EDM's 0.002, or the first of a table of betas.
Where r_max is infinite (alpha_T = 0) the points are laid out from r = 80, EDM's, and the first is then moved to T.

trailing, leading and linspace are the whole timesteps at which diffusers' pipelines call their networks.
"""

import inspect
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from limbeck.diffusion.process import DiscreteVP, Process

_FAR_RATIO = 80.0
_NEAR_RATIO = 0.002


def near_ratio(process: Process) -> float:
    """The default r_min of a grid. A network over a table of betas was never shown less than its first."""
    if not isinstance(process, DiscreteVP):
        return _NEAR_RATIO
    first = torch.ones((), dtype=torch.float64)
    return float(f"{(process.sigma(first) / process.alpha(first)).item():.13g}")


def karras(
    process: Process, num_steps: int, *, rho: float = 7.0, r_max: float | None = None, r_min: float | None = None
) -> Tensor:
    """r^(1/rho) uniform, then 0. Karras et al. 2022, eq. 5."""
    _check_steps(num_steps)
    if rho <= 0:
        raise ValueError(f"rho {rho}: give one above 0 (7 in the paper)")
    near = near_ratio(process) if r_min is None else r_min
    far = _far_ratio(process, r_max, near)
    roots = torch.linspace(far ** (1 / rho), near ** (1 / rho), num_steps, dtype=torch.float64)
    return _grid_at(process, roots**rho, from_end=r_max is None)


def uniform_logsnr(
    process: Process, num_steps: int, *, r_max: float | None = None, r_min: float | None = None
) -> Tensor:
    """log r = -lambda uniform, then 0. Lu et al. 2022 (DPM-Solver), section 3.3."""
    _check_steps(num_steps)
    near = near_ratio(process) if r_min is None else r_min
    far = _far_ratio(process, r_max, near)
    logs = torch.linspace(math.log(far), math.log(near), num_steps, dtype=torch.float64)
    return _grid_at(process, logs.exp(), from_end=r_max is None)


def uniform_time(process: Process, num_steps: int, *, t_min: float | None = None, shift: float = 1.0) -> Tensor:
    """T to 0 in equal steps; with t_min, T to t_min in equal steps and then 0.

    shift: u = t/T becomes shift u/(1 + (shift - 1) u), more steps at high noise. Esser et al. 2024 (SD3), eq. 23; the
    mu of Flux's resolution-dependent shift is log(shift).
    """
    _check_steps(num_steps)
    if shift <= 0:
        raise ValueError(f"shift {shift}: give one above 0 (1 shifts nothing)")
    if t_min is not None and not 0 < t_min < process.T:
        raise ValueError(f"t_min {t_min}: give a time between 0 and {process.T}")
    if t_min is None:
        times = torch.linspace(process.T, 0.0, num_steps + 1, dtype=torch.float64)
    else:
        times = _ending_at(0, torch.linspace(process.T, t_min, num_steps, dtype=torch.float64))
    if shift == 1:
        return times
    u = times / process.T
    return process.T * (shift * u / (1 + (shift - 1) * u))


# Whole timesteps of a table of betas, as diffusers spaces them. Timestep n is our time n + 1, and 0 is data.


def trailing(process: Process, num_steps: int, *, end: int = 0) -> Tensor:
    """The last timestep, then down in equal steps. Lin et al. 2024 (Common Diffusion Noise Schedules), table 2."""
    count = _table_length("trailing", process, num_steps)
    return _on_the_table(np.round(count - np.arange(num_steps) * (count / num_steps)), end)


def leading(process: Process, num_steps: int, *, offset: int = 0, end: int = 0, spare: int = 0) -> Tensor:
    """Multiples of count // num_steps from 0 on, and offset more: DDIM's own, which begins below T. Ibid.

    spare 1: of num_steps + 1 points, without the last one, as DPM-Solver, UniPC and DEIS have it.
    """
    count, points = _table_length("leading", process, num_steps, spare=spare), num_steps + spare
    ratio = count // points
    most = count - 1 - (points - 1) * ratio
    if not 0 <= offset <= most:
        raise ValueError(f"offset {offset}: give one from 0 to {most}, where the table ends")
    return _on_the_table((np.arange(points) * ratio + offset + 1)[::-1][:num_steps], end)


def linspace(process: Process, num_steps: int, *, end: int = 0, spare: int = 0) -> Tensor:
    """The last timestep to the first in equal steps, rounded: ibid. spare: as of leading."""
    count, points = _table_length("linspace", process, num_steps, spare=spare), num_steps + spare
    return _on_the_table((np.linspace(0, count - 1, points).round() + 1)[::-1][:num_steps], end)


def listed(process: Process, num_steps: int, *, times: Sequence[float]) -> Tensor:
    """The times as they are given, descending."""
    if len(times) != num_steps + 1:
        raise ValueError(f"times has {len(times)} points, {num_steps} steps need {num_steps + 1}: give as many")
    if not all(process.T >= a > b >= 0 for a, b in itertools.pairwise(times)):
        raise ValueError(f"times {' '.join(map(str, times))}: give them descending, from {process.T} at most to 0")
    return torch.tensor(times, dtype=torch.float64)


ONE_NUMBER_OF_STEPS = ("own", "times")
"""Grids that say every time; own: a student's, which is no grid here."""

GRIDS: dict[str, Callable[..., Tensor]] = {
    "karras": karras,
    "uniform_time": uniform_time,
    "uniform_logsnr": uniform_logsnr,
    "trailing": trailing,
    "leading": leading,
    "linspace": linspace,
    "times": listed,
}


def make_grid(name: str, process: Process, num_steps: int, **options: Any) -> Tensor:
    """The named grid; an option left at None has the grid's own default, one that the grid does not have is refused."""
    if name not in GRIDS:
        raise ValueError(f"grid {name!r} does not exist: choose one of {', '.join(GRIDS)}")
    given = {option: value for option, value in options.items() if value is not None}
    for option, value in given.items():
        if option not in grid_options(name):
            raise ValueError(f"the {name} grid has no {option} (given {value}): leave it out")
    return GRIDS[name](process, num_steps, **given)


def recorded_times(grid: Mapping[str, Any], process: Process, num_steps: int) -> Tensor:
    """The grid that a recipe records by its name and options, with this number of steps."""
    options = dict(grid)
    return make_grid(options.pop("name"), process, num_steps, **options)


def grid_options(name: str) -> tuple[str, ...]:
    """Names of a grid's own options."""
    return tuple(
        name for name, one in inspect.signature(GRIDS[name]).parameters.items() if one.kind is one.KEYWORD_ONLY
    )


def subset_indices(num_steps: int, n: int) -> tuple[int, ...]:
    """Indices, in a grid of num_steps steps, of the nested grid of n steps."""
    if n < 1 or num_steps % n:
        raise ValueError(f"{n} steps are no nested subset of {num_steps}: give a divisor of {num_steps}")
    return tuple(range(0, num_steps + 1, num_steps // n))


def _far_ratio(process: Process, r_max: float | None, r_min: float) -> float:
    """The ratio from which a grid's points are laid out."""
    T = torch.tensor(process.T, dtype=torch.float64)
    alpha, sigma = process.alpha(T).item(), process.sigma(T).item()
    limit = sigma / alpha if alpha > 0 else math.inf
    far = r_max if r_max is not None else limit if alpha > 0 else _FAR_RATIO
    if not 0 < r_min < far <= limit or math.isinf(far):
        raise ValueError(f"r_min {r_min}, r_max {far}: give 0 < r_min < r_max <= {limit}, sigma/alpha at T")
    return far


def _grid_at(process: Process, ratios: Tensor, *, from_end: bool) -> Tensor:
    times = process.time_at(ratios).clamp(max=process.T)
    if from_end:
        times[0] = process.T
    return _ending_at(0, times)


def _ending_at(end: float, times: Tensor) -> Tensor:
    return torch.cat([times, times.new_full((1,), end)])


def _table_length(name: str, process: Process, num_steps: int, *, spare: int | None = None) -> int:
    """Timesteps of a process that is a table, at least as many as the points. spare: None where a grid has none."""
    _check_steps(num_steps)
    if spare not in (None, 0, 1):
        raise ValueError(f"spare {spare}: give 0, or 1 for a point more that is left out")
    if spare == 0 and num_steps == 1:
        raise ValueError(f"1 step of the {name} grid begins at the table's first time: use trailing, or spare 1")
    if not isinstance(process, DiscreteVP):
        raise ValueError(f"the {name} grid is of whole timesteps, which only a table of betas has: choose another grid")
    most = len(process.betas) - (spare or 0)
    if num_steps > most:
        raise ValueError(f"{num_steps} steps on a table of {len(process.betas)} timesteps: give at most {most}")
    return len(process.betas)


def _on_the_table(times: np.ndarray, end: int) -> Tensor:
    """Times after which `end` comes: 0, or the table's first, as where set_alpha_to_one is false."""
    if end not in (0, 1):
        raise ValueError(f"end {end}: give 0, which is data, or 1, the table's first time")
    if times[-1] <= end:
        raise ValueError(f"end {end}: the grid has {times[-1]:g} as its last time before; give end 0, or an offset")
    return _ending_at(end, torch.tensor(times.tolist(), dtype=torch.float64))


def _check_steps(num_steps: int) -> None:
    if num_steps < 1:
        raise ValueError(f"{num_steps} steps: give at least 1")

"""Time grids: float64 [num_steps + 1], descending from t_0 (T, unless r_max is given) to exactly 0.

karras and uniform_logsnr place the points t_0 .. t_{N-1} by their ratio r = sigma/alpha, from r_max down to r_min, and
put 0 after them. r_max is the process's own largest ratio; r_min is EDM's 0.002, or the first of a table of betas.
Where r_max is infinite (alpha_T = 0) the points are laid out from r = 80, EDM's, and the first is then moved to T.
"""

import math

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


def uniform_time(process: Process, num_steps: int, *, t_min: float | None = None) -> Tensor:
    """T to 0 in equal steps; with t_min, T to t_min in equal steps and then 0."""
    _check_steps(num_steps)
    if t_min is None:
        return torch.linspace(process.T, 0.0, num_steps + 1, dtype=torch.float64)
    if not 0 < t_min < process.T:
        raise ValueError(f"t_min {t_min}: give a time between 0 and {process.T}")
    return _ending_at_0(torch.linspace(process.T, t_min, num_steps, dtype=torch.float64))


def make_grid(
    name: str,
    process: Process,
    num_steps: int,
    *,
    rho: float | None = None,
    r_max: float | None = None,
    r_min: float | None = None,
    t_min: float | None = None,
) -> Tensor:
    """The named grid; an option left at None has the grid's own default, one that the grid does not have is refused."""
    if name == "karras":
        _refuse(name, t_min=t_min)
        return karras(process, num_steps, rho=7.0 if rho is None else rho, r_max=r_max, r_min=r_min)
    if name == "uniform_logsnr":
        _refuse(name, rho=rho, t_min=t_min)
        return uniform_logsnr(process, num_steps, r_max=r_max, r_min=r_min)
    if name == "uniform_time":
        _refuse(name, rho=rho, r_max=r_max, r_min=r_min)
        return uniform_time(process, num_steps, t_min=t_min)
    raise ValueError(f"grid {name!r} does not exist: choose one of karras, uniform_time, uniform_logsnr")


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
    return _ending_at_0(times)


def _ending_at_0(times: Tensor) -> Tensor:
    return torch.cat([times, times.new_zeros(1)])


def _check_steps(num_steps: int) -> None:
    if num_steps < 1:
        raise ValueError(f"{num_steps} steps: give at least 1")


def _refuse(name: str, **options: float | None) -> None:
    for option, value in options.items():
        if value is not None:
            raise ValueError(f"the {name} grid has no {option} (given {value}): leave it out")

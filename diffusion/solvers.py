"""Deterministic solvers of the probability-flow ODE: each is a table of numbers, and one loop carries them all out.

A solver turns the points of a grid into steps, and a step into denoiser calls with their coefficients, all of it in
float64 and before the first call. Nothing in the loop depends on the process, waits for a device or looks at a value.

    name       order  calls a step  what it holds fixed or extrapolates over a step
    ddim       1      1             the slope dz/dp (Euler in either frame of frames.py; Song et al. 2021)
    heun       2      2             the slope, by the trapezoidal rule (Karras et al. 2022, Algorithm 1)
    rk4        4      4             the slope, by the classical Runge-Kutta rule; a reference
    ab2        2      1             the slope, linear in p (Adams-Bashforth: iPNDM)
    deis       2      1             the slope, linear in log p, integrated exactly (DEIS, Zhang & Chen 2023)
    dpmpp_2m   2      1             x_0, linear in lambda = log(alpha/sigma) (DPM-Solver++ 2M, Lu et al. 2022)
    dpmpp_3m   3      1             x_0, quadratic in lambda, integrated exactly
    unipc      3      1             x_0, linear in lambda, corrected by the next call (UniPC-2, Zhao et al. 2023)

The denoiser is never called at sigma = 0. A last step to sigma = 0 is Euler for heun (as in EDM) and deis, three inner
stages for rk4, x_0 itself for dpmpp and unipc. A multistep solver starts with its own lower orders. From alpha = 0 the
slope solvers work in the flow frame; dpmpp and unipc take DDIM's step, and never extrapolate from that point, whose
lambda is -inf.
"""

import itertools
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from limbeck.diffusion.denoiser import check_answer
from limbeck.diffusion.frames import FrameName, Point, frame_for, points_at, points_between
from limbeck.diffusion.process import Process

Denoise = Callable[[Tensor, Tensor, Tensor | None], Tensor]


@dataclass(frozen=True)
class Call:
    """One denoiser call of a step, and where the step goes from it.

    k = on_state * x + on_x0 * denoise(x, time)                     what the solver remembers of the call
    x = carry * x_n + weights[0] * k + weights[1] * k_before + ...  newest first, x_n the state the step began with
    """

    time: Tensor
    on_state: float
    on_x0: float
    carry: float
    weights: tuple[float, ...]


Step = tuple[Call, ...]


Plan = Callable[[Process, Sequence[Point], FrameName], list[Step]]


@dataclass(frozen=True)
class Solver:
    """A solver: its order of convergence, and its steps over the points of a grid."""

    order: int
    plan: Plan


@dataclass(frozen=True)
class Solution:
    """The kept states [K, B, ...] of a solve, their times [K] (float64), and how many network calls it took."""

    states: Tensor
    times: Tensor
    nfe: int


def solve(
    denoise: Denoise,
    process: Process,
    x_T: Tensor,
    times: Tensor,
    *,
    solver: str = "heun",
    condition: Tensor | None = None,
    keep: Sequence[int] | None = None,
) -> Solution:
    """Carry x_T [B, ...] along the descending grid times [N+1] (float64); return the states at the grid indices keep.

    denoise(x_t, t, condition) -> x_0 is called with t a float64 [] where x_T is; keep is ascending, all N+1 by default.
    """
    times = _checked_times(process, times)
    kept = _checked_keep(keep, len(times))
    states = x_T.new_empty(len(kept), *x_T.shape)
    slots = {index: slot for slot, index in enumerate(kept)}
    steps = plan(solver, process, times)
    clock = _clock(steps, x_T.device)
    memory = deque[Tensor](maxlen=max(len(call.weights) for step in steps for call in step))
    x, calls = x_T, 0
    if 0 in slots:
        states[slots[0]] = x_T
    for index, step in enumerate(steps, start=1):
        start = x
        for call in step:
            x_0 = answer(denoise, x, clock[calls], condition)
            memory.appendleft(_combine((call.on_state, x), (call.on_x0, x_0)))
            x = _combine((call.carry, start), *zip(call.weights, memory, strict=False))
            calls += 1
        if index in slots:
            states[slots[index]] = x
    return Solution(states, times[list(kept)], calls * getattr(denoise, "nfe_per_call", 1))


def answer(denoise: Denoise, x_t: Tensor, t: Tensor, condition: Tensor | None) -> Tensor:
    """denoise(x_t, t, condition), held to its word: a real x_0 [B, ...], of an x_t that it leaves as it is."""
    before = _changes(x_t)
    with no_exit("the denoiser"):
        x_0 = denoise(x_t, t, condition)
    check_answer(x_0, x_t)
    if _changes(x_t) != before:
        raise ValueError("the denoiser changes x_t, which the solver goes on with: compute on a copy (x_t.clone())")
    return x_0


@contextmanager
def no_exit(what: str) -> Iterator[None]:
    """Turn sys.exit in code of the user's into an error: it would end the program, perhaps with code 0."""
    try:
        yield
    except SystemExit as error:
        raise ValueError(f"{what} calls sys.exit({error.code!r}): raise an exception there that says why") from error


def _changes(x_t: Tensor) -> int:
    """How often a tensor was changed in place; tensors of inference mode don't count it."""
    return 0 if x_t.is_inference() else x_t._version


def plan(solver: str, process: Process, times: Tensor) -> list[Step]:
    """The N steps of the named solver over times [N+1], in the frame that suits times[0]."""
    if solver not in SOLVERS:
        raise ValueError(f"solver {solver!r} does not exist: choose one of {', '.join(SOLVERS)}")
    frame = frame_for(process, times)
    return SOLVERS[solver].plan(process, points_at(process, times, frame=frame), frame)


def _clock(steps: Sequence[Step], device: torch.device) -> tuple[Tensor, ...]:
    """The time of every call, moved in one copy before the first: a copy in the loop would wait for the device."""
    times = torch.stack([call.time for step in steps for call in step])
    # MPS knows no float64: there t stays on the CPU, and the denoiser casts what it makes of it.
    return (times if device.type == "mps" else times.to(device)).unbind()


def _combine(*terms: tuple[float, Tensor]) -> Tensor:
    """The sum of weight * tensor, as a new tensor; a weight of 0 leaves its tensor unread."""
    (weight, tensor), *rest = [(weight, tensor) for weight, tensor in terms if weight != 0]
    total = weight * tensor
    for weight, tensor in rest:
        total = torch.add(total, tensor, alpha=weight)
    return total


def _checked_times(process: Process, times: Tensor) -> Tensor:
    if times.dtype != torch.float64 or times.ndim != 1 or len(times) < 2:
        raise ValueError(f"times are {times.dtype} {list(times.shape)}: give a float64 grid of two points or more")
    times = times.detach().cpu()
    if not (times[1:] < times[:-1]).all():
        raise ValueError(f"times {times.tolist()} do not descend: give a grid that runs from noise down to data")
    if times[0] > process.T or times[-1] < 0:
        raise ValueError(f"times run from {times[0]} to {times[-1]}: give times between {process.T} and 0")
    return times


def _checked_keep(keep: Sequence[int] | None, num_points: int) -> tuple[int, ...]:
    kept = tuple(range(num_points)) if keep is None else tuple(keep)
    if not kept or list(kept) != sorted(set(kept)) or kept[0] < 0 or kept[-1] >= num_points:
        raise ValueError(f"keep {list(kept)}: give ascending grid indices between 0 and {num_points - 1}")
    return kept


# Solvers that hold the slope dz/dp. A Runge-Kutta rule is its rows: (how far along the step the row leads, its mixture
# of the slopes so far, oldest first). The next slope is taken where the row has led; the last row ends the step.

Rule = tuple[tuple[float, tuple[float, ...]], ...]

EULER: Rule = ((1, (1,)),)
HEUN: Rule = ((1, (1,)), (1, (1 / 2, 1 / 2)))
RK4: Rule = ((1 / 2, (1 / 2,)), (1 / 2, (0, 1 / 2)), (1, (0, 0, 1)), (1, (1 / 6, 1 / 3, 1 / 3, 1 / 6)))
RALSTON3: Rule = ((1 / 2, (1 / 2,)), (3 / 4, (0, 3 / 4)), (1, (2 / 9, 1 / 3, 4 / 9)))  # no slope at the step's end


def _runge_kutta(rule: Rule, *, last: Rule) -> Plan:
    """Steps by one rule, and by the rule `last` where a step ends at sigma = 0, which has no slope."""

    def step(process: Process, here: Point, there: Point, frame: FrameName) -> Step:
        rows = last if there.sigma == 0 else rule
        aims = points_between(process, here, there, [fraction for fraction, _ in rows], frame=frame)
        h = there.position - here.position
        return tuple(
            _slope_call(at, aim, start=here, weights=[h * part for part in reversed(parts)])
            for at, aim, (_, parts) in zip((here, *aims), aims, rows, strict=False)
        )

    def plan(process: Process, points: Sequence[Point], frame: FrameName) -> list[Step]:
        return [step(process, here, there, frame) for here, there in itertools.pairwise(points)]

    return plan


def _adams_bashforth_2(process: Process, points: Sequence[Point], frame: FrameName) -> list[Step]:
    """Integrates the line through the last two slopes, over steps of any lengths; the first step is Euler's."""
    steps: list[Step] = []
    weights = [points[1].position - points[0].position]
    for n, (here, there) in enumerate(itertools.pairwise(points)):
        if n > 0:
            h = there.position - here.position
            bend = h / (here.position - points[n - 1].position) / 2
            weights = [h * (1 + bend), -h * bend]
        steps.append((_slope_call(here, there, start=here, weights=weights),))
    return steps


def _deis_2(process: Process, points: Sequence[Point], frame: FrameName) -> list[Step]:
    """Integrates the line in log p through the last two slopes; Euler's at either end. Zhang & Chen 2023."""
    steps: list[Step] = []
    for n, (here, there) in enumerate(itertools.pairwise(points)):
        p, p_next = here.position, there.position
        weights = [p_next - p]
        if n > 0 and p_next > 0:
            bend = (p_next * math.log(p_next / p) - p_next + p) / math.log(p / points[n - 1].position)
            weights = [p_next - p + bend, -bend]
        steps.append((_slope_call(here, there, start=here, weights=weights),))
    return steps


def _slope_call(at: Point, aim: Point, *, start: Point, weights: Sequence[float]) -> Call:
    """The call that takes k = dz/dp at `at` and leads to z_start + sum of weights * slopes, in x = scale * z."""
    return Call(
        time=at.time,
        on_state=1 / at.sigma,
        on_x0=-at.scale / at.sigma,
        carry=aim.scale / start.scale,
        weights=tuple(aim.scale * weight for weight in weights),
    )


# Solvers that hold x_0, over a step of length h in lambda from t to s:
#     x_s = sigma_s/sigma_t x_t + alpha_s * (integral over the step of exp(lambda - lambda_s) x_0(lambda)).
# Coefficients are found by running the paper's formula on unit vectors: m[j] stands for x_0 of the j-th last call.


def _dpm_solver_pp(order: int) -> Plan:
    """DPM-Solver++ multistep of the given order. Lu et al. 2022 (DPM-Solver++), eq. 9 and Algorithm 2."""

    def plan(process: Process, points: Sequence[Point], frame: FrameName) -> list[Step]:
        steps: list[Step] = []
        for n, (here, there) in enumerate(itertools.pairwise(points)):
            nodes = [point.log_snr for point in points[max(0, n + 1 - order) : n + 1] if point.alpha > 0][::-1]
            weights = _data_weights(here, there, nodes)
            steps.append((Call(here.time, 0.0, 1.0, there.sigma / here.sigma, tuple(weights.tolist())),))
        return steps

    return plan


def _data_weights(here: Point, there: Point, nodes: Sequence[float]) -> np.ndarray:
    """Weights of the last calls' x_0, newest first; nodes: their lambdas, as many as the order. [1], [2] or [3]."""
    gain = there.alpha - here.alpha * there.sigma / here.sigma  # alpha_s (1 - e^-h), finite at both ends
    if there.sigma == 0 or len(nodes) < 2:
        return np.array([gain])
    h = there.log_snr - here.log_snr
    h_0 = nodes[0] - nodes[1]
    if len(nodes) == 2:
        return gain * _second_order(h_0 / h)
    return there.alpha * _third_order(h, h_0 / h, (nodes[1] - nodes[2]) / h)


def _unipc_2(process: Process, points: Sequence[Point], frame: FrameName) -> list[Step]:
    """UniPC of order 2 with B(h) = e^h - 1 on x_0. Zhao et al. 2023, Algorithm 2; states are those that it predicts.

    A call corrects the state that it is about. The correction is linear in the calls' x_0, so it goes, scaled as the
    state, into the weights of the step that begins there.
    """
    steps: list[Step] = []
    correction = np.zeros(3)
    for n, (here, there) in enumerate(itertools.pairwise(points)):
        nodes = [point.log_snr for point in points[max(0, n - 1) : n + 1] if point.alpha > 0][::-1]
        carry, predictor = there.sigma / here.sigma, np.zeros(3)
        weights = _data_weights(here, there, nodes)
        predictor[: len(weights)] = weights
        steps.append((Call(here.time, 0.0, 1.0, carry, tuple((predictor + carry * correction).tolist())),))
        correction = _corrector(here, there, nodes) - np.array([0.0, *predictor[:2]])
    return steps


def _corrector(here: Point, there: Point, nodes: Sequence[float]) -> np.ndarray:
    """Weights of x_0 there, here and before for a step by UniC, [3]; the predictor's where that has no place."""
    gain = there.alpha - here.alpha * there.sigma / here.sigma
    if there.sigma == 0 or not nodes:
        return np.array([0.0, *np.pad(_data_weights(here, there, nodes), (0, 1))])
    m = np.eye(3)
    if len(nodes) == 1:
        return gain * (m[1] + (m[0] - m[1]) / 2)
    h, earlier = there.log_snr - here.log_snr, (nodes[1] - nodes[0]) / (there.log_snr - here.log_snr)
    phi = -1 / h - 1 / math.expm1(-h)  # (e^-h - 1 + h)/(h (1 - e^-h)), the mean of (lambda - lambda_t)/h
    both = np.array([phi, -2 * phi / h - 1 / math.expm1(-h)])
    before, after = np.linalg.solve([[1.0, 1.0], [earlier, 1.0]], both)
    return gain * (m[1] + before * (m[2] - m[1]) / earlier + after * (m[0] - m[1]))


def _second_order(r_0: float) -> np.ndarray:
    """The x_0 that 2M holds over the step: the line through the last two at its middle. r_0 = h_0/h."""
    m = np.eye(2)
    return m[0] + (m[0] - m[1]) / (2 * r_0)


def _third_order(h: float, r_0: float, r_1: float) -> np.ndarray:
    """Integral of exp(-h (1 - theta)) h dtheta, theta in [0, 1], against the parabola through the last three x_0.

    first, second: the parabola's derivatives in theta at the step's start. The 3M of the authors' code and of diffusers
    weighs `second` by half of this, which costs it an order.
    """
    m = np.eye(3)
    near, far = (m[0] - m[1]) / r_0, (m[1] - m[2]) / r_1
    second = 2 * (near - far) / (r_0 + r_1)
    first = near + r_0 * second / 2
    i_0 = -math.expm1(-h)
    i_1 = 1 - i_0 / h
    i_2 = 1 / 2 - i_1 / h
    return i_0 * m[0] + i_1 * first + i_2 * second


SOLVERS: dict[str, Solver] = {
    "ddim": Solver(1, _runge_kutta(EULER, last=EULER)),
    "heun": Solver(2, _runge_kutta(HEUN, last=EULER)),
    "ab2": Solver(2, _adams_bashforth_2),
    "deis": Solver(2, _deis_2),
    "dpmpp_2m": Solver(2, _dpm_solver_pp(2)),
    "dpmpp_3m": Solver(3, _dpm_solver_pp(3)),
    "unipc": Solver(3, _unipc_2),
    "rk4": Solver(4, _runge_kutta(RK4, last=RALSTON3)),
}

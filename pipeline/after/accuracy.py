"""What an audit learns by solving samples again: the solver's error, and whether the stored states are the recipe's."""

import math
from typing import Any

import numpy as np

from limbeck.diffusion.recipes.samples import draw_scales
from limbeck.diffusion.solvers import SOLVERS
from limbeck.pipeline.after.checks import Check, named
from limbeck.pipeline.after.resolve import Resolved, halves_last, is_own
from limbeck.pipeline.after.scan import Findings
from limbeck.pipeline.config import VerifyConfig
from limbeck.storage_schemas.recipe import Recipe
from limbeck.storage_schemas.record import state_column

DRIFT = {False: 2e-3, True: 3e-2}
"""RMS that another batch or machine may bring about, relative to the state's spread; with TF32 or autocast."""

RESAMPLES = 2000
BLOCK_VALUES = 1 << 20


def error_check(recipe: Recipe, found: Findings, resolved: Resolved, place: int, config: VerifyConfig) -> Check:
    """RMS over samples and coordinates of (stored - solved at 2N steps), relative to the spread of the output.

    With `richardson` it is scaled to the error against the exact solution: for a solver of order p the difference is
    (1 - 2^-p) of it. A last step that both have in common is no part of either. Storage's rounding, which is known, is
    not scaled. The interval is a studentised bootstrap over samples; from a few dozen samples with rare large errors it
    is too short, so take more for a verdict that matters. A student on its own grid has no finer solution: it is solved
    at the same steps again, and what is left is storage's rounding.
    """
    order, name = SOLVERS[recipe.solver.name].order, state_column(recipe.states[place], recipe.num_steps)
    extrapolated = config.richardson and not is_own(recipe)
    factor = (2**order / (2**order - 1)) ** 2 if extrapolated else 1.0
    std, rounding = found.states["output"].std or 1.0, float(resolved.rounding[place])
    squares = factor * (resolved.squares[:, place] - rounding) + rounding
    error, low, high = (value / std for value in rms_interval(squares, seed=config.seed))
    figures: dict[str, Any] = {
        "error": error,
        "low": low,
        "high": high,
        "rounding": math.sqrt(rounding) / std,
        "worst": math.sqrt(float(resolved.squares[:, place].max())) / std,
    }
    limit = config.tolerance if name == "output" else None
    against = _against(recipe, name, extrapolated=extrapolated)
    detail = f"{error:.3g} of the output's spread against {against}, 95% in [{low:.3g}, {high:.3g}]"
    detail += f", tolerance {limit:g}" if limit else ""
    detail += "; worst sample {worst:.3g}, storage's rounding {rounding:.3g}".format(**figures)
    if by_scale := _error_by_scale(recipe, resolved, squares, std):
        detail += "; by guidance " + ", ".join(f"{scale} {value:.3g}" for scale, value in by_scale.items())
        figures["by_guidance"] = by_scale
    passed = math.isfinite(error) and (limit is None or high <= limit)
    return Check(f"solver error of {name}", passed, detail, figures)


def _against(recipe: Recipe, state: str, *, extrapolated: bool) -> str:
    """What a stored state's error is measured against."""
    if is_own(recipe):
        return "its own steps"
    aside = "" if halves_last(recipe) or state != "output" else ", the last step to sigma = 0 aside"
    return ("the exact solution" if extrapolated else "doubled steps") + aside


def _error_by_scale(recipe: Recipe, resolved: Resolved, squares: np.ndarray, std: float) -> dict[str, float]:
    """sqrt(mean)/std of squares [K] over the samples of each guidance scale; empty where there is one scale."""
    if len(recipe.guidance.scales) == 1:
        return {}
    scales = np.array([draw_scales(recipe, sample.split, np.array([sample.id]))[0] for sample in resolved.samples])
    return {str(scale): _root(float(squares[scales == scale].mean())) / std for scale in np.unique(scales).tolist()}


def rms_interval(squares: np.ndarray, *, seed: int) -> tuple[float, float, float]:
    """sqrt(mean) of squares [K], and its 95% interval by the studentised bootstrap (Efron & Tibshirani 1993, 12.5)."""
    count, mean = len(squares), float(squares.mean())
    if not math.isfinite(mean) or count < 2:
        return (mean if math.isfinite(mean) else math.inf), 0.0, math.inf
    spread = float(squares.std(ddof=1)) / math.sqrt(count)
    students = _students(squares, np.random.default_rng(seed)) if spread > 0 else np.zeros(1)
    low, high = np.quantile(students, [0.025, 0.975])
    return _root(mean), _root(mean - high * spread), _root(mean - low * spread)


def _students(squares: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """(mean of a resample - mean)/(its standard error), RESAMPLES times, some at a time."""
    count, found = len(squares), []
    some = max(1, BLOCK_VALUES // count)
    for first in range(0, RESAMPLES, some):
        drawn = squares[generator.integers(0, count, (min(some, RESAMPLES - first), count))]
        least = 1e-3 * squares.std(ddof=1)  # a resample of one value alone has no spread
        found.append((drawn.mean(1) - squares.mean()) / np.maximum(drawn.std(1, ddof=1), least) * math.sqrt(count))
    return np.concatenate(found)


def _root(value: float) -> float:
    return math.sqrt(max(0.0, value))


def replay_check(recipe: Recipe, found: Findings, resolved: Resolved) -> Check:
    """All samples solved again at the recipe's own steps: each within DRIFT of what is stored, besides its rounding.

    The worst of them also among the samples that the recipe says: to the same bits on the same host, device and torch
    by as many threads.
    """
    stds = np.array([found.states[state_column(k, recipe.num_steps)].std for k in recipe.states])
    alike = (np.sqrt(resolved.drift) <= DRIFT[recipe.tf32 or recipe.autocast != "none"] * stds).all(1).tolist()
    odd = [str(sample) for sample, fits in zip(resolved.samples, alike, strict=True) if not fits]
    replays = resolved.replays
    other = [str(part.sample) for part in replays if part.same_machine and not part.same_bits]
    wrong = list(dict.fromkeys(odd + other))
    same, elsewhere = sum(part.same_bits for part in replays), sum(not part.same_machine for part in replays)
    largest = max((max(part.max_difference.values()) for part in replays if part.max_difference), default=math.nan)
    detail = (
        f"{sum(alike)} of {len(alike)} samples come out alike; of the {len(replays)} least alike {same} have the same "
        f"bits in their micro-batch, largest difference {largest:.3g}"
    )
    detail += f"; {elsewhere} were solved on another machine, or by other threads" if elsewhere else ""
    figures = {"samples": len(alike), "alike": sum(alike), "replayed": len(replays), "same_bits": same}
    figures |= {"max_difference": largest, "wrong": wrong}
    return Check("solved again", not wrong, detail + named(wrong), figures)

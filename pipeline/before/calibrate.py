"""`calibrate`: measure solvers against a far finer reference, and name the cheapest whose error is allowed."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from limbeck.pipeline.before.calibration_plot import draw
from limbeck.pipeline.before.solver_error import Measured, Trial, build_config, measure
from limbeck.pipeline.config import CalibrateConfig, GridConfig
from limbeck.pipeline.job.prepare import load
from limbeck.pipeline.recipe import build_recipe
from limbeck.pipeline.workers.one_call import try_out
from limbeck.storage_schemas.clock import utc_now
from limbeck.storage_schemas.errors import UserError, usage_errors
from limbeck.storage_schemas.extras import need
from limbeck.storage_schemas.log import log
from limbeck.storage_schemas.notes import Calibration, CalibrationPoint, Reference, cheapest
from limbeck.storage_schemas.recipe import Recipe

DONE, FAILED = 0, 1

FINER = 3
"""The reference's own error must be so many times below the tolerance, and below an error that is shown as one."""

ABOVE_ROUNDING = 10
"""An order is measured between errors that are so many times above the reference's and above rounding."""

Z_95 = 1.959964


def run_calibrate(config: CalibrateConfig) -> int:
    """The exit code: 1 where no solver is good enough."""
    with usage_errors():
        _check_folders(config)
        teacher = load(config)
        recipes = [build_recipe(build_config(config, config.solvers[0], steps), teacher) for steps in config.steps]
    measured = try_out("the calibration", measure, config, runner=config)
    calibration = judge(config, recipes[0], measured)
    if config.out:
        Path(config.out).write_bytes(calibration.to_bytes())
    if config.picture:
        draw(calibration, config.picture)
    print(json.dumps(_as_json(config, calibration)) if config.as_json else describe(config, calibration))
    _warn(calibration)
    return FAILED if calibration.choice is None else DONE


def _check_folders(config: CalibrateConfig) -> None:
    """Before a worker measures for minutes what then can't be written."""
    for path in filter(None, (config.out, config.picture)):
        if not Path(path).absolute().parent.is_dir():
            raise ValueError(f"{path}: its folder does not exist, make it first")
    if config.picture:
        need("matplotlib", "--picture", extra="pipeline")


def judge(config: CalibrateConfig, recipe: Recipe, measured: Measured) -> Calibration:
    """What was measured as a document. Refuses a reference that is no finer than the errors to be compared."""
    if not (math.isfinite(measured.scale) and measured.scale > 0):
        raise UserError(f"the reference's outputs have the scale {measured.scale}: the teacher can't be solved so")
    solver, steps, nfe = measured.reference
    own = _point(measured.halved, measured.scale)
    if own.error is None or FINER * own.error > config.tolerance:
        raise UserError(
            f"the reference, {solver} at {steps} steps, is itself {_format_error(own.error)} from {solver} at half as "
            f"many: too much to judge a tolerance of {config.tolerance:g}; raise --reference-factor or the tolerance"
        )
    points = tuple(_point(trial, measured.scale) for trial in measured.trials)
    return Calibration(
        teacher=recipe.teacher,
        guidance=recipe.guidance,
        condition=recipe.condition,
        grid=recipe.solver.grid,
        solve_dtype=recipe.solve_dtype,
        autocast=recipe.autocast,
        tf32=recipe.tf32,
        seed=config.seed,
        count=config.count,
        tolerance=config.tolerance,
        scale=measured.scale,
        reference=Reference(solver=solver, steps=steps, nfe=nfe, error=own.error),
        points=points,
        choice=cheapest(points, config.tolerance - own.error),
        machine=measured.machine,
        made_at=utc_now(),
    )


def _point(trial: Trial, scale: float) -> CalibrationPoint:
    """Root of the mean square over samples, and of the ends of the mean's normal interval, in units of `scale`."""
    squares = trial.squares / scale**2
    mean = float(squares.mean())
    with np.errstate(invalid="ignore"):  # of a solve that ran away
        margin = Z_95 * float(squares.std(ddof=1)) / math.sqrt(len(squares))
    ends = [
        math.sqrt(max(value, 0)) if math.isfinite(value) else None for value in (mean, mean - margin, mean + margin)
    ]
    error, low, high = ends if None not in ends else (None, None, None)
    return CalibrationPoint(solver=trial.solver, steps=trial.steps, nfe=trial.nfe, error=error, low=low, high=high)


def orders(calibration: Calibration) -> dict[str, float | None]:
    """p in error ~ steps^-p of each solver, between its two finest points that are clear of all other errors."""
    rounding = 8 * float(np.finfo(calibration.solve_dtype).eps)
    floor = ABOVE_ROUNDING * max(calibration.reference.error, rounding)
    found: dict[str, list[tuple[int, float]]] = {point.solver: [] for point in calibration.points}
    for point in calibration.points:
        if point.error is not None and point.error > floor:
            found[point.solver].append((point.steps, point.error))
    return {solver: _order(sorted(pairs)[-2:]) for solver, pairs in found.items()}


def _order(pairs: Sequence[tuple[int, float]]) -> float | None:
    if len(pairs) < 2:
        return None
    (coarse, large), (fine, small) = pairs
    return math.log(large / small) / math.log(fine / coarse)


def flags(calibration: Calibration) -> list[str]:
    """The choice as options of generate."""
    if calibration.choice is None:
        return []
    point = calibration.points[calibration.choice]
    words = [
        "--solver.name",
        point.solver,
        "--solver.steps",
        str(point.steps),
        "--solver.grid",
        calibration.grid["name"],
    ]
    for name in GridConfig.model_fields:
        if name in calibration.grid:
            words += [f"--solver.{name.replace('_', '-')}", str(calibration.grid[name])]
    return words


def describe(config: CalibrateConfig, calibration: Calibration) -> str:
    """The table: a row for a number of steps, a column for a solver, error and network calls in each cell."""
    reference, solvers = calibration.reference, list(dict.fromkeys(point.solver for point in calibration.points))
    grid = ", ".join(f"{name} {value}" for name, value in calibration.grid.items() if name != "name")
    lines = [
        f"teacher    {calibration.teacher.uri}, guidance {calibration.guidance.as_words}, "
        f"{calibration.grid['name']} grid{' (' + grid + ')' if grid else ''}",
        f"reference  {reference.solver}, {reference.steps} steps, {reference.nfe} calls, "
        f"{_format_error(reference.error)} from half as many steps",
        f"error      RMS of a coordinate over {calibration.count} samples, in standard deviations of the outputs "
        f"({calibration.scale:.4g}); behind it the network calls",
        "",
        f"{'steps':>5}" + "".join(f"{solver:>18}" for solver in solvers),
        *(_row(calibration, solvers, steps) for steps in sorted(set(config.steps))),
        f"{'order':>5}" + "".join(f"{_format_order(order):>18}" for order in orders(calibration).values()),
        "order: between the two finest steps. The last step, to sigma = 0, has an error that more steps don't lessen.",
        "",
        _verdict(calibration),
    ]
    if calibration.choice is not None:
        lines.append(f"generate with {' '.join(flags(calibration) + _noted(config))}")
    return "\n".join(lines)


def _noted(config: CalibrateConfig) -> list[str]:
    return ["--calibration", config.out] if config.out else []


def _row(calibration: Calibration, solvers: Sequence[str], steps: int) -> str:
    cells = []
    for solver in solvers:
        point = calibration.point(solver, steps)
        assert point is not None
        index = calibration.points.index(point)
        mark = "*" if index == calibration.choice else "~" if _drowned(calibration, point) else " "
        cells.append(f"{_format_error(point.error)}{mark}{'(' + str(point.nfe) + ')':>6}")
    return f"{steps:>5}" + "".join(f"{cell:>18}" for cell in cells)


def _verdict(calibration: Calibration) -> str:
    if calibration.choice is None:
        best = min(calibration.points, key=lambda point: math.inf if point.error is None else point.error)
        return (
            f"none is surely below {calibration.tolerance:g}; nearest: {best.solver} at {best.steps} steps, "
            f"{_format_error(best.error)}: give more --steps, more --count, or a larger --tolerance"
        )
    point = calibration.points[calibration.choice]
    return (
        f"* cheapest below {calibration.tolerance:g}: {point.solver} at {point.steps} steps, {point.nfe} calls, error "
        f"{_format_error(point.error)} (95%: {_format_error(point.low)} to {_format_error(point.high)})"
    )


def _drowned(calibration: Calibration, point: CalibrationPoint) -> bool:
    return point.error is not None and point.error < FINER * calibration.reference.error


def _warn(calibration: Calibration) -> None:
    drowned = [point for point in calibration.points if _drowned(calibration, point)]
    if drowned:
        names = ", ".join(f"{point.solver} {point.steps}" for point in drowned)
        log.warning(f"~ not told apart from the reference's own error, {calibration.reference.error:.2g}: {names}")


def _as_json(config: CalibrateConfig, calibration: Calibration) -> dict[str, object]:
    return {**calibration.plain(), "orders": orders(calibration), "flags": flags(calibration), "out": config.out}


def _format_error(error: float | None) -> str:
    return "not finite" if error is None else f"{error:.2e}" if error < 1e-3 else f"{error:.4f}"


def _format_order(order: float | None) -> str:
    return "-" if order is None else f"{order:.2f}      "

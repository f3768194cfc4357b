"""What is known of a recipe beside what it is: notes change no number and are no part of its id."""

from collections.abc import Iterable, Sequence
from typing import Any, Literal, Self

from pydantic import model_validator

from limbeck.storage_schemas import paths
from limbeck.storage_schemas.canonical import digest
from limbeck.storage_schemas.documents import SCHEMA_VERSION, Document
from limbeck.storage_schemas.errors import UsageError
from limbeck.storage_schemas.log import log
from limbeck.storage_schemas.names import Count, Positive, Text, Time
from limbeck.storage_schemas.reading import read_all
from limbeck.storage_schemas.recipe import Condition, Guidance, Recipe, TeacherRecord
from limbeck.storage_schemas.store import Store


class CalibrationPoint(Document):
    """RMS error over coordinates and samples, relative to `scale`, with its 95% interval; None: it is not finite."""

    solver: Text
    steps: Positive
    nfe: Positive
    error: float | None
    low: float | None
    high: float | None


class Reference(Document):
    """What errors are measured against; `error` is its difference from the same solver at half the steps."""

    solver: Text
    steps: Positive
    nfe: Positive
    error: float


class Calibration(Document):
    """Solver error of one teacher on one kind of grid, against the number of steps.

    choice: index of the cheapest point whose error is below the tolerance. scale: standard deviation of the
    reference's outputs over samples and coordinates.
    """

    schema_version: Literal[2] = SCHEMA_VERSION
    teacher: TeacherRecord
    guidance: Guidance
    condition: Condition
    grid: dict[str, Any]
    solve_dtype: Text
    autocast: Text
    tf32: bool
    seed: Count
    count: Positive
    tolerance: float
    scale: float
    reference: Reference
    points: tuple[CalibrationPoint, ...]
    choice: Count | None
    machine: dict[Text, Text]
    made_at: Time

    @model_validator(mode="after")
    def _choice_is_a_point(self) -> Self:
        if self.choice is not None and not 0 <= self.choice < len(self.points):
            raise ValueError(f"choice {self.choice} is none of {len(self.points)} points")
        return self

    def point(self, solver: str, steps: int) -> CalibrationPoint | None:
        """What was measured of a solver at a number of steps, None if nothing was."""
        return next((point for point in self.points if (point.solver, point.steps) == (solver, steps)), None)


def check_calibration(calibration: Calibration, recipe: Recipe, source: str) -> CalibrationPoint:
    """The point that tells of this recipe. UsageError where the calibration, read from `source`, is of another."""
    measured, teacher = calibration.teacher, recipe.teacher
    pairs = {
        "teacher weights": (measured.weights_sha256, teacher.weights_sha256),
        "teacher source": (measured.source_sha256, teacher.source_sha256),
        "teacher": (digest(measured.model), digest(teacher.model)),
        "guidance": (calibration.guidance.scale, recipe.guidance.scale),
        "condition": (calibration.condition.kind, recipe.condition.kind),
        "grid": (calibration.grid, recipe.solver.grid),
        "solve dtype": (calibration.solve_dtype, recipe.solve_dtype),
        "autocast": (calibration.autocast, recipe.autocast),
        "TF32": (calibration.tf32, recipe.tf32),
    }
    for what, (had, wanted) in pairs.items():
        if had != wanted:
            problem = f"{source} was measured with {what} {_short(had)}, this recipe has {_short(wanted)}"
            raise UsageError(f"{problem}: calibrate again")
    point = calibration.point(recipe.solver.name, recipe.solver.steps)
    if point is None:
        raise UsageError(
            f"{source} did not measure {recipe.solver.name} at {recipe.solver.steps} steps: calibrate with these, or "
            f"take one of {_measured(calibration.points)}"
        )
    return point


def put_calibration(store: Store, recipe: Recipe, calibration: Calibration) -> None:
    """Keep it among the recipe's notes, under a name of its content."""
    store.put_if_absent(paths.calibration_path(recipe.id, digest(calibration.plain())), calibration.to_bytes())


def read_calibrations(store: Store, recipe_id: str) -> list[Calibration]:
    """All that are among the recipe's notes, the newest last."""
    folder = paths.notes_folder(recipe_id)
    names = [f"{folder}/{name}" for name in store.list(folder) if name.startswith("calibration-")]
    found, unread = read_all(store, names, Calibration)
    for problem in unread.values():
        log.warning(problem)
    return sorted(found.values(), key=lambda calibration: calibration.made_at)


def _measured(points: Iterable[CalibrationPoint]) -> str:
    steps: dict[str, list[str]] = {}
    for point in points:
        steps.setdefault(point.solver, []).append(str(point.steps))
    return "; ".join(f"{solver} at {', '.join(numbers)}" for solver, numbers in steps.items())


def _short(value: object) -> str:
    text = str(value)
    return text[:12] if isinstance(value, str) and len(text) == 64 else text


def cheapest(points: Sequence[CalibrationPoint], limit: float) -> int | None:
    """Index of the point of fewest network calls whose interval ends below `limit`, the more accurate of equals."""
    good = [(point.nfe, point.high, index) for index, point in enumerate(points) if _below(point, limit)]
    return min(good)[2] if good else None


def _below(point: CalibrationPoint, limit: float) -> bool:
    return point.high is not None and point.high < limit

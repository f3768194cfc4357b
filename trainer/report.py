"""`limbeck report`: evaluations of the same contenders, such as fits of several seeds, as one table."""

import json
import math
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from statistics import fmean, stdev
from typing import Annotated, Any

import tyro
from pydantic import Field, model_validator

from limbeck.storage_schemas.command_line import Config
from limbeck.storage_schemas.errors import ManifestMismatch, UsageError
from limbeck.storage_schemas.places import LocalPath
from limbeck.trainer.evaluation.plots import check_plots, plot_quality
from limbeck.trainer.evaluation.tables import markdown, show, terminal

_FIGURES = ("holdout_error", "sliced_wasserstein", "frechet", "density", "coverage")
_SAME = ("count", "recipe", "reference", "output_variance", "floor")
_FILE = "evaluation.json"
_ROUNDING = 1e-3


class ReportConfig(Config):
    """Put evaluations together: mean and spread of each contender's figures, by the name of its run's folder."""

    evaluations: tyro.conf.Positional[tuple[LocalPath, ...]] = Field(
        description=f"Files {_FILE} of evaluate, or folders that hold one, all of one recipe and one reference."
    )
    out: LocalPath = Field(description="Folder to write report.json, .md and .png to.")
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = Field(
        False, description="Print report.json instead of a table."
    )

    @model_validator(mode="after")
    def _check(self) -> "ReportConfig":
        if not self.evaluations:
            raise ValueError(f"no evaluation is named; give one {_FILE} or more")
        return self


def run_report(config: ReportConfig) -> int:
    """The command: read, put together, write, show."""
    check_plots()
    report = put_together([_read(path) for path in config.evaluations])
    config.out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(report, indent=1)
    (config.out / "report.json").write_text(text + "\n")
    (config.out / "report.md").write_text(markdown(report))
    plot_quality(report, config.out / "report.png")
    if config.as_json:
        print(text)
    else:
        show(report, terminal())
        print(", ".join(str(config.out / f"report.{suffix}") for suffix in ("json", "md", "png")))
    return 0


def _read(path: Path) -> dict[str, Any]:
    file = path / _FILE if path.is_dir() else path
    try:
        evaluation: dict[str, Any] = json.loads(file.read_text())
        if evaluation["rows"] and "costs" in evaluation["rows"][0]:
            return {**evaluation, "file": str(file)}
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise UsageError(f"{file} is no evaluation of this release's; make one by limbeck evaluate")


def put_together(evaluations: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One evaluation whose rows hold means, with the sample standard deviations under `spread`.

    Raises ManifestMismatch where they are of other data: their figures can't be compared.
    """
    first = evaluations[0]
    for other in evaluations[1:]:
        for name in _SAME:
            if not _alike(other[name], first[name]):
                problem = f"{other['file']} has {name} {other[name]}, {first['file']} has {first[name]}"
                raise ManifestMismatch(f"{problem}; put evaluations of the same data together")
    return {
        **{name: first[name] for name in _SAME},
        "evaluations": len(evaluations),
        "machines": sorted({evaluation["machine"] for evaluation in evaluations}),
        "rows": list(_rows(row for evaluation in evaluations for row in evaluation["rows"])),
        "notes": [note for note in first["notes"] if all(note in other["notes"] for other in evaluations)],
    }


def _alike(one: Any, other: Any) -> bool:
    """Equal, but for what another machine or number of threads rounds in another way."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_alike(one[name], other[name]) for name in one)
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=_ROUNDING)
    return bool(one == other)


def _rows(rows: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """One row for each contender and NFE: by NFE, students first, the best of each first."""

    def key(row: dict[str, Any]) -> tuple[Any, ...]:
        return row["nfe"], row["kind"], _name(row), row["steps"]

    met = [_mean(list(same)) for _, same in groupby(sorted(rows, key=key), key)]
    yield from sorted(
        met, key=lambda row: (row["nfe"], row["kind"] != "student", row["frechet"] or row["holdout_error"])
    )


def _name(row: dict[str, Any]) -> str:
    return Path(row["name"]).name if row["kind"] == "student" else str(row["name"])


def _mean(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    costs = [row["costs"] for row in rows if row["costs"]]
    figures = [name for name in _FIGURES if rows[0][name] is not None]
    return {
        **{name: rows[0][name] for name in ("kind", "steps", "nfe")},
        "name": _name(rows[0]),
        "runs": len(rows),
        **dict.fromkeys(_FIGURES),
        **{name: fmean(row[name] for row in rows) for name in figures},
        "spread": {name: stdev(row[name] for row in rows) for name in figures} if len(rows) > 1 else {},
        "costs": {name: _mean_cost([each[name] for each in costs]) for name in costs[0]} if costs else None,
    }


def _mean_cost(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None

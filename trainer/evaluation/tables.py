"""Tables of evaluation.json and report.json for people: on a terminal and in Markdown."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from limbeck.storage_schemas.errors import shown
from limbeck.storage_schemas.log import log

Figures = Mapping[str, Any]

_QUALITY = {
    "holdout_error": "holdout error",
    "sliced_wasserstein": "sliced W2",
    "frechet": "Frechet",
    "density": "density",
    "coverage": "coverage",
}
_TIMES = {"train_seconds": "training s", "teacher_seconds": "teacher s"}
_SPEED = {"samples_per_s": "samples/s", "data_wait": "waiting for data", "memory_mib": "memory, MiB"}
_WIDE, _ROOMY = 140, 100


def terminal() -> Console:
    """Standard output; as wide as a table is, where it is no terminal."""
    return Console(width=None if sys.stdout.isatty() else _WIDE, markup=False, emoji=False)


def show(evaluation: Figures, console: Console) -> None:
    """The evaluation as a table, with what one must know to read it; without the times on a narrow terminal."""
    table = Table(title=shown(title(evaluation)), box=SIMPLE_HEAD, padding=(0, 0, 0, 1), pad_edge=False)
    headings, sections = quality(evaluation, with_times=console.width >= _ROOMY)
    table.add_column("", overflow="fold")
    for heading in headings[1:]:
        table.add_column(heading, justify="right", overflow="fold")
    for section in sections:
        for cells in section:
            table.add_row(*map(shown, cells), end_section=cells is section[-1])
    console.print(table)
    for line in legend(evaluation):
        console.print(shown(line), highlight=False)
    for note in evaluation["notes"]:
        log.info(f"note: {note}")


def markdown(evaluation: Figures) -> str:
    """The same as Markdown, with what each student's training was like."""
    headings, sections = quality(evaluation)
    lines = _table(headings, [cells for section in sections for cells in section])
    speed = list(_speed(evaluation["rows"]))
    if speed:
        lines += ["", "Training:", "", *_table(["", *_SPEED.values()], speed)]
    remarks = [title(evaluation), *legend(evaluation), *(f"note: {note}" for note in evaluation["notes"])]
    return "\n".join([*lines, "", *(f"- {line}" for line in remarks), ""])


def title(evaluation: Figures) -> str:
    return f"{evaluation['count']} samples each, against {evaluation['reference']}"


def legend(evaluation: Figures) -> Iterator[str]:
    """The legend of the figures, a line each."""
    floor = evaluation["floor"]
    yield f"holdout error: per dimension, of a variance of {_figure(evaluation['output_variance'])}"
    yield f"floor: {floor['of']}, {' samples against '.join(map(str, floor['counts']))}"
    if _has_costs(evaluation["rows"], _TIMES):
        yield "training s: of its steps; teacher s: of solving what it read, over all workers"
    machines = evaluation.get("machines") or [evaluation["machine"]]
    yield f"evaluated on: {', '.join(machines)}"
    if evaluation.get("evaluations", 1) > 1:
        yield f"mean and standard deviation over {evaluation['evaluations']} evaluations"


def quality(evaluation: Figures, *, with_times: bool = True) -> tuple[list[str], list[list[list[str]]]]:
    """(headings, rows of cells by their NFE) of everything that was measured."""
    rows, floor = evaluation["rows"], evaluation["floor"]
    names = [name for name in _QUALITY if any(row[name] is not None for row in rows)]
    times = list(_TIMES) if with_times and _has_costs(rows, _TIMES) else []
    headings = ["", "NFE", *(_QUALITY[name] for name in names), *(_TIMES[name] for name in times)]
    labels = _names(rows)
    parts = groupby(rows, lambda row: row["nfe"])
    sections = [[[labels[row["name"]], *_cells(row, names, times)] for row in part] for _, part in parts]
    last = ["floor", "", *(_figure(floor.get(name)) for name in names), *("" for _ in times)]
    return headings, [*sections, [last]]


def _names(rows: Sequence[Figures]) -> dict[str, str]:
    """Each contender's label: a student's folder alone, where that tells students apart."""
    students = {row["name"] for row in rows if row["kind"] == "student"}
    short = {name: Path(name).name for name in students}
    alike = len(set(short.values())) < len(short)
    return {row["name"]: row["name"] for row in rows} | ({} if alike else short)


def _cells(row: Figures, names: Sequence[str], times: Sequence[str]) -> Iterator[str]:
    spread, costs = row.get("spread", {}), row["costs"] or {}
    yield str(row["nfe"]) if row["steps"] == row["nfe"] else f"{row['nfe']} ({row['steps']} steps)"
    yield from (_figure(row[name], spread.get(name)) for name in names)
    yield from (_whole(costs.get(name)) for name in times)


def _speed(rows: Sequence[Figures]) -> Iterator[list[str]]:
    """A line for each student; those of several numbers of steps once."""
    students = {row["name"]: row["costs"] for row in rows if row["costs"]}
    for name, costs in students.items():
        rate, waiting, memory = (costs[figure] for figure in _SPEED)
        yield [name, _whole(rate), f"{waiting:.2%}", _whole(memory)]


def _has_costs(rows: Sequence[Figures], costs: Mapping[str, str]) -> bool:
    return any((row["costs"] or {}).get(name) is not None for row in rows for name in costs)


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    rule = ["---", *("--:" for _ in headings[1:])]
    return [f"| {' | '.join(cells)} |" for cells in (headings, rule, *rows)]


def _figure(value: float | None, spread: float | None = None) -> str:
    if value is None:
        return ""
    return f"{value:.3g} ± {spread:.1g}" if spread else f"{value:.4g}"


def _whole(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}"

"""Quality against the number of network calls, drawn from what evaluation.json says."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator, ScalarFormatter

_LABELS = {
    "frechet": "Frechet distance",
    "sliced_wasserstein": "sliced Wasserstein distance",
    "holdout_error": "holdout error per dimension",
}
_MARKERS = "o^sDvP"


def plot_quality(evaluation: Mapping[str, Any], path: Path) -> None:
    """A panel for each figure that was measured, both axes logarithmic: students, the teacher's solvers, the floor."""
    rows: Sequence[Mapping[str, Any]] = evaluation["rows"]
    figures = [name for name in _LABELS if any(row[name] is not None for row in rows)]
    figure = Figure(figsize=(4.6 * len(figures), 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(figures), squeeze=False)[0]
    for axes, name in zip(panels, figures, strict=True):
        _panel(axes, name, rows, evaluation["floor"])
    handles, labels = panels[0].get_legend_handles_labels()
    columns = min(len(labels), 2 * len(figures))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)
    figure.savefig(path, dpi=120)


def _panel(axes: Axes, name: str, rows: Sequence[Mapping[str, Any]], floor: Mapping[str, Any]) -> None:
    # A stored output's error against itself is 0, which has no place on a logarithmic axis.
    shown = [row for row in rows if row[name]]
    for index, curve in enumerate(dict.fromkeys((row["kind"], row["name"]) for row in rows)):
        points = sorted((row["nfe"], row[name]) for row in shown if (row["kind"], row["name"]) == curve)
        style = {"student": "-", "teacher": "--", "stored": " "}[curve[0]]
        marker = "*" if curve[0] == "stored" else _MARKERS[index % len(_MARKERS)]
        axes.plot([nfe for nfe, _ in points], [value for _, value in points], style, marker=marker, label=curve[1])
    if floor.get(name):
        axes.axhline(floor[name], color="grey", linestyle=":", label=f"floor: {floor['of']}")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(sorted({row["nfe"] for row in rows}))
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("network calls (NFE)")
    axes.set_ylabel(_LABELS[name])
    axes.grid(alpha=0.3)

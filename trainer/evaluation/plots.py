"""Quality against the number of network calls, drawn from what evaluation.json says."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from limbeck.storage_schemas.extras import need

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LABELS = {
    "frechet": "Frechet distance",
    "sliced_wasserstein": "sliced Wasserstein distance",
    "holdout_error": "holdout error per dimension",
    "coverage": "coverage",
    "density": "density",
}
_LINEAR = ("coverage", "density")
_MARKERS = "o^sDvPX<>p"
_COLUMNS = 3
_TEN = 10


def check_plots() -> None:
    """Refuse where no plot can be drawn, before what it would show is measured."""
    need("matplotlib", "a plot")


def plot_quality(evaluation: Mapping[str, Any], path: Path) -> None:
    """A panel for each figure that was measured: students, the teacher's solvers, the floor; bars show the spread."""
    rows: Sequence[Mapping[str, Any]] = evaluation["rows"]
    figures = [name for name in _LABELS if any(row[name] is not None for row in rows)]
    columns = min(len(figures), _COLUMNS)
    lines = math.ceil(len(figures) / columns)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6 * columns, 4.2 * lines), layout="constrained")
    FigureCanvasAgg(figure)
    panels = list(figure.subplots(lines, columns, squeeze=False).flat)
    for axes, name in zip(panels, figures, strict=False):
        _panel(axes, name, rows, evaluation["floor"])
    for axes in panels[len(figures) :]:
        axes.set_axis_off()
    handles, labels = panels[0].get_legend_handles_labels()
    columns = min(len(labels), 2 * columns)
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)
    figure.savefig(path, dpi=120)


def _panel(axes: "Axes", name: str, rows: Sequence[Mapping[str, Any]], floor: Mapping[str, Any]) -> None:
    from matplotlib import colormaps
    from matplotlib.ticker import NullLocator, ScalarFormatter

    # A stored output's error against itself is 0, which has no place on a logarithmic axis.
    shown = [row for row in rows if row[name]]
    curves = list(dict.fromkeys((row["kind"], row["name"]) for row in rows))
    colours = colormaps["tab10" if len(curves) <= _TEN else "tab20"]
    for index, curve in enumerate(curves):
        points = sorted(_point(row, name) for row in shown if (row["kind"], row["name"]) == curve)
        style = {"student": "-", "teacher": "--", "stored": " "}[curve[0]]
        marker = "*" if curve[0] == "stored" else _MARKERS[index % len(_MARKERS)]
        nfes, values, spreads = zip(*points, strict=True) if points else ((), (), ())
        colour = colours(index % colours.N)
        axes.errorbar(nfes, values, spreads, fmt=style, marker=marker, color=colour, capsize=2, label=curve[1])
    if floor.get(name):
        axes.axhline(floor[name], color="grey", linestyle=":", label=f"floor: {floor['of']}")
    axes.set_xscale("log")
    axes.set_yscale("linear" if name in _LINEAR else "log")
    axes.set_xticks(sorted({row["nfe"] for row in rows}))
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("network calls (NFE)")
    axes.set_ylabel(_LABELS[name])
    axes.grid(alpha=0.3)


def _point(row: Mapping[str, Any], name: str) -> tuple[int, float, float]:
    """(NFE, value, its spread)."""
    return row["nfe"], row[name], row.get("spread", {}).get(name, 0.0)

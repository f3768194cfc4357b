"""Error against network calls, a line for each solver."""

from typing import Any

from limbeck.storage_schemas.notes import Calibration, CalibrationPoint


def draw(calibration: Calibration, path: str) -> None:
    """A PNG, both axes logarithmic; the band is the 95% interval, the ring the choice."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5.2), layout="constrained")
    axes = figure.add_subplot(xscale="log", yscale="log", xlabel="network calls a sample (NFE)")
    axes.set_ylabel("RMS error of a coordinate / standard deviation of the outputs")
    for solver in dict.fromkeys(point.solver for point in calibration.points):
        _line(axes, [point for point in calibration.points if point.solver == solver])
    _limits(axes, calibration)
    if calibration.choice is not None:
        _ring(axes, calibration.points[calibration.choice])
    _decorate(axes, calibration)
    figure.savefig(path, dpi=150)


def _line(axes: Any, points: list[CalibrationPoint]) -> None:
    drawn = sorted((point for point in points if point.error), key=lambda point: point.nfe)
    if not drawn:
        return
    name = points[0].solver
    calls, errors = [point.nfe for point in drawn], [point.error for point in drawn]
    (line,) = axes.plot(calls, errors, marker="o", markersize=4, linewidth=1.6, label=name)
    # A lower end of 0 has no place on a logarithmic axis.
    low = [point.low or (point.error or 0) / 10 for point in drawn]
    axes.fill_between(calls, low, [point.high for point in drawn], color=line.get_color(), alpha=0.15, linewidth=0)


def _limits(axes: Any, calibration: Calibration) -> None:
    axes.axhline(calibration.tolerance, color="black", linewidth=1, linestyle="--")
    _beside(axes, calibration.tolerance, f"tolerance {calibration.tolerance:g}")
    errors = [point.error for point in calibration.points if point.error]
    own = calibration.reference.error
    if own > 0 and errors and own > min(errors) / 30:
        axes.axhline(own, color="grey", linewidth=1, linestyle=":")
        _beside(axes, own, "the reference's own")


def _beside(axes: Any, height: float, text: str) -> None:
    place = axes.get_yaxis_transform()
    axes.text(0.995, height, text, transform=place, ha="right", va="bottom", fontsize=8, color="#444444")


def _ring(axes: Any, point: CalibrationPoint) -> None:
    axes.plot(point.nfe, point.error, "o", markersize=12, markerfacecolor="none", markeredgecolor="black")
    axes.annotate(
        f"{point.solver}, {point.steps} steps",
        (point.nfe, point.error),
        xytext=(-9, -9),
        textcoords="offset points",
        ha="right",
        va="top",
        fontsize=9,
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1.5},
    )


def _decorate(axes: Any, calibration: Calibration) -> None:
    from matplotlib.ticker import FixedLocator, NullFormatter, ScalarFormatter

    calls = [point.nfe for point in calibration.points]
    ticks = [2**k for k in range(12) if min(calls) <= 2**k <= max(calls)]
    axes.xaxis.set_major_locator(FixedLocator(ticks or sorted(set(calls))))
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.25, linewidth=0.6)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    reference = f"{calibration.reference.solver} at {calibration.reference.steps} steps"
    axes.set_title(
        f"{calibration.teacher.uri}, {calibration.grid['name']} grid, guidance {calibration.guidance.as_words}: "
        f"{calibration.count} samples against {reference}",
        fontsize=10,
        loc="left",
    )

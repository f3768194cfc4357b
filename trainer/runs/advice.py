"""A fit's advice at its end: whether more pairs, more steps or a larger student would lower its error on the holdout.

A student that was fitted to N pairs is better on these than on others. Were there endless pairs, both errors would be
about the mean of the two, so of the holdout error H beside the training error E about (H - E)/(2 H) is for want of
pairs: a tenth where H/E = 1.25. tests/benchmarks/pairs.py measures it.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from limbeck.trainer.runs.place import METRICS, lines_of

_GAP = 1.25
_FALLING = 0.95
_LATE = 0.8  # of a stage's steps: where the error that the last one is compared with was measured


def advice(*, train_error: float, holdout_error: float, earlier: float | None = None) -> str:
    """Two sentences. Errors are mean squares per number; earlier: on the holdout, a fifth of the steps before the end.

    That a student has no more to gain from steps is never said: the rate falls to 0, so the error stands in the end.
    """
    found = f"Holdout error {holdout_error:.4g} against {train_error:.4g} on pairs that it was fitted to"
    if holdout_error > _GAP * train_error:
        ways = "generate with a larger --count, or let regenerate refresh the window and fit with --follow-latest"
        return f"{found}: the student wants more pairs. To lower it, {ways}, before more --steps."
    falling = earlier is not None and holdout_error < _FALLING * earlier
    ways = "for more --steps: it was falling yet" if falling else "for more --steps, or a larger student"
    return f"{found}: more pairs would gain little. To lower it, fit {ways}."


def advice_of(run: Path) -> str | None:
    """The advice at the end of a run, from its metrics: None before its end, or where its errors were not measured."""
    lines = lines_of(run / METRICS)
    if not lines or not {"train_error", "holdout_error", "stage"} <= lines[-1].keys():
        return None
    errors = {name: lines[-1][name] for name in ("train_error", "holdout_error")}
    return advice(**errors, earlier=_earlier(lines))


def _earlier(lines: Sequence[Mapping[str, Any]]) -> float | None:
    """The last holdout error of the first four fifths of the last stage."""
    last = lines[-1]
    begin = max((line["step"] for line in lines if line.get("stage", last["stage"]) != last["stage"]), default=0)
    until = begin + _LATE * (last["step"] - begin)
    errors = [line["holdout_error"] for line in lines if begin < line["step"] <= until and "holdout_error" in line]
    return errors[-1] if errors else None

"""The table of all rounds."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from limbeck.pipeline.rounds.config import ProgressiveConfig
from limbeck.storage_schemas.errors import shown


def show(config: ProgressiveConfig, record: Mapping[str, Any]) -> None:
    """A line a round: the error that has piled up, beside direct progressive and the teacher's own solver."""
    direct, so_far = record["direct"] if "errors" in record["direct"] else {}, 0
    table = Table(title=f"{shown(config.teacher)} in {config.num_steps} steps, halved round by round")
    for heading in ("steps", "error", *(["direct"] if direct else []), "ddim", "calls", "so far", "solve s", "fit s"):
        table.add_column(heading, justify="right", no_wrap=True)
    for steps in config.schedule:
        part = record["rounds"][str(steps)]
        so_far += part["calls"]
        errors = [part["error"], *([direct["errors"][str(steps)]] if direct else []), part["teacher_error"]]
        table.add_row(*map(_cell, [steps, *errors, part["calls"], so_far, part["solve_seconds"], part["fit_seconds"]]))
    console = Console(highlight=False, markup=False, emoji=False)
    console.print(table)
    variance = record["rounds"][str(config.schedule[0])]["variance"]
    where = f"dataset {record['reference']['dataset']}"
    lines = [
        f"error: mean square per number against the first teacher's outputs for holdout noises of {where}, "
        f"of a variance of {variance:.4g}; ddim: the first teacher's own in as many steps",
        "calls: of the network, for the train samples of the round",
    ]
    if direct:
        lines.append(
            f"direct: all stages on the first teacher's own states, {direct['calls']} calls, "
            f"solved in {direct['solve_seconds']:.4g} s, fitted in {direct['fit_seconds']:.4g} s"
        )
    for line in lines:
        console.print(shown(line))


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)

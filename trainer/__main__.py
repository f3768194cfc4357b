"""`python -m trainer COMMAND`."""

import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any

from storage_schemas.command_line import Command, main

# Each command's module is imported when it is asked for: fitting needs no plotting library.
_COMMANDS = {
    "fit": ("trainer.fit", "FitConfig", "run_fit"),
    "sample": ("trainer.sample", "SampleConfig", "run_sample"),
    "evaluate": ("trainer.evaluate", "EvaluateConfig", "run_evaluate"),
    "report": ("trainer.report", "ReportConfig", "run_report"),
    "classifier": ("trainer.classifier", "ClassifierConfig", "run_classifier"),
    "shuffle": ("trainer.shuffle", "ShuffleConfig", "run_shuffle"),
}


def commands(word: str | None) -> dict[str, Command]:
    """The command named by `word`, or all of them where it names none."""
    names = [word] if word in _COMMANDS else list(_COMMANDS)
    return {name: _command(*_COMMANDS[name]) for name in names}


def _command(module: str, config: str, run: str) -> Command:
    loaded: Any = import_module(module)
    runner: Callable[[Any], int] = getattr(loaded, run)
    return Command(getattr(loaded, config), runner)


if __name__ == "__main__":
    sys.exit(main("trainer", commands(sys.argv[1] if len(sys.argv) > 1 else None)))

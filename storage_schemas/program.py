"""`limbeck COMMAND`: every command of both programs, each imported when it is asked for."""

import sys
from importlib import import_module
from typing import NoReturn

from limbeck.storage_schemas import command_line
from limbeck.storage_schemas.command_line import Command

_PROGRAMS = [import_module(f"limbeck.{name}.__main__") for name in ("pipeline", "trainer")]
"""By name, since what is on disk knows neither: each is a table of its commands' modules, and a `run` that exits."""

COMMANDS: dict[str, Command] = {word: one for program in _PROGRAMS for word, one in program.COMMANDS.items()}


def main() -> NoReturn:
    """The console script: a command ends the process as its own program does."""
    words = sys.argv[1:]
    command = next((word for word in words if word != "--debug"), "")
    for program in _PROGRAMS:
        if command in program.COMMANDS:
            program.run(words)
    sys.exit(command_line.main(COMMANDS, words))

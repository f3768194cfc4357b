"""`python -m limbeck.trainer COMMAND`: the commands that use data."""

import sys
from collections.abc import Sequence
from typing import NoReturn

from limbeck.storage_schemas.command_line import Command, main

COMMANDS = {
    "fit": Command("limbeck.trainer.fit", "FitConfig", "run_fit"),
    "sample": Command("limbeck.trainer.sample", "SampleConfig", "run_sample"),
    "evaluate": Command("limbeck.trainer.evaluate", "EvaluateConfig", "run_evaluate"),
    "report": Command("limbeck.trainer.report", "ReportConfig", "run_report"),
    "classifier": Command("limbeck.trainer.classifier", "ClassifierConfig", "run_classifier"),
    "shuffle": Command("limbeck.trainer.shuffle", "ShuffleConfig", "run_shuffle"),
}


def run(arguments: Sequence[str]) -> NoReturn:
    """Run a command and end the process with its exit code."""
    sys.exit(main(COMMANDS, arguments))


if __name__ == "__main__":
    run(sys.argv[1:])

"""`python -m limbeck.pipeline COMMAND`: the commands that make data."""

import sys
from collections.abc import Sequence
from typing import NoReturn

from limbeck.pipeline.workers.signals import exit_on_sigterm, leave
from limbeck.storage_schemas.command_line import Command, main

COMMANDS = {
    "generate": Command("limbeck.pipeline.generate", "GenerateConfig", "run_generate"),
    "regenerate": Command("limbeck.pipeline.regenerate", "RegenerateConfig", "run_regenerate"),
    "progressive": Command("limbeck.pipeline.rounds.progressive", "ProgressiveConfig", "run_progressive"),
    "plan": Command("limbeck.pipeline.before.plan", "PlanConfig", "run_plan"),
    "parity": Command("limbeck.pipeline.before.parity", "ParityConfig", "run_parity"),
    "calibrate": Command("limbeck.pipeline.before.calibrate", "CalibrateConfig", "run_calibrate"),
    "submit": Command("limbeck.pipeline.workers.submission", "SubmitConfig", "run_submit"),
    "status": Command("limbeck.pipeline.status", "StatusConfig", "run_status"),
    "verify": Command("limbeck.pipeline.after.verify", "VerifyConfig", "run_verify"),
    "reproduce": Command("limbeck.pipeline.after.reproduce", "ReproduceConfig", "run_reproduce"),
    "inspect": Command("limbeck.pipeline.inspection", "InspectConfig", "run_inspect"),
    "convert": Command("limbeck.pipeline.upkeep.convert", "ConvertConfig", "run_convert"),
    "prune": Command("limbeck.pipeline.upkeep.prune", "PruneConfig", "run_prune"),
}


def run(arguments: Sequence[str]) -> NoReturn:
    """Run a command and end the process with its exit code."""
    exit_on_sigterm()
    leave(main(COMMANDS, arguments))


if __name__ == "__main__":
    run(sys.argv[1:])

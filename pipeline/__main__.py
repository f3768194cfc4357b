"""`python -m pipeline COMMAND`."""

import sys

from pipeline.config import GenerateConfig, InspectConfig, RegenerateConfig, StatusConfig, VerifyConfig
from pipeline.generate import run_generate, run_regenerate
from pipeline.inspection import run_inspect
from pipeline.status import run_status
from pipeline.verify import run_verify
from storage_schemas.command_line import Command, main

COMMANDS = {
    "generate": Command(GenerateConfig, run_generate),
    "regenerate": Command(RegenerateConfig, run_regenerate),
    "status": Command(StatusConfig, run_status),
    "verify": Command(VerifyConfig, run_verify),
    "inspect": Command(InspectConfig, run_inspect),
}

if __name__ == "__main__":
    sys.exit(main("pipeline", COMMANDS))

"""`python -m pipeline COMMAND`."""

from pipeline.calibrate import run_calibrate
from pipeline.config import (
    CalibrateConfig,
    ConvertConfig,
    GenerateConfig,
    InspectConfig,
    PlanConfig,
    PruneConfig,
    RegenerateConfig,
    ReproduceConfig,
    StatusConfig,
    SubmitConfig,
    VerifyConfig,
)
from pipeline.convert import run_convert
from pipeline.drain import leave
from pipeline.estimate import run_plan
from pipeline.generate import run_generate
from pipeline.inspection import run_inspect
from pipeline.prune import run_prune
from pipeline.regenerate import run_regenerate
from pipeline.reproduce import run_reproduce
from pipeline.status import run_status
from pipeline.submission import run_submit
from pipeline.verify import run_verify
from storage_schemas.command_line import Command, main

COMMANDS = {
    "generate": Command(GenerateConfig, run_generate),
    "regenerate": Command(RegenerateConfig, run_regenerate),
    "plan": Command(PlanConfig, run_plan),
    "calibrate": Command(CalibrateConfig, run_calibrate),
    "submit": Command(SubmitConfig, run_submit),
    "status": Command(StatusConfig, run_status),
    "verify": Command(VerifyConfig, run_verify),
    "reproduce": Command(ReproduceConfig, run_reproduce),
    "inspect": Command(InspectConfig, run_inspect),
    "convert": Command(ConvertConfig, run_convert),
    "prune": Command(PruneConfig, run_prune),
}

if __name__ == "__main__":
    leave(main("pipeline", COMMANDS))

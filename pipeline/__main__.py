"""`python -m pipeline COMMAND`."""

from pipeline.after.reproduce import run_reproduce
from pipeline.after.verify import run_verify
from pipeline.before.calibrate import run_calibrate
from pipeline.before.plan import run_plan
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
from pipeline.generate import run_generate
from pipeline.inspection import run_inspect
from pipeline.regenerate import run_regenerate
from pipeline.rounds.config import ProgressiveConfig
from pipeline.rounds.progressive import run_progressive
from pipeline.status import run_status
from pipeline.upkeep.convert import run_convert
from pipeline.upkeep.prune import run_prune
from pipeline.workers.signals import exit_on_sigterm, leave
from pipeline.workers.submission import run_submit
from storage_schemas.command_line import Command, main

COMMANDS = {
    "generate": Command(GenerateConfig, run_generate),
    "regenerate": Command(RegenerateConfig, run_regenerate),
    "progressive": Command(ProgressiveConfig, run_progressive),
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
    exit_on_sigterm()
    leave(main("pipeline", COMMANDS))

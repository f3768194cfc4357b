"""What a fit begins with: a new run's plan, record and student, or those of the one that it goes on with."""

import os
from typing import Any

from diffusion.denoiser import Denoiser
from diffusion.spec import model_from_spec
from storage_schemas.dataset import latest_manifest
from storage_schemas.errors import ManifestMismatch, UsageError
from storage_schemas.store import Store
from trainer.config import FitConfig
from trainer.order import default_block, default_lanes
from trainer.parallel import Ranks
from trainer.plan import Plan, plan_images
from trainer.run import RunRecord, new_record, where
from trainer.saving.checkpoints import Found
from trainer.saving.place import Place
from trainer.student import with_dropout
from trainer.trajectories import plan_trajectories


def check_launch(config: FitConfig, crew: Ranks) -> None:
    """Refuse to be spread over no processes, and to start anew what torchrun would start anew at each restart."""
    if config.parallel != "auto" and crew.objects is None:
        told = f"parallel {config.parallel} spreads a fit over processes"
        raise ValueError(f"{told}; start it by torchrun -m trainer fit, or leave --parallel out")
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0))
    if restarts and not config.resume:
        raise ValueError(
            f"--no-resume with --max-restarts={restarts} would start anew each time; leave one of them out"
        )


def make_plan(config: FitConfig, crew: Ranks, earlier: RunRecord | None, found: Found | None) -> Plan:
    """The plan of a new run, or of an earlier one on the samples that it reads: on every rank the same."""
    tree = found.plain if found else None
    if tree and tree["sharded"] != (config.parallel == "fsdp"):
        told = f"{config.out} was saved {'with' if tree['sharded'] else 'without'} --parallel fsdp"
        raise UsageError(f"{told}; go on in the same way, or start anew by --no-resume")
    reads = tree["reads"] if tree else earlier.reads if earlier else {}
    if config.objective.name == "denoising":
        plan = plan_images(config)
    else:
        plan = plan_trajectories(config, number=crew.broadcast(_manifest(config, reads) if crew.is_first else None))
    if reads and reads["content_digest"] != plan.reads["content_digest"]:
        told = f"{config.out} was reading samples {reads['content_digest'][:12]}"
        raise ManifestMismatch(f"{told}, now {plan.reads}: name those it read, or choose another --out")
    return plan


def _manifest(config: FitConfig, reads: dict[str, Any]) -> int | None:
    """Its number, which one rank finds out for all, as a newer one may be sealed meanwhile. None: there is none."""
    if config.manifest:
        return config.manifest
    if reads and all(reads[name] == value for name, value in where(config).items()):
        return int(reads["manifest"])
    latest = latest_manifest(Store.open(config.data or ""), config.dataset)
    return latest.number if latest else None


def start(config: FitConfig, plan: Plan, place: Place) -> tuple[RunRecord, Denoiser]:
    """The record of a new run, and its student as --init says."""
    start = plan.start()
    model = with_dropout(start.model, config.network.dropout)
    denoiser = built(model)
    denoiser.load_state_dict(start.build().state_dict())
    count = plan.source(plan.stages[0].objective.columns).ids.count
    block = default_block(count, config.lanes or default_lanes(config.batch_size))
    return new_record(config, place, reads=_reads(config, plan), model=model, block=block), denoiser


def _reads(config: FitConfig, plan: Plan) -> dict[str, Any]:
    return {**where(config), **plan.reads}


def built(model: dict[str, Any]) -> Denoiser:
    denoiser = model_from_spec(model)
    assert isinstance(denoiser, Denoiser)
    return denoiser

"""The start of a fit: a new run's plan, record and student, or those of the run that it goes on with."""

import os
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from limbeck.diffusion.denoiser import Denoiser
from limbeck.diffusion.flow_map import FlowMap
from limbeck.diffusion.models.activations import checkpoint_activations
from limbeck.diffusion.models.checkpoint import Checkpoint, check_size, widened
from limbeck.diffusion.models.spec import model_from_spec
from limbeck.diffusion.models.teachers import Teacher
from limbeck.storage_schemas.dataset import latest_manifest
from limbeck.storage_schemas.errors import ManifestMismatch, UsageError, without_credentials
from limbeck.storage_schemas.store import Store
from limbeck.trainer.config import FitConfig
from limbeck.trainer.networks.critic import Critic, FrozenTeacher, frozen_teacher, make_critic
from limbeck.trainer.networks.networks import Networks
from limbeck.trainer.networks.student import with_dropout
from limbeck.trainer.networks.uncertainty import Uncertainty
from limbeck.trainer.options import ComputeConfig
from limbeck.trainer.planning.plan import Plan, plan_images
from limbeck.trainer.planning.trajectories import plan_trajectories
from limbeck.trainer.ranks import Ranks
from limbeck.trainer.reading.options import StoreConfig
from limbeck.trainer.runs.checkpoints import Checkpoints, Found
from limbeck.trainer.runs.place import RECORD, Place
from limbeck.trainer.runs.record import RunRecord, check_place, earlier_run, new_record, only_fit, where

# Seconds that a restarted run waits for its processes elsewhere to end, which notice when their collectives fail.
_PATIENCE = 60.0


class RunLocks:
    """Locks a run's folder and checkpoint place. Only rank 0 has a `held` for its locks; others' methods do nothing.

    Nothing is written before `make`, so that what is refused until then leaves no trace.
    """

    def __init__(self, config: FitConfig, place: Place, held: ExitStack | None) -> None:
        self._config, self._place, self._held = config, place, held
        self._has_begun = (config.out / RECORD).is_file()
        self._has_begun_there = held is not None and place.elsewhere and place.store.exists(RECORD)

    def earlier(self, checkpoints: Checkpoints) -> RunRecord | None:
        """The run that is there to go on with, once no other process is at work on it."""
        config, place = self._config, self._place
        if self._held is None:
            return None
        patience = _PATIENCE if "WORLD_SIZE" in os.environ else 0.0
        if self._has_begun:
            self._held.enter_context(only_fit(config.out, patience=patience))
        if self._has_begun_there:
            self._held.enter_context(place.held(patience=patience))
        earlier = earlier_run(config, place)
        if not earlier and not place.store.exists(RECORD) and checkpoints:
            problem = f"{place.store.uri} holds checkpoints of a run without its {RECORD}"
            raise UsageError(f"{problem}; move them, or choose another")
        return earlier

    def make(self, record: RunRecord, *, goes_on: bool) -> None:
        """Remove what another run has left, or fetch it to go on with, now that nothing is refused any more."""
        config, place = self._config, self._place
        if self._held is None:
            return
        if not self._has_begun:
            self._held.enter_context(only_fit(config.out))
            if (config.out / RECORD).is_file():
                raise UsageError(f"another fit has begun in {config.out} since; the same command goes on with it")
        if not self._has_begun_there:
            self._held.enter_context(place.held())
            if place.elsewhere and place.store.exists(RECORD):
                raise UsageError(f"another fit has begun in {place.store.uri} since; choose another --checkpoints")
        if not config.saving.resume:
            place.clear()
        if goes_on:
            place.fetch()
        record.save(config.out)
        place.put(RECORD)


def check_launch(compute: ComputeConfig, ranks: Ranks, *, resume: bool) -> None:
    """Refuse --parallel without processes, and --no-resume where torchrun would start over at each restart."""
    if compute.parallel != "auto" and ranks.objects is None:
        problem = f"parallel {compute.parallel} spreads a fit over processes"
        raise ValueError(f"{problem}; start it by torchrun -m limbeck.trainer fit, or leave --parallel out")
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0))
    if restarts and not resume:
        raise ValueError(
            f"--no-resume with --max-restarts={restarts} would start anew each time; leave one of them out"
        )


def make_plan(config: FitConfig, ranks: Ranks, earlier: RunRecord | None, found: Found | None) -> Plan:
    """The plan of a new run, or of an earlier one on the samples that it reads: on every rank the same."""
    tree = found.plain if found else None
    if tree and tree["sharded"] != (config.compute.parallel == "fsdp"):
        problem = f"{config.out} was saved {'with' if tree['sharded'] else 'without'} --parallel fsdp"
        raise UsageError(f"{problem}; go on in the same way, or start anew by --no-resume")
    reads = tree["reads"] if tree else earlier.reads if earlier else {}
    if config.objective.kind.reads_images:
        plan = plan_images(config)
    else:
        number = ranks.broadcast(_manifest(config.store, reads) if ranks.is_first else None)
        plan = plan_trajectories(config, number=number)
    if reads and reads["content_digest"] != plan.reads["content_digest"]:
        problem = f"{config.out} was reading samples {reads['content_digest'][:12]}"
        raise ManifestMismatch(f"{problem}, now {plan.reads}: name those it read, or choose another --out")
    _check_beside(config, earlier.reads if earlier else {}, plan.reads)
    return plan


def _check_beside(config: FitConfig, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Refuse files beside the store that hold something else than at the run's start."""
    for name, what in (
        ("images_digest", f"images {config.images}"),
        ("lpips_sha256", f"{config.objective.options.distance_file}"),
    ):
        if name in before and before[name] != now.get(name):
            changed = f"{what} has sha256 {str(now.get(name))[:12]}..., {config.out} began with {before[name][:12]}..."
            raise UsageError(f"{changed}; bring back what it held, or choose another --out")


def _manifest(store: StoreConfig, reads: dict[str, Any]) -> int | None:
    """The manifest's number, or None: one rank finds it for all, as a newer one may be sealed meanwhile."""
    if store.manifest:
        return store.manifest
    if reads and all(reads[name] == value for name, value in where(store).items()):
        return int(reads["manifest"])
    latest = latest_manifest(Store.open(store.data or ""), store.dataset)
    return latest.number if latest else None


def start_or_go_on(
    config: FitConfig, plan: Plan, place: Place, earlier: RunRecord | None, found: Found | None
) -> tuple[RunRecord, Denoiser]:
    """The record and the student of the earlier run; of a new one where there is no checkpoint to go on from."""
    if earlier and found:
        tensors, numbers = found.holds
        check_size(earlier.model, tensors=tensors, numbers=numbers, source=f"checkpoint {found.marker.folder}")
        return earlier, built(earlier.model)
    if earlier:
        check_place(earlier, place, config.out)
    return start(config, plan, place)


def start(config: FitConfig, plan: Plan, place: Place) -> tuple[RunRecord, Denoiser]:
    """The record of a new run, and its student as --init says."""
    start = plan.start()
    student, kind = config.student, config.objective.kind
    init = None if student.init in ("teacher", "scratch") else _known_of(start, uri=str(student.init))
    torch.manual_seed(config.seed)  # for the inputs that its teacher lacks
    start = widened(start, second_time=kind.takes_target_time, told_guidance=student.told_guidance)
    _check_scales(start, plan.guidance)
    model = with_dropout(start.model, config.network.dropout)
    denoiser = built(model)
    denoiser.load_state_dict(start.build().state_dict())
    return new_record(config, place, reads={**where(config.store), **plan.reads}, model=model, init=init), denoiser


def _known_of(saved: Checkpoint, *, uri: str) -> dict[str, Any]:
    """Where a saved model was and all that its description says but the spec: its folder may be gone one day."""
    document = saved.document()
    return {"uri": without_credentials(uri), **{name: document[name] for name in ("weights_sha256", "grids", "about")}}


def _check_scales(start: Checkpoint, scales: tuple[float, ...]) -> None:
    """Refuse scales below 0: a network takes log(1 + w)."""
    if start.model["network"].get("told_guidance") and min(scales) < 0:
        problem = f"guidance scale {min(scales):g} can't be given to a student, only 0 and more"
        raise ValueError(f"{problem}; generate at others, or fit a student without --told-guidance")


def built(model: dict[str, Any]) -> Denoiser:
    denoiser = model_from_spec(model)
    assert isinstance(denoiser, Denoiser)
    return denoiser


def gather(config: FitConfig, plan: Plan, student: FlowMap) -> Networks:
    """The student, and the networks beside it that its objective needs."""
    device, objective = next(student.parameters()).device, config.objective
    weighting = Uncertainty(config.seed).to(device) if objective.options.learns_weighting else None
    networks = Networks(student, weighting=weighting)
    with_gradients: list[nn.Module] = [student]
    if objective.kind.has_critic:
        assert plan.teacher is not None
        teacher = plan.teacher(torch.device("cpu") if config.teacher.offload else device)
        networks.critic = critic_of(config, teacher, student.denoiser)  # first: it starts in float32
        networks.teacher = real_score(config, teacher, guidance=plan.guidance, device=device)
        with_gradients.append(networks.critic)
        # One that is offloaded answers again for them anyhow.
        if objective.kind.through_teacher and not config.teacher.offload:
            with_gradients.append(teacher.denoiser)
    if config.compute.gradient_checkpointing:
        for module in with_gradients:
            checkpoint_activations(module)
    return networks


def critic_of(config: FitConfig, teacher: Teacher, student: Denoiser) -> Critic:
    """The critic as the config says."""
    discriminates = config.objective.options.has_discriminator
    return make_critic(config.critic, teacher, student, seed=config.seed, discriminates=discriminates)


def real_score(
    config: FitConfig, teacher: Teacher, *, guidance: tuple[float, ...], device: torch.device
) -> FrozenTeacher:
    """The frozen teacher as the config says: guided by objective.guidance, default: by the data's scales."""
    asked = config.objective.options.real_guidance
    return frozen_teacher(config.teacher, teacher, asked=asked, guidance=guidance, device=device)

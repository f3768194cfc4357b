"""`limbeck fit`: stages of optimizer steps, from a plan to a saved model, on one process or many."""

import math
import signal
from contextlib import ExitStack, nullcontext
from typing import Any

import torch

from limbeck.diffusion.flow_map import FlowMap
from limbeck.storage_schemas.errors import UserError, usage_errors
from limbeck.trainer.config import FitConfig
from limbeck.trainer.loop import Stepper, StopRequest, check_device, step_seed, stop_on_signals
from limbeck.trainer.objectives.kind import Stage
from limbeck.trainer.planning.follow import Following
from limbeck.trainer.planning.models import Models
from limbeck.trainer.planning.plan import Plan
from limbeck.trainer.planning.start import RunLocks, check_launch, gather, make_plan, start_or_go_on
from limbeck.trainer.ranks import Ranks, join_ranks
from limbeck.trainer.reading.content import check_division
from limbeck.trainer.runs.advice import advice_of
from limbeck.trainer.runs.checkpoints import Checkpoints, Found
from limbeck.trainer.runs.logs import NoLog, RunLog
from limbeck.trainer.runs.meter import Figures, Meter
from limbeck.trainer.runs.pins import Pins
from limbeck.trainer.runs.place import BEST, METRICS, Place
from limbeck.trainer.runs.record import RunRecord, as_begun, where
from limbeck.trainer.stream import Stream

__all__ = ["FitConfig", "run_fit"]


class Diverged(UserError):
    """A loss or a gradient that is no number, from which no step leads back."""


def run_fit(config: FitConfig) -> int:
    """Fit to the end, or to a signal: 0, or 128 + the signal after saving. Every process of torchrun's calls it."""
    if config.compute.threads:
        torch.set_num_threads(config.compute.threads)
    with ExitStack() as held:
        with usage_errors():
            ranks = held.enter_context(join_ranks(config.compute.device))
            check_device(config.compute, ranks.device)
            check_division(config.batch.size, config.batch.num_lanes, ranks.world_size)
            check_launch(config.compute, ranks, resume=config.saving.resume)
        return _fit(config, ranks, held)


def _fit(config: FitConfig, ranks: Ranks, held: ExitStack) -> int:
    keep_last, keep_best = config.saving.keep_last, config.keeps_best
    place = Place(config.out, config.saving.checkpoints)
    checkpoints = Checkpoints(place.store, ranks, keep_last=keep_last, keep_best=keep_best, check=place.check)
    locks = RunLocks(config, place, held if ranks.is_first else None)
    earlier = ranks.broadcast(locks.earlier(checkpoints))
    config = as_begun(config, earlier)
    with checkpoints.newest() if earlier else nullcontext() as found:
        with usage_errors():
            plan = make_plan(config, ranks, earlier, found)
            record, denoiser = start_or_go_on(config, plan, place, earlier, found)
        record = ranks.broadcast(record)
        locks.make(record, goes_on=earlier is not None)
        stop = held.enter_context(stop_on_signals())
        fit = Fit(config, plan, record, ranks, stop, place, checkpoints)
        fit.begin(FlowMap(denoiser.to(ranks.device)), found)
    return fit.run()


class Fit:
    """One run over its stages."""

    def __init__(
        self,
        config: FitConfig,
        plan: Plan,
        record: RunRecord,
        ranks: Ranks,
        stop: StopRequest,
        place: Place,
        checkpoints: Checkpoints,
    ) -> None:
        self.config, self.plan, self.ranks, self.stop = config, plan, ranks, stop
        self.place, self.checkpoints = place, checkpoints
        self.models = Models(config, record, place)
        self.steps = config.optimization.steps
        self.total = self.steps * len(plan.stages)
        self.pins = None
        if plan.store is not None and ranks.is_first:
            self.pins = Pins(plan.store, run=record.name, dataset=plan.reads["dataset"])

    def begin(self, student: FlowMap, found: Found | None) -> None:
        """Initialise, or restore from a checkpoint."""
        sharded = self.config.compute.parallel == "fsdp"
        with usage_errors():
            networks = gather(self.config, self.plan, student)
            self.stepper = Stepper(networks, self.config, self.ranks, sharded=sharded)
        self.stage, self.step = 0, 0
        self.stream_state: dict[str, Any] | None = None
        self.warnings = self.plan.warnings_of(student)
        if found:
            tree = found.read(like={"stepper": self.stepper.state_dict()} if sharded else None)
            with found.store_errors():
                self.stepper.load_state_dict(tree["stepper"])
                self.stage, self.step, self.stream_state = tree["stage"], tree["step"], tree["stream"]
            self.warnings += found.refused

    @property
    def done(self) -> int:
        """Steps done of the whole run."""
        return self.stage * self.steps + self.step

    def run(self) -> int:
        """Run to the end or to a signal; the exit code."""
        log = RunLog(self.config.out, step=self.done, total=self.total) if self.ranks.is_first else NoLog()
        with log as self.log:
            self._greet()
            while True:
                if self._run_stage():
                    self.log.say(f"{self.config.out}: saved on a signal; the same command goes on")
                    return self.stop.exit_code if self.stop else 128 + signal.SIGTERM
                self._save_model(*self._folders())
                if self.stage + 1 == len(self.plan.stages):
                    break
                self.stepper.restart()
                self.stage, self.step = self.stage + 1, 0
            if self.pins:
                self.pins.drop()
            if self.ranks.is_first and (found := advice_of(self.config.out)):
                self.log.say(found)
            self.log.say(f"{self.config.out / 'model'}: fitted in {self.total} steps")
        return 0

    def _greet(self) -> None:
        for line in self.plan.notes:
            self.log.say(line)
        for warning in self.warnings:
            self.log.say(f"warning: {warning}")
        if self.done:
            self.log.say(f"{self.config.out}: going on from step {self.done} of {self.total}")
        self._pin(self.plan.reads.get("manifest"))

    def _pin(self, number: int | None) -> None:
        refused = self.pins.keep(number) if self.pins and number else None
        if refused:
            self.log.say(f"warning: {refused}")

    def _run_stage(self) -> bool:
        """Steps up to the stage's end; whether a signal came, on any rank."""
        config, stage = self.config, self.plan.stages[self.stage]
        following = None
        if config.store.follow_latest:
            following = Following(config, self.plan, stage, ranks=self.ranks, pins=self.pins, say=self.log.say)
        with self._stream(stage, following) as stream, following or nullcontext():
            meter, stopped = Meter(stream, self.ranks.device), self.ranks.any(bool(self.stop))
            while self.step < self.steps and not stopped:
                batch = next(stream)
                meter.note_batch()
                if following:
                    self._note_content(following, stream)
                seed = step_seed(config.seed, self.done)
                found = self.stepper.step(stage.objective, batch, seed=seed, number=self.step)
                self.step += 1
                meter.add(found, config.batch.size)
                error = self._report(stage, meter, stream)
                stopped = self.ranks.any(bool(self.stop))  # agreed, so that all ranks end after the same step
                if self.step % config.saving.checkpoint_every == 0 or self.step == self.steps or stopped:
                    self._check_finite(meter)
                    self._checkpoint(stream, error)
            self.stream_state = stream.state_dict(self.ranks.gather)
            return stopped

    def _stream(self, stage: Stage, following: Following | None) -> Stream:
        config = self.config
        return Stream(
            self.plan.source(stage.objective.columns),
            batch_size=config.batch.size,
            seed=config.seed,
            lanes=config.batch.num_lanes,
            num_uniforms=stage.objective.num_uniforms,
            rank=self.ranks.rank,
            world_size=self.ranks.world_size,
            ahead_bytes=config.batch.ahead_mib << 20,
            device=self.ranks.device,
            follow=following,
            state=self.stream_state,
        )

    def _note_content(self, following: Following, stream: Stream) -> None:
        """Go over to another manifest's plan at its first batch."""
        number, before = stream.state_dict()["place"]["manifest"], self.plan.reads["manifest"]
        if number != before:
            self.plan = following.plans[number]
            self.log.say(f"{self.config.out}: from step {self.done + 1} on manifest {number}, in place of {before}")
            for warning in self.plan.warnings_of(self.stepper.networks.student):
                self.log.say(f"warning: {warning}")

    def _report(self, stage: Stage, meter: Meter, stream: Stream) -> float | None:
        """The line of metrics that is due after a step, if one is; its error on the holdout split, if that was due."""
        saving, figures, last = self.config.saving, Figures(), self.step == self.steps
        if self.done % saving.log_every == 0 or last:
            self._check_finite(meter)
            lr = float(self.stepper.student.scheduler.get_last_lr()[0])
            figures = {"stage": stage.name, **meter.take(), "lr": lr, **self._counts(stream)}
        error = None
        if saving.validate_every and (self.step % saving.validate_every == 0 or last) and self.plan.holdout_error:
            with self.stepper.evaluating() as served:
                error = figures["holdout_error"] = self.plan.holdout_error(FlowMap(served), stage)
                if last and self.plan.train_error:
                    figures["train_error"] = self.plan.train_error(FlowMap(served), stage)
        if figures:
            self.log.write(self.done, figures)
        return error

    def _counts(self, stream: Stream) -> Figures:
        state = stream.state_dict(self.ranks.gather)
        counts: Figures = {name: state[name] for name in ("substituted", "left_out") if state[name]}
        return counts | ({"manifest": state["place"]["manifest"]} if self.config.store.follow_latest else {})

    def _check_finite(self, meter: Meter) -> None:
        # float16 steps whose gradient overflows are skipped by the scaler: only its loss tells.
        if not meter.finite(norms=self.config.compute.autocast != "float16"):
            problem = f"{self.config.out} has diverged by step {self.done}: its loss or gradient is not finite"
            raise Diverged(f"{problem}; start it anew by --no-resume with a smaller --lr or a longer --warmup")

    def _checkpoint(self, stream: Stream, error: float | None) -> None:
        """Save metrics and the best model, then the checkpoint, which says that they are there."""
        error = error if error is None or math.isfinite(error) else None
        if error is not None and self.config.keeps_best and self.checkpoints.would_be_best(self.stage, error):
            self._save_model(BEST)
        if self.ranks.is_first:
            self.place.put(METRICS)
        state = stream.state_dict(self.ranks.gather)
        reads = {**where(self.config.store), **state["place"], "content_digest": state["content_digest"]}
        tree = {
            "stage": self.stage,
            "step": self.step,
            "sharded": self.stepper.sharded,
            "reads": reads,
            "stream": state,
            "stepper": self.stepper.state_dict(),
        }
        self.checkpoints.save(self.done, tree, stage=self.stage, holdout_error=error)
        self._pin(reads.get("manifest"))

    def _folders(self) -> list[str]:
        """Folders to save the stage's student in."""
        staged = [f"stages/{self.plan.stages[self.stage].name}"] if len(self.plan.stages) > 1 else []
        return staged + (["model"] if self.stage + 1 == len(self.plan.stages) else [])

    def _save_model(self, *folders: str) -> None:
        weights = self.stepper.served_state()
        if self.ranks.is_first:
            self.models.save(weights, self.plan, self.plan.stages[self.stage], steps=self.done, folders=folders)

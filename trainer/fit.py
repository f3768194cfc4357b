"""`python -m trainer fit`: stages of optimizer steps, from a plan to a saved model."""

import time
from pathlib import Path
from typing import Any

import torch

from diffusion import checkpoint
from diffusion.checkpoint import Checkpoint, pack
from diffusion.denoiser import Denoiser
from diffusion.flow_map import FlowMap
from diffusion.spec import model_from_spec
from storage_schemas.errors import ManifestMismatch, UserError, usage_errors
from trainer import checkpoints
from trainer.config import FitConfig
from trainer.logs import RunLog
from trainer.loop import Stepper, StopRequest, check_device, step_seed, stop_on_signals
from trainer.pins import ManifestPin
from trainer.plan import Plan, Stage, pick_device, plan_images
from trainer.run import RunRecord, clear, earlier_run, new_record, only_fit
from trainer.stream import Stream
from trainer.student import with_dropout
from trainer.trajectories import plan_trajectories

__all__ = ["FitConfig", "run_fit"]


class Diverged(UserError):
    """A loss or a gradient that is no number, from which no step leads back."""


def run_fit(config: FitConfig) -> int:
    """Fit to the end, or to a signal: 0, or 128 + the signal after saving."""
    if config.threads:
        torch.set_num_threads(config.threads)
    earlier = earlier_run(config)
    with usage_errors():
        device = pick_device(config.device)
        check_device(config, device)
        plan = make_plan(config, earlier)
        state = checkpoints.load_last(config.out, device=device) if earlier else None
        record, denoiser = (earlier, _built(earlier.model)) if earlier and state else _start(config, plan)
    with only_fit(config.out), stop_on_signals() as stop:
        if not config.resume:
            clear(config.out)  # only now that nothing is refused any more
        record.save(config.out)
        return Fit(config, plan, record, device, stop).run(FlowMap(denoiser.to(device)), state)


def make_plan(config: FitConfig, earlier: RunRecord | None) -> Plan:
    """The plan of a new run, or of an earlier one on the manifest that it reads."""
    if config.objective.name == "denoising":
        plan = plan_images(config)
    else:
        plan = plan_trajectories(config, number=earlier.reads["manifest"] if earlier else config.manifest)
    if earlier and earlier.reads != plan.reads:
        raise ManifestMismatch(f"{config.out} was reading {earlier.reads}, now {plan.reads}: choose another --out")
    return plan


def _start(config: FitConfig, plan: Plan) -> tuple[RunRecord, Denoiser]:
    """The record of a new run, and its student as --init says."""
    start = plan.start()
    model = with_dropout(start.model, config.network.dropout)
    denoiser = _built(model)
    denoiser.load_state_dict(start.build().state_dict())
    return new_record(config, plan.reads, model), denoiser


def _built(model: dict[str, Any]) -> Denoiser:
    denoiser = model_from_spec(model)
    assert isinstance(denoiser, Denoiser)
    return denoiser


class Fit:
    """One run over its stages."""

    def __init__(
        self, config: FitConfig, plan: Plan, record: RunRecord, device: torch.device, stop: StopRequest
    ) -> None:
        self.config, self.plan, self.record, self.device, self.stop = config, plan, record, device, stop
        self.total = config.steps * len(plan.stages)
        self.pin = (
            None
            if plan.store is None
            else ManifestPin(plan.store, run=record.name, dataset=plan.reads["dataset"], number=plan.reads["manifest"])
        )

    def run(self, student: FlowMap, state: dict[str, Any] | None) -> int:
        """From a checkpoint's state, or from the start."""
        first, step = (state["stage"], state["step"]) if state else (0, 0)
        start = first * self.config.steps + step
        stream_state = state["stream"] if state else None
        with RunLog(self.config.out, step=start, total=self.total) as self.log:
            self._greet(start)
            for index in range(first, len(self.plan.stages)):
                stepper = Stepper(student, self.config, self.device)
                if state:
                    stepper.load_state_dict(state["stepper"])
                stream_state = self._stage(index, stepper, step, stream_state)
                if self.stop:
                    self.log.say(f"{self.config.out}: saved on signal {self.stop.signal}; the same command goes on")
                    return self.stop.exit_code
                self._save_model(index, stepper)
                student.denoiser.load_state_dict(stepper.served.state_dict())
                state, step = None, 0
            if self.pin:
                self.pin.drop()
            self.log.say(f"{self.config.out / 'model'}: fitted in {self.total} steps")
        return 0

    def _greet(self, start: int) -> None:
        for warning in self.plan.warnings:
            self.log.say(f"warning: {warning}")
        if start:
            self.log.say(f"{self.config.out}: going on from step {start} of {self.total}")
        self._renew_pin()

    def _renew_pin(self) -> None:
        refused = self.pin.renew() if self.pin else None
        if refused:
            self.log.say(f"warning: {refused}")

    def _stage(self, index: int, stepper: Stepper, step: int, stream_state: dict[str, Any] | None) -> dict[str, Any]:
        """Steps of one stage; the stream's state after the last."""
        stage, config = self.plan.stages[index], self.config
        with Stream(
            self.plan.source(stage.objective.columns),
            batch_size=config.batch_size,
            seed=config.seed,
            num_uniforms=stage.objective.num_uniforms,
            ahead_bytes=config.ahead_mib << 20,
            state=stream_state,
        ) as stream:
            meter, stopped = Meter(stream), bool(self.stop)
            while step < config.steps and not stopped:
                batch = next(stream)
                total_step = index * config.steps + step
                loss, norm = stepper.step(stage.objective, batch, seed=step_seed(config.seed, total_step))
                step += 1
                meter.add(loss, norm, len(batch))
                self._report(stage, stepper, meter, total_step + 1, last=step == config.steps)
                stopped = bool(self.stop)  # read once, so that no run ends on a signal without saving
                if step % config.checkpoint_every == 0 or step == config.steps or stopped:
                    self._check_finite(meter, total_step + 1)
                    self._checkpoint(index, step, stepper, stream)
            return stream.state_dict()

    def _report(self, stage: Stage, stepper: Stepper, meter: "Meter", total_step: int, *, last: bool) -> None:
        config, figures = self.config, dict[str, float | int | str]()
        if total_step % config.log_every == 0 or last:
            self._check_finite(meter, total_step)
            figures = {"stage": stage.name, **meter.take(), "lr": float(stepper.scheduler.get_last_lr()[0])}
        due = config.validate_every and (total_step % config.validate_every == 0 or last)
        if due and self.plan.holdout_error is not None:
            with stepper.evaluating() as served:
                figures["holdout_error"] = self.plan.holdout_error(FlowMap(served), stage)
        if figures:
            self.log.write(total_step, figures)

    def _check_finite(self, meter: "Meter", total_step: int) -> None:
        # float16 steps whose gradient overflows are skipped by the scaler: only its loss tells.
        if not meter.finite(norms=self.config.autocast != "float16"):
            told = f"{self.config.out} has diverged by step {total_step}: its loss or gradient is not finite"
            raise Diverged(f"{told}; start it anew by --no-resume with a smaller --lr or a longer --warmup")

    def _checkpoint(self, index: int, step: int, stepper: Stepper, stream: Stream) -> None:
        state = {"stage": index, "step": step, "stepper": stepper.state_dict(), "stream": stream.state_dict()}
        total_step = index * self.config.steps + step
        checkpoints.save(self.config.out, total_step, state, keep_last=self.config.keep_last)
        self._renew_pin()

    def _save_model(self, index: int, stepper: Stepper) -> None:
        stage, last = self.plan.stages[index], index == len(self.plan.stages) - 1
        saved = Checkpoint(
            model=self.record.model,
            weights=pack(stepper.served, dtype=getattr(torch, self.config.save_dtype)),
            grids={stage.num_steps: stage.times} if stage.times else {},
            about={
                "objective": self.config.objective.model_dump(mode="json", exclude_none=True),
                "stage": stage.name,
                "steps": (index + 1) * self.config.steps,
                "batch_size": self.config.batch_size,
                "seed": self.config.seed,
                "reads": self.plan.reads,
                "labels": self.plan.labels,
            },
        )
        for folder in self._folders(stage, last):
            checkpoint.save(saved, folder)

    def _folders(self, stage: Stage, last: bool) -> list[Path]:
        staged = [self.config.out / "stages" / stage.name] if len(self.plan.stages) > 1 else []
        return staged + ([self.config.out / "model"] if last else [])


class Meter:
    """Means since the last line: loss, norm of the gradient, samples a second, share of time spent waiting for data."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._reset()

    def add(self, loss: torch.Tensor, norm: torch.Tensor, samples: int) -> None:
        """One step's figures, left on the device so that the step need not wait for them."""
        self._losses.append(loss)
        self._norms.append(norm)
        self._samples += samples

    def finite(self, *, norms: bool) -> bool:
        """Whether every loss since the last line is, and every norm."""
        figures = self._losses + (self._norms if norms else [])
        return not figures or bool(torch.stack(figures).isfinite().all())

    def take(self) -> dict[str, float | int | str]:
        """The figures, and start again."""
        loss, norm = torch.stack(self._losses).mean().item(), torch.stack(self._norms).mean().item()
        seconds = time.perf_counter() - self._started
        figures: dict[str, float | int | str] = {
            "loss": loss,
            "grad_norm": norm,
            "samples_per_s": self._samples / seconds,
            "data_wait": (self._stream.waited - self._waited) / seconds,
            "epoch": self._stream.epochs,
        }
        self._reset()
        return figures

    def _reset(self) -> None:
        self._losses: list[torch.Tensor] = []
        self._norms: list[torch.Tensor] = []
        self._samples, self._started, self._waited = 0, time.perf_counter(), self._stream.waited

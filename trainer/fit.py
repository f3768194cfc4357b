"""`python -m trainer fit`: stages of optimizer steps, from a plan to a saved model."""

import sys
import time
from pathlib import Path
from typing import Any

import torch

from diffusion import checkpoint
from diffusion.checkpoint import Checkpoint, pack
from diffusion.flow_map import FlowMap
from storage_schemas.errors import usage_errors
from trainer import checkpoints
from trainer.config import FitConfig
from trainer.logs import RunLog
from trainer.loop import Stepper, StopRequest, check_device, step_seed, stop_on_signals
from trainer.plan import Plan, Stage, pick_device, plan_images
from trainer.run import earlier_run, new_record
from trainer.stream import Stream

__all__ = ["FitConfig", "run_fit"]


def run_fit(config: FitConfig) -> int:
    """Fit to the end, or to a signal: 0, or 128 + the signal after saving."""
    if config.threads:
        torch.set_num_threads(config.threads)
    record = earlier_run(config)
    with usage_errors():
        device = pick_device(config.device)
        check_device(config, device)
        plan = plan_images(config)
    for warning in plan.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    if record is None:
        record = new_record(config, plan.reads, plan.start.model)
        record.save(config.out)
    state = checkpoints.load_last(config.out, device=device)
    with stop_on_signals() as stop:
        return Fit(config, plan, device, stop).run(state)


class Fit:
    """One run over its stages."""

    def __init__(self, config: FitConfig, plan: Plan, device: torch.device, stop: StopRequest) -> None:
        self.config, self.plan, self.device, self.stop = config, plan, device, stop
        self.total = config.steps * len(plan.stages)

    def run(self, state: dict[str, Any] | None) -> int:
        """From a checkpoint's state, or from the start."""
        first = state["stage"] if state else 0
        start = state["stage"] * self.config.steps + state["step"] if state else 0
        student = FlowMap(self.plan.start.build(device=self.device))  # type: ignore[arg-type]
        stream_state = state["stream"] if state else None
        with RunLog(self.config.out, step=start, total=self.total) as self.log:
            if state:
                self.log.say(f"{self.config.out}: going on from step {start} of {self.total}")
            for index in range(first, len(self.plan.stages)):
                stepper = Stepper(student, self.config, self.device)
                if state and index == first:
                    stepper.load_state_dict(state["stepper"])
                step = state["step"] if state and index == first else 0
                stream_state = self._stage(index, stepper, step, stream_state)
                if self.stop:
                    self.log.say(f"{self.config.out}: saved on signal {self.stop.signal}; the same command goes on")
                    return self.stop.exit_code
                self._save_model(index, stepper)
                student.denoiser.load_state_dict(stepper.served.state_dict())
            self.log.say(f"{self.config.out / 'model'}: fitted in {self.total} steps")
        return 0

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
            meter = Meter(stream)
            while step < config.steps and not self.stop:
                batch = next(stream)
                total_step = index * config.steps + step
                loss, norm = stepper.step(stage.objective, batch, seed=step_seed(config.seed, total_step))
                step += 1
                meter.add(loss, norm, len(batch))
                self._report(stage, stepper, meter, total_step + 1, last=step == config.steps)
                if step % config.checkpoint_every == 0 or step == config.steps or self.stop:
                    self._checkpoint(index, step, stepper, stream)
            return stream.state_dict()

    def _report(self, stage: Stage, stepper: Stepper, meter: "Meter", total_step: int, *, last: bool) -> None:
        config, figures = self.config, {}
        if total_step % config.log_every == 0 or last:
            figures = {"stage": stage.name, **meter.take(), "lr": stepper.scheduler.get_last_lr()[0]}
        due = config.validate_every and (total_step % config.validate_every == 0 or last)
        if due and self.plan.holdout_error is not None:
            figures["holdout_error"] = self.plan.holdout_error(FlowMap(stepper.served), stage)  # type: ignore[arg-type]
        if figures:
            self.log.write(total_step, figures)

    def _checkpoint(self, index: int, step: int, stepper: Stepper, stream: Stream) -> None:
        state = {"stage": index, "step": step, "stepper": stepper.state_dict(), "stream": stream.state_dict()}
        total_step = index * self.config.steps + step
        checkpoints.save(self.config.out, total_step, state, keep_last=self.config.keep_last)

    def _save_model(self, index: int, stepper: Stepper) -> None:
        stage, last = self.plan.stages[index], index == len(self.plan.stages) - 1
        saved = Checkpoint(
            model=self.plan.start.model,
            weights=pack(stepper.served, dtype=getattr(torch, self.config.save_dtype)),
            grids={stage.num_steps: stage.times} if stage.times else {},
            about={
                "objective": self.config.objective.model_dump(mode="json", exclude_none=True),
                "stage": stage.name,
                "steps": (index + 1) * self.config.steps,
                "batch_size": self.config.batch_size,
                "seed": self.config.seed,
                "reads": self.plan.reads,
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

"""`parity`: a pipeline's own scheduler beside our solve, from the same noise and at the same times, step by step.

The scheduler's loop calls the pipeline's own network, so that whatever was read wrongly shows: process, prediction,
network time, grid, solver.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from limbeck.diffusion import noise
from limbeck.diffusion.denoiser import Guided
from limbeck.diffusion.grids import recorded_times
from limbeck.diffusion.models.diffusers_models import Pipeline, open_pipeline
from limbeck.diffusion.models.teachers import Teacher, load_teacher
from limbeck.diffusion.process import DiscreteVP, Process
from limbeck.diffusion.recipes.devices import pick_device
from limbeck.diffusion.solvers import solve
from limbeck.pipeline.config import GridConfig, ParityConfig
from limbeck.pipeline.recipe import recorded_grid
from limbeck.storage_schemas.errors import UsageError, usage_errors

Predict = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Step:
    """Both states after a step. difference: the largest of an element; rms: of the scheduler's state."""

    step: int
    time: float
    rms: float
    difference: float

    @property
    def relative(self) -> float:
        """The difference in units of the state."""
        return self.difference / self.rms


@dataclass(frozen=True)
class Parity:
    """One comparison. scheduler: the class whose steps were taken; steps: the noise first."""

    scheduler: str
    solver: str
    grid: dict[str, Any]
    steps: tuple[Step, ...]

    @property
    def worst(self) -> float:
        """The largest relative difference of any state."""
        return max(step.relative for step in self.steps)


def run_parity(config: ParityConfig) -> int:
    """The exit code: 0 where every state agrees to --tolerance, else 1."""
    parity = measure(config)
    if config.as_json:
        print(json.dumps({**asdict(parity), "worst": parity.worst, "tolerance": config.tolerance}))
    else:
        show(parity, config.tolerance)
    return 0 if parity.worst <= config.tolerance else 1


def measure(config: ParityConfig) -> Parity:
    """Solve with both. UsageError for a teacher that is no pipeline, or whose scheduler has no such steps."""
    scheme, _, source = config.teacher.partition(":")
    if scheme != "diffusers":
        raise UsageError(f"{config.teacher} has no scheduler to compare with: give a pipeline, diffusers:FOLDER")
    device = pick_device(config.device)
    with usage_errors():
        pipeline = open_pipeline(source, ignore=config.ignore)
        teacher = load_teacher(config.teacher, device=device, ignore=config.ignore)
        grid = recorded_grid(GridConfig(grid="scheduler"), teacher)
        times = recorded_times(grid, teacher.process, config.steps)
    name, scheduler = _rival(config, pipeline, teacher.process)
    x_T, labels = _noise(teacher, times, config).to(device), _labels(teacher, config, device)
    with torch.no_grad():
        theirs = list(_their_states(scheduler, _asked(pipeline, config, labels, device), x_T, config.steps))
        denoise = teacher.denoiser if config.guidance == 1 else Guided(teacher.denoiser, config.guidance)
        ours = solve(denoise, teacher.process, x_T, times, solver=config.solver, condition=labels).states
    if len(theirs) != len(ours):
        raise UsageError(f"{name} takes {len(theirs) - 1} steps where {config.steps} are asked for: ask for a divisor")
    return Parity(name, config.solver, grid, tuple(_compared(times, theirs, ours)))


def _rival(config: ParityConfig, pipeline: Pipeline, process: Process) -> tuple[str, Any]:
    """diffusers' scheduler that takes the solver's steps: its class, and one with the pipeline's own configuration."""
    rivals = pipeline.described.rivals
    if config.solver not in rivals:
        own, served = type(pipeline.scheduler).__name__, " or ".join(rivals) or "none"
        raise UsageError(f"diffusers has no deterministic steps like {config.solver} for {own}: choose {served}")
    if isinstance(process, DiscreteVP) and len(process.betas) % config.steps:
        count = len(process.betas)
        raise UsageError(f"steps {config.steps} does not divide {count}, and DDIMScheduler goes wrong: give a divisor")
    name, settings = rivals[config.solver]
    end = (pipeline.described.grid or {}).get("end", 0)
    ends = {"set_alpha_to_one": not end, "final_sigmas_type": "sigma_min" if end else "zero"}
    return name, pipeline.scheduler_of(name, {**pipeline.written, **settings, **ends})


def _noise(teacher: Teacher, times: Tensor, config: ParityConfig) -> Tensor:
    """x at the first time: sigma eps, float32 [count, *shape]."""
    eps = noise.standard_normal(config.seed, "holdout", range(config.count), teacher.sample_shape)
    return (teacher.process.sigma(times[0]) * torch.from_numpy(eps)).float()


def _labels(teacher: Teacher, config: ParityConfig, device: torch.device) -> Tensor | None:
    """A class for each sample, as `generate` draws them, or None; UsageError for a guidance without classes."""
    if teacher.num_classes is not None:
        drawn = noise.labels(config.seed, "holdout", range(config.count), teacher.num_classes)
        return torch.from_numpy(drawn).to(device)
    if config.guidance != 1:
        raise UsageError(f"guidance {config.guidance} needs classes, {config.teacher} has none: leave it at 1")
    return None


def _asked(pipeline: Pipeline, config: ParityConfig, labels: Tensor | None, device: torch.device) -> Predict:
    """The pipeline's own network as its scheduler wants it: (x, t) -> prediction, guided, without a variance."""
    network, call = pipeline.network.to(device).eval(), pipeline.family.call

    def predict(x: Tensor, t: Tensor) -> Tensor:
        if labels is None or config.guidance == 1:
            return call(network, x, t.expand(len(x)), labels)[:, : x.shape[1]]
        both = torch.cat([torch.full_like(labels, pipeline.family.num_classes(network.config) or 0), labels])
        answer = call(network, torch.cat([x, x]), t.expand(2 * len(x)), both)[:, : x.shape[1]]
        unconditional, conditional = answer.chunk(2)
        return unconditional + config.guidance * (conditional - unconditional)

    return predict


def _their_states(scheduler: Any, predict: Predict, x: Tensor, steps: int) -> Iterator[Tensor]:
    """The states of the loop that every diffusers pipeline is."""
    scheduler.set_timesteps(steps, device=x.device)
    yield x
    for t in scheduler.timesteps:
        shown = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(predict(shown, t), t, x).prev_sample
        yield x


def _compared(times: Tensor, theirs: Sequence[Tensor], ours: Tensor) -> Iterator[Step]:
    for index, (time, there, here) in enumerate(zip(times.tolist(), theirs, ours, strict=True)):
        rms, difference = there.square().mean().sqrt().item(), (there - here).abs().max().item()
        yield Step(index, time, rms, difference)


def show(parity: Parity, tolerance: float) -> None:
    """A row for each state, and the verdict."""
    options = " ".join(f"{name} {value}" for name, value in parity.grid.items() if name != "name")
    table = Table("step", "time", "rms", "largest difference", "of the rms")
    for step in parity.steps:
        table.add_row(
            str(step.step), f"{step.time:.6g}", f"{step.rms:.4g}", f"{step.difference:.2e}", f"{step.relative:.2e}"
        )
    console = Console()
    console.print(f"{parity.scheduler} beside {parity.solver}, grid {parity.grid['name']} {options}", highlight=False)
    console.print(table)
    verdict = "agree" if parity.worst <= tolerance else "DIFFER"
    console.print(
        f"they {verdict}: {parity.worst:.2e} of a state's rms at most, {tolerance:g} is allowed", highlight=False
    )

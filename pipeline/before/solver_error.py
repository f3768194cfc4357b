"""How far each solver ends from where the teacher's ODE leads, on the same noises: what `calibrate` asks a worker."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from limbeck.diffusion.grids import recorded_times
from limbeck.diffusion.models.teachers import Teacher, load_teacher
from limbeck.diffusion.recipes.devices import pick_device
from limbeck.pipeline.config import CalibrateConfig, GenerateConfig, TeacherConfig
from limbeck.pipeline.producer import machine_of, set_up_torch
from limbeck.pipeline.recipe import build_recipe
from limbeck.pipeline.solve import as_out_of_memory, denoise_of, solve_ids
from limbeck.storage_schemas.errors import UsageError
from limbeck.storage_schemas.recipe import Recipe

REFERENCE = "rk4"

REFERENCE_STEPS = 512
"""The fewest steps of a default reference: with fewer it is no finer than a tolerance."""


@dataclass(frozen=True)
class Trial:
    """squares [n]: of each sample, the mean over its coordinates of (x_0 - the reference's x_0)^2."""

    solver: str
    steps: int
    nfe: int
    squares: np.ndarray


@dataclass(frozen=True)
class Measured:
    """Trials against the reference; scale: standard deviation of the reference's x_0 over samples and coordinates.

    halved: the reference's solver at half the steps, as a trial.
    """

    scale: float
    reference: tuple[str, int, int]
    halved: Trial
    trials: tuple[Trial, ...]
    machine: dict[str, str]


@dataclass(frozen=True)
class Bench:
    """Everything that the trials share."""

    config: CalibrateConfig
    recipe: Recipe
    teacher: Teacher
    denoise: nn.Module
    device: torch.device

    @classmethod
    def open(cls, config: CalibrateConfig) -> "Bench":
        """Load the teacher here, and set torch up as a worker does."""
        set_up_torch(threads=config.threads, tf32=config.tf32)
        device = pick_device(config.device)
        teacher = load_teacher(config.teacher, device=device, ignore=config.ignore)
        recipe = build_recipe(build_config(config, config.solvers[0], config.steps[0]), teacher)
        return cls(config, recipe, teacher, denoise_of(recipe, teacher.denoiser, device=device), device)

    def solve(self, solver: str, steps: int, *, dtype: torch.dtype) -> tuple[Tensor, int]:
        """x_0 of the holdout's first ids, float64 [n, *shape] on the CPU, and the network calls of a sample."""
        config, process = self.config, self.teacher.process
        times = recorded_times(self.recipe.solver.grid, process, steps)
        if not math.isclose(times[0].item(), self.recipe.times[0], rel_tol=1e-12):
            recipe, name = self.recipe, self.recipe.solver.grid["name"]
            begins = f"the {name} grid begins at {recipe.times[0]:g} with {recipe.num_steps} steps"
            raise UsageError(f"{begins}, at {times[0]:g} with {steps}: calibrate on one such as trailing")
        outputs, nfe = [], 0
        for start in range(0, config.count, config.micro_batch):
            ids = np.arange(start, min(start + config.micro_batch, config.count))
            with as_out_of_memory(len(ids), self.device), torch.no_grad():
                solution = solve_ids(
                    self.recipe, self.denoise, process, "holdout", ids, times,
                    keep=[steps], device=self.device, solver=solver, dtype=dtype,
                )  # fmt: skip
                outputs.append(solution.states[0].cpu().double())
            nfe = solution.nfe
        return torch.cat(outputs), nfe


def measure(config: CalibrateConfig) -> Measured:
    """Every solver at every number of steps. The reference is solved in float64: its own rounding is out of the way."""
    bench = Bench.open(config)
    most = max(config.steps)
    fine = config.reference_factor * most if config.reference_factor else max(8 * most, REFERENCE_STEPS)
    exact, nfe = bench.solve(REFERENCE, fine, dtype=torch.float64)

    def trial(solver: str, steps: int, dtype: torch.dtype) -> Trial:
        x_0, calls = bench.solve(solver, steps, dtype=dtype)
        return Trial(solver, steps, calls, (x_0 - exact).square().flatten(1).mean(1).numpy())

    dtype = getattr(torch, config.solve_dtype)
    return Measured(
        scale=exact.std(correction=0).item(),
        reference=(REFERENCE, fine, nfe),
        halved=trial(REFERENCE, fine // 2, torch.float64),
        trials=tuple(trial(solver, steps, dtype) for solver in config.solvers for steps in config.steps),
        machine=machine_of(bench.device, config.threads),
    )


def build_config(config: CalibrateConfig, solver: str, steps: int) -> GenerateConfig:
    """One trial as the options of generate, from which a recipe is built."""
    return GenerateConfig.model_validate(
        {
            **{name: getattr(config, name) for name in TeacherConfig.model_fields},
            "solver": {**config.solver.model_dump(), "name": solver, "steps": steps},
            "store": "none",
            "count": config.count,
            "samples_per_shard": config.micro_batch,
            "micro_batch": config.micro_batch,
        }
    )

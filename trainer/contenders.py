"""Who is compared: a run's students, the teacher's own solvers at the same NFE, and what the store holds.

All start from the same stored noises with the same conditions. NFE counts network calls for one sample; a guided
teacher makes two a call.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from diffusion.checkpoint import Checkpoint
from diffusion.denoiser import Guided
from diffusion.flow_map import FlowMap
from diffusion.grids import make_grid
from diffusion.process import Process
from diffusion.solvers import plan, solve
from diffusion.spec import process_from_spec
from diffusion.teachers import Teacher
from storage_schemas.errors import ManifestMismatch
from storage_schemas.recipe import Recipe, UniformLabels
from trainer.holdout import Pairs
from trainer.student import check_finite, find_student, student_steps

Sampler = Callable[[Tensor, Tensor | None], Tensor]
"""(x_T [B, ...], condition [B] or None) -> x_0 [B, ...]."""


@dataclass(frozen=True)
class Contender:
    """One row to be: its name in the table, its curve in the plot, its cost, and how it samples."""

    name: str
    kind: Literal["student", "teacher"]
    steps: int
    nfe: int
    sample: Sampler

    @torch.no_grad()
    def outputs(self, pairs: Pairs, *, batch: int, device: torch.device) -> Tensor:
        """Its x_0 for every noise of `pairs`, [n, ...] on the CPU. Raises ManifestMismatch if some are not finite."""
        conditions = [None] * len(pairs) if pairs.condition is None else list(pairs.condition.split(batch))
        parts = zip(pairs.noise.split(batch), conditions, strict=False)
        found = torch.cat([self.sample(x.to(device), None if c is None else c.to(device)).cpu() for x, c in parts])
        check_finite(found, name=f"{self.name} in {self.steps} steps")
        return found


def students(
    runs: Sequence[Path], nfes: Sequence[int], recipe: Recipe, *, device: torch.device
) -> tuple[list[Contender], list[str]]:
    """Every run's student at each NFE that it was fitted for, and a note of each that it was not.

    Raises ValueError where none remains.
    """
    found, notes = [], []
    for run in runs:
        serves = student_steps(run)
        for nfe in nfes or serves:
            if nfe in serves:
                found.append(student(run, nfe, recipe, device=device))
            else:
                told = ", ".join(map(str, serves)) or "no number of steps"
                notes.append(f"{run} was not fitted for {nfe} steps; it serves {told}")
    if not found:
        raise ValueError("; ".join(notes) or f"{runs[0]} serves no number of steps; name a distilled student")
    return found, notes


def student(run: Path, steps: int, recipe: Recipe, *, device: torch.device) -> Contender:
    """A student as it samples in `steps` jumps. Raises ManifestMismatch where it is one of other data."""
    saved = find_student(run, steps)
    times = torch.tensor(saved.grids[steps], dtype=torch.float64)
    _check_student(run, saved, float(times[0]), recipe)
    flow_map = FlowMap(saved.build(device=device))  # type: ignore[arg-type]

    def sample(x_T: Tensor, condition: Tensor | None) -> Tensor:
        return flow_map.sample(x_T.float(), times, condition)

    return Contender(name=str(run), kind="student", steps=steps, nfe=steps, sample=sample)


def teacher_solvers(teacher: Teacher, recipe: Recipe, nfes: Sequence[int]) -> Iterator[Contender]:
    """ddim, heun and dpmpp_2m at each NFE that they can spend exactly, and ddim on the recipe's own grid.

    Grids are of the recipe's kind, with its options. From one point straight to 0 every solver is ddim, told once.
    """
    calls_each = 1 if recipe.guidance.scale == 1 else Guided.nfe_per_call
    for nfe in sorted({*nfes, recipe.num_steps * calls_each}):
        calls = nfe // calls_each
        for solver, steps in (("ddim", calls), ("heun", (calls + 1) // 2), ("dpmpp_2m", calls)):
            affordable = steps > (0 if solver == "ddim" else 1)
            recipes_own = solver == "ddim" and steps == recipe.num_steps
            if affordable and (nfe in nfes or recipes_own):
                contender = teacher_solver(teacher, recipe, solver, steps)
                if contender.nfe == nfe:
                    yield contender


def teacher_solver(teacher: Teacher, recipe: Recipe, solver: str, steps: int) -> Contender:
    """The guided teacher under one solver, in the recipe's solve dtype, on its kind of grid with `steps` steps."""
    times = recipe_grid(recipe, teacher.process, steps)
    scale = recipe.guidance.scale
    denoise = teacher.denoiser if scale == 1 else Guided(teacher.denoiser, scale)

    def sample(x_T: Tensor, condition: Tensor | None) -> Tensor:
        keep = [steps]
        solution = solve(denoise, teacher.process, x_T, times, solver=solver, condition=condition, keep=keep)
        return solution.states[0]

    nfe = count_nfe(solver, teacher.process, times, scale)
    return Contender(name=f"teacher {solver}", kind="teacher", steps=steps, nfe=nfe, sample=sample)


def recipe_grid(recipe: Recipe, process: Process, steps: int) -> Tensor:
    """The recipe's grid, or one of its kind with another number of steps: float64 [steps + 1]."""
    if steps == recipe.num_steps:
        return torch.tensor(recipe.times, dtype=torch.float64)
    options: dict[str, Any] = dict(recipe.solver.grid)
    return make_grid(options.pop("name"), process, steps, **options)


def recipe_nfe(recipe: Recipe) -> int:
    """Network calls behind one stored output."""
    process = process_from_spec(recipe.teacher.model["process"])
    times = torch.tensor(recipe.times, dtype=torch.float64)
    return count_nfe(recipe.solver.name, process, times, recipe.guidance.scale)


def count_nfe(solver: str, process: Process, times: Tensor, guidance_scale: float) -> int:
    """Network calls that a solver's plan makes for one sample."""
    calls = sum(len(step) for step in plan(solver, process, times))
    return calls * (1 if guidance_scale == 1 else Guided.nfe_per_call)


def _check_student(run: Path, saved: Checkpoint, start: float, recipe: Recipe) -> None:
    classes = saved.model["num_classes"] if isinstance(recipe.condition, UniformLabels) else None
    theirs = (tuple(saved.model["sample_shape"]), classes, process_from_spec(saved.model["process"]), start)
    needed = recipe.condition.num_classes if isinstance(recipe.condition, UniformLabels) else None
    ours = (recipe.sample_shape, needed, process_from_spec(recipe.teacher.model["process"]), recipe.times[0])
    names = ("sample shape", "number of classes", "process", "first time")
    for what, there, here in zip(names, theirs, ours, strict=True):
        if there != here:
            raise ManifestMismatch(f"{run} has {what} {there}, this data has {here}; evaluate it on data like its own")

"""The contenders: a run's students, the teacher's own solvers at the same NFE, and what the store holds.

All start from the same stored noises with the same conditions. NFE counts network calls for one sample; a guided
teacher makes two a call.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from limbeck.diffusion.denoiser import Guided
from limbeck.diffusion.grids import ONE_NUMBER_OF_STEPS
from limbeck.diffusion.models.checkpoint import Checkpoint
from limbeck.diffusion.models.spec import process_from_spec
from limbeck.diffusion.models.teachers import Teacher
from limbeck.diffusion.recipes.grid import calls_of, count_nfe, recipe_grid
from limbeck.diffusion.solvers import solve
from limbeck.storage_schemas.errors import ManifestMismatch
from limbeck.storage_schemas.recipe import Recipe, UniformLabels
from limbeck.trainer.evaluation.holdout import Pairs
from limbeck.trainer.evaluation.sampling import Way, few_steps, noises_of
from limbeck.trainer.networks.student import check_finite, find_student, student_steps

Sampler = Callable[[Pairs], Tensor]
"""Stored pairs -> x_0 [B, ...] from their noises, with their conditions and guidance scales."""


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
        """x_0 for every noise of `pairs`, [n, ...] on the CPU. Raises ManifestMismatch if some are not finite."""
        found = torch.cat([self.sample(part).cpu() for part in pairs.parts(batch, device)])
        check_finite(found, name=f"{self.name} in {self.steps} steps")
        return found


def students(
    runs: Sequence[Path], nfes: Sequence[int], recipe: Recipe, *, device: torch.device, way: Way | None = None
) -> tuple[list[Contender], list[str]]:
    """Every run's student at each NFE that it was fitted for, and a note of those that it was not.

    Raises ValueError where none remains.
    """
    found, notes = [], []
    for run in runs:
        serves = student_steps(run)
        wanted = nfes or serves
        found += [student(run, nfe, recipe, device=device, way=way) for nfe in wanted if nfe in serves]
        if missing := [nfe for nfe in wanted if nfe not in serves]:
            have = ", ".join(map(str, serves)) or "no number of steps"
            notes.append(f"{run} was not fitted for {', '.join(map(str, missing))} steps; it serves {have}")
    if not found:
        raise ValueError("; ".join(notes) or f"{runs[0]} serves no number of steps; name a distilled student")
    return found, notes


def student(run: Path, steps: int, recipe: Recipe, *, device: torch.device, way: Way | None = None) -> Contender:
    """A student as it samples in `steps` steps, at each pair's own guidance scale if it takes one.

    A reflow's process is its own, and its noise the stored one at its own scale. Raises ManifestMismatch where it is
    one of other data.
    """
    saved = find_student(run, steps)
    _check_student(run, saved, steps, recipe)
    sampler = few_steps(saved, steps, way=way, device=device)
    scale = sampler.noise_scale / recipe.sigmas[0] if _is_scaled(saved) else 1.0

    def sample(pairs: Pairs) -> Tensor:
        x_T = pairs.noise.float() * scale
        noises = noises_of(pairs.seed, pairs.split, pairs.ids, like=x_T)
        return sampler(x_T, pairs.condition, pairs.guidance, noises)

    return Contender(name=str(run), kind="student", steps=steps, nfe=steps, sample=sample)


def teacher_solvers(teacher: Teacher, recipe: Recipe, nfes: Sequence[int]) -> Iterator[Contender]:
    """ddim, heun and dpmpp_2m at each NFE that they can spend exactly, and ddim on the recipe's own grid.

    Grids are of the recipe's kind, with its options. From one point straight to 0 every solver is ddim, listed once.
    """
    calls_each = calls_of(recipe)
    for nfe in sorted({*nfes, recipe.num_steps * calls_each}):
        calls = nfe // calls_each
        for solver, steps in (("ddim", calls), ("heun", (calls + 1) // 2), ("dpmpp_2m", calls)):
            affordable = steps > (0 if solver == "ddim" else 1)
            recipes_own = solver == "ddim" and steps == recipe.num_steps
            if recipe.solver.grid["name"] in ONE_NUMBER_OF_STEPS and steps != recipe.num_steps:
                continue  # a student is asked at no other times than its own
            if affordable and recipe_grid(recipe, teacher.process, steps)[0] != recipe.times[0]:
                continue  # which is not where these noises are
            if affordable and (nfe in nfes or recipes_own):
                contender = teacher_solver(teacher, recipe, solver, steps)
                if contender.nfe == nfe:
                    yield contender


def teacher_solver(teacher: Teacher, recipe: Recipe, solver: str, steps: int) -> Contender:
    """The teacher under one solver, each sample at its own guidance scale, in the recipe's solve dtype.

    On a grid of the recipe's kind with `steps` steps.
    """
    times = recipe_grid(recipe, teacher.process, steps)

    def sample(pairs: Pairs) -> Tensor:
        denoise = teacher.denoiser if recipe.guidance.is_plain else Guided(teacher.denoiser, pairs.guidance)
        given, keep = (teacher.process, pairs.noise, times), [steps]
        return solve(denoise, *given, solver=solver, condition=pairs.condition, keep=keep).states[0]

    nfe = count_nfe(solver, teacher.process, times, recipe)
    return Contender(name=f"teacher {solver}", kind="teacher", steps=steps, nfe=nfe, sample=sample)


def _check_student(run: Path, saved: Checkpoint, steps: int, recipe: Recipe) -> None:
    needed = recipe.condition.num_classes if isinstance(recipe.condition, UniformLabels) else None
    theirs: dict[str, Any] = {
        "sample shape": tuple(saved.model["sample_shape"]),
        "number of classes": None if needed is None else saved.model["num_classes"],
    }
    ours: dict[str, Any] = {"sample shape": recipe.sample_shape, "number of classes": needed}
    if not _is_scaled(saved):
        theirs |= {"process": process_from_spec(saved.model["process"]), "first time": saved.grids[steps][0]}
        ours |= {"process": process_from_spec(recipe.teacher.model["process"]), "first time": recipe.times[0]}
    for what, here in ours.items():
        if theirs[what] != here:
            problem = f"{run} has {what} {theirs[what]}, this data has {here}"
            raise ManifestMismatch(f"{problem}; evaluate it on data like its own")


def _is_scaled(saved: Checkpoint) -> bool:
    """Whether the student learnt from the data's noises at the scale of a process of its own."""
    return saved.about.get("from_noise") == "scaled"

"""A recipe's process and time grid, and the network calls (NFE) that they cost."""

import math

import torch
from torch import Tensor

from limbeck.diffusion.denoiser import Guided
from limbeck.diffusion.grids import recorded_times
from limbeck.diffusion.models.spec import process_from_spec
from limbeck.diffusion.process import Process
from limbeck.diffusion.solvers import plan
from limbeck.storage_schemas.errors import ManifestMismatch
from limbeck.storage_schemas.recipe import Recipe
from limbeck.storage_schemas.record import SEGMENT_STATES


def recipe_process(recipe: Recipe) -> Process:
    """The recipe's process. Raises ManifestMismatch unless its alpha and sigma are those that the recipe records."""
    process = process_from_spec(recipe.teacher.model["process"])
    t = torch.tensor(recipe.times, dtype=torch.float64)
    recorded = (("alpha", recipe.alphas, process.alpha(t)), ("sigma", recipe.sigmas, process.sigma(t)))
    for name, theirs, ours in recorded:
        for time, there, here in zip(recipe.times, theirs, ours.tolist(), strict=True):
            if not math.isclose(there, here, rel_tol=1e-9, abs_tol=1e-12):
                said = f"the recipe says {name} {there} at t = {time}, its process gives {here}"
                raise ManifestMismatch(f"{said}: another release wrote it; generate the data again")
    return process


def recipe_grid(recipe: Recipe, process: Process, steps: int) -> Tensor:
    """The recipe's grid, or one of its kind with another number of steps: float64 [steps + 1]."""
    if steps == recipe.num_steps:
        return torch.tensor(recipe.times, dtype=torch.float64)
    return recorded_times(recipe.solver.grid, process, steps)


def recipe_nfe(recipe: Recipe) -> int:
    """Network calls behind one stored sample: of a trajectory's solver, or of the DDIM steps of a segment."""
    if recipe.chain == "segment":
        return (SEGMENT_STATES - 1) * calls_of(recipe)
    process = process_from_spec(recipe.teacher.model["process"])
    return count_nfe(recipe.solver.name, process, torch.tensor(recipe.times, dtype=torch.float64), recipe)


def count_nfe(solver: str, process: Process, times: Tensor, recipe: Recipe) -> int:
    """Network calls that a solver makes for one sample on this grid, guided as the recipe says."""
    return sum(len(step) for step in plan(solver, process, times)) * calls_of(recipe)


def calls_of(recipe: Recipe) -> int:
    """Network calls behind one guided x_0. With several scales, a sample of scale 1 costs as much as the others."""
    takes_scale = recipe.teacher.model.get("network", {}).get("told_guidance", False)
    return 1 if takes_scale or recipe.guidance.is_plain else Guided.nfe_per_call

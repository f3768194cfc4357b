"""The stored states of each row that an objective compares, and the grids that its student is saved to serve."""

import functools
from collections.abc import Sequence
from itertools import pairwise

import torch
from pydantic import Field, field_validator
from torch import Tensor

from limbeck.diffusion.grids import subset_indices
from limbeck.storage_schemas.dataset import Dataset
from limbeck.storage_schemas.errors import ManifestMismatch
from limbeck.storage_schemas.recipe import Recipe
from limbeck.storage_schemas.record import state_column
from limbeck.trainer.objectives.kind import Options, Times
from limbeck.trainer.stream import Batch

_MOST_STEPS = 8
"""Jumps that a student of all stored states is saved to serve at most, without a schedule."""


class ScheduleOptions(Options):
    """An objective whose student serves several numbers of steps."""

    schedule: tuple[int, ...] | None = Field(
        None,
        description="Numbers of steps, each half of the one before: of the stages of progressive, or that students of "
        "the others are saved to serve, by default all up to 8 that the stored states have.",
    )

    @field_validator("schedule")
    @classmethod
    def _halves(cls, schedule: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if schedule is not None:
            halves = all(longer == 2 * shorter for longer, shorter in pairwise(schedule))
            if not schedule or min(schedule) < 1 or not halves:
                raise ValueError(f"objective.schedule {list(schedule)} does not halve; write one such as 8 4 2 1")
        return schedule


class HalvingOptions(ScheduleOptions):
    """An objective whose schedule doesn't follow from the stored states."""

    schedule: tuple[int, ...] = Field((8, 4, 2, 1), description=ScheduleOptions.model_fields["schedule"].description)


def drawn(batch: Batch, columns: Sequence[str], times: Times, choices: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """(states [n, B, ...], times float64 [n, B]) of one of `choices` for each row, all of them equally likely.

    columns, times: the stored states'. choices: int64 [m, n], indices of states that go together. u: [B] in (0, 1).
    """
    index = _kept_on(u.device, choices)[(u * len(choices)).long()].T
    states = torch.stack([batch.states[name] for name in columns])
    rows = torch.arange(len(batch), device=u.device)
    return states[index, rows], times_on(u.device, times)[index]


@functools.lru_cache(maxsize=64)
def _kept_on(device: torch.device, choices: Tensor) -> Tensor:
    return choices.to(device)


@functools.lru_cache(maxsize=64)
def times_on(device: torch.device, times: Times) -> Tensor:
    """Times as float64 on a device, where they stay: to copy them there at each step would be to wait for it."""
    return torch.tensor(times, dtype=torch.float64, device=device)


def ends(recipe: Recipe) -> Times:
    """(t_0, t_N): T and 0, unless the grid says other."""
    return recipe.times[0], recipe.times[-1]


def times_at(recipe: Recipe, indices: Sequence[int]) -> Times:
    return tuple(recipe.times[index] for index in indices)


def all_states(dataset: Dataset, *, objective: str) -> tuple[Times, tuple[str, ...]]:
    """(times, columns) of every stored state. ManifestMismatch for noises and outputs alone."""
    recipe = dataset.recipe
    if len(recipe.states) <= 2:
        quarters = {recipe.num_steps * quarter // 4 for quarter in (1, 2, 3)} - {0}
        way = f"generate with --states {' '.join(map(str, sorted(quarters)))}, or " if quarters else ""
        have = f"{dataset.store.uri} stores states {' '.join(map(str, recipe.states))}"
        raise ManifestMismatch(f"{have}, {objective} learns from those between: {way}fit knowledge")
    columns = tuple(state_column(index, recipe.num_steps) for index in recipe.states)
    return times_at(recipe, recipe.states), columns


def served_grids(dataset: Dataset, schedule: Sequence[int] | None) -> dict[int, Times]:
    """The grids of a student of all stored states: the schedule's, or all up to 8 steps that there are."""
    recipe = dataset.recipe
    divisors = [steps for steps in range(1, _MOST_STEPS + 1) if recipe.num_steps % steps == 0]
    stored = [steps for steps in divisors if set(subset_indices(recipe.num_steps, steps)) <= set(recipe.states)]
    return {steps: times_at(recipe, indices) for steps, indices in stored_grids(dataset, schedule or stored).items()}


def stored_grids(dataset: Dataset, schedule: Sequence[int]) -> dict[int, tuple[int, ...]]:
    """Indices of each number of steps. ManifestMismatch, with what to store, where the dataset lacks some."""
    recipe = dataset.recipe
    grids = {steps: subset_indices(recipe.num_steps, steps) for steps in schedule}
    needed = {index for indices in grids.values() for index in indices}
    if missing := sorted(needed - set(recipe.states)):
        inner = " ".join(map(str, sorted(needed - {0, recipe.num_steps})))
        have = " ".join(map(str, recipe.states))
        raise ManifestMismatch(
            f"{dataset.store.uri} stores states {have}, this schedule needs also {' '.join(map(str, missing))}: "
            f"generate with --states {inner}"
        )
    return grids

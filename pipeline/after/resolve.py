"""Samples that are stored already, solved again: at doubled steps, to measure the error, and just as they were."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from limbeck.diffusion.grids import recorded_times
from limbeck.diffusion.process import Process
from limbeck.diffusion.recipes.devices import pick_device
from limbeck.diffusion.recipes.teacher import TeacherSource
from limbeck.pipeline.after.duplicates import DIGITS, Sample
from limbeck.pipeline.producer import Producer, WorkOrder
from limbeck.pipeline.solve import as_out_of_memory, micro_batches, solve_batch, solve_ids
from limbeck.storage_schemas.commit import Task
from limbeck.storage_schemas.recipe import Recipe
from limbeck.storage_schemas.record import Columns, from_storage, state_column, to_storage


@dataclass(frozen=True)
class Stored:
    """A sample as it lies in the store: its row of every column, and the machine that its shard names."""

    sample: Sample
    row: Columns
    machine: dict[str, str]


@dataclass(frozen=True)
class Replay:
    """A sample solved as the recipe says, against what is stored: the largest difference of each state.

    None if the new solve is not finite.
    """

    sample: Sample
    same_bits: bool
    max_difference: dict[str, float] | None
    solved_on: dict[str, str]
    here: dict[str, str]

    @property
    def same_machine(self) -> bool:
        """Whether both solves were on one host, device and torch by as many threads: the same bits are promised."""
        return all(self.solved_on.get(key) == self.here.get(key) for key in ("host", "device", "torch", "threads"))


@dataclass(frozen=True)
class Resolved:
    """What came of solving K samples again; S stored states.

    squares [K, S]: mean over coordinates of (stored - solved at 2N steps)^2, or at a student's own N; rounding [S]:
    storage's share of it. drift [K, S]: the same against N steps, among other samples than the recipe says, without one
    unit of rounding.
    """

    samples: tuple[Sample, ...]
    squares: np.ndarray
    rounding: np.ndarray
    drift: np.ndarray
    replays: tuple[Replay, ...]


def resolve(source: TeacherSource, order: WorkOrder, stored: Sequence[Stored], *, replays: int) -> Resolved:
    """Every sample at doubled steps and at the recipe's own, and the worst of the latter by whole micro-batches, too.

    The first two take samples together as they come: that changes the last bits of a network's answers, which is far
    below what they look for.
    """
    producer = open_producer(source, order)
    batches = list(_batches(stored, order.recipe.micro_batch))
    solved = [_solved_anew(producer, batch) for batch in batches]
    squares, rounding, again, drift, size = (np.concatenate(parts) for parts in zip(*solved, strict=True))
    samples = [part for batch in batches for part in batch]
    odd = np.nan_to_num(again / size.mean(0), nan=np.inf).max(1)
    worst = [samples[place] for place in np.argsort(-odd, kind="stable")[:replays].tolist()]
    return Resolved(
        tuple(part.sample for part in samples),
        squares,
        rounding.mean(0),
        drift,
        tuple(replay(producer, part) for part in worst),
    )


def _solved_anew(producer: Producer, batch: Sequence[Stored]) -> tuple[np.ndarray, ...]:
    """Mean squares [B, S] of a batch: stored - fine, rounding of fine, stored - coarse rounded, beyond a unit, fine."""
    recipe = producer.order.recipe
    kept = [_numbers(recipe, np.stack([part.row[name] for part in batch])) for name in _names(recipe)]
    fine = _solve(producer, batch, *finer(producer.teacher.process, recipe))
    coarse = _solve(producer, batch, torch.tensor(recipe.times, dtype=torch.float64), recipe.states)
    unit = 2.0 ** (1 - DIGITS[recipe.storage_dtype][0])
    beyond = [np.maximum(np.abs(x - y) - unit * np.abs(y), 0.0) for x, y in zip(kept, coarse, strict=True)]
    return (
        _mean_squares([x - y for x, y in zip(kept, fine, strict=True)]),
        _mean_squares([_rounded(recipe, y) - y for y in fine]),
        _mean_squares([x - _rounded(recipe, y) for x, y in zip(kept, coarse, strict=True)]),
        _mean_squares(beyond),
        _mean_squares(fine),
    )


def reproduce_one(source: TeacherSource, order: WorkOrder, stored: Stored) -> Replay:
    """`replay`, with the teacher loaded first."""
    return replay(open_producer(source, order), stored)


def open_producer(source: TeacherSource, order: WorkOrder) -> Producer:
    """The recipe's teacher on the order's device, set up just as in `generate`."""
    return Producer(order, source.load(device=pick_device(order.device)))


def replay(producer: Producer, stored: Stored) -> Replay:
    """Solve the sample's whole micro-batch, as the recipe fixes which ids are solved together, and compare its row."""
    recipe, sample = producer.order.recipe, stored.sample
    (ids,) = micro_batches(Task(sample.split, sample.id // recipe.micro_batch, recipe.micro_batch), recipe.micro_batch)
    solved = solve_batch(
        recipe, producer.denoise, producer.teacher.process, sample.split, ids, device=producer.device
    ).columns
    (rows,) = np.nonzero(solved["sample_id"] == sample.id)
    if not len(rows):
        return Replay(sample, False, None, stored.machine, producer.machine)
    row = {name: column[rows[0]] for name, column in solved.items()}
    names = _names(recipe)
    gaps = {name: np.abs(_numbers(recipe, row[name]) - _numbers(recipe, stored.row[name])) for name in names}
    return Replay(
        sample,
        all(np.array_equal(_bytes(row[name]), _bytes(stored.row[name])) for name in row),
        {name: float(gap.max()) for name, gap in gaps.items()},
        stored.machine,
        producer.machine,
    )


IN_THEIR_OWN_PARAMETER = ("karras", "uniform_logsnr", "uniform_time")
"""Grids of which one with twice the steps has every time of the first."""


def is_own(recipe: Recipe) -> bool:
    """Whether the grid is that of a student, which knows no other times: there is no finer solution of it."""
    return recipe.solver.grid["name"] == "own"


def finer(process: Process, recipe: Recipe) -> tuple[Tensor, Sequence[int]]:
    """The doubled grid, or a student's own, and the places of the recipe's states on it."""
    if is_own(recipe):
        return torch.tensor(recipe.times, dtype=torch.float64), recipe.states
    doubled = doubled_grid(process, recipe)
    return doubled, [2 * k if k < recipe.num_steps else len(doubled) - 1 for k in recipe.states]


def doubled_grid(process: Process, recipe: Recipe) -> Tensor:
    """The recipe's grid with every step halved, in the grid's own parameter: [2N+1] or [2N], index 2i is index i.

    A last step from r_min (or t_min) to 0 is left as it is: below that the network was not trained, and the finer grids
    of the same kind have it, too. Whole timesteps, and times that were given, are halved in time.
    """
    times, grid, steps = torch.tensor(recipe.times, dtype=torch.float64), recipe.solver.grid, recipe.num_steps
    if grid["name"] not in IN_THEIR_OWN_PARAMETER:
        middles = (times[:-1] + times[1:]) / 2
        halved = torch.stack([times[:-1], middles], dim=1).flatten()
        return torch.cat([halved if halves_last(recipe) else halved[:-1], times[-1:]])
    doubled = recorded_times(grid, process, 2 * steps if halves_last(recipe) else 2 * steps - 1)
    doubled[:-1:2] = times[:-1]
    return doubled


def halves_last(recipe: Recipe) -> bool:
    """Whether the doubled grid halves the last step, too; if not, its error is in both solutions and not seen."""
    grid, before_last = recipe.solver.grid, recipe.times[-2]
    if grid["name"] not in IN_THEIR_OWN_PARAMETER:  # a table's network was not trained below time 1
        return recipe.teacher.model["process"]["name"] != "discrete_vp" or before_last >= 2
    return recipe.num_steps == 1 or (grid["name"] == "uniform_time" and "t_min" not in grid)


def _batches(stored: Sequence[Stored], size: int) -> Iterator[Sequence[Stored]]:
    """Samples of one split at a time, no more than `size`: at doubled steps it does not matter which are together."""
    for split in sorted({part.sample.split for part in stored}):
        mine = [part for part in stored if part.sample.split == split]
        yield from (mine[first : first + size] for first in range(0, len(mine), size))


@torch.no_grad()
def _solve(producer: Producer, batch: Sequence[Stored], times: Tensor, keep: Sequence[int]) -> list[np.ndarray]:
    """States of a batch from its ids' own x_T, in float64 and not rounded for storage."""
    recipe, split = producer.order.recipe, batch[0].sample.split
    ids = np.array([part.sample.id for part in batch], dtype=np.int64)
    with as_out_of_memory(recipe.micro_batch, producer.device):
        solution = solve_ids(
            recipe, producer.denoise, producer.teacher.process, split, ids, times, keep=keep, device=producer.device
        )
    return list(solution.states.double().cpu().numpy())


def _names(recipe: Recipe) -> list[str]:
    return [state_column(k, recipe.num_steps) for k in recipe.states]


def _mean_squares(gaps: Sequence[np.ndarray]) -> np.ndarray:
    """Over coordinates: [B, S] of S arrays [B, ...]."""
    return np.stack([np.square(gap).reshape(len(gap), -1).mean(1) for gap in gaps], axis=1)


def _rounded(recipe: Recipe, values: np.ndarray) -> np.ndarray:
    """The values as the storage dtype would hold them."""
    with np.errstate(over="ignore"):
        return _numbers(recipe, to_storage(values, recipe.storage_dtype))


def _numbers(recipe: Recipe, stored: np.ndarray) -> np.ndarray:
    return from_storage(stored, recipe.storage_dtype).astype(np.float64)


def _bytes(values: np.ndarray) -> np.ndarray:
    return np.atleast_1d(values).view(np.uint8)

"""What a fit on stored trajectories will do: checks the data against the objective, and cuts the run into stages."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from diffusion.checkpoint import Checkpoint
from diffusion.flow_map import FlowMap
from diffusion.grids import subset_indices
from diffusion.process import Process
from storage_schemas.dataset import Dataset, open_dataset
from storage_schemas.errors import ManifestMismatch
from storage_schemas.recipe import Recipe
from storage_schemas.record import Split, state_column
from storage_schemas.store import Store
from trainer.config import FitConfig
from trainer.objectives import student_condition
from trainer.objectives.knowledge import Knowledge
from trainer.objectives.progressive import Progressive, rounding_error
from trainer.plan import Plan, Stage
from trainer.reading.chunks import Reading
from trainer.reading.rows import gathered
from trainer.reading.shards import ShardSource
from trainer.student import Shape, check_few_steps, check_fits, recipe_process, saved_model, scratch
from trainer.teacher import recipe_checkpoint

# Rounding in the targets, as a share of the data's rms.
_WARN, _REFUSE = 0.05, 0.5
_HOLDOUT_ROWS = 1024
_RMS_ROWS = 2048


def plan_trajectories(config: FitConfig, *, number: int | None) -> Plan:
    """The plan for one manifest: `number`, or the latest."""
    store = Store.open(config.data or "")
    dataset = open_dataset(store, config.dataset, number)
    recipe = dataset.recipe
    if recipe.chain != "trajectory":
        raise ManifestMismatch(f"{store.uri} holds segments, this objective needs trajectories: name another --dataset")
    process = recipe_process(recipe.teacher.model["process"], recipe.times, recipe.alphas, recipe.sigmas)
    stages = _stages(config, dataset)
    rms = _output_rms(config, dataset)
    shape = Shape(recipe.sample_shape, recipe.teacher.model["num_classes"], recipe.teacher.model["process"], rms)
    return Plan(
        start=lambda: start_student(config, dataset, shape),
        stages=stages,
        source=lambda columns: _source(config, dataset, "train", columns),
        reads={
            "dataset": config.dataset,
            "manifest": dataset.manifest.number,
            "content_digest": dataset.manifest.content_digest,
            "recipe": recipe.id,
        },
        shape=shape,
        holdout_error=HoldoutError(config, dataset) if dataset.ids("holdout").count else None,
        warnings=_rounding_warnings(recipe, process, stages, rms),
        store=store,
        labels=recipe.condition.kind != "none",
    )


def start_student(config: FitConfig, dataset: Dataset, shape: Shape) -> Checkpoint:
    """What --init says: the recipe's teacher, a fresh network, or a saved model; refused if it can't fit the data."""
    if config.init == "scratch":
        start = scratch(config, shape)
    elif config.init == "teacher":
        start = recipe_checkpoint(dataset.store, dataset.recipe)
    else:
        start = saved_model(config.init or "")
    name = dataset.recipe.teacher.uri if config.init == "teacher" else str(config.init)
    check_fits(start, shape, name=name)
    check_few_steps(start, dataset.recipe.times[0])
    return start


def _stages(config: FitConfig, dataset: Dataset) -> tuple[Stage, ...]:
    recipe, options = dataset.recipe, config.objective
    if options.name == "knowledge":
        times = (recipe.times[0], recipe.times[-1])
        return (Stage("knowledge", Knowledge(times, options.distance or "l2", options.c or 1.0), times),)
    schedule = options.schedule or ()
    needed = {steps: subset_indices(recipe.num_steps, steps) for steps in schedule}
    _check_stored(dataset, {index for indices in needed.values() for index in indices})
    return tuple(_progressive_stage(recipe, indices) for indices in needed.values())


def _progressive_stage(recipe: Recipe, indices: Sequence[int]) -> Stage:
    times = tuple(recipe.times[index] for index in indices)
    columns = tuple(state_column(index, recipe.num_steps) for index in indices)
    return Stage(f"{len(indices) - 1}-step", Progressive(times, columns), times)


def _check_stored(dataset: Dataset, needed: set[int]) -> None:
    recipe = dataset.recipe
    if missing := sorted(needed - set(recipe.states)):
        inner = " ".join(map(str, sorted(needed - {0, recipe.num_steps})))
        have = " ".join(map(str, recipe.states))
        raise ManifestMismatch(
            f"{dataset.store.uri} stores states {have}, this schedule needs also {' '.join(map(str, missing))}: "
            f"generate with --states {inner}"
        )


def _rounding_warnings(recipe: Recipe, process: Process, stages: Sequence[Stage], rms: float) -> tuple[str, ...]:
    """One line for each stage whose targets storage rounding blurs; refused where little else would be left."""
    lines = []
    for stage in stages:
        if not isinstance(stage.objective, Progressive):
            continue
        errors = rounding_error(process, stage.times, storage_dtype=recipe.storage_dtype, data_rms=rms)
        worst = max(errors)
        told = f"{recipe.storage_dtype} storage puts {worst:.2g} rms into {stage.name} targets of rms {rms:.2g}"
        if worst > _REFUSE * rms:
            raise ManifestMismatch(f"{told}: generate with --dtype float32, or fit fewer steps")
        if worst > _WARN * rms:
            lines.append(f"{told} (segment {errors.index(worst) + 1}); --dtype float32 would not")
    return tuple(lines)


def _output_rms(config: FitConfig, dataset: Dataset) -> float:
    """Root mean square of the teacher's first outputs."""
    if not dataset.ids("train").count:
        raise ManifestMismatch(f"{dataset.store.uri} has no train samples: generate some with --count")
    _, states = _first_rows(config, dataset, "train", ("output",), _RMS_ROWS)
    return float(states["output"].double().square().mean().sqrt())


def _source(config: FitConfig, dataset: Dataset, split: Split, columns: Sequence[str]) -> ShardSource:
    return ShardSource(dataset, split, columns, reading=_reading(config), seed=config.seed)


def _reading(config: FitConfig) -> Reading:
    return Reading(
        verify=config.verify,
        on_corrupt=config.on_corrupt,
        cache_folder=config.cache_folder,
        cache_bytes=int(config.cache_gib * 2**30),
        in_flight_bytes=config.in_flight_mib << 20,
    )


def _first_rows(
    config: FitConfig, dataset: Dataset, split: Split, columns: Sequence[str], count: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """(condition, states) of up to `count` first samples of a split."""
    source = _source(config, dataset, split, columns)
    rows = source.load(source.ids.at(np.arange(min(count, source.ids.count))))
    return gathered(rows, source.fields)


class HoldoutError:
    """Mean squared error per number of the student's samples against the teacher's, from the first holdout noises."""

    def __init__(self, config: FitConfig, dataset: Dataset) -> None:
        columns = ("noise", "output")
        self._condition, states = _first_rows(config, dataset, "holdout", columns, _HOLDOUT_ROWS)
        self._noise, self._output = states["noise"].float(), states["output"].float()

    @torch.no_grad()
    def __call__(self, student: FlowMap, stage: Stage) -> float:
        device = next(student.parameters()).device
        condition = student_condition(student, self._condition.to(device))
        times = torch.tensor(stage.times, dtype=torch.float64)
        samples = student.sample(self._noise.to(device), times, condition)
        return float((samples - self._output.to(device)).square().mean())

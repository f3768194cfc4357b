"""The plan of a fit on stored trajectories: checks the data against the objective, cuts the run into stages."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from limbeck.diffusion.flow_map import FlowMap
from limbeck.diffusion.models.checkpoint import Checkpoint
from limbeck.diffusion.models.description import check_model
from limbeck.diffusion.models.teachers import Teacher
from limbeck.diffusion.process import Process
from limbeck.diffusion.recipes.grid import recipe_process
from limbeck.diffusion.recipes.teacher import NoTeacher, TeacherSource
from limbeck.storage_schemas.dataset import Dataset, open_dataset
from limbeck.storage_schemas.errors import ManifestMismatch, UsageError
from limbeck.storage_schemas.recipe import Recipe
from limbeck.storage_schemas.record import Split
from limbeck.storage_schemas.store import Store
from limbeck.trainer.config import FitConfig
from limbeck.trainer.networks.networks import Networks
from limbeck.trainer.networks.options import CriticConfig, TeacherConfig
from limbeck.trainer.networks.student import Shape, check_few_steps, check_fits, saved_model
from limbeck.trainer.objectives.conditioning import student_labels
from limbeck.trainer.objectives.kind import Given, Stage
from limbeck.trainer.objectives.progressive import Progressive, ProgressiveSegments, progressive_target, rounding_error
from limbeck.trainer.objectives.table import make_stages
from limbeck.trainer.planning.plan import Plan, fresh
from limbeck.trainer.reading.rows import gathered
from limbeck.trainer.reading.shards import ShardSource
from limbeck.trainer.stream import Batch

# Opens columns of a split of the fit's dataset.
Read = Callable[[Split, Sequence[str]], ShardSource]
# Rounding in the targets, as a share of the data's rms.
_WARN, _REFUSE = 0.05, 0.5
_HOLDOUT_ROWS = 1024
_RMS_ROWS = 2048


def plan_trajectories(config: FitConfig, *, number: int | None) -> Plan:
    """The plan for one manifest: `number`, or the latest."""
    store, objective = Store.open(config.store.data or ""), config.objective
    dataset = open_dataset(store, config.store.dataset, number)
    recipe = dataset.recipe
    _check_teacher(recipe, config.critic)
    process = recipe_process(recipe)
    given = Given(recipe.sample_shape, config.seed, dataset, config.images)
    planned = make_stages(objective.kind, objective.options, given)
    read = partial(ShardSource, dataset, reading=config.store.reading, seed=config.seed)
    rms = _rms(read, dataset, process)
    theirs = dict(objective.kind.process or recipe.teacher.model["process"])
    shape = Shape(recipe.sample_shape, recipe.teacher.model["num_classes"], theirs, rms)
    has_holdout, judged = dataset.ids("holdout").count > 0, objective.kind.judged_by_holdout
    return Plan(
        start=lambda: start_student(config, dataset, shape, planned[0].times[0]),
        stages=planned,
        source=lambda columns: read("train", columns),
        reads=_named(dataset) | planned[0].reads,
        shape=shape,
        holdout_error=_error_on(read, recipe, "holdout") if has_holdout else None,
        train_error=_error_on(read, recipe, "train") if has_holdout and judged else None,
        notes=planned[0].notes,
        warnings=_rounding_warnings(recipe, process, planned, rms),
        store=store,
        labels=recipe.condition.kind != "none",
        teacher=lambda device: _load_teacher(config.teacher, dataset, device),
        made_by=recipe.teacher,
        guidance=recipe.guidance.scales,
    )


def _load_teacher(teacher: TeacherConfig, dataset: Dataset, device: torch.device) -> Teacher:
    with _to_be_named():
        return _teacher_source(teacher, dataset).load(device=device)


def _teacher_source(teacher: TeacherConfig, dataset: Dataset) -> TeacherSource:
    return TeacherSource(dataset.store, dataset.recipe, teacher.uri, flag="--teacher.uri")


@contextmanager
def _to_be_named() -> Iterator[None]:
    """A teacher that can't be had is for the user to name: NoTeacher -> UsageError."""
    try:
        yield
    except NoTeacher as error:
        raise UsageError(str(error)) from error


def _check_teacher(recipe: Recipe, critic: CriticConfig) -> None:
    """Refuse a teacher that is described by other fields than ours, or that a critic can't be made from."""
    try:
        check_model(recipe.teacher.model)
    except ValueError as error:
        raise ManifestMismatch(f"recipe {recipe.id[:12]} describes no teacher of ours ({error}): restore it") from None
    kind = recipe.teacher.model["kind"]
    if critic.kind == "lora" and kind != "network":
        raise ValueError(f"critic.kind lora changes a network's weights, the teacher is a {kind}; use copy")


def _named(dataset: Dataset) -> dict[str, Any]:
    """The data's names and digests, for the record."""
    manifest = dataset.manifest
    return {
        "dataset": manifest.dataset,
        "manifest": manifest.number,
        "content_digest": manifest.content_digest,
        "recipe": dataset.recipe.id,
    }


def start_student(config: FitConfig, dataset: Dataset, shape: Shape, first_time: float) -> Checkpoint:
    """The model of --init: the recipe's teacher, a fresh network, or a saved one; refused if it can't fit the data."""
    init = name = config.student.init or ""
    if init == "scratch":
        start = fresh(config, shape)
    elif init == "teacher":
        name = dataset.recipe.teacher.uri
        with _to_be_named():
            start = _teacher_source(config.teacher, dataset).checkpoint()
    else:
        start = saved_model(init)
    whose = f"a {config.objective.name} student of this data" if config.objective.kind.process else "the data"
    check_fits(start, shape, name=name, whose=whose)
    check_few_steps(start, first_time)
    return start


def _rounding_warnings(recipe: Recipe, process: Process, stages: Sequence[Stage], rms: float) -> tuple[str, ...]:
    """One line for each stage whose targets storage rounding blurs; refused where little else would be left."""
    lines = []
    for stage in stages:
        segments = isinstance(stage.objective, ProgressiveSegments)
        if not segments and not isinstance(stage.objective, Progressive):
            continue
        errors = rounding_error(
            process, stage.times, storage_dtype=recipe.storage_dtype, data_rms=rms, exact_starts=segments
        )
        worst = max(errors)
        problem = f"{recipe.storage_dtype} storage puts {worst:.2g} rms into {stage.name} targets of rms {rms:.2g}"
        if worst > _REFUSE * rms:
            raise ManifestMismatch(f"{problem}: generate with --dtype float32, or fit fewer steps")
        if worst > _WARN * rms:
            lines.append(f"{problem} (segment {errors.index(worst) + 1}); --dtype float32 would not")
    return tuple(lines)


def _rms(read: Read, dataset: Dataset, process: Process) -> float:
    """Root mean square of the teacher's first outputs; of segments that of x~, which is an output of two steps."""
    if not dataset.ids("train").count:
        raise ManifestMismatch(f"{dataset.store.uri} has no train samples: generate some with --count")
    segments = dataset.recipe.chain == "segment"
    columns = ProgressiveSegments.columns if segments else ("output",)
    _, _, states = _first_rows(read, "train", columns, _RMS_ROWS)
    if segments:
        start, x_t, x_s = (states[name] for name in columns)
        times = torch.tensor(dataset.recipe.times, dtype=torch.float64)
        t, s = times[start.long()], times[start.long() + 2]
        return float(progressive_target(process, x_t.double(), x_s.double(), t, s).square().mean().sqrt())
    return float(states["output"].double().square().mean().sqrt())


def _first_rows(
    read: Read, split: Split, columns: Sequence[str], count: int
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """(condition, guidance, states) of up to `count` first samples of a split."""
    source = read(split, columns)
    rows = source.load(source.ids.at(np.arange(min(count, source.ids.count))))
    return torch.from_numpy(rows.guidance), *gathered(rows, source.fields)


def _error_on(read: Read, recipe: Recipe, split: Split) -> "HoldoutError | SegmentError":
    kind = SegmentError if recipe.chain == "segment" else HoldoutError
    return kind(read, recipe, split)


class HoldoutError:
    """Mean squared error per number of the student's samples against the teacher's, from a split's first noises."""

    def __init__(self, read: Read, recipe: Recipe, split: Split) -> None:
        columns = ("noise", "output")
        self._guidance, self._condition, states = _first_rows(read, split, columns, _HOLDOUT_ROWS)
        self._noise, self._output = states["noise"].float(), states["output"].float()
        self._noise_scale = recipe.sigmas[0]

    @torch.no_grad()
    def __call__(self, student: FlowMap, stage: Stage) -> float:
        device = next(student.parameters()).device
        condition = student_labels(student, self._condition.to(device))
        guidance = self._guidance.to(device) if student.told_guidance else None
        times = torch.tensor(stage.times, dtype=torch.float64)
        # A student with a process of its own has its own scale of noise.
        noise = self._noise.to(device) * (float(student.process.sigma(times[0])) / self._noise_scale)
        samples = student.sample(noise, times, condition, guidance=guidance)
        return float((samples - self._output.to(device)).square().mean())


class SegmentError:
    """The objective itself on a split's first segments, which lead to no output that a sample could be held to."""

    def __init__(self, read: Read, recipe: Recipe, split: Split) -> None:
        columns = ProgressiveSegments.columns
        guidance, condition, states = _first_rows(read, split, columns, _HOLDOUT_ROWS)
        rows = torch.arange(len(condition))
        self._batch = Batch(rows, rows, condition, states, torch.empty(len(rows), 0, dtype=torch.float64), guidance)

    @torch.no_grad()
    def __call__(self, student: FlowMap, stage: Stage) -> float:
        device = next(student.parameters()).device
        return float(stage.objective(Networks(student), self._batch.to(device)))

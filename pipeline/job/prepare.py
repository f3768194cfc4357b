"""What a run needs before any work: the teacher, the recipe, the layout and the store. All refusals come from here."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from limbeck.diffusion.models.checkpoint import Checkpoint
from limbeck.diffusion.models.teachers import Teacher, load_checkpoint, load_teacher
from limbeck.diffusion.recipes.devices import pick_device
from limbeck.diffusion.recipes.samples import draw_labels, draw_noise, draw_scales
from limbeck.diffusion.recipes.teacher import keep_weights
from limbeck.diffusion.solvers import answer
from limbeck.pipeline.config import GenerateConfig, TeacherConfig
from limbeck.pipeline.job.driver import Ledger
from limbeck.pipeline.job.micro_batch import settle
from limbeck.pipeline.producer import describe
from limbeck.pipeline.recipe import build_recipe
from limbeck.pipeline.solve import guided
from limbeck.storage_schemas import paths
from limbeck.storage_schemas.dataset import put_recipe
from limbeck.storage_schemas.errors import UsageError, UserError, usage_errors
from limbeck.storage_schemas.layout import Layout
from limbeck.storage_schemas.notes import Calibration, check_calibration, put_calibration
from limbeck.storage_schemas.recipe import Recipe
from limbeck.storage_schemas.store import Store

TRIED = 2
"""Samples that a teacher is asked about before a job begins."""


@dataclass(frozen=True)
class Run:
    """One run of the command: what it asked for, and what it has learnt so far."""

    config: GenerateConfig
    store: Store
    recipe: Recipe
    layout: Layout
    weights: Checkpoint | None = None
    calibration: Calibration | None = None
    ledger: Ledger = field(default_factory=Ledger)


def prepare(config: GenerateConfig, *, writes: bool = True) -> Run:
    """Everything that can be refused is refused here, before any work. Without `writes` no store is made."""
    with usage_errors():
        if config.runner == "local":  # on a cluster it is the workers that have one
            pick_device(config.device)
        teacher = load(config)
        draft = build_recipe(config, teacher)
        try_teacher(draft, teacher)
        weights = _weights_of(config, teacher) if config.with_weights else None
        calibration = _calibration_of(draft, config.calibration) if config.calibration else None
    store = Store.create(config.store, single_writer=config.single_writer) if writes else _as_it_is(config.store)
    recipe, layout = settle(config, draft, store)
    return Run(config, store, recipe, layout, weights, calibration)


def _as_it_is(uri: str) -> Store:
    """The store, or a handle to an empty place if it doesn't exist yet."""
    store = Store(uri)
    return Store.open(uri) if store.exists(paths.STORE) else store


def keep_recipe(run: Run) -> None:
    """Put the recipe, and the teacher's weights and a calibration where they were asked for, into the store."""
    put_recipe(run.store, run.recipe)
    if run.weights:
        keep_weights(run.store, run.recipe.id, run.weights)
    if run.calibration:
        put_calibration(run.store, run.recipe, run.calibration)


def _weights_of(config: GenerateConfig, teacher: Teacher) -> Checkpoint:
    if teacher.source_sha256:
        raise UsageError(f"--with-weights: {teacher.uri} is code, which a store can't keep; save it as a model first")
    return load_checkpoint(teacher.uri, ignore=config.ignore)


def _calibration_of(recipe: Recipe, path: str) -> Calibration:
    calibration = Calibration.from_bytes(Path(path).read_bytes(), path)
    check_calibration(calibration, recipe, path)
    return calibration


def load(config: TeacherConfig) -> Teacher:
    """The teacher on the CPU, with whatever a factory raises as a UsageError."""
    uri = config.teacher
    try:
        return load_teacher(uri, ignore=config.ignore)
    except (UserError, ValueError, FileNotFoundError, ModuleNotFoundError):
        raise
    except Exception as error:  # whatever a factory of the user's raises
        raise UsageError(f"teacher {uri} can't be loaded: {type(error).__name__}: {error}") from error


@torch.no_grad()
def try_teacher(recipe: Recipe, teacher: Teacher) -> None:
    """One call about the first samples' x_T, before any work: UserError where no solve could go on with the answer."""
    ids, cpu = np.arange(TRIED), torch.device("cpu")
    labels = draw_labels(recipe, "train", ids)
    condition = None if labels is None else torch.from_numpy(labels)
    denoise = guided(recipe, teacher.denoiser, draw_scales(recipe, "train", ids), device=cpu)
    time = torch.tensor(recipe.times[0], dtype=torch.float64)
    try:
        x_0 = answer(denoise, draw_noise(recipe, "train", ids), time, condition)
    except Exception as error:  # whatever code of the user's raises
        raise UserError(f"teacher {teacher.uri} fails at the first call: {describe(error).error}") from error
    if not x_0.isfinite().all():
        raise UserError(f"teacher {teacher.uri} answers what is not finite at the first call: look at its weights")

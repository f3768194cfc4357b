"""What a run needs before any work: the teacher, the recipe, the layout and the store. All refusals come from here."""

import json
from dataclasses import dataclass, field

from diffusion import checkpoint
from diffusion.checkpoint import Checkpoint
from diffusion.teachers import Teacher, load_checkpoint, load_teacher
from pipeline.config import GenerateConfig
from pipeline.recipe import build_layout, build_recipe
from storage_schemas import paths
from storage_schemas.dataset import put_recipe
from storage_schemas.errors import UsageError, UserError, usage_errors
from storage_schemas.job import Failure
from storage_schemas.layout import Layout
from storage_schemas.recipe import Recipe
from storage_schemas.shards import Shard
from storage_schemas.store import Store


@dataclass
class Run:
    """One run of the command: what it asked for, and what it has learnt so far."""

    config: GenerateConfig
    store: Store
    recipe: Recipe
    layout: Layout
    job: str = ""
    shards: dict[str, Shard] = field(default_factory=dict)
    failures: dict[str, Failure] = field(default_factory=dict)


def prepare(config: GenerateConfig) -> Run:
    """Everything that can be refused is refused here, before any work."""
    with usage_errors():
        teacher = _load(config.teacher)
        recipe = build_recipe(config, teacher)
        layout = build_layout(config, recipe)
        weights = _weights_of(teacher) if config.with_weights else None
    store = Store.create(config.store, single_writer=config.single_writer)
    put_recipe(store, recipe)
    if weights:
        keep_weights(store, recipe, weights)
    return Run(config, store, recipe, layout)


def keep_weights(store: Store, recipe: Recipe, weights: Checkpoint) -> None:
    """Put the teacher beside its recipe, its description last; what is there already is the same by its digest."""
    folder = paths.weights_folder(recipe.id)
    if not store.exists(f"{folder}/{checkpoint.MODEL_FILE}"):
        store.write(f"{folder}/{checkpoint.WEIGHTS_FILE}", weights.weights)
        store.write(f"{folder}/{checkpoint.MODEL_FILE}", json.dumps(weights.document(), sort_keys=True).encode())


def _weights_of(teacher: Teacher) -> Checkpoint:
    if teacher.source_sha256:
        raise UsageError(f"--with-weights: {teacher.uri} is code, which a store can't keep; save it as a model first")
    return load_checkpoint(teacher.uri)


def _load(uri: str) -> Teacher:
    try:
        return load_teacher(uri)
    except (UserError, ValueError, FileNotFoundError, ModuleNotFoundError):
        raise
    except Exception as error:  # whatever a factory of the user's raises
        raise UsageError(f"teacher {uri} can't be loaded: {type(error).__name__}: {error}") from error

"""The teacher of a recipe: from the store that keeps its weights, else from its uri, and only if its hash agrees."""

from typing import Any

import torch

from diffusion import checkpoint
from diffusion.checkpoint import Checkpoint
from diffusion.schedulers import IGNORABLE
from diffusion.teachers import Teacher, check_unasked, from_checkpoint, load_checkpoint, load_teacher
from storage_schemas import paths
from storage_schemas.errors import UsageError, usage_errors
from storage_schemas.recipe import Recipe
from storage_schemas.store import Store


def recipe_teacher(
    store: Store, recipe: Recipe, *, uri: str | None = None, flag: str = "--teacher", device: str | torch.device = "cpu"
) -> Teacher:
    """The teacher that made a dataset, at `uri` if one is given. Raises UsageError in one line where it can't be had.

    flag: of the command line, by which the user gives a uri.
    """
    kept = None if uri else stored_checkpoint(store, recipe)
    source = uri or recipe.teacher.uri
    with usage_errors():
        if kept is not None:
            return from_checkpoint(recipe.teacher.uri, kept, device=device)
        if uri is None:
            check_unasked(source, flag=flag)
        teacher = load_teacher(source, device=device, ignore=IGNORABLE)
    _check(recipe, source, teacher.model, teacher.weights_sha256, teacher.source_sha256)
    return teacher


def recipe_checkpoint(store: Store, recipe: Recipe, *, uri: str | None = None) -> Checkpoint:
    """The teacher's spec and weights, for a student to start from. Raises UsageError where they can't be had."""
    kept = None if uri else stored_checkpoint(store, recipe)
    if kept is not None:
        return kept
    source = uri or recipe.teacher.uri
    if source.startswith("python:"):
        raise UsageError(
            f"the teacher {source} is code, not a saved model; use --init scratch or the folder of a model"
        )
    try:
        if uri is None:
            check_unasked(source, flag="--teacher.uri")
        saved = load_checkpoint(source, ignore=IGNORABLE)
    except (ValueError, FileNotFoundError) as error:
        raise UsageError(f"{error}; or generate --with-weights, or use --init scratch") from error
    _check(recipe, source, saved.model, saved.weights_sha256, None)
    return saved


def stored_checkpoint(store: Store, recipe: Recipe) -> Checkpoint | None:
    """The weights that `generate --with-weights` kept, or None."""
    folder = paths.weights_folder(recipe.id)
    document = store.read(f"{folder}/{checkpoint.MODEL_FILE}")
    weights = store.read(f"{folder}/{checkpoint.WEIGHTS_FILE}")
    if document is None or weights is None:
        return None
    with usage_errors():
        saved = checkpoint.unpack(document, weights, source=f"{store.uri}/{folder}")
    _check(recipe, f"{store.uri}/{folder}", saved.model, saved.weights_sha256, recipe.teacher.source_sha256)
    return saved


def _check(recipe: Recipe, source: str, model: dict[str, Any], weights: str, code: str | None) -> None:
    differs = recipe.teacher.difference(source, model=model, weights_sha256=weights, source_sha256=code)
    if differs:
        raise UsageError(f"{differs}; name the teacher that made this data by --teacher")

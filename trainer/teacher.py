"""The teacher of a recipe: from the store that keeps its weights, else from its uri, and only if its hash agrees."""

import json

import torch

from diffusion import checkpoint
from diffusion.teachers import Teacher, from_checkpoint, load_teacher
from storage_schemas import paths
from storage_schemas.canonical import digest
from storage_schemas.errors import UsageError, usage_errors
from storage_schemas.recipe import Recipe
from storage_schemas.store import Store


def recipe_teacher(
    store: Store, recipe: Recipe, *, uri: str | None = None, device: str | torch.device = "cpu"
) -> Teacher:
    """The teacher that made a dataset, at `uri` if one is given. Raises UsageError in one line where it can't be had.

    A recipe may come from anybody, so the code that a `python:` teacher names runs only if the user names it too.
    """
    kept = None if uri else stored_teacher(store, recipe, device=device)
    if kept is not None:
        return kept
    source = uri or recipe.teacher.uri
    if uri is None and source.startswith("python:"):
        raise UsageError(f"the teacher {source} is code and isn't in the store; allow it to run by --teacher {source}")
    with usage_errors():
        teacher = load_teacher(source, device=device)
    _check(recipe, source, teacher)
    return teacher


def stored_teacher(store: Store, recipe: Recipe, *, device: str | torch.device = "cpu") -> Teacher | None:
    """The teacher whose weights `generate --with-weights` kept, or None."""
    folder = paths.weights_folder(recipe.id)
    document = store.read(f"{folder}/{checkpoint.MODEL_FILE}")
    weights = store.read(f"{folder}/{checkpoint.WEIGHTS_FILE}")
    if document is None or weights is None:
        return None
    with usage_errors():
        saved = checkpoint.unpack(json.loads(document), weights)
        teacher = from_checkpoint(recipe.teacher.uri, saved, device=device)
    _check(recipe, f"{store.uri}/{folder}", teacher)
    return teacher


def _check(recipe: Recipe, source: str, teacher: Teacher) -> None:
    told = recipe.teacher
    for what, here, there in (
        ("weights", teacher.weights_sha256, told.weights_sha256),
        ("description", digest(teacher.model), digest(told.model)),
        ("source code", teacher.source_sha256, told.source_sha256),
    ):
        if here != there:
            differs = f"{source} has {what} {str(here)[:12]}..., the recipe says {str(there)[:12]}..."
            raise UsageError(f"{differs}; name the teacher that made this data by --teacher")

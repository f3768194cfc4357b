"""A recipe's teacher as the store keeps it: whoever solves or trains needs no other place to have it from."""

import json

from diffusion import checkpoint
from diffusion.checkpoint import Checkpoint
from diffusion.teachers import Teacher
from storage_schemas import paths
from storage_schemas.errors import StoreError
from storage_schemas.recipe import Recipe
from storage_schemas.store import Store


def keep_weights(store: Store, recipe_id: str, weights: Checkpoint) -> None:
    """Put the teacher beside its recipe, its description last; what is there already is the same by its digest."""
    folder = paths.weights_folder(recipe_id)
    if not store.exists(f"{folder}/{checkpoint.MODEL_FILE}"):
        store.write(f"{folder}/{checkpoint.WEIGHTS_FILE}", weights.weights)
        store.write(f"{folder}/{checkpoint.MODEL_FILE}", json.dumps(weights.document(), sort_keys=True).encode())


def teacher_differs(recipe: Recipe, teacher: Teacher, source: str) -> str | None:
    """How a loaded teacher is another than the recipe's, in one line that names `source`; None if it is the same."""
    return recipe.teacher.difference(
        source, model=teacher.model, weights_sha256=teacher.weights_sha256, source_sha256=teacher.source_sha256
    )


def kept_weights(store: Store, recipe_id: str) -> Checkpoint | None:
    """What `keep_weights` put there, None where nobody did. StoreError in one line where it is damaged."""
    folder = paths.weights_folder(recipe_id)
    document = store.read(f"{folder}/{checkpoint.MODEL_FILE}")
    weights = store.read(f"{folder}/{checkpoint.WEIGHTS_FILE}") if document is not None else None
    if document is None or weights is None:
        return None
    try:
        return checkpoint.unpack(document, weights, source=f"{store.uri}/{folder}")
    except ValueError as error:
        raise StoreError(str(error)) from None

"""The teacher of a recipe: from the store that keeps its weights, else from a URI, and only if it is the recipe's."""

import json
from dataclasses import dataclass

import torch

from limbeck.diffusion.models import checkpoint
from limbeck.diffusion.models.checkpoint import Checkpoint
from limbeck.diffusion.models.schedulers import IGNORABLE
from limbeck.diffusion.models.teachers import Teacher, check_unasked, from_checkpoint, load_checkpoint, load_teacher
from limbeck.storage_schemas import paths
from limbeck.storage_schemas.errors import UserError
from limbeck.storage_schemas.recipe import Recipe
from limbeck.storage_schemas.store import Store


class NoTeacher(UserError):
    """The recipe's teacher can't be had: it isn't there, isn't named by the user, or is another one."""


@dataclass(frozen=True)
class TeacherSource:
    """Where to load a recipe's teacher from, small enough to send to a worker.

    uri: given by the user, by `flag`; None looks in the store, then at the recipe's URI.
    trusts_recipe: the user gave the recipe's URI too, so what lies there may be opened or run.
    """

    store: Store
    recipe: Recipe
    uri: str | None = None
    flag: str = "--teacher"
    trusts_recipe: bool = False

    def load(self, *, device: str | torch.device = "cpu") -> Teacher:
        """The teacher in evaluation mode. Raises NoTeacher in one line."""
        kept = self._kept()
        if kept is not None:
            try:
                return from_checkpoint(self.recipe.teacher.uri, kept, device=device)
            except ValueError as error:
                raise NoTeacher(str(error)) from None
        uri = self._asked()
        try:
            teacher = load_teacher(uri, device=device, ignore=IGNORABLE)
        except Exception as error:  # whatever a factory of the user's raises, too
            if self.trusts_recipe:
                raise
            raise NoTeacher(f"teacher {uri} can't be loaded ({error}): name it by {self.flag}") from error
        self._check(teacher, uri)
        return teacher

    def checkpoint(self) -> Checkpoint:
        """The teacher's spec and weights, for a student to start from. Raises NoTeacher in one line."""
        kept = self._kept()
        if kept is not None:
            return kept
        uri = self.uri or self.recipe.teacher.uri
        if uri.startswith("python:"):
            raise NoTeacher(f"the teacher {uri} is code, not a saved model; use --init scratch or a model's folder")
        try:
            saved = load_checkpoint(self._asked(), ignore=IGNORABLE)
        except (NoTeacher, ValueError, FileNotFoundError) as error:
            raise NoTeacher(f"{error}; or generate --with-weights, or use --init scratch") from error
        self._check(saved, uri)
        return saved

    def _kept(self) -> Checkpoint | None:
        """The teacher that the store keeps; a place that the user gave goes first."""
        saved = None if self.uri else kept_weights(self.store, self.recipe.id)
        if saved is not None:
            self._check(saved, f"{self.store.uri}/{paths.weights_folder(self.recipe.id)}")
        return saved

    def _asked(self) -> str:
        """The URI that may be opened."""
        if self.uri is None and not self.trusts_recipe:
            try:
                check_unasked(self.recipe.teacher.uri, flag=self.flag)
            except ValueError as error:
                raise NoTeacher(str(error)) from None
        return self.uri or self.recipe.teacher.uri

    def _check(self, found: Teacher | Checkpoint, place: str) -> None:
        """Refuse a model whose weights, description or source code are not the recipe's."""
        code = found.source_sha256 if isinstance(found, Teacher) else None
        differs = self.recipe.teacher.difference(
            place, model=found.model, weights_sha256=found.weights_sha256, source_sha256=code
        )
        if differs and self.trusts_recipe:
            changed = "it changed since the job began, or another machine has another file"
            raise NoTeacher(f"{differs}: {changed}; start again with one and the same")
        if differs:
            raise NoTeacher(f"{differs}; name the teacher that made this data by {self.flag}")


def keep_weights(store: Store, recipe_id: str, weights: Checkpoint) -> None:
    """Put a teacher's weights beside its recipe, its description last: a description in place means whole weights."""
    folder = paths.weights_folder(recipe_id)
    if not store.exists(f"{folder}/{checkpoint.MODEL_FILE}"):
        store.write(f"{folder}/{checkpoint.WEIGHTS_FILE}", weights.weights)
        store.write(f"{folder}/{checkpoint.MODEL_FILE}", json.dumps(weights.document(), sort_keys=True).encode())


def kept_weights(store: Store, recipe_id: str) -> Checkpoint | None:
    """The weights that `keep_weights` put there, or None. Raises NoTeacher in one line where they are damaged."""
    folder = paths.weights_folder(recipe_id)
    document = store.read(f"{folder}/{checkpoint.MODEL_FILE}")
    weights = store.read(f"{folder}/{checkpoint.WEIGHTS_FILE}") if document is not None else None
    if document is None or weights is None:
        return None
    try:
        return checkpoint.unpack(document, weights, source=f"{store.uri}/{folder}")
    except ValueError as error:
        raise NoTeacher(str(error)) from None

"""The teacher of a dataset that is there already: where its weights are to be had, and only if their hash agrees."""

from dataclasses import dataclass

import torch

from diffusion.schedulers import IGNORABLE
from diffusion.teachers import Teacher, check_unasked, from_checkpoint, load_teacher
from pipeline.weights import kept_weights, teacher_differs
from storage_schemas.errors import StoreError, UserError
from storage_schemas.recipe import Recipe
from storage_schemas.store import Store


class NoTeacher(UserError):
    """Nobody has the weights that the recipe names."""


@dataclass(frozen=True)
class TeacherSource:
    """Where to load a recipe's teacher from, small enough to send: `uri`, else the store, else the recipe's uri."""

    store: Store
    recipe: Recipe
    uri: str | None = None

    def load(self, *, device: str | torch.device = "cpu") -> Teacher:
        """The teacher, if it is the recipe's. Raises NoTeacher in one line."""
        source = self.uri or self.recipe.teacher.uri
        kept = None if self.uri else self._kept(device)
        if kept is None and self.uri is None:
            self._check_unasked(source)
        return self._same(source, kept or _loaded(source, device))

    def _check_unasked(self, source: str) -> None:
        try:
            check_unasked(source, flag="--teacher")
        except ValueError as error:
            raise NoTeacher(str(error)) from None

    def _kept(self, device: str | torch.device) -> Teacher | None:
        try:
            saved = kept_weights(self.store, self.recipe.id)
            return None if saved is None else from_checkpoint(self.recipe.teacher.uri, saved, device=device)
        except (StoreError, ValueError) as error:
            raise NoTeacher(str(error)) from None

    def _same(self, source: str, teacher: Teacher) -> Teacher:
        if differs := teacher_differs(self.recipe, teacher, source):
            raise NoTeacher(f"{differs}: name the teacher that made this data by --teacher")
        return teacher


def _loaded(uri: str, device: str | torch.device) -> Teacher:
    try:
        return load_teacher(uri, device=device, ignore=IGNORABLE)
    except Exception as error:  # whatever a factory of the user's raises, too
        raise NoTeacher(f"teacher {uri} can't be loaded ({error}): name it by --teacher") from error

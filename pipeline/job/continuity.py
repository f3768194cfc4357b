"""Refuse to go on with a dataset in another recipe or layout than it holds, and name what differs."""

from collections.abc import Iterator
from typing import Any

from limbeck.pipeline.windows import Policy
from limbeck.storage_schemas.dataset import read_recipe
from limbeck.storage_schemas.errors import UsageError
from limbeck.storage_schemas.layout import Layout
from limbeck.storage_schemas.manifest import Manifest
from limbeck.storage_schemas.recipe import Recipe
from limbeck.storage_schemas.store import Store

SHOWN = 4
"""Differences that a message names."""

DERIVED = ("times", "alphas", "sigmas")
"""Fields that follow from the solver's grid and the teacher's process: worth a word only where nothing else differs."""

WIDEST = 40


def check_continues(store: Store, parent: Manifest, recipe: Recipe, layout: Layout, policy: Policy | None) -> None:
    """Refuse a recipe or layout that is not the dataset's own. `policy` is None for `generate`."""
    place = f"dataset {parent.dataset} of {store.uri}"
    if parent.recipe_id != recipe.id:
        changes = list(differences(read_recipe(store, parent.recipe_id), recipe))
        more = f" and {len(changes) - SHOWN} more" if len(changes) > SHOWN else ""
        way_out = "--policy recipe" if policy else "--new-recipe"
        raise UsageError(
            f"{place} holds another recipe: {'; '.join(changes[:SHOWN])}{more}; use --dataset OTHER, or {way_out} to "
            f"begin a new window in {parent.dataset}"
        )
    if parent.layout != layout:
        raise UsageError(
            f"{place} holds its samples as {parent.layout.id}, you ask for {layout.id}, which would solve them all "
            "again: use the layout that is there, `limbeck convert`, or --dataset OTHER"
        )


def differences(held: Recipe, asked: Recipe) -> Iterator[str]:
    """What sets two recipes apart, one short phrase each, the teacher first."""
    before, after = held.plain(), asked.plain()
    yield from _of_teachers(before.pop("teacher"), after.pop("teacher"))
    derived = [(name, before.pop(name), after.pop(name)) for name in DERIVED]
    fields = list(_of_fields(before, after))
    yield from fields
    if not fields and held.teacher == asked.teacher:
        yield from (f"{name} differ" for name, there, here in derived if there != here)


def _of_teachers(held: dict[str, Any], asked: dict[str, Any]) -> Iterator[str]:
    if held["uri"] != asked["uri"]:
        names = (f"{it['uri']} (weights {it['weights_sha256'][:8]})" for it in (held, asked))
        yield "teacher {}, you ask for {}".format(*names)
        return
    for name, what in (("weights_sha256", "weights"), ("source_sha256", "code")):
        if held[name] != asked[name]:
            there, here = (str(it[name])[:8] for it in (held, asked))
            yield f"the teacher's {what} {there} -> {here} changed under {held['uri']}"
    yield from _of_fields(held["model"], asked["model"], "teacher.model.")


def _of_fields(held: dict[str, Any], asked: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for name in sorted(held.keys() | asked.keys()):
        there, here = held.get(name), asked.get(name)
        if isinstance(there, dict) and isinstance(here, dict):
            yield from _of_fields(there, here, f"{prefix}{name}.")
        elif there != here:
            yield f"{prefix}{name} {_short(there)}, you ask for {_short(here)}"


def _short(value: Any) -> str:
    text = str(list(value) if isinstance(value, tuple) else value)
    return text if len(text) <= WIDEST else f"{text[:WIDEST]}..."

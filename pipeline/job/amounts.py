"""What a job is about to make, in one line before any work, and whether there is room for it."""

import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from limbeck.diffusion.recipes.grid import recipe_nfe
from limbeck.storage_schemas import paths
from limbeck.storage_schemas.commit import Task
from limbeck.storage_schemas.errors import UsageError
from limbeck.storage_schemas.layout import Layout
from limbeck.storage_schemas.log import log
from limbeck.storage_schemas.recipe import Recipe
from limbeck.storage_schemas.store import Store

PER_TASK = 3
"""Objects of a task: its shard and its commit, which lies in two places."""


def say_amounts(store: Store, recipe: Recipe, layout: Layout, tasks: Sequence[Task], runner: str, workers: int) -> None:
    """Log one line. UsageError where a disk has no room for it.

    `convert` calls no network. Workers of `local` are on this machine, each with room for a shard in scratch.
    """
    here = min(workers, len(tasks)) if runner == "local" else 0
    samples = len(tasks) * layout.samples_per_shard
    size, shard = samples * recipe.sample_bytes, layout.samples_per_shard * recipe.sample_bytes
    document = store.local_path(paths.STORE)
    root = None if document is None else os.path.dirname(document)
    free = None if root is None else _free(root)
    words = [
        f"{samples} samples in {len(tasks)} shard{'s' * (len(tasks) > 1)} of {layout.samples_per_shard}",
        *([f"{samples * recipe_nfe(recipe)} network calls"] if runner != "convert" else []),
        f"{'at most ' if layout.compression != 'none' else ''}{format_size(size)} in {PER_TASK * len(tasks)} objects",
        *([] if free is None else [f"{format_size(free)} are free"]),
    ]
    log.info(f"to make: {', '.join(words)}")
    if layout.compression == "none":
        _check_room({**({root: size} if root else {}), **({_scratch(): here * shard} if here else {})})


def _scratch() -> str:
    try:
        return tempfile.gettempdir()
    except FileNotFoundError:  # a worker says so, with the way out
        return os.getcwd()


def _check_room(needed: dict[str, int]) -> None:
    """Refuse what is more than is free, also where several places share a disk."""
    disks: dict[int, list[str]] = {}
    for place in needed:
        disks.setdefault(os.stat(_existing(place)).st_dev, []).append(place)
    for places in disks.values():
        size, free = sum(needed[place] for place in places), _free(places[0])
        if size > free:
            raise UsageError(
                f"{' and '.join(places)}: {format_size(size)} are needed, {format_size(free)} are free: "
                "make room, give a smaller --count, --holdout or --samples-per-shard, or another place "
                "(TMPDIR names that of scratch)"
            )


def _free(place: str) -> int:
    return shutil.disk_usage(_existing(place)).free


def _existing(place: str) -> Path:
    path = Path(place)
    return next(folder for folder in (path, *path.parents) if folder.exists())


def format_size(count: float) -> str:
    """1.5 GB."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} B"

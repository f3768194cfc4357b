"""`inspect`: what a dataset holds, from its documents alone; a picture reads one shard."""

import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from limbeck.pipeline import lineage
from limbeck.pipeline.config import InspectConfig
from limbeck.storage_schemas.commit import ColumnStatistics, Commit
from limbeck.storage_schemas.dataset import Dataset, latest_number, open_dataset
from limbeck.storage_schemas.errors import UserError, shown
from limbeck.storage_schemas.extras import need
from limbeck.storage_schemas.log import log
from limbeck.storage_schemas.notes import Calibration, check_calibration, read_calibrations
from limbeck.storage_schemas.recipe import Recipe
from limbeck.storage_schemas.record import SEGMENT_STATES, SPLITS, from_storage
from limbeck.storage_schemas.store import Store

MOST_COMMITS = 512
"""Shards, evenly spread, whose commits are read for statistics and labels; `commits_read` tells how many were."""

DRAWN = 48
"""Trajectories in a picture."""


def run_inspect(config: InspectConfig) -> int:
    """The exit code."""
    store = Store.open(config.store)
    if config.lineage:
        links = list(_lineage(store, config))
        print(json.dumps(links) if config.as_json else lineage.describe(iter(links)))
        return 0
    dataset = open_dataset(store, config.dataset, config.manifest)
    found = describe(dataset)
    print(json.dumps(found) if config.as_json else format_description(found))
    if config.picture:
        draw(dataset, config.picture)
    return 0


def _lineage(store: Store, config: InspectConfig) -> Iterator[lineage.Link]:
    if config.student:
        return lineage.lineage_of_student(store, config.student)
    dataset = open_dataset(store, config.dataset, config.manifest)
    return lineage.lineage_of(store, dataset.recipe.id, config.dataset)


def describe(dataset: Dataset) -> dict[str, Any]:
    """All that `inspect` shows, as plain JSON."""
    manifest, recipe = dataset.manifest, dataset.recipe
    shards = list(dataset.table[:: max(1, math.ceil(len(dataset.table) / MOST_COMMITS))])
    commits = [dataset.commit(shard) for shard in shards]
    return {
        "store": dataset.store.uri,
        "dataset": manifest.dataset,
        "manifest": manifest.number,
        "latest_manifest": latest_number(dataset.store, manifest.dataset),
        "sealed_at": manifest.sealed_at,
        "recipe_id": recipe.id,
        "layout": dataset.layout.id,
        "window": {split: list(manifest.window.bounds(split)) for split in SPLITS},
        "samples": {split: dataset.ids(split).count for split in SPLITS},
        "missing": list(manifest.missing),
        "quarantined": {split: dataset.shards(split).quarantined.tolist() for split in SPLITS},
        "shards": len(dataset.table),
        "bytes": sum(shard.bytes for shard in dataset.table),
        "bytes_per_sample": recipe.sample_bytes,
        "columns": {field.name: {"shape": list(field.shape), "dtype": field.dtype} for field in recipe.fields},
        "commits_read": len(commits),
        "nfe": commits[0].nfe if commits else None,
        "solve_seconds": sum(commit.seconds for commit in commits),
        "labels": _labels(commits),
        "statistics": {field.name: pooled(commits, field.name) for field in recipe.fields if not field.is_scalar},
        "recipe": recipe.plain(),
        "calibrations": [calibrated(note, recipe) for note in read_calibrations(dataset.store, recipe.id)],
    }


def calibrated(note: Calibration, recipe: Recipe) -> dict[str, Any]:
    """What a calibration among the recipe's notes says of the recipe's own solver."""
    point = check_calibration(note, recipe, "a note")
    reference = note.reference.plain()
    return {"made_at": note.made_at, "tolerance": note.tolerance, "count": note.count, "reference": reference} | {
        name: getattr(point, name) for name in ("error", "low", "high", "nfe")
    }


def pooled(commits: Sequence[Commit], column: str) -> dict[str, float] | None:
    """Mean, standard deviation, minimum and maximum over all these shards' rows together."""
    parts = [(it.rows, it.statistics[column]) for it in commits if it.rows and column in it.statistics]
    if not parts:
        return None
    rows = np.array([count for count, _ in parts], dtype=np.float64)
    figures = ("mean", "std", "min", "max")
    mean, std, low, high = (np.array([_number(part, name) for _, part in parts]) for name in figures)
    centre = np.average(mean, weights=rows)
    spread = np.average(std**2 + (mean - centre) ** 2, weights=rows)
    return {"mean": float(centre), "std": float(np.sqrt(spread)), "min": float(low.min()), "max": float(high.max())}


def format_description(found: dict[str, Any]) -> str:
    """The same as text for people."""
    lines = [
        f"{found['store']}, dataset {found['dataset']}",
        f"manifest   {found['manifest']} of {found['latest_manifest']}, sealed {found['sealed_at']}",
        *_describe_recipe(found["recipe_id"], found["recipe"], found["nfe"]),
        *map(_describe_calibration, found["calibrations"]),
        *(_describe_window(split, found["samples"][split], *found["window"][split]) for split in SPLITS),
        f"shards     {found['shards']} of layout {found['layout']}, {found['bytes']} bytes",
        *([f"missing    {', '.join(found['missing'])}"] if found["missing"] else []),
        *(f"quarantined {split}: {ids}" for split, ids in found["quarantined"].items() if ids),
    ]
    if found["labels"]:
        lines.append("labels     " + ", ".join(f"{label}: {count}" for label, count in found["labels"].items()))
    lines.append(f"{'state':<12}" + "".join(f"{name:>12}" for name in ("mean", "std", "min", "max")))
    for name, figures in found["statistics"].items():
        lines.append(f"{name:<12}" + "".join(f"{value:>12.4g}" for value in (figures or {}).values()))
    return "\n".join(map(shown, lines))


def _describe_recipe(recipe_id: str, recipe: dict[str, Any], nfe: int | None) -> list[str]:
    teacher, solver = recipe["teacher"], recipe["solver"]
    grid = ", ".join(f"{name} {value}" for name, value in solver["grid"].items() if name != "name")
    shape = "x".join(map(str, recipe["sample_shape"]))
    return [
        f"teacher    {teacher['uri']}, weights {teacher['weights_sha256'][:12]}",
        _describe_guidance(recipe["guidance"]["scale"]),
        f"solver     {solver['name']}, {solver['steps']} steps, {nfe} calls a sample, {solver['frame']} frame",
        f"grid       {solver['grid']['name']}{' (' + grid + ')' if grid else ''}, {_describe_stored(recipe)}",
        f"samples    {shape} {recipe['storage_dtype']}, solved in {recipe['solve_dtype']} by {recipe['micro_batch']}",
        f"recipe     {recipe_id}, seed {recipe['noise']['seed']}",
    ]


def _describe_guidance(scale: float | tuple[float, ...]) -> str:
    if isinstance(scale, tuple):
        return f"guidance   {', '.join(map(str, scale))}: each sample has one of them"
    return f"guidance   {scale}"


def _describe_stored(recipe: dict[str, Any]) -> str:
    if recipe["chain"] == "trajectory":
        return f"stored at {list(recipe['states'])}"
    start = recipe["start"]
    return f"segments of two steps from {start['images'] if start['kind'] == 'data' else 'the prior'}"


def _describe_window(split: str, samples: int, start: int, stop: int) -> str:
    return f"{split:<10} {samples} samples, window [{start}, {stop})"


def _describe_calibration(note: dict[str, Any]) -> str:
    reference, ends = note["reference"], [note[name] for name in ("error", "low", "high")]
    error, low, high = ("not finite" if end is None else f"{end:.2g}" for end in ends)
    return (
        f"solver     is off by {error} standard deviations RMS (95%: {low} to {high}) over {note['count']} samples, "
        f"against {reference['solver']} at {reference['steps']} steps"
    )


def draw(dataset: Dataset, path: str) -> None:
    """A PNG of one shard's first trajectories: images state by state, or one coordinate over the grid."""
    if not len(dataset.table):
        raise UserError("this dataset has no shards to draw: generate some")
    need("matplotlib", "--picture", extra="pipeline")
    recipe = dataset.recipe
    columns = dataset.read(dataset.table[0])
    stored = [columns[field.name][:DRAWN] for field in recipe.fields if not field.is_scalar]
    states = [from_storage(state, recipe.storage_dtype) for state in stored]
    are_images = len(recipe.sample_shape) == 3 and recipe.sample_shape[0] in (1, 3)
    figure = _images(states) if are_images else _lines(states, recipe.states or range(SEGMENT_STATES))
    figure.savefig(path, dpi=120)
    log.info(f"drew {len(states[0])} trajectories into {path}")


def _images(states: list[np.ndarray]) -> Any:
    """A row a sample, a column a state; every state to its own range, as noise is far wider than data."""
    from matplotlib.figure import Figure

    rows = min(8, len(states[0]))
    figure = Figure(figsize=(len(states), rows))
    for k, state in enumerate(states):
        low, high = float(state.min()), float(state.max())
        for row in range(rows):
            axes = figure.add_subplot(rows, len(states), row * len(states) + k + 1)
            image = ((state[row].astype(np.float32) - low) / max(high - low, 1e-12)).transpose(1, 2, 0)
            axes.imshow(image.squeeze(), cmap="gray", vmin=0, vmax=1)
            axes.axis("off")
    return figure


def _lines(states: list[np.ndarray], indices: Sequence[int]) -> Any:
    """The first coordinate of each trajectory over the grid's indices; symmetric log scale."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="grid index (0 is noise)", ylabel="first coordinate", yscale="symlog")
    axes.plot(indices, np.stack([state.reshape(len(state), -1)[:, 0] for state in states]), color="C0", alpha=0.4)
    return figure


def _labels(commits: Sequence[Commit]) -> dict[str, int]:
    total = sum((Counter(commit.labels) for commit in commits), Counter[str]())
    return dict(sorted(total.items(), key=lambda item: int(item[0])))


def _number(part: ColumnStatistics, name: str) -> float:
    value: float | None = getattr(part, name)
    assert value is not None  # only a shard without rows has none
    return value

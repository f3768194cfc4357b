"""`reproduce`: one sample solved again from its recipe, with its whole micro-batch, against what is stored."""

import json

import numpy as np

from limbeck.diffusion.recipes.teacher import TeacherSource
from limbeck.pipeline.after.audit import refuse_segments
from limbeck.pipeline.after.duplicates import Sample
from limbeck.pipeline.after.resolve import Replay, Stored, reproduce_one
from limbeck.pipeline.config import ReproduceConfig
from limbeck.pipeline.producer import WorkOrder
from limbeck.pipeline.workers.one_call import run_once
from limbeck.storage_schemas.dataset import Dataset, open_dataset
from limbeck.storage_schemas.errors import UserError, shown
from limbeck.storage_schemas.store import Store


def run_reproduce(config: ReproduceConfig) -> int:
    """The exit code: 0 for the same bits, or for no difference above --tolerance; else 1."""
    dataset = open_dataset(Store.open(config.store), config.dataset, config.manifest)
    refuse_segments(dataset.recipe)
    stored = read_sample(dataset, Sample(config.split, config.sample))
    source = TeacherSource(dataset.store, dataset.recipe, config.teacher)
    order = WorkOrder(dataset.store, dataset.recipe, dataset.layout, config.device, config.threads)
    replay = run_once(reproduce_one, source, order, stored, runner=config)
    print(json.dumps(_plain(dataset, replay)) if config.as_json else describe(replay))
    return 0 if agrees(replay, config.tolerance) else 1


def read_sample(dataset: Dataset, sample: Sample) -> Stored:
    """One row. Raises UserError in one line for an id that has none."""
    ids, (start, stop) = dataset.ids(sample.split), dataset.manifest.window.bounds(sample.split)
    name = f"manifest {dataset.manifest.number} of {dataset.manifest.dataset}"
    if not start <= sample.id < stop:
        raise UserError(f"{sample} is outside of {name}: its window is [{start}, {stop})")
    shards = dataset.shards(sample.split)
    if sample.id in shards.quarantined:
        raise UserError(f"{sample} was quarantined, because it was not finite: {name} has no row of it to compare with")
    if not ids.contains(np.array([sample.id]))[0]:
        raise UserError(f"{sample} is in a task that {name} names as missing: generate again to make it")
    (place,), (row,) = shards.locate(np.array([sample.id]))
    shard = shards[int(place)]
    columns = dataset.read(shard)
    return Stored(sample, {key: column[row].copy() for key, column in columns.items()}, dataset.commit(shard).machine)


def agrees(replay: Replay, tolerance: float) -> bool:
    """Whether the new solve is what is stored."""
    if replay.same_bits:
        return True
    return bool(tolerance) and replay.max_difference is not None and max(replay.max_difference.values()) <= tolerance


def describe(replay: Replay) -> str:
    """A few lines for people."""
    if replay.max_difference is None:
        lines = [f"{replay.sample}: not finite now, though what is stored is"]
    elif replay.same_bits:
        lines = [f"{replay.sample}: the same bits in every column"]
    else:
        lines = [f"{replay.sample}: other bits; largest difference of each state:"]
        lines += [f"  {name:<10} {value:.6g}" for name, value in replay.max_difference.items()]
    lines += [f"solved on  {_machine(replay.solved_on)}", f"here       {_machine(replay.here)}"]
    return "\n".join(map(shown, lines))


def _machine(machine: dict[str, str]) -> str:
    return ", ".join(f"{key} {value}" for key, value in sorted(machine.items()))


def _plain(dataset: Dataset, replay: Replay) -> dict[str, object]:
    return {
        "split": replay.sample.split,
        "sample": replay.sample.id,
        "recipe_id": dataset.recipe.id,
        "same_bits": replay.same_bits,
        "max_difference": replay.max_difference,
        "solved_on": replay.solved_on,
        "here": replay.here,
    }

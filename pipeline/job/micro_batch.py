"""Sizes that aren't given become numbers before there is a recipe, which then holds its micro-batch and no other.

A rerun takes those of what it goes on with. Else they have defaults, and of `--micro-batch auto` a worker tries: a
whole shard together, half of it, ...
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch

from limbeck.pipeline.config import GenerateConfig, RegenerateConfig
from limbeck.pipeline.producer import Producer, WorkOrder
from limbeck.pipeline.recipe import build_layout, with_micro_batch
from limbeck.pipeline.solve import OutOfMemory, solve_batch
from limbeck.pipeline.workers.crossing import WorkerDied
from limbeck.pipeline.workers.one_call import try_out
from limbeck.storage_schemas import paths
from limbeck.storage_schemas.dataset import latest_manifest
from limbeck.storage_schemas.errors import UserError
from limbeck.storage_schemas.job import Job
from limbeck.storage_schemas.layout import FORMATS, Layout
from limbeck.storage_schemas.log import log
from limbeck.storage_schemas.reading import read_all, read_document
from limbeck.storage_schemas.recipe import Recipe
from limbeck.storage_schemas.store import Store

LARGEST = 4096
"""More samples together make no network faster."""

HEADROOM = 0.9
"""Fraction of a worker's share of a GPU that a micro-batch may fill: the rest is what the allocator can't use."""

PROBE_STEPS = 4
"""Enough for every solver to hold all the earlier calls that it ever holds."""

JOBS_LOOKED_AT = 16
"""The newest ones, among which a job of this dataset that died before it sealed is looked for."""


def settle(config: GenerateConfig, draft: Recipe, store: Store) -> tuple[Recipe, Layout]:
    """The recipe with its micro-batch, and the layout: what isn't given is as in what the job goes on with.

    Else it is as in `draft`, the recipe of a new dataset; the micro-batch of `auto` is found, and logged.
    """
    layout = build_layout(config, draft)
    given = (config.micro_batch, config.samples_per_shard, config.format, config.compression)
    earlier = _earlier(config, draft, store) if {None, "auto"} & set(given) else None
    if earlier is not None:
        return _like(config, draft, layout, earlier, store)
    if config.micro_batch != "auto":
        return draft, layout
    found = _probe(config, draft, layout, store)
    log.info(f"micro-batch {found}: found by a trial on a worker, from now on part of the recipe")
    return with_micro_batch(draft, found), layout


def _like(
    config: GenerateConfig, draft: Recipe, layout: Layout, earlier: tuple[Recipe, Layout], store: Store
) -> tuple[Recipe, Layout]:
    """The draft and its layout, with what the config leaves open as it was earlier."""
    recipe, there = earlier
    theirs = {name: getattr(there, name) for name in Layout.model_fields if getattr(config, name) is None}
    if "format" in theirs and layout.compression not in FORMATS[theirs["format"]].COMPRESSIONS:
        del theirs["format"]  # which can't be as compressed as is asked for
    layout = layout.model_copy(update=theirs)
    if config.micro_batch == "auto":
        log.info(f"micro-batch {recipe.micro_batch}, as in what is in {store.uri} already")
    elif config.micro_batch is not None:
        return draft, layout
    return with_micro_batch(draft, recipe.micro_batch), layout


def _earlier(config: GenerateConfig, draft: Recipe, store: Store) -> tuple[Recipe, Layout] | None:
    """The recipe and layout of the dataset's latest manifest, or of its newest job, with this recipe but for the sizes.

    A manifest of another recipe, which only --new-recipe may leave, is refused later: no worker is asked before that.
    """
    manifest = latest_manifest(store, config.dataset)
    held = _held(store, manifest.recipe_id) if manifest else None
    if held and manifest and (_differs_at_most_there(held, draft, config) or not _may_change(config)):
        return held, manifest.layout
    begun = _begun(config.dataset, store)
    return next((found for found in begun if _differs_at_most_there(found[0], draft, config)), None)


def _may_change(config: GenerateConfig) -> bool:
    return config.new_recipe or (isinstance(config, RegenerateConfig) and config.policy == "recipe")


def _differs_at_most_there(held: Recipe, draft: Recipe, config: GenerateConfig) -> bool:
    given = isinstance(config.micro_batch, int)
    same = (draft if given else with_micro_batch(draft, held.micro_batch)).id == held.id
    return same and (config.samples_per_shard or held.micro_batch) % held.micro_batch == 0


def _begun(dataset: str, store: Store) -> Iterator[tuple[Recipe, Layout]]:
    """Recipes and layouts of the newest jobs of the dataset, newest first."""
    newest = reversed(store.list(paths.JOBS)[-JOBS_LOOKED_AT:])
    jobs, unread = read_all(store, [paths.job_path(name) for name in newest], Job)
    for problem in unread.values():
        log.warning(problem)
    for job in jobs.values():
        recipe = _held(store, job.recipe_id) if job.dataset == dataset else None
        if recipe:
            yield recipe, job.layout


def _held(store: Store, recipe_id: str) -> Recipe | None:
    return read_document(store, paths.recipe_path(recipe_id), Recipe)


def sizes(samples_per_shard: int) -> list[int]:
    """What is tried: halves of a shard while they are whole, largest first, from LARGEST down."""
    halves = [samples_per_shard]
    while halves[-1] % 2 == 0:
        halves.append(halves[-1] // 2)
    return [size for size in halves if size <= LARGEST] or halves[-1:]


def _probe(config: GenerateConfig, draft: Recipe, layout: Layout, store: Store) -> int:
    """A worker that dies can't say at which size, so the next one leaves the largest out."""
    order = WorkOrder(store, draft, layout, config.device, config.threads)
    left = sizes(layout.samples_per_shard)
    while left:
        try:
            found = try_out(
                "the trial of a micro-batch", first_that_fits, order, left, gpu_share(config), runner=config
            )
        except WorkerDied as death:
            log.warning(f"a micro-batch of {left[0]} or less is too large: {death}")
            left = left[1:]
            continue
        if found:
            return found
        break
    raise UserError(
        f"a worker has no room for {sizes(layout.samples_per_shard)[-1]} samples of {draft.teacher.uri} together: give "
        "it more memory, or shards with more factors of 2"
    )


def gpu_share(config: GenerateConfig) -> float:
    """The part of a GPU that one worker has: local ones share one GPU."""
    if config.runner == "ray":
        return min(1.0, config.ray.num_gpus or 1.0)
    return 1 / config.num_workers


def first_that_fits(order: WorkOrder, candidates: Sequence[int], share: float) -> int | None:
    """The first of `candidates`, samples together, for which this worker has memory; its share of the GPU counts."""
    producer = Producer(order)
    with _limited(producer.device, share):
        return next((size for size in candidates if _fits(producer, size)), None)


def _fits(producer: Producer, size: int) -> bool:
    recipe = shortened(with_micro_batch(producer.order.recipe, size))
    try:
        solve_batch(
            recipe, producer.denoise, producer.teacher.process, "train", np.arange(size), device=producer.device
        )
    except OutOfMemory:
        return False
    finally:
        if producer.device.type == "cuda":
            torch.cuda.empty_cache()
    return True


def shortened(recipe: Recipe) -> Recipe:
    """Fewer steps with as many stored states: it takes as much memory, and no longer than it must."""
    steps = min(recipe.num_steps, max(PROBE_STEPS, len(recipe.states) - 1))
    grid = {name: (*getattr(recipe, name)[:steps], getattr(recipe, name)[-1]) for name in ("times", "alphas", "sigmas")}
    states = (*range(len(recipe.states) - 1), steps)
    solver = recipe.solver.model_copy(update={"steps": steps})
    return recipe.model_copy(update={"solver": solver, "states": states, **grid})


@contextmanager
def _limited(device: torch.device, share: float) -> Iterator[None]:
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_per_process_memory_fraction(share * HEADROOM, device.index)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device.index)

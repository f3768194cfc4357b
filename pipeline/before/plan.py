"""`plan`: what generate would do and cost, from what the store holds and a handful of samples timed on one worker."""

import json
import math
import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from limbeck.diffusion.models import checkpoint
from limbeck.pipeline.before.timing import Timing, time_a_worker
from limbeck.pipeline.config import PlanConfig
from limbeck.pipeline.generate import plan_of
from limbeck.pipeline.job.amounts import PER_TASK, format_size
from limbeck.pipeline.job.continuity import check_continues
from limbeck.pipeline.job.driver import adopt
from limbeck.pipeline.job.prepare import Run, prepare
from limbeck.pipeline.producer import WorkOrder
from limbeck.pipeline.windows import Goal, grow, missing_tasks
from limbeck.storage_schemas import paths
from limbeck.storage_schemas.canonical import digest
from limbeck.storage_schemas.dataset import latest_manifest, read_shard_table

GB = 1e9
HOUR = 3600

PER_JOB = 4
"""Objects of a job beside shards and commits: job, heartbeat, manifest, table of shards."""


@dataclass(frozen=True)
class Work:
    """What there is to do; objects counts all that would be written, recipe_bytes what of a recipe isn't there yet."""

    tasks: int
    tasks_in_window: int
    tasks_adopted: int
    samples: int
    objects: int
    recipe_bytes: int


@dataclass(frozen=True)
class Estimate:
    """Seconds of a task and of it all, hours of what is paid by the hour (GPU or CPU), money where prices are known.

    A worker solves one task while it writes another, so the slower of the two is what a task costs.
    """

    nfe: int
    nfe_total: int
    micro_batches: int
    bytes: int
    solve_seconds: float
    write_seconds: float
    workers: int
    wall_seconds: float
    device: str
    device_hours: float
    bottleneck: str
    compute_cost: float | None
    storage_cost_a_month: float | None


def run_plan(config: PlanConfig) -> int:
    """The exit code."""
    run = prepare(config, writes=False)
    work = find_work(run)
    timing = None
    if work.tasks:
        timing = time_a_worker(config, WorkOrder(run.store, run.recipe, run.layout, config.device, config.threads))
    estimate = foretell(config, run, work, timing) if timing else None
    if config.as_json:
        print(json.dumps(_as_json(run, work, timing, estimate)))
    else:
        print("\n".join(describe(config, run, work, timing, estimate)))
    return 0


def find_work(run: Run) -> Work:
    """What generate would do: the window's tasks but those that the latest manifest lists or that are committed."""
    config, parent = run.config, latest_manifest(run.store, run.config.dataset)
    if parent and not (config.new_recipe and parent.recipe_id != run.recipe.id):
        check_continues(run.store, parent, run.recipe, run.layout, None)
    window = grow(parent, run.recipe.id, count=config.count, holdout=config.num_holdout)
    goal = Goal(config.dataset, parent, run.recipe.id, run.layout, window)
    if goal.reached:
        return Work(0, sum(1 for _ in window.tasks(run.layout.samples_per_shard)), 0, 0, 0, 0)
    listed = read_shard_table(run.store, parent).tasks if parent and goal.continues else frozenset()
    needed = missing_tasks(goal, listed)
    adopt(plan_of(run, goal, needed))
    left = len(needed) - sum(task.name in run.ledger.shards for task in needed)
    recipe = [len(data) for path, data in _of_recipe(run) if not run.store.exists(path)]
    return Work(
        tasks=left,
        tasks_in_window=sum(1 for _ in window.tasks(run.layout.samples_per_shard)),
        tasks_adopted=len(needed) - left,
        samples=left * run.layout.samples_per_shard,
        objects=PER_TASK * left + PER_JOB + len(recipe) + (not run.store.exists(paths.STORE)),
        recipe_bytes=sum(recipe),
    )


def _of_recipe(run: Run) -> Iterator[tuple[str, bytes]]:
    """Paths and contents of what a run keeps once for its recipe."""
    yield paths.recipe_path(run.recipe.id), run.recipe.to_bytes()
    if run.weights:
        folder = paths.weights_folder(run.recipe.id)
        yield f"{folder}/{checkpoint.WEIGHTS_FILE}", run.weights.weights
        yield f"{folder}/{checkpoint.MODEL_FILE}", json.dumps(run.weights.document(), sort_keys=True).encode()
    if run.calibration:
        name = digest(run.calibration.plain())
        yield paths.calibration_path(run.recipe.id, name), run.calibration.to_bytes()


def foretell(config: PlanConfig, run: Run, work: Work, timing: Timing) -> Estimate:
    """The sums."""
    batches = run.layout.samples_per_shard // run.recipe.micro_batch
    solve, write = batches * statistics.median(timing.batches), timing.encode + (timing.upload or 0)
    workers = min(config.num_workers, work.tasks)
    rounds = math.ceil(work.tasks / workers)
    first = timing.start + timing.load + max(0.0, timing.warm_up - statistics.median(timing.batches))
    wall = first + solve + write + (rounds - 1) * max(solve, write)
    device, units = _paid(config, timing, workers)
    size = work.tasks * (timing.shard_bytes + (PER_TASK - 1) * timing.commit_bytes) + work.recipe_bytes
    hours = units * wall / HOUR
    return Estimate(
        nfe=timing.nfe,
        nfe_total=timing.nfe * work.samples,
        micro_batches=work.tasks * batches,
        bytes=size,
        solve_seconds=solve,
        write_seconds=write,
        workers=workers,
        wall_seconds=wall,
        device=device,
        device_hours=hours,
        bottleneck="writing" if write > solve else "solving",
        compute_cost=None if config.price_gpu_hour is None else config.price_gpu_hour * hours,
        storage_cost_a_month=None if config.price_gb_month is None else config.price_gb_month * size / GB,
    )


def _paid(config: PlanConfig, timing: Timing, workers: int) -> tuple[str, float]:
    """GPU or CPU, and how many of them these workers take. Workers that share a GPU are slower than the timed one."""
    if _on_gpu(timing):
        return "GPU", workers * (config.ray.num_gpus or 1.0)
    if config.runner == "local":
        return "CPU", float(workers * config.threads)
    return "CPU", workers * (config.ray.num_cpus or 1.0)


def _on_gpu(timing: Timing) -> bool:
    return timing.machine["device"].startswith(("cuda", "xpu", "mps"))


def describe(
    config: PlanConfig, run: Run, work: Work, timing: Timing | None, estimate: Estimate | None
) -> Iterator[str]:
    """The plan as lines for people."""
    already = f", {work.tasks_adopted} are committed and not sealed yet" if work.tasks_adopted else ""
    size = run.layout.samples_per_shard
    yield f"tasks      {work.tasks} of {work.tasks_in_window} to do{already}, {size} samples each"
    if timing is None or estimate is None:
        yield "nothing to solve, " + ("a manifest to seal" if work.objects else "nothing to seal")
        return
    per_batch = statistics.median(timing.batches)
    together = f"{run.recipe.micro_batch} together, in {estimate.micro_batches} micro-batches"
    yield f"samples    {work.samples}, solved {together}"
    yield f"calls      {estimate.nfe} a sample (NFE), {estimate.nfe_total} in all"
    yield (
        f"bytes      {format_size(estimate.bytes)}, {format_size(timing.shard_bytes)} a shard, in {work.objects} "
        f"objects: {work.tasks} shards, {work.tasks} commits in two places, {work.objects - PER_TASK * work.tasks} more"
    )
    yield (
        f"a task     solving {_time(estimate.solve_seconds)}, writing {_time(estimate.write_seconds)} "
        f"({_uploaded(timing)}); a worker does both at once"
    )
    yield from _warnings(estimate, timing)
    yield (
        f"in all     {_time(estimate.wall_seconds)} with workers: {estimate.workers}"
        f"{_sharing(config, timing, estimate)}, {estimate.device_hours:.3g} {estimate.device} hours"
    )
    if estimate.compute_cost is not None:
        yield f"compute    {_money(estimate.compute_cost)} at {config.price_gpu_hour:g} an hour of {estimate.device}"
    if estimate.storage_cost_a_month is not None:
        yield f"storage    {_money(estimate.storage_cost_a_month)} a month at {config.price_gb_month:g} a GB"
    spread = f"{_time(min(timing.batches))} to {_time(max(timing.batches))}"
    yield (
        f"measured   {len(timing.batches)} micro-batches of {_time(per_batch)} ({spread}) by one worker alone on "
        f"{timing.machine['host']}, {timing.machine['device']}; it was there after {_time(timing.start)}, had its "
        f"teacher {_time(timing.load)} later, and took {_time(timing.warm_up)} for the first one"
    )


def _sharing(config: PlanConfig, timing: Timing, estimate: Estimate) -> str:
    """What the wall time takes for granted, and `--runner local` has not: a plan made there is often for a cluster."""
    alone = config.runner == "ray" or estimate.workers == 1 or not _on_gpu(timing)
    return "" if alone else " as if each had a GPU of its own"


def _warnings(estimate: Estimate, timing: Timing) -> Iterator[str]:
    if estimate.bottleneck == "writing":
        yield (
            "bottleneck writing, not solving: the device waits for shards to be written; a faster way to the store, "
            "another compression or fewer stored states help, a faster device doesn't"
        )
    elif timing.upload is None:
        room = timing.shard_bytes / max(estimate.solve_seconds - timing.encode, 1e-9)
        yield f"bottleneck solving, as long as a worker's uploads run at {format_size(room)}/s or more"
    else:
        yield "bottleneck solving"


def _uploaded(timing: Timing) -> str:
    if timing.upload is None:
        return "to scratch alone: --probe-store times an upload, too"
    return f"{_time(timing.encode)} to encode, {_time(timing.upload)} to upload"


def _as_json(run: Run, work: Work, timing: Timing | None, estimate: Estimate | None) -> dict[str, Any]:
    return {
        "recipe_id": run.recipe.id,
        "layout": run.layout.id,
        "micro_batch": run.recipe.micro_batch,
        "work": asdict(work),
        "timing": asdict(timing) if timing else None,
        "estimate": asdict(estimate) if estimate else None,
    }


def _money(amount: float) -> str:
    return f"{amount:,.2f}" if amount >= 1 else f"{amount:.3g}"


def _time(seconds: float) -> str:
    if seconds >= 2 * HOUR:
        return f"{seconds / HOUR:.1f} h"
    return f"{seconds / 60:.1f} min" if seconds >= 120 else f"{seconds:.3g} s"

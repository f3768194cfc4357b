"""A handful of micro-batches and one shard, timed on a worker by the very functions that `generate` runs there."""

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from limbeck.pipeline.config import PlanConfig
from limbeck.pipeline.producer import Producer, WorkOrder, publish
from limbeck.pipeline.solve import Solved, solve_batch
from limbeck.pipeline.workers.one_call import try_out
from limbeck.storage_schemas import paths
from limbeck.storage_schemas.commit import Commit, Task
from limbeck.storage_schemas.errors import UserError
from limbeck.storage_schemas.store import Store


@dataclass(frozen=True)
class Written:
    """A shard that was encoded in scratch and committed to a store in the worker's own memory."""

    seconds: float
    commit: Commit
    data: bytes


@dataclass(frozen=True)
class Timing:
    """Seconds: to get a worker, to load the teacher, for the first micro-batch, for each later one, for a shard.

    upload is None where the store was left alone; total: all that the worker itself took.
    """

    start: float
    load: float
    warm_up: float
    batches: tuple[float, ...]
    encode: float
    upload: float | None
    nfe: int
    shard_bytes: int
    commit_bytes: int
    total: float
    machine: dict[str, str]


def time_a_worker(config: PlanConfig, order: WorkOrder) -> Timing:
    """`time_worker` on a worker of its own; what that took besides is the time to get one."""
    began = time.perf_counter()
    timing = try_out("the timing", time_worker, order, config.time_batches, config.probe_store, runner=config)
    return replace(timing, start=time.perf_counter() - began - timing.total)


def time_worker(order: WorkOrder, batches: int, probe_store: bool) -> Timing:
    """One micro-batch to warm up, `batches` more of the first task, and one shard made of what they give."""
    started = time.perf_counter()
    producer = Producer(order)
    load = time.perf_counter() - started
    warm_up, _ = _solve(producer, 0)
    seconds, solved = zip(*(_solve(producer, number) for number in range(batches)), strict=True)
    written = _write(producer, joined(solved), order.layout.samples_per_shard)
    plain = order.layout.compression == "none"
    upload = _upload(order.store, written.data) if probe_store else None
    shard_bytes = written.commit.bytes if plain else _compressed(producer, joined(solved))
    return Timing(
        start=0.0,
        load=load,
        warm_up=warm_up,
        batches=seconds,
        encode=written.seconds,
        upload=upload,
        nfe=solved[0].nfe,
        shard_bytes=shard_bytes,
        commit_bytes=len(written.commit.to_bytes()),
        total=time.perf_counter() - started,
        machine=producer.machine,
    )


def _solve(producer: Producer, number: int) -> tuple[float, Solved]:
    """The number-th micro-batch of the first task, over again from its start when it has no more."""
    order, size = producer.order, producer.order.recipe.micro_batch
    start = number * size % order.layout.samples_per_shard
    began = time.perf_counter()
    solved = solve_batch(
        order.recipe,
        producer.denoise,
        producer.teacher.process,
        "train",
        np.arange(start, start + size),
        device=producer.device,
    )
    return time.perf_counter() - began, solved


def joined(parts: Sequence[Solved]) -> Solved:
    """The rows of all, with ids from 0."""
    columns = {name: np.concatenate([part.columns[name] for part in parts]) for name in parts[0].columns}
    rows = len(columns["sample_id"])
    if not rows:
        raise UserError("no sample of the trial is finite: nothing can be foretold; look at one by --solver.steps")
    return Solved(columns | {"sample_id": np.arange(rows)}, (), parts[0].nfe)


def _rows(solved: Solved, count: int) -> Solved:
    """`count` rows, by repeating those that there are."""
    chosen = np.arange(count) % len(solved.columns["sample_id"])
    columns = {name: column[chosen] for name, column in solved.columns.items()}
    return replace(solved, columns=columns | {"sample_id": np.arange(count)})


def _write(producer: Producer, solved: Solved, rows: int) -> Written:
    """Encode and commit a shard of so many rows as generate does, with memory for a store."""
    store = Store(f"memory://limbeck-plan-{paths.new_attempt()}", single_writer=True)
    task = Task("train", 0, producer.order.layout.samples_per_shard)
    filled = _rows(solved, rows)
    began = time.perf_counter()
    commit = publish(replace(producer.order, store=store), task, filled, seconds=0.0, machine=producer.machine)
    seconds, data = time.perf_counter() - began, store.read(commit.path)
    assert data is not None
    for path in (commit.path, commit.record_path, commit.commit_path):
        store.remove(path)
    return Written(seconds, commit, data)


def _compressed(producer: Producer, solved: Solved) -> int:
    """Bytes of a whole shard, from two small ones: repeated rows would compress far better than others do."""
    size = producer.order.layout.samples_per_shard
    many = min(len(solved.columns["sample_id"]), size)
    few = max(1, many // 2)
    large, small = (_write(producer, solved, rows).commit.bytes for rows in (many, few))
    return large if many == few else round(large + (large - small) / (many - few) * (size - many))


def _upload(store: Store, data: bytes) -> float:
    """Seconds for one file of a shard's size under a name that nothing refers to; it is removed again."""
    path = f"plan-{paths.new_attempt()}.tmp"
    with tempfile.TemporaryDirectory(prefix="limbeck-") as scratch:
        local = Path(scratch) / "shard"
        local.write_bytes(data)
        began = time.perf_counter()
        try:
            store.upload(local, path)
            return time.perf_counter() - began
        finally:
            store.remove(path)

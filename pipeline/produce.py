"""A worker's inside: a teacher, loaded once, that turns tasks into commits. It knows nothing of who calls it."""

import platform
import tempfile
import threading
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from diffusion.teachers import Teacher, load_teacher
from pipeline.solve import Solved, denoise_of, solve_task
from storage_schemas import formats, paths
from storage_schemas.commit import Commit, Task, column_statistics, put_commit, read_commit, utc_now
from storage_schemas.errors import UserError
from storage_schemas.layout import Layout
from storage_schemas.recipe import Recipe
from storage_schemas.store import Store


@dataclass(frozen=True)
class Order:
    """All that a worker must know, small enough to send."""

    store: Store
    recipe: Recipe
    layout: Layout
    device: str
    threads: int


@dataclass(frozen=True)
class Problem:
    """What went wrong in a worker: one line, where, and on which machine."""

    error: str
    traceback: str
    machine: str


class Producer:
    """One teacher on one device. Two calls of `run` may be in flight: one uploads while the other solves."""

    def __init__(self, order: Order) -> None:
        torch.set_num_threads(order.threads)
        torch.set_float32_matmul_precision("high" if order.recipe.tf32 else "highest")
        torch.backends.cudnn.allow_tf32 = order.recipe.tf32
        self.order = order
        self.device = pick_device(order.device)
        self.teacher = _same_teacher(order.recipe, load_teacher(order.recipe.teacher.uri, device=self.device))
        self.denoise = denoise_of(order.recipe, self.teacher.denoiser, device=self.device)
        self.machine = _machine(self.device, order.threads)
        self._solving = threading.Lock()

    def run(self, task: Task) -> Commit:
        """The commit that stands for the task: ours, or that of whoever was first."""
        order = self.order
        with self._solving:
            there = read_commit(order.store, order.recipe.id, order.layout.id, task.name)
            if there is not None:
                return there
            started = time.perf_counter()
            solved = solve_task(order.recipe, self.denoise, self.teacher.process, task, device=self.device)
            seconds = time.perf_counter() - started
        return publish(order, task, solved, seconds=seconds, machine=self.machine)


def publish(order: Order, task: Task, solved: Solved, *, seconds: float, machine: dict[str, str]) -> Commit:
    """Encode to scratch, upload under a name of this attempt, then commit if nobody has."""
    attempt, recipe, layout = paths.new_attempt(), order.recipe, order.layout
    path = paths.shard_path(recipe.id, layout.id, task.name, attempt, layout.suffix)
    with tempfile.TemporaryDirectory(prefix="limbeck-") as scratch:
        local = Path(scratch) / f"shard{layout.suffix}"
        shard = formats.encode_shard(
            local, recipe.fields, solved.columns, task=task, recipe_id=recipe.id, layout=layout
        )
        order.store.upload(local, path)
    commit = Commit(
        split=task.split,
        index=task.index,
        samples_per_shard=task.samples_per_shard,
        recipe_id=recipe.id,
        layout_id=layout.id,
        attempt=attempt,
        path=path,
        bytes=shard.bytes,
        sha256=shard.sha256,
        rows=shard.rows,
        quarantined=solved.quarantined,
        chunks=shard.chunks,
        seconds=seconds,
        nfe=solved.nfe,
        machine=machine,
        statistics=column_statistics(recipe.fields, solved.columns),
        labels=label_histogram(solved.columns["condition"]),
        committed_at=utc_now(),
    )
    return put_commit(order.store, commit)


def attempt_task(producer: Producer, task: Task) -> Commit | Problem:
    """`run`, with an exception told instead of raised: it may have to cross to another process."""
    try:
        return producer.run(task)
    except Exception as error:
        return describe(error)


def describe(error: BaseException) -> Problem:
    """An exception as what a Failure record keeps of it."""
    line = " ".join(str(error).split()) or "no message"
    told = line if isinstance(error, UserError) else f"{type(error).__name__}: {line}"
    return Problem(told, "".join(traceback.format_exception(error)), platform.node())


def label_histogram(condition: np.ndarray) -> dict[str, int]:
    """How often each label occurs; empty without labels."""
    values, counts = np.unique(condition[condition >= 0], return_counts=True)
    return {str(value): int(count) for value, count in zip(values, counts, strict=True)}


def pick_device(name: str) -> torch.device:
    """The device of a name; auto is the first GPU where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(name)


def _same_teacher(recipe: Recipe, teacher: Teacher) -> Teacher:
    told = (recipe.teacher.weights_sha256, recipe.teacher.source_sha256)
    if told != (teacher.weights_sha256, teacher.source_sha256):
        raise UserError(
            f"{teacher.uri} has weights {teacher.weights_sha256[:12]} here, the recipe says {told[0][:12]}: it changed "
            "since the job began, or another machine has another file; start again with one and the same"
        )
    return teacher


def _machine(device: torch.device, threads: int) -> dict[str, str]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    versions = {"torch": torch.__version__, "numpy": np.__version__, "python": platform.python_version()}
    return {"host": platform.node(), "device": f"{device} {name}", "threads": str(threads), **versions}

"""A worker's inside: a teacher, loaded once, that turns tasks into commits. It knows nothing of its caller."""

import ctypes
import errno
import os
import platform
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np
import torch

from limbeck.diffusion.models.teachers import Teacher
from limbeck.diffusion.recipes.devices import pick_device
from limbeck.diffusion.recipes.teacher import NoTeacher, TeacherSource
from limbeck.pipeline.segments import starting_images
from limbeck.pipeline.solve import Solved, denoise_of, solve_task
from limbeck.storage_schemas import formats, paths
from limbeck.storage_schemas.clock import utc
from limbeck.storage_schemas.commit import (
    COMMIT_WITHIN,
    Commit,
    Task,
    column_statistics,
    is_sick,
    is_whole,
    put_commit,
    read_commit,
    replace_commit,
)
from limbeck.storage_schemas.errors import UserError, without_credentials
from limbeck.storage_schemas.layout import Layout
from limbeck.storage_schemas.recipe import DataStart, Recipe
from limbeck.storage_schemas.store import Store

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Parameters of mallopt, as malloc.h of glibc numbers them."""

SCRATCH_FULL = (errno.ENOSPC, errno.EDQUOT)


class ScratchFull(UserError):
    """A machine without room to encode a shard; another one may have it."""


class LateAttempt(UserError):
    """An attempt that slept so long that prune may have taken its shard away."""


@dataclass(frozen=True)
class WorkOrder:
    """All that a worker must know, small enough to send. again: tasks that have a commit and are solved again."""

    store: Store
    recipe: Recipe
    layout: Layout
    device: str
    threads: int
    again: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Problem:
    """What went wrong in a worker: one line, where, and on which machine."""

    error: str
    traceback: str
    machine: str
    exit_code: int = UserError.exit_code


class Producer:
    """One teacher on one device. Two calls of `run` may be in flight: one uploads while the other solves."""

    def __init__(self, order: WorkOrder, teacher: Teacher | None = None) -> None:
        """teacher: the recipe's, checked and on the order's device; else it is loaded from the store or its URI."""
        set_up_torch(threads=order.threads, tf32=order.recipe.tf32)
        self.order = order
        self.device = pick_device(order.device)
        self.teacher = teacher or _load_teacher(order, self.device)
        self.denoise = denoise_of(order.recipe, self.teacher.denoiser, device=self.device)
        if isinstance(order.recipe.start, DataStart):
            starting_images(order.recipe.start)  # refused here, and not task by task
        self.machine = machine_of(self.device, order.threads)
        self._solving = threading.Lock()

    def run(self, task: Task) -> Commit:
        """The commit that stands for the task: ours, or that of the first to commit.

        A first one that is sick counts for nothing; one that is solved again, and loses as many samples, stands.
        """
        order = self.order
        with self._solving:
            first = read_commit(order.store, order.recipe.id, order.layout.id, task.name)
            there = first if first and is_whole(order.store, first) else None
            sick = there is not None and is_sick(task, there.quarantined, order.recipe.micro_batch)
            if there is not None and not sick and task.name not in order.again:
                return there
            started = time.perf_counter()
            solved = solve_task(order.recipe, self.denoise, self.teacher.process, task, device=self.device)
            seconds = time.perf_counter() - started
        if there is not None and not sick and len(solved.quarantined) >= len(there.quarantined):
            return there
        commit = put_commit if first is None else replace_commit
        return publish(order, task, solved, seconds=seconds, machine=self.machine, commit=commit)


def publish(
    order: WorkOrder,
    task: Task,
    solved: Solved,
    *,
    seconds: float,
    machine: dict[str, str],
    commit: Callable[[Store, Commit], Commit] = put_commit,
) -> Commit:
    """Encode to scratch, upload under a name of this attempt, then commit if no other attempt has."""
    attempt, recipe, layout = paths.new_attempt(), order.recipe, order.layout
    path = paths.shard_path(recipe.id, layout.id, task.name, attempt, layout.suffix)
    with _scratch() as scratch:
        local = Path(scratch) / f"shard{layout.suffix}"
        with _room_in(scratch):
            shard = formats.encode_shard(
                local, recipe.fields, solved.columns, task=task, recipe_id=recipe.id, layout=layout
            )
        begun = utc()
        order.store.upload(local, path)
    committed_at = in_time(task, begun)
    ours = Commit(
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
        committed_at=committed_at.isoformat(timespec="seconds"),
    )
    stands = commit(order.store, ours)
    in_time(task, begun)  # it may have slept right before it committed
    return stands


def in_time(task: Task, begun: datetime) -> datetime:
    """The time of the commit. LateAttempt if the upload began too long before."""
    now = utc()
    if now - begun > COMMIT_WITHIN:
        raise LateAttempt(
            f"{task.name}: its upload began at {begun:%Y-%m-%d %H:%M} UTC, more than {COMMIT_WITHIN} ago, so it is not "
            "committed: prune may have deleted it; the task runs again"
        )
    return now


@contextmanager
def _scratch() -> Iterator[str]:
    """A folder of this attempt's own, gone at its end."""
    try:
        folder = tempfile.TemporaryDirectory(prefix="limbeck-", ignore_cleanup_errors=True)
    except OSError as error:  # FileNotFoundError where no candidate for a scratch folder takes a byte
        raise ScratchFull(
            f"no scratch folder can be made ({error}): free the disk, or set TMPDIR to a roomier one"
        ) from None
    with folder as name:
        yield name


@contextmanager
def _room_in(scratch: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in SCRATCH_FULL:
            raise
        where = f"the scratch folder {Path(scratch).parent} is full ({os.strerror(error.errno)})"
        raise ScratchFull(f"{where}: free it, or set TMPDIR to a roomier one") from None


def attempt_task(producer: Producer, task: Task) -> Commit | Problem:
    """`run`, with an exception returned instead of raised: it may have to cross to another process."""
    try:
        return producer.run(task)
    except Exception as error:
        return describe(error)


def describe(error: BaseException) -> Problem:
    """An exception as what a Failure record keeps of it, without the credentials of any uri in its words."""
    line = " ".join(str(error).split()) or "no message"
    problem = line if isinstance(error, UserError) else f"{type(error).__name__}: {line}"
    where = "".join(traceback.format_exception(error))
    code = error.exit_code if isinstance(error, UserError) else UserError.exit_code
    return Problem(without_credentials(problem), without_credentials(where), platform.node(), code)


def label_histogram(condition: np.ndarray) -> dict[str, int]:
    """How often each label occurs; empty without labels."""
    values, counts = np.unique(condition[condition >= 0], return_counts=True)
    return {str(value): int(count) for value, count in zip(values, counts, strict=True)}


def _load_teacher(order: WorkOrder, device: torch.device) -> Teacher:
    """The recipe's teacher: from the store, as on another machine there may be no other place, or from its URI."""
    try:
        return TeacherSource(order.store, order.recipe, trusts_recipe=True).load(device=device)
    except NoTeacher as error:  # by now it is the worker that fails, not the command line that is wrong
        raise UserError(str(error)) from error


def set_up_torch(*, threads: int, tf32: bool) -> None:
    """What holds for a whole worker process: workers keep the thread count that they are given."""
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32
    keep_buffers()


def keep_buffers() -> None:
    """Have glibc keep large buffers for the next call: else the kernel clears their pages every time."""
    if platform.libc_ver()[0] == "glibc":
        for option, value in ((M_MMAP_THRESHOLD, 1 << 30), (M_TRIM_THRESHOLD, 2**31 - 1)):
            ctypes.CDLL(None).mallopt(option, value)


def machine_of(device: torch.device, threads: int) -> dict[str, str]:
    """Where and with what numbers are computed."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    versions = {"torch": torch.__version__, "numpy": np.__version__, "python": platform.python_version()}
    return {"host": platform.node(), "device": f"{device} {name}", "threads": str(threads), **versions}

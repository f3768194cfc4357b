"""What a cluster costs: samples/s of `generate` with Ray workers against bare processes that only solve.

    python -m tests.benchmarks.generation [--rounds 3] [--tasks 40] [--long 220]

All in one run, on the built-in digits teacher: 31 calls a sample, 9 stored states, one CPU thread a worker. A bare
process loads the teacher and solves tasks; `generate` also encodes, checks, uploads and commits them. Rates are from
the first few tasks that end to the last, so that no start-up is in them; each round measures every contender once, and
the ratios to quote are of the same round. Memory is that of the Ray workers, from /proc, over the `--long` run.
"""

import argparse
import itertools
import multiprocessing
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from limbeck.diffusion.models.teachers import load_teacher
from limbeck.diffusion.recipes.devices import pick_device
from limbeck.pipeline.config import GenerateConfig
from limbeck.pipeline.recipe import build_recipe
from limbeck.pipeline.solve import denoise_of, solve_task
from limbeck.storage_schemas.command_line import parse
from limbeck.storage_schemas.commit import Task
from limbeck.storage_schemas.dataset import open_dataset
from limbeck.storage_schemas.store import Store
from tests.servers import BUCKET, seaweed

SHARD = 2048
SOLVE = f"--teacher builtin:digits --states 2 4 6 8 10 12 14 --samples-per-shard {SHARD} --micro-batch 256"
WARM = 4
"""Tasks whose end isn't counted: workers start one after the other."""


def bare(tasks: int, processes: int) -> float:
    """Samples/s of processes that solve and drop what they solved."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(processes) as pool:
        ends = pool.starmap(solve_only, [(first, tasks, processes) for first in range(processes)], chunksize=1)
    return rate(sorted(itertools.chain.from_iterable(ends)))


def solve_only(first: int, tasks: int, step: int) -> list[float]:
    """When each of every step-th task ended."""
    torch.set_num_threads(1)
    config = parse(GenerateConfig, [*SOLVE.split(), "--store", "unused", "--count", "1"], program="benchmark")
    teacher = load_teacher(config.teacher)
    recipe, device = build_recipe(config, teacher), pick_device("cpu")
    denoise = denoise_of(recipe, teacher.denoiser, device=device)
    ends = []
    for index in range(first, tasks, step):
        solve_task(recipe, denoise, teacher.process, Task("train", index, SHARD), device=device)
        ends.append(time.time())
    return ends


def generated(store: str, tasks: int, workers: int, environment: dict[str, str], watch: "Watch | None" = None) -> float:
    """Samples/s of `limbeck generate --runner ray`, from the times of its commits."""
    words = f"generate {SOLVE} --store {store} --count {tasks * SHARD} --holdout 0 --runner ray --workers {workers}"
    command = [sys.executable, "-m", "limbeck.pipeline", *words.split()]
    with subprocess.Popen(command, env=os.environ | environment, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            time.sleep(0.5)
            if watch:
                watch.look(process.pid)
    assert process.returncode == 0
    return rate(commit_times(store))


def commit_times(store: str) -> list[float]:
    """When each commit was written: to the nanosecond in a folder, to the second in a bucket."""
    files = list(Path(store).glob("recipes/*/*/commits/*.json"))
    if files:
        return sorted(file.stat().st_mtime for file in files)
    dataset = open_dataset(Store.open(store))
    return sorted(datetime.fromisoformat(dataset.commit(shard).committed_at).timestamp() for shard in dataset.table)


def rate(ends: list[float]) -> float:
    """Samples/s between the end of the first tasks and that of the last."""
    return SHARD * (len(ends) - WARM) / (ends[-1] - ends[WARM - 1])


class Watch:
    """Resident memory of the Ray workers below a process, MiB, over time."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def look(self, driver: int) -> None:
        parents = dict(_processes())
        workers = [pid for pid, (_, name) in parents.items() if name.startswith("ray::_Worker")]
        sizes = [_resident(pid) for pid in workers if driver in _line(pid, parents)]
        if len(sizes) == 2:
            self.seen.append(sum(sizes) / 2)

    def growth(self) -> tuple[float, float]:
        """Median of the second and of the last tenth of all looks: the first has the start in it."""
        tenth = max(1, len(self.seen) // 10)
        return statistics.median(self.seen[tenth : 2 * tenth]), statistics.median(self.seen[-tenth:])


def _processes() -> Iterator[tuple[int, tuple[int, str]]]:
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            yield int(folder.name), (parent, (folder / "cmdline").read_bytes().decode().strip("\0"))
        except (OSError, ValueError):
            continue


def _line(pid: int, parents: dict[int, tuple[int, str]]) -> Iterator[int]:
    while pid in parents:
        pid = parents[pid][0]
        yield pid


def _resident(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    match = re.search(r"VmRSS:\s+(\d+) kB", status)
    return int(match[1]) / 1024 if match else 0.0


@contextmanager
def folder(name: str) -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix=f"limbeck-{name}-") as path:
        yield f"{path}/store"


def contenders(tasks: int, bucket: str, s3: dict[str, str]) -> dict[str, Callable[[], float]]:
    """Name -> one measurement."""
    fresh = itertools.count()

    def on_a_folder(workers: int) -> float:
        with folder("bench") as store:
            return generated(store, tasks * workers // 2, workers, {})

    return {
        "2 bare processes": lambda: bare(tasks, 2),
        "generate, 2 Ray workers, folder": lambda: on_a_folder(2),
        "generate, 2 Ray workers, s3://": lambda: generated(f"{bucket}/{next(fresh)}", tasks, 2, s3),
        "1 bare process": lambda: bare(tasks // 2, 1),
        "generate, 1 Ray worker, folder": lambda: on_a_folder(1),
    }


def told(rates: dict[str, list[float]]) -> Table:
    """Medians over the rounds, and the ratio to two bare processes in the same round."""
    table = Table("", "samples/s", "of 2 bare processes", "range")
    for name, measured in rates.items():
        shares = [mine / theirs for mine, theirs in zip(measured, rates["2 bare processes"], strict=True)]
        spread = f"{min(shares):.1%} to {max(shares):.1%}"
        table.add_row(name, f"{statistics.median(measured):.0f}", f"{statistics.median(shares):.1%}", spread)
    return table


def main(arguments: Any) -> None:
    with tempfile.TemporaryDirectory(prefix="limbeck-s3-") as disk, seaweed(disk) as server:
        os.environ.update(server.environment)
        makers = contenders(arguments.tasks, f"s3://{BUCKET}/generation", server.environment)
        rates: dict[str, list[float]] = {name: [] for name in makers}
        for _ in range(arguments.rounds):
            for name, measure in makers.items():
                rates[name].append(measure())
                print(f"{name}: {rates[name][-1]:.0f} samples/s", file=sys.stderr)
    Console().print(told(rates))
    two, one = rates["generate, 2 Ray workers, folder"], rates["generate, 1 Ray worker, folder"]
    ratios = [many / single for many, single in zip(two, one, strict=True)]
    print(f"2 Ray workers against 1: {statistics.median(ratios):.2f}x")
    with folder("long") as store:
        watch = Watch()
        generated(store, arguments.long, 2, {}, watch)
        early, late = watch.growth()
    print(f"resident memory of a worker: {early:.0f} MiB early, {late:.0f} MiB after {arguments.long // 2} tasks each")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tasks", type=int, default=40, help="tasks of 2,048 samples in a measurement of 2 workers")
    parser.add_argument("--long", type=int, default=220, help="tasks of the run whose memory is watched")
    main(parser.parse_args())

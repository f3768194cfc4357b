"""Ours on a GPU: batches to the device against a plain pinned copy, and how long the steps of a fit wait."""

import statistics
import tempfile
import time
from collections.abc import Generator
from pathlib import Path

import torch

from tests.benchmarks.child import BATCH, FILLED, TIMED, rate
from tests.benchmarks.readers import ours
from tests.benchmarks.samples import COLUMNS, SHAPE, STATE_BYTES, make_store
from tests.benchmarks.waiting import on_a_folder

Batches = Generator[int, None, None]

FORMATS = ("parquet", "webdataset")
STUDENTS = {"the teacher's network": "", "a residual MLP of width 1024": "--init scratch --network.width 1024"}
STEPS = 1000


def main(samples: int, rounds: int, device: str) -> None:
    """Print both, in minutes."""
    print(torch.cuda.get_device_name(device))
    with tempfile.TemporaryDirectory(prefix="limbeck-bench-") as made:
        make_store(Path(made), samples)
        for columns in COLUMNS:
            streams(Path(made), columns, samples, rounds, device)
        for number, (name, options) in enumerate(STUDENTS.items()):
            (folder := Path(made, str(number))).mkdir()
            waited = on_a_folder(folder, samples, STEPS, "--device", device, *options.split())
            told = f"{waited.samples_per_s:,.0f} samples/s, first batch after {waited.first_batch_s:.3f} s, not counted"
            print(f"fit of {name} on digits: {waited.share:.2%} of the time waiting for data ({told})", flush=True)


def streams(folder: Path, columns: str, samples: int, rounds: int, device: str) -> None:
    """A line for each way to the device."""
    names = COLUMNS[columns]
    _tell(f"{columns}, pinned copy alone", names, [to_device(copies(names, device), samples) for _ in range(rounds)])
    for form in FORMATS:
        for verify in ("always", "first", "never"):
            rates = [
                to_device(ours.read(folder, names, BATCH, form=form, verify=verify, device=device), samples)
                for _ in range(rounds)
            ]
            _tell(f"{columns}, ours, {form}, verify {verify}", names, rates)


def copies(names: tuple[str, ...], device: str) -> Batches:
    """The same bytes from two pinned batches in turn: the limit."""
    pinned = [[torch.empty(BATCH, *SHAPE, dtype=torch.float16, pin_memory=True) for _ in names] for _ in range(2)]
    while True:
        for states in pinned * 16:
            for state in states:
                state.to(device, non_blocking=True)
            yield BATCH
        torch.cuda.synchronize(device)


def to_device(batches: Batches, samples: int) -> float:
    """Samples/s until all are there, after a pass that is not counted."""
    rate(batches, samples, FILLED)
    torch.cuda.synchronize()
    started = time.perf_counter()
    asked = rate(batches, samples, TIMED)
    seen = asked * (time.perf_counter() - started)
    torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    batches.close()
    return seen / seconds


def _tell(name: str, names: tuple[str, ...], rates: list[float]) -> None:
    middle, nbytes = statistics.median(rates), len(names) * STATE_BYTES + 8
    spread = f"{min(rates):,.0f} to {max(rates):,.0f}"
    print(f"{name}: {middle:,.0f} samples/s ({spread}), {middle * nbytes / 1e9:.2f} GB/s", flush=True)

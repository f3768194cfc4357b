"""How fast batches come: our stream on both formats against webdataset on the same tars and a gather from memmaps.

    python -m tests.benchmarks.stream [--samples 8192]

All in one run, in one process, on the same samples: five float16 states of 3x32x32 and a label, batches of 256,
shuffled. Rates are of a second pass, when files are in the page cache; ratios are to webdataset. The figures to quote
are the ratios: absolute ones follow the machine.
"""

import argparse
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import webdataset
from rich.console import Console
from rich.table import Table

from diffusion.gaussian import GaussianTeacher
from diffusion.process import VE
from pipeline.__main__ import COMMANDS
from storage_schemas.command_line import main
from storage_schemas.dataset import Dataset, open_dataset
from storage_schemas.store import Store
from trainer.shards import ShardSource
from trainer.stream import Stream

BATCH = 256
PAIR = ("noise", "output")
ALL = ("noise", "state_001", "state_002", "state_003", "output")


def teacher() -> GaussianTeacher:
    """A closed form at the size of small colour images: the bytes are what matters here."""
    made = GaussianTeacher(VE(), mean=0.0, variance=0.25)
    made.sample_shape = (3, 32, 32)  # type: ignore[assignment]
    return made


def make_store(folder: Path, form: str, samples: int) -> Dataset:
    """The samples in one format, by `generate` itself."""
    words = f"generate --teacher python:tests.benchmarks.stream:teacher --store {folder} --count {samples} --holdout 0"
    words += (
        f" --solver.name ddim --solver.steps 4 --states 1 2 3 --samples-per-shard 1024 --format {form} --runner local"
    )
    assert main("pipeline", COMMANDS, [*words.split(), "--runner", "local"]) == 0
    return open_dataset(Store.open(str(folder)))


def ours(dataset: Dataset, columns: tuple[str, ...]) -> Iterator[int]:
    """The trainer's stream: checksums checked as shards are read, batches made ahead in a thread."""
    source = ShardSource(dataset, "train", columns, cache_bytes=1 << 30)
    with Stream(source, batch_size=BATCH, seed=0) as stream:
        for batch in stream:
            yield len(batch)


def by_webdataset(dataset: Dataset, columns: tuple[str, ...]) -> Iterator[int]:
    """webdataset as its users write it, told to skip the members that are not needed."""
    urls = [dataset.store.local_path(shard.path) for shard in dataset.shards("train")]
    wanted = (*(f"{name}.npy" for name in columns), "json")
    while True:
        reader = webdataset.WebDataset(urls, shardshuffle=len(urls), select_files=lambda name: name.endswith(wanted))
        for batch in reader.shuffle(1000).decode().to_tuple(*wanted).batched(BATCH):
            yield len(batch[0])


def by_memmap(dataset: Dataset, columns: tuple[str, ...], folder: Path) -> Iterator[int]:
    """One .npy file a column, rows gathered by a shuffled index: no checks, no formats, no epochs to resume."""
    shards = list(dataset.shards("train"))
    for name in columns:
        if not (folder / f"{name}.npy").exists():
            np.save(folder / f"{name}.npy", np.concatenate([dataset.read(shard, [name])[name] for shard in shards]))
    arrays = [np.load(folder / f"{name}.npy", mmap_mode="r") for name in columns]
    generator = np.random.default_rng(0)
    while True:
        for rows in np.split(generator.permutation(len(arrays[0])), range(BATCH, len(arrays[0]), BATCH)):
            gathered = [torch.from_numpy(array[rows]) for array in arrays]
            yield len(gathered[0])


def rate(batches: Iterator[int], samples: int) -> float:
    """Samples a second over a pass of `samples`, after a first pass that is not counted."""
    for count in (samples, samples):
        seen, started = 0, time.perf_counter()
        while seen < count:
            seen += next(batches)
        seconds = time.perf_counter() - started
    return seen / seconds


def measure(samples: int, folder: Path) -> Table:
    """The table of every reader."""
    parquet, tars = (make_store(folder / form, form, samples) for form in ("parquet", "webdataset"))
    readers: dict[str, Callable[[tuple[str, ...]], Iterator[int]]] = {
        "webdataset": lambda columns: by_webdataset(tars, columns),
        "memmap gather": lambda columns: by_memmap(parquet, columns, folder),
        "ours, webdataset tars": lambda columns: ours(tars, columns),
        "ours, Parquet": lambda columns: ours(parquet, columns),
    }
    table = Table(title=f"{samples} samples, batches of {BATCH}: samples/s (ratio to webdataset)")
    for head in ("reader", "pair, 12 KiB", "all five states, 30 KiB"):
        table.add_column(head, justify="left" if head == "reader" else "right")
    base: list[float] = []
    for name, reader in readers.items():
        rates = [rate(reader(columns), samples) for columns in (PAIR, ALL)]
        base = base or rates
        table.add_row(name, *(f"{now:,.0f} ({now / first:.1f}x)" for now, first in zip(rates, base, strict=True)))
    return table


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=8192, help="samples to read a pass")
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="limbeck-bench-"))
    try:
        Console().print(measure(given.samples, folder))
    finally:
        shutil.rmtree(folder)

"""litdata on its own chunks."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import litdata
import torch
from litdata.streaming.writer import BinaryWriter

from tests.benchmarks.samples import every_sample

NAME = f"litdata {litdata.__version__}"


def write(folder: Path) -> None:
    """Chunks of 64 MB, its default, by the writer behind `optimize`."""
    writer = BinaryWriter(str(folder / "litdata"), chunk_bytes="64MB")
    for at, sample in enumerate(every_sample(folder)):
        writer[at] = {name: torch.from_numpy(value) if value.ndim else int(value) for name, value in sample.items()}
    writer.done()
    writer.merge()


class Wanted:
    """Only the columns that are asked for go into the batch."""

    def __init__(self, columns: tuple[str, ...]) -> None:
        self._columns = columns

    def __call__(self, sample: dict[str, Any]) -> dict[str, Any]:
        return {name: sample[name] for name in self._columns}


def read(folder: Path, columns: tuple[str, ...], batch: int, *, workers: int) -> Iterator[int]:
    """Its own shuffle of chunks and of the samples in them."""
    wanted = Wanted(("condition", *columns))
    samples = litdata.StreamingDataset(str(folder / "litdata"), shuffle=True, drop_last=False, transform=wanted)
    loader = litdata.StreamingDataLoader(samples, batch_size=batch, num_workers=workers)
    while True:
        for states in loader:
            yield len(states["condition"])

"""Hugging Face datasets: map style over mapped Arrow files, torch format."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import torch
from numpy.typing import NDArray
from torch.utils.data import BatchSampler, DataLoader, RandomSampler

from tests.benchmarks.samples import SHAPE, every_shard

datasets.disable_progress_bars()
NAME = f"datasets {datasets.__version__}"


def write(folder: Path) -> None:
    """`save_to_disk`, states as flat lists of a fixed length: nine times as fast to read as its Array3D."""
    tables = [pyarrow.table({name: _column(values) for name, values in shard.items()}) for shard in every_shard(folder)]
    datasets.Dataset(pyarrow.concat_tables(tables)).save_to_disk(folder / "datasets")


def _column(values: NDArray[Any]) -> pyarrow.Array:
    if values.ndim == 1:
        return pyarrow.array(values)
    return pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(values.reshape(-1)), math.prod(SHAPE))


def read(folder: Path, columns: tuple[str, ...], batch: int) -> Iterator[int]:
    """A DataLoader that asks for a batch of shuffled rows at a time, in this process."""
    samples = datasets.load_from_disk(folder / "datasets")
    samples = samples.with_format("torch", columns=["condition", *columns], dtype=torch.float16)
    sampler = BatchSampler(RandomSampler(samples), batch, drop_last=False)
    loader = DataLoader(samples, sampler=sampler, batch_size=None)
    while True:
        for states in loader:
            shaped = [states[name].view(-1, *SHAPE) for name in columns]
            yield len(shaped[0])

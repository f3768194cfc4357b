"""webdataset on our own tars, as its users write it, told to skip the members that are not needed."""

from collections.abc import Iterator
from pathlib import Path

import torch
import webdataset

from tests.benchmarks.samples import tar_paths

NAME = f"webdataset {webdataset.__version__}"


def read(folder: Path, columns: tuple[str, ...], batch: int, *, workers: int) -> Iterator[int]:
    """Batches made in the workers; shards shuffled, then samples in a buffer of 1,000."""
    urls, wanted = tar_paths(folder), (*(f"{name}.npy" for name in columns), "json")
    samples = webdataset.WebDataset(
        urls, shardshuffle=len(urls), select_files=lambda name: name.endswith(wanted), empty_check=False
    )
    batches = samples.shuffle(1000).decode().to_tuple(*wanted).map_tuple(*[torch.from_numpy] * len(columns), _label)
    loader = webdataset.WebLoader(batches.batched(batch), batch_size=None, num_workers=workers)
    while True:
        for states in loader:
            yield len(states[0])


def _label(record: dict[str, int]) -> int:
    return record["condition"]

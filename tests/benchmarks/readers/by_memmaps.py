"""A torch DataLoader over memory-mapped .npy files, with a batched index: no checks, no formats, nothing to resume."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from tests.benchmarks.samples import STATES, every_shard

NAME = "DataLoader over memmaps"


def write(folder: Path) -> None:
    """One .npy file a column, which SPDL's threads read, too."""
    if (folder / "memmaps").exists():
        return
    (folder / "memmaps").mkdir()
    shards = list(every_shard(folder))
    for name in ("condition", *STATES):
        np.save(folder / "memmaps" / f"{name}.npy", np.concatenate([shard[name] for shard in shards]))


class Memmaps(Dataset[Tensor]):
    """Rows of mapped columns, a whole batch a call."""

    def __init__(self, folder: Path, columns: tuple[str, ...]) -> None:
        self._arrays = [np.load(folder / "memmaps" / f"{name}.npy", mmap_mode="r") for name in columns]

    def __len__(self) -> int:
        return len(self._arrays[0])

    def __getitems__(self, rows: list[int]) -> list[Tensor]:
        return [torch.from_numpy(array[rows]) for array in self._arrays]


def read(folder: Path, columns: tuple[str, ...], batch: int, *, workers: int) -> Iterator[int]:
    """Rows shuffled anew each epoch."""
    samples = Memmaps(folder, ("condition", *columns))
    loader = DataLoader(samples, batch_size=batch, shuffle=True, num_workers=workers, collate_fn=_as_they_are)
    while True:
        for states in loader:
            yield len(states[0])


def _as_they_are(states: list[Tensor]) -> list[Tensor]:
    return states

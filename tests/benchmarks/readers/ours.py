"""Our reader: as the trainer has it, with a ring of buffers filled ahead; or in a DataLoader, with fresh ones."""

from collections.abc import Generator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from limbeck.trainer.reading.chunks import Reading
from limbeck.trainer.reading.shards import ShardSource
from limbeck.trainer.stream import Stream, TrajectoryStream
from tests.benchmarks.samples import opened

NAME = "ours"


def read(
    folder: Path,
    columns: tuple[str, ...],
    batch: int,
    *,
    form: str,
    verify: Any,
    loader: bool = False,
    device: str = "cpu",
) -> Generator[int, None, None]:
    """Batches of one of our formats: verify always, first or never."""
    dataset, reading = opened(folder, form), Reading(verify=verify)
    if loader:
        for rows in DataLoader(TrajectoryStream(dataset, columns, batch_size=batch, reading=reading), batch_size=None):
            yield len(rows["ids"])
    source = ShardSource(dataset, "train", columns, reading=reading)
    with Stream(source, batch_size=batch, seed=0, device=torch.device(device)) as stream:
        for made in stream:
            yield len(made)

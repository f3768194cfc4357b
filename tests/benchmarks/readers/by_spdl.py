"""SPDL's threads over the memory-mapped .npy files of by_memmaps: no checks, no formats, nothing to resume."""

from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import torch
from spdl.pipeline import PipelineBuilder

from tests.benchmarks.readers.by_memmaps import Memmaps, write

__all__ = ["NAME", "read", "write"]

NAME = f"SPDL {version('spdl-core')}"
_AHEAD = 3  # batches


def read(folder: Path, columns: tuple[str, ...], batch: int, *, workers: int) -> Iterator[int]:
    """So many threads index a batch each; rows shuffled anew each epoch."""
    samples = Memmaps(folder, ("condition", *columns))
    builder = PipelineBuilder().add_source(_shuffled(len(samples), batch))
    builder = builder.pipe(samples.__getitems__, concurrency=workers).add_sink(_AHEAD)
    pipeline = builder.build(num_threads=workers)
    with pipeline.auto_stop():
        for states in pipeline:
            yield len(states[0])


def _shuffled(count: int, batch: int) -> Iterator[list[int]]:
    while True:
        yield from (rows.tolist() for rows in torch.randperm(count).split(batch))

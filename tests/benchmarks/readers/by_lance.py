"""Lance: `take` of a batch of shuffled rows, of columns of float16 lists of a fixed length."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pyarrow
import torch
from numpy.typing import NDArray

from tests.benchmarks.samples import SHAPE, every_shard

NAME = f"Lance {lance.__version__}"


def write(folder: Path) -> None:
    """By its own writer, as it does by default."""
    tables = [pyarrow.table({name: _column(values) for name, values in shard.items()}) for shard in every_shard(folder)]
    lance.write_dataset(pyarrow.concat_tables(tables), folder / "lance")


def _column(values: NDArray[Any]) -> pyarrow.Array:
    if values.ndim == 1:
        return pyarrow.array(values)
    return pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(values.reshape(-1)), math.prod(SHAPE))


def read(folder: Path, columns: tuple[str, ...], batch: int) -> Iterator[int]:
    """Rows shuffled anew each epoch; Lance's own threads."""
    samples, rng = lance.dataset(folder / "lance"), np.random.default_rng(0)
    count = samples.count_rows()
    while True:
        for rows in np.array_split(rng.permutation(count), math.ceil(count / batch)):
            found = samples.take(rows, columns=["condition", *columns])
            shaped = [_tensor(found[name]) for name in columns]
            yield len(shaped[0])


def _tensor(column: pyarrow.ChunkedArray) -> torch.Tensor:
    return torch.from_numpy(column.combine_chunks().flatten().to_numpy()).view(-1, *SHAPE)

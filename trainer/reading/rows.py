"""Rows where they lie: copied by address, column by column, out of as many mapped files as a batch touches."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from storage_schemas.record import Field
from trainer.order import Ints

_ALIGNED = 128
"""Rows that all lie at multiples of so many bytes, or more, are copied faster in items of that size."""

_ITEM = 512
"""Bytes of an item at any address, at most: numpy lets other threads go on where it copies 500 items or more."""

_PIECE = 256 << 10
"""Bytes copied by one call from any address: numpy gathers into a temporary first, which should stay in the cache."""


@dataclass(frozen=True)
class Rows:
    """Rows that were opened and checked, ready to be copied: one entry for each id that was asked for.

    ids, condition: int64 [n]; an id that could not be read has given way to a substitute. guidance: float64 [n], the
    scale that each of these ids was solved at. addresses: column -> int64 [n], where each row's bytes begin. keep: what
    owns that memory. substituted: bool [n], where ids gave way.
    """

    ids: Ints
    condition: Ints
    guidance: NDArray[np.float64]
    addresses: dict[str, Ints]
    keep: Any
    substituted: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.ids)


def copy_rows(addresses: Ints, out: NDArray[np.uint8]) -> None:
    """The bytes at each address into its row of `out`, uint8 [n, row bytes], C-contiguous."""
    if not len(addresses):
        return
    start = int(addresses.min())
    offsets = addresses - start
    item = int(np.gcd.reduce(offsets, initial=out.shape[1]))
    if item >= _ALIGNED:
        _copy_aligned(start, offsets, out, item)
    else:
        _copy_scattered(start, offsets, out)


def _copy_aligned(start: int, offsets: Ints, out: NDArray[np.uint8], item: int) -> None:
    """Rows whose offsets are multiples of `item`, as all of a tar's are of 512: one gather, straight into `out`."""
    in_row = out.shape[1] // item
    memory = _memory(start, int(offsets.max()) // item + in_row, item, stride=item)
    items = (offsets // item)[:, None] + np.arange(in_row)
    # Every index is in range. The default mode would look for one that is not, and so gather into a temporary first.
    np.take(memory, items.ravel(), out=out.reshape(-1).view(memory.dtype), mode="clip")


def _copy_scattered(start: int, offsets: Ints, out: NDArray[np.uint8]) -> None:
    """Rows at any offset, out of an array that has an item at every byte, so that an index is an address."""
    nbytes = out.shape[1]
    item = _item_bytes(nbytes)
    memory = _memory(start, int(offsets.max()) + nbytes - item + 1, item, stride=1)
    items = (offsets[:, None] + np.arange(0, nbytes, item)).ravel()
    target = out.reshape(-1).view(memory.dtype)
    for first in range(0, len(items), _PIECE // item):
        piece = slice(first, first + _PIECE // item)
        target[piece] = memory[items[piece]]


@cache
def _item_bytes(nbytes: int) -> int:
    return next(size for size in range(min(nbytes, _ITEM), 0, -1) if nbytes % size == 0)


def as_tensor(buffer: NDArray[np.uint8], field: Field) -> Tensor:
    """The same memory, uint8 [n, nbytes], as [n, *shape] in the field's dtype; bfloat16's raw bits become numbers."""
    return torch.from_numpy(buffer.reshape(-1)).view(getattr(torch, field.dtype)).view(len(buffer), *field.shape)


def gathered(rows: Rows, fields: Sequence[Field]) -> tuple[Tensor, dict[str, Tensor]]:
    """(condition int64 [n], states [n, ...] in the storage dtype) in fresh memory."""
    states: dict[str, Tensor] = {}
    for field in fields:
        buffer = np.empty((len(rows), field.nbytes), np.uint8)
        copy_rows(rows.addresses[field.name], buffer)
        states[field.name] = as_tensor(buffer, field)
    return torch.from_numpy(rows.condition.copy()), states


def _memory(start: int, length: int, item: int, *, stride: int) -> NDArray[np.void]:
    """`length` items of the process's memory from the address `start` on, one every `stride` bytes."""
    return np.asarray(_Memory(start, length, item, stride))


class _Memory:
    """What numpy needs to know of memory that it does not own."""

    def __init__(self, start: int, length: int, item: int, stride: int) -> None:
        self.__array_interface__ = {
            "version": 3, "data": (start, True), "shape": (length,), "strides": (stride,), "typestr": f"|V{item}",
        }  # fmt: skip

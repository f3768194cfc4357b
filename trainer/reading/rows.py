"""Rows where they lie: copied by address, column by column, out of as many mapped files as a batch touches."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from limbeck.storage_schemas.record import Field
from limbeck.trainer.reading.order import Ints

_ITEM = 16 << 10
"""Bytes copied at once, at most: torch hands pieces of less than 32 KiB straight to memcpy."""


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
    nbytes = out.shape[1]
    item = _item_bytes(nbytes)
    start = int(addresses.min())
    items = (addresses[:, None] - start + np.arange(0, nbytes, item)).ravel()
    # An item begins at every byte, so that an index is an address. Torch's gather takes such an array and writes
    # straight into `out`; numpy's would go by way of a temporary.
    last = int(items.max())
    memory = torch.from_numpy(np.asarray(_Memory(start, last + item))).as_strided((last + 1, item), (1, 1))
    torch.index_select(memory, 0, torch.from_numpy(items), out=torch.from_numpy(out.reshape(-1, item)))


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


class _Memory:
    """An array interface to memory that numpy does not own; torch would warn of memory that is only for reading."""

    def __init__(self, start: int, length: int) -> None:
        self.__array_interface__ = {"version": 3, "data": (start, False), "shape": (length,), "typestr": "|u1"}

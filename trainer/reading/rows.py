"""Rows where they lie: copied by address, out of as many mapped files as a batch touches, by one call a column."""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from storage_schemas.record import Field
from trainer.order import Ints

_LONG = 64 << 10
"""Bytes of a row from which on one call a row costs nothing; shorter rows times any address fit 63 bits."""


@dataclass(frozen=True)
class Rows:
    """Rows that were opened and checked, ready to be copied: one entry for each id that was asked for.

    ids, condition: int64 [n]; an id that could not be read has given way to a substitute. addresses: column -> int64
    [n], where each row's bytes begin. keep: what owns that memory. substituted: bool [n], where ids gave way.
    """

    ids: Ints
    condition: Ints
    addresses: dict[str, Ints]
    keep: Any
    substituted: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.ids)


def copy_rows(addresses: Ints, out: NDArray[np.uint8]) -> None:
    """The bytes at each address into its row of `out`, uint8 [n, row bytes], C-contiguous. Other threads may go on."""
    nbytes = out.shape[1]
    if nbytes > _LONG:
        for row, address in zip(out, addresses.tolist(), strict=True):
            ctypes.memmove(row.ctypes.data, address, nbytes)
    elif len(addresses):
        lowest, highest = int(addresses.min()), int(addresses.max())
        memory = torch.from_numpy(np.asarray(_Memory(lowest, highest - lowest + 1, nbytes)))
        torch.index_select(memory, 0, torch.from_numpy(addresses - lowest), out=torch.from_numpy(out))


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
    """The process's memory as an array with a row at every byte, so that an index is an address: [length, nbytes]."""

    def __init__(self, start: int, length: int, nbytes: int) -> None:
        self.__array_interface__ = {
            "version": 3, "data": (start, False), "shape": (length, nbytes), "strides": (1, 1), "typestr": "|u1",
        }  # fmt: skip

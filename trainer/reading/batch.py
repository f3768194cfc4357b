"""Batches and the buffers that they are made in: a ring on the host, pinned with copies beside it for a GPU."""

import math
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from limbeck.storage_schemas.record import Field

_TORCH_DTYPES = {name: getattr(torch, name) for name in ("float16", "bfloat16", "float32", "int64", "int32")}

_ALIGNED = 64


@dataclass(frozen=True)
class Batch:
    """Rows of the run; of a global batch, the rank's own.

    positions: int64 [B], each row's place in the whole run: samples consumed before its global batch, plus its place
    in that. ids, condition: int64 [B], condition -1 for none. states: column -> [B, *sample_shape] in the storage
    dtype, or float32; of segments also start_index, int32 [B]. uniforms: float64 [B, n] in (0, 1), the objective's own
    random numbers, a function of (seed, position). guidance: float64 [B], the scale that each row was solved at; 1 is
    the conditional model.
    """

    positions: Tensor
    ids: Tensor
    condition: Tensor
    states: dict[str, Tensor]
    uniforms: Tensor
    guidance: Tensor

    def __len__(self) -> int:
        return len(self.ids)

    def each(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        """The batch of `change` of each tensor."""
        return Batch(
            positions=change(self.positions),
            ids=change(self.ids),
            condition=change(self.condition),
            states={name: change(state) for name, state in self.states.items()},
            uniforms=change(self.uniforms),
            guidance=change(self.guidance),
        )

    def to(self, device: torch.device) -> "Batch":
        """The batch on `device`, states in float32 there; a segment's place on the grid stays an integer."""
        there = self.each(lambda tensor: tensor.to(device))
        states = {name: x.float() if x.is_floating_point() else x for name, x in there.states.items()}
        return replace(there, states=states)

    def split(self, size: int) -> Iterator["Batch"]:
        """Micro-batches of `size` rows."""
        for start in range(0, len(self), size):
            yield self._rows(slice(start, start + size))

    def _rows(self, rows: slice) -> "Batch":
        return self.each(lambda tensor: tensor[rows])


@dataclass(frozen=True)
class BatchShape:
    """The layout of a batch: rows, state columns, uniform numbers of each row."""

    rows: int
    fields: tuple[Field, ...]
    num_uniforms: int

    @property
    def nbytes(self) -> int:
        """Bytes of one batch."""
        return self._sections[-1].past

    def empty(self, *, pinned: bool = False) -> "Packed":
        """New memory for one."""
        return self.over(torch.empty(self.nbytes, dtype=torch.uint8, pin_memory=pinned))

    def over(self, memory: Tensor) -> "Packed":
        """The batch that lies in these bytes, uint8 [nbytes]."""
        positions, ids, condition, guidance, uniforms, *states = (section.of(memory) for section in self._sections)
        named = {field.name: state for field, state in zip(self.fields, states, strict=True)}
        return Packed(memory, Batch(positions, ids, condition, named, uniforms, guidance))

    @cached_property
    def _sections(self) -> list["_Section"]:
        rows, sections = self.rows, list[_Section]()
        plain = [(torch.int64, (rows,))] * 3 + [(torch.float64, (rows,)), (torch.float64, (rows, self.num_uniforms))]
        for dtype, shape in [*plain, *((_TORCH_DTYPES[field.dtype], (rows, *field.shape)) for field in self.fields)]:
            start = -(-sections[-1].past // _ALIGNED) * _ALIGNED if sections else 0
            sections.append(_Section(start, dtype, shape))
        return sections


@dataclass(frozen=True)
class Packed:
    """A batch in one piece of memory, so that one copy takes it to a device."""

    memory: Tensor
    batch: Batch

    @cached_property
    def host(self) -> "Host":
        """The same memory as arrays to fill."""
        batch = self.batch
        return Host(
            positions=batch.positions.numpy(),
            ids=batch.ids.numpy(),
            condition=batch.condition.numpy(),
            guidance=batch.guidance.numpy(),
            uniforms=batch.uniforms.numpy(),
            states={name: _raw_rows(state) for name, state in batch.states.items()},
        )


class Host(NamedTuple):
    """A batch's arrays; states as bytes, uint8 [B, row bytes]."""

    positions: NDArray[np.int64]
    ids: NDArray[np.int64]
    condition: NDArray[np.int64]
    guidance: NDArray[np.float64]
    uniforms: NDArray[np.float64]
    states: dict[str, NDArray[np.uint8]]


def _raw_rows(state: Tensor) -> NDArray[np.uint8]:
    width = state.element_size() * math.prod(state.shape[1:])
    return state.view(-1).view(torch.uint8).view(-1, width).numpy()


class _Section(NamedTuple):
    """A tensor's place in a batch's memory."""

    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def past(self) -> int:
        return self.start + self.dtype.itemsize * math.prod(self.shape)

    def of(self, memory: Tensor) -> Tensor:
        return memory[self.start : self.past].view(self.dtype).view(self.shape)


class Ring:
    """Batches in host memory, each filled again once it was given back; with `fresh` none is, and each is new.

    The one that was given back last is filled first: its memory is in the processor's caches.
    """

    def __init__(self, shape: BatchShape, *, fresh: bool) -> None:
        self._shape, self._fresh, self._free = shape, fresh, list[Packed]()

    def take(self) -> Packed:
        """Memory to fill."""
        return self._free.pop() if self._free else self._shape.empty()

    def send(self, filled: Packed) -> Packed:
        """The filled batch as it is handed out."""
        return filled

    def receive(self, packed: Packed) -> Batch:
        """The batch to use; call it in the thread that uses it."""
        return packed.batch

    def give_back(self, packed: Packed) -> None:
        if not self._fresh:
            self._free.append(packed)

    def close(self) -> None:
        self._free.clear()


class DeviceRing:
    """Two pinned batches, filled in turn and copied to new memory of a GPU, on a stream of their own."""

    def __init__(self, shape: BatchShape, device: torch.device) -> None:
        self._shape, self._stream = shape, torch.cuda.Stream(device)
        # By its number: another thread's "cuda" may be another device.
        self._device = self._stream.device
        self._pinned: deque[tuple[Packed, torch.cuda.Event]] = deque()
        self._copied: deque[torch.cuda.Event] = deque()

    def take(self) -> Packed:
        """Pinned memory to fill, once its last copy is done."""
        if len(self._pinned) < 2:
            with torch.cuda.device(self._device):
                return self._shape.empty(pinned=True)
        pinned, copied = self._pinned.popleft()
        copied.synchronize()
        return pinned

    def send(self, filled: Packed) -> Packed:
        """Begin the copy: the batch on the device, not there yet."""
        copied = torch.cuda.Event(blocking=True)
        with torch.cuda.stream(self._stream):
            there = self._shape.over(filled.memory.to(self._device, non_blocking=True))
            copied.record()
        self._pinned.append((filled, copied))
        self._copied.append(copied)
        return there

    def receive(self, packed: Packed) -> Batch:
        """Batches come in the order they were sent in: what follows on the current stream waits for the copy."""
        current = torch.cuda.current_stream(self._device)
        current.wait_event(self._copied.popleft())
        # Else its memory could be filled again while the step that used it is still running.
        packed.memory.record_stream(current)
        return packed.batch

    def give_back(self, packed: Packed) -> None:
        """No-op: its memory goes with it."""

    def close(self) -> None:
        self._stream.synchronize()
        self._pinned.clear()
        self._copied.clear()

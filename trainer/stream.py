"""Batches in the order of order.py, made ahead of the step in a thread.

A source gathers rows by sample id; the stream decides which rows, and its state is a few integers and the digest of
the content. An epoch's remainder is carried into the next epoch's first batch: nothing is dropped, padded or repeated
silently.
"""

import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from diffusion import noise
from storage_schemas.errors import ManifestMismatch
from storage_schemas.ids import IdSet, id_set
from trainer.order import Ints, epoch_order


@dataclass(frozen=True)
class Batch:
    """Rows at positions [first, first + B) of the whole run.

    states: column name -> [B, *sample_shape] in the storage dtype, or float32; condition: int64 [B], -1 for none;
    uniforms: float64 [B, n] in (0, 1), the objective's own random numbers, a function of (seed, position).
    """

    first: int
    ids: Tensor
    condition: Tensor
    states: dict[str, Tensor]
    uniforms: Tensor

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in (self.ids, self.condition, self.uniforms, *self.states.values()))

    def to(self, device: torch.device) -> "Batch":
        """On `device`, states in float32 there."""
        states = {name: state.to(device).float() for name, state in self.states.items()}
        return replace(self, condition=self.condition.to(device), uniforms=self.uniforms.to(device), states=states)

    def split(self, size: int) -> Iterator["Batch"]:
        """Micro-batches of `size` rows."""
        for start in range(0, len(self), size):
            rows = slice(start, start + size)
            yield Batch(
                first=self.first + start,
                ids=self.ids[rows],
                condition=self.condition[rows],
                states={name: state[rows] for name, state in self.states.items()},
                uniforms=self.uniforms[rows],
            )


class Source(Protocol):
    """Samples by id."""

    ids: IdSet
    digest: str

    def gather(self, ids: Ints) -> tuple[Tensor, dict[str, Tensor]]:
        """(condition [B], states) of existing ids, in their order."""


@dataclass(frozen=True)
class Cursor:
    """Where a stream stands: `position` samples into `epoch`, `consumed` samples in all."""

    epoch: int = 0
    position: int = 0
    consumed: int = 0


class Stream:
    """An endless iterator of batches over one source. `close` it, or use it as a context manager."""

    def __init__(
        self,
        source: Source,
        *,
        batch_size: int,
        seed: int,
        num_uniforms: int = 0,
        ahead_bytes: int = 64 << 20,
        state: dict[str, Any] | None = None,
    ) -> None:
        if source.ids.count == 0:
            raise ManifestMismatch("the dataset holds no samples in this split: generate some with --count")
        self._source, self._batch_size, self._seed, self._num_uniforms = source, batch_size, seed, num_uniforms
        self._cursor = self._resumed(state) if state else Cursor()
        self.waited = 0.0
        self._ahead = _Ahead(self._batches(self._cursor), ahead_bytes)

    def __iter__(self) -> "Stream":
        return self

    def __next__(self) -> Batch:
        started = time.perf_counter()
        batch, self._cursor = self._ahead.get()
        self.waited += time.perf_counter() - started
        return batch

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the thread."""
        self._ahead.close()

    @property
    def epochs(self) -> float:
        """How often the samples have been seen, so far."""
        return self._cursor.epoch + self._cursor.position / self._source.ids.count

    def state_dict(self) -> dict[str, Any]:
        """What a later stream needs to give the batches that come after the last one given."""
        cursor = self._cursor
        return {
            "content_digest": self._source.digest,
            "seed": self._seed,
            "epoch": cursor.epoch,
            "position": cursor.position,
            "consumed": cursor.consumed,
        }

    def _resumed(self, state: dict[str, Any]) -> Cursor:
        for name, now in (("content_digest", self._source.digest), ("seed", self._seed)):
            if state[name] != now:
                told = f"{name} {str(state[name])[:12]}, this stream has {str(now)[:12]}"
                raise ManifestMismatch(f"this run was reading other samples ({told}): give its --manifest and --seed")
        return Cursor(state["epoch"], state["position"], state["consumed"])

    def _batches(self, cursor: Cursor) -> Iterator[tuple[Batch, Cursor]]:
        while True:
            ids, later = next_ids(self._source, self._batch_size, seed=self._seed, cursor=cursor)
            condition, states = self._source.gather(ids)
            positions = np.arange(cursor.consumed, later.consumed)
            uniforms = objective_uniforms(self._seed, positions, self._num_uniforms)
            yield Batch(cursor.consumed, torch.from_numpy(ids), condition, states, uniforms), later
            cursor = later


def next_ids(source: Source, batch_size: int, *, seed: int, cursor: Cursor) -> tuple[Ints, Cursor]:
    """The next `batch_size` ids and where that leaves the cursor, over as many ends of epochs as it takes."""
    pieces, epoch, position, needed = [], cursor.epoch, cursor.position, batch_size
    while needed:
        order = epoch_order(source.ids, source.digest, seed, epoch)
        piece = order.slice(position, min(position + needed, order.count))
        pieces.append(piece)
        needed, position = needed - len(piece), position + len(piece)
        if position == order.count:
            epoch, position = epoch + 1, 0
    return np.concatenate(pieces), Cursor(epoch, position, cursor.consumed + batch_size)


def objective_uniforms(seed: int, positions: Ints, size: int) -> Tensor:
    """`size` numbers in (0, 1) for each position of the run, from the counter-based generator: float64 [B, size]."""
    if not size:
        return torch.empty(len(positions), 0, dtype=torch.float64)
    return torch.from_numpy(noise.uniform(seed, "train", positions, purpose="objective", size=size))


class ArraySource:
    """Images in memory as a source: the column `output` and their labels; ids are rows."""

    def __init__(self, images: Tensor, labels: Tensor, digest: str) -> None:
        self.ids = id_set(0, len(images), [])
        self.digest = digest
        self._images, self._labels = images, labels

    def gather(self, ids: Ints) -> tuple[Tensor, dict[str, Tensor]]:
        rows = torch.from_numpy(ids)
        return self._labels[rows], {"output": self._images[rows]}


class _Ahead:
    """Runs an iterator of batches in a thread, at most `limit` bytes (and at least one batch) ahead."""

    def __init__(self, batches: Iterator[tuple[Batch, Cursor]], limit: int) -> None:
        self._ready: queue.Queue[tuple[Batch, Cursor] | BaseException] = queue.Queue()
        self._room = threading.Condition()
        self._held, self._limit, self._closed = 0, limit, False
        self._thread = threading.Thread(target=self._run, args=(batches,), daemon=True, name="stream")
        self._thread.start()

    def get(self) -> tuple[Batch, Cursor]:
        item = self._ready.get()
        if isinstance(item, BaseException):
            self._ready.put(item)
            raise item
        self._hold(-item[0].nbytes)
        return item

    def close(self) -> None:
        with self._room:
            self._closed = True
            self._room.notify_all()
        self._thread.join()

    def _run(self, batches: Iterator[tuple[Batch, Cursor]]) -> None:
        try:
            for batch in batches:
                self._hold(batch[0].nbytes)
                self._ready.put(batch)
                if not self._wait_for_room():
                    return
        except BaseException as error:  # told to the reader, whose step it ends
            self._ready.put(error)

    def _hold(self, nbytes: int) -> None:
        with self._room:
            self._held += nbytes
            self._room.notify_all()

    def _wait_for_room(self) -> bool:
        with self._room:
            self._room.wait_for(lambda: self._closed or self._held < self._limit)
            return not self._closed

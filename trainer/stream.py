"""Batches in the order of order.py, made ahead of the step in two threads.

One thread loads windows: the rows of this rank's lanes, read and checked, one window ahead of the one that batches are
made of. The other copies rows into batches, up to a number of bytes ahead. The state is a few integers and the digest
of the content. An epoch's remainder is carried into the next epoch's first batch: nothing is dropped, padded or
repeated silently.
"""

import pickle
import sys
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.utils.data import IterableDataset, get_worker_info

from limbeck.storage_schemas.dataset import Dataset, open_dataset
from limbeck.storage_schemas.ids import merge_ranges
from limbeck.storage_schemas.record import Split
from limbeck.storage_schemas.store import Store
from limbeck.trainer.reading.ahead import Ahead
from limbeck.trainer.reading.batch import Batch, BatchShape, DeviceRing, Packed, Ring
from limbeck.trainer.reading.chunks import Reading
from limbeck.trainer.reading.content import ArraySource, Cursor, Source, check_division, resumed, start
from limbeck.trainer.reading.filler import Filler, Follow, LoadedWindow, Made, load_windows, objective_uniforms
from limbeck.trainer.reading.shards import ShardSource

__all__ = ["ArraySource", "Batch", "Source", "Stream", "TrajectoryStream", "objective_uniforms"]

Gather = Callable[[dict[str, Any]], list[dict[str, Any]]]

_CPU, _READING = torch.device("cpu"), Reading()
_PATIENCE = 1.0  # seconds that `close` waits for a read that has begun; for a copy more


class Stream:
    """An endless iterator of this rank's part of the global batches. `close` it, or use it as a context manager.

    A batch is valid until the next one is asked for, when its memory is filled again; with `fresh` it is the caller's.
    Memory: `ahead_bytes` (at least one batch), the batch being filled and the one given. On a GPU the copies run on a
    stream of their own, from pinned memory, and tensors are there in the storage dtype.

    batch_size: the global batch's. lanes, block: the order's; a run that goes on has its state's. turn (w, W): only
    every W-th global batch from the w-th on. follow: asked in the loading thread at each later epoch's start for a
    source to go over to; every rank must answer the same. ValueError: ranks, lanes and batch that do not divide.
    ManifestMismatch: no samples, or a state of other content, seed, lanes or block.
    """

    def __init__(
        self,
        source: Source,
        *,
        batch_size: int,
        seed: int,
        lanes: int | None = None,
        block: int | None = None,
        num_uniforms: int = 0,
        rank: int = 0,
        world_size: int = 1,
        turn: tuple[int, int] = (0, 1),
        ahead_bytes: int = 64 << 20,
        device: torch.device = _CPU,
        fresh: bool = False,
        follow: Follow | None = None,
        state: dict[str, Any] | None = None,
    ) -> None:
        self._given = start(source, state, batch_size=batch_size, seed=seed, lanes=lanes, block=block)
        num_lanes = self._given.lanes.lanes
        check_division(batch_size, num_lanes, world_size)
        self._earlier = state or {"substituted": 0, "unreadable": []}
        source.exclude(self._earlier["unreadable"])
        rows, per_rank = batch_size // num_lanes, num_lanes // world_size
        shape = BatchShape(rows * per_rank, source.fields, num_uniforms)
        self._ring = DeviceRing(shape, device) if device.type == "cuda" else Ring(shape, fresh=fresh)
        self._in_hand: Packed | None = None
        self._substituted = 0
        self.waited = 0.0
        """Seconds that batches were waited for, but the first."""
        self.first_wait: float | None = None
        """Seconds from the call for the first batch to having it."""
        mine = range(rank * per_rank, (rank + 1) * per_rank)
        windows = load_windows(self._given, mine, follow=follow, block=block)
        self._windows = Ahead(windows, limit=1, name="stream loader")
        filler = Filler(self._windows, self._ring, batch_size=batch_size, first=rank * shape.rows, turn=turn)
        ready = max(1, ahead_bytes // shape.nbytes)
        self._batches = Ahead(filler.batches(self._given), limit=ready + 1, name="stream filler")
        # Runs once: by `close`, when the stream is dropped, or as the program ends: the interpreter would stop a thread
        # within numpy's C++, which aborts.
        self._finish = weakref.finalize(self, _finish, self._windows, self._batches, self._ring)

    def __iter__(self) -> "Stream":
        return self

    def __next__(self) -> Batch:
        if self._in_hand is not None:
            self._ring.give_back(self._in_hand)
            self._in_hand = None
        began = time.perf_counter()
        made = self._batches.get()
        self._in_hand, batch = made.batch, self._ring.receive(made.batch)
        self._note_wait(time.perf_counter() - began)
        self._given, self._substituted = made.after, self._substituted + made.substituted
        return batch

    def _note_wait(self, seconds: float) -> None:
        if self.first_wait is None:
            self.first_wait = seconds
        else:
            self.waited += seconds

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End the threads and free the buffers; the state can still be asked for."""
        self._finish()

    @property
    def epochs(self) -> float:
        """Epochs so far: number of passes over the samples."""
        return self._given.epochs

    def state_dict(self, gather: Gather = lambda mine: [mine]) -> dict[str, Any]:
        """A state that gives the batches after the last one given, on any number of ranks.

        gather: this rank's small object -> every rank's; then call it on every rank, and all have the same state.
        """
        cursor = self._given
        every = gather({"substituted": self._substituted, "unreadable": cursor.source.unreadable})
        unreadable = [part for mine in every for part in mine["unreadable"]]
        ids = cursor.lanes.ids
        return cursor.state() | {
            "substituted": self._earlier["substituted"] + sum(mine["substituted"] for mine in every),
            "unreadable": merge_ranges(unreadable, ids.start, ids.stop).tolist(),
        }


def _finish(windows: Ahead[LoadedWindow], batches: Ahead[Made], ring: Ring | DeviceRing) -> None:
    windows.close(timeout=_PATIENCE)
    batches.close(timeout=10 * _PATIENCE)
    ring.close()


class TrajectoryStream(IterableDataset[dict[str, Tensor]]):
    """The same batches for any training loop: `DataLoader(TrajectoryStream(...), batch_size=None)`.

    Yields this rank's part of each global batch, in new memory: ids and condition int64 [B], guidance float64 [B] (the
    scale that each was solved at), each of `columns` [B, *sample_shape] in the storage dtype. Endless; with `epochs`,
    an iteration ends with the batch that completes that many, and the next goes on from there.

    data: a store's URI, of which `dataset` and `manifest` (None: the latest) are opened, or a Dataset. rank,
    world_size: those of torch.distributed where it is set up already, else one rank. Worker w of W of a DataLoader
    yields every W-th batch from the w-th on, which the DataLoader puts in order; workers make it no faster, as it
    reads ahead in threads. Only persistent workers know where the last iteration ended: others begin at this
    process's state again.
    """

    def __init__(
        self,
        data: str | Dataset,
        columns: Sequence[str] = ("noise", "output"),
        *,
        batch_size: int,
        seed: int = 0,
        epochs: int | None = None,
        dataset: str = "main",
        manifest: int | None = None,
        split: Split = "train",
        rank: int | None = None,
        world_size: int | None = None,
        lanes: int | None = None,
        reading: Reading = _READING,
        ahead_bytes: int = 64 << 20,
    ) -> None:
        opened = data if isinstance(data, Dataset) else open_dataset(Store.open(data), dataset, manifest)
        self._source = ShardSource(opened, split, columns, reading=reading, seed=seed)
        together = dist.is_available() and dist.is_initialized()
        self._rank = rank if rank is not None else dist.get_rank() if together else 0
        self._world_size = world_size if world_size is not None else dist.get_world_size() if together else 1
        self._batch_size, self._seed, self._epochs, self._ahead_bytes = batch_size, seed, epochs, ahead_bytes
        first = start(self._source, None, batch_size=batch_size, seed=seed, lanes=lanes, block=None)
        check_division(batch_size, first.lanes.lanes, self._world_size)
        self._state = first.state() | {"substituted": 0, "unreadable": []}

    def state_dict(self, batches: int | None = None) -> dict[str, Any]:
        """A state that gives the batches after the last one given, on any number of ranks and workers.

        Of samples that could not be read it has this rank's own. batches: after that many of this size since the
        run's very first, instead: a pure function, for callers that know how many were used where others were
        fetched ahead, as by a DataLoader's workers.
        """
        if batches is None:
            return self._state
        order = resumed(self._source, self._state, seed=self._seed).lanes
        return self._state | Cursor(self._source, order).after(batches, self._batch_size).state()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state. ManifestMismatch if it is of other content or of another seed."""
        order = resumed(self._source, state, seed=self._seed).lanes
        check_division(self._batch_size, order.lanes, self._world_size)
        self._state = state

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        worker = get_worker_info()
        turn = which, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        # A source that came by a fork shares its connections with the parent process.
        source = pickle.loads(pickle.dumps(self._source)) if worker else self._source
        begun, length = resumed(source, self._state, seed=self._seed), self._length()
        with Stream(
            source, batch_size=self._batch_size, seed=self._seed, rank=self._rank, world_size=self._world_size,
            turn=turn, ahead_bytes=self._ahead_bytes, fresh=True, state=self._state,
        ) as stream:  # fmt: skip
            for number in range(which, length, workers):
                batch = next(stream)
                # Workers that go on from their states begin a round together.
                past = min((number // workers + 1) * workers, length)
                self._state = stream.state_dict() | begun.after(past, self._batch_size).state()
                yield {"ids": batch.ids, "condition": batch.condition, "guidance": batch.guidance, **batch.states}
            self._state = self._state | begun.after(length, self._batch_size).state()

    def _length(self) -> int:
        """Batches until the next multiple of `epochs` epochs is complete."""
        if self._epochs is None:
            return sys.maxsize
        cursor = resumed(self._source, self._state, seed=self._seed)
        epoch = cursor.lanes.epoch_at(cursor.row)
        end = cursor.lanes.epoch_start((epoch // self._epochs + 1) * self._epochs)
        return -(-(end - cursor.row) * cursor.lanes.lanes // self._batch_size)

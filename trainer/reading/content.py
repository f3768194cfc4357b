"""A stream's source of samples, their order, and its cursor, which is saved as integers."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from limbeck.storage_schemas.errors import ManifestMismatch
from limbeck.storage_schemas.ids import IdSet, id_set
from limbeck.storage_schemas.record import Field
from limbeck.trainer.reading.order import WINDOW, Ints, Lanes, default_block, default_lanes, default_window
from limbeck.trainer.reading.rows import Rows


class Source(Protocol):
    """Samples by id.

    digest: the content's; another layout of the same samples has the same. fields: the state columns. row_bytes: size
    of a sample with all that is stored of it. place: what opens it again, written into the state. unreadable: sorted
    [first, past) ranges of ids that are known to be unreadable, found by now or excluded.
    """

    ids: IdSet
    digest: str
    fields: tuple[Field, ...]
    row_bytes: int
    place: dict[str, Any]

    @property
    def unreadable(self) -> list[list[int]]: ...

    def load(self, ids: Ints) -> Rows:
        """Rows of existing ids in any order, read and checked. Called in a thread, ahead of their use."""

    def exclude(self, ranges: Sequence[Sequence[int]]) -> None:
        """Treat these ids as unreadable from the outset."""


class ArraySource:
    """Images in memory as a source: the column `output` and their labels; ids are rows."""

    def __init__(self, images: Tensor, labels: Tensor, digest: str) -> None:
        self._images, self._labels = images.contiguous(), labels.numpy()
        dtype = str(images.dtype).removeprefix("torch.")
        self.ids, self.digest, self.place = id_set(0, len(images), []), digest, dict[str, Any]()
        self.fields: tuple[Field, ...] = (Field("output", tuple(images.shape[1:]), dtype),)
        self.row_bytes = self.fields[0].nbytes

    @property
    def unreadable(self) -> list[list[int]]:
        return []

    def load(self, ids: Ints) -> Rows:
        return Rows(
            ids=ids,
            condition=self._labels[ids],
            guidance=np.ones(len(ids)),
            addresses={"output": self._images.data_ptr() + ids * self.fields[0].nbytes},
            keep=self._images,
            substituted=np.zeros(len(ids), dtype=bool),
        )

    def exclude(self, ranges: Sequence[Sequence[int]]) -> None:
        assert not ranges


@dataclass(frozen=True)
class Cursor:
    """Where a stream stands: before `row` of each lane over a source.

    consumed: samples of the whole run. left_out: samples carried over the end of an epoch at which other content
    came, fewer than there are lanes each time.
    """

    source: Source
    lanes: Lanes
    row: int = 0
    consumed: int = 0
    left_out: int = 0

    @property
    def epochs(self) -> float:
        """Epochs seen: number of passes over the samples."""
        return self.lanes.first_epoch + self.row * self.lanes.lanes / self.lanes.ids.count

    def after(self, batches: int, batch_size: int) -> "Cursor":
        """The cursor that many global batches on."""
        samples = batches * batch_size
        return replace(self, row=self.row + samples // self.lanes.lanes, consumed=self.consumed + samples)

    def moved(self, source: Source, epoch: int, block: int | None) -> "Cursor":
        """The cursor at the start of `epoch`, in another source."""
        check_not_empty(source)
        if source.fields != self.source.fields:
            now, before = ([f"{field.name} {field.dtype}{[*field.shape]}" for field in fields] for fields in
                           (source.fields, self.source.fields))  # fmt: skip
            raise ManifestMismatch(f"the newer samples have {now}, this run reads {before}: start another run on them")
        old = self.lanes
        carried = (epoch - old.first_epoch) * old.ids.count - self.row * old.lanes
        lanes = lanes_of(source, seed=old.seed, lanes=old.lanes, block=block, first_epoch=epoch)
        return Cursor(source, lanes, consumed=self.consumed, left_out=self.left_out + carried)

    def state(self) -> dict[str, Any]:
        """The cursor as integers, a digest, and the place of the source."""
        lanes = self.lanes
        epoch = lanes.epoch_at(self.row)
        return {
            "content_digest": lanes.digest,
            "seed": lanes.seed,
            "lanes": lanes.lanes,
            "block": lanes.block,
            "window": lanes.window,
            "first_epoch": lanes.first_epoch,
            "epoch": epoch,
            "position": (self.row - lanes.epoch_start(epoch)) * lanes.lanes,
            "consumed": self.consumed,
            "left_out": self.left_out,
            "place": self.source.place,
        }


def lanes_of(
    source: Source, *, seed: int, lanes: int, block: int | None, window: int | None = None, first_epoch: int = 0
) -> Lanes:
    """The order of a source's samples. Its blocks and windows are those of its state, or by number and size."""
    block = block or default_block(source.ids.count, lanes)
    window = window or default_window(lanes, block, source.row_bytes)
    return Lanes(source.ids, source.digest, seed, lanes, block, first_epoch, window)


def start(
    source: Source, state: dict[str, Any] | None, *, batch_size: int, seed: int, lanes: int | None, block: int | None
) -> Cursor:
    """Where a stream begins: where its state stands, or at the first row."""
    check_not_empty(source)
    if state:
        return resumed(source, state, seed=seed, lanes=lanes, block=block)
    return Cursor(source, lanes_of(source, seed=seed, lanes=lanes or default_lanes(batch_size), block=block))


def resumed(
    source: Source, state: dict[str, Any], *, seed: int, lanes: int | None = None, block: int | None = None
) -> Cursor:
    """Where a state stands. ManifestMismatch where it is of other content, or was made in another order."""
    ours = {"content_digest": source.digest, "seed": seed, "lanes": lanes, "block": block}
    for name, now in ours.items():
        if now is not None and state[name] != now:
            problem = f"{name} {str(state[name])[:12]}, this stream has {str(now)[:12]}"
            raise ManifestMismatch(f"this run was reading samples in another order ({problem}): {_WAYS_OUT[name]}")
    cut = {name: state[name] for name in ("lanes", "block", "first_epoch")}
    # A state of before windows were bounded in bytes names none, and had WINDOW blocks in each.
    order = lanes_of(source, seed=seed, window=state.get("window", WINDOW), **cut)
    row = order.epoch_start(state["epoch"]) + state["position"] // order.lanes
    return Cursor(source, order, row, state["consumed"], state["left_out"])


_WAYS_OUT = {
    "content_digest": "give its --manifest",
    "seed": "give its --seed",
    "lanes": "give its --lanes, or none",
    "block": "give its block, or none",
}


def check_not_empty(source: Source) -> None:
    if source.ids.count == 0:
        raise ManifestMismatch("the dataset holds no samples in this split: generate some with --count")


def check_division(batch_size: int, lanes: int, world_size: int) -> None:
    """Raise ValueError unless lanes divide the global batch, and ranks the lanes."""
    if batch_size % lanes:
        problem = f"lanes {lanes} do not divide a global batch of {batch_size}"
        raise ValueError(f"{problem}; choose from {_divisors(batch_size)}")
    if lanes % world_size:
        problem = f"{world_size} ranks do not divide {lanes} lanes, of which each rank reads its own"
        raise ValueError(f"{problem}; choose from {_divisors(lanes)} ranks, or begin the run with other lanes")


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0][:16]

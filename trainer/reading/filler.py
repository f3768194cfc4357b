"""Windows of rows, loaded, and batches filled from them: what the stream's two threads do."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from limbeck.diffusion import noise
from limbeck.trainer.reading.ahead import Ahead
from limbeck.trainer.reading.batch import DeviceRing, Packed, Ring
from limbeck.trainer.reading.content import Cursor, Source
from limbeck.trainer.reading.order import Ints
from limbeck.trainer.reading.rows import copy_rows

Follow = Callable[[int], Source | None]


@dataclass(frozen=True)
class LoadedWindow:
    """Loaded rows of a rank's lanes from `cursor` on: [lanes, rows] each.

    addresses: column -> where each row's bytes begin. keep: what owns that memory.
    """

    cursor: Cursor
    ids: Ints
    condition: Ints
    guidance: NDArray[np.float64]
    addresses: dict[str, Ints]
    substituted: NDArray[np.bool_]
    keep: Any


def load_windows(cursor: Cursor, mine: range, *, follow: Follow | None, block: int | None) -> Iterator[LoadedWindow]:
    """One window after the other of the lanes `mine`, from the cursor on."""
    while True:
        epoch = cursor.lanes.epoch_at(cursor.row)
        if follow and cursor.row and cursor.row == cursor.lanes.epoch_start(epoch):
            cursor = _followed(cursor, follow(epoch), epoch, block)
        window = cursor.lanes.window_at(cursor.row)
        # A run that goes on begins within a window.
        ids = cursor.lanes.window_ids(window, mine)[:, cursor.row - window.start :]
        yield _load(cursor, ids)
        cursor = replace(cursor, row=window.stop)


def _followed(cursor: Cursor, source: Source | None, epoch: int, block: int | None) -> Cursor:
    """The start of an epoch, in `source` if it is one."""
    if source is None:
        return cursor
    if source.digest == cursor.lanes.digest:  # the same samples, stored again
        return replace(cursor, source=source)
    return cursor.moved(source, epoch, block)


def _load(cursor: Cursor, ids: Ints) -> LoadedWindow:
    rows = cursor.source.load(ids.ravel())
    return LoadedWindow(
        cursor=cursor,
        ids=rows.ids.reshape(ids.shape),
        condition=rows.condition.reshape(ids.shape),
        guidance=rows.guidance.reshape(ids.shape),
        addresses={name: where.reshape(ids.shape) for name, where in rows.addresses.items()},
        substituted=rows.substituted.reshape(ids.shape),
        keep=rows.keep,
    )


class Made(NamedTuple):
    """A batch, the cursor after it, and how many of its rows are substitutes."""

    batch: Packed
    after: Cursor
    substituted: int


class Filler:
    """Copies the rows of loaded windows into batches.

    first: place of this rank's rows in a global batch. turn (w, W): every W-th global batch from the w-th on.
    """

    def __init__(
        self,
        windows: Ahead[LoadedWindow],
        ring: Ring | DeviceRing,
        *,
        batch_size: int,
        first: int,
        turn: tuple[int, int],
    ) -> None:
        self._windows, self._ring = windows, ring
        self._batch_size, self._first, self._turn = batch_size, first, turn
        self._window: LoadedWindow | None = None
        self._at = 0

    def batches(self, cursor: Cursor) -> Iterator[Made]:
        """The batches from a cursor on, at which the first window begins."""
        rows, consumed = self._batch_size // cursor.lanes.lanes, cursor.consumed
        skipped, every = self._turn
        while True:
            self._take(skipped * rows)
            consumed += skipped * self._batch_size
            yield self._made(self._take(rows), consumed, cursor.lanes.seed)
            consumed += self._batch_size
            skipped = every - 1

    def _take(self, rows: int) -> list[tuple[LoadedWindow, slice]]:
        """The next rows of each lane, from as many windows as they are in."""
        parts = []
        while rows:
            if self._window is None or self._at == self._window.ids.shape[1]:
                self._window, self._at = None, 0  # unmapped before the next is waited for
                self._window = self._windows.get()
            past = min(self._at + rows, self._window.ids.shape[1])
            parts.append((self._window, slice(self._at, past)))
            rows, self._at = rows - (past - self._at), past
        return parts

    def _made(self, parts: list[tuple[LoadedWindow, slice]], consumed: int, seed: int) -> Made:
        """A batch of these rows. Its own function, so that no local keeps them mapped while we wait for the next."""
        window, place = parts[-1]
        after = replace(window.cursor, row=window.cursor.row + place.stop, consumed=consumed + self._batch_size)
        substituted = sum(int(window.substituted[:, place].sum()) for window, place in parts)
        return Made(self._filled(parts, consumed, seed), after, substituted)

    def _filled(self, parts: list[tuple[LoadedWindow, slice]], consumed: int, seed: int) -> Packed:
        """A batch of these rows, lane by lane."""
        packed = self._ring.take()
        host = packed.host
        host.positions[:] = np.arange(consumed + self._first, consumed + self._first + len(host.positions))
        host.ids[:] = _joined([window.ids[:, place] for window, place in parts])
        host.condition[:] = _joined([window.condition[:, place] for window, place in parts])
        host.guidance[:] = _joined([window.guidance[:, place] for window, place in parts])
        if host.uniforms.size:
            host.uniforms[:] = objective_uniforms(seed, host.positions, host.uniforms.shape[1]).numpy()
        for name, state in host.states.items():
            copy_rows(_joined([window.addresses[name][:, place] for window, place in parts]), state)
        return self._ring.send(packed)


def _joined(parts: list[NDArray[Any]]) -> NDArray[Any]:
    """Rows of every lane [lanes, rows of each part], lane after lane: [lanes * rows]."""
    return (parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)).ravel()


def objective_uniforms(seed: int, positions: Ints, size: int) -> Tensor:
    """`size` numbers in (0, 1) for each position of the run, from the counter-based generator: float64 [B, size]."""
    if not size:
        return torch.empty(len(positions), 0, dtype=torch.float64)
    return torch.from_numpy(noise.uniform(seed, "train", positions, purpose="objective", size=size))

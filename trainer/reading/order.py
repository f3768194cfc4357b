"""The order in which samples are seen: a pure function of (content digest, seed, epoch, lanes, block, window).

    E_e   an epoch's n ids: blocks of `block` consecutive ids, permuted and laid end to end
    S     E_f ++ E_{f+1} ++ ...                          f: the first epoch
    P_e   floor((e - f) n / C)                           C: lanes; rows that do not divide go into the next epoch
    run   S[C P_e + c q_e : C P_e + (c + 1) q_e)         of lane c in epoch e, q_e = P_{e+1} - P_e rows
    row   P_e + i of lane c: the i-th of its run, cut evenly into windows of up to `window` blocks, each shuffled

The first epoch's runs begin with smaller windows, of START blocks each, so that a run can begin before much is read.

Lanes have equal runs and equal windows, so "row r" is the r-th row of every lane. A global batch of C b samples is rows
[k b, (k + 1) b) of every lane, lane after lane; a rank's part of it is the part of its consecutive lanes.

Any row is found in O(window), for 100 samples or 10^10. Bits come from Philox and SHA-2, whose streams are frozen;
numpy's `permutation` is not.
"""

import hashlib
import itertools
import math
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import NDArray

from limbeck.storage_schemas.ids import IdSet
from limbeck.trainer.reading.blocks import Blocks, LaidOut

BATCH = 256
BLOCK = 512
WINDOW = 16
WINDOW_BYTES = 512 << 20
START = (1, 2, 4, 8)
_VERSION = "limbeck order 2"

Ints = NDArray[np.int64]


def default_batch(*parts: int | None, rows: int = BATCH) -> int:
    """Samples of a step: the most up to BATCH, and up to the rows there are, that each of `parts` divides."""
    part = math.lcm(*(each for each in parts if each))
    return part * max(1, min(BATCH, rows) // part)


def default_lanes(batch_size: int) -> int:
    """The largest number of lanes of 1, 2, 4 and 8 that divides the global batch."""
    return math.gcd(batch_size, 8)


def default_block(count: int, lanes: int) -> int:
    """The largest power of two up to BLOCK with which `count` samples fill a window of every lane, at least 1."""
    return min(BLOCK, 1 << (max(1, count // (lanes * WINDOW)).bit_length() - 1))


def default_window(lanes: int, block: int, row_bytes: int) -> int:
    """Blocks of each lane in a window: as many of WINDOW as keep all lanes' rows within WINDOW_BYTES, at least 1."""
    return max(1, min(WINDOW, WINDOW_BYTES // (lanes * block * row_bytes)))


@dataclass(frozen=True)
class Window:
    """Rows [start, stop) of every lane: the index-th window of an epoch."""

    epoch: int
    index: int
    start: int
    stop: int


@dataclass(frozen=True)
class Lanes:
    """Row of a lane -> sample id; each id of an epoch exactly once.

    digest: the content's (recipe, windows, gaps), so another layout of the same samples has the same order.
    """

    ids: IdSet
    digest: str
    seed: int
    lanes: int
    block: int
    first_epoch: int = 0
    window: int = WINDOW

    def __post_init__(self) -> None:
        if min(self.ids.count, self.lanes, self.block, self.window) < 1:
            cut = f"{self.lanes} lanes, blocks of {self.block} and windows of {self.window}"
            raise ValueError(f"no order of {self.ids.count} samples in {cut}")

    def epoch_start(self, epoch: int) -> int:
        """P_e: rows of each lane before this epoch."""
        if epoch < self.first_epoch:
            raise ValueError(f"epoch {epoch} is before the order's first, {self.first_epoch}")
        return (epoch - self.first_epoch) * self.ids.count // self.lanes

    def epoch_at(self, row: int) -> int:
        """The epoch e with P_e <= row < P_{e+1}."""
        if row < 0:
            raise ValueError(f"row {row} is before a lane's first, 0")
        return self.first_epoch + (self.lanes * (row + 1) - 1) // self.ids.count

    def window_at(self, row: int) -> Window:
        """The window that this row is in."""
        epoch = self.epoch_at(row)
        first, past = self.epoch_start(epoch), self.epoch_start(epoch + 1)
        index = 0
        for blocks in self._start if epoch == self.first_epoch else ():
            if row < first + blocks * self.block:
                return Window(epoch, index, first, min(first + blocks * self.block, past))
            first, index = first + blocks * self.block, index + 1
        length = past - first
        windows = -(-length // (self.window * self.block))
        place = ((row - first + 1) * windows - 1) // length
        return Window(
            epoch, index + place, first + place * length // windows, first + (place + 1) * length // windows
        )  # fmt: skip

    def window_ids(self, window: Window, lanes: range) -> Ints:
        """Ids of a window's rows in consecutive lanes: [len(lanes), stop - start], read-only."""
        if not 0 <= lanes.start < lanes.stop <= self.lanes or lanes.step != 1:
            raise ValueError(f"{lanes} is no range of lanes below {self.lanes}")
        return _window_ids(self, window, lanes)

    def rows(self, start: int, stop: int, lanes: range) -> Ints:
        """Ids of rows [start, stop) in consecutive lanes, over windows and epochs: [len(lanes), stop - start]."""
        if not 0 <= start <= stop:
            raise ValueError(f"rows {start} to {stop} are no rows of a lane: give 0 <= start <= stop")
        parts = [np.empty((len(lanes), 0), dtype=np.int64)]
        while start < stop:
            window = self.window_at(start)
            parts.append(self.window_ids(window, lanes)[:, start - window.start : stop - window.start])
            start = window.stop
        return np.concatenate(parts, axis=1)

    def _stretch(self, start: int, places: Ints) -> Ints:
        """S[start + places], ascending places, over any number of epochs."""
        passed, start = divmod(start, self.ids.count)
        places = places + start
        bounds = np.arange(int(places[-1]) // self.ids.count + 2) * self.ids.count
        cuts = itertools.pairwise(np.searchsorted(places, bounds))
        parts = [
            _laid_out(self, self.first_epoch + passed + i)(places[first:past] - bounds[i])
            for i, (first, past) in enumerate(cuts)
        ]
        return np.concatenate(parts)

    def _key(self, epoch: int) -> bytes:
        return hashlib.sha256(f"{_VERSION}|{self.digest}|{self.seed}|{epoch}".encode()).digest()

    @property
    def _start(self) -> tuple[int, ...]:
        return tuple(blocks for blocks in START if blocks < self.window)

    @cached_property
    def _blocks(self) -> Blocks:
        return Blocks(self.ids, self.block)


@lru_cache(maxsize=4)
def _laid_out(order: Lanes, epoch: int) -> LaidOut:
    return LaidOut(order._blocks, order._key(epoch))


# Batch after batch comes from one window, or from two where it ends.
@lru_cache(maxsize=4)
def _window_ids(order: Lanes, window: Window, lanes: range) -> Ints:
    first, past = order.epoch_start(window.epoch), order.epoch_start(window.epoch + 1)
    start = order.lanes * first + lanes.start * (past - first) + window.start - first
    places = np.arange(len(lanes))[:, None] * (past - first) + np.arange(window.stop - window.start)
    ids = order._stretch(start, places.ravel()).reshape(places.shape)
    shuffled = np.take_along_axis(ids, _shuffles(order._key(window.epoch), window, lanes), axis=1)
    shuffled.flags.writeable = False
    return shuffled


def _shuffles(key: bytes, window: Window, lanes: range) -> Ints:
    """A permutation of a window's rows for each lane: [len(lanes), rows]."""
    rows, words = window.stop - window.start, np.frombuffer(key, dtype="<u8")[:2]
    counters = (np.array([0, window.index, lane, 0], dtype=np.uint64) for lane in lanes)
    bits = np.stack([np.random.Philox(key=words, counter=counter).random_raw(rows) for counter in counters])
    # Random numbers that end in their own index have no ties, so that every machine's sort gives the same.
    low = np.uint64((1 << rows.bit_length()) - 1)
    numbers = np.sort(bits & ~low | np.arange(rows, dtype=np.uint64), axis=1)
    return (numbers & low).astype(np.int64)

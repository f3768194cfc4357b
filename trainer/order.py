"""The order in which samples are seen: a pure function of (content digest, seed, epoch). No dataset is needed.

An epoch's ids are a window minus its gaps. They are cut into blocks of BLOCK consecutive ids, whatever the shards are;
the blocks are permuted, and rows are shuffled within WINDOW blocks at a time, so that the shards a batch touches stay
few. Position p of an epoch is found in O(WINDOW * BLOCK), for 100 rows or 10^10: the permutation of blocks is a
Feistel network walked until it lands inside (Black & Rogaway 2002), never a table.

Bits come from Philox and SHA-256, whose streams are frozen; numpy's `permutation` is not.
"""

import bisect
import hashlib
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import NDArray

from storage_schemas.ids import IdSet

BLOCK = 512
WINDOW = 16
_ROUNDS = 8
_VERSION = "limbeck order 1"

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Permutation:
    """A pseudo-random permutation of range(size), with its inverse, in constant memory."""

    size: int
    key: bytes

    def __call__(self, places: Ints) -> Ints:
        return self._walk(places, forward=True)

    def inverse(self, values: Ints) -> Ints:
        return self._walk(values, forward=False)

    def _walk(self, values: Ints, *, forward: bool) -> Ints:
        walked = self._feistel(values.astype(np.uint64), forward=forward)
        while (outside := walked >= self.size).any():
            walked[outside] = self._feistel(walked[outside], forward=forward)
        return walked.astype(np.int64)

    def _feistel(self, values: NDArray[np.uint64], *, forward: bool) -> NDArray[np.uint64]:
        """One pass over [0, 4^k), the smallest such domain that holds `size`."""
        half = np.uint64(max(1, (max(self.size - 1, 1).bit_length() + 1) // 2))
        mask = (np.uint64(1) << half) - np.uint64(1)
        left, right = values >> half, values & mask
        for key in self._round_keys if forward else self._round_keys[::-1]:
            if forward:
                left, right = right, left ^ (_mix(right ^ key) & mask)
            else:
                left, right = right ^ (_mix(left ^ key) & mask), left
        return left << half | right

    @cached_property
    def _round_keys(self) -> NDArray[np.uint64]:
        return np.frombuffer(hashlib.sha512(self.key).digest(), dtype="<u8")[:_ROUNDS]


@dataclass(frozen=True)
class EpochOrder:
    """Position in an epoch -> sample id; each id exactly once.

    digest: of the content (recipe, windows, gaps), so another layout of the same samples has the same order.
    """

    ids: IdSet
    digest: str
    seed: int
    epoch: int

    @property
    def count(self) -> int:
        return self.ids.count

    def slice(self, start: int, stop: int) -> Ints:
        """Ids at positions [start, stop), 0 <= start <= stop <= count: [stop - start]."""
        if not 0 <= start <= stop <= self.count:
            raise ValueError(f"positions {start} to {stop} are not in an epoch of {self.count}")
        pieces: list[Ints] = []
        while start < stop:
            window = self._window_of(start)
            first = self._rows_before(window * WINDOW)
            rows = _shuffled_window(self, window)[start - first : stop - first]
            pieces.append(rows)
            start += len(rows)
        return np.concatenate(pieces) if pieces else np.empty(0, dtype=np.int64)

    def _window_of(self, position: int) -> int:
        """The last window that starts at or before `position`."""
        windows = range(-(-self._num_blocks // WINDOW))
        return bisect.bisect_right(windows, position, key=lambda window: self._rows_before(window * WINDOW)) - 1

    def _rows_before(self, place: int) -> int:
        """Rows in the blocks that come before `place` in the permuted order."""
        places, missing = self._short_blocks
        return place * BLOCK - int(missing[np.searchsorted(places, place)])

    @property
    def _first_block(self) -> int:
        return self.ids.start // BLOCK

    @property
    def _num_blocks(self) -> int:
        return -(-self.ids.stop // BLOCK) - self._first_block

    @cached_property
    def _key(self) -> bytes:
        return hashlib.sha256(f"{_VERSION}|{self.digest}|{self.seed}|{self.epoch}".encode()).digest()

    @cached_property
    def _permutation(self) -> Permutation:
        return Permutation(self._num_blocks, self._key)

    @cached_property
    def _short_blocks(self) -> tuple[Ints, Ints]:
        """Places of blocks with fewer than BLOCK rows: [n] ascending; rows missing before each, and in all: [n + 1]."""
        first, last = self._first_block * BLOCK, (self._first_block + self._num_blocks) * BLOCK
        outside = [(first, self.ids.start), *self.ids.gaps.tolist(), (self.ids.stop, last)]
        blocks = np.unique(np.concatenate([_blocks_of(start, stop) for start, stop in outside]))
        missing = BLOCK - (_ids_below(self.ids, (blocks + 1) * BLOCK) - _ids_below(self.ids, blocks * BLOCK))
        places = self._permutation.inverse(blocks - self._first_block)
        order = np.argsort(places)
        return places[order], np.concatenate([[0], np.cumsum(missing[order])])


@lru_cache(maxsize=4)
def epoch_order(ids: IdSet, digest: str, seed: int, epoch: int) -> EpochOrder:
    """The order of an epoch; the last few are kept, with what they have worked out."""
    return EpochOrder(ids, digest, seed, epoch)


# Consecutive batches come from one window, or two where it ends.
@lru_cache(maxsize=2)
def _shuffled_window(order: EpochOrder, window: int) -> Ints:
    places = np.arange(window * WINDOW, min((window + 1) * WINDOW, order._num_blocks), dtype=np.int64)
    blocks = order._permutation(places) + order._first_block
    ids = (blocks[:, None] * BLOCK + np.arange(BLOCK)).ravel()
    ids = ids[order.ids.contains(ids)]
    key = np.frombuffer(order._key, dtype="<u8")[:2]
    bits = np.random.Philox(key=key, counter=np.array([0, window, 0, 0], dtype=np.uint64)).random_raw(len(ids))
    shuffled = ids[np.argsort(bits, kind="stable")]
    shuffled.flags.writeable = False
    return shuffled


def _blocks_of(start: int, stop: int) -> Ints:
    """Blocks that [start, stop) touches."""
    return np.arange(start // BLOCK, -(-stop // BLOCK) if stop > start else start // BLOCK, dtype=np.int64)


def _ids_below(ids: IdSet, bounds: Ints) -> Ints:
    """How many ids are below each bound."""
    bounds = bounds.clip(ids.start, ids.stop)
    lost = np.concatenate([[0], np.cumsum(ids.gaps[:, 1] - ids.gaps[:, 0])])
    after = np.searchsorted(ids.gaps[:, 0], bounds)
    ends = np.concatenate([[ids.start], ids.gaps[:, 1]])[after]
    # A gap that a bound cuts is lost only up to the bound.
    return np.asarray(bounds - ids.start - lost[after] + np.maximum(ends - bounds, 0))


def _mix(value: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """A bijective scramble of 64 bits: splitmix64's finaliser (Steele et al. 2014)."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))

"""Which ids of an endless line exist: a window without its gaps. Nothing here ever holds an id array of the window."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np


@dataclass(frozen=True, eq=False)
class IdSet:
    """[start, stop) without `gaps`: sorted, disjoint, non-touching [first, past last) ranges in it, int64 [k, 2]."""

    start: int
    stop: int
    gaps: np.ndarray

    @property
    def count(self) -> int:
        """Number of ids."""
        return self.stop - self.start - int((self.gaps[:, 1] - self.gaps[:, 0]).sum())

    @cached_property
    def _first_positions(self) -> np.ndarray:
        """Position of the first id after each gap."""
        lost = np.cumsum(self.gaps[:, 1] - self.gaps[:, 0])
        return self.gaps[:, 1] - self.start - lost

    @cached_property
    def _lost(self) -> np.ndarray:
        """Ids lost before each gap, and in all: [k + 1]."""
        return np.concatenate([np.zeros(1, np.int64), np.cumsum(self.gaps[:, 1] - self.gaps[:, 0])])

    def at(self, positions: np.ndarray) -> np.ndarray:
        """The ids at positions 0 <= p < count in ascending order."""
        positions = np.asarray(positions, dtype=np.int64)
        if positions.size and (positions.min() < 0 or positions.max() >= self.count):
            raise IndexError(f"positions must be in [0, {self.count})")
        gaps_before = np.searchsorted(self._first_positions, positions, side="right")
        return self.start + positions + self._lost[gaps_before]

    def contains(self, ids: np.ndarray) -> np.ndarray:
        """Whether each id exists."""
        ids = np.asarray(ids, dtype=np.int64)
        after = np.searchsorted(self.gaps[:, 0], ids, side="right")
        ends = np.concatenate([np.full(1, self.start, np.int64), self.gaps[:, 1]])[after]
        return (ids >= self.start) & (ids < self.stop) & (ids >= ends)

    def positions(self, ids: np.ndarray) -> np.ndarray:
        """The inverse of `at`."""
        ids = np.asarray(ids, dtype=np.int64)
        if not np.all(self.contains(ids)):
            raise KeyError("some of these ids are in a gap or outside the window")
        return ids - self.start - self._lost[np.searchsorted(self.gaps[:, 0], ids, side="right")]


def id_set(start: int, stop: int, ranges: Iterable[tuple[int, int]] | np.ndarray) -> IdSet:
    """The ids of [start, stop) that are in none of `ranges`, which may overlap, touch or lie outside."""
    return IdSet(start, stop, merge_ranges(ranges, start, stop))


def merge_ranges(ranges: Iterable[tuple[int, int]] | np.ndarray, start: int, stop: int) -> np.ndarray:
    """Sorted, disjoint, non-touching ranges inside [start, stop) that cover the same ids, int64 [k, 2]."""
    rows = ranges if isinstance(ranges, np.ndarray) else list(ranges)
    array = np.asarray(rows, dtype=np.int64).reshape(-1, 2).clip(start, stop)
    array = array[array[:, 0] < array[:, 1]]
    array = array[np.argsort(array[:, 0], kind="stable")]
    if not len(array):
        return array
    reach = np.maximum.accumulate(array[:, 1])
    opens = np.concatenate([[True], array[1:, 0] > reach[:-1]])
    closes = np.concatenate([opens[1:], [True]])
    return np.stack([array[opens, 0], reach[closes]], axis=1)

"""Which ids can't be read, and which stand in for them: the same ones on every rank, in every batch, after a resume."""

import hashlib
import threading
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from limbeck.storage_schemas.errors import CorruptShard
from limbeck.storage_schemas.ids import IdSet, id_set, merge_ranges
from limbeck.trainer.reading.order import Ints

_VERSION = "limbeck substitutes 1"


class Substitutes:
    """For an id that can't be read, the first of its candidates that can.

    Candidate k = 1, 2, ... of an id is drawn evenly from all ids by (seed, k, id). So which id stands in is a function
    of what can't be read alone, not of when, where or beside which other rows that was found out.
    """

    def __init__(self, ids: IdSet, seed: int, ranges: Iterable[Sequence[int]] = ()) -> None:
        self._ids, self._seed = ids, seed
        self._lost: Ints = np.empty((0, 2), np.int64)
        self._readable = ids
        self._lock = threading.Lock()
        self.add(ranges)

    def __reduce__(self) -> tuple[Any, ...]:
        return Substitutes, (self._ids, self._seed, self.ranges)

    @property
    def ranges(self) -> list[list[int]]:
        """[first, past) of the ids that can't be read: sorted, disjoint."""
        ranges: list[list[int]] = self._lost.tolist()
        return ranges

    def add(self, ranges: Iterable[Sequence[int]]) -> None:
        """Add ids that can't be read. CorruptShard where that is more than half of all ids."""
        start, stop = self._ids.start, self._ids.stop
        with self._lock:
            lost = merge_ranges([(first, past) for first, past in [*self._lost, *ranges]], start, stop)
            readable = id_set(start, stop, np.concatenate([self._ids.gaps, lost]))
            if 2 * readable.count < self._ids.count:
                raise CorruptShard(self._too_many(readable))
            self._lost, self._readable = lost, readable

    def _too_many(self, readable: IdSet) -> str:
        problem = f"{self._ids.count - readable.count} of {self._ids.count} samples can't be read, more than half"
        return f"{problem}: `limbeck verify` names what to restore or to generate anew"

    def chosen(self, ids: Ints) -> Ints:
        """The ids, each that can't be read replaced."""
        readable, chosen, attempt = self._readable, ids, 0
        while (lost := ~readable.contains(chosen)).any():
            attempt += 1
            chosen = np.where(lost, self._candidates(ids, attempt), chosen)
        return chosen

    def _candidates(self, ids: Ints, attempt: int) -> Ints:
        text = f"{_VERSION} {self._seed} {attempt}"
        key = np.frombuffer(hashlib.sha256(text.encode()).digest(), "<u8")
        bits = _mix(_mix(ids.astype(np.uint64) ^ key[0]) ^ key[1])
        return self._ids.at((bits % np.uint64(self._ids.count)).astype(np.int64))


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's finalizer: a permutation of 64 bits that looks random."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))

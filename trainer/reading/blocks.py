"""An epoch's blocks of ids, permuted and laid end to end: which id is at a position, at no cost that grows with ids."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from limbeck.storage_schemas.ids import IdSet, id_set, merge_ranges
from limbeck.trainer.reading.permutation import Permutation

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Blocks:
    """Runs of `size` consecutive ids that hold a sample at all; those that a gap or an end cuts are short.

    Block b is ids [b size, (b + 1) size). A block's rank is its place among those there are.
    """

    ids: IdSet
    size: int

    @cached_property
    def numbers(self) -> IdSet:
        """The blocks that are there: number at rank."""
        empty = np.stack([-(-self._outside[:, 0] // self.size), self._outside[:, 1] // self.size], axis=1)
        return id_set(self.ids.start // self.size, -(-self.ids.stop // self.size), empty)

    @cached_property
    def short(self) -> tuple[Ints, Ints]:
        """(rank, missing samples) of each short block: at most two for a gap."""
        cut = np.unique(self._outside[self._outside % self.size > 0] // self.size)
        return self.numbers.positions(cut), self.size - (self.samples_before(cut + 1) - self.samples_before(cut))

    def samples_before(self, numbers: Ints) -> Ints:
        """Samples whose ids are below each block's."""
        bounds = (numbers * self.size).clip(self.ids.start, self.ids.stop)
        after = np.searchsorted(self.ids.gaps[:, 0], bounds)
        ends, lost = self._gaps
        # A gap that a bound cuts is lost only up to the bound.
        return np.asarray(bounds - self.ids.start - lost[after] + np.maximum(ends[after] - bounds, 0))

    @cached_property
    def _gaps(self) -> tuple[Ints, Ints]:
        """(where the window begins and its gaps end, ids lost before each and in all): [k + 1] both."""
        gaps = self.ids.gaps
        return (
            np.concatenate([[self.ids.start], gaps[:, 1]]),
            np.concatenate([[0], np.cumsum(gaps[:, 1] - gaps[:, 0])]),
        )

    @cached_property
    def _outside(self) -> Ints:
        """Id ranges without samples, from the first block's beginning to the last one's end: [k, 2]."""
        first = self.ids.start // self.size * self.size
        last = -(-self.ids.stop // self.size) * self.size
        ends = np.array([(first, self.ids.start), (self.ids.stop, last)])
        return merge_ranges(np.concatenate([self.ids.gaps, ends]), first, last)


@dataclass(frozen=True)
class LaidOut:
    """Position in the permuted blocks, end to end -> id."""

    blocks: Blocks
    key: bytes

    def __call__(self, positions: Ints) -> Ints:
        """Ids at ascending positions in [0, number of samples)."""
        if not len(positions):
            return np.empty(0, dtype=np.int64)
        ends, missing = self._short
        # Where it would be if every block before it were full.
        positions = positions + missing[np.searchsorted(ends, positions, side="right")]
        places, within = np.divmod(positions, self.blocks.size)
        new = np.concatenate([[True], places[1:] != places[:-1]])
        first = self.blocks.samples_before(self.blocks.numbers.at(self._permutation(places[new])))
        return self.blocks.ids.at(first[np.cumsum(new) - 1] + within)

    @cached_property
    def _permutation(self) -> Permutation:
        return Permutation(self.blocks.numbers.count, self.key)

    @cached_property
    def _short(self) -> tuple[Ints, Ints]:
        """(positions where short blocks end [k] ascending, samples missing in those before each and in all [k + 1])."""
        ranks, missing = self.blocks.short
        places = self._permutation.inverse(ranks)
        order = np.argsort(places)
        total = np.cumsum(missing[order])
        return (places[order] + 1) * self.blocks.size - total, np.concatenate([[0], total])

"""Stored trajectories as a source: ids become rows in the mapped bytes of their shards, checked before they are used.

Only the parts (Parquet: row groups of the needed columns; tars: blocks of rows) that hold wanted rows are opened.
"""

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from limbeck.diffusion.recipes.samples import draw_scales
from limbeck.storage_schemas.dataset import Dataset, Pruned
from limbeck.storage_schemas.errors import CorruptShard, ManifestMismatch
from limbeck.storage_schemas.file_format import Part, Views
from limbeck.storage_schemas.record import Split
from limbeck.trainer.reading.chunks import Chunks, Reading
from limbeck.trainer.reading.order import Ints
from limbeck.trainer.reading.recent import Recent
from limbeck.trainer.reading.rows import Rows, copy_rows
from limbeck.trainer.reading.substitutes import Substitutes
from limbeck.trainer.reading.views import Viewer

_READERS = 16
_REMEMBERED = 1 << 14  # parts of shards, some KiB each
_PLAIN = Reading()


class ShardSource:
    """One split of a dataset. Any number of threads may load from it; it pickles without what it has in memory."""

    def __init__(
        self, dataset: Dataset, split: Split, columns: Sequence[str], *, reading: Reading = _PLAIN, seed: int = 0
    ) -> None:
        by_name = {field.name: field for field in dataset.recipe.fields}
        if unknown := sorted(set(columns) - set(by_name)):
            raise ManifestMismatch(f"{dataset.store.uri} has no columns {unknown}: it has {[*by_name]}")
        self.ids = dataset.ids(split)
        self.digest = dataset.manifest.content_digest
        self.fields = tuple(field for field in dataset.recipe.fields if field.name in columns)
        self.row_bytes = dataset.recipe.sample_bytes
        self.place: dict[str, Any] = {"dataset": dataset.manifest.dataset, "manifest": dataset.manifest.number}
        self._dataset, self._table, self._on_corrupt = dataset, dataset.shards(split), reading.on_corrupt
        self._split_name = split
        self._needed = tuple(field for field in dataset.recipe.fields if field.name in {"condition", *columns})
        self._viewer = Viewer(Chunks(dataset.store, reading), dataset.recipe, self._needed)
        self._substitutes = Substitutes(self.ids, seed)
        self._parts: Recent[tuple[int, bool], list[Part]] = Recent(_REMEMBERED)
        self._foreign: set[int] = set()

    @property
    def unreadable(self) -> list[list[int]]:
        """[first, past) id ranges that could not be read so far, or were excluded: sorted, disjoint."""
        return self._substitutes.ranges

    def exclude(self, ranges: Iterable[Sequence[int]]) -> None:
        """Treat these ids as unreadable without trying, so that a resumed run has the same substitutes."""
        self._substitutes.add(ranges)

    def check_new(self, before: "ShardSource") -> None:
        """Raise CorruptShard, or Pruned, unless each shard that `before` lacks is as its commit says.

        That is its commit, its size and a Parquet file's footer; a bit that flipped is found when it is read.
        Nothing is asked where other samples would stand in for what is lost.
        """
        known = set(before._table.table["path"].to_pylist())
        new = [place for place, path in enumerate(self._table.table["path"].to_pylist()) if path not in known]
        if self._on_corrupt == "fail":
            lost = [(place, None, it) for place, it in self._read(new).items() if isinstance(it, CorruptShard)]
            with ThreadPoolExecutor(_READERS) as readers:
                lost += [(place, None, it) for place, it in zip(new, readers.map(self._cut, new), strict=True) if it]
            if lost:
                self._give_up(lost[:1])

    def _cut(self, index: int) -> CorruptShard | None:
        """An error if a shard's file has another number of bytes than it should."""
        shard, store = self._table[index], self._dataset.store
        size = store.size(shard.path)
        problem = f"{store.uri}/{shard.path} has {size} bytes, its manifest says {shard.bytes}"
        return None if size == shard.bytes else CorruptShard(f"{problem}: restore the file or generate it anew")

    def load(self, ids: Ints) -> Rows:
        """The rows of existing ids, in their order.

        CorruptShard, or Pruned, for what can't be read; with `on_corrupt="substitute"` other ids stand in for it.
        """
        while True:
            chosen = self._substitutes.chosen(ids)
            opened = self._open(chosen)
            if opened is not None:
                return self._rows(chosen, chosen != ids, *opened)

    def _open(self, ids: Ints) -> tuple[list[Views], Ints] | None:
        """(rows of the parts that hold these ids, place of each id among them); None where ids must be chosen again."""
        shards, rows = self._table.locate(ids)
        touched, which = _compact(shards)
        read = self._read(touched.tolist())
        lost = [(shard, None, found) for shard, found in read.items() if isinstance(found, CorruptShard)]
        if lost:
            self._give_up(lost)
            return None
        known = [found for found in read.values() if not isinstance(found, CorruptShard)]
        parts, places = _locate(known, self._table.rows[touched], which, rows)
        return self._view(parts, places)

    def _view(self, parts: Sequence[Part], places: Ints) -> tuple[list[Views], Ints] | None:
        found = self._viewer.open(parts)
        lost = [(part, view) for part, view in zip(parts, found, strict=True) if isinstance(view, CorruptShard)]
        if lost:
            self._give_up([(self._shard(part), part, error) for part, error in lost])
        self._foreign |= {self._shard(part) for part, view in zip(parts, found, strict=True) if view is None}
        views = [view for view in found if isinstance(view, dict)]
        return (views, places) if len(views) == len(parts) else None

    def _rows(self, ids: Ints, substituted: np.ndarray, views: Sequence[Views], places: Ints) -> Rows:
        addresses = {
            field.name: _addresses([array for view in views for array in view[field.name]])[places]
            for field in self._needed
        }
        condition = np.empty(len(ids), np.int64)
        copy_rows(addresses["condition"], condition.view(np.uint8).reshape(len(ids), 8))
        recipe = self._dataset.recipe
        guidance = draw_scales(recipe, self._split_name, ids)
        return Rows(ids, condition, guidance, addresses, views, substituted)

    def _read(self, shards: Sequence[int]) -> dict[int, list[Part] | CorruptShard]:
        """The parts of each shard, or why they can't be had."""
        known = {shard: self._parts.find(self._key(shard)) for shard in shards}
        new = [shard for shard, parts in known.items() if parts is None]
        with ThreadPoolExecutor(_READERS) as readers:
            made = dict(zip(new, readers.map(self._parts_of, new), strict=True))
        return {shard: made[shard] if parts is None else parts for shard, parts in known.items()}

    def _key(self, shard: int) -> tuple[int, bool]:
        return shard, shard in self._foreign or self._dataset.layout.compression != "none"

    def _parts_of(self, shard: int) -> list[Part] | CorruptShard:
        key = self._key(shard)
        try:
            return self._parts.get(key, lambda: self._split(*key), len)
        except CorruptShard as error:
            return error

    def _split(self, index: int, decode: bool) -> list[Part]:
        return self._viewer.split(self._dataset.commit(self._table[index]), decode=decode)

    def _shard(self, part: Part) -> int:
        return int(np.searchsorted(self._table.starts, part.commit.task.start))

    def _give_up(self, lost: Sequence[tuple[int, Part | None, CorruptShard]]) -> None:
        """Raises the first error, or notes which ids can't be read."""
        ranges = []
        for index, part, error in lost:
            shard = self._table[index]
            reason = self._dataset.explained(shard, error)
            if isinstance(reason, Pruned) or self._on_corrupt == "fail":
                raise reason
            if part is None or not self._dataset.store.exists(shard.path):
                ranges.append((shard.start, shard.stop))
            else:
                mine = shard.ids[part.first_row : part.first_row + part.rows]
                ranges.append((int(mine[0]), int(mine[-1]) + 1))
        self._substitutes.add(ranges)


def _compact(values: Ints) -> tuple[Ints, Ints]:
    """(the distinct values, place of each value among them): np.unique for values that lie close together, unsorted."""
    if not len(values):
        return values, values
    low = values.min()
    there = np.zeros(values.max() - low + 1, np.int64)
    there[values - low] = 1
    return np.flatnonzero(there) + low, (np.cumsum(there) - 1)[values - low]


def _locate(shards: Sequence[Sequence[Part]], sizes: Ints, which: Ints, rows: Ints) -> tuple[list[Part], Ints]:
    """(the parts that hold these rows, place of each row in those parts laid end to end).

    sizes: rows of each shard. Row i is row rows[i] of shard which[i].
    """
    parts = [part for shard in shards for part in shard]
    lengths = np.array([part.rows for part in parts], np.int64)
    starts = _starts(lengths)
    along = _starts(sizes)[which] + rows
    numbers = np.searchsorted(starts, along, side="right") - 1
    wanted, places = _compact(numbers)
    return [parts[number] for number in wanted.tolist()], _starts(lengths[wanted])[places] + along - starts[numbers]


def _addresses(arrays: Sequence[np.ndarray]) -> Ints:
    """Where each row of these arrays begins, one array after another."""
    rows = np.array([len(array) for array in arrays], np.int64)
    bases = np.array([array.__array_interface__["data"][0] for array in arrays], np.int64)
    strides = np.array([array.strides[0] for array in arrays], np.int64)
    return np.repeat(bases - _starts(rows) * strides, rows) + np.arange(rows.sum()) * np.repeat(strides, rows)


def _starts(lengths: Ints) -> Ints:
    return np.cumsum(lengths) - lengths

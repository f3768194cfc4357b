"""Stored trajectories as a source: only the columns that are asked for, checked against their checksums."""

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from storage_schemas.dataset import Dataset
from storage_schemas.errors import CorruptShard
from storage_schemas.record import Columns, Split
from trainer.order import Ints

_READERS = 4


class ShardSource:
    """One split of a dataset. Decoded shards stay in memory up to `cache_bytes`, the last used longest."""

    def __init__(self, dataset: Dataset, split: Split, columns: Sequence[str], *, cache_bytes: int) -> None:
        self.ids = dataset.ids(split)
        self.digest = dataset.manifest.content_digest
        self._dataset, self._table = dataset, dataset.shards(split)
        self._fields = {field.name: field for field in dataset.recipe.fields if field.name in columns}
        self._cache = _Cache(cache_bytes)

    def gather(self, ids: Ints) -> tuple[Tensor, dict[str, Tensor]]:
        """(condition int64 [B], states [B, ...] in the storage dtype) of existing ids, in their order."""
        shards, rows = self._table.locate(ids)
        condition = np.empty(len(ids), dtype=np.int64)
        states = {name: np.empty((len(ids), *field.shape), field.numpy_dtype) for name, field in self._fields.items()}
        found = self._load(np.unique(shards).tolist())
        for shard, places in _groups(shards):
            condition[places] = found[shard]["condition"][rows[places]]
            for name, out in states.items():
                # A tar's column is a strided view, which `take` would first copy whole.
                out[places] = found[shard][name][rows[places]]
        return torch.from_numpy(condition), {name: self._tensor(name, array) for name, array in states.items()}

    def _load(self, shards: list[int]) -> dict[int, Columns]:
        """The columns of each shard, several read at a time."""
        missing = [shard for shard in shards if shard not in self._cache]
        found = {shard: self._cache.get(shard) for shard in shards if shard not in missing}
        if len(missing) > 1:
            with ThreadPoolExecutor(_READERS) as readers:
                found |= zip(missing, readers.map(self._read, missing), strict=True)
        else:
            found |= {shard: self._read(shard) for shard in missing}
        for shard in missing:
            self._cache.put(shard, found[shard])
        return found

    def _read(self, index: int) -> Columns:
        """A shard's columns; one that does not match its checksum is fetched once more."""
        shard, names = self._table[index], ["condition", *self._fields]
        try:
            return self._dataset.read(shard, names)
        except CorruptShard:
            return self._dataset.read(shard, names)

    def _tensor(self, name: str, array: NDArray[np.generic]) -> Tensor:
        """Stored bits as torch knows them; bfloat16 is stored as its raw 16."""
        if self._fields[name].dtype == "bfloat16":
            return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(array)


class _Cache:
    """Least recently used columns by shard, up to a limit in bytes."""

    def __init__(self, limit: int) -> None:
        self._limit, self._held = limit, 0
        self._entries: OrderedDict[int, Columns] = OrderedDict()
        self._lock = threading.Lock()

    def __contains__(self, shard: int) -> bool:
        return shard in self._entries

    def get(self, shard: int) -> Columns:
        with self._lock:
            self._entries.move_to_end(shard)
            return self._entries[shard]

    def put(self, shard: int, columns: Columns) -> None:
        with self._lock:
            self._entries[shard] = columns
            self._held += _nbytes(columns)
            while self._held > self._limit:
                _, evicted = self._entries.popitem(last=False)
                self._held -= _nbytes(evicted)


def _nbytes(columns: Columns) -> int:
    return sum(array.nbytes for array in columns.values())


def _groups(values: Ints) -> Iterator[tuple[int, Ints]]:
    """(value, where it is) for each distinct value."""
    order = np.argsort(values, kind="stable")
    edges = np.flatnonzero(np.diff(values[order])) + 1
    for places in np.split(order, edges):
        yield int(values[places[0]]), places

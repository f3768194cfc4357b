"""The table of shards of a manifest: columns, not objects, so that a million of them open in a second."""

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import PurePosixPath
from typing import Self, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from limbeck.storage_schemas.commit import Commit
from limbeck.storage_schemas.ids import merge_ranges
from limbeck.storage_schemas.record import Split

SCHEMA = pa.schema(
    [
        ("task", pa.string()),
        ("split", pa.string()),
        ("start", pa.int64()),
        ("stop", pa.int64()),
        ("path", pa.string()),
        ("bytes", pa.int64()),
        ("rows", pa.int64()),
        ("sha256", pa.string()),
        ("commit_path", pa.string()),
        ("quarantined", pa.list_(pa.int64())),
        ("commit_sha256", pa.string()),
    ]
)


@dataclass(frozen=True)
class Shard:
    """One row of the table: a file with the rows of ids [start, stop) without the quarantined ones.

    commit_path: of the commit's record; of the task's commit in a row of an older release. commit_sha256: of the
    commit's own bytes; None in a row that a release wrote which knew of none.
    """

    task: str
    split: Split
    start: int
    stop: int
    path: str
    bytes: int
    rows: int
    sha256: str
    commit_path: str
    quarantined: tuple[int, ...]
    commit_sha256: str | None = None

    @property
    def commit_name(self) -> str:
        """Name of its commit's document, without .json: <task>-<attempt> of a record, <task> in an older table."""
        return PurePosixPath(self.commit_path).stem

    @property
    def ids(self) -> np.ndarray:
        """Sample ids of its rows, int64 [rows]."""
        return np.setdiff1d(np.arange(self.start, self.stop), np.asarray(self.quarantined, dtype=np.int64))

    def lists(self, commit: Commit) -> bool:
        """Whether this row is the commit's: all that both say is one, the digest too where the row has it."""
        row = replace(self, commit_path=commit.record_path, commit_sha256=self.commit_sha256 or commit.digest)
        return self.commit_path in (commit.record_path, commit.commit_path) and Shard.of(commit) == row

    @classmethod
    def of(cls, commit: Commit) -> Self:
        """The row of a commit."""
        task = commit.task
        return cls(
            task.name, task.split, task.start, task.stop, commit.path, commit.bytes, commit.rows, commit.sha256,
            commit.record_path, tuple(sorted(commit.quarantined)), commit.digest,
        )  # fmt: skip


@dataclass(frozen=True, eq=False)
class ShardTable(Sequence[Shard]):
    """Shards in order of split and start."""

    table: pa.Table

    @classmethod
    def of(cls, shards: Sequence[Shard]) -> Self:
        """A table of these shards."""
        columns = {field.name: [getattr(shard, field.name) for shard in shards] for field in fields(Shard)}
        return cls._sorted(pa.table(columns, schema=SCHEMA))

    @classmethod
    def _sorted(cls, table: pa.Table) -> Self:
        # "train" sorts after "holdout": descending by name puts train first, as everywhere.
        return cls(table.sort_by([("split", "descending"), ("start", "ascending")]).combine_chunks())

    def to_bytes(self, *, writer: str) -> bytes:
        """The table as a Parquet file of this writer's own: no two manifests come to share it by chance."""
        file = io.BytesIO()
        table = self.table.replace_schema_metadata({"writer": writer})
        pq.write_table(table, file, compression="zstd", write_page_checksum=True)
        return file.getvalue()

    def __len__(self) -> int:
        """Number of shards."""
        return self.table.num_rows

    @overload
    def __getitem__(self, index: int) -> Shard: ...

    @overload
    def __getitem__(self, index: slice) -> Self: ...

    def __getitem__(self, index: int | slice) -> "Shard | ShardTable":
        """The shard at an index, or the table of a slice."""
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            return type(self)(self.table.take(np.arange(start, stop, step)))
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        (row,) = self.table.slice(index % len(self), 1).to_pylist()
        return Shard(**{**row, "quarantined": tuple(row["quarantined"])})

    def __iter__(self) -> Iterator[Shard]:
        """Every shard, a batch of rows at a time."""
        for batch in self.table.to_batches(max_chunksize=4096):
            for row in batch.to_pylist():
                yield Shard(**{**row, "quarantined": tuple(row["quarantined"])})

    def of_split(self, split: Split) -> Self:
        """The shards of one split."""
        # Not `pc.equal(..., "train")`: Arrow imports pandas, 0.5 s, where a Python value becomes one of its own.
        counts = {count["values"]: count["counts"] for count in self.table["split"].value_counts().to_pylist()}
        train = counts.get("train", 0)
        return type(self)(self.table.slice(0, train) if split == "train" else self.table.slice(train))

    def inside(self, split: Split, start: int, stop: int) -> Self:
        """The shards of a split that touch [start, stop)."""
        mine = self.of_split(split)
        first = np.searchsorted(mine.stops, start, side="right")
        past = np.searchsorted(mine.starts, stop) if stop > start else first
        return type(self)(mine.table.slice(first, max(past - first, 0)))

    def plus(self, other: "ShardTable") -> Self:
        """Both tables' shards; a task that is in both is taken once, from this one."""
        new = pc.invert(pc.is_in(other.table["task"], value_set=self.table["task"].combine_chunks()))
        return self._sorted(pa.concat_tables([self.table, other.table.filter(new)]))

    def without(self, tasks: Sequence[str]) -> Self:
        """The other shards."""
        gone = pc.is_in(self.table["task"], value_set=pa.array(tasks, pa.string()))
        return type(self)(self.table.filter(pc.invert(gone)).combine_chunks())

    @property
    def unattested(self) -> Self:
        """The shards whose commits the table names no digest of."""
        return type(self)(self.table.filter(pc.is_null(self.table["commit_sha256"])))

    @cached_property
    def lacking(self) -> Self:
        """The shards that quarantined ids have no row in."""
        return type(self)(self.table.filter(pc.greater(pc.list_value_length(self.table["quarantined"]), 0)))

    @cached_property
    def tasks(self) -> frozenset[str]:
        """Names of the tasks."""
        return frozenset(self.table["task"].to_pylist())

    @property
    def commits(self) -> set[str]:
        """The `commit_name` of each shard."""
        return {path.rpartition("/")[2].removesuffix(".json") for path in self.table["commit_path"].to_pylist()}

    @cached_property
    def starts(self) -> np.ndarray:
        """First id of each shard, int64."""
        return integers(self.table["start"])

    @cached_property
    def stops(self) -> np.ndarray:
        """One past the last id of each shard, int64."""
        return integers(self.table["stop"])

    @cached_property
    def rows(self) -> np.ndarray:
        """Rows of each shard, int64."""
        return integers(self.table["rows"])

    @cached_property
    def quarantined(self) -> np.ndarray:
        """All quarantined ids of a one-split table, sorted."""
        return np.sort(integers(pc.list_flatten(self.table["quarantined"])))

    def gaps(self, start: int, stop: int) -> np.ndarray:
        """Id ranges of [start, stop) that a one-split table has no row for, int64 [k, 2]."""
        edges = np.concatenate([[start], np.maximum(self.stops, start)]), np.concatenate([self.starts, [stop]])
        alone = np.stack([self.quarantined, self.quarantined + 1], axis=1)
        return merge_ranges(np.concatenate([np.stack(edges, axis=1), alone]), start, stop)

    def locate(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(shard index, row in the shard) of each id, in a one-split table. KeyError for an id without a row."""
        ids = np.asarray(ids, dtype=np.int64)
        if not len(self):
            raise KeyError("there are no shards")
        shard = np.searchsorted(self.starts, ids, side="right") - 1
        if np.any(shard < 0) or np.any(ids >= self.stops[shard]) or np.any(np.isin(ids, self.quarantined)):
            raise KeyError("some of these ids have no row here")
        lost = np.searchsorted(self.quarantined, ids) - np.searchsorted(self.quarantined, self.starts[shard])
        return shard, ids - self.starts[shard] - lost


def integers(column: pa.ChunkedArray) -> np.ndarray:
    """The column's values, int64 [n]. By DLPack: Arrow's `to_numpy` imports pandas."""
    return np.concatenate([np.empty(0, np.int64), *map(np.from_dlpack, column.chunks)])

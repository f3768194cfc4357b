"""A task is one whole shard's range of ids; a commit is what makes the shard exist.

A commit lies in two places. Its record has the attempt in its name, which is never used again: manifests list records,
so that no late deletion takes what came after. commits/<task>.json says only whose record was first.
"""

import hashlib
import math
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from typing import Literal, Self

import numpy as np
from pydantic import Field, model_validator

from limbeck.storage_schemas import paths, record
from limbeck.storage_schemas.documents import SCHEMA_VERSION, Document
from limbeck.storage_schemas.names import (
    MOST,
    Attempt,
    Count,
    LayoutId,
    Samples,
    Seconds,
    Sha256,
    StoredPath,
    Text,
    Time,
    Xxh3,
)
from limbeck.storage_schemas.record import Columns, Split, from_storage
from limbeck.storage_schemas.store import Store

MOST_QUARANTINED = 0.01
"""Share of a window's ids that may have no row because they were not finite, by default."""

SICK = 0.1
"""Share of a task's samples that are not finite at which its worker is to blame."""

COMMIT_WITHIN = timedelta(hours=12)
"""Time from the start of an upload to its commit. Prune spares uncommitted shards that are younger than a day."""

FOOTER = "footer"
ALL_COLUMNS = "*"
Data = bytes  # by another name, since a commit has a field `bytes`


@dataclass(frozen=True, order=True, slots=True)
class Task:
    """Ids [start, stop) of one split: always one full shard."""

    split: Split
    index: int
    samples_per_shard: int

    @property
    def name(self) -> str:
        """train-00000003."""
        return f"{self.split}-{self.index:08d}"

    @property
    def start(self) -> int:
        """First id."""
        return self.index * self.samples_per_shard

    @property
    def stop(self) -> int:
        """One past the last id."""
        return self.start + self.samples_per_shard

    @classmethod
    def parse(cls, name: str, samples_per_shard: int) -> Self:
        """The task of a name."""
        split, _, index = name.rpartition("-")
        if split not in record.SPLITS or not index.isdecimal():
            raise ValueError(f"{name!r} is not a task's name such as train-00000003")
        return cls(split, int(index), samples_per_shard)


class Chunk(Document):
    """One run of bytes with its own checksum: a column of a row group, a block of tar rows, or what ends the file."""

    column: Text
    first_row: Count
    rows: Count
    offset: Count
    length: Count
    xxh3: Xxh3 = Field(description="Sum xxh3-128 of exactly these bytes.")


class ColumnStatistics(Document):
    """Over all values of a column, in float64. None where it is not finite, or there are no rows."""

    mean: float | None
    std: float | None
    min: float | None
    max: float | None


class Commit(Document):
    """The winner of a task. `path` is relative to the store."""

    schema_version: Literal[2] = SCHEMA_VERSION
    split: Split
    index: Count
    samples_per_shard: Samples
    recipe_id: Sha256
    layout_id: LayoutId
    attempt: Attempt
    path: StoredPath
    bytes: Count
    sha256: Sha256
    rows: Count
    quarantined: tuple[Count, ...] = ()
    chunks: tuple[Chunk, ...]
    seconds: Seconds
    nfe: Count
    machine: dict[Text, Text]
    statistics: dict[Text, ColumnStatistics] = Field(default_factory=dict)
    labels: dict[Text, Count] = Field(default_factory=dict)
    committed_at: Time

    @model_validator(mode="after")
    def _has_samples(self) -> Self:
        if self.task.stop > MOST or self.rows > self.samples_per_shard:
            raise ValueError(f"{self.rows} rows of task {self.index} are more than {self.samples_per_shard} ids have")
        return self

    @property
    def task(self) -> Task:
        """The task that this commit ends."""
        return Task(self.split, self.index, self.samples_per_shard)

    @cached_property
    def digest(self) -> str:
        """sha256 of the document as it is stored: what a table of shards names it by."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    @classmethod
    def from_bytes(cls, data: Data, source: str) -> Self:
        """The commit in `data`. Its digest is of these bytes: another release may have written other fields."""
        commit = super().from_bytes(data, source)
        commit.__dict__["digest"] = hashlib.sha256(data).hexdigest()
        return commit

    @property
    def record_path(self) -> str:
        """Where this document lies for good, by a name of its own attempt: what manifests list."""
        return paths.record_path(self.recipe_id, self.layout_id, self.task.name, self.attempt)

    @property
    def commit_path(self) -> str:
        """Where it lies, too, as long as it is the one that others go on with."""
        return paths.commit_path(self.recipe_id, self.layout_id, self.task.name)

    @property
    def own_paths(self) -> tuple[str, ...]:
        """Two paths: by its task's name, and by its attempt's."""
        return self.commit_path, self.record_path


def ids_of(commit: Commit, first: int = 0, rows: int | None = None) -> np.ndarray:
    """The sample ids of some rows of a shard, all by default: its task's without the quarantined, int64."""
    task = commit.task
    ids = np.setdiff1d(np.arange(task.start, task.stop), np.asarray(commit.quarantined, dtype=np.int64))
    return ids[first:] if rows is None else ids[first : first + rows]


def is_sick(task: Task, quarantined: Collection[int], micro_batch: int) -> bool:
    """Whether so many of a task's samples are not finite that their worker should not be believed.

    That is more than a tenth of the task, or a whole micro-batch of more than one sample.
    """
    batches = Counter(i // micro_batch for i in quarantined).values()
    return len(quarantined) > SICK * task.samples_per_shard or (micro_batch > 1 and micro_batch in batches)


def replace_commit(store: Store, commit: Commit) -> Commit:
    """Ours in the place of one whose samples or file are lost; of two that replace one, either's rows are right.

    The record of the other stays, for the manifests that list it.
    """
    data = commit.to_bytes()
    store.put_if_absent(commit.record_path, data)
    store.write(commit.commit_path, data)
    return commit


def put_commit(store: Store, commit: Commit) -> Commit:
    """The commit that stands now: ours, or that of the first attempt (compare `attempt`)."""
    data = commit.to_bytes()
    store.put_if_absent(commit.record_path, data)
    there = store.put_if_absent(commit.commit_path, data)
    first = Commit.from_bytes(there, f"{store.uri}/{commit.commit_path}")
    if first.attempt != commit.attempt:
        if not is_whole(store, first):
            return replace_commit(store, commit)
        store.remove(commit.record_path)  # which nobody has heard of: others go on with the first one's
    return first


def is_whole(store: Store, commit: Commit) -> bool:
    """Whether a commit's shard is there in its length: one that came late may name a file that was pruned."""
    return store.size(commit.path) == commit.bytes


def read_commit(store: Store, recipe_id: str, layout_id: str, task: str) -> Commit | None:
    """The commit of a task, None while nobody has finished it."""
    path = paths.commit_path(recipe_id, layout_id, task)
    data = store.read(path)
    return None if data is None else Commit.from_bytes(data, f"{store.uri}/{path}")


def read_commits(store: Store, recipe_id: str, layout_id: str, tasks: Sequence[str]) -> dict[str, Commit]:
    """Commits of those of `tasks` that have one, by task name; missing tasks are simply not there."""
    found = store.read_many([paths.commit_path(recipe_id, layout_id, task) for task in tasks])
    folder = f"{store.uri}/{paths.commits_folder(recipe_id, layout_id)}"
    pairs = zip(tasks, found, strict=True)
    return {task: Commit.from_bytes(data, f"{folder}/{task}.json") for task, data in pairs if data is not None}


def list_committed(store: Store, recipe_id: str, layout_id: str) -> set[str]:
    """Names of all tasks with a commit, by one listing past every cache."""
    names = map(paths.COMMIT.fullmatch, store.list(paths.commits_folder(recipe_id, layout_id)))
    return {match[1] for match in names if match}


def list_records(store: Store, recipe_id: str, layout_id: str) -> set[str]:
    """Names of all records, <task>-<attempt>, by one listing past every cache."""
    names = map(paths.RECORD.fullmatch, store.list(paths.records_folder(recipe_id, layout_id)))
    return {match[1] for match in names if match}


def column_statistics(fields: Sequence[record.Field], columns: Columns) -> dict[str, ColumnStatistics]:
    """Mean, standard deviation, minimum and maximum of every state column."""
    return {field.name: _statistics(field, columns[field.name]) for field in fields if not field.is_scalar}


def _statistics(field: record.Field, stored: np.ndarray) -> ColumnStatistics:
    if not stored.size:
        return ColumnStatistics(mean=None, std=None, min=None, max=None)
    low = min(float(block.min()) for block in _blocks(field, stored))
    high = max(float(block.max()) for block in _blocks(field, stored))
    if not math.isfinite(low) or not math.isfinite(high):  # no solve of ours leaves such rows in; a forged shard may
        return ColumnStatistics(mean=None, std=None, min=None, max=None)
    mean = math.fsum(block.sum() for block in _blocks(field, stored)) / stored.size
    variance = math.fsum(np.square(block - mean).sum() for block in _blocks(field, stored)) / stored.size
    return ColumnStatistics(mean=mean, std=math.sqrt(variance), min=low, max=high)


def _blocks(field: record.Field, stored: np.ndarray) -> Iterator[np.ndarray]:
    """The values in float64, about a million at a time: a shard of large samples need not fit in memory again."""
    rows = max(1, (1 << 20) * len(stored) // stored.size)
    for first in range(0, len(stored), rows):
        yield from_storage(stored[first : first + rows], field.dtype).astype(np.float64)

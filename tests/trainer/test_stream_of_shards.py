"""The stream over stored shards: what each rank opens and checks, and what damage does on any number of ranks."""

import secrets
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace

import fsspec
import numpy as np
import pytest

from limbeck.storage_schemas import parquet, webdataset
from limbeck.storage_schemas.commit import ALL_COLUMNS
from limbeck.storage_schemas.dataset import open_dataset
from limbeck.storage_schemas.errors import CorruptShard
from limbeck.storage_schemas.store import Store
from limbeck.trainer.reading import chunks as chunks_module
from limbeck.trainer.reading.chunks import Reading
from limbeck.trainer.reading.shards import ShardSource
from limbeck.trainer.stream import Stream
from tests.trainer.conftest import write_store
from tests.trainer.test_stream import assert_same, ids_of, joined, lanes_of, take

PART = 16  # rows of a row group and of a tar's block
COUNT, EPOCH = 320, 320 // 16  # samples, and batches of them

by_format = pytest.mark.parametrize("format", ["parquet", "webdataset"])
by_kind = pytest.mark.parametrize("kind", ["folder", "memory"])


@pytest.fixture
def make(monkeypatch, tmp_path):
    """Stores of 320 rows in 5 shards of 4 parts: a folder, or what is read through the cache."""
    monkeypatch.setattr(parquet, "ROWS_PER_GROUP", PART)
    monkeypatch.setattr(webdataset, "ROWS_PER_BLOCK", PART)
    name, memory = secrets.token_hex(6), fsspec.filesystem("memory")

    def make(kind: str = "folder", **options) -> Store:
        return write_store(tmp_path / name if kind == "folder" else f"memory://{name}", count=COUNT, **options)

    yield make
    if memory.exists(f"/{name}"):
        memory.rm(f"/{name}", recursive=True)


@pytest.fixture
def source(tmp_path) -> Callable[..., ShardSource]:
    def open_source(store: Store, **options) -> ShardSource:
        reading = Reading(cache_folder=tmp_path / "cache", **options)
        return ShardSource(open_dataset(store), "train", ("output",), reading=reading)

    return open_source


@pytest.mark.parametrize("rank", range(4))
@by_format
def test_a_rank_checks_the_chunks_of_its_own_lanes_once_a_window(make, source, monkeypatch, format, rank):
    checked, loads, check, load = [], [], chunks_module.check_chunk, ShardSource.load
    columns, once = ["condition", "output"] if format == "parquet" else [ALL_COLUMNS], []

    def note_check(store, commit, chunk, data):
        one = commit.task.start + chunk.first_row, chunk.column
        (checked if chunk.column in columns else once).append(one)
        check(store, commit, chunk, data)

    def note_load(self, ids):
        checked.clear()
        rows = load(self, ids)
        loads.append((ids.tolist(), sorted(checked)))
        return rows

    monkeypatch.setattr(chunks_module, "check_chunk", note_check)
    monkeypatch.setattr(ShardSource, "load", note_load)
    ours = source(make(format=format))
    take(ours, EPOCH, block=1, rank=rank, world_size=4)
    order, row, mine = replace(lanes_of(ours), block=1), 0, range(2 * rank, 2 * rank + 2)
    for ids, parts in loads:
        window = order.window_at(row)
        assert ids == order.window_ids(window, mine).ravel().tolist()
        assert parts == [(part, name) for part in sorted({i // PART * PART for i in ids}) for name in columns]
        row = window.stop
    assert row >= COUNT // 8
    assert {name for _, name in once} == ({"sample_id", "footer"} if format == "parquet" else set())
    assert len(once) == len(set(once)), "what says whose rows they are is checked once"


def damage(store: Store) -> None:
    """A flipped bit in shard 0, shard 2 cut within its last part, shard 3 gone."""
    dataset = open_dataset(store)
    flipped, _, cut, gone, _ = (dataset.commit(shard) for shard in dataset.shards("train"))
    (chunk,) = (c for c in flipped.chunks if c.column in ("output", ALL_COLUMNS) and c.first_row == PART)
    data = bytearray(store.read(flipped.path))
    data[chunk.offset + chunk.length // 2] ^= 1
    store.write(flipped.path, bytes(data))
    (last,) = (c for c in cut.chunks if c.column in ("output", ALL_COLUMNS) and c.first_row == 3 * PART)
    store.write(cut.path, store.read(cut.path)[: last.offset + 1])
    store.remove(gone.path)


def unreadable(kind: str, format: str) -> list[list[int]]:
    """A file of another size is not read at all in a folder, nor without its footer; of an object, what is there."""
    return [[16, 32], [176, 256]] if (kind, format) == ("memory", "webdataset") else [[16, 32], [128, 256]]


@by_format
@by_kind
def test_damage_gives_any_number_of_ranks_the_same_batches(make, source, kind, format):
    store = make(kind, format=format)
    damage(store)

    def on_ranks(ranks: int, number: int, state=None):
        options = {"batch_size": 16, "seed": 0, "world_size": ranks, "state": state}
        streams = [Stream(source(store, on_corrupt="substitute"), rank=rank, **options) for rank in range(ranks)]
        batches = [joined(tuple(next(stream).each(lambda it: it.clone()) for stream in streams)) for _ in range(number)]
        mine = []
        for stream in streams:
            stream.state_dict(lambda part: mine.append(part) or [part])
        states = [stream.state_dict(lambda part: mine) for stream in streams]
        for stream in streams:
            stream.close()
        assert all(state == states[0] for state in states)
        return batches, states[0]

    whole, after = on_ranks(1, 2 * EPOCH + 3)
    lost = unreadable(kind, format)
    clean = lanes_of(source(store)).rows(0, 2 * (2 * EPOCH + 3), range(8)).reshape(8, -1, 2).transpose(1, 0, 2)
    bad = np.any([(clean >= first) & (clean < past) for first, past in lost], axis=0).reshape(-1, 16)
    np.testing.assert_array_equal(ids_of(whole) != clean.reshape(-1, 16), bad)
    assert (after["unreadable"], after["substituted"]) == (lost, bad.sum())
    for ranks in (2, 4, 8):
        batches, state = on_ranks(ranks, EPOCH + 2)
        assert_same(batches, whole[: EPOCH + 2])
        batches, state = on_ranks(8 // ranks, EPOCH + 1, state)
        assert_same(batches, whole[EPOCH + 2 :])
        assert state == after


@by_format
def test_without_leave_to_substitute_damage_ends_the_ranks_that_read_it(make, source, format):
    store = make(format=format)
    right = ids_of(take(source(store), EPOCH, block=PART)[0]).reshape(EPOCH, 8, 2)
    damage(store)
    lost = right.transpose(1, 0, 2).reshape(8, -1)
    ended = []
    for rank in range(8):
        own = lost[rank]
        if any(((own >= first) & (own < past)).any() for first, past in unreadable("folder", format)):
            ended.append(rank)
            with pytest.raises(CorruptShard, match=r"checksum|missing"):
                take(source(store), EPOCH, block=PART, rank=rank, world_size=8)
        else:
            batches, _ = take(source(store), EPOCH, block=PART, rank=rank, world_size=8)
            np.testing.assert_array_equal(ids_of(batches), right[:, rank])
    assert 0 < len(ended) < 8


@by_format
def test_without_room_in_the_cache_rows_are_what_they_are(make, source, format):
    folder, memory = make(format=format), make("memory", format=format)
    plain, _ = take(source(folder), EPOCH + 3, fresh=True)
    assert_same(take(source(memory, cache_bytes=0), EPOCH + 3)[0], plain)


ONE_BATCH_EACH = """
import sys
from pathlib import Path
from limbeck.trainer.reading.chunks import Reading
from limbeck.trainer.stream import TrajectoryStream

cache, *stores = sys.argv[1:]
for store in stores:
    batches = iter(TrajectoryStream(store, batch_size=16, reading=Reading(cache_folder=Path(cache))))
    assert len(next(batches)["output"]) == 16
    batches.close()
print("pandas" in sys.modules)
"""


def test_reading_imports_no_pandas(tmp_path):
    """Arrow imports it where a Python value becomes one of its own, and would spend most of a first batch's time so."""
    kinds = [{}, {"compression": "zstd"}, {"format": "webdataset", "quarantined": (5,)}]
    stores = [write_store(tmp_path / str(number), count=64, **kind).uri for number, kind in enumerate(kinds)]
    command = [sys.executable, "-c", ONE_BATCH_EACH, str(tmp_path / "cache"), *stores]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "False\n"

import itertools
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from storage_schemas.dataset import open_dataset
from storage_schemas.errors import CorruptShard, ManifestMismatch
from storage_schemas.record import from_storage
from trainer.shards import ShardSource
from trainer.stream import ArraySource, Batch, Stream, objective_uniforms


def source_of(store, split="train", columns=("noise", "output"), cache_bytes=1 << 20) -> ShardSource:
    return ShardSource(open_dataset(store), split, columns, cache_bytes=cache_bytes)


def take(source, number: int, *, batch_size=48, seed=0, num_uniforms=1, state=None, ahead_bytes=1 << 20):
    with Stream(
        source, batch_size=batch_size, seed=seed, num_uniforms=num_uniforms, ahead_bytes=ahead_bytes, state=state
    ) as stream:
        return list(itertools.islice(stream, number)), stream.state_dict()


def assert_same(ours: list[Batch], theirs: list[Batch]) -> None:
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert a.first == b.first
        assert a.states.keys() == b.states.keys()
        for x, y in zip(tensors(a), tensors(b), strict=True):
            assert x.dtype == y.dtype
            assert torch.equal(x, y)


def tensors(batch: Batch) -> list[torch.Tensor]:
    return [batch.ids, batch.condition, batch.uniforms, *batch.states.values()]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("format", ["parquet", "webdataset"])
def test_rows_are_the_stored_bits_of_their_ids(make_store, dtype, format):
    store = make_store(dtype=dtype, format=format, quarantined=(3, 100), window_start=5, count=250)
    dataset = open_dataset(store)
    (batch, *_), _ = take(source_of(store), 1, batch_size=200)
    for shard in dataset.shards("train"):
        stored = dataset.read(shard, ["sample_id", "output", "noise"])
        for row, sample_id in enumerate(stored["sample_id"].tolist()):
            for place in torch.nonzero(batch.ids == sample_id).flatten():
                for name in ("noise", "output"):
                    expected = from_storage(stored[name], dtype)[row].astype(np.float32)
                    np.testing.assert_array_equal(batch.states[name][place].float().numpy(), expected)
    assert batch.states["noise"].dtype == getattr(torch, dtype)


def test_an_epoch_is_each_id_once_and_the_remainder_is_carried_over(make_store):
    store = make_store(count=250, quarantined=(3, 100), missing=("train-00000002",))
    source = source_of(store)
    assert source.ids.count == 250 - 2 - 64
    batches, state = take(source, 8)
    ids = torch.cat([batch.ids for batch in batches]).numpy()
    everything = source.ids.at(np.arange(source.ids.count))
    np.testing.assert_array_equal(np.sort(ids[:184]), everything)
    np.testing.assert_array_equal(np.sort(ids[184:368]), everything)
    assert (state["epoch"], state["position"], state["consumed"]) == (2, 384 - 368, 384)


def test_resume_after_any_batch_is_bit_identical(make_store):
    store = make_store(count=200)
    whole, _ = take(source_of(store), 9)
    for done in range(1, 9):
        _, state = take(source_of(store), done)
        rest, _ = take(source_of(store), 9 - done, state=state)
        assert_same(rest, whole[done:])


def test_state_is_that_of_the_last_batch_given_not_of_those_made_ahead(make_store):
    with Stream(source_of(make_store()), batch_size=16, seed=0, ahead_bytes=1 << 24) as stream:
        next(stream)
        time.sleep(0.2)
        assert stream.state_dict()["consumed"] == 16


def test_order_does_not_depend_on_format_shards_cache_or_read_ahead(make_store):
    options = {"count": 256, "dtype": "float32"}
    plain, _ = take(source_of(make_store("a", **options)), 7)
    others = [
        take(source_of(make_store("b", format="webdataset", samples_per_shard=16, **options)), 7)[0],
        take(source_of(make_store("c", samples_per_shard=128, **options), cache_bytes=0), 7, ahead_bytes=1)[0],
    ]
    for other in others:
        assert_same(other, plain)


def test_only_the_needed_columns_are_read(make_store):
    (batch,), _ = take(source_of(make_store(), columns=("state_004", "output")), 1)
    assert set(batch.states) == {"state_004", "output"}


def test_other_content_or_seed_is_refused(make_store):
    _, state = take(source_of(make_store("a")), 2)
    with pytest.raises(ManifestMismatch, match="content_digest"):
        take(source_of(make_store("b", count=192)), 1, state=state)
    with pytest.raises(ManifestMismatch, match="seed"):
        take(source_of(make_store("c")), 1, seed=1, state=state)


def test_an_empty_split_is_refused(make_store):
    with pytest.raises(ManifestMismatch, match="holds no samples"):
        take(source_of(make_store(holdout=0), split="holdout"), 1)


def flip(store, byte: int) -> Path:
    shard = open_dataset(store).shards("train")[0]
    path = Path(store.local_path(shard.path))
    data = bytearray(path.read_bytes())
    data[byte] ^= 1
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("format", ["parquet", "webdataset"])
def test_a_flipped_bit_ends_the_stream_in_one_line(make_store, format):
    store = make_store(format=format, count=64)
    column = "noise" if format == "parquet" else "*"
    chunk = next(
        c for c in open_dataset(store).commit(open_dataset(store).shards("train")[0]).chunks if c.column == column
    )
    flip(store, chunk.offset + chunk.length // 2)
    with pytest.raises(CorruptShard, match="checksum"):
        take(source_of(store), 1)


def test_a_shard_that_reads_well_the_second_time_is_used(make_store, monkeypatch):
    store, failures = make_store(count=64), [CorruptShard("flipped in transit")]
    dataset = open_dataset(store)
    read = type(dataset).read

    def flaky(self, shard, columns):
        if failures:
            raise failures.pop()
        return read(self, shard, columns)

    monkeypatch.setattr(type(dataset), "read", flaky)
    (batch,), _ = take(ShardSource(dataset, "train", ("output",), cache_bytes=0), 1)
    assert len(batch) == 48
    assert not failures


def test_reading_ahead_is_bounded_in_bytes():
    made = []

    class Counting(ArraySource):
        def gather(self, ids):
            made.append(len(ids))
            return super().gather(ids)

    source = Counting(torch.zeros(1000, 256), torch.zeros(1000, dtype=torch.int64), "digest")
    one = 10 * (256 * 4 + 8 + 8)
    with Stream(source, batch_size=10, seed=0, ahead_bytes=3 * one) as stream:
        next(stream)
        time.sleep(0.3)
        assert 3 <= len(made) <= 5


def test_close_ends_the_thread():
    before = threading.active_count()
    source = ArraySource(torch.zeros(10, 4), torch.zeros(10, dtype=torch.int64), "digest")
    with Stream(source, batch_size=3, seed=0, ahead_bytes=1):
        assert threading.active_count() == before + 1
    assert threading.active_count() == before


def test_uniforms_belong_to_seed_and_position():
    positions = np.arange(20)
    whole = objective_uniforms(5, positions, 3)
    assert torch.equal(objective_uniforms(5, positions[7:9], 3), whole[7:9])
    assert not torch.equal(objective_uniforms(6, positions, 3), whole)
    assert whole[3, 0].item() == 0.8995823936930146


def test_split_and_move_keep_the_rows():
    states = {"output": torch.arange(6, dtype=torch.float16)[:, None]}
    batch = Batch(10, torch.arange(6), torch.arange(6), states, torch.rand(6, 2))
    parts = list(batch.split(4))
    assert [part.first for part in parts] == [10, 14]
    assert [len(part) for part in parts] == [4, 2]
    assert parts[1].to(torch.device("cpu")).states["output"].tolist() == [[4.0], [5.0]]
    assert parts[1].to(torch.device("cpu")).states["output"].dtype == torch.float32

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from limbeck.storage_schemas.ids import id_set, merge_ranges
from limbeck.storage_schemas.shards import Shard, ShardTable
from limbeck.storage_schemas.tables import decode

ranges = st.lists(st.tuples(st.integers(-5, 60), st.integers(-5, 60)), max_size=8)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 30), st.integers(0, 30), ranges)
def test_an_id_set_is_the_set_that_it_says(start: int, length: int, gaps: list[tuple[int, int]]) -> None:
    stop = start + length
    lost = {n for first, past in gaps for n in range(first, past)}
    expected = [n for n in range(start, stop) if n not in lost]
    ids = id_set(start, stop, gaps)
    assert ids.count == len(expected)
    positions = np.arange(len(expected))
    assert ids.at(positions).tolist() == expected
    assert ids.positions(np.array(expected, dtype=np.int64)).tolist() == positions.tolist()
    everything = np.arange(-3, 65)
    assert everything[ids.contains(everything)].tolist() == expected
    for refused in {start - 1, stop, *lost}:
        with pytest.raises(KeyError):
            ids.positions(np.array([refused]))
    with pytest.raises(IndexError):
        ids.at(np.array([len(expected)]))
    merged = ids.gaps
    assert np.all(merged[1:, 0] > merged[:-1, 1]), "ranges that touch are one"


def test_ten_billion_ids_cost_nothing() -> None:
    ids = id_set(5, 10**10, [(10**9, 10**9 + 7)])
    assert ids.count == 10**10 - 5 - 7
    assert ids.at(np.array([0, 10**9 - 6, 10**9 - 5, ids.count - 1])).tolist() == [5, 10**9 - 1, 10**9 + 7, 10**10 - 1]


def test_merged_ranges_are_golden() -> None:
    assert merge_ranges([(7, 9), (0, 3), (3, 4), (8, 12), (20, 20)], 1, 11).tolist() == [[1, 4], [7, 11]]
    assert merge_ranges([], 0, 10).shape == (0, 2)


def shard(index: int, quarantined: tuple[int, ...] = (), split: str = "train") -> Shard:
    name = f"{split}-{index:08d}"
    return Shard(
        task=name, split=split, start=10 * index, stop=10 * index + 10, path=f"{name}-a.tar", bytes=1,
        rows=10 - len(quarantined), sha256="0" * 64, commit_path=f"{name}.json", quarantined=quarantined,
    )  # type: ignore[arg-type]  # fmt: skip


def test_rows_are_found_past_quarantined_ids() -> None:
    one = shard(2, (20, 25))
    assert one.ids.tolist() == [21, 22, 23, 24, 26, 27, 28, 29]
    table = ShardTable.of([shard(4), one, shard(1)])
    found, rows = table.locate(np.array([49, 26, 10, 21]))
    assert (found.tolist(), rows.tolist()) == ([2, 1, 0, 1], [9, 4, 0, 0])
    for refused in (9, 30, 25, 50):
        with pytest.raises(KeyError):
            table.locate(np.array([refused]))
    assert table.gaps(15, 55).tolist() == [[20, 21], [25, 26], [30, 40], [50, 55]]


def test_a_table_comes_back_from_its_file_in_order() -> None:
    shards = [shard(3), shard(0, (4,)), shard(1, split="holdout")]
    table = ShardTable(decode(ShardTable.of(shards).to_bytes(writer="w"), 3, "table"))
    assert list(table) == [shards[1], shards[0], shards[2]]
    assert table[-1] == shards[2]
    assert list(table[1:]) == [shards[0], shards[2]]
    assert list(table.of_split("holdout")) == [shards[2]]
    assert list(table.inside("train", 9, 30)) == [shards[1]]
    assert len(table.inside("train", 10, 30)) == 0
    more = ShardTable.of([shard(2), shard(3, (31,))])
    assert list(more.plus(table)) == [shards[1], shard(2), shard(3, (31,)), shards[2]]
    assert len(ShardTable.of([]).plus(table)) == 3
    assert ShardTable.of([]).tasks == frozenset()


def test_two_hundred_thousand_shards_open_quickly() -> None:
    count = 200_000
    one = ShardTable.of([shard(0)]).table.to_pydict()
    columns = {name: values * count for name, values in one.items()} | {
        "start": np.arange(count) * 10, "stop": np.arange(count) * 10 + 10,
        "task": [f"train-{n:08d}" for n in range(count)],
    }  # fmt: skip
    import pyarrow as pa

    data = ShardTable(pa.table(columns, schema=ShardTable.of([]).table.schema)).to_bytes(writer="w")
    table = ShardTable(decode(data, count, "table"))
    ids = np.random.default_rng(0).integers(0, 10 * count, 10_000)
    found, rows = table.of_split("train").locate(ids)
    np.testing.assert_array_equal(found * 10 + rows, ids)
    assert table.gaps(0, 10 * count + 5).tolist() == [[10 * count, 10 * count + 5]]

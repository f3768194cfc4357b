"""Tables of shards that somebody else made: each is refused in one line, and costs no more than its bytes are worth."""

import copy
import hashlib
import io
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from limbeck.storage_schemas import paths
from limbeck.storage_schemas.errors import CONTROLS, CorruptShard
from limbeck.storage_schemas.layout import Layout
from limbeck.storage_schemas.manifest import Manifest, ShardTableRecord, Window
from limbeck.storage_schemas.record import SPLITS, Split
from limbeck.storage_schemas.shards import SCHEMA, Shard, ShardTable
from limbeck.storage_schemas.tables import decode, read_table

RECIPE, LAYOUT = "ab" * 32, Layout(samples_per_shard=8)
ATTEMPT, SHA = "0123456789abcdef", "cd" * 32
AT = "2026-01-01T00:00:00+00:00"
LOST = (9, 11)
FREED = 64 << 20
"""Bytes that no table of some kilobytes may ask for."""


def row(split: Split, index: int, quarantined: tuple[int, ...] = (), *, record: bool = True) -> Shard:
    name = f"{split}-{index:08d}"
    place = paths.record_path if record else lambda *it: paths.commit_path(*it[:3])
    return Shard(
        task=name, split=split, start=8 * index, stop=8 * index + 8, bytes=100, rows=8 - len(quarantined), sha256=SHA,
        path=paths.shard_path(RECIPE, LAYOUT.id, name, ATTEMPT, LAYOUT.suffix), quarantined=quarantined,
        commit_path=place(RECIPE, LAYOUT.id, name, ATTEMPT), commit_sha256=SHA if record else None,
    )  # fmt: skip


ROWS = (row("train", 0), row("train", 1, LOST), row("train", 3, record=False), row("holdout", 0))


def manifest_of(count: int) -> Manifest:
    return Manifest(
        dataset="main", number=1, parent_digest=None, writer="w", recipe_id=RECIPE, layout=LAYOUT,
        window=Window(train=(2, 32), holdout=(0, 8)), missing=("train-00000002", "holdout-00000000"),
        rows={"train": 1, "holdout": 1}, content_digest=SHA,
        shards=ShardTableRecord(path=paths.shard_table_path("main", SHA), sha256=SHA, count=count),
        train_changed_at=AT, sealed_at=AT,
    )  # fmt: skip


def plain() -> dict[str, list[Any]]:
    return copy.deepcopy(ShardTable.of(ROWS).table.to_pydict())


def file_of(columns: dict[str, Any], schema: pa.Schema = SCHEMA, **options: Any) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table(columns, schema=schema), file, **{"compression": "zstd", **options})
    return file.getvalue()


def complaint(data: bytes, count: int = len(ROWS)) -> str | None:
    """How the table is refused, in one line that names it; None if it is read. Neither takes long, nor much memory."""
    began, usual, pool = time.perf_counter(), pa.default_memory_pool(), pa.proxy_memory_pool(pa.default_memory_pool())
    pa.set_memory_pool(pool)
    try:
        read_table(data, manifest_of(count), "s3://b/table.parquet")
    except CorruptShard as error:
        told = str(error)
        assert told.startswith("s3://b/table.parquet ")
        assert told.endswith(": restore it")
        assert CONTROLS.search(told) is None
        assert len(told) < 300
        return told
    finally:
        pa.set_memory_pool(usual)
        assert time.perf_counter() - began < 5
        assert pool.max_memory() < FREED
    return None


def test_a_table_comes_back_as_it_was_sealed() -> None:
    data = ShardTable.of(ROWS).to_bytes(writer="w")
    assert list(read_table(data, manifest_of(len(ROWS)), "table")) == list(ROWS)
    assert complaint(ShardTable.of(ROWS[:-1]).to_bytes(writer="w"), len(ROWS) - 1) is None
    old = {name: values for name, values in plain().items() if name != "commit_sha256"}
    assert complaint(file_of(old, SCHEMA.remove(SCHEMA.get_field_index("commit_sha256")))) is None


NAMES = (
    "",
    "../x",
    "/etc/passwd",
    "a/../b",
    "train-1",
    "train-00000009",
    "x\x1b[2J",
    "x" * 5000,
    "é",
    "s3:x",
    "a\\b",
    "a\0b",
)
NUMBERS = (-1, 2**62, -(2**63), 10**12, 3)
CHANGES: dict[str, tuple[Any, ...]] = {
    "task": (*NAMES, ROWS[1].task, "holdout-00000000", "train-000000000", None),
    "split": (*NAMES, "holdout", "test", None),
    "start": (*NUMBERS, None),
    "stop": (*NUMBERS, None),
    "rows": (*NUMBERS, 9, None),
    "bytes": (-1, -(2**63), None),
    "path": (
        *NAMES, ROWS[1].path, ROWS[0].path.replace(RECIPE, "ef" * 32), ROWS[0].path.replace("parquet-8", "parquet-9"),
        ROWS[0].path.replace(".parquet", ".tar"), ROWS[0].path.replace(ATTEMPT, "x"), f"{ROWS[0].path}\n", None,
    ),
    "commit_path": (*NAMES, ROWS[1].commit_path, ROWS[0].path, ROWS[0].commit_path.replace(RECIPE, "ef" * 32), None),
    "sha256": (*NAMES, "AB" * 32, None),
    "commit_sha256": NAMES,
    "quarantined": ([8], [-1], [2**62], [3, 3], [4, 3], [None], [0], None),
}  # fmt: skip


@pytest.mark.parametrize("column", SCHEMA.names)
def test_every_value_is_held_to_its_row_and_its_manifest(column: str) -> None:
    for value in CHANGES[column]:
        columns = plain()
        columns[column][0] = value
        assert complaint(file_of(columns)), (column, value)


def test_rows_are_each_once_in_order_and_inside_of_the_window() -> None:
    for rows in (
        [ROWS[1], ROWS[0], *ROWS[2:]],
        [ROWS[0], *ROWS],
        [ROWS[-1], *ROWS[:-1]],
        [*ROWS[:-1], row("train", 4), ROWS[-1]],
        [*ROWS, row("holdout", 1)],
    ):
        columns = {name: [getattr(it, name) for it in rows] for name in SCHEMA.names}
        assert complaint(file_of(columns), len(rows)), [it.task for it in rows]
    assert complaint(file_of(plain()), 5) == "s3://b/table.parquet has 4 rows, its manifest says 5: restore it"


@pytest.mark.parametrize("at", range(len(ROWS)))
@pytest.mark.parametrize("split", ["test", "", "Train", "holdout ", "train\0"])
def test_there_are_two_splits(at: int, split: str) -> None:
    columns = plain()
    columns["split"][at] = split
    assert complaint(file_of(columns))


def test_other_columns_are_no_table() -> None:
    columns = plain()
    for name in SCHEMA.names:
        without = {key: value for key, value in columns.items() if key != name}
        if name != "commit_sha256":
            assert complaint(file_of(without, SCHEMA.remove(SCHEMA.get_field_index(name)))), name
    more = SCHEMA.append(pa.field("more", pa.int64()))
    assert complaint(file_of({**columns, "more": [1] * 4}, more))
    narrow = SCHEMA.set(3, pa.field("stop", pa.int32()))
    assert complaint(file_of(columns, narrow))
    large = SCHEMA.set(0, pa.field("task", pa.large_string()))
    assert complaint(file_of(columns, large))


def many(count: int, **others: Any) -> dict[str, Any]:
    """So many equal rows."""
    one = {name: values[0] for name, values in plain().items()} | others
    arrays = {name: pa.array([value], SCHEMA.field(name).type) for name, value in one.items()}
    zeros = np.zeros(count, np.int32)
    return {
        name: pa.DictionaryArray.from_arrays(zeros, array) if array.type == pa.string() else array.take(zeros)
        for name, array in arrays.items()
    }


def packed(columns: dict[str, Any], **options: Any) -> bytes:
    """The columns as a file in which a text that many rows have stands once."""
    file = io.BytesIO()
    pq.write_table(pa.table(columns), file, compression="zstd", store_schema=False, **options)
    return file.getvalue()


def alike(count: int, task: str) -> dict[str, list[Any]]:
    return {name: values[:1] * count for name, values in plain().items()} | {"task": [task] * count}


BOMBS: dict[str, Callable[[], tuple[bytes, int]]] = {
    "a text that each row repeats": lambda: (packed(many(4000, task="x" * 10**5)), 4000),
    "a text of any length": lambda: (packed(many(4, task="x" * (100 << 20))), 4),
    "rows without bytes": lambda: (packed(many(1_000_000)), 1_000_000),
    "rows in many groups": lambda: (packed(many(100_000), row_group_size=1000), 100_000),
    "ids without bytes": lambda: (packed(many(4, quarantined=[7] * 3_000_000)), 4),
    "texts that begin alike": lambda: (
        file_of(alike(400, "x" * 10**5), use_dictionary=False, column_encoding={"task": "DELTA_BYTE_ARRAY"}),
        400,
    ),
    "plain texts": lambda: (file_of(alike(400, "x" * 10**5), use_dictionary=False), 400),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_table_costs_what_its_bytes_are_worth(bomb: str) -> None:
    data, count = BOMBS[bomb]()
    assert len(data) < 2 << 20
    assert complaint(data, count)


def test_a_page_that_claims_more_than_its_column_is_refused() -> None:
    """The header of the first page, whose sizes are varints: 2 GiB where there were some bytes."""
    data = bytearray(file_of(plain(), compression="none", use_dictionary=False))
    column = pq.ParquetFile(io.BytesIO(data)).metadata.row_group(0).column(2)
    at = column.data_page_offset
    data[at : at + 14] = b"\x15\x00\x15\xfe\xff\xff\xff\x0f\x15\xfe\xff\xff\xff\x0f"
    assert complaint(bytes(data))


@settings(derandomize=True, deadline=None, max_examples=300, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_any_bytes_are_the_table_or_are_refused(data: st.DataObject) -> None:
    whole = bytearray(ShardTable.of(ROWS).to_bytes(writer="w"))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(whole) - 1))
        whole[at : at + data.draw(st.integers(0, 9))] = data.draw(st.binary(max_size=9))
    if complaint(bytes(whole)) is None:
        found = read_table(bytes(whole), manifest_of(len(ROWS)), "table")
        assert [it.task for it in found] == [it.task for it in ROWS]


@pytest.mark.parametrize("data", [b"", b"PAR1", b"PAR1" + bytes(4000) + b"PAR1", b"{}", b"\xff" * 100])
def test_what_is_no_parquet_file_is_refused(data: bytes) -> None:
    assert complaint(data)


def test_a_long_table_of_honest_rows_is_read() -> None:
    """Real tables have more bytes a row than those in which everything counts up."""
    count = 20_000
    rows = [row("train", index) for index in range(count)]
    columns = {name: [getattr(it, name) for it in rows] for name in SCHEMA.names}
    columns["sha256"] = [hashlib.sha256(it.task.encode()).hexdigest() for it in rows]
    assert decode(file_of(columns), count, "table").num_rows == count
    assert {shard.split for shard in ROWS} == set(SPLITS)

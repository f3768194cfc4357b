"""Parquet shards: one fixed-size binary column per state, so that an objective reads only what it needs."""

import io
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from storage_schemas.commit import FOOTER, Chunk, Commit, Task
from storage_schemas.errors import CorruptShard
from storage_schemas.layout import Layout
from storage_schemas.pages import Page, find_pages
from storage_schemas.ranges import check_chunk, checksum, fetch
from storage_schemas.record import Columns, Field
from storage_schemas.store import Store

ROWS_PER_GROUP = 512
PAGE_BYTES = 64 << 20  # a page's size is an int32 in the format, so large samples are written a few rows a time


def encode(
    path: str | Path, fields: Sequence[Field], columns: Columns, *, task: Task, recipe_id: str, layout: Layout
) -> tuple[Chunk, ...]:
    """Writes a shard to a local file and returns the checksum of each column of each row group, and of the footer."""
    schema = arrow_schema(fields).with_metadata({"recipe": recipe_id, "split": task.split, "task": task.name})
    table = pa.table([_arrow_array(field, columns[field.name]) for field in fields], schema=schema)
    pq.write_table(
        table,
        path,
        row_group_size=ROWS_PER_GROUP,
        compression=layout.compression,
        use_dictionary=False,
        write_statistics=[field.name for field in fields if field.is_scalar],
        write_page_checksum=True,
        write_batch_size=max(1, min(ROWS_PER_GROUP, PAGE_BYTES // max(field.nbytes for field in fields))),
    )
    return _chunks(path)


def arrow_schema(fields: Sequence[Field]) -> pa.Schema:
    """Plain integers for scalars, fixed-size binary for states, with shape and dtype in the field's metadata."""
    return pa.schema([_arrow_field(field) for field in fields])


def _arrow_field(field: Field) -> pa.Field:
    return pa.field(field.name, _arrow_type(field), nullable=False, metadata=describe(field))


def _arrow_type(field: Field) -> pa.DataType:
    return pa.from_numpy_dtype(field.numpy_dtype) if field.is_scalar else pa.binary(field.nbytes)


def describe(field: Field) -> dict[str, str]:
    """The Arrow metadata of a column: what a row is, where the type alone doesn't tell."""
    return {"shape": json.dumps(list(field.shape)), "dtype": field.dtype}


def _arrow_array(field: Field, values: np.ndarray) -> pa.Array:
    flat = np.ascontiguousarray(values)
    return pa.Array.from_buffers(_arrow_type(field), len(flat), [None, pa.py_buffer(flat.reshape(-1).view(np.uint8))])


def _chunks(path: str | Path) -> tuple[Chunk, ...]:
    metadata, chunks, first_row, end = pq.read_metadata(path), [], 0, 4
    with open(path, "rb") as file:
        for group in map(metadata.row_group, range(metadata.num_row_groups)):
            for column in map(group.column, range(group.num_columns)):
                offset, length = column.data_page_offset, column.total_compressed_size
                chunks.append(_chunk(file, column.path_in_schema, first_row, group.num_rows, offset, length))
                end = offset + length
            first_row += group.num_rows
        size = file.seek(0, io.SEEK_END)
        chunks.append(_chunk(file, FOOTER, 0, 0, end, size - end))
    return tuple(chunks)


def _chunk(file: Any, column: str, first_row: int, rows: int, offset: int, length: int) -> Chunk:
    file.seek(offset)
    xxh3 = checksum(file.read(length))
    return Chunk(column=column, first_row=first_row, rows=rows, offset=offset, length=length, xxh3=xxh3)


def decode(store: Store, commit: Commit, fields: Sequence[Field], columns: Sequence[str], *, verify: bool) -> Columns:
    """The named columns of every row, from the footer's and those columns' bytes alone."""
    needed = [chunk for chunk in commit.chunks if chunk.column in {*columns, FOOTER}]
    found = fetch(store, commit, needed)
    for chunk, data in zip(needed, found, strict=True):
        if verify or len(data) != chunk.length:
            check_chunk(store, commit, chunk, data)
    source = _Chunks(commit.bytes, dict(zip((chunk.offset for chunk in needed), found, strict=True)))
    with _as_committed(f"{store.uri}/{commit.path}"):
        table = _open(source, found[-1]).read(columns=list(columns), use_threads=False)
    by_name = {field.name: field for field in fields}
    return {name: _to_numpy(by_name[name], table.column(name)) for name in columns}


def decode_chunk(commit: Commit, field: Field, chunk: Chunk, data: memoryview, footer: memoryview) -> np.ndarray:
    """The rows [n, *shape] of one column chunk, compressed or not, from its checked bytes and the footer's."""
    source = _Chunks(commit.bytes, {chunk.offset: data})
    group = [other.first_row for other in commit.chunks if other.column == chunk.column].index(chunk.first_row)
    with _as_committed(commit.path):
        table = _open(source, footer).read_row_group(group, columns=[field.name], use_threads=False)
    if table.num_rows != chunk.rows:
        raise CorruptShard(f"{commit.path}: row group {group} has {table.num_rows} rows, its commit says {chunk.rows}")
    return _to_numpy(field, table.column(0))


def view_chunk(field: Field, rows: int, data: memoryview) -> list[np.ndarray] | None:
    """The same as views of the bytes, a page each; None where they aren't plain rows. Not for a compressed file."""
    pages = find_pages(data, rows, field.nbytes)
    return None if pages is None else [_page_view(field, page, data) for page in pages]


def _page_view(field: Field, page: Page, data: memoryview) -> np.ndarray:
    return np.ndarray((page.rows, *field.shape), field.numpy_dtype, data, page.offset)


@contextmanager
def _as_committed(name: str) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise CorruptShard(f"{name} is not the Parquet file of its commit: {error}") from None


def _open(source: "_Chunks", footer: memoryview) -> pq.ParquetFile:
    metadata = pq.read_metadata(pa.BufferReader(footer))
    # pre_buffer would join reads across columns that were not fetched
    return pq.ParquetFile(pa.PythonFile(source, mode="r"), metadata=metadata, pre_buffer=False)


class _Chunks(io.RawIOBase):
    """A file of which only the checked chunks exist: what was not checked can't be read."""

    def __init__(self, size: int, chunks: dict[int, memoryview]) -> None:
        self._size, self._chunks, self._at = size, chunks, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def size(self) -> int:
        return self._size

    def read(self, length: int = -1) -> Any:
        data = self._chunks.get(self._at)
        if data is None or not 0 <= length <= len(data):
            raise OSError(f"bytes {self._at} to {self._at + length} were not checked")
        self._at += length
        return data[:length]


def _to_numpy(field: Field, column: pa.ChunkedArray) -> np.ndarray:
    pieces = [_view(field, piece) for piece in column.chunks]
    return np.concatenate(pieces) if pieces else np.empty((0, *field.shape), field.numpy_dtype)


def _view(field: Field, array: pa.Array) -> np.ndarray:
    flat = np.frombuffer(array.buffers()[1], field.numpy_dtype)
    row = field.nbytes // field.numpy_dtype.itemsize
    return flat[array.offset * row : (array.offset + len(array)) * row].reshape(len(array), *field.shape)

"""Parquet shards: one fixed-size binary column per state, so that an objective reads only what it needs."""

import io
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from limbeck.storage_schemas.commit import FOOTER, Chunk, Commit, Task
from limbeck.storage_schemas.errors import CorruptShard, shown
from limbeck.storage_schemas.file_format import Fields, Part, Read, View, is_footer, rows_follow
from limbeck.storage_schemas.pages import Page, find_pages
from limbeck.storage_schemas.ranges import check_chunk, checksum, fetch
from limbeck.storage_schemas.record import Columns, Field
from limbeck.storage_schemas.store import Store

SUFFIX = ".parquet"
COMPRESSIONS: tuple[str, ...] = ("none", "zstd")
ROWS_PER_GROUP = 512
_MAGIC = 4
"""Bytes before the first column."""

_CHECKED = 512
"""Bytes that it takes to remember of a row group that its integers are checked, about."""

_PLAIN = {"PLAIN", "RLE"}
"""Encodings of a required column without a dictionary: RLE is that of levels, which it has none of."""

PAGE_BYTES = 64 << 20  # a page's size is an int32 in the format, so large samples are written a few rows a time


def encode(
    path: str | Path, fields: Fields, columns: Columns, *, task: Task, recipe_id: str, compression: str
) -> tuple[Chunk, ...]:
    """Writes a shard to a local file and returns the checksum of each column of each row group, and of the footer."""
    schema = arrow_schema(fields).with_metadata(_provenance(task, recipe_id))
    table = pa.table([_arrow_array(field, columns[field.name]) for field in fields], schema=schema)
    pq.write_table(
        table,
        path,
        row_group_size=ROWS_PER_GROUP,
        compression=compression,
        use_dictionary=False,
        write_statistics=[field.name for field in fields if field.is_scalar],
        write_page_checksum=True,
        write_batch_size=max(1, min(ROWS_PER_GROUP, PAGE_BYTES // max(field.nbytes for field in fields))),
    )
    return _chunks(path)


def _provenance(task: Task, recipe_id: str) -> dict[str, str]:
    """The Arrow metadata of a file: whose samples it holds."""
    return {"recipe": recipe_id, "split": task.split, "task": task.name}


def arrow_schema(fields: Fields) -> pa.Schema:
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


def decode(store: Store, commit: Commit, fields: Fields, columns: Sequence[str], *, verify: bool) -> Columns:
    """The named columns of every row, from the footer's and those columns' bytes alone."""
    needed = [chunk for chunk in commit.chunks if chunk.column in {*columns, FOOTER}]
    found = fetch(store, commit, needed)
    for chunk, data in zip(needed, found, strict=True):
        if verify or len(data) != chunk.length:
            check_chunk(store, commit, chunk, data)
    check_footer(commit, fields, found[-1])
    by_name = {field.name: field for field in fields}
    pieces: dict[str, list[np.ndarray]] = {name: [] for name in columns}
    for chunk, data in zip(needed[:-1], found[:-1], strict=True):
        pieces[chunk.column].append(decode_chunk(commit, by_name[chunk.column], chunk, data, found[-1]))
    return {name: _joined(by_name[name], arrays) for name, arrays in pieces.items()}


def check_footer(commit: Commit, fields: Fields, footer: memoryview) -> None:
    """CorruptShard unless the footer describes the file that its commit does: columns of these fields, where they are.

    Then every reader finds the same rows, whether it goes by the footer or by the commit.
    """
    with _as_committed(commit.path):
        metadata = pq.read_metadata(pa.BufferReader(footer))
        problem = _other_columns(commit, fields, metadata.schema.to_arrow_schema()) or _other_groups(commit, metadata)
    if problem:
        raise CorruptShard(f"{commit.path} is not the Parquet file of its commit: its footer says other {problem}")


def _other_columns(commit: Commit, fields: Fields, schema: pa.Schema) -> str | None:
    if not schema.equals(arrow_schema(fields)):
        return "columns than its recipe's"
    said = [(field.metadata or {}, describe(mine)) for field, mine in zip(schema, fields, strict=True)]
    said.append((schema.metadata or {}, _provenance(commit.task, commit.recipe_id)))
    if any(found.get(key.encode()) != value.encode() for found, mine in said for key, value in mine.items()):
        return "shapes, types, recipe or task"
    return None


def _other_groups(commit: Commit, metadata: pq.FileMetaData) -> str | None:
    *chunks, _ = commit.chunks
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    columns = [(group.num_rows, group.column(number)) for group in groups for number in range(group.num_columns)]
    found = [(it.path_in_schema, rows, it.data_page_offset, it.total_compressed_size) for rows, it in columns]
    if found != [(chunk.column, chunk.rows, chunk.offset, chunk.length) for chunk in chunks]:
        return "rows or places of its columns than its commit"
    if metadata.num_rows != commit.rows or any(it.num_values != rows for rows, it in columns):
        return "numbers of rows than its commit"
    codec = "ZSTD" if _is_compressed(commit) else "UNCOMPRESSED"
    plain = all(it.compression == codec and {*it.encodings} <= _PLAIN for _, it in columns)
    return None if plain and not any(it.has_dictionary_page for _, it in columns) else "encodings than its layout's"


def _is_compressed(commit: Commit) -> bool:
    return "-zstd-" in commit.layout_id


def covers(commit: Commit, fields: Fields) -> bool:
    """Whether each row group has one chunk a field, in order, and the footer ends the file."""
    if not commit.chunks or len(commit.chunks) % len(fields) != 1:
        return False
    footer, groups = commit.chunks[-1], _groups(commit, fields)
    return (
        all([chunk.column for chunk in group] == [field.name for field in fields] for group in groups)
        and all(len({(chunk.first_row, chunk.rows) for chunk in group}) == 1 for group in groups)
        and rows_follow([group[0] for group in groups], commit.rows)
        and all(before.offset + before.length <= after.offset for before, after in pairwise(commit.chunks))
        and (commit.chunks[0].offset >= _MAGIC or not commit.rows)
        and is_footer(footer, commit)
    )


def _groups(commit: Commit, fields: Fields) -> list[tuple[Chunk, ...]]:
    """The chunks of each row group, without the footer."""
    *chunks, _ = commit.chunks
    return [tuple(chunks[at : at + len(fields)]) for at in range(0, len(chunks), len(fields))]


def split(commit: Commit, every: Fields, fields: Fields, read: Read, *, decode: bool) -> list[Part]:
    """The row groups, once the footer is found to describe them."""
    check_footer(commit, every, *read(commit.chunks[-1:]))
    wanted = {field.name for field in fields}
    integers = {field.name for field in every if field.is_scalar}
    return [
        Part(
            commit, group[0].first_row, group[0].rows, tuple(chunk for chunk in group if chunk.column in wanted),
            decode, tuple(chunk for chunk in group if chunk.column in integers),
        )
        for group in _groups(commit, every)
    ]  # fmt: skip


def view(part: Part, fields: Fields, data: dict[str, memoryview], known: Any) -> View:
    """The pages of a row group's columns."""
    chunks = {chunk.column: chunk for chunk in (*part.integers, *part.chunks)}
    columns = {field.name: view_chunk(part.commit, field, chunks[field.name], data[field.name]) for field in fields}
    return View(columns, known=True, weight=_CHECKED)


def decoder(part: Part, fields: Fields, read: Read) -> Callable[[Field], np.ndarray]:
    """Each column is decoded by itself, with the footer."""
    footer = part.commit.chunks[-1]
    chunks = {chunk.column: chunk for chunk in (*part.integers, *part.chunks)}

    def rows(field: Field) -> np.ndarray:
        chunk = chunks[field.name]
        return decode_chunk(part.commit, field, chunk, *read((chunk, footer)))

    return rows


def decode_chunk(commit: Commit, field: Field, chunk: Chunk, data: memoryview, footer: memoryview) -> np.ndarray:
    """The rows [n, *shape] of one column chunk, compressed or not, from its checked bytes and the footer's.

    The pages' own sizes are held against the rows first: a page of some bytes may claim to hold gigabytes.
    """
    if not chunk.rows:
        return _joined(field, [])
    if not _is_compressed(commit):
        return _joined(field, view_chunk(commit, field, chunk, data))
    _pages(commit, field, chunk, data)
    source = _Chunks(commit.bytes, {chunk.offset: data})
    group = [other.first_row for other in commit.chunks if other.column == chunk.column].index(chunk.first_row)
    with _as_committed(commit.path):
        table = _open(source, footer).read_row_group(group, columns=[field.name], use_threads=False)
    if table.num_rows != chunk.rows or table.column(0).null_count:
        raise CorruptShard(f"{commit.path}: row group {group} has other rows than the {chunk.rows} of its commit")
    return _to_numpy(field, table.column(0))


def _pages(commit: Commit, field: Field, chunk: Chunk, data: memoryview) -> list[Page]:
    pages = find_pages(data, chunk.rows, field.nbytes, compressed=_is_compressed(commit))
    if pages is None:
        problem = f"column {field.name} from row {chunk.first_row} on is no {chunk.rows} rows of {field.nbytes} bytes"
        raise CorruptShard(f"{commit.path} is not the Parquet file of its commit: {problem}")
    return pages


def _joined(field: Field, arrays: list[np.ndarray]) -> np.ndarray:
    if len(arrays) == 1:
        return arrays[0]
    return np.concatenate(arrays) if arrays else np.empty((0, *field.shape), field.numpy_dtype)


def view_chunk(commit: Commit, field: Field, chunk: Chunk, data: memoryview) -> list[np.ndarray]:
    """The same as views of the bytes, a page each. Not for a compressed file."""
    return [_page_view(field, page, data) for page in _pages(commit, field, chunk, data)]


def _page_view(field: Field, page: Page, data: memoryview) -> np.ndarray:
    return np.ndarray((page.rows, *field.shape), field.numpy_dtype, data, page.offset)


@contextmanager
def _as_committed(name: str) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError, ValueError, MemoryError, OverflowError) as error:
        why = shown(" ".join(str(error).split()))
        raise CorruptShard(f"{name} is not the Parquet file of its commit: {why}") from None


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
    return _joined(field, [_view(field, piece) for piece in column.chunks])


def _view(field: Field, array: pa.Array) -> np.ndarray:
    flat = np.frombuffer(array.buffers()[1], field.numpy_dtype)
    row = field.nbytes // field.numpy_dtype.itemsize
    return flat[array.offset * row : (array.offset + len(array)) * row].reshape(len(array), *field.shape)

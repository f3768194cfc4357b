"""The file of a table of shards, read as what somebody else wrote.

What its footer and the headers of its pages say is held against its bytes before anything is decoded, and its rows are
held against the manifest that names it before anything is made of them.
"""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from limbeck.storage_schemas import paths
from limbeck.storage_schemas.errors import CorruptShard
from limbeck.storage_schemas.manifest import Manifest
from limbeck.storage_schemas.pages import stored_pages
from limbeck.storage_schemas.record import SPLITS, Split
from limbeck.storage_schemas.shards import SCHEMA, ShardTable, integers

MOST_TABLE = 1 << 30
"""Bytes of a table's file: some millions of shards."""

MOST_ROW = 1024
"""Bytes of a row without its quarantined ids, once they are decompressed."""

_LEAST_ROW, _LEAST_ID = 4, 1 / 8
"""Bytes that a row and a quarantined id have in a file: tables in which all names count up have ten a row."""

_SLACK = 1 << 16
_LONGEST = 512
"""Characters of any text in a table, at most."""

_ENCODINGS = (0, 2, 3, 8)
"""Plain, dictionary, RLE: the only ones that we write. Of others a few bytes may be long texts."""

_HEX = np.isin(np.arange(256), np.frombuffer(b"0123456789abcdef", np.uint8))
_SHA256, _ATTEMPT = 64, 16
_INDEX, _LONGEST_INDEX = 8, 18
_AT_ONCE = 1 << 16

_TEXTS = [field.name for field in SCHEMA if field.type == pa.string()]


def read_table(data: bytes, manifest: Manifest, source: str) -> ShardTable:
    """The shards that a manifest lists; CorruptShard where the file, read from `source`, can't be their table."""
    shards = ShardTable(decode(data, manifest.shards.count, source))
    for problem in _problems(shards, manifest):
        raise CorruptShard(f"{source} {problem}: restore it")
    return shards


def decode(data: bytes, count: int, source: str) -> pa.Table:
    """The table in a file that should have `count` rows. Nothing is allocated that its bytes can't account for."""
    try:
        file = pq.ParquetFile(pa.BufferReader(data), thrift_string_size_limit=len(data))
        problem = _oversized(data, file.metadata, count) or _mistyped(file.schema_arrow) or _talkative(data)
        if not problem:
            # Without Arrow's thread pools: a program that ends soon after has been seen to abort in their shutdown.
            table = file.read(use_threads=False)
    except (pa.ArrowException, OSError, ValueError, OverflowError, MemoryError):
        problem = "is no table of shards"
    if problem:
        raise CorruptShard(f"{source} {problem}: restore it")
    if "commit_sha256" not in table.column_names:  # an older release's
        table = table.append_column(SCHEMA.field("commit_sha256"), pa.nulls(len(table), pa.string()))
    return table.cast(SCHEMA)


def _oversized(data: bytes, footer: pq.FileMetaData, count: int) -> str | None:
    """How the footer and the pages don't account for each other, or for the rows that there should be."""
    groups = [footer.row_group(index) for index in range(footer.num_row_groups)]
    if footer.num_rows != count or sum(group.num_rows for group in groups) != count:
        return f"has {footer.num_rows} rows, its manifest says {count}"
    if count * _LEAST_ROW > len(data):
        return f"has {count} rows in {len(data)} bytes, which is too few"
    for group in groups:
        for index in range(group.num_columns):
            column = group.column(index)
            values = column.num_values
            is_list = column.path_in_schema.startswith("quarantined.")
            if values < group.num_rows or values > (len(data) / _LEAST_ID if is_list else group.num_rows):
                return f"has {values} values of {column.path_in_schema!r} in {group.num_rows} rows"
            if not _add_up(data, column, group.num_rows * MOST_ROW + 16 * is_list * values + _SLACK):
                return f"has pages of {column.path_in_schema!r} that are not those of {group.num_rows} rows"
    return None


def _add_up(data: bytes, column: pq.ColumnChunkMetaData, most: int) -> bool:
    """Whether a column's pages hold the values that the footer says, in at most so many bytes once decompressed."""
    start = column.dictionary_page_offset if column.has_dictionary_page else column.data_page_offset
    chunk = memoryview(data)[start : start + column.total_compressed_size]
    pages = stored_pages(chunk) if 0 < start <= len(data) and len(chunk) == column.total_compressed_size else None
    return (
        pages is not None
        and sum(page.size for page in pages) <= most
        and sum(page.values for page in pages if not page.is_dictionary) == column.num_values
        and not any(page.is_dictionary for page in pages[1:])
        and all(page.encoding in _ENCODINGS for page in pages)
    )


def _mistyped(schema: pa.Schema) -> str | None:
    """Which column is another than ours; only an older release's table may lack the commits' digests."""
    wanted = [field for field in SCHEMA if field.name in schema.names or field.name != "commit_sha256"]
    if [(field.name, field.type) for field in schema] == [(field.name, field.type) for field in wanted]:
        return None
    return "has other columns than a table of shards"


def _talkative(data: bytes) -> str | None:
    """Whether a text is longer than a path: one that stands in a dictionary once would be there in every row."""
    names = [name for name in pq.read_schema(pa.BufferReader(data)).names if name in _TEXTS]
    file = pq.ParquetFile(pa.BufferReader(data), read_dictionary=names)
    for group in range(file.num_row_groups):
        # A batch of one row has the whole dictionary of its row group.
        for batch in file.iter_batches(1, row_groups=[group], columns=names, use_threads=False):
            for column in batch.columns:
                longest = pc.max(pc.binary_length(column.dictionary)).as_py()
                if (longest or 0) > _LONGEST:
                    return f"holds a text of {longest} bytes"
            break
    return None


def _problems(shards: ShardTable, manifest: Manifest) -> Iterator[str]:
    """What of the rows is not as a manifest's are: the first one counts, later ones may build on it."""
    table = shards.table
    for name in table.column_names:
        if name != "commit_sha256" and table[name].null_count:
            yield f"has rows without {name!r}"
    if pc.list_flatten(table["quarantined"]).null_count:
        yield "has quarantined ids that are none"
    for split in SPLITS:
        mine = shards.of_split(split)
        yield from _misplaced(mine, split, manifest)
        for batch in mine.table.to_batches(max_chunksize=_AT_ONCE):
            if name := _misnamed(batch, split, manifest):
                yield f"has a {name!r} that no {split} shard of its manifest has"


def _misplaced(shards: ShardTable, split: Split, manifest: Manifest) -> Iterator[str]:
    """Ids and counts that are not those of the split's tasks, each once and in order."""
    size, starts, table = manifest.layout.samples_per_shard, shards.starts, shards.table
    tasks = manifest.window.task_range(split, size)
    if len(starts) and not (tasks.start * size <= starts[0] and starts[-1] < tasks.stop * size):
        yield f"has {split} shards outside of the window"
    elif np.any(np.diff(starts) <= 0) or np.any(starts % size) or not np.array_equal(shards.stops, starts + size):
        yield f"has {split} shards that are not each once, in order and with the ids of a task"
    lengths = integers(pc.cast(pc.list_value_length(table["quarantined"]), pa.int64()))
    lost = integers(pc.list_flatten(table["quarantined"]))
    lows = np.repeat(starts, lengths)
    if not (np.all(lost >= lows) and np.all(lost < lows + size) and np.all(np.diff(lost) > 0)):
        yield f"has quarantined {split} ids that are not each once, in order and inside of their shard"
    if not np.array_equal(shards.rows, size - lengths) or np.any(integers(table["bytes"]) < 0):
        yield f"has {split} shards with other rows or bytes than a file of theirs"


def _misnamed(batch: pa.RecordBatch, split: Split, manifest: Manifest) -> str | None:
    """The column with a name that is not its task's, in this recipe and layout; None where all are.

    Texts of equal lengths are compared as a matrix of their characters: a regular expression takes a second a million.
    """
    recipe, layout = manifest.recipe_id, manifest.layout
    places = paths.shards_folder, paths.commits_folder, paths.records_folder
    shards, commits, records = (f"{place(recipe, layout.id)}/".encode() for place in places)
    texts = [_Texts(batch.column(name)) for name in ("task", "path", "commit_path")]
    indices = integers(pa.chunked_array([batch.column("start")])) // layout.samples_per_shard
    alike = sum(text.lengths.astype(np.int64) << 20 * place for place, text in enumerate(texts))
    for lengths in np.unique(alike):
        where = np.flatnonzero(alike == lengths)
        task, path, commit = (text.rows(where) for text in texts)
        digits = task[:, len(split) + 1 :]
        width = digits.shape[1]
        if not (_reads(task, f"{split}-".encode(), width) and _are_numbers(digits, indices[where])):
            return "task"
        if not _reads(path, shards, task, b"-", _ATTEMPT, layout.suffix.encode()):
            return "path"
        record = path[:, len(shards) : -len(layout.suffix)]
        if not (_reads(commit, commits, task, b".json") or _reads(commit, records, record, b".json")):
            return "commit_path"
    for name, part in (("split", split.encode()), ("sha256", _SHA256), ("commit_sha256", _SHA256)):
        column = _Texts(batch.column(name).drop_null())
        size = part if isinstance(part, int) else len(part)
        if np.any(column.lengths != size) or (len(column.lengths) and not _reads(column.rows(), part)):
            return name
    return None


class _Texts:
    """A column of texts as bytes."""

    def __init__(self, array: pa.Array) -> None:
        _, offsets, data = array.buffers()
        self._data = np.frombuffer(data, np.uint8) if data else np.empty(0, np.uint8)
        self._ends = np.frombuffer(offsets, np.int32)[array.offset : array.offset + len(array) + 1]
        self.lengths = np.diff(self._ends)

    def rows(self, where: np.ndarray | None = None) -> np.ndarray:
        """The texts at these indices, all by default, which are of one length: uint8 [n, length]."""
        if where is None or len(where) == len(self.lengths):
            return self._data[self._ends[0] : self._ends[-1]].reshape(len(self.lengths), -1)
        return self._data[self._ends[where][:, None] + np.arange(self.lengths[where[0]])]


def _reads(texts: np.ndarray, *parts: bytes | np.ndarray | int) -> bool:
    """Whether each text is made of these parts: given ones, those of another column, or so many hex digits."""
    at = 0
    for part in parts:
        size = part if isinstance(part, int) else len(part) if isinstance(part, bytes) else part.shape[1]
        piece = texts[:, at : at + size]
        wanted = np.frombuffer(part, np.uint8) if isinstance(part, bytes) else part
        if piece.shape[1] != size or not np.all(_HEX[piece] if isinstance(part, int) else piece == wanted):
            return False
        at += size
    return at == texts.shape[1]


def _are_numbers(digits: np.ndarray, numbers: np.ndarray) -> bool:
    """Whether each text is its number, as it stands in a task's name."""
    width = digits.shape[1]
    if not _INDEX <= width <= _LONGEST_INDEX or np.any(digits > ord("9")):
        return False
    if width > _INDEX and np.any(digits[:, 0] == ord("0")):
        return False
    return np.array_equal((digits - np.uint8(ord("0"))) @ 10 ** np.arange(width - 1, -1, -1), numbers)

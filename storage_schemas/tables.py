"""The file of a table of shards, read as what somebody else wrote.

What its footer and the headers of its pages say is held against its bytes before anything is decoded, and its rows are
held against the manifest that names it before anything is made of them.
"""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from storage_schemas import paths
from storage_schemas.errors import CorruptShard
from storage_schemas.manifest import Manifest
from storage_schemas.pages import stored_pages
from storage_schemas.paths import INDEX
from storage_schemas.record import SPLITS, Split
from storage_schemas.shards import SCHEMA, ShardTable, integers

MOST_TABLE = 1 << 30
"""Bytes of a table's file: some millions of shards."""

MOST_ROW = 1024
"""Bytes of a row without its quarantined ids, once they are decompressed."""

_LEAST_ROW, _LEAST_ID = 4, 1 / 8
"""Bytes that a row and a quarantined id have in a file: tables in which all names count up have ten a row."""

_SLACK = 1 << 16
_LONGEST = 512
"""Of any text in a table."""

_ENCODINGS = (0, 2, 3, 8)
"""Plain, dictionary, RLE: the only ones that we write. Of others a few bytes may be long texts."""

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
            table.validate(full=True)
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
        yield from _misnamed(mine.table, split, manifest)
        yield from _misplaced(mine, split, manifest)


def _misnamed(table: pa.Table, split: Split, manifest: Manifest) -> Iterator[str]:
    """Names that are not those of the split's tasks, shards and commits in this recipe and layout."""
    recipe, layout = manifest.recipe_id, manifest.layout
    shards, commits = (f"{folder(recipe, layout.id)}/" for folder in (paths.shards_folder, paths.commits_folder))
    records = f"{paths.records_folder(recipe, layout.id)}/"
    attempt = "-[0-9a-f]{16}"
    for name, pattern in (
        ("split", split),
        ("task", f"{split}-{INDEX}"),
        ("path", f"{shards}{split}-{INDEX}{attempt}[.]{layout.suffix[1:]}"),
        ("commit_path", f"({commits}{split}-{INDEX}|{records}{split}-{INDEX}{attempt})[.]json"),
    ):
        if not _all(pc.match_substring_regex(table[name], rf"\A{pattern}\z")):
            yield f"has a {name!r} that no {split} shard of its manifest has"
    for name in ("sha256", "commit_sha256"):
        if not _all(pc.match_substring_regex(table[name], r"\A[0-9a-f]{64}\z")):
            yield f"has a {name!r} that is no digest"
    for name in ("path", "commit_path"):
        own = pc.replace_substring_regex(table[name], rf"\A.*/({split}-[0-9]+)[-.].*\z", r"\1")
        if not _all(pc.equal(own, table["task"])):
            yield f"has a {name!r} of another task than its row's"


def _misplaced(shards: ShardTable, split: Split, manifest: Manifest) -> Iterator[str]:
    """Ids and counts that are not those of the split's tasks, each once and in order."""
    size, table = manifest.layout.samples_per_shard, shards.table
    first, starts = len(split) + 1, shards.starts
    indices = integers(pc.cast(pc.utf8_slice_codeunits(table["task"], first, 1 << 10), pa.int64()))
    tasks = manifest.window.task_range(split, size)
    if len(starts) and not (tasks.start <= indices[0] and indices[-1] < tasks.stop and np.all(np.diff(indices) > 0)):
        yield f"has {split} shards that are not each once, in order and inside of the window"
    elif not (np.array_equal(starts, indices * size) and np.array_equal(shards.stops, starts + size)):
        yield f"has {split} shards with other ids than their tasks have"
    lengths = integers(pc.cast(pc.list_value_length(table["quarantined"]), pa.int64()))
    lost = integers(pc.list_flatten(table["quarantined"]))
    lows = np.repeat(starts, lengths)
    if not (np.all(lost >= lows) and np.all(lost < lows + size) and np.all(np.diff(lost) > 0)):
        yield f"has quarantined {split} ids that are not each once, in order and inside of their shard"
    if not np.array_equal(shards.rows, size - lengths) or np.any(integers(table["bytes"]) < 0):
        yield f"has {split} shards with other rows or bytes than a file of theirs"


def _all(mask: pa.ChunkedArray) -> bool:
    """Whether it is true of every row; of a null, which only an unknown digest is, it counts as true."""
    return bool(pc.all(mask, min_count=0).as_py())

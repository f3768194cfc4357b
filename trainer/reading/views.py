"""Where the rows of a shard's chunks lie: views of their bytes, in both formats.

What can't be viewed (compressed Parquet, a tar that somebody else wrote) is decoded once, into the disk cache.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache

import numpy as np

from storage_schemas import parquet, webdataset
from storage_schemas.commit import ALL_COLUMNS, Chunk, Commit
from storage_schemas.errors import CorruptShard
from storage_schemas.record import Columns, Field
from trainer.reading.chunks import Chunks
from trainer.reading.recent import Recent

_DECODERS = 4
_PARSED = 16 << 20  # bytes

Views = dict[str, list[np.ndarray]]
"""Column -> arrays [n, *shape] whose rows follow one another. The bytes of one row lie together."""


@dataclass(frozen=True)
class Part:
    """Rows of a shard that are opened together: a Parquet row group, a block of rows of a tar, or all of a tar.

    chunks: for Parquet one a field. decode: their bytes are not the rows.
    """

    commit: Commit
    first_row: int
    rows: int
    chunks: tuple[Chunk, ...]
    decode: bool


def split_parts(commit: Commit, fields: Sequence[Field], *, decode: bool) -> list[Part]:
    """The parts of a shard in the order of their rows, with the chunks that hold these fields."""
    if not _is_tar(commit):
        columns = [[chunk for chunk in commit.chunks if chunk.column == field.name] for field in fields]
        parts = [_part(commit, chunks, decode) for chunks in zip(*columns, strict=False)]
    else:
        blocks = [chunk for chunk in commit.chunks if chunk.column == ALL_COLUMNS]
        if decode or not all(block.rows for block in blocks):
            return [Part(commit, 0, commit.rows, commit.chunks, decode=True)]
        parts = [_part(commit, (block,), decode) for block in blocks]
    _check_cover(commit, parts)
    return parts


def _is_tar(commit: Commit) -> bool:
    return not commit.path.endswith(".parquet")


def _part(commit: Commit, chunks: tuple[Chunk, ...], decode: bool) -> Part:
    return Part(commit, chunks[0].first_row, chunks[0].rows, chunks, decode)


def _check_cover(commit: Commit, parts: Sequence[Part]) -> None:
    end = 0
    for part in parts:
        if {(chunk.first_row, chunk.rows) for chunk in part.chunks} == {(end, part.rows)}:
            end += part.rows
    if end != commit.rows:
        raise CorruptShard(f"{commit.commit_path}: the chunks don't cover its {commit.rows} rows: restore it")


@dataclass(frozen=True)
class _Block:
    """What is remembered of a block of a tar: how its rows are laid out, and the integers in their JSON."""

    stride: int
    members: dict[str, tuple[int, int]]
    integers: Columns

    def weight(self) -> int:
        """Bytes, about."""
        return 1024 + sum(array.nbytes for array in self.integers.values())


class Viewer:
    """Opens parts and finds their rows. Any number of threads."""

    def __init__(self, chunks: Chunks, fields: Sequence[Field]) -> None:
        self._chunks, self._fields = chunks, tuple(fields)
        self._scalars = [field for field in fields if field.is_scalar]
        self._tars: Recent[str, _Block] = Recent(_PARSED)

    def open(self, parts: Sequence[Part]) -> list[Views | CorruptShard | None]:
        """For each part its rows, or why they can't be had, or None where it must be decoded and did not say so."""
        plain = [part for part in parts if not part.decode]
        found = iter(self._chunks.open([(part.commit, chunk) for part in plain for chunk in part.chunks]))
        views = iter([self._view(part, [next(found) for _ in part.chunks]) for part in plain])
        with ThreadPoolExecutor(_DECODERS) as threads:
            decoded = threads.map(self._decoded, [part for part in parts if part.decode])
            return [next(decoded) if part.decode else next(views) for part in parts]

    def _view(self, part: Part, found: Sequence[memoryview | CorruptShard]) -> Views | CorruptShard | None:
        data = [piece for piece in found if not isinstance(piece, CorruptShard)]
        if len(data) < len(found):
            return next(piece for piece in found if isinstance(piece, CorruptShard))
        return self._view_block(part, data[0]) if _is_tar(part.commit) else self._view_group(part, data)

    def _view_group(self, part: Part, found: Sequence[memoryview]) -> Views | None:
        views: Views = {}
        for field, data in zip(self._fields, found, strict=True):
            pages = parquet.view_chunk(field, part.rows, data)
            if pages is None:
                return None
            views[field.name] = pages
        return views

    def _view_block(self, part: Part, data: memoryview) -> Views | None:
        try:
            tar = self._tars.get(part.chunks[0].xxh3, lambda: self._read_block(data, part.rows), _Block.weight)
            states = webdataset.RegularRows(data, part.rows, tar.stride, tar.members).states(self._fields)
        except webdataset.NOT_OURS:
            return None
        return {name: [array] for name, array in (states | tar.integers).items()}

    def _read_block(self, data: memoryview, rows: int) -> "_Block":
        block = webdataset.regular_block(data, rows)
        if block is None or not block.holds(self._fields):
            raise ValueError("not regular")
        return _Block(block.stride, block.members, block.scalars(self._scalars))

    def _decoded(self, part: Part) -> Views | CorruptShard:
        try:
            return self._decode_tar(part) if _is_tar(part.commit) else self._decode_group(part)
        except CorruptShard as error:
            return error

    def _decode_tar(self, part: Part) -> Views:
        """A tar is parsed once for all its columns, and only where one is not in the cache."""

        @cache
        def columns() -> Columns:
            data = memoryview(b"".join(self._bytes(part.commit, part.chunks)))
            return webdataset.parse(data, self._fields, part.rows, name=part.commit.path)

        def rows(field: Field) -> np.ndarray:
            return self._derived(f"{part.commit.sha256}-{field.name}", field, lambda: columns()[field.name])

        return {field.name: [rows(field)] for field in self._fields}

    def _decode_group(self, part: Part) -> Views:
        footer = part.commit.chunks[-1]

        def decode(field: Field, chunk: Chunk) -> np.ndarray:
            return parquet.decode_chunk(part.commit, field, chunk, *self._bytes(part.commit, (chunk, footer)))

        def rows(field: Field, chunk: Chunk) -> np.ndarray:
            return self._derived(f"{chunk.xxh3}-rows", field, lambda: decode(field, chunk))

        pairs = zip(self._fields, part.chunks, strict=True)
        return {field.name: [rows(field, chunk)] for field, chunk in pairs}

    def _bytes(self, commit: Commit, chunks: Sequence[Chunk]) -> list[memoryview]:
        found = []
        for data in self._chunks.open([(commit, chunk) for chunk in chunks]):
            if isinstance(data, CorruptShard):
                raise data
            found.append(data)
        return found

    def _derived(self, name: str, field: Field, make: Callable[[], np.ndarray]) -> np.ndarray:
        data = self._chunks.derived(name, lambda: make().tobytes())
        return np.frombuffer(data, field.numpy_dtype).reshape(-1, *field.shape)

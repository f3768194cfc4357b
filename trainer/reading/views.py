"""Where the rows of a shard's chunks lie: views of their bytes, in both formats.

What can't be viewed (compressed Parquet, a tar that somebody else wrote) is decoded once, into the disk cache.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial

import numpy as np

from limbeck.storage_schemas import parquet, webdataset
from limbeck.storage_schemas.claims import check_integers, ids_of
from limbeck.storage_schemas.commit import ALL_COLUMNS, Chunk, Commit
from limbeck.storage_schemas.errors import CorruptShard
from limbeck.storage_schemas.recipe import Recipe
from limbeck.storage_schemas.record import Columns, Field
from limbeck.trainer.reading.chunks import Chunks, Found
from limbeck.trainer.reading.recent import Recent

_DECODERS = 4
_PARSED = 16 << 20  # bytes
_REMEMBERED = 1 << 16  # parts, some 100 bytes each

Views = dict[str, list[np.ndarray]]
"""Column -> arrays [n, *shape] whose rows follow one another. The bytes of one row lie together."""


@dataclass(frozen=True)
class Part:
    """Rows of a shard that are opened together: a Parquet row group, a block of rows of a tar, or all of a tar.

    chunks: for Parquet one a field. integers: for Parquet those of its integers, which are checked once. decode: the
    bytes of chunks are not the rows.
    """

    commit: Commit
    first_row: int
    rows: int
    chunks: tuple[Chunk, ...]
    decode: bool
    integers: tuple[Chunk, ...] = ()


def split_parts(commit: Commit, fields: Sequence[Field], recipe: Recipe, *, decode: bool) -> list[Part]:
    """The parts of a shard in the order of their rows, with the chunks that hold these fields."""
    if _is_tar(commit):
        blocks = [chunk for chunk in commit.chunks if chunk.column == ALL_COLUMNS]
        if decode or not all(block.rows for block in blocks):
            return [Part(commit, 0, commit.rows, commit.chunks, decode=True)]
        return [Part(commit, block.first_row, block.rows, (block,), decode) for block in blocks]
    *chunks, _ = commit.chunks
    width = len(recipe.fields)
    return [_group(commit, chunks[at : at + width], fields, recipe, decode) for at in range(0, len(chunks), width)]


def _group(commit: Commit, group: Sequence[Chunk], fields: Sequence[Field], recipe: Recipe, decode: bool) -> Part:
    by_name = {chunk.column: chunk for chunk in group}
    integers = tuple(by_name[field.name] for field in recipe.fields if field.is_scalar)
    wanted = tuple(by_name[field.name] for field in fields)
    return Part(commit, group[0].first_row, group[0].rows, wanted, decode, integers)


def _is_tar(commit: Commit) -> bool:
    return not commit.path.endswith(".parquet")


@dataclass(frozen=True)
class _Block:
    """A parsed block of a tar: the layout of its rows, and the integers in their JSON."""

    stride: int
    members: dict[str, tuple[int, int]]
    integers: Columns

    def weight(self) -> int:
        """Bytes, about."""
        return 1024 + sum(array.nbytes for array in self.integers.values())


class Viewer:
    """Opens parts and finds their rows. Any number of threads."""

    def __init__(self, chunks: Chunks, recipe: Recipe, fields: Sequence[Field]) -> None:
        self._chunks, self._recipe, self._fields = chunks, recipe, tuple(fields)
        self._by_name = {field.name: field for field in recipe.fields}
        self._integers = [field for field in recipe.fields if field.is_scalar]
        self._tars: Recent[tuple[str, int], _Block] = Recent(_PARSED)
        self._known: Recent[tuple[str, int], bool] = Recent(_REMEMBERED)

    def check(self, commit: Commit) -> None:
        """Raise CorruptShard unless a Parquet file's footer is what its commit and recipe say."""
        if not _is_tar(commit):
            parquet.check_footer(commit, self._recipe.fields, *self._chunks.checked(commit, commit.chunks[-1:]))

    def open(self, parts: Sequence[Part]) -> list[Views | CorruptShard | None]:
        """For each part its rows, or why they can't be had, or None where it must be decoded and did not say so."""
        plain = [(part, self._wanted(part)) for part in parts if not part.decode]
        found = iter(self._chunks.open([(part.commit, chunk) for part, chunks in plain for chunk in chunks.values()]))
        views = iter([self._view(part, {name: next(found) for name in chunks}) for part, chunks in plain])
        with ThreadPoolExecutor(_DECODERS) as threads:
            decoded = threads.map(self._decoded, [part for part in parts if part.decode])
            return [next(decoded) if part.decode else next(views) for part in parts]

    def _wanted(self, part: Part) -> dict[str, Chunk]:
        """The chunks of its columns, and those of a row group's integers where this process has not checked them."""
        return {chunk.column: chunk for chunk in (*part.chunks, *self._unchecked(part))}

    def _unchecked(self, part: Part) -> tuple[Chunk, ...]:
        return () if self._known.find((part.commit.digest, part.first_row)) else part.integers

    def _check_integers(self, part: Part, integers: Columns) -> None:
        check_integers(self._recipe, part.commit, integers, first_row=part.first_row)
        self._known.get((part.commit.digest, part.first_row), lambda: True, lambda _: 1)

    def _view(self, part: Part, found: Mapping[str, Found]) -> Views | CorruptShard | None:
        data = {name: piece for name, piece in found.items() if not isinstance(piece, CorruptShard)}
        if len(data) < len(found):
            return next(piece for piece in found.values() if isinstance(piece, CorruptShard))
        if _is_tar(part.commit):
            return self._view_block(part, data[ALL_COLUMNS])
        try:
            return self._view_group(part, data)
        except CorruptShard as error:
            return error

    def _view_group(self, part: Part, data: Mapping[str, memoryview]) -> Views:
        views = {
            name: parquet.view_chunk(part.commit, self._by_name[name], chunk, data[name])
            for name, chunk in self._wanted(part).items()
        }
        if unchecked := self._unchecked(part):
            self._check_integers(part, {chunk.column: np.concatenate(views[chunk.column]) for chunk in unchecked})
        return {field.name: views[field.name] for field in self._fields}

    def _view_block(self, part: Part, data: memoryview) -> Views | CorruptShard | None:
        try:
            key = part.commit.digest, part.first_row
            tar = self._tars.get(key, lambda: self._read_block(part, data), _Block.weight)
            states = webdataset.RegularRows(data, part.rows, tar.stride, tar.members).states(self._fields)
        except CorruptShard as error:
            return error
        except webdataset.NOT_OURS:
            return None
        return {name: [array] for name, array in (states | tar.integers).items()}

    def _read_block(self, part: Part, data: memoryview) -> "_Block":
        block = webdataset.regular_block(data, part.rows)
        if block is None or not block.holds(self._fields):
            raise ValueError("not regular")
        names = webdataset.sample_names(part.commit.split, ids_of(part.commit, part.first_row, part.rows))
        webdataset.check_names(block.names, names)
        integers = block.scalars(self._integers)
        check_integers(self._recipe, part.commit, integers, first_row=part.first_row)
        kept = {field.name: integers[field.name] for field in self._fields if field.is_scalar}
        return _Block(block.stride, block.members, kept)

    def _decoded(self, part: Part) -> Views | CorruptShard:
        try:
            return self._decode_tar(part) if _is_tar(part.commit) else self._decode_group(part)
        except CorruptShard as error:
            return error

    def _decode_tar(self, part: Part) -> Views:
        """A tar is parsed once for all its columns, and only where one is not in the cache."""

        @cache
        def columns() -> Columns:
            commit, wanted = part.commit, dict.fromkeys((*self._fields, *self._integers))
            data = memoryview(b"".join(self._chunks.checked(commit, part.chunks)))
            names = webdataset.sample_names(commit.split, ids_of(commit))
            found = webdataset.parse(data, [*wanted], names, name=commit.path)
            check_integers(self._recipe, commit, found)
            return found

        def rows(field: Field) -> np.ndarray:
            return self._derived(part, field, lambda: columns()[field.name])

        return {field.name: [rows(field)] for field in self._fields}

    def _decode_group(self, part: Part) -> Views:
        commit, footer = part.commit, part.commit.chunks[-1]

        def decode(field: Field, chunk: Chunk) -> np.ndarray:
            return parquet.decode_chunk(commit, field, chunk, *self._chunks.checked(commit, (chunk, footer)))

        def rows(field: Field, chunk: Chunk) -> np.ndarray:
            return self._derived(part, field, partial(decode, field, chunk))

        if unchecked := self._unchecked(part):
            pairs = zip(self._integers, unchecked, strict=True)
            self._check_integers(part, {field.name: rows(field, chunk) for field, chunk in pairs})
        return {field.name: [rows(field, chunk)] for field, chunk in zip(self._fields, part.chunks, strict=True)}

    def _derived(self, part: Part, field: Field, make: Callable[[], np.ndarray]) -> np.ndarray:
        """Rows of a part, kept under a sum of the commit's own bytes: all that they were checked against stands there.

        Never under a sum that a document claims of another file: those bytes need not be the ones that were read.
        """
        name = f"{part.commit.digest} {part.first_row} {field.name} {field.dtype} {field.shape}"
        data = self._chunks.derived(name, lambda: make().tobytes(), size=part.rows * field.nbytes)
        return np.frombuffer(data, field.numpy_dtype).reshape(part.rows, *field.shape)

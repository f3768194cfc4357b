"""Where the rows of a shard's chunks lie: views of their bytes, in any format.

What can't be viewed (compressed Parquet, a tar that somebody else wrote) is decoded once, into the disk cache.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np

from limbeck.storage_schemas.claims import check_integers
from limbeck.storage_schemas.commit import Chunk, Commit
from limbeck.storage_schemas.errors import CorruptShard
from limbeck.storage_schemas.file_format import Part, Views
from limbeck.storage_schemas.layout import format_of
from limbeck.storage_schemas.recipe import Recipe
from limbeck.storage_schemas.record import Columns, Field
from limbeck.trainer.reading.chunks import Chunks, Found
from limbeck.trainer.reading.recent import Recent

_DECODERS = 4
_REMEMBERED = 32 << 20  # bytes
_SMALL = 512


class Viewer:
    """Splits shards into parts, opens these and finds their rows. Any number of threads."""

    def __init__(self, chunks: Chunks, recipe: Recipe, fields: Sequence[Field]) -> None:
        self._chunks, self._recipe, self._fields = chunks, recipe, tuple(fields)
        self._integers = [field for field in recipe.fields if field.is_scalar]
        self._every = tuple(dict.fromkeys((*fields, *self._integers)))
        self._known: Recent[tuple[str, int, bool], Any] = Recent(_REMEMBERED)

    def split(self, commit: Commit, *, decode: bool) -> list[Part]:
        """The parts of a shard in the order of their rows. CorruptShard where the file says other ones."""
        read = partial(self._chunks.checked, commit)
        return format_of(commit).split(commit, self._recipe.fields, self._fields, read, decode=decode)

    def open(self, parts: Sequence[Part]) -> list[Views | CorruptShard | None]:
        """For each part its rows, or why they can't be had, or None where it must be decoded and did not say so."""
        plain = [(part, known := self._find(part), _needed(part, known)) for part in parts if not part.decode]
        wanted = [(part.commit, chunk) for part, _, chunks in plain for chunk in chunks.values()]
        found = iter(self._chunks.open(wanted))
        views = iter([self._view(part, known, {name: next(found) for name in chunks}) for part, known, chunks in plain])
        with ThreadPoolExecutor(_DECODERS) as threads:
            decoded = threads.map(self._decoded, [part for part in parts if part.decode])
            return [next(decoded) if part.decode else next(views) for part in parts]

    def _find(self, part: Part) -> Any:
        """What is known of a part whose integers this process has checked, else None."""
        return self._known.find((part.commit.digest, part.first_row, part.decode))

    def _check(self, part: Part, integers: Columns, known: Any, weight: int) -> None:
        check_integers(self._recipe, part.commit, integers, first_row=part.first_row)
        self._known.get((part.commit.digest, part.first_row, part.decode), lambda: known, lambda _: weight)

    def _view(self, part: Part, known: Any, found: Mapping[str, Found]) -> Views | CorruptShard | None:
        data = {name: piece for name, piece in found.items() if not isinstance(piece, CorruptShard)}
        if len(data) < len(found):
            return next(piece for piece in found.values() if isinstance(piece, CorruptShard))
        wanted = self._fields if known else self._every
        try:
            view = format_of(part.commit).view(part, wanted, data, known)
            if view is None:
                return None
            if not known:
                integers = {field.name: np.concatenate(view.columns[field.name]) for field in self._integers}
                self._check(part, integers, view.known, view.weight)
        except CorruptShard as error:
            return error
        return {field.name: view.columns[field.name] for field in self._fields}

    def _decoded(self, part: Part) -> Views | CorruptShard:
        decode = format_of(part.commit).decoder(part, self._every, partial(self._chunks.checked, part.commit))

        def rows(field: Field) -> np.ndarray:
            return self._derived(part, field, partial(decode, field))

        try:
            if not self._find(part):
                self._check(part, {field.name: rows(field) for field in self._integers}, True, _SMALL)
            return {field.name: [rows(field)] for field in self._fields}
        except CorruptShard as error:
            return error

    def _derived(self, part: Part, field: Field, make: Callable[[], np.ndarray]) -> np.ndarray:
        """Rows of a part, kept under a sum of the commit's own bytes: all that they were checked against stands there.

        Never under a sum that a document claims of another file: those bytes need not be the ones that were read.
        """
        name = f"{part.commit.digest} {part.first_row} {field.name} {field.dtype} {field.shape}"
        data = self._chunks.derived(name, lambda: make().tobytes(), size=part.rows * field.nbytes)
        return np.frombuffer(data, field.numpy_dtype).reshape(part.rows, *field.shape)


def _needed(part: Part, known: Any) -> dict[str, Chunk]:
    """The chunks of its columns, and those of its integers until they are checked."""
    return {chunk.column: chunk for chunk in (*part.chunks, *(() if known else part.integers))}

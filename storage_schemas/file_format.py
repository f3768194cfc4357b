"""What a file format is: a module with the names of `FileFormat`, and a row of `FORMATS` in layout.py."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from limbeck.storage_schemas.commit import FOOTER, Chunk, Commit, Task
from limbeck.storage_schemas.record import Columns, Field
from limbeck.storage_schemas.store import Store

Fields = Sequence[Field]
Views = dict[str, list[np.ndarray]]
"""Column -> arrays [n, *shape] whose rows follow one another. The bytes of one row lie together."""

Read = Callable[[Sequence[Chunk]], list[memoryview]]
"""The bytes of chunks, checked against their checksums."""


@dataclass(frozen=True)
class Part:
    """Rows of a shard that are opened together, such as a Parquet row group or a block of rows of a tar.

    chunks: those with the wanted columns. integers: those with all integer columns, where these lie in chunks of their
    own: they are opened until they are checked. decode: the bytes of chunks are not the rows.
    """

    commit: Commit
    first_row: int
    rows: int
    chunks: tuple[Chunk, ...]
    decode: bool
    integers: tuple[Chunk, ...] = ()


class View(NamedTuple):
    """Rows of a part where they lie. known: what finds them faster the next time; weight: its bytes, about."""

    columns: Views
    known: Any
    weight: int


class FileFormat(Protocol):
    """A module that writes, reads and maps the shards of one format. `every` is all fields of the recipe.

    Functions raise CorruptShard where bytes are not what their commit says.
    """

    SUFFIX: str
    """File name ending of a shard."""

    COMPRESSIONS: tuple[str, ...]
    """Compressions of a layout that it has."""

    def encode(
        self, path: str | Path, fields: Fields, columns: Columns, *, task: Task, recipe_id: str, compression: str
    ) -> tuple[Chunk, ...]:
        """Write a shard to a local file: the same input gives the same bytes. The chunks cover the file."""

    def decode(self, store: Store, commit: Commit, fields: Fields, columns: Sequence[str], *, verify: bool) -> Columns:
        """The named columns of every row of a committed shard."""

    def covers(self, commit: Commit, fields: Fields) -> bool:
        """Whether the chunks of a commit hold its rows, one after another, and end with the file."""

    def split(self, commit: Commit, every: Fields, fields: Fields, read: Read, *, decode: bool) -> list[Part]:
        """The parts of a shard in the order of their rows, with the chunks that hold `fields`."""

    def view(self, part: Part, fields: Fields, data: dict[str, memoryview], known: Any) -> View | None:
        """The rows of these fields as views of the bytes of its chunks, None for bytes that must be decoded.

        known: as it was found before; None for the first time, when `fields` has every integer.
        """

    def decoder(self, part: Part, fields: Fields, read: Read) -> Callable[[Field], np.ndarray]:
        """A function from one of these fields to its rows [n, *shape], for a part that must be decoded."""


def rows_follow(chunks: Sequence[Chunk], rows: int) -> bool:
    """Whether they hold the rows one after another, none of them empty where there are any."""
    ends = [0, *(chunk.first_row + chunk.rows for chunk in chunks)]
    return (
        [chunk.first_row for chunk in chunks] == ends[:-1]
        and ends[-1] == rows
        and all(chunk.rows > 0 and chunk.length > 0 for chunk in chunks if rows)
    )


def is_footer(chunk: Chunk, commit: Commit) -> bool:
    """Whether a chunk ends the file and holds no rows."""
    placed = chunk.column, chunk.first_row, chunk.rows, chunk.offset + chunk.length
    return placed == (FOOTER, 0, 0, commit.bytes) and chunk.length > 0

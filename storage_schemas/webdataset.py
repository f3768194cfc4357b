"""WebDataset shards: tar files whose rows all have the same size, so that our reader maps them as strided arrays.

    train-000000000123.noise.npy  .state_006.npy  ...  .output.npy  .json

mtime is 0 and the owner fixed, else a PAX record would come before each member. bfloat16 is two bytes of no type of
numpy's, "|V2" as ml_dtypes saves it too, and the .json names it: any reader that takes it for numbers fails at once.
"""

import io
import json
import tarfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from storage_schemas.commit import ALL_COLUMNS, FOOTER, Chunk, Commit, Task
from storage_schemas.errors import CorruptShard
from storage_schemas.layout import Layout
from storage_schemas.ranges import check_chunk, checksum, fetch
from storage_schemas.record import Columns, Field
from storage_schemas.store import Store

ROWS_PER_BLOCK = 256
BLOCK_BYTES = 64 << 20
BLOCK = tarfile.BLOCKSIZE

BFLOAT16 = ("|V2", "<u2")
"""What a .npy says of bfloat16, and what ours said at first, which readers took for integers."""

NOT_OURS = (ValueError, KeyError, TypeError, AttributeError, OverflowError, EOFError)
"""What it raises to read members as ours that hold something else."""


def encode(
    path: str | Path, fields: Sequence[Field], columns: Columns, *, task: Task, recipe_id: str, layout: Layout
) -> tuple[Chunk, ...]:
    """Writes a shard to a local file and returns the checksum of each block of rows, and of what ends the file."""
    writer = _RowWriter(fields, columns, task)
    rows, chunks, offset = len(columns["sample_id"]), [], 0
    step = max(1, min(ROWS_PER_BLOCK, BLOCK_BYTES // writer.stride))
    with open(path, "wb") as file:
        for first in range(0, rows, step):
            block = writer.block(first, min(step, rows - first))
            chunks.append(_chunk(ALL_COLUMNS, first, len(block), offset, block.data))
            offset += file.write(block.data)
        trailer = bytes(2 * BLOCK + -(offset + 2 * BLOCK) % tarfile.RECORDSIZE)
        chunks.append(_chunk(FOOTER, 0, 0, offset, trailer))
        file.write(trailer)
    return tuple(chunks)


def _chunk(column: str, first_row: int, rows: int, offset: int, data: Any) -> Chunk:
    view = memoryview(data).cast("B")
    return Chunk(
        column=column, first_row=first_row, rows=rows, offset=offset, length=len(view), xxh3=checksum(view)
    )  # fmt: skip


class _RowWriter:
    """Rows of a tar as one array [n, stride] of bytes: member headers, npy headers and data at fixed places."""

    def __init__(self, fields: Sequence[Field], columns: Columns, task: Task) -> None:
        self.columns, self.split = columns, task.split
        self.states = [field for field in fields if not field.is_scalar]
        self.scalars = [field for field in fields if field.is_scalar]
        self.npy = {field.name: _npy_headers(field)[0] for field in self.states}
        self.texts = {"split": self.split} | ({"dtype": "bfloat16"} if _is_bfloat16(self.states) else {})
        self.sizes = {f"{field.name}.npy": len(self.npy[field.name]) + field.nbytes for field in self.states}
        self.sizes["json"] = self._json_size()
        self.stride = sum(BLOCK + _padded(size) for size in self.sizes.values())

    def _json_size(self) -> int:
        longest = {**self.texts, **{field.name: -(2**63) for field in self.scalars}}
        return -(-len(json.dumps(longest)) // 64) * 64

    def block(self, first: int, rows: int) -> np.ndarray:
        """Rows [first, first + rows), uint8 [rows, stride]."""
        out = np.zeros((rows, self.stride), np.uint8)
        at = 0
        for suffix, size in self.sizes.items():
            out[:, at : at + BLOCK] = self._headers(suffix, size, first, rows)
            out[:, at + BLOCK : at + BLOCK + size] = self._contents(suffix, first, rows)
            at += BLOCK + _padded(size)
        return out

    def _headers(self, suffix: str, size: int, first: int, rows: int) -> np.ndarray:
        ids = self.columns["sample_id"][first : first + rows]
        joined = b"".join(_header(f"{self.split}-{sample:012d}.{suffix}", size) for sample in ids)
        return np.frombuffer(joined, np.uint8).reshape(rows, BLOCK)

    def _contents(self, suffix: str, first: int, rows: int) -> np.ndarray:
        if suffix == "json":
            joined = b"".join(self._json(row) for row in range(first, first + rows))
            return np.frombuffer(joined, np.uint8).reshape(rows, -1)
        name = suffix.removesuffix(".npy")
        data = np.ascontiguousarray(self.columns[name][first : first + rows]).reshape(rows, -1).view(np.uint8)
        header = np.frombuffer(self.npy[name], np.uint8)
        return np.concatenate([np.broadcast_to(header, (rows, len(header))), data], axis=1)

    def _json(self, row: int) -> bytes:
        values = {field.name: int(self.columns[field.name][row]) for field in self.scalars}
        return json.dumps({**self.texts, **values}).encode().ljust(self.sizes["json"])


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _header(name: str, size: int) -> bytes:
    member = tarfile.TarInfo(name)
    member.size, member.mode = size, 0o444
    return member.tobuf(format=tarfile.USTAR_FORMAT)


def _is_bfloat16(states: Sequence[Field]) -> bool:
    return any(field.dtype == "bfloat16" for field in states)


@lru_cache
def _npy_headers(field: Field) -> tuple[bytes, ...]:
    """What a state's .npy begins with, and what it began with in older shards; all of one length."""
    described = BFLOAT16 if field.dtype == "bfloat16" else (field.numpy_dtype.str,)
    return tuple(_npy_header(descr, field.shape) for descr in described)


def _npy_header(descr: str, shape: tuple[int, ...]) -> bytes:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": descr, "fortran_order": False, "shape": shape})
    return header.getvalue()


def decode(store: Store, commit: Commit, fields: Sequence[Field], columns: Sequence[str], *, verify: bool) -> Columns:
    """The named columns of every row; views of the file where its rows are regular, else parsed as any tar."""
    whole = Chunk(column=ALL_COLUMNS, first_row=0, rows=commit.rows, offset=0, length=commit.bytes, xxh3="0" * 32)
    (data,) = fetch(store, commit, [whole])
    if verify or len(data) != commit.bytes:
        for chunk in commit.chunks:
            check_chunk(store, commit, chunk, data[chunk.offset : chunk.offset + chunk.length])
    wanted = [field for field in fields if field.name in columns]
    return parse(data, wanted, commit.rows, name=f"{store.uri}/{commit.path}")


def parse(data: memoryview, fields: Sequence[Field], rows: int, *, name: str) -> Columns:
    """These columns out of a whole tar: views where its rows are regular, else parsed as anybody's."""
    if not rows:
        return {field.name: np.empty((0, *field.shape), field.numpy_dtype) for field in fields}
    try:
        regular = regular_rows(data, rows)
        found = regular.columns(fields) if regular and regular.holds(fields) else decode_foreign_tar(data)
        return {field.name: _as_stored(field, rows, found[field.name]) for field in fields}
    except (tarfile.TarError, *NOT_OURS) as error:
        raise CorruptShard(f"{name} is not the tar of its commit: {error}") from None


def _as_stored(field: Field, rows: int, values: np.ndarray) -> np.ndarray:
    if field.dtype == "bfloat16" and values.dtype == BFLOAT16[0]:
        values = values.view(field.numpy_dtype)
    if values.shape != (rows, *field.shape) or not (field.is_scalar or values.dtype == field.numpy_dtype):
        have, need = f"{values.dtype}{list(values.shape)}", f"{field.dtype}{[rows, *field.shape]}"
        raise ValueError(f"{field.name} is {have}, not {need}")
    return values.astype(field.numpy_dtype, copy=False)


@dataclass(frozen=True)
class RegularRows:
    """A tar whose rows repeat every `stride` bytes; `members` maps a suffix to (offset in a row, bytes)."""

    data: memoryview
    rows: int
    stride: int
    members: dict[str, tuple[int, int]]

    def columns(self, fields: Sequence[Field]) -> Columns:
        """States that it holds as views of the file; integers out of the JSON, one of NOT_OURS where it has others."""
        return self.states(fields) | self.scalars([field for field in fields if field.is_scalar])

    def holds(self, fields: Sequence[Field]) -> bool:
        """Whether every row has the states of these fields, as we store them."""
        return all(self._has(field) for field in fields if not field.is_scalar)

    def _has(self, field: Field) -> bool:
        offset, size = self.members.get(f"{field.name}.npy", (0, 0))
        headers = [np.frombuffer(header, np.uint8) for header in _npy_headers(field)]
        if size != len(headers[0]) + field.nbytes:
            return False
        found = self._along((len(headers[0]),), np.dtype(np.uint8), offset)
        return any((found == header).all() for header in headers)

    def states(self, fields: Sequence[Field]) -> Columns:
        """Views [rows, *shape] of the fields that are not scalars and that it holds."""
        return {field.name: self._state(field) for field in fields if not field.is_scalar}

    def _state(self, field: Field) -> np.ndarray:
        offset, _ = self.members[f"{field.name}.npy"]
        return self._along(field.shape, field.numpy_dtype, offset + len(_npy_headers(field)[0]))

    def _along(self, shape: tuple[int, ...], dtype: np.dtype, offset: int) -> np.ndarray:
        """What lies at `offset` of each row: [rows, *shape]."""
        inner = np.empty(shape, dtype).strides
        return np.ndarray((self.rows, *shape), dtype, self.data, offset, (self.stride, *inner))

    def scalars(self, fields: Sequence[Field]) -> Columns:
        """The integers of these fields, parsed out of every row's JSON."""
        if not fields:
            return {}
        offset, size = self.members["json"]
        texts = self._along((), np.dtype(f"S{size}"), offset)
        parsed = json.loads(b"[" + b",".join(texts.tolist()) + b"]")
        return {
            field.name: np.array([_integer(row[field.name]) for row in parsed], field.numpy_dtype) for field in fields
        }

    def has_everywhere(self) -> bool:
        """Whether the headers of every row name these members, of these sizes, after keys of one length."""
        for offset, _ in self.members.values():
            headers = self._along((BLOCK,), np.dtype(np.uint8), offset - BLOCK)
            key = max(0, bytes(headers[0]).find(b"."))
            if not all((part == part[0]).all() for part in (headers[:, key:100], headers[:, 124:136])):
                return False
        return True


def _integer(value: Any) -> int:
    if type(value) is not int:
        raise ValueError(f"{value!r} is no integer")
    return value


def regular_rows(data: memoryview, rows: int) -> RegularRows | None:
    """The row layout of a tar made by `encode`, None for another tar: the headers of all rows must agree."""
    end = rows * _row_size(_row_members(data, 0))
    if len(data) < end + 2 * BLOCK or any(data[end : end + 2 * BLOCK]):
        return None
    return regular_block(data[:end], rows)


def regular_block(data: memoryview, rows: int) -> RegularRows | None:
    """The same for a block of rows, without what ends a tar."""
    stride, rest = divmod(len(data), rows)
    try:
        first, last = _row_members(data[:stride], 0), _row_members(data[-stride:], 0)
    except tarfile.TarError:  # no row begins there
        return None
    if rest or first != last or _row_size(first) != stride:
        return None
    found = RegularRows(data, rows, stride, first)
    return found if found.has_everywhere() else None


def _row_members(data: memoryview, start: int) -> dict[str, tuple[int, int]]:
    """Suffix -> (offset of the contents, bytes) of the members that share the key of the header at `start`."""
    members: dict[str, tuple[int, int]] = {}
    key, at = None, start
    while at + BLOCK <= len(data) and any(data[at : at + BLOCK]):
        header = tarfile.TarInfo.frombuf(bytes(data[at : at + BLOCK]), "utf-8", "strict")
        name, _, suffix = header.name.partition(".")
        if not header.isreg() or name != (key := key or name):
            break
        members[suffix] = (at + BLOCK, header.size)
        at += BLOCK + _padded(header.size)
    return members


def _row_size(members: dict[str, tuple[int, int]]) -> int:
    return sum(BLOCK + _padded(size) for _, size in members.values())


def decode_foreign_tar(data: bytes | memoryview) -> Columns:
    """Columns of any WebDataset tar of .npy and .json members, as somebody else may have written it.

    Samples are runs of members that share what is before the file name's first dot. Integers in a .json become columns.
    """
    rows = [_sample(members) for members in _samples(data)]
    if any(row.keys() != rows[0].keys() for row in rows):
        raise ValueError("the samples of the tar don't all have the same columns")
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]} if rows else {}


def _samples(data: bytes | memoryview) -> Iterator[dict[str, bytes]]:
    samples: dict[str, dict[str, bytes]] = defaultdict(dict)
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
        for member in tar:
            folder, slash, name = member.name.rpartition("/")
            key, _, suffix = name.partition(".")
            contents = tar.extractfile(member) if member.isfile() else None
            if contents is not None:
                samples[folder + slash + key][suffix.lower()] = contents.read()
    yield from samples.values()


def _sample(members: dict[str, bytes]) -> dict[str, np.ndarray]:
    row: dict[str, np.ndarray] = {}
    for suffix, contents in members.items():
        if suffix.endswith(".npy") or suffix == "npy":
            row[suffix.removesuffix(".npy")] = np.load(io.BytesIO(contents), allow_pickle=False)
        elif suffix == "json":
            values = json.loads(contents)
            row |= {name: np.int64(value) for name, value in values.items() if type(value) is int}
    return row

"""WebDataset shards: tar files whose rows all have the same size, so that our reader maps them as strided arrays.

    train-000000000123.noise.npy  .state_006.npy  ...  .output.npy  .json

mtime is 0 and the owner fixed, else a PAX record would come before each member. bfloat16 is two bytes of no type of
numpy's, "|V2" as ml_dtypes saves it too, and the .json names it: any reader that takes it for numbers fails at once.
"""

import io
import json
import math
import re
import tarfile
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from limbeck.storage_schemas.commit import ALL_COLUMNS, FOOTER, Chunk, Commit, Task, ids_of
from limbeck.storage_schemas.errors import CorruptShard, shown
from limbeck.storage_schemas.file_format import Fields, Part, Read, View, is_footer, rows_follow
from limbeck.storage_schemas.ranges import check_chunk, checksum, fetch
from limbeck.storage_schemas.record import Columns, Field
from limbeck.storage_schemas.store import Store

SUFFIX = ".tar"
COMPRESSIONS: tuple[str, ...] = ("none",)
ROWS_PER_BLOCK = 256
BLOCK_BYTES = 64 << 20
BLOCK = tarfile.BLOCKSIZE

BFLOAT16 = ("|V2", "<u2")
"""Type codes of bfloat16 in a .npy: ours now, and ours at first, which readers took for integers."""

NOT_OURS = (
    ValueError, KeyError, TypeError, AttributeError, OverflowError, EOFError, RecursionError, SyntaxError, MemoryError,
)  # fmt: skip
"""Exceptions raised by reading members as ours that hold something else."""

_HEADER = 1024
"""Bytes of an .npy header, at most: numpy parses it as Python."""

_JSON = 1 << 20
"""Bytes that a sample's JSON may have."""


def encode(
    path: str | Path, fields: Fields, columns: Columns, *, task: Task, recipe_id: str, compression: str
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

    def __init__(self, fields: Fields, columns: Columns, task: Task) -> None:
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
        joined = b"".join(_header(f"{name}.{suffix}", size) for name in sample_names(self.split, ids))
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


def sample_names(split: str, ids: np.ndarray) -> list[str]:
    """What samples are called in a tar: train-000000000123."""
    return [f"{split}-{sample:012d}" for sample in ids.tolist()]


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _header(name: str, size: int) -> bytes:
    member = tarfile.TarInfo(name)
    member.size, member.mode = size, 0o444
    return member.tobuf(format=tarfile.USTAR_FORMAT)


def _is_bfloat16(states: Fields) -> bool:
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


def decode(store: Store, commit: Commit, fields: Fields, columns: Sequence[str], *, verify: bool) -> Columns:
    """The named columns of every row; views of the file where its rows are regular, else parsed as any tar."""
    whole = Chunk(column=ALL_COLUMNS, first_row=0, rows=commit.rows, offset=0, length=commit.bytes, xxh3="0" * 32)
    (data,) = fetch(store, commit, [whole])
    if verify or len(data) != commit.bytes:
        for chunk in commit.chunks:
            check_chunk(store, commit, chunk, data[chunk.offset : chunk.offset + chunk.length])
    wanted = [field for field in fields if field.name in columns]
    return parse(data, wanted, sample_names(commit.split, ids_of(commit)), name=f"{store.uri}/{commit.path}")


def covers(commit: Commit, fields: Fields) -> bool:
    """Whether the blocks follow each other and cover the file; of somebody else's tar they may not say which rows."""
    if not commit.chunks:
        return False
    last = commit.chunks[-1]
    blocks = commit.chunks[:-1] if last.column == FOOTER else commit.chunks
    unsaid = commit.rows > 0 and not any(chunk.rows or chunk.first_row for chunk in blocks)
    return (
        all(chunk.column == ALL_COLUMNS for chunk in blocks)
        and (unsaid or rows_follow(blocks, commit.rows))
        and commit.chunks[0].offset == 0
        and all(before.offset + before.length == after.offset for before, after in pairwise(commit.chunks))
        and (is_footer(last, commit) if last.column == FOOTER else last.offset + last.length == commit.bytes)
    )


def split(commit: Commit, every: Fields, fields: Fields, read: Read, *, decode: bool) -> list[Part]:
    """The blocks of rows; all of a tar that must be decoded, or doesn't say which rows its blocks hold."""
    blocks = [chunk for chunk in commit.chunks if chunk.column == ALL_COLUMNS]
    if decode or not all(block.rows for block in blocks):
        return [Part(commit, 0, commit.rows, commit.chunks, decode=True)]
    return [Part(commit, block.first_row, block.rows, (block,), decode=False) for block in blocks]


def view(part: Part, fields: Fields, data: dict[str, memoryview], known: Any) -> View | None:
    """States in a block of regular rows, and the integers out of their JSON; None for other rows.

    known: what their layout is, and the integers.
    """
    try:
        block = known or _read_block(part, fields, data[ALL_COLUMNS])
        states = RegularRows(data[ALL_COLUMNS], part.rows, block.stride, block.members).states(fields)
    except NOT_OURS:
        return None
    return View({name: [array] for name, array in (states | block.integers).items()}, block, block.weight)


@dataclass(frozen=True)
class _Block:
    """A parsed block of a tar: the layout of its rows, and the integers in their JSON."""

    stride: int
    members: dict[str, tuple[int, int]]
    integers: Columns

    @cached_property
    def weight(self) -> int:
        return 1024 + sum(array.nbytes for array in self.integers.values())


def _read_block(part: Part, fields: Fields, data: memoryview) -> _Block:
    block = regular_block(data, part.rows)
    if block is None or not block.holds(fields):
        raise ValueError("not regular")
    check_names(block.names, sample_names(part.commit.split, ids_of(part.commit, part.first_row, part.rows)))
    return _Block(block.stride, block.members, block.scalars([field for field in fields if field.is_scalar]))


def decoder(part: Part, fields: Fields, read: Read) -> Callable[[Field], np.ndarray]:
    """The tar is parsed once for all its columns, when the first is asked for."""
    commit = part.commit

    @cache
    def columns() -> Columns:
        data = memoryview(b"".join(read(part.chunks)))
        return parse(data, fields, sample_names(commit.split, ids_of(commit)), name=commit.path)

    return lambda field: columns()[field.name]


def parse(data: memoryview, fields: Fields, names: Sequence[str], *, name: str) -> Columns:
    """These columns out of a whole tar: views where its rows are regular, else parsed as anybody's.

    names: what its samples are called, if they are called as ours are.
    """
    rows = len(names)
    if not rows:
        return {field.name: np.empty((0, *field.shape), field.numpy_dtype) for field in fields}
    try:
        regular = regular_rows(data, rows)
        if regular and regular.holds(fields):
            check_names(regular.names, names)
            found = regular.columns(fields)
        else:
            found = decode_foreign_tar(data, names)
        return {field.name: _as_stored(field, rows, found[field.name]) for field in fields}
    except (tarfile.TarError, *NOT_OURS) as error:
        why = shown(" ".join(str(error).split()))
        raise CorruptShard(f"{name} is not the tar of its commit: {why}") from None


def check_names(found: Sequence[str], names: Sequence[str]) -> None:
    """ValueError where a sample is called as ours are, but as another one; somebody else's names say nothing."""
    if list(found) == list(names):
        return
    for mine, should in zip(found, names, strict=False):
        if mine != should and re.fullmatch(r"(train|holdout)-\d{12,}", mine):
            raise ValueError(f"it has {mine} where {should} belongs")


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

    def columns(self, fields: Fields) -> Columns:
        """States that it holds as views of the file; integers out of the JSON, one of NOT_OURS where it has others."""
        return self.states(fields) | self.scalars([field for field in fields if field.is_scalar])

    def holds(self, fields: Fields) -> bool:
        """Whether every row has the states of these fields, as we store them."""
        return all(self._has(field) for field in fields if not field.is_scalar)

    def _has(self, field: Field) -> bool:
        offset, size = self.members.get(f"{field.name}.npy", (0, 0))
        headers = [np.frombuffer(header, np.uint8) for header in _npy_headers(field)]
        if size != len(headers[0]) + field.nbytes:
            return False
        found = self._along((len(headers[0]),), np.dtype(np.uint8), offset)
        return any((found == header).all() for header in headers)

    def states(self, fields: Fields) -> Columns:
        """Views [rows, *shape] of the fields that are not scalars and that it holds."""
        return {field.name: self._state(field) for field in fields if not field.is_scalar}

    def _state(self, field: Field) -> np.ndarray:
        offset, _ = self.members[f"{field.name}.npy"]
        return self._along(field.shape, field.numpy_dtype, offset + len(_npy_headers(field)[0]))

    def _along(self, shape: tuple[int, ...], dtype: np.dtype, offset: int) -> np.ndarray:
        """What lies at `offset` of each row: [rows, *shape]."""
        inner = np.empty(shape, dtype).strides
        return np.ndarray((self.rows, *shape), dtype, self.data, offset, (self.stride, *inner))

    def scalars(self, fields: Fields) -> Columns:
        """The integers of these fields, parsed out of every row's JSON."""
        if not fields:
            return {}
        offset, size = self.members["json"]
        texts = self._along((), np.dtype(f"S{size}"), offset)
        parsed = [_json(text) for text in texts.tolist()]
        return {
            field.name: np.array([_integer(row[field.name]) for row in parsed], field.numpy_dtype) for field in fields
        }

    @property
    def names(self) -> list[str]:
        """What its samples are called, by their first members."""
        return [text.decode().partition(".")[0] for text in self._along((), np.dtype("S100"), 0).tolist()]

    def has_everywhere(self) -> bool:
        """Whether the headers of every row name these members, of these sizes, after one key of the same length."""
        first = self._along((BLOCK,), np.dtype(np.uint8), 0)
        key = max(0, bytes(first[0]).find(b"."))
        for offset, _ in self.members.values():
            headers = self._along((BLOCK,), np.dtype(np.uint8), offset - BLOCK)
            # All but the key and the header's own checksum, which counts the key.
            alike = all((part == part[0]).all() for part in (headers[:, key:148], headers[:, 156:]))
            if not alike or (headers[:, :key] != first[:, :key]).any():
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
        if not header.isreg() or header.size < 0 or name != (key := key or name):
            break
        members[suffix] = (at + BLOCK, header.size)
        at += BLOCK + _padded(header.size)
    return members


def _row_size(members: dict[str, tuple[int, int]]) -> int:
    return sum(BLOCK + _padded(size) for _, size in members.values())


def decode_foreign_tar(data: bytes | memoryview, names: Sequence[str] = ()) -> Columns:
    """Columns of any WebDataset tar of .npy and .json members, as somebody else may have written it.

    Samples are runs of members that share what is before the file name's first dot. Integers in a .json become columns.
    names: what samples that are called as ours must be called, in order.
    """
    samples = _samples(data)
    check_names([*samples], names)
    rows = [_sample(members) for members in samples.values()]
    if any(row.keys() != rows[0].keys() for row in rows):
        raise ValueError("the samples of the tar don't all have the same columns")
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]} if rows else {}


def _samples(data: bytes | memoryview) -> dict[str, dict[str, bytes]]:
    """Key -> suffix -> contents."""
    samples: dict[str, dict[str, bytes]] = defaultdict(dict)
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
        for member in tar:
            if member.issparse() or not 0 <= member.size <= len(data):  # a hole is claimed, not stored
                raise ValueError(f"{member.name} claims {member.size} bytes in a file of {len(data)}")
            folder, slash, name = member.name.rpartition("/")
            key, _, suffix = name.partition(".")
            contents = tar.extractfile(member) if member.isreg() else None
            if contents is not None:
                samples[folder + slash + key][suffix.lower()] = contents.read()
    return samples


def _sample(members: dict[str, bytes]) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for suffix, contents in members.items():
        if suffix.endswith(".npy") or suffix == "npy":
            row[suffix.removesuffix(".npy")] = _npy(contents)
        elif suffix == "json":
            row |= {name: np.int64(value) for name, value in _json(contents).items() if type(value) is int}
    return row


def _npy(contents: bytes) -> np.ndarray:
    """An array whose header counts the bytes that follow it, and no objects, which would be unpickled."""
    file = io.BytesIO(contents)
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"an .npy of version {version}")
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, is_fortran, dtype = read(file, max_header_size=_HEADER)
    if dtype.hasobject or dtype.fields or min(shape, default=0) < 0:
        raise ValueError(f"an .npy of {dtype} {shape}, which is no array of numbers: allow_pickle is never given")
    if len(contents) - file.tell() != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"an .npy of {dtype} {shape} in {len(contents)} bytes")
    flat = np.frombuffer(contents, dtype, math.prod(shape), file.tell())
    return flat.reshape(shape, order="F" if is_fortran else "C")


def _json(text: bytes) -> dict[str, Any]:
    """What a member says of its sample; ValueError where it is anything but a small object of finite numbers."""
    if len(text) > _JSON:
        raise ValueError(f"{len(text)} bytes of JSON in one sample")
    try:
        found = _DECODER.decode(text.decode())
    except RecursionError:
        raise ValueError(f"JSON of too many levels: {text[:20]!r}") from None
    if type(found) is not dict:
        raise ValueError(f"JSON that is no object: {text[:20]!r}")
    return found


def _not_finite(text: str) -> Any:
    raise ValueError(f"{text} in JSON")


_DECODER = json.JSONDecoder(parse_constant=_not_finite)

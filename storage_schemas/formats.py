"""Shards are written, read and checked, in any format: the same records, the same commits, the same reader."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import xxhash

from limbeck.storage_schemas.claims import check_integers
from limbeck.storage_schemas.commit import Chunk, Commit, Task
from limbeck.storage_schemas.errors import CorruptShard
from limbeck.storage_schemas.layout import FORMATS, Layout, format_of
from limbeck.storage_schemas.ranges import check_chunk, fetch
from limbeck.storage_schemas.recipe import Recipe
from limbeck.storage_schemas.record import Columns, Field, check_columns
from limbeck.storage_schemas.store import MissingFile, Store

PIECE = 8 << 20


@dataclass(frozen=True)
class EncodedShard:
    """A finished local file and what its commit says of it."""

    path: Path
    bytes: int
    sha256: str
    rows: int
    chunks: tuple[Chunk, ...]


def encode_shard(
    path: str | Path, fields: Sequence[Field], columns: Columns, *, task: Task, recipe_id: str, layout: Layout
) -> EncodedShard:
    """Writes the rows of a task to a local file; the same input gives the same bytes."""
    rows = check_columns(fields, columns)
    encode = FORMATS[layout.format].encode
    chunks = encode(path, fields, columns, task=task, recipe_id=recipe_id, compression=layout.compression)
    with open(path, "rb") as file:
        size, sha256 = _hash(file)
    return EncodedShard(Path(path), size, sha256, rows, chunks)


def _hash(file: BinaryIO) -> tuple[int, str]:
    sha256, size = hashlib.sha256(), 0
    while piece := file.read(PIECE):
        sha256.update(piece)
        size += len(piece)
    return size, sha256.hexdigest()


def read_shard(
    store: Store, commit: Commit, recipe: Recipe, columns: Sequence[str] | None = None, *, verify: bool = True
) -> Columns:
    """The named columns (all by default) of every row. Bytes are decoded only after they matched their checksums.

    Parquet fetches the footer, the integers and those columns; a tar's members interleave, so it is fetched whole.
    Arrays may be read-only views of a mapped file. Its ids are those that the commit says, or it is refused.
    """
    fields = recipe.fields
    wanted = list(columns) if columns is not None else [field.name for field in fields]
    unknown = set(wanted) - {field.name for field in fields}
    if unknown:
        have = [field.name for field in fields]
        raise ValueError(f"{sorted(unknown)} are not columns of {commit.path}: it has {have}")
    every = [field.name for field in fields if field.is_scalar or field.name in wanted]
    try:
        found = format_of(commit).decode(store, commit, fields, every, verify=verify)
    except MissingFile as error:
        raise CorruptShard(f"{error}: run `limbeck verify` to see what else is") from None
    check_integers(recipe, commit, found)
    return {name: found[name] for name in wanted}


def check_shard(store: Store, commit: Commit) -> list[str]:
    """What is wrong with a shard's bytes, one line each: missing, truncated, or which chunks don't match."""
    name = f"{store.uri}/{commit.path}"
    size = store.size(commit.path)
    if size is None:
        return [f"{name} is missing"]
    if size != commit.bytes:
        return [f"{name} has {size} bytes, its commit says {commit.bytes}"]
    sha256, chunks = hashlib.sha256(), [xxhash.xxh3_128() for _ in commit.chunks]
    for offset in range(0, size, PIECE):
        piece = memoryview(store.read_range(commit.path, offset, min(PIECE, size - offset)))
        sha256.update(piece)
        for chunk, sum_ in zip(commit.chunks, chunks, strict=True):
            sum_.update(piece[max(chunk.offset - offset, 0) : max(chunk.offset + chunk.length - offset, 0)])
    # Chunks count also where the file is whole: readers go by them, and it may be the commit that is damaged.
    pairs = zip(commit.chunks, chunks, strict=True)
    problems = _complaints(store, commit, [chunk for chunk, sum_ in pairs if sum_.hexdigest() != chunk.xxh3])
    if problems or sha256.hexdigest() == commit.sha256:
        return problems
    return [f"{name} does not match its sha256, outside of every chunk"]


def _complaints(store: Store, commit: Commit, bad: Sequence[Chunk]) -> list[str]:
    problems = []
    for chunk in bad:
        try:
            check_chunk(store, commit, chunk, fetch(store, commit, [chunk])[0])
        except CorruptShard as error:
            problems.append(str(error))
    return problems

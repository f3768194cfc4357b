"""The bytes of a shard's chunks, mapped where the store is a folder and fetched where it is not, and their check."""

import mmap
from collections.abc import Sequence

import xxhash

from limbeck.storage_schemas.backends import open_regular
from limbeck.storage_schemas.commit import Chunk, Commit
from limbeck.storage_schemas.cuts import watch
from limbeck.storage_schemas.errors import CorruptShard, StoreError
from limbeck.storage_schemas.store import MissingFile, Range, Store


def fetch(store: Store, commit: Commit, chunks: Sequence[Chunk]) -> list[memoryview]:
    """Bytes of each chunk, shorter where the file was cut."""
    whole = map_shard(store, commit)
    if whole is not None:
        return [whole[chunk.offset : chunk.offset + chunk.length] for chunk in chunks]
    found = fetch_ranges(store, commit, [(chunk.offset, chunk.length) for chunk in chunks])
    return [memoryview(piece) for piece in found]


def fetch_ranges(store: Store, commit: Commit, ranges: Sequence[Range]) -> Sequence[bytes]:
    """Bytes of each (offset, length) of a shard by requests side by side, shorter where the file was cut."""
    try:
        return store.read_ranges(commit.path, ranges)
    except StoreError:
        size = store.size(commit.path)
        if size is not None and size != commit.bytes:  # S3 answers a range past a cut object's end with an error
            raise other_size(store, commit, size) from None
        raise


def other_size(store: Store, commit: Commit, size: int) -> CorruptShard:
    """What to say of a file that was cut, or that something was added to."""
    less = f", {commit.bytes - size} bytes are missing" if size < commit.bytes else ""
    says = f"{store.uri}/{commit.path} has {size} bytes, its commit says {commit.bytes}{less}"
    return CorruptShard(f"{says}: restore the file or generate it again")


def map_shard(store: Store, commit: Commit) -> memoryview | None:
    """A local shard's file as read-only memory, None in a store that is not a folder."""
    path = store.local_path(commit.path)
    if path is None:
        return None
    try:
        with open_regular(path) as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError:
        raise MissingFile(f"{store.uri}/{commit.path} is missing") from None
    except ValueError:  # an empty file can't be mapped
        return memoryview(b"")
    watch(mapped, path, len(mapped))
    return memoryview(mapped)


def checksum(data: bytes | memoryview) -> str:
    """xxh3-128 in hex."""
    return xxhash.xxh3_128_hexdigest(data)


def check_chunk(store: Store, commit: Commit, chunk: Chunk, data: memoryview) -> None:
    """CorruptShard, naming the chunk, unless `data` is what was committed."""
    if checksum(data) != chunk.xxh3:
        rows = f"rows {chunk.first_row} to {chunk.first_row + chunk.rows - 1}" if chunk.rows else "no rows"
        cut = f", {chunk.length - len(data)} bytes are missing" if len(data) < chunk.length else ""
        raise CorruptShard(
            f"{store.uri}/{commit.path}: column {chunk.column}, {rows} (bytes {chunk.offset} to "
            f"{chunk.offset + chunk.length - 1}) does not match its checksum{cut}: restore the file or "
            "generate it again"
        )

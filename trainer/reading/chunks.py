"""The bytes of committed chunks, mapped and checked: a folder's own files, or a disk cache in front of ranged GETs."""

import hashlib
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from limbeck.storage_schemas.commit import Chunk, Commit
from limbeck.storage_schemas.errors import CorruptShard, StoreError
from limbeck.storage_schemas.ranges import check_chunk, checksum, fetch_ranges, other_size
from limbeck.storage_schemas.store import MissingFile, Store
from limbeck.trainer.reading.cache import Cache, default_folder
from limbeck.trainer.reading.mapped import Maps

THREADS = 16
"""Regions at a time of a store on a network."""

CHECKERS = max(1, min(4, len(os.sched_getaffinity(0)) // 2))
"""Threads that check mapped files: few saturate the memory, and the step and the copies need their processors."""

GAP = 64 << 10
"""Bytes between two chunks that cost less to fetch than one more request."""

REGION = 16 << 20
"""Chunks that begin in the same so many bytes of a shard are fetched together, by one process of a node at a time."""

_REMEMBERED = 1 << 20
_TRAILER = 24
Wanted = tuple[Commit, Chunk]
Found = memoryview | CorruptShard
Place = tuple[int, int]
"""Where a chunk lies in its file, and its bytes. Not its checksum: others may claim the same."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """Options of reading chunks.

    verify: `always`, each time a chunk is opened; `first`, when a process opens it for the first time; `never`, only
    its length. What comes over a network is checked in any case, as the cache serves other processes, too.
    cache_folder: None is `default_folder()`. cache_bytes: what it may hold. in_flight_bytes: what is fetched and not
    yet in the cache; a larger chunk goes alone.
    """

    verify: Literal["always", "first", "never"] = "always"
    on_corrupt: Literal["fail", "substitute"] = "fail"
    cache_folder: Path | None = None
    cache_bytes: int = 32 << 30
    in_flight_bytes: int = 256 << 20


class Chunks:
    """The chunks of one store, for any number of threads. Pickles to (store, reading)."""

    def __init__(self, store: Store, reading: Reading) -> None:
        self._store, self._reading = store, reading
        self._local = store.protocol == "file"
        self._maps = Maps()
        self._cache = Cache(reading.cache_folder or default_folder(), reading.cache_bytes, self._maps)
        self._budget = _Budget(reading.in_flight_bytes)
        self._seen: set[int] = set()

    def __reduce__(self) -> tuple[Any, ...]:
        """Open it again where it is unpickled."""
        return Chunks, (self._store, self._reading)

    def open(self, wanted: Sequence[Wanted]) -> list[Found]:
        """Each chunk's bytes, read-only and good for as long as they are held, or why they can't be had.

        A chunk that is not what was committed is fetched, or mapped, once more before it is given up. StoreError if
        the store itself fails.
        """
        regions: dict[tuple[str, int], list[int]] = {}
        for place, (commit, chunk) in enumerate(wanted):
            regions.setdefault((commit.path, chunk.offset // REGION), []).append(place)
        groups = [[wanted[place] for place in places] for places in regions.values()]
        places = [place for places in regions.values() for place in places]
        found = [one for group in self._read(groups) for one in group]
        return [one for _, one in sorted(zip(places, found, strict=True), key=lambda pair: pair[0])]

    def checked(self, commit: Commit, chunks: Sequence[Chunk]) -> list[memoryview]:
        """Bytes of these chunks that match their checksums, whatever `verify` is: what is made of them is kept."""
        found = []
        for chunk, data in zip(chunks, self.open([(commit, chunk) for chunk in chunks]), strict=True):
            if isinstance(data, CorruptShard):
                raise data
            if self._reading.verify != "always":
                check_chunk(self._store, commit, chunk, data)
            found.append(data)
        return found

    def derived(self, name: str, make: Callable[[], bytes], *, size: int) -> memoryview:
        """The `size` bytes that `make` gives, kept in the disk cache under a name that says all that they depend on.

        Their length and checksum follow them in the file.
        """
        entry = f"{hashlib.sha256(name.encode()).hexdigest()}.made"
        found = self._made(entry, size)
        if found is not None:
            return found
        with self._cache.lock(entry):
            found = self._made(entry, size)
            if found is not None:
                return found
            made = make()
            kept = self._cache.put(entry, made, _trailer(made))
        self._remember(entry)
        return memoryview(made) if kept is None else kept[:-_TRAILER]

    def _read(self, groups: list[list[Wanted]]) -> list[list[Found]]:
        read = self._cached
        if self._local:  # a file is opened once for all its chunks
            commits = {commit.path: commit for group in groups for commit, _ in group}
            read = partial(self._mapped, {path: _outcome(self._map, commit) for path, commit in commits.items()})
        if len(groups) <= 1 or (self._local and self._reading.verify == "never"):
            return [read(group) for group in groups]
        with ThreadPoolExecutor(min(len(groups), CHECKERS if self._local else THREADS)) as threads:
            return list(threads.map(read, groups))

    def _mapped(self, files: dict[str, Found], wanted: list[Wanted]) -> list[Found]:
        """Chunks from a folder's own files. files: path -> its map, or why there is none."""
        found = [_outcome(self._cut, files[commit.path], commit, chunk) for commit, chunk in wanted]
        return [
            _outcome(self._cut, _outcome(self._map, one[0]), *one) if isinstance(it, CorruptShard) else it
            for one, it in zip(wanted, found, strict=True)
        ]

    def _cut(self, file: Found, commit: Commit, chunk: Chunk) -> memoryview:
        if isinstance(file, CorruptShard):
            raise file
        data = file[chunk.offset : chunk.offset + chunk.length]
        self._check(commit, chunk, data)
        return data

    def _map(self, commit: Commit) -> memoryview:
        path = f"{self._store.uri}/{commit.path}"
        try:
            whole = self._maps.open(self._store.local_path(commit.path) or "", size=commit.bytes)
        except FileNotFoundError:
            raise CorruptShard(f"{path} is missing: restore the file or generate it anew") from None
        except OSError as error:
            raise StoreError(f"{path}: {error}") from None
        if whole is None:
            raise other_size(self._store, commit, self._store.size(commit.path) or 0)
        return whole

    def _cached(self, wanted: list[Wanted]) -> list[Found]:
        """Chunks of one region from the cache, which gets what it lacks."""
        found: dict[Place, Found] = {}
        missing = self._look_up(wanted, found)
        if missing:
            commit, first = missing[0]
            with self._cache.lock(f"{commit.path} {first.offset // REGION}"):
                missing = self._look_up(missing, found)  # again: the lock's last holder may have brought them
                found |= self._fetch(commit, [chunk for _, chunk in missing])
        return [found[_place(chunk)] for _, chunk in wanted]

    def _look_up(self, wanted: list[Wanted], found: dict[Place, Found]) -> list[Wanted]:
        """Adds to `found` what the cache has, and gives back the others; an entry that isn't what it was is dropped."""
        missing = []
        for commit, chunk in wanted:
            data = self._cache.open(chunk.xxh3, size=chunk.length) if chunk.length else memoryview(b"")
            try:
                if data is None:
                    missing.append((commit, chunk))
                else:
                    self._check(commit, chunk, data)
                    found[_place(chunk)] = data
            except CorruptShard:
                self._cache.drop(chunk.xxh3)
                missing.append((commit, chunk))
        return missing

    def _fetch(self, commit: Commit, chunks: list[Chunk]) -> dict[Place, Found]:
        """Fetch them together; then those that are wrong again, one by one: one may spoil an answer for others."""
        pieces = list(_pieces(chunks, self._reading.in_flight_bytes))
        at_once = pieces and sum(map(_span, pieces)) <= self._reading.in_flight_bytes
        found: dict[Place, Found] = {}
        for batch in [pieces] if at_once else [[piece] for piece in pieces]:
            found |= self._request(commit, batch)
        for chunk in chunks:
            if isinstance(found[_place(chunk)], CorruptShard):
                found |= self._request(commit, [[chunk]])
        return found

    def _request(self, commit: Commit, pieces: list[list[Chunk]]) -> dict[Place, Found]:
        """One ranged GET a piece, side by side. The bytes are in the cache before others may come."""
        with self._budget.hold(sum(map(_span, pieces))):
            try:
                fetched = fetch_ranges(self._store, commit, [(piece[0].offset, _span(piece)) for piece in pieces])
            except (MissingFile, CorruptShard) as error:
                problem = CorruptShard(str(error))
                return {_place(chunk): problem for piece in pieces for chunk in piece}
            return {
                _place(chunk): _outcome(self._keep, commit, chunk, memoryview(data)[chunk.offset - piece[0].offset :])
                for piece, data in zip(pieces, fetched, strict=True)
                for chunk in piece
            }

    def _keep(self, commit: Commit, chunk: Chunk, data: memoryview) -> memoryview:
        data = data[: chunk.length]
        check_chunk(self._store, commit, chunk, data)
        self._remember(commit.path, chunk.offset)
        return self._cache.put(chunk.xxh3, data) or data

    def _check(self, commit: Commit, chunk: Chunk, data: memoryview) -> None:
        if len(data) != chunk.length or self._is_due(commit.path, chunk.offset):
            check_chunk(self._store, commit, chunk, data)
            self._remember(commit.path, chunk.offset)

    def _made(self, entry: str, size: int) -> memoryview | None:
        whole = self._cache.open(entry, size=size + _TRAILER)
        if whole is None:
            return None
        data, trailer = whole[:-_TRAILER], whole[-_TRAILER:]
        expected = _trailer(data) if self._is_due(entry) else len(data).to_bytes(8, "little")
        if bytes(trailer[: len(expected)]) != expected:
            self._cache.drop(entry)
            return None
        self._remember(entry)
        return data

    def _is_due(self, *what: Any) -> bool:
        verify = self._reading.verify
        return verify == "always" or (verify == "first" and hash(what) not in self._seen)

    def _remember(self, *what: Any) -> None:
        if self._reading.verify == "first":
            if len(self._seen) >= _REMEMBERED:  # some 100 MB; forgetting costs only another check
                self._seen.clear()
            self._seen.add(hash(what))


def _outcome(action: Callable[..., memoryview], *args: Any) -> Found:
    try:
        return action(*args)
    except CorruptShard as error:
        return error


def _place(chunk: Chunk) -> Place:
    return chunk.offset, chunk.length


def _pieces(chunks: list[Chunk], most: int) -> Iterator[list[Chunk]]:
    """The chunks in runs that one request fetches: less than GAP apart, at most `most` bytes if more than one."""
    piece: list[Chunk] = []
    for chunk in sorted(chunks, key=lambda chunk: chunk.offset):
        far = piece and chunk.offset - (piece[-1].offset + piece[-1].length) >= GAP
        if far or (piece and _span([*piece[:1], chunk]) > most):
            yield piece
            piece = []
        piece.append(chunk)
    if piece:
        yield piece


def _span(piece: list[Chunk]) -> int:
    return piece[-1].offset + piece[-1].length - piece[0].offset


def _trailer(data: bytes | memoryview) -> bytes:
    return len(data).to_bytes(8, "little") + bytes.fromhex(checksum(data))


class _Budget:
    """So many bytes at a time; what needs more goes alone."""

    def __init__(self, limit: int) -> None:
        self._limit, self._held = limit, 0
        self._changed = threading.Condition()

    @contextmanager
    def hold(self, count: int) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: not self._held or self._held + count <= self._limit)
            self._held += count
        try:
            yield
        finally:
            with self._changed:
                self._held -= count
                self._changed.notify_all()

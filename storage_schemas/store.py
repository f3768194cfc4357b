"""The store: a folder or bucket over fsspec with whole reads, uploads and one primitive, put-if-absent."""

import os
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import Field

from limbeck.storage_schemas import backends, paths
from limbeck.storage_schemas.documents import MOST_BYTES, SCHEMA_VERSION, Document
from limbeck.storage_schemas.errors import StoreError, without_credentials
from limbeck.storage_schemas.names import Attempt

TRIES = 12
LONGEST_PAUSE = 20.0
PATIENCE = 120.0
"""Seconds after which no other try begins; a storage that is away for a minute costs no solved shard."""

FIRST_TRIES = 3
"""Tries of a store's first request: a wrong address should show in seconds."""

READ_THREADS = 16
FOREIGN = (".tar", ".parquet", ".arrow", ".mds", ".npz", ".npy", ".h5", ".safetensors", ".pt")
"""Endings of files in which others keep samples."""

FORMAT = 'README\'s chapter "The store" describes the format'
Range = tuple[int, int]
T = TypeVar("T")


class MissingFile(StoreError):
    """A file that a document names is not there."""


@dataclass(frozen=True, order=True)
class Listed:
    """A file of a folder, and when the storage last wrote it, None where it doesn't say."""

    name: str
    size: int
    modified: datetime | None


class StoreDocument(Document):
    """store.json. A store of a single writer makes no promise when two programs write to it at once."""

    schema_version: Literal[2] = SCHEMA_VERSION
    single_writer: bool = False
    writer: Attempt = Field(default_factory=paths.new_attempt, description="The process that created it.")


class Store:
    """Paths are relative to the store's root. Pickles to its uri; `uri` and `repr` never hold credentials."""

    def __init__(self, uri: str, *, single_writer: bool = False) -> None:
        """Only for a uri that is known to be a store: use `open` or `create`."""
        self.protocol, self.uri, options = backends.split_uri(uri)
        self._given = uri if options else self.uri
        self._secrets = tuple(options.values())
        self.single_writer = single_writer
        self._tries = TRIES
        self._fs, root = backends.filesystem(self.protocol, self.uri, options)
        self._root = root.rstrip("/")
        if self.protocol in ("s3", "s3a", "gs", "gcs") and not self._root:
            raise StoreError(f"{self.uri} names no bucket: write {self.protocol}://bucket/folder")

    def __reduce__(self) -> tuple[Any, ...]:
        """Re-opened from its uri, without asking store.json again."""
        return _reopen, (self._given, self.single_writer)

    def __repr__(self) -> str:
        """Store('s3://bucket/folder')."""
        return f"Store({self.uri!r})"

    @classmethod
    def open(cls, uri: str) -> "Store":
        """An existing store."""
        store = cls(uri)
        if not store._is_there():
            way = "`limbeck generate` makes one"
            raise StoreError(f"{store.uri} is not a store (no {paths.STORE}): {store._foreign()}{way}")
        return store

    @classmethod
    def create(cls, uri: str, *, single_writer: bool = False) -> "Store":
        """The store at `uri`, made if need be. Creating twice proves that the second creator is refused here."""
        store = cls(uri, single_writer=single_writer)
        if store.protocol not in ("file", *backends.CONDITIONAL) and not single_writer:
            raise StoreError(
                f"{store.uri}: {store.protocol} has no conditional create, so two writers could both win: "
                "use a folder, s3://, gs:// or az://, or --single-writer"
            )
        if store._is_there():
            return store
        ours = StoreDocument(single_writer=single_writer).to_bytes()
        if store.put_if_absent(paths.STORE, ours) == ours and not single_writer:
            store._probe(ours)
        return cls.open(uri)

    def _foreign(self) -> str:
        """Names the data in a folder without store.json that no command of ours wrote; empty if there is none."""
        try:
            names = self._fs.ls(self._root, detail=False)
        except Exception:  # what can't be listed is described by what can't be read
            return ""
        counted = Counter(suffix for name in names if (suffix := Path(str(name)).suffix) in FOREIGN)
        kinds = " and ".join(f"{count} {suffix} file{'s' * (count > 1)}" for suffix, count in counted.most_common(2))
        return f"it holds {kinds} that no command of ours wrote; {FORMAT}; " if kinds else ""

    def _is_there(self) -> bool:
        """Whether store.json exists, which says if writers exclude each other. First contact: with less patience."""
        if self.protocol == "file" and Path(self._root).is_file():
            raise StoreError(
                f"{self.uri} is a file, not a store: give the folder of a store, or s3://bucket/folder; {FORMAT}"
            )
        self._tries = FIRST_TRIES
        data = self.read(paths.STORE)
        self._tries = TRIES
        if data is not None:
            document = StoreDocument.from_bytes(data, f"{self.uri}/{paths.STORE}")
            self.single_writer = document.single_writer
        if not self.single_writer:
            backends.check_creates(self._fs, self.protocol, self.uri)
        return data is not None

    def _probe(self, ours: bytes) -> None:
        if self.put_if_absent(paths.STORE, StoreDocument().to_bytes()) == ours == self.read(paths.STORE):
            return
        self.remove(paths.STORE)
        raise StoreError(
            f"{self.uri} accepted a conditional create of the same name twice, so two writers could both win: "
            "use another storage, or --single-writer"
        )

    def put_if_absent(self, path: str, data: bytes) -> bytes:
        """The bytes that are there now: `data` if we won, the winner's otherwise.

        `data` must hold something that only this writer knows. Then a lost response, or a retry that loses against
        our own earlier write, is still recognised as ours. A conflict (409) or any other unknown outcome is read
        back; if nothing is there it is tried again. Nothing is ever deleted: a create that we gave up may still land.
        """
        if self.single_writer:
            return self._put_alone(path, data)
        problem: Exception = OSError("it exists but can't be read")
        full = self._full(path)
        for _ in self._turns():
            try:
                backends.create(self._fs, self.protocol, full, data)
                return data
            except FileExistsError:
                pass
            except Exception as error:
                problem = error
                if backends.is_permanent(error):
                    break
            there = self._look(full)
            if there is not None:
                return there
        raise self._as_store_error(path, problem) from None

    def _look(self, full: str) -> bytes | None:
        """What is there, None also when that can't be found out just now."""
        try:
            return backends.read(self._fs, self.protocol, full, MOST_BYTES)
        except Exception:
            return None

    def _put_alone(self, path: str, data: bytes) -> bytes:
        there = self.read(path)
        if there is None:
            self.write(path, data)
        return data if there is None else there

    def write(self, path: str, data: bytes) -> None:
        """Writes or replaces: for what one writer owns, such as its own pin."""
        full = self._full(path)
        if self.protocol == "file":
            self._call(path, lambda: backends.write_local(Path(full), data))
        else:
            self._call(path, lambda: self._fs.pipe_file(full, data))

    def upload(self, local_path: str | Path, path: str) -> None:
        """Copies a finished local file to a name of its own attempt."""
        full = self._full(path)
        if self.protocol == "file":
            self._call(path, lambda: backends.copy_local(str(local_path), Path(full)))
        else:
            self._call(path, lambda: self._fs.put_file(str(local_path), full))

    def remove(self, path: str) -> None:
        """Deletes one file, if it is there."""
        full = self._full(path)
        try:
            self._call(path, lambda: self._fs.rm_file(full))
        except MissingFile:
            return

    def read(self, path: str, *, most: int | None = None) -> bytes | None:
        """The whole file, None if it is absent. StoreError where it has more than `most` bytes, or any document may."""
        full = self._full(path)
        most = MOST_BYTES if most is None and path.endswith(".json") else most
        try:
            data = self._call(path, lambda: backends.read(self._fs, self.protocol, full, most))
        except MissingFile:
            return None
        if most is not None and len(data) > most:
            raise StoreError(f"{self.uri}/{path} has more than {most} bytes, which none of its kind has: restore it")
        return data

    def read_many(self, many: Sequence[str]) -> Sequence[bytes | None]:
        """`read` of each, several at a time."""
        with ThreadPoolExecutor(READ_THREADS) as threads:
            return list(threads.map(self.read, many))

    def read_range(self, path: str, offset: int, length: int) -> bytes:
        """`length` bytes from `offset`, fewer at the end of the file."""
        return self.read_ranges(path, [(offset, length)])[0]

    def read_ranges(self, path: str, ranges: Sequence[Range]) -> Sequence[bytes]:
        """Bytes of each (offset, length), side by side where the storage can. MissingFile if there is no file."""
        full = self._full(path)
        if self.protocol == "file":
            return self._call(path, lambda: _pread(full, ranges))
        starts, ends = [start for start, _ in ranges], [start + length for start, length in ranges]
        return self._call(path, lambda: backends.read_ranges(self._fs, [full] * len(ranges), starts, ends))

    def list(self, folder: str) -> Sequence[str]:
        """Sorted names in a folder, past every cache; none if there is no such folder. Unfinished files don't show."""
        full = self._full(folder)
        self._fs.invalidate_cache(full)
        try:
            found = self._call(folder, lambda: self._fs.ls(full, detail=False))
        except MissingFile:
            return []
        names = {str(name).rstrip("/").rpartition("/")[2] for name in found if str(name).rstrip("/") != full}
        return sorted(name for name in names if not name.startswith(".") and not paths.is_outside(name))

    def list_details(self, folder: str, *, unfinished: bool = False) -> Sequence[Listed]:
        """Files as by `list`, with sizes and times; or the hidden ones that killed writers left in a folder."""
        full = self._full(folder)
        self._fs.invalidate_cache(full)
        try:
            found = self._call(folder, lambda: self._fs.ls(full, detail=True))
        except MissingFile:
            return []
        files = [entry for entry in found if entry["type"] == "file"]
        names = [str(entry["name"]).rpartition("/")[2] for entry in files]
        listed = (Listed(name, int(it["size"]), backends.modified(it)) for name, it in zip(names, files, strict=True))
        return sorted(it for it in listed if it.name.startswith(".") == unfinished and not paths.is_outside(it.name))

    def size(self, path: str) -> int | None:
        """Bytes of a file, None if it is absent."""
        full = self._full(path)
        self._fs.invalidate_cache(full)
        try:
            return int(self._call(path, lambda: self._fs.info(full))["size"])
        except MissingFile:
            return None

    def modified(self, path: str) -> datetime | None:
        """When the storage put a file into its place, by its own clock; None where it doesn't say, or has no file."""
        full = self._full(path)
        self._fs.invalidate_cache(full)
        try:
            if self.protocol == "file":  # not its mtime, which is that of the temporary file before
                return datetime.fromtimestamp(self._call(path, lambda: os.stat(full)).st_ctime, UTC)
            return backends.modified(self._call(path, lambda: self._fs.info(full)))
        except MissingFile:
            return None

    def exists(self, path: str) -> bool:
        """Whether a file is there now."""
        return self.size(path) is not None

    def local_path(self, path: str) -> str | None:
        """The file's own path where the store is a local folder, for mapping it."""
        return self._full(path) if self.protocol == "file" else None

    def _full(self, path: str) -> str:
        full = paths.join(self._root, path)
        if self.protocol == "file":
            backends.check_inside(self._root, path)
        return full

    def _turns(self) -> Iterator[int]:
        """Tries, with growing random pauses between them, until they or our patience are used up."""
        began = time.monotonic()
        for turn in range(self._tries):
            if turn:
                if time.monotonic() - began > PATIENCE:
                    return
                time.sleep(random.uniform(0.5, 1.0) * min(0.2 * 2**turn, LONGEST_PAUSE))
            yield turn

    def _call(self, path: str, action: Callable[[], T]) -> T:
        """What `action` returns. A failure that may pass is tried again; a folder's never is."""
        for _ in self._turns():
            try:
                return action()
            except Exception as error:
                problem = error
                if self.protocol == "file" or backends.is_permanent(error):
                    break
        raise self._as_store_error(path, problem) from None

    def _as_store_error(self, path: str, error: Exception) -> StoreError:
        """The exception as one line without credentials."""
        if isinstance(error, StoreError):
            return error
        if backends.error_code(error) == "NoSuchBucket":
            return StoreError(f"{self.uri}: there is no such bucket: create it first, or mend the name")
        if isinstance(error, FileNotFoundError):
            return MissingFile(f"{self.uri}/{path} is missing")
        reason = str(error).strip().split("\n")[0] or "no reason given"
        for secret in self._secrets:
            reason = reason.replace(secret, "***")
        problem = f"{type(error).__name__}: {without_credentials(reason)}"
        return StoreError(f"{self.uri}/{path}: {problem}{self._way_out(error)}")

    def _way_out(self, error: Exception) -> str:
        if isinstance(error, PermissionError):
            return ": check the credentials and their rights"
        return "" if self.protocol == "file" else ": check the address, the network and the credentials"


def _reopen(uri: str, single_writer: bool) -> Store:
    return Store(uri, single_writer=single_writer)


def _pread(full: str, ranges: Sequence[Range]) -> list[bytes]:
    with backends.open_regular(full) as file:
        return [os.pread(file.fileno(), length, offset) for offset, length in ranges]

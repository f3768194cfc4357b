"""A folder of checked bytes for all processes of a node: limited, last used kept longest, safe to kill or delete.

An entry is a file that never changes, written under another name and renamed. Everything else can be lost: a killed
writer leaves a file that the next scan sweeps, its locks end with it, and every scan puts the count of bytes right.
"""

import contextlib
import errno
import fcntl
import os
import struct
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from limbeck.storage_schemas.backends import FULL
from limbeck.storage_schemas.log import log
from limbeck.storage_schemas.ranges import checksum
from limbeck.trainer.reading.mapped import Maps

PATIENCE = 60.0
"""Seconds to wait for a process that fetches the same; then it is fetched twice."""

TOUCH = 60.0
"""Seconds in which a use is not noted again."""

STALE = 3600.0
"""Seconds after which an unfinished file is nobody's, even where files can't be locked."""

_COUNT, _SCAN, _NAMES = 0, 8, 16  # bytes of the lock file, each a lock; the first 8 hold the count of bytes, too
_MOST = 1 << 62
_unwarned = threading.Lock()


def default_folder() -> Path:
    """$XDG_CACHE_HOME/limbeck, ~/.cache/limbeck without it; among temporary files for a user without a home."""
    home = os.path.expanduser("~/.cache")
    return (
        Path(os.environ.get("XDG_CACHE_HOME") or (home if os.path.isabs(home) else tempfile.gettempdir())) / "limbeck"
    )


class Cache:
    """Entries by name, in memory as maps. `limit`: bytes of all of them."""

    def __init__(self, folder: Path, limit: int, maps: Maps) -> None:
        self.folder, self.limit = folder, limit
        self._maps = maps
        self._scanned = False

    def open(self, name: str, *, size: int | None = None) -> memoryview | None:
        """An entry's bytes, None if it isn't there. One of another size than `size` is dropped."""
        path = self._path(name)
        try:
            data = self._maps.open(path, size=size)
        except OSError:  # one that can't be read is as good as none
            return None
        if data is None:
            self.drop(name)
            return None
        with contextlib.suppress(OSError):
            if time.time() - os.stat(path).st_mtime > TOUCH:
                os.utime(path)
        return data

    def put(self, name: str, *parts: bytes | memoryview) -> memoryview | None:
        """Keep the bytes and return them as a map; None where there is no room for them, or no right to write."""
        size = sum(len(part) for part in parts)
        problem = OSError(errno.EFBIG, f"one entry has {size} bytes, all of them may have {self.limit}")
        for full in (False, True) if size <= self.limit else ():
            try:
                self._make_room(size, full=full)
                return self._write(name, parts)
            except OSError as error:
                problem = error
                if error.errno not in FULL:
                    break
        if self.limit:
            self._warn(problem)
        return None

    def drop(self, name: str) -> None:
        """Delete an entry; those that have it mapped keep its bytes."""
        with contextlib.suppress(OSError):
            os.unlink(self._path(name))

    @contextlib.contextmanager
    def lock(self, name: str) -> Iterator[None]:
        """Hold a lock that nobody else of this node gets meanwhile; no lock where none can be had in time."""
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(OSError):
                stack.enter_context(self._hold(_NAMES + int(checksum(name.encode())[:15], 16), PATIENCE))
            yield

    def _path(self, name: str) -> str:
        return os.path.join(self.folder, name[:2], name)

    @property
    def _incoming(self) -> str:
        return os.path.join(self.folder, "incoming")

    def _write(self, name: str, parts: tuple[bytes | memoryview, ...]) -> memoryview | None:
        path, temporary = self._path(name), os.path.join(self._incoming, uuid.uuid4().hex)
        os.makedirs(self._incoming, exist_ok=True)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(temporary, "xb") as file:
            try:
                _lock_file(file.fileno())  # tells a scan that its writer lives
                for part in parts:
                    file.write(part)
                file.flush()
                data = self._maps.open(temporary)  # by its old name: under the new one it may be evicted at once
                os.rename(temporary, path)
            except BaseException:
                os.unlink(temporary)
                raise
        return data

    def _make_room(self, size: int, *, full: bool) -> None:
        """Counts `size` bytes more, and evicts where that is past the limit or the disk is full.

        A process's first entry scans in any case: what killed writers left is swept, and a wrong count mended.
        """
        past = full or self._count(size) > self.limit
        first, self._scanned = not self._scanned, True
        if not (past or first):
            return
        with self._hold(_SCAN, PATIENCE if past else 0) as (handle, alone):
            if alone and (full or first or _read_count(handle) > self.limit):  # else somebody else just did it
                self._evict(handle, size, full=full)

    def _evict(self, handle: int, room: int, *, full: bool) -> None:
        """Deletes the entries used longest ago down to 15/16 of the limit, or of what a full disk holds."""
        before = _read_count(handle)
        self._sweep()
        entries = sorted(self._entries())
        total = sum(size for _, size, _ in entries)
        limit = min(self.limit, total) if full else self.limit
        past = full or total + room > limit
        for _, size, path in entries if past else ():
            if total + room <= limit - limit // 16:
                break
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            total -= size
        self._count(total + room - before)  # beside what others have counted meanwhile

    def _count(self, more: int) -> int:
        """The count of bytes after so many more."""
        with self._hold(_COUNT, PATIENCE) as (handle, _):
            total = _read_count(handle) + more
            os.pwrite(handle, struct.pack("q", total), 0)
            return total

    def _entries(self) -> Iterator[tuple[int, int, str]]:
        """(when it was used, bytes, path) of each entry."""
        with os.scandir(self.folder) as folders:
            names = [folder.path for folder in folders if len(folder.name) == 2]
        for name in names:
            with os.scandir(name) as entries:
                for entry in entries:
                    with contextlib.suppress(FileNotFoundError):
                        found = entry.stat()
                        yield found.st_mtime_ns, found.st_size, entry.path

    def _sweep(self) -> None:
        """Deletes unfinished files whose writer is dead: its lock ended with it."""
        os.makedirs(self._incoming, exist_ok=True)
        with os.scandir(self._incoming) as entries:
            for entry in entries:
                with contextlib.suppress(OSError):
                    if _is_abandoned(entry):
                        os.unlink(entry.path)

    @contextlib.contextmanager
    def _hold(self, place: int, patience: float) -> Iterator[tuple[int, bool]]:
        """(the lock file's handle, whether the lock of this byte was had in time). Closing the file ends the lock."""
        os.makedirs(self.folder, exist_ok=True)
        handle = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            yield handle, _lock_byte(handle, place, patience)
        finally:
            os.close(handle)

    def _warn(self, problem: OSError) -> None:
        """Warn once a process: the lock is never released."""
        if _unwarned.acquire(blocking=False):
            what = "full" if problem.errno in (*FULL, errno.EFBIG) else "unwritable"
            state = f"the cache in {self.folder} is {what}: {problem.strerror}: chunks are fetched anew for every use"
            log.warning(f"warning: {state}: make room there, or name another --cache-folder")


def _read_count(handle: int) -> int:
    return int(struct.unpack("q", os.pread(handle, 8, 0).ljust(8, b"\0"))[0]) % _MOST


def _is_abandoned(entry: os.DirEntry[str]) -> bool:
    found = entry.stat()
    age = time.time() - found.st_mtime
    if age > STALE:
        return True
    if not found.st_size and age < TOUCH:
        return False  # perhaps just created, and about to be locked
    with open(entry.path, "rb+") as file:
        return _lock_file(file.fileno())


def _lock_file(handle: int) -> bool:
    """Whether nobody else had it, and now we do; False too where files can't be locked."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _lock_byte(handle: int, place: int, patience: float) -> bool:
    """Whether one byte of a file became ours in time. These locks belong to the open file, so threads exclude threads.

    True too where such locks can't be had: what they save is a second fetch.
    """
    request = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, place, 1, 0)
    deadline = time.monotonic() + patience
    while True:
        try:
            fcntl.fcntl(handle, fcntl.F_OFD_SETLK, request)
            return True
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                return True
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.005)

"""Put-if-absent for each kind of storage: only creates that the storage itself makes atomic.

fsspec's local `pipe_file(mode="create")` lets two writers win, and an exclusive open shows half-written files to the
loser; a finished temporary file and a hard link do neither. S3, GCS and Azure have a conditional put of their own.
"""

import errno
import inspect
import os
import re
import shutil
import stat
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import unquote

import fsspec
from fsspec.config import conf
from fsspec.core import url_to_fs

from limbeck.storage_schemas.errors import StoreError, UsageError, shown, usage_errors
from limbeck.storage_schemas.extras import need
from limbeck.storage_schemas.places import store_place

LOCAL = ("file", "local")
CONDITIONAL = ("memory", "s3", "s3a", "gs", "gcs", "az", "abfs", "abfss")
S3 = ("s3", "s3a")
NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)

S3_CLIENT: dict[str, Any] = {
    "connect_timeout": 3,
    "read_timeout": 15,
    "max_pool_connections": 64,
    "retries": {"mode": "standard", "total_max_attempts": 2},
}
"""One request's own patience. Botocore's defaults times s3fs's would be minutes, before the store's own tries.

Its 10 connections would make ranged reads wait for each other."""

PERMANENT = (
    *(PermissionError, FileNotFoundError, NotADirectoryError, IsADirectoryError, ImportError, StoreError),
    *(TypeError, ValueError, AttributeError, LookupError, RuntimeError),
)
FULL = (errno.ENOSPC, errno.EDQUOT)
PERMANENT_ERRNO = (*FULL, errno.EROFS, errno.ENAMETOOLONG, errno.EFBIG)
TRANSIENT_STATUS = (408, 409, 425, 429, 500, 502, 503, 504, 509)
TRANSIENT_CODE = (
    "BadDigest",
    "IncompleteBody",
    "NoSuchUpload",
    "RequestTimeout",
    "SlowDown",
    "XAmzContentSHA256Mismatch",
)
"""Damage on the way, throttling under a 400, and a multipart upload that a lost answer had ended already."""

NO_RANGE = ("InvalidRange", "416")
"""What S3 says of the first bytes of an empty object."""

PRECONDITION = ("PreconditionFailed", "412")
TRANSIENT_BOTOCORE = {"HTTPClientError", "ConnectionError", "IncompleteReadError", "CredentialRetrievalError"}
_memory = threading.Lock()  # memory:// lives in one process, where a lock makes its check-then-write one step


def split_uri(uri: str) -> tuple[str, str, dict[str, str]]:
    """Protocol, uri without credentials, credentials as fsspec options; a local uri becomes an absolute path."""
    with usage_errors():
        protocol, separator, rest = store_place(uri).partition("://")
    if not separator or protocol in LOCAL:
        path = rest if separator else protocol
        if not path:  # abspath would make it the working directory
            raise UsageError(f"{uri!r} names no store: give a folder, s3://, gs:// or az://")
        return "file", os.path.abspath(os.path.expanduser(path)), {}
    if "::" in uri:
        raise StoreError(f"{protocol} is a chained uri, which a store can't be: name the storage itself")
    if "?" in rest or "#" in rest:
        shown = re.split(r"[?#]", rest.rpartition("@")[2])[0]
        raise StoreError(f"{protocol}://{shown} has a query, which a store can't have: set options by environment")
    return (protocol, *_credentials(protocol, rest))


def _credentials(protocol: str, rest: str) -> tuple[str, dict[str, str]]:
    match = re.match(r"([^/@:]+):([^@]+)@(.+)", rest)
    if match and protocol in ("s3", "s3a"):
        return _whole(protocol, match[3]), {"key": unquote(match[1]), "secret": unquote(match[2])}
    if match or "@" in rest.partition("/")[0]:
        raise StoreError(f"{protocol} credentials can't be in the uri: give them by environment")
    return _whole(protocol, rest), {}


def _whole(protocol: str, rest: str) -> str:
    """The uri without empty parts: what is written under a//b, some list under a/b."""
    if rest.startswith("/") and protocol in CONDITIONAL and protocol != "memory":
        raise StoreError(f"{protocol}://{rest} names no bucket: write {protocol}://bucket/folder")
    return f"{protocol}://{re.sub('//+', '/', rest).rstrip('/')}"


def filesystem(protocol: str, uri: str, options: dict[str, str]) -> tuple[Any, str]:
    """The fsspec filesystem of a uri, with no listing cache, and the path in it."""
    try:
        if protocol in S3:
            return _s3(uri, options)
        return url_to_fs(uri, use_listings_cache=False, **options)
    except ImportError as error:
        if protocol in S3:
            need("s3fs", f"{protocol}://")
        raise StoreError(f"{protocol}:// needs a package that is not installed ({error}): pip install it") from None
    except ValueError:
        raise StoreError(f"{protocol}:// is unknown to fsspec: use a folder, s3://, gs:// or az://") from None


def _s3(uri: str, options: dict[str, str]) -> tuple[Any, str]:
    """What the user's own fsspec configuration says about the client wins over S3_CLIENT, field by field."""
    given = (conf.get("s3", {}) | conf.get("s3a", {})).get("config_kwargs", {})
    fs, root = url_to_fs(uri, use_listings_cache=False, config_kwargs=S3_CLIENT | given, **options)
    fs.retries = 1  # on top of botocore's tries come the store's, which know when an outcome is unknown
    return fs, root


def read(fs: Any, protocol: str, path: str, most: int | None = None) -> bytes:
    """A whole file; of one with more than `most` bytes, so many and one more.

    s3fs would ask for a size first, to read large files side by side: one request is enough.
    """
    if protocol == "file":
        with open_regular(path) as file:
            return file.read() if most is None else file.read(most + 1)
    options = {"max_concurrency": 1} if protocol in S3 else {}
    if most is None:
        return bytes(fs.cat_file(path, **options))
    try:
        return bytes(fs.cat_file(path, start=0, end=most + 1, **options))
    except Exception as error:
        if error_code(error) in NO_RANGE:
            return b""
        raise


def open_regular(path: str | Path) -> BinaryIO:
    """A local file, open for reading. StoreError for what would block or never end: FIFOs, devices, folders."""
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise StoreError(f"{shown(path)} is no regular file: remove it, or restore what was there")
    return os.fdopen(handle, "rb")


def check_inside(root: str, path: str) -> None:
    """StoreError where a symbolic link in a local store is on the way to `path` and leads out of the store.

    The root itself may be a link, and links from one place in the store to another are followed.
    """
    full = root
    for part in path.split("/"):
        full = f"{full}/{part}"
        if os.path.islink(full) and not Path(os.path.realpath(full)).is_relative_to(os.path.realpath(f"{root}/")):
            raise StoreError(f"{shown(full)} is a link out of the store {root}, which is not followed: remove it")


def read_ranges(fs: Any, paths: list[str], starts: list[int], ends: list[int]) -> list[bytes]:
    """Bytes of each range. Older releases of fsspec put errors in their places instead of raising one."""
    found = list(fs.cat_ranges(paths, starts, ends, on_error="raise"))
    for error in found:
        if isinstance(error, Exception):
            raise error
    return found


def create(fs: Any, protocol: str, path: str, data: bytes) -> None:
    """Writes `path` whole if it is absent, FileExistsError otherwise; what isn't permanent has an unknown outcome."""
    if protocol == "file":
        _create_local(Path(path), data)
    elif protocol == "memory":
        with _memory:
            fs.pipe_file(path, data, mode="create")
    else:
        try:
            fs.pipe_file(path, data, mode="create")
        except Exception as error:
            if error_code(error) in PRECONDITION:
                raise FileExistsError(path) from error
            raise


def check_creates(fs: Any, protocol: str, uri: str) -> None:
    """Refuse a client without exclusive creates: it takes `mode` for any other option, and replaces what is there.

    The code is asked and not the signature, since adlfs takes `mode` out of its keyword arguments.
    """
    if protocol not in CONDITIONAL:
        return
    code = inspect.unwrap(getattr(fs, "_pipe_file", None) or fs.pipe_file).__code__
    if "mode" in code.co_varnames + code.co_consts:
        return
    package = type(fs).__module__.partition(".")[0]
    wanted = "fsspec>=2024.12" if package == "fsspec" else f"fsspec>=2024.12 and the newest {package}"
    raise StoreError(
        f"{uri}: {type(fs).__name__} of fsspec {fsspec.__version__} ignores exclusive creates, "
        f"so two writers could both win: install {wanted}"
    )


def _create_local(path: Path, data: bytes) -> None:
    with _temporary(path, lambda temporary: temporary.write(data)) as finished:
        try:
            os.link(finished, path)
        except OSError as error:
            if error.errno in NO_LINKS:
                raise StoreError(
                    f"{path.parent} is on a file system without hard links, so writers can't exclude each other there: "
                    "put the store elsewhere, or create it with --single-writer"
                ) from None
            raise


def write_local(path: Path, data: bytes) -> None:
    """Writes or replaces a local file; readers see the old or the new one whole."""
    with _temporary(path, lambda temporary: temporary.write(data)) as finished:
        os.replace(finished, path)


def copy_local(source: str, path: Path) -> None:
    """Copies a file to a name that nobody else uses, and makes it last. A copy that fails leaves no half behind."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(source, "rb") as reader, open(path, "wb") as writer:
            shutil.copyfileobj(reader, writer, 1 << 22)
            _sync(writer)
        sync_path(path.parent)
    except OSError:
        path.unlink(missing_ok=True)
        raise


@contextmanager
def _temporary(path: Path, fill: Callable[[Any], Any]) -> Iterator[Path]:
    path.parent.mkdir(parents=True, exist_ok=True)
    finished = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(finished, "xb") as temporary:
            fill(temporary)
            _sync(temporary)
        yield finished
        sync_path(path.parent)
    finally:
        finished.unlink(missing_ok=True)


def _sync(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def sync_path(path: Path) -> None:
    """Make a closed file, or the names in a folder, last."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def modified(entry: dict[str, Any]) -> datetime | None:
    """When a file that fsspec listed was last written: every storage has its own name and type for that."""
    named = (entry.get(name) for name in ("LastModified", "last_modified", "updated", "mtime", "created"))
    time = next((value for value in named if value is not None), None)
    if isinstance(time, int | float):
        return datetime.fromtimestamp(time, UTC)
    if isinstance(time, str):
        time = datetime.fromisoformat(time)
    return time.astimezone(UTC) if isinstance(time, datetime) else None


def error_code(error: BaseException | None) -> str:
    """The object store's own code, such as NoSuchBucket, anywhere in an exception's causes."""
    return str(_response(error).get("Error", {}).get("Code", ""))


def is_permanent(error: BaseException) -> bool:
    """Whether trying again can't help: refused credentials, a name that isn't there, a full disk, our own mistake."""
    if error_code(error) in TRANSIENT_CODE:
        return False
    status = _response(error).get("ResponseMetadata", {}).get("HTTPStatusCode")
    if status:
        return status not in TRANSIENT_STATUS
    if type(error).__module__ == "botocore.exceptions":
        return TRANSIENT_BOTOCORE.isdisjoint(kind.__name__ for kind in type(error).__mro__)
    return isinstance(error, PERMANENT) or getattr(error, "errno", None) in PERMANENT_ERRNO


def _response(error: BaseException | None) -> dict[str, Any]:
    """What botocore kept of the server's answer, anywhere in an exception's causes."""
    while error is not None:
        response = getattr(error, "response", None)
        if isinstance(response, dict):
            return response
        error = error.__cause__ or error.__context__
    return {}

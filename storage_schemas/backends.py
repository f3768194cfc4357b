"""Put-if-absent for each kind of storage: only creates that the storage itself makes atomic.

fsspec's local `pipe_file(mode="create")` lets two writers win, and an exclusive open shows half-written files to the
loser; a finished temporary file and a hard link do neither. S3, GCS and Azure have a conditional put of their own.
"""

import errno
import os
import re
import shutil
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from fsspec.core import url_to_fs

from storage_schemas.errors import StoreError, UsageError

LOCAL = ("file", "local")
CONDITIONAL = ("memory", "s3", "s3a", "gs", "gcs", "az", "abfs", "abfss")
NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)
_memory = threading.Lock()  # memory:// lives in one process, where a lock makes its check-then-write one step


def split_uri(uri: str) -> tuple[str, str, dict[str, str]]:
    """Protocol, uri without credentials, credentials as fsspec options; a local uri becomes an absolute path."""
    protocol, separator, rest = uri.partition("://")
    if not separator or protocol in LOCAL:
        path = rest if separator else uri
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
        return f"{protocol}://{match[3].rstrip('/')}", {"key": unquote(match[1]), "secret": unquote(match[2])}
    if match or "@" in rest.partition("/")[0]:
        raise StoreError(f"{protocol} credentials can't be in the uri: give them by environment")
    return f"{protocol}://{rest.rstrip('/')}", {}


def filesystem(protocol: str, uri: str, options: dict[str, str]) -> tuple[Any, str]:
    """The fsspec filesystem of a uri, with no listing cache, and the path in it."""
    try:
        return url_to_fs(uri, use_listings_cache=False, **options)
    except ImportError as error:
        raise StoreError(f"{protocol}:// needs a package that is not installed ({error}): pip install it") from None
    except ValueError:
        raise StoreError(f"{protocol}:// is unknown to fsspec: use a folder, s3://, gs:// or az://") from None


def create(fs: Any, protocol: str, path: str, data: bytes) -> None:
    """Writes `path` whole if it is absent, FileExistsError otherwise; other exceptions leave the outcome unknown."""
    if protocol == "file":
        _create_local(Path(path), data)
    elif protocol == "memory":
        with _memory:
            fs.pipe_file(path, data, mode="create")
    else:
        fs.pipe_file(path, data, mode="create")


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
    """Copies a file to a name that nobody else uses, and makes it last."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(source, "rb") as reader, open(path, "wb") as writer:
        shutil.copyfileobj(reader, writer, 1 << 22)
        _sync(writer)
    _sync_folder(path.parent)


@contextmanager
def _temporary(path: Path, fill: Callable[[Any], Any]) -> Iterator[Path]:
    path.parent.mkdir(parents=True, exist_ok=True)
    finished = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(finished, "xb") as temporary:
            fill(temporary)
            _sync(temporary)
        yield finished
        _sync_folder(path.parent)
    finally:
        finished.unlink(missing_ok=True)


def _sync(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def error_code(error: BaseException | None) -> str:
    """The object store's own code, such as NoSuchBucket, anywhere in an exception's causes."""
    while error is not None:
        response = getattr(error, "response", None)
        if isinstance(response, dict):
            return str(response.get("Error", {}).get("Code", ""))
        error = error.__cause__ or error.__context__
    return ""

"""Documents of a store by their paths: one, or many of which some may be damaged."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from limbeck.storage_schemas.documents import Document
from limbeck.storage_schemas.errors import StoreError
from limbeck.storage_schemas.store import READ_THREADS, Store

D = TypeVar("D", bound=Document)


def read_document(store: Store, path: str, kind: type[D]) -> D | None:
    """The document at a path, None where nothing is."""
    data = store.read(path)
    return None if data is None else kind.from_bytes(data, f"{store.uri}/{path}")


def read_all(store: Store, many: Sequence[str], kind: type[D]) -> tuple[dict[str, D], dict[str, str]]:
    """(path -> document) of those that can be read, (path -> what is wrong, in a line) of the others.

    What is absent is in neither. Nothing of one document keeps another from being read.
    """

    def read(path: str) -> D | StoreError | None:
        try:
            return read_document(store, path, kind)
        except StoreError as error:
            return error

    with ThreadPoolExecutor(READ_THREADS) as threads:
        found = dict(zip(many, threads.map(read, many), strict=True))
    documents = {path: one for path, one in found.items() if isinstance(one, kind)}
    return documents, {path: f"{one}; it is left alone" for path, one in found.items() if isinstance(one, StoreError)}

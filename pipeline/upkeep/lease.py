"""One prune at a time: the run that takes the next number in prunes/ holds it, until its end or an hour of silence."""

import platform
import re
import threading
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Self

from limbeck.pipeline.job.heartbeat import SPARED
from limbeck.pipeline.job.targets import readable
from limbeck.storage_schemas import paths
from limbeck.storage_schemas.clock import SKEW, age
from limbeck.storage_schemas.errors import StoreError
from limbeck.storage_schemas.job import Prune
from limbeck.storage_schemas.store import Store

RENEWED = timedelta(minutes=1)


class Lease:
    """Taken when made. `check` right before every deletion, `end` at the end."""

    def __init__(self, store: Store, run: str, clock: Callable[[], datetime]) -> None:
        self.store, self.run, self.clock = store, run, clock
        self._lock = threading.Lock()
        number = _last_number(store)
        self._refuse_if_held(number)
        self.number = number + 1
        there = store.put_if_absent(self.path, self._document().to_bytes())
        if Prune.from_bytes(there, store.uri).run != run:
            raise self._held(Prune.from_bytes(there, store.uri))
        self._renewed = clock()

    @property
    def path(self) -> str:
        """Path of the document by which the lease is held."""
        return paths.prune_path(self.number)

    def check(self) -> None:
        """Say that we live, and make sure that no other run has taken us for dead."""
        with self._lock:
            silent = self.clock() - self._renewed
            if silent < RENEWED:
                return
            if silent > SPARED - SKEW or _last_number(self.store) != self.number:
                raise StoreError(f"this prune of {self.store.uri} was held up for {silent}: run it again")
            self._write(self._document())

    def end(self) -> None:
        """Let the next one begin."""
        self._write(self._document(ended=True))
        for number in _numbers(self.store):
            if number < self.number:
                self.store.remove(paths.prune_path(number))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self.end()

    def _document(self, *, ended: bool = False) -> Prune:
        at = self.clock().isoformat(timespec="seconds")
        return Prune(run=self.run, machine=platform.node(), at=at, ended=ended)

    def _write(self, document: Prune) -> None:
        self.store.write(self.path, document.to_bytes())
        self._renewed = self.clock()

    def _refuse_if_held(self, number: int) -> None:
        path = paths.prune_path(number)
        last = readable(self.store, [path], Prune, []).get(path) if number else None
        if last and not last.ended and age(last.at, self.clock()) < SPARED:
            raise self._held(last)

    def _held(self, other: Prune) -> StoreError:
        return StoreError(
            f"another prune of {self.store.uri} is at work on {other.machine} (last heard of at {other.at}): wait for "
            "it; if it is dead, an hour from then this will go on"
        )


def _numbers(store: Store) -> list[int]:
    names = (re.fullmatch(r"([0-9]{6,18})\.json", name) for name in store.list(paths.PRUNES))
    return [int(match[1]) for match in names if match]


def _last_number(store: Store) -> int:
    return max(_numbers(store), default=0)

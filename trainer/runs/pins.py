"""Pins say that a run still reads a manifest, so that nothing it needs is pruned. A read-only store has none."""

from datetime import datetime, timedelta

from limbeck.storage_schemas import paths
from limbeck.storage_schemas.clock import check_clock, utc
from limbeck.storage_schemas.errors import StoreError
from limbeck.storage_schemas.job import Pin
from limbeck.storage_schemas.store import Store

_LASTS = timedelta(days=7)
_RENEWED = timedelta(hours=6)


class Pins:
    """The pins of one run on manifests of one dataset: one, or several while it goes over to a newer one."""

    def __init__(self, store: Store, *, run: str, dataset: str) -> None:
        self._store, self._run, self._dataset = store, run, dataset
        self._written: dict[int, datetime] = {}

    def hold(self, number: int) -> str | None:
        """Pin a manifest, if that is due; a line for the user where the store refuses."""
        now = utc()
        written = self._written.get(number)
        if written is not None and now - written < _RENEWED:
            return None
        self._written[number] = now
        expires = (now + _LASTS).isoformat(timespec="seconds")
        name = self._name(number)
        pin = Pin(run=name, dataset=self._dataset, number=number, expires_at=expires)
        try:
            self._store.write(paths.pin_path(name), pin.to_bytes())
            check_clock(self._store, paths.pin_path(name), since=now)
        except StoreError as error:
            return f"manifest {number} is not pinned ({error}): a prune may remove what this run reads"
        return None

    def keep(self, number: int) -> str | None:
        """Pin this one, and remove the pins on those that the run read before."""
        for before in [held for held in list(self._written) if held < number]:
            self._remove(self._name(before))
            del self._written[before]
        return self.hold(number)

    def drop(self) -> None:
        """Remove all pins, also those that a killed process of the run has left."""
        try:
            listed = self._store.list(paths.PINS)
        except StoreError:
            return
        for name in listed:
            if name.startswith(f"{self._run}-"):
                self._remove(name.removesuffix(".json"))
        self._written.clear()

    def _name(self, number: int) -> str:
        return f"{self._run}-{number}"

    def _remove(self, name: str) -> None:
        try:
            self._store.remove(paths.pin_path(name))
        except StoreError:
            return

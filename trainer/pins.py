"""A pin says that a run still reads a manifest, so that nothing it needs is pruned. A read-only store has none."""

from datetime import UTC, datetime, timedelta

from storage_schemas import paths
from storage_schemas.errors import StoreError
from storage_schemas.job import Pin
from storage_schemas.store import Store

_LASTS = timedelta(days=7)
_RENEWED = timedelta(hours=6)


class ManifestPin:
    """The pin of one run on one manifest; renew it now and then, and drop it at the end."""

    def __init__(self, store: Store, *, run: str, dataset: str, number: int) -> None:
        self._store, self._run, self._dataset, self._number = store, run, dataset, number
        self._written: datetime | None = None

    def renew(self) -> str | None:
        """Write the pin if it is due; a line for the user where the store refuses."""
        now = datetime.now(UTC)
        if self._written is not None and now - self._written < _RENEWED:
            return None
        self._written = now
        expires = (now + _LASTS).isoformat(timespec="seconds")
        pin = Pin(run=self._run, dataset=self._dataset, number=self._number, expires_at=expires)
        try:
            self._store.write(paths.pin_path(self._run), pin.to_bytes())
        except StoreError as error:
            return f"manifest {self._number} is not pinned ({error}): a prune may remove what this run reads"
        return None

    def drop(self) -> None:
        """The run has ended."""
        try:
            self._store.remove(paths.pin_path(self._run))
        except StoreError:
            return

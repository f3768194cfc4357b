"""The wall clock, and whether it agrees with the storage's: what may be deleted is decided by times in documents."""

from datetime import UTC, datetime, timedelta

from limbeck.storage_schemas.errors import StoreError
from limbeck.storage_schemas.store import Store

SKEW = timedelta(minutes=10)
"""How far apart the clocks of two machines may be."""


def utc() -> datetime:
    """The time now. It goes on while a process or its machine is stopped, as monotonic clocks don't."""
    return datetime.now(UTC)


def utc_now() -> str:
    """The time as ISO 8601 in UTC, to the second."""
    return utc().isoformat(timespec="seconds")


def age(at: str, now: datetime) -> timedelta:
    """How long ago a time of a document was."""
    return now - datetime.fromisoformat(at)


def check_clock(store: Store, path: str, *, since: datetime) -> None:
    """StoreError where this machine's clock is not the storage's, which has just written `path`.

    since: our time right before that write. A storage that doesn't say when it writes is believed to agree.
    """
    written = store.modified(path)
    if written is None or since - SKEW <= written <= utc() + SKEW:
        return
    off = utc() - written
    difference = f"{abs(off)} {'ahead of' if off > timedelta() else 'behind'}"
    raise StoreError(
        f"the clock of this machine is {difference} that of {store.uri}, and what may be deleted is decided by time: "
        "set the clock (NTP), then run this again"
    )

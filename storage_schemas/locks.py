"""One process at a time in a folder of this machine."""

import fcntl
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from limbeck.storage_schemas.errors import UsageError

_LOOKS = 0.2  # seconds between two tries


@contextmanager
def only_one(
    lock: Path, *, refused: str, patience: float = 0.0, wait: Callable[[], None] = lambda: None
) -> Iterator[int]:
    """Hold a lock file, whose folder is made; yields its descriptor, for a child process to inherit.

    The lock is free when all who have the descriptor have ended: a killed process leaves none behind. patience: seconds
    to wait for others; wait: called once before that. UsageError with `refused` if they are still there.
    """
    lock.parent.mkdir(parents=True, exist_ok=True)
    with open(lock, "w") as file:
        deadline = time.monotonic() + patience
        if not _locked(file.fileno()):
            wait()
        while not _locked(file.fileno()):
            if time.monotonic() > deadline:
                raise UsageError(refused)
            time.sleep(_LOOKS)
        yield file.fileno()


def _locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True

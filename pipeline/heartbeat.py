"""A driver says every minute that it lives: `status` tells by it, `prune` spares what its job aims at."""

import threading
import time
from datetime import datetime, timedelta

from storage_schemas import paths
from storage_schemas.commit import utc_now
from storage_schemas.job import Heartbeat, JobState
from storage_schemas.store import Store

EVERY = 60.0
"""Seconds between two heartbeats."""

LAPSED = timedelta(minutes=30)
"""A driver that could say nothing for this long doesn't count on being spared any more, and plans again."""

SPARED = timedelta(hours=1)
"""`prune` spares a job for at least this long after its last heartbeat, whatever the grace."""

SKEW = timedelta(minutes=10)
"""How far apart the clocks of two machines may be."""


class Pulse:
    """Writes a job's heartbeat from a thread. A store that refuses it does the job no harm."""

    def __init__(self, store: Store, job: str, *, every: float = EVERY) -> None:
        self.store, self.job, self.every = store, job, every
        self.beat = Heartbeat(at=utc_now(), state="planning")
        self.lapsed = False
        self._written = time.time()
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def say(self, state: JobState, *, found: int = 0) -> None:
        """Write this state now and every minute from now on."""
        with self._lock:
            if self._thread is None:
                self._written = time.time()  # a long look before the first word is no silence
            self.beat = Heartbeat(at=utc_now(), state=state, found=found)
            self._write()
        if self._thread is None:
            self._thread = threading.Thread(target=self._go_on, daemon=True, name="heartbeat")
            self._thread.start()

    def end(self, state: JobState) -> None:
        """The last word, if there was a first one. A job that ends badly while it plans has checked nothing."""
        self._ended.set()
        unchecked = self.beat.state == "planning" and state in ("failed", "stopped")
        if self._thread is not None:
            self.say("refused" if unchecked else state, found=self.beat.found)

    def plan_again(self) -> None:
        """The driver's aim will change: nobody builds on it before the driver has checked it, and says so."""
        if self._thread is not None:
            self.say("planning")

    def _go_on(self) -> None:
        while not self._ended.wait(self.every):
            with self._lock:
                if not self._ended.is_set():
                    self.beat = self.beat.model_copy(update={"at": utc_now()})
                    self._write()

    def _write(self) -> None:
        # By the wall clock: the others stop while a machine is suspended, and prunes don't.
        self.lapsed |= time.time() - self._written > LAPSED.total_seconds()
        try:
            self.store.write(paths.heartbeat_path(self.job), self.beat.to_bytes())
            self._written = time.time()
        except Exception:  # whatever a store can raise: the job is worth more than its heartbeat
            return


def age(at: str, now: datetime) -> timedelta:
    """How long ago a time of a document was."""
    return now - datetime.fromisoformat(at)

"""A driver says every minute that it lives: `status` tells by it, `prune` spares what its job aims at."""

import threading
from datetime import timedelta

from limbeck.storage_schemas import paths
from limbeck.storage_schemas.clock import utc_now
from limbeck.storage_schemas.job import Heartbeat, JobState
from limbeck.storage_schemas.store import Store

EVERY = 60.0
"""Seconds between two heartbeats."""

SPARED = timedelta(hours=1)
"""`prune` spares a job for at least this long after its last heartbeat, whatever the grace."""


class Pulse:
    """Writes the heartbeat of a driver's job from a thread. Failed writes are ignored: the job matters more."""

    def __init__(self, store: Store, *, every: float = EVERY) -> None:
        self.store, self.every, self.job = store, every, ""
        self.beat = Heartbeat(at=utc_now(), state="planning")
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def begin(self, job: str) -> None:
        """The first word of a job that is announced. It takes over what the driver's job before it held."""
        before, found = self.job, self.beat.found
        with self._lock:
            self.job = job
            self._say("planning", found=0)
            if before:
                self._write(before, Heartbeat(at=utc_now(), state="ended", found=found))
        if self._thread is None:
            self._thread = threading.Thread(target=self._go_on, daemon=True, name="heartbeat")
            self._thread.start()

    def say(self, state: JobState, *, found: int = 0) -> None:
        """Write this state now and every minute from now on."""
        with self._lock:
            self._say(state, found=found)

    def end(self, state: JobState) -> None:
        """The last word, if there was a first one. A job that ends badly while it plans has checked nothing."""
        self._ended.set()
        unchecked = self.beat.state == "planning" and state in ("failed", "stopped")
        if self.job:
            self.say("refused" if unchecked else state, found=self.beat.found)

    def _say(self, state: JobState, *, found: int) -> None:
        self.beat = Heartbeat(at=utc_now(), state=state, found=found)
        self._write(self.job, self.beat)

    def _go_on(self) -> None:
        while not self._ended.wait(self.every):
            with self._lock:
                if not self._ended.is_set():
                    self._say(self.beat.state, found=self.beat.found)

    def _write(self, job: str, beat: Heartbeat) -> None:
        try:
            self.store.write(paths.heartbeat_path(job), beat.to_bytes())
        except Exception:  # whatever a store can raise: the job is worth more than its heartbeat
            return

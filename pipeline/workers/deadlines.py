"""How long a job waits: for workers to be ready, and for a task to end."""

import math
import statistics
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from limbeck.pipeline.workers.fleet import WorkerError
from limbeck.pipeline.workers.pool import Pool

ROOM_SECONDS = 60.0
"""How often a log says that workers wait for room."""

STRAGGLER_TIMES, STRAGGLER_SECONDS, STRAGGLER_AFTER = 20, 600.0, 3
"""The deadline that is derived: so many times the median task, at least so long, once so many tasks have ended. A
worker's first task may compile its network, which takes minutes."""

RECENT = 101


@dataclass(frozen=True)
class Patience:
    """Workers that must be ready within `startup_seconds`; a task's deadline, derived from the others' if None."""

    min_workers: int = 1
    startup_seconds: float = math.inf
    straggler_seconds: float | None = None


class Deadline:
    """The deadline of a task, from those that have ended."""

    def __init__(self, given: float | None) -> None:
        self._given = given
        self._recent = deque[float](maxlen=RECENT)

    def ended(self, seconds: float) -> None:
        """One more task took so long."""
        self._recent.append(seconds)

    def after(self, silence: float) -> float:
        """The deadline in seconds, for a worker that has been silent for so long."""
        if self._given is not None:
            return self._given
        if silence <= STRAGGLER_SECONDS or len(self._recent) < STRAGGLER_AFTER:
            return math.inf
        return max(STRAGGLER_SECONDS, STRAGGLER_TIMES * statistics.median(self._recent))


class RoomWatch:
    """Ends a job that the cluster has no room for, and says now and then that it has too little."""

    def __init__(self, pool: Pool, patience: Patience, *, workers: int, tell: Callable[[str], None]) -> None:
        self._pool, self._patience, self._tell = pool, patience, tell
        self._enough = min(patience.min_workers, workers)
        self._enough_at: float | None = None
        self._changed: tuple[float, int] | None = None  # when, and how many were ready

    def look(self, now: float) -> None:
        """WorkerError if too few workers have been ready for too long, none of them once there were enough."""
        pool = self._pool
        if pool.ready >= self._enough:
            self._enough = 1
        if self._enough_at is None or pool.ready >= self._enough or not pool.starting:
            self._enough_at = now
        elif now - self._enough_at > self._patience.startup_seconds:
            raise WorkerError(
                f"{pool.ready} workers are ready after {self._patience.startup_seconds:g} s, {self._enough} must be: "
                f"{pool.fleet.room()}; let a worker take less, or wait longer (--ray.startup-timeout)"
            )
        self._say_how_many_wait(now)

    def _say_how_many_wait(self, now: float) -> None:
        ready, starting = self._pool.ready, len(self._pool.starting)
        if not starting or self._changed is None or self._changed[1] != ready:
            self._changed = now, ready
        elif now - self._changed[0] >= ROOM_SECONDS:
            self._changed = now, ready
            self._tell(
                f"{ready} of {ready + starting} workers ready; the others wait for room: {self._pool.fleet.room()}"
            )

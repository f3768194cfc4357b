"""How far a job is: a bar on a terminal, one plain line an interval elsewhere."""

import sys
import threading
import time
from types import TracebackType
from typing import Self

import rich.progress as bars
from rich.console import Console

from limbeck.storage_schemas.commit import Commit
from limbeck.storage_schemas.job import Failure
from limbeck.storage_schemas.log import log

INTERVAL_SECONDS = 10.0


class Progress:
    """Counts tasks and samples from now on; `with` shows them, on stderr."""

    def __init__(self, total_tasks: int, *, interval: float = INTERVAL_SECONDS) -> None:
        self.total = total_tasks
        self.tasks = self.samples = self.failures = 0
        self._interval = interval
        self._started = time.monotonic()
        self._ended = threading.Event()
        self._bar = _bar() if sys.stderr.isatty() else None
        self._row = self._bar.add_task("solving", total=total_tasks, rate="") if self._bar else None

    def __enter__(self) -> Self:
        if self._bar:
            self._bar.start()
        else:
            threading.Thread(target=self._tell, daemon=True, name="progress").start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._ended.set()
        if self._bar:
            self._bar.stop()

    def count(self, outcome: Commit | Failure) -> None:
        """One task has ended."""
        if isinstance(outcome, Commit):
            self.tasks += 1
            self.samples += outcome.rows
        else:
            self.failures += 1
            log.warning(f"{outcome.task} set aside after {outcome.attempts} attempts: {outcome.error}")
        if self._bar and self._row is not None:
            self._bar.update(self._row, completed=self.tasks, rate=self._rate())

    def _tell(self) -> None:
        """A line an interval, also while no task ends: those who read a log see that the job lives."""
        while not self._ended.wait(self._interval):
            log.info(self.line())

    def line(self) -> str:
        """One line such as: 3/9 tasks, 6144 samples, 812 samples/s, 0 failures, 15 s to go."""
        left = self.total - self.tasks - self.failures
        eta = f"{self._elapsed / self.tasks * left:.0f} s to go" if self.tasks else "no estimate yet"
        return f"{self.tasks}/{self.total} tasks, {self.samples} samples, {self._rate()}, {eta}"

    @property
    def _elapsed(self) -> float:
        return max(time.monotonic() - self._started, 1e-9)

    def _rate(self) -> str:
        return f"{self.samples / self._elapsed:.0f} samples/s, {self.failures} failures"


def _bar() -> bars.Progress:
    return bars.Progress(
        bars.TextColumn("{task.description}"),
        bars.BarColumn(),
        bars.MofNCompleteColumn(),
        bars.TextColumn("shards, {task.fields[rate]}"),
        bars.TimeElapsedColumn(),
        bars.TimeRemainingColumn(),
        console=Console(stderr=True),
    )

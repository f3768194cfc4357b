"""The one loop that hands tasks to workers, whatever a worker is: a thread, a process, an actor on a cluster.

Execution is at least once: a worker may die after it committed, and its task then runs again and finds the commit.
"""

import math
import platform
import time
from collections.abc import Callable, Iterator, Sequence

from limbeck.pipeline.producer import Problem
from limbeck.pipeline.workers.backlog import Backlog, MayTry
from limbeck.pipeline.workers.deadlines import Deadline, Patience, RoomWatch
from limbeck.pipeline.workers.fleet import IN_FLIGHT, Died, Event, Finished, Fleet, Leaving, Ready, WorkerError
from limbeck.pipeline.workers.pool import Pool
from limbeck.pipeline.workers.signals import Drain, describe_drain
from limbeck.pipeline.workers.worker_death import Cause
from limbeck.storage_schemas.commit import Commit, Task
from limbeck.storage_schemas.job import Failure

__all__ = ["IN_FLIGHT", "Died", "Event", "Finished", "Fleet", "Leaving", "Patience", "Ready", "WorkerError", "dispatch"]

DEAD_ON_ARRIVAL = 3
"""Workers in a row, or half of all if that is more, whose process may die before its teacher is loaded. One that went
with its node isn't counted: that is not the teacher's doing, and a spot cluster that flaps takes many along."""

PAUSE_SECONDS = 60.0
"""Seconds for which that many deaths pause the starting of more, where others are at work."""

SICK = 3
"""Tasks in a row that a worker may fail while others succeed, before it is replaced."""


def dispatch(
    fleet: Fleet,
    tasks: Sequence[Task],
    *,
    workers: int,
    max_attempts: int,
    patience: Patience | None = None,
    drain: Drain | None = None,
    tell: Callable[[str], None] = lambda line: None,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Commit | Failure]:
    """Every task's end, as it comes: its commit, or its failure once its last attempt has failed.

    Ends early, with tasks left, once `drain` was asked and what was in flight has finished or had its time.
    """
    backlog = Backlog(tasks, max_attempts)
    yield from _Dispatch(fleet, backlog, workers, patience or Patience(), drain or Drain(0.0), tell, clock).run()


class _Dispatch:
    def __init__(
        self,
        fleet: Fleet,
        backlog: Backlog,
        workers: int,
        patience: Patience,
        drain: Drain,
        tell: Callable[[str], None],
        clock: Callable[[], float],
    ) -> None:
        self.pool = Pool(fleet, clock)
        self.backlog, self.workers, self.drain, self.tell, self.clock = backlog, workers, drain, tell, clock
        self.deadline = Deadline(patience.straggler_seconds)
        self.watch = RoomWatch(self.pool, patience, workers=workers, tell=tell)
        self.start_at = -math.inf
        self.stillborn = self.successes = 0
        self.sick: set[str] = set()  # machines that could not load the teacher, since the last one that could
        self.streaks: dict[int, tuple[int, int]] = {}  # failures in a row, and all successes before them

    def run(self) -> Iterator[Commit | Failure]:
        draining = False
        while self.backlog or self.pool.busy:
            if self.drain.asked:
                if not draining:
                    self._stop_handing_out()
                draining = True
                if self.drain.over or not self.pool.busy:
                    return
            else:
                self._start()
                self._hand_out()
                self._end_unneeded()
            for event in self.pool.fleet.wait():
                yield from self._take(event)
            yield from self._end_stragglers()
            self.watch.look(self.clock())

    def _start(self) -> None:
        """Start as many workers as may be, no more than there are tasks for."""
        pool = self.pool
        places = self.workers - len(pool.starting) - pool.ready
        unserved = len(self.backlog) - len(pool.starting) - len(pool.idle)
        paused = pool.ready and self.clock() < self.start_at
        for _ in range(0 if paused else min(places, unserved)):
            pool.start()

    def _hand_out(self) -> None:
        """A first task for every idle worker, then second ones, but for those that workers still starting will need."""
        pool = self.pool
        for worker in list(pool.idle):
            if task := self.backlog.first(self._may_try(worker)):
                pool.give(worker, task, alone=self.backlog.is_suspect(task))
        while pool.open and len(self.backlog) > len(pool.starting):
            worker = next(iter(pool.open))
            task = self.backlog.second(self._may_try(worker))
            if task is None:
                pool.open.move_to_end(worker)  # another one is asked first next time
                return
            pool.give(worker, task, alone=False)

    def _may_try(self, worker: int) -> MayTry:
        """A sole worker may have those again that it failed itself; others what raised elsewhere."""
        return lambda failed_on: self.workers == 1 or self.pool.is_elsewhere(worker, failed_on)

    def _end_unneeded(self) -> None:
        """Their GPUs are free for others now. A worker that failed all tasks that wait is idle too: another starts.

        One that may try none of them from the beginning is where they failed, and so would the next one be.
        """
        for worker in list(self.pool.idle):
            if self.backlog and worker not in self.pool.used:
                self.start_at = self.clock() + PAUSE_SECONDS
            self.pool.end(worker)
        while len(self.pool.starting) > len(self.backlog):
            self.pool.end(next(reversed(self.pool.starting)))

    def _stop_handing_out(self) -> None:
        self.tell(describe_drain(self.drain, in_flight=self.pool.in_flight))
        for worker in [*self.pool.starting, *self.pool.idle]:
            self.pool.end(worker)

    def _take(self, event: Event) -> Iterator[Commit | Failure]:
        if event.worker not in self.pool.starting and event.worker not in self.pool.loads:
            return  # ended here, perhaps a moment ago
        match event:
            case Ready(worker, problem):
                self._ready(worker, problem, event.place)
            case Finished(worker, task, outcome):
                yield from self._finished(worker, task, outcome)
            case Died(worker) if worker in self.pool.starting:
                self.pool.forget(worker)
                if event.cause == "process":
                    self._died_at_birth(event.reason)
            case Died(worker):
                problem = Problem(f"its worker died: {event.reason}", event.detail, event.machine)
                yield from self._lost(self.pool.forget(worker), problem, event.cause)
            case Leaving(worker) if worker in self.pool.loads:
                self.pool.leave(worker)

    def _ready(self, worker: int, problem: Problem | None, place: str) -> None:
        if problem is None:
            self.pool.welcome(worker, place)
            self.stillborn = 0
            self.sick.clear()
            return
        reason = f"a worker on {problem.machine} can't start: {problem.error}"
        self.pool.end(worker)
        self.sick.add(problem.machine)
        # One sick node fails the fastest of all. Two say that it is the teacher, and so does one that is alone.
        if not self.pool.ready and (len(self.sick) > 1 or not self.pool.starting):
            raise WorkerError(reason, problem.exit_code)
        self.tell(reason)
        self._one_more_stillborn(reason)

    def _died_at_birth(self, reason: str) -> None:
        self._one_more_stillborn(
            f"{self.stillborn + 1} workers in a row died while they loaded the teacher ({reason}): "
            "give them more memory, or fewer --workers"
        )

    def _one_more_stillborn(self, problem: str) -> None:
        self.stillborn += 1
        if self.stillborn < max(DEAD_ON_ARRIVAL, self.workers // 2):
            return
        if not self.pool.ready:
            raise WorkerError(problem)
        self.start_at = self.clock() + PAUSE_SECONDS

    def _finished(self, worker: int, task: Task, outcome: Commit | Problem) -> Iterator[Commit | Failure]:
        self.deadline.ended(self.pool.finished(worker, task))
        if isinstance(outcome, Commit):
            self.successes += 1
            self.streaks.pop(worker, None)
            yield outcome
            return
        if failure := self.backlog.raised(task, outcome, worker=worker):
            yield failure
        self._count_failure(worker, outcome)

    def _count_failure(self, worker: int, problem: Problem) -> None:
        """A full disk or a sick GPU fails one task after the other, and fast: it would have them all."""
        failures, before = self.streaks.get(worker, (0, self.successes))
        self.streaks[worker] = failures + 1, before
        if failures + 1 < SICK or self.successes == before or self.workers == 1 or worker not in self.pool.loads:
            return
        self.tell(
            f"a worker on {problem.machine} failed {failures + 1} tasks in a row and is replaced: {problem.error}"
        )
        del self.streaks[worker]
        for task in self.pool.end(worker):
            self.backlog.put_back(task)

    def _lost(self, tasks: Sequence[Task], problem: Problem, cause: Cause) -> Iterator[Failure]:
        for task in tasks:
            if cause == "notice":
                self.backlog.put_back(task)
            elif failure := self.backlog.lost(task, problem, with_node=cause == "node"):
                yield failure

    def _end_stragglers(self) -> Iterator[Failure]:
        while silent := self.pool.longest_silent():
            worker, seconds = silent
            limit = self.deadline.after(seconds)
            if seconds <= limit:
                return
            names = " and ".join(task.name for task in self.pool.loads[worker])
            self.tell(f"a worker that was silent for {limit:g} s over {names} is ended (--straggler-seconds)")
            problem = Problem(f"no end after {limit:g} s, the straggler deadline", "", platform.node())
            yield from self._lost(self.pool.end(worker), problem, "process")

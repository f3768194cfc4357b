"""The one loop that hands tasks to workers, whatever a worker is: a thread, a process, an actor on a cluster.

Execution is at least once: a worker may die after it committed, and its task then runs again and finds the commit.
"""

import platform
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from pipeline.produce import Problem
from storage_schemas.commit import Commit, Task, utc_now
from storage_schemas.errors import UserError
from storage_schemas.job import Failure

IN_FLIGHT = 2
"""Tasks of a worker at a time: one solves while the other's shard is uploaded."""

DEAD_ON_ARRIVAL = 3
"""Workers in a row that may die before their teacher is loaded."""


class WorkerError(UserError):
    """No worker can do this job."""


@dataclass(frozen=True)
class Ready:
    """A worker has loaded its teacher, or says why it can't."""

    worker: int
    problem: Problem | None


@dataclass(frozen=True)
class Finished:
    """A worker ended a task, well or not."""

    worker: int
    task: Task
    outcome: Commit | Problem


@dataclass(frozen=True)
class Died:
    """A worker is gone, and with it whatever it had in flight."""

    worker: int
    reason: str


Event = Ready | Finished | Died


class Fleet(Protocol):
    """Workers of one kind, by number."""

    def start(self) -> int:
        """Begin to start another worker; Ready or Died says how that went."""

    def submit(self, worker: int, task: Task) -> None:
        """Give a ready worker a task, which ends in Finished or in its worker's Died."""

    def wait(self) -> Sequence[Event]:
        """What happened since the last call; may wait a moment for something to happen."""

    def close(self) -> None:
        """End all workers."""


class Backlog:
    """Tasks that wait, and how often each was tried.

    A task whose worker died runs alone from then on: should it be what kills workers, it takes no other along again.
    """

    def __init__(self, tasks: Sequence[Task], max_attempts: int) -> None:
        self.fresh = deque(tasks)
        self.alone = deque[Task]()
        self.max_attempts = max_attempts
        self.attempts = Counter[Task]()
        self._suspects = set[Task]()

    def __len__(self) -> int:
        return len(self.fresh) + len(self.alone)

    def take(self, load: Sequence[Task]) -> Task | None:
        """The next task for a worker that has `load` in flight, if it should get one."""
        if not load and self.alone:
            return self.alone.popleft()
        if len(load) < IN_FLIGHT and self._suspects.isdisjoint(load) and self.fresh:
            return self.fresh.popleft()
        return None

    def failed(self, task: Task, problem: Problem, *, alone: bool) -> Failure | None:
        """Count the attempt and queue the task again, or set it aside for good."""
        self.attempts[task] += 1
        if self.attempts[task] < self.max_attempts:
            (self.alone if alone else self.fresh).append(task)
            self._suspects |= {task} if alone else set()
            return None
        return Failure(
            task=task.name,
            error=problem.error,
            traceback=problem.traceback,
            attempts=self.attempts[task],
            machine=problem.machine,
            failed_at=utc_now(),
        )


def dispatch(fleet: Fleet, tasks: Sequence[Task], *, workers: int, max_attempts: int) -> Iterator[Commit | Failure]:
    """Every task's end, as it comes: its commit, or its failure once its last attempt has failed."""
    backlog = Backlog(tasks, max_attempts)
    starting: set[int] = set()
    loads: dict[int, list[Task]] = {}
    stillborn = 0
    while backlog or any(loads.values()):
        for _ in range(min(workers, len(backlog)) - len(starting) - len(loads)):
            starting.add(fleet.start())
        _hand_out(fleet, backlog, loads, starting=len(starting))
        for event in fleet.wait():
            match event:
                case Ready(worker, problem):
                    _check_ready(problem)
                    starting.remove(worker)
                    loads[worker], stillborn = [], 0
                case Finished(worker, task, outcome):
                    loads[worker].remove(task)
                    yield from _ended(backlog, task, outcome)
                case Died(worker, reason) if worker in starting:
                    starting.remove(worker)
                    stillborn = _one_more(stillborn, reason)
                case Died(worker, reason):
                    for task in loads.pop(worker):
                        yield from _lost(backlog, task, reason)


def _hand_out(fleet: Fleet, backlog: Backlog, loads: dict[int, list[Task]], *, starting: int) -> None:
    """A first task for every idle worker, then second ones, but for those that workers still starting will need."""
    for depth in range(IN_FLIGHT):
        for worker, load in loads.items():
            wanted = len(load) <= depth and (depth == 0 or len(backlog) > starting)
            if wanted and (task := backlog.take(load)):
                load.append(task)
                fleet.submit(worker, task)


def _ended(backlog: Backlog, task: Task, outcome: Commit | Problem) -> Iterator[Commit | Failure]:
    if isinstance(outcome, Commit):
        yield outcome
    elif failure := backlog.failed(task, outcome, alone=False):
        yield failure


def _lost(backlog: Backlog, task: Task, reason: str) -> Iterator[Failure]:
    problem = Problem(f"its worker died: {reason}", "", platform.node())
    if failure := backlog.failed(task, problem, alone=True):
        yield failure


def _check_ready(problem: Problem | None) -> None:
    if problem:
        raise WorkerError(f"a worker on {problem.machine} can't start: {problem.error}")


def _one_more(stillborn: int, reason: str) -> int:
    if stillborn + 1 == DEAD_ON_ARRIVAL:
        raise WorkerError(
            f"{DEAD_ON_ARRIVAL} workers in a row died while they loaded the teacher ({reason}): "
            "give them more memory, or fewer --workers"
        )
    return stillborn + 1

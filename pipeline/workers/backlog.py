"""Tasks that wait, how often each was tried, and which worker may have which. Every step costs O(1)."""

from collections import Counter, deque
from collections.abc import Callable, Sequence

from limbeck.pipeline.producer import Problem
from limbeck.storage_schemas.clock import utc_now
from limbeck.storage_schemas.commit import Task
from limbeck.storage_schemas.job import Failure
from limbeck.storage_schemas.names import MOST_TEXT

LOOK_AHEAD = 16
"""Retries that are looked at for a worker that didn't fail them itself."""

MayTry = Callable[[int], bool]
"""Whether the worker that is asked for may have a task that raised on this one."""

NODE_LOSSES = 5
"""Times that a task's whole node may die before that is the task's doing. They count apart from its attempts: on spot
machines a long job would otherwise set tasks aside that are only unlucky."""


class Backlog:
    """A task that raised waits behind all others, for another worker than the one that it raised on.

    A task whose worker died runs alone from then on: should it be what kills workers, it takes no other along again.
    """

    def __init__(self, tasks: Sequence[Task], max_attempts: int) -> None:
        self._fresh = deque(tasks)
        self._again = deque[tuple[Task, int]]()  # with the worker it raised on
        self._alone = deque[Task]()
        self._suspects = set[Task]()
        self._max_attempts = max_attempts
        self._attempts = Counter[Task]()
        self._node_losses = Counter[Task]()

    def __len__(self) -> int:
        return len(self._fresh) + len(self._again) + len(self._alone)

    def first(self, may_try: MayTry) -> Task | None:
        """The next task for a worker that has none."""
        return self._alone.popleft() if self._alone else self.second(may_try)

    def second(self, may_try: MayTry) -> Task | None:
        """The next task for a worker that has one already."""
        if self._fresh:
            return self._fresh.popleft()
        for _ in range(min(LOOK_AHEAD, len(self._again))):
            task, failed_on = self._again.popleft()
            if may_try(failed_on):
                return task
            self._again.append((task, failed_on))
        return None

    def is_suspect(self, task: Task) -> bool:
        """Whether a worker died with it."""
        return task in self._suspects

    def put_back(self, task: Task) -> None:
        """Queue a task again that was taken from its worker through no fault of its own."""
        (self._alone if self.is_suspect(task) else self._fresh).appendleft(task)

    def raised(self, task: Task, problem: Problem, *, worker: int) -> Failure | None:
        """Count the attempt and queue the task again, or set it aside for good."""
        failure = self._count(task, problem)
        if failure is None and self.is_suspect(task):
            self._alone.append(task)
        elif failure is None:
            self._again.append((task, worker))
        return failure

    def lost(self, task: Task, problem: Problem, *, with_node: bool) -> Failure | None:
        """The same for a task whose worker is gone."""
        failure = self._count_node(task, problem) if with_node else self._count(task, problem)
        if failure is None:
            self._suspects.add(task)
            self._alone.append(task)
        return failure

    def _count(self, task: Task, problem: Problem) -> Failure | None:
        self._attempts[task] += 1
        return self._set_aside(task, problem) if self._attempts[task] >= self._max_attempts else None

    def _count_node(self, task: Task, problem: Problem) -> Failure | None:
        self._node_losses[task] += 1
        return self._set_aside(task, problem) if self._node_losses[task] >= NODE_LOSSES else None

    def _set_aside(self, task: Task, problem: Problem) -> Failure:
        return Failure(
            task=task.name,
            error=problem.error[:MOST_TEXT],
            traceback=problem.traceback[-MOST_TEXT:],
            attempts=self._attempts[task] + self._node_losses[task],
            machine=problem.machine,
            failed_at=utc_now(),
        )

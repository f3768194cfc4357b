"""What dispatch knows of workers, whatever they are: threads, processes, actors on a cluster."""

import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from limbeck.pipeline.producer import Problem
from limbeck.pipeline.workers.worker_death import Cause
from limbeck.storage_schemas.commit import Commit, Task
from limbeck.storage_schemas.errors import UserError

IN_FLIGHT = 2
"""Tasks of a worker at a time: one solves while the other's shard is uploaded."""


class WorkerError(UserError):
    """No worker can do this job."""

    def __init__(self, message: str, exit_code: int = UserError.exit_code) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@dataclass(frozen=True)
class Ready:
    """A worker has loaded its teacher, or says why it can't. place: its GPU, or its machine where it has none."""

    worker: int
    problem: Problem | None
    place: str = ""


@dataclass(frozen=True)
class Finished:
    """A worker ended a task, well or not."""

    worker: int
    task: Task
    outcome: Commit | Problem


@dataclass(frozen=True)
class Died:
    """A worker is gone, and with it whatever it had in flight. `detail` is all that is known of why."""

    worker: int
    reason: str
    detail: str = ""
    cause: Cause = "process"
    machine: str = field(default_factory=platform.node)


@dataclass(frozen=True)
class Leaving:
    """A worker's machine has been given notice: what is in flight may finish, no more should begin."""

    worker: int


Event = Ready | Finished | Died | Leaving


class Fleet(Protocol):
    """Workers of one kind, by number."""

    def start(self) -> int:
        """Begin to start another worker; Ready or Died says how that went."""

    def submit(self, worker: int, task: Task) -> None:
        """Give a ready worker a task, which ends in Finished or in its worker's Died."""

    def end(self, worker: int) -> None:
        """End a worker at once, ready or not, whatever it does; no event tells of it any more."""

    def wait(self) -> Sequence[Event]:
        """What happened since the last call; waits for about a second at most."""

    def room(self) -> str:
        """What each worker takes, and of how much."""

    def close(self) -> None:
        """End all workers."""

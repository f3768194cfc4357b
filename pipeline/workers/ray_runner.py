"""The only file that imports Ray. Workers are actors: only tasks go out and only commits come back."""

import itertools
import math
import os
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from limbeck.pipeline.config import RayConfig
from limbeck.pipeline.producer import Problem, WorkOrder, attempt_task
from limbeck.pipeline.workers.cluster import Head, actor_options, draining_nodes, first_line, joined, room, why_gone
from limbeck.pipeline.workers.crossing import WorkerDied, caught
from limbeck.pipeline.workers.fleet import IN_FLIGHT, Died, Event, Finished, Leaving, Ready, WorkerError
from limbeck.pipeline.workers.local import load_producer
from limbeck.storage_schemas.commit import Commit, Task
from limbeck.storage_schemas.errors import UsageError, without_credentials

WAIT_SECONDS = 1.0
NOTICE_SECONDS = 5.0
"""Seconds between questions to the cluster which of its nodes have had notice to go."""


class _Worker:
    """The actor: a producer, or the problem that kept it from becoming one."""

    def __init__(self, order: WorkOrder) -> None:
        self.producer, self.problem = load_producer(order)

    def ready(self) -> tuple[Problem | None, str, str]:
        """Also on which node, and on which of its GPUs."""
        node = import_ray().get_runtime_context().get_node_id()
        return self.problem, node, f"{node} {os.environ.get('CUDA_VISIBLE_DEVICES', '')}"

    def run(self, task: Task) -> Commit | Problem:
        assert self.producer is not None
        return attempt_task(self.producer, task)


class _Once:
    """The actor of `call_once`."""

    def ready(self) -> None:
        """Answers once there is room."""

    def run(self, function: Callable[..., Any], arguments: tuple[object, ...]) -> Any:
        return caught(function, arguments)


@dataclass
class _Actor:
    """An actor, the calls that it hasn't answered, and its node once it is ready."""

    handle: Any
    calls: set[Any] = field(default_factory=set)
    node: str = ""


class RayFleet:
    """Actors of a cluster that is joined, or started here. Those without room are what an autoscaler sees."""

    def __init__(self, order: WorkOrder, config: RayConfig, *, workers: int) -> None:
        self._ray = import_ray()
        self._config = config
        self._connection = ExitStack()
        self._connection.enter_context(joined(self._ray, config, workers=workers))
        self._head = Head(self._ray)
        self._order = self._ray.put(order)
        self._actor = self._ray.remote(_Worker).options(max_concurrency=IN_FLIGHT, **actor_options(config))
        self._numbers = itertools.count()
        self._actors: dict[int, _Actor] = {}
        self._calls: dict[Any, tuple[int, Task | None]] = {}  # without a task: is it ready?
        self._noticed: set[str] = set()
        self._look_at = 0.0

    def start(self) -> int:
        """Ask for an actor; it is ready once the cluster has room and the teacher is loaded."""
        number = next(self._numbers)
        actor = self._actors[number] = _Actor(self._actor.remote(self._order))
        self._called(number, actor.handle.ready.remote(), None)
        return number

    def submit(self, worker: int, task: Task) -> None:
        """Queue the task at its actor."""
        self._called(worker, self._actors[worker].handle.run.remote(task), task)

    def end(self, worker: int) -> None:
        """End an actor at once; a place that it held or waited for is free again."""
        actor = self._actors.pop(worker)
        for reference in actor.calls:
            del self._calls[reference]
        self._ray.kill(actor.handle)

    def wait(self) -> Sequence[Event]:
        """All answers that are there, or the first to come. HeadGone if none will ever come."""
        if not self._head.answers() or not self._calls:
            time.sleep(WAIT_SECONDS)
            return []
        references = list(self._calls)
        done, _ = self._ray.wait(references, num_returns=len(references), timeout=0)
        if not done:
            done, _ = self._ray.wait(references, num_returns=1, timeout=WAIT_SECONDS)
        # A worker that died answers all its calls at once: the first ends it, and with it the others.
        answers = [self._answer(reference) for reference in done if reference in self._calls]
        return [answer for answer in answers if answer] + self._notices()

    def room(self) -> str:
        """What an actor takes, and what the cluster has."""
        return room(self._ray, self._config)

    def close(self) -> None:
        """End every actor, and the cluster if it was started or joined here, unless its head is gone."""
        if self._head.is_gone:
            self._connection.pop_all()
            return
        for actor in self._actors.values():
            self._ray.kill(actor.handle)
        self._connection.close()

    def _called(self, worker: int, reference: Any, task: Task | None) -> None:
        self._actors[worker].calls.add(reference)
        self._calls[reference] = worker, task

    def _answer(self, reference: Any) -> Event | None:
        """None for a worker that went with the head, for all that is known yet."""
        worker, task = self._calls[reference]
        try:
            value = self._ray.get(reference)
        except self._ray.exceptions.RayError as error:
            if not self._head.answers(now=True):
                return None
            # An actor that is only out of reach is ended too: its tasks are given to others now.
            machine = f"Ray node {self._actors[worker].node}"
            self.end(worker)
            reason, cause = why_gone(self._ray, error)
            return Died(worker, without_credentials(reason), without_credentials(str(error)), cause, machine)
        del self._calls[reference]
        self._actors[worker].calls.discard(reference)
        if task is not None:
            return Finished(worker, task, value)
        problem, self._actors[worker].node, place = value
        return Ready(worker, problem, place)

    def _notices(self) -> list[Event]:
        """Leaving, for each ready worker on a node that has had notice, again and again while it is there."""
        # The call has no timeout: asked of a head that has just died, it waits until Ray ends the process.
        if time.monotonic() >= self._look_at and self._head.answers(now=True):
            self._look_at = time.monotonic() + NOTICE_SECONDS
            self._noticed = draining_nodes(self._ray)
        if not self._noticed:
            return []
        return [Leaving(number) for number, actor in self._actors.items() if actor.node in self._noticed]


def call_once(function: Callable[..., Any], arguments: tuple[object, ...], config: RayConfig) -> Any:
    """function(*arguments), or `Raised`, by an actor with a worker's resources."""
    ray = import_ray()
    with joined(ray, config, workers=1):
        head = Head(ray)
        actor = ray.remote(_Once).options(**actor_options(config)).remote()
        try:
            if not head.awaits(actor.ready.remote(), config.startup_timeout):
                raise WorkerError(f"no room for a worker in {config.startup_timeout:g} s: {room(ray, config)}")
            answer = actor.run.remote(function, arguments)
            head.awaits(answer, math.inf)
            return ray.get(answer)
        except ray.exceptions.RayError as error:
            raise WorkerDied(f"the worker that ran {function.__name__} died: {why_gone(ray, error)[0]}") from None
        finally:
            if not head.is_gone:
                ray.kill(actor)


def import_ray() -> Any:
    """The module, or one line that says how to get it."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError:
        raise UsageError(
            "runner ray needs Ray, which is not installed: pip install 'limbeck[pipeline]', or use --runner local"
        ) from None
    return ray


def job_client(dashboard: str) -> Any:
    """A client of the cluster's job server."""
    import_ray()
    from ray.job_submission import JobSubmissionClient

    try:
        return JobSubmissionClient(dashboard)
    except (OSError, RuntimeError, ValueError) as error:
        reason = first_line(error)
        raise UsageError(f"no Ray job server at {dashboard} ({reason}): mend --dashboard") from None

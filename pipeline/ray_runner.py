"""Workers as Ray actors: the only file that knows Ray. Only tasks go out and only commits come back."""

import itertools
import math
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.config import RayConfig
from pipeline.dispatch import IN_FLIGHT, Died, Event, Finished, Ready
from pipeline.local import load_producer
from pipeline.produce import Order, Problem, attempt_task
from storage_schemas.commit import Commit, Task
from storage_schemas.errors import UsageError

OBJECT_STORE_BYTES = 100 * 2**20
"""Of a cluster that is started here. Tensors never enter it."""


KNOCK_SECONDS = 10.0


class _Worker:
    """The actor: a producer, or the problem that kept it from becoming one."""

    def __init__(self, order: Order) -> None:
        self.producer, self.problem = load_producer(order)

    def ready(self) -> Problem | None:
        return self.problem

    def run(self, task: Task) -> Commit | Problem:
        assert self.producer is not None
        return attempt_task(self.producer, task)


@dataclass(frozen=True)
class _Call:
    """A call that an actor has not answered; without a task it is the one that asks whether it is ready."""

    worker: int
    task: Task | None


class RayFleet:
    """Actors that Ray neither restarts nor asks again: who retries what is decided in one place, by dispatch."""

    def __init__(self, order: Order, config: RayConfig, *, workers: int) -> None:
        self._ray = _import_ray()
        self._ours = not self._ray.is_initialized()
        if self._ours:
            _connect(self._ray, config, workers=workers)
        self._order = self._ray.put(order)
        self._actor = self._ray.remote(_Worker).options(
            num_cpus=config.num_cpus,
            num_gpus=config.num_gpus,
            max_restarts=0,
            max_task_retries=0,
            max_concurrency=IN_FLIGHT,
        )
        self._numbers = itertools.count()
        self._actors: dict[int, Any] = {}
        self._calls: dict[Any, _Call] = {}

    def start(self) -> int:
        """Ask for an actor; it is ready once the cluster has room and the teacher is loaded."""
        number = next(self._numbers)
        self._actors[number] = self._actor.remote(self._order)
        self._calls[self._actors[number].ready.remote()] = _Call(number, None)
        return number

    def submit(self, worker: int, task: Task) -> None:
        """Queue the task at its actor."""
        self._calls[self._actors[worker].run.remote(task)] = _Call(worker, task)

    def wait(self) -> Sequence[Event]:
        """Blocks for a second at most."""
        done, _ = self._ray.wait(list(self._calls), timeout=1.0)
        return [self._answer(reference) for reference in done]

    def close(self) -> None:
        """End every actor, and the cluster if it was started or joined here."""
        for actor in self._actors.values():
            self._ray.kill(actor)
        if self._ours:
            self._ray.shutdown()

    def _answer(self, reference: Any) -> Event:
        call = self._calls.pop(reference)
        try:
            value = self._ray.get(reference)
        except self._ray.exceptions.RayError as error:
            return self._bury(call.worker, error)
        return Ready(call.worker, value) if call.task is None else Finished(call.worker, call.task, value)

    def _bury(self, worker: int, error: Exception) -> Event:
        # An actor that is only out of reach is ended too: its tasks are given to others now.
        self._ray.kill(self._actors.pop(worker))
        self._calls = {reference: call for reference, call in self._calls.items() if call.worker != worker}
        return Died(worker, _first_line(error))


def _import_ray() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError:
        raise UsageError(
            "runner ray needs Ray, which is not installed: pip install 'limbeck[pipeline]', or use --runner local"
        ) from None
    return ray


def _connect(ray: Any, config: RayConfig, *, workers: int) -> None:
    """Join the cluster that the configuration or RAY_ADDRESS names, else start one on this machine."""
    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    address = config.address or os.environ.get("RAY_ADDRESS")
    if address:
        try:
            _knock(address)
            ray.init(address=address, **quiet)
        except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
            reason = _first_line(error)
            raise UsageError(f"no Ray cluster at {address} ({reason}): mend the address, or leave it out") from None
        return
    # Ray may otherwise turn token authentication on by itself and write a token to the home folder.
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    ray.init(
        num_cpus=max(1, math.ceil(workers * config.num_cpus)),
        num_gpus=None if config.num_gpus else 0,
        object_store_memory=OBJECT_STORE_BYTES,
        include_dashboard=False,
        **quiet,
    )
    _refuse_no_room(ray, config)


def _refuse_no_room(ray: Any, config: RayConfig) -> None:
    """UsageError where no worker will ever fit: a cluster of this machine alone gets no other one to wait for."""
    gpus = ray.cluster_resources().get("GPU", 0.0)
    if config.num_gpus > gpus:
        ray.shutdown()
        raise UsageError(
            f"a worker takes {config.num_gpus:g} GPUs, this machine has {gpus:g}: lower --ray.num-gpus, "
            "or name a cluster by --ray.address"
        )


def _knock(address: str) -> None:
    """OSError at once where nobody listens at host:port; Ray itself would wait for minutes."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if port.isdecimal():
        socket.create_connection((host, int(port)), timeout=KNOCK_SECONDS).close()


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__

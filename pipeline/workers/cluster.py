"""A Ray cluster as this program meets it: joined or started, how much room it has, why an actor of it is gone.

Every function takes the ray module: the caller has imported it.
"""

import atexit
import math
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from limbeck.pipeline.config import RayConfig
from limbeck.pipeline.workers.fleet import WorkerError
from limbeck.pipeline.workers.signals import signals_kept
from limbeck.pipeline.workers.worker_death import OUT_OF_MEMORY_HINT, Cause
from limbeck.storage_schemas.errors import UsageError

OBJECT_STORE_BYTES = 100 * 2**20
"""Size of the object store of a cluster that is started here. Tensors never enter it."""

KNOCK_SECONDS = 10.0


GONE_SECONDS = 45.0
"""A head that doesn't answer for so long is gone. After 60 s Ray ends the whole process, without a word of ours."""


class HeadGone(WorkerError):
    """The cluster's head is gone, and with it whatever could be asked of the cluster."""


class Head:
    """Whether a cluster's head answers. Nothing else is to be asked of Ray while it doesn't: it may wait for ever."""

    def __init__(self, ray: Any) -> None:
        self._ray = ray
        self._address = str(getattr(ray.get_runtime_context(), "gcs_address", ""))
        self._asked = self._heard = time.monotonic()
        self.is_gone = False

    def answers(self, *, now: bool = False) -> bool:
        """Whether the head answered in the last second, or now. HeadGone once it has been silent for GONE_SECONDS."""
        clock = time.monotonic()
        if now or clock - self._asked >= 1 or self._heard < self._asked:
            self._asked = clock
            try:
                _knock(self._address)
                self._heard = clock
            except OSError as error:
                self._refuse_if_gone(first_line(error))
        return self._heard >= self._asked

    def awaits(self, reference: Any, seconds: float) -> bool:
        """Whether a call is answered within so many seconds by a cluster whose head is there."""
        end = time.monotonic() + seconds
        while not self.answers() or not self._ray.wait([reference], timeout=1.0)[0]:
            if time.monotonic() >= end:
                return False
            if not self.answers():
                time.sleep(1.0)
        return True

    def _refuse_if_gone(self, reason: str) -> None:
        if self._asked - self._heard < GONE_SECONDS:
            return
        self.is_gone = True
        atexit.unregister(self._ray.shutdown)  # which would ask the head once more
        raise HeadGone(
            f"the head of the Ray cluster at {self._address} has not answered for {GONE_SECONDS:g} s ({reason}): what "
            "is committed is kept, start the cluster and run this again to go on"
        )


@contextmanager
def joined(ray: Any, config: RayConfig, *, workers: int) -> Iterator[None]:
    """A connection to the cluster; one that was made here ends here, and with it a cluster that was started here."""
    ours = not ray.is_initialized()
    if ours:
        with signals_kept():
            connect(ray, config, workers=workers)
    try:
        yield
    except HeadGone:
        ours = False
        raise
    finally:
        if ours:
            ray.shutdown()


def connect(ray: Any, config: RayConfig, *, workers: int) -> None:
    """Join the cluster that the configuration or RAY_ADDRESS names, else start one on this machine."""
    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    address = config.address or os.environ.get("RAY_ADDRESS")
    if address:
        try:
            _knock(address)
            ray.init(address=address, **quiet)
        except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
            reason = first_line(error)
            raise UsageError(f"no Ray cluster at {address} ({reason}): mend the address, or leave it out") from None
        return
    # Ray may otherwise turn token authentication on by itself and write a token to the home folder.
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    ray.init(
        address="local",  # without it Ray would join a cluster that somebody started on this machine, or fail to
        num_cpus=max(1, math.ceil(workers * config.num_cpus)),
        num_gpus=None if config.num_gpus else 0,
        object_store_memory=OBJECT_STORE_BYTES,
        include_dashboard=False,
        **quiet,
    )
    _refuse_no_room(ray, config)


def actor_options(config: RayConfig) -> dict[str, Any]:
    """What an actor takes. Ray neither restarts it nor calls it again: dispatch decides what is retried."""
    return {"num_cpus": config.num_cpus, "num_gpus": config.num_gpus, "max_restarts": 0, "max_task_retries": 0}


def room(ray: Any, config: RayConfig) -> str:
    """One line such as: each takes 1 CPU, 0.5 GPU; the cluster has 8 CPU, 1 GPU, free are 2 CPU, 0 GPU."""
    total, free = ray.cluster_resources(), ray.available_resources()
    asked = {"CPU": config.num_cpus, "GPU": config.num_gpus}
    names = [name for name, number in asked.items() if number]
    return (
        f"each takes {_amounts(asked, names)}; the cluster has {_amounts(total, names)}, "
        f"free are {_amounts(free, names)}"
    )


def draining_nodes(ray: Any) -> set[str]:
    """Ids of nodes that have had notice to go. Ray tells by a private call only, the one that Ray Train uses."""
    try:
        return set(ray._private.state.state.get_draining_nodes())
    except Exception:  # another version's inside: its actors on such a node are simply lost with it
        return set()


def why_gone(ray: Any, error: Exception) -> tuple[str, Cause]:
    """An actor's error as one line, and what went: its process, its whole node, or a node that had notice."""
    text = " ".join(str(error).split())
    if getattr(error, "preempted", False):
        return "its node was preempted", "notice"
    if "node has died" in text or isinstance(error, ray.exceptions.NodeDiedError):
        _, _, why = text.partition("terminated unexpectedly: ")
        return f"its node died{': ' if why else ''}{why}", "node"
    _, _, detail = text.partition("exit detail: ")
    reason = detail.partition(" Some common causes")[0] or first_line(error)
    # Ray sees only that the connection ended, whatever signal ended the process.
    return reason + (f" ({OUT_OF_MEMORY_HINT})" if "OOM killer" in detail else ""), "process"


def first_line(error: Exception) -> str:
    """An error's first line that says anything."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _amounts(of: dict[str, float], names: list[str]) -> str:
    return ", ".join(f"{of.get(name, 0.0):g} {name}" for name in names) or "nothing"


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
    """OSError at once where nothing listens at host:port; Ray itself would wait for minutes."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if port.isdecimal():
        socket.create_connection((host, int(port)), timeout=KNOCK_SECONDS).close()

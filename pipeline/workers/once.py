"""One function, once, with a worker's resources: what a driver without a GPU has measured or solved elsewhere."""

import multiprocessing
import os
import pickle
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Protocol, TypeVar

from pipeline.config import RayConfig
from pipeline.produce import describe
from pipeline.workers.worker_death import exit_reason
from storage_schemas.errors import UserError

T = TypeVar("T")


class WorkerDied(UserError):
    """The process that ran the function is gone: out of memory, mostly."""


class Runner(Protocol):
    """The fields of a configuration that say where a worker runs; GenerateConfig has them."""

    @property
    def runner(self) -> str: ...

    @property
    def ray(self) -> RayConfig: ...


@dataclass(frozen=True)
class Raised:
    """An exception, as something that can cross to another process."""

    error: Exception


def run_once(function: Callable[..., T], *arguments: object, runner: Runner) -> T:
    """function(*arguments) in a process of its own, here or on the cluster. Its exceptions are raised here.

    The function is importable (not a lambda) and its arguments and result can be pickled. WorkerDied if the process
    was killed: what runs out of memory there leaves this process alone.
    """
    outcome = _on_ray(function, arguments, runner.ray) if runner.runner == "ray" else _here(function, arguments)
    if isinstance(outcome, Raised):
        raise outcome.error
    return outcome


def caught(function: Callable[..., T], arguments: tuple[object, ...]) -> T | Raised:
    """What the other process does: an exception becomes a value, one that can't be pickled a UserError."""
    try:
        return function(*arguments)
    except Exception as error:
        problem = describe(error)
        error.add_note(f"on {problem.machine}:\n{problem.traceback}")
        return Raised(error if _survives_pickling(error) else UserError(problem.error))


def _here(function: Callable[..., T], arguments: tuple[object, ...]) -> T | Raised:
    spawn = multiprocessing.get_context("spawn")
    here, there = spawn.Pipe()
    process = spawn.Process(target=_child, args=(there, function, arguments), daemon=True)
    process.start()
    there.close()
    try:
        return here.recv()
    except EOFError:
        process.join()
        raise WorkerDied(f"the process of {function.__name__} died: {exit_reason(process.exitcode)}") from None
    finally:
        process.kill()
        process.join()


def _child(pipe: Connection, function: Callable[..., Any], arguments: tuple[object, ...]) -> None:
    threading.Thread(target=_end_with_parent, args=(pipe,), daemon=True).start()
    pipe.send(caught(function, arguments))


def _end_with_parent(pipe: Connection) -> None:
    """Nothing is ever sent this way: what is read is the end of a parent that was killed."""
    with suppress(EOFError, OSError):
        pipe.recv()
    os._exit(1)


def _on_ray(function: Callable[..., T], arguments: tuple[object, ...], config: RayConfig) -> T | Raised:
    from pipeline.workers.ray_runner import call_once  # only who asks for Ray pays for it

    return call_once(function, arguments, config)


def _survives_pickling(error: Exception) -> bool:
    try:
        return isinstance(pickle.loads(pickle.dumps(error)), type(error))
    except Exception:
        return False

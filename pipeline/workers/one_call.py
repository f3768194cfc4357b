"""One call of a function with a worker's resources: what a driver without a GPU measures or solves elsewhere."""

import multiprocessing
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any, Protocol, TypeVar

from limbeck.pipeline.config import RayConfig
from limbeck.pipeline.producer import describe
from limbeck.pipeline.workers.crossing import Raised, WorkerDied, caught
from limbeck.pipeline.workers.worker_death import exit_reason
from limbeck.storage_schemas.errors import UserError

T = TypeVar("T")


class Runner(Protocol):
    """The fields of a configuration that say where a worker runs; GenerateConfig has them."""

    @property
    def runner(self) -> str: ...

    @property
    def ray(self) -> RayConfig: ...


def run_once(function: Callable[..., T], *arguments: object, runner: Runner) -> T:
    """function(*arguments) in a process of its own, here or on the cluster. Its exceptions are raised here.

    The function is importable (not a lambda) and its arguments and result can be pickled. WorkerDied if the process
    was killed: what runs out of memory there leaves this process alone.
    """
    outcome = _on_ray(function, arguments, runner.ray) if runner.runner == "ray" else _here(function, arguments)
    if isinstance(outcome, Raised):
        raise outcome.error
    return outcome


def try_out(what: str, function: Callable[..., T], *arguments: object, runner: Runner) -> T:
    """function(*arguments) on a worker; whatever a teacher raises there, which may be anything, as a UserError."""
    try:
        return run_once(function, *arguments, runner=runner)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{what} failed on a worker: {describe(error).error}") from error


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
    from limbeck.pipeline.workers.ray_runner import call_once  # only those who ask for Ray pay for it

    return call_once(function, arguments, config)

"""What crosses from one process to another: a result, or an exception as a value."""

import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from limbeck.pipeline.producer import describe
from limbeck.storage_schemas.errors import UserError

T = TypeVar("T")


class WorkerDied(UserError):
    """The process that ran the function is gone: out of memory, mostly."""


@dataclass(frozen=True)
class Raised:
    """An exception, as something that can cross to another process."""

    error: Exception


def caught(function: Callable[..., T], arguments: tuple[object, ...]) -> T | Raised:
    """What the other process does: an exception becomes a value, one that can't be pickled a UserError."""
    try:
        return function(*arguments)
    except Exception as error:
        problem = describe(error)
        error.add_note(f"on {problem.machine}:\n{problem.traceback}")
        return Raised(error if _survives_pickling(error) else UserError(problem.error))


def _survives_pickling(error: Exception) -> bool:
    try:
        return isinstance(pickle.loads(pickle.dumps(error)), type(error))
    except Exception:
        return False

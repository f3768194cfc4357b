"""What a command tries out on a worker before there is a job: its failures are told in one line."""

from collections.abc import Callable
from typing import TypeVar

from pipeline.produce import describe
from pipeline.workers.once import Runner, run_once
from storage_schemas.errors import UserError

T = TypeVar("T")


def try_out(what: str, function: Callable[..., T], *arguments: object, runner: Runner) -> T:
    """function(*arguments) on a worker; whatever a teacher raises there, which may be anything, as a UserError."""
    try:
        return run_once(function, *arguments, runner=runner)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{what} failed on a worker: {describe(error).error}") from error

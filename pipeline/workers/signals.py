"""SIGTERM and SIGINT to a driver: let what is in flight finish for a while, then leave; a second one leaves at once."""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from types import FrameType, TracebackType
from typing import Any, NoReturn, Self

from limbeck.storage_schemas.errors import UserError

SIGNALS = (signal.SIGTERM, signal.SIGINT)
SOLVING = "limbeck-solve"
"""Name prefix of threads that solve in this process and can't be ended."""


class Stopped(UserError):
    """The driver got a signal to stop, and did; the exit code is that of a program that the signal ended."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + number


class Drain:
    """`with` takes the signals over, where this is the main thread, and gives them back at its end."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.signal: int | None = None
        self._deadline = float("inf")
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        self._before = {number: signal.getsignal(number) for number in SIGNALS}
        _set(dict.fromkeys(SIGNALS, self._on_signal))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        _set(self._before)

    @property
    def asked(self) -> bool:
        """Whether no more tasks are to be handed out."""
        return self.signal is not None

    @property
    def over(self) -> bool:
        """Whether what is in flight has had its time."""
        return time.monotonic() >= self._deadline

    def raise_if_asked(self, how_far: str) -> None:
        """Stopped, once the work has ended early."""
        if self.signal is not None:
            name = signal.Signals(self.signal).name
            raise Stopped(f"stopped by {name}: {how_far}, nothing is sealed; run it again to go on there", self.signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        self._deadline = now if self.asked else now + self.seconds
        self.signal = self.signal or number


@contextmanager
def stoppable() -> Iterator[None]:
    """SIGTERM and SIGINT end what runs inside, wherever it is, as Stopped. A Drain inside takes them over."""
    seen: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        seen.append(number)
        raise KeyboardInterrupt  # which no `except Exception` on its way out takes for a fault of the storage

    with signals_kept():
        _set(dict.fromkeys(SIGNALS, stop))
        try:
            yield
        except KeyboardInterrupt:
            if not seen:
                raise
            name = signal.Signals(seen[0]).name
            raise Stopped(f"stopped by {name}: what is done is kept, run it again to go on there", seen[0]) from None


def describe_drain(drain: Drain, *, in_flight: int) -> str:
    """The line for the log when a signal came."""
    assert drain.signal is not None
    name = signal.Signals(drain.signal).name
    return f"{name}: {in_flight} tasks in flight may finish for {drain.seconds:g} s; a second signal ends them at once"


@contextmanager
def signals_kept() -> Iterator[None]:
    """Keep our handlers around ray.init, which takes SIGTERM for itself twice: its own would print a crash trace."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        yield
    finally:
        _set(before)


def ignore_signals() -> None:
    """Ignore signals in a worker: they go to its driver's whole group, and the driver decides what they mean."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def exit_on_sigterm() -> None:
    """SIGTERM where nothing takes it over, as in the last moments of a stop, ends with the code of one that did."""

    def end(number: int, frame: FrameType | None) -> None:
        with suppress(RuntimeError, ValueError, OSError):  # it may come in the midst of a print
            sys.stdout.flush()
        os._exit(128 + number)

    signal.signal(signal.SIGTERM, end)


def leave(code: int) -> NoReturn:
    """End the program, also where a thread still solves: nobody waits for it, and it can't be ended."""
    if any(thread.name.startswith(SOLVING) for thread in threading.enumerate()):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _set(handlers: Mapping[signal.Signals, Any]) -> None:
    if threading.current_thread() is threading.main_thread():  # Python allows it nowhere else
        for number, handler in handlers.items():
            signal.signal(number, handler)

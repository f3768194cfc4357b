"""Where a run's figures go: metrics.jsonl, TensorBoard, and a progress bar or plain lines."""

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from limbeck.storage_schemas.errors import shown
from limbeck.storage_schemas.log import log
from limbeck.trainer.runs.place import METRICS, lines_of, write_whole

Figures = Mapping[str, float | int | str]

_PLAIN_SECONDS = 10.0


class _Board(Protocol):
    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None: ...

    def close(self) -> None: ...


class RunLog:
    """Metrics of one run from global step `step` on; lines that a killed run wrote past it are taken back."""

    def __init__(self, run: Path, *, step: int, total: int) -> None:
        path = run / METRICS
        lines = lines_of(path)
        self._lost = (path.read_bytes().count(b"\n") if path.is_file() else 0) - len(lines)
        kept = [line for line in lines if line["step"] <= step]
        write_whole(path, "".join(json.dumps(line) + "\n" for line in kept).encode())
        self._file = open(path, "a", buffering=1)  # noqa: SIM115 - closed in __exit__
        self._board = _board(run / "tensorboard", purge_step=step + 1)
        self._display: _Display = _Bar(total) if sys.stderr.isatty() else _Lines(total)

    def __enter__(self) -> Self:
        self._display.start()
        if self._lost:
            self.say(f"warning: {METRICS} had {self._lost} lines that are no figures, which are left out")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._display.stop()
        self._file.close()
        if self._board is not None:
            self._board.close()

    def write(self, step: int, figures: Figures) -> None:
        """One line of figures at global step `step`."""
        self._file.write(json.dumps({"step": step, **figures}) + "\n")
        if self._board is not None:
            for name, value in figures.items():
                if not isinstance(value, str):
                    self._board.add_scalar(name, value, step)
        self._display.show(step, figures)

    def say(self, line: str) -> None:
        """One line to the user."""
        log.info(line)


class NoLog:
    """A log that discards everything: used on all ranks but the first."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        return

    def write(self, step: int, figures: Figures) -> None:
        """Discard it."""

    def say(self, line: str) -> None:
        """Discard it."""


class _Display(Protocol):
    def start(self) -> None: ...

    def stop(self) -> None: ...

    def show(self, step: int, figures: Figures) -> None: ...


class _Bar:
    """A rich bar on a terminal."""

    def __init__(self, total: int) -> None:
        count, figures = TextColumn("{task.completed}/{task.total}"), TextColumn("{task.description}", markup=False)
        self._progress = Progress(
            BarColumn(), count, TimeRemainingColumn(), figures, console=Console(stderr=True, markup=False)
        )
        self._task = self._progress.add_task("", total=total)

    def start(self) -> None:
        self._progress.start()

    def stop(self) -> None:
        self._progress.stop()

    def show(self, step: int, figures: Figures) -> None:
        self._progress.update(self._task, completed=step, description=_summary(figures))


class _Lines:
    """A plain line every few seconds elsewhere."""

    def __init__(self, total: int) -> None:
        self._total, self._last = total, 0.0

    def start(self) -> None:
        self._last = 0.0

    def stop(self) -> None:
        sys.stderr.flush()

    def show(self, step: int, figures: Figures) -> None:
        if step < self._total and time.monotonic() - self._last < _PLAIN_SECONDS:
            return
        self._last = time.monotonic()
        log.info(f"step {step}/{self._total}  {_summary(figures)}")


def _summary(figures: Figures) -> str:
    return "  ".join(f"{name} {_short(value)}" for name, value in figures.items())


def _short(value: float | int | str) -> str:
    return f"{value:.4g}" if isinstance(value, float) else shown(value)


def _board(folder: Path, *, purge_step: int) -> _Board | None:
    """A TensorBoard writer, None where TensorBoard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ModuleNotFoundError:
        return None
    writer: _Board = SummaryWriter(str(folder), purge_step=purge_step)
    return writer

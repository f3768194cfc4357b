"""One reader in a process of its own, which does nothing else: `measured` starts it and returns what it found.

The reader is opened once: its first batch is timed, then a pass fills its buffers, the next is timed, and in a last
one its memory is looked at, which would slow a timed one. Passes of a slow reader end early.
"""

import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from tests.benchmarks.samples import COLUMNS
from tests.benchmarks.watch import MIB, Watch

BATCH = 256
FILLED, TIMED, WATCHED = (0.1, 1.0), (0.4, 2.5), (0.1, 0.5)
"""Seconds that each pass lasts at least, with as many epochs as that takes, and at most."""
LIMIT, PATIENCE = 90.0, 3.0
"""Seconds for one process, and for its end."""


@dataclass(frozen=True)
class Figures:
    """Of one reader and one choice of columns."""

    name: str
    samples_per_s: float
    first_batch_s: float
    peak_mib: float
    files_mib: float


class Failed(Exception):
    """The reader could not be measured; says why in a line."""


def measured(python: str, reader: str, folder: Path, columns: str, samples: int, options: dict[str, Any]) -> Figures:
    """Figures of one fresh process; raises Failed."""
    with _started(python, "read", reader, str(folder), columns, str(samples), json.dumps(options)) as process:
        assert process.stdin
        assert process.stdout
        _hear("ready", process.stdout)
        with Watch(process.pid) as watch:
            for word, watched in (("ready", False), ("opened", True), ("filled", False), ("timed", True)):
                if word != "ready":
                    _hear(word, process.stdout)
                watch.on = watched
                process.stdin.write("go\n")
                process.stdin.flush()
            told = json.loads(process.stdout.readline())
        return Figures(**told, peak_mib=watch.peak.own / MIB, files_mib=watch.peak.files / MIB)


def written(python: str, reader: str, folder: Path) -> None:
    """The reader's own copy of the samples; raises Failed."""
    with _started(python, "write", reader, str(folder)) as process:
        assert process.stdout
        _hear("written", process.stdout)


@contextmanager
def _started(python: str, *words: str) -> Iterator[subprocess.Popen[str]]:
    """A process in a session and with a folder for temporary files of its own, so that all it starts ends with it."""
    command = [python, "-m", "tests.benchmarks.child", *words]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with tempfile.TemporaryDirectory(prefix="bench-", ignore_cleanup_errors=True) as own:
        errors = Path(own, "stderr")
        own_place = {"TMPDIR": own, "RAY_TMPDIR": own, "PYTHONPATH": os.getcwd(), "PYTHONWARNINGS": "ignore"}
        with open(errors, "w") as file:
            process = subprocess.Popen(
                command, **pipes, stderr=file, text=True, env=os.environ | own_place, start_new_session=True
            )
        alarm = threading.Timer(LIMIT, _end, [process])
        alarm.start()
        try:
            yield process
            process.communicate(timeout=PATIENCE)
        except (ValueError, BrokenPipeError):
            reason = "\n".join(errors.read_text().splitlines()[-1:]) if alarm.is_alive() else f"over {LIMIT:.0f} s"
            raise Failed(reason[:200] or "it ended without a word") from None
        except subprocess.TimeoutExpired:
            pass
        finally:
            alarm.cancel()
            _end(process)


def _hear(word: str, said: IO[str]) -> None:
    if (line := said.readline().strip()) != word:
        raise ValueError(line)


def _end(process: subprocess.Popen[str]) -> None:
    """It, and what it left behind."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def main(command: str, reader: str, folder: str, *rest: str) -> None:
    """What the process does. Whatever the reader prints goes to stderr: stdout is the conversation."""
    said = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    module = importlib.import_module(f"tests.benchmarks.readers.{reader}")
    if command == "write":
        module.write(Path(folder))
        print("written", file=said)
    else:
        print(json.dumps(passes(module, Path(folder), *rest, said)), file=said)


def passes(module: Any, folder: Path, columns: str, count: str, options: str, said: IO[str]) -> dict[str, Any]:
    """Opens the reader and goes through its passes."""

    def say(word: str) -> None:
        print(word, file=said)
        sys.stdin.readline()  # until the watcher has heard

    samples = int(count)
    getattr(module, "prepare", lambda: None)()
    say("ready")
    started = time.perf_counter()
    batches = module.read(folder, COLUMNS[columns], BATCH, **json.loads(options))
    next(batches)
    first = time.perf_counter() - started
    say("opened")
    rate(batches, samples, FILLED)
    say("filled")
    found = rate(batches, samples, TIMED)
    say("timed")
    rate(batches, samples, WATCHED)
    return {"name": module.NAME, "samples_per_s": found, "first_batch_s": first}


def rate(batches: Iterator[int], samples: int, span: tuple[float, float]) -> float:
    """Samples/s over at least a pass and the span's first seconds, or until its last."""
    seen, started = 0, time.perf_counter()
    while True:
        seen += next(batches)
        seconds = time.perf_counter() - started
        if (seen >= samples and seconds >= span[0]) or seconds >= span[1]:
            return seen / seconds


if __name__ == "__main__":
    main(*sys.argv[1:])

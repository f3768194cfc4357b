"""Commands as a user types them, each until it has ended well once."""

import json
import shlex
import subprocess
import sysconfig
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from threading import Lock

LIMBECK = str(Path(sysconfig.get_path("scripts")) / "limbeck")

Launch = Callable[[Sequence[str]], int]
"""A command's words -> exit code."""


def as_process(words: Sequence[str]) -> int:
    """`limbeck WORDS`, in a process of its own."""
    return subprocess.run([LIMBECK, *words], check=False).returncode


class Commands:
    """Programs to run in one folder of results, where commands.json holds what is done.

    A command that changed is run again. One that fails ends nothing: `failed` lists it. Threads may share it.
    """

    def __init__(self, folder: Path, launch: Launch = as_process) -> None:
        self._launch = launch
        self._file = folder / "commands.json"
        folder.mkdir(parents=True, exist_ok=True)
        self._done: dict[str, float] = json.loads(self._file.read_text()) if self._file.is_file() else {}
        self.failed: list[str] = []
        self._noting = Lock()

    def run(self, *words: str, again: bool = False) -> bool:
        """Run `limbeck WORDS`, unless it is done; whether it has run. again: whatever was done before."""
        line = told(words)
        if line in self._done and not again:
            return False
        print(f"\n$ {line}", flush=True)
        started = time.perf_counter()
        if self._launch(words):
            self.failed.append(line)
        else:
            self.note(line, time.perf_counter() - started)
        return True

    def note(self, line: str, seconds: float) -> None:
        """A command is done."""
        with self._noting:
            self._done[line] = seconds
            self._file.write_text(json.dumps(self._done, indent=1) + "\n")

    def is_done(self, line: str) -> bool:
        return line in self._done


def told(words: Sequence[str]) -> str:
    """As it is typed."""
    return f"limbeck {shlex.join(words)}"

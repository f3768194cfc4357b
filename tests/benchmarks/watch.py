"""Memory of a process and all its children while it runs, from /proc/*/smaps_rollup."""

import re
import threading
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

MIB = 1 << 20


@dataclass
class Memory:
    """Bytes. own: anonymous and shared-memory pages (a page that n processes share counts 1/n in each, so once);
    files: pages of mapped files, which the kernel drops when it needs the room.
    """

    own: int = 0
    files: int = 0


def memory_of(process: int) -> Memory:
    """Of a process and its children, now."""
    total = Memory()
    for pid in _family(process):
        try:
            told = Path(f"/proc/{pid}/smaps_rollup").read_text()
        except OSError:  # it has ended
            continue
        sizes = {name: int(kib) << 10 for name, kib in re.findall(r"(\w+): +(\d+) kB", told)}
        total.own += sizes["Pss_Anon"] + sizes["Pss_Shmem"]
        total.files += sizes["Pss_File"]
    return total


def _family(process: int) -> Iterator[int]:
    children = defaultdict(list)
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            children[int(stat.read_text().rpartition(")")[2].split()[1])].append(int(stat.parent.name))
        except OSError:
            continue
    waiting = [process]
    while waiting:
        yield (pid := waiting.pop())
        waiting += children[pid]


class Watch:
    """The peak above what was there at the start, looked at every 10 ms while `on`. A context manager."""

    def __init__(self, process: int) -> None:
        self._process, self._start, self._done = process, memory_of(process), threading.Event()
        self.on, self.peak = False, Memory()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._done.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._done.wait(0.01):
            if self.on:
                self.look()

    def look(self) -> None:
        """Once, now."""
        now = memory_of(self._process)
        self.peak.own = max(self.peak.own, now.own - self._start.own)
        self.peak.files = max(self.peak.files, now.files - self._start.files)

"""A lock on a bucket of checkpoints, where no file can be locked: one fit at a time.

    fits/000007.json        which fit is at work: put where nothing is, renewed every few seconds by the one that put it

The highest number holds. A number is put once and never used again, so that of several that come at the same time one
holds the place, and one that slept finds a higher number than its own and stops before it writes.

A fit that was killed leaves its claim. It is taken over at once where its process is gone from this machine, else once
it is a minute old by the storage's own clock: a fit that comes earlier waits, and is refused as soon as it is renewed.
"""

import os
import re
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Annotated, Literal, Self

from pydantic import Field

from limbeck.storage_schemas import paths
from limbeck.storage_schemas.documents import Document
from limbeck.storage_schemas.errors import StoreError, UsageError, UserError
from limbeck.storage_schemas.log import log
from limbeck.storage_schemas.names import Attempt, Count
from limbeck.storage_schemas.store import Store

FITS = "fits"
_NAME = re.compile(r"[0-9]{6,18}\.json")
_RENEWED, _LAPSES = 10.0, 60.0  # seconds
_LOOKS = 1.0
_TRIES = 5


class TakenOver(UserError):
    """Another fit goes on in this one's place."""


class FitAtWork(Document):
    """A fit at work. process: on which machine, and which process there; beats: how often it was renewed."""

    format: Literal[1] = 1
    attempt: Attempt
    process: Annotated[str, Field(max_length=200)]
    beats: Count = 0
    ended: bool = False


class Claim:
    """A fit's claim on a place, for as long as it lasts. UsageError where another fit is at work there."""

    def __init__(self, place: Store) -> None:
        self._place, self._attempt, self._process = place, paths.new_attempt(), _this_process()
        self._number, self._ended = 0, threading.Event()
        self._renewal = threading.Thread(target=self._renew, daemon=True, name="claim")

    def __enter__(self) -> Self:
        for _ in range(_TRIES):
            last = max(self._numbers(), default=0)
            if last:
                self._outwait(last)
            ours = self._document().to_bytes()
            if self._place.put_if_absent(_path(last + 1), ours) == ours:
                break
        else:
            raise self._refused()
        self._number = last + 1
        for number in self._numbers():
            if number < self._number:
                self._place.remove(_path(number))
        self._renewal.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._ended.set()
        self._renewal.join()
        try:
            self._place.write(_path(self._number), self._document(ended=True).to_bytes())
        except StoreError:
            return  # it lapses

    def check(self) -> None:
        """TakenOver where another fit took this one for dead."""
        if any(number > self._number for number in self._numbers()):
            problem = f"another fit goes on in {self._place.uri} since this one was away for more than {_LAPSES:.0f} s"
            raise TakenOver(f"{problem}; nothing is written any more")

    def _renew(self) -> None:
        beats = 0
        while not self._ended.wait(_RENEWED):
            beats += 1
            try:
                self._place.write(_path(self._number), self._document(beats=beats).to_bytes())
            except StoreError:
                continue  # the next one may get through

    def _document(self, *, beats: int = 0, ended: bool = False) -> FitAtWork:
        return FitAtWork(attempt=self._attempt, process=self._process, beats=beats, ended=ended)

    def _numbers(self) -> list[int]:
        return [int(name[:-5]) for name in self._place.list(FITS) if _NAME.fullmatch(name)]

    def _outwait(self, number: int) -> None:
        """Return once a claim is nobody's any more."""
        data = self._place.read(_path(number))
        if data is None or _is_over(data):
            return
        rest = _LAPSES - self._age(number)
        if rest > 0:
            log.info(f"{self._place.uri} is a fit's that may be at work yet: waiting up to {rest:.0f} s")
        until = time.monotonic() + rest
        while time.monotonic() < until:
            time.sleep(min(_LOOKS, rest))
            now = self._place.read(_path(number))
            if now is None or _is_over(now):
                return
            if now != data:
                raise self._refused()

    def _age(self, number: int) -> float:
        """Seconds since a claim was written, by the storage's clock, which says when a file is written now."""
        look = f"look-{self._attempt}"
        self._place.write(f"{FITS}/{look}", b"")
        times = {one.name: one.modified for one in self._place.list_details(FITS)}
        self._place.remove(f"{FITS}/{look}")
        then, now = times.get(_path(number).rpartition("/")[2]), times.get(look)
        return (now - then).total_seconds() if then and now else 0.0

    def _refused(self) -> UsageError:
        return UsageError(
            f"another fit keeps its checkpoints in {self._place.uri}; wait for it, or choose another --checkpoints"
        )


def _path(number: int) -> str:
    return f"{FITS}/{number:06d}.json"


def _is_over(data: bytes) -> bool:
    """Whether a claim's fit has ended, or its process is gone from this machine. What is no claim lapses, too."""
    try:
        fit = FitAtWork.from_bytes(data, FITS)
    except StoreError:
        return False
    return fit.ended or _is_gone(fit.process)


def _this_process() -> str:
    """boot/namespace/pid/start: the same again for no other process; empty where the system doesn't say."""
    return _process(os.getpid())


def _process(pid: int) -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "" if fields[0] in "ZX" else f"{boot}/{os.readlink('/proc/self/ns/pid')}/{pid}/{fields[19]}"
    except OSError:
        return ""


def _is_gone(process: str) -> bool:
    """Whether it was a process of this boot and namespace that has ended; False where that can't be known."""
    here, parts = _this_process().split("/"), process.split("/")
    if len(here) != 4 or len(parts) != 4 or here[:2] != parts[:2] or not parts[2].isdecimal():
        return False
    return _process(int(parts[2])) != process

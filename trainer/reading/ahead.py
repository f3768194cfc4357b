"""Items made in a thread ahead of their use: windows ahead of batches, batches ahead of the step."""

import contextlib
import ctypes
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Generic, TypeVar

import torch

T = TypeVar("T")


@dataclass(frozen=True)
class _Ended:
    """Why no further item comes."""

    error: BaseException


class Ahead(Generic[T]):
    """Runs an iterator in a thread; an item is begun while fewer than `limit` wait to be taken.

    So `limit` items at most are ready or being made. What the iterator raises is raised by `get` after the items
    before it, and by every later `get`. The queues let go of the interpreter only where there is nothing to take, so
    that a step whose batch is ready does not wait for the thread to make another. Torch's operations in the thread run
    in it alone: the step has the other processors.
    """

    def __init__(self, items: Iterator[T], *, limit: int, name: str) -> None:
        self._ready: SimpleQueue[T | _Ended] = SimpleQueue()
        self._taken: SimpleQueue[None] = SimpleQueue()
        self._room = limit  # the thread's own
        self._closed = False
        # The iterator is the thread's alone: what its frame holds is freed with the thread.
        self._thread = threading.Thread(target=self._run, args=(items,), daemon=True, name=name)
        self._thread.start()

    def get(self) -> T:
        """The oldest item, waited for. ValueError once closed."""
        if self._closed:
            raise _closed()
        item = self._ready.get()
        if isinstance(item, _Ended):
            self._ready.put(item)
            raise item.error
        self._taken.put(None)
        return item

    def close(self, timeout: float | None = None) -> None:
        """Wake those that wait, drop what is ready and end the thread; one that is reading ends after its read."""
        self._closed = True
        self._taken.put(None)
        self._end()
        if threading.current_thread() is not self._thread:  # which may be the one that collects garbage
            self._thread.join(timeout)
        self._end()

    def _end(self) -> None:
        with contextlib.suppress(Empty):
            while True:
                self._ready.get_nowait()
        self._ready.put(_Ended(_closed()))

    def _run(self, items: Iterator[T]) -> None:
        _work_alone()
        try:
            while self._has_room():
                self._ready.put(next(items))
        except BaseException as error:  # raised where the items are taken
            self._ready.put(_Ended(error))

    def _has_room(self) -> bool:
        """Whether to go on, once there is room; not when closed."""
        if self._room:
            self._room -= 1
        else:
            self._taken.get()
        return not self._closed


def _work_alone() -> None:
    """Torch's operations that this thread calls from now on run in it alone; others keep their number of threads."""
    torch.get_num_threads()  # else the thread's first operation would set the number again
    getattr(ctypes.CDLL(None), "omp_set_num_threads", lambda number: None)(1)


def _closed() -> ValueError:
    return ValueError("the stream is closed: make another from its state")

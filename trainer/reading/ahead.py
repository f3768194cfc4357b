"""Items made in a thread ahead of whoever takes them: windows ahead of batches, batches ahead of the step."""

import threading
from collections import deque
from collections.abc import Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class Ahead(Generic[T]):
    """Runs an iterator in a thread; an item is begun while fewer than `limit` wait to be taken.

    So `limit` items at most are ready or being made. What the iterator raises is raised by `get` after the items
    before it, and by every later `get`.
    """

    def __init__(self, items: Iterator[T], *, limit: int, name: str) -> None:
        self._limit, self._ready = limit, deque[T]()
        self._error: BaseException | None = None
        self._closed, self._changed = False, threading.Condition()
        # The iterator is the thread's alone: what its frame holds is freed with the thread.
        self._thread = threading.Thread(target=self._run, args=(items,), daemon=True, name=name)
        self._thread.start()

    def get(self) -> T:
        """The oldest item, waited for. ValueError once closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._ready or self._error or self._closed)
            if self._closed:
                raise ValueError("the stream is closed: make another from its state")
            if not self._ready:
                assert self._error is not None
                raise self._error
            self._changed.notify_all()
            return self._ready.popleft()

    def close(self, timeout: float | None = None) -> None:
        """Wake whoever waits, drop what is ready and end the thread; one that is reading ends after its read."""
        with self._changed:
            self._closed = True
            self._ready.clear()
            self._changed.notify_all()
        self._thread.join(timeout)

    def _run(self, items: Iterator[T]) -> None:
        try:
            while self._has_room():
                self._put(next(items))
        except BaseException as error:  # told to whoever takes the items
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _has_room(self) -> bool:
        """Whether to go on, once there is room; not when closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or len(self._ready) < self._limit)
            return not self._closed

    def _put(self, item: T) -> None:
        with self._changed:
            if not self._closed:
                self._ready.append(item)
                self._changed.notify_all()

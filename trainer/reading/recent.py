"""The last things that were made, up to a limit."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


class Recent(Generic[Key, Value]):
    """Values by key, the least recently used dropped where their weights exceed `limit`. Any number of threads."""

    def __init__(self, limit: int) -> None:
        self._limit, self._held = limit, 0
        self._entries: OrderedDict[Key, tuple[Value, int]] = OrderedDict()
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return Recent, (self._limit,)

    def get(self, key: Key, make: Callable[[], Value], weight: Callable[[Value], int]) -> Value:
        """The value remembered for `key`, or made now."""
        found = self.find(key)
        if found is not None:
            return found
        value = make()
        self._put(key, value, weight(value))
        return value

    def find(self, key: Key) -> Value | None:
        """The value remembered for `key`, None where there is none."""
        with self._lock:
            if key not in self._entries:
                return None
            self._entries.move_to_end(key)
            return self._entries[key][0]

    def _put(self, key: Key, value: Value, weight: int) -> None:
        with self._lock:
            if key in self._entries:  # another thread made it meanwhile
                return
            self._entries[key] = value, weight
            self._held += weight
            while self._held > self._limit:
                _, (_, lighter) = self._entries.popitem(last=False)
                self._held -= lighter

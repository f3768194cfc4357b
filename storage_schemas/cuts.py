"""A file that is cut while it is mapped: SIGBUS ends a read behind its new end, and here one line says which file.

Python's own handlers run between two instructions of Python's, and the one that faults never ends: so this one stands
in the C library's place, for the whole process, and runs in the thread that faults.
"""

import ctypes
import itertools
import os
import signal
import weakref

_libc = ctypes.CDLL(None)
_libc.signal.restype = ctypes.c_void_p
_libc.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]

_mapped: dict[int, tuple[str, int]] = {}
_numbers = itertools.count()
_before: list[int | None] = [None]


def watch(owner: object, path: str, size: int) -> None:
    """End the process, naming this file, at a read behind its end once it is cut from `size` bytes.

    owner: what lives as long as the map of it.
    """
    number = next(_numbers)
    _mapped[number] = path, size
    weakref.finalize(owner, _mapped.pop, number, None).atexit = False
    # Each time: torch puts one of its own into a DataLoader's worker, which speaks of shared memory.
    found = _libc.signal(signal.SIGBUS, _ours)
    if found != _ours:
        _before[0] = found


@ctypes.CFUNCTYPE(None, ctypes.c_int)
def _explain(number: int) -> None:
    # First, so that what isn't explained here ends as it would without us: the read is tried again after this.
    _libc.signal(signal.SIGBUS, _before[0])
    for path, size in list(_mapped.values()):
        found = _size(path)
        if found is not None and found < size:
            line = f"{path} was cut from {size} to {found} bytes while it was read: restore the file, then start again"
            os.write(2, f"{line}\n".encode(errors="replace"))
            os._exit(1)


_ours = ctypes.cast(_explain, ctypes.c_void_p).value


def _size(path: str) -> int | None:
    try:
        return os.stat(path).st_size
    except OSError:
        return None

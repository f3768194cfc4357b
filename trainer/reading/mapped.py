"""Files as read-only memory, without a file descriptor each: a stream holds more files than a process may have open."""

import ctypes
import errno
import mmap
import os
import weakref

import numpy as np
from numpy.typing import NDArray

from limbeck.storage_schemas.backends import open_regular
from limbeck.storage_schemas.cuts import watch

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_FAILED = ctypes.c_void_p(-1).value


class Maps:
    """One map a file, for as long as anybody holds a view of it. A file deleted meanwhile stays readable."""

    def __init__(self) -> None:
        self._held: weakref.WeakValueDictionary[tuple[int, int, int], NDArray[np.uint8]] = weakref.WeakValueDictionary()

    def open(self, path: str, *, size: int | None = None) -> memoryview | None:
        """The file's bytes, uint8; None if its size is not `size`. FileNotFoundError, OSError; StoreError for no file.

        The size is asked for every time, so that a file that was cut is noticed. Cut later it ends the process.
        """
        with open_regular(path) as file:
            found = os.fstat(file.fileno())
            if size is not None and found.st_size != size:
                return None
            key = (found.st_dev, found.st_ino, found.st_size)  # an inode that is mapped is not given away
            array = self._held.get(key)
            if array is None:
                array = self._held[key] = _map(file.fileno(), found.st_size, path)
            return array.data.toreadonly()


def _map(handle: int, size: int, path: str) -> NDArray[np.uint8]:
    if not size:
        return np.empty(0, np.uint8)
    address = _libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, handle, 0)
    if address == _FAILED:
        number = ctypes.get_errno()
        raise OSError(number or errno.ENOMEM, os.strerror(number or errno.ENOMEM))
    memory = _Memory(address, size)
    # Not at exit: a thread may still read, and the system unmaps anyway.
    weakref.finalize(memory, _libc.munmap, address, size).atexit = False
    watch(memory, path, size)
    return np.asarray(memory)


class _Memory:
    """The owner of a map, held by arrays over it; the map ends with it."""

    def __init__(self, address: int, size: int) -> None:
        self.__array_interface__ = {"version": 3, "data": (address, True), "shape": (size,), "typestr": "|u1"}

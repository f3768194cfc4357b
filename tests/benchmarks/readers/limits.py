"""What no reader can pass: the same bytes copied by one thread, with nothing decided, opened or checked.

memory copy: batches that lie end to end in memory, by numpy. C gather: the rows of our order, at their addresses in
the mapped files, by a loop of memcpy. Both write into the same buffers again and again.
"""

import ctypes
import itertools
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from limbeck.trainer.reading.chunks import Reading
from limbeck.trainer.reading.content import start
from limbeck.trainer.reading.rows import Rows
from limbeck.trainer.reading.shards import ShardSource
from tests.benchmarks.samples import SHAPE, every_shard, opened

NAME = "limit"
_C = """
#include <stddef.h>
#include <stdint.h>
#include <string.h>
void gather(const int64_t *addresses, size_t rows, size_t bytes, char *out) {
    for (size_t row = 0; row < rows; row++) memcpy(out + row * bytes, (const char *) addresses[row], bytes);
}
"""


def read(folder: Path, columns: tuple[str, ...], batch: int, *, form: str = "") -> Iterator[int]:
    """The C gather from one of our formats, or the memory copy."""
    return gather(folder, columns, batch, form) if form else copy(folder, columns, batch)


def copy(folder: Path, columns: tuple[str, ...], batch: int) -> Iterator[int]:
    """Each column of each batch by one copy."""
    shards = list(every_shard(folder))
    whole = [np.concatenate([shard[name] for shard in shards]) for name in columns]
    out = [np.empty((batch, *SHAPE), np.float16) for _ in columns]
    for first in itertools.cycle(range(0, len(whole[0]) - batch + 1, batch)):
        for source, target in zip(whole, out, strict=True):
            np.copyto(target, source[first : first + batch])
        yield batch


def gather(folder: Path, columns: tuple[str, ...], batch: int, form: str) -> Iterator[int]:
    """Each column of each batch by one call."""
    function = _compiled()
    source = ShardSource(opened(folder, form), "train", columns, reading=Reading(verify="never"))
    batches = list(_epoch(source, batch))
    out = {name: np.empty((batch, *SHAPE), np.float16) for name in columns}
    width = out[columns[0]][0].nbytes
    for rows in itertools.cycle(batches):
        for name, target in out.items():
            function(rows.addresses[name].ctypes.data, batch, width, target.ctypes.data)
        yield batch


def _epoch(source: ShardSource, batch: int) -> Iterator[Rows]:
    """Where the rows of each batch of the first epoch lie."""
    lanes = start(source, None, batch_size=batch, seed=0, lanes=None, block=None).lanes
    each = batch // lanes.lanes
    for first in range(0, source.ids.count // lanes.lanes - each + 1, each):
        yield source.load(np.ravel(lanes.rows(first, first + each, range(lanes.lanes))))


def _compiled() -> Callable[..., None]:
    if not (compiler := shutil.which("cc")):
        raise RuntimeError("no C compiler (cc) here")
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "gather.c"), Path(folder, "gather.so")
        source.write_text(_C)
        subprocess.run([compiler, "-O3", "-shared", "-fPIC", "-o", library, source], check=True)
        function = ctypes.CDLL(str(library)).gather
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_void_p]
    function.restype = None
    return function

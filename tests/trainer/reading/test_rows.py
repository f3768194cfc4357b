import ctypes
import mmap

import numpy as np
import pytest
import torch

from limbeck.storage_schemas.record import Field, to_storage
from limbeck.trainer.reading.rows import Rows, as_tensor, copy_rows, gathered


def raw(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).reshape(len(array), -1).view(np.uint8)


@pytest.mark.parametrize("nbytes", [1, 2, 3, 8, 6144, 300_000])
def test_rows_come_from_wherever_they_are(nbytes):
    """Rows of several arrays, one of them strided and one read backwards, in any order and more than once."""
    rng = np.random.default_rng(0)
    packed = rng.integers(0, 256, (9, nbytes), dtype=np.uint8)
    strided = rng.integers(0, 256, (9, 2 * nbytes + 5), dtype=np.uint8)[:, 3 : 3 + nbytes]
    arrays = [packed, strided, packed[::-1]]
    where = np.concatenate([a.__array_interface__["data"][0] + a.strides[0] * np.arange(len(a)) for a in arrays])
    pick = rng.integers(0, len(where), 100)
    out = np.zeros((100, nbytes), np.uint8)
    copy_rows(where[pick], out)
    np.testing.assert_array_equal(out, np.concatenate(arrays)[pick])
    copy_rows(where[:0], out[:0])
    np.testing.assert_array_equal(out, np.concatenate(arrays)[pick])


@pytest.mark.parametrize("nbytes", [32, 128, 384, 1568, 6144])
@pytest.mark.parametrize("picks", [1, 100])
def test_rows_of_tars_come_whole_too(nbytes, picks):
    """They lie at multiples of 512 bytes: what these and a row have in common is copied at once."""
    rng = np.random.default_rng(nbytes)

    def tar() -> np.ndarray:
        """Rows of two members each, with headers of 512 bytes and 128 more before the data."""
        member = 512 + -(-(128 + nbytes) // 512) * 512
        file = rng.integers(0, 256, 4096 + 9 * 2 * member, dtype=np.uint8)
        start = -file.ctypes.data % 4096  # mapped files begin at a page
        return file[start:][: 9 * 2 * member].reshape(9, -1)[:, 512 + 128 : 512 + 128 + nbytes]

    arrays = [tar(), tar()[::-1], tar()]
    where = np.concatenate([a.__array_interface__["data"][0] + a.strides[0] * np.arange(len(a)) for a in arrays])
    for pick in (rng.integers(0, len(where), picks), np.array([where.argmax()]), np.array([where.argmin()])):
        out = np.zeros((len(pick), nbytes), np.uint8)
        copy_rows(where[pick], out)
        np.testing.assert_array_equal(out, np.concatenate(arrays)[pick])


def test_rows_may_lie_as_far_apart_as_memory_reaches():
    """At its lowest addresses and at its highest: what lies between is counted by the byte, and by rows of an item."""
    nbytes, far = 16 << 10, np.full((2, 16 << 10), 7, np.uint8)
    libc = ctypes.CDLL(None)
    libc.mmap.restype, libc.munmap.argtypes = ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_size_t]
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
    near = libc.mmap(1 << 32, nbytes, mmap.PROT_READ, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
    assert near < 1 << 40
    out = np.ones((3, nbytes), np.uint8)
    copy_rows(np.array([far.ctypes.data, near, far.ctypes.data + nbytes]), out)
    libc.munmap(near, nbytes)
    assert out[:, [0, -1]].tolist() == [[7, 7], [0, 0], [7, 7]]


def test_rows_are_copied_between_the_arrays_that_they_are_from():
    """Into memory that lies within what the gather takes for one array."""
    memory = np.random.default_rng(0).integers(0, 256, (3, 8, 1024), dtype=np.uint8)
    first, out, last = memory
    copy_rows(np.array([first.ctypes.data + 1024, last.ctypes.data + 2048] * 4), out)
    np.testing.assert_array_equal(out, np.stack([first[1], last[2]] * 4))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("shape", [(3,), (2, 3, 4)])
def test_bytes_become_numbers_without_a_copy(dtype, shape):
    values = np.random.default_rng(1).standard_normal((5, *shape))
    field = Field("output", shape, dtype)
    buffer = raw(to_storage(values, dtype)).copy()
    tensor = as_tensor(buffer, field)
    assert torch.equal(tensor, torch.from_numpy(values).float().to(getattr(torch, dtype)))
    assert tensor.data_ptr() == buffer.ctypes.data
    assert as_tensor(buffer[:0], field).shape == (0, *shape)


def test_integers_become_tensors_too():
    assert as_tensor(raw(np.array([[2**40, -1]]).T), Field("data_id", (), "int64")).tolist() == [2**40, -1]
    assert as_tensor(raw(np.array([[7, -9]], np.int32).T), Field("start_index", (), "int32")).tolist() == [7, -9]


def test_gathered_rows_are_their_own_memory():
    values = np.arange(12, dtype=np.float16).reshape(6, 2)
    pick = np.array([5, 0, 5])
    labels = np.array([1, 2, 3])
    addresses = {"output": values.ctypes.data + 4 * pick}
    rows = Rows(pick, labels, np.ones(3), addresses, keep=values, substituted=np.zeros(3, bool))
    condition, states = gathered(rows, [Field("output", (2,), "float16")])
    values[:], labels[:] = 0, 0
    assert states["output"].tolist() == [[10.0, 11.0], [0.0, 1.0], [10.0, 11.0]]
    assert condition.tolist() == [1, 2, 3]
    assert len(rows) == 3

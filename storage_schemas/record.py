"""What one sample is on disk. Names are lower case, because WebDataset folds case.

    sample_id    int64   place on its endless line, `train` or `holdout`
    condition    int64   label, -1 for none
    noise        x_T, rounded to the storage dtype before the solve (grid index 0)
    state_006    the state at grid index 6
    output       x_0 of the solver (grid index N)

A segment starts at a grid index of its own: start_index, data_id (-1 when it starts from the prior), segment_0..2.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

Split = Literal["train", "holdout"]
SPLITS: tuple[Split, ...] = get_args(Split)
StorageDtype = Literal["float16", "bfloat16", "float32"]
Columns = dict[str, np.ndarray]
"""Column name -> array [n, *shape]; rows in ascending order of sample_id. Arrays may be read-only views."""

SEGMENT_STATES = 3
NO_CONDITION = -1
NO_DATA = -1

# bfloat16 has no numpy type: its raw 16 bits are stored.
NUMPY_DTYPES = {"float16": "<f2", "bfloat16": "<u2", "float32": "<f4", "int64": "<i8", "int32": "<i4"}


@dataclass(frozen=True)
class Field:
    """One column: name, shape of one row, dtype name."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def numpy_dtype(self) -> np.dtype:
        """Little-endian dtype of the stored array; uint16 for bfloat16."""
        return np.dtype(NUMPY_DTYPES[self.dtype])

    @property
    def nbytes(self) -> int:
        """Bytes of one row."""
        return self.numpy_dtype.itemsize * math.prod(self.shape)

    @property
    def is_scalar(self) -> bool:
        """Whether a row is one plain integer."""
        return self.shape == ()


def state_column(index: int, num_steps: int) -> str:
    """Column of the state at grid index 0 <= index <= num_steps."""
    if not 0 <= index <= num_steps:
        raise ValueError(f"state {index} is not on a grid of {num_steps} steps: indices run from 0 to {num_steps}")
    return {0: "noise", num_steps: "output"}.get(index, f"state_{index:03d}")


def trajectory_fields(
    sample_shape: Sequence[int], storage_dtype: StorageDtype, num_steps: int, states: Sequence[int]
) -> tuple[Field, ...]:
    """Columns of a trajectory: sample_id, condition, then the states in grid order."""
    names = [state_column(index, num_steps) for index in sorted(states)]
    return (*_SAMPLE, *(Field(name, tuple(sample_shape), storage_dtype) for name in names))


def segment_fields(sample_shape: Sequence[int], storage_dtype: StorageDtype) -> tuple[Field, ...]:
    """Columns of a segment: sample_id, condition, start_index, data_id, then its states from noise towards data."""
    states = (Field(f"segment_{k}", tuple(sample_shape), storage_dtype) for k in range(SEGMENT_STATES))
    return (*_SAMPLE, Field("start_index", (), "int32"), Field("data_id", (), "int64"), *states)


_SAMPLE = (Field("sample_id", (), "int64"), Field("condition", (), "int64"))


def check_columns(fields: Sequence[Field], columns: Columns) -> int:
    """Number of rows, once every column has the shape and dtype of its field and ids ascend."""
    if set(columns) != {field.name for field in fields}:
        raise ValueError(f"columns {sorted(columns)} are not the record's {sorted(field.name for field in fields)}")
    rows = len(columns["sample_id"])
    for field in fields:
        array = columns[field.name]
        if array.shape != (rows, *field.shape) or array.dtype != field.numpy_dtype:
            have, need = f"{array.dtype}{list(array.shape)}", f"{field.numpy_dtype}{[rows, *field.shape]}"
            raise ValueError(f"column {field.name} is {have}, not {need}")
    if np.any(np.diff(columns["sample_id"]) <= 0):
        raise ValueError("sample ids must ascend within a shard")
    return rows


def to_storage(values: np.ndarray, dtype: StorageDtype) -> np.ndarray:
    """Floats rounded to nearest even in `dtype`, as the stored array."""
    if dtype == "bfloat16":
        return bfloat16_bits(values)
    return values.astype(NUMPY_DTYPES[dtype])


def from_storage(stored: np.ndarray, dtype: str) -> np.ndarray:
    """The stored array as numbers: bfloat16 widens to float32, everything else stays itself."""
    return bfloat16_values(stored) if dtype == "bfloat16" else stored


def bfloat16_bits(values: np.ndarray) -> np.ndarray:
    """Raw bits (uint16) of float32 values rounded to nearest even; a nan stays a nan."""
    single = np.ascontiguousarray(values, dtype=np.float32)
    bits = single.view(np.uint32)
    rounded = (bits + (np.uint32(0x7FFF) + ((bits >> 16) & 1))) >> 16
    return np.where(np.isnan(single), (bits >> 16) | 0x40, rounded).astype("<u2")


def bfloat16_values(bits: np.ndarray) -> np.ndarray:
    """float32 values of raw bfloat16 bits."""
    return (bits.astype(np.uint32) << 16).view(np.float32)

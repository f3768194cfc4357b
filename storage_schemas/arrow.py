"""Samples of both formats as Arrow tables with tensor columns, as Ray Data and Hugging Face datasets take them."""

from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa

from limbeck.storage_schemas.dataset import Dataset
from limbeck.storage_schemas.parquet import describe
from limbeck.storage_schemas.record import Field, Split
from limbeck.storage_schemas.shards import Shard

_LIST_VALUES = 1 << 30  # an Arrow list's offsets are int32


def arrow_tables(dataset: Dataset, split: Split = "train", columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
    """`arrow_table` of each shard of a split, in the order of ids."""
    for shard in dataset.shards(split):
        yield arrow_table(dataset, shard, columns)


def arrow_table(dataset: Dataset, shard: Shard, columns: Sequence[str] | None = None) -> pa.Table:
    """The shard's rows that are inside the window, checked against their checksums; all columns by default.

    States are fixed-shape tensors [n, *shape]; bfloat16 is its raw bits in uint16, and a column's metadata has its
    dtype. CorruptShard, or Pruned, as `Dataset.read`.
    """
    found, inside = dataset.read(shard, columns), dataset.rows_inside(shard)
    fields = [field for field in dataset.recipe.fields if field.name in found]
    arrays = [_array(field, found[field.name][inside]) for field in fields]
    schema = pa.schema([pa.field(f.name, _type(f), nullable=False, metadata=describe(f)) for f in fields])
    return pa.table(arrays, schema=schema)


def _type(field: Field) -> pa.DataType:
    values = pa.from_numpy_dtype(field.numpy_dtype)
    return values if field.is_scalar else pa.fixed_shape_tensor(values, field.shape)


def _array(field: Field, rows: np.ndarray) -> pa.Array:
    flat = pa.array(np.ascontiguousarray(rows).reshape(-1))
    if field.is_scalar:
        return flat
    tensor = _type(field)
    lists = pa.FixedSizeListArray.from_arrays(flat, tensor.storage_type.list_size)
    return pa.ExtensionArray.from_storage(tensor, lists)


def as_lists(table: pa.Table) -> pa.Table:
    """The table with its tensors as lists of lists over the same memory: what `datasets.Array3D` is made of."""
    return pa.table([_lists(column) for column in table.columns], names=table.column_names)


def _lists(column: pa.ChunkedArray) -> pa.ChunkedArray:
    if not isinstance(column.type, pa.FixedShapeTensorType):
        return column
    step = max(1, _LIST_VALUES // column.type.storage_type.list_size)
    pieces = [chunk.slice(first, step) for chunk in column.chunks for first in range(0, len(chunk), step)]
    kind = pa.list_(column.type.value_type)
    for _ in column.type.shape[1:]:
        kind = pa.list_(kind)
    return pa.chunked_array([_nested(piece.storage.flatten(), column.type.shape) for piece in pieces], type=kind)


def _nested(values: pa.Array, shape: Sequence[int]) -> pa.Array:
    for size in reversed(shape):
        values = pa.ListArray.from_arrays(np.arange(0, len(values) + 1, size, dtype=np.int32), values)
    return values

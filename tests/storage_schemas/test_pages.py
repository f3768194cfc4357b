import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from limbeck.storage_schemas.pages import Page, find_pages


def write(values: np.ndarray, *, nullable: bool = False, **options: object) -> tuple[bytes, pq.FileMetaData]:
    """A file of one column: int64 values, or fixed-size binary rows."""
    flat = np.ascontiguousarray(values)
    kind = pa.int64() if flat.ndim == 1 else pa.binary(flat[0].nbytes)
    array = pa.Array.from_buffers(kind, len(flat), [None, pa.py_buffer(flat.reshape(-1).view(np.uint8))])
    file = io.BytesIO()
    table = pa.table([array], schema=pa.schema([pa.field("x", kind, nullable=nullable)]))
    pq.write_table(table, file, **{"compression": "none", "use_dictionary": False, **options})
    return file.getvalue(), pq.read_metadata(io.BytesIO(file.getvalue()))


def chunks(data: bytes, metadata: pq.FileMetaData) -> list[tuple[int, bytes]]:
    """(rows, bytes) of each column chunk."""
    groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
    columns = [(group.num_rows, group.column(0)) for group in groups]
    starts = [column.dictionary_page_offset or column.data_page_offset for _, column in columns]
    return [
        (rows, data[start : start + column.total_compressed_size])
        for (rows, column), start in zip(columns, starts, strict=True)
    ]


def rows_of(chunk: bytes, pages: list[Page], like: np.ndarray) -> np.ndarray:
    views = [np.frombuffer(chunk, like.dtype, page.rows * like[0].size, page.offset) for page in pages]
    return np.concatenate(views).reshape(-1, *like.shape[1:])


VALUES = {
    "states": np.arange(1000 * 60, dtype=np.float16).reshape(1000, 3, 20),
    "integers": np.arange(1000) * 2**40 - 2**45,
    "one row": np.ones((1, 3), np.float32),
}


@pytest.mark.parametrize("name", VALUES)
@pytest.mark.parametrize("page_bytes", [1, 700, 4096, 1 << 20])
@pytest.mark.parametrize("options", [{}, {"write_page_checksum": True}, {"write_statistics": False}], ids=str)
def test_pages_are_the_rows_where_they_lie(name, page_bytes, options):
    values = VALUES[name]
    data, metadata = write(values, data_page_size=page_bytes, write_batch_size=7, row_group_size=640, **options)
    first, found = 0, 0
    for rows, chunk in chunks(data, metadata):
        pages = find_pages(memoryview(chunk), rows, values[0].nbytes)
        np.testing.assert_array_equal(rows_of(chunk, pages, values), values[first : first + rows])
        assert [page.first_row for page in pages] == np.cumsum([0, *(page.rows for page in pages[:-1])]).tolist()
        first, found = first + rows, found + len(pages)
    assert first == len(values)
    assert found > 2 or len(values) == 1 or page_bytes > 700 * 9, "small pages must have been cut"


@pytest.mark.parametrize(
    "options",
    [
        {"use_dictionary": True},
        {"data_page_version": "2.0"},
        {"compression": "zstd"},
        {"compression": "snappy"},
        {"nullable": True},
        {"column_encoding": {"x": "BYTE_STREAM_SPLIT"}},
        {"column_encoding": {"x": "DELTA_BINARY_PACKED"}},
    ],
    ids=str,
)
def test_anything_but_plain_pages_is_left_to_a_parquet_reader(options):
    for values in (np.arange(1000) % 7, np.arange(1000 * 4, dtype=np.float32).reshape(1000, 4)):
        if values.ndim == 2 and "DELTA_BINARY_PACKED" in str(options):
            continue
        data, metadata = write(values, **options)
        for rows, chunk in chunks(data, metadata):
            assert find_pages(chunk, rows, values[0].nbytes) is None


def test_bytes_that_are_not_these_rows_are_no_pages():
    values = VALUES["states"]
    data, metadata = write(values, data_page_size=4096, write_batch_size=7)
    ((rows, chunk),) = chunks(data, metadata)
    assert find_pages(chunk, rows, 120)
    assert find_pages(chunk, rows + 1, 120) is None
    assert find_pages(chunk, rows, 60) is None
    assert find_pages(chunk + chunk, rows, 120) is None
    assert find_pages(b"", 1, 120) is None
    for length in (1, 5, 40, len(chunk) - 1):
        assert find_pages(chunk[:length], rows, 120) is None
    for endless in (b"\x1c" * 100_000, b"\xff" * 1_000_000):  # structs in structs, a number without an end
        assert find_pages(endless, rows, 120) is None
    rng = np.random.default_rng(0)
    for _ in range(300):
        noise = rng.integers(0, 256, int(rng.integers(1, 200)), dtype=np.uint8).tobytes()
        assert find_pages(noise, rows, 120) is None


def test_a_page_header_as_the_format_writes_it():
    """By hand: field 1 (type), 2 and 3 (sizes 16), 5 (a struct: 2 values, plain, two encodings of levels)."""
    header = bytes([0x15, 0x00, 0x15, 0x20, 0x15, 0x20, 0x2C, 0x15, 0x04, 0x15, 0x00, 0x15, 0x06, 0x15, 0x06, 0, 0])
    body = np.array([7, 9]).tobytes()
    assert find_pages(header + body, 2, 8) == [Page(0, 2, len(header))]
    assert find_pages((header + body) * 2, 4, 8) == [Page(0, 2, len(header)), Page(2, 2, 2 * len(header) + 16)]
    assert find_pages(bytes([*header[:1], 2, *header[2:]]) + body, 2, 8) is None, "another type of page"
    assert find_pages(bytes([*header[:5], 0x22, *header[6:]]) + body, 2, 8) is None, "17 bytes stored for 16"
    long_form = bytes([0x05, 0x02]) + header[1:]  # a field's number may be written out
    assert find_pages(long_form + body, 2, 8) == [Page(0, 2, len(long_form))]

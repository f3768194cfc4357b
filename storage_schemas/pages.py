"""Where the rows of a Parquet column chunk lie, so that they are used as they are: no decoder, no copy.

A page is a header and its values. Of a required, plain, uncompressed column of fixed size the values are the rows, one
after another, as in memory. The header is a Thrift struct in the compact protocol:
https://github.com/apache/parquet-format, PageHeader.
"""

from typing import Any, NamedTuple

_DATA_PAGE, _DICTIONARY, _PLAIN = 0, 2, 0
_STOP, _TRUE, _FALSE, _BYTE, _I16, _I32, _I64, _DOUBLE, _BINARY, _LIST, _SET, _MAP, _STRUCT = range(13)


class Page(NamedTuple):
    """Rows [first_row, first_row + rows) of a column chunk, from byte `offset` of the chunk on."""

    first_row: int
    rows: int
    offset: int


def find_pages(chunk: bytes | memoryview, rows: int, nbytes: int, *, compressed: bool = False) -> list[Page] | None:
    """The pages of a column chunk of `rows` required values of `nbytes` each; compressed ones are not looked into.

    None where they are anything but plain (a dictionary, data pages of version 2, levels, sizes that don't add up). The
    codec stands in the file's footer, so only the caller can tell it.
    """
    pages, at, first_row = [], 0, 0
    try:
        while at < len(chunk):
            page, at = _page(chunk, at, first_row, nbytes, compressed)
            first_row += page.rows
            pages.append(page)
    except (IndexError, KeyError, TypeError, ValueError, RecursionError):
        return None
    return pages if (at, first_row) == (len(chunk), rows) else None


class Stored(NamedTuple):
    """What the header of a page says: whether it is a dictionary, bytes once decompressed, values, their encoding."""

    is_dictionary: bool
    size: int
    values: int
    encoding: int


def stored_pages(chunk: bytes | memoryview) -> list[Stored] | None:
    """The pages of any column chunk by their headers; None where they are no such pages, one after another."""
    pages, at = list[Stored](), 0
    try:
        while at < len(chunk):
            header, start = _struct(chunk, at)
            about = header[7] if header[1] == _DICTIONARY else header[5]
            page = Stored(header[1] == _DICTIONARY, header[2], about[1], about[2])
            if min(page.size, page.values, header[3] - 1) < 0:
                return None
            pages.append(page)
            at = start + header[3]
    except (IndexError, KeyError, TypeError, ValueError, RecursionError):
        return None
    return pages if at == len(chunk) else None


def _page(chunk: bytes | memoryview, at: int, first_row: int, nbytes: int, compressed: bool) -> tuple[Page, int]:
    header, start = _struct(chunk, at)
    data_page = header[5]
    kind, size, stored_size, values, encoding = header[1], header[2], header[3], data_page[1], data_page[2]
    if (kind, encoding) != (_DATA_PAGE, _PLAIN) or not size == values * nbytes > 0 or stored_size <= 0:
        raise ValueError("not a plain page of these values")
    if stored_size != size and not compressed:
        raise ValueError("other bytes than its values have")
    return Page(first_row, values, start), start + stored_size


def _struct(data: bytes | memoryview, at: int) -> tuple[dict[int, Any], int]:
    """(field number -> value, where the struct ends). Each field: a byte of (number's step, type), then its value."""
    found: dict[int, Any] = {}
    number = 0
    while data[at] != _STOP:
        step, kind = data[at] >> 4, data[at] & 15
        number, at = (number + step, at + 1) if step else _integer(data, at + 1)
        found[number], at = _value(data, at, kind)
    return found, at + 1


def _value(data: bytes | memoryview, at: int, kind: int) -> tuple[Any, int]:
    """(value, where it ends). Kinds that a page header never has are a ValueError."""
    if kind in (_TRUE, _FALSE):
        return kind == _TRUE, at
    if kind in (_I16, _I32, _I64):
        return _integer(data, at)
    if kind == _BINARY:
        length, at = _varint(data, at)
        return data[at : at + length], at + length
    if kind == _STRUCT:
        return _struct(data, at)
    raise ValueError(f"type {kind}")


def _integer(data: bytes | memoryview, at: int) -> tuple[int, int]:
    """Zigzag: 0, -1, 1, -2 are stored as 0, 1, 2, 3."""
    stored, at = _varint(data, at)
    return (stored >> 1) ^ -(stored & 1), at


def _varint(data: bytes | memoryview, at: int) -> tuple[int, int]:
    """Seven bits a byte, lowest first; the eighth says that more follow."""
    value = shift = 0
    while data[at] & 0x80:
        if shift > 63:
            raise ValueError("no integer is as long")
        value |= (data[at] & 0x7F) << shift
        shift, at = shift + 7, at + 1
    return value | data[at] << shift, at + 1

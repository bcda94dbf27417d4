"""What a Parquet file says of its sizes, read before anything is unpacked.

pyarrow allocates what a page's header states, and a page of a few bytes can hold any number of equal values.
Nor can pyarrow be asked: of a damaged description of a column, ``ColumnChunkMetaData`` ends the process
(26.0). So the headers, which are in Thrift's compact protocol, are read here: the footer once, and those of
all pages of the columns in question. https://github.com/apache/parquet-format has the fields by number.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from mmap import mmap
from typing import Any, NamedTuple

_DEPTH = 24
_TRUE, _FALSE, _BYTE, _SHORT, _INT, _LONG, _DOUBLE, _BINARY, _LIST, _SET, _MAP, _STRUCT = range(1, 13)


class Sizes(NamedTuple):
    """``rows`` of the file, ``values`` of the columns in question, ``bytes`` that their pages unpack to, and
    those of the largest page."""

    rows: int
    values: int
    bytes: int
    page: int


def stated_sizes(data: bytes | mmap, columns: Sequence[int]) -> Sizes:
    """The sizes that a Parquet file states, ``columns`` by their places among the top ones of the schema.

    Each of them must be one without columns below it. ValueError where the headers are damaged. O(footer +
    pages) time.
    """
    if data[:4] != b"PAR1" or data[-4:] != b"PAR1" or len(data) < 12:
        raise ValueError("the mark PAR1 is not at both ends")
    start = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    if start < 4:
        raise ValueError("the footer is longer than the file")
    footer = _Thrift(data, start, len(data) - 8).struct()
    leaves = _leaves(_field(footer, 2, list))
    wanted = [sum(leaves[:place]) for place in columns]
    rows = values = size = page = 0
    for group in _field(footer, 4, list):
        rows += _count(group, 3)
        chunks = _field(group, 1, list)
        for place in wanted:
            if place >= len(chunks):
                raise ValueError("a group of rows lacks a column")
            about = _field(chunks[place], 3, dict)
            of_pages, unpacked, largest = _page_sizes(data, about)
            page = max(page, largest)
            values += max(_count(about, 5), of_pages)
            size += max(_count(about, 6), unpacked)
    return Sizes(rows, max(values, rows * len(wanted)), size, page)


def _leaves(schema: list[Any]) -> list[int]:
    """Of each top column, how many columns of values are below it; the schema is in preorder."""
    counts: list[int] = []
    at = 1
    while at < len(schema):
        below, leaves = 1, 0
        while below and at < len(schema):
            children = _count(schema[at], 5, 0)
            below += children - 1
            leaves += not children
            at += 1
        counts.append(leaves)
    return counts


def _page_sizes(data: bytes | mmap, about: dict[int, Any]) -> tuple[int, int, int]:
    """(values, unpacked bytes, those of the largest) that the headers of a column's pages state."""
    places = [_count(about, 9), _count(about, 11, 0)]
    at = min((place for place in places if place), default=0)  # 0 where there is no such page
    end = at + _count(about, 7)
    if at == end:
        return 0, 0, 0
    if not 4 <= at <= end <= len(data) - 8:
        raise ValueError("a column lies outside the file")
    values = size = largest = 0
    while at < end:
        reader = _Thrift(data, at, end)
        header = reader.struct()
        unpacked = _count(header, 2)
        in_dictionary = _count(_field(header, 7, dict, {}), 1, 0)
        if in_dictionary > unpacked:  # no value takes less than a byte there
            raise ValueError(f"a dictionary of {unpacked:,} bytes states {in_dictionary:,} values")
        values += sum(_count(_field(header, kind, dict, {}), 1, 0) for kind in (5, 8))
        size += unpacked
        largest = max(largest, unpacked)
        at = reader.at + _count(header, 3)
    return values, size, largest


def _field(struct: Any, number: int, kind: type, missing: Any = None) -> Any:
    value = struct.get(number, missing) if isinstance(struct, dict) else None
    if not isinstance(value, kind):
        raise ValueError(f"field {number} of a header is missing")
    return value


def _count(struct: Any, number: int, missing: int | None = None) -> int:
    value: int = _field(struct, number, int, missing)
    if value < 0:
        raise ValueError(f"field {number} of a header is negative")
    return value


class _Thrift:
    """A struct as a dict by the fields' numbers, lists as lists; texts and maps are passed over, as None."""

    def __init__(self, data: bytes | mmap, at: int, end: int) -> None:
        self.data, self.at, self.end = data, at, end

    def struct(self, depth: int = 0) -> dict[int, Any]:
        if depth > _DEPTH:
            raise ValueError("headers are nested too deeply")
        found: dict[int, Any] = {}
        number = 0
        while head := self._byte():
            kind, step = head & 15, head >> 4
            number = number + step if step else self._signed()
            found[number] = kind == _TRUE if kind in (_TRUE, _FALSE) else self._value(kind, depth)
        return found

    def _value(self, kind: int, depth: int) -> Any:
        if kind in (_TRUE, _FALSE, _BYTE):
            self._skip(1)
        elif kind in (_SHORT, _INT, _LONG):
            return self._signed()
        elif kind == _DOUBLE:
            self._skip(8)
        elif kind == _BINARY:
            self._skip(self._unsigned())
        elif kind in (_LIST, _SET):
            return list(self._list(depth))
        elif kind == _MAP:
            count = self._unsigned()
            kinds = self._byte() if count else 0
            for _ in range(count):
                self._value(kinds >> 4, depth)
                self._value(kinds & 15, depth)
        elif kind == _STRUCT:
            return self.struct(depth + 1)
        else:
            raise ValueError(f"a header has a field of an unknown type {kind}")
        return None

    def _list(self, depth: int) -> Iterator[Any]:
        if depth > _DEPTH:
            raise ValueError("headers are nested too deeply")
        head = self._byte()
        count = head >> 4 if head >> 4 < 15 else self._unsigned()
        for _ in range(count):  # no element takes less than a byte, so the end comes soon where this lies
            yield self._value(head & 15, depth + 1)

    def _byte(self) -> int:
        self._skip(1)
        return self.data[self.at - 1]

    def _skip(self, count: int) -> None:
        self.at += count
        if self.at > self.end:
            raise ValueError("a header is cut short")

    def _unsigned(self) -> int:
        value = shift = 0
        while True:
            byte = self._byte()
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value
            if shift > 63:
                raise ValueError("a header has a number of more than 64 bits")

    def _signed(self) -> int:
        value = self._unsigned()
        return (value >> 1) ^ -(value & 1)

"""Rows of text with separators as a table.

Fields are cut by libraries: pandas' C parser, or where there are quotes Python's csv module. Around them is
by hand what neither they nor pyarrow tell: the line that a row stands on, past blank lines and line ends in
quotes; rows of too few fields, which pandas fills up; and where text is not UTF-8.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from lunet_fast.recsys.data.errors import RatingFileError, cause
from lunet_fast.recsys.data.ids import Int64Array
from lunet_fast.recsys.data.table import Column, Table, used_columns
from lunet_fast.recsys.data.values import NUMBER
from lunet_fast.training.outside import utf8

# Stands for a separator of several bytes ("::") while the C parser, which takes one byte, reads the file.
_ONE_BYTE_SEPARATOR = b"\x1f"


BLANKS = "space"
"""A separator: any run of spaces and tabs."""
_SNIFFED, _LINES = 65536, 50


class _Rows(NamedTuple):
    """All rows of a text, the header's too, that are not blank."""

    head: list[str]
    """The fields of the first."""
    counts: Int64Array
    """The number of fields of each."""
    places: Int64Array
    """The line that each starts on, from 1."""
    cells: list[list[str]] | bytes
    """The fields where there are quotes; otherwise the text, a line a row."""


def read_text(
    source: str,
    data: bytes,
    sep: str,
    columns: Mapping[str, str | None],
    *,
    names: list[str] | None = None,
    header: bool = True,
    quoted: bool = True,
    strip_types: bool = False,
) -> Table:
    """The columns of text; with ``names`` there is no header line. ``source`` stands in messages.

    Without a ``header`` and ``names``, columns are in the order of ``columns``, or named by their numbers
    from 1. A field may be ``quoted`` where ``sep`` is one byte; BLANKS is any run of spaces and tabs.
    ``strip_types`` takes ``:type`` off names of the header. RatingFileError.
    """
    data = utf8(source, data, RatingFileError)
    if b"\r" in data:
        data = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    if sep == BLANKS:
        data = re.sub(rb"[ \t]+", b" ", re.sub(rb"(?m)^[ \t]+|[ \t]+$", b"", data))
        sep, quoted = " ", False
    separator = sep
    if len(sep.encode()) > 1:
        if _ONE_BYTE_SEPARATOR in data:
            line = data.count(b"\n", 0, data.index(_ONE_BYTE_SEPARATOR)) + 1
            raise RatingFileError(f"{source}, line {line}: contains the control character 0x1f")
        data = data.replace(sep.encode(), _ONE_BYTE_SEPARATOR)
        separator, quoted = _ONE_BYTE_SEPARATOR.decode(), False
    rows = _quoted(source, data, separator) if quoted and b'"' in data else _plain(data, separator)
    del data  # the rows have a copy
    if not len(rows.places):
        raise RatingFileError(f"{source}: the file is empty")
    if names is None and not header:
        names, columns = _numbered(source, int(rows.counts[0]), columns)
    if names is None:
        names = [name.strip() for name in rows.head]
        if strip_types:
            names = [name.split(":")[0] for name in names]
        first = f"{source}, line {rows.places[0]}"
        used = used_columns(first, names, columns, hint=_header_hint(names))
        if len(rows.places) == 1:
            raise RatingFileError(f"{source}: there is a header, line {rows.places[0]}, but no row after it")
        skip = 1
    else:
        used, skip = used_columns(source, names, columns), 0
    _check_counts(source, rows, len(names), sep)
    cells = _cells(rows, separator, len(names), sorted(set(used.values())), skip)
    found = {role: Column.of(names[k], cells[k]) for role, k in used.items()}
    return Table(source, found, rows.places[skip:], "line")


def _check_counts(source: str, rows: _Rows, wanted: int, sep: str) -> None:
    ragged = np.flatnonzero(rows.counts != wanted)
    if len(ragged):
        shown = sep if sep.isprintable() and sep != " " else repr(sep)
        more = f" ({len(ragged)} such lines in all)" if len(ragged) > 1 else ""
        raise RatingFileError(
            f"{source}, line {rows.places[ragged[0]]}: the number of fields is {rows.counts[ragged[0]]}, "
            f"expected {wanted}, separated by {shown}{more}"
        )


def _cells(rows: _Rows, separator: str, width: int, wanted: list[int], skip: int) -> Mapping[int, Any]:
    """The fields of each column ``wanted``, from row ``skip`` on."""
    if not isinstance(rows.cells, bytes):
        body = rows.cells[skip:]
        return {k: [row[k] for row in body] for k in wanted}
    # The parser takes a byte order mark off its first field, even where that is not the file's first.
    frame = pd.read_csv(
        io.BytesIO(rows.cells if skip else b"\n" + rows.cells),
        skiprows=1,
        sep=separator,
        header=None,
        names=list(range(width)),
        usecols=wanted,
        dtype=object,  # not "category", whose texts pandas may turn into numbers: "007" into 7
        na_filter=False,
        quoting=csv.QUOTE_NONE,
        skip_blank_lines=False,
        lineterminator="\n",
        low_memory=False,
    )
    return {k: frame[k] for k in wanted}


def _plain(data: bytes, separator: str) -> _Rows:
    """Rows without quotes, none of them cut yet."""
    data, places = _without_blank_lines(data)
    buffer = np.frombuffer(data, dtype=np.uint8)
    ends = np.flatnonzero(buffer == ord("\n"))
    before = np.searchsorted(np.flatnonzero(buffer == ord(separator)), ends)
    counts = np.diff(before, prepend=0).astype(np.int64) + 1
    return _Rows(data[: data.find(b"\n")].decode().split(separator), counts, places, data)


def _quoted(source: str, data: bytes, separator: str) -> _Rows:
    """Rows of text that has quotes. Slower than the C parser, but it knows each row's line."""
    reader = csv.reader(io.StringIO(data.decode(), newline="\n"), delimiter=separator, strict=True)
    rows, places = [], []
    start = 1
    try:
        for row in reader:
            blank = (len(row) <= 1 or separator in " \t") and not any(field.strip(" \t") for field in row)
            if not blank:
                rows.append(row)
                places.append(start)
            start = reader.line_num + 1
    except csv.Error as error:
        raise RatingFileError(
            f"{source}, line {start}: the quotes do not match, or a field is too long ({cause(error)})"
        ) from error
    counts = np.array([len(row) for row in rows], dtype=np.int64)
    return _Rows(rows[0] if rows else [], counts, np.array(places, dtype=np.int64), rows)


def sniffed(data: bytes, usual: str | None) -> str | None:
    """The separator that cuts most of the first rows into as many fields as the first, at least two.

    Else ``usual``, which goes before wherever the first row has it.
    """
    text = data[:_SNIFFED].decode("utf-8", "replace").lstrip("\ufeff")
    lines = [line.strip(" ") for line in re.split(r"[\r\n]+", text) if line.strip()]
    if len(data) > _SNIFFED:
        lines = lines[:-1]
    if not lines or (usual is not None and usual in lines[0]):
        return usual
    lines = lines[:_LINES]
    cuts = {sep: [line.count(sep) for line in lines] for sep in ("\t", "::", ";", "|", ",")}
    cuts[BLANKS] = [len(line.split()) - 1 for line in lines]
    # The rows that are cut as the first one is, and the first separator of as many.
    alike = {sep: sum(count == counts[0] for count in counts) for sep, counts in cuts.items() if counts[0]}
    best = max(alike, key=alike.__getitem__, default=None)
    return best if best is not None and alike[best] > len(lines) / 2 else usual


def _numbered(
    source: str, width: int, columns: Mapping[str, str | None]
) -> tuple[list[str], dict[str, str | None]]:
    """Names of ``width`` columns without a header, which are their numbers, and the one of each role."""
    names = [str(k) for k in range(1, width + 1)]
    chosen = {role: name for role, name in columns.items() if name in names}
    free = iter([name for name in names if name not in chosen.values()])
    for role, name in columns.items():
        if name is None or role in chosen:
            continue
        if name != role:
            raise RatingFileError(
                f"{source}: without a header the column {name!r} for the {role} has no name: give its number "
                f"from 1, here to {width}"
            )
        chosen[role] = next(free, role)
    return names, {role: chosen.get(role) for role in columns}


def _without_blank_lines(data: bytes) -> tuple[bytes, Int64Array]:
    """The text without lines of spaces and tabs alone, every line ended; the numbers of the lines kept."""
    if not data.endswith(b"\n"):
        data += b"\n"
    starts_blank = data[:1] in b" \t\n" or re.search(rb"\n[ \t\n]", data) is not None
    if not starts_blank:
        return data, np.arange(1, data.count(b"\n") + 1, dtype=np.int64)
    lines = data.split(b"\n")[:-1]
    kept = [k for k, line in enumerate(lines) if line.strip(b" \t")]
    return b"".join(lines[k] + b"\n" for k in kept), np.array(kept, dtype=np.int64) + 1


def _header_hint(names: Sequence[str]) -> str:
    if len(names) == 1 and (other := [s for s in (",", "\t", ";", "|", "::") if s in names[0]]):
        return f"; the separator may be another one: sep={other[-1]!r}"
    if any(NUMBER.fullmatch(name) for name in names):
        return (
            "; the first line holds numbers: put a header such as user,item,rating,timestamp before it, or "
            "read the file without one: header=False"
        )
    return ""

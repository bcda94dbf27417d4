"""A table as text, ``.csv`` or ``.tsv``: every row is as wide as the header, and every cell is a number."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from lunet_fast.density.data_limits import DataError, brief, check_size, read_bytes
from lunet_fast.training.outside import utf8

_NUMBER = re.compile(r"\s*[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?\s*")


@dataclass(frozen=True)
class Text:
    """The cells of a table of N rows, not parsed yet."""

    names: list[str]
    """Of the columns: the header."""
    lines: npt.NDArray[np.int64]
    """[N], the line that each row starts on, from 1."""
    width: int
    """Fields of each row."""
    separator: str
    body: bytes | list[list[str]]
    """The rows: a line each, or where there are quotes lists of fields."""

    def frame(self, columns: Sequence[int], dtype: type) -> pd.DataFrame:
        """[N, len(columns)] of the columns at these places; ValueError where a cell is no ``dtype``."""
        if not isinstance(self.body, bytes):
            return pd.DataFrame({k: [row[k] for row in self.body] for k in columns}).astype(dtype)
        return pd.read_csv(
            io.BytesIO(self.body),
            sep=self.separator,
            header=None,
            names=list(range(self.width)),
            usecols=list(columns),
            dtype=dtype,
            na_filter=False,
            quoting=csv.QUOTE_NONE,
            skip_blank_lines=False,
            lineterminator="\n",
            index_col=False,
        )


def read_text(path: Path, *, width_may_differ: bool = False) -> Text:
    """The cells of a table whose first line is its header; blank lines are passed over.

    :class:`DataError`, naming the line, for text that is no UTF-8, quotes that do not match, a row of more
    or fewer fields than the header, a name that occurs twice, and a header of numbers. Where
    ``width_may_differ`` all rows together may have one field more or less than the header.
    """
    separator = "," if path.suffix == ".csv" else "\t"
    data = utf8(str(path), read_bytes(path), DataError)
    data = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n") if b"\r" in data else data
    rows = _quoted(path, data, separator) if b'"' in data else _unquoted(data, separator)
    names, lines, counts, body = rows
    if not names:
        raise DataError(f"{path}: is empty: a header and rows of numbers are needed")
    _check_names(path, names)
    if not len(lines):
        raise DataError(f"{path}: has a header and no row after it")
    width = len(names)
    if width_may_differ and abs(counts[0] - width) == 1:
        width = int(counts[0])
    ragged = np.flatnonzero(counts != width)
    if len(ragged):
        more = f" ({len(ragged):,} such lines in all)" if len(ragged) > 1 else ""
        raise DataError(
            f"{path}, line {lines[ragged[0]]}: has {counts[ragged[0]]} fields and the header {len(names)}, "
            f"separated by {separator!r}{more}: give every row one field for each name"
        )
    check_size(path, 4 * len(lines) * width, "holds numbers of")
    return Text(names, lines, width, separator, body)


def column_place(path: Path, names: Sequence[str], wanted: str) -> int:
    """The place of a column of labels."""
    if wanted not in names:
        shown = ", ".join(map(brief, names[:30])) + ", …" * (len(names) > 30)
        raise DataError(f"{path}: has no column {brief(wanted)!r}; it has {shown}")
    return names.index(wanted)


def numbers(
    path: Path, text: Text, columns: Sequence[int], dtype: npt.DTypeLike = np.float32
) -> npt.NDArray[Any]:
    """[N, len(columns)] of the columns at these places, all finite in float32.

    :class:`DataError` with line, column and value where one is not.
    """
    try:
        frame = text.frame(columns, float)
    except ValueError:
        frame = text.frame(columns, str).apply(pd.to_numeric, errors="coerce")
    found = np.empty((len(text.lines), len(columns)), dtype)
    for place, column in enumerate(columns):
        values = frame[column].to_numpy(np.float64, na_value=np.nan)
        bad = np.flatnonzero(~(np.abs(values) <= np.finfo(np.float32).max))
        if len(bad):
            line, value = text.lines[bad[0]], str(text.frame([column], str)[column].iloc[bad[0]])
            more = f" ({len(bad):,} such rows in all)" if len(bad) > 1 else ""
            raise DataError(f"{path}, line {line}: column {brief(text.names[column])!r} {_told(value)}{more}")
        found[:, place] = values
    return found


def _told(value: str) -> str:
    """What is wrong with a cell."""
    if not value.strip():
        return "is empty: leave such rows out"
    if _NUMBER.fullmatch(value) or value.strip().lower().lstrip("+-") in ("nan", "inf", "infinity"):
        return f"holds {brief(value)}, which is no finite number of 32 bits: leave such rows out"
    return (
        f"holds '{brief(value)}', not a number: leave the column out, or name it with --label-column if it "
        "holds classes"
    )


def _check_names(path: Path, names: list[str]) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise DataError(f"{path}, line 1: the column {brief(name)!r} occurs twice: rename one")
        seen.add(name)
    counted = names == [str(number) for number in range(len(names))]  # as pandas names columns
    if not counted and all(_NUMBER.fullmatch(name) for name in names):
        raise DataError(
            f"{path}, line 1: holds numbers ({brief(', '.join(names), 60)}): put a header with the names of "
            "the columns before them"
        )


_Cut = tuple[list[str], "npt.NDArray[np.int64]", "npt.NDArray[np.int64]", Any]
"""(the header, line of each row, fields of each row, the rows: text of a line each, or lists of fields)."""


def _unquoted(data: bytes, separator: str) -> _Cut:
    if not data.endswith(b"\n"):
        data += b"\n"
    lines = np.arange(1, data.count(b"\n") + 1, dtype=np.int64)
    if data[:1] in b" \t\n" or re.search(rb"\n[ \t\n]", data):
        texts = data.split(b"\n")[:-1]
        kept = [number for number, line in enumerate(texts) if line.strip(b" \t")]
        data, lines = b"".join(texts[n] + b"\n" for n in kept), np.array(kept, np.int64) + 1
    head, _, body = data.partition(b"\n")
    bytes_of = np.frombuffer(body, np.uint8)
    ends = np.flatnonzero(bytes_of == ord("\n"))
    before = np.searchsorted(np.flatnonzero(bytes_of == ord(separator)), ends)
    counts = np.diff(before, prepend=0).astype(np.int64) + 1
    names = [name.strip() for name in head.decode().split(separator)] if head else []
    return names, lines[1:], counts, body


def _quoted(path: Path, data: bytes, separator: str) -> _Cut:
    rows, lines = [], []
    for line, row in _records(path, data, separator):
        if len(row) > 1 or any(field.strip() for field in row):
            rows.append(row)
            lines.append(line)
    counts = np.array([len(row) for row in rows[1:]], np.int64)
    head = [name.strip() for name in rows[0]] if rows else []
    return head, np.array(lines[1:], np.int64), counts, rows[1:]


def _records(path: Path, data: bytes, separator: str) -> Iterator[tuple[int, list[str]]]:
    reader = csv.reader(io.StringIO(data.decode(), newline="\n"), delimiter=separator, strict=True)
    start = 1
    try:
        for row in reader:
            yield start, row
            start = reader.line_num + 1
    except csv.Error as error:
        raise DataError(
            f"{path}, line {start}: the quotes do not match, or a field is too long ({brief(error)})"
        ) from error

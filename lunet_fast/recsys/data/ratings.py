"""Reading and validating rating files, and the one table of ratings that everything above works on.

A rating file becomes a :class:`Ratings`: three tensors (user index, item index, rating), the time where the
file has one, and two :class:`IdMap` that lead from the ids of the file to the indices and back.

Rules for ids, the same for CSV, TSV, Parquet and data frames:

* white space around a value is dropped;
* ids are 64-bit integers if **every** id of the column is written as a plain integer (``0``, ``42``, ``-7``);
  an id such as ``007``, ``+5``, ``5.0``, ``-0`` or one outside the 64-bit range makes all ids of that column
  strings, because ``007`` and ``7`` may be two different people;
* integer ids are sorted by value, strings by code point; the index of an id is its place in that order.

Files may come from anybody, so what reading one may take has bounds: a file is refused that is larger, or
unpacks to more, than :func:`max_bytes`, a sixteenth of the memory, or that unpacks to more than RATIO times
its own size.
"""

from __future__ import annotations

import calendar
import contextlib
import csv
import gzip
import io
import math
import os
import re
import stat
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from functools import cached_property
from mmap import mmap
from pathlib import Path
from typing import IO, Any, NoReturn

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch

from lunet_fast.recsys.data.parquet_sizes import stated_sizes

__all__ = ["IdMap", "RatingFileError", "Ratings", "check_sizes", "from_frame", "max_bytes", "read_ratings"]

Int64Array = npt.NDArray[np.int64]

LIMIT_VARIABLE = "LUNET_FAST_MAX_BYTES"
RATIO = 200
"""The most that a packed file may unpack to, as a multiple of its size. Ratings have 3 to 20, bombs 1000."""
RATIO_FREE_BYTES = 64 << 20
"""What any packed file may unpack to: small ones of many equal rows have higher ratios."""
MAX_FIELD = 131_072
"""Characters of an id, a rating or a time; also the limit of Python's csv module."""
_PARQUET_TEXTS = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view")
_UNKNOWN_MEMORY = 8 << 30
_BLOCK = 1 << 20

SEPARATORS = {".csv": ",", ".tsv": "\t", ".txt": "\t", ".inter": "\t", ".dat": "::"}
_INT64 = np.iinfo(np.int64)
_FLOAT32_MAX = float(np.finfo(np.float32).max)
_PLAIN_INTEGER = re.compile(r"0|-?[1-9][0-9]{0,18}")
# No digit can be matched by two parts of it: otherwise a long text that is no number took quadratic time.
_NUMBER = re.compile(r"[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[+-]?(?:nan|inf|infinity)", re.IGNORECASE)
_ISO_DATE = re.compile(
    r"([0-9]{4})-([0-9]{2})-([0-9]{2})"
    r"(?:[T ]([0-9]{2}):([0-9]{2})(?::([0-9]{2})(?:[.,][0-9]+)?)?\s*(Z|[+-][01][0-9]:?[0-5][0-9])?)?"
)
# Stands for a separator of several bytes ("::") while the C parser, which takes one byte, reads the file.
_ONE_BYTE_SEPARATOR = b"\x1f"
_HISTOGRAM_VALUES = 100
_HISTOGRAM_BINS = 10


class RatingFileError(ValueError):
    """A rating file that cannot be used; the message names the file, the line (from 1) and the value."""


class IdMap:
    """The ids of a data set, sorted, and the way from an id to its index.

    ``ids`` is int64 or an object array of ``str``; ``ids[index]`` gives ids back. ``IdMap(ids)`` takes ids
    that are sorted and unique already (as ``list(map.ids)`` is); :meth:`of` sorts. ValueError where they are
    not.
    """

    def __init__(self, ids: Sequence[int] | Sequence[str] | npt.NDArray[Any]) -> None:
        values = ids.tolist() if isinstance(ids, np.ndarray) else list(ids)
        if all(isinstance(v, (int, np.integer)) and not isinstance(v, bool) for v in values):
            self.ids: npt.NDArray[Any] = np.array(values, dtype=np.int64)
        elif all(isinstance(v, str) for v in values):
            self.ids = np.empty(len(values), dtype=object)
            self.ids[:] = values
        else:
            raise ValueError(
                "ids must be all integers or all strings; build a map of mixed ids with IdMap.of(ids)"
            )
        if len(values) > 1 and not bool(np.all(self.ids[1:] > self.ids[:-1])):
            raise ValueError("ids must be sorted and unique; build a map of other ids with IdMap.of(ids)")

    @classmethod
    def of(cls, values: Iterable[Any]) -> IdMap:
        """The map of all distinct ``values``: integers if every one is a plain integer, otherwise strings."""
        return _id_map(sorted({_id_text(v) for v in values}))[0]

    def __len__(self) -> int:
        return len(self.ids)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, IdMap):
            return NotImplemented
        return self.ids.dtype == other.ids.dtype and np.array_equal(self.ids, other.ids)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"IdMap({len(self)} {'integers' if self.is_integer else 'strings'})"

    @property
    def is_integer(self) -> bool:
        return self.ids.dtype != np.dtype(object)

    @cached_property
    def _table(self) -> Any:
        return pd.Index(self.ids, dtype=self.ids.dtype)

    def index(self, ids: Any) -> Int64Array:
        """Indices [N] (int64) of ``ids``, -1 for an id that is not in the map.

        ``ids`` is a sequence, array or tensor of integers or strings, or one of them. In a map of integers
        the string "42" is the id 42; a map of strings looks an integer up as ``str(id)``. Expected O(N).
        """
        if isinstance(ids, torch.Tensor):
            ids = ids.detach().cpu().numpy()
        elif isinstance(ids, (str, int, float, np.generic)):
            ids = [ids]
        is_array = isinstance(ids, (np.ndarray, pd.Series, pd.Index))
        values = np.asarray(ids).reshape(-1) if is_array else _as_array(list(ids))
        if values.dtype.kind == "i" and self.is_integer:
            return np.asarray(self._table.get_indexer(pd.Index(values.astype(np.int64))), dtype=np.int64)
        # Everything else goes by its distinct values: Python code runs once for each id, not for each row.
        codes, distinct = pd.factorize(values, use_na_sentinel=True)
        texts = [_id_text(v) for v in distinct.tolist()]
        found = np.full(len(texts) + 1, -1, dtype=np.int64)  # the last: missing values, code -1
        if self.is_integer:
            plain = [k for k, text in enumerate(texts) if _is_int64(text)]
            numbers = np.array([int(texts[k]) for k in plain], dtype=np.int64)
            found[plain] = self._table.get_indexer(pd.Index(numbers))
        elif texts:
            found[:-1] = self._table.get_indexer(pd.Index(texts, dtype=object))
        return found[codes]


@dataclass(frozen=True, eq=False, repr=False)
class Ratings:
    """N ratings of items by users.

    ``user`` and ``item`` are indices, int64 [N]; ``rating`` is float32 [N]; ``timestamp`` is int64 [N] in
    Unix seconds, 0 where unknown, or None where the source has no times. ``users`` and ``items`` map ids to
    indices. ``scale`` is the (lowest, highest) rating allowed. ``item_info`` (columns ``title`` and
    ``genres``, the latter separated by "|") and ``user_info`` are aligned to the indices, None where the
    source has none. ``source`` says where the rows were read.
    """

    name: str
    user: torch.Tensor
    item: torch.Tensor
    rating: torch.Tensor
    timestamp: torch.Tensor | None
    users: IdMap
    items: IdMap
    scale: tuple[float, float]
    item_info: pd.DataFrame | None = None
    user_info: pd.DataFrame | None = None
    source: str = ""

    def __post_init__(self) -> None:
        expected = [
            ("user", torch.int64),
            ("item", torch.int64),
            ("rating", torch.float32),
            ("timestamp", torch.int64),
        ]
        for field, dtype in expected:
            tensor = getattr(self, field)
            if tensor is None and field == "timestamp":
                continue
            if tensor.dtype != dtype or tensor.shape != (len(self),):
                raise ValueError(
                    f"{field} must be a {dtype} tensor of shape [{len(self)}], "
                    f"got {tensor.dtype} {list(tensor.shape)}"
                )
        for field, count in (("item_info", self.n_items), ("user_info", self.n_users)):
            info = getattr(self, field)
            if info is not None and len(info) != count:
                raise ValueError(f"{field} must have {count} rows, one for each index, got {len(info)}")

    def __len__(self) -> int:
        return self.user.shape[0]

    def __repr__(self) -> str:
        return f"Ratings({self.name}: {self.n_users} users, {self.n_items} items, {len(self)} ratings)"

    @property
    def n_users(self) -> int:
        return len(self.users)

    @property
    def n_items(self) -> int:
        return len(self.items)

    def select(self, index: torch.Tensor | npt.NDArray[Any] | Sequence[int]) -> Ratings:
        """The rows ``index`` (integers, or a boolean mask of length N) in that order; the id maps stay."""
        rows = torch.as_tensor(index, device=self.user.device)
        if rows.dtype != torch.bool:
            rows = rows.to(torch.int64)
        timestamp = None if self.timestamp is None else self.timestamp[rows]
        return replace(
            self, user=self.user[rows], item=self.item[rows], rating=self.rating[rows], timestamp=timestamp
        )

    def describe(self) -> dict[str, Any]:
        """Counts of the data set, as a dict of plain Python values.

        ``users``, ``items`` (sizes of the id maps), ``ratings``, ``density`` = ratings / (users * items),
        ``mean``, ``scale``, ``histogram`` (count by rating; by the lower edge of ten equal bins where there
        are more than 100 distinct ratings), ``first_timestamp`` and ``last_timestamp`` over the known times
        (None without any) and ``unknown_timestamps``.
        """
        values = self.rating.cpu().numpy().astype(np.float64)
        levels, counts = np.unique(values, return_counts=True)
        if len(levels) > _HISTOGRAM_VALUES:
            counts, edges = np.histogram(values, bins=_HISTOGRAM_BINS)
            levels = edges[:-1]
        known = None if self.timestamp is None else self.timestamp[self.timestamp != 0]
        has_times = known is not None and known.numel() > 0
        cells = self.n_users * self.n_items
        return {
            "name": self.name,
            "users": self.n_users,
            "items": self.n_items,
            "ratings": len(self),
            "density": len(self) / cells if cells else 0.0,
            "mean": float(values.mean()) if len(self) else None,
            "scale": self.scale,
            "histogram": dict(zip(levels.tolist(), counts.tolist(), strict=True)),
            "first_timestamp": int(known.min()) if known is not None and has_times else None,
            "last_timestamp": int(known.max()) if known is not None and has_times else None,
            "unknown_timestamps": len(self) - (0 if known is None else known.numel()),
        }


def read_ratings(
    path: str | os.PathLike[str],
    *,
    user: str = "user",
    item: str = "item",
    rating: str | None = "rating",
    timestamp: str | None = "timestamp",
    scale: tuple[float, float] | None = None,
    sep: str | None = None,
    users: IdMap | None = None,
    items: IdMap | None = None,
) -> Ratings:
    """Reads a file of ratings, one a row, and validates every value.

    The format follows the extension: ``.csv`` (comma), ``.tsv``, ``.txt``, ``.inter`` (tab), ``.dat``
    (``::``) or ``.parquet``, each also with ``.gz``; ``sep`` overrides the separator. Text files are UTF-8
    and start with a header line; a field may be quoted with ``"`` where the separator is one character. A
    header name of a ``.inter`` file loses its ``:type``. Blank lines are skipped.

    ``user``, ``item``, ``rating`` and ``timestamp`` name the columns; other columns are ignored, and the
    timestamp may be absent. Without ratings, ``rating=None``, each row is an interaction (a click, a
    purchase): its rating is 1, and of several rows of a pair the latest counts. A timestamp is a number of
    Unix seconds or an ISO date (``2020-01-31``, ``2020-01-31T12:30:00Z``; UTC unless it says otherwise),
    fractions of a second are cut off, and an empty one is 0, unknown. ``scale`` is the (lowest, highest)
    rating allowed; without it, the lowest and highest of the file. ``users`` and ``items`` index the ids by
    given maps instead of the file's own.

    Raises RatingFileError, naming the file, line and value: a missing column, text in a number, a rating that
    is not finite or outside the scale, an empty id, an id that a given map lacks, a (user, item) pair rated
    twice, a row with more or fewer fields than the header, no rows, text that is not UTF-8, a damaged file,
    an id of more than MAX_FIELD characters, a file larger than :func:`max_bytes` or unpacking to more than
    that or RATIO times its size.
    FileNotFoundError where there is no file; ValueError for a wrong argument.

    Takes O(n) time for n bytes, O(n log n) for sorting, and 12 to 20 bytes of memory for each; 40 for text
    that has quotes.
    """
    file = Path(path)
    _check_scale(scale)
    suffix = _format(file, sep)
    data = read_bytes(file)
    columns = _columns(user=user, item=item, rating=rating, timestamp=timestamp)
    if suffix == ".parquet":
        table = _read_parquet(file, data, columns)
    else:
        separator = SEPARATORS[suffix] if sep is None else sep
        table = _read_text(str(file), data, separator, columns, strip_types=suffix == ".inter")
    return _ratings(table, file.name, str(file), scale, users, items)


def from_frame(
    frame: pd.DataFrame,
    *,
    user: str = "user",
    item: str = "item",
    rating: str | None = "rating",
    timestamp: str | None = "timestamp",
    scale: tuple[float, float] | None = None,
    users: IdMap | None = None,
    items: IdMap | None = None,
    name: str = "ratings",
) -> Ratings:
    """The ratings in a data frame; arguments, rules and errors as :func:`read_ratings`, rows from 1."""
    _check_scale(scale)
    columns = _columns(user=user, item=item, rating=rating, timestamp=timestamp)
    return _ratings(_frame_table(name, frame, columns), name, "a data frame", scale, users, items)


def max_bytes() -> int:
    """The most bytes that a rating file may have, and unpack to.

    ``$LUNET_FAST_MAX_BYTES``, or a sixteenth of the memory of this machine or container, as reading takes 12
    to 20 bytes for each. ValueError where the variable is no whole number.
    """
    given = os.environ.get(LIMIT_VARIABLE, "").strip()
    if not given:
        return _memory() // 16
    if not (_PLAIN_INTEGER.fullmatch(given) and int(given) > 0):
        raise ValueError(f"${LIMIT_VARIABLE} must be a whole number of bytes, at least 1, got {given!r}")
    return int(given)


def read_bytes(file: Path) -> bytes:
    """What ``file`` holds, unpacked where its name ends in ``.gz``.

    RatingFileError, before more than the limit is in memory, where it is larger than :func:`max_bytes`,
    unpacks to more than that or to more than RATIO times its size, or is damaged; OSError as ``open``.
    """
    limit = max_bytes()
    with file.open("rb") as stream:
        about = os.fstat(stream.fileno())
        if stat.S_ISREG(about.st_mode) and about.st_size > limit:
            raise RatingFileError(f"{file}: has {about.st_size:,} bytes, {_too_many(limit)}")
        if file.suffix.lower() != ".gz":
            data = _within(stream, limit)
            if data is None:
                raise RatingFileError(f"{file}: has more bytes, {_too_many(limit)}")
            return data
        by_ratio = max(RATIO_FREE_BYTES, RATIO * about.st_size)
        try:
            with gzip.GzipFile(fileobj=stream, mode="rb") as unpacked:
                data = _within(unpacked, min(limit, by_ratio))
        except (OSError, EOFError, zlib.error) as error:
            raise RatingFileError(
                f"{file}: the gzip file is damaged or cut short ({cause(error)})"
            ) from error
    if data is not None:
        return data
    if by_ratio < limit:
        raise RatingFileError(
            f"{file}: its {about.st_size:,} bytes unpack to more than {by_ratio:,}, as no ratings do: if you "
            "trust it, unpack it (gunzip) and give the unpacked file"
        )
    raise RatingFileError(f"{file}: unpacks to more bytes, {_too_many(limit)}")


def parse_text(
    source: str,
    data: bytes,
    sep: str,
    *,
    name: str,
    scale: tuple[float, float],
    users: IdMap | None = None,
    items: IdMap | None = None,
) -> Ratings:
    """The ratings in text without header or quotes, whose columns are user, item, rating and timestamp.

    For the fixed formats of published data sets; ``source`` stands in messages. Raises as
    :func:`read_ratings`.
    """
    names = ["user", "item", "rating", "timestamp"]
    table = _read_text(source, data, sep, {role: role for role in names}, names=names, quoted=False)
    return _ratings(table, name, source, scale, users, items)


# ------------------------------------------------------------------------------------------------------------
# A file becomes a _Table: for each column, the distinct texts and, for each row, which of them it holds. All
# rules on values then run once for each distinct text, whatever the format, and only a failure looks at rows.


@dataclass(frozen=True)
class _Column:
    name: str
    codes: Int64Array  # [N], places in texts
    texts: list[str]  # without white space around them; distinct codes may share a text


@dataclass(frozen=True)
class _Table:
    source: str
    columns: dict[str, _Column]  # by role: "user", "item", "rating", "timestamp"
    places: Int64Array  # [N], the line (or row) of the source, from 1
    unit: str  # "line", or "row" for a format without lines

    def fail(self, role: str, bad: Sequence[int], problem: str) -> NoReturn:
        """Raises for the distinct texts ``bad`` and names the first row with one; {text} stands for it."""
        column = self.columns[role]
        rows = np.flatnonzero(np.isin(column.codes, np.asarray(bad, dtype=np.int64)))
        text = column.texts[int(column.codes[rows[0]])]
        label = role if role == column.name else f"{role} (column {column.name!r})"
        more = f" ({len(rows)} such {self.unit}s in all)" if len(rows) > 1 else ""
        shown = repr(text if len(text) <= 80 else text[:77] + "...")
        raise RatingFileError(
            f"{self.source}, {self.unit} {self.places[rows[0]]}: {label} "
            + problem.replace("{text}", shown)
            + more
        )


def _ratings(
    table: _Table,
    name: str,
    source: str,
    scale: tuple[float, float] | None,
    users: IdMap | None,
    items: IdMap | None,
) -> Ratings:
    user, users = _indices(table, "user", users)
    item, items = _indices(table, "item", items)
    rating = _rating_values(table, scale) if "rating" in table.columns else None
    timestamp = _timestamp_values(table) if "timestamp" in table.columns else None
    if rating is not None:
        _refuse_duplicates(table, user, item, users, items)
    else:
        latest = _latest_of_each_pair(user, item, timestamp)
        user, item = user[latest], item[latest]
        timestamp = None if timestamp is None else timestamp[latest]
        rating = np.ones(len(user), dtype=np.float32)
    bounds = (
        (float(rating.min()), float(rating.max())) if scale is None else (float(scale[0]), float(scale[1]))
    )
    return Ratings(
        name=name,
        user=torch.from_numpy(user),
        item=torch.from_numpy(item),
        rating=torch.from_numpy(rating),
        timestamp=None if timestamp is None else torch.from_numpy(timestamp),
        users=users,
        items=items,
        scale=bounds,
        source=source,
    )


def _columns(**columns: str | None) -> dict[str, str | None]:
    names = [name for name in columns.values() if name is not None]
    for role, name in columns.items():
        if name is not None and names.count(name) > 1:
            raise ValueError(
                f"user, item, rating and timestamp must be different columns, got {role}={name!r} twice"
            )
    return columns


def _check_scale(scale: tuple[float, float] | None) -> None:
    if scale is None:
        return
    ok = len(scale) == 2 and all(math.isfinite(bound) for bound in scale) and scale[0] < scale[1]
    if not ok:
        raise ValueError(f"scale must be (lowest, highest), two finite numbers in that order, got {scale!r}")


# ------------------------------------------------------------------------------------------------------------
# Values


def _is_int64(text: str) -> bool:
    return _PLAIN_INTEGER.fullmatch(text) is not None and _INT64.min <= int(text) <= _INT64.max


def _as_array(values: list[Any]) -> npt.NDArray[Any]:
    """int64 where every value is an integer that fits, otherwise the objects as they are."""
    if values and all(isinstance(v, (int, np.integer)) and not isinstance(v, bool) for v in values):
        with contextlib.suppress(OverflowError):
            return np.array(values, dtype=np.int64)
    array = np.empty(len(values), dtype=object)
    array[:] = values
    return array


def _id_text(value: Any) -> str:
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value).strip()


def _id_map(texts: Sequence[str]) -> tuple[IdMap, Int64Array]:
    """The map of ``texts`` and the index of each."""
    if all(_is_int64(text) for text in texts):
        ids, inverse = np.unique(np.array([int(text) for text in texts], dtype=np.int64), return_inverse=True)
        return IdMap(ids), inverse.astype(np.int64)
    strings = sorted(set(texts))
    place = {text: k for k, text in enumerate(strings)}
    return IdMap(strings), np.array([place[text] for text in texts], dtype=np.int64)


def _indices(table: _Table, role: str, given: IdMap | None) -> tuple[Int64Array, IdMap]:
    column = table.columns[role]
    empty = [k for k, text in enumerate(column.texts) if not text]
    if empty:
        table.fail(role, empty, "id is empty: give every row one")
    if given is None:
        ids, place = _id_map(column.texts)
    else:
        ids, place = given, given.index(column.texts)
        unseen = np.flatnonzero(place < 0).tolist()
        if unseen:
            table.fail(role, unseen, f"id {{text}} is not among the {len(given)} {role}s of the data set")
    return place[column.codes], ids


def _rating_values(table: _Table, scale: tuple[float, float] | None) -> npt.NDArray[np.float32]:
    column = table.columns["rating"]
    missing, text_in_number, not_finite, outside = (list[int]() for _ in range(4))
    values = np.zeros(len(column.texts), dtype=np.float64)
    for k, text in enumerate(column.texts):
        if _NUMBER.fullmatch(text):
            values[k] = float(text)
            if abs(values[k]) > _FLOAT32_MAX:
                not_finite.append(k)
            elif scale is not None and not scale[0] <= values[k] <= scale[1]:
                outside.append(k)
        elif _NOT_FINITE.fullmatch(text):
            not_finite.append(k)
        else:
            (text_in_number if text else missing).append(k)
    if missing:
        table.fail("rating", missing, "is missing: give every row a number")
    if text_in_number:
        table.fail("rating", text_in_number, "{text} is not a number")
    if not_finite:
        table.fail("rating", not_finite, "{text} is not a finite number (as float32)")
    if outside and scale is not None:
        table.fail("rating", outside, f"{{text}} is outside the scale {scale[0]:g} to {scale[1]:g}")
    return values.astype(np.float32)[column.codes]


def _timestamp_values(table: _Table) -> Int64Array:
    column = table.columns["timestamp"]
    values = np.zeros(len(column.texts), dtype=np.int64)
    bad = []
    for k, text in enumerate(column.texts):
        seconds = _unix_seconds(text)
        if seconds is None or not _INT64.min <= seconds <= _INT64.max:
            bad.append(k)
        else:
            values[k] = seconds
    if bad:
        table.fail(
            "timestamp", bad, "{text} is neither Unix seconds nor an ISO date such as 2020-01-31T12:30:00Z"
        )
    return values[column.codes]


def _unix_seconds(text: str) -> int | None:
    """Seconds since 1970, 0 for an empty text (unknown), None for one that is no time."""
    if not text:
        return 0
    if text.isascii() and text.isdigit() and len(text) < 20:  # the usual case, and exact beyond 2^53
        return int(text)
    if _PLAIN_INTEGER.fullmatch(text):
        return int(text)
    if _NUMBER.fullmatch(text):
        number = float(text)
        return math.floor(number) if math.isfinite(number) else None
    match = _ISO_DATE.fullmatch(text)
    if match is None:
        return None
    year, month, day, hour, minute, second, zone = match.groups()
    try:
        moment = datetime(int(year), int(month), int(day), int(hour or 0), int(minute or 0), int(second or 0))
        if zone not in (None, "Z"):
            shift = timedelta(hours=int(zone[1:3]), minutes=int(zone[-2:]))
            moment = moment + shift if zone[0] == "-" else moment - shift
    except (ValueError, OverflowError):
        return None
    return calendar.timegm(moment.timetuple())


def _latest_of_each_pair(user: Int64Array, item: Int64Array, timestamp: Int64Array | None) -> Int64Array:
    """Rows to keep, ascending: of the rows of a pair the one of the latest time, the last of equal ones."""
    time = np.zeros_like(user) if timestamp is None else timestamp
    order = np.lexsort((np.arange(len(user)), time, item, user))
    is_last = np.ones(len(user), dtype=bool)
    is_last[:-1] = (np.diff(user[order]) != 0) | (np.diff(item[order]) != 0)
    return np.sort(order[is_last])


def _refuse_duplicates(table: _Table, user: Int64Array, item: Int64Array, users: IdMap, items: IdMap) -> None:
    pair = user * max(len(items), 1) + item
    order = np.argsort(pair, kind="stable")
    repeated = np.flatnonzero(pair[order][1:] == pair[order][:-1])
    if not len(repeated):
        return
    # Stable: within a pair, rows keep the order of the file, so each repeated row stands behind its
    # predecessor.
    first = repeated[np.argmin(order[repeated + 1])]
    earlier, later = order[first], order[first + 1]
    more = f" ({len(repeated)} repeated pairs in all)" if len(repeated) > 1 else ""
    raise RatingFileError(
        f"{table.source}, {table.unit} {table.places[later]}: user {brief(users.ids[user[later]])} has rated "
        f"item {brief(items.ids[item[later]])} already in {table.unit} {table.places[earlier]}: keep one of "
        f"them{more}"
    )


# ------------------------------------------------------------------------------------------------------------
# Formats


def _format(file: Path, sep: str | None) -> str:
    suffixes = [suffix.lower() for suffix in file.suffixes]
    if suffixes and suffixes[-1] == ".gz":
        suffixes.pop()
    suffix = suffixes[-1] if suffixes else ""
    if sep is not None:
        if not isinstance(sep, str) or not sep or any(c in sep for c in '\n\r"\0') or not _is_utf8(sep):
            raise ValueError(
                f"sep must be a text without line ends and quotes, such as ',' or '\\t', got {sep!r}"
            )
        return suffix
    if suffix != ".parquet" and suffix not in SEPARATORS:
        known = ", ".join([*SEPARATORS, ".parquet"])
        raise RatingFileError(
            f"{file}: cannot tell the format from the extension {suffix!r}: rename it to one of {known} "
            "(.gz may follow), or pass sep="
        )
    return suffix


def _memory() -> int:
    """Bytes of memory that this process may come to use: the machine's, or less in a container."""
    found = []
    with contextlib.suppress(AttributeError, OSError, ValueError):  # Windows has no sysconf
        found.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for place in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):  # no cgroup, or "max"
            found.append(int(Path(place).read_text(encoding="ascii")))
    return min((size for size in found if size > 0), default=_UNKNOWN_MEMORY)


def _too_many(limit: int) -> str:
    return (
        f"more than the {limit:,} that are read on this machine: give it in parts or on a machine with more "
        f"memory, or set ${LIMIT_VARIABLE} to a larger number"
    )


def _within(stream: IO[bytes] | gzip.GzipFile, limit: int) -> bytes | None:
    """The rest of ``stream``, or None where it is more than ``limit`` bytes, of which no more is read."""
    kept = io.BytesIO()
    while block := stream.read(_BLOCK):
        if kept.tell() + len(block) > limit:
            return None
        kept.write(block)
    return kept.getvalue()


def cause(error: BaseException) -> str:
    """What an error of another library says, on one line, short, and safe for a terminal."""
    return brief(str(error) or type(error).__name__, 200)


def brief(value: object, most: int = 80) -> str:
    """``value`` for a message: control characters are written out, and what is too long is cut."""
    text = str(value)
    text = text if len(text) <= most else text[: most - 3] + "..."
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _read_text(
    source: str,
    data: bytes,
    sep: str,
    columns: Mapping[str, str | None],
    *,
    names: list[str] | None = None,
    quoted: bool = True,
    strip_types: bool = False,
) -> _Table:
    """Tokenises text; with ``names`` there is no header line."""
    data = _utf8(source, data)
    if b"\r" in data:
        data = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    if len(sep.encode()) > 1:
        if _ONE_BYTE_SEPARATOR in data:
            line = data.count(b"\n", 0, data.index(_ONE_BYTE_SEPARATOR)) + 1
            raise RatingFileError(f"{source}, line {line}: contains the control character 0x1f")
        data = data.replace(sep.encode(), _ONE_BYTE_SEPARATOR)
        separator, quoted = _ONE_BYTE_SEPARATOR.decode(), False
    else:
        separator = sep

    rows: list[list[str]] | None = None
    if quoted and b'"' in data:
        rows, places = _csv_rows(source, data.decode(), separator)
        n_rows, head = len(rows), rows[0] if rows else []
    else:
        data, places = _without_blank_lines(data)
        n_rows, head = len(places), data[: data.find(b"\n")].decode().split(separator)
    if n_rows == 0:
        raise RatingFileError(f"{source}: the file is empty")

    if names is None:
        names = [name.strip() for name in head]
        if strip_types:
            names = [name.split(":")[0] for name in names]
        used = _used_columns(source, names, columns, hint=_header_hint(names))
        if n_rows == 1:
            raise RatingFileError(f"{source}: there is a header, line {places[0]}, but no row after it")
        skip = 1
    else:
        used, skip = _used_columns(source, names, columns), 0

    shown = sep if sep.isprintable() and sep != " " else repr(sep)
    expected = f"{len(names)}, separated by {shown}"
    if rows is not None:
        counts = np.array([len(row) for row in rows], dtype=np.int64)
    else:
        counts = _field_counts(data, separator)
    ragged = np.flatnonzero(counts != len(names))
    if len(ragged):
        found_count = f"the number of fields is {counts[ragged[0]]}, expected {expected}"
        more = f" ({len(ragged)} such lines in all)" if len(ragged) > 1 else ""
        raise RatingFileError(f"{source}, line {places[ragged[0]]}: {found_count}{more}")

    if rows is not None:
        body = rows[skip:]
        found = {role: _factorise(names[k], [row[k] for row in body]) for role, k in used.items()}
    else:
        # The parser takes a byte order mark off its first field, even where that is not the file's first.
        frame = pd.read_csv(
            io.BytesIO(data if skip else b"\n" + data),
            skiprows=1,
            sep=separator,
            header=None,
            names=list(range(len(names))),
            usecols=sorted(set(used.values())),
            dtype=object,  # not "category", whose texts pandas may turn into numbers: "007" into 7
            na_filter=False,
            quoting=csv.QUOTE_NONE,
            skip_blank_lines=False,
            lineterminator="\n",
            low_memory=False,
        )
        found = {role: _factorise(names[k], frame[k]) for role, k in used.items()}
    return _not_too_long(_Table(source, found, places[skip:], "line"))


def _is_utf8(text: str) -> bool:
    return not any("\ud800" <= c <= "\udfff" for c in text)


def _utf8(source: str, data: bytes) -> bytes:
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise RatingFileError(
            f"{source}, line 1: the text is UTF-16 (byte order mark at byte 0): save it as UTF-8"
        )
    try:
        if not data.isascii():
            data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise RatingFileError(
            f"{source}, line {line}: the text is not UTF-8 (byte 0x{data[error.start]:02x} at offset "
            f"{error.start}): save it as UTF-8"
        ) from error
    zero = data.find(b"\0")
    if zero >= 0:
        line = data.count(b"\n", 0, zero) + 1
        raise RatingFileError(f"{source}, line {line}: a zero byte at offset {zero}: this is not a text file")
    return data.removeprefix(b"\xef\xbb\xbf")


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


def _field_counts(data: bytes, separator: str) -> Int64Array:
    buffer = np.frombuffer(data, dtype=np.uint8)
    ends = np.flatnonzero(buffer == ord("\n"))
    before = np.searchsorted(np.flatnonzero(buffer == ord(separator)), ends)
    return np.diff(before, prepend=0).astype(np.int64) + 1


def _csv_rows(source: str, text: str, separator: str) -> tuple[list[list[str]], Int64Array]:
    """All rows of text that has quotes, and the line that each starts on. Slower than the C parser."""
    reader = csv.reader(io.StringIO(text, newline="\n"), delimiter=separator, strict=True)
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
    return rows, np.array(places, dtype=np.int64)


def _used_columns(
    source: str, names: Sequence[str], columns: Mapping[str, str | None], hint: str = ""
) -> dict[str, int]:
    """The place of each role's column; a timestamp may be absent."""
    used = {}
    for role, name in columns.items():
        if name is not None and names.count(name) == 1:
            used[role] = list(names).index(name)
        elif name is not None and names.count(name) > 1:
            raise RatingFileError(
                f"{source}, line 1: the column {name!r} ({role}) occurs {names.count(name)} times"
            )
        elif role != "timestamp" and not (role == "rating" and name is None):
            listed = ", ".join(repr(n if len(n) <= 40 else n[:37] + "...") for n in names[:30])
            also = (
                " (interactions without ratings are read with rating=None, --gamma 0 on the command line)"
                if role == "rating"
                else ""
            )
            raise RatingFileError(
                f"{source}, line 1: there is no column {name!r} for the {role}{also}; the columns are "
                f"{listed}: name the right one with {role}=..., on the command line --{role}-column{hint}"
            )
    return used


def _header_hint(names: Sequence[str]) -> str:
    if len(names) == 1 and (other := [s for s in (",", "\t", ";", "|", "::") if s in names[0]]):
        return f"; the separator may be another one: sep={other[-1]!r}"
    if all(_NUMBER.fullmatch(name) for name in names):
        return "; the first line holds numbers: put a header such as user,item,rating,timestamp before it"
    return ""


def _factorise(name: str, values: pd.Series | list[str]) -> _Column:
    codes, distinct = pd.factorize(values if isinstance(values, pd.Series) else _as_array(values))
    texts = [v.decode("utf-8") if isinstance(v, bytes) else str(v) for v in distinct]
    texts = [text.strip() for text in texts]
    missing = codes < 0  # in a frame, where pandas gives them no code
    if missing.any():
        codes = np.where(missing, len(texts), codes)
        texts.append("")
    return _Column(name, codes.astype(np.int64), texts)


def _not_too_long(table: _Table) -> _Table:
    for role, column in table.columns.items():
        long = [k for k, text in enumerate(column.texts) if len(text) > MAX_FIELD]
        if long:
            table.fail(role, long, f"{{text}} has more than {MAX_FIELD:,} characters: give it a shorter one")
    return table


def _read_parquet(file: Path, data: bytes, columns: Mapping[str, str | None]) -> _Table:
    if not data:
        raise RatingFileError(f"{file}: the file is empty")
    try:
        from pyarrow import parquet  # type: ignore[import-untyped,unused-ignore]
    except ImportError as error:
        raise ImportError(f"{file}: reading Parquet needs pyarrow: pip install pyarrow") from error
    try:
        schema = parquet.read_schema(io.BytesIO(data))
        names = [str(name) for name in schema.names]
    except Exception as error:  # pyarrow reports damage by errors of a dozen types
        raise RatingFileError(f"{file}: the Parquet file is damaged or cut short ({cause(error)})") from error
    used = _used_columns(str(file), names, columns)
    for role, k in used.items():
        if schema.field(k).type.num_fields:
            raise RatingFileError(
                f"{file}: the {role} column {names[k]!r} is of type {brief(schema.field(k).type)}: store a "
                "number, a string or a time"
            )
    rows = check_sizes(file, data, list(used.values()))
    wanted = [names[k] for k in used.values()]
    # Texts as a dictionary: a page can name one of a megabyte a million times.
    texts = [names[k] for k in used.values() if str(schema.field(k).type) in _PARQUET_TEXTS]
    try:
        content = parquet.ParquetFile(io.BytesIO(data), read_dictionary=texts)
        frame = content.read(columns=wanted).to_pandas(ignore_metadata=True)
    except Exception as error:
        raise RatingFileError(
            f"{file}: the Parquet file is damaged or cut short, or has a value that cannot be read "
            f"({cause(error)})"
        ) from error
    if len(frame) != rows:
        raise RatingFileError(
            f"{file}: the Parquet file is damaged: it states {rows:,} rows and holds {len(frame):,}"
        )
    return _frame_table(str(file), frame, columns)


def check_sizes(file: Path, data: bytes | mmap, columns: Sequence[int], *, streamed: bool = False) -> int:
    """The rows that a Parquet file states; RatingFileError where they, or the bytes of ``columns``, are more
    than is read. Of a ``streamed`` file only the largest page has to fit, but no more than RATIO times its
    size may come of it either."""
    try:
        rows, values, unpacked, page = stated_sizes(data, columns)
    except ValueError as error:
        raise RatingFileError(f"{file}: the Parquet file is damaged or cut short ({error})") from error
    stated = max(8 * values, unpacked)
    limit, by_ratio = max_bytes(), max(RATIO_FREE_BYTES, RATIO * len(data))
    if streamed and page > limit:
        raise RatingFileError(f"{file}: one of its pages is {page:,} bytes, {_too_many(limit)}")
    if stated > limit and not streamed:
        raise RatingFileError(f"{file}: its {rows:,} rows are {stated:,} bytes, {_too_many(limit)}")
    if stated > by_ratio:
        raise RatingFileError(
            f"{file}: its {len(data):,} bytes state {rows:,} rows of {stated:,} bytes, as no ratings do: if "
            "you trust it, write it anew without compression and dictionary"
        )
    return rows


def _frame_table(source: str, frame: pd.DataFrame, columns: Mapping[str, str | None]) -> _Table:
    used = _used_columns(source, [str(name) for name in frame.columns], columns)
    if not len(frame):
        raise RatingFileError(f"{source}: there is no row")
    found = {}
    for role, k in used.items():
        series = frame.iloc[:, k]
        if role in ("user", "item") and pd.api.types.is_float_dtype(series.dtype):
            empty = np.flatnonzero(series.isna().to_numpy())
            if len(empty):
                raise RatingFileError(f"{source}, row {empty[0] + 1}: {role} id is empty: give every row one")
            raise RatingFileError(
                f"{source}: the {role} ids are floating-point numbers (row 1: {series.iloc[0]}): store them "
                "as integers or strings"
            )
        try:
            found[role] = _factorise(str(frame.columns[k]), series)
        except UnicodeDecodeError as error:
            row = series.tolist().index(error.object) + 1
            raise RatingFileError(
                f"{source}, row {row}: {role} {brief(error.object)} is not UTF-8: store it as a string"
            ) from error
        except Exception as error:  # of pandas, by the type: a time that no datetime can hold, a list
            raise RatingFileError(
                f"{source}: the {role} column {frame.columns[k]!r} has values of type {series.dtype} that "
                f"cannot be read ({cause(error)})"
            ) from error
    return _not_too_long(_Table(source, found, np.arange(1, len(frame) + 1, dtype=np.int64), "row"))

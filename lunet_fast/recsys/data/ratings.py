"""The one table of ratings that everything above works on, and how a file or a data frame becomes it.

A rating file becomes a :class:`Ratings`: three tensors (user index, item index, rating), the time where the
file has one, and two :class:`IdMap` that lead from the ids of the file to the indices and back. The rules for
ids are in :mod:`~.ids`, the bounds on what reading may take in :mod:`~.limits`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch

from lunet_fast.recsys.data.errors import RatingFileError
from lunet_fast.recsys.data.ids import IdMap, TwoIdMaps
from lunet_fast.recsys.data.json_table import read_json_rows
from lunet_fast.recsys.data.limits import read_bytes
from lunet_fast.recsys.data.parquet_table import read_parquet
from lunet_fast.recsys.data.table import Table, by_role, frame_table
from lunet_fast.recsys.data.text_table import BLANKS, read_text, sniffed
from lunet_fast.recsys.data.values import (
    indices,
    latest_of_each_pair,
    of_each_pair,
    rating_values,
    refuse_duplicates,
    timestamp_values,
    weight_values,
)
from lunet_fast.recsys.data.zipped import table_in

__all__ = [
    "IdMap",
    "RatingFileError",
    "Ratings",
    "Ties",
    "from_frame",
    "parse_text",
    "read_ratings",
    "read_table",
]

SEPARATORS = {".csv": ",", ".tsv": "\t", ".txt": "\t", ".inter": "\t", ".dat": "::"}
JSON = (".json", ".jsonl", ".ndjson")
SPREADSHEETS = (".xlsx", ".xls", ".ods")
SEPARATOR_NAMES = {
    "tab": "\t",
    "\\t": "\t",
    "comma": ",",
    "semicolon": ";",
    "pipe": "|",
    "colons": "::",
    BLANKS: BLANKS,
    " ": BLANKS,
}
"""Separators that are hard to type, by name."""
DUPLICATES = ("error", "latest", "mean", "max")
_HISTOGRAM_VALUES = 100
_HISTOGRAM_BINS = 10


@dataclass(frozen=True, eq=False)
class Ties:
    """E directed ties between users: ``user`` knows or trusts ``friend``, indices int64 [E], with ``weight``
    above 0, float32 [E]."""

    user: torch.Tensor
    friend: torch.Tensor
    weight: torch.Tensor


@dataclass(frozen=True, eq=False, repr=False)
class Ratings(TwoIdMaps):
    """N ratings of items by users.

    ``user`` and ``item`` are indices, int64 [N]; ``rating`` is float32 [N]; ``timestamp`` is int64 [N] in
    Unix seconds, 0 where unknown, or None where the source has no times. ``users`` and ``items`` map ids to
    indices. ``scale`` is the (lowest, highest) rating allowed. ``item_info`` (columns ``title`` and
    ``genres``, the latter separated by "|") and ``user_info`` are aligned to the indices, None where the
    source has none. ``source`` says where the rows were read. ``position``, int64 [N], is a row's place among
    the user's ratings in order of time, equal for those of one second, from sources that know it of rows of
    unknown time; else None. ``weight``, float32 [N] above 0, is how often a row's choice was made (plays,
    clicks). ``item_text``, float32 [n_items, T], is what items are described by
    (:func:`~.texts.with_text`), ``friends`` the ties between users (:func:`~.ties.with_friends`).
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
    position: torch.Tensor | None = None
    weight: torch.Tensor | None = None
    item_text: torch.Tensor | None = None
    friends: Ties | None = None
    reading: dict[str, Any] | None = None
    """The arguments of :func:`read_ratings` that read these from their file again, ``scale`` aside; None for
    other sources."""
    notes: tuple[str, ...] = ()
    """How the file was taken to be meant where nobody said, for people."""

    def __post_init__(self) -> None:
        expected = [
            ("user", torch.int64),
            ("item", torch.int64),
            ("rating", torch.float32),
            ("timestamp", torch.int64),
            ("position", torch.int64),
            ("weight", torch.float32),
        ]
        for field, dtype in expected:
            tensor = getattr(self, field)
            if tensor is None and field in ("timestamp", "position", "weight"):
                continue
            if tensor.dtype != dtype or tensor.shape != (len(self),):
                raise ValueError(
                    f"{field} must be a {dtype} tensor of shape [{len(self)}], "
                    f"got {tensor.dtype} {list(tensor.shape)}"
                )
        rows = (("item_info", self.n_items), ("user_info", self.n_users), ("item_text", self.n_items))
        for field, count in rows:
            info = getattr(self, field)
            if info is not None and len(info) != count:
                raise ValueError(f"{field} must have {count} rows, one for each index, got {len(info)}")

    def __len__(self) -> int:
        return self.user.shape[0]

    def __repr__(self) -> str:
        return f"Ratings({self.name}: {self.n_users} users, {self.n_items} items, {len(self)} ratings)"

    def select(self, index: torch.Tensor | npt.NDArray[Any] | Sequence[int]) -> Ratings:
        """The rows ``index`` (integers, or a boolean mask of length N) in that order; the id maps stay."""
        rows = torch.as_tensor(index, device=self.user.device)
        if rows.dtype != torch.bool:
            rows = rows.to(torch.int64)
        return replace(
            self,
            user=self.user[rows],
            item=self.item[rows],
            rating=self.rating[rows],
            timestamp=None if self.timestamp is None else self.timestamp[rows],
            position=None if self.position is None else self.position[rows],
            weight=None if self.weight is None else self.weight[rows],
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
    weight: str | None = None,
    scale: tuple[float, float] | None = None,
    sep: str | None = None,
    header: bool = True,
    duplicates: str = "error",
    users: IdMap | None = None,
    items: IdMap | None = None,
) -> Ratings:
    """Reads a file of ratings, one a row, and validates every value.

    The format follows the extension: ``.csv`` (comma), ``.tsv``, ``.txt``, ``.inter`` (tab), ``.dat``
    (``::``), ``.json``, ``.jsonl``, ``.ndjson`` (an object a line) or ``.parquet``, each also with ``.gz``,
    or in a ``.zip`` of one table. Where the first line has no such separator, or the extension is another,
    the one that cuts the first rows evenly is taken. ``sep`` is the separator, or its name (SEPARATOR_NAMES).
    Text files are UTF-8 and start with a header line, unless ``header`` is false: then columns are named by
    their numbers from 1, and are users, items, ratings and times in this order. A field may be quoted with
    ``"`` where the separator is one character. A header name of a ``.inter`` file loses its ``:type``. Blank
    lines are skipped.

    ``user``, ``item``, ``rating``, ``timestamp`` and ``weight`` name the columns; by default they are those
    that are usually called so (:data:`~.headers.USUAL`), and no weight. Other columns are ignored, and the
    timestamp may be absent. A weight is a number above 0.
    Without ratings, ``rating=None``, each row is an interaction (a click, a purchase): its rating is 1, and
    of several rows of a pair the latest counts. Ratings may have decimal commas, or all be true and false. A
    timestamp is a number of Unix seconds (or milli-, micro-, nanoseconds) or an ISO date (``2020-01-31``,
    ``2020-01-31T12:30:00Z``; UTC unless it says otherwise), fractions of a second are cut off, and an empty
    one is 0, unknown. ``duplicates``: of several ratings of a pair, ``error`` refuses them, ``latest`` takes
    the latest (the last of equal times), ``mean`` and ``max`` what they say, with the latest time. ``scale``
    is the (lowest, highest) rating allowed; without it, the lowest and highest of the file. ``users`` and
    ``items`` index the ids by given maps instead of the file's own. What was recognised stands in ``notes``
    of the result, and the arguments that read the file the same again in ``reading``.

    Raises RatingFileError, naming the file, line and value: a missing column, text in a number, a rating that
    is not finite or outside the scale, an empty id, an id that a given map lacks, a (user, item) pair rated
    twice, a row with more or fewer fields than the header, no rows, text that is not UTF-8, a damaged file,
    an id of more than MAX_FIELD characters, a file larger than
    :func:`~lunet_fast.training.outside.max_bytes` or unpacking to more than that or RATIO times its size.
    FileNotFoundError where there is no file; ValueError for a wrong argument.

    Takes O(n) time for n bytes, O(n log n) for sorting, and 12 to 20 bytes of memory for each; 40 for text
    that has quotes.
    """
    file = Path(path)
    _check_scale(scale)
    columns: dict[str, Any] = {"user": user, "item": item, "rating": rating, "timestamp": timestamp}
    columns["weight"] = weight
    table = read_table(file, sep, header=header, **columns)
    ratings = _ratings(table, file.name, str(file), scale, users, items, duplicates)
    columns |= {role: column.name for role, column in table.columns.items()}
    reading = {**columns, "sep": sep, "header": header, "duplicates": duplicates}
    return replace(ratings, reading=reading)


def from_frame(
    frame: pd.DataFrame,
    *,
    user: str = "user",
    item: str = "item",
    rating: str | None = "rating",
    timestamp: str | None = "timestamp",
    weight: str | None = None,
    scale: tuple[float, float] | None = None,
    duplicates: str = "error",
    users: IdMap | None = None,
    items: IdMap | None = None,
    name: str = "ratings",
) -> Ratings:
    """The ratings in a data frame; arguments, rules and errors as :func:`read_ratings`, rows from 1."""
    _check_scale(scale)
    columns = by_role(user=user, item=item, rating=rating, timestamp=timestamp, weight=weight)
    return _ratings(frame_table(name, frame, columns), name, "a data frame", scale, users, items, duplicates)


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
    table = read_text(source, data, sep, {role: role for role in names}, names=names, quoted=False)
    return _ratings(table, name, source, scale, users, items, "error")


def read_table(file: Path, sep: str | None = None, *, header: bool = True, **columns: str | None) -> Table:
    """The columns of a file, named by role as in :func:`read_ratings`, whose formats and errors it has.

    What the texts mean is not looked at: an id may be empty, a rating any text, a pair there twice.
    """
    sep = SEPARATOR_NAMES.get(sep, sep) if isinstance(sep, str) else sep
    _check_separator(sep)
    names = by_role(**columns)
    data, notes, inner = read_bytes(file), [], file
    if _suffix(file) == ".zip":
        name, data = table_in(file, data)
        notes.append(f"{file}: read {name} in the zip")
        inner = Path(name)
    suffix = _suffix(inner)
    if suffix == ".parquet":
        table = read_parquet(file, data, names)
    elif suffix in JSON:
        table = read_json_rows(str(file), data, names)
    else:
        usual = SEPARATORS.get(suffix)
        separator = _separator(file, suffix, data, usual) if sep is None else sep
        if sep is None and separator != usual:
            notes.append(f"{file}: columns are separated by {_SHOWN.get(separator, separator)}")
        table = read_text(str(file), data, separator, names, header=header, strip_types=suffix == ".inter")
    read_as = [f"{role} {c.name!r}" for role, c in table.columns.items() if c.name != names[role]]
    if read_as:
        kind = "columns" if header else "columns by number"
        notes.append(f"{file}: read as {kind} {', '.join(read_as)}")
    table.notes.extend(notes)
    return table


def _ratings(
    table: Table,
    name: str,
    source: str,
    scale: tuple[float, float] | None,
    users: IdMap | None,
    items: IdMap | None,
    duplicates: str,
) -> Ratings:
    if duplicates not in DUPLICATES:
        raise ValueError(f"duplicates={duplicates!r} is unknown: choose one of {', '.join(DUPLICATES)}")
    user, users = indices(table, "user", users)
    item, items = indices(table, "item", items)
    rating = rating_values(table, scale) if "rating" in table.columns else None
    timestamp = timestamp_values(table) if "timestamp" in table.columns else None
    weight = weight_values(table) if "weight" in table.columns else None
    if rating is not None and duplicates == "error":
        refuse_duplicates(table, user, item, users, items)
    else:
        latest = latest_of_each_pair(user, item, timestamp)
        if rating is None:
            rating = np.ones(len(latest), dtype=np.float32)
        else:
            if len(latest) < len(rating):
                repeated = len(rating) - len(latest)
                table.notes.append(f"{source}: {repeated:,} repeated pairs: the {duplicates} of each")
            rating = of_each_pair(user, item, rating, latest, duplicates)
        user, item = user[latest], item[latest]
        timestamp = None if timestamp is None else timestamp[latest]
        weight = None if weight is None else weight[latest]
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
        notes=tuple(table.notes),
        weight=None if weight is None else torch.from_numpy(weight),
    )


def _check_scale(scale: tuple[float, float] | None) -> None:
    if scale is None:
        return
    ok = len(scale) == 2 and all(math.isfinite(bound) for bound in scale) and scale[0] < scale[1]
    if not ok:
        raise ValueError(f"scale must be (lowest, highest), two finite numbers in that order, got {scale!r}")


_SHOWN = {"\t": "tabs", BLANKS: "blanks"}


def _suffix(file: Path) -> str:
    """The extension that tells the format."""
    suffixes = [suffix.lower() for suffix in file.suffixes]
    if suffixes and suffixes[-1] == ".gz":
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def _check_separator(sep: str | None) -> None:
    if sep is None:
        return
    if not isinstance(sep, str) or not sep or any(c in sep for c in '\n\r"\0') or not _is_utf8(sep):
        raise ValueError(
            f"sep must be a text without line ends and quotes, such as ',' or '\\t', or one of "
            f"{', '.join(name for name in SEPARATOR_NAMES if name.isalpha())}, got {sep!r}"
        )


def _separator(file: Path, suffix: str, data: bytes, usual: str | None) -> str:
    """The separator of a text; RatingFileError where neither extension nor rows tell it."""
    found = None if usual is None and b"\0" in data else sniffed(data, usual)
    if found is None and suffix in SPREADSHEETS:
        raise RatingFileError(f"{file}: spreadsheets are not read: save the sheet as .csv")
    if found is None:
        known = ", ".join([*SEPARATORS, *JSON, ".parquet", ".zip"])
        raise RatingFileError(
            f"{file}: cannot tell the format from the extension {suffix!r}: rename it to one of {known} "
            "(.gz may follow), or name the separator: sep=TEXT"
        )
    return found


def _is_utf8(text: str) -> bool:
    return not any("\ud800" <= c <= "\udfff" for c in text)

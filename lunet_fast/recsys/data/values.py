"""What the texts of a table mean: indices of ids, ratings, times; and no pair twice.

Written by hand, as every rule has to say which value of which line breaks it, and ``to_numeric`` and
``to_datetime`` of pandas take more than is meant ("1_0", "0x10", "now") or fail without the value.
"""

from __future__ import annotations

import calendar
import math
import re
from datetime import datetime, timedelta

import numpy as np
import numpy.typing as npt

from lunet_fast.recsys.data.errors import RatingFileError, brief
from lunet_fast.recsys.data.ids import INT64, PLAIN_INTEGER, IdMap, Int64Array, id_map
from lunet_fast.recsys.data.table import Table

_FLOAT32_MAX = float(np.finfo(np.float32).max)
# No digit can be matched by two parts of it: otherwise a long text that is no number took quadratic time.
NUMBER = re.compile(r"[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
_DECIMAL_COMMA = re.compile(r"[+-]?[0-9]+,[0-9]+")
_THOUSANDS = re.compile(r"[+-]?[1-9][0-9]{0,2},[0-9]{3}")
_BOOLEANS = {"true": "1", "false": "0"}
_PLAUSIBLE = (500_000_000, 4_200_000_000)
"""Seconds of 1985 and 2103: times that all lie between them in a finer unit are in that unit."""
_NOT_FINITE = re.compile(r"[+-]?(?:nan|inf|infinity)", re.IGNORECASE)
_ISO_DATE = re.compile(
    r"([0-9]{4})-([0-9]{2})-([0-9]{2})"
    r"(?:[T ]([0-9]{2}):([0-9]{2})(?::([0-9]{2})(?:[.,][0-9]+)?)?\s*(Z|[+-][01][0-9]:?[0-5][0-9])?)?"
)


def indices(table: Table, role: str, given: IdMap | None) -> tuple[Int64Array, IdMap]:
    """The index of each row's id, int64 ``[N]``, and the map: ``given``, or the column's own."""
    table.refuse_empty(role)
    column = table.columns[role]
    if given is None:
        ids, place = id_map(column.texts)
    else:
        ids, place = given, given.index(column.texts)
        unseen = np.flatnonzero(place < 0).tolist()
        if unseen:
            table.fail(role, unseen, f"id {{text}} is not among the {len(given)} {role}s of the data set")
    return place[column.codes], ids


def weight_values(table: Table) -> npt.NDArray[np.float32]:
    """The weights, float32 ``[N]``: finite numbers above 0."""
    values = _numbers(table, "weight", None)
    column = table.columns["weight"]
    low = [k for k in range(len(column.texts)) if not values[k] > 0]
    if low:
        table.fail("weight", low, "{text} is not above 0: leave out rows that do not count")
    return values[column.codes]


def rating_values(table: Table, scale: tuple[float, float] | None) -> npt.NDArray[np.float32]:
    """The ratings, float32 ``[N]``: finite numbers, within ``scale`` where it is given."""
    return _numbers(table, "rating", scale)[table.columns["rating"].codes]


def _numbers(table: Table, role: str, scale: tuple[float, float] | None) -> npt.NDArray[np.float32]:
    """The finite numbers of a column's distinct texts."""
    texts = _numbers_as_written(table, role)
    missing, text_in_number, not_finite, outside = (list[int]() for _ in range(4))
    values = np.zeros(len(texts), dtype=np.float64)
    for k, text in enumerate(texts):
        if NUMBER.fullmatch(text):
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
        table.fail(role, missing, "is missing: give every row a number")
    if text_in_number:
        table.fail(role, text_in_number, "{text} is not a number")
    if not_finite:
        table.fail(role, not_finite, "{text} is not a finite number (as float32)")
    if outside and scale is not None:
        table.fail(role, outside, f"{{text}} is outside the scale {scale[0]:g} to {scale[1]:g}")
    return values.astype(np.float32)


def _numbers_as_written(table: Table, role: str) -> list[str]:
    """The texts of a column with decimal points for commas, and 0 and 1 where all are false and true."""
    texts = table.columns[role].texts
    if texts and all(text.lower() in _BOOLEANS for text in texts):
        table.notes.append(f"{table.source}: {role}s are true and false, read as 1 and 0")
        return [_BOOLEANS[text.lower()] for text in texts]
    commas = [text for text in texts if _DECIMAL_COMMA.fullmatch(text)]
    if not commas or any("." in text for text in texts):
        return texts
    if all(_THOUSANDS.fullmatch(text) for text in commas):
        bad = [k for k, text in enumerate(texts) if text in commas]
        table.fail(role, bad, "{text} has a comma for decimals or thousands: write it without")
    table.notes.append(f"{table.source}: {role}s have decimal commas")
    return [text.replace(",", ".") if _DECIMAL_COMMA.fullmatch(text) else text for text in texts]


def timestamp_values(table: Table) -> Int64Array:
    """Unix seconds, int64 ``[N]``, 0 where the text is empty."""
    column = table.columns["timestamp"]
    values = np.zeros(len(column.texts), dtype=np.int64)
    bad = []
    for k, text in enumerate(column.texts):
        seconds = _unix_seconds(text)
        if seconds is None or not INT64.min <= seconds <= INT64.max:
            bad.append(k)
        else:
            values[k] = seconds
    if bad:
        table.fail(
            "timestamp",
            bad,
            "{text} is neither Unix seconds nor an ISO date such as 2020-01-31T12:30:00Z: convert it, or "
            "read no times: timestamp=None",
        )
    numbers = np.array([bool(PLAIN_INTEGER.fullmatch(text)) for text in column.texts], dtype=bool)
    known = values != 0
    if known.any() and bool(numbers[known].all()):
        for unit, parts in (("milli", 10**3), ("micro", 10**6), ("nano", 10**9)):
            low, high = (plausible * parts for plausible in _PLAUSIBLE)
            if low <= values[known].min() and values[known].max() < high:
                table.notes.append(f"{table.source}: times are in {unit}seconds")
                values //= parts
    return values[column.codes]


def _unix_seconds(text: str) -> int | None:
    """Seconds since 1970, 0 for an empty text (unknown), None for one that is no time."""
    if not text:
        return 0
    if text.isascii() and text.isdigit() and len(text) < 20:  # the usual case, and exact beyond 2^53
        return int(text)
    if PLAIN_INTEGER.fullmatch(text):
        return int(text)
    if NUMBER.fullmatch(text):
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


def latest_of_each_pair(user: Int64Array, item: Int64Array, timestamp: Int64Array | None) -> Int64Array:
    """Rows to keep, ascending: of the rows of a pair the one of the latest time, the last of equal ones."""
    time = np.zeros_like(user) if timestamp is None else timestamp
    order = np.lexsort((np.arange(len(user)), time, item, user))
    is_last = np.ones(len(user), dtype=bool)
    is_last[:-1] = (np.diff(user[order]) != 0) | (np.diff(item[order]) != 0)
    return np.sort(order[is_last])


def of_each_pair(
    user: Int64Array, item: Int64Array, rating: npt.NDArray[np.float32], latest: Int64Array, how: str
) -> npt.NDArray[np.float32]:
    """One rating for each row of ``latest``: its own, or ``mean`` or ``max`` over all rows of its pair."""
    if how == "latest":
        return rating[latest]
    order = np.lexsort((item, user))
    starts = np.flatnonzero(np.r_[True, (np.diff(user[order]) != 0) | (np.diff(item[order]) != 0)])
    if how == "max":
        found = np.maximum.reduceat(rating[order], starts)
    else:
        sums = np.add.reduceat(rating[order].astype(np.float64), starts)
        found = (sums / np.diff(np.r_[starts, len(order)])).astype(np.float32)
    # The pairs ascend here, and stand in the order of the file there.
    place = np.empty(len(latest), dtype=np.int64)
    place[np.lexsort((item[latest], user[latest]))] = np.arange(len(latest))
    result: npt.NDArray[np.float32] = found[place]
    return result


def refuse_duplicates(table: Table, user: Int64Array, item: Int64Array, users: IdMap, items: IdMap) -> None:
    """RatingFileError for the first row whose pair is rated in an earlier one."""
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
        f"them, or say what counts: duplicates='latest', 'mean' or 'max'{more}"
    )

"""Rows of JSON as a table: an object a line, or one list of objects."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from lunet_fast.recsys.data.errors import RatingFileError, cause
from lunet_fast.recsys.data.table import Column, Table, used_columns
from lunet_fast.training.outside import utf8


def read_json_rows(source: str, data: bytes, columns: Mapping[str, str | None]) -> Table:
    """The columns of JSON lines, or of a list of objects. A missing key and null are an empty text.

    ``RatingFileError``, which names the line (of a list the row), for what is no JSON object, and for a
    column of lists or objects.
    """
    text = utf8(source, data, RatingFileError).decode("utf-8")
    if text.lstrip()[:1] == "[":
        unit, numbered = "row", list(enumerate(_parsed(source, "line 1", text), start=1))
    else:
        unit = "line"
        lines = ((n, line) for n, line in enumerate(text.split("\n"), start=1) if line.strip())
        numbered = [(n, _parsed(source, f"line {n}", line)) for n, line in lines]
    if not numbered:
        raise RatingFileError(f"{source}: the file is empty")
    for n, row in numbered:
        if not isinstance(row, dict):
            raise RatingFileError(f'{source}, {unit} {n}: is no JSON object such as {{"user": 1, ...}}')
    names = list(dict.fromkeys(name for _, row in numbered for name in row))
    used = used_columns(source, names, columns)
    found = {}
    for role, k in used.items():
        values = []
        for n, row in numbered:
            value = row.get(names[k])
            if isinstance(value, (dict, list)):
                kind = type(value).__name__
                raise RatingFileError(f"{source}, {unit} {n}: {role} is a {kind}, no single value")
            values.append(_text(value))
        found[role] = Column.of(names[k], values)
    return Table(source, found, np.array([n for n, _ in numbered], dtype=np.int64), unit)


def _parsed(source: str, place: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RatingFileError(f"{source}, {place}: is not JSON ({cause(error)})") from error


def _text(value: Any) -> str:
    if value is None:
        return ""
    return str(value).lower() if isinstance(value, bool) else str(value)

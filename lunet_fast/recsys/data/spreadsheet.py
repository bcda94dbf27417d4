"""Texts in CSV files that people open in a spreadsheet, which would run some of them as formulas.

The rule, for every CSV file that commands write: a text that starts with one of ``= + - @``, their full-width
forms, a tab or a line end, with or without white space before it, gets an apostrophe before it, and so does
such a text that has apostrophes before it already. A text that is a plain number (``-7``, ``+5``, ``-1.5``),
any other text and any number stay as they are. So taking one apostrophe off gives the text back, whatever it
was. JSON and Parquet, which no spreadsheet runs, hold texts as they are.
"""

from __future__ import annotations

import re
from typing import Any

_FORMULA = re.compile(r"'*(?:\s*[=+\-@＝＋－＠]|[\t\r\n])")
_PLAIN_NUMBER = re.compile(r"[+-]?[0-9]+(\.[0-9]+)?")


def spreadsheet_safe(value: Any) -> Any:
    """``value`` for a cell of a CSV file: with an apostrophe before it where it is a text that could run."""
    if isinstance(value, str) and _FORMULA.match(value) and not _PLAIN_NUMBER.fullmatch(value):
        return f"'{value}"
    return value


def as_it_was(cell: str) -> str:
    """The text of which :func:`spreadsheet_safe` made ``cell``."""
    return cell[1:] if cell.startswith("'") and _FORMULA.match(cell) else cell

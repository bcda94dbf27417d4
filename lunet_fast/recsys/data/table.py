"""A table as it is read, in any format: of each column the distinct texts, and for each row which it holds.

So all rules on values run once for each distinct text, and only a failure looks at rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NoReturn

import numpy as np
import pandas as pd

from lunet_fast.recsys.data.errors import RatingFileError, brief, cause
from lunet_fast.recsys.data.headers import usual_column
from lunet_fast.recsys.data.ids import Int64Array, as_array

MISSING = ("nan", "null", "none", "<na>", "nat", "\\n")
"""What programs write for no value, in lower case."""
MAX_FIELD = 131_072
"""Characters of an id, a rating or a time; also the limit of Python's csv module."""


@dataclass(frozen=True)
class Column:
    """A column of a table of N rows."""

    name: str
    codes: Int64Array
    """``[N]``, places in ``texts``."""
    texts: list[str]
    """Without white space around them; distinct codes may share a text."""

    @classmethod
    def of(cls, name: str, values: pd.Series | list[str]) -> Column:
        """The column of N values; in a frame, what pandas takes for missing becomes an empty text."""
        codes, distinct = pd.factorize(values if isinstance(values, pd.Series) else as_array(values))
        texts = [v.decode("utf-8") if isinstance(v, bytes) else str(v) for v in distinct]
        texts = [text.strip() for text in texts]
        missing = codes < 0
        if missing.any():
            codes = np.where(missing, len(texts), codes)
            texts.append("")
        return cls(name, codes.astype(np.int64), texts)


@dataclass(frozen=True)
class Table:
    """N rows of the columns that are used. RatingFileError for a text of more than MAX_FIELD characters."""

    source: str
    columns: dict[str, Column]
    """By role: ``user``, ``item``, ``rating``, ``timestamp``, ``weight``."""
    places: Int64Array
    """``[N]``, the line (or row) of the source, from 1."""
    unit: str
    """``line``, or ``row`` for a format without lines."""
    notes: list[str] = field(default_factory=list)
    """How the rows were taken to be meant where nobody said, for people."""

    def __post_init__(self) -> None:
        for role, column in self.columns.items():
            long = [k for k, text in enumerate(column.texts) if len(text) > MAX_FIELD]
            if long:
                self.fail(
                    role, long, f"{{text}} has more than {MAX_FIELD:,} characters: give it a shorter one"
                )

    def refuse_empty(self, role: str) -> None:
        """RatingFileError for the first row whose id is empty, or what stands for one in exported tables."""
        texts = self.columns[role].texts
        empty = [k for k, text in enumerate(texts) if not text]
        if empty:
            self.fail(role, empty, "id is empty: give every row one")
        missing = [k for k, text in enumerate(texts) if text.lower() in MISSING]
        if missing:
            self.fail(role, missing, "id {text} stands for a missing one: leave such rows out, or rename it")

    def fail(self, role: str, bad: Sequence[int], problem: str) -> NoReturn:
        """Raises for the distinct texts ``bad`` and names the first row with one; {text} stands for it."""
        column = self.columns[role]
        rows = np.flatnonzero(np.isin(column.codes, np.asarray(bad, dtype=np.int64)))
        text = column.texts[int(column.codes[rows[0]])]
        label = role if role == column.name else f"{role} (column {column.name!r})"
        more = ""
        if len(rows) > 1:
            listed = ", ".join(str(place) for place in self.places[rows[:10]])
            others = ", ..." if len(rows) > 10 else ""
            more = f" ({len(rows)} such {self.unit}s in all: {listed}{others})"
        shown = repr(text if len(text) <= 80 else text[:77] + "...")
        raise RatingFileError(
            f"{self.source}, {self.unit} {self.places[rows[0]]}: {label} "
            + problem.replace("{text}", shown)
            + more
        )


def by_role(**columns: str | None) -> dict[str, str | None]:
    """The names of columns by role; ValueError where two roles have the same, but that ratings may be the
    weights as well."""
    names = [columns[role] for role in columns if role != "weight" or columns[role] != columns.get("rating")]
    for role, name in columns.items():
        if name is not None and names.count(name) > 1:
            raise ValueError(
                f"roles must have different columns, got {role}={name!r}, which is another one's too"
            )
    return columns


def used_columns(
    source: str, names: Sequence[str], columns: Mapping[str, str | None], hint: str = ""
) -> dict[str, int]:
    """The place of each role's column; a timestamp may be absent.

    A name that is that of its role, as by default, stands for all that are usual (:mod:`~.headers`).
    """
    used: dict[str, int] = {}
    exact = {
        role: list(names).index(name)
        for role, name in columns.items()
        if name is not None and names.count(name) == 1
    }
    for role, name in columns.items():
        usual = None
        if name == role and role not in exact and name not in names:
            usual = usual_column(source, names, role, {*exact.values(), *used.values()})
        if role in exact:
            used[role] = exact[role]
        elif usual is not None:
            used[role] = usual
        elif name is not None and names.count(name) > 1:
            raise RatingFileError(f"{source}: the column {name!r} ({role}) occurs {names.count(name)} times")
        elif role != "timestamp" and not (role in ("rating", "weight") and name is None):
            listed = ", ".join(repr(n if len(n) <= 40 else n[:37] + "...") for n in names[:30])
            also = " (interactions without ratings are read with rating=None)" if role == "rating" else ""
            raise RatingFileError(
                f"{source}: there is no column {name!r} for the {role}{also}; the columns are "
                f"{listed}: name the right one with {role}=...{hint}"
            )
    return used


def frame_table(source: str, frame: pd.DataFrame, columns: Mapping[str, str | None]) -> Table:
    wanted = {role: None if name is None else str(name) for role, name in columns.items()}
    used = used_columns(source, [str(name) for name in frame.columns], wanted)
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
            found[role] = Column.of(str(frame.columns[k]), series)
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
    return Table(source, found, np.arange(1, len(frame) + 1, dtype=np.int64), "row")

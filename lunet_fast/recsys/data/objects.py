"""Ratings in the objects that people have, as a pandas data frame: frames of other libraries, sparse
matrices, arrays, rows in a list, dicts and series.

Nothing is guessed: what could mean two things, or nothing, is a ``TypeError`` that names the type and what to
give. What the values mean is the business of :func:`~lunet_fast.recsys.data.ratings.from_frame`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import numpy as np
import pandas as pd
import torch

from lunet_fast.recsys.data.errors import brief
from lunet_fast.recsys.data.ids import a_type

RATINGS = (
    "a file's path, a data frame of pandas or polars, a scipy.sparse matrix of users by items, rows (user, "
    "item, rating) as a list or an array, or {user: {item: rating}}"
)
ONE_USERS = (
    "{item: rating}, rows (item, rating), a list of items, a data frame with the column item, or a pandas "
    "Series of ratings whose index are the items"
)
_CELLS = (tuple, list, np.ndarray)


def is_table(given: Any) -> bool:
    """Whether it is a data frame, of pandas or another library."""
    # By the type: asked for its columns, a lazy frame of polars computes.
    kind = type(given)
    return hasattr(kind, "columns") and hasattr(kind, "__getitem__")


def ratings_frame(given: Any, names: Sequence[str]) -> pd.DataFrame:
    """The ratings of many users as a frame; a table keeps its columns, the others get ``names`` in order.

    ``names`` are those of users, items and, where they are wanted, ratings and times. Entries that a sparse
    matrix stores are ratings, zeros too, and its row and column numbers the ids. An array of N rows has two
    to four columns, or names of its own; ids in one of floating-point numbers have to be whole.
    ``TypeError``.
    """
    if is_table(given):
        return _table(given)
    if isinstance(given, pd.Series) and given.index.nlevels == 2:
        sides = [given.index.get_level_values(level) for level in (0, 1)]
        return _named([*sides, given.to_numpy()], names)
    if hasattr(given, "tocoo"):
        matrix = given.tocoo()
        return _named([*matrix.coords, matrix.data], names)
    if isinstance(given, Mapping):
        return _of_mapping(given, names)
    found = _rows(given, names, "ratings", RATINGS)
    if not isinstance(found, pd.DataFrame):
        _refuse("ratings", given, RATINGS)
    return found


def items_frame(given: Any, argument: str) -> pd.DataFrame:
    """What one user rated or chose: a frame with ``item`` and, where known, ``rating`` and ``timestamp``.

    A Series of numbers is ratings by item, unless it is called ``item`` or holds texts: then its values are
    the items. ``TypeError``, which calls what was given ``argument``.
    """
    if is_table(given):
        return _table(given)
    if isinstance(given, pd.Series):
        return _of_series(given, argument)
    if hasattr(given, "tocoo"):
        matrix = given.tocoo()
        if matrix.ndim == 2 and 1 not in matrix.shape:
            _refuse(argument, given, "of a sparse matrix one user's row")
        item = max(matrix.coords, key=len) if matrix.ndim == 1 else matrix.coords[int(matrix.shape[0] == 1)]
        return pd.DataFrame({"item": item, "rating": matrix.data})
    if isinstance(given, Mapping):
        inner = next((value for value in given.values() if isinstance(value, (Mapping, *_CELLS))), None)
        if inner is not None:
            _refuse(f"a value of {argument}", inner, "a rating for each item")
        return pd.DataFrame({"item": list(given.keys()), "rating": list(given.values())})
    found = _rows(given, ("item", "rating", "timestamp"), argument, ONE_USERS)
    return found if isinstance(found, pd.DataFrame) else pd.DataFrame({"item": pd.Series(found)})


def _table(given: Any) -> pd.DataFrame:
    if isinstance(given, pd.DataFrame):
        return given
    if hasattr(given, "get_columns"):  # polars, which needs pyarrow to convert by itself
        return pd.DataFrame({column.name: column.to_list() for column in given.get_columns()})
    if not hasattr(given, "to_pandas"):
        lazy = ", collected" if hasattr(given, "collect") else ""
        _refuse("a table", given, f"a data frame of pandas or polars{lazy}")
    return pd.DataFrame(given.to_pandas())


def _of_series(given: pd.Series, argument: str) -> pd.DataFrame:
    values = given.to_numpy()
    if given.name == "item" or not pd.api.types.is_numeric_dtype(given.dtype):
        return pd.DataFrame({"item": values})
    plain = isinstance(given.index, pd.RangeIndex) and given.index.start == 0 and given.index.step == 1
    if given.index.nlevels > 1 or (plain and given.index.name is None):
        raise TypeError(
            f"{argument} is a pandas Series without items in its index: give series.tolist() where its "
            f"values are the items, and {ONE_USERS.split(',')[0]} where they are ratings"
        )
    return pd.DataFrame({"item": given.index, "rating": values})


def _of_mapping(given: Mapping[Any, Any], names: Sequence[str]) -> pd.DataFrame:
    """{user: {item: rating}}, {user: [item, ...]} or {(user, item): rating}."""
    rows: list[tuple[Any, ...]] = []
    for key, value in given.items():
        if isinstance(value, Mapping):
            rows += [(key, item, rating) for item, rating in value.items()]
        elif isinstance(key, tuple) and len(key) == 2:
            rows.append((*key, value))
        elif isinstance(value, (list, set, frozenset)) and len(names) < 4:
            rows += [(key, item) for item in value]
        else:
            _refuse(
                f"ratings[{key!r}]", value, "{item: rating} for each user, or a rating for each (user, item)"
            )
    if len({len(row) for row in rows}) > 1:
        _refuse("ratings", given, "ratings for all users, or for none")
    return _named(list(zip(*rows, strict=True)) or [[], [], []], names)


def _rows(given: Any, names: Sequence[str], argument: str, wanted: str) -> pd.DataFrame | list[Any]:
    """A frame of rows of two to len(names) cells or of records; a list of plain values as it is."""
    if isinstance(given, torch.Tensor):
        given = given.detach().cpu().numpy()
    if isinstance(given, np.ndarray):
        if given.dtype.names is not None:
            return pd.DataFrame(given)
        if given.ndim == 2 and 2 <= given.shape[1] <= len(names):
            return _named([_whole(column) if n < 2 else column for n, column in enumerate(given.T)], names)
        if given.ndim != 1:
            raise TypeError(
                f"{argument} is an array of {list(given.shape)}: give {wanted}; a matrix of all users by all "
                "items as scipy.sparse.coo_array(matrix)"
            )
        return list(given.tolist())
    if given is None or isinstance(given, (str, bytes, int, float, np.generic)):
        _refuse(argument, given, wanted)
    try:
        rows = list(given)
    except TypeError:
        _refuse(argument, given, wanted)
    if rows and all(isinstance(row, Mapping) for row in rows):
        return pd.DataFrame(rows)
    cells = {len(row) if isinstance(row, _CELLS) else 0 for row in rows}
    if cells <= {0}:
        other = next((row for row in rows if isinstance(row, (Mapping, set, frozenset))), None)
        if other is not None:
            _refuse(f"an entry of {argument}", other, wanted)
        return rows
    if len(cells) > 1 or not 2 <= max(cells) <= len(names):
        shown = ", ".join(brief(repr(row), 40) for row in rows[:3])
        raise TypeError(
            f"{argument} has rows of {' and '.join(map(str, sorted(cells)))} cells ({shown}, ...), and each "
            f"has to have 2 to {len(names)}, all as many: give {wanted}"
        )
    return _named(list(zip(*rows, strict=True)), names)


def _named(columns: Sequence[Any], names: Sequence[str]) -> pd.DataFrame:
    return pd.DataFrame({name: list(column) for name, column in zip(names, columns, strict=False)})


def _whole(column: Any) -> Any:
    """Ids in floating-point numbers as integers, where they are; ``frame_table`` refuses others."""
    whole = column.dtype.kind == "f" and bool((np.mod(column, 1) == 0).all())
    return column.astype(np.int64) if whole else column


def _refuse(argument: str, given: Any, wanted: str) -> NoReturn:
    text = f" ({given!r:.60})" if isinstance(given, (str, int, float)) else ""
    raise TypeError(f"{argument} is {a_type(given)}{text}: give {wanted}")

"""The ids of users and items, and the way from an id to its index.

The rules, the same for CSV, TSV, Parquet and data frames:

* white space around a value is dropped;
* ids are 64-bit integers if **every** id of the column is written as a plain integer (``0``, ``42``, ``-7``);
  an id such as ``007``, ``+5``, ``5.0``, ``-0`` or one outside the 64-bit range makes all ids of that column
  strings, because ``007`` and ``7`` may be two different people;
* integer ids are sorted by value, strings by code point; the index of an id is its place in that order.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch

from lunet_fast.recsys.data.errors import brief

Int64Array = npt.NDArray[np.int64]

INT64 = np.iinfo(np.int64)
_CONTAINERS = (tuple, list, set, frozenset, dict, np.ndarray)
PLAIN_INTEGER = re.compile(r"0|-?[1-9][0-9]{0,18}")


class TwoIdMaps:
    """What has an index for each of its users and items."""

    users: IdMap
    items: IdMap

    @property
    def n_users(self) -> int:
        return len(self.users)

    @property
    def n_items(self) -> int:
        return len(self.items)


class IdMap:
    """The ids of a data set, sorted, and the way from an id to its index.

    ``ids`` is int64 or an object array of ``str``; ``ids[index]`` gives ids back. ``IdMap(ids)`` takes ids
    that are sorted and unique already (as ``list(map.ids)`` is); :meth:`of` sorts. ValueError where they are
    not.
    """

    def __init__(self, ids: Sequence[int] | Sequence[str] | npt.NDArray[Any]) -> None:
        values = ids.tolist() if isinstance(ids, np.ndarray) else list(ids)
        if _all_integers(values):
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
        return id_map(sorted({id_text(v) for v in values}))[0]

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

        ``ids`` is what :func:`ids_array` takes, which raises ``TypeError`` for anything else. In a map of
        integers the string "42" is the id 42; a map of strings looks an integer up as ``str(id)``. Expected
        O(N).
        """
        values = ids_array(ids)
        if values.dtype.kind == "i" and self.is_integer:
            return np.asarray(self._table.get_indexer(pd.Index(values.astype(np.int64))), dtype=np.int64)
        # Everything else goes by its distinct values: Python code runs once for each id, not for each row.
        codes, distinct = pd.factorize(values, use_na_sentinel=True)
        texts = [id_text(v) for v in distinct.tolist()]
        found = np.full(len(texts) + 1, -1, dtype=np.int64)  # the last: missing values, code -1
        if self.is_integer:
            plain = [k for k, text in enumerate(texts) if is_int64(text)]
            numbers = np.array([int(texts[k]) for k in plain], dtype=np.int64)
            found[plain] = self._table.get_indexer(pd.Index(numbers))
        elif texts:
            found[:-1] = self._table.get_indexer(pd.Index(texts, dtype=object))
        return found[codes]


def ids_array(ids: Any) -> npt.NDArray[Any]:
    """``[N]`` of ids: a sequence, column, array or tensor of integers or strings, or one of them.

    ``TypeError``, which names the type, for what has ids only in a part of it (a data frame, a sparse matrix,
    a dict) and for entries that are tuples or lists: nothing is guessed.
    """
    if isinstance(ids, torch.Tensor):
        ids = ids.detach().cpu().numpy()
    if isinstance(ids, (str, int, float, np.generic)):
        return as_array([ids])
    if hasattr(ids, "columns") or hasattr(ids, "tocsr") or isinstance(ids, (Mapping, bytes)) or ids is None:
        raise TypeError(
            f"ids are wanted, one or a list of them, and this is {a_type(ids)}: give list(...) of them, of a "
            "data frame a column such as frame['item']"
        )
    if isinstance(ids, (np.ndarray, pd.Series, pd.Index)):
        values = np.asarray(ids)
        if values.ndim > 1 and values.size != max(values.shape):
            raise TypeError(f"ids are wanted in one dimension, and this array is {list(values.shape)}")
        values = values.reshape(-1)
    else:
        try:
            values = as_array(list(ids))
        except TypeError:
            raise TypeError(f"ids are wanted, one or a list of them, and this is {a_type(ids)}") from None
    if values.dtype == object:
        inner = next((v for v in values.tolist() if isinstance(v, _CONTAINERS)), None)
        if inner is not None:
            raise TypeError(f"ids are wanted, and this list holds {a_type(inner)}: {brief(repr(inner))}")
    return values


def listed(ids: Any) -> list[Any]:
    """:func:`ids_array` as a list."""
    found: list[Any] = ids_array(ids).tolist()
    return found


def a_type(value: Any) -> str:
    """The type of ``value``, for messages."""
    kind = type(value)
    where = "" if kind.__module__ == "builtins" else kind.__module__.split(".")[0] + "."
    return f"a {where}{kind.__qualname__}"


def is_int64(text: str) -> bool:
    """Whether a text is a plain integer of 64 bits, as the rules above have it."""
    return PLAIN_INTEGER.fullmatch(text) is not None and INT64.min <= int(text) <= INT64.max


def as_array(values: list[Any]) -> npt.NDArray[Any]:
    """int64 where every value is an integer that fits, otherwise the objects as they are."""
    if values and _all_integers(values):
        with contextlib.suppress(OverflowError):
            return np.array(values, dtype=np.int64)
    array = np.empty(len(values), dtype=object)
    array[:] = values
    return array


def _all_integers(values: Sequence[Any]) -> bool:
    return all(isinstance(v, (int, np.integer)) and not isinstance(v, bool) for v in values)


def id_text(value: Any) -> str:
    """The text of an id; a whole floating-point number as the integer."""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value).strip()


def id_map(texts: Sequence[str]) -> tuple[IdMap, Int64Array]:
    """The map of ``texts`` and the index of each."""
    if all(is_int64(text) for text in texts):
        ids, inverse = np.unique(np.array([int(text) for text in texts], dtype=np.int64), return_inverse=True)
        return IdMap(ids), inverse.astype(np.int64)
    strings = sorted(set(texts))
    place = {text: k for k, text in enumerate(strings)}
    return IdMap(strings), np.array([place[text] for text in texts], dtype=np.int64)

"""The first pass over the files of a stream: every value is checked, and what a model needs of them is kept.

That is the ids, and sums and counts of the training part by user and item: O(users + items) numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from lunet_fast.recsys.data.errors import RatingFileError, cause
from lunet_fast.recsys.data.ids import IdMap, Int64Array
from lunet_fast.recsys.data.pair_hash import ITEM, USER, UInt64Array, is_tested, mix, salted, text_hash
from lunet_fast.recsys.data.parquet_pieces import (
    Float32Array,
    PieceFile,
    column_of,
    first_null,
    integers,
    ratings_of,
    record_batches,
    release_memory,
    texts_of,
    wrong_row,
)

MOST_LEVELS = 100
"""Different ratings that are counted one by one."""

Progress = Callable[[int, int], None]
"""Is called with the rows read so far and the rows there are."""

Int32Array = npt.NDArray[np.int32]

# A table over the range of the integer ids is faster than a search, and small where the ids are dense.
_TABLE_CELLS_AN_ID = 4
_COMPACT_AT = 1 << 18


class FirstPass:
    """What is known of the rows read so far."""

    def __init__(self, users: _Ids, items: _Ids, test_share: float, seed: int) -> None:
        self.users, self.items = users, items
        self.test_share, self.seed = test_share, seed
        self.low, self.high, self.total = math.inf, -math.inf, 0.0
        self.levels: dict[float, int] | None = {}
        """Rows of the training part by rating; None from more than MOST_LEVELS on."""
        self.fingerprint = 0
        self.group_rows: list[Int64Array] = []
        """By file, the training rows of each row group."""

    @classmethod
    def over(
        cls,
        files: Sequence[PieceFile],
        columns: dict[str, str | None],
        test_share: float,
        seed: int,
        progress: Progress | None,
    ) -> FirstPass:
        """What is known of all rows of ``files``. O(rows) time."""
        texts = {role for file in files for role in file.texts}
        first = cls(_Ids("user", "user" in texts), _Ids("item", "item" in texts), test_share, seed)
        total = sum(sum(file.rows) for file in files)
        done = 0
        for file in files:
            ends, group_rows = np.cumsum(file.rows), np.zeros(len(file.rows), dtype=np.int64)
            row = 0
            for batch in record_batches(file, range(len(file.rows)), columns):
                training = first.add(file, row, batch, columns)
                _count_by_group(training, row, ends, group_rows)
                row += len(training)
                done += len(training)
                if progress is not None:
                    progress(done, total)
            first.group_rows.append(group_rows)
        release_memory()
        return first

    def add(
        self, file: PieceFile, row: int, batch: Any, columns: dict[str, str | None]
    ) -> npt.NDArray[np.bool_]:
        """Takes in a batch that starts at ``row`` of the file (from 0); which of its rows are to train on."""
        coded = []
        for ids in (self.users, self.items):
            column = column_of(batch, columns[ids.role])
            if column.null_count:
                wrong_row(file, row + first_null(column), f"{ids.role} id is empty: give every row one")
            try:
                coded.append(ids.encode(file, row, column))
            except RatingFileError:
                raise
            except ValueError as error:  # of pyarrow: no int64, or a text that is not UTF-8
                raise RatingFileError(
                    f"{file.path}, rows {row + 1} to {row + len(batch)}: a {ids.role} id cannot be read "
                    f"({cause(error)}): store ids as int64 or UTF-8 strings"
                ) from error
        column = None if columns["rating"] is None else column_of(batch, columns["rating"])
        if column is not None and column.null_count:
            wrong_row(file, row + first_null(column), "rating is missing: give every row a number")
        rating = ratings_of(batch, columns["rating"])
        finite = np.isfinite(rating)
        if not finite.all():
            wrong = int(np.argmin(finite))
            shown = column[wrong].as_py() if column is not None else rating[wrong]
            wrong_row(
                file,
                row + wrong,
                f"rating {shown} is not a finite number (as float32): correct or remove the row",
            )
        (user, user_keys, user_hashes), (item, item_keys, item_hashes) = coded
        pair = user_hashes[user] ^ item_hashes[item]
        training = ~is_tested(pair, self.test_share, self.seed)

        # The sum of hashes of rows does not depend on their order.
        bits = rating.view(np.uint32).astype(np.uint64) << np.uint64(16)
        self.fingerprint = (self.fingerprint + int(mix(pair ^ bits).sum())) % 2**64
        self.low, self.high = min(self.low, float(rating.min())), max(self.high, float(rating.max()))
        rating = rating[training]
        self.total += float(rating.sum(dtype=np.float64))
        self._count_levels(rating)
        self.users.tally.add(user_keys, user[training], rating)
        self.items.tally.add(item_keys, item[training], rating)
        return training

    def _count_levels(self, rating: Float32Array) -> None:
        if self.levels is None:
            return
        codes, values = pd.factorize(rating)
        if len(values) > MOST_LEVELS:
            self.levels = None
            return
        for value, count in zip(values.tolist(), np.bincount(codes).tolist(), strict=False):
            self.levels[value] = self.levels.get(value, 0) + count
        if len(self.levels) > MOST_LEVELS:
            self.levels = None


class _Ids:
    """The ids of users or of items met so far.

    Each has a key, an int64: the id itself, or in columns of texts its number in the order of appearance.
    """

    def __init__(self, role: str, as_text: bool) -> None:
        self.role, self.as_text = role, as_text
        self.salt = USER if role == "user" else ITEM
        self.tally = _Tally()
        self.key: dict[str, int] = {}
        self.hash: list[int] = []

    def encode(self, file: PieceFile, row: int, column: Any) -> tuple[Int64Array, Int64Array, UInt64Array]:
        """Codes ``[n]`` of the ids of a column, and by code the key and the mixed hash."""
        if not self.as_text:
            codes, keys = pd.factorize(integers(column))
            return codes, keys, salted(keys.view(np.uint64), self.salt)
        codes, texts = texts_of(file, self.role, column)
        if "" in texts:
            wrong = int(np.argmax(codes == texts.index("")))
            wrong_row(file, row + wrong, f"{self.role} id is empty: give every row one")
        for text in texts:
            if text not in self.key:
                self.key[text] = len(self.hash)
                self.hash.append(text_hash(text))
        keys = np.array([self.key[text] for text in texts], dtype=np.int64)
        hashes = np.array([self.hash[key] for key in keys], dtype=np.uint64)
        return codes, keys, salted(hashes, self.salt)

    def finish(self) -> tuple[IdMap, Index, Int64Array, npt.NDArray[np.float64]]:
        """The map of all ids, the way to their indices, and by index the count and sum of the ratings."""
        keys, counts, sums = self.tally.result()
        if not self.as_text:
            ids = IdMap(keys)
            return ids, Index.ofintegers(keys, salted(keys.view(np.uint64), self.salt)), counts, sums
        texts = list(self.key)
        ids = IdMap.of(texts)
        index = ids.index(texts)  # of each key; every key is in the tally
        by_index = np.argsort(index)
        hashes = salted(np.array(self.hash, dtype=np.uint64), self.salt)[by_index]
        table = dict(zip(texts, index.tolist(), strict=True))
        return ids, Index(hashes, texts=table), counts[by_index], sums[by_index]


class _Tally:
    """Counts and sums of ratings by key, in O(keys) memory: sorted ones, and what came since."""

    def __init__(self) -> None:
        self.parts: list[tuple[Int64Array, Int64Array, npt.NDArray[np.float64]]] = []
        self.pending = self.compacted = 0

    def add(self, keys: Int64Array, codes: Int64Array, ratings: Float32Array) -> None:
        """Takes ratings ``[n]`` in; row r is of key ``keys[codes[r]]``, and keys without a row are kept."""
        counts = np.bincount(codes, minlength=len(keys))
        sums: npt.NDArray[Any] = np.bincount(codes, ratings, len(keys))
        self.parts.append((keys, counts, sums))
        self.pending += len(keys)
        if self.pending > max(_COMPACT_AT, self.compacted):
            self.result()

    def result(self) -> tuple[Int64Array, Int64Array, npt.NDArray[np.float64]]:
        """The different keys, ascending, with their counts and sums."""
        if len(self.parts) > 1 or self.pending:
            keys, place = np.unique(np.concatenate([part[0] for part in self.parts]), return_inverse=True)
            # Not as weights, which are float64: a count stays exact in any case.
            counts = np.zeros(len(keys), dtype=np.int64)
            np.add.at(counts, place, np.concatenate([part[1] for part in self.parts]))
            sums: npt.NDArray[Any] = np.bincount(
                place, np.concatenate([part[2] for part in self.parts]), len(keys)
            )
            self.parts = [(keys, counts, sums)]
            self.pending, self.compacted = 0, len(keys)
        return self.parts[0]


class Index:
    """From the ids of a column to their indices, for ids that are all known; and hashes by index."""

    def __init__(
        self,
        hashes: UInt64Array,
        *,
        texts: dict[str, int] | None = None,
        ids: Int64Array | None = None,
        table: Int32Array | None = None,
        low: int = 0,
    ) -> None:
        self.hashes, self.texts, self.ids, self.table, self.low = hashes, texts, ids, table, low

    @classmethod
    def ofintegers(cls, ids: Int64Array, hashes: UInt64Array) -> Index:
        low, high = int(ids[0]), int(ids[-1])
        if high - low >= _TABLE_CELLS_AN_ID * len(ids):
            return cls(hashes, ids=ids)
        table = np.zeros(high - low + 1, dtype=np.int32)
        table[ids - low] = np.arange(len(ids), dtype=np.int32)
        return cls(hashes, table=table, low=low)

    def __call__(self, column: Any) -> Int32Array:
        if self.texts is not None:
            codes, texts = texts_of(None, "", column)
            return np.array([self.texts[text] for text in texts], dtype=np.int32)[codes]
        values = integers(column)
        if self.table is not None:
            return self.table[values - self.low] if self.low else self.table[values]
        return np.searchsorted(self.ids, values).astype(np.int32)  # type: ignore[arg-type]


def _count_by_group(
    training: npt.NDArray[np.bool_], row: int, ends: Int64Array, group_rows: Int64Array
) -> None:
    """Adds the training rows of a batch that starts at ``row`` to those of the row groups it lies in."""
    group, at = int(np.searchsorted(ends, row, side="right")), 0
    while at < len(training):
        stop = min(len(training), int(ends[group]) - row)
        group_rows[group] += np.count_nonzero(training[at:stop])
        group, at = group + 1, stop

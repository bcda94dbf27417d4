"""Ratings from Parquet files that need not fit into memory, for training and for testing.

:meth:`RatingStream.open` reads the files once, checks every value as :func:`~.ratings.read_ratings` does and
keeps what a model needs of them: the ids, the scale, and means and counts of the training part, O(users +
items) numbers. Every later pass reads the files again. No pass holds more than a buffer of rows, however many
there are.

Which rows are tested is no draw but a property of the pair. With 64-bit arithmetic and the finaliser of
SplitMix64,

    mix(z) = z4, where z1 = z + 0x9E3779B97F4A7C15, z2 = (z1 ^ (z1 >> 30)) 0xBF58476D1CE4E5B9,
                       z3 = (z2 ^ (z2 >> 27)) 0x94D049BB133111EB, z4 = z3 ^ (z3 >> 31),

the row of user u and item i is tested if mix(mix(h(u) ^ 1) ^ mix(h(i) ^ 2) ^ mix(seed)) < test_share 2^64. h
of an id that is a plain 64-bit integer, also as a text, is that integer, and of another text the first 8
bytes of its BLAKE2b, little-endian. So the split needs no memory and depends neither on the order of the
rows, nor on how they are spread over files, nor on the other rows.

A pair that is rated twice cannot be noticed without remembering every pair: both its rows are used, in the
same part. :func:`~.ratings.read_ratings` refuses such a file.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import mmap
import os
import queue
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torch import Tensor

from lunet_fast.recsys.data.ratings import (
    MAX_FIELD,
    IdMap,
    Int64Array,
    RatingFileError,
    Ratings,
    brief,
    check_sizes,
    from_frame,
)

__all__ = ["RatingStream"]

Batch = tuple[Tensor, Tensor, Tensor]
"""Users and items, int64 ``[b]``, and ratings, float32 ``[b]``."""

Progress = Callable[[int, int], None]
"""Is called with the rows read so far and the rows there are."""

BUFFER_ROWS = 1 << 20
"""Training rows that are shuffled together."""

PIECE_ROWS = 1 << 17
"""Rows decoded at a time."""

READ_BYTES = 1 << 20
"""Bytes of a column read at a time; without it pyarrow reads a row group's columns whole."""

MOST_LEVELS = 100
"""Different ratings that are counted one by one."""

_Int32 = npt.NDArray[np.int32]
_UInt64 = npt.NDArray[np.uint64]
_Float32 = npt.NDArray[np.float32]
_Rows = tuple[_Int32, _Int32, _Float32]

_USER, _ITEM = 1, 2
_ORDER, _BUFFER = 5, 6  # streams of a seed; splits has 0 to 3
# A table over the range of the integer ids is faster than a search, and small where the ids are dense.
_TABLE_CELLS_AN_ID = 4
_COMPACT_AT = 1 << 18


@dataclass(frozen=True, eq=False, repr=False)
class RatingStream:
    """Ratings in Parquet files, divided into a training and a test part and read batch by batch.

    Made by :meth:`open`. ``users`` and ``items`` map the ids of all rows to indices, ``scale`` is the
    (lowest, highest) rating of all rows. Of the training part alone are ``n_rows``, ``mean``, ``user_sum``
    and ``item_sum`` (float64 ``[n_users]`` and ``[n_items]``, sums of ratings), ``user_count`` and
    ``item_count`` (int64, their numbers), and ``levels`` (float32 ``[L]``, the different ratings, ascending)
    with ``level_count`` (int64 ``[L]``), both None where there are more than MOST_LEVELS. ``n_test`` rows are
    in the test part. ``fingerprint`` tells the rows from others, whatever their order: 16 hexadecimal digits.

    No file is open between two passes, and a pass refuses a file that has changed since :meth:`open`. Several
    passes may go on at once. Each costs O(rows) time and a few times PIECE_ROWS rows of memory beside what
    its docstring says, and raises RatingFileError for a file that is damaged or changed.
    """

    name: str
    source: str
    users: IdMap
    items: IdMap
    scale: tuple[float, float]
    n_rows: int
    n_test: int
    mean: float
    user_sum: Tensor
    user_count: Tensor
    item_sum: Tensor
    item_count: Tensor
    levels: Tensor | None
    level_count: Tensor | None
    fingerprint: str
    test_share: float
    seed: int
    buffer_rows: int
    _columns: dict[str, str | None] = field(repr=False)
    _files: list[_File] = field(repr=False)
    # By row group, those of all files one after the other: (file, group of the file), and training rows.
    _groups: list[tuple[int, int]] = field(repr=False)
    _group_rows: Int64Array = field(repr=False)
    _user_index: _Index = field(repr=False)
    _item_index: _Index = field(repr=False)

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        user: str = "user",
        item: str = "item",
        rating: str | None = "rating",
        timestamp: str | None = "timestamp",
        test_share: float = 0.2,
        seed: int = 0,
        buffer_rows: int = BUFFER_ROWS,
        progress: Progress | None = None,
    ) -> RatingStream:
        """Reads a ``.parquet`` file, or all of a folder in the order of their names, once.

        ``user``, ``item``, ``rating`` and ``timestamp`` name the columns, others are not read; the timestamp
        may be absent and is read by :meth:`in_memory` alone. Without ratings, ``rating=None``, every row is
        an interaction of rating 1. Ids are integers or texts, by the rules of :mod:`~.ratings`; ratings are
        numbers. Of all rows, those that the module's rule finds with ``seed`` and ``test_share`` are tested;
        0 tests none. ``buffer_rows`` training rows are shuffled together by :meth:`batches`.

        O(rows) time; O(users + items) memory, a row group's metadata, and PIECE_ROWS rows a few times over.

        RatingFileError, naming the file, row (from 1) and row group (from 0, as pyarrow counts): an empty id,
        a missing rating or one that is not finite; or naming the file: a missing column or one of another
        type, no rows, a damaged file; before anything is unpacked, one that states to unpack to more than
        RATIO times its size, or a page of more than :func:`~.ratings.max_bytes`; an id of more than MAX_FIELD
        characters. FileNotFoundError where there is no file, ImportError without pyarrow,
        ValueError for a wrong argument and where no row is left to train on.
        """
        _require_pyarrow(path)
        _check_whole("seed", seed, 0)
        _check_whole("buffer_rows", buffer_rows, 1)
        if isinstance(test_share, bool) or not 0 <= test_share < 1:
            raise ValueError(f"test_share must be a share of at least 0 and below 1, got {test_share!r}")
        columns = {"user": user, "item": item, "rating": rating, "timestamp": timestamp}
        names = [name for name in columns.values() if name is not None]
        for role, name in columns.items():
            if names.count(name or "") > 1:
                raise ValueError(
                    f"user, item, rating and timestamp must be different columns, got {role}={name!r} twice"
                )
        place = Path(path)
        files, text_roles = _find_files(place, columns)
        total = sum(sum(file.rows) for file in files)
        first = _FirstPass(
            _Ids("user", "user" in text_roles),
            _Ids("item", "item" in text_roles),
            _threshold(test_share),
            _seed_hash(seed),
        )
        groups = [(n, group) for n, file in enumerate(files) for group in range(len(file.rows))]
        group_rows = np.zeros(len(groups), dtype=np.int64)
        done = group_start = 0
        for file in files:
            ends = np.cumsum(file.rows)
            row = 0
            for batch in _record_batches(file, range(len(file.rows)), columns):
                training = first.add(file, row, batch, columns)
                _count_by_group(training, row, ends, group_rows[group_start:])
                row += len(training)
                done += len(training)
                if progress is not None:
                    progress(done, total)
            group_start += len(file.rows)
        _release_memory()

        n_rows = int(group_rows.sum())
        if n_rows == 0:
            raise ValueError(
                f"{place}: test_share={test_share} leaves none of the {total} rows to train on: lower it"
            )
        users, user_index, user_count, user_sum = first.users.finish()
        items, item_index, item_count, item_sum = first.items.finish()
        levels = sorted(first.levels) if first.levels is not None else None
        return cls(
            name=place.name,
            source=str(place),
            users=users,
            items=items,
            scale=(first.low, first.high),
            n_rows=n_rows,
            n_test=total - n_rows,
            mean=first.total / n_rows,
            user_sum=torch.from_numpy(user_sum),
            user_count=torch.from_numpy(user_count),
            item_sum=torch.from_numpy(item_sum),
            item_count=torch.from_numpy(item_count),
            levels=None if levels is None else torch.tensor(levels, dtype=torch.float32),
            level_count=None
            if levels is None
            else torch.tensor([(first.levels or {})[level] for level in levels]),
            fingerprint=f"{first.fingerprint:016x}",
            test_share=float(test_share),
            seed=int(seed),
            buffer_rows=int(buffer_rows),
            _columns=columns,
            _files=files,
            _groups=groups,
            _group_rows=group_rows,
            _user_index=user_index,
            _item_index=item_index,
        )

    def __len__(self) -> int:
        """Rows of both parts."""
        return self.n_rows + self.n_test

    def __repr__(self) -> str:
        return (
            f"RatingStream({self.name}: {self.n_users} users, {self.n_items} items, {self.n_rows} training "
            f"and {self.n_test} test ratings)"
        )

    @property
    def n_users(self) -> int:
        return len(self.users)

    @property
    def n_items(self) -> int:
        return len(self.items)

    def batches(
        self, epoch: int, batch_size: int, *, start: int = 0, seed: int | None = None
    ) -> Generator[Batch, None, None]:
        """The training rows of epoch ``epoch`` (from 0) in shuffled order: users, items, ratings, ``[b]``.

        ``seed`` is that of :meth:`open` unless given. Row groups are read in the order of
        ``default_rng((seed, 5, epoch)).permutation``; their training rows, one group after the other, fill
        buffers of ``buffer_rows``, and buffer b (from 0) is permuted by ``default_rng((seed, 6, epoch, b))``.
        Batches are cut from the buffers, across their ends, and all but the last have ``batch_size`` rows.
        They depend on the files, ``seed``, ``epoch``, ``batch_size`` and ``buffer_rows`` alone.

        ``start=k`` leaves out the first k batches and gives the same ones from there on; row groups that lie
        in earlier buffers are not read. Where that leaves none, there are none.

        A file in the order of users is mixed as far as a buffer holds row groups: one of 2^20 rows holds 8
        groups of 2^17 rows, which are different ones in every epoch, so the users of a batch are drawn from
        those of 8 groups. A file of one row group is read from its beginning to its end in every epoch, mixed
        within buffers alone: write files with smaller row groups.

        The next buffer is read in a thread while the batches of one are used; close the iterator, or let it
        go, to end that. Memory: 72 bytes a row of a buffer. Batches are the caller's to keep or to write
        into, but one keeps its buffer in memory. ValueError for a wrong argument, at once.
        """
        _check_whole("epoch", epoch, 0)
        _check_whole("batch_size", batch_size, 1)
        _check_whole("start", start, 0)
        seed = self.seed if seed is None else seed
        _check_whole("seed", seed, 0)
        return self._batches(int(epoch), int(batch_size), int(start), int(seed))

    def test_batches(self, batch_size: int) -> Generator[Batch, None, None]:
        """The test rows in the order of the files: users, items, ratings, as :meth:`batches` gives them."""
        _check_whole("batch_size", batch_size, 1)
        return self._test_batches(int(batch_size))

    def seen(self, users: Tensor, progress: Progress | None = None) -> tuple[Tensor, Tensor]:
        """The training pairs of ``users`` (indices, int64 ``[U]``): user and item, int64 ``[S]`` each.

        In the order of the files. One pass; memory O(n_users + S). ValueError for an index that is not 0 to
        n_users - 1.
        """
        return self._pairs_of(users, False, progress)

    def test_pairs(self, users: Tensor, progress: Progress | None = None) -> tuple[Tensor, Tensor]:
        """The test pairs of ``users``, as :meth:`seen`."""
        return self._pairs_of(users, True, progress)

    def in_memory(self) -> tuple[Ratings, Ratings]:
        """All training rows and all test rows, in the order of the files, with the ids of the stream.

        For data that does fit into memory: O(rows), several times over while it is read. Raises as
        :func:`~.ratings.from_frame` does, so for a pair that is rated twice and for a wrong timestamp too;
        rows in messages are counted through all files.
        """
        from pyarrow import parquet

        wanted = [name for name in self._columns.values() if name is not None]
        frames = []
        for file in self._files:
            file.check()
            try:
                with parquet.ParquetFile(file.path, read_dictionary=file.texts) as content:
                    present = [name for name in wanted if name in content.schema_arrow.names]
                    frames.append(content.read(columns=present).to_pandas(ignore_metadata=True))
            except Exception as error:
                _damaged(file.path, error)
        scale = self.scale if self.scale[0] < self.scale[1] else None
        ratings = from_frame(
            pd.concat(frames, ignore_index=True) if len(frames) > 1 else frames[0],
            **self._columns,  # type: ignore[arg-type]
            scale=scale,
            users=self.users,
            items=self.items,
            name=self.name,
        )
        test = torch.from_numpy(self._is_test(ratings.user.numpy(), ratings.item.numpy()))
        return ratings.select(~test), ratings.select(test)

    def _batches(self, epoch: int, batch_size: int, start: int, seed: int) -> Generator[Batch, None, None]:
        begin = start * batch_size
        if begin >= self.n_rows:
            return
        first = begin // self.buffer_rows
        last = -(-self.n_rows // self.buffer_rows) - 1
        rest: list[npt.NDArray[Any]] = [np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32)]
        with closing(_ahead(self._buffers(epoch, seed, first))) as buffers:
            number = first - 1
            for rows in buffers:
                number += 1
                # What is left of one buffer stands before the next: copied once, with the permuted rows.
                skipped = begin - first * self.buffer_rows if number == first else 0
                order = np.random.default_rng((seed, _BUFFER, epoch, number)).permutation(len(rows[0]))
                whole = []
                for old, new in zip(rest, rows, strict=True):
                    joined = np.empty(len(old) + len(new) - skipped, dtype=old.dtype)
                    joined[: len(old)] = old
                    joined[len(old) :] = new[order[skipped:]]
                    whole.append(joined)
                size = len(whole[0])
                stop = size if number == last else size - size % batch_size
                rest = [column[stop:].copy() for column in whole]
                columns = [torch.from_numpy(column[:stop]).split(batch_size) for column in whole]
                del rows, order, whole, joined
                if stop:
                    yield from zip(*columns, strict=True)
                del columns

    def _buffers(self, epoch: int, seed: int, first: int) -> Generator[_Rows, None, None]:
        """The rows of each buffer from number ``first`` on, in the order they are read in."""
        order = np.random.default_rng((seed, _ORDER, epoch)).permutation(len(self._groups))
        ends = np.cumsum(self._group_rows[order])
        place = first * self.buffer_rows
        group = int(np.searchsorted(ends, place, side="right"))
        skip = place - int(ends[group - 1] if group else 0)
        filled, buffer = 0, self._empty_buffer(place)
        for rows in self._rows(order[group:].tolist(), test=False):
            n = len(rows[0])
            taken = min(skip, n)
            skip -= taken
            while taken < n:
                count = min(n - taken, len(buffer[0]) - filled)
                for whole, column in zip(buffer, rows, strict=True):
                    whole[filled : filled + count] = column[taken : taken + count]
                taken += count
                filled += count
                if filled == len(buffer[0]):
                    place += filled
                    yield buffer
                    filled, buffer = 0, self._empty_buffer(place)

    def _empty_buffer(self, place: int) -> _Rows:
        size = min(self.buffer_rows, self.n_rows - place)
        return np.empty(size, np.int32), np.empty(size, np.int32), np.empty(size, np.float32)

    def _test_batches(self, batch_size: int) -> Generator[Batch, None, None]:
        waiting: list[_Rows] = []
        n = 0
        with closing(_ahead(self._rows(range(len(self._groups)), test=True))) as pieces:
            for rows in pieces:
                waiting.append(rows)
                n += len(rows[0])
                if n >= batch_size:
                    columns = _tensors(waiting)
                    stop = n - n % batch_size
                    yield from zip(*(t[:stop].split(batch_size) for t in columns), strict=True)
                    user, item, rating = (t[stop:].numpy() for t in columns)
                    waiting, n = [(user.astype(np.int32), item.astype(np.int32), rating)], n - stop
        if n:
            yield _tensors(waiting)

    def _pairs_of(self, users: Tensor, test: bool, progress: Progress | None) -> tuple[Tensor, Tensor]:
        if users.dim() != 1 or users.dtype != torch.int64:
            raise ValueError(f"users must be int64 indices [U], got {users.dtype} {list(users.shape)}")
        chosen = users.cpu().numpy()
        outside = chosen[(chosen < 0) | (chosen >= self.n_users)]
        if len(outside):
            raise ValueError(f"users must be indices from 0 to {self.n_users - 1}, got {outside[0]}")
        wanted = np.zeros(self.n_users, dtype=bool)
        wanted[chosen] = True
        pairs = [
            (user.copy(), item.copy(), rating[:0].copy())
            for user, item, rating in self._rows(range(len(self._groups)), test, wanted, progress)
            if len(user)
        ]
        user, item, _ = _tensors(pairs)
        return user, item

    def _rows(
        self,
        groups: Sequence[int],
        test: bool,
        wanted: npt.NDArray[np.bool_] | None = None,
        progress: Progress | None = None,
    ) -> Generator[_Rows, None, None]:
        """The rows of one part in some row groups, in that order, in pieces; of the ``wanted`` users alone,
        bool ``[n_users]``, where given."""
        done = 0
        for n, run in groupby((self._groups[group] for group in groups), key=lambda place: place[0]):
            file = self._files[n]
            for batch in _record_batches(file, [group for _, group in run], self._columns):
                user = self._user_index(_column(batch, self._columns["user"]))
                item = self._item_index(_column(batch, self._columns["item"]))
                rating = _ratings(batch, self._columns["rating"])
                kept = self._is_test(user, item) == test
                if wanted is not None:
                    kept &= wanted[user]
                done += len(user)
                yield user[kept], item[kept], rating[kept]
                if progress is not None:
                    progress(done, len(self))

    def _is_test(self, user: npt.NDArray[Any], item: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
        pair = self._user_index.hashes[user] ^ self._item_index.hashes[item] ^ _seed_hash(self.seed)
        return _mix(pair) < _threshold(self.test_share)


# The first pass ---------------------------------------------------------------------------------------------


class _FirstPass:
    """What is known of the rows read so far."""

    def __init__(self, users: _Ids, items: _Ids, threshold: np.uint64, seed_hash: np.uint64) -> None:
        self.users, self.items = users, items
        self.threshold, self.seed_hash = threshold, seed_hash
        self.low, self.high, self.total = math.inf, -math.inf, 0.0
        self.levels: dict[float, int] | None = {}
        self.fingerprint = 0

    def add(self, file: _File, row: int, batch: Any, columns: dict[str, str | None]) -> npt.NDArray[np.bool_]:
        """Takes in a batch that starts at ``row`` of the file (from 0); which of its rows are to train on."""
        coded = []
        for ids in (self.users, self.items):
            column = _column(batch, columns[ids.role])
            if column.null_count:
                _wrong_row(file, row + _first_null(column), f"{ids.role} id is empty: give every row one")
            coded.append(ids.encode(file, row, column))
        column = None if columns["rating"] is None else _column(batch, columns["rating"])
        if column is not None and column.null_count:
            _wrong_row(file, row + _first_null(column), "rating is missing: give every row a number")
        rating = _ratings(batch, columns["rating"])
        finite = np.isfinite(rating)
        if not finite.all():
            wrong = int(np.argmin(finite))
            shown = column[wrong].as_py() if column is not None else rating[wrong]
            _wrong_row(
                file,
                row + wrong,
                f"rating {shown} is not a finite number (as float32): correct or remove the row",
            )
        (user, user_keys, user_hashes), (item, item_keys, item_hashes) = coded
        pair = user_hashes[user] ^ item_hashes[item]
        training = _mix(pair ^ self.seed_hash) >= self.threshold

        # The sum of hashes of rows does not depend on their order.
        bits = rating.view(np.uint32).astype(np.uint64) << np.uint64(16)
        self.fingerprint = (self.fingerprint + int(_mix(pair ^ bits).sum())) % 2**64
        self.low, self.high = min(self.low, float(rating.min())), max(self.high, float(rating.max()))
        rating = rating[training]
        self.total += float(rating.sum(dtype=np.float64))
        self._count_levels(rating)
        self.users.tally.add(user_keys, user[training], rating)
        self.items.tally.add(item_keys, item[training], rating)
        return training

    def _count_levels(self, rating: _Float32) -> None:
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
        self.salt = _USER if role == "user" else _ITEM
        self.tally = _Tally()
        self.key: dict[str, int] = {}
        self.hash: list[int] = []

    def encode(self, file: _File, row: int, column: Any) -> tuple[Int64Array, Int64Array, _UInt64]:
        """Codes ``[n]`` of the ids of a column, and by code the key and the mixed hash."""
        if not self.as_text:
            codes, keys = pd.factorize(_integers(column))
            return codes, keys, _salted(keys.view(np.uint64), self.salt)
        codes, texts = _texts(file, self.role, column)
        if "" in texts:
            wrong = int(np.argmax(codes == texts.index("")))
            _wrong_row(file, row + wrong, f"{self.role} id is empty: give every row one")
        for text in texts:
            if text not in self.key:
                self.key[text] = len(self.hash)
                self.hash.append(_text_hash(text))
        keys = np.array([self.key[text] for text in texts], dtype=np.int64)
        hashes = np.array([self.hash[key] for key in keys], dtype=np.uint64)
        return codes, keys, _salted(hashes, self.salt)

    def finish(self) -> tuple[IdMap, _Index, Int64Array, npt.NDArray[np.float64]]:
        """The map of all ids, the way to their indices, and by index the count and sum of the ratings."""
        keys, counts, sums = self.tally.result()
        if not self.as_text:
            ids = IdMap(keys)
            return ids, _Index.of_integers(keys, _salted(keys.view(np.uint64), self.salt)), counts, sums
        texts = list(self.key)
        ids = IdMap.of(texts)
        index = ids.index(texts)  # of each key; every key is in the tally
        by_index = np.argsort(index)
        hashes = _salted(np.array(self.hash, dtype=np.uint64), self.salt)[by_index]
        table = dict(zip(texts, index.tolist(), strict=True))
        return ids, _Index(hashes, texts=table), counts[by_index], sums[by_index]


class _Tally:
    """Counts and sums of ratings by key, in O(keys) memory: sorted ones, and what came since."""

    def __init__(self) -> None:
        self.parts: list[tuple[Int64Array, Int64Array, npt.NDArray[np.float64]]] = []
        self.pending = self.compacted = 0

    def add(self, keys: Int64Array, codes: Int64Array, ratings: _Float32) -> None:
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


class _Index:
    """From the ids of a column to their indices, for ids that are all known; and hashes by index."""

    def __init__(
        self,
        hashes: _UInt64,
        *,
        texts: dict[str, int] | None = None,
        ids: Int64Array | None = None,
        table: _Int32 | None = None,
        low: int = 0,
    ) -> None:
        self.hashes, self.texts, self.ids, self.table, self.low = hashes, texts, ids, table, low

    @classmethod
    def of_integers(cls, ids: Int64Array, hashes: _UInt64) -> _Index:
        low, high = int(ids[0]), int(ids[-1])
        if high - low >= _TABLE_CELLS_AN_ID * len(ids):
            return cls(hashes, ids=ids)
        table = np.zeros(high - low + 1, dtype=np.int32)
        table[ids - low] = np.arange(len(ids), dtype=np.int32)
        return cls(hashes, table=table, low=low)

    def __call__(self, column: Any) -> _Int32:
        if self.texts is not None:
            codes, texts = _texts(None, "", column)
            return np.array([self.texts[text] for text in texts], dtype=np.int32)[codes]
        values = _integers(column)
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


# Hashes -----------------------------------------------------------------------------------------------------


def _mix(z: _UInt64) -> _UInt64:
    """The finaliser of SplitMix64, of each number."""
    z = z + np.uint64(0x9E3779B97F4A7C15)
    z ^= z >> np.uint64(30)
    z *= np.uint64(0xBF58476D1CE4E5B9)
    z ^= z >> np.uint64(27)
    z *= np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    return z


def _salted(hashes: _UInt64, salt: int) -> _UInt64:
    return _mix(hashes ^ np.uint64(salt))


def _seed_hash(seed: int) -> np.uint64:
    return _mix(np.array([seed % 2**64], dtype=np.uint64))[0]


def _threshold(test_share: float) -> np.uint64:
    return np.uint64(int(test_share * 2.0**64))


def _text_hash(text: str) -> int:
    """h of an id, see the module."""
    # A plain integer is what Python writes it as: no "007", no "+5", no digits of other scripts.
    if text[-1].isdigit() and len(text) <= 20:
        with contextlib.suppress(ValueError):
            number = int(text)
            if str(number) == text and -(2**63) <= number < 2**63:
                return number % 2**64
    return int.from_bytes(hashlib.blake2b(text.encode()).digest()[:8], "little")


# Parquet ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _File:
    path: Path
    rows: list[int]  # of each row group
    size: int
    changed: int  # st_mtime_ns
    texts: list[str]  # columns of texts: a page can name one of a megabyte a million times

    def check(self) -> None:
        """RatingFileError where the file is not the one that was opened."""
        try:
            now = self.path.stat()
        except OSError as error:
            raise RatingFileError(f"{self.path}: cannot be read any more ({error})") from error
        if (now.st_size, now.st_mtime_ns) != (self.size, self.changed):
            raise RatingFileError(f"{self.path}: has changed since it was opened: open the stream again")


def _require_pyarrow(path: object) -> None:
    try:
        import pyarrow  # noqa: F401
    except ImportError as error:
        raise ImportError(f"{path}: reading Parquet needs pyarrow: pip install pyarrow") from error


def _find_files(path: Path, columns: dict[str, str | None]) -> tuple[list[_File], set[str]]:
    """The files of a path, their columns checked, and for which of user and item any file has texts."""
    from pyarrow import parquet, types

    if path.is_dir():
        found = sorted(p for p in path.iterdir() if p.suffix.lower() == ".parquet" and p.is_file())
        if not found:
            raise RatingFileError(f"{path}: there is no .parquet file in this folder")
    elif not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    elif path.suffix.lower() != ".parquet":
        raise RatingFileError(
            f"{path}: ratings are streamed from Parquet alone, and the extension is {path.suffix!r}: convert "
            "the file, or read it whole with read_ratings"
        )
    else:
        found = [path]
    files, text_roles = [], set()
    for file in found:
        state = file.stat()
        if state.st_size == 0:
            raise RatingFileError(f"{file}: the file is empty")
        try:
            with parquet.ParquetFile(file) as content:
                schema, metadata = content.schema_arrow, content.metadata
                rows = [metadata.row_group(k).num_rows for k in range(metadata.num_row_groups)]
        except Exception as error:  # pyarrow reports damage by errors of a dozen types
            _damaged(file, error)
        names = list(schema.names)
        texts: list[str] = []
        for role, name in columns.items():
            if name is None or (role == "timestamp" and name not in names):
                continue
            if names.count(name) != 1:
                listed = ", ".join(repr(n) for n in names[:30])
                raise RatingFileError(
                    f"{file}: there are {names.count(name)} columns {name!r} for the {role}; the columns are "
                    f"{listed}: name the right one with {role}=..., on the command line --{role}-column"
                )
            kind = schema.field(name).type
            kind = kind.value_type if types.is_dictionary(kind) else kind
            is_text = (
                types.is_string(kind)
                or types.is_large_string(kind)
                or types.is_binary(kind)
                or types.is_large_binary(kind)
                or (hasattr(types, "is_string_view") and types.is_string_view(kind))
            )
            is_number = types.is_integer(kind) or types.is_floating(kind) or types.is_decimal(kind)
            if is_text:
                texts.append(name)
            if role in ("user", "item") and is_text:
                text_roles.add(role)
            elif role in ("user", "item") and not types.is_integer(kind):
                raise RatingFileError(
                    f"{file}: the {role} column {name!r} has values of type {kind}: store ids as integers or "
                    "strings"
                )
            elif role == "rating" and not is_number:
                raise RatingFileError(
                    f"{file}: the rating column {name!r} has values of type {kind}: store numbers"
                )
        used = [
            names.index(name) for role, name in columns.items() if name is not None and role != "timestamp"
        ]
        with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            if check_sizes(file, data, used, streamed=True) != sum(rows):
                raise RatingFileError(f"{file}: the Parquet file is damaged: its numbers of rows differ")
        files.append(_File(file, rows, state.st_size, state.st_mtime_ns, texts))
    if not any(sum(file.rows) for file in files):
        raise RatingFileError(f"{path}: there is no row")
    return files, text_roles


def _record_batches(file: _File, groups: Sequence[int], columns: dict[str, str | None]) -> Iterator[Any]:
    """The columns that are used, PIECE_ROWS rows at a time, of some row groups in that order."""
    from pyarrow import parquet

    wanted = [name for role, name in columns.items() if name is not None and role != "timestamp"]
    file.check()
    try:
        # Nothing is read before it is needed, and no threads: memory must not grow with a row group.
        with parquet.ParquetFile(
            file.path, buffer_size=READ_BYTES, pre_buffer=False, read_dictionary=file.texts
        ) as content:
            for batch in content.iter_batches(
                PIECE_ROWS, row_groups=list(groups), columns=wanted, use_threads=False
            ):
                if len(batch):
                    yield batch
    except RatingFileError:
        raise
    except Exception as error:
        _damaged(file.path, error)


def _column(batch: Any, name: str | None) -> Any:
    return batch.column(batch.schema.get_field_index(name))


def _integers(column: Any) -> Int64Array:
    import pyarrow as pa

    return _decoded(column).cast(pa.int64()).to_numpy(zero_copy_only=False)


def _texts(file: _File | None, role: str, column: Any) -> tuple[Int64Array, list[str]]:
    """Codes ``[n]`` of a column of texts, and by code the text; each is there once before it is stripped.

    RatingFileError, where ``file`` is given, for one of more than MAX_FIELD characters.
    """
    import pyarrow as pa
    from pyarrow import types

    encoded = column if types.is_dictionary(column.type) else column.dictionary_encode()
    # A dictionary is a row group's, and a text that no row of this piece names may be in no row at all.
    used, codes = np.unique(encoded.indices.to_numpy(zero_copy_only=False), return_inverse=True)
    texts = [text or "" for text in encoded.dictionary.take(pa.array(used)).cast(pa.string()).to_pylist()]
    longest = max(texts, key=len)
    if file is not None and len(longest) > MAX_FIELD:
        raise RatingFileError(
            f"{file.path}: {role} {brief(longest)} has more than {MAX_FIELD:,} characters: give it a shorter "
            "one"
        )
    return codes.reshape(-1), [text.strip() for text in texts]


def _decoded(column: Any) -> Any:
    from pyarrow import types

    return column.dictionary_decode() if types.is_dictionary(column.type) else column


def _ratings(batch: Any, name: str | None) -> _Float32:
    """Ratings ``[n]``, infinite where float32 cannot hold one."""
    import pyarrow as pa
    from pyarrow import types

    if name is None:
        return np.ones(len(batch), dtype=np.float32)
    column = _decoded(_column(batch, name))
    if not types.is_float32(column.type):
        column = column.cast(pa.float64(), safe=False)
    with np.errstate(over="ignore"):
        return column.to_numpy(zero_copy_only=False).astype(np.float32, copy=False)


def _first_null(column: Any) -> int:
    return int(np.argmax(column.is_null().to_numpy(zero_copy_only=False)))


def _wrong_row(file: _File, row: int, problem: str) -> NoReturn:
    group = int(np.searchsorted(np.cumsum(file.rows), row, side="right"))
    raise RatingFileError(f"{file.path}, row {row + 1} (row group {group}): {problem}")


def _damaged(path: Path, error: Exception) -> NoReturn:
    raise RatingFileError(f"{path}: the Parquet file is damaged or cut short ({error})") from error


def _release_memory() -> None:
    """Gives what pyarrow keeps for later back to the system."""
    import pyarrow as pa

    pa.default_memory_pool().release_unused()


# ------------------------------------------------------------------------------------------------------------


def _tensors(parts: Sequence[_Rows]) -> Batch:
    if not parts:
        return torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64), torch.empty(0)
    user, item, rating = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    return torch.from_numpy(user).long(), torch.from_numpy(item).long(), torch.from_numpy(rating)


def _ahead(source: Generator[_Rows, None, None]) -> Generator[_Rows, None, None]:
    """What ``source`` gives, the next one made in a thread while one is used; its errors are raised here."""
    made: queue.SimpleQueue[tuple[_Rows | None, BaseException | None]] = queue.SimpleQueue()
    wanted = threading.Semaphore(1)
    stopped = threading.Event()

    def work() -> None:
        try:
            with closing(source):
                while True:
                    wanted.acquire()
                    if stopped.is_set():
                        return
                    rows = next(source, None)
                    made.put((rows, None))
                    if rows is None:
                        return
                    del rows
        except BaseException as error:
            made.put((None, error))

    thread = threading.Thread(target=work, name="lunet-fast reader", daemon=True)
    thread.start()
    try:
        while True:
            rows, error = made.get()
            if error is not None:
                raise error
            if rows is None:
                return
            wanted.release()
            yield rows
            del rows
    finally:
        stopped.set()
        wanted.release()
        thread.join()


def _check_whole(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")

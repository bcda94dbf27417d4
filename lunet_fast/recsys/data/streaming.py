"""Ratings from Parquet files that need not fit into memory, for training and for testing.

:meth:`RatingStream.open` reads the files once, checks every value as :func:`~.ratings.read_ratings` does and
keeps what a model needs of them: the ids, the scale, and means and counts of the training part, O(users +
items) numbers. Every later pass reads the files again. No pass holds more than a buffer of rows, however many
there are.

Which rows are tested is no draw but a property of the pair, defined in :mod:`~.pair_hash`.

A pair that is rated twice cannot be noticed without remembering every pair: both its rows are used, in the
same part. :func:`~.ratings.read_ratings` refuses such a file.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torch import Tensor

from lunet_fast.recsys.data.errors import check_whole
from lunet_fast.recsys.data.first_pass import FirstPass, Index, Int32Array, Progress
from lunet_fast.recsys.data.ids import IdMap, Int64Array, TwoIdMaps
from lunet_fast.recsys.data.pair_hash import is_tested
from lunet_fast.recsys.data.parquet_pieces import (
    Float32Array,
    PieceFile,
    column_of,
    damaged,
    find_files,
    names_in,
    ratings_of,
    record_batches,
)
from lunet_fast.recsys.data.parquet_table import require_pyarrow
from lunet_fast.recsys.data.ratings import Ratings, from_frame
from lunet_fast.recsys.data.table import by_role

__all__ = ["RatingStream"]

Batch = tuple[Tensor, Tensor, Tensor]
"""Users and items, int64 ``[b]``, and ratings, float32 ``[b]``."""

BUFFER_ROWS = 1 << 20
"""Training rows that are shuffled together."""

_Rows = tuple[Int32Array, Int32Array, Float32Array]

_ORDER, _BUFFER = 5, 6  # streams of a seed; splits has 0 to 3


@dataclass(frozen=True, eq=False, repr=False)
class RatingStream(TwoIdMaps):
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
    _files: list[PieceFile] = field(repr=False)
    # By row group, those of all files one after the other: (file, group of the file), and training rows.
    _groups: list[tuple[int, int]] = field(repr=False)
    _group_rows: Int64Array = field(repr=False)
    _user_index: Index = field(repr=False)
    _item_index: Index = field(repr=False)

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
        RATIO times its size, or a page of more than
        :func:`~lunet_fast.training.outside.max_bytes`; an id of more than MAX_FIELD characters.
        FileNotFoundError where there is no file, ImportError without pyarrow,
        ValueError for a wrong argument and where no row is left to train on.
        """
        require_pyarrow(f"{path}: reading Parquet")
        check_whole("seed", seed, 0)
        check_whole("buffer_rows", buffer_rows, 1)
        if isinstance(test_share, bool) or not 0 <= test_share < 1:
            raise ValueError(f"test_share must be a share of at least 0 and below 1, got {test_share!r}")
        columns = by_role(user=user, item=item, rating=rating, timestamp=timestamp)
        place = Path(path)
        files = find_files(place, columns)
        columns = names_in(files, columns)
        first = FirstPass.over(files, columns, test_share, seed, progress)
        group_rows = np.concatenate(first.group_rows)
        total, n_rows = sum(sum(file.rows) for file in files), int(group_rows.sum())
        if n_rows == 0:
            raise ValueError(
                f"{place}: test_share={test_share} leaves none of the {total} rows to train on: lower it"
            )
        users, user_index, user_count, user_sum = first.users.finish()
        items, item_index, item_count, item_sum = first.items.finish()
        levels = level_count = None
        if first.levels is not None:
            levels = torch.tensor(sorted(first.levels), dtype=torch.float32)
            level_count = torch.tensor([first.levels[level] for level in sorted(first.levels)])
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
            levels=levels,
            level_count=level_count,
            fingerprint=f"{first.fingerprint:016x}",
            test_share=float(test_share),
            seed=int(seed),
            buffer_rows=int(buffer_rows),
            _columns=columns,
            _files=files,
            _groups=[(n, group) for n, file in enumerate(files) for group in range(len(file.rows))],
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
        check_whole("epoch", epoch, 0)
        check_whole("batch_size", batch_size, 1)
        check_whole("start", start, 0)
        seed = self.seed if seed is None else seed
        check_whole("seed", seed, 0)
        return self._batches(int(epoch), int(batch_size), int(start), int(seed))

    def test_batches(self, batch_size: int) -> Generator[Batch, None, None]:
        """The test rows in the order of the files: users, items, ratings, as :meth:`batches` gives them."""
        check_whole("batch_size", batch_size, 1)
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
                with parquet.ParquetFile(file.path, read_dictionary=list(file.texts.values())) as content:
                    present = [name for name in wanted if name in content.schema_arrow.names]
                    frames.append(content.read(columns=present).to_pandas(ignore_metadata=True))
            except Exception as error:
                damaged(file.path, error)
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
            for batch in record_batches(file, [group for _, group in run], self._columns):
                user = self._user_index(column_of(batch, self._columns["user"]))
                item = self._item_index(column_of(batch, self._columns["item"]))
                rating = ratings_of(batch, self._columns["rating"])
                kept = self._is_test(user, item) == test
                if wanted is not None:
                    kept &= wanted[user]
                done += len(user)
                yield user[kept], item[kept], rating[kept]
                if progress is not None:
                    progress(done, len(self))

    def _is_test(self, user: npt.NDArray[Any], item: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
        pair = self._user_index.hashes[user] ^ self._item_index.hashes[item]
        return is_tested(pair, self.test_share, self.seed)


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

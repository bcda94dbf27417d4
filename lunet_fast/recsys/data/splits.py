"""Training, test and held-out parts of a data set, and the candidates that ranking chooses from.

Every split is fixed by its seed and by nothing else. Rows of the test part are there to predict ratings of,
held-out rows to be found again among other items. The streams of one seed are independent of each other:
``default_rng(seed)`` draws the test part, ``(seed, 1)`` the validation part, ``(seed, 2)`` the held-out rows
and ``(seed, 3)`` the candidates.

NumPy's generator is used, never torch's global one: the same seed gives the same split whatever ran before.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch

from lunet_fast.recsys.data.errors import check_whole
from lunet_fast.recsys.data.ids import IdMap, Int64Array
from lunet_fast.recsys.data.order import time_keys
from lunet_fast.recsys.data.ratings import Ratings

__all__ = [
    "Split",
    "draw_candidates",
    "holdout",
    "join",
    "joint_split",
    "leave_one_out",
    "per_user_split",
    "random_split",
    "time_split",
]

SplitName = Literal["random", "per-user", "files", "leave-one-out", "joint", "time"]

_NO_ROWS: Int64Array = np.empty(0, dtype=np.int64)


@dataclass(frozen=True, eq=False)
class Split:
    """Rows of a :class:`~.ratings.Ratings` for training, for rating prediction and for ranking.

    ``train``, ``test`` and ``held_out`` are int64 row indices, each sorted, disjoint, and together all rows.
    ``test`` is empty for ``leave-one-out``, ``held_out`` for ``random``, ``per-user`` and ``files``. ``seed``
    is None where files made the split.
    """

    train: torch.Tensor
    test: torch.Tensor
    held_out: torch.Tensor
    name: SplitName
    seed: int | None


def random_split(ratings: Ratings, seed: int, test_fraction: float = 0.2) -> Split:
    """A part of all rows at random: the first rows of ``default_rng(seed).permutation(N)`` are the test part.

    Of N rows, floor(test_fraction * N + 1/2) are tested, at least 1 and at most N - 1. A user or item may
    have no training row. ValueError for a fraction outside (0, 1), a negative seed or fewer than 2 rows.
    O(N).
    """
    _check(seed, test_fraction, "test_fraction")
    n = len(ratings)
    if n < 2:
        raise ValueError(f"ratings must have at least 2 rows to be split, got {n}")
    return _split(n, "random", seed, test=_random_part(n, seed, test_fraction))


def per_user_split(ratings: Ratings, seed: int, test_fraction: float = 0.2) -> Split:
    """A part of each user's rows at random, so that every user keeps at least one training row.

    Of a user's n rows, floor(test_fraction * n + 1/2) are tested, at most n - 1: with 0.2, users with 1 or 2
    rows have none, and one with 3 has one. ValueError as :func:`random_split`, and where no user gives a test
    row. O(N log N).
    """
    _check(seed, test_fraction, "test_fraction")
    n = len(ratings)
    user = ratings.user.cpu().numpy()
    # The rows in a random order, then grouped by user (stable): each user's rows are in a random order.
    order = np.random.default_rng(seed).permutation(n)
    order = order[np.argsort(user[order], kind="stable")]
    counts = np.bincount(user, minlength=1)
    n_test = np.minimum(np.floor(test_fraction * counts + 0.5), np.maximum(counts - 1, 0)).astype(np.int64)
    place = np.arange(n) - (np.cumsum(counts) - counts)[user[order]]
    test = order[place < n_test[user[order]]]
    if not len(test):
        raise ValueError(
            f"test_fraction={test_fraction} of each user's rows is no row at all: no user of these {n} "
            "ratings has enough; use random_split or a larger fraction"
        )
    return _split(n, "per-user", seed, test=test)


def leave_one_out(ratings: Ratings, seed: int) -> Split:
    """Holds out each user's most recent rating; all other rows train, and ``test`` is empty.

    The most recent rating has the user's greatest timestamp, where 0 (unknown) is older than every known
    time, or stands where :mod:`~.order` places it. Where several rows of the user tie for it, one of them is
    drawn at random, each with the same probability: neither the order of a file nor an id says anything about
    time, and ids go with popularity.
    Where no time is known, for one user or in the whole data set, all rows of the user tie. A user with
    fewer than 2 rows keeps them in training and has none held out.

    The draws, ``default_rng((seed, 2)).permutation(N)``, go to the rows in the order of (user, item), so the
    same pairs are held out whatever the order of the rows. ValueError for a negative seed, and where no user
    has 2 rows. O(N log N).
    """
    check_whole("seed", seed, 0)
    return _split(len(ratings), "leave-one-out", seed, held_out=_most_recent(ratings, seed))


def joint_split(ratings: Ratings, seed: int, test_fraction: float = 0.2) -> Split:
    """Holds out what :func:`leave_one_out` holds out with the same seed; the rest is divided at random.

    Of the R rows that are not held out, those at the first places of ``default_rng(seed).permutation(R)`` are
    the test part: floor(test_fraction * R + 1/2) of them, at least 1 and at most R - 1, as in
    :func:`random_split`. A user or item may have no training row. The held-out pairs do not depend on the
    order of the rows, the test part does. ValueError as the two raise, and where R < 2. O(N log N).
    """
    _check(seed, test_fraction, "test_fraction")
    n = len(ratings)
    held_out = _most_recent(ratings, seed)
    rest = np.setdiff1d(np.arange(n), held_out, assume_unique=True)
    if len(rest) < 2:
        raise ValueError(
            "ratings must have at least 2 rows beside the held-out ones to be split into training and test, "
            f"got {len(rest)}"
        )
    test = rest[_random_part(len(rest), seed, test_fraction)]
    return _split(n, "joint", seed, test=test, held_out=held_out)


def time_split(ratings: Ratings, seed: int, test_fraction: float = 0.2) -> Split:
    """Divides all rows at one time: what came before it trains, and nothing of what came later.

    The time is the earliest that leaves at most floor(test_fraction * N + 1/2) rows at it or after it; rows
    of one second are on one side. Of each user with rows on both sides the first later one is held out, drawn
    as in :func:`leave_one_out` where several tie for it; all other later rows are the test part, those of
    users without a training row among them.

    ValueError as :func:`random_split`, where the time of any row is unknown, where all rows are of one time,
    and where no user has rows on both sides. O(N log N).
    """
    _check(seed, test_fraction, "test_fraction")
    n = len(ratings)
    time = np.zeros(n, dtype=np.int64) if ratings.timestamp is None else ratings.timestamp.cpu().numpy()
    unknown = int((time == 0).sum())
    if unknown:
        raise ValueError(
            f"a split by time needs the time of every rating, and {unknown} of the {n} of {ratings.name} "
            "have none: use leave_one_out, which needs the order of each user's ratings alone"
        )
    ascending = np.sort(time)
    first_later = max(n - _rounded(test_fraction * n), 1)
    later_times = ascending[first_later:][ascending[first_later:] > ascending[first_later - 1]]
    if not len(later_times):
        raise ValueError(
            f"test_fraction={test_fraction} leaves no time that divides the {n} ratings of {ratings.name}: "
            "their last ones are of one second; choose a larger fraction"
        )
    later = np.flatnonzero(time >= later_times[0])
    user = ratings.user.cpu().numpy()
    known = np.zeros(ratings.n_users, dtype=bool)
    known[user[time < later_times[0]]] = True
    later_of_known = later[known[user[later]]]
    order = later_of_known[
        np.lexsort((_draws(ratings, seed)[later_of_known], time[later_of_known], user[later_of_known]))
    ]
    held_out = order[np.flatnonzero(np.diff(user[order], prepend=-1))]
    if not len(held_out):
        raise ValueError(f"no user of {ratings.name} has ratings before and after the time of the split")
    return _split(n, "time", seed, test=np.setdiff1d(later, held_out), held_out=held_out)


def draw_candidates(ratings: Ratings, held_out: torch.Tensor, seed: int, count: int = 100) -> torch.Tensor:
    """For each held-out row, ``count`` distinct items that its user has not rated; int64 ``[H, count]``.

    ``ratings`` is the complete data set and ``held_out`` int64 ``[H]`` some of its rows: an item rated in any
    part, the held-out one included, is no candidate. Every set of ``count`` of the other items of
    ``ratings.items`` is equally likely. A row of the result is in ascending order; where the user has fewer
    such items, it has all of them, then -1.

    The draws come from ``default_rng((seed, 3))`` and go to the held-out rows in the order of (user, item):
    they depend on which pairs are held out, and not on the order of the rows. ValueError for a negative seed,
    ``count`` below 1, and ``held_out`` that is not a list of rows of ``ratings``. O(N log N + H count² + H
    count log N) time; H count numbers of memory beside the arguments, a few times over.
    """
    check_whole("seed", seed, 0)
    check_whole("count", count, 1)
    if held_out.dim() != 1 or held_out.dtype != torch.int64:
        raise ValueError(
            f"held_out must be int64 row indices [H], got {held_out.dtype} {list(held_out.shape)}"
        )
    rows = held_out.cpu().numpy()
    outside = rows[(rows < 0) | (rows >= len(ratings))]
    if len(outside):
        raise ValueError(
            f"held_out must be rows of ratings, 0 to {len(ratings) - 1}, got {outside[0]}: pass the complete "
            "ratings that were split"
        )
    n_items = ratings.n_items
    user, item = ratings.user.cpu().numpy(), ratings.item.cpu().numpy()
    order = np.lexsort((item[rows], user[rows]))
    drawn_for = user[rows[order]]

    seen_user, seen_item = np.divmod(np.unique(user * n_items + item), n_items)
    n_seen = np.bincount(seen_user, minlength=ratings.n_users)
    start = np.cumsum(n_seen) - n_seen
    unseen = n_items - n_seen[drawn_for]

    # R. W. Floyd's sampling: the places of the candidates among the user's unseen items, by ascending item.
    rng = np.random.default_rng((seed, 3))
    size = np.minimum(count, unseen)
    place = np.full((count, len(rows)), n_items, dtype=np.int64)  # n_items: none
    for step in range(count):
        last = unseen - size + step
        drawn = rng.integers(0, last + 1)
        taken = (place[:step] == drawn).any(axis=0)
        place[step] = np.where(step < size, np.where(taken, last, drawn), n_items)
    place.sort(axis=0)

    # The unseen item at place r is r + the number of seen items that have at most r unseen items below them.
    below = seen_item - (np.arange(len(seen_item)) - start[seen_user])
    key = seen_user * (n_items + 1) + below
    found = np.searchsorted(key, drawn_for * (n_items + 1) + place, side="right") - start[drawn_for]
    candidates = np.empty((len(rows), count), dtype=np.int64)
    candidates[order] = np.where(place < n_items, place + found, -1).T
    return torch.from_numpy(candidates)


def join(train: Ratings, test: Ratings) -> tuple[Ratings, Ratings]:
    """The training and the test part of a data set that came as two files, both indexed by the ids of both.

    The scale of each covers both; a timestamp that only one of them has is 0 (unknown) in the other;
    ``item_info`` and ``user_info`` are kept where they belong to exactly the ids of both together; texts and
    ties are not, and are to be read for the joined parts. ValueError
    where a (user, item) pair is in both files: training would know its rating. O(N log N).
    """
    users, items = _union(train.users, test.users), _union(train.items, test.items)
    parts = []
    for part in (train, test):
        user = torch.from_numpy(users.index(part.users.ids))[part.user]
        item = torch.from_numpy(items.index(part.items.ids))[part.item]
        parts.append((user, item, user * len(items) + item))
    shared = np.intersect1d(parts[0][2].numpy(), parts[1][2].numpy())
    if len(shared):
        user_index, item_index = divmod(int(shared[0]), len(items))
        raise ValueError(
            f"{len(shared)} (user, item) pairs of the test file {test.name} are in the training file "
            f"{train.name} too, for one user {users.ids[user_index]} and item {items.ids[item_index]}: "
            "remove them from one of the two"
        )
    has_times = train.timestamp is not None or test.timestamp is not None
    item_info = [r.item_info for r in (train, test) if r.item_info is not None and r.items == items]
    user_info = [r.user_info for r in (train, test) if r.user_info is not None and r.users == users]
    joined = []
    for part, (user, item, _) in zip((train, test), parts, strict=True):
        unknown = torch.zeros_like(user) if has_times else None
        joined.append(
            replace(
                part,
                user=user,
                item=item,
                timestamp=unknown if part.timestamp is None else part.timestamp,
                users=users,
                items=items,
                scale=(min(train.scale[0], test.scale[0]), max(train.scale[1], test.scale[1])),
                item_text=None,
                friends=None,
                item_info=item_info[0] if item_info else None,
                user_info=user_info[0] if user_info else None,
            )
        )
    return joined[0], joined[1]


def holdout(index: torch.Tensor, fraction: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Divides the rows ``index`` [N] at random into (rest, part), both sorted; ``part`` is for validation.

    ``part`` has floor(fraction * N + 1/2) rows, at least 1 and at most N - 1, drawn by ``default_rng((seed,
    1))``, so that it is independent of the split that the same seed made. The order of ``index`` does not
    matter. ValueError for a fraction outside (0, 1), a negative seed, fewer than 2 rows or repeated rows. O(N
    log N).
    """
    _check(seed, fraction, "fraction")
    rows = np.unique(index.cpu().numpy())
    if index.dim() != 1 or len(rows) != len(index):
        raise ValueError(
            f"index must be one-dimensional without repeated rows, got shape {list(index.shape)}"
        )
    if len(rows) < 2:
        raise ValueError(f"index must have at least 2 rows to be divided, got {len(rows)}")
    n_part = min(max(_rounded(fraction * len(rows)), 1), len(rows) - 1)
    order = np.random.default_rng((seed, 1)).permutation(len(rows))
    return torch.from_numpy(np.sort(rows[order[n_part:]])), torch.from_numpy(np.sort(rows[order[:n_part]]))


def _check(seed: int, fraction: float, name: str) -> None:
    check_whole("seed", seed, 0)
    if not 0 < fraction < 1:
        raise ValueError(f"{name} must lie between 0 and 1, both excluded, got {fraction!r}")


def _rounded(value: float) -> int:
    return math.floor(value + 0.5)


def _random_part(n: int, seed: int, fraction: float) -> Int64Array:
    n_part = min(max(_rounded(fraction * n), 1), n - 1)
    return np.random.default_rng(seed).permutation(n)[:n_part]


def _most_recent(ratings: Ratings, seed: int) -> Int64Array:
    """The row that :func:`leave_one_out` holds out, for each user with 2 rows or more."""
    n = len(ratings)
    user = ratings.user.cpu().numpy()
    place, known = time_keys(ratings)
    order = np.lexsort((_draws(ratings, seed), known, place, user))
    counts = np.bincount(user)
    last = order[np.cumsum(counts)[counts >= 2] - 1]
    if not len(last):
        raise ValueError(
            f"no user of these {n} ratings has 2 rows, one to hold out and one to train on: use random_split"
        )
    return last


def _draws(ratings: Ratings, seed: int) -> Int64Array:
    """A number for each row, by which ties are decided; fixed by the seed and the (user, item) pairs."""
    user, item = ratings.user.cpu().numpy(), ratings.item.cpu().numpy()
    draw = np.empty(len(user), dtype=np.int64)
    draw[np.lexsort((item, user))] = np.random.default_rng((seed, 2)).permutation(len(user))
    return draw


def _split(
    n: int, name: SplitName, seed: int, test: Int64Array = _NO_ROWS, held_out: Int64Array = _NO_ROWS
) -> Split:
    part = np.zeros(n, dtype=np.int8)
    part[test], part[held_out] = 1, 2
    train_rows, test_rows, held_out_rows = (torch.from_numpy(np.flatnonzero(part == k)) for k in range(3))
    return Split(train_rows, test_rows, held_out_rows, name, int(seed))


def _union(first: IdMap, second: IdMap) -> IdMap:
    return first if first == second else IdMap.of([*first.ids.tolist(), *second.ids.tolist()])

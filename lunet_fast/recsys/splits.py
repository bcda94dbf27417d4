"""Training and test parts of a data set. Every split is fixed by its seed and by nothing else.

NumPy's generator is used, never torch's global one: the same seed gives the same split whatever ran before.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch

from lunet_fast.recsys.ratings import IdMap, Int64Array, Ratings

__all__ = ["Split", "holdout", "join", "per_user_split", "random_split"]


@dataclass(frozen=True, eq=False)
class Split:
    """Rows of a :class:`~.ratings.Ratings` for training and for testing.

    ``train`` and ``test`` are int64 row indices, each sorted, disjoint, and together all rows. ``seed`` is
    None where files made the split.
    """

    train: torch.Tensor
    test: torch.Tensor
    name: Literal["random", "per-user", "files"]
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
    order = np.random.default_rng(seed).permutation(n)
    n_test = min(max(_rounded(test_fraction * n), 1), n - 1)
    return _split(order[:n_test], n, "random", seed)


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
    return _split(test, n, "per-user", seed)


def join(train: Ratings, test: Ratings) -> tuple[Ratings, Ratings]:
    """The training and the test part of a data set that came as two files, both indexed by the ids of both.

    The scale of each covers both; a timestamp that only one of them has is 0 (unknown) in the other;
    ``item_info`` and ``user_info`` are kept where they belong to exactly the ids of both together. ValueError
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
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or seed < 0:
        raise ValueError(f"seed must be an integer of at least 0, got {seed!r}")
    if not 0 < fraction < 1:
        raise ValueError(f"{name} must lie between 0 and 1, both excluded, got {fraction!r}")


def _rounded(value: float) -> int:
    return math.floor(value + 0.5)


def _split(test: Int64Array, n: int, name: Literal["random", "per-user"], seed: int) -> Split:
    is_test = np.zeros(n, dtype=bool)
    is_test[test] = True
    train_rows, test_rows = np.flatnonzero(~is_test), np.flatnonzero(is_test)
    return Split(torch.from_numpy(train_rows), torch.from_numpy(test_rows), name, int(seed))


def _union(first: IdMap, second: IdMap) -> IdMap:
    return first if first == second else IdMap.of([*first.ids.tolist(), *second.ids.tolist()])

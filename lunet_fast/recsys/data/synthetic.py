"""Ratings from a known model, as many as one likes, for tests of scale."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lunet_fast.recsys.data.parquet_table import require_pyarrow
from lunet_fast.training.files import write_atomically

ROW_GROUP = 1 << 17
"""Rows of a row group of the file."""

BLOCK_ROWS = 1 << 20
"""Rows made at a time, unless one user has more: bounds the memory."""

LEAST_RATINGS = 20
"""Of a user, as in MovieLens, where there are that many ratings a user."""

FACTORS = 16
MEAN, USER_SD, ITEM_SD, FACTOR_SD, NOISE_SD = 3.6, 0.4, 0.4, 0.5, 0.7
"""Of rating = mean + b_u + b_i + p_u.q_i + noise, standard deviations of the four terms."""

ACTIVITY = 1.2
"""Standard deviation of the logarithm of a user's share of the ratings beyond the least number."""

POPULARITY, POPULARITY_SHIFT = 1.3, 0.01
"""An item of rank k (from 0) of I is chosen with probability proportional to (k + shift I)^-exponent."""

FIRST_TIME, SPAN = 820_454_400, 27 * 365 * 86_400
"""Times lie between the start of 1996 and 27 years later."""

_ROUNDS = 12
_Floats = npt.NDArray[np.float64]
_Integers = npt.NDArray[np.int64]


def synthesize(
    path: Path | str | os.PathLike[str],
    *,
    users: int,
    items: int,
    ratings: int,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Write a Parquet file of ``ratings`` ratings and return how they were made.

    Columns ``user`` and ``item`` (int64, from 1), ``rating`` (float32, 0.5 to 5 in halves) and ``timestamp``
    (int64, Unix seconds), in the order of users as in MovieLens; no pair comes twice. Users have log-normal
    activity, items a Zipf-Mandelbrot popularity, a rating is that of FACTORS latent factors and biases with
    noise, rounded and clipped. The same arguments and the same NumPy give the same rows.

    The returned values are in the file's metadata too, under ``lunet_fast`` as JSON: the arguments, and
    ``truth_mse``, the mean squared error of the exact noiseless rating, below which no model can get but by
    luck; ``variance`` of the ratings.

    ``progress`` hears of rows made. O(ratings) time, O(users + items + BLOCK_ROWS) memory. ``ValueError``
    where the numbers do not fit together, ``ImportError`` without pyarrow.
    """
    target = Path(path)
    if target.suffix != ".parquet":
        raise ValueError(f"path={str(target)!r} must end in .parquet")
    for name, value in (("users", users), ("items", items), ("ratings", ratings)):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    if seed < 0:
        raise ValueError(f"seed={seed} must be at least 0")
    most = max(1, items // 2)
    if not users <= ratings <= users * most:
        raise ValueError(
            f"ratings={ratings:,} must be at least one a user and at most half of the items for each: from "
            f"{users:,} to {users * most:,}"
        )
    made: dict[str, Any] = {}
    write_atomically(
        target, lambda temporary: made.update(_write(temporary, users, items, ratings, seed, progress))
    )
    return made


def _write(
    path: Path, users: int, items: int, ratings: int, seed: int, progress: Callable[[int], None] | None
) -> dict[str, Any]:
    require_pyarrow(f"{path}: writing Parquet")
    import pyarrow as pa
    from pyarrow import parquet

    rng = np.random.default_rng((seed, 0))
    counts = _activity(rng, users, max(1, items // 2), ratings)
    weight = (np.arange(items) + 1.0 + POPULARITY_SHIFT * items) ** -POPULARITY
    popularity: _Floats = rng.permutation(weight / weight.sum()).astype(np.float64)
    item_bias = rng.normal(0, ITEM_SD, items).astype(np.float32)
    scale = (FACTOR_SD / FACTORS**0.5) ** 0.5
    item_factors = rng.normal(0, scale, (items, FACTORS)).astype(np.float32)

    schema = pa.schema(
        [("user", pa.int64()), ("item", pa.int64()), ("rating", pa.float32()), ("timestamp", pa.int64())]
    )
    squares = total = total_squares = 0.0
    with parquet.ParquetWriter(path, schema, compression="zstd") as writer:
        first = 0
        ends = np.cumsum(counts)
        while first < users:
            done = int(ends[first - 1]) if first else 0
            last = max(first + 1, int(np.searchsorted(ends, done + BLOCK_ROWS, side="right")))
            block = np.random.default_rng((seed, 1, first))
            user, item = _pairs(block, counts[first:last], popularity)
            own = last - first
            user_bias = block.normal(0, USER_SD, own).astype(np.float32)
            user_factors = block.normal(0, scale, (own, FACTORS)).astype(np.float32)
            truth = MEAN + user_bias[user] + item_bias[item]
            truth += np.einsum("ij,ij->i", user_factors[user], item_factors[item])
            noisy = truth + block.normal(0, NOISE_SD, len(truth)).astype(np.float32)
            rating = np.clip(np.rint(noisy * 2) / 2, 0.5, 5.0).astype(np.float32)
            start = block.integers(0, SPAN, own)
            time = FIRST_TIME + (start[user] + block.random(len(user)) * (SPAN - start[user])).astype(
                np.int64
            )
            squares += float(np.square(np.clip(truth, 0.5, 5.0) - rating, dtype=np.float64).sum())
            total += float(rating.sum(dtype=np.float64))
            total_squares += float(np.square(rating, dtype=np.float64).sum())
            columns = [user + (first + 1), item + 1, rating, time]
            writer.write_table(pa.table(columns, schema=schema), row_group_size=ROW_GROUP)
            if progress is not None:
                progress(len(user))
            first = last
        values = {
            "users": users,
            "items": items,
            "ratings": ratings,
            "seed": seed,
            "truth_mse": squares / ratings,
            "variance": total_squares / ratings - (total / ratings) ** 2,
        }
        writer.add_key_value_metadata({"lunet_fast": json.dumps(values)})
    return values


def _activity(rng: np.random.Generator, users: int, most: int, ratings: int) -> _Integers:
    """Ratings of each user: ``ratings`` in all, from the least number to ``most`` each."""
    least = min(LEAST_RATINGS, ratings // users, most)
    share = rng.lognormal(0, ACTIVITY, users)
    counts = np.full(users, least, dtype=np.int64)
    left = ratings - int(counts.sum())
    while left > 0:
        # Cut at ``most``, what is left goes to the others by their shares.
        open_ = np.flatnonzero(counts < most)
        wanted = np.diff(np.rint(np.cumsum(share[open_]) * (left / share[open_].sum())), prepend=0)
        added = np.minimum(wanted.astype(np.int64), most - counts[open_])
        if not added.any():
            added[:left] = 1
        counts[open_] += added
        left = ratings - int(counts.sum())
    return counts


def _pairs(rng: np.random.Generator, counts: _Integers, popularity: _Floats) -> tuple[_Integers, _Integers]:
    """For each user (from 0) ``counts`` different items, by popularity: by user, items in random order."""
    items = len(popularity)
    cumulative = np.cumsum(popularity)
    cumulative /= cumulative[-1]
    chosen = np.empty(0, dtype=np.int64)  # user * items + item, sorted
    missing = counts.copy()
    for _ in range(_ROUNDS):
        # More than needed, since some come twice; popular items of active users again and again.
        drawn_for = np.repeat(np.arange(len(counts)), missing + missing // 4 + (missing > 0))
        drawn = np.searchsorted(cumulative, rng.random(len(drawn_for)), side="right").clip(max=items - 1)
        keys = np.unique(drawn_for * items + drawn)
        if len(chosen):
            place = np.searchsorted(chosen, keys).clip(max=len(chosen) - 1)
            keys = keys[chosen[place] != keys]
        # Of those too many, random ones are kept.
        by_user = np.lexsort((rng.random(len(keys)), np.floor_divide(keys, items)))
        keys = keys[by_user]
        owner = keys // items
        rank = np.arange(len(keys)) - np.searchsorted(owner, owner)
        chosen = np.sort(np.concatenate((chosen, keys[rank < missing[owner]])))
        missing = counts - np.bincount(chosen // items, minlength=len(counts))
        if not missing.any():
            break
    extra = []
    for active in np.flatnonzero(missing).tolist():
        # Very active ones: the rest by Gumbel's trick, without replacement.
        weights = np.log(popularity) + rng.gumbel(size=items)
        begin, end = np.searchsorted(chosen, (active * items, (active + 1) * items))
        weights[chosen[begin:end] - active * items] = -np.inf
        best = np.argpartition(-weights, missing[active] - 1)[: missing[active]]
        extra.append(active * items + best)
    chosen = np.concatenate((chosen, *extra)) if extra else chosen
    user = chosen // items
    order = np.lexsort((rng.random(len(chosen)), user))
    return user[order], (chosen % items)[order]

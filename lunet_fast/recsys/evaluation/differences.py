"""Whether two methods differ: their squared errors, paired over users."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lunet_fast.recsys.data.ratings import Ratings
from lunet_fast.recsys.measures.protocols import Parts

_Floats = npt.NDArray[np.float64]

DRAWS = 4000
"""Bootstrap samples of the users."""

BETWEEN = (0.025, 0.975)
"""Quantiles of the differences of these samples: an interval of 95 %."""


def squared_errors(prediction: Tensor, test: Ratings) -> str:
    """The sum of each user's squared errors, by the users' indices, as words: one line of a file."""
    squares = (prediction.double() - test.rating.double()).square()
    sums = torch.zeros(test.n_users, dtype=torch.float64).index_add_(0, test.user, squares)
    return " ".join(f"{value:.5g}" for value in sums.tolist())


def from_the_best(
    ratings: Ratings, rows: list[dict[str, Any]], runs: Mapping[tuple[str, int], Mapping[str, Any]]
) -> None:
    """Give each of ``rows`` that predicts ratings ``over_best``, by how much its MSE is above the least.

    Compared are rows with the same ``side`` and the same seeds, on the same test ratings. ``over_best`` has
    ``key``, the row of the least MSE; ``mse``, the difference of the two over all seeds' test ratings; and
    ``low`` and ``high``, the ends of its interval: :data:`BETWEEN` of :data:`DRAWS` draws of as many users
    with replacement, the same for all rows, where a user brings its test ratings of all seeds. So the
    interval is that of other users for the trained models; that of other trainings it is not.
    """
    rated = [row for row in rows if row["kind"] == "rating" and row["seeds"]]
    for side in (False, True):
        group = [row for row in rated if row["side"] == side]
        if len(group) < 2:
            continue
        best = min(group, key=lambda row: float(row["test_mse"]))
        seeds = best["seeds"]
        others = [row for row in group if row is not best and row["seeds"] == seeds]
        counts = np.sum([_tested(ratings, seed) for seed in seeds], axis=0)
        errors = [
            np.sum([_sums(runs[row["key"], seed]) for seed in seeds], axis=0) for row in (best, *others)
        ]
        differences = np.array([each - errors[0] for each in errors[1:]]).reshape(len(others), len(counts))
        for row, difference, samples in zip(others, differences, _drawn(differences, counts), strict=True):
            low, high = np.quantile(samples, BETWEEN)
            row["over_best"] = {
                "key": best["key"],
                "mse": float(difference.sum() / counts.sum()),
                "low": float(low),
                "high": float(high),
            }


def _drawn(differences: _Floats, counts: _Floats) -> _Floats:
    """``[rows, DRAWS]``: the mean of ``differences`` ``[rows, users]`` over drawn users' test ratings."""
    rng, users = np.random.default_rng(0), len(counts)
    both = np.concatenate([differences, counts[None]]).T
    found = np.empty((DRAWS, both.shape[1]))
    for draw in found:
        draw[:] = np.bincount(rng.integers(users, size=users), minlength=users) @ both
    return (found[:, :-1] / np.maximum(found[:, -1:], 1)).T


def _tested(ratings: Ratings, seed: int) -> _Floats:
    """How many test ratings each user has."""
    test = Parts.of(ratings, "random", seed).test
    assert test is not None
    return np.bincount(test.user.numpy(), minlength=test.n_users).astype(np.float64)


def _sums(run: Mapping[str, Any]) -> _Floats:
    return np.array(run["user_errors"].split(), dtype=np.float64)

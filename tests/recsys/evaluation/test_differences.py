"""Differences of the squared errors, against their formula and against what is known of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from lunet_fast.recsys.evaluation.differences import from_the_best, squared_errors
from lunet_fast.recsys.measures.protocols import Parts
from tests.recsys.synthetic import latent_ratings

RATINGS = latent_ratings()
SEEDS = [0, 3]


def rows_and_runs(noise: dict[str, float], side: tuple[str, ...] = ()) -> Any:
    """Rows whose predictions are the ratings with normal errors of these standard deviations."""
    rows: list[dict[str, Any]] = []
    runs: dict[tuple[str, int], dict[str, Any]] = {}
    rng = np.random.default_rng(0)
    errors: dict[str, list[Any]] = {key: [] for key in noise}
    for seed in SEEDS:
        test = Parts.of(RATINGS, "random", seed).test
        assert test is not None
        for key, spread in noise.items():
            prediction = test.rating.double() + torch.from_numpy(rng.normal(0, spread, len(test)))
            runs[key, seed] = {"user_errors": squared_errors(prediction, test)}
            errors[key].append(((prediction - test.rating) ** 2, test.user))
    for key, parts in errors.items():
        mse = float(torch.cat([squares for squares, _ in parts]).mean())
        rows.append({"key": key, "kind": "rating", "seeds": SEEDS, "side": key in side, "test_mse": mse})
    return rows, runs, errors


def test_the_difference_is_that_of_the_errors() -> None:
    rows, runs, _ = rows_and_runs({"a": 0.5, "b": 0.7, "c": 1.0})
    from_the_best(RATINGS, rows, runs)
    a, b, c = rows
    assert "over_best" not in a
    for row in (b, c):
        over = row["over_best"]
        assert over["key"] == "a"
        assert over["mse"] == pytest.approx(row["test_mse"] - a["test_mse"], rel=1e-3)
        assert 0 < over["low"] < over["mse"] < over["high"]


def test_the_interval_is_that_of_the_mean_over_users() -> None:
    """Against the standard error of a ratio of two sums over users."""
    rows, runs, errors = rows_and_runs({"a": 0.5, "b": 0.55})
    from_the_best(RATINGS, rows, runs)
    over = rows[1]["over_best"]
    sums, counts = torch.zeros(60, dtype=torch.float64), torch.zeros(60, dtype=torch.float64)
    for sign, key in ((-1, "a"), (1, "b")):
        for squares, user in errors[key]:
            sums.index_add_(0, user, sign * squares)
            counts.index_add_(0, user, torch.full((len(user),), 0.5, dtype=torch.float64))
    residual = sums - over["mse"] * counts
    error = float(residual.square().sum().sqrt() / counts.sum())
    assert over["high"] - over["low"] == pytest.approx(2 * 1.96 * error, rel=0.1)


def test_equals_have_an_interval_around_zero() -> None:
    rows, runs, _ = rows_and_runs({"a": 0.5, "b": 0.5})
    from_the_best(RATINGS, rows, runs)
    (over,) = [row["over_best"] for row in rows if "over_best" in row]
    assert over["low"] < 0 < over["high"]


def test_those_that_know_more_are_apart() -> None:
    rows, runs, _ = rows_and_runs({"a": 0.5, "b": 0.9, "c": 0.3, "d": 0.4}, side=("c", "d"))
    from_the_best(RATINGS, rows, runs)
    assert {row["key"]: row["over_best"]["key"] for row in rows if "over_best" in row} == {"b": "a", "d": "c"}


def test_other_seeds_and_kinds_are_not_compared() -> None:
    rows, runs, _ = rows_and_runs({"a": 0.5, "b": 0.9, "c": 0.9})
    rows[1]["seeds"] = SEEDS[:1]
    rows[2]["kind"] = "both"
    from_the_best(RATINGS, rows, runs)
    assert not [row for row in rows if "over_best" in row]

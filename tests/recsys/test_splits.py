"""Splits: disjoint, covering, fixed by the seed; what each promises about its size and its users."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lunet_fast.recsys.ratings import Ratings, from_frame
from lunet_fast.recsys.splits import Split, holdout, join, per_user_split, random_split


def ratings_of(counts: list[int]) -> Ratings:
    """User k has counts[k] ratings; the rows are in an order that mixes users."""
    pairs = [(user, item) for user, count in enumerate(counts) for item in range(count)]
    order = np.random.default_rng(7).permutation(len(pairs))
    table = pd.DataFrame([pairs[k] for k in order], columns=["user", "item"])
    return from_frame(table.assign(rating=3.0))


def assert_partition(split: Split, n: int) -> None:
    assert torch.equal(torch.cat([split.train, split.test]).sort().values, torch.arange(n))
    for part in (split.train, split.test):
        assert part.dtype == torch.int64
        assert bool((part[1:] > part[:-1]).all())


counts = st.lists(st.integers(1, 12), min_size=1, max_size=8).filter(lambda c: sum(c) >= 2)
fractions = st.floats(0.01, 0.99)
seeds = st.integers(0, 2**63)


@given(counts, seeds, fractions)
@settings(max_examples=50)
def test_random_split(count: list[int], seed: int, fraction: float) -> None:
    ratings = ratings_of(count)
    n = len(ratings)
    split = random_split(ratings, seed, fraction)
    assert_partition(split, n)
    assert (split.name, split.seed) == ("random", seed)
    assert len(split.test) == min(max(math.floor(fraction * n + 0.5), 1), n - 1)
    first = np.random.default_rng(seed).permutation(n)[: len(split.test)]
    assert set(split.test.tolist()) == set(first.tolist())


@given(counts.filter(lambda c: max(c) >= 3), seeds, st.floats(0.2, 0.99))
@settings(max_examples=50)
def test_per_user_split(count: list[int], seed: int, fraction: float) -> None:
    ratings = ratings_of(count)
    split = per_user_split(ratings, seed, fraction)
    assert_partition(split, len(ratings))
    assert (split.name, split.seed) == ("per-user", seed)
    tested = torch.bincount(ratings.user[split.test], minlength=len(count)).tolist()
    assert tested == [min(math.floor(fraction * n + 0.5), n - 1) for n in count]


@given(st.lists(st.integers(0, 10**9), min_size=2, max_size=60, unique=True), seeds, fractions)
@settings(max_examples=50)
def test_holdout(index: list[int], seed: int, fraction: float) -> None:
    rest, part = holdout(torch.tensor(index), fraction, seed)
    n = len(index)
    assert sorted(rest.tolist() + part.tolist()) == sorted(index)
    assert rest.tolist() == sorted(rest.tolist())
    assert part.tolist() == sorted(part.tolist())
    assert len(part) == min(max(math.floor(fraction * n + 0.5), 1), n - 1)
    again = holdout(torch.tensor(index).flip(0), fraction, seed)
    assert torch.equal(again[0], rest)


def test_the_seed_alone_decides() -> None:
    ratings = ratings_of([20] * 10)
    for make in (random_split, per_user_split):
        torch.manual_seed(0)
        np.random.seed(0)  # noqa: NPY002
        one = make(ratings, 3)
        state = torch.get_rng_state()
        torch.manual_seed(1)
        np.random.seed(1)  # noqa: NPY002
        two = make(ratings, np.int64(3))  # type: ignore[arg-type]
        assert torch.equal(one.test, two.test)
        assert type(two.seed) is int
        assert not torch.equal(one.test, make(ratings, 4).test)
        torch.manual_seed(0)
        assert torch.equal(torch.get_rng_state(), state), "torch's global generator was used"
    index = torch.arange(200)
    assert torch.equal(holdout(index, 0.2, 3)[1], holdout(index, 0.2, 3)[1])
    assert not torch.equal(holdout(index, 0.2, 3)[1], holdout(index, 0.2, 4)[1])


def test_known_splits_stay() -> None:
    """Results of other versions are only comparable while these rows do not change."""
    ratings = ratings_of([5, 5])
    assert random_split(ratings, 0).test.tolist() == sorted(
        np.random.default_rng(0).permutation(10)[:2].tolist()
    )
    assert random_split(ratings, 0, 0.5).test.tolist() == [2, 3, 4, 6, 7]
    assert per_user_split(ratings, 0, 0.4).test.tolist() == [2, 4, 5, 6]
    assert holdout(torch.arange(10), 0.3, 0)[1].tolist() == [1, 3, 9]


def test_validation_rows_are_independent_of_the_split() -> None:
    """With one stream for both, the validation part would be tied to the rows that the split left out."""
    ratings = ratings_of([50] * 20)
    split = random_split(ratings, 5)
    order = np.random.default_rng(5).permutation(800)[:160]
    _, part = holdout(split.train, 0.2, 5)
    assert set(part.tolist()) != set(split.train[np.sort(order)].tolist())


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, 1.5, float("nan")])
def test_the_fraction_is_checked(fraction: float) -> None:
    ratings = ratings_of([5, 5])
    for make in (random_split, per_user_split):
        with pytest.raises(ValueError, match="test_fraction must lie between 0 and 1"):
            make(ratings, 0, fraction)
    with pytest.raises(ValueError, match="^fraction must lie between 0 and 1"):
        holdout(torch.arange(10), fraction, 0)


@pytest.mark.parametrize("seed", [-1, 0.5, "0", None, True])
def test_the_seed_is_checked(seed: object) -> None:
    for make in (random_split, per_user_split):
        with pytest.raises(ValueError, match="seed must be an integer of at least 0"):
            make(ratings_of([5, 5]), seed)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="seed must be an integer of at least 0"):
        holdout(torch.arange(10), 0.5, seed)  # type: ignore[arg-type]


def test_too_few_rows() -> None:
    with pytest.raises(ValueError, match="at least 2 rows to be split, got 1"):
        random_split(ratings_of([1]), 0)
    with pytest.raises(ValueError, match="no row at all"):
        per_user_split(ratings_of([1, 1, 1]), 0)
    with pytest.raises(ValueError, match="no row at all"):
        per_user_split(ratings_of([3]).select([]), 0)
    with pytest.raises(ValueError, match="at least 2 rows to be divided, got 1"):
        holdout(torch.arange(1), 0.5, 0)
    with pytest.raises(ValueError, match="without repeated rows"):
        holdout(torch.tensor([1, 1, 2]), 0.5, 0)


def frame(users: list[object], items: list[object], **other: list[object]) -> Ratings:
    return from_frame(
        pd.DataFrame({"user": users, "item": items, "rating": [float(k) for k in range(len(users))], **other})
    )


def test_join_indexes_both_files_by_the_ids_of_both() -> None:
    train = frame([5, 5, 9], [1, 2, 1], timestamp=[10, 20, 30])
    test = frame([9, 7], [3, 2])
    one, two = join(train, test)
    assert one.users.ids.tolist() == [5, 7, 9]
    assert one.items.ids.tolist() == [1, 2, 3]
    assert one.users == two.users
    assert one.items == two.items
    assert one.users.ids[one.user.numpy()].tolist() == [5, 5, 9]
    assert two.users.ids[two.user.numpy()].tolist() == [9, 7]
    assert two.items.ids[two.item.numpy()].tolist() == [3, 2]
    assert one.scale == two.scale == (0.0, 2.0)
    assert one.timestamp is not None
    assert two.timestamp is not None
    assert one.timestamp.tolist() == [10, 20, 30]
    assert two.timestamp.tolist() == [0, 0]


def test_join_of_integer_and_string_ids() -> None:
    one, two = join(frame([5, 10], [1, 1]), frame(["5", "x"], [2, 2]))
    assert one.users.ids.tolist() == ["10", "5", "x"]
    assert one.user.tolist() == [1, 0]
    assert two.user.tolist() == [1, 2]


def test_join_refuses_a_leak() -> None:
    with pytest.raises(ValueError, match=r"^1 \(user, item\) pairs.*user 9 and item 1: remove them"):
        join(frame([5, 9], [1, 1]), frame([9, 7], [1, 2]))

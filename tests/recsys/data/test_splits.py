"""Splits: disjoint, covering, fixed by the seed; what each promises about its size and its users."""

from __future__ import annotations

import math
import os
from collections import Counter

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lunet_fast.recsys.data.movielens import load
from lunet_fast.recsys.data.ratings import Ratings, from_frame
from lunet_fast.recsys.data.splits import (
    Split,
    draw_candidates,
    holdout,
    join,
    joint_split,
    leave_one_out,
    per_user_split,
    random_split,
    time_split,
)

REAL_DATA = os.environ.get("LUNET_FAST_DATA", "")
needs_data = pytest.mark.skipif(
    not REAL_DATA, reason="$LUNET_FAST_DATA does not name a folder with MovieLens files"
)


def ratings_of(counts: list[int]) -> Ratings:
    """User k has counts[k] ratings; the rows are in an order that mixes users."""
    pairs = [(user, item) for user, count in enumerate(counts) for item in range(count)]
    order = np.random.default_rng(7).permutation(len(pairs))
    table = pd.DataFrame([pairs[k] for k in order], columns=["user", "item"])
    return from_frame(table.assign(rating=3.0))


def timed(rows: list[tuple[int, int, int]]) -> Ratings:
    """(user, item, timestamp) in the order given."""
    return from_frame(pd.DataFrame(rows, columns=["user", "item", "timestamp"]).assign(rating=3.0))


def pairs_of(ratings: Ratings, rows: torch.Tensor) -> set[tuple[int, int]]:
    """(user id, item id) of some rows."""
    users = ratings.users.ids[ratings.user[rows].numpy()].tolist()
    return set(zip(users, ratings.items.ids[ratings.item[rows].numpy()].tolist(), strict=True))


def assert_partition(split: Split, n: int) -> None:
    parts = (split.train, split.test, split.held_out)
    assert torch.equal(torch.cat(parts).sort().values, torch.arange(n))
    for part in parts:
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
    assert len(split.held_out) == 0
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
    assert len(split.held_out) == 0
    tested = torch.bincount(ratings.user[split.test], minlength=len(count)).tolist()
    assert tested == [min(math.floor(fraction * n + 0.5), n - 1) for n in count]


# Few distinct times, so that many tie; 0 is unknown, and a time before 1970 is negative.
tables = st.dictionaries(
    st.tuples(st.integers(0, 5), st.integers(0, 6)),
    st.sampled_from([0, 0, -5, 1, 2]),
    min_size=2,
    max_size=30,
).filter(lambda t: max(Counter(user for user, _ in t).values()) >= 2)


@given(tables, seeds, st.randoms(use_true_random=False))
@settings(max_examples=50)
def test_leave_one_out(table: dict[tuple[int, int], int], seed: int, random: object) -> None:
    rows = [(*pair, time) for pair, time in table.items()]
    ratings = timed(rows)
    split = leave_one_out(ratings, seed)
    assert_partition(split, len(rows))
    assert (split.name, split.seed, len(split.test)) == ("leave-one-out", seed, 0)
    held_out = pairs_of(ratings, split.held_out)
    counts = Counter(user for user, _ in table)
    assert sorted(user for user, _ in held_out) == sorted(u for u in counts if counts[u] >= 2)
    for user, item in held_out:
        times = [time for (u, _), time in table.items() if u == user]
        known = [time for time in times if time != 0]
        assert table[user, item] == (max(known) if known else 0)
    random.shuffle(rows)  # type: ignore[attr-defined]
    shuffled = timed(rows)
    assert pairs_of(shuffled, leave_one_out(shuffled, seed).held_out) == held_out


def test_leave_one_out_by_hand() -> None:
    # User 1: the latest. 2: one row. 3: an unknown time is older than one before 1970. 4: a tie of three.
    rows = [(1, 10, 50), (2, 10, 99), (1, 11, 60), (3, 12, 0), (3, 10, -7), (1, 12, 0)]
    rows += [(4, item, 70) for item in (10, 11, 12)] + [(4, 13, 69)]
    ratings = timed(rows)
    drawn = Counter()
    for seed in range(300):
        held_out = leave_one_out(ratings, seed).held_out.tolist()
        assert held_out[:2] == [2, 4]
        assert len(held_out) == 3
        drawn[held_out[2]] += 1
    assert sorted(drawn) == [6, 7, 8]
    assert min(drawn.values()) > 70, "each of the tied rows is as likely as the others: 100 ± 8"


def test_leave_one_out_without_timestamps_draws_among_all_rows() -> None:
    ratings = ratings_of([4, 1, 3])
    assert ratings.timestamp is None
    drawn = Counter()
    for seed in range(400):
        split = leave_one_out(ratings, seed)
        assert sorted(ratings.user[split.held_out].tolist()) == [0, 2]
        drawn.update(split.held_out.tolist())
    assert sorted(drawn) == sorted(torch.nonzero(ratings.user != 1).flatten().tolist())
    assert min(drawn.values()) > 65, "100 ± 9 and 133 ± 9"
    unknown = timed([(u, i, 0) for u, i in zip(ratings.user.tolist(), ratings.item.tolist(), strict=True)])
    assert torch.equal(leave_one_out(unknown, 5).held_out, leave_one_out(ratings, 5).held_out)


@given(tables.filter(lambda t: len(t) >= 10), seeds, fractions)
@settings(max_examples=50)
def test_joint_split(table: dict[tuple[int, int], int], seed: int, fraction: float) -> None:
    ratings = timed([(*pair, time) for pair, time in table.items()])
    split = joint_split(ratings, seed, fraction)
    assert_partition(split, len(ratings))
    assert (split.name, split.seed) == ("joint", seed)
    assert torch.equal(split.held_out, leave_one_out(ratings, seed).held_out)
    rest = leave_one_out(ratings, seed).train
    as_random = random_split(ratings.select(rest), seed, fraction)
    assert torch.equal(split.test, rest[as_random.test])
    assert torch.equal(split.train, rest[as_random.train])


known_times = st.dictionaries(
    st.tuples(st.integers(0, 5), st.integers(0, 6)),
    st.sampled_from([-5, 1, 2, 3, 9]),
    min_size=2,
    max_size=30,
)


@given(known_times, seeds, fractions)
@settings(max_examples=50)
def test_time_split(table: dict[tuple[int, int], int], seed: int, fraction: float) -> None:
    ratings = timed([(*pair, time) for pair, time in table.items()])
    time = ratings.timestamp
    assert time is not None
    most = math.floor(fraction * len(ratings) + 0.5)
    begins = [t for t in sorted(set(time.tolist()))[1:] if int((time >= t).sum()) <= most]
    both = [
        u
        for u in range(ratings.n_users)
        if begins and len({t >= begins[0] for t in time[ratings.user == u].tolist()}) > 1
    ]
    if not both:
        with pytest.raises(ValueError, match="no time that divides|before and after"):
            time_split(ratings, seed, fraction)
        return
    split = time_split(ratings, seed, fraction)
    assert_partition(split, len(ratings))
    assert (split.name, split.seed) == ("time", seed)
    assert torch.equal(split.train, torch.nonzero(time < begins[0]).flatten())
    assert sorted(ratings.user[split.held_out].tolist()) == both
    for row in split.held_out.tolist():
        own = (ratings.user == ratings.user[row]) & (time >= begins[0])
        assert time[row] == time[own].min()
    order = torch.randperm(len(ratings))
    shuffled = time_split(ratings.select(order), seed, fraction)
    assert pairs_of(ratings.select(order), shuffled.held_out) == pairs_of(ratings, split.held_out)


def test_a_split_by_time_needs_all_times() -> None:
    with pytest.raises(ValueError, match="needs the time of every rating, and 1 of the 3 of"):
        time_split(timed([(0, 0, 5), (0, 1, 0), (1, 0, 7)]), 0)
    with pytest.raises(ValueError, match="and 9 of the 9 of .* have none: use leave_one_out"):
        time_split(ratings_of([9]), 0)


@given(tables, seeds, st.integers(1, 8))
@settings(max_examples=50)
def test_candidates(table: dict[tuple[int, int], int], seed: int, count: int) -> None:
    ratings = timed([(*pair, time) for pair, time in table.items()])
    held_out = leave_one_out(ratings, seed).held_out
    candidates = draw_candidates(ratings, held_out, seed, count)
    assert candidates.shape == (len(held_out), count)
    assert candidates.dtype == torch.int64
    for row, drawn in zip(held_out.tolist(), candidates.tolist(), strict=True):
        history = set(ratings.item[ratings.user == ratings.user[row]].tolist())
        size = min(count, ratings.n_items - len(history))
        assert drawn[size:] == [-1] * (count - size)
        assert drawn[:size] == sorted(set(drawn[:size]))
        assert set(drawn[:size]) <= set(range(ratings.n_items)) - history
    order = torch.randperm(len(ratings))
    shuffled = ratings.select(order)
    rows = torch.argsort(order)[held_out]
    assert torch.equal(draw_candidates(shuffled, rows, seed, count), candidates)
    assert torch.equal(draw_candidates(ratings, held_out.flip(0), seed, count), candidates.flip(0))


def test_every_set_of_candidates_is_equally_likely() -> None:
    # User u rated only item u mod 6 of 6: each of the 10 pairs of others is drawn for a tenth of the users.
    n = 6000
    ratings = timed([(user, user % 6, 1) for user in range(n)])
    candidates = draw_candidates(ratings, torch.arange(n), 0, 2)
    relative = (candidates - (torch.arange(n) % 6)[:, None]) % 6
    drawn = Counter(tuple(sorted(pair)) for pair in relative.tolist())
    assert sorted(drawn) == [(a, b) for a in range(1, 6) for b in range(a + 1, 6)]
    assert all(500 < times < 700 for times in drawn.values()), "600 ± 23"


def test_candidates_of_several_rows_of_one_user_and_of_none() -> None:
    ratings = ratings_of([5, 20])
    rows = torch.nonzero(ratings.user == 0).flatten()
    candidates = draw_candidates(ratings, rows, 0, 10)
    assert int(candidates.min()) >= 5
    assert len({tuple(row) for row in candidates.tolist()}) == 5
    of_one_who_saw_all = draw_candidates(ratings, torch.nonzero(ratings.user == 1).flatten(), 0, 3)
    assert bool((of_one_who_saw_all == -1).all())
    assert draw_candidates(ratings, torch.arange(0), 0).shape == (0, 100)


def test_wrong_arguments_of_candidates() -> None:
    ratings = ratings_of([5, 5])
    rows = torch.arange(2)
    for count in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match="count must be an integer of at least 1"):
            draw_candidates(ratings, rows, 0, count)  # type: ignore[arg-type]
    for wrong in (rows.float(), rows.bool(), rows[None]):
        with pytest.raises(ValueError, match="held_out must be int64 row indices"):
            draw_candidates(ratings, wrong, 0)
    for outside in (-1, 10):
        with pytest.raises(ValueError, match=f"rows of ratings, 0 to 9, got {outside}: pass the complete"):
            draw_candidates(ratings, torch.tensor([0, outside]), 0)


@needs_data
def test_leave_one_out_on_ml_100k() -> None:
    ratings = load("ml-100k", REAL_DATA)
    split = leave_one_out(ratings, 0)
    assert (len(split.held_out), len(split.train)) == (943, 99_057)
    assert ratings.timestamp is not None
    latest = torch.zeros(943, dtype=torch.int64).scatter_reduce(0, ratings.user, ratings.timestamp, "amax")
    tied = torch.bincount(ratings.user[ratings.timestamp == latest[ratings.user]])
    assert int((tied > 1).sum()) == 415
    assert torch.equal(ratings.timestamp[split.held_out], latest[ratings.user[split.held_out]])
    other = leave_one_out(ratings, 1).held_out
    changed = ratings.user[split.held_out[~torch.isin(split.held_out, other)]]
    assert 100 < len(changed) <= 415
    assert bool((tied[changed] > 1).all())
    joint = joint_split(ratings, 0)
    assert [len(rows) for rows in (joint.train, joint.test, joint.held_out)] == [79_246, 19_811, 943]
    candidates = draw_candidates(ratings, split.held_out, 0)
    assert int(candidates.min()) >= 0
    rated = torch.zeros(ratings.n_users, 1682, dtype=torch.bool)
    rated[ratings.user, ratings.item] = True
    assert not rated[ratings.user[split.held_out][:, None], candidates].any()


@needs_data
def test_leave_one_out_on_ml_1m() -> None:
    ratings = load("ml-1m", REAL_DATA)
    split = leave_one_out(ratings, 0)
    assert len(split.held_out) == 6040
    assert ratings.timestamp is not None
    assert not (ratings.timestamp[split.held_out] == 0).any()
    candidates = draw_candidates(ratings, split.held_out, 0)
    assert int(candidates.min()) >= 0
    rated = torch.zeros(ratings.n_users, 3706, dtype=torch.bool)
    rated[ratings.user, ratings.item] = True
    assert not rated[ratings.user[split.held_out][:, None], candidates].any()


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
    one, other = leave_one_out(ratings, 3).held_out, leave_one_out(ratings, 4).held_out
    assert torch.equal(one, leave_one_out(ratings, np.int64(3)).held_out)  # type: ignore[arg-type]
    assert not torch.equal(one, other)
    candidates = draw_candidates(ratings_of([2] * 5 + [20]), torch.arange(4), 3, 5)
    assert torch.equal(candidates, draw_candidates(ratings_of([2] * 5 + [20]), torch.arange(4), 3, 5))
    assert not torch.equal(candidates, draw_candidates(ratings_of([2] * 5 + [20]), torch.arange(4), 4, 5))
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
    assert leave_one_out(ratings, 0).held_out.tolist() == [1, 9]
    assert joint_split(ratings, 0, 0.4).test.tolist() == [3, 4, 5]
    several = ratings_of([4, 2, 9])
    held_out = leave_one_out(several, 0).held_out
    assert draw_candidates(several, held_out, 0, 3).tolist() == [[5, 7, 8], [-1, -1, -1], [6, 7, 8]]


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
    for make in (random_split, per_user_split, joint_split):
        with pytest.raises(ValueError, match="test_fraction must lie between 0 and 1"):
            make(ratings, 0, fraction)
    with pytest.raises(ValueError, match="^fraction must lie between 0 and 1"):
        holdout(torch.arange(10), fraction, 0)


@pytest.mark.parametrize("seed", [-1, 0.5, "0", None, True])
def test_the_seed_is_checked(seed: object) -> None:
    for make in (random_split, per_user_split, leave_one_out, joint_split):
        with pytest.raises(ValueError, match="seed must be an integer of at least 0"):
            make(ratings_of([5, 5]), seed)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="seed must be an integer of at least 0"):
        holdout(torch.arange(10), 0.5, seed)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="seed must be an integer of at least 0"):
        draw_candidates(ratings_of([5, 5]), torch.arange(2), seed)  # type: ignore[arg-type]


def test_too_few_rows() -> None:
    with pytest.raises(ValueError, match="at least 2 rows to be split, got 1"):
        random_split(ratings_of([1]), 0)
    with pytest.raises(ValueError, match="no row at all"):
        per_user_split(ratings_of([1, 1, 1]), 0)
    with pytest.raises(ValueError, match="no row at all"):
        per_user_split(ratings_of([3]).select([]), 0)
    for make in (leave_one_out, joint_split):
        for none_has_two in (ratings_of([1, 1, 1]), ratings_of([3]).select([])):
            with pytest.raises(ValueError, match="no user of these [30] ratings has 2 rows"):
                make(none_has_two, 0)
    with pytest.raises(ValueError, match="at least 2 rows beside the held-out ones.*got 1"):
        joint_split(ratings_of([2]), 0)
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

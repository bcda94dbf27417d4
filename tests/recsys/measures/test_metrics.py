from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lunet_fast.recsys.measures import metrics


def test_known_answers() -> None:
    prediction, rating = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([1.0, 4.0, 3.0])
    assert metrics.mse(prediction, rating) == pytest.approx(5 / 3, rel=1e-15)
    assert metrics.rmse(prediction, rating) == pytest.approx(math.sqrt(5 / 3), rel=1e-15)
    x = torch.tensor([[3.0, 4.0], [0.0, 1.0]])
    assert metrics.squared_norm(x) == 13.0
    assert metrics.reconstruction_error(x, x + torch.tensor([[1.0, 1.0], [0.0, 2.0]])) == 3.0
    assert metrics.reconstruction_error(x, x) == 0.0


def test_small_differences_are_not_rounded_away() -> None:
    # 1e8 + 1 is not a float32, so the sum of 1e8 squares and one small one is taken in float64.
    prediction, rating = torch.tensor([1e4, 1.0]), torch.tensor([0.0, 0.0])
    assert metrics.mse(prediction, rating) == (1e8 + 1) / 2
    x = torch.full((1, 4), 1e3)
    moved = torch.nextafter(x, torch.full_like(x, 2e3))
    step = float(moved[0, 0].double() - 1e3)
    assert metrics.reconstruction_error(x, moved) == pytest.approx(4 * step**2, rel=1e-12)


def test_leading_dimensions_are_all_rows() -> None:
    x = torch.randn(3, 5, 4)
    assert metrics.squared_norm(x) == pytest.approx(metrics.squared_norm(x.reshape(15, 4)), rel=1e-12)


def test_refuses_what_has_no_mean_or_does_not_match() -> None:
    with pytest.raises(ValueError, match="no pairs"):
        metrics.mse(torch.empty(0), torch.empty(0))
    with pytest.raises(ValueError, match=r"prediction has shape \(2,\), rating \(2, 1\)"):
        metrics.mse(torch.zeros(2), torch.zeros(2, 1))
    with pytest.raises(ValueError, match="its reconstruction"):
        metrics.reconstruction_error(torch.zeros(2, 3), torch.zeros(1, 3))


INF, NAN = math.inf, math.nan
# Few values, so that many tie.
scores = st.sampled_from([-INF, NAN, -2.5, -0.0, 0.0, 1.0, 1.0, 7.0, INF])


@given(st.lists(scores, min_size=1, max_size=9))
@settings(max_examples=100)
def test_ranks_against_counting(row: list[float]) -> None:
    score, *others = [-INF if math.isnan(s) else s for s in row]
    expected = 1 + sum(s > score for s in others) + sum(s == score for s in others) / 2
    rank = metrics.ranks(torch.tensor(row[:1]), torch.tensor([row[1:]]))
    assert rank.mean.dtype == torch.float64
    assert rank.mean.tolist() == [INF if score == -INF else expected]


def test_ranks_by_hand() -> None:
    score = torch.tensor([3.0, 3.0, 3.0, 3.0, -INF, NAN])
    others = torch.tensor(
        [[1, 2, 0], [4, 5, 0], [3, 3, 3], [NAN, -INF, 3], [-INF, -INF, NAN], [-INF, NAN, 0]]
    ).float()
    assert metrics.ranks(score, others).mean.tolist() == [1.0, 3.0, 2.5, 1.5, INF, INF]
    assert metrics.ranks(score, others[:, :0]).mean.tolist() == [1.0, 1.0, 1.0, 1.0, INF, INF]
    with pytest.raises(ValueError, match=r"score must be \[N\] and others \[N, C\], got \[6\] and \[5, 3\]"):
        metrics.ranks(score, others[:5])


def mean_places(row: list[float], relevant: list[int]) -> list[float]:
    """Ranks by definition: among T tied items, the j-th of m relevant ones is at place j (T + 1)/(m + 1)."""
    ranks = []
    for k, item in enumerate(relevant):
        tied = [i for i in range(len(row)) if row[i] == row[item]]
        m = [i for i in relevant if i in tied]
        j = 1 + sum(i in tied for i in relevant[:k])
        higher = sum(s > row[item] for s in row)
        ranks.append(INF if row[item] == -INF else higher + j * (len(tied) + 1) / (len(m) + 1))
    return ranks


tables = st.integers(1, 7).flatmap(
    lambda items: st.lists(
        st.tuples(
            st.lists(scores.filter(lambda s: not math.isnan(s)), min_size=items, max_size=items),
            st.lists(st.integers(0, items - 1), max_size=items, unique=True),
        ),
        min_size=1,
        max_size=5,
    )
)


@given(tables)
@settings(max_examples=100)
def test_ranks_of_several_against_counting(table: list[tuple[list[float], list[int]]]) -> None:
    grid = torch.tensor([row for row, _ in table])
    user = torch.tensor([u for u, (_, relevant) in enumerate(table) for _ in relevant], dtype=torch.int64)
    item = torch.tensor([i for _, relevant in table for i in relevant], dtype=torch.int64)
    rank = metrics.ranks_of_several(grid[user, item], user, grid.sort(descending=True).values)
    assert rank.mean.dtype == torch.float64
    assert rank.mean.tolist() == [r for row, relevant in table for r in mean_places(row, relevant)]
    for u, (row, relevant) in enumerate(table):
        if len(relevant) == 1:
            others = torch.tensor([row[: relevant[0]] + row[relevant[0] + 1 :]])
            alone = metrics.ranks(grid[u, relevant], others)
            for mine, other in zip(rank.where(user == u), alone, strict=True):
                assert torch.equal(mine, other) or float(alone.mean) == INF
    if len(item):
        known = user.unique(return_inverse=True)[1]
        for k in (1, 2, 5):
            for values in (metrics.recall, metrics.precision, metrics.ndcg, metrics.hit_rate):
                value = values(rank, known, k)
                assert value.dtype == torch.float64
                assert float(value.min()) >= 0
                assert float(value.max()) <= 1 + 1e-12


def test_ranks_of_several_by_hand() -> None:
    # 9 is first; 5 is twice, both relevant: places 2 and 3; four have 1, one of them relevant: (4+5+6+7)/4.
    row = torch.tensor([9.0, 5, 5, 1, 1, 1, 1, -INF])
    relevant = torch.tensor([5.0, 5, 1, -INF])
    rank = metrics.ranks_of_several(relevant, torch.zeros(4, dtype=torch.int64), row[None])
    assert rank.mean.tolist() == [2.0, 3.0, 5.5, INF]


def untied(*places: float) -> metrics.Ranks:
    """Ranks of relevant items that tie with nothing; inf for one that is not ranked."""
    mean = torch.tensor(places, dtype=torch.float64)
    one = torch.ones(len(places), dtype=torch.int64)
    return metrics.Ranks(mean, mean.nan_to_num(posinf=10.0**9).long() - 1, one, one)


@given(
    st.lists(st.sampled_from([0.0, 1.0, 2.0]), min_size=1, max_size=6),
    st.data(),
)
@settings(max_examples=60)
def test_metrics_at_k_are_means_over_all_orders_of_the_tied(row: list[float], data: st.DataObject) -> None:
    items = range(len(row))
    relevant = sorted(data.draw(st.sets(st.sampled_from(items), min_size=1)))
    k = data.draw(st.integers(1, len(row) + 1))
    orders = [
        order
        for order in itertools.permutations(items)
        if sorted(order, key=lambda i: -row[i]) == list(order)
    ]
    ideal = sum(1 / math.log2(r + 1) for r in range(1, min(k, len(relevant)) + 1))
    wanted = {"hit_rate": 0.0, "recall": 0.0, "precision": 0.0, "ndcg": 0.0}
    for order in orders:
        places = [r for r, item in enumerate(order, 1) if item in relevant and r <= k]
        wanted["hit_rate"] += bool(places) / len(orders)
        wanted["recall"] += len(places) / len(relevant) / len(orders)
        wanted["precision"] += len(places) / k / len(orders)
        wanted["ndcg"] += sum(1 / math.log2(r + 1) for r in places) / ideal / len(orders)
    grid, user = torch.tensor([row]), torch.zeros(len(relevant), dtype=torch.int64)
    ranks = metrics.ranks_of_several(grid[0, relevant], user, grid.sort(descending=True).values)
    for name, value in wanted.items():
        assert float(getattr(metrics, name)(ranks, user, k)) == pytest.approx(value, abs=1e-12), name


def test_ties_earn_their_share_of_a_hit() -> None:
    # 19 candidates with the highest score, one of them the relevant one; and 101 of one score.
    score = torch.tensor([1.0, 0.5])
    others = torch.cat([torch.tensor([[1.0] * 18 + [0.0] * 82]), torch.full((1, 100), 0.5)])
    hits = metrics.hit_rate(metrics.ranks(score, others), torch.arange(2), 10)
    assert hits.tolist() == pytest.approx([10 / 19, 10 / 101], abs=1e-15)


def test_rankings_by_hand() -> None:
    rank = untied(1.0, 4.0, 12.0, 3.0, 2.0, INF)
    user = torch.tensor([0, 0, 0, 1, 2, 2])
    assert metrics.recall(rank, user, 5).tolist() == [2 / 3, 1.0, 0.5]
    assert metrics.precision(rank, user, 5).tolist() == [0.4, 0.2, 0.2]
    assert metrics.hit_rate(rank, user, 3).tolist() == [1.0, 1.0, 1.0]
    assert metrics.hit_rate(rank, user, 1).tolist() == [1.0, 0.0, 0.0]
    assert metrics.mrr(rank, user).tolist() == [1.0, 1 / 3, 0.5]
    three, two = 1 + 1 / math.log2(3) + 0.5, 1 + 1 / math.log2(3)
    expected = [(1 + 1 / math.log2(5)) / three, 0.5, 1 / math.log2(3) / two]
    assert metrics.ndcg(rank, user, 10).tolist() == pytest.approx(expected, rel=1e-15)
    # With k = 2, no more than two places can be filled.
    expected = [1 / two, 0, 1 / math.log2(3) / two]
    assert metrics.ndcg(rank, user, 2).tolist() == pytest.approx(expected, rel=1e-15)
    for value in (metrics.mrr(untied(INF), user[:1]), metrics.ndcg(untied(INF), user[:1], 5)):
        assert value.tolist() == [0.0]


def test_one_relevant_item() -> None:
    rank, user = untied(1.0, 2.0, 10.0, 11.0), torch.arange(4)
    assert metrics.hit_rate(rank, user, 10).tolist() == [1, 1, 1, 0]
    expected = [1, 1 / math.log2(3), 1 / math.log2(11), 0]
    assert metrics.ndcg(rank, user, 10).tolist() == pytest.approx(expected, rel=1e-15)
    assert metrics.mrr(rank, user).tolist() == [1, 0.5, 0.1, 1 / 11]


def test_coverage() -> None:
    top = torch.tensor([[0, 2], [2, -1], [-1, -1]])
    assert metrics.coverage(top, 8) == 0.25
    assert metrics.coverage(top[:, :0], 8) == 0.0
    with pytest.raises(ValueError, match="top has item 2, n_items is 2"):
        metrics.coverage(top, 2)
    with pytest.raises(ValueError, match="n_items must be at least 1"):
        metrics.coverage(top, 0)


def test_rankings_refuse_what_has_no_mean_or_does_not_match() -> None:
    rank, user = untied(1.0, 1.0), torch.arange(2)
    for metric in (metrics.recall, metrics.precision, metrics.ndcg, metrics.hit_rate):
        with pytest.raises(ValueError, match="k must be at least 1, got 0"):
            metric(rank, user, 0)
        with pytest.raises(ValueError, match="user 0 has no relevant item"):
            metric(rank, user + 1, 5)
    with pytest.raises(ValueError, match="no ranks"):
        metrics.mrr(untied(), user[:0])
    with pytest.raises(ValueError, match=r"must all be \[R\], got \[2\], \[2\], \[2\], \[2\], \[1\]"):
        metrics.mrr(rank, user[:1])

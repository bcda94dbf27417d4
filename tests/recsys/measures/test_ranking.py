"""Ranking: known answers, definitions by plain loops, the package ranx, and independence of the chunks."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lunet_fast.recsys.measures import ranking
from lunet_fast.recsys.measures.ranking import FullRanking, full_ranking, sampled_ranking

INF, NAN = math.inf, math.nan


def scorer(table: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda users: table[users]


def random_pairs(users: int, items: int, density: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    mask = torch.rand(users, items, generator=torch.Generator().manual_seed(seed)) < density
    user, item = mask.nonzero(as_tuple=True)
    return user, item


def divided(users: int, items: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(relevant pairs, seen pairs), disjoint, in no order; user 0 has no relevant one, user 1 no seen one."""
    user, item = random_pairs(users, items, 0.3)
    relevant = torch.rand(len(user)) < 0.4
    relevant, seen = relevant & (user != 0), ~relevant & (user != 1)
    order = torch.randperm(len(user))
    relevant, seen = order[relevant[order]], order[seen[order]]
    return (user[relevant], item[relevant]), (user[seen], item[seen])


# One relevant item among candidates -------------------------------------------------------------------------


def test_sampled_ranking_by_hand() -> None:
    table = torch.tensor([[5.0, 4, 3, 2, 1, 0], [0, 0, 0, 0, 0, 0], [1, 2, 3, -INF, NAN, 6]])
    users, items = torch.tensor([0, 1, 2, 2]), torch.tensor([2, 0, 2, 4])
    candidates = torch.tensor([[0, 1, 4], [1, 2, 3], [3, 4, -1], [0, 3, -1]])
    # Ranks: 3; one of 1 to 4, tied; 1, as -inf, NaN and none are absent; inf, as NaN is never recommended.
    values = sampled_ranking(scorer(table), users, items, candidates, ks=(1, 3)).metrics
    assert values == pytest.approx(
        {
            "hr@1": (1 / 4 + 1) / 4,
            "hr@3": (1 + 3 / 4 + 1) / 4,
            "ndcg@1": (1 / 4 + 1) / 4,
            "ndcg@3": (1 / 2 + (1 + 1 / math.log2(3) + 1 / 2) / 4 + 1) / 4,
            "mrr": (1 / 3 + 1 / 2.5 + 1) / 4,
        },
        rel=1e-15,
    )
    assert list(sampled_ranking(scorer(table), users, items, candidates).metrics) == [
        *(f"{name}@{k}" for name in ("hr", "ndcg") for k in (5, 10, 20)),
        "mrr",
    ]


def test_one_score_for_everything_earns_what_chance_does() -> None:
    users = torch.arange(50)
    items = torch.randint(200, (50,))
    candidates = (items[:, None] + 1 + torch.stack([torch.randperm(199)[:100] for _ in range(50)])) % 200
    for value in (0.0, NAN, -INF):
        values = sampled_ranking(scorer(torch.full((50, 200), value)), users, items, candidates).metrics
        assert values["hr@20"] == pytest.approx(20 / 101 if value == 0 else 0)
        assert values["mrr"] == pytest.approx(1 / 51 if value == 0 else 0)


@pytest.mark.parametrize("chunk", [1, 7, 64, 1000])
def test_sampled_ranking_does_not_depend_on_the_chunks(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    table = torch.randn(150, 90).mul(4).round()
    users, items = torch.randperm(150)[:130], torch.randint(90, (130,))
    candidates = (items[:, None] + 1 + torch.stack([torch.randperm(89)[:30] for _ in range(130)])) % 90
    candidates[::9, 20:] = -1
    expected = sampled_ranking(scorer(table), users, items, candidates).metrics
    sizes = []

    def score(some: Tensor) -> Tensor:
        sizes.append(len(some))
        return table[some]

    monkeypatch.setattr(ranking, "USER_CHUNK", chunk)
    assert sampled_ranking(score, users, items, candidates).metrics == expected
    assert max(sizes) == min(chunk, 130)


def test_sampled_ranking_refuses_wrong_arguments() -> None:
    score, users, items = scorer(torch.zeros(3, 5)), torch.arange(3), torch.arange(3)
    candidates = torch.full((3, 2), 4)
    with pytest.raises(ValueError, match="there is no held-out pair"):
        sampled_ranking(score, users[:0], items[:0], candidates[:0])
    for wrong in (candidates[:2], candidates[:, 0], candidates[None]):
        with pytest.raises(ValueError, match=r"users and items must be \[H\] and candidates \[H, C\]"):
            sampled_ranking(score, users, items, wrong)
    with pytest.raises(ValueError, match="candidates of user 1 contain the held-out item 1: draw them"):
        sampled_ranking(score, users, items, torch.tensor([[4, 3], [2, 1], [0, 1]]))
    with pytest.raises(ValueError, match="items must be indices of at least 0, got -1"):
        sampled_ranking(score, users, items - 1, candidates)
    for ks in ((), (0, 5)):
        with pytest.raises(ValueError, match="ks must be one or more lengths of at least 1"):
            sampled_ranking(score, users, items, candidates, ks)
    for table in (torch.zeros(3, 5, dtype=torch.int64), torch.zeros(2, 5), torch.zeros(3)):
        with pytest.raises(ValueError, match=r"floating-point scores \[3, I\] for 3 users"):
            sampled_ranking(lambda _, table=table: table, users, items, candidates)


# All items --------------------------------------------------------------------------------------------------


def test_full_ranking_by_hand() -> None:
    table = torch.tensor([[9.0, 8, 7, 6, 5], [1, 1, 1, 1, 1], [5, 4, NAN, -INF, 1], [0, 0, 0, 0, 0]])
    # User 0 saw 0 and 1, so 3 is second and 4 third; user 1 saw nothing and 2 is tied with four others; user
    # 2 saw 1, and 2 cannot be recommended. User 3 has nothing to find.
    relevant = torch.tensor([2, 0, 1, 0]), torch.tensor([2, 4, 2, 3])
    seen = torch.tensor([0, 0, 2, 3, 0]), torch.tensor([0, 1, 1, 4, 0])
    told = full_ranking(scorer(table), *relevant, *seen, n_items=5, ks=(2, 3))
    assert told.users == 3
    log2 = math.log2
    assert told.metrics == pytest.approx(
        {
            "full_recall@2": (1 / 2 + 2 / 5 + 0) / 3,
            "full_recall@3": (1 + 3 / 5 + 0) / 3,
            "full_precision@2": (1 / 2 + 1 / 5 + 0) / 3,
            "full_precision@3": (2 / 3 + 1 / 5 + 0) / 3,
            "full_ndcg@2": (1 / log2(3) / (1 + 1 / log2(3)) + (1 + 1 / log2(3)) / 5) / 3,
            "full_ndcg@3": ((1 / log2(3) + 1 / 2) / (1 + 1 / log2(3)) + (1 + 1 / log2(3) + 1 / 2) / 5) / 3,
            "full_hr@2": (1 + 2 / 5 + 0) / 3,
            "full_hr@3": (1 + 3 / 5 + 0) / 3,
            "full_mrr": (1 / 2 + 1 / 3 + 0) / 3,
            # Lists: 2, 3, 4; 0, 1, 2; 0, 4 and no third.
            "coverage@2": 5 / 5,
            "coverage@3": 5 / 5,
        },
        rel=1e-14,
    )
    assert [(g.least, g.most, g.users) for g in told.groups] == [(0, 0, 1), (1, 1, 1), (2, 2, 1)]
    assert [g.metrics["full_mrr"] for g in told.groups] == pytest.approx([1 / 3, 0, 1 / 2])
    assert [g.metrics["coverage@3"] for g in told.groups] == [3 / 5, 2 / 5, 3 / 5]
    assert all(list(g.metrics) == list(told.metrics) for g in told.groups)


def by_definition(
    table: Tensor, relevant: set[tuple[int, int]], seen: set[tuple[int, int]], k: int
) -> list[float]:
    """Recall, precision, NDCG, hit rate, MRR and coverage by loops over lists, for scores without ties."""
    sums, covered = [0.0] * 5, set()
    users = sorted({user for user, _ in relevant})
    for user in users:
        unseen = [i for i in range(table.shape[1]) if (user, i) not in seen and table[user, i] > -INF]
        best = sorted(unseen, key=lambda i: -float(table[user, i]))
        wanted = {i for u, i in relevant if u == user}
        hits = [place for place, i in enumerate(best, 1) if i in wanted]
        top = [place for place in hits if place <= k]
        ideal = sum(1 / math.log2(place + 1) for place in range(1, min(k, len(wanted)) + 1))
        gain = sum(1 / math.log2(place + 1) for place in top)
        values = [len(top) / len(wanted), len(top) / k, gain / ideal, float(bool(top)), 1 / min([*hits, INF])]
        sums = [a + b for a, b in zip(sums, values, strict=True)]
        covered |= set(best[:k])
    return [*(total / len(users) for total in sums), len(covered) / table.shape[1]]


@given(st.integers(0, 10**6))
@settings(max_examples=25)
def test_full_ranking_against_its_definition(seed: int) -> None:
    torch.manual_seed(seed)
    users, items = int(torch.randint(3, 30, ())), int(torch.randint(5, 40, ()))
    table = torch.randperm(users * items).view(users, items).float()
    table[torch.rand(users, items) < 0.1] = -INF
    relevant, seen = divided(users, items)
    if not len(relevant[0]):
        return
    told = full_ranking(scorer(table), *relevant, *seen, n_items=items, ks=(3, 10))
    sets = [set(zip(u.tolist(), i.tolist(), strict=True)) for u, i in (relevant, seen)]
    names = [
        "full_recall@{k}",
        "full_precision@{k}",
        "full_ndcg@{k}",
        "full_hr@{k}",
        "full_mrr",
        "coverage@{k}",
    ]
    for k in (3, 10):
        expected = by_definition(table, *sets, k)
        assert [told.metrics[name.format(k=k)] for name in names] == pytest.approx(expected, rel=1e-12)
    # Each group is the same evaluation of its users alone.
    activity = torch.bincount(seen[0], minlength=users)
    assert sum(g.users for g in told.groups) == told.users == len(relevant[0].unique())
    for group in told.groups:
        inside = (activity >= group.least) & (activity <= group.most)
        part = [t[inside[relevant[0]]] for t in relevant]
        alone = full_ranking(scorer(table), *part, *seen, n_items=items, ks=(3, 10))
        assert (alone.users, alone.metrics) == (group.users, pytest.approx(group.metrics, rel=1e-12))


@pytest.mark.slow  # ranx compiles its metrics at the first call, most of a minute
def test_full_ranking_agrees_with_ranx() -> None:
    ranx = pytest.importorskip("ranx")
    ours = {"recall": "recall", "precision": "precision", "ndcg": "ndcg", "hit_rate": "hr"}
    table = torch.randperm(40 * 60).view(40, 60).double()
    relevant, seen = divided(40, 60)
    told = full_ranking(scorer(table), *relevant, *seen, n_items=60, ks=(5, 20))
    wanted: dict[str, dict[str, int]] = {}
    for user, item in zip(*(t.tolist() for t in relevant), strict=True):
        wanted.setdefault(str(user), {})[str(item)] = 1
    taken = set(zip(*(t.tolist() for t in seen), strict=True))
    run = {
        user: {str(i): float(table[int(user), i]) for i in range(60) if (int(user), i) not in taken}
        for user in wanted
    }
    names = {f"{n}@{k}": f"full_{m}@{k}" for n, m in ours.items() for k in (5, 20)} | {"mrr": "full_mrr"}
    values = ranx.evaluate(ranx.Qrels(wanted), ranx.Run(run), list(names))
    assert {names[name]: value for name, value in values.items()} == pytest.approx(
        {name: told.metrics[name] for name in names.values()}, rel=1e-12
    )


@pytest.mark.parametrize("chunk", [1, 7, 64, 1000])
def test_full_ranking_does_not_depend_on_the_chunks(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    table = torch.randn(150, 90).mul(4).round()
    relevant, seen = divided(150, 90)
    expected = full_ranking(scorer(table), *relevant, *seen, n_items=90)[:3]
    monkeypatch.setattr(ranking, "USER_CHUNK", chunk)
    assert full_ranking(scorer(table), *relevant, *seen, n_items=90)[:3] == expected


def test_the_scores_of_the_model_stay() -> None:
    table = torch.randn(20, 30)
    before = table.clone()
    relevant, seen = divided(20, 30)
    full_ranking(lambda users: table[: len(users)], *relevant, *seen, n_items=30)
    sampled_ranking(lambda users: table[: len(users)], *(t[:20] for t in relevant), torch.full((20, 3), -1))
    assert torch.equal(table, before)


def test_of_equal_scores_the_lower_item_is_in_the_list() -> None:
    relevant, seen = (torch.tensor([0]), torch.tensor([29])), (torch.tensor([0, 0]), torch.tensor([0, 2]))
    listed = full_ranking(scorer(torch.zeros(1, 30)), *relevant, *seen, n_items=30, ks=(3,))
    assert listed.metrics["coverage@3"] == 3 / 30
    # Everybody's list is 0, 1, 2, whatever the number of users; at random it would be all items.
    every = torch.arange(200), torch.full((200,), 29)
    none = torch.arange(0)
    told = full_ranking(scorer(torch.zeros(200, 30)), *every, none, none, n_items=30, ks=(3,))
    assert told.metrics["coverage@3"] == 3 / 30


def groups_of(activity: list[int]) -> list[tuple[int, int, int]]:
    n, items = len(activity), max(activity) + 1
    user = torch.repeat_interleave(torch.arange(n), torch.tensor(activity))
    item = torch.cat([torch.arange(a) for a in activity])
    relevant = torch.arange(n), torch.full((n,), items - 1)
    told = full_ranking(scorer(torch.zeros(n, items)), *relevant, user, item, n_items=items)
    return [(g.least, g.most, g.users) for g in told.groups]


def test_groups_by_activity() -> None:
    assert groups_of([6, 5, 4, 3, 2, 1]) == [(1, 2, 2), (3, 4, 2), (5, 6, 2)]
    assert groups_of([1, 2, 3, 4]) == [(1, 2, 2), (3, 3, 1), (4, 4, 1)]
    assert groups_of([3, 3, 3, 3, 3, 9]) == [(3, 3, 5), (9, 9, 1)]
    assert groups_of([4, 8]) == [(4, 4, 1), (8, 8, 1)]
    assert groups_of([7]) == [(7, 7, 1)]
    assert groups_of([0, 0, 0]) == [(0, 0, 3)]


def test_full_ranking_refuses_wrong_arguments() -> None:
    score, users, items = scorer(torch.zeros(3, 5)), torch.arange(3), torch.arange(3)

    def ranked(*pairs: Tensor, n_items: int = 5) -> FullRanking:
        return full_ranking(score, *pairs, n_items=n_items)

    with pytest.raises(ValueError, match="relevant_users is empty"):
        ranked(users[:0], items[:0], users, items)
    with pytest.raises(ValueError, match="pair of user 1 and item 1 is given twice: give it once"):
        ranked(torch.tensor([1, 0, 1]), torch.tensor([1, 0, 1]), users, items + 2)
    with pytest.raises(ValueError, match="pair of user 2 and item 2 is among the seen ones too: remove it"):
        ranked(users, items, users[2:], items[2:])
    with pytest.raises(ValueError, match="seen_users and seen_items must both be one-dimensional"):
        ranked(users, items, users, items[:2])
    for outside in (items + 3, items - 1):
        with pytest.raises(
            ValueError, match=r"relevant_items 0 to 4 \(n_items=5\), got users from 0 and items"
        ):
            ranked(users, outside, users, items)
    with pytest.raises(ValueError, match="score_items gave 5 items, but n_items is 6"):
        ranked(users, items, users, items + 1, n_items=6)
    with pytest.raises(ValueError, match="ks must be"):
        full_ranking(score, users, items, users, items + 1, 5, ks=())

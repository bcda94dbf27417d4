"""The best items of each user, against every pair's score in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

import lunet_fast
from harness import FAMILIES, LIMIT, amid_nan, guarded, normwise
from lunet_fast.kernels import score, tiles
from lunet_fast.kernels.launch import PRECISIONS
from lunet_fast.ops import reference
from lunet_fast.recsys.model.config import TrainConfig
from lunet_fast.recsys.model.network import RatingModel
from lunet_fast.recsys.model.scoring import ItemScorer

NOWHERE = -torch.inf


@dataclass
class Case:
    """The arguments of ``score_topk``."""

    p: Tensor
    q: Tensor
    weight: Tensor | None
    bias: Tensor | None
    slopes: Any
    readout: Tensor
    curvature: Tensor | None
    user_offset: Tensor
    item_offset: Tensor
    seen: tuple[Tensor, Tensor] | None
    k: int
    activated: bool

    @classmethod
    def random(
        cls,
        *,
        K: int = 1,
        U: int = 2,
        I: int = 40,
        D: int = 8,
        L: int = 1,
        k: int = 5,
        activated: bool = False,
        curved: bool = True,
        biased: bool = True,
        seen: float | None = None,
        slopes: Any = FAMILIES[0],
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> Case:
        """``seen``: the share of pairs left out, None for no such argument; "learnt" slopes: a row each."""
        g = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=g)

        if slopes == "learnt":
            rows = [FAMILIES[(seed + i) % 3] for i in range(L + activated)]
            slopes = torch.tensor(rows).reshape(-1, 3)
        indices = None
        if seen is not None:
            pairs = (torch.rand(U, I, generator=g) < seen).nonzero()
            counts = torch.bincount(pairs[:, 0], minlength=U)
            indptr = torch.cat((torch.zeros(1, dtype=torch.int64), counts.cumsum(0)))
            kinds = (torch.int32, torch.int64)
            indices = indptr.to(kinds[seed % 2]), pairs[:, 1].to(kinds[seed // 2 % 2])
        return cls(
            normal(K, U, D).to(dtype),
            normal(K, I, D).to(dtype),
            (normal(K, L, D, D) / math.sqrt(D)).to(dtype) if L else None,
            normal(K, L, D) if L and biased else None,
            slopes,
            normal(K, D) / math.sqrt(D),
            normal(K, D) / D if curved else None,
            normal(U),
            normal(I),
            indices,
            k,
            activated,
        )

    def run(self, *, precision: str = "tf32x3", splits: int | None = None) -> tuple[Tensor, Tensor]:
        """What the kernel gives: read amid NaN, written between guards."""

        def amid(x: Any) -> Any:
            return amid_nan(x) if isinstance(x, Tensor) else x

        with guarded():
            scores, items = score.score_topk(
                *(amid(self.p), amid(self.q), amid(self.weight), amid(self.bias), amid(self.slopes)),
                *(amid(self.readout), amid(self.curvature), amid(self.user_offset), amid(self.item_offset)),
                None if self.seen is None else (amid(self.seen[0]), amid(self.seen[1])),
                self.k,
                activated=self.activated,
                precision=precision,
                splits=splits,
            )
        assert scores.shape == items.shape == (self.p.shape[1], self.k)
        assert scores.dtype == torch.float32
        assert items.dtype == torch.int64
        return scores, items

    def exact(self) -> Tensor:
        """Every pair's score [U, I] in float64, −∞ for what was seen."""
        h = self.p.double().unsqueeze(2) + self.q.double().unsqueeze(1)
        L = 0 if self.weight is None else self.weight.shape[1]

        def phi(x: Tensor, place: int) -> Tensor:
            slopes = self.slopes[place].double() if isinstance(self.slopes, Tensor) else self.slopes
            return reference.leaky_softplus(x, slopes)

        for place in range(L):
            assert self.weight is not None
            h = phi(h, place) @ self.weight[:, place].double().mT.unsqueeze(1)
            if self.bias is not None:
                h = h + self.bias[:, place].double()[:, None, None]
        if self.activated:
            h = phi(h, L)
        slope = self.readout.double()[:, None, None]
        if self.curvature is not None:
            slope = slope + self.curvature.double()[:, None, None] * h
        total = (h * slope).sum(-1).mean(0)
        total = total + self.user_offset.double().unsqueeze(1) + self.item_offset.double()
        if self.seen is not None:
            rows = torch.repeat_interleave(self.seen[0].diff().long())
            total[rows, self.seen[1].long()] = NOWHERE
        return total

    def check(self, limit: float = LIMIT, **how: Any) -> tuple[Tensor, Tensor]:
        """The kernel's result, after comparing it with the float64 scores."""
        scores, items = self.run(**how)
        exact = self.exact()
        U, I = exact.shape
        found = items >= 0
        assert torch.equal(found.sum(1), (exact > NOWHERE).sum(1).clamp(max=self.k))
        assert torch.equal(found, found.sort(dim=1, descending=True).values)
        assert bool((scores[~found] == NOWHERE).all())
        assert bool((items[~found] == -1).all())
        if not bool(found.any()):
            return scores, items
        # Each item once, and with its own score, in order.
        mine = exact.gather(1, items.clamp(min=0))
        scale = exact[exact > NOWHERE].square().mean().sqrt().item()
        assert normwise(scores[found], mine[found]) <= limit
        for row, there in zip(items, found, strict=True):
            assert len(set(row[there].tolist())) == int(there.sum())
        assert bool((scores[:, 1:] <= scores[:, :-1]).all())
        # No better one was missed, but for rounding: as good as the k best in float64, place by place.
        best = exact.sort(dim=1, descending=True).values[:, : self.k]
        there = found[:, : best.shape[1]]
        assert bool(((mine[:, : best.shape[1]] - best)[there].abs() <= 20 * limit * scale).all())
        return scores, items


SHAPES = {
    "K": st.sampled_from([1, 3]),
    "U": st.integers(1, 3),
    "I": st.integers(1, 150),
    "D": st.one_of(st.integers(1, 40), st.sampled_from([63, 64, 96, 127, 128])),
    "L": st.integers(0, 2),
    "k": st.integers(1, 12),
    "activated": st.booleans(),
    "curved": st.booleans(),
    "biased": st.booleans(),
    "seen": st.sampled_from([None, 0.0, 0.1, 0.9]),
    "slopes": st.sampled_from([*FAMILIES[:4], "learnt"]),
    "seed": st.integers(0, 7),
}


@given(precision=st.sampled_from(PRECISIONS), splits=st.sampled_from([None, 1, 2]), **SHAPES)
@example(K=1, U=2, I=70, D=1, L=0, k=4, activated=False, curved=True, biased=True, seen=0.5,
         slopes="learnt", seed=0, precision="ieee", splits=1)  # fmt: skip
@example(K=3, U=1, I=70, D=33, L=2, k=4, activated=True, curved=True, biased=True, seen=0.5,
         slopes="learnt", seed=1, precision="tf32x3", splits=2)  # fmt: skip
@example(K=1, U=1, I=33, D=100, L=2, k=40, activated=True, curved=False, biased=False, seen=0.2,
         slopes=FAMILIES[2], seed=2, precision="tf32", splits=None)  # fmt: skip
def test_against_float64(precision: str, splits: int | None, **shapes: Any) -> None:
    Case.random(**shapes).check(precision=precision, splits=splits)


@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize("D", [40, 72])
def test_every_tile(D: int, architecture: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "architecture", lambda x: architecture)
    for L in (1, 2):
        Case.random(D=D, L=L, K=2, I=70, seen=0.2).check(precision="ieee" if L == 1 else "tf32")


def test_bfloat16() -> None:
    """Rounded on the way into a product alone: against float64 of the same rounded arguments."""
    for D, L in ((16, 1), (33, 2), (20, 0)):
        case = Case.random(D=D, L=L, K=2, I=90, activated=True, dtype=torch.bfloat16)
        case.check(limit=LIMIT if L == 0 else 8e-3)


@pytest.mark.parametrize("splits", [2, 3, 1000])
def test_splits_change_nothing(splits: int) -> None:
    case = Case.random(U=2, I=300, D=20, K=2, L=1, k=10, seen=0.3)
    expected = case.run(splits=1)
    scores, items = case.run(splits=splits)
    assert torch.equal(scores, expected[0])
    assert torch.equal(items, expected[1])


def test_other_users_change_nothing() -> None:
    case = Case.random(U=4, I=100, D=20, L=1, seen=0.3)
    assert case.seen is not None
    scores, items = case.run()
    bounds = case.seen[0]
    alone = replace(
        case,
        p=case.p[:, 2:3],
        user_offset=case.user_offset[2:3],
        seen=(bounds[2:4] - bounds[2], case.seen[1][bounds[2] : bounds[3]]),
    )
    alone_scores, alone_items = alone.run()
    assert torch.equal(alone_scores, scores[2:3])
    assert torch.equal(alone_items, items[2:3])


@pytest.mark.parametrize("splits", [1, 4])
def test_ties_go_to_the_lower_item(splits: int) -> None:
    # Without a product: NumPy's, which stands in for tl.dot here, depends on a row's place in a tile.
    case = Case.random(I=200, D=6, L=0, activated=True, k=30)
    tied = replace(case, q=case.q[:, :1].expand_as(case.q), item_offset=torch.zeros(200))
    scores, items = tied.run(splits=splits)
    assert torch.equal(items, torch.arange(30).expand(2, 30))
    assert bool((scores == scores[:, :1]).all())
    # A few levels, so that ties straddle blocks and the end of the list.
    levels = replace(tied, item_offset=(torch.arange(200) % 7).float())
    _, items = levels.run(splits=splits)
    expected = levels.item_offset.sort(descending=True, stable=True).indices[:30]
    assert torch.equal(items, expected.expand(2, 30))


def test_zeros_of_both_signs_tie() -> None:
    case = Case.random(I=4, D=3, k=4, L=0, curved=False)
    nothing = replace(case, readout=torch.zeros_like(case.readout), user_offset=torch.zeros(2))
    offsets = torch.tensor([0.0, -0.0, 1.0, -0.0])
    for sign in (1.0, -1.0):
        signed = replace(nothing, item_offset=offsets, readout=nothing.readout * sign)
        scores, items = signed.run()
        assert items.tolist() == [[2, 0, 1, 3]] * 2
        assert scores.tolist() == [[1.0, 0.0, 0.0, 0.0]] * 2


def test_every_size_of_score_has_its_place() -> None:
    """From the largest to the smallest, both signs, +∞ among them."""
    magnitudes = [1e-45, 1e-38, 1e-20, 1.0, 1.0000001, 3e38]
    values = torch.tensor([*magnitudes, *(-m for m in magnitudes), torch.inf])
    case = Case.random(U=1, I=len(values), D=2, k=len(values), L=0, curved=False)
    case = replace(
        case,
        readout=torch.zeros_like(case.readout),
        user_offset=torch.zeros(1),
        item_offset=values[torch.randperm(len(values))],
    )
    scores, items = case.run()
    assert torch.equal(scores[0], values.sort(descending=True).values)
    assert torch.equal(case.item_offset[items[0]], scores[0])


def test_fewer_candidates_than_k() -> None:
    for I, k in ((1, 1), (1, 3), (5, 100), (70, 512)):
        Case.random(I=I, k=k).check(splits=2)


def test_all_seen() -> None:
    for splits in (1, 3):
        scores, items = Case.random(I=150, k=4, seen=1.0).run(splits=splits)
        assert bool((items == -1).all())
        assert bool((scores == NOWHERE).all())


def test_long_lists_of_seen_items() -> None:
    """Many steps of the walk in a block, empty lists beside full ones, and entries on the blocks' edges."""
    I = 200
    lists = [torch.arange(I), torch.tensor([]), torch.arange(63, I, 64), torch.arange(0, I, 64)]
    lists += [torch.arange(128), torch.arange(64, 192), torch.arange(I - 1), torch.arange(16, 32)]
    bounds = torch.tensor([0, *(len(entries) for entries in lists)]).cumsum(0)
    case = Case.random(U=len(lists), I=I, D=5, L=0, k=20)
    for splits in (1, 2, 4):
        replace(case, seen=(bounds, torch.cat(lists).int())).check(splits=splits)


def test_nan_and_minus_infinity_are_never_among_the_best() -> None:
    case = Case.random(U=2, I=80, D=12, L=1, k=80)
    case.q[0, 7, 3] = math.nan
    case.q[0, 70] = math.nan
    case.item_offset[[11, 64]] = NOWHERE
    case.item_offset[12] = math.nan
    scores, items = case.run()
    assert sorted(items[0].tolist()) == sorted([*(set(range(80)) - {7, 70, 11, 64, 12}), *[-1] * 5])
    assert not bool(scores.isnan().any())
    case.p[0, 1, 0] = math.nan
    after_scores, after_items = case.run()
    assert torch.equal(after_items[0], items[0])
    assert torch.equal(after_scores[0], scores[0])
    assert bool((after_items[1] == -1).all())


def test_same_bits_twice() -> None:
    case = Case.random(U=2, I=150, D=33, L=2, K=3)
    first, second = case.run(), case.run()
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


def test_empty() -> None:
    scores, items = Case.random(U=0).run()
    assert scores.shape == (0, 5)
    scores, items = Case.random(I=0).run()
    assert bool((items == -1).all())
    assert bool((scores == NOWHERE).all())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": torch.zeros(1, 40, 7)}, "q must be contiguous"),
        ({"q": torch.zeros(1, 40, 8, dtype=torch.bfloat16)}, "q must be torch.float32"),
        ({"weight": torch.zeros(1, 8, 8)}, "weight must be contiguous"),
        ({"bias": torch.zeros(1, 8)}, "bias must be contiguous"),
        ({"readout": torch.zeros(8)}, "readout must be contiguous"),
        ({"curvature": torch.zeros(8)}, "curvature must be contiguous"),
        ({"user_offset": torch.zeros(3)}, "user_offset must be contiguous"),
        ({"item_offset": torch.zeros(40).double()}, "item_offset must be torch.float32"),
        ({"slopes": torch.ones(2, 3)}, "slopes must be contiguous"),
        ({"seen": (torch.zeros(2).long(), torch.zeros(1).int())}, "seen.0. must be contiguous"),
        ({"seen": (torch.zeros(3).long(), torch.zeros(4).int()[::2])}, "seen.1. must be contiguous"),
        ({"seen": (torch.zeros(3), torch.zeros(1).int())}, "seen.0. must be int32 or int64"),
        ({"k": 0}, "k must lie between 1 and 512, got 0"),
        ({"k": 513}, "k must lie between 1 and 512, got 513"),
    ],
)
def test_refused(changes: dict[str, Any], message: str) -> None:
    case = replace(Case.random(), **changes)
    with pytest.raises(ValueError, match=message):
        score.score_topk(
            *(case.p, case.q, case.weight, case.bias, case.slopes, case.readout, case.curvature),
            *(case.user_offset, case.item_offset, case.seen, case.k),
            activated=case.activated,
            precision="tf32",
        )


def test_refused_sizes() -> None:
    with pytest.raises(ValueError, match="at most 128 features, got 129"):
        Case.random(D=129).run()
    with pytest.raises(ValueError, match="precision must be one of"):
        Case.random().run(precision="tf64")


@pytest.mark.parametrize("readout", ["linear", "pair"])
def test_recommendations_come_from_it(readout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    g = torch.Generator().manual_seed(0)
    users, items = torch.randint(20, (300,), generator=g), torch.randint(70, (300,), generator=g)
    config = TrainConfig(members=2, embedding_size=6, layers=3, item_history=True, readout=readout)
    model = RatingModel(config, users, items, torch.rand(300, generator=g), 20, 70)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=g))
        scorer = ItemScorer(model, model.histories())
    expected = scorer.best(torch.arange(4), 5, torch.arange(3, 70))
    calls: list[int] = []
    launch = score.score_topk
    monkeypatch.setattr(score, "score_topk", lambda *args, **how: calls.append(1) or launch(*args, **how))
    lunet_fast.set_backend("triton")
    try:
        scores, found = scorer.best(torch.arange(4), 5, torch.arange(3, 70))
    finally:
        lunet_fast.set_backend("auto")
    assert calls == [1]
    assert torch.equal(found, expected[1])
    assert normwise(scores, expected[0].double()) <= LIMIT

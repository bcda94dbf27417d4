"""The two protocols of the paper: what a method learns from, and what it is measured on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lunet_fast.recsys.data.order import GAP_NAMES, GAPS, gaps_since
from lunet_fast.recsys.data.ratings import Ratings
from lunet_fast.recsys.data.splits import (
    draw_candidates,
    joint_split,
    leave_one_out,
    per_user_split,
    random_split,
    time_split,
)
from lunet_fast.recsys.measures.ranking import (
    KS,
    ActivityGroup,
    FullRanking,
    SampledRanking,
    ScoreItems,
    full_ranking,
    metrics_of_one_each,
    sampled_ranking,
)

RANKED_PAIRS = 2**26
"""Pairs that a ranking of all items scores at most: of more users than that allows, a sample is ranked."""


@dataclass(frozen=True)
class Parts:
    """The parts of one data set, all with the same ids."""

    training: Ratings
    test: Ratings | None
    """For ratings."""
    held_out: Ratings | None
    """For ranking, one of each user: the latest one, or the first after a time."""
    candidates: Tensor | None
    """int64 ``[held_out, 100]``: what each held-out item is ranked with, -1 for none."""
    gaps: Tensor | None = None
    """uint8 ``[held_out]``, the class of the time since the user's last rating in training, as
    :func:`~lunet_fast.recsys.data.order.gap_classes` has them."""

    @classmethod
    def of(cls, ratings: Ratings, split: str, seed: int) -> Parts:
        """Those of a split, named as in the settings of a training; ``ValueError`` where it needs more."""
        if split == "stream":
            raise ValueError("split='stream' is that of a stream of ratings: choose split='random'")
        if split == "files":
            raise ValueError(
                "split='files' needs the test part: pass test=, or choose split='random' or 'per-user'"
            )
        if split == "none":
            return cls(ratings, None, None, None)
        divide = {
            "random": random_split,
            "per-user": per_user_split,
            "leave-one-out": leave_one_out,
            "joint": joint_split,
            "time": time_split,
        }[split]
        divided = divide(ratings, seed)
        training, held_out, candidates, gaps = ratings.select(divided.train), None, None, None
        if len(divided.held_out):
            held_out = ratings.select(divided.held_out)
            candidates = draw_candidates(ratings, divided.held_out, seed)
            gaps = torch.from_numpy(gaps_since(training, held_out))
        test = ratings.select(divided.test) if len(divided.test) else None
        return cls(training, test, held_out, candidates, gaps)

    def beyond_training(self) -> bool:
        """Whether a part other than training's has rows."""
        return self.test is not None or self.held_out is not None

    def chosen(self, least: float | None) -> Parts:
        """The same without the test and held-out ratings below ``least``; None for a part left empty."""
        if least is None:
            return self
        test, held_out, candidates, gaps = self.test, self.held_out, self.candidates, self.gaps
        if test is not None:
            test = test.select(test.rating >= least)
        if held_out is not None:
            kept = held_out.rating >= least
            held_out = held_out.select(kept)
            candidates, gaps = (None if each is None else each[kept] for each in (candidates, gaps))
        test, held_out = (part if part is not None and len(part) else None for part in (test, held_out))
        return replace(self, test=test, held_out=held_out, candidates=candidates, gaps=gaps)

    def known_pairs(self) -> Tensor:
        """``user * n_items + item`` of all parts, int64."""
        parts = [part for part in (self.training, self.test, self.held_out) if part is not None]
        return torch.cat([part.user * part.n_items + part.item for part in parts])


class Ranking(NamedTuple):
    """Metrics of a model, and of groups of users."""

    metrics: dict[str, float]
    groups: list[ActivityGroup]
    """``full_...`` for thirds of the users by the number of their seen pairs."""
    gaps: dict[str, dict[str, float]]
    """Of held-out ratings, by the time since the user's last rating in training, a name of GAP_NAMES: the
    number of ``users``, ``hr@10``, ``ndcg@10``, ``full_hr@10`` and ``full_ndcg@10``. Without those of unknown
    times, and so empty where there are no times."""

    @property
    def figures(self) -> dict[str, Any]:
        """What results are to hold: the metrics, and ``by_gap`` where there are any."""
        return {**self.metrics, **({"by_gap": self.gaps} if self.gaps else {})}


def evaluate_ranking(
    score_items: ScoreItems, parts: Parts, seed: int = 0, positive_from: float | None = None
) -> Ranking:
    """All metrics of ranking that ``parts`` allow; none where there is neither a held-out nor a test part.

    With held-out ratings: ``hr@k``, ``ndcg@k`` and ``mrr`` among the candidates, and
    ``full_...`` among all items that are in no other known pair of the user. ``precision@k`` (2.16) and
    ``recall@k`` are of the test part, ranked among all items that are neither in training nor held out; where
    there is no test part, a held-out rating is the one relevant item of its user among the candidates, and
    precision@k = hr@k / k. Without held-out ratings, ``full_...`` are of the test part. k is 5, 10 and 20.

    ``full_users`` is the number of users ranked; where all would make more than RANKED_PAIRS pairs, they are
    a sample drawn by ``default_rng((seed, 4))``.

    Of ratings below ``positive_from`` none is to be found again: held-out ones are left out, and test ones
    are among the items that are not relevant.
    """
    values: dict[str, float] = {}
    training, test, every_held_out = parts.training, parts.test, parts.held_out
    parts = parts.chosen(positive_from)
    relevant, held_out = parts.test, parts.held_out
    sampled = None
    if held_out is not None and parts.candidates is not None:
        sampled = sampled_ranking(score_items, held_out.user, held_out.item, parts.candidates)
        values |= sampled.metrics
    of_test = None
    if relevant is not None:
        others = [training] if every_held_out is None else [training, every_held_out]
        of_test = _ranked_among_all(score_items, relevant, others, seed)
        for k in KS:
            for name in ("precision", "recall"):
                values[f"{name}@{k}"] = of_test.metrics[f"full_{name}@{k}"]
    elif held_out is not None:
        values |= {f"precision@{k}": values[f"hr@{k}"] / k for k in KS}
    full = of_test
    if held_out is not None:
        others = [training] if test is None else [training, test]
        full = _ranked_among_all(score_items, held_out, others, seed)
    if full is None:
        return Ranking(values, [], {})
    gaps = {} if sampled is None else _by_gap(parts, sampled, full)
    return Ranking({**values, **full.metrics, "full_users": full.users}, full.groups, gaps)


def _by_gap(parts: Parts, sampled: SampledRanking, full: FullRanking) -> dict[str, dict[str, float]]:
    """The metrics of the held-out ratings by their gaps, of the gaps that there are."""
    assert parts.held_out is not None
    if parts.gaps is None:
        return {}
    # The classes of more than a day are one, and unknown ones in none.
    of_pair = torch.where(parts.gaps == GAPS - 1, len(GAP_NAMES), parts.gaps.clamp(max=len(GAP_NAMES) - 1))
    gap_of = torch.full((parts.held_out.n_users,), len(GAP_NAMES), dtype=torch.uint8)
    gap_of[parts.held_out.user] = of_pair
    users, ranks = full.pairs
    found = {}
    for gap, name in enumerate(GAP_NAMES):
        inside, ranked = of_pair == gap, gap_of[users] == gap
        if ranked.any():
            among_all = metrics_of_one_each(ranks.where(ranked), (10,))
            found[name] = {
                "users": int(inside.sum()),
                **metrics_of_one_each(sampled.ranks.where(inside), (10,)),
                **{f"full_{measure}": value for measure, value in among_all.items()},
            }
    return found


def _ranked_among_all(
    score_items: ScoreItems, relevant: Ratings, seen: list[Ratings], seed: int
) -> FullRanking:
    """``full_ranking`` of the pairs ``relevant``, with those of ``seen`` left out."""
    users, items = relevant.user, relevant.item
    some = torch.unique(users)
    most = max(1, RANKED_PAIRS // relevant.n_items)
    if len(some) > most:
        drawn = np.random.default_rng((seed, 4)).choice(len(some), most, replace=False)
        kept = torch.isin(users, some[torch.from_numpy(drawn)])
        users, items = users[kept], items[kept]
    seen_users, seen_items = (torch.cat([getattr(part, side) for part in seen]) for side in ("user", "item"))
    return full_ranking(score_items, users, items, seen_users, seen_items, relevant.n_items)

"""Metrics: pure functions of tensors. Those of pairs return a Python float, those of rankings one a user.

A ranking is measured by the places of its relevant items: ``ranks``, :class:`Ranks` of R of them, and
``user`` int64 ``[R]``, whose relevant item each of them is; users are numbered 0 to U - 1, and every one has
a relevant item (R = U and ``user = arange(U)`` where each has one). Candidates of equal scores are in no
order, and a metric at k is its expectation over all orders of them. Optimistic ties, the first place for whatever
nothing beats, would give a model with one score for everything the first place everywhere; mean places alone
would make 19 candidates with the highest score a hit among 10, and a hundred none.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Ranks(NamedTuple):
    """Where R relevant items are among the candidates of their users; each ``[R]``."""

    mean: Tensor
    """The place from 1, float64; of those with equal scores the mean one, inf where it is not ranked."""
    higher: Tensor
    """Candidates with a higher score, int64."""
    tied: Tensor
    """Candidates with the same score, itself among them, int64."""
    relevant: Tensor
    """Those of the tied that are relevant, itself among them, int64."""

    def where(self, chosen: Tensor) -> Ranks:
        """Those of a mask or of indices."""
        return Ranks(*(each[chosen] for each in self))

    def cpu(self) -> Ranks:
        return Ranks(*(each.cpu() for each in self))

    @classmethod
    def cat(cls, parts: list[Ranks]) -> Ranks:
        return cls(*(torch.cat(each) for each in zip(*parts, strict=True)))


def mse(prediction: Tensor, rating: Tensor) -> float:
    """Mean squared error over the pairs, (2.12); both ``[B]``, B > 0. Summed in float64."""
    _check_pairs(prediction, rating)
    return float((prediction.double() - rating.double()).square().mean())


def rmse(prediction: Tensor, rating: Tensor) -> float:
    """Root of :func:`mse`, (2.15)."""
    return math.sqrt(mse(prediction, rating))


def squared_norm(x: Tensor) -> float:
    """Mean over the rows of ``|x|^2`` for x ``[..., D]``, summed in float64."""
    return float(x.double().square().sum(-1).mean())


def reconstruction_error(x: Tensor, reconstructed: Tensor) -> float:
    """Mean over the rows of ``|reconstructed - x|^2`` for two ``[..., D]`` tensors.

    The tensors are compared as they are, in float64, so nothing is rounded away; divide by
    :func:`squared_norm` of x for the relative error.
    """
    if x.shape != reconstructed.shape:
        raise ValueError(f"x has shape {tuple(x.shape)} but its reconstruction {tuple(reconstructed.shape)}")
    return squared_norm(reconstructed.double() - x.double())


def ranks(score: Tensor, others: Tensor) -> Ranks:
    """Of one relevant candidate each, with ``score [N]``, among ``others [N, C]``: its mean place is

        1 + number of others scored higher + (number of others scored the same) / 2

    NaN counts as -inf, and -inf as absent: such a candidate neither beats nor ties anything, and a relevant
    one is not in the ranking at all, its rank is inf, which no metric rewards. O(N C).
    """
    if score.dim() != 1 or others.dim() != 2 or len(score) != len(others):
        raise ValueError(
            f"score must be [N] and others [N, C], got {list(score.shape)} and {list(others.shape)}"
        )
    score, others = absent_as_minus_inf(score).unsqueeze(1), absent_as_minus_inf(others)
    higher, same = (others > score).sum(1), (others == score).sum(1)
    rank = 1 + higher.double() + same.double() / 2
    rank = rank.masked_fill(score.squeeze(1) == -torch.inf, torch.inf)
    return Ranks(rank, higher, same + 1, torch.ones_like(same))


def ranks_of_several(score: Tensor, user: Tensor, descending: Tensor) -> Ranks:
    """Of R relevant items with ``score [R]`` for ``user [R]`` (int64, ascending).

    ``descending [U, I]`` are all candidates' scores for each user, the relevant ones' among them, from the
    highest to the lowest. Without ties the rank is the place in that row. Where T candidates have the same
    score, m of them relevant, and H a higher one, the j-th of the m (in the order given) has the mean place

        H + j (T + 1) / (m + 1)

    when the T are ordered at random. For m = 1 that is the rank of :func:`ranks`. -inf is treated as there;
    NaN is not allowed. O(U I + R log I) time and O(U I) memory.
    """
    rows = torch.arange(len(descending), device=user.device)
    first = torch.searchsorted(user, rows)
    counts = torch.searchsorted(user, rows, right=True) - first
    place = torch.arange(len(user), device=user.device) - first[user]
    # One row of queries for each user; what fills up the short rows is not read again.
    wanted = score.new_zeros(len(descending), int(counts.max()) if len(counts) else 0)
    wanted[user, place] = -score
    ascending = (-descending).contiguous()
    higher = torch.searchsorted(ascending, wanted)[user, place]
    tied = torch.searchsorted(ascending, wanted, right=True)[user, place] - higher
    # A user's items with the same number of higher ones are those with the same score.
    group = user * (descending.shape[1] + 1) + higher
    order = torch.argsort(group, stable=True)
    _, relevant = torch.unique_consecutive(group[order], return_counts=True)
    before = torch.repeat_interleave(relevant.cumsum(0) - relevant, relevant)
    j, m = torch.empty_like(group), torch.empty_like(group)
    j[order] = torch.arange(1, len(group) + 1, device=user.device) - before
    m[order] = torch.repeat_interleave(relevant, relevant)
    rank = higher.double() + (j * (tied + 1)).double() / (m + 1).double()
    return Ranks(rank.masked_fill(score == -torch.inf, torch.inf), higher, tied, m)


def absent_as_minus_inf(scores: Tensor) -> Tensor:
    """Floating-point ``scores`` with -inf in place of NaN."""
    return scores.masked_fill(scores.isnan(), -torch.inf)


def hit_rate(ranks: Ranks, user: Tensor, k: int) -> Tensor:
    """The chance of a relevant item among the first k; float64 ``[U]``, 0 or 1 without ties.

    For one relevant item a user, the mean is HR@k. Of T tied candidates, m of them relevant, of which the
    first q are among the k, none is relevant with the chance C(T - m, q) / C(T, q).
    """
    inside = _places_inside(ranks, user, k)
    q, tied, m = inside.double(), ranks.tied.double(), ranks.relevant.double()
    ways = [torch.lgamma(n.clamp_min(0) + 1) for n in (tied - m, tied - q, tied - m - q, tied)]
    missed = torch.exp((ways[0] + ways[1] - ways[2] - ways[3]) / m)  # each of the m has an equal factor of it
    missed = torch.where(q > tied - m, 0.0, torch.where(m == 1, 1 - q / tied, missed))
    missed = torch.where(inside == 0, 1.0, missed)
    users = torch.ones(int(user.max()) + 1, dtype=torch.float64, device=user.device)
    return 1 - users.scatter_reduce(0, user, missed, "prod")


def recall(ranks: Ranks, user: Tensor, k: int) -> Tensor:
    """Relevant items among the first k over all relevant items of the user; float64 ``[U]``."""
    return _hits(ranks, user, k) / torch.bincount(user)


def precision(ranks: Ranks, user: Tensor, k: int) -> Tensor:
    """Relevant items among the first k over k, (2.16); float64 ``[U]``.

    k divides also where the user has fewer than k relevant items, or fewer than k items to choose from.
    """
    return _hits(ranks, user, k) / k


def ndcg(ranks: Ranks, user: Tensor, k: int) -> Tensor:
    """Normalised discounted cumulative gain of a user with n relevant items; float64 ``[U]``.

        NDCG@k = sum over ranks r <= k of 1/log2(r + 1)  /  sum for r = 1 .. min(k, n) of 1/log2(r + 1)

    For one relevant item this is 1/log2(rank + 1) if rank <= k, otherwise 0; of T tied candidates, the mean
    of that over their T places.
    """
    inside = _places_inside(ranks, user, k)
    places = torch.arange(1, k + 1, dtype=torch.float64, device=user.device)
    gains = 1 / torch.log2(places + 1)
    up_to = torch.cat([gains.new_zeros(1), gains.cumsum(0)])
    first = ranks.higher.clamp(max=k)
    of_tied = (up_to[first + inside] - up_to[first]) / ranks.tied
    alone = gains[first.clamp(max=k - 1)] * inside  # not as a difference, which would round
    gain = torch.where(ranks.tied == 1, alone, of_tied)
    n = torch.bincount(user)
    return torch.bincount(user, weights=gain) / up_to[n.clamp(max=k)]


def mrr(ranks: Ranks, user: Tensor) -> Tensor:
    """1/rank of the user's first relevant item, the highest of the ranking, without a cut; float64 ``[U]``.

    The mean is the mean reciprocal rank. Of tied candidates it is that of the mean place.
    """
    _check_ranks(ranks, user)
    reciprocal = torch.zeros(int(user.max()) + 1, dtype=torch.float64, device=user.device)
    return reciprocal.scatter_reduce(0, user, 1 / ranks.mean, "amax")


def coverage(top: Tensor, n_items: int) -> float:
    """Share of all ``n_items`` items that are in somebody's list; ``top`` int64 ``[U, k]``, -1 for none."""
    if n_items < 1:
        raise ValueError(f"n_items must be at least 1, got {n_items}")
    if top.numel() and int(top.max()) >= n_items:
        raise ValueError(f"top has item {int(top.max())}, n_items is {n_items}: pass the number of all items")
    return len(top[top >= 0].unique()) / n_items


def _hits(ranks: Ranks, user: Tensor, k: int) -> Tensor:
    """How many relevant items are among the first k, in the mean; float64 ``[U]``."""
    return torch.bincount(user, weights=_places_inside(ranks, user, k).double() / ranks.tied)


def _places_inside(ranks: Ranks, user: Tensor, k: int) -> Tensor:
    """How many of the places that an item shares with the tied are among the first k; int64 ``[R]``."""
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    _check_ranks(ranks, user)
    inside = torch.minimum((k - ranks.higher).clamp_min(0), ranks.tied)
    return inside.masked_fill(ranks.mean.isinf(), 0)


def _check_ranks(ranks: Ranks, user: Tensor) -> None:
    if user.dim() != 1 or any(each.shape != user.shape for each in ranks):
        shapes = [list(each.shape) for each in (*ranks, user)]
        raise ValueError(f"ranks and user must all be [R], got {', '.join(map(str, shapes))}")
    if user.numel() == 0:
        raise ValueError("no ranks: a mean over nothing is undefined")
    counts = torch.bincount(user)
    if int(counts.min()) == 0:
        raise ValueError(
            f"user {int(counts.argmin())} has no relevant item: leave such users out and number the others "
            "from 0"
        )


def _check_pairs(prediction: Tensor, rating: Tensor) -> None:
    if prediction.shape != rating.shape:
        raise ValueError(
            f"prediction has shape {tuple(prediction.shape)}, rating {tuple(rating.shape)}: one number a pair"
        )
    if prediction.numel() == 0:
        raise ValueError("no pairs: a mean over nothing is undefined")

"""Metrics: pure functions of tensors. Those of pairs return a Python float, those of rankings one a user.

A ranking is measured by the ranks of its relevant items: ``rank`` float64 ``[R]``, from 1, and ``user`` int64
``[R]``, whose relevant item each of them is; users are numbered 0 to U - 1, and every one has a relevant item
(R = U and ``user = arange(U)`` where each has one). Equal scores make ranks fractional (see :func:`ranks`);
the formulas are the same for those: an item is among the first k where rank <= k, and its discount is
1/log2(rank + 1). Optimistic ties, rank = 1 + the number scored higher, would give a model with one score for
everything the first place everywhere.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


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


def ranks(score: Tensor, others: Tensor) -> Tensor:
    """Rank of one relevant candidate with ``score [N]`` among ``others [N, C]``; float64 ``[N]``.

        rank = 1 + number of others scored higher + (number of others scored the same) / 2

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
    return rank.masked_fill(score.squeeze(1) == -torch.inf, torch.inf)


def ranks_of_several(score: Tensor, user: Tensor, descending: Tensor) -> Tensor:
    """Ranks of R relevant items with ``score [R]`` for ``user [R]`` (int64, ascending); float64 ``[R]``.

    ``descending [U, I]`` are all candidates' scores for each user, the relevant ones' among them, from the
    highest to the lowest. Without ties the rank is the place in that row. Where T candidates have the same
    score, m of them relevant, and H a higher one, the j-th of the m (in the order given) has the rank

        H + j (T + 1) / (m + 1),

    its mean place when the T are ordered at random. For m = 1 that is the rank of :func:`ranks`; for m > 1 no
    two relevant items share a place, so that precision and NDCG stay at 1 or below. -inf is treated as
    there; NaN is not allowed. O(U I + R log I) time and O(U I) memory.
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
    return rank.masked_fill(score == -torch.inf, torch.inf)


def absent_as_minus_inf(scores: Tensor) -> Tensor:
    """Floating-point ``scores`` with -inf in place of NaN."""
    return scores.masked_fill(scores.isnan(), -torch.inf)


def hit_rate(rank: Tensor, user: Tensor, k: int) -> Tensor:
    """1 for a user with a relevant item among the first k, otherwise 0; float64 ``[U]``.

    For one relevant item a user, the mean is HR@k.
    """
    return (_hits(rank, user, k) > 0).double()


def recall(rank: Tensor, user: Tensor, k: int) -> Tensor:
    """Relevant items among the first k over all relevant items of the user; float64 ``[U]``."""
    return _hits(rank, user, k) / torch.bincount(user)


def precision(rank: Tensor, user: Tensor, k: int) -> Tensor:
    """Relevant items among the first k over k, (2.16); float64 ``[U]``.

    k divides also where the user has fewer than k relevant items, or fewer than k items to choose from.
    """
    return _hits(rank, user, k) / k


def ndcg(rank: Tensor, user: Tensor, k: int) -> Tensor:
    """Normalised discounted cumulative gain of a user with n relevant items; float64 ``[U]``.

        NDCG@k = sum over ranks r <= k of 1/log2(r + 1)  /  sum for r = 1 .. min(k, n) of 1/log2(r + 1)

    For one relevant item this is 1/log2(rank + 1) if rank <= k, otherwise 0.
    """
    _check_ranks(rank, user, k)
    gain = torch.where(rank <= k, 1 / torch.log2(rank + 1), 0.0)
    n = torch.bincount(user)
    places = torch.arange(1, min(k, int(n.max())) + 1, dtype=torch.float64, device=rank.device)
    ideal = (1 / torch.log2(places + 1)).cumsum(0)
    return torch.bincount(user, weights=gain) / ideal[n.clamp(max=k) - 1]


def mrr(rank: Tensor, user: Tensor) -> Tensor:
    """1/rank of the user's first relevant item, the highest of the ranking, without a cut; float64 ``[U]``.

    The mean is the mean reciprocal rank.
    """
    _check_ranks(rank, user)
    reciprocal = torch.zeros(int(user.max()) + 1, dtype=torch.float64, device=rank.device)
    return reciprocal.scatter_reduce(0, user, 1 / rank, "amax")


def coverage(top: Tensor, n_items: int) -> float:
    """Share of all ``n_items`` items that are in somebody's list; ``top`` int64 ``[U, k]``, -1 for none."""
    if n_items < 1:
        raise ValueError(f"n_items must be at least 1, got {n_items}")
    if top.numel() and int(top.max()) >= n_items:
        raise ValueError(f"top has item {int(top.max())}, n_items is {n_items}: pass the number of all items")
    return len(top[top >= 0].unique()) / n_items


def _hits(rank: Tensor, user: Tensor, k: int) -> Tensor:
    _check_ranks(rank, user, k)
    return torch.bincount(user, weights=(rank <= k).double())


def _check_ranks(rank: Tensor, user: Tensor, k: int = 1) -> None:
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    if rank.dim() != 1 or rank.shape != user.shape:
        raise ValueError(f"rank and user must both be [R], got {list(rank.shape)} and {list(user.shape)}")
    if rank.numel() == 0:
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

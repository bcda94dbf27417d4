"""Rankings of items by any method's scores, and what is measured of them. The formulas are in ``metrics``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lunet_fast.recsys.measures import metrics

USER_CHUNK = 256
"""Users whose scores of all items are held at once: bounds the memory of ranking."""

KS = (5, 10, 20)
"""Lengths of the lists that ranking is measured at."""

ScoreItems = Callable[[Tensor], Tensor]
"""users int64 ``[U]``, on the CPU -> scores ``[U, I]`` of all items, floating point, on any device: higher is
better, -inf for what cannot be recommended. A user's row must not depend on who else is asked for."""


class ActivityGroup(NamedTuple):
    """Ranking metrics of the users with a similar number of seen pairs."""

    least: int
    """Seen pairs of its least active user."""
    most: int
    """Seen pairs of its most active user."""
    users: int
    """Number of evaluated users."""
    metrics: dict[str, float]
    """The keys of :attr:`FullRanking.metrics`."""


class FullRanking(NamedTuple):
    """Ranking metrics over all items that a user has not seen."""

    users: int
    """Number of evaluated users: those with a relevant item."""
    metrics: dict[str, float]
    """``full_recall@k``, ``full_precision@k``, ``full_ndcg@k``, ``full_hr@k`` for each k and ``full_mrr``,
    means over the evaluated users; ``coverage@k``, the share of all items in somebody's first k."""
    groups: list[ActivityGroup]
    """The users in thirds from the least to the most active. Those with equally many seen pairs are together,
    so there are fewer groups where few users or many equal ones are; coverage grows with a group's users."""
    pairs: tuple[Tensor, metrics.Ranks]
    """The user, int64 ``[R]``, of each relevant pair in the order of (user, item), and the pairs' ranks."""


class SampledRanking(NamedTuple):
    """Ranking metrics of one relevant item each among its candidates."""

    metrics: dict[str, float]
    """``hr@k`` and ``ndcg@k`` for each k, and ``mrr``, means over the pairs."""
    ranks: metrics.Ranks
    """Of the H pairs."""


def metrics_of_one_each(rank: metrics.Ranks, ks: Sequence[int] = KS) -> dict[str, float]:
    """``hr@k`` and ``ndcg@k`` for each k, means over users with one relevant item each, of these ranks."""
    pair = torch.arange(len(rank.mean))
    result = {f"hr@{k}": float(metrics.hit_rate(rank, pair, k).mean()) for k in ks}
    return result | {f"ndcg@{k}": float(metrics.ndcg(rank, pair, k).mean()) for k in ks}


@torch.no_grad()
def sampled_ranking(
    score_items: ScoreItems, users: Tensor, items: Tensor, candidates: Tensor, ks: Sequence[int] = KS
) -> SampledRanking:
    """Leave-one-out: each held-out pair's item against its candidates; HR@k, NDCG@k and MRR.

    ``users`` and ``items``, int64 ``[H]``, are the held-out pairs, ``candidates`` int64 ``[H, C]`` their
    :func:`~lunet_fast.recsys.data.splits.draw_candidates`, -1 for none. Ranks, ties and -inf are those of
    :func:`~.metrics.ranks`. A pair without any candidate has rank 1.

    Users are scored USER_CHUNK at a time, and the result does not depend on that number. Time beside
    ``score_items`` O(H C); USER_CHUNK (I + C) numbers of memory. ValueError where the shapes do not fit,
    where no pair is given, for a negative item, and where a candidate is the held-out item.
    """
    _check_ks(ks)
    if users.dim() != 1 or users.shape != items.shape or candidates.shape[:-1] != users.shape:
        raise ValueError(
            "users and items must be [H] and candidates [H, C], got "
            f"{list(users.shape)}, {list(items.shape)} and {list(candidates.shape)}"
        )
    if len(users) == 0:
        raise ValueError("users is empty: there is no held-out pair to rank")
    if int(items.min()) < 0:
        raise ValueError(f"items must be indices of at least 0, got {int(items.min())}")
    taken = (candidates == items.unsqueeze(1)).any(1).nonzero()
    if len(taken):
        h = int(taken[0])
        raise ValueError(
            f"candidates of user {int(users[h])} contain the held-out item {int(items[h])}: draw them with "
            "draw_candidates from the complete ratings"
        )
    users, items, candidates = users.cpu(), items.cpu(), candidates.cpu()
    parts = []
    for u, i, c in zip(*(t.split(USER_CHUNK) for t in (users, items, candidates)), strict=True):
        scores = _scores(score_items, u)
        i, c = i.to(scores.device), c.to(scores.device)
        others = scores.gather(1, c.clamp(min=0)).masked_fill_(c < 0, -torch.inf)
        parts.append(metrics.ranks(scores.gather(1, i.unsqueeze(1)).squeeze(1), others).cpu())
    rank = metrics.Ranks.cat(parts)
    mrr = float(metrics.mrr(rank, torch.arange(len(users))).mean())
    return SampledRanking(metrics_of_one_each(rank, ks) | {"mrr": mrr}, rank)


@torch.no_grad()
def full_ranking(
    score_items: ScoreItems,
    relevant_users: Tensor,
    relevant_items: Tensor,
    seen_users: Tensor,
    seen_items: Tensor,
    n_items: int,
    ks: Sequence[int] = KS,
) -> FullRanking:
    """Ranks all items that a user has not seen, and measures where the relevant ones come.

    The relevant pairs, int64 ``[R]`` each, are held-out or test pairs; the seen ones, int64 ``[S]`` each, are
    left out of the ranking: the training pairs, and whatever else must not be recommended. A user's activity
    is the number of its distinct seen pairs. ``n_items`` is I, the number of all items. Ranks, ties and -inf
    are those of :func:`~.metrics.ranks_of_several`. For ``coverage@k``, of equal scores the lower item comes
    first, and no item of -inf is in a list.

    Users are scored USER_CHUNK at a time, and the result does not depend on that number. Time beside
    ``score_items`` O(U I log I + (R + S) log(R + S)); memory a few times USER_CHUNK I + R + S numbers.
    ValueError where the shapes do not fit, where there is no relevant pair, for an item outside 0 to I - 1,
    and for a relevant pair that is given twice or is among the seen ones.
    """
    _check_ks(ks)
    relevant = _pair_keys("relevant", relevant_users, relevant_items, n_items)
    seen = _pair_keys("seen", seen_users, seen_items, n_items).unique()
    if len(relevant) == 0:
        raise ValueError("relevant_users is empty: there is no pair to rank")
    relevant = relevant.sort().values
    for wrong, what in (
        (relevant[1:][relevant[1:] == relevant[:-1]], "is given twice: give it once"),
        (relevant[torch.isin(relevant, seen)], "is among the seen ones too: remove it from one of the two"),
    ):
        if len(wrong):
            u, i = divmod(int(wrong[0]), n_items)
            raise ValueError(f"the relevant pair of user {u} and item {i} {what}")

    # From here on a user is its place among those with a relevant item.
    users, row = (relevant // n_items).unique_consecutive(return_inverse=True)
    seen_row = torch.searchsorted(users, seen // n_items).clamp_(max=len(users) - 1)
    evaluated = users[seen_row] == seen // n_items
    seen, seen_row = (seen % n_items)[evaluated], seen_row[evaluated]
    relevant = relevant % n_items

    ranks, tops = [], []
    for start in range(0, len(users), USER_CHUNK):
        chunk = users[start : start + USER_CHUNK]
        scores = _scores(score_items, chunk)
        if scores.shape[1] != n_items:
            raise ValueError(f"score_items gave {scores.shape[1]} items, but n_items is {n_items}")
        device = scores.device
        left_out = _rows(seen_row, start, start + len(chunk))
        scores[seen_row[left_out].to(device) - start, seen[left_out].to(device)] = -torch.inf
        wanted = _rows(row, start, start + len(chunk))
        wanted_row, wanted_item = row[wanted].to(device) - start, relevant[wanted].to(device)
        # Stable: of equal scores the lower item stays first.
        descending, order = scores.sort(dim=1, descending=True, stable=True)
        wanted_score = scores[wanted_row, wanted_item]
        ranks.append(metrics.ranks_of_several(wanted_score, wanted_row, descending).cpu())
        best = slice(0, max(ks))
        tops.append(order[:, best].masked_fill(descending[:, best] == -torch.inf, -1).cpu())
    rank, top = metrics.Ranks.cat(ranks), torch.cat(tops)

    activity = torch.bincount(seen_row, minlength=len(users))
    groups = []
    for member in _thirds(activity):
        place = member.cumsum(0) - 1
        inside = member[row]
        least, most = activity[member].aminmax()
        values = _full_metrics(rank.where(inside), place[row[inside]], top[member], n_items, ks)
        groups.append(ActivityGroup(int(least), int(most), int(member.sum()), values))
    return FullRanking(len(users), _full_metrics(rank, row, top, n_items, ks), groups, (users[row], rank))


def _full_metrics(
    rank: metrics.Ranks, user: Tensor, top: Tensor, n_items: int, ks: Sequence[int]
) -> dict[str, float]:
    at_k = {
        "recall": metrics.recall,
        "precision": metrics.precision,
        "ndcg": metrics.ndcg,
        "hr": metrics.hit_rate,
    }
    values = {f"full_{n}@{k}": float(f(rank, user, k).mean()) for n, f in at_k.items() for k in ks}
    values["full_mrr"] = float(metrics.mrr(rank, user).mean())
    return values | {f"coverage@{k}": metrics.coverage(top[:, :k], n_items) for k in ks}


def _thirds(activity: Tensor) -> list[Tensor]:
    """Masks of the users up to each third of the sorted ``activity``; equal ones stay together."""
    n = len(activity)
    bounds = activity.sort().values[[(n + 2) // 3 - 1, (2 * n + 2) // 3 - 1]]
    group = torch.searchsorted(bounds, activity)
    return [group == g for g in group.unique()]


def _scores(score_items: ScoreItems, users: Tensor) -> Tensor:
    """A copy of the scores of ``users``, checked, -inf in place of NaN."""
    scores = score_items(users)
    if scores.dim() != 2 or len(scores) != len(users) or not scores.is_floating_point():
        raise ValueError(
            f"score_items must give floating-point scores [{len(users)}, I] for {len(users)} users, got "
            f"{scores.dtype} {list(scores.shape)}"
        )
    return metrics.absent_as_minus_inf(scores)


def _rows(row: Tensor, start: int, stop: int) -> slice:
    """Where ascending ``row`` is in [start, stop)."""
    first, last = torch.searchsorted(row, torch.tensor([start, stop])).tolist()
    return slice(first, last)


def _pair_keys(name: str, users: Tensor, items: Tensor, n_items: int) -> Tensor:
    """user * n_items + item, on the CPU: one number for each pair, in order of user and item."""
    if users.dim() != 1 or users.shape != items.shape:
        raise ValueError(
            f"{name}_users and {name}_items must both be one-dimensional and of one length, got "
            f"{list(users.shape)} and {list(items.shape)}"
        )
    if len(users) and (int(users.min()) < 0 or int(items.min()) < 0 or int(items.max()) >= n_items):
        raise ValueError(
            f"{name}_users must be at least 0 and {name}_items 0 to {n_items - 1} (n_items={n_items}), got "
            f"users from {int(users.min())} and items {int(items.min())} to {int(items.max())}"
        )
    return (users * n_items + items).cpu()


def _check_ks(ks: Sequence[int]) -> None:
    if not ks or min(ks) < 1:
        raise ValueError(f"ks must be one or more lengths of at least 1, got {ks!r}")

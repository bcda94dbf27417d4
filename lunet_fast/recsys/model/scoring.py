"""All items' scores for many users at once, and the best of them, without a tensor of users × items × D.

The network's first layer splits: for x = [u; i],  W x + b = (W_u u + b) + (W_i i) = p_u + q_i, with p
computed once for each user and q once for each item. That needs u to be free of i, which it is for every
pair but the training ratings: a training pair's own entry is left out of the two histories in x. The
activation that follows splits too, but for one logarithm (:func:`_after_first`).

The last layer is affine and meets the read-out, which saves work. The linear read-out w.(A x + b) is
(Aᵀw).x + w.b: no product is left of that layer. For the read-out by halves, z_u.z_i = |s|² − |d|² with
s = (z_u + z_i)/2 and d = (z_u − z_i)/2: A and b are turned into those coordinates, where the read-out is a
sum over single features and D need not be cut in halves.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from lunet_fast import functional
from lunet_fast.layers.activations import SoftplusFamily
from lunet_fast.layers.lu_dense import LUDense
from lunet_fast.layers.lunet import LUNet
from lunet_fast.ops import dispatch
from lunet_fast.ops.reference import Slopes, unpack
from lunet_fast.recsys.model.embeddings import Histories
from lunet_fast.recsys.model.interactions import Interactions, runs
from lunet_fast.recsys.model.network import RatingModel

BLOCK = 1 << 16
"""Numbers in a block of pairs × D, the most that is computed at once in PyTorch; a few fit in a cache."""
BLOCK_USERS = 16
"""Users of a block, where there are as many items."""
LARGEST_EXPONENT = 80.0
"""Between e^-80 and e^80 a product of exponentials and its factors are normal float32 numbers."""

_EMPTY = torch.iinfo(torch.int64).min
_LARGEST_ITEM = 2**31 - 1


class SplitNet(NamedTuple):
    """K members' networks from the sum of p and q on, and their read-outs.

    For member m, with L the products that are left,

        h_0 = p_u + q_i,   h_l = W_l φ(h_{l−1}) + b_l,   z = φ(h_L) if ``activated`` else h_L
        score = user offset + item offset + mean over m of Σ_d z_d (readout_d + curvature_d z_d)
    """

    weight: Tensor | None
    """``[K, L, D, D]``, None for L = 0"""
    bias: Tensor | None
    """``[K, L, D]``"""
    slopes: Slopes
    """of every φ"""
    activated: bool
    readout: Tensor
    """``[K, D]``"""
    curvature: Tensor | None
    """``[K, D]``"""


class Seen(NamedTuple):
    """Items to leave out for each of U users: the rows of a sparse matrix, sorted within a row."""

    indptr: Tensor
    """int64 ``[U + 1]``"""
    items: Tensor
    """int32 or int64, one for each pair"""


class ItemScorer:
    """The scores of a trained :class:`RatingModel` for any of its users and items that training did not pair.

    ``readout`` says which: ``rating``, the score of which :meth:`RatingModel.rating` makes a rating, or
    ``interaction``, the logit; by default the one that ranks (:func:`ranking_readout`). What depends on an
    item alone is computed here, once: O(K (I k D + M D³)) time and K I D numbers for K members, M layers and
    I items. Later changes of the model are not seen. ``device`` is where scores are computed; the model stays
    where it is. ``rated`` are the pairs that :meth:`best` leaves out, the training pairs and maybe more.
    """

    def __init__(
        self,
        model: RatingModel,
        histories: Histories,
        device: torch.device | str = "cpu",
        readout: str | None = None,
        rated: Interactions | None = None,
    ) -> None:
        self.model, self.histories, self.device = model, histories, torch.device(device)
        self.rated = model.interactions if rated is None else rated
        self.readout = readout or ranking_readout(model)
        with torch.no_grad():
            first, self._user_bias, net, self._constant = _split(model, self.readout)
            k = model.config.embedding_size
            self._user_weight = first[..., :k]
            every = torch.arange(model.interactions.n_items, device=first.device)
            # Any user will do: without its own rating, an item's half of x is the same for all.
            vectors = model.embed(torch.zeros_like(every), every, histories, False)[..., k:]
            offset = torch.zeros_like(vectors[0, :, 0])
            item_offset = model.item_bias if self.readout == "rating" else model.item_logit
            if item_offset is not None:
                offset = item_offset.mean(1)
            if self.readout == "rating":
                offset = model.strength() * offset
                if model.config.offset == "biases":
                    offset = offset + model.item_deviation
            # The network says nothing of an item without ratings, and −∞ is never among the best.
            offset = offset.masked_fill(model.interactions.item_counts == 0, -torch.inf)
            # Of strength 0 the offsets are all there is: no member's network is computed.
            self._members = 0 if self.readout == "rating" and model.strength() == 0 else len(first)
            q = vectors[: self._members] @ first[: self._members, ..., k:].mT
        self.q, self.item_offset = self._moved(q), self._moved(offset)
        parts = [self._moved(part) if isinstance(part, Tensor) else part for part in net]
        self.net = SplitNet(*cast(Any, parts))

    def _moved(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device).contiguous()

    @torch.no_grad()
    def users(self, users: Tensor) -> tuple[Tensor, Tensor]:
        """(p ``[K, U, D]``, user offset ``[U]``) of ``users``, int64 ``[U]``; O(K U k D)."""
        model, k = self.model, self.model.config.embedding_size
        vectors = model.embed(users, torch.zeros_like(users), self.histories, False)[..., :k]
        p = torch.baddbmm(self._user_bias.unsqueeze(1), vectors, self._user_weight.mT)
        offset = self._constant.expand(len(users))
        if self.readout == "rating":
            if model.user_bias is not None:
                offset = offset + model.strength() * model.user_bias[users].mean(1)
            if model.config.offset == "biases":
                offset = offset + model.user_deviation[users]
        return self._moved(p[: self._members]), self._moved(offset)

    @torch.no_grad()
    def scores(self, users: Tensor) -> Tensor:
        """Scores ``[U, I]`` of every item for ``users``, int64 ``[U]``, on ``device``.

        Of pairs that are no training ratings, of users that have some, they are the model's to rounding; −∞
        where the item has no training rating.
        """
        p, user_offset = self.users(users)
        return score_all(p, self.q, self.net, user_offset, self.item_offset)

    @torch.no_grad()
    def best(
        self, users: Tensor, k: int, candidates: Tensor | None = None, *, training_only: bool = False
    ) -> tuple[Tensor, Tensor]:
        """(scores, items), both ``[U, k]`` and on the CPU: the k best for each of ``users``, best first.

        ``users``, int64 ``[U]``, have training ratings. Those pairs are left out, or all of ``rated`` unless
        ``training_only``. ``candidates``, int64 and
        ascending, are the items to choose from, by default all. Items without training ratings are left out
        as well. Order, ties and what stands for missing items are those of :func:`score_topk`.
        """
        p, user_offset = self.users(users)
        q, item_offset = self.q, self.item_offset
        if candidates is not None:
            there = candidates.to(self.device)
            q, item_offset = q.index_select(1, there), item_offset[there]
        seen = self._seen(self.model.interactions if training_only else self.rated, users, candidates)
        scores, items = score_topk(p, q, self.net, user_offset, item_offset, seen, k)
        scores, items = scores.cpu(), items.cpu()
        if candidates is not None and len(candidates):
            items = torch.where(items < 0, items, candidates[items.clamp(min=0)])
        return scores, items

    def _seen(self, rated: Interactions, users: Tensor, candidates: Tensor | None) -> Seen:
        """The pairs of ``users``, as places among the candidates."""
        rows, items = rated.of_users(users)
        if candidates is not None:
            place = torch.full((self.model.interactions.n_items,), -1)
            place[candidates] = torch.arange(len(candidates))
            items = place[items]
            rows, items = rows[items >= 0], items[items >= 0]
        counts = torch.bincount(rows, minlength=len(users))
        indptr = torch.cat((counts.new_zeros(1), counts.cumsum(0)))
        return Seen(self._moved(indptr), self._moved(items.int()))


def ranking_readout(model: RatingModel) -> str:
    """``interaction`` where the model has that read-out, for it is trained to rank; otherwise ``rating``."""
    return "rating" if model.interaction_weight is None else "interaction"


def _split(model: RatingModel, which: str) -> tuple[Tensor, Tensor, SplitNet, Tensor]:
    """(W_1 [K, D, D], b_1 [K, D], what follows, the constant part of every score) of one read-out."""
    nets = [[cast(LUDense, layer) for layer in cast(LUNet, net).layers] for net in model.nets]
    weight = torch.stack([torch.stack([layer.weight for layer in net]) for net in nets])
    bias = torch.stack([torch.stack([cast(Tensor, layer.bias) for layer in net]) for net in nets])
    layers = weight.shape[1]
    # Every layer but the last has the same, and its slopes are fixed.
    activation = cast("SoftplusFamily | None", nets[0][0].activation)
    slopes: Slopes = (1.0, 1.0, 1.0) if activation is None else activation.slopes()
    own = model.config.embedding_size - model.config.interaction_size
    if which == "rating":
        chosen, intercept, product = model.weight, model.intercept, slice(None, own)
    else:
        chosen, intercept, product = model.interaction_weight, model.interaction_intercept, slice(own, None)
    if chosen is None or intercept is None:
        raise ValueError(f"gamma={model.config.gamma:g}: this model was trained without the {which} read-out")
    strength = model.strength() if which == "rating" else 1.0
    readout: Tensor = strength * chosen
    constant = strength * intercept.mean()
    if which == "rating" and model.thresholds is None:
        constant = constant + model.mean
    curvature: Tensor | None = None
    if model.config.readout == "pair":
        # w.z = w_u.(s + d) + w_i.(s − d)
        readout = 2 * _halves_turned(readout, dim=-1)
        half = torch.zeros_like(readout.chunk(2, dim=-1)[0])
        half[:, product] = strength
        curvature = torch.cat((half, -half), dim=-1)
        last, last_bias = _halves_turned(weight[:, -1], dim=-2), _halves_turned(bias[:, -1], dim=-1)
        weight = torch.cat((weight[:, :-1], last.unsqueeze(1)), dim=1)
        bias = torch.cat((bias[:, :-1], last_bias.unsqueeze(1)), dim=1)
    elif layers > 1:
        constant = constant + (readout * bias[:, -1]).sum(-1).mean()
        readout = torch.einsum("kd,kde->ke", readout, weight[:, -1])
        weight, bias = weight[:, :-1], bias[:, :-1]
    left = weight.shape[1] > 1
    net = SplitNet(
        weight[:, 1:] if left else None,
        bias[:, 1:] if left else None,
        slopes,
        activated=weight.shape[1] < layers,
        readout=readout,
        curvature=curvature,
    )
    return weight[:, 0], bias[:, 0], net, constant


def _halves_turned(t: Tensor, dim: int) -> Tensor:
    """[a; b] along ``dim`` -> [(a + b)/2; (a − b)/2]."""
    a, b = t.chunk(2, dim)
    return torch.cat((a + b, a - b), dim) / 2


# Scoring ----------------------------------------------------------------------------------------------------


def score_topk(
    p: Tensor,
    q: Tensor,
    net: SplitNet,
    user_offset: Tensor,
    item_offset: Tensor,
    seen: Seen | None,
    k: int,
) -> tuple[Tensor, Tensor]:
    """(scores float32, items int64), both ``[U, k]``: the k best items of each user, best first.

    p ``[K, U, D]``, q ``[K, I, D]``, offsets ``[U]`` and ``[I]``, all float32 and on one device; I < 2^31.
    Pairs in ``seen`` and those whose score is NaN or −inf are left out; where fewer than k are left, the
    score is −inf and the item −1. Of equal scores the lower item comes first.

    Cost: O(U I K (L D² + D)). Memory beside the arguments, never U I D or U I: in PyTorch

        3 max(BLOCK, D) + O(BLOCK / D + I + U k) numbers,

    three blocks of pairs × D and what belongs to one; in the Triton kernel, which the backend chooses
    (:func:`lunet_fast.set_backend`), U k keys for each program that shares a user.
    """
    if _runs_kernel(p, k):
        kernel = importlib.import_module("lunet_fast.kernels.score")
        precision = importlib.import_module("lunet_fast.ops.triton").precision_of(p)
        scores, items = kernel.score_topk(
            *(p, q, net.weight, net.bias, net.slopes, net.readout, net.curvature),
            *(user_offset, item_offset, seen, k),
            activated=net.activated,
            precision=precision,
        )
        return scores, items
    best = torch.full((p.shape[1], k), _EMPTY, dtype=torch.int64, device=p.device)
    bounds = None if seen is None else seen.indptr.tolist()
    for users, items, scores in _blocks(p, q, net, user_offset, item_offset):
        if seen is not None and bounds is not None:
            taken = seen.items[bounds[users.start] : bounds[users.stop]].long()
            rows = torch.repeat_interleave(seen.indptr[users.start : users.stop + 1].diff())
            inside = (taken >= items.start) & (taken < items.stop)
            scores[rows[inside], taken[inside] - items.start] = -torch.inf
        _merge_(best[users], scores, items.start)
    return _unpacked(best)


def score_all(p: Tensor, q: Tensor, net: SplitNet, user_offset: Tensor, item_offset: Tensor) -> Tensor:
    """The scores ``[U, I]`` that :func:`score_topk` takes the best of, in PyTorch and in any dtype."""
    out = torch.empty(p.shape[1], q.shape[1], dtype=p.dtype, device=p.device)
    for users, items, scores in _blocks(p, q, net, user_offset, item_offset):
        out[users, items] = scores
    return out


def _runs_kernel(p: Tensor, k: int) -> bool:
    """Whether the Triton kernel scores: where the backend says so, and it can."""
    if not len(p) or not dispatch.runs_triton(p) or p.dtype != torch.float32:
        return False
    kernel = importlib.import_module("lunet_fast.kernels.score")
    return p.shape[-1] <= kernel.LARGEST_D and k <= kernel.LARGEST_K


def _blocks(
    p: Tensor, q: Tensor, net: SplitNet, user_offset: Tensor, item_offset: Tensor
) -> Iterator[tuple[slice, slice, Tensor]]:
    """(users, items, scores of these users and items) of every pair once, items ascending for each user.

    As many pairs at a time as make BLOCK numbers: some users by many items, so that little of the work is for
    one of the two alone.
    """
    members, n_users, D = p.shape
    n_items = q.shape[1]
    pairs = max(1, BLOCK // (D if members else 1))
    some_users = max(1, min(n_users, BLOCK_USERS, pairs))
    some_items = max(1, min(n_items, pairs // some_users))
    some_users = max(some_users, pairs // some_items)  # where the items are few
    for first_user in range(0, n_users, some_users):
        users = slice(first_user, min(first_user + some_users, n_users))
        for first_item in range(0, n_items, some_items):
            items = slice(first_item, min(first_item + some_items, n_items))
            if not members:
                yield users, items, user_offset[users].unsqueeze(1) + item_offset[items]
                continue
            total = sum(_member_scores(p[m, users], q[m, items], net, m) for m in range(members))
            scores = cast(Tensor, total).view(users.stop - users.start, -1) / members
            yield users, items, scores + user_offset[users].unsqueeze(1) + item_offset[items]


def _member_scores(p: Tensor, q: Tensor, net: SplitNet, m: int) -> Tensor:
    """Σ_d z_d (readout_d + curvature_d z_d) of member m for every pair of the rows of p and q, flat.

    Blocks are ``[D, pairs]``: a coordinate of all pairs lies in one piece, whatever the sizes of p and q.
    """
    if net.weight is None or net.bias is None:
        h = _every_sum(p, q)
    else:
        h = _after_first(p, q, net.weight[m, 0], net.bias[m, 0], net.slopes)
        for weight, bias in zip(net.weight[m, 1:], net.bias[m, 1:], strict=True):
            h = torch.addmm(bias.unsqueeze(1), weight, functional.leaky_softplus(h, net.slopes))
    if net.activated:
        h = functional.leaky_softplus(h, net.slopes)
    out = net.readout[m] @ h
    if net.curvature is not None:
        out += net.curvature[m] @ h.square_()
    return out


def _every_sum(p: Tensor, q: Tensor) -> Tensor:
    """p_u + q_i, ``[D, U I]``, of ``[U, D]`` and ``[I, D]``."""
    return (p.T.contiguous().unsqueeze(2) + q.T.contiguous().unsqueeze(1)).flatten(1)


def _after_first(p: Tensor, q: Tensor, weight: Tensor, bias: Tensor, slopes: Slopes) -> Tensor:
    """W φ(p_u + q_i) + b, ``[D, U I]``.

    φ(h) = a h + (c/κ) log(1 + e^(κ h)): its linear part is a sum of what users and items have alone, and the
    exponential a product of theirs, as long as that is within float32's normal numbers. The logarithm alone
    is left to be taken of every pair.
    """
    a, c, kappa = unpack(slopes)
    if not bool(kappa * (p.abs().amax() + q.abs().amax()) < LARGEST_EXPONENT):  # NaN as well
        return torch.addmm(bias.unsqueeze(1), weight, functional.leaky_softplus(_every_sum(p, q), slopes))
    of_user, of_item = ((kappa * side.T.contiguous()).exp() for side in (p, q))
    soft = (of_user.unsqueeze(2) * of_item.unsqueeze(1)).log1p_().flatten(1)
    of_user, of_item = torch.addmm(bias.unsqueeze(1), a * weight, p.T), (a * weight) @ q.T
    return (of_user.unsqueeze(2) + of_item.unsqueeze(1)).flatten(1).addmm_(c / kappa * weight, soft)


def _merge_(best: Tensor, scores: Tensor, first: int) -> None:
    """Put into ``best``, keys ``[U, k]`` in order, what of ``scores`` ``[U, I]``, of the items from ``first``
    on, belongs there."""
    # Nearly all are below the k-th best so far, and need no key.
    least = _unpacked(best[:, -1:])[0]
    rows, places = (scores >= least).nonzero(as_tuple=True)
    if not len(rows):
        return
    counts = torch.bincount(rows, minlength=len(scores))
    found = best.new_full((len(best), int(counts.max())), _EMPTY)
    found[runs(counts)] = _keys(scores[rows, places], first + places)
    best.copy_(torch.cat((best, found), dim=1).topk(best.shape[1], dim=1).values)


# A key is a score and its item in one integer: above, the bits of the score in an order that integers have;
# below, the item, the lower the better. So one top-k settles ties as well, whatever the blocks.


def _keys(scores: Tensor, items: Tensor) -> Tensor:
    """int64 keys of ``scores``, float32; _EMPTY for −inf and NaN."""
    bits = (scores + 0.0).view(torch.int32)  # −0 becomes 0, with which it ties
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    keys = (ordered.long() << 32) | (_LARGEST_ITEM - items)
    return keys.masked_fill_(~(scores > -torch.inf), _EMPTY)


def _unpacked(keys: Tensor) -> tuple[Tensor, Tensor]:
    """(score, item) of each key; (−inf, −1) of the empty ones."""
    ordered = (keys >> 32).int()
    scores = (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).view(torch.float32)
    empty = keys == _EMPTY
    items = _LARGEST_ITEM - (keys & _LARGEST_ITEM)
    return scores.masked_fill(empty, -torch.inf), items.masked_fill(empty, -1)

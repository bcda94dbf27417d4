"""What the invertible network gives beside predictions: the density of pairs, and items solved for backwards.

A member's network f is one-to-one, so x = [user half; item half] can be had back from z
(:meth:`~lunet_fast.recsys.model.network.RatingModel.inverse`), a density of z is one of x, and a wanted score
can be
followed back to the item that would have it. What each is good for on ML-100K, beside the same without f, is
in ``benchmarks/results/inversion.md``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from torch import Tensor

from lunet_fast.layers.lunet import LUNet
from lunet_fast.recsys.model.embeddings import Histories
from lunet_fast.recsys.model.network import RatingModel
from lunet_fast.recsys.model.prediction import CHUNK
from lunet_fast.recsys.model.scoring import ranking_readout

SPACES = ("latent", "input")
"""Where :class:`PairDensity` fits its normal distribution: on z = f(x), or on x itself."""

STEPS = 50
"""Steps that :func:`items_for_score` takes at most towards the nearest point, and again to be exact."""


@dataclass(frozen=True)
class PairDensity:
    """The density of pairs: a normal distribution of z = f(x), carried back to x. Made by :meth:`fit`.

        log p(x) = log N(f(x); mu, Sigma) + log|det df/dx|

    for each of the K members, with mu and Sigma of its z of the training pairs. A pair's is the mean over the
    members. With ``space`` "input" the normal distribution is of x itself, as if f were the identity.

    p is a density over vectors, not a probability of an interaction: it says how usual a pair's x is among
    those of training. With an affine f, which a trained one nearly is, both spaces give the same density but
    for the ridge.
    """

    model: RatingModel
    histories: Histories
    mean: Tensor
    """mu, float64 ``[K, D]``"""
    cholesky: Tensor
    """The lower triangular C with C Cᵀ = Sigma, float64 ``[K, D, D]``"""
    space: str

    @classmethod
    @torch.no_grad()
    def fit(cls, model: RatingModel, *, space: str = "latent", ridge: float = 1e-4) -> PairDensity:
        """The density of ``model``'s training pairs, each without its own entry in its histories.

        Sigma is the pairs' covariance plus ``ridge`` times the mean of its diagonal, times I: coordinates
        that hardly vary would make it singular. Later changes of the model must be fitted anew.

        Cost for N training pairs: one pass of the model and O(K (N D² + D³)), in memory O(K D (CHUNK + D)).
        ``ValueError`` for an unknown space, a ridge that is negative or not finite, and a Sigma that is
        singular all the same.
        """
        if space not in SPACES:
            raise ValueError(f"space={space!r} is unknown: choose one of {', '.join(SPACES)}")
        if not 0 <= ridge < math.inf:
            raise ValueError(f"ridge={ridge!r} must be a finite number of at least 0, such as 1e-4")
        seen, histories = model.interactions, model.histories()
        count, mean, scatter = 0, torch.tensor(0.0), torch.tensor(0.0)
        for pairs in seen.pairs.split(CHUNK):
            items = pairs % seen.n_items
            x, z = model.latent(pairs // seen.n_items, items, histories)
            part = (z if space == "latent" else x).double()
            # Means and scatter of two sets joined: exact where a sum of squares would cancel.
            part_mean, n = part.mean(1), len(pairs)
            centred = part - part_mean.unsqueeze(1)
            shift = part_mean - mean
            scatter = scatter + centred.mT @ centred
            scatter = scatter + shift.unsqueeze(2) * shift.unsqueeze(1) * (count * n / (count + n))
            mean, count = mean + shift * (n / (count + n)), count + n
        covariance = scatter / count
        diagonal = covariance.diagonal(dim1=-2, dim2=-1)
        diagonal += ridge * diagonal.mean(-1, keepdim=True)
        cholesky, failed = torch.linalg.cholesky_ex(covariance)
        if bool(failed.any()):
            raise ValueError(
                f"the covariance of {count} training pairs in {mean.shape[-1]} dimensions is singular with "
                f"ridge={ridge:g}: give a larger ridge"
            )
        return cls(model, histories, mean, cholesky, space)

    @torch.no_grad()
    def log_prob(self, users: Tensor, items: Tensor) -> Tensor:
        """log p of pairs, float64 ``[B]``, natural logarithm: the mean over the members.

        ``users``, ``items`` int64 ``[B]`` are indices as for the model's ``forward``; ``ValueError`` for one
        that the model does not have, -1 included. A user or item without training ratings has a vector that
        nothing was learnt for. Cost: one pass of the model and O(K D²) a pair, CHUNK pairs at a time.
        """
        seen = self.model.interactions
        for name, index, size in (("users", users, seen.n_users), ("items", items, seen.n_items)):
            if len(index) and not 0 <= int(index.min()) <= int(index.max()) < size:
                raise ValueError(
                    f"{name} must be indices from 0 to {size - 1}, got {int(index.min())} to "
                    f"{int(index.max())}: leave out what training has not seen"
                )
        parts = [
            self.members_log_prob(self.model.embed(user, item, self.histories, None)).mean(0)
            for user, item in zip(users.split(CHUNK), items.split(CHUNK), strict=True)
        ]
        return torch.cat(parts)

    def members_log_prob(self, x: Tensor) -> Tensor:
        """log p of each member at its own inputs x ``[K, B, D]``: float64 ``[K, B]``, differentiable."""
        logabsdet: Tensor | float = 0.0
        point = x
        if self.space == "latent":
            nets = [cast(LUNet, net) for net in self.model.nets]
            both = [net.forward_and_logabsdet(part) for net, part in zip(nets, x, strict=True)]
            point, logabsdet = (torch.stack(side) for side in zip(*both, strict=True))
        centred = (point.double() - self.mean.unsqueeze(1)).mT
        whitened = torch.linalg.solve_triangular(self.cholesky, centred, upper=False)
        log_scale = self.cholesky.diagonal(dim1=-2, dim2=-1).log().sum(-1, keepdim=True)
        constant = 0.5 * x.shape[-1] * math.log(2.0 * math.pi)
        return -0.5 * whitened.square().sum(-2) - log_scale - constant + logabsdet


def risk_coverage(confidence: Tensor, error: Tensor) -> Tensor:
    """The mean error of the n most confident predictions, for n = 1 .. N; float64 ``[N]``.

    ``confidence`` ``[N]``: higher is surer; ``error`` ``[N]``, of any kind, such as the squared one. Of equal
    confidence, each has the mean error of all that share it, so that the order given says nothing. The last
    value is the mean of all errors, and the mean of the values the area under the curve: the smallest where
    confidence falls with the error, and the mean of all errors in expectation where it knows nothing.
    O(N log N).

    ``ValueError`` where the two are not of one length N > 0, or confidence has NaN.
    """
    if confidence.dim() != 1 or confidence.shape != error.shape or len(error) == 0:
        raise ValueError(
            f"confidence and error must both be [N] with N > 0, got {list(confidence.shape)} and "
            f"{list(error.shape)}"
        )
    if bool(confidence.isnan().any()):
        raise ValueError("confidence has NaN: give -inf to what is not trusted at all")
    _, group, size = torch.unique(-confidence, return_inverse=True, return_counts=True)
    total = torch.zeros(len(size), dtype=torch.float64, device=error.device)
    total.index_add_(0, group, error.double())
    ordered = (total / size).repeat_interleave(size)
    return ordered.cumsum(0) / torch.arange(1, len(error) + 1, device=error.device)


class ItemsForScore(NamedTuple):
    """What :func:`items_for_score` finds for U users."""

    vector: Tensor
    """``[K, U, k]``, the item's half of x that gives the wanted score"""
    score: Tensor
    """``[K, U]``, each member's read-out there: the wanted one, or the nearest that was reached"""
    items: Tensor
    """int64 ``[U, count]``, the real items nearest to ``vector``, nearest first; -1 where there are fewer"""
    distance: Tensor
    """``[U, count]``, of their own vectors, all K members' taken as one; inf for an item of -1"""


@torch.no_grad()
def item_vectors(model: RatingModel, histories: Histories) -> Tensor:
    """The item's half of x, ``[K, n_items, k]``, of every item with a user who has not rated it.

    O(K n_items k); it is the same for every such user.
    """
    items = torch.arange(model.interactions.n_items, device=model.user_embedding.weight.device)
    return model.embed(torch.zeros_like(items), items, histories, False)[..., model.config.embedding_size :]


def items_for_score(
    model: RatingModel,
    histories: Histories,
    users: Tensor,
    wanted: float | Tensor,
    count: int = 10,
    *,
    near: Tensor | None = None,
    readout: str | None = None,
    exclude_seen: bool = True,
) -> ItemsForScore:
    """The item vector nearest to a given one that a user would score as wanted, and the real items near it.

    For a member and a user with the half u of x, the v that minimises

        |v - v_0|²   with   score(f([u; v])) = wanted,

    v_0 being the vector of item ``near``, int64 ``[U]``, or without it the mean of all rated items'; the
    item's bias stays that of ``near``, or the mean. Found by Newton's method on the item's half, from
    the gradient g of the score at v:

        v  <-  v_0 + g (wanted - score(v) + g.(v - v_0)) / |g|²,

    and half of this step from the tenth on. A v that has not settled after STEPS goes on from where it is:
    then it has the score, but may not be the nearest such point (on ML-100K, a rating of 5: 1 in 500). Each
    member reaches the score by itself, so their mean does. f^-1 has no part in it: inverting a changed z
    would change the user too.

    ``users``, int64 ``[U]``, are indices of users with training ratings; ``wanted`` a number or ``[U]``.
    ``readout`` is ``rating`` or ``interaction``, by default the one that ranks; ``wanted`` is then a rating
    (with loss ``ordinal`` the score that :meth:`~lunet_fast.recsys.model.network.RatingModel.rating` takes)
    or a
    logit. ``items`` leaves out ``near`` itself, items without training ratings and, with ``exclude_seen``,
    what the user rated in training. ``histories`` are
    :meth:`~lunet_fast.recsys.model.network.RatingModel.histories`.

    Cost: a pass of the network and its gradient over U pairs a step, until the last user has settled, at most
    2 STEPS (most settle within ten); then O(K k) a user and item. Memory O(U (n_items + K k)).
    ``ValueError`` for a count below 1, an unknown or untrained read-out, and users or ``near`` without
    training ratings. A score that cannot be reached raises nothing: see :attr:`ItemsForScore.score`.
    """
    seen = model.interactions
    if count < 1:
        raise ValueError(f"count={count!r} must be at least 1")
    _check_rated("users", users, seen.user_counts)
    if near is not None:
        _check_rated("near", near, seen.item_counts)
        if near.shape != users.shape:
            raise ValueError(f"near must be {list(users.shape)} as users is, got {list(near.shape)}")
    readout = readout or ranking_readout(model)
    with torch.no_grad():
        vectors = item_vectors(model, histories)
        user = model.embed(users, torch.zeros_like(users), histories, False)[..., : vectors.shape[-1]]
        rated = torch.where(seen.item_counts > 0)[0]
        # [U or 1, those whose mean is the start]
        origin = rated.unsqueeze(0) if near is None else near.unsqueeze(1)
        start = vectors[:, origin].mean(2).expand_as(user)
        member_scores = _scores_of_vectors(model, user, users, origin, readout)
        goal = torch.as_tensor(wanted, dtype=start.dtype, device=start.device).expand(start.shape[:2])
        if readout == "rating":
            goal = model.transform(goal)
    vector, score = _nearest_with_score(member_scores, start, goal)
    with torch.no_grad():
        # A member's k coordinates side by side: one vector an item.
        flat, flat_vectors = (side.transpose(0, 1).flatten(1) for side in (vector, vectors))
        distance = torch.cdist(flat, flat_vectors, compute_mode="donot_use_mm_for_euclid_dist")
        distance[:, seen.item_counts == 0] = torch.inf
        if near is not None:
            distance.scatter_(1, near.unsqueeze(1), torch.inf)
        if exclude_seen:
            distance[seen.of_users(users)] = torch.inf
        nearest, items = distance.sort(dim=1, stable=True)
        nearest, items = nearest[:, :count], items[:, :count]
        return ItemsForScore(vector, score, items.masked_fill(nearest.isinf(), -1), nearest)


def _check_rated(name: str, index: Tensor, counts: Tensor) -> None:
    """That ``index`` ``[U]`` names users or items with training ratings."""
    known = index.dim() == 1 and bool(((index >= 0) & (index < len(counts))).all())
    if not known or bool((counts[index] == 0).any()):
        raise ValueError(
            f"{name} must be int64 [U], indices from 0 to {len(counts) - 1} with training ratings, got "
            f"{index.tolist() if index.numel() <= 10 else list(index.shape)}"
        )


def _scores_of_vectors(
    model: RatingModel, user: Tensor, users: Tensor, origin: Tensor, readout: str
) -> Callable[[Tensor], Tensor]:
    """(item vectors ``[K, U, k]`` -> scores ``[K, U]``) for fixed user halves, with the biases of ``users``
    and the mean one of the items ``origin``, int64 ``[U or 1, any]``."""
    own = model.config.embedding_size - model.config.interaction_size
    if readout == "rating":
        weight, intercept, product = model.weight, model.intercept, slice(None, own)
    elif readout == "interaction":
        weight, intercept, product = model.interaction_weight, model.interaction_intercept, slice(own, None)
    else:
        raise ValueError(f"readout={readout!r} is unknown: choose rating or interaction")
    if weight is None or intercept is None:
        raise ValueError(
            f"gamma={model.config.gamma:g}: this model was trained without the {readout} read-out"
        )
    item_bias = model.item_bias if readout == "rating" else model.item_logit
    bias = torch.zeros_like(user[..., 0])
    if item_bias is not None:
        bias = bias + item_bias[origin].mean(1).t()
    strength = 1.0
    if readout == "rating":
        strength = model.strength()
        if model.user_bias is not None:
            bias = bias + model.user_bias[users].t()
        bias = strength * bias
        if model.thresholds is None:
            bias = bias + model.mean
        if model.config.offset == "biases":
            bias = bias + model.user_deviation[users] + model.item_deviation[origin].mean(1)

    def scores(item: Tensor) -> Tensor:
        z = model.network(torch.cat((user, item), dim=-1))
        return strength * model._read_out(z, weight, intercept, product) + bias

    return scores


def _nearest_with_score(
    scores: Callable[[Tensor], Tensor], start: Tensor, goal: Tensor
) -> tuple[Tensor, Tensor]:
    """(v ``[K, U, k]``, its scores ``[K, U]``): the v nearest to ``start`` with scores ``goal``."""
    v = start
    resolution = torch.finfo(v.dtype).eps
    close_score = 8 * resolution * (1 + goal.abs())
    for step in range(2 * STEPS):
        with torch.enable_grad():
            v = v.detach().requires_grad_()
            score = scores(v)
            # A pair's score depends on its own vector alone: one gradient serves them all.
            (gradient,) = torch.autograd.grad(score.sum(), v)
        v, score = v.detach(), score.detach()
        # The second half of the steps goes on from v: no longer to the nearest point, but surely nearer to
        # the score where the first has not settled.
        base = start if step < STEPS else v
        missing = goal - score + (gradient * (v - base)).sum(-1)
        size = gradient.square().sum(-1)
        # Where nothing changes the score, stay.
        length = torch.where(size > 0, missing / size, 0.0)
        moved = base + gradient * length.unsqueeze(-1)
        near_enough = resolution**0.5 * (moved - start).norm(dim=-1) + 8 * resolution * v.norm(dim=-1)
        settled = (moved - v).norm(dim=-1) <= near_enough
        done = ((goal - score).abs() <= close_score) & (settled | (step >= STEPS))
        if bool(done.all()):
            break
        if 10 <= step < STEPS:
            # Whole steps can swing to and fro across a curved surface for ever; half ones do not.
            moved = (v + moved) / 2
        v = torch.where(done.unsqueeze(-1), v, moved)
    return v, score

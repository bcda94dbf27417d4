"""The training loss (2.11): ratings, interactions, and the penalties of each."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lunet_fast.recsys.model.config import TrainConfig
from lunet_fast.recsys.model.network import Output, RatingModel


class Losses(NamedTuple):
    """Of one batch; scalars."""

    objective: Tensor
    """What is differentiated: (2.11) with its penalties, a sum over the members."""
    reported: Tensor
    """Squared error of the members' mean rating; with gamma 0 the interactions' loss, a mean over members."""


def hybrid_loss(model: RatingModel, output: Output, rating: Tensor, weight: Tensor | None = None) -> Losses:
    """gamma ratings + (1 - gamma) interactions, (2.11), of a batch of B training ratings.

    ``output`` holds K members' read-outs of B' >= B pairs: the B of ``rating`` first, then for each of them
    n pairs without interaction, B' = (1 + n) B; B' = B with gamma 1. Everything is a mean over the pairs and
    a sum over the members, each with its own error, so that a member has the gradient it would have alone. As
    means over the batch, the L2 terms weigh a user or an item by how often it is in one. Those on z are
    what regularises: the network rescales whatever a penalty on x alone would shrink.

    With ``positive_from`` a rating below it is no choice: its own pair counts as one without interaction, or
    not at all, and the pairs drawn for it do not count. ``weight`` ``[B]``, of :func:`confidence_weights`,
    multiplies the loss of the B pairs themselves, where they are choices.
    """
    config, count = model.config, len(rating)
    own = config.embedding_size - config.interaction_size
    objective = reported = output.z.new_zeros(())
    if config.gamma > 0 and output.score is not None:
        score = output.score[:, :count]
        loss = _rating_loss(model, score, rating)
        loss = loss + _penalty(output.z[:, :count], config.l2_latent, slice(None, own))
        loss = loss + _penalty(output.x[:, :count], config.l2_embedding, slice(None, own))
        if config.l2_bias and output.bias is not None:
            loss = loss + config.l2_bias * output.bias[:, :count].square().sum(-1)
        objective = config.gamma * loss.mean(-1).sum()
        with torch.no_grad():
            reported = (model.rating(score.mean(0)) - rating).square().mean()
    if config.gamma < 1 and output.logit is not None:
        positive, negative = output.logit[:, :count], output.logit[:, count:].unflatten(1, (count, -1))
        interactions = _interaction_loss(config, positive, negative, rating, weight).sum()
        if config.gamma == 0:
            reported = interactions.detach() / config.members
        for vectors, strength in (
            (output.z, config.l2_interaction_latent),
            (output.x, config.l2_interaction_embedding),
        ):
            interactions = interactions + _penalty(vectors, strength, slice(own, None)).mean(-1).sum()
        objective = objective + (1 - config.gamma) * interactions
    return Losses(objective, reported)


def _rating_loss(model: RatingModel, score: Tensor, rating: Tensor) -> Tensor:
    """``[K, B]``: (2.12) or what stands for it."""
    if model.thresholds is not None and model.levels is not None:
        # P(rating > level l) = sigmoid(s - threshold_l): the levels on either side of the rating's own.
        place = torch.searchsorted(model.levels, rating)
        edges = F.pad(model.increasing_thresholds(), (1, 1))
        low, high = edges[:, place], edges[:, place + 1]
        first, last = place.eq(0), place.eq(len(model.levels) - 1)
        # log(sigmoid(high - s) - sigmoid(low - s)), with -inf and inf for the outermost edges
        inside = _log_difference(high - score, low - score)
        inside = torch.where(first, F.logsigmoid(high - score), inside)
        return -torch.where(last, F.logsigmoid(score - low), inside)
    rating = model.transform(rating)
    if model.config.loss == "huber":
        return F.huber_loss(score, rating.expand_as(score), reduction="none", delta=1.0)
    return (score - rating).square()


def _log_difference(high: Tensor, low: Tensor) -> Tensor:
    """log(sigmoid(high) - sigmoid(low)) for high > low, without cancellation."""
    gap = torch.where(high > low, high - low, torch.ones_like(high))
    return F.logsigmoid(high) + F.logsigmoid(-low) + torch.log(-torch.expm1(-gap))


def confidence_weights(weight: Tensor, confidence: float) -> Tensor:
    """(1 + confidence log(1 + w / median)) over its mean, of the weights w ``[N]`` of training ratings."""
    logs = torch.log1p(weight / weight.median())
    return (1 + confidence * logs) / (1 + confidence * logs.mean())


def _interaction_loss(
    config: TrainConfig, positive: Tensor, negative: Tensor, rating: Tensor, weight: Tensor | None
) -> Tensor:
    """``[K]``: cross-entropy over observed and drawn pairs (2.13), or BPR; ``[K, B]`` and ``[K, B, n]``."""
    pairs = 1 + negative.shape[-1]
    chosen = None if config.positive_from is None else rating >= config.positive_from
    if config.loss == "bpr":
        compared = F.softplus(negative - positive.unsqueeze(-1))
        for factor in (weight, chosen):  # below='ignore': a rating below has the factor 0
            compared = compared if factor is None else compared * factor.unsqueeze(-1)
        return compared.mean((-2, -1))
    own = F.softplus(-positive)
    summed = (own if weight is None else weight * own) + F.softplus(negative).sum(-1)
    if chosen is not None:
        unwanted = F.softplus(positive) if config.below == "dislike" else torch.zeros_like(positive)
        summed = torch.where(chosen, summed, unwanted)
    return summed.mean(-1) / pairs


def _penalty(vectors: Tensor, weight: float, part: slice) -> Tensor:
    """``[K, B]``: weight |v|^2 over a slice of both halves of ``vectors`` ``[K, B, D]``."""
    if not weight:
        return vectors.new_zeros(())
    halves = vectors.unflatten(-1, (2, -1))[..., part]
    return weight * halves.square().sum((-2, -1))

"""What a model says of pairs, a chunk at a time: their ratings, and how far its inverse is from the input."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lunet_fast.recsys.measures import metrics
from lunet_fast.recsys.model.mlp import MLPModel
from lunet_fast.recsys.model.network import RatingModel

CHUNK = 2048
"""Pairs a pass: bounds the memory of an evaluation, whatever the number of pairs."""


class Reconstruction(NamedTuple):
    """How far f^-1(f(x)) is from x, over a set of pairs."""

    error: float
    """Mean of ``|f^-1(f(x)) - x|^2``."""
    relative: float
    """The same over the mean of ``|x|^2``."""


@torch.no_grad()
def predict_ratings(
    model: RatingModel | MLPModel, users: Tensor, items: Tensor, scale: tuple[float, float]
) -> Tensor:
    """Ratings ``[B]`` clipped to ``scale``, CHUNK pairs at a time; ``users``, ``items`` int64 ``[B]``."""
    rate = partial(model, histories=model.histories()) if isinstance(model, RatingModel) else model
    parts = [rate(u, i) for u, i in zip(users.split(CHUNK), items.split(CHUNK), strict=True)]
    return torch.cat(parts).clamp_(*scale)


@torch.no_grad()
def reconstruct(model: RatingModel, users: Tensor, items: Tensor) -> Reconstruction:
    """Reconstruction of x by the network's own inverse, over B > 0 pairs and all members.

    x is what the read-out's z is computed from when these pairs are predicted, in the model's own precision
    (float32); nothing but z goes into the inverse.
    """
    histories = model.histories()

    def inverted(u: Tensor, i: Tensor) -> tuple[Tensor, Tensor]:
        x, z = model.latent(u, i, histories)
        return x, model.inverse(z)

    return _mean_over_chunks(users, items, inverted)


@torch.no_grad()
def decode(model: MLPModel, decoder: nn.Module, users: Tensor, items: Tensor) -> Reconstruction:
    """The same for the MLP, whose last hidden layer a trained ``decoder`` maps back to x."""

    def decoded(u: Tensor, i: Tensor) -> tuple[Tensor, Tensor]:
        x, h = model.latent(u, i)
        return x, decoder(h)

    return _mean_over_chunks(users, items, decoded)


def _mean_over_chunks(
    users: Tensor, items: Tensor, rebuild: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
) -> Reconstruction:
    error = size = 0.0
    for u, i in zip(users.split(CHUNK), items.split(CHUNK), strict=True):
        x, reconstructed = rebuild(u, i)
        error += metrics.reconstruction_error(x, reconstructed) * len(u)
        size += metrics.squared_norm(x) * len(u)
    # x = 0 everywhere is rebuilt exactly or not at all: no relative error, written as the absolute one.
    return Reconstruction(error / len(users), error / size if size else error / len(users))

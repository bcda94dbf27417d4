"""Metrics: pure functions of tensors, each returning a Python float."""

from __future__ import annotations

import math

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


def _check_pairs(prediction: Tensor, rating: Tensor) -> None:
    if prediction.shape != rating.shape:
        raise ValueError(
            f"prediction has shape {tuple(prediction.shape)}, rating {tuple(rating.shape)}: one number a pair"
        )
    if prediction.numel() == 0:
        raise ValueError("no pairs: a mean over nothing is undefined")

"""From data to the numbers that a flow is trained on and back, with the Jacobian of each step.

A log-likelihood of a flow is one of *data* only with these: a flow that skips them reports the density of
other numbers. For rows of integers 0 … levels − 1, P(x) = ∫ p(x + u) du over u in [0, 1)ᴰ, so the mean over u
of log p(x + u) bounds log P(x) from below, and −log P(x)/(D·log 2) is what bits per dimension means.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

LOGIT_MARGIN = 0.01
"""λ: dequantised values in [0, 1) are brought to [λ, 1 − λ) before the logit, which has poles at 0 and 1."""


@dataclass(frozen=True)
class Preprocessing:
    """What data of one kind goes through.

    With ``levels``: x in 0 … levels − 1 gets noise u, v = (x + u)/levels, y = logit(λ + (1 − 2λ)·v).
    Otherwise y = x. Then, with ``shift`` and ``scale`` [D], (y − shift)/scale, which integers of a table have
    and those of pictures have not.
    """

    levels: int | None = None
    shift: Tensor | None = None
    scale: Tensor | None = None

    @classmethod
    def of(cls, rows: Tensor, levels: int | None, *, standardise: bool = False) -> Preprocessing:
        """Of data given by its training part [N, D]: integers are dequantised, other numbers standardised.

        With ``standardise``, integers are so too, after the logit: of a table whose columns have ranges of
        their own, most lie in a small part of it.

        Raises ``ValueError`` where a column of other numbers is constant: there is no density on it.
        """
        if levels is not None:
            return _of_integers(cls(levels), rows.double()) if standardise else cls(levels)
        shift, scale = rows.double().mean(0), rows.double().std(0)
        flat = (scale <= 1e-12 * shift.abs()).nonzero().flatten().tolist()
        if flat:
            raise ValueError(
                f"column {flat[0]} (from 0) is constant in the training rows, so the data has no density: "
                "leave it out"
            )
        return cls(None, shift, scale)

    def forward(self, x: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """(y [..., D], log|det ∂y/∂x| [...]) in x's dtype; the noise is drawn from ``generator``."""
        features = x.shape[-1]
        logabsdet = x.new_zeros(x.shape[:-1])
        if self.levels is not None:
            u = torch.rand(x.shape, generator=generator, dtype=x.dtype, device=x.device)
            inner = 1.0 - 2.0 * LOGIT_MARGIN
            v = LOGIT_MARGIN + inner * ((x + u) / self.levels)
            x = torch.logit(v)
            logabsdet = features * math.log(inner / self.levels) - (v * (1.0 - v)).log().sum(-1)
        if self.shift is not None and self.scale is not None:
            scale = self.scale.to(x)
            x = (x - self.shift.to(x)) / scale
            logabsdet = logabsdet - scale.log().sum()
        return x, logabsdet

    def inverse(self, y: Tensor) -> Tensor:
        """Data [..., D] from what a flow gives: integers again (in y's dtype) where they were dequantised."""
        if self.shift is not None and self.scale is not None:
            y = y * self.scale.to(y) + self.shift.to(y)
        if self.levels is not None:
            v = (torch.sigmoid(y) - LOGIT_MARGIN) / (1.0 - 2.0 * LOGIT_MARGIN)
            y = (v * self.levels).floor().clamp(0, self.levels - 1)
        return y

    @property
    def unit(self) -> str:
        """What a loss is told in: ``bits/dim`` of integers, ``nats`` a row of others."""
        return "nats" if self.levels is None else "bits/dim"

    def loss(self, log_prob: Tensor, features: int) -> Tensor:
        """−log p(x) [...] of rows of D ``features`` in :attr:`unit`; less is better."""
        return -log_prob if self.levels is None else -log_prob / (features * math.log(2.0))


def _of_integers(plain: Preprocessing, rows: Tensor) -> Preprocessing:
    """``plain`` followed by standardisation, by the mean and variance of rows [N, D] with their noise.

    The noise is uniform within a level, which the logit makes as wide as its slope there.
    """
    assert plain.levels is not None
    v = LOGIT_MARGIN + (1.0 - 2.0 * LOGIT_MARGIN) * ((rows + 0.5) / plain.levels)
    y = torch.logit(v)
    width = (1.0 - 2.0 * LOGIT_MARGIN) / plain.levels / (v * (1.0 - v))
    variance = y.var(0, correction=0) + width.square().mean(0) / 12
    return Preprocessing(plain.levels, y.mean(0), variance.sqrt())

"""What a model learns of a rating: itself, in units of its spread, or its logarithm or rank."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lunet_fast.recsys.model.config import TransformName

SPREAD = 1.125
"""Standard deviation of what is learnt: that of the ratings of ML-100K, for which the settings were found."""
MOST_KNOTS = 256


class Transform(nn.Module):
    """y = t(rating), increasing, and its inverse; fitted to the training ratings.

        none        y = r
        standard    y = r / unit
        log         y = log(1 + (r - low) / typical) / unit
        rank        y by linear interpolation between ``knots``, the normal scores of the ratings' ranks

    ``unit`` gives y the standard deviation SPREAD, or is 1 where all ratings are equal; ``low`` is the lowest
    rating and ``typical`` the median above it. So a multiple of the ratings changes no y. Buffers, all saved:
    ``unit``, ``low``, ``typical`` float32 scalars, ``knots`` float32 ``[2, Q]``, those that the kind needs.
    """

    unit: Tensor | None
    low: Tensor | None
    typical: Tensor | None
    knots: Tensor | None

    def __init__(self, kind: TransformName, knots: int = 0) -> None:
        super().__init__()
        self.kind = kind
        scalars = {"unit": kind in ("standard", "log"), "low": kind == "log", "typical": kind == "log"}
        for name, there in scalars.items():
            self.register_buffer(name, torch.ones(()) if there else None)
        self.register_buffer("knots", torch.zeros(2, knots) if kind == "rank" else None)

    def fit_(self, ratings: Tensor) -> None:
        """Set the buffers from ratings ``[N]``; O(N log N)."""
        r = ratings.double()
        if self.kind == "rank":
            self.knots = _normal_scores(r).to(ratings.device).float()
        if self.low is not None and self.typical is not None:
            above = r[r > r.min()] - r.min()
            self.low.fill_(float(r.min()))
            self.typical.fill_(float(above.median()) if len(above) else 1.0)
        if self.unit is not None:
            spread = float(self(r).std(correction=0)) / SPREAD
            self.unit.fill_(spread if spread > 0 else 1.0)

    def forward(self, ratings: Tensor) -> Tensor:
        """y of ratings of any shape."""
        if self.knots is not None:
            return _interpolated(ratings, self.knots[0], self.knots[1])
        if self.low is not None and self.typical is not None:
            ratings = torch.log1p(((ratings - self.low) / self.typical).clamp(min=0))
        return ratings if self.unit is None else ratings / self.unit

    def inverse(self, y: Tensor) -> Tensor:
        """The ratings of y of any shape."""
        if self.knots is not None:
            return _interpolated(y, self.knots[1], self.knots[0])
        if self.unit is not None:
            y = y * self.unit
        if self.low is not None and self.typical is not None:
            return self.low + self.typical * torch.expm1(y)
        return y


def _normal_scores(ratings: Tensor) -> Tensor:
    """``[2, Q]``: distinct ratings, at most MOST_KNOTS of them, and the normal score of each one's rank."""
    levels, counts = torch.unique(ratings, return_counts=True)
    below = counts.cumsum(0) - counts
    scores = torch.special.ndtri((below + counts / 2) / len(ratings))
    if len(levels) > MOST_KNOTS:
        shares = torch.linspace(0, len(ratings) - 1, MOST_KNOTS, dtype=torch.float64)
        kept = torch.unique(torch.searchsorted(counts.cumsum(0).double(), shares, right=True))
        levels, scores = levels[kept], scores[kept]
    if len(levels) == 1:
        return torch.stack((levels, torch.zeros_like(levels)))
    spread = (scores - scores.mean()).square().mean().sqrt() if len(levels) == 2 else 1.0
    return torch.stack((levels, SPREAD * scores / spread))


def _interpolated(x: Tensor, known: Tensor, values: Tensor) -> Tensor:
    """Linear between (known, values), both ascending ``[Q]``; constant beyond the ends."""
    if len(known) == 1:
        return values[0].expand_as(x).to(x.dtype)
    place = torch.searchsorted(known, x.to(known.dtype).contiguous()).clamp(1, len(known) - 1)
    low, high = known[place - 1], known[place]
    share = ((x - low) / (high - low)).clamp(0, 1)
    return values[place - 1] + share * (values[place] - values[place - 1])

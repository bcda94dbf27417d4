"""A Gaussianization flow, as a peer of ``density.py``: rotations and marginal mixture CDFs in turn.

After Meng, Song, Song and Ermon, Gaussianization Flows (AISTATS 2020, arXiv 2003.01941): each layer sends
each coordinate through the CDF of a mixture of logistics of its own and through the logit, which keeps the
tails linear where the inverse of the normal CDF would leave float32; then an orthogonal matrix turns them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid
from torch.nn.utils.parametrizations import orthogonal

#: Halvings that find the inverse of a marginal to float32's precision.
HALVINGS = 50


class MarginalMixture(nn.Module):
    """z = logit F(x), F the CDF of K logistics for each of D coordinates; 3·K·D parameters.

    The locations start evenly over [−2, 2], where standardised data is, with widths that overlap.
    """

    def __init__(self, features: int, components: int) -> None:
        super().__init__()
        places = torch.linspace(-2.0, 2.0, components).unsqueeze(-1)
        self.location = nn.Parameter(places.expand(-1, features).clone())
        self.log_scale = nn.Parameter(torch.full((components, features), -0.5))
        self.log_weight = nn.Parameter(torch.zeros(components, features))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(z, log dz/dx) [N, D]."""
        weight = self.log_weight.log_softmax(0)
        u = (x.unsqueeze(-2) - self.location) * (-self.log_scale).exp()
        below, above = logsigmoid(u), logsigmoid(-u)
        left, right = (torch.logsumexp(weight + tail, -2) for tail in (below, above))
        density = torch.logsumexp(weight - self.log_scale + below + above, -2)
        return left - right, density - left - right

    def inverse(self, z: Tensor) -> Tensor:
        """By bisection, as F has no inverse in closed form."""
        low, high = torch.full_like(z, -1e3), torch.full_like(z, 1e3)
        for _ in range(HALVINGS):
            middle = 0.5 * (low + high)
            below = self.forward(middle)[0] < z
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return 0.5 * (low + high)


class Gaussianization(nn.Module):
    """Layers of a marginal mixture and a rotation, on standardised rows [N, D].

    The rotations are Cayley transforms: PyTorch's Householder ones keep signs among the trained numbers, as
    whole parts of ones, so that a weight decay that makes them .99 makes the matrix singular.
    """

    def __init__(self, features: int, layers: int, components: int) -> None:
        super().__init__()
        self.marginals = nn.ModuleList(MarginalMixture(features, components) for _ in range(layers))
        self.rotations = nn.ModuleList(
            orthogonal(nn.Linear(features, features, bias=False), "weight", "cayley") for _ in range(layers)
        )

    def forward(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """(z, log|det|)."""
        logabsdet = y.new_zeros(y.shape[0])
        for marginal, rotation in zip(self.marginals, self.rotations, strict=True):
            y, each = marginal(y)
            logabsdet = logabsdet + each.sum(-1)
            y = rotation(y)
        return y, logabsdet

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """(y, log|det|) of the inverse, as nflows' transforms have it."""
        logabsdet = z.new_zeros(z.shape[0])
        for marginal, rotation in zip(reversed(self.marginals), reversed(self.rotations), strict=True):
            z = marginal.inverse(z @ rotation.weight)
            logabsdet = logabsdet - marginal(z)[1].sum(-1)
        return z, logabsdet

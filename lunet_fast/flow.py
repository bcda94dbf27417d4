"""LUFlow: a normalising flow with an LUNet, density and samples both exact."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lunet_fast.lunet import LUNet
from lunet_fast.reference import wide
from lunet_fast.transforms import InvertibleTransform


class StandardNormal(nn.Module):
    """N(0, I) on ℝᴰ as a module, so that it follows ``.to()`` and ``.double()``.

    Args:
        features: D.
        device, dtype: as in ``nn.Linear``.
    """

    like: Tensor

    def __init__(
        self, features: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.features = features
        # Holds no numbers, only the dtype and device to draw in.
        self.register_buffer("like", torch.empty(0, device=device, dtype=dtype), persistent=False)

    def log_prob(self, z: Tensor) -> Tensor:
        """log N(z; 0, I) = −(|z|² + D·log 2π)/2 [...] for z [..., D], float32 or wider."""
        z = z.to(wide(z.dtype))
        return -0.5 * (z.square().sum(-1) + self.features * math.log(2.0 * math.pi))

    def sample(self, shape: Sequence[int]) -> Tensor:
        """[*shape, D] draws, by PyTorch's global generator."""
        return torch.randn(*shape, self.features, device=self.like.device, dtype=self.like.dtype)


class LUFlow(nn.Module):
    """A density on ℝᴰ: z = net(x) for data x, log p(x) = log p_base(z) + log|det ∂z/∂x|.

    Args:
        net: maps data to the latent space; an ``LUNet`` or anything with its methods.
        base: the latent density, with ``log_prob(z)`` and ``sample(shape)``: a module (it then follows
            ``.to()``) or a ``torch.distributions`` distribution with event shape [D]; a standard normal if
            None.

    Cost for N points: log_prob one forward pass of net, samples one inverse pass.
    """

    def __init__(self, net: LUNet, base: Any = None) -> None:
        super().__init__()
        self.net = net
        if base is None:
            parameter = next(net.parameters())
            base = StandardNormal(net.features, device=parameter.device, dtype=parameter.dtype)
        self.base = base

    def forward(self, x: Tensor) -> Tensor:
        """``log_prob(x)``, so that wrappers that call a module, as data parallel does, train a flow."""
        return self.log_prob(x)

    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x) [...], natural logarithm, for x [..., D]."""
        z, logabsdet = self.net.forward_and_logabsdet(x)
        return self.base.log_prob(z) + logabsdet

    def sample(self, n: int | Sequence[int] = ()) -> Tensor:
        """n draws [n, D], or [*n, D] for a shape; drawn with PyTorch's global generator. No gradient."""
        with torch.no_grad():
            return self.net.inverse(self.base.sample(_shape(n)))

    def sample_and_log_prob(self, n: int | Sequence[int] = ()) -> tuple[Tensor, Tensor]:
        """(draws x [*n, D], log p(x) [*n]) in the one pass of ``sample``. No gradient."""
        with torch.no_grad():
            z = self.base.sample(_shape(n))
            x, logabsdet = self.net.inverse_and_logabsdet(z)
            return x, self.base.log_prob(z) - logabsdet

    def as_transform(self) -> InvertibleTransform:
        """Data → latent as a ``torch.distributions`` transform; its ``inv`` turns base draws into data."""
        return InvertibleTransform(self.net)


def _shape(n: int | Sequence[int]) -> torch.Size:
    return torch.Size(n) if isinstance(n, Sequence) else torch.Size([operator.index(n)])

"""LUFlow: a normalising flow with an LUNet, density and samples both exact."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from lunet_fast.layers.conditional import ConditionalLUNet, GivenContext
from lunet_fast.layers.transforms import InvertibleTransform
from lunet_fast.ops.precision import wide


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


class NormalMixture(nn.Module):
    """Σ_k π_k N(z; μ_k, diag(σ_k²)) on ℝᴰ with learnt π, μ, σ: a base with several modes.

    Starts at π_k = 1/K, σ_k = 1 and μ_k drawn from N(0, spread²·I) by PyTorch's global generator.

    Args:
        features: D.
        components: K ≥ 1.
        spread: of the first means.
        device, dtype: as in ``nn.Linear``.

    Raises:
        ValueError: features or components below 1, or spread below 0.
    """

    def __init__(
        self,
        features: int,
        components: int,
        spread: float = 0.5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if features < 1 or components < 1 or not spread >= 0.0:
            raise ValueError(
                "features and components must be at least 1 and spread at least 0, got "
                f"{features}, {components} and {spread}"
            )
        self.features, self.components, self.spread = features, components, spread
        self.mean = nn.Parameter(torch.empty(components, features, device=device, dtype=dtype))
        self.log_scale = nn.Parameter(torch.empty(components, features, device=device, dtype=dtype))
        self.logits = nn.Parameter(torch.empty(components, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.mean, std=self.spread)
        nn.init.zeros_(self.log_scale)
        nn.init.zeros_(self.logits)

    def component_log_prob(self, z: Tensor) -> Tensor:
        """log π_k + log N(z; μ_k, diag(σ_k²)) [..., K] for z [..., D], float32 or wider.

        By two products with [D, K] matrices, 4·K·D flops a row, without an array [..., K, D]. Squares are
        multiplied out, so the absolute error is about |z − m|²/σ² roundings, m the mean of the means.
        """
        wider = wide(torch.promote_types(z.dtype, self.mean.dtype))
        mean, log_scale = self.mean.to(wider), self.log_scale.to(wider)
        centre = mean.mean(0).detach()
        z, mean = z.to(wider) - centre, mean - centre
        precision = torch.exp(-2.0 * log_scale)
        weighted = mean * precision
        constant = (
            self.logits.to(wider).log_softmax(0)
            - log_scale.sum(-1)
            - 0.5 * ((weighted * mean).sum(-1) + self.features * math.log(2.0 * math.pi))
        )
        return constant + z @ weighted.mT - 0.5 * (z.square() @ precision.mT)

    def log_prob(self, z: Tensor) -> Tensor:
        """log p(z) [...] for z [..., D]."""
        return self.component_log_prob(z).logsumexp(-1)

    def as_distribution(self) -> MixtureSameFamily:
        """The same as a ``torch.distributions`` distribution, with its parameters' gradients."""
        components = Independent(Normal(self.mean, self.log_scale.exp()), 1)
        return MixtureSameFamily(Categorical(logits=self.logits), components)

    def sample(self, shape: Sequence[int]) -> Tensor:
        """[*shape, D] draws, by PyTorch's global generator."""
        # torch.distributions draws from every component and keeps one.
        with torch.no_grad():
            count = math.prod(shape)
            which = torch.multinomial(self.logits.softmax(0), max(count, 1), replacement=True)[:count]
            noise = torch.randn(count, self.features, device=self.mean.device, dtype=self.mean.dtype)
            return torch.addcmul(self.mean[which], self.log_scale.exp()[which], noise).reshape(
                *shape, self.features
            )

    def extra_repr(self) -> str:
        return f"features={self.features}, components={self.components}"


class LUFlow(nn.Module):
    """A density on ℝᴰ: z = net(x) for data x, log p(x) = log p_base(z) + log|det ∂z/∂x|.

    Args:
        net: maps data to the latent space; an ``LUNet``, a ``ConditionalLUNet`` or anything with their
            methods.
        base: the latent density, with ``log_prob(z)`` and ``sample(shape)``: a module (it then follows
            ``.to()``) or a ``torch.distributions`` distribution with event shape [D]; a standard normal if
            None.

    With a ``ConditionalLUNet`` the density is p(x | context), and every method takes the contexts [..., C],
    one a row or one for all; without, none.

    Cost for N points: log_prob one forward pass of net, samples one inverse pass.
    """

    def __init__(self, net: Any, base: Any = None) -> None:
        super().__init__()
        self.net = net
        if base is None:
            parameter = next(net.parameters())
            base = StandardNormal(net.features, device=parameter.device, dtype=parameter.dtype)
        self.base = base

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """``log_prob``, so that wrappers that call a module, as data parallel does, train a flow."""
        return self.log_prob(x, context)

    def log_prob(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """log p(x) or log p(x | context) [...], natural logarithm, for x [..., D]."""
        z, logabsdet = self._map(context).forward_and_logabsdet(x)
        return self.base.log_prob(z) + logabsdet

    def sample(self, n: int | Sequence[int] = (), context: Tensor | None = None) -> Tensor:
        """n draws [n, D], or [*n, D] for a shape; with contexts [..., C], [*n, ..., D].

        Drawn with PyTorch's global generator. No gradient.
        """
        with torch.no_grad():
            net = self._map(context)
            return net.inverse(self.base.sample(_shape(n) + _leading(net)))

    def sample_and_log_prob(
        self, n: int | Sequence[int] = (), context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(draws x as ``sample`` gives them, log p of each) in the one pass of ``sample``. No gradient."""
        with torch.no_grad():
            net = self._map(context)
            z = self.base.sample(_shape(n) + _leading(net))
            x, logabsdet = net.inverse_and_logabsdet(z)
            return x, self.base.log_prob(z) - logabsdet

    def _map(self, context: Tensor | None) -> Any:
        """What takes data to the latent space, for these contexts."""
        if isinstance(self.net, ConditionalLUNet):
            if context is None:
                raise ValueError("context must be given: the net is a ConditionalLUNet")
            return self.net.given(context)
        if context is not None:
            raise ValueError("context must be None: only a flow with a ConditionalLUNet depends on one")
        return self.net

    def as_transform(self, context: Tensor | None = None) -> InvertibleTransform:
        """Data → latent as a ``torch.distributions`` transform; its ``inv`` turns base draws into data."""
        return InvertibleTransform(self._map(context))


def _leading(net: Any) -> torch.Size:
    return net.shape if isinstance(net, GivenContext) else torch.Size()


def _shape(n: int | Sequence[int]) -> torch.Size:
    return torch.Size(n) if isinstance(n, Sequence) else torch.Size([operator.index(n)])

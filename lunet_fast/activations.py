"""The paper's two bijective activations, one family: φ(x) = a·x + (c/κ)·softplus(κ·x).

φ is increasing and convex with φ′ between a and a + c, so it is onto ℝ and its inverse is unique. Fixed
parameters are kept as Python floats. Learnable ones are stored unconstrained and mapped into a bounded
range by a sigmoid, so that no optimiser step can make the activation singular.
"""

from __future__ import annotations

import math
from abc import abstractmethod

import torch
from torch import Tensor, nn

from lunet_fast import functional
from lunet_fast.reference import Slopes

#: A learnable α of (2.6) stays strictly between these.
SLOPE_RANGE = (1e-3, 1.0 - 1e-3)

#: Learnable α and β of (2.9) stay strictly between these, on a logarithmic scale.
SCALE_RANGE = (1e-3, 1e3)


def _logit(fraction: float) -> float:
    return math.log(fraction) - math.log1p(-fraction)


def _check_inside(name: str, value: float, low: float, high: float) -> None:
    if not low < value < high:
        raise ValueError(f"a learnable {name} must start strictly between {low} and {high}, got {value}")


class BijectiveActivation(nn.Module):
    """An elementwise bijection of the family, with its inverse and log-determinants.

    Every method takes [..., D] and keeps shape and dtype; log-determinants sum over the last dimension,
    have shape [...] and are float32 or wider. Cost: O(1) transcendentals an element forward, two or three
    times that for the inverse (see ``functional.leaky_softplus_inverse``).
    """

    @abstractmethod
    def slopes(self) -> Slopes:
        """(a, c, κ): three floats, or a tensor [3] through which the parameters are learnt."""

    def forward(self, x: Tensor) -> Tensor:
        """φ(x)."""
        return functional.leaky_softplus(x, self.slopes())

    def inverse(self, y: Tensor) -> Tensor:
        """φ⁻¹(y); ±inf and NaN pass through."""
        return functional.leaky_softplus_inverse(y, self.slopes())

    def forward_and_logabsdet(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(φ(x), Σ log φ′(x))."""
        return functional.leaky_softplus_and_logabsdet(x, self.slopes())

    def inverse_and_logabsdet(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """(φ⁻¹(y), the log-determinant of φ⁻¹ at y)."""
        return functional.leaky_softplus_inverse_and_logabsdet(y, self.slopes())

    def slope_values(self) -> tuple[float, float, float]:
        """(a, c, κ) as they are now, as floats."""
        slopes = self.slopes()
        a, c, kappa = slopes.tolist() if isinstance(slopes, Tensor) else slopes
        return a, c, kappa

    def tangent_at_zero(self) -> tuple[float, float]:
        """(φ(0), φ′(0)): what a following layer undoes to start near the identity."""
        a, c, kappa = self.slope_values()
        return c / kappa * math.log(2.0), a + 0.5 * c


class LeakySoftplus(BijectiveActivation):
    """φ(x) = α·x + (1 − α)·softplus(x), (2.6): slope α on the far left, 1 on the far right.

    Args:
        alpha: α, strictly between 0 and 1; between 0.001 and 0.999 if learnable.
        learnable: make α a parameter (``raw_alpha``, a scalar).

    Raises:
        ValueError: alpha outside its range.
    """

    def __init__(self, alpha: float = 0.1, learnable: bool = False) -> None:
        super().__init__()
        alpha = float(alpha)
        if not 0.0 < alpha < 1.0:
            raise ValueError(f"alpha must lie strictly between 0 and 1, got {alpha}")
        self.learnable = learnable
        self._alpha = alpha
        self.raw_alpha: nn.Parameter | None
        if learnable:
            low, high = SLOPE_RANGE
            _check_inside("alpha", alpha, low, high)
            self.raw_alpha = nn.Parameter(torch.tensor(_logit((alpha - low) / (high - low))))
        else:
            self.register_parameter("raw_alpha", None)

    @property
    def alpha(self) -> float | Tensor:
        """α: a float, or a scalar tensor when learnable."""
        if self.raw_alpha is None:
            return self._alpha
        low, high = SLOPE_RANGE
        return low + (high - low) * torch.sigmoid(self.raw_alpha)

    def slopes(self) -> Slopes:
        alpha = self.alpha
        if isinstance(alpha, Tensor):
            return torch.stack([alpha, 1.0 - alpha, torch.ones_like(alpha)])
        return alpha, 1.0 - alpha, 1.0

    def extra_repr(self) -> str:
        return f"alpha={self.slope_values()[0]:.4g}, learnable={self.learnable}"


class GeneralizedLeakySoftplus(BijectiveActivation):
    """φ(x) = (1/α)·softplus(α·x) + β·x, (2.9): slope β on the far left, 1 + β on the far right.

    Args:
        alpha: α > 0, how sharply the slope changes; between 0.001 and 1000 if learnable.
        beta: β > 0; between 0.001 and 1000 if learnable. β = 0 is plain softplus, which is not onto ℝ.
        learnable: make both parameters (``raw_alpha`` and ``raw_beta``, scalars).

    Raises:
        ValueError: alpha or beta outside its range.
    """

    def __init__(self, alpha: float = 1.0, beta: float = 0.1, learnable: bool = False) -> None:
        super().__init__()
        alpha, beta = float(alpha), float(beta)
        if not 0.0 < alpha < math.inf:
            raise ValueError(f"alpha must be above 0 and finite, got {alpha}")
        if not 0.0 < beta < math.inf:
            raise ValueError(
                f"beta must be above 0 and finite, got {beta}; with beta = 0 the function is plain softplus, "
                "which is not onto the real line"
            )
        self.learnable = learnable
        self._alpha, self._beta = alpha, beta
        self.raw_alpha: nn.Parameter | None
        self.raw_beta: nn.Parameter | None
        if learnable:
            self.raw_alpha = nn.Parameter(torch.tensor(self._raw("alpha", alpha)))
            self.raw_beta = nn.Parameter(torch.tensor(self._raw("beta", beta)))
        else:
            self.register_parameter("raw_alpha", None)
            self.register_parameter("raw_beta", None)

    @staticmethod
    def _raw(name: str, value: float) -> float:
        low, high = SCALE_RANGE
        _check_inside(name, value, low, high)
        return _logit(math.log(value / low) / math.log(high / low))

    @staticmethod
    def _value(raw: Tensor) -> Tensor:
        low, high = SCALE_RANGE
        return low * torch.exp(math.log(high / low) * torch.sigmoid(raw))

    @property
    def alpha(self) -> float | Tensor:
        """α: a float, or a scalar tensor when learnable."""
        return self._alpha if self.raw_alpha is None else self._value(self.raw_alpha)

    @property
    def beta(self) -> float | Tensor:
        """β: a float, or a scalar tensor when learnable."""
        return self._beta if self.raw_beta is None else self._value(self.raw_beta)

    def slopes(self) -> Slopes:
        alpha, beta = self.alpha, self.beta
        if isinstance(alpha, Tensor) and isinstance(beta, Tensor):
            return torch.stack([beta, torch.ones_like(beta), alpha])
        return self._beta, 1.0, self._alpha

    def extra_repr(self) -> str:
        beta, _, alpha = self.slope_values()
        return f"alpha={alpha:.4g}, beta={beta:.4g}, learnable={self.learnable}"

"""LUNet: a stack of LU layers, the last one linear, (2.7) and (2.8)."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lunet_fast import reference
from lunet_fast.activations import BijectiveActivation, LeakySoftplus
from lunet_fast.lu_dense import LUDense
from lunet_fast.transforms import InvertibleTransform


class LUNet(nn.Module):
    """f = A_M ∘ φ ∘ A_{M−1} ∘ … ∘ φ ∘ A_1 with affine A_m: invertible, its Jacobian's determinant in O(M·D).

    f starts near the identity: each layer after an activation undoes the activation's tangent at 0.

    Args:
        features: D.
        layers: M ≥ 1; the first M − 1 have the activation, the last is linear.
        activation: copied for each layer, so learnable slopes are learnt a layer each.
        bias, device, dtype: as in ``LUDense``.

    Raises:
        ValueError: features or layers below 1.

    Shapes: every method takes [..., D]. Cost for N rows: M times that of ``LUDense``.
    """

    def __init__(
        self,
        features: int,
        layers: int,
        activation: BijectiveActivation | None = None,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if layers < 1:
            raise ValueError(f"layers must be at least 1, got {layers}")
        self.features = features
        activation = LeakySoftplus(0.1) if activation is None else activation
        own = [copy.deepcopy(activation).to(device=device, dtype=dtype) for _ in range(layers - 1)]
        self.layers = nn.ModuleList(
            LUDense(features, bias=bias, device=device, dtype=dtype, activation=each) for each in [*own, None]
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start near the identity: u_ii = 1/φ′(0) and b = −A φ(0)·1 after an activation, so that f(0) = 0.

        Learnable slopes go back to where they started.
        """
        before: BijectiveActivation | None = None
        for layer in self._layers():
            layer.reset_parameters()
            if layer.activation is not None:
                layer.activation.reset_parameters()
            if before is not None and not layer.lu.is_meta:
                value, slope = before.tangent_at_zero()
                with torch.no_grad():
                    layer.lu.copy_(layer.lu.tril(-1) + layer.lu.triu(1) / slope)
                    layer.lu.fill_diagonal_(-math.log(slope))
                    if layer.bias is not None:
                        layer.bias.copy_(-value * layer.weight.sum(-1))
            before = layer.activation

    def _layers(self) -> list[LUDense]:
        return [layer for layer in self.layers if isinstance(layer, LUDense)]

    def forward(self, x: Tensor) -> Tensor:
        """f(x) [..., D]."""
        for layer in self.layers:
            x = layer(x)
        return x

    def inverse(self, y: Tensor) -> Tensor:
        """The x [..., D] with f(x) = y, (2.8)."""
        for layer in reversed(self._layers()):
            y = layer.inverse(y)
        return y

    def forward_and_logabsdet(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(f(x), log|det of f's Jacobian at x| [...])."""
        first, *rest = self._layers()
        x, total = first.forward_and_logabsdet(x)
        for layer in rest:
            x, share = layer.forward_and_logabsdet(x)
            total = total + share
        return x, total

    def inverse_and_logabsdet(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """(f⁻¹(y), log|det of the inverse's Jacobian at y| [...])."""
        last, *rest = reversed(self._layers())
        y, total = last.inverse_and_logabsdet(y)
        for layer in rest:
            y, share = layer.inverse_and_logabsdet(y)
            total = total + share
        return y, total

    def as_transform(self) -> InvertibleTransform:
        """f as a ``torch.distributions`` transform of vectors [D]."""
        return InvertibleTransform(self)

    def condition(self, x: Tensor | None = None) -> Condition:
        """How many digits a round trip through each layer can lose, O(M·D³).

        Args:
            x: data [..., D] on which the activations' slopes are taken; None takes their full range.
        """
        report = []
        with torch.no_grad():
            for index, layer in enumerate(self._layers()):
                lower, upper = (t.double() for t in reference.factors(layer.lu, layer.sign))
                slope = (1.0, 1.0)
                if layer.activation is not None:
                    a, c, kappa = layer.activation.slope_values()
                    slope = (a, a + c)
                    if x is not None and x.numel():
                        h = reference.affine(x, layer.lu, layer.bias, layer.sign, layer.permutation)
                        sigma = torch.sigmoid(kappa * h.double())
                        slope = (a + c * float(sigma.min()), a + c * float(sigma.max()))
                report.append(LayerCondition(f"layers.{index}", _kappa_1(lower), _kappa_1(upper), *slope))
                if x is not None:
                    x = layer(x)
        dtype = self._layers()[0].lu.dtype
        return Condition(tuple(report), -math.log10(torch.finfo(dtype).eps))


def _kappa_1(triangle: Tensor) -> float:
    """κ₁(T) = ‖T‖₁·‖T⁻¹‖₁ of a triangular matrix."""
    upper = bool((triangle.tril(-1) == 0).all())
    eye = torch.eye(triangle.shape[0], dtype=triangle.dtype, device=triangle.device)
    inverse = torch.linalg.solve_triangular(triangle, eye, upper=upper)
    return float(torch.linalg.matrix_norm(triangle, 1) * torch.linalg.matrix_norm(inverse, 1))


@dataclass(frozen=True)
class LayerCondition:
    """What one layer can cost a round trip: κ₁ of its factors and the range of its activation's slope."""

    name: str
    kappa_lower: float
    kappa_upper: float
    slope_low: float
    slope_high: float

    @property
    def digits_lost(self) -> float:
        """log₁₀(κ₁(L)·κ₁(U)·max φ′/min φ′): a bound, met by the worst input and mostly far from met."""
        return math.log10(self.kappa_lower * self.kappa_upper * self.slope_high / self.slope_low)


@dataclass(frozen=True)
class Condition:
    """The report of ``LUNet.condition``; printed, a table with a row a layer."""

    layers: tuple[LayerCondition, ...]
    digits: float
    """Decimal digits that the parameters' dtype holds: 6.9 in float32, 15.7 in float64."""

    @property
    def digits_lost(self) -> float:
        """Digits that a round trip through all layers can lose: the sum over the layers."""
        return sum(layer.digits_lost for layer in self.layers)

    @property
    def digits_left(self) -> float:
        """Digits that a round trip keeps even in the worst case; below 0 nothing is promised."""
        return self.digits - self.digits_lost

    def __str__(self) -> str:
        lines = [f"{'layer':<12}{'κ₁(L)':>10}{'κ₁(U)':>10}{'slopes φ′':>18}{'digits lost':>13}"]
        for layer in self.layers:
            slopes = f"{layer.slope_low:.3g} … {layer.slope_high:.3g}"
            lines.append(
                f"{layer.name:<12}{layer.kappa_lower:>10.3g}{layer.kappa_upper:>10.3g}{slopes:>18}"
                f"{layer.digits_lost:>13.1f}"
            )
        lines.append(f"a round trip keeps at least {self.digits_left:.1f} of {self.digits:.1f} digits")
        return "\n".join(lines)

"""LUNet: a stack of LU layers, the last one linear, (2.7) and (2.8)."""

from __future__ import annotations

import copy
import math
import warnings
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from lunet_fast import functional, ops, reference, reversible, small
from lunet_fast.activations import BijectiveActivation, LeakySoftplus
from lunet_fast.lu_dense import LUDense
from lunet_fast.reference import Slopes
from lunet_fast.transforms import InvertibleTransform

#: What ``LUNet`` keeps for backward: every layer's input, or only the result.
MEMORY = ("saved", "reversible")

#: How ``LUNet`` may mix the order of coordinates between layers.
PERMUTATIONS = ("reverse", "random")

#: The signs that the diagonals of U may have.
SIGNS = ("positive", "negative", "random")


class ConditionWarning(UserWarning):
    """The inverse of a net has lost digits: ``LUNet.condition`` says how many, and in which layer."""


class LUNet(nn.Module):
    """f = A_M ∘ φ ∘ A_{M−1} ∘ … ∘ φ ∘ A_1 with affine A_m: invertible, its Jacobian's determinant in O(M·D).

    f starts near the identity: each layer after an activation undoes the activation's tangent at 0.

    Args:
        features: D.
        layers: M ≥ 1; the first M − 1 have the activation, the last is linear.
        activation: copied for each layer, so learnable slopes are learnt a layer each.
        bias, device, dtype: as in ``LUDense``.
        memory: "saved" or "reversible", see below; the attribute of that name may be set at any time.
        permutation: the order in which each layer but the last gives its coordinates to the next: "reverse",
            "random" (drawn here, by PyTorch's global generator), or None for their own. f then starts near
            the product of the permutations.
        signs: of the diagonals of U, which training keeps: "positive"; "negative" in every layer, so that
            each layer turns its coordinates round and the activations, which are convex, bend them to
            alternate sides; "random", drawn for each coordinate of each layer. f then starts near a diagonal
            matrix of signs. As a flow on digits, "negative" is worth 0.05 bits a dimension.

    Raises:
        ValueError: features or layers below 1, or memory, permutation or signs is not one of its values.

    Shapes: every method takes [..., D]. Cost for N rows: M times that of ``LUDense``. NaN and infinities pass
    as through ``LUDense``.

    Memory. "saved" keeps each layer's input and pre-activation for backward, about 2·M·N·D numbers.
    "reversible" keeps only the result, N·D, and up to 32 rows of each layer's input; backward recovers the
    inputs by inversion and recomputes a layer at a time, about 7·N·D numbers at once whatever M, for
    about twice the time of a training step.

    The kept rows are compared with the recovered ones, and once inversion has lost half of the digits
    backward raises RuntimeError rather than give wrong gradients. Each layer loses some: by ``condition()``,
    and at least the activation's slopes apart, so depth is limited. A fresh net (D = 64, normal data) in
    float32 passes with 9 layers at α = 0.1, 19 at 0.5 and 64 at 0.9, in float64 with 13, 39 and 128.

    "reversible" computes in float32 or float64, under autocast too; a bfloat16 or float16 net raises
    TypeError. Under ``torch.compile`` and ``torch.func``, in forward mode, and where a layer has hooks of
    its own (those of FSDP, for one) or is not a plain ``LUDense``, layers are called one by one, as "saved".
    """

    def __init__(
        self,
        features: int,
        layers: int,
        activation: BijectiveActivation | None = None,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        memory: str = "saved",
        permutation: str | None = None,
        signs: str = "positive",
    ) -> None:
        super().__init__()
        if layers < 1:
            raise ValueError(f"layers must be at least 1, got {layers}")
        if permutation is not None and permutation not in PERMUTATIONS:
            raise ValueError(
                f"permutation must be one of {', '.join(PERMUTATIONS)} or None, got {permutation!r}"
            )
        self.features = features
        self.memory = memory
        if signs not in SIGNS:
            raise ValueError(f"signs must be one of {', '.join(SIGNS)}, got {signs!r}")
        self.signs = signs
        activation = LeakySoftplus(0.1) if activation is None else activation
        own = [copy.deepcopy(activation).to(device=device, dtype=dtype) for _ in range(layers - 1)]
        self.layers = nn.ModuleList(
            LUDense(features, bias=bias, device=device, dtype=dtype, activation=each) for each in [*own, None]
        )
        if permutation is not None:
            for layer in self._layers()[:-1]:
                order = torch.arange(features - 1, -1, -1)
                order = order if permutation == "reverse" else torch.randperm(features)
                layer.permutation = order.to(device=layer.lu.device)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start near the identity: u_ii = 1/φ′(0) and b = −A φ(0)·1 after an activation, so that f(0) = 0.

        With other signs, near a diagonal matrix of them; random ones are drawn anew. Learnable slopes go
        back to where they started.
        """
        before: BijectiveActivation | None = None
        for layer in self._layers():
            layer.reset_parameters()
            if self.signs == "negative":
                layer.sign.neg_()
            elif self.signs == "random":
                layer.sign.copy_(2.0 * torch.randint(2, layer.sign.shape) - 1.0)
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

    def whiten(self, x: Tensor) -> None:
        """Set every A and b so that on the rows of x [..., D] each layer's h = A x + b is white.

        Data-dependent initialisation: h then has mean 0 and covariance I, so that training starts from
        a maximum-likelihood Gaussian bent by the activations. A = Pᵀ C^(−1/2), the whitening matrix nearest
        to the identity, by the LU factorisation of a positive definite matrix, which needs no pivoting; C is
        the covariance of the layer's input, drawn to its mean diagonal by the share D/(D + N) so that N rows
        of any number will do. P, the slopes and the signs s of U's diagonal are kept: where s is not 1,
        A = Pᵀ diag(s) C^(−1/2).

        Cost: O(M·(N·D² + D³)), in float64.

        Raises:
            ValueError: x has fewer than two rows, another last dimension than D, or values that are not
                finite; a layer has no bias.
        """
        layers = self._layers()
        if x.dim() == 0 or x.shape[-1] != self.features:
            raise ValueError(
                f"x must have {self.features} features in its last dimension, got shape {tuple(x.shape)}"
            )
        rows = x.detach().reshape(-1, self.features)
        if len(rows) < 2 or not bool(torch.isfinite(rows).all()):
            raise ValueError(f"x must have at least 2 rows, all finite, got shape {tuple(x.shape)}")
        if any(layer.bias is None for layer in layers):
            raise ValueError("whiten needs layers with a bias: make the net with bias=True")
        rows = rows.to(layers[0].lu.device, torch.float64)
        with torch.no_grad(), reference.without_autocast(rows):
            for layer in layers:
                rows = _whiten(layer, rows)

    @property
    def memory(self) -> str:
        """What is kept for backward: "saved" or "reversible"."""
        return self._memory

    @memory.setter
    def memory(self, value: str) -> None:
        if value not in MEMORY:
            raise ValueError(f"memory must be one of {', '.join(MEMORY)}, got {value!r}")
        self._memory = value

    def _layers(self) -> list[LUDense]:
        return cast("list[LUDense]", list(self.layers))

    def forward(self, x: Tensor) -> Tensor:
        """f(x) [..., D]."""
        return self._run(x, inverse=False, logabsdet=False)[0]

    def inverse(self, y: Tensor) -> Tensor:
        """The x [..., D] with f(x) = y, (2.8)."""
        return self._run(y, inverse=True, logabsdet=False)[0]

    def forward_and_logabsdet(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(f(x), log|det of f's Jacobian at x| [...])."""
        y, logabsdet = self._run(x, inverse=False, logabsdet=True)
        return y, cast(Tensor, logabsdet)

    def inverse_and_logabsdet(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """(f⁻¹(y), log|det of the inverse's Jacobian at y| [...])."""
        x, logabsdet = self._run(y, inverse=True, logabsdet=True)
        return x, cast(Tensor, logabsdet)

    def _run(self, x: Tensor, *, inverse: bool, logabsdet: bool) -> tuple[Tensor, Tensor | None]:
        """f or its inverse at x, and its log-determinant if asked for: here it is decided how."""
        if self.memory == "saved":
            layers = self._layers()
            if all(map(_is_plain, self.layers)):
                if not inverse and small.takes(x, layers):
                    return small.net(x, layers, logabsdet=logabsdet)
                if inverse and small.takes_inverse(x, layers):
                    found = small.inverse_net(x, layers, logabsdet=logabsdet)
                    if found is not None:
                        return found
            slopes = self._common_slopes() if ops.fuses_net(x) else None
            if slopes is not None:
                return self._run_as_one(x, slopes, inverse=inverse, logabsdet=logabsdet)
            return self._run_each(x, inverse=inverse, logabsdet=logabsdet)
        # What is computed must not depend on whether a gradient is recorded: one precision for all.
        x = self._invertible(x)
        with reference.without_autocast(x):
            if all(map(_is_plain, self.layers)):
                parts = [
                    reversible.Layer(layer.lu, layer.bias, layer._slopes(), layer.sign, layer.permutation)
                    for layer in self._layers()
                ]
                if reversible.applies(x, parts):
                    return reversible.run(x, parts, inverse=inverse, logabsdet=logabsdet)
            return self._run_each(x, inverse=inverse, logabsdet=logabsdet)

    def _run_each(self, x: Tensor, *, inverse: bool, logabsdet: bool) -> tuple[Tensor, Tensor | None]:
        """The layers called one by one, each keeping what its own backward needs."""
        total = None
        for layer in reversed(self._layers()) if inverse else self._layers():
            if logabsdet:
                x, share = (layer.inverse_and_logabsdet if inverse else layer.forward_and_logabsdet)(x)
                total = share if total is None else total + share
            else:
                x = layer.inverse(x) if inverse else layer(x)
        return x, total

    def _common_slopes(self) -> Slopes | None:
        """The slopes of all active layers as ``functional.net`` takes them, or None if it does not take
        these layers: what it computes, they compute."""
        layers = self._layers()
        if len(layers) < 2 or not all(map(_is_plain, layers)) or layers[-1].activation is not None:
            return None
        first = layers[0]
        alike = all(
            layer.permutation is None
            and layer.lu.shape == first.lu.shape
            and layer.lu.dtype == first.lu.dtype
            and (layer.bias is None) == (first.bias is None)
            for layer in layers
        )
        slopes = [layer._slopes() for layer in layers[:-1]]
        learnt = [each for each in slopes if isinstance(each, Tensor)]
        if not alike or slopes[0] is None:
            return None
        if not learnt:
            return slopes[0] if all(each == slopes[0] for each in slopes) else None
        same = len(learnt) == len(slopes) and all(each.shape == learnt[0].shape for each in learnt)
        return torch.stack(learnt) if same else None

    def _run_as_one(
        self, x: Tensor, slopes: Slopes, *, inverse: bool, logabsdet: bool
    ) -> tuple[Tensor, Tensor | None]:
        """All layers in one operation, which keeps nothing between them."""
        layers = self._layers()
        return functional.net(
            x,
            torch.stack([layer.lu for layer in layers]),
            None if layers[0].bias is None else torch.stack([cast(Tensor, layer.bias) for layer in layers]),
            sign=torch.stack([layer.sign for layer in layers]),
            slopes=slopes,
            inverse=inverse,
            logabsdet=logabsdet,
        )

    def _invertible(self, x: Tensor) -> Tensor:
        """x in a dtype that inversion can be trusted in; low precision from autocast is widened."""
        dtype = self._layers()[0].dtype
        if dtype not in reversible.DTYPES:
            raise TypeError(
                f"memory='reversible' needs a float32 or float64 net, not {dtype}, in which inversion "
                "loses what gradients need; set memory='saved', or keep float32 parameters and use autocast"
            )
        lowered = reference.autocast_enabled(x) and x.is_floating_point() and x.dtype != torch.float64
        return x.to(dtype) if lowered else x

    def as_transform(self) -> InvertibleTransform:
        """f as a ``torch.distributions`` transform of vectors [D]."""
        return InvertibleTransform(self)

    def condition(self, x: Tensor | None = None) -> Condition:
        """How many digits a round trip through each layer can lose, and how many one keeps on x; O(M·D³).

        Args:
            x: data [..., D] on which the activations' slopes are taken and a round trip is measured; None
                takes the slopes' full range, and measures on 64 rows of standard normal numbers.

        Warns:
            ConditionWarning: a round trip keeps less than half of the digits of the parameters' dtype in its
                worst row: 3.5 of 6.9 in float32, 7.8 of 15.7 in float64, 1.1 of 2.1 in bfloat16. The other
                half is still there then.
        """
        report = []
        where, rows = ("x", x) if x is not None and x.numel() else self._normal_rows()
        with torch.no_grad():
            kept = self._digits_kept(rows)
            for index, layer in enumerate(self._layers()):
                lower, upper = (t.double() for t in reference.factors(layer.lu, layer.sign))
                slope = (1.0, 1.0)
                if layer.activation is not None:
                    a, c, kappa = layer.activation.slope_values()
                    low, high = a, a + c
                    if x is not None and x.numel():
                        h = reference.affine(x, layer.lu, layer.bias, layer.sign, layer.permutation)
                        low = high = a + c * torch.sigmoid(kappa * h.double())
                    slope = (float(low.min()), float(high.max()))
                report.append(LayerCondition(f"layers.{index}", _kappa_1(lower), _kappa_1(upper), *slope))
                if x is not None:
                    x = layer(x)
        dtype = self._layers()[0].dtype
        condition = Condition(tuple(report), -math.log10(torch.finfo(dtype).eps), kept)
        if not condition.is_good:
            # NaN, which compares with nothing, is the worst.
            worst = max(report, key=lambda each: (math.isnan(each.digits_lost), each.digits_lost))
            warnings.warn(
                f"a round trip of {where} keeps {max(kept, 0):.1f} of {condition.digits:.1f} digits in "
                f"{dtype}; {worst.name} can lose most, {worst.digits_lost:.1f}: compute in a wider dtype, or "
                "train with a lower rate, weight decay on the layers, fewer layers or a larger alpha",
                ConditionWarning,
                stacklevel=2,
            )
        return condition

    def _normal_rows(self) -> tuple[str, Tensor]:
        """Their name, and 64 rows, the same at each call."""
        like = self._layers()[0]
        rows = torch.randn(64, self.features, generator=torch.Generator().manual_seed(0))
        return "standard normal rows", rows.to(like.lu.device, like.dtype)

    def _digits_kept(self, x: Tensor) -> float:
        """Decimal digits that f⁻¹(f(x)) has in its worst row, -inf where it is not finite.

        A row's error is taken beside its own length or the mean one, whichever is greater, since a row that
        happens to lie near 0 says nothing; where all are 0, beside 1.
        """
        with reference.without_autocast(x):
            error = (self.inverse(self.forward(x)).double() - x.double()).norm(dim=-1)
        lengths = x.double().norm(dim=-1)
        worst = float((error / torch.maximum(lengths, lengths.mean() or lengths.new_ones(()))).max())
        if not math.isfinite(worst):
            return -math.inf
        return -math.log10(worst) if worst > 0 else math.inf


def _is_plain(layer: nn.Module) -> bool:
    """Whether calling the layer does nothing but compute an ``LUDense``."""
    hooked = (
        layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks
    )
    return isinstance(layer, LUDense) and type(layer).forward is LUDense.forward and not hooked


def _whiten(layer: LUDense, x: Tensor) -> Tensor:
    """Set A and b of a layer so that h = A x + b is white on x [N, D], float64; return φ(h)."""
    count, features = x.shape
    mean = x.mean(0)
    covariance = torch.cov(x.mT).reshape(features, features)
    # A constant coordinate has no scale of its own; beside the others it is left as it is.
    scale = covariance.diagonal().mean().clamp_min(torch.finfo(x.dtype).tiny)
    covariance = torch.lerp(
        covariance, scale * torch.eye(features, dtype=x.dtype, device=x.device), features / (features + count)
    )
    values, vectors = torch.linalg.eigh(covariance)
    root = torch.linalg.cholesky((vectors / values.sqrt()) @ vectors.mT)
    diagonal = root.diagonal()
    # diag(s) L U = (diag(s) L diag(s)) (diag(s) U)
    signs = layer.sign.to(x.dtype)
    unit_lower = signs.unsqueeze(-1) * (root / diagonal) * signs
    upper = (signs * diagonal).unsqueeze(-1) * root.mT
    layer.lu.copy_(unit_lower.tril(-1) + upper.triu(1) + torch.diag(2.0 * diagonal.log()))
    weight = reference.lu_weight(layer.lu.double(), layer.sign.double(), layer.permutation)
    cast(Tensor, layer.bias).copy_(-(weight @ mean))
    h = (x - mean) @ weight.mT
    slopes = layer._slopes()
    return h if slopes is None else reference.leaky_softplus(h, slopes)


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
    digits_kept: float
    """Digits that a round trip kept in the worst of the rows that it was measured on; -inf where it was not
    finite."""

    @property
    def is_good(self) -> bool:
        """Whether the round trip that was measured kept half of the digits or more."""
        return self.digits_kept >= self.digits / 2

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
        lines.append(f"measured, it keeps {self.digits_kept:.1f}")
        return "\n".join(lines)

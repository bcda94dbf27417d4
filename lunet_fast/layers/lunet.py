"""LUNet: a stack of LU layers, the last one linear, (2.7) and (2.8)."""

from __future__ import annotations

import copy
import math
import warnings
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from lunet_fast import functional
from lunet_fast.layers import planned, reversible, small
from lunet_fast.layers.activations import BijectiveActivation, LeakySoftplus, call, is_replaced
from lunet_fast.layers.arguments import check_dtype, check_tensor, checked_size
from lunet_fast.layers.cached import usable
from lunet_fast.layers.lu_dense import LUDense
from lunet_fast.layers.sharded import gathers
from lunet_fast.layers.transforms import InvertibleTransform
from lunet_fast.ops import dispatch, reference
from lunet_fast.ops.precision import autocast_enabled, without_autocast
from lunet_fast.ops.values import Activation, Matrix

#: What ``LUNet`` keeps for backward: every layer's input, or only the result.
MEMORY = ("saved", "reversible")

#: How ``LUNet`` may mix the order of coordinates between layers.
PERMUTATIONS = ("reverse", "random")

#: The signs that the diagonals of U may have.
SIGNS = ("positive", "negative", "random")


#: Layers of a net that starts at scale 1 whatever it does to unit normal data.
SHALLOW = 4

#: What the activations of a deeper one may change log φ′ by on unit data, in all.
START_BEND = 0.3

#: How far from 0 a deep net may start its activations.
MOST_POINT = 17


class ConditionWarning(UserWarning):
    """The inverse of a net has lost digits: ``LUNet.condition`` says how many, and in which layer."""


class LUNet(planned.Planned):
    """f = A_M ∘ φ ∘ A_{M−1} ∘ … ∘ φ ∘ A_1 with affine A_m: invertible, its Jacobian's determinant in O(M·D).

    With an ``input`` ψ, f = A_M ∘ φ ∘ … ∘ A_1 ∘ ψ.

    f starts near the identity: each layer after an activation undoes the activation's tangent at 0. With more
    than 4 layers it stays near it on unit data however many there are: off-diagonals fall as 1/√M, and biases
    move the data to where the activations hardly bend it, for LeakySoftplus to the right by about log M.
    Without biases it does not.

    Args:
        features: D.
        layers: M ≥ 1; the first M − 1 have the activation, the last is linear.
        activation: copied for each layer, so learnable slopes are learnt a layer each.
        bias, device, dtype: as in ``LUDense``.
        memory: "saved" or "reversible", see below; the attribute of that name may be set at any time.
        permutation: the order in which each layer but the last gives its coordinates to the next: "reverse",
            "random" (drawn from ``structure_seed``), or None for their own. f then starts near the product of
            the permutations.
        signs: of the diagonals of U, which training keeps: "positive"; "negative" in every layer, so that
            each layer turns its coordinates round and the activations, which are convex, bend them to
            alternate sides; "random", drawn for each coordinate of each layer. f then starts near a diagonal
            matrix of signs.
        structure_seed: what random permutations and signs are drawn from, and nothing else is, so that nets
            made in several processes, each with a seed of its own for the weights, are of one structure.
        input: ψ, a ``BijectiveActivation`` before the first matrix, or None; copied. A ``MonotoneSpline``
            whose ``fit_range`` has seen the data bends each of its coordinates to what the layers can carry.

    Raises:
        ValueError: features or layers below 1, or memory, permutation or signs is not one of its values.
        TypeError: features, layers or structure_seed is not an int, input no ``BijectiveActivation``, or
            dtype not one of ``LUDense``'s.

    Shapes: every method takes [..., D]. Cost for N rows: M times that of ``LUDense``. NaN and infinities pass
    as through ``LUDense``.

    Memory. "saved" keeps each layer's input and pre-activation for backward, about 2·M·N·D numbers.
    "reversible" keeps only the result, N·D (and the input's, if there is one), and up to 32 rows of each
    layer's input; backward recovers the inputs by inversion and recomputes a layer at a time, about 7·N·D
    numbers at once whatever M. A training step then takes longer, by what inversion and recomputing cost.

    The kept rows are compared with the recovered ones, and once inversion has lost half of the digits
    backward raises RuntimeError rather than give wrong gradients. Each layer loses some: by ``condition()``,
    and at least the activation's slopes apart, so depth is limited: not that of a fresh net, which hardly
    bends its data, but of a trained one whose data reach where the slopes are apart.

    "reversible" computes in float32 or float64, under autocast too; a bfloat16 or float16 net raises
    TypeError. Under ``torch.compile`` and ``torch.func``, in forward mode, and where a layer has hooks of
    its own (those of FSDP, for one) or is not a plain ``LUDense``, layers are called one by one, as "saved".

    What is replaced in a layer or in its activation, a method in a subclass or on the object, is called, and
    so are hooks on them and on all modules: then layers are called one by one too. Hooks see what PyTorch
    shows them: the call ``layer(x)``, which is the forward pass without a log-determinant.
    """

    input: BijectiveActivation | None

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
        structure_seed: int = 0,
        input: BijectiveActivation | None = None,  # noqa: A002
    ) -> None:
        super().__init__()
        check_dtype("dtype", torch.get_default_dtype() if dtype is None else dtype)
        features, layers = checked_size("features", features), checked_size("layers", layers)
        if permutation is not None and permutation not in PERMUTATIONS:
            raise ValueError(
                f"permutation must be one of {', '.join(PERMUTATIONS)} or None, got {permutation!r}"
            )
        self.features = features
        self.memory = memory
        if signs not in SIGNS:
            raise ValueError(f"signs must be one of {', '.join(SIGNS)}, got {signs!r}")
        self.signs = signs
        if input is not None and not isinstance(input, BijectiveActivation):
            raise TypeError(f"input must be a BijectiveActivation or None, got {type(input).__name__}")
        own_input = None if input is None else copy.deepcopy(input).to(device=device, dtype=dtype)
        self.register_module("input", own_input)
        activation = LeakySoftplus(0.1) if activation is None else activation
        # By a generator of its own, on the CPU, whatever the net's device.
        generator = torch.Generator("cpu").manual_seed(checked_size("structure_seed", structure_seed, 0))
        self.structure_seed = structure_seed
        orders: list[Tensor | None] = [None] * layers
        if permutation == "reverse":
            orders[:-1] = [torch.arange(features - 1, -1, -1, device="cpu") for _ in orders[:-1]]
        elif permutation == "random":
            orders[:-1] = [torch.randperm(features, generator=generator, device="cpu") for _ in orders[:-1]]
        own = [copy.deepcopy(activation).to(device=device, dtype=dtype) for _ in range(layers - 1)]
        self.layers = nn.ModuleList(
            LUDense(features, bias=bias, device=device, dtype=dtype, activation=each, permutation=order)
            for each, order in zip([*own, None], orders, strict=True)
        )
        before: BijectiveActivation | None = None
        point, scale = _start_of(activation, features, layers) if bias else (0.0, 1.0)
        for layer in self._layers():
            layer._start_noise = 0.1 * math.sqrt(min(1.0, SHALLOW / layers))
            if signs != "positive":
                drawn = torch.randint(2, (features,), generator=generator, device="cpu")
                layer._start_sign = -torch.ones_like(drawn) if signs == "negative" else 2 * drawn - 1
            layer._start_after = None if before is None else before.tangent_at(point, features)
            before = layer.activation
            layer._start_point = 0.0 if before is None else point
        self._layers()[0]._start_scale, self._layers()[-1]._start_scale = scale, 1.0 / scale
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start near the identity: u_ii = 1/φ′(p) and b = −A φ(p)·1 after an activation, so that f(0) = 0.

        p, which is added to b before an activation, is 0 up to 4 layers.

        With other signs, near a diagonal matrix of them, those that the net was made with. Learnable slopes
        go back to where they started. Same as ``reset_parameters`` of each layer and each activation.
        """
        for layer in self._layers():
            layer.reset_parameters()
            if layer.activation is not None:
                layer.activation.reset_parameters()
        if self.input is not None:
            self.input.reset_parameters()

    def __setstate__(self, state: dict[str, Any]) -> None:
        state["_modules"].setdefault("input", None)  # pickled before there was one
        super().__setstate__(state)

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
                finite; a layer has no bias, or one with a parametrisation that has no ``right_inverse``.
        """
        check_tensor("x", x)
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
        for layer in layers:
            layer._check_writable("lu")
            layer._check_writable("bias")
        rows = rows.to(layers[0].lu.device, torch.float64)
        with torch.no_grad(), without_autocast(rows):
            if self.input is not None:
                rows = self.input(rows)
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
        """f or its inverse at x, and its log-determinant if asked for."""
        check_tensor("y" if inverse else "x", x)
        if self._modules["input"] is None:  # as every call asks
            return self._run_layers(x, inverse=inverse, logabsdet=logabsdet)
        assert self.input is not None
        if inverse:
            x, total = self._run_layers(x, inverse=True, logabsdet=logabsdet)
            x, share = call(self.input, x, inverse=True, logabsdet=logabsdet)
        else:
            x, share = call(self.input, x, inverse=False, logabsdet=logabsdet)
            x, total = self._run_layers(x, inverse=False, logabsdet=logabsdet)
        return x, None if total is None or share is None else total + share

    def _run_layers(self, x: Tensor, *, inverse: bool, logabsdet: bool) -> tuple[Tensor, Tensor | None]:
        """``_run`` of the layers: here it is decided how."""
        if self._memory == "saved" and self._on_kernels(x):
            members = tuple(self._modules["layers"]._modules.values())  # type: ignore[union-attr]
            found = planned.run(self, members, x, inverse=inverse, logabsdet=logabsdet)
            if found is not None:
                return found
        if self._layers()[0]._kept is not None and usable(self._layers()[0], x):
            return self._run_each(x, inverse=inverse, logabsdet=logabsdet)
        if self.memory == "saved":
            layers = self._layers()
            if all(map(_is_plain, self.layers)):
                if not inverse and small.takes(x, layers):
                    return small.net(x, layers, logabsdet=logabsdet)
                if inverse and small.takes_inverse(x, layers):
                    found = small.inverse_net(x, layers, logabsdet=logabsdet)
                    if found is not None:
                        return found
            one = self._as_one(x) if dispatch.fuses_net(x) else None
            if one is not None:
                return functional.net(x, *one, inverse=inverse, logabsdet=logabsdet)
            return self._run_each(x, inverse=inverse, logabsdet=logabsdet)
        # What is computed must not depend on whether a gradient is recorded: one precision for all.
        x = self._invertible(x)
        with without_autocast(x):
            if all(map(_is_plain, self.layers)):
                parts = [
                    reversible.Layer(
                        layer._matrix(), layer._fused() or cast(BijectiveActivation, layer.activation)
                    )
                    for layer in self._layers()
                ]
                run = reversible.run if reversible.applies(x, parts) else reversible.each
                return run(x, parts, inverse=inverse, logabsdet=logabsdet)
            return self._run_each(x, inverse=inverse, logabsdet=logabsdet)

    def _run_each(self, x: Tensor, *, inverse: bool, logabsdet: bool) -> tuple[Tensor, Tensor | None]:
        """The layers called one by one, each keeping what its own backward needs."""
        total = None
        for layer in reversed(self._layers()) if inverse else self._layers():
            gathers(layer)
            if logabsdet:
                x, share = (layer.inverse_and_logabsdet if inverse else layer.forward_and_logabsdet)(x)
                total = share if total is None else total + share
            else:
                x = layer.inverse(x) if inverse else layer(x)
        return x, total

    def _on_kernels(self, x: Tensor) -> bool:
        return dispatch.fuses_net(x)

    def _prepared(self, x: Tensor, *, inverse: bool, many: bool) -> Any:
        one = self._as_one(x)
        prepare = dispatch.implementation("triton", "prepare_net")
        return None if one is None else prepare(x, *one, inverse=inverse)

    def _as_one(self, x: Tensor) -> tuple[Matrix, Activation] | None:
        """All layers as one operation, ``functional.net``, takes them for x, or None if it does not take
        these layers: what it computes, they compute."""
        layers = self._layers()
        if len(layers) < 2 or not all(map(_is_plain, layers)) or layers[-1].activation is not None:
            return None
        parts = [layer._matrix() for layer in layers]
        lu, bias = parts[0].lu, parts[0].bias
        alike = all(
            part.permutation is None
            and part.lu.shape == lu.shape
            and part.lu.dtype == lu.dtype
            and (part.bias is None) == (bias is None)
            for part in parts
        )
        given = [layer._fused() for layer in layers[:-1]]
        described = [phi for phi in given if phi is not None and not phi.linear and dispatch.fuses(x, phi)]
        if not alike or len(described) < len(given):
            return None
        fixed = {phi._replace(parameters=None) for phi in described}
        shapes = {None if phi.parameters is None else phi.parameters.shape for phi in described}
        if len(fixed) > 1 or len(shapes) > 1:
            return None
        learnt = [phi.parameters for phi in described if phi.parameters is not None]
        phi = described[0]._replace(parameters=torch.stack(learnt) if learnt else None)
        stacked = (None if each[0] is None else torch.stack(each) for each in zip(*parts, strict=True))
        return Matrix(*stacked), phi  # type: ignore[arg-type]

    def _invertible(self, x: Tensor) -> Tensor:
        """x in a dtype that inversion can be trusted in; low precision from autocast is widened."""
        dtype = self._layers()[0].dtype  # a replica of DataParallel has no parameters()
        if dtype not in reversible.DTYPES:
            raise TypeError(
                f"memory='reversible' needs a float32 or float64 net, not {dtype}, in which inversion "
                "loses what gradients need; set memory='saved', or keep float32 parameters and use autocast"
            )
        lowered = autocast_enabled(x) and x.is_floating_point() and x.dtype != torch.float64
        return x.to(dtype) if lowered else x

    def as_transform(self) -> InvertibleTransform:
        """f as a ``torch.distributions`` transform of vectors [D]."""
        return InvertibleTransform(self)

    def condition(self, x: Tensor | None = None) -> Condition:
        """How many digits a round trip through each layer can lose, and how many one keeps on x; O(M·D³).

        Args:
            x: data [..., D] on which the activations' slopes are taken and a round trip is measured; None
                takes the slopes' full range, and measures on 64 rows of standard normal numbers.

        Raises:
            TypeError: a parameter is a DTensor, as FSDP2 makes them.

        Warns:
            ConditionWarning: a round trip keeps less than half of the digits of the parameters' dtype in its
                worst row: 3.5 of 6.9 in float32, 7.8 of 15.7 in float64, 1.1 of 2.1 in bfloat16. The other
                half is still there then.
        """
        if x is not None:
            check_tensor("x", x)
        for name, parameter in self.named_parameters():
            if hasattr(parameter, "placements"):
                raise TypeError(
                    f"{name} is a DTensor, of which this process has a part: load the whole state, as of "
                    "torch.distributed.checkpoint.state_dict.get_model_state_dict with full_state_dict=True, "
                    "into a plain net and ask that"
                )
        report = []
        where, rows = ("x", x) if x is not None and x.numel() else self._normal_rows()
        with torch.no_grad():
            kept = self._digits_kept(rows)
            if self.input is not None:
                slope = self._slope_range(self.input, x)
                report.append(LayerCondition("input", 1.0, 1.0, *slope))
                x = None if x is None else self.input(x)
            for index, layer in enumerate(self._layers()):
                lower, upper = (t.double() for t in reference.factors(layer.lu, layer.sign))
                slope = (1.0, 1.0)
                if layer.activation is not None:
                    h = reference.affine(x, layer._matrix()) if x is not None and x.numel() else None
                    slope = self._slope_range(layer.activation, h)
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

    def _slope_range(self, activation: BijectiveActivation, h: Tensor | None) -> tuple[float, float]:
        """(least, greatest) φ′ on h, or of all if there are no rows."""
        if h is None or not h.numel():
            return activation.derivative_range(self.features)
        low, high = activation.log_derivative(h.double()).aminmax()
        return math.exp(low), math.exp(high)

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
        with without_autocast(x):
            error = (self.inverse(self.forward(x)).double() - x.double()).norm(dim=-1)
        lengths = x.double().norm(dim=-1)
        worst = float((error / torch.maximum(lengths, lengths.mean() or lengths.new_ones(()))).max())
        if not math.isfinite(worst):
            return -math.inf
        return -math.log10(worst) if worst > 0 else math.inf


def _start_of(activation: BijectiveActivation, features: int, layers: int) -> tuple[float, float]:
    """(p, ε) of a deep net, which starts as (1/ε)·g(ε x) with the data of g's activations around p.

    What the layers bend adds up. So p is the first of 0, 1, 2, … around which all together bend unit data
    less than ``START_BEND``, since few get straighter to the left: LeakySoftplus does as e^−p. Where none is,
    ε falls by halves, as any function gets straighter the closer one looks. That moves biases further than
    the data by a step of training, and so comes second.
    """

    def bend(point: float, deviation: float) -> float:
        return (layers - 1) * activation.bend_around(point, deviation, features)

    if layers <= SHALLOW:
        return 0.0, 1.0
    point = next((float(p) for p in range(MOST_POINT) if bend(float(p), 1.0) <= START_BEND), None)
    if point is not None:
        return point, 1.0
    scale = 1.0
    while scale > 1e-6 and bend(0.0, scale) > START_BEND:  # which a function with a kink at 0 never ends
        scale /= 2.0
    return 0.0, scale


def _is_plain(layer: nn.Module) -> bool:
    """Whether calling the layer does nothing but compute an ``LUDense``: no method of it is replaced, and
    nothing hangs on it."""
    return isinstance(layer, LUDense) and not is_replaced(layer, LUDense)


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
    packed = unit_lower.tril(-1) + upper.triu(1) + torch.diag(2.0 * diagonal.log())
    layer._write("lu", packed)
    # The next layer sees what this one computes, with lu as its dtype holds it.
    held = packed.to(layer.lu.dtype).double()
    weight = reference.lu_weight(held, layer.sign.double(), layer.permutation)
    layer._write("bias", -(weight @ mean))
    h = (x - mean) @ weight.mT
    return h if layer.activation is None else layer.activation(h)


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

"""LUDense: a square linear layer stored as its LU factorisation, with an optional bijective activation."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lunet_fast import functional
from lunet_fast.layers import planned, small
from lunet_fast.layers.activations import BijectiveActivation, call, fused_of
from lunet_fast.layers.arguments import check_dtype, check_tensor, checked_size
from lunet_fast.layers.cached import usable
from lunet_fast.layers.readonly import ReadOnlyTensor, read_only
from lunet_fast.layers.structure import StructuredLayer
from lunet_fast.layers.transforms import InvertibleTransform
from lunet_fast.ops import dispatch
from lunet_fast.ops.cpu.matrix import Packed, dense_inverse
from lunet_fast.ops.precision import LOG_DIAGONAL_BOUND, wide
from lunet_fast.ops.values import IDENTITY, Activation, Matrix


class Weight(ReadOnlyTensor):  # type: ignore[metaclass]
    """``LUDense.weight``."""

    advice = (
        "LUDense.weight is formed from lu at each access, and what is written to it is lost. Write to lu, or "
        "convert a linear layer that has the weight with LUDense.from_linear; weight.clone() may be changed"
    )


class LUDense(StructuredLayer, planned.Planned):
    """y = φ(A x + b) with A = Pᵀ L U, (2.1): a drop-in for a square ``nn.Linear`` that can be inverted.

    It has as many parameters as ``nn.Linear``: one parameter ``lu`` [D, D] (strict lower triangle L, strict
    upper triangle U, diagonal s with u_ii = sign_i·exp(s_i)) and ``bias`` [D]. The signs ``sign`` [D] and the
    row permutation ``permutation`` [D] are buffers; see ``lunet_fast.layers.structure`` for what averaging
    can do to them. u_ii cannot reach zero: exp is positive, and |s_i| beyond 80 (700 in float64) counts as
    that bound. The exponential makes log|det A| = Σ s_i linear in the parameters, and weight decay pulls A
    towards the identity instead of towards a singular matrix.

    In bfloat16 and float16, by ``dtype`` or by ``.to()``, rows come in and go out in that dtype and products
    are taken in it, but the parameters stay float32: an error in one factor reaches A multiplied by the
    other, ‖|L||U|‖/‖A‖ times, which grows with D for ``nn.Linear``'s initial weights. The attribute ``dtype``
    is the rows'.

    The layer starts at A = I + O(0.1/√D) with b = 0.

    Args:
        in_features: D.
        out_features: D again, if given: only square layers are invertible.
        bias: learn an additive b.
        device, dtype: as in ``nn.Linear``; for bfloat16 and float16 see above.
        activation: a ``BijectiveActivation``, or None for an affine layer.
        permutation: [D] int64, the rows of P: (P A)[i] = A[permutation[i]]; None for no permutation.

    Shapes: every method takes [..., D] with any leading shape, none and empty ones included.

    NaN and infinities are no errors: a row that holds one comes out without a finite number, forward and
    inverse, an infinity perhaps as NaN, and reaches no other row. A NaN in a parameter is in every row of the
    results that depend on it.

    Cost for N rows: forward and inverse 2·N·D² flops (plus 2·D³/3 when N > D), log-determinant O(D) a row.

    Raises:
        ValueError: out_features differs from in_features, D < 1, or permutation is not one of 0..D−1; later,
            where the layer is used, signs other than ±1 or a permutation that is none were written to it, as
            by a mean of layers with different ones.
        TypeError: in_features is not an int, activation is no ``BijectiveActivation``, or dtype is not one of
            float64, float32, bfloat16 and float16.
    """

    lu: nn.Parameter

    # How reset_parameters starts, other than from the identity: the signs; (φ(p), φ′(p)) of an activation
    # before this layer that it undoes; the p of its own; a factor of A; and √D times the deviation of A's
    # other entries. An LUNet sets them.
    _start_sign: Tensor | None = None
    _start_after: tuple[Tensor | float, Tensor | float] | None = None
    _start_point: float = 0.0
    _start_scale: float = 1.0
    _start_noise: float = 0.1

    def __init__(
        self,
        in_features: int,
        out_features: int | None = None,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        activation: BijectiveActivation | None = None,
        permutation: Tensor | None = None,
    ) -> None:
        super().__init__()
        in_features = checked_size("in_features", in_features)
        if out_features is not None and out_features != in_features:
            raise ValueError(
                f"out_features must equal in_features for an invertible layer, got {in_features} and "
                f"{out_features}; use nn.Linear where the width changes"
            )
        check_dtype("dtype", torch.get_default_dtype() if dtype is None else dtype)
        if activation is not None and not isinstance(activation, BijectiveActivation):
            raise TypeError(
                f"activation must be a BijectiveActivation or None, got {type(activation).__name__}; another "
                "function may not be invertible"
            )
        self.in_features = in_features
        self.out_features = in_features
        dtype = torch.get_default_dtype() if dtype is None else dtype
        stored = wide(dtype)
        self.lu = nn.Parameter(torch.empty(in_features, in_features, device=device, dtype=stored))
        if bias:
            self.bias: nn.Parameter | None = nn.Parameter(
                torch.empty(in_features, device=device, dtype=stored)
            )
        else:
            self.register_parameter("bias", None)
        self._make_structure(device, dtype, permutation)
        self.activation = activation
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start near the identity: off-diagonals N(0, (0.1/√D)²), u_ii = 1, b = 0. P is kept.

        A layer of an ``LUNet`` starts as the net does: with its signs, undoing the activation before it, and
        in a deep net with smaller off-diagonals, and where its own activation is straight.
        So the net and its layers may be reset in any order, also after ``to_empty``. An activation has a
        ``reset_parameters`` of its own. With parameters that are DTensors, those of FSDP2, every process must
        call this: they take the numbers of the mesh's first one.
        """
        features = self.in_features
        with torch.no_grad():
            self._reset_structure(self._start_sign)
            if self.lu.is_meta:
                return  # no numbers; signs may have some, as under accelerate's init_empty_weights
            lu = torch.empty(features, features, device=self.lu.device, dtype=self.lu.dtype)
            lu.normal_(0.0, self._start_noise / math.sqrt(features)).fill_diagonal_(0.0)
            bias = torch.zeros(features, device=lu.device, dtype=lu.dtype)
            if self._start_after is not None:
                value, slope = (torch.as_tensor(t, dtype=torch.float64) for t in self._start_after)
                logs = -slope.log().expand(features)
                lu = lu.tril(-1) + lu.triu(1) / slope.to(lu) + torch.diag(logs.to(lu))
                weight = functional.lu_weight(lu, *self._structure())
                bias = -(weight @ value.to(lu) if value.dim() else value.to(lu) * weight.sum(-1))
            if self._start_scale != 1.0:  # A's and b's: that of U
                lu += lu.triu(1) * (self._start_scale - 1.0)
                lu.diagonal().add_(math.log(self._start_scale))
                bias *= self._start_scale
            bias += self._start_point
            self._write("lu", lu)
            if self.bias is not None:
                self._write("bias", bias)

    @property
    def dtype(self) -> torch.dtype:
        """Of the rows; the parameters' too, unless it is bfloat16 or float16, where they are float32."""
        return self._buffers["sign"].dtype  # type: ignore[union-attr]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        parameters = [p for p in self._parameters.values() if p is not None]
        own = {id(t) for p in parameters for t in (p, p.grad) if t is not None}

        def moved(tensor: Tensor) -> Tensor:
            found = fn(tensor)
            if found.is_complex():
                check_dtype("dtype", found.dtype)
            stored = wide(found.dtype) if found.is_floating_point() else found.dtype
            if id(tensor) not in own or found.dtype == stored or tensor.dtype == found.dtype:
                return found
            return tensor.to(found.device, stored)

        return super()._apply(moved, recurse)

    def _write(self, name: str, value: Tensor) -> None:
        """Give the parameter of this name a value; under ``torch.no_grad``.

        Raises ``ValueError`` where it is parametrised and a parametrisation has no ``right_inverse``.
        """
        parameter = getattr(self, name)
        if parametrize.is_parametrized(self, name):
            self._check_writable(name)
            setattr(self, name, value.to(parameter.dtype))
            return
        if hasattr(parameter, "placements"):
            from torch.distributed.tensor import distribute_tensor

            value = value.to(parameter.dtype)
            value = distribute_tensor(value, parameter.device_mesh, parameter.placements)
        parameter.copy_(value)

    def _check_writable(self, name: str) -> None:
        if not parametrize.is_parametrized(self, name):
            return
        for each in self.parametrizations[name]:  # type: ignore[union-attr, index]
            if not hasattr(each, "right_inverse"):
                raise ValueError(
                    f"{name} is parametrised by {type(each).__name__}, which has no right_inverse, so that a "
                    f"value written to {name} would be lost: give it one, or write before parametrising"
                )

    def _matrix(self) -> Matrix:
        return Matrix(self.lu, *self._structure(), self.bias)

    def _fused(self) -> Activation | None:
        """The activation as the layer's operation takes it, or None if it has to be called."""
        return IDENTITY if self.activation is None else fused_of(self.activation)

    def _run(self, x: Tensor, *, inverse: bool, logabsdet: bool) -> tuple[Tensor, Any]:
        """The layer or its inverse at x, and that direction's log-determinant or None."""
        check_tensor("y" if inverse else "x", x)
        if self._on_kernels(x):
            found = planned.run(self, (self,), x, inverse=inverse, logabsdet=logabsdet)
            if found is not None:
                return found
        if self._kept is not None:
            found = self._run_kept(x, inverse=inverse, logabsdet=logabsdet)
            if found is not None:
                return found
        phi = self._fused()
        if not inverse and phi is not None and small.takes_layer(x, self.lu, phi):
            return small.layer(x, self, phi, logabsdet=logabsdet)
        if phi is not None and dispatch.fuses(x, phi):
            return functional.layer(x, self._matrix(), phi, inverse=inverse, logabsdet=logabsdet)
        activation, share = cast(BijectiveActivation, self.activation), None
        if inverse:
            x, share = call(activation, x, inverse=True, logabsdet=logabsdet)
        x, total = functional.layer(x, self._matrix(), IDENTITY, inverse=inverse, logabsdet=logabsdet)
        if not inverse:
            x, share = call(activation, x, inverse=False, logabsdet=logabsdet)
        return x, None if total is None or share is None else total + share

    def _on_kernels(self, x: Tensor) -> bool:
        return x.dim() > 0 and dispatch.takes_triton(x)

    def _prepared(self, x: Tensor, *, inverse: bool, many: bool) -> Any:
        phi = self._fused()
        if phi is None or not dispatch.fuses(x, phi):
            return None
        learnt = phi.parameters
        if learnt is not None and learnt.dim() > 1 and learnt.shape[-1] != x.shape[-1]:
            return None
        prepare = dispatch.implementation("triton", "prepare_layer")
        return prepare(x, self._matrix(), phi, inverse=inverse, many=many)

    def _run_kept(self, x: Tensor, *, inverse: bool, logabsdet: bool) -> tuple[Tensor, Any] | None:
        """``_run`` with what the layer keeps, within ``cached``; None where it may not or has nothing."""
        kept = usable(self, x)
        lu, bias = self._parameters.get("lu"), self._parameters.get("bias")
        sign, permutation = self._buffers["sign"], self._buffers["permutation"]
        fits = x.dim() and x.shape[-1] == self.in_features and sign is not None and x.dtype == sign.dtype
        if kept is None or lu is None or not fits or "bias" not in self._parameters:
            return None
        sources = lu, sign, permutation
        total = share = None
        if logabsdet:
            total = kept.get("logabsdet", (lu,), self.logabsdet)
            if total is None:
                return None
        if inverse:
            # Not in low precision, where solving with the wide factors is more accurate.
            found = kept.get("inverse", (*sources, bias), self._inverse_map) if x.dtype == lu.dtype else None
            if found is None:
                return None
            if self.activation is not None:
                x, share = call(self.activation, x, inverse=True, logabsdet=logabsdet)
            x = _linear(x, *found)
        else:
            transposed = kept.get("weight", sources, self._transposed)
            if transposed is None:
                return None
            x = _linear(x, transposed, bias if bias is None or bias.dtype == x.dtype else bias.to(x.dtype))
            if self.activation is not None:
                x, share = call(self.activation, x, inverse=False, logabsdet=logabsdet)
        if total is None:
            return x, None
        total = -total if inverse else total
        return x, total + (total.new_zeros(x.shape[:-1]) if share is None else share)

    def _transposed(self) -> Tensor:
        """Aᵀ, a view of A."""
        return self.weight.as_subclass(Tensor).T

    def _inverse_map(self) -> tuple[Tensor, Tensor | None] | None:
        """(A⁻ᵀ, −A⁻¹ b or None); None where products with A⁻¹ would not be accurate."""
        inverse = dense_inverse(Packed.of(self._matrix()))
        if inverse is None:
            return None
        return inverse.T, None if self.bias is None else -(inverse @ self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """φ(A x + b) [..., D]."""
        return self._run(x, inverse=False, logabsdet=False)[0]

    def inverse(self, y: Tensor) -> Tensor:
        """The x [..., D] with forward(x) = y, by φ⁻¹ and triangular substitution."""
        return self._run(y, inverse=True, logabsdet=False)[0]

    def forward_and_logabsdet(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(forward(x), log|det of its Jacobian at x| [...])."""
        return self._run(x, inverse=False, logabsdet=True)

    def inverse_and_logabsdet(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """(inverse(y), log|det of the inverse's Jacobian at y| [...])."""
        return self._run(y, inverse=True, logabsdet=True)

    def logabsdet(self) -> Tensor:
        """log|det A| = Σ log|u_ii|, a scalar, O(D); the activation's share depends on x and is not in it."""
        return functional.lu_logabsdet(self.lu)

    @property
    def weight(self) -> Tensor:
        """A = Pᵀ L U [D, D], formed anew at each access and differentiable. O(D³).

        Read-only: a write to it, to its ``.data`` or to its rows would be lost and raises ``RuntimeError``;
        not within ``torch.compile``, tracing and ``torch.func``, where it is a plain tensor.
        """
        return read_only(functional.lu_weight(self.lu, *self._structure()).to(self.dtype), Weight)

    @classmethod
    def from_linear(cls, linear: nn.Linear, activation: BijectiveActivation | None = None) -> LUDense:
        """The layer with this linear layer's weight and bias, by LU factorisation with row pivoting.

        ``weight`` then equals ``linear.weight`` to rounding, of log u_ii too where weights are far from 1.
        Device, dtype, bias, training mode and whether gradients are wanted are the linear layer's.
        Cost O(D³), once.

        Raises:
            TypeError: not an ``nn.Linear``, or of a dtype that this layer does not have, as complex64.
            ValueError: the weight is not square, not finite, or singular to working precision
                (min|u_ii| ≤ D·eps·max|u_ii|, eps that of float32 or wider), or u_ii lies outside what the
                layer can hold.
        """
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"linear must be an nn.Linear, got {type(linear).__name__}")
        if linear.weight.is_meta:
            raise ValueError(
                "linear is on the meta device and has no numbers to factorise; materialise it first"
            )
        check_dtype("linear.weight", linear.weight.dtype)
        weight = linear.weight.detach()
        rows, columns = weight.shape
        if rows != columns:
            raise ValueError(f"linear must be square, got in_features={columns} and out_features={rows}")
        work = weight.to(wide(weight.dtype))
        if not bool(work.isfinite().all()):
            raise ValueError("linear.weight has entries that are infinite or NaN; it cannot be factorised")
        packed, pivots, _ = torch.linalg.lu_factor_ex(work)  # an exact zero on the diagonal is refused below
        pivot_matrix, _, _ = torch.lu_unpack(packed, pivots, unpack_data=False)
        diagonal = packed.diagonal()
        magnitude = diagonal.abs()
        low, high = float(magnitude.min()), float(magnitude.max())
        # By the precision of the factorisation: low digits of the weight are no error of it.
        if low <= rows * torch.finfo(work.dtype).eps * high:
            raise ValueError(
                f"linear.weight is singular to working precision: |u_ii| from {low:.3g} to {high:.3g}"
            )
        bound = LOG_DIAGONAL_BOUND[work.dtype]
        if max(-math.log(low), math.log(high)) > bound:
            raise ValueError(
                f"linear.weight has |u_ii| from {low:.3g} to {high:.3g}; this layer holds exp(±{bound:g}) in "
                f"{work.dtype}: rescale the weight or use a wider dtype"
            )
        layer = cls(
            columns,
            bias=linear.bias is not None,
            device=weight.device,
            dtype=weight.dtype,
            activation=None if activation is None else activation.to(weight.device, weight.dtype),
        )
        with torch.no_grad():
            layer.lu.copy_(packed)
            layer.lu.diagonal().copy_(magnitude.log())
            layer.sign = diagonal.sign().to(weight.dtype)
            # lu_unpack gives A = M L U, so P = Mᵀ and row i of P A is the row of A where column i of M is 1.
            permutation = pivot_matrix.argmax(0)
            if not bool((permutation == torch.arange(rows, device=permutation.device)).all()):
                layer.permutation = permutation
            if layer.bias is not None:
                layer.bias.copy_(linear.bias)
                layer.bias.requires_grad_(linear.bias.requires_grad)
        layer.lu.requires_grad_(linear.weight.requires_grad)
        return layer.train(linear.training)

    def to_linear(self) -> nn.Linear:
        """An ``nn.Linear`` with weight A and bias b: the affine part, without the activation. O(D³)."""
        linear = nn.Linear(
            self.in_features,
            self.out_features,
            bias=self.bias is not None,
            device=self.lu.device,
            dtype=self.dtype,
        )
        with torch.no_grad():
            linear.weight.copy_(self.weight)
            if self.bias is not None:
                linear.bias.copy_(self.bias)
        return linear

    def as_transform(self) -> InvertibleTransform:
        """This layer as a ``torch.distributions`` transform x → forward(x) of vectors [D]."""
        return InvertibleTransform(self)

    def extra_repr(self) -> str:
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        permuted = "" if self._buffers["permutation"] is None else ", permuted"
        return f"{sizes}, bias={self.bias is not None}{permuted}"

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        missing_keys, error_msgs = args[2], args[4]
        if prefix + "weight" in state_dict and prefix + "lu" not in state_dict:
            error_msgs.append(
                f"'{prefix}weight' is the weight of an nn.Linear, and LUDense stores its LU factors: load it "
                "into an nn.Linear and convert that with LUDense.from_linear(linear)"
            )
            state_dict = {k: v for k, v in state_dict.items() if k != prefix + "weight"}
        super()._load_from_state_dict(state_dict, prefix, *args)
        if error_msgs and prefix + "lu" in missing_keys:
            missing_keys.remove(prefix + "lu")


def _linear(x: Tensor, transposed: Tensor, bias: Tensor | None) -> Tensor:
    """Rows of W x + b from Wᵀ."""
    if bias is None or x.dim() != 2:
        return F.linear(x, transposed.T, bias)
    return torch.addmm(bias, x, transposed)  # what F.linear comes to: of a small layer's call a tenth


LUDense._described = LUDense

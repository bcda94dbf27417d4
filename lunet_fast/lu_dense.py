"""LUDense: a square linear layer stored as its LU factorisation, with an optional bijective activation."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lunet_fast import functional, reference
from lunet_fast.activations import BijectiveActivation
from lunet_fast.reference import Slopes
from lunet_fast.transforms import InvertibleTransform


class LUDense(nn.Module):
    """y = φ(A x + b) with A = Pᵀ L U, (2.1): a drop-in for a square ``nn.Linear`` that can be inverted.

    It has as many numbers as ``nn.Linear``: one parameter ``lu`` [D, D] (strict lower triangle L, strict
    upper triangle U, diagonal s with u_ii = sign_i·exp(s_i)) and ``bias`` [D]. The signs and the row
    permutation P are buffers. u_ii cannot reach zero: exp is positive, and |s_i| beyond 80 (700 in
    float64) counts as that bound. The exponential makes log|det A| = Σ s_i linear in the
    parameters, and weight decay pulls A towards the identity instead of towards a singular matrix.

    In bfloat16 and float16, by ``dtype`` or by ``.to()``, rows come in and go out in that dtype and products
    are taken in it, but the parameters stay float32: an error in one factor reaches A multiplied by the
    other, ‖|L||U|‖/‖A‖ times, which is 20 to 600 for ``nn.Linear``'s initial weights of D = 64 to 1024. The
    attribute ``dtype`` is the rows'.

    The layer starts at A = I + O(0.1/√D) with b = 0.

    Args:
        in_features: D.
        out_features: D again, if given: only square layers are invertible.
        bias: learn an additive b.
        device, dtype: as in ``nn.Linear``; for bfloat16 and float16 see below.
        activation: a ``LeakySoftplus``, a ``GeneralizedLeakySoftplus``, or None for an affine layer.
        permutation: [D] int64, the rows of P: (P A)[i] = A[permutation[i]]; None for no permutation.

    Shapes: every method takes [..., D] with any leading shape, none and empty ones included.

    NaN and infinities are no errors: a row that holds one comes out without a finite number, forward and
    inverse, an infinity perhaps as NaN, and reaches no other row. A NaN in a parameter is in every row of the
    results that depend on it.

    Cost for N rows: forward and inverse 2·N·D² flops (plus 2·D³/3 when N > D), log-determinant O(D) a row.

    Raises:
        ValueError: out_features differs from in_features, D < 1, or permutation is not one of 0..D−1.
        TypeError: activation is not of the two kinds above.
    """

    lu: nn.Parameter
    sign: Tensor
    permutation: Tensor | None

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
        if out_features is not None and out_features != in_features:
            raise ValueError(
                f"out_features must equal in_features for an invertible layer, got {in_features} and "
                f"{out_features}; use nn.Linear where the width changes"
            )
        if in_features < 1:
            raise ValueError(f"in_features must be at least 1, got {in_features}")
        if activation is not None and not isinstance(activation, BijectiveActivation):
            raise TypeError(
                "activation must be LeakySoftplus, GeneralizedLeakySoftplus or None, got "
                f"{type(activation).__name__}; another function may not be invertible"
            )
        self.in_features = in_features
        self.out_features = in_features
        dtype = torch.get_default_dtype() if dtype is None else dtype
        stored = reference.wide(dtype)
        self.lu = nn.Parameter(torch.empty(in_features, in_features, device=device, dtype=stored))
        if bias:
            self.bias: nn.Parameter | None = nn.Parameter(
                torch.empty(in_features, device=device, dtype=stored)
            )
        else:
            self.register_parameter("bias", None)
        self.register_buffer("sign", torch.ones(in_features, device=device, dtype=dtype))
        self.register_buffer("permutation", None)
        self.activation = activation
        self.reset_parameters()
        if permutation is not None:
            self.permutation = _checked_permutation(permutation, in_features).to(device=self.lu.device)

    def reset_parameters(self) -> None:
        """Start near the identity: off-diagonals N(0, (0.1/√D)²), u_ii = 1, b = 0. P is kept."""
        with torch.no_grad():
            self.lu.normal_(0.0, 0.1 / math.sqrt(self.in_features))
            self.lu.fill_diagonal_(0.0)
            self.sign.fill_(1.0)
            if self.bias is not None:
                self.bias.zero_()

    @property
    def dtype(self) -> torch.dtype:
        """Of the rows; the parameters' too, unless it is bfloat16 or float16, where they are float32."""
        return self.sign.dtype

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LUDense:
        parameters = [p for p in self._parameters.values() if p is not None]
        own = {id(t) for p in parameters for t in (p, p.grad) if t is not None}

        def moved(tensor: Tensor) -> Tensor:
            found = fn(tensor)
            stored = reference.wide(found.dtype) if found.is_floating_point() else found.dtype
            if id(tensor) not in own or found.dtype == stored or tensor.dtype == found.dtype:
                return found
            return tensor.to(found.device, stored)

        return super()._apply(moved, recurse)

    def _slopes(self) -> Slopes | None:
        return None if self.activation is None else self.activation.slopes()

    def forward(self, x: Tensor) -> Tensor:
        """φ(A x + b) [..., D]."""
        return functional.lu_dense(
            x, self.lu, self.bias, sign=self.sign, permutation=self.permutation, slopes=self._slopes()
        )

    def inverse(self, y: Tensor) -> Tensor:
        """The x [..., D] with forward(x) = y, by φ⁻¹ and triangular substitution."""
        return functional.lu_dense_inverse(
            y, self.lu, self.bias, sign=self.sign, permutation=self.permutation, slopes=self._slopes()
        )

    def forward_and_logabsdet(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(forward(x), log|det of its Jacobian at x| [...])."""
        return functional.lu_dense_and_logabsdet(
            x, self.lu, self.bias, sign=self.sign, permutation=self.permutation, slopes=self._slopes()
        )

    def inverse_and_logabsdet(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """(inverse(y), log|det of the inverse's Jacobian at y| [...])."""
        return functional.lu_dense_inverse_and_logabsdet(
            y, self.lu, self.bias, sign=self.sign, permutation=self.permutation, slopes=self._slopes()
        )

    def logabsdet(self) -> Tensor:
        """log|det A| = Σ log|u_ii|, a scalar, O(D); the activation's share depends on x and is not in it."""
        return functional.lu_logabsdet(self.lu)

    @property
    def weight(self) -> Tensor:
        """A = Pᵀ L U [D, D], formed anew at each access and differentiable; read-only. O(D³)."""
        return functional.lu_weight(self.lu, self.sign, self.permutation).to(self.dtype)

    @classmethod
    def from_linear(cls, linear: nn.Linear, activation: BijectiveActivation | None = None) -> LUDense:
        """The layer with this linear layer's weight and bias, by LU factorisation with row pivoting.

        ``weight`` then equals ``linear.weight`` to rounding, of log u_ii too where weights are far from 1.
        Device, dtype, bias, training mode and whether gradients are wanted are the linear layer's.
        Cost O(D³), once.

        Raises:
            TypeError: not an ``nn.Linear``.
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
        weight = linear.weight.detach()
        rows, columns = weight.shape
        if rows != columns:
            raise ValueError(f"linear must be square, got in_features={columns} and out_features={rows}")
        work = weight.to(reference.wide(weight.dtype))
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
        bound = reference.LOG_DIAGONAL_BOUND[work.dtype]
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
            layer.sign.copy_(diagonal.sign())
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
        permuted = "" if self.permutation is None else ", permuted"
        return f"{sizes}, bias={self.bias is not None}{permuted}"

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        missing_keys, error_msgs = args[2], args[4]
        if prefix + "weight" in state_dict and prefix + "lu" not in state_dict:
            error_msgs.append(
                f"'{prefix}weight' is the weight of an nn.Linear, and LUDense stores its LU factors: load it "
                "into an nn.Linear and convert that with LUDense.from_linear(linear)"
            )
            state_dict = {k: v for k, v in state_dict.items() if k != prefix + "weight"}
        # P is there only for layers that have one, so a whole layer's state may bring one or take it away.
        given = state_dict.get(prefix + "permutation")
        if given is not None:
            try:
                self.permutation = _checked_permutation(given, self.in_features).to(self.lu.device, copy=True)
            except ValueError as error:
                error_msgs.append(f"{prefix}permutation: {error}")
                state_dict = {k: v for k, v in state_dict.items() if k != prefix + "permutation"}
        elif prefix + "lu" in state_dict:
            self.permutation = None
        super()._load_from_state_dict(state_dict, prefix, *args)
        if error_msgs and prefix + "lu" in missing_keys:
            missing_keys.remove(prefix + "lu")


def _checked_permutation(permutation: Tensor, features: int) -> Tensor:
    if permutation.shape != (features,) or permutation.dtype.is_floating_point:
        raise ValueError(
            f"permutation must be {features} integers, got {permutation.dtype} of shape "
            f"{tuple(permutation.shape)}"
        )
    if not permutation.is_meta:
        expected = torch.arange(features, device=permutation.device)
        if not bool((permutation.sort().values == expected).all()):
            raise ValueError(
                f"permutation must hold each of 0..{features - 1} once, got {permutation.tolist()}"
            )
    return permutation.to(torch.int64)

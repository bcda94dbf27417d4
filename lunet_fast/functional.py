"""LU layers as functions: nothing is stored, every tensor is an argument.

Shapes. x and y are [..., D] with any leading shape, none included; a log-determinant has the leading
shape, ``x.shape[:-1]``, and is float32 or wider. ``lu`` is the packed matrix [D, D] described in
``lunet_fast.ops.reference``, ``sign`` [D] holds the signs of u_ii (all +1 if None), ``permutation`` [D] int64
the rows of P, (P A)[i] = A[permutation[i]], and ``slopes`` the activation's (a, c, κ): three floats, or a
tensor [3] or [3, D] to be learnt; None means no activation.

Stacked layers. With lu [K, D, D], bias and sign [K, D], x is [K, ..., D]: K layers in one call, their slopes
shared and without permutation, forward and its backward as batched products, the inverse one layer after
another. ``torch.func.vmap`` over parameters comes out as this.

dtypes. x has the dtype of ``lu``; or, in bfloat16 and float16, that of ``sign`` beside a float32 ``lu``.
Under autocast x is lowered to the autocast dtype in the forward direction, as for a linear layer; the inverse
is computed in float32 or wider.

Cost, for N rows. Forward: 2·N·D² flops plus 2·D³/3 to form L U when N > D; inverse the same; the
log-determinant O(D) per row on top. Memory: the result, and h = A x + b when gradients are recorded.

``lunet_fast.ops.reference`` has the same functions with the same arguments, written plainly.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import Parameter

from lunet_fast.ops import autograd, reference, tracing
from lunet_fast.ops.precision import autocast_enabled, wide
from lunet_fast.ops.reference import Slopes
from lunet_fast.ops.values import Activation, Matrix, WithLogabsdet

__all__ = [
    "leaky_softplus",
    "leaky_softplus_and_logabsdet",
    "leaky_softplus_inverse",
    "leaky_softplus_inverse_and_logabsdet",
    "lu_dense",
    "lu_dense_and_logabsdet",
    "lu_dense_inverse",
    "lu_dense_inverse_and_logabsdet",
    "lu_logabsdet",
    "lu_weight",
]

lu_weight = reference.lu_weight
lu_logabsdet = reference.lu_logabsdet


def activation_of(slopes: Slopes | None) -> Activation:
    """The activation with these slopes, three floats or a tensor [3] or [3, D]; None for none.

    Raises:
        ValueError: not three slopes, or one that is not above 0.
        TypeError: tensors in a sequence.
    """
    if slopes is None or isinstance(slopes, Tensor):
        return reference.family(slopes)
    if any(isinstance(value, Tensor) for value in slopes):
        raise TypeError("slopes must be three floats or one tensor; torch.stack tensors to learn them")
    if len(slopes) != 3 or not all(value > 0 for value in slopes):
        raise ValueError(f"slopes must be three numbers (a, c, kappa), each above 0, got {tuple(slopes)}")
    return reference.family([float(value) for value in slopes])


def _check_whole(name: str, tensor: Tensor) -> None:
    """Raise ``TypeError`` for what is no tensor, or a part of one."""
    if type(tensor) in (Tensor, Parameter):
        return
    if not isinstance(tensor, Tensor):
        kind = f"{type(tensor).__module__}.{type(tensor).__name__}"
        raise TypeError(f"{name} must be a torch.Tensor, got {kind}; use torch.as_tensor")
    if hasattr(tensor, "placements"):
        raise TypeError(
            f"{name} is a DTensor, with which layers do not compute: give each process rows of its own, as "
            "x.to_local(), and share out parameters by fully_shard, which gathers them for each call"
        )


def _check_floating(name: str, x: Tensor) -> None:
    _check_whole(name, x)
    if not x.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, got {x.dtype}; convert it with .float()")


def _check_device(name: str, x: Tensor, what: str, other: Tensor) -> None:
    if x.device == other.device:
        return
    if other.is_meta:
        fix = (
            "the meta device holds no numbers: materialise the module first; where accelerate has offloaded "
            "it, only calls of it as net(x) bring them back, no other methods"
        )
    else:
        fix = "move one with .to()"
    raise ValueError(f"{name} is on {x.device} and {what} on {other.device}; {fix}")


def _check_slopes(name: str, x: Tensor, phi: Activation) -> None:
    slopes = phi.parameters
    # While being traced, a comparison of shapes is one to warn of.
    if slopes is None or torch._C._get_tracing_state() is not None:
        return
    _check_device(name, x, "the activation's parameters", slopes)
    if slopes.shape == (3,):
        return
    if phi.kind != "leaky_softplus":
        if x.dim() == 0 or slopes.shape[-1] != x.shape[-1]:
            raise ValueError(
                f"x must have {slopes.shape[-1]} features in its last dimension, as its activation has, got "
                f"shape {tuple(x.shape)}"
            )
        return
    if x.dim() == 0 or slopes.shape != (3, x.shape[-1]):
        raise ValueError(f"slopes must be [3] or [3, D] as a tensor, got shape {tuple(slopes.shape)}")


def _check(name: str, x: Tensor, matrix: Matrix) -> None:
    if torch._C._get_tracing_state() is not None:
        with tracing.quiet():
            _check_shapes(name, x, matrix)
    else:
        _check_shapes(name, x, matrix)


def _check_shapes(name: str, x: Tensor, matrix: Matrix) -> None:
    lu, sign, permutation, bias = matrix
    _check_floating(name, x)
    _check_whole("lu", lu)
    if lu.dim() not in (2, 3) or lu.shape[-2] != lu.shape[-1] or lu.shape[0] == 0:
        raise ValueError(f"lu must be square, [D, D] or [K, D, D], got shape {tuple(lu.shape)}")
    if x.dim() == 0 or x.shape[-1] != lu.shape[-1]:
        raise ValueError(
            f"{name} must have {lu.shape[-1]} features in its last dimension, got shape {tuple(x.shape)}"
        )
    if lu.dim() == 3 and (x.dim() < 2 or x.shape[0] != lu.shape[0]):
        raise ValueError(
            f"{name} must be [K, ..., D] for stacked layers, here with K = {lu.shape[0]}, got shape "
            f"{tuple(x.shape)}"
        )
    _check_device(name, x, "lu", lu)
    for what, vector in (("bias", bias), ("sign", sign)):
        if vector is not None and vector.shape != lu.shape[:-1]:
            raise ValueError(
                f"{what} must have shape {tuple(lu.shape[:-1])} beside this lu, got {tuple(vector.shape)}"
            )
        if vector is not None:
            _check_device(what, vector, "lu", lu)
    if sign is not None and sign.requires_grad:
        raise ValueError("sign must not require a gradient: it is +1 or −1, and not learnt")
    if permutation is None:
        return
    if lu.dim() == 3:
        raise ValueError("permutation must be None for stacked layers; call them one by one")
    if permutation.shape != lu.shape[:1] or permutation.is_floating_point():
        raise ValueError(
            f"permutation must be {lu.shape[0]} integers, got {permutation.dtype} of shape "
            f"{tuple(permutation.shape)}"
        )


def _matching(name: str, x: Tensor, matrix: Matrix, *, lower: bool) -> Tensor:
    """x in the dtype to compute in: the autocast dtype if ``lower`` and autocast is on, else its own."""
    lu, sign = matrix.lu, matrix.sign
    if autocast_enabled(x) and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype(x.device.type) if lower else wide(lu.dtype))
    if x.dtype != lu.dtype:
        stored_wide = sign is not None and x.dtype == sign.dtype and wide(x.dtype) == lu.dtype
        if not stored_wide:
            raise TypeError(
                f"{name} is {x.dtype} and the layer's lu is {lu.dtype}; convert one with .to(), or use "
                "autocast"
            )
    return x


def activation(x: Tensor, phi: Activation, *, inverse: bool, logabsdet: bool) -> WithLogabsdet:
    """(φ(x), Σ log φ′(x) or None) or, with ``inverse``, (φ⁻¹(x), the log-determinant of φ⁻¹ at x or None)."""
    argument = "y" if inverse else "x"
    _check_floating(argument, x)
    _check_slopes(argument, x, phi)
    name = "activation_inverse" if inverse else "activation_forward"
    return autograd.apply(name, x, None, phi, logabsdet)


def layer(x: Tensor, matrix: Matrix, phi: Activation, *, inverse: bool, logabsdet: bool) -> WithLogabsdet:
    """(φ(A x + b), its log|det| or None) or, with ``inverse``, the same of A⁻¹ (φ⁻¹(x) − b); raises as
    ``lu_dense``."""
    argument = "y" if inverse else "x"
    _check(argument, x, matrix)
    _check_slopes(argument, x, phi)
    x = _matching(argument, x, matrix, lower=not inverse)
    name = "layer_inverse" if inverse else "layer_forward"
    return autograd.apply(name, x, matrix, phi, logabsdet)


def net(x: Tensor, matrix: Matrix, phi: Activation, *, inverse: bool, logabsdet: bool) -> WithLogabsdet:
    """(f(x) or, with ``inverse``, f⁻¹(x), and that direction's log-determinant [...] or None).

    f is M layers one after another, the last one linear: lu is [M, D, D], bias and sign [M, D], and the
    activation that of the M − 1 others, its parameters with a leading dimension of M − 1. One operation,
    which keeps x (or the inverse's result) alone for backward and computes the layers again there: for
    devices where ``dispatch.fuses_net`` says that it is one launch.
    """
    lu = matrix.lu
    _check_floating("x", x)
    if lu.dim() != 3 or x.dim() == 0 or x.shape[-1] != lu.shape[-1] or x.device != lu.device:
        raise ValueError(
            f"x must have {lu.shape[-1]} features in its last dimension, on {lu.device}, got shape "
            f"{tuple(x.shape)} on {x.device}"
        )
    x = _matching("x", x, matrix, lower=not inverse)
    return autograd.apply("net_inverse" if inverse else "net_forward", x, matrix, phi, logabsdet)


def leaky_softplus(x: Tensor, slopes: Slopes) -> Tensor:
    """φ(x) = a·x + (c/κ)·softplus(κ·x), elementwise; (2.6) is (α, 1 − α, 1), (2.9) is (β, 1, α)."""
    return activation(x, activation_of(slopes), inverse=False, logabsdet=False)[0]


def leaky_softplus_and_logabsdet(x: Tensor, slopes: Slopes) -> tuple[Tensor, Tensor]:
    """(φ(x) [..., D], Σ log φ′(x) over the last dimension [...])."""
    return activation(x, activation_of(slopes), inverse=False, logabsdet=True)  # type: ignore[return-value]


def leaky_softplus_inverse(y: Tensor, slopes: Slopes) -> Tensor:
    """φ⁻¹(y), elementwise: |φ(x̂) − y| is within a few roundings of |y| + φ(0). ±inf and NaN pass through.

    Halley's iteration from the nearest of three tangents; its number of steps follows a/c: 2 in float32
    and 3 in float64 at (2.6) with α = 0.1.
    """
    return activation(y, activation_of(slopes), inverse=True, logabsdet=False)[0]


def leaky_softplus_inverse_and_logabsdet(y: Tensor, slopes: Slopes) -> tuple[Tensor, Tensor]:
    """(φ⁻¹(y) [..., D], the log-determinant of φ⁻¹ at y [...])."""
    return activation(y, activation_of(slopes), inverse=True, logabsdet=True)  # type: ignore[return-value]


def lu_dense(
    x: Tensor,
    lu: Tensor,
    bias: Tensor | None = None,
    *,
    sign: Tensor | None = None,
    permutation: Tensor | None = None,
    slopes: Slopes | None = None,
) -> Tensor:
    """y = φ(A x + b) with A = Pᵀ L U, (2.1).

    Raises:
        ValueError: ``lu`` is not square, x's last dimension is not D, or a slope is not positive.
        TypeError: x and ``lu`` differ in dtype outside autocast.
    """
    matrix = Matrix(lu, sign, permutation, bias)
    return layer(x, matrix, activation_of(slopes), inverse=False, logabsdet=False)[0]


def lu_dense_and_logabsdet(
    x: Tensor,
    lu: Tensor,
    bias: Tensor | None = None,
    *,
    sign: Tensor | None = None,
    permutation: Tensor | None = None,
    slopes: Slopes | None = None,
) -> tuple[Tensor, Tensor]:
    """(φ(A x + b), Σ log|u_ii| + Σ log φ′(h_i) [...]); raises as ``lu_dense``."""
    matrix = Matrix(lu, sign, permutation, bias)
    return layer(x, matrix, activation_of(slopes), inverse=False, logabsdet=True)  # type: ignore[return-value]


def lu_dense_inverse(
    y: Tensor,
    lu: Tensor,
    bias: Tensor | None = None,
    *,
    sign: Tensor | None = None,
    permutation: Tensor | None = None,
    slopes: Slopes | None = None,
) -> Tensor:
    """x = U⁻¹ L⁻¹ P (φ⁻¹(y) − b), by triangular substitution; raises as ``lu_dense``."""
    matrix = Matrix(lu, sign, permutation, bias)
    return layer(y, matrix, activation_of(slopes), inverse=True, logabsdet=False)[0]


def lu_dense_inverse_and_logabsdet(
    y: Tensor,
    lu: Tensor,
    bias: Tensor | None = None,
    *,
    sign: Tensor | None = None,
    permutation: Tensor | None = None,
    slopes: Slopes | None = None,
) -> tuple[Tensor, Tensor]:
    """(x, the inverse's own log-determinant at y [...]); raises as ``lu_dense``."""
    matrix = Matrix(lu, sign, permutation, bias)
    return layer(y, matrix, activation_of(slopes), inverse=True, logabsdet=True)  # type: ignore[return-value]

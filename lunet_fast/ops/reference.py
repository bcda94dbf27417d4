"""The mathematics of LU layers in plain, differentiable PyTorch.

Every formula is written as it stands on paper, with no thought for speed; every fast path is tested
against this file in float64. It is also what second derivatives, forward-mode derivatives and ``vmap``
are computed through where an operation cannot do it itself; each function can be differentiated in
reverse mode to any order.

Storage. One square matrix ``lu`` [D, D] holds a layer: its strict lower triangle is that of the unit
lower triangular L, its strict upper triangle that of U, and its diagonal s gives u_ii = sign_i·exp(s_i).
With an optional row permutation P, (P A)[i] = A[permutation[i]], the layer's matrix is A = Pᵀ L U.

Activation. Both activations of the paper are φ(x) = a·x + (c/κ)·softplus(κ·x) with a, c, κ > 0, so
φ′(x) = a + c·σ(κ·x) lies strictly between a and a + c. (2.6) is (a, c, κ) = (α, 1 − α, 1); (2.9) is
(β, 1, α). ``slopes`` is that triple: three floats, or a tensor [3] or [3, D] when it is learnt.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lunet_fast.ops import spline
from lunet_fast.ops.precision import LOG_DIAGONAL_BOUND, wide, without_autocast
from lunet_fast.ops.values import IDENTITY, Activation, Matrix, WithLogabsdet

Slopes = Sequence[float] | Tensor


def log_diagonal(lu: Tensor) -> Tensor:
    """log|u_ii| [..., D]: the diagonal of ``lu`` [..., D, D], clamped to what its dtype can exponentiate."""
    bound = LOG_DIAGONAL_BOUND[lu.dtype]
    logs = lu.diagonal(dim1=-2, dim2=-1).clamp(-bound, bound)
    stored = wide(lu.dtype)
    return logs if logs.dtype == stored else logs.to(stored)


def factors(lu: Tensor, sign: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(L, U), both [D, D] and dense, of a packed ``lu`` [D, D]."""
    diagonal = log_diagonal(lu).exp()
    if sign is not None:
        diagonal = torch.mul(diagonal, sign)
    lu = lu.to(diagonal.dtype)
    eye = torch.eye(lu.shape[-1], dtype=lu.dtype, device=lu.device)
    return lu.tril(-1) + eye, lu.triu(1) + torch.diag_embed(diagonal)


def lu_weight(lu: Tensor, sign: Tensor | None = None, permutation: Tensor | None = None) -> Tensor:
    """A = Pᵀ L U [D, D]."""
    lower, upper = factors(lu, sign)
    with without_autocast(lu):
        weight = lower @ upper
    if permutation is not None:
        weight = weight[permutation.argsort()]
    return weight.to(lu.dtype)


def lu_logabsdet(lu: Tensor) -> Tensor:
    """log|det A| = Σ log|u_ii|, a scalar."""
    return log_diagonal(lu).sum()


def unpack(slopes: Slopes) -> tuple[Any, Any, Any]:
    """(a, c, κ) as three floats or three tensors."""
    triple: Any = slopes.unbind(0) if isinstance(slopes, Tensor) else slopes
    a, c, kappa = triple
    return a, c, kappa


def softplus(x: Tensor) -> Tensor:
    """log(1 + eˣ) to rounding; with its own threshold of 20, F.softplus is off by 2e-9 there."""
    return F.softplus(x, threshold=40.0)


def leaky_softplus(x: Tensor, slopes: Slopes) -> Tensor:
    """φ(x) = a·x + (c/κ)·softplus(κ·x), elementwise; (2.6) and (2.9)."""
    a, c, kappa = unpack(slopes)
    return a * x + (c / kappa) * softplus(kappa * x)


def leaky_softplus_derivative(x: Tensor, slopes: Slopes) -> Tensor:
    """φ′(x) = a + c·σ(κ·x), elementwise."""
    a, c, kappa = unpack(slopes)
    return a + c * torch.sigmoid(kappa * x)


def leaky_softplus_inverse(y: Tensor, slopes: Slopes) -> Tensor:
    """φ⁻¹(y), elementwise, differentiable in y and in a tensor of slopes."""
    if isinstance(slopes, Tensor):
        return _Inverse.apply(y, slopes, 1.0, 0.0, 1.0)
    return _Inverse.apply(y, None, *slopes)


def solve_leaky_softplus(y: Tensor, slopes: Slopes) -> Tensor:
    """φ⁻¹(y) by Newton's iteration, which is all that is recorded of it."""
    a, c, _ = unpack(slopes)
    start = torch.minimum(y / a, y / (a + c))
    # φ is convex and start is not left of the solution, so Newton falls onto it monotonically: by about 1/κ
    # a step while eˣ dominates the slope, and quadratically at the end. Slopes in a tensor may be batched by
    # vmap, when their values cannot be read: they get the steps that 1e-13 needs.
    ratio = 1e-13 if isinstance(slopes, Tensor) else max(a / c, 1e-300)
    x = start
    for _ in range(8 + math.ceil(max(0.0, -math.log(ratio)))):
        step = (leaky_softplus(x, slopes) - y) / leaky_softplus_derivative(x, slopes)
        x = torch.where(step.isfinite(), x - step, x)
    return x


class _Inverse(torch.autograd.Function):
    """x = φ⁻¹(y), differentiated through the implicit function theorem.

    φ(x) = y gives dx = (dy − ∂φ/∂slopes·dslopes) / φ′(x). Both directions are written in terms of the
    output x, which autograd knows to depend on y, so derivatives of every order are right.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(y: Tensor, slopes: Tensor | None, *fixed: float) -> Tensor:
        return solve_leaky_softplus(y, fixed if slopes is None else slopes)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        _, slopes, *ctx.fixed = inputs
        ctx.save_for_backward(output, slopes)
        ctx.save_for_forward(output, slopes)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, slopes = ctx.saved_tensors
        grad_y = grad / leaky_softplus_derivative(x, ctx.fixed if slopes is None else slopes)
        if slopes is None:
            return grad_y, None, None, None, None
        partials = slope_partials(x, slopes)
        grad_slopes = torch.stack([-(grad_y * p) for p in partials])
        grad_slopes = grad_slopes.sum_to_size(_aligned(slopes, grad_slopes)).reshape(slopes.shape)
        return grad_y, grad_slopes, None, None, None

    @staticmethod
    def jvp(ctx: Any, dy: Tensor | None, dslopes: Tensor | None, *_: None) -> Tensor:
        x, slopes = ctx.saved_tensors
        numerator = torch.zeros_like(x) if dy is None else dy
        if dslopes is not None:
            partials = slope_partials(x, slopes)
            numerator = numerator - sum(p * d for p, d in zip(partials, dslopes.unbind(0), strict=True))
        return numerator / leaky_softplus_derivative(x, ctx.fixed if slopes is None else slopes)


def _aligned(slopes: Tensor, stacked: Tensor) -> list[int]:
    """The shape [3, 1, …, 1] or [3, 1, …, D] to which a gradient [3, …, D] sums for these slopes."""
    return [3] + [1] * (stacked.dim() - slopes.dim()) + list(slopes.shape[1:])


def slope_partials(x: Tensor, slopes: Slopes) -> tuple[Tensor, Tensor, Tensor]:
    """(∂φ/∂a, ∂φ/∂c, ∂φ/∂κ) at x, elementwise."""
    _, c, kappa = unpack(slopes)
    soft = softplus(kappa * x) / kappa
    return x, soft, (c / kappa) * (x * torch.sigmoid(kappa * x) - soft)


def log_derivative_sum(x: Tensor, slopes: Slopes) -> Tensor:
    """Σ log φ′ over the last dimension, float32 or wider."""
    return leaky_softplus_derivative(x.to(wide(x.dtype)), slopes).log().sum(-1)


def leaky_softplus_and_logabsdet(x: Tensor, slopes: Slopes) -> tuple[Tensor, Tensor]:
    """(φ(x), Σ log φ′(x) over the last dimension)."""
    return leaky_softplus(x, slopes), log_derivative_sum(x, slopes)


def leaky_softplus_inverse_and_logabsdet(y: Tensor, slopes: Slopes) -> tuple[Tensor, Tensor]:
    """(φ⁻¹(y), the log-determinant of φ⁻¹ at y)."""
    x = leaky_softplus_inverse(y, slopes)
    return x, -log_derivative_sum(x, slopes)


class Formula(NamedTuple):
    """An activation in differentiable PyTorch; each function takes x or y and ``Activation.numbers``."""

    forward: Callable[[Tensor, Any], Tensor]
    inverse: Callable[[Tensor, Any], Tensor]
    solve: Callable[[Tensor, Any], Tensor]
    """The inverse in PyTorch's operations alone, for what records them."""
    log_derivative_sum: Callable[[Tensor, Any], Tensor]


def _spline_log_derivative_sum(x: Tensor, parameters: Tensor) -> Tensor:
    return spline.log_derivative(x, parameters).sum(-1)


#: The formulas of each kind of activation.
ACTIVATIONS = {
    "leaky_softplus": Formula(
        leaky_softplus, leaky_softplus_inverse, solve_leaky_softplus, log_derivative_sum
    ),
    spline.KIND: Formula(spline.forward, spline.inverse, spline.inverse, _spline_log_derivative_sum),
}


def family(slopes: Slopes | None) -> Activation:
    """The activation with these slopes (a, c, κ); None for none."""
    if slopes is None:
        return IDENTITY
    if isinstance(slopes, Tensor):
        return Activation("leaky_softplus", slopes, ())
    return Activation("leaky_softplus", None, tuple(slopes))


def activation(x: Tensor, phi: Activation, *, inverse: bool, logabsdet: bool) -> WithLogabsdet:
    """(φ(x), Σ log φ′(x) over the last dimension) or, with ``inverse``, (φ⁻¹(x), that of φ⁻¹ at x)."""
    formula, numbers = ACTIVATIONS[phi.kind], phi.numbers
    if inverse:
        x = formula.inverse(x, numbers)
        return x, -formula.log_derivative_sum(x, numbers) if logabsdet else None
    return formula.forward(x, numbers), formula.log_derivative_sum(x, numbers) if logabsdet else None


def affine(x: Tensor, matrix: Matrix) -> Tensor:
    """h = A x + b for rows x [..., D]."""
    lower, upper = factors(matrix.lu, matrix.sign)
    h = (x.to(upper.dtype) @ upper.mT) @ lower.mT
    if matrix.permutation is not None:
        h = h.index_select(-1, matrix.permutation.argsort())
    if matrix.bias is not None:
        h = h + matrix.bias
    return h.to(x.dtype)


def affine_inverse(h: Tensor, matrix: Matrix) -> Tensor:
    """x = U⁻¹ L⁻¹ P (h − b) for rows h [..., D], by two triangular solves. (2.2), as mended in the notes."""
    lower, upper = factors(matrix.lu, matrix.sign)
    right = h.to(upper.dtype)
    if matrix.bias is not None:
        right = right - matrix.bias
    if matrix.permutation is not None:
        right = right.index_select(-1, matrix.permutation)
    rows = right.reshape(-1, right.shape[-1])
    rows = torch.linalg.solve_triangular(lower, rows.mT, upper=False, unitriangular=True)
    rows = torch.linalg.solve_triangular(upper, rows, upper=True).mT
    return rows.reshape(h.shape).to(h.dtype)


def layer(x: Tensor, matrix: Matrix, phi: Activation, *, inverse: bool, logabsdet: bool) -> WithLogabsdet:
    """The layer (2.1) at x [..., D], φ(A x + b), and Σ log|u_ii| + Σ log φ′(h_i) [...]; or, with ``inverse``,
    A⁻¹ (φ⁻¹(x) − b) and the log-determinant of the inverse at x."""
    if not inverse:
        x = affine(x, matrix)
    share = None
    if not phi.linear:
        x, share = activation(x, phi, inverse=inverse, logabsdet=logabsdet)
    result = affine_inverse(x, matrix) if inverse else x
    if not logabsdet:
        return result, None
    constant = -lu_logabsdet(matrix.lu) if inverse else lu_logabsdet(matrix.lu)
    return result, constant.repeat(x.shape[:-1]) if share is None else constant + share


def net(x: Tensor, matrix: Matrix, phi: Activation, *, inverse: bool, logabsdet: bool) -> WithLogabsdet:
    """M layers one after another, the last one linear, as ``layer``; lu is [M, D, D], bias and sign [M,
    D]."""
    layers, total = matrix.lu.shape[0], None
    for m in reversed(range(layers)) if inverse else range(layers):
        x, share = layer(x, matrix.member(m), phi.at(m, layers), inverse=inverse, logabsdet=logabsdet)
        total = share if total is None or share is None else total + share
    return x, total


# The same arguments as in ``lunet_fast.functional``, which says what each of them is.


def lu_dense(
    x: Tensor, lu: Tensor, bias: Any = None, *, sign: Any = None, permutation: Any = None, slopes: Any = None
) -> Tensor:
    """φ(A x + b), (2.1)."""
    return layer(x, Matrix(lu, sign, permutation, bias), family(slopes), inverse=False, logabsdet=False)[0]


def lu_dense_and_logabsdet(
    x: Tensor, lu: Tensor, bias: Any = None, *, sign: Any = None, permutation: Any = None, slopes: Any = None
) -> tuple[Tensor, Tensor]:
    """(φ(A x + b), log|det J| at x)."""
    matrix = Matrix(lu, sign, permutation, bias)
    return layer(x, matrix, family(slopes), inverse=False, logabsdet=True)  # type: ignore[return-value]


def lu_dense_inverse(
    y: Tensor, lu: Tensor, bias: Any = None, *, sign: Any = None, permutation: Any = None, slopes: Any = None
) -> Tensor:
    """A⁻¹ (φ⁻¹(y) − b)."""
    return layer(y, Matrix(lu, sign, permutation, bias), family(slopes), inverse=True, logabsdet=False)[0]


def lu_dense_inverse_and_logabsdet(
    y: Tensor, lu: Tensor, bias: Any = None, *, sign: Any = None, permutation: Any = None, slopes: Any = None
) -> tuple[Tensor, Tensor]:
    """(A⁻¹ (φ⁻¹(y) − b), the log-determinant of the inverse at y)."""
    matrix = Matrix(lu, sign, permutation, bias)
    return layer(y, matrix, family(slopes), inverse=True, logabsdet=True)  # type: ignore[return-value]

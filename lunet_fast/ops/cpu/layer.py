"""A layer and stacked layers on rows: forward, inverse, and their gradients by hand."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lunet_fast.ops.cpu.elementwise import Elementwise
from lunet_fast.ops.cpu.matrix import (
    DENSE,
    Packed,
    by_factors,
    compose,
    compose_backward,
    compose_dense,
    compose_dense_backward,
    composes,
    permute,
    rows_backward,
    solve,
    solve_transposed,
    times,
    unpermute,
)
from lunet_fast.ops.cpu.sweeps import column, is_one_sweep, sweeps
from lunet_fast.ops.precision import LOG_DIAGONAL_BOUND, wide

_hardtanh_backward_out = torch.ops.aten.hardtanh_backward.grad_input


class Needs(NamedTuple):
    """Which gradients are wanted."""

    x: bool
    lu: bool
    bias: bool


class Gradients(NamedTuple):
    """Those of a layer's arguments, float32 or wider but for x; None for one that was not wanted."""

    x: Tensor | None
    lu: Tensor | None
    bias: Tensor | None
    parameters: Tensor | None


def matrices_kept(x: Tensor, lu: Tensor) -> int:
    """How many [D, D] a layer's forward keeps for backward in the place of A: 3 where it ``is_factored``, U
    and L − I among them; else 1, A or, where rows go through the factors, t = U x in its first rows; and 0
    where dtypes differ or layers are stacked: A alone."""
    if lu.dim() != 2 or not x.dtype == lu.dtype == wide(x.dtype):
        return 0
    return 3 if lu.shape[0] <= DENSE else 1


def is_factored(x: Tensor, lu: Tensor) -> bool:
    """Whether a layer is so small that U and L − I are copied once, for forward and backward."""
    return matrices_kept(x, lu) == 3


# --- forward --------------------------------------------------------------------------------------------


def layer_forward(
    x: Tensor, packed: Packed, bias: Tensor | None, phi: Elementwise | None, *, logabsdet: bool, save: bool
) -> tuple[Tensor | None, ...]:
    """(y, log|det J| or None, h or None if φ is the identity, A, or U x [N, D] where A was not formed).

    Without ``save`` h need not be whole at any time, and what is returned for it may be None.
    """
    if composes(*x.shape):
        weight = compose(packed).to(x.dtype)
        found = _composed(x, weight, packed, bias, phi, logabsdet=logabsdet, save=save)
        return *found, weight
    t = times(x.to(packed.lu.dtype), packed, upper=True, transposed=False)
    h = unpermute(times(t, packed, upper=False, transposed=False), packed)
    if bias is not None:
        h = h + bias
    return *_activated(h.to(x.dtype), packed, phi, logabsdet=logabsdet), t


def factored_forward(
    x: Tensor,
    packed: Packed,
    bias: Tensor | None,
    phi: Elementwise | None,
    *,
    logabsdet: bool,
    save: bool,
    memory: Tensor | None = None,
) -> tuple[Tensor | None, ...]:
    """``layer_forward`` where it ``is_factored``: with U and L − I after A or U x; all three in ``memory``
    [3, D, D] if given, U x in the first N rows."""
    first, upper, below = (None, None, None) if memory is None else memory.unbind(0)
    upper = torch.triu(packed.lu, out=upper)
    upper.diagonal().copy_(packed.diagonal)
    below = torch.tril(packed.lu, -1, out=below)
    if composes(*x.shape):
        weight = torch.addmm(upper, below, upper, out=first)
        if packed.permutation is not None:
            weight[packed.permutation] = weight.clone()
        found = _composed(x, weight, packed, bias, phi, logabsdet=logabsdet, save=save)
        return *found, weight, upper, below
    t = torch.mm(x, upper.T, out=None if first is None else first[: len(x)])
    h = unpermute(torch.addmm(t, t, below.T), packed)
    if bias is not None:
        h.add_(bias)
    y, total, saved = _activated(h, packed, phi, logabsdet=logabsdet)
    return y, total, saved, t, upper, below


def _activated(
    h: Tensor, packed: Packed, phi: Elementwise | None, *, logabsdet: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(φ(h), log|det J| or None, h or None if φ is the identity)."""
    if phi is None:
        return h, packed.log_diagonal.sum().repeat(len(h)) if logabsdet else None, None
    y, total = phi.activated(h, logabsdet=logabsdet)
    return y, None if total is None else total.add_(packed.log_diagonal.sum()), h


def _affine(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Rows of A x + b."""
    return torch.mm(x, weight.T) if bias is None else torch.addmm(bias.to(x.dtype), x, weight.T)


def _composed(
    x: Tensor,
    weight: Tensor,
    packed: Packed,
    bias: Tensor | None,
    phi: Elementwise | None,
    *,
    logabsdet: bool,
    save: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(φ(h), log|det J| or None, h or None) of h = A x + b, A being formed; φ meets each run of rows still in
    the cache."""
    if phi is None or is_one_sweep(x, product=True):
        return _activated(_affine(x, weight, bias), packed, phi, logabsdet=logabsdet)
    y = torch.empty_like(x)
    h = torch.empty_like(x) if save else None
    total = torch.empty(x.shape[0], dtype=wide(x.dtype), device=x.device) if logabsdet else None
    bias = None if bias is None else bias.to(x.dtype)
    scratch = None
    start = 0
    for x_part, y_part in sweeps(x, y, product=True):
        rows = slice(start, start + len(x_part))
        start = rows.stop
        if h is not None:
            h_part = h[rows]
        else:
            scratch = torch.empty_like(x_part) if scratch is None else scratch
            h_part = scratch[: len(x_part)]
        if bias is None:
            torch.mm(x_part, weight.T, out=h_part)
        else:
            torch.addmm(bias, x_part, weight.T, out=h_part)
        phi.activated_into(y_part, None if total is None else total[rows], h_part)
    return y, None if total is None else total.add_(packed.log_diagonal.sum()), h


# --- backward -------------------------------------------------------------------------------------------


def layer_backward(
    grad_y: Tensor,
    grad_logabsdet: Tensor | None,
    x: Tensor,
    h: Tensor | None,
    kept: Tensor | None,
    packed: Packed,
    phi: Elementwise | None,
    needs: Needs,
) -> Gradients:
    """Gradients of a layer: through A, which is ``kept``, or through the rows themselves, where it is U x or
    None."""
    dtype = packed.lu.dtype
    totals = None if phi is None else phi.totals(x)
    grad_x = grad_lu = None
    if composes(*x.shape):
        assert kept is not None
        grad_x, grad_weight, grad_bias = _product_gradients(
            grad_y, grad_logabsdet, x, h, kept, phi, totals, needs
        )
        if grad_weight is not None:
            grad_lu = compose_backward(grad_weight, packed)
    else:
        grad_h = _scaled_(*_preactivation_gradient(grad_y, grad_logabsdet, h, phi, totals))
        grad_bias = grad_h.sum(0, dtype=dtype) if needs.bias else None
        grad_v = permute(grad_h.to(dtype), packed)
        grad_t = times(grad_v, packed, upper=False, transposed=True)
        if needs.x:
            grad_x = times(grad_t, packed, upper=True, transposed=True).to(x.dtype)
        if needs.lu:
            wide_x = x.to(dtype)
            t = times(wide_x, packed, upper=True, transposed=False) if kept is None else kept
            grad_lu = rows_backward(grad_v, t, grad_t, wide_x, packed)
    if grad_lu is not None:
        _finish_lu_(grad_lu, packed, _row_sum(grad_logabsdet), 1.0)
    return Gradients(grad_x, grad_lu, grad_bias, totals)


def factored_backward(
    grad_y: Tensor,
    grad_logabsdet: Tensor | None,
    x: Tensor,
    h: Tensor | None,
    kept: Sequence[Tensor],
    lu: Tensor,
    permutation: Tensor | None,
    phi: Elementwise | None,
    needs: Needs,
) -> Gradients:
    """Gradients of a layer from the three matrices that ``factored_forward`` kept."""
    first, upper, below = kept
    totals = None if phi is None else phi.totals(x)
    grad_lu = None
    if composes(*x.shape):
        grad_x, grad_weight, grad_bias = _product_gradients(
            grad_y, grad_logabsdet, x, h, first, phi, totals, needs
        )
        if grad_weight is not None:
            grad_lu = by_factors(grad_weight[... if permutation is None else permutation], upper, below)
    else:
        grad_h, factor = _preactivation_gradient(grad_y, grad_logabsdet, h, phi, totals)
        grad_bias = _scaled_(grad_h.sum(0), factor) if needs.bias else None
        grad_v = grad_h if permutation is None else grad_h[:, permutation]
        grad_t = torch.addmm(grad_v, grad_v, below, beta=factor, alpha=factor)
        grad_x = torch.mm(grad_t, upper) if needs.x else None
        if needs.lu:
            by_lower = torch.addmm(below, grad_v.T, first, beta=0, alpha=factor).tril_(-1)
            grad_lu = by_lower.add_(torch.mm(grad_t.T, x).triu_())
    if grad_lu is not None:
        diagonal = grad_lu.diagonal()
        diagonal.mul_(upper.diagonal())
        if grad_logabsdet is not None:
            diagonal.add_(grad_logabsdet.sum())
        bound = LOG_DIAGONAL_BOUND[lu.dtype]
        # A clamped s_i has no influence.
        _hardtanh_backward_out(diagonal, lu.diagonal(), -bound, bound, grad_input=diagonal)
    return Gradients(grad_x, grad_lu, grad_bias, totals)


def _preactivation_gradient(
    grad_y: Tensor,
    grad_logabsdet: Tensor | None,
    h: Tensor | None,
    phi: Elementwise | None,
    totals: Tensor | None,
) -> tuple[Tensor, float]:
    """The gradient of h [N, D], whole, over a factor, and the factor: that of ``scaled_gradient``."""
    if phi is None or h is None:
        return grad_y, 1.0
    factor, phi, grad_logabsdet = _factored(phi, grad_logabsdet)
    grad_h = torch.empty_like(h)
    phi.backward_into(grad_h, grad_y, h, column(grad_logabsdet), totals)
    return grad_h, factor


def _factored(phi: Elementwise, grad_logabsdet: Tensor | None) -> tuple[float, Elementwise, Tensor | None]:
    """(f, ψ) of ``scaled_gradient`` and the gradient of Σ log φ′(h) over f."""
    factor, phi = phi.scaled_gradient()
    if grad_logabsdet is not None and factor != 1.0:
        grad_logabsdet = grad_logabsdet / factor
    return factor, phi, grad_logabsdet


def _product_gradients(
    grad_y: Tensor,
    grad_logabsdet: Tensor | None,
    x: Tensor,
    h: Tensor | None,
    weight: Tensor,
    phi: Elementwise | None,
    totals: Tensor | None,
    needs: Needs,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of (x, A, b), float32 or wider but for x, through y = φ(h) with h = A x + b."""
    dtype = wide(x.dtype)
    if is_one_sweep(x, product=True):
        grad_h, factor = _preactivation_gradient(grad_y, grad_logabsdet, h, phi, totals)
        grad_x = torch.addmm(grad_h, grad_h, weight, beta=0, alpha=factor) if needs.x else None
        grad_weight = grad_bias = None
        if needs.lu:
            grad_weight = torch.addmm(weight, grad_h.T, x, beta=0, alpha=factor).to(dtype)
        if needs.bias:
            grad_bias = _scaled_(grad_h.sum(0, dtype=dtype), factor)
        return grad_x, grad_weight, grad_bias
    grad_x = torch.empty_like(x) if needs.x else None
    grad_weight = torch.zeros_like(weight, dtype=dtype) if needs.lu else None
    grad_bias = x.new_zeros(x.shape[1], dtype=dtype) if needs.bias else None
    factor = 1.0
    if phi is not None:
        factor, phi, grad_logabsdet = _factored(phi, grad_logabsdet)
    for grad_h, rows in _preactivation_gradients(grad_y, grad_logabsdet, h, phi, totals):
        if grad_x is not None:
            part = grad_x[rows]
            torch.addmm(part, grad_h, weight, beta=0, alpha=factor, out=part)
        if grad_weight is not None:
            _add_product_(grad_weight, grad_h.T, x[rows], factor)
        if grad_bias is not None:
            grad_bias.add_(grad_h.sum(0, dtype=dtype), alpha=factor)
    return grad_x, grad_weight, grad_bias


def _scaled_(t: Tensor, scale: float) -> Tensor:
    return t if scale == 1.0 else t.mul_(scale)


def _preactivation_gradients(
    grad_y: Tensor,
    grad_logabsdet: Tensor | None,
    h: Tensor | None,
    phi: Elementwise | None,
    totals: Tensor | None,
) -> Iterator[tuple[Tensor, slice]]:
    """The gradient of h for one run of rows after another, in memory that is used again for the next.

    The products that need it follow while it is in the cache, and it is never there as a whole: memory of
    its size, fresh from the system, would cost more time than computing it.
    """
    if phi is None or h is None:
        yield grad_y, slice(0, grad_y.shape[0])
        return
    scratch = None
    start = 0
    for g, h_part, *ld in sweeps(grad_y, h, *column(grad_logabsdet), product=True):
        scratch = torch.empty_like(h_part) if scratch is None else scratch[: len(h_part)]
        phi.backward_into(scratch, g, h_part, ld, totals)
        yield scratch, slice(start, start + len(h_part))
        start += len(h_part)


def _add_product_(total: Tensor, left: Tensor, right: Tensor, scale: float) -> None:
    """total ← total + scale·left·right, summed over the runs in the dtype of ``total``."""
    if left.dtype == total.dtype:
        total.addmm_(left, right, alpha=scale)
    else:
        total.add_(left @ right, alpha=scale)


def _row_sum(grad_logabsdet: Tensor | None) -> Tensor | None:
    return None if grad_logabsdet is None else grad_logabsdet.sum()


def _finish_lu_(grad_lu: Tensor, packed: Packed, grad_logabsdet: Tensor | None, direction: float) -> None:
    """Turn the gradient of u_ii into that of s_i (du_ii/ds_i = u_ii) and add the log-determinant's share.

    ``grad_logabsdet`` is summed over the rows, broadcasting to [..., D].
    """
    diagonal = grad_lu.diagonal(dim1=-2, dim2=-1)
    diagonal.mul_(packed.diagonal)
    if grad_logabsdet is not None:
        diagonal.add_(grad_logabsdet.to(diagonal.dtype), alpha=direction)
    # A clamped s_i has no influence.
    diagonal.masked_fill_(packed.lu.diagonal(dim1=-2, dim2=-1) != packed.log_diagonal, 0.0)


# --- inverse --------------------------------------------------------------------------------------------


def layer_inverse(
    y: Tensor, packed: Packed, bias: Tensor | None, phi: Elementwise | None, *, logabsdet: bool, save: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(x, the inverse's own log-determinant or None, h = φ⁻¹(y) to ``save`` or None; None if φ is linear)."""
    h = y if phi is None else phi.inverse(y)
    total = None
    if logabsdet:
        total = packed.log_diagonal.sum().neg().repeat(len(y))
        if phi is not None:
            total.sub_(phi.log_derivative_sum(h))
    right = h.to(packed.lu.dtype)
    own = right is not h or not (phi is None or save)
    bias = None if bias is None else bias.to(right.dtype)
    x = solve(right, packed, bias, own=own).to(y.dtype)
    return x, total, h if save and phi is not None else None


def layer_inverse_backward(
    grad_x: Tensor,
    grad_logabsdet: Tensor | None,
    x: Tensor,
    h: Tensor | None,
    packed: Packed,
    phi: Elementwise | None,
    needs: Needs,
) -> Gradients:
    """Gradients of a layer's inverse: g_r = A⁻ᵀ g_x, g_A = −g_rᵀ x, g_b = −Σ g_r, g_y = g_r/φ′(h)."""
    grad_v, grad_t = solve_transposed(grad_x.to(packed.lu.dtype), packed)
    grad_right = unpermute(grad_v, packed)
    grad_bias = grad_right.sum(0).neg_() if needs.bias else None
    grad_lu = None
    if needs.lu:
        wide_x = x.to(packed.lu.dtype)
        if composes(*x.shape):
            grad_lu = compose_backward(grad_right.T @ wide_x, packed)
        else:
            if grad_t is None:
                grad_t = times(grad_v, packed, upper=False, transposed=True)
            t = times(wide_x, packed, upper=True, transposed=False)
            grad_lu = rows_backward(grad_v, t, grad_t, wide_x, packed)
        _finish_lu_(grad_lu.neg_(), packed, _row_sum(grad_logabsdet), -1.0)
    grad_y, totals = grad_right.to(x.dtype), None
    if phi is not None and h is not None:
        grad_y, totals = phi.inverse_backward(grad_y, grad_logabsdet, h)
    return Gradients(grad_y, grad_lu, grad_bias, totals)


# --- stacked layers -------------------------------------------------------------------------------------


def stacked_forward(
    x: Tensor, packed: Packed, bias: Tensor | None, phi: Elementwise | None, *, logabsdet: bool, save: bool
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    """``layer_forward`` for K layers at once: x [K, N, D], lu [K, D, D], bias [K, D]; A is always formed.

    Meant for many small layers, where one call for each would cost more than its arithmetic; so the
    factors are multiplied as dense matrices, 2·D³ flops a layer.
    """
    weight = compose_dense(packed).to(x.dtype)
    transposed = weight.mT
    if bias is None:
        h = torch.bmm(x, transposed)
    else:
        h = torch.baddbmm(bias.unsqueeze(1).to(x.dtype), x, transposed)
    constant = packed.log_diagonal.sum(-1, keepdim=True)
    if phi is None:
        return h, constant.expand(x.shape[:2]).contiguous() if logabsdet else None, None, weight
    y, total = phi.activated(h.flatten(0, 1), logabsdet=logabsdet)
    total = None if total is None else total.reshape(x.shape[:2]).add_(constant)
    return y.reshape(x.shape), total, h if save else None, weight


def stacked_backward(
    grad_y: Tensor,
    grad_logabsdet: Tensor | None,
    x: Tensor,
    h: Tensor | None,
    weight: Tensor,
    packed: Packed,
    phi: Elementwise | None,
    needs: Needs,
) -> Gradients:
    """``layer_backward`` for stacked layers, which share the activation's parameters."""
    grad_h, grad_parameters = grad_y, None
    if phi is not None and h is not None:
        flat_ld = None if grad_logabsdet is None else grad_logabsdet.flatten()
        grad_h, grad_parameters = phi.backward(grad_y.flatten(0, 1), flat_ld, h.flatten(0, 1))
        grad_h = grad_h.reshape(x.shape)
    grad_bias = grad_h.sum(1, dtype=packed.lu.dtype) if needs.bias else None
    grad_x = torch.bmm(grad_h, weight) if needs.x else None
    grad_lu = None
    if needs.lu:
        grad_lu = compose_dense_backward(torch.bmm(grad_h.mT, x).to(packed.lu.dtype), packed)
        row_sums = None if grad_logabsdet is None else grad_logabsdet.sum(-1, keepdim=True)
        _finish_lu_(grad_lu, packed, row_sums, 1.0)
    return Gradients(grad_x, grad_lu, grad_bias, grad_parameters)

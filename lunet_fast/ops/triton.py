"""The registered operations on Triton kernels: which kernel, in which arithmetic, for which sizes.

Imported by ``dispatch.py`` when the first operation goes to Triton, so that a machine without it never
notices. Each function has the arguments and results of the operation of its name in ``dispatch.py``.

| rows N, features D | forward | inverse |
| --- | --- | --- |
| N ≤ D | x → U x → L (U x), zero blocks skipped | substitution |
| N > D | W formed, one product | substitution; from D = 129 W⁻¹, or substitution where that loses digits |
| N > D ≥ 1024, tf32 or bfloat16 | W formed, cuBLAS, one row-wise launch | the same |

Backward always goes through W: g_W is turned into that of the packed matrix. With D ≤ 128 it computes
h = W x + b again; beyond, the forward saves h.

Arithmetic. Float32 products follow ``torch.get_float32_matmul_precision()``: "highest" gives tf32x3, whose
error is float32's, "high" and "medium" give tf32. GPUs before sm_80 compute in float32 itself. Sums
are float32. The inverse never goes below tf32x3, nor do W, W⁻¹ and their gradients.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lunet_fast.kernels import (
    activation,
    gradient,
    inverse_gradient,
    layer,
    matrix,
    solve,
    stack,
    stack_gradient,
    tiles,
    triangular,
)
from lunet_fast.kernels import inverse as inverse_kernels
from lunet_fast.ops import dispatch, reference
from lunet_fast.ops.cpu import composes
from lunet_fast.ops.dispatch import _or_nothing, _rows
from lunet_fast.ops.reference import Slopes

#: Features from which the library's tf32 and bfloat16 products are expected to be faster than this one.
LIBRARY_PRODUCT_FROM = 1024


def precision_of(x: Tensor) -> str:
    """The arithmetic of a float32 product with x, one of ``kernels.launch.PRECISIONS``."""
    if tiles.architecture(x) < 80:
        return "ieee"
    try:
        highest = torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # set by PyTorch's newer, per-device setting
        highest = torch.backends.cuda.matmul.fp32_precision != "tf32"
    return "tf32x3" if highest else "tf32"


def _members(x: Tensor, lu: Tensor) -> Tensor:
    """x as contiguous rows [K, N, D] of K stacked layers, or of one."""
    members = lu.shape[0] if lu.dim() == 3 else 1
    return x.reshape(members, math.prod(x.shape[:-1]) // members, x.shape[-1]).contiguous()


def _stacked(parameter: Tensor | None, lu: Tensor) -> Tensor | None:
    """A layer's parameter with a leading dimension for the members, contiguous."""
    if parameter is None:
        return None
    return (parameter if lu.dim() == 3 else parameter.unsqueeze(0)).contiguous()


def _packed(lu: Tensor) -> Tensor:
    stacked = (lu if lu.dim() == 3 else lu.unsqueeze(0)).contiguous()
    return stacked if stacked.dtype in (torch.float32, torch.bfloat16) else stacked.float()


def _order(permutation: Tensor | None) -> Tensor | None:
    return None if permutation is None else permutation.to(torch.int64).contiguous()


def _slopes(slopes: Tensor | None, a: float, c: float, kappa: float) -> Slopes | None:
    if slopes is not None:
        return slopes.contiguous()
    return None if c == 0.0 else (a, c, kappa)


def _flat(row_values: Tensor | None, shape: tuple[int, ...]) -> Tensor | None:
    return None if row_values is None else row_values.reshape(shape).contiguous()


def _total(total: Tensor | None, x: Tensor) -> Tensor:
    return x.new_empty(0, dtype=torch.float32) if total is None else total.reshape(x.shape[:-1])


def _slope_gradient(grad: Tensor | None, slopes: Tensor | None, x: Tensor) -> Tensor:
    return x.new_empty(0) if grad is None or slopes is None else grad.to(slopes.dtype)


# --- activation -----------------------------------------------------------------------------------------


def activation_forward(
    x: Tensor, slopes: Tensor | None, a: float, c: float, kappa: float, logabsdet: bool
) -> tuple[Tensor, Tensor]:
    family = _slopes(slopes, a, c, kappa)
    assert family is not None
    y, total = activation.activation_forward(_rows(x), family, logabsdet=logabsdet)
    return y.reshape(x.shape), _total(total, x)


def activation_inverse(
    y: Tensor, slopes: Tensor | None, a: float, c: float, kappa: float, logabsdet: bool
) -> tuple[Tensor, Tensor]:
    family = _slopes(slopes, a, c, kappa)
    assert family is not None
    x, total = activation.activation_inverse(_rows(y), family, logabsdet=logabsdet)
    return x.reshape(y.shape), _total(total, y)


def activation_backward(
    grad_y: Tensor,
    grad_logabsdet: Tensor | None,
    x: Tensor,
    slopes: Tensor | None,
    a: float,
    c: float,
    kappa: float,
) -> tuple[Tensor, Tensor]:
    family = _slopes(slopes, a, c, kappa)
    assert family is not None
    grad_x, grad_slopes = activation.activation_backward(
        _rows(grad_y), _flat(grad_logabsdet, (-1,)), _rows(x), family
    )
    return grad_x.reshape(x.shape), _slope_gradient(grad_slopes, slopes, x)


def activation_inverse_backward(
    grad_x: Tensor,
    grad_logabsdet: Tensor | None,
    x: Tensor,
    slopes: Tensor | None,
    a: float,
    c: float,
    kappa: float,
) -> tuple[Tensor, Tensor]:
    family = _slopes(slopes, a, c, kappa)
    assert family is not None
    grad_y, grad_slopes = activation.activation_inverse_backward(
        _rows(grad_x), _flat(grad_logabsdet, (-1,)), _rows(x), family
    )
    return grad_y.reshape(x.shape), _slope_gradient(grad_slopes, slopes, x)


# --- layer ----------------------------------------------------------------------------------------------


def layer_forward(
    x: Tensor,
    lu: Tensor,
    sign: Tensor | None,
    permutation: Tensor | None,
    bias: Tensor | None,
    slopes: Tensor | None,
    a: float,
    c: float,
    kappa: float,
    logabsdet: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, packed, bias = _members(x, lu), _packed(lu), _stacked(bias, lu)
    family, precision = _slopes(slopes, a, c, kappa), precision_of(x)
    N, D = rows.shape[1:]
    sign, order = _stacked(sign, lu), _order(permutation)
    # What the fake of this operation says is saved.
    save_h = save and family is not None and not tiles.recomputes(D)
    weight = None
    if not composes(N, D):
        constant = reference.log_diagonal(packed).sum(-1) if logabsdet else None
        y, total, h = triangular.layer_forward_rows(
            *(rows, packed, sign, order, bias, family),
            logabsdet=logabsdet,
            save=save_h,
            precision=precision,
            constant=constant,
        )
    else:
        weight, constant = matrix.compose(packed, sign, order, x.dtype)
        if D >= LIBRARY_PRODUCT_FROM and family is not None and _uses_library(x, precision):
            h = (
                torch.bmm(rows, weight.mT)
                if bias is None
                else torch.baddbmm(bias.unsqueeze(1).to(x.dtype), rows, weight.mT)
            )
            y, total = activation.activation_forward(h.flatten(0, 1), family, logabsdet=logabsdet)
            y = y.reshape(rows.shape)
            if total is not None:
                total = total.reshape(rows.shape[:-1]) + constant.unsqueeze(-1)
        else:
            y, total, h = layer.layer_forward(
                *(rows, weight, bias, family),
                logabsdet=logabsdet,
                save=save_h,
                precision=precision,
                constant=constant,
            )
    if save and weight is None and lu.dim() == 3:
        weight, _ = matrix.compose(packed, sign, order, x.dtype)  # stacked layers always save it
    elif save and weight is None:
        weight = torch.empty_like(packed, dtype=x.dtype)
    return (
        y.reshape(x.shape),
        _total(total, x),
        _or_nothing(h if save_h else None, x, x.shape),
        _or_nothing(weight if save else None, x, lu.shape),
    )


def _uses_library(x: Tensor, precision: str) -> bool:
    return x.dtype == torch.bfloat16 or precision == "tf32"


def layer_backward(
    grad_y: Tensor,
    grad_logabsdet: Tensor | None,
    x: Tensor,
    h: Tensor,
    weight: Tensor,
    lu: Tensor,
    sign: Tensor | None,
    permutation: Tensor | None,
    bias: Tensor | None,
    slopes: Tensor | None,
    a: float,
    c: float,
    kappa: float,
    needs_x: bool,
    needs_lu: bool,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if weight.dim() > lu.dim():
        # The backend was changed since the forward: what PyTorch's kept is for PyTorch's backward.
        return dispatch._layer_backward(
            *(grad_y, grad_logabsdet, x, h, weight, lu, sign, permutation, bias, slopes, a, c, kappa),
            *(needs_x, needs_lu, needs_bias),
        )
    rows, packed, order = _members(x, lu), _packed(lu), _order(permutation)
    sign, family = _stacked(sign, lu), _slopes(slopes, a, c, kappa)
    K, N, D = rows.shape
    # With N ≤ D the forward of one layer does not form W.
    saved = composes(N, D) or lu.dim() == 3
    formed = _stacked(weight, lu) if saved else matrix.compose(packed, sign, order, x.dtype)[0]
    assert formed is not None
    share = _flat(grad_logabsdet, (K, N))
    grad_x, grad_weight, grad_bias, grad_slopes = gradient.layer_backward(
        _members(grad_y, lu),
        share,
        rows,
        None if family is None or tiles.recomputes(D) else _members(h, lu),
        formed,
        _stacked(bias, lu),
        family,
        needs_x=needs_x,
        needs_weight=needs_lu,
        needs_bias=needs_bias,
        precision=precision_of(x),
    )
    grad_lu = None
    if grad_weight is not None:
        row_sum = None if share is None else share.sum(-1)
        grad_lu = matrix.compose_backward(grad_weight, row_sum, packed, sign, order)
    return (
        _or_nothing(grad_x, x, x.shape),
        _or_nothing(None if grad_lu is None else grad_lu.to(lu.dtype), lu, lu.shape),
        _or_nothing(None if grad_bias is None else grad_bias.to(lu.dtype), lu, lu.shape[:-1]),
        _slope_gradient(grad_slopes, slopes, x),
    )


def layer_inverse(
    y: Tensor,
    lu: Tensor,
    sign: Tensor | None,
    permutation: Tensor | None,
    bias: Tensor | None,
    slopes: Tensor | None,
    a: float,
    c: float,
    kappa: float,
    logabsdet: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    rows, packed, order = _members(y, lu), _packed(lu), _order(permutation)
    N, D = rows.shape[1:]
    precision = precision_of(y)
    prepared = inverse_kernels.prepare_inverse(
        packed, _stacked(sign, lu), order, precision=precision, many_rows=composes(N, D)
    )
    x, total, h = inverse_kernels.layer_inverse(
        rows,
        packed,
        prepared.inverses,
        _stacked(bias, lu),
        _slopes(slopes, a, c, kappa),
        permutation=order,
        logabsdet=logabsdet,
        save=save,
        precision=precision,
        constant=prepared.logabsdet,
        weight=prepared.weight,
        condition=prepared.condition,
    )
    return x.reshape(y.shape), _total(total, y), _or_nothing(h, y, y.shape)


def layer_inverse_backward(
    grad_x: Tensor,
    grad_logabsdet: Tensor | None,
    x: Tensor,
    h: Tensor,
    lu: Tensor,
    sign: Tensor | None,
    permutation: Tensor | None,
    slopes: Tensor | None,
    a: float,
    c: float,
    kappa: float,
    needs_lu: bool,
    has_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, packed, order = _members(x, lu), _packed(lu), _order(permutation)
    sign, family, precision = _stacked(sign, lu), _slopes(slopes, a, c, kappa), precision_of(x)
    K, N, D = rows.shape
    prepared = inverse_kernels.prepare_inverse(packed, sign, order, precision=precision, many_rows=False)
    share = _flat(grad_logabsdet, (K, N))
    grad_right, grad_y, grad_slopes = inverse_gradient.layer_inverse_backward(
        _members(grad_x, lu),
        share,
        None if family is None else _members(h, lu),
        packed,
        prepared.inverses,
        family,
        permutation=order,
        precision=precision,
    )
    grad_lu = grad_bias = None
    if needs_lu:
        grad_weight, column_sums = gradient.weight_and_bias_gradients(grad_right, rows, precision=precision)
        row_sum = None if share is None else share.sum(-1)
        grad_lu = matrix.compose_backward(grad_weight, row_sum, packed, sign, order, direction=-1)
        grad_bias = column_sums
    elif has_bias:
        grad_bias = grad_right.sum(1, dtype=torch.float32)
    return (
        grad_y.reshape(x.shape),
        _or_nothing(None if grad_lu is None else grad_lu.to(lu.dtype), lu, lu.shape),
        _or_nothing(
            None if grad_bias is None or not has_bias else grad_bias.neg().to(lu.dtype), lu, lu.shape[:-1]
        ),
        _slope_gradient(grad_slopes, slopes, x),
    )


# --- net ------------------------------------------------------------------------------------------------


def _stack_tile(kernel: str, x: Tensor, precision: str) -> tiles.Tile | None:
    return tiles.stack_tile(kernel, x.shape[-1], x.dtype, precision, tiles.architecture(x))


def net(
    x: Tensor,
    lu: Tensor,
    sign: Tensor | None,
    bias: Tensor | None,
    slopes: Tensor | None,
    a: float,
    c: float,
    kappa: float,
    inverse: bool,
    logabsdet: bool,
) -> tuple[Tensor, Tensor]:
    precision = precision_of(x)
    if inverse:
        precision = solve.at_least_tf32x3(precision)
    tile = _stack_tile("inverse" if inverse else "forward", x, precision)
    if tile is None:
        return dispatch.net_by_layers(
            layer_inverse if inverse else layer_forward,
            *(x, lu, sign, bias, slopes, a, c, kappa, inverse, logabsdet),
        )
    rows, packed, family = _rows(x), _packed(lu), _slopes(slopes, a, c, kappa)
    sign = None if sign is None else sign.contiguous()
    bias = None if bias is None else bias.contiguous()
    assert family is not None
    if inverse:
        blocks, constant = solve.invert_blocks(packed, sign, block=tile.inner)
        y, total = stack.stack_inverse(
            *(rows, packed, blocks, bias, family),
            constant=constant,
            logabsdet=logabsdet,
            precision=precision,
        )
    else:
        weights, constant = matrix.compose(packed, sign, None, x.dtype)
        y, total = stack.stack_forward(
            *(rows, weights, bias, family), constant=constant, logabsdet=logabsdet, precision=precision
        )
    return y.reshape(x.shape), _total(total, x)


def net_backward(
    grad: Tensor,
    grad_logabsdet: Tensor | None,
    x: Tensor,
    lu: Tensor,
    sign: Tensor | None,
    bias: Tensor | None,
    slopes: Tensor | None,
    a: float,
    c: float,
    kappa: float,
    inverse: bool,
    needs_x: bool,
    needs_lu: bool,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    precision = precision_of(x)
    if inverse:
        precision = solve.at_least_tf32x3(precision)
    tile = _stack_tile("inverse backward" if inverse else "backward", x, precision)
    if tile is None:
        return dispatch.net_backward_by_layers(
            layer_forward,
            layer_backward,
            layer_inverse_backward,
            grad,
            grad_logabsdet,
            x,
            lu,
            sign,
            bias,
            slopes,
            a,
            c,
            kappa,
            inverse,
            needs_x,
            needs_lu,
            needs_bias,
        )
    rows, packed, family = _rows(x), _packed(lu), _slopes(slopes, a, c, kappa)
    sign = None if sign is None else sign.contiguous()
    given_bias = None if bias is None else bias.contiguous()
    share = _flat(grad_logabsdet, (-1,))
    assert family is not None
    if inverse:
        weights, _ = matrix.compose(packed, sign, None, torch.float32)
        blocks, _ = solve.invert_blocks(packed, sign, block=tile.inner)
        grad_x, grad_weights, grad_bias, grad_slopes = stack_gradient.stack_inverse_backward(
            *(_rows(grad), share, rows, weights, packed, blocks, given_bias, family),
            needs_weights=needs_lu or needs_bias,
            precision=precision,
        )
    else:
        weights, _ = matrix.compose(packed, sign, None, x.dtype)
        grad_x, grad_weights, grad_bias, grad_slopes = stack_gradient.stack_backward(
            *(_rows(grad), share, rows, weights, given_bias, family),
            needs_x=needs_x,
            needs_weights=needs_lu or needs_bias,
            precision=precision,
        )
    grad_lu = None
    if needs_lu and grad_weights is not None:
        # W_m's gradient of an inverse comes with its sign; the log-determinant's share has the inverse's.
        row_sum = None
        if share is not None:
            row_sum = (-share if inverse else share).sum().expand(lu.shape[0]).contiguous()
        grad_lu = matrix.compose_backward(grad_weights, row_sum, packed, sign, None)
    return (
        _or_nothing(grad_x if needs_x else None, x, x.shape),
        _or_nothing(None if grad_lu is None else grad_lu.to(lu.dtype), lu),
        _or_nothing(None if grad_bias is None or not needs_bias else grad_bias.to(lu.dtype), lu),
        _slope_gradient(grad_slopes, slopes, x),
    )

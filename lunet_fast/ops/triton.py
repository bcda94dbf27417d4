"""The registered operations on Triton kernels: which kernel, in which arithmetic, for which sizes.

Imported when the first operation goes to Triton, so that a machine without it never notices.

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
from typing import Any

import torch
from torch import Tensor

from lunet_fast.kernels import activation as row_wise
from lunet_fast.kernels import gradient, layer, matrix, stack, substitution, tiles, triangular
from lunet_fast.ops import dispatch, reference
from lunet_fast.ops.by_layers import net_backward_by_layers, net_by_layers
from lunet_fast.ops.cpu.matrix import composes
from lunet_fast.ops.dispatch import implements
from lunet_fast.ops.reference import Slopes
from lunet_fast.ops.values import Activation, Matrix, gradient_of, row_values, rows, shaped

#: Features from which the library's tf32 and bfloat16 products are expected to be faster than this one.
LIBRARY_PRODUCT_FROM = 1024

Four = tuple[Tensor, Tensor, Tensor, Tensor]


def precision_of(x: Tensor) -> str:
    """The arithmetic of a float32 product with x, one of ``kernels.launch.PRECISIONS``."""
    if tiles.architecture(x) < 80:
        return "ieee"
    try:
        highest = torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # set by PyTorch's newer, per-device setting
        highest = torch.backends.cuda.matmul.fp32_precision != "tf32"
    return "tf32x3" if highest else "tf32"


@implements("triton")
def knows(activation: Activation) -> bool:
    return activation.kind in ("identity", "leaky_softplus")


@implements("triton")
def kept(x: Tensor, given: Matrix) -> tuple[bool, bool]:
    return not tiles.recomputes(x.shape[-1]), False


@implements("triton")
def fuses_net(x: Tensor) -> bool:
    return x.shape[-1] <= tiles.NET_FEATURES


def _members(x: Tensor, lu: Tensor) -> Tensor:
    """x as contiguous rows [K, N, D] of K stacked layers, or of one."""
    members = lu.shape[0] if lu.dim() == 3 else 1
    return x.reshape(members, math.prod(x.shape[:-1]) // members, x.shape[-1]).contiguous()


def _stacked(given: Matrix) -> Matrix:
    """The matrix as the kernels take it: a leading dimension for the members, contiguous, lu in float32 or
    bfloat16, the permutation as int64."""
    lu, sign, permutation, bias = given
    if not given.stacked:
        lu, sign, bias = (None if t is None else t.unsqueeze(0) for t in (lu, sign, bias))  # type: ignore
    lu = lu if lu.dtype in (torch.float32, torch.bfloat16) else lu.float()
    order = None if permutation is None else permutation.to(torch.int64)
    return Matrix(lu, sign, order, bias).contiguous()


def _slopes(activation: Activation) -> Slopes | None:
    """The activation as the kernels take it; None for the identity."""
    if activation.linear:
        return None
    return activation.constants if activation.parameters is None else activation.parameters.contiguous()


def _flat(values: Tensor | None, shape: tuple[int, ...]) -> Tensor | None:
    return None if values is None else values.reshape(shape).contiguous()


def _parameters_gradient(activation: Activation, gradient: Tensor | None, x: Tensor) -> Tensor:
    if activation.parameters is None:
        return x.new_empty(0)
    return gradient_of(activation.parameters, gradient)


def _results(
    x: Tensor,
    given: Matrix,
    activation: Activation,
    grad_x: Tensor | None,
    grad_lu: Tensor | None,
    grad_bias: Tensor | None,
    grad_parameters: Tensor | None,
) -> Four:
    lu = given.lu
    return (
        shaped(grad_x, x),
        shaped(None if grad_lu is None else grad_lu.to(lu.dtype), lu),
        shaped(None if grad_bias is None else grad_bias.to(lu.dtype), lu, lu.shape[:-1]),
        _parameters_gradient(activation, grad_parameters, x),
    )


# --- activation -----------------------------------------------------------------------------------------


def _required(slopes: Slopes | None) -> Slopes:
    assert slopes is not None
    return slopes


@implements("triton")
def activation_forward(x: Tensor, activation: Activation, logabsdet: bool) -> tuple[Tensor, Tensor]:
    y, total = row_wise.activation_forward(rows(x), _required(_slopes(activation)), logabsdet=logabsdet)
    return shaped(y, x), row_values(total, x)


@implements("triton")
def activation_inverse(x: Tensor, activation: Activation, logabsdet: bool) -> tuple[Tensor, Tensor]:
    y, total = row_wise.activation_inverse(rows(x), _required(_slopes(activation)), logabsdet=logabsdet)
    return shaped(y, x), row_values(total, x)


def _activation_gradients(
    launch: Any, grad: Tensor, grad_logabsdet: Tensor | None, x: Tensor, activation: Activation
) -> tuple[Tensor, Tensor]:
    slopes, share = _required(_slopes(activation)), _flat(grad_logabsdet, (-1,))
    grad_x, grad_slopes = launch(rows(grad), share, rows(x), slopes)
    return shaped(grad_x, x), _parameters_gradient(activation, grad_slopes, x)


@implements("triton")
def activation_backward(grad: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return _activation_gradients(row_wise.activation_backward, grad, *args)


@implements("triton")
def activation_inverse_backward(grad: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return _activation_gradients(row_wise.activation_inverse_backward, grad, *args)


# --- layer ----------------------------------------------------------------------------------------------


@implements("triton")
def layer_forward(x: Tensor, given: Matrix, activation: Activation, logabsdet: bool, save: bool) -> Four:
    members, (lu, sign, order, bias) = _members(x, given.lu), _stacked(given)
    slopes, precision = _slopes(activation), precision_of(x)
    N, D = members.shape[1:]
    # What the fake of this operation says is saved.
    save_h = save and slopes is not None and not tiles.recomputes(D)
    weight = None
    options: dict[str, Any] = {"logabsdet": logabsdet, "save": save_h, "precision": precision}
    if not composes(N, D):
        constant = reference.log_diagonal(lu).sum(-1) if logabsdet else None
        y, total, h = triangular.layer_forward_rows(
            members, lu, sign, order, bias, slopes, constant=constant, **options
        )
    else:
        weight, constant = matrix.compose(lu, sign, order, x.dtype)
        if D >= LIBRARY_PRODUCT_FROM and slopes is not None and _uses_library(x, precision):
            h = (
                torch.bmm(members, weight.mT)
                if bias is None
                else torch.baddbmm(bias.unsqueeze(1).to(x.dtype), members, weight.mT)
            )
            y, total = row_wise.activation_forward(h.flatten(0, 1), slopes, logabsdet=logabsdet)
            if total is not None:
                total = total.reshape(members.shape[:-1]) + constant.unsqueeze(-1)
        else:
            y, total, h = layer.layer_forward(members, weight, bias, slopes, constant=constant, **options)
    if save and weight is None:
        # Stacked layers always save it; a single layer's W, not formed, is not read.
        formed = given.stacked
        weight = (
            matrix.compose(lu, sign, order, x.dtype)[0] if formed else torch.empty_like(lu, dtype=x.dtype)
        )
    return (
        shaped(y, x),
        row_values(total, x),
        shaped(h if save_h else None, x),
        shaped(weight if save else None, x, given.lu.shape),
    )


def _uses_library(x: Tensor, precision: str) -> bool:
    return x.dtype == torch.bfloat16 or precision == "tf32"


@implements("triton")
def layer_backward(
    grad: Tensor,
    grad_logabsdet: Tensor | None,
    x: Tensor,
    h: Tensor,
    weight: Tensor,
    given: Matrix,
    activation: Activation,
    needs_x: bool,
    needs_lu: bool,
    needs_bias: bool,
) -> Four:
    if weight.dim() > given.lu.dim():
        # The backend was changed since the forward: what PyTorch's kept is for PyTorch's backward.
        return dispatch.implementation("pytorch", "layer_backward")(
            *(grad, grad_logabsdet, x, h, weight, given, activation, needs_x, needs_lu, needs_bias)
        )
    members, (lu, sign, order, bias) = _members(x, given.lu), _stacked(given)
    slopes, (K, N, D) = _slopes(activation), members.shape
    # With N ≤ D the forward of one layer does not form W.
    if composes(N, D) or given.stacked:
        formed = weight.reshape(lu.shape).contiguous()
    else:
        formed = matrix.compose(lu, sign, order, x.dtype)[0]
    share = _flat(grad_logabsdet, (K, N))
    grad_x, grad_weight, grad_bias, grad_slopes = gradient.layer_backward(
        _members(grad, given.lu),
        share,
        members,
        None if slopes is None or tiles.recomputes(D) else _members(h, given.lu),
        formed,
        bias,
        slopes,
        needs_x=needs_x,
        needs_weight=needs_lu,
        needs_bias=needs_bias,
        precision=precision_of(x),
    )
    grad_lu = None
    if grad_weight is not None:
        row_sum = None if share is None else share.sum(-1)
        grad_lu = matrix.compose_backward(grad_weight, row_sum, lu, sign, order)
    return _results(x, given, activation, grad_x, grad_lu, grad_bias, grad_slopes)


@implements("triton")
def layer_inverse(
    x: Tensor, given: Matrix, activation: Activation, logabsdet: bool, save: bool
) -> tuple[Tensor, Tensor, Tensor]:
    members, (lu, sign, order, bias) = _members(x, given.lu), _stacked(given)
    precision, many_rows = precision_of(x), composes(*members.shape[1:])
    prepared = substitution.prepare_inverse(lu, sign, order, precision=precision, many_rows=many_rows)
    result, total, h = substitution.layer_inverse(
        *(members, lu, prepared.inverses, bias, _slopes(activation)),
        permutation=order,
        logabsdet=logabsdet,
        save=save,
        precision=precision,
        constant=prepared.logabsdet,
        weight=prepared.weight,
        condition=prepared.condition,
    )
    return shaped(result, x), row_values(total, x), shaped(h, x)


@implements("triton")
def layer_inverse_backward(
    grad: Tensor,
    grad_logabsdet: Tensor | None,
    x: Tensor,
    h: Tensor,
    given: Matrix,
    activation: Activation,
    needs_x: bool,
    needs_lu: bool,
    needs_bias: bool,
) -> Four:
    members, (lu, sign, order, _) = _members(x, given.lu), _stacked(given)
    slopes, precision, (K, N, _) = _slopes(activation), precision_of(x), members.shape
    prepared = substitution.prepare_inverse(lu, sign, order, precision=precision, many_rows=False)
    share = _flat(grad_logabsdet, (K, N))
    grad_right, grad_y, grad_slopes = substitution.layer_inverse_backward(
        *(_members(grad, given.lu), share, None if slopes is None else _members(h, given.lu)),
        *(lu, prepared.inverses, slopes),
        permutation=order,
        precision=precision,
    )
    grad_lu = grad_bias = None
    if needs_lu:
        grad_weight, grad_bias = gradient.weight_and_bias_gradients(grad_right, members, precision=precision)
        row_sum = None if share is None else share.sum(-1)
        grad_lu = matrix.compose_backward(grad_weight, row_sum, lu, sign, order, direction=-1)
    elif needs_bias:
        grad_bias = grad_right.sum(1, dtype=torch.float32)
    grad_bias = grad_bias.neg() if grad_bias is not None and needs_bias else None
    return _results(x, given, activation, grad_y if needs_x else None, grad_lu, grad_bias, grad_slopes)


# --- net ------------------------------------------------------------------------------------------------


def _net_arithmetic(kernel: str, x: Tensor, inverse: bool) -> tuple[str, tiles.Tile | None]:
    """The precision, and the tile of the kernel for the whole net; None where it has none."""
    precision = precision_of(x)
    if inverse:
        precision = substitution.at_least_tf32x3(precision)
    return precision, tiles.stack_tile(kernel, x.shape[-1], x.dtype, precision, tiles.architecture(x))


@implements("triton")
def net_forward(x: Tensor, given: Matrix, activation: Activation, logabsdet: bool) -> tuple[Tensor, Tensor]:
    precision, tile = _net_arithmetic("forward", x, False)
    if tile is None:
        return net_by_layers(layer_forward, x, given, activation, logabsdet, inverse=False)
    lu, sign, _, bias = _stacked(given)
    weights, constant = matrix.compose(lu, sign, None, x.dtype)
    y, total = stack.stack_forward(
        *(rows(x), weights, bias, _required(_slopes(activation))),
        constant=constant,
        logabsdet=logabsdet,
        precision=precision,
    )
    return shaped(y, x), row_values(total, x)


@implements("triton")
def net_inverse(x: Tensor, given: Matrix, activation: Activation, logabsdet: bool) -> tuple[Tensor, Tensor]:
    precision, tile = _net_arithmetic("inverse", x, True)
    if tile is None:
        return net_by_layers(layer_inverse, x, given, activation, logabsdet, inverse=True)
    lu, sign, _, bias = _stacked(given)
    blocks, constant = substitution.invert_blocks(lu, sign, block=tile.inner)
    y, total = stack.stack_inverse(
        *(rows(x), lu, blocks, bias, _required(_slopes(activation))),
        constant=constant,
        logabsdet=logabsdet,
        precision=precision,
    )
    return shaped(y, x), row_values(total, x)


@implements("triton")
def net_backward(
    grad: Tensor,
    grad_logabsdet: Tensor | None,
    x: Tensor,
    given: Matrix,
    activation: Activation,
    needs_x: bool,
    needs_lu: bool,
    needs_bias: bool,
) -> Four:
    precision, tile = _net_arithmetic("backward", x, False)
    if tile is None:
        return net_backward_by_layers(
            *(layer_forward, layer_backward, grad, grad_logabsdet, x, given, activation),
            *(needs_x, needs_lu, needs_bias),
            inverse=False,
        )
    lu, sign, _, bias = _stacked(given)
    share = _flat(grad_logabsdet, (-1,))
    weights, _ = matrix.compose(lu, sign, None, x.dtype)
    grad_x, grad_weights, grad_bias, grad_slopes = stack.stack_backward(
        *(rows(grad), share, rows(x), weights, bias, _required(_slopes(activation))),
        needs_x=needs_x,
        needs_weights=needs_lu or needs_bias,
        precision=precision,
    )
    grad_lu = _net_lu_gradient(grad_weights if needs_lu else None, share, lu, sign)
    grad_bias = grad_bias if needs_bias else None
    return _results(x, given, activation, grad_x if needs_x else None, grad_lu, grad_bias, grad_slopes)


@implements("triton")
def net_inverse_backward(
    grad: Tensor,
    grad_logabsdet: Tensor | None,
    x: Tensor,
    given: Matrix,
    activation: Activation,
    needs_x: bool,
    needs_lu: bool,
    needs_bias: bool,
) -> Four:
    precision, tile = _net_arithmetic("inverse backward", x, True)
    if tile is None:
        return net_backward_by_layers(
            *(layer_forward, layer_inverse_backward, grad, grad_logabsdet, x, given, activation),
            *(needs_x, needs_lu, needs_bias),
            inverse=True,
        )
    lu, sign, _, bias = _stacked(given)
    share = _flat(grad_logabsdet, (-1,))
    weights, _ = matrix.compose(lu, sign, None, torch.float32)
    blocks, _ = substitution.invert_blocks(lu, sign, block=tile.inner)
    grad_x, grad_weights, grad_bias, grad_slopes = stack.stack_inverse_backward(
        *(rows(grad), share, rows(x), weights, lu, blocks, bias, _required(_slopes(activation))),
        needs_weights=needs_lu or needs_bias,
        precision=precision,
    )
    # W_m's gradient comes with its sign; the log-determinant's share has the inverse's.
    share = None if share is None else -share
    grad_lu = _net_lu_gradient(grad_weights if needs_lu else None, share, lu, sign)
    grad_bias = grad_bias if needs_bias else None
    return _results(x, given, activation, grad_x if needs_x else None, grad_lu, grad_bias, grad_slopes)


def _net_lu_gradient(
    grad_weights: Tensor | None, share: Tensor | None, lu: Tensor, sign: Tensor | None
) -> Tensor | None:
    """The packed matrices' gradient from that of all W and of the log-determinants [N]."""
    if grad_weights is None:
        return None
    row_sum = None if share is None else share.sum().expand(lu.shape[0]).contiguous()
    return matrix.compose_backward(grad_weights, row_sum, lu, sign, None)

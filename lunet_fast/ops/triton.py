"""The registered operations on Triton kernels: which kernel, in which arithmetic, for which sizes.

Imported when the first operation goes to Triton, so that a machine without it never notices.

| rows N, features D | forward | inverse |
| --- | --- | --- |
| N ≤ D | x → U x → L (U x), zero blocks skipped | substitution |
| N > D | W formed, one product | substitution; W⁻¹ where it pays and loses no digits |
| N > D ≥ 1024, tf32 or bfloat16 | W formed, cuBLAS, one row-wise launch | the same |

W⁻¹ pays for D > 128, and from D = 17 on if N·D ≥ 2²². Backward always goes through W: g_W is turned into that
of the packed matrix. With D ≤ 128 it computes h = W x + b again; beyond, the forward saves h.

Arithmetic. Float32 products follow ``torch.get_float32_matmul_precision()``: "highest" gives tf32x3, whose
error is float32's, "high" and "medium" give tf32. GPUs before sm_80 compute in float32 itself. Sums
are float32. The inverse never goes below tf32x3, nor do W, W⁻¹ and their gradients.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lunet_fast.kernels import activation as row_wise
from lunet_fast.kernels import (
    gradient,
    inverse_gradient,
    layer,
    matrix,
    solve,
    spline,
    stack,
    stack_gradient,
    tiles,
    triangular,
)
from lunet_fast.kernels import inverse as inverse_kernels
from lunet_fast.ops import dispatch, reference
from lunet_fast.ops.by_layers import net_backward_by_layers, net_by_layers
from lunet_fast.ops.cpu.matrix import composes
from lunet_fast.ops.dispatch import implements
from lunet_fast.ops.rows import Four, layer_gradients, row_gradient, row_values, rows, rows_of, shaped
from lunet_fast.ops.spline import KIND
from lunet_fast.ops.values import Activation, Matrix

#: Features from which the library's tf32 and bfloat16 products are expected to be faster than this one.
LIBRARY_PRODUCT_FROM = 1024


@implements("triton")
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
    if activation.kind == KIND:
        assert activation.parameters is not None
        return activation.parameters.shape[-2] - 3 <= spline.MOST_BINS
    return activation.kind in ("identity", "leaky_softplus")


@implements("triton")
def kept(x: Tensor, given: Matrix) -> tuple[bool, int]:
    return not tiles.recomputes(x.shape[-1]), 0


@implements("triton")
def fuses_net(x: Tensor) -> bool:
    return x.shape[-1] <= tiles.NET_FEATURES


def _members(x: Tensor, lu: Tensor) -> Tensor:
    """x as contiguous rows [K, N, D] of K stacked layers, or of one."""
    members = rows_of(x, lu)
    return members if lu.dim() == 3 else members.unsqueeze(0)


def _stacked(given: Matrix) -> Matrix:
    """The matrix as the kernels take it: a leading dimension for the members, contiguous, lu in float32 or
    bfloat16, the permutation as int64."""
    lu, sign, permutation, bias = given
    if not given.stacked:
        lu, sign, bias = (None if t is None else t.unsqueeze(0) for t in (lu, sign, bias))  # type: ignore
    lu = lu if lu.dtype in (torch.float32, torch.bfloat16) else lu.float()
    order = None if permutation is None else permutation.to(torch.int64)
    return Matrix(lu, sign, order, bias).contiguous()


def _slopes(activation: Activation) -> Any:
    """The activation as the kernels take it, ``kernels.activation.Slopes``; None for the identity."""
    if activation.linear:
        return None
    if activation.kind == KIND:
        assert activation.parameters is not None
        return spline.Spline(activation.parameters.contiguous())
    return activation.constants if activation.parameters is None else activation.parameters.contiguous()


# --- activation -----------------------------------------------------------------------------------------


@implements("triton")
def activation_forward(x: Tensor, activation: Activation, logabsdet: bool) -> tuple[Tensor, Tensor]:
    y, total = row_wise.activation_forward(rows(x), _slopes(activation), logabsdet=logabsdet)
    return shaped(y, x), row_values(total, x)


@implements("triton")
def activation_inverse(x: Tensor, activation: Activation, logabsdet: bool) -> tuple[Tensor, Tensor]:
    y, total = row_wise.activation_inverse(rows(x), _slopes(activation), logabsdet=logabsdet)
    return shaped(y, x), row_values(total, x)


def _activation_gradients(
    launch: Any, grad: Tensor, grad_logabsdet: Tensor | None, x: Tensor, activation: Activation
) -> tuple[Tensor, Tensor]:
    slopes, share = _slopes(activation), row_gradient(grad_logabsdet)
    grad_x, grad_slopes = launch(rows(grad), share, rows(x), slopes)
    return shaped(grad_x, x), activation.parameters_gradient(grad_slopes, x)


@implements("triton")
def activation_backward(grad: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return _activation_gradients(row_wise.activation_backward, grad, *args)


@implements("triton")
def activation_inverse_backward(grad: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return _activation_gradients(row_wise.activation_inverse_backward, grad, *args)


# --- layer ----------------------------------------------------------------------------------------------


@implements("triton")
def layer_forward(x: Tensor, given: Matrix, activation: Activation, logabsdet: bool, save: bool) -> Four:
    members, slopes, precision = _members(x, given.lu), _slopes(activation), precision_of(x)
    lu, sign, order, bias = stacked = _stacked(given)
    N, D = members.shape[1:]
    # What the fake of this operation says is saved.
    save_h = save and slopes is not None and not tiles.recomputes(D)
    weight = None
    options: dict[str, Any] = {"logabsdet": logabsdet, "save": save_h, "precision": precision}
    if not composes(N, D):
        constant = reference.log_diagonal(lu).sum(-1) if logabsdet else None
        y, total, h = triangular.layer_forward_rows(members, *stacked, slopes, constant=constant, **options)
    else:
        weight, constant = matrix.compose(lu, sign, order, x.dtype)
        narrow = x.dtype == torch.bfloat16 or precision == "tf32"
        if narrow and slopes is not None and D >= LIBRARY_PRODUCT_FROM:
            if bias is None:
                h = torch.bmm(members, weight.mT)
            else:
                h = torch.baddbmm(bias.unsqueeze(1).to(x.dtype), members, weight.mT)
            y, total = row_wise.activation_forward(h.flatten(0, 1), slopes, logabsdet=logabsdet)
            if total is not None:
                total = total.reshape(members.shape[:-1]) + constant.unsqueeze(-1)
        else:
            y, total, h = layer.layer_forward(members, weight, bias, slopes, constant=constant, **options)
    if save and weight is None:
        # Stacked layers always save it; a single layer's W, not formed, is not read.
        unformed = torch.empty_like(lu, dtype=x.dtype)
        weight = matrix.compose(lu, sign, order, x.dtype)[0] if given.stacked else unformed
    saved = shaped(h if save_h else None, x), shaped(weight if save else None, x, given.lu.shape)
    return shaped(y, x), row_values(total, x), *saved


@implements("triton")
def layer_backward(
    grad: Tensor,
    grad_logabsdet: Tensor | None,
    x: Tensor,
    h: Tensor,
    weight: Tensor,
    given: Matrix,
    activation: Activation,
    *needs: bool,
) -> Four:
    if weight.dim() > given.lu.dim():
        # The backend was changed since the forward: what PyTorch's kept is for PyTorch's backward.
        return dispatch.implementation("pytorch", "layer_backward")(
            *(grad, grad_logabsdet, x, h, weight, given, activation, *needs)
        )
    members, (lu, sign, order, bias) = _members(x, given.lu), _stacked(given)
    slopes, (K, N, D), (needs_x, needs_lu, needs_bias) = _slopes(activation), members.shape, needs
    # With N ≤ D the forward of one layer does not form W.
    if composes(N, D) or given.stacked:
        formed = weight.reshape(lu.shape).contiguous()
    else:
        formed = matrix.compose(lu, sign, order, x.dtype)[0]
    share = row_gradient(grad_logabsdet, (K, N))
    saved = None if slopes is None or tiles.recomputes(D) else _members(h, given.lu)
    grad_x, grad_weight, grad_bias, grad_slopes = gradient.layer_backward(
        *(_members(grad, given.lu), share, members, saved, formed, bias, slopes),
        needs_x=needs_x,
        needs_weight=needs_lu,
        needs_bias=needs_bias,
        precision=precision_of(x),
    )
    grad_lu = None
    if grad_weight is not None:
        row_sum = None if share is None else share.sum(-1)
        grad_lu = matrix.compose_backward(grad_weight, row_sum, lu, sign, order)
    return layer_gradients(x, given, activation, grad_x, grad_lu, grad_bias, grad_slopes)


@implements("triton")
def layer_inverse(
    x: Tensor, given: Matrix, activation: Activation, logabsdet: bool, save: bool
) -> tuple[Tensor, Tensor, Tensor]:
    members, (lu, sign, order, bias) = _members(x, given.lu), _stacked(given)
    precision, N = precision_of(x), members.shape[1]
    prepared = inverse_kernels.prepare_inverse(lu, sign, order, precision=precision, N=N)
    options: dict[str, Any] = {"logabsdet": logabsdet, "save": save, "precision": precision}
    result, total, h = inverse_kernels.layer_inverse(
        *(members, lu, prepared.inverses, bias, _slopes(activation)),
        **options,
        permutation=order,
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
    *needs: bool,
) -> Four:
    members, (lu, sign, order, _) = _members(x, given.lu), _stacked(given)
    slopes, precision, (K, N, _) = _slopes(activation), precision_of(x), members.shape
    needs_x, needs_lu, needs_bias = needs
    prepared = inverse_kernels.prepare_inverse(lu, sign, order, precision=precision, N=0)
    share = row_gradient(grad_logabsdet, (K, N))
    grad_right, grad_y, grad_slopes = inverse_gradient.layer_inverse_backward(
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
    return layer_gradients(x, given, activation, grad_y if needs_x else None, grad_lu, grad_bias, grad_slopes)


# --- net ------------------------------------------------------------------------------------------------


def _net_arithmetic(kernel: str, x: Tensor, inverse: bool) -> tuple[str, tiles.Tile | None]:
    """The precision, and the tile of the kernel for the whole net; None where it has none."""
    precision = precision_of(x)
    if inverse:
        precision = solve.at_least_tf32x3(precision)
    return precision, tiles.stack_tile(kernel, x.shape[-1], x.dtype, precision, tiles.architecture(x))


class Net:
    """A net, or its inverse, of layers of one kind as one launch.

    Made of the layers as they are, for rows of this dtype; then the numbers in matrices and biases may
    change, signs and activation not.
    """

    def __init__(
        self, dtype: torch.dtype, given: Matrix, activation: Activation, precision: str, block: int
    ) -> None:
        """``block``: of the substitution by which the net is inverted, or 0, and it is not."""
        lu, sign, _, _ = _stacked(given)
        self._dtype, self._inverse, self._slopes = dtype, block > 0, _slopes(activation)
        self._precision = precision
        self._prepare: Any = (
            solve.InvertBlocks(lu, sign, block=block) if block else matrix.Compose(lu, sign, None, dtype)
        )
        self._stack: stack.Stack | None = None

    def matrices(self, lu: Tensor) -> tuple[Tensor, ...]:
        """What a call needs of the matrices [M, D, D] as they are now, in one launch."""
        found: tuple[Tensor, ...] = self._prepare(lu)
        return (lu, *found) if self._inverse else found

    def __call__(
        self, rows: Tensor, matrices: tuple[Tensor, ...], bias: Tensor | None, *, logabsdet: bool
    ) -> tuple[Tensor, Tensor | None]:
        """The result for contiguous rows [N, D], and log|det| [N] if asked for."""
        *factors, constant = matrices
        run = self._stack
        if run is None:
            options: Any = {"constant": constant, "precision": self._precision}
            leading = (self._dtype,) if self._inverse else ()
            prepare: Any = stack.prepare_inverse if self._inverse else stack.prepare_forward
            self._stack = run = prepare(*leading, *factors, bias, self._slopes, **options)
        return run(rows, *factors, biases=bias, constant=constant, logabsdet=logabsdet)


@implements("triton")
def prepare_net(x: Tensor, given: Matrix, activation: Activation, *, inverse: bool) -> Net | None:
    """``net_forward``, or the inverse, for rows like x's; None where no kernel has the whole net."""
    precision, tile = _net_arithmetic("inverse" if inverse else "forward", x, inverse)
    if tile is None:
        return None
    return Net(x.dtype, given, activation, precision, tile.inner if inverse else 0)


@implements("triton")
def net_forward(
    x: Tensor, given: Matrix, activation: Activation, logabsdet: bool, *, inverse: bool = False
) -> tuple[Tensor, Tensor]:
    net = prepare_net(x, given, activation, inverse=inverse)
    if net is None:
        by_layer = layer_inverse if inverse else layer_forward
        return net_by_layers(by_layer, x, given, activation, logabsdet, inverse=inverse)
    stacked = _stacked(given)
    y, total = net(rows(x), net.matrices(stacked.lu), stacked.bias, logabsdet=logabsdet)
    return shaped(y, x), row_values(total, x)


@implements("triton")
def net_inverse(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return net_forward(x, *args, inverse=True)


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
    *,
    inverse: bool = False,
) -> Four:
    precision, tile = _net_arithmetic("inverse backward" if inverse else "backward", x, inverse)
    if tile is None:
        by_layer = layer_inverse_backward if inverse else layer_backward
        return net_backward_by_layers(
            *(layer_forward, by_layer, grad, grad_logabsdet, x, given, activation),
            *(needs_x, needs_lu, needs_bias),
            inverse=inverse,
        )
    (lu, sign, _, bias), slopes = _stacked(given), _slopes(activation)
    needs_weights, share = needs_lu or needs_bias, row_gradient(grad_logabsdet)
    weights, _ = matrix.compose(lu, sign, None, torch.float32 if inverse else x.dtype)
    if inverse:
        blocks, _ = solve.invert_blocks(lu, sign, block=tile.inner)
        grad_x, grad_weights, grad_bias, grad_slopes = stack_gradient.stack_inverse_backward(
            *(rows(grad), share, rows(x), weights, lu, blocks, bias, slopes),
            needs_weights=needs_weights,
            precision=precision,
        )
        # W_m's gradient comes with its sign; the log-determinant's share has the inverse's.
        share = None if share is None else -share
    else:
        grad_x, grad_weights, grad_bias, grad_slopes = stack_gradient.stack_backward(
            *(rows(grad), share, rows(x), weights, bias, slopes),
            needs_x=needs_x,
            needs_weights=needs_weights,
            precision=precision,
        )
    grad_lu = None
    if grad_weights is not None and needs_lu:
        row_sum = None if share is None else share.sum().expand(lu.shape[0]).contiguous()
        grad_lu = matrix.compose_backward(grad_weights, row_sum, lu, sign, None)
    wanted = (grad_x if needs_x else None, grad_lu, grad_bias if needs_bias else None, grad_slopes)
    return layer_gradients(x, given, activation, *wanted)


@implements("triton")
def net_inverse_backward(grad: Tensor, *args: Any) -> Four:
    return net_backward(grad, *args, inverse=True)

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

from functools import cached_property
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

#: Features up to which a program of the layer's product has all columns of its rows, or half of them.
ONE_BLOCK = 128


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


class Layer:
    """A layer, or K stacked ones, on the kernels.

    Made of the layer as it is, for rows of this D, dtype and device; then their number and the numbers in
    matrix and bias may change, sign, permutation and activation not.
    """

    def __init__(self, x: Tensor, given: Matrix, activation: Activation) -> None:
        self._rows, self._given, self._stacked = x.new_empty((0, x.shape[-1])), given, _stacked(given)
        self._slopes, self._precision = _slopes(activation), precision_of(x)
        narrow = x.dtype == torch.bfloat16 or self._precision == "tf32"
        self._library = narrow and not activation.linear and x.shape[-1] >= LIBRARY_PRODUCT_FROM

    @cached_property
    def _compose(self) -> matrix.Compose:
        return matrix.Compose(*self._stacked[:3], self._rows.dtype)

    @cached_property
    def _product(self) -> layer.Forward:
        return layer.Forward(self._rows, self._slopes, precision=self._precision)

    @cached_property
    def _triangles(self) -> triangular.Forward:
        _, sign, order, _ = self._stacked
        return triangular.Forward(self._rows, sign, order, self._slopes, precision=self._precision)

    def matrices(self, lu: Tensor, x: Tensor | None) -> tuple[Tensor, Tensor] | None:
        """(W, log|det W|) of ``lu`` [K, D, D] as it is now, where the rows of x, or None: many calls, are
        worth it."""
        return self._compose(lu) if x is None or composes(_rows_each(x, lu), lu.shape[-1]) else None

    def __call__(
        self,
        x: Tensor,
        lu: Tensor,
        matrices: tuple[Tensor, Tensor] | None,
        bias: Tensor | None,
        *,
        logabsdet: bool,
        save: bool = False,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """(y like x, log|det J| [...] if asked for, h like x if saved); ``bias`` [K, D]."""
        members = _members(x, self._given.lu)
        given: dict[str, Any] = {"logabsdet": logabsdet, "save": save}
        if matrices is None:
            constant = reference.log_diagonal(lu).sum(-1) if logabsdet else None
            y, total, h = self._triangles(members, lu, bias, constant=constant, **given)
        elif self._library:
            y, total, h = self._by_library(members, *matrices, bias, logabsdet)
        else:
            weight, constant = matrices
            y, total, h = self._product(members, weight, bias, constant=constant, **given)
        return _as_rows_were(x, y, total, h)

    def _by_library(
        self, members: Tensor, weight: Tensor, constant: Tensor, bias: Tensor | None, logabsdet: bool
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        if bias is None:
            h = torch.bmm(members, weight.mT)
        else:
            h = torch.baddbmm(bias.unsqueeze(1).to(members.dtype), members, weight.mT)
        y, total = row_wise.activation_forward(h.flatten(0, 1), self._slopes, logabsdet=logabsdet)
        if total is not None:
            total = total.reshape(members.shape[:-1]) + constant.unsqueeze(-1)
        return y, total, h


class LayerInverse:
    """``Layer``, inverted."""

    def __init__(self, x: Tensor, given: Matrix, activation: Activation) -> None:
        precision, self._given = precision_of(x), given
        lu, sign, order, _ = _stacked(given)
        self._prepare = inverse_kernels.Preparation(lu, sign, order, precision=precision)
        self._run = inverse_kernels.Inverse(x, order, _slopes(activation), precision=precision)

    def matrices(self, lu: Tensor, x: Tensor | None) -> inverse_kernels.PreparedInverse:
        """What the rows of x need of ``lu`` [K, D, D] as it is now; None: what many calls of one layer do.

        For those the host waits for the condition, so that one of two launches is left.
        """
        found = self._prepare(lu, None if x is None else _rows_each(x, lu))
        if x is not None or found.condition is None:
            return found
        if bool((found.condition <= solve.EXPLICIT_INVERSE_LIMIT.value).all()):
            return found._replace(inverses=None)
        return found._replace(weight=None, condition=None)

    def __call__(
        self,
        x: Tensor,
        lu: Tensor,
        matrices: inverse_kernels.PreparedInverse,
        bias: Tensor | None,
        *,
        logabsdet: bool,
        save: bool = False,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """(The inverse at x, like x, its log|det J| [...] if asked for, h like x if saved)."""
        inverses, constant, weight, condition = matrices
        found = self._run(
            *(_members(x, self._given.lu), lu, inverses, bias),
            logabsdet=logabsdet,
            save=save,
            constant=constant,
            weight=weight,
            condition=condition,
        )
        return _as_rows_were(x, *found)


def _rows_each(x: Tensor, lu: Tensor) -> int:
    """How many rows each of the layers ``lu`` [K, D, D] gets of x."""
    return x.numel() // (lu.shape[0] * lu.shape[-1])


def _as_rows_were(
    x: Tensor, result: Tensor, total: Tensor | None, h: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """What kernels made of x, in its shape."""
    return (
        shaped(result, x),
        None if total is None else row_values(total, x),
        None if h is None else shaped(h, x),
    )


@implements("triton")
def prepare_layer(
    x: Tensor, given: Matrix, activation: Activation, *, inverse: bool, many: bool
) -> Layer | LayerInverse | None:
    """A layer, or its inverse, for rows like x's.

    With ``many`` calls of the same matrices, where rows are as long as several blocks of columns, None: a
    library's product with what was formed once is better then. Not for an inverse in less than float32.
    """
    if many and x.shape[-1] > ONE_BLOCK and not (inverse and precision_of(x) == "tf32"):
        return None
    return (LayerInverse if inverse else Layer)(x, given, activation)


@implements("triton")
def layer_forward(x: Tensor, given: Matrix, activation: Activation, logabsdet: bool, save: bool) -> Four:
    run, (lu, sign, order, bias) = Layer(x, given, activation), _stacked(given)
    # What the fake of this operation says is saved.
    save_h = save and not activation.linear and not tiles.recomputes(x.shape[-1])
    matrices = run.matrices(lu, x)
    y, total, h = run(x, lu, matrices, bias, logabsdet=logabsdet, save=save_h)
    weight = None if matrices is None else matrices[0]
    if save and weight is None:
        # Stacked layers always save it; a single layer's W, not formed, is not read.
        unformed = torch.empty_like(lu, dtype=x.dtype)
        weight = matrix.compose(lu, sign, order, x.dtype)[0] if given.stacked else unformed
    saved = shaped(h if save_h else None, x), shaped(weight if save else None, x, given.lu.shape)
    return y, row_values(total, x), *saved


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
    run, (lu, _, _, bias) = LayerInverse(x, given, activation), _stacked(given)
    result, total, h = run(x, lu, run.matrices(lu, x), bias, logabsdet=logabsdet, save=save)
    return result, row_values(total, x), shaped(h, x)


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
    inverses, _ = solve.invert_blocks(lu, sign, block=tiles.substitution_block(lu.shape[-1]))
    share = row_gradient(grad_logabsdet, (K, N))
    grad_right, grad_y, grad_slopes = inverse_gradient.layer_inverse_backward(
        *(_members(grad, given.lu), share, None if slopes is None else _members(h, given.lu)),
        *(lu, inverses, slopes),
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

    def matrices(self, lu: Tensor, x: Tensor | None) -> tuple[Tensor, ...]:
        """What any rows need of the matrices [M, D, D] as they are now, in one launch."""
        found: tuple[Tensor, ...] = self._prepare(lu)
        return found

    def __call__(
        self, x: Tensor, lu: Tensor, matrices: tuple[Tensor, ...], bias: Tensor | None, *, logabsdet: bool
    ) -> tuple[Tensor, Tensor | None]:
        """The result, like x, and log|det J| [...] if asked for; ``bias`` [M, D]."""
        *factors, constant = (lu, *matrices) if self._inverse else matrices
        run = self._stack
        if run is None:
            options: Any = {"constant": constant, "precision": self._precision}
            leading = (self._dtype,) if self._inverse else ()
            prepare: Any = stack.prepare_inverse if self._inverse else stack.prepare_forward
            self._stack = run = prepare(*leading, *factors, bias, self._slopes, **options)
        y, total = run(rows(x), *factors, biases=bias, constant=constant, logabsdet=logabsdet)
        if x.dim() == 2:
            return y, total
        return shaped(y, x), None if total is None else row_values(total, x)


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
    y, total = net(x, stacked.lu, net.matrices(stacked.lu, x), stacked.bias, logabsdet=logabsdet)
    return y, row_values(total, x)


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

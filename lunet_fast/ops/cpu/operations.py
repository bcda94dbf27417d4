"""The registered operations in PyTorch: any leading shape to rows, the computation, and back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lunet_fast.ops import dispatch
from lunet_fast.ops.by_layers import net_backward_by_layers, net_by_layers
from lunet_fast.ops.cpu import layer, leaky_softplus, spline  # noqa: F401  (importing a kind registers it)
from lunet_fast.ops.cpu.elementwise import elementwise
from lunet_fast.ops.cpu.layer import Needs, matrices_kept
from lunet_fast.ops.cpu.matrix import Packed, composes
from lunet_fast.ops.dispatch import implements
from lunet_fast.ops.rows import Four, layer_gradients, row_gradient, row_values, rows, rows_of, shaped
from lunet_fast.ops.values import Activation, Matrix


@implements("pytorch")
def kept(x: Tensor, matrix: Matrix) -> tuple[bool, int]:
    return True, matrices_kept(x, matrix.lu)


# --- activation -----------------------------------------------------------------------------------------


@implements("pytorch")
def activation_forward(x: Tensor, activation: Activation, logabsdet: bool) -> tuple[Tensor, Tensor]:
    phi, h = elementwise(activation, x.dtype), rows(x)
    assert phi is not None
    y, total = phi.activated(h, logabsdet=logabsdet)
    return shaped(y, x), row_values(total, x)


@implements("pytorch")
def activation_recorded(x: Tensor, activation: Activation, logabsdet: bool) -> dispatch.Recorded | None:
    """``activation_forward``; None where nothing would be kept."""
    phi = elementwise(activation, x.dtype)
    assert phi is not None
    found = phi.recorded(rows(x), logabsdet=logabsdet)
    if found is None:
        return None
    y, total, backward = found

    def gradients(grad: Tensor, grad_logabsdet: Tensor | None, *_: Any) -> tuple[Tensor, Tensor]:
        grad_x, totals = backward(rows(grad), row_gradient(grad_logabsdet))
        return shaped(grad_x, x), activation.parameters_gradient(totals, x)

    return dispatch.Recorded(shaped(y, x), row_values(total, x) if logabsdet else None, (), gradients)


@implements("pytorch")
def activation_inverse(x: Tensor, activation: Activation, logabsdet: bool) -> tuple[Tensor, Tensor]:
    phi = elementwise(activation, x.dtype)
    assert phi is not None
    h = phi.inverse(rows(x))
    return shaped(h, x), row_values(phi.log_derivative_sum(h).neg_() if logabsdet else None, x)


@implements("pytorch")
def activation_backward(
    grad: Tensor, grad_logabsdet: Tensor | None, x: Tensor, activation: Activation, *, inverse: bool = False
) -> tuple[Tensor, Tensor]:
    phi = elementwise(activation, x.dtype)
    assert phi is not None
    backward = phi.inverse_backward if inverse else phi.backward
    grad_x, totals = backward(rows(grad), row_gradient(grad_logabsdet), rows(x))
    return shaped(grad_x, x), activation.parameters_gradient(totals, x)


@implements("pytorch")
def activation_inverse_backward(
    grad: Tensor, grad_logabsdet: Tensor | None, x: Tensor, activation: Activation
) -> tuple[Tensor, Tensor]:
    return activation_backward(grad, grad_logabsdet, x, activation, inverse=True)


# --- layer ----------------------------------------------------------------------------------------------


def _forward_of_rows(
    x: Tensor,
    matrix: Matrix,
    activation: Activation,
    *,
    logabsdet: bool,
    save: bool,
    memory: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, list[Any]]:
    """(y, log|det J| or None, [h or None, and what else is kept]) in the shape of rows; kept are three
    matrices of a layer that ``is_factored``, else one. ``memory`` [3, D, D] is for the three."""
    packed, phi = Packed.of(matrix), elementwise(activation, x.dtype)
    given: Any = (rows_of(x, matrix.lu), packed, matrix.bias, phi)
    if layer.is_factored(x, matrix.lu):
        found: Any = layer.factored_forward(*given, logabsdet=logabsdet, save=save, memory=memory)
    else:
        forward: Any = layer.stacked_forward if matrix.stacked else layer.layer_forward
        found = forward(*given, logabsdet=logabsdet, save=save)
    y, total, *kept = found
    return y, total, kept


def _gradients_of_rows(
    grad: Tensor,
    grad_logabsdet: Tensor | None,
    x: Tensor,
    kept: Sequence[Any],
    matrix: Matrix,
    activation: Activation,
    *needs: bool,
) -> Four:
    """The backward of ``_forward_of_rows`` from what it kept; h is computed again where it is missing."""
    phi, lu = elementwise(activation, x.dtype), matrix.lu
    x_rows, (h, *matrices) = rows_of(x, lu), kept
    given = (rows_of(grad, lu), row_gradient(grad_logabsdet, x_rows.shape[:-1]), x_rows)
    if len(matrices) == 3:
        found = layer.factored_backward(*given, h, matrices, lu, matrix.permutation, phi, Needs(*needs))
    else:
        packed = Packed.of(matrix)
        if h is None and phi is not None:
            h = _preactivation(x_rows, packed, matrix)
        backward: Any = layer.stacked_backward if matrix.stacked else layer.layer_backward
        found = backward(*given, h, matrices[0], packed, phi, Needs(*needs))
    return layer_gradients(x, matrix, activation, *found)


@implements("pytorch")
def layer_recorded(x: Tensor, matrix: Matrix, activation: Activation, logabsdet: bool) -> dispatch.Recorded:
    """``layer_forward`` and what its backward needs, as it comes."""
    y, total, kept = _forward_of_rows(x, matrix, activation, logabsdet=logabsdet, save=True)
    total = None if total is None else row_values(total, x)
    return dispatch.Recorded(shaped(y, x), total, kept, _gradients_of_rows)


@implements("pytorch")
def layer_forward(x: Tensor, matrix: Matrix, activation: Activation, logabsdet: bool, save: bool) -> Four:
    """(y, log|det J| per row, h, A). The last two are for backward: h is empty without an activation, and
    A holds nothing meaningful when it was not formed (``composes``). Of ``matrices_kept`` in its place three
    are what ``factored_forward`` keeps, and one is A or U x."""
    keeps_h, matrices = dispatch.kept(x, matrix, activation) if save else (False, 0)
    memory = x.new_empty(3, *matrix.lu.shape) if matrices == 3 else None
    y, total, (h, *products) = _forward_of_rows(
        x, matrix, activation, logabsdet=logabsdet, save=save, memory=memory
    )
    y, total = shaped(y, x), row_values(total, x)
    if not save:
        return y, total, x.new_empty(0), x.new_empty(0)
    weight = memory
    if weight is None:
        weight = products[0]
        assert weight is not None
        if weight.shape[-2:] != matrix.lu.shape[-2:]:
            weight = torch.empty_like(matrix.lu, dtype=x.dtype)
            if matrices:
                weight[: len(products[0])] = products[0]
        weight = weight.unsqueeze(0) if matrices == 1 else weight
    return y, total, shaped(h if keeps_h else None, x), weight


@implements("pytorch")
def layer_backward(
    grad: Tensor,
    grad_logabsdet: Tensor | None,
    x: Tensor,
    h: Tensor,
    weight: Tensor,
    matrix: Matrix,
    activation: Activation,
    *needs: bool,
) -> Four:
    lu = matrix.lu
    count, own = math.prod(x.shape[:-1]), weight.dim() > lu.dim()
    few = not (matrix.stacked or composes(count, lu.shape[-1]))
    first: Any
    first, *factors = weight.unbind(0) if own else (weight,)
    if few:
        first = first[:count] if own else None
    # A forward that Triton did may not have saved h.
    h_rows = rows_of(h, lu) if h.numel() == x.numel() and not activation.linear else None
    kept = (h_rows, first, *factors)
    return _gradients_of_rows(grad, grad_logabsdet, x, kept, matrix, activation, *needs)


def _preactivation(x_rows: Tensor, packed: Packed, matrix: Matrix) -> Tensor:
    """h = A x + b."""
    forward: Any = layer.stacked_forward if matrix.stacked else layer.layer_forward
    return forward(x_rows, packed, matrix.bias, None, logabsdet=False, save=False)[0]


@implements("pytorch")
def layer_inverse(
    x: Tensor, matrix: Matrix, activation: Activation, logabsdet: bool, save: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(the layer's x, the inverse's log-determinant per row, h for backward)."""
    if matrix.stacked:
        members = [
            layer_inverse(x[k], matrix.member(k), activation, logabsdet, save)
            for k in range(matrix.lu.shape[0])
        ]
        result, total, h = (torch.stack(results) for results in zip(*members, strict=True))
        kept_h = save and not activation.linear
        return result, total if logabsdet else total.flatten(), h if kept_h else h.flatten()
    phi = elementwise(activation, x.dtype)
    result, logs, kept_h_ = layer.layer_inverse(
        rows(x), Packed.of(matrix), matrix.bias, phi, logabsdet=logabsdet, save=save
    )
    return shaped(result, x), row_values(logs, x), shaped(kept_h_, x)


@implements("pytorch")
def layer_inverse_backward(
    grad: Tensor,
    grad_logabsdet: Tensor | None,
    x: Tensor,
    h: Tensor,
    matrix: Matrix,
    activation: Activation,
    *needs: bool,
) -> Four:
    if matrix.stacked:
        members = [
            layer_inverse_backward(
                *(grad[k], None if grad_logabsdet is None else grad_logabsdet[k], x[k]),
                *(h[k] if h.dim() > 1 else h, matrix.member(k), activation, *needs),
            )
            for k in range(matrix.lu.shape[0])
        ]
        stacked = [torch.stack(parts) for parts in zip(*members, strict=True)]
        wanted = [part if need else part.flatten() for part, need in zip(stacked[:3], needs, strict=True)]
        return wanted[0], wanted[1], wanted[2], stacked[3].sum(0)
    phi = elementwise(activation, x.dtype)
    gradients = layer.layer_inverse_backward(
        *(rows(grad), row_gradient(grad_logabsdet), rows(x), None if phi is None else rows(h)),
        *(Packed.of(matrix), phi, Needs(*needs)),
    )
    return layer_gradients(x, matrix, activation, *(gradients if needs[0] else gradients._replace(x=None)))


# --- net ------------------------------------------------------------------------------------------------


@implements("pytorch")
def net_forward(x: Tensor, matrix: Matrix, activation: Activation, logabsdet: bool) -> tuple[Tensor, Tensor]:
    return net_by_layers(layer_forward, x, matrix, activation, logabsdet, inverse=False)


@implements("pytorch")
def net_inverse(x: Tensor, matrix: Matrix, activation: Activation, logabsdet: bool) -> tuple[Tensor, Tensor]:
    return net_by_layers(layer_inverse, x, matrix, activation, logabsdet, inverse=True)


@implements("pytorch")
def net_backward(grad: Tensor, *args: Any) -> Four:
    return net_backward_by_layers(layer_forward, layer_backward, grad, *args, inverse=False)


@implements("pytorch")
def net_inverse_backward(grad: Tensor, *args: Any) -> Four:
    return net_backward_by_layers(layer_forward, layer_inverse_backward, grad, *args, inverse=True)

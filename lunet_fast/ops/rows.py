"""Any leading shape to the rows that an implementation works on, and its results back."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from lunet_fast.ops.precision import wide
from lunet_fast.ops.values import Activation, Matrix

Four = tuple[Tensor, Tensor, Tensor, Tensor]


def rows(x: Tensor) -> Tensor:
    """x as contiguous rows [N, D]; a 0-dimensional x is one row of one."""
    if x.dim() == 2:
        return x.contiguous()
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1] if x.dim() else 1).contiguous()


def rows_of(x: Tensor, lu: Tensor) -> Tensor:
    """x as contiguous rows [N, D] of a layer, or [K, N, D] of stacked layers."""
    if lu.dim() == 2:
        return rows(x)
    return x.reshape(lu.shape[0], math.prod(x.shape[1:-1]), x.shape[-1]).contiguous()


def shaped(result: Tensor | None, like: Tensor, shape: Sequence[int] | None = None) -> Tensor:
    """``result`` in ``shape``, that of ``like`` if not given; where it was not asked for, no elements."""
    if result is None:
        return like.new_empty(0)
    shape = like.shape if shape is None else shape
    return result if result.shape == shape else result.reshape(shape)


def row_values(total: Tensor | None, x: Tensor) -> Tensor:
    """One value for each row of x, float32 or wider, in x's leading shape; no elements if not asked for."""
    return x.new_empty(0, dtype=wide(x.dtype)) if total is None else total.reshape(x.shape[:-1])


def row_gradient(grad_logabsdet: Tensor | None, shape: Sequence[int] = (-1,)) -> Tensor | None:
    """The gradient of one value for each row, contiguous, in the shape that rows have."""
    return None if grad_logabsdet is None else grad_logabsdet.reshape(shape).contiguous()


def layer_gradients(x: Tensor, matrix: Matrix, activation: Activation, *found: Tensor | None) -> Four:
    """The results of a layer's or net's backward, from the gradients of x, lu, bias and the activation's
    parameters in any shape and precision, None where not asked for."""
    lu, (grad_x, grad_lu, grad_bias, grad_parameters) = matrix.lu, found
    return (
        shaped(grad_x, x),
        shaped(None if grad_lu is None else grad_lu.to(lu.dtype), lu),
        shaped(None if grad_bias is None else grad_bias.to(lu.dtype), lu, lu.shape[:-1]),
        activation.parameters_gradient(grad_parameters, x),
    )

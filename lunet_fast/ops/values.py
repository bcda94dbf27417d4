"""The two values that describe a layer, its matrix and its activation, and what rows and results look like.

Both travel whole from ``functional`` to the kernels' launchers. A registered operation takes tensors and
numbers alone and has their fields as arguments: ``flatten`` and ``structure`` lead from one to the other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from lunet_fast.ops.precision import wide

Four = tuple[Tensor, Tensor, Tensor, Tensor]

#: What ``torch.ops.lunet_fast`` operations call the fields.
MATRIX_SCHEMA = "Tensor lu, Tensor? sign, Tensor? permutation, Tensor? bias"
ACTIVATION_SCHEMA = "str kind, Tensor? parameters, float[] constants"


class Matrix(NamedTuple):
    """A = Pᵀ L U and b: ``lu`` [D, D] packed as in ``reference``, sign [D], permutation [D], bias [D].

    K stacked layers have lu [K, D, D], sign and bias [K, D] and no permutation; so do the M layers of a net,
    one after another.
    """

    lu: Tensor
    sign: Tensor | None = None
    permutation: Tensor | None = None
    bias: Tensor | None = None

    @property
    def stacked(self) -> bool:
        return self.lu.dim() == 3

    def member(self, k: int) -> Matrix:
        """Layer k of several."""
        sign, bias = (None if t is None else t[k] for t in (self.sign, self.bias))
        return Matrix(self.lu[k], sign, None, bias)

    def contiguous(self) -> Matrix:
        return Matrix(*(None if t is None else t.contiguous() for t in self))  # type: ignore[arg-type]


class Activation(NamedTuple):
    """An activation that implementations know by its ``kind``, with a formula in ``reference.ACTIVATIONS``.

    What is learnt is in the tensor ``parameters``, what is not in ``constants``. The layers of a net have
    their parameters in a leading dimension.
    """

    kind: str
    parameters: Tensor | None
    constants: tuple[float, ...]

    @property
    def linear(self) -> bool:
        """Whether there is no activation."""
        return self.kind == "identity"

    def at(self, m: int, layers: int) -> Activation:
        """That of layer m of a net of so many layers, the last one linear."""
        if m == layers - 1:
            return IDENTITY
        return self if self.parameters is None else self._replace(parameters=self.parameters[m])


#: No activation.
IDENTITY = Activation("identity", None, ())


def flatten(values: Sequence[Any]) -> list[Any]:
    """``values`` with the fields of matrices and activations in their places."""
    flat: list[Any] = []
    for value in values:
        if isinstance(value, (Matrix, Activation)):
            flat.extend(value)
        else:
            flat.append(value)
    return flat


def structure(flat: Sequence[Any], leading: int, has_matrix: bool) -> list[Any]:
    """The inverse of ``flatten`` where ``leading`` values stand before the first of the two."""
    values, rest = list(flat[:leading]), flat[leading:]
    if has_matrix:
        values.append(Matrix(*rest[:4]))
        rest = rest[4:]
    kind, parameters, constants = rest[:3]
    return [*values, Activation(kind, parameters, tuple(constants)), *rest[3:]]


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


def parameters_gradient(activation: Activation, gradient: Tensor | None, x: Tensor) -> Tensor:
    """``gradient`` in the dtype and shape of the activation's parameters; no elements if there is none."""
    parameters = activation.parameters
    if parameters is None or gradient is None:
        return (x if parameters is None else parameters).new_empty(0)
    return gradient.to(parameters.dtype).reshape(parameters.shape)


def layer_gradients(x: Tensor, matrix: Matrix, activation: Activation, *found: Tensor | None) -> Four:
    """The results of a layer's or net's backward, from the gradients of x, lu, bias and the activation's
    parameters in any shape and precision, None where not asked for."""
    lu, (grad_x, grad_lu, grad_bias, grad_parameters) = matrix.lu, found
    return (
        shaped(grad_x, x),
        shaped(None if grad_lu is None else grad_lu.to(lu.dtype), lu),
        shaped(None if grad_bias is None else grad_bias.to(lu.dtype), lu, lu.shape[:-1]),
        parameters_gradient(activation, grad_parameters, x),
    )

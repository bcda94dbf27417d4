"""The two values that describe a layer, its matrix and its activation.

Both travel whole from ``functional`` to the kernels' launchers. A registered operation takes tensors and
numbers alone and has their fields as arguments: ``flatten`` and ``structure`` lead from one to the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

#: A value, and the log-determinant if it was asked for.
WithLogabsdet = tuple[Tensor, Tensor | None]

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

    @property
    def numbers(self) -> Tensor | tuple[float, ...]:
        """The parameters if there are any, else the constants."""
        return self.constants if self.parameters is None else self.parameters

    def at(self, m: int, layers: int) -> Activation:
        """That of layer m of a net of so many layers, the last one linear."""
        if m == layers - 1:
            return IDENTITY
        return self if self.parameters is None else self._replace(parameters=self.parameters[m])

    def parameters_gradient(self, gradient: Tensor | None, x: Tensor) -> Tensor:
        """``gradient`` in the parameters' dtype and shape; no elements if there is none."""
        if self.parameters is None or gradient is None:
            return (x if self.parameters is None else self.parameters).new_empty(0)
        return gradient.to(self.parameters.dtype).reshape(self.parameters.shape)


#: No activation.
IDENTITY = Activation("identity", None, ())


def flatten(values: Sequence[Any]) -> list[Any]:
    """``values`` with the fields of matrices and activations in their places."""
    flat: list[Any] = []
    for value in values:
        flat.extend(value if isinstance(value, (Matrix, Activation)) else (value,))
    return flat


def structure(flat: Sequence[Any], schema: str) -> list[Any]:
    """The inverse of ``flatten`` for the arguments of an operation with this schema."""
    has_matrix = MATRIX_SCHEMA in schema
    leading = schema.partition(MATRIX_SCHEMA if has_matrix else ACTIVATION_SCHEMA)[0].count(",")
    values, rest = list(flat[:leading]), flat[leading:]
    if has_matrix:
        values.append(Matrix(*rest[:4]))
        rest = rest[4:]
    kind, parameters, constants = rest[:3]
    return [*values, Activation(kind, parameters, tuple(constants)), *rest[3:]]

"""What the operations cost, for ``torch.utils.flop_counter.FlopCounterMode``.

As there, products of matrices and solves alone are counted: neither activations nor log-determinants. The
formulas are those of the table in ``docs/explanation/cost.md``, by shapes, whatever computes.
"""

from __future__ import annotations

import sys
from functools import partial
from math import prod
from typing import Any

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from lunet_fast.ops.dispatch import SCHEMAS
from lunet_fast.ops.values import Matrix, structure


def tell_counters() -> None:
    """Give the counters that watch, and those made later, the formulas of our operations.

    Not once for all on import: ``torch.utils.flop_counter`` takes Triton along, which costs as much time as
    half of PyTorch. So it is done where an operation is watched, and by then a counter has its own formulas.
    """
    if torch.compiler.is_compiling():
        return
    counting = sys.modules.get("torch.utils.flop_counter")
    if counting is None:
        return
    counters = (getattr(mode, "counter", None) for mode in _get_current_dispatch_mode_stack())
    registries = [c.flop_registry for c in counters if isinstance(c, counting.FlopCounterMode)]
    for name, schema in SCHEMAS.items():
        if name.startswith("activation"):
            continue
        formula = counting.shape_wrapper(partial(_flops_of, name, schema))
        for registry in (counting.flop_registry, *registries):
            registry.setdefault(getattr(torch.ops.lunet_fast, name), formula)


def _flops_of(name: str, schema: str, *flat: Any, **_: Any) -> int:
    """Of a call of the operation ``name``, its tensors given by their shapes."""
    values = structure(flat, schema)
    matrix = next(value for value in values if isinstance(value, Matrix))
    backward, net, inverse = name.endswith("backward"), name.startswith("net"), "inverse" in name
    # Of a backward the third: before it are the gradients of the results.
    x, shape = values[2 if backward else 0], tuple(matrix.lu)
    size, layers = shape[-1], prod(shape[:-2])
    rows = prod(x) // (size if net else size * layers)  # a net's layers have all rows each
    if not backward:
        return layers * _product(rows, size)
    needs_x, needs_lu, _ = values[-3:]
    # How many layers a gradient is taken through: an inverse has it on the way to that of its parameters.
    through = layers if needs_x or inverse else layers - 1 if net else 0
    return (
        through * 2 * rows * size**2
        + (layers * _matrix_gradient(rows, size) if needs_lu else 0)
        + (layers * _product(rows, size) if net else 0)  # which keeps nothing between its layers
    )


def _product(rows: int, size: int) -> int:
    """Of A x or A⁻¹ x for the rows, with A = L U formed where that pays."""
    return 2 * rows * size**2 + (2 * size**3 // 3 if rows > size else 0)


def _matrix_gradient(rows: int, size: int) -> int:
    """Of the gradients of L and U, by that of A where A was formed."""
    return 2 * rows * size**2 + (4 * size**3 // 3 if rows > size else 0)

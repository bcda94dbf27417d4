"""The layers in PyTorch's own operations, for what records a call and runs the record elsewhere.

``torch.jit.trace`` and both of ``torch.onnx.export``'s exporters know neither the registered operations nor
the writes into preallocated memory behind them: a record of those would be refused, or be wrong without a
word. While one of them is recording, ``autograd.py`` computes a layer by this file. For ONNX A^(±1) is formed
from the parameters alone, so that a runtime which folds constants is left with one product a layer.

``torch.export``'s programs do hold the registered operations: give ``torch.onnx.export`` the module, not
such a program, in which it would find operations that it has no translation for.

Nothing here depends on the values or on the number of rows that it is recorded with.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from lunet_fast import reference

Outputs = tuple[Tensor, Tensor]


def is_recording() -> bool:
    """Whether a recorder that knows PyTorch's own operations alone is at work."""
    if torch.compiler.is_dynamo_compiling():
        return False
    if torch.compiler.is_compiling():
        return torch.onnx.is_in_onnx_export()
    return torch._C._get_tracing_state() is not None


@contextmanager
def quiet() -> Iterator[None]:
    """No warnings about decisions by shapes: those made here follow from the parameters' shapes, which the
    record keeps, or check what was given."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # type: ignore[attr-defined]
        yield


def activation(x: Tensor, slopes: reference.Slopes, logabsdet: bool) -> Outputs:
    """(φ(x), Σ log φ′ [...] or an empty tensor)."""
    y = reference.leaky_softplus(x, slopes)
    return y, reference.log_derivative_sum(x, slopes) if logabsdet else _nothing(x)


def activation_inverse(y: Tensor, slopes: reference.Slopes, logabsdet: bool) -> Outputs:
    """(φ⁻¹(y), −Σ log φ′ [...] or an empty tensor)."""
    x = reference.solve_leaky_softplus(y, slopes)
    return x, -reference.log_derivative_sum(x, slopes) if logabsdet else _nothing(y)


def layer(
    x: Tensor,
    lu: Tensor,
    bias: Tensor | None,
    slopes: reference.Slopes | None,
    sign: Tensor | None,
    permutation: Tensor | None,
    logabsdet: bool,
    *,
    inverse: bool,
) -> Outputs:
    """A layer or its inverse, and that direction's log-determinant [...] or an empty tensor."""
    with quiet(), reference.without_autocast(x):
        if lu.dim() == 3:
            members = [
                layer(
                    *(x[k], lu[k], None if bias is None else bias[k], slopes),
                    *(None if sign is None else sign[k], None, logabsdet),
                    inverse=inverse,
                )
                for k in range(int(lu.shape[0]))
            ]
            results, totals = zip(*members, strict=True)
            return torch.stack(results), torch.stack(totals) if logabsdet else totals[0]
        run = _inverse if inverse else _forward
        return run(x, lu, bias, slopes, sign, permutation, logabsdet)


def _forward(
    x: Tensor,
    lu: Tensor,
    bias: Tensor | None,
    slopes: reference.Slopes | None,
    sign: Tensor | None,
    permutation: Tensor | None,
    logabsdet: bool,
) -> Outputs:
    lower, upper, logs = _factors(lu, sign)
    weight = lower @ upper
    if permutation is not None:
        weight = weight.index_select(0, permutation.argsort())
    h = x.to(weight.dtype) @ weight.transpose(0, 1)
    if bias is not None:
        h = h + bias
    h = h.to(x.dtype)
    total = _row_value(x, logs.sum()) if logabsdet else _nothing(x)
    if slopes is None:
        return h, total
    return reference.leaky_softplus(h, slopes), (
        total + reference.log_derivative_sum(h, slopes) if logabsdet else total
    )


def _inverse(
    y: Tensor,
    lu: Tensor,
    bias: Tensor | None,
    slopes: reference.Slopes | None,
    sign: Tensor | None,
    permutation: Tensor | None,
    logabsdet: bool,
) -> Outputs:
    lower, upper, logs = _factors(lu, sign)
    total = _row_value(y, -logs.sum()) if logabsdet else _nothing(y)
    h = y
    if slopes is not None:
        h = reference.solve_leaky_softplus(y, slopes)
        if logabsdet:
            total = total - reference.log_derivative_sum(h, slopes)
    right = h.to(upper.dtype)
    if bias is not None:
        right = right - bias
    if permutation is not None:
        right = right.index_select(-1, permutation)
    if torch.onnx.is_in_onnx_export():
        # ONNX has no triangular solve.
        x = right @ (_invert(upper) @ _invert(lower)).transpose(0, 1)
    else:
        rows = right.unsqueeze(0) if right.dim() == 1 else right
        rows = torch.linalg.solve_triangular(lower.mT, rows, upper=True, left=False, unitriangular=True)
        rows = torch.linalg.solve_triangular(upper.mT, rows, upper=False, left=False)
        x = rows.squeeze(0) if right.dim() == 1 else rows
    return x.to(y.dtype), total


def _factors(lu: Tensor, sign: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """(L, U, log|u_ii| [D])."""
    logs = reference.log_diagonal(lu)
    diagonal = logs.exp() if sign is None else logs.exp() * sign
    lu = lu.to(diagonal.dtype)
    eye = torch.eye(int(lu.shape[-1]), dtype=lu.dtype, device=lu.device)
    return lu.tril(-1) + eye, lu.triu(1) + eye * diagonal, logs


def _invert(triangle: Tensor) -> Tensor:
    """T⁻¹ [D, D] of a triangular matrix by products alone, ⌈log₂ D⌉ steps of two.

    With X the inverses of T's diagonal blocks of one size, X − X C X has those of twice the size, where C is
    what couples the blocks of each pair: the recursion for [[A, 0], [B, C]]⁻¹ in all of T at once.
    """
    size = int(triangle.shape[-1])
    index = torch.arange(size, device=triangle.device)
    inverse = torch.eye(size, dtype=triangle.dtype, device=triangle.device) / triangle.diagonal()
    block = 1
    while block < size:
        own, pair = index // block, index // (2 * block)
        couples = (pair[:, None] == pair[None, :]) & (own[:, None] != own[None, :])
        inverse = inverse - inverse @ (triangle * couples.to(triangle.dtype)) @ inverse
        block *= 2
    return inverse


def _row_value(x: Tensor, value: Tensor) -> Tensor:
    """A scalar for each row of x, [...]."""
    return torch.zeros_like(x.select(-1, 0), dtype=value.dtype) + value


def _nothing(x: Tensor) -> Tensor:
    return x.new_zeros(0, dtype=reference.wide(x.dtype))

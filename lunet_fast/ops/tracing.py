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

from lunet_fast.ops import reference
from lunet_fast.ops.precision import without_autocast
from lunet_fast.ops.values import Activation, Matrix, WithLogabsdet


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


def activation(x: Tensor, phi: Activation, *, inverse: bool, logabsdet: bool) -> WithLogabsdet:
    """(φ(x), Σ log φ′ [...]) or, with ``inverse``, (φ⁻¹(x), −Σ log φ′ [...])."""
    formula, numbers = reference.ACTIVATIONS[phi.kind], phi.numbers
    if not inverse:
        return formula.forward(x, numbers), formula.log_derivative_sum(x, numbers) if logabsdet else None
    x = formula.solve(x, numbers)
    return x, -formula.log_derivative_sum(x, numbers) if logabsdet else None


def layer(x: Tensor, matrix: Matrix, phi: Activation, *, inverse: bool, logabsdet: bool) -> WithLogabsdet:
    """A layer or its inverse, and that direction's log-determinant [...]."""
    with quiet(), without_autocast(x):
        if matrix.stacked:
            members = [
                layer(x[k], matrix.member(k), phi, inverse=inverse, logabsdet=logabsdet)
                for k in range(int(matrix.lu.shape[0]))
            ]
            results, totals = zip(*members, strict=True)
            return torch.stack(results), torch.stack(totals) if logabsdet else None  # type: ignore[arg-type]
        lower, upper, logs = _factors(matrix)
        total = _row_value(x, -logs.sum() if inverse else logs.sum()) if logabsdet else None
        h = x if inverse else _affine(x, lower, upper, matrix)
        if not phi.linear:
            h, share = activation(h, phi, inverse=inverse, logabsdet=logabsdet)
            total = None if total is None or share is None else total + share
        return _affine_inverse(h, lower, upper, matrix) if inverse else h, total


def _affine(x: Tensor, lower: Tensor, upper: Tensor, matrix: Matrix) -> Tensor:
    weight = lower @ upper
    if matrix.permutation is not None:
        weight = weight.index_select(0, matrix.permutation.argsort())
    h = x.to(weight.dtype) @ weight.transpose(0, 1)
    return (h if matrix.bias is None else h + matrix.bias).to(x.dtype)


def _affine_inverse(h: Tensor, lower: Tensor, upper: Tensor, matrix: Matrix) -> Tensor:
    right = h.to(upper.dtype)
    if matrix.bias is not None:
        right = right - matrix.bias
    if matrix.permutation is not None:
        right = right.index_select(-1, matrix.permutation)
    if torch.onnx.is_in_onnx_export():
        # ONNX has no triangular solve.
        return (right @ (_invert(upper) @ _invert(lower)).transpose(0, 1)).to(h.dtype)
    rows = right.unsqueeze(0) if right.dim() == 1 else right
    rows = torch.linalg.solve_triangular(lower.mT, rows, upper=True, left=False, unitriangular=True)
    rows = torch.linalg.solve_triangular(upper.mT, rows, upper=False, left=False)
    return (rows.squeeze(0) if right.dim() == 1 else rows).to(h.dtype)


def _factors(matrix: Matrix) -> tuple[Tensor, Tensor, Tensor]:
    """(L, U, log|u_ii| [D])."""
    logs = reference.log_diagonal(matrix.lu)
    diagonal = logs.exp() if matrix.sign is None else logs.exp() * matrix.sign
    lu = matrix.lu.to(diagonal.dtype)
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

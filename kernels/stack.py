# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False
# mypy: disable-error-code=assignment
# ruff: noqa: RUF005 (the compiler knows a sum of tuples, not what ruff would have instead)
"""M small layers in one launch: h_m = W_m x_{m−1} + b_m, x_m = φ_m(h_m), and its inverse.

A program keeps its rows in registers from the first layer to the last, so that of M layers only the first
input and the last output meet memory; the weights come from the L2 cache. All M layers are of one width D,
which ``tiles.stack_tile`` bounds: beyond, the rows of a program no longer fit its registers.

Rows are held as a tuple of tiles [ROWS, CHUNK], D of them in all. A register tile cannot be sliced, and a
tuple can: substitution takes its steps of CHUNK columns, and a product that is unrolled (ieee) is not
unrolled over more than CHUNK.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lunet_fast.kernels import tiles
from lunet_fast.kernels.activation import (
    Slopes,
    activation_of,
    is_learnt,
    load_family,
    located,
    located_inverse,
    log2_phi_derivative,
    outputs_by_row,
    phi,
    steps_of,
)
from lunet_fast.kernels.launch import (
    Prepared,
    check_parameter,
    check_precision,
    check_rows,
    dot,
    load_row,
    load_tile,
    store_tile,
)
from lunet_fast.kernels.leaky_softplus import LN2
from lunet_fast.kernels.solve import solve_held

# --- rows in chunks --------------------------------------------------------------------------------------


@triton.jit
def load_rows(ptr, left, D, ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr):
    """Rows [ROWS, D] at ptr, of which ``left`` are there, as chunks of float32; zeros where nothing is."""
    here = tl.arange(0, ROWS)[:, None] < left
    chunks = ()
    for j in tl.static_range(COLUMNS // CHUNK):
        chunks = chunks + (load_tile(ptr, j * CHUNK, here, D, ROWS, CHUNK),)
    return chunks


@triton.jit
def store_rows(ptr, chunks, left, D, ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr):
    """The reverse of ``load_rows``."""
    here = tl.arange(0, ROWS)[:, None] < left
    for j in tl.static_range(COLUMNS // CHUNK):
        store_tile(ptr, chunks[j], j * CHUNK, here, D, ROWS, CHUNK)


@triton.jit
def times(
    x,
    matrix_ptr,
    D,
    TRANSPOSED: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Rows x A, or x Aᵀ, for A [D, D], float32."""
    inner = tl.arange(0, CHUNK)[:, None]
    outer = tl.arange(0, CHUNK)[None, :]
    chunks = ()
    for j in tl.static_range(COLUMNS // CHUNK):
        total = tl.zeros([ROWS, CHUNK], tl.float32)
        for i in tl.static_range(COLUMNS // CHUNK):
            valid = (inner < D - i * CHUNK) & (outer < D - j * CHUNK)
            if TRANSPOSED:
                ptrs = matrix_ptr + (j * CHUNK * D + i * CHUNK) + (outer * D + inner)
            else:
                ptrs = matrix_ptr + (i * CHUNK * D + j * CHUNK) + (inner * D + outer)
            total = dot(x[i], tl.load(ptrs, mask=valid, other=0.0), total, PRECISION)
        chunks = chunks + (total,)
    return chunks


@triton.jit
def affine(
    x,
    weight_ptr,
    bias_ptr,
    m,
    D,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """h = x W_mᵀ + b_m, chunks of float32."""
    h = times(x, weight_ptr + m * D * D, D, True, PRECISION, ROWS, COLUMNS, CHUNK)
    if bias_ptr is not None:
        h = _add_bias(h, bias_ptr + m * D, D, 1.0, COLUMNS, CHUNK)
    return h


@triton.jit
def _add_bias(h, bias_ptr, D, factor, COLUMNS: tl.constexpr, CHUNK: tl.constexpr):
    """h + factor·b."""
    chunks = ()
    for j in tl.static_range(COLUMNS // CHUNK):
        bias = load_row(bias_ptr, j * CHUNK + tl.arange(0, CHUNK), D)
        chunks = chunks + (h[j] + factor * bias,)
    return chunks


@triton.jit
def activate(h, activation, m, D, INVERSE: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr):
    """φ_m(h), or φ_m⁻¹(h), chunks of float32."""
    chunks = ()
    for j in tl.static_range(COLUMNS // CHUNK):
        family = load_family(activation, m, j * CHUNK + tl.arange(0, CHUNK), D)
        if INVERSE:
            chunks = chunks + (located_inverse(h[j], family, activation)[0],)
        else:
            chunks = chunks + (phi(located(h[j], family, activation), family, activation),)
    return chunks


@triton.jit
def _log_derivative_sum(h, activation, m, D, ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr):
    """Σ log φ_m′(h) over each row, [ROWS]."""
    total = tl.zeros([ROWS], tl.float32)
    for j in tl.static_range(COLUMNS // CHUNK):
        cols = j * CHUNK + tl.arange(0, CHUNK)
        family = load_family(activation, m, cols, D)
        there = (cols < D)[None, :]
        at = located(h[j], family, activation)
        total += tl.sum(tl.where(there, log2_phi_derivative(at, family, activation), 0.0), 1)
    return total * LN2


# --- forward --------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["N", "M", "active"])
def stack_fwd_kernel(
    x_ptr,  # [N, D]
    weight_ptr,  # [M, D, D]
    bias_ptr,  # [M, D], or None
    y_ptr,  # [N, D]
    logabsdet_ptr,  # [N] float32, or None
    constant_ptr,  # [M] float32, log|det W_m|, or None
    activation,
    N,
    M,
    active,
    D,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """ROWS rows through M layers, of which the first ``active`` have an activation."""
    first = tl.program_id(0).to(tl.int64) * ROWS
    left = tl.minimum(N - first, ROWS).to(tl.int32)
    x = load_rows(x_ptr + first * D, left, D, ROWS, COLUMNS, CHUNK)
    total = tl.zeros([ROWS], tl.float32)
    for m in range(M):
        h = affine(x, weight_ptr, bias_ptr, m, D, PRECISION, ROWS, COLUMNS, CHUNK)
        if logabsdet_ptr is not None and constant_ptr is not None:
            total += tl.load(constant_ptr + m)
        if m < active:
            if logabsdet_ptr is not None:
                total += _log_derivative_sum(h, activation, m, D, ROWS, COLUMNS, CHUNK)
            h = activate(h, activation, m, D, False, COLUMNS, CHUNK)
        x = h
    store_rows(y_ptr + first * D, x, left, D, ROWS, COLUMNS, CHUNK)
    if logabsdet_ptr is not None:
        rows = tl.arange(0, ROWS)
        tl.store(logabsdet_ptr + first + rows, total, mask=rows < left)


# --- inverse --------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["N", "M", "active"])
def stack_inv_kernel(
    y_ptr,  # [N, D]
    lu_ptr,  # [M, D, D], packed
    blocks_ptr,  # [M, 2, COLUMNS/CHUNK, CHUNK, CHUNK] float32, inverses of L's and U's diagonal blocks
    bias_ptr,  # [M, D], or None
    x_ptr,  # [N, D]
    logabsdet_ptr,  # [N] float32, or None
    constant_ptr,  # [M] float32, log|det W_m|, or None
    activation,
    N,
    M,
    active,
    D,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """ROWS rows back through M layers: φ⁻¹ where there is one, minus the bias, then L⁻¹ and U⁻¹."""
    first = tl.program_id(0).to(tl.int64) * ROWS
    left = tl.minimum(N - first, ROWS).to(tl.int32)
    x = load_rows(y_ptr + first * D, left, D, ROWS, COLUMNS, CHUNK)
    total = tl.zeros([ROWS], tl.float32)
    for step in range(M):
        m = M - 1 - step
        h = x
        if logabsdet_ptr is not None and constant_ptr is not None:
            total -= tl.load(constant_ptr + m)
        if m < active:
            h = activate(h, activation, m, D, True, COLUMNS, CHUNK)
            if logabsdet_ptr is not None:
                total -= _log_derivative_sum(h, activation, m, D, ROWS, COLUMNS, CHUNK)
        if bias_ptr is not None:
            h = _add_bias(h, bias_ptr + m * D, D, -1.0, COLUMNS, CHUNK)
        inverses = blocks_ptr + m * 2 * COLUMNS * CHUNK
        x = solve_held(h, lu_ptr + m * D * D, inverses, D, False, PRECISION, ROWS, CHUNK, COLUMNS // CHUNK)
    store_rows(x_ptr + first * D, x, left, D, ROWS, COLUMNS, CHUNK)
    if logabsdet_ptr is not None:
        rows = tl.arange(0, ROWS)
        tl.store(logabsdet_ptr + first + rows, total, mask=rows < left)


# --- launchers -------------------------------------------------------------------------------------------


def stack_arguments(
    kernel: str,
    x: Tensor,
    biases: Tensor | None,
    slopes: Slopes,
    M: int,
    precision: str,
    *,
    activate_last: bool,
    steps: int = 0,
) -> tuple[tiles.Tile, dict[str, Any]]:
    """The tile, and the arguments that all kernels of a stack share; refuses what does not fit."""
    check_rows("rows", x, dims=2)
    check_precision(precision)
    N, D = x.shape
    check_parameter("biases", biases, (M, D))
    learnt = is_learnt(slopes)
    tile = tiles.stack_tile(kernel, D, x.dtype, precision, tiles.architecture(x), learnt=learnt)
    if tile is None:
        raise ValueError(
            f"a stack of {D} features does not go in one launch in {precision}: call layer by layer"
        )
    active = M if activate_last else M - 1
    return tile, {
        "activation": activation_of(slopes, D, layers=active, steps=steps),
        "bias_ptr": biases,
        "N": N,
        "M": M,
        "active": active,
        "D": D,
        "PRECISION": precision,
        "ROWS": tile.rows,
        "COLUMNS": tile.columns,
        "CHUNK": tile.inner,
        # Left to itself ptxas aims at a number of programs on a multiprocessor and spills to reach it; the
        # large kernels it does better left to itself.
        "maxnreg": None if kernel.endswith("backward") and precision != "ieee" else 255,
    }


class Stack:
    """``stack_forward``, or ``stack_inverse``, of layers of one kind: what depends neither on the rows nor
    on the numbers in matrices and biases is found out once."""

    def __init__(
        self,
        kernel: Any,
        tile: tiles.Tile,
        arguments: dict[str, Any],
        names: Sequence[str],
        dtype: torch.dtype,
    ) -> None:
        """``names`` are those of the rows, the result and the matrices among the kernel's arguments."""
        self._rows, self._kind = tile.rows, (arguments["D"], dtype)
        varying = (*names, "constant_ptr", "bias_ptr", "logabsdet_ptr", "N")
        self._launch = Prepared(kernel, tile, arguments, varying)

    def __call__(
        self,
        rows: Tensor,
        *matrices: Tensor,
        biases: Tensor | None,
        constant: Tensor | None,
        logabsdet: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """(Rows [N, D], log|det J| [N] float32 or None) of contiguous rows [N, D] in the stack's dtype.

        ``matrices``, ``biases`` and ``constant`` are as in the call that it was made for.
        """
        check_rows("rows", rows, dims=2, kind=self._kind)
        N = len(rows)
        out, total = outputs_by_row(rows, logabsdet)
        self._launch((tiles.ceil_div(N, self._rows), 1, 1), rows, out, *matrices, constant, biases, total, N)
        return out, total


def prepare_forward(
    weights: Tensor,
    biases: Tensor | None,
    slopes: Slopes,
    *,
    constant: Tensor | None,
    precision: str,
    activate_last: bool = False,
) -> Stack:
    """``stack_forward`` as a function of x, ``weights``, ``biases`` and ``constant`` of these kinds."""
    M, D = weights.shape[0], weights.shape[-1]
    x = weights.new_empty(0, D)
    tile, arguments = stack_arguments("forward", x, biases, slopes, M, precision, activate_last=activate_last)
    check_parameter("weights", weights, (M, D, D), x.dtype)
    check_parameter("constant", constant, (M,), torch.float32)
    return Stack(stack_fwd_kernel, tile, arguments, ("x_ptr", "y_ptr", "weight_ptr"), x.dtype)


def stack_forward(
    x: Tensor,
    weights: Tensor,
    biases: Tensor | None,
    slopes: Slopes,
    *,
    constant: Tensor | None,
    logabsdet: bool,
    precision: str,
    activate_last: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """(y [N, D], log|det J| [N] float32 or None) of x through M layers; 2·N·M·D² flops, 8·N·D bytes.

    x [N, D] and ``weights`` [M, D, D] are contiguous and of one dtype, float32 or bfloat16; ``biases``
    [M, D] may differ. The last layer has no activation unless ``activate_last``; of the A = M − 1 or M layers
    that have, ``slopes`` are three floats for all, or a tensor [A, 3] or [A, 3, D]. ``constant`` [M],
    float32, is log|det W_m|, added to each row's Σ log φ′. ``precision`` is that of a float32 product.
    Nothing else is kept for ``stack_backward``. ValueError where ``tiles.stack_tile`` has no row for this.
    """
    check_rows("rows", x, dims=2)
    check_parameter("weights", weights, (weights.shape[0], x.shape[-1], x.shape[-1]), x.dtype)
    found = prepare_forward(
        weights, biases, slopes, constant=constant, precision=precision, activate_last=activate_last
    )
    return found(x, weights, biases=biases, constant=constant, logabsdet=logabsdet)


def prepare_inverse(
    dtype: torch.dtype,
    lu: Tensor,
    blocks: Tensor,
    biases: Tensor | None,
    slopes: Slopes,
    *,
    constant: Tensor | None,
    precision: str,
    activate_last: bool = False,
    steps: int | None = None,
) -> Stack:
    """``stack_inverse`` as a function of y in this dtype, ``lu``, ``blocks``, ``biases`` and ``constant`` of
    these kinds."""
    M, D = lu.shape[0], lu.shape[-1]
    y, steps = lu.new_empty((0, D), dtype=dtype), steps_of(slopes, steps)
    tile, arguments = stack_arguments(
        "inverse", y, biases, slopes, M, precision, activate_last=activate_last, steps=steps
    )
    check_inverse(lu, blocks, M, D, tile, precision)
    check_parameter("constant", constant, (M,), torch.float32)
    return Stack(stack_inv_kernel, tile, arguments, ("y_ptr", "x_ptr", "lu_ptr", "blocks_ptr"), dtype)


def stack_inverse(
    y: Tensor,
    lu: Tensor,
    blocks: Tensor,
    biases: Tensor | None,
    slopes: Slopes,
    *,
    constant: Tensor | None,
    logabsdet: bool,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """(x [N, D], the inverse's own log-determinant [N] float32 or None) of y [N, D]; 2·N·M·D² flops and up.

    ``lu`` [M, D, D], float32 or bfloat16, is packed (and unpermuted: the columns of a row in registers cannot
    be gathered); ``blocks`` [M, 2, ⌈D/block⌉, block, block], float32, are the inverses of the diagonal blocks
    of L and U, with zeros in their other triangle, block = ``tiles.stack_tile("inverse", …).inner``.
    ``options`` are those of ``prepare_inverse``: ``precision`` is "ieee" or "tf32x3", of float32 arithmetic
    whatever y's dtype, ``steps`` of Halley's iteration are as for ``activation_inverse``. Else as for
    ``stack_forward``.
    """
    found = prepare_inverse(y.dtype, lu, blocks, biases, slopes, constant=constant, **options)
    return found(y, lu, blocks, biases=biases, constant=constant, logabsdet=logabsdet)


def check_inverse(lu: Tensor, blocks: Tensor, M: int, D: int, tile: tiles.Tile, precision: str) -> None:
    """Refuse what no stack is inverted with."""
    if precision == "tf32":
        raise ValueError("nothing is inverted in tf32: give 'ieee' or 'tf32x3'")
    check_parameter("lu", lu, (M, D, D))
    block = tile.inner
    check_parameter("blocks", blocks, (M, 2, tiles.ceil_div(D, block), block, block), torch.float32)

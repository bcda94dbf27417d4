# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False
"""y = φ(Pᵀ L (U x) + b) straight from the packed matrix, for few rows: no W is formed.

Forming W costs 2·D³/3 flops, so it pays when there are more rows than columns; with fewer, the rows go
through U and then L. Both products start and stop where their triangle does: of D/BLOCK blocks squared, half
are loaded.

Where ``tiles.fuses_triangles`` (D ≤ 128) one launch does both: t = U x stays in registers, as one tile
for each block of columns, unrolled. Beyond, one program would have the whole matrix to read; there two
launches share it out over the device, and t goes through memory (the cache, for few rows) once.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lunet_fast.kernels import tiles
from lunet_fast.kernels.activation import Slopes, activation_of
from lunet_fast.kernels.launch import check_layer, check_parameter, dot, launch, load_tile, store_tile
from lunet_fast.kernels.layer import finish_tile, forward_outputs, row_totals
from lunet_fast.kernels.matrix import check_packed, diagonal, lower_tile, permuted, upper_tile


@triton.jit(do_not_specialize=["N"])
def triangular_fused_kernel(
    x_ptr,  # [K, N, D]
    lu_ptr,  # [K, D, D]
    sign_ptr,  # [K, D], or None
    permutation_ptr,  # [D] int64, or None
    bias_ptr,  # [K, D], or None
    y_ptr,  # [K, N, D]
    h_ptr,  # [K, N, D], or None
    partial_ptr,  # [K, N, BLOCKS] float32, or None
    constant_ptr,  # [K] float32, log|det W|, or None
    activation,
    N,
    D,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,  # ⌈D / BLOCK⌉
):
    """A tile [ROWS, D] through both triangles in one program, t = U x in registers."""
    first = tl.program_id(0).to(tl.int64) * ROWS
    member = tl.program_id(1).to(tl.int64)
    first_row = member * N + first
    x_ptr += first_row * D
    lu_ptr += member * D * D
    if sign_ptr is not None:
        sign_ptr += member * D
    rows = tl.arange(0, ROWS)
    here = rows[:, None] < N - first
    span = tl.arange(0, BLOCK)

    middle = ()
    for block in tl.static_range(BLOCKS):
        i = block * BLOCK + span
        u = diagonal(lu_ptr, sign_ptr, i, D)[None, :]
        t = tl.zeros([ROWS, BLOCK], tl.float32)
        for start in range(block * BLOCK, D, BLOCK):
            k = start + span
            x = load_tile(x_ptr, start, here, D, ROWS, BLOCK)
            upper = upper_tile(lu_ptr, u, i[None, :], k[:, None], D)  # Uᵀ
            t = dot(x, upper, t, PRECISION)
        middle = middle + (t,)  # type: ignore[assignment]  # noqa: RUF005  Triton has no unpacking
    for block in tl.static_range(BLOCKS):
        i = block * BLOCK + span
        h = tl.zeros([ROWS, BLOCK], tl.float32)
        for before in tl.static_range(block + 1):
            lower = lower_tile(lu_ptr, i[None, :], (before * BLOCK + span)[:, None], D)  # Lᵀ
            h = dot(middle[before], lower, h, PRECISION)
        finish_tile(
            *(h, y_ptr, h_ptr, partial_ptr, constant_ptr, bias_ptr, activation),
            *(first_row, rows, here, permuted(permutation_ptr, i, D), block, BLOCKS, member, D),
        )


@triton.jit(do_not_specialize=["N"])
def triangular_upper_kernel(
    x_ptr,  # [K, N, D]
    lu_ptr,  # [K, D, D]
    sign_ptr,  # [K, D], or None
    t_ptr,  # [K, N, D] float32
    N,
    D,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """t = U x; one program computes a tile [ROWS, BLOCK], from the columns of x that U does not zero."""
    blocks = tl.cdiv(D, BLOCK)
    block = tl.program_id(0) % blocks
    first = (tl.program_id(0) // blocks).to(tl.int64) * ROWS
    member = tl.program_id(1).to(tl.int64)
    x_ptr += (member * N + first) * D
    t_ptr += (member * N + first) * D
    lu_ptr += member * D * D
    if sign_ptr is not None:
        sign_ptr += member * D
    rows = tl.arange(0, ROWS)
    here = rows[:, None] < N - first
    span = tl.arange(0, BLOCK)
    i = block * BLOCK + span
    u = diagonal(lu_ptr, sign_ptr, i, D)[None, :]
    t = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(block * BLOCK, D, BLOCK):
        x = load_tile(x_ptr, start, here, D, ROWS, BLOCK)
        upper = upper_tile(lu_ptr, u, i[None, :], (start + span)[:, None], D)  # Uᵀ
        t = dot(x, upper, t, PRECISION)
    store_tile(t_ptr, t, block * BLOCK, here, D, ROWS, BLOCK)


@triton.jit(do_not_specialize=["N"])
def triangular_lower_kernel(
    t_ptr,  # [K, N, D] float32
    lu_ptr,  # [K, D, D]
    permutation_ptr,  # [D] int64, or None
    bias_ptr,  # [K, D], or None
    y_ptr,  # [K, N, D]
    h_ptr,  # [K, N, D], or None
    partial_ptr,  # [K, N, column blocks] float32, or None
    constant_ptr,  # [K] float32, log|det W|, or None
    activation,
    N,
    D,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """y = φ(Pᵀ L t + b); one program computes a tile [ROWS, BLOCK], from the columns of t up to its own."""
    blocks = tl.cdiv(D, BLOCK)
    block = tl.program_id(0) % blocks
    first = (tl.program_id(0) // blocks).to(tl.int64) * ROWS
    member = tl.program_id(1).to(tl.int64)
    first_row = member * N + first
    t_ptr += first_row * D
    lu_ptr += member * D * D
    rows = tl.arange(0, ROWS)
    here = rows[:, None] < N - first
    span = tl.arange(0, BLOCK)
    i = block * BLOCK + span
    h = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, (block + 1) * BLOCK, BLOCK):
        t = load_tile(t_ptr, start, here, D, ROWS, BLOCK)
        lower = lower_tile(lu_ptr, i[None, :], (start + span)[:, None], D)  # Lᵀ
        h = dot(t, lower, h, PRECISION)
    finish_tile(
        *(h, y_ptr, h_ptr, partial_ptr, constant_ptr, bias_ptr, activation),
        *(first_row, rows, here, permuted(permutation_ptr, i, D), block, blocks, member, D),
    )


def layer_forward_rows(
    x: Tensor,
    lu: Tensor,
    sign: Tensor | None,
    permutation: Tensor | None,
    bias: Tensor | None,
    slopes: Slopes | None,
    *,
    logabsdet: bool,
    save: bool,
    precision: str,
    constant: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(y = φ(Pᵀ L (U x) + b) [K, N, D], log|det J| [K, N] float32 or None, h [K, N, D] or None).

    x [K, N, D] float32 or bfloat16; ``lu`` [K, D, D], ``sign`` [K, D] and ``permutation`` [D] as in
    ``matrix.compose``; ``bias`` [K, D]; ``slopes`` None for no activation, and then h is y and is not
    returned. 2·K·N·D² flops. The products are of float32
    numbers in ``precision``, U x is not rounded to x's dtype between them. ``constant`` [K], float32, is
    log|det W|, added to each row's Σ log φ′.
    """
    K, N, D = check_layer("x", x, bias, constant, precision)
    check_packed(lu, sign, permutation)
    check_parameter("lu", lu, (K, D, D))
    tile = tiles.triangular_tile(D, tiles.architecture(x))
    blocks = triton.cdiv(D, tile.columns)
    y, h, partial = forward_outputs(x, blocks, slopes, logabsdet=logabsdet, save=save)
    row_tiles = triton.cdiv(N, tile.rows)
    sizes: dict[str, Any] = {"N": N, "D": D, "PRECISION": precision, "ROWS": tile.rows, "BLOCK": tile.columns}
    ends = (permutation, bias, y, h, partial, constant, activation_of(slopes, D))
    if tiles.fuses_triangles(D, precision):
        grid = (row_tiles, K)
        launch(triangular_fused_kernel, grid, tile, x, lu, sign, *ends, **sizes, BLOCKS=blocks)
    else:
        grid = (row_tiles * blocks, K)
        t = torch.empty_like(x, dtype=torch.float32)
        launch(triangular_upper_kernel, grid, tile, x, lu, sign, t, **sizes)
        launch(triangular_lower_kernel, grid, tile, t, lu, *ends, **sizes)
    return y, row_totals(x, partial, constant) if logabsdet else None, h

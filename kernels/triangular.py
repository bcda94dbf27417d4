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
from lunet_fast.kernels.activation import Slopes, family_arguments
from lunet_fast.kernels.launch import (
    check_parameter,
    check_precision,
    check_rows,
    on_device_of,
)
from lunet_fast.kernels.layer import finish_tile, row_totals
from lunet_fast.kernels.matrix import check_packed, diagonal, lower_tile, upper_tile
from lunet_fast.ops.precision import LOG_DIAGONAL_BOUND


@triton.jit
def row_tile(x_ptr, rows, here, start, D, BLOCK: tl.constexpr):
    """Columns start … start + BLOCK of a tile of rows, float32; 0 where there are none."""
    cols = start + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + (rows[:, None] * D + cols[None, :]), mask=here & (cols[None, :] < D), other=0.0)
    return x.to(tl.float32)


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
    slopes_ptr,  # [3] or [3, D], or None
    a,
    c,
    kappa,
    log_low,
    log_high,
    N,
    D,
    PER_COLUMN: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BOUND: tl.constexpr,
    PRECISION: tl.constexpr,
    FAST: tl.constexpr,
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
        u = diagonal(lu_ptr, sign_ptr, i, D, BOUND)[None, :]
        t = tl.zeros([ROWS, BLOCK], tl.float32)
        for start in range(block * BLOCK, D, BLOCK):
            k = start + span
            x = row_tile(x_ptr, rows, here, start, D, BLOCK)
            upper = upper_tile(lu_ptr, u, i[None, :], k[:, None], D)  # Uᵀ
            t = tl.dot(x, upper, t, input_precision=PRECISION)
        middle = middle + (t,)  # type: ignore[assignment]  # noqa: RUF005  Triton has no unpacking
    for block in tl.static_range(BLOCKS):
        i = block * BLOCK + span
        h = tl.zeros([ROWS, BLOCK], tl.float32)
        for before in tl.static_range(block + 1):
            lower = lower_tile(lu_ptr, i[None, :], (before * BLOCK + span)[:, None], D)  # Lᵀ
            h = tl.dot(middle[before], lower, h, input_precision=PRECISION)
        cols = i
        if permutation_ptr is not None:
            cols = tl.load(permutation_ptr + i, mask=i < D, other=D).to(tl.int32)
        finish_tile(
            *(h, y_ptr, h_ptr, partial_ptr, constant_ptr, bias_ptr, slopes_ptr),
            *(a, c, kappa, log_low, log_high, first_row, rows, here, cols, block, BLOCKS, member, D),
            *(PER_COLUMN, ACTIVATION, FAST),
        )


@triton.jit(do_not_specialize=["N"])
def triangular_upper_kernel(
    x_ptr,  # [K, N, D]
    lu_ptr,  # [K, D, D]
    sign_ptr,  # [K, D], or None
    t_ptr,  # [K, N, D] float32
    N,
    D,
    BOUND: tl.constexpr,
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
    u = diagonal(lu_ptr, sign_ptr, i, D, BOUND)[None, :]
    t = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(block * BLOCK, D, BLOCK):
        x = row_tile(x_ptr, rows, here, start, D, BLOCK)
        upper = upper_tile(lu_ptr, u, i[None, :], (start + span)[:, None], D)  # Uᵀ
        t = tl.dot(x, upper, t, input_precision=PRECISION)
    tl.store(t_ptr + (rows[:, None] * D + i[None, :]), t, mask=here & (i[None, :] < D))


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
    slopes_ptr,  # [3] or [3, D], or None
    a,
    c,
    kappa,
    log_low,
    log_high,
    N,
    D,
    PER_COLUMN: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    FAST: tl.constexpr,
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
        t = row_tile(t_ptr, rows, here, start, D, BLOCK)
        lower = lower_tile(lu_ptr, i[None, :], (start + span)[:, None], D)  # Lᵀ
        h = tl.dot(t, lower, h, input_precision=PRECISION)
    cols = i
    if permutation_ptr is not None:
        cols = tl.load(permutation_ptr + i, mask=i < D, other=D).to(tl.int32)
    finish_tile(
        *(h, y_ptr, h_ptr, partial_ptr, constant_ptr, bias_ptr, slopes_ptr, a, c, kappa, log_low, log_high),
        *(first_row, rows, here, cols, block, blocks, member, D, PER_COLUMN, ACTIVATION, FAST),
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
    fast: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(y = φ(Pᵀ L (U x) + b) [K, N, D], log|det J| [K, N] float32 or None, h [K, N, D] or None).

    x [K, N, D] float32 or bfloat16; ``lu`` [K, D, D], ``sign`` [K, D] and ``permutation`` [D] as in
    ``matrix.compose``; ``bias`` [K, D]; ``slopes`` None for no activation, and then h is y and is not
    returned. 2·K·N·D² flops. The products are of float32
    numbers in ``precision``, U x is not rounded to x's dtype between them. ``constant`` [K], float32, is
    log|det W|, added to each row's Σ log φ′.
    """
    check_rows("x", x)
    check_packed(lu, sign, permutation)
    K, N, D = x.shape
    check_parameter("lu", lu, (K, D, D))
    check_parameter("bias", bias, (K, D))
    check_parameter("constant", constant, (K,), torch.float32)
    check_precision(precision)

    tile = tiles.triangular_tile(D, tiles.architecture(x))
    blocks = triton.cdiv(D, tile.columns)
    active = slopes is not None
    y = torch.empty_like(x)
    h = torch.empty_like(x) if save and active else None
    partial: Tensor | None = None
    if logabsdet and active:
        partial = torch.empty((K, N, blocks), dtype=torch.float32, device=x.device)
    if x.numel() == 0:
        return y, row_totals(x, partial, constant) if logabsdet else None, h

    family: dict[str, Any] = family_arguments((1.0, 1.0, 1.0) if slopes is None else slopes, D)
    finish: dict[str, Any] = {
        "permutation_ptr": permutation,
        "bias_ptr": bias,
        "y_ptr": y,
        "h_ptr": h,
        "partial_ptr": partial,
        "constant_ptr": constant,
        **family,
        "ACTIVATION": active,
        "FAST": fast,
    }
    common: dict[str, Any] = {
        "lu_ptr": lu,
        "N": N,
        "D": D,
        "PRECISION": precision,
        "ROWS": tile.rows,
        "BLOCK": tile.columns,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
        "enable_fp_fusion": True,
    }
    upper: dict[str, Any] = {"x_ptr": x, "sign_ptr": sign, "BOUND": LOG_DIAGONAL_BOUND[lu.dtype]}
    row_tiles = triton.cdiv(N, tile.rows)
    with on_device_of(x):
        if tiles.fuses_triangles(D, precision):
            triangular_fused_kernel[(row_tiles, K)](**upper, **finish, **common, BLOCKS=blocks)
        else:
            t = torch.empty_like(x, dtype=torch.float32)
            triangular_upper_kernel[(row_tiles * blocks, K)](**upper, **common, t_ptr=t)
            triangular_lower_kernel[(row_tiles * blocks, K)](**finish, **common, t_ptr=t)
    return y, row_totals(x, partial, constant) if logabsdet else None, h

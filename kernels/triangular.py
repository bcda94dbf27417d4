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
from lunet_fast.kernels.launch import (
    Prepared,
    check_layer,
    check_parameter,
    check_precision,
    check_rows,
    dot,
    load_tile,
    store_tile,
)
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


class Forward:
    """``layer_forward_rows`` of layers of one kind: what depends neither on the rows nor on the numbers in
    matrices and biases is found out once."""

    def __init__(
        self,
        rows: Tensor,
        sign: Tensor | None,
        permutation: Tensor | None,
        slopes: Slopes | None,
        *,
        precision: str,
    ) -> None:
        """For ``rows`` of this D, dtype and device."""
        check_precision(precision)
        D = rows.shape[-1]
        tile = tiles.triangular_tile(D, tiles.architecture(rows))
        self._kind, self._active = (D, rows.dtype), slopes is not None
        self._rows, self._blocks = tile.rows, tiles.ceil_div(D, tile.columns)
        self._sign, self._permutation = sign, permutation
        sizes = {"D": D, "PRECISION": precision, "ROWS": tile.rows, "BLOCK": tile.columns}
        last: dict[str, Any] = {"permutation_ptr": permutation, **sizes}
        last["activation"] = activation_of(slopes, D)
        ends = ("bias_ptr", "y_ptr", "h_ptr", "partial_ptr", "constant_ptr", "N")
        self._fused = self._upper = None
        if tiles.fuses_triangles(D, precision):
            last |= {"sign_ptr": sign, "BLOCKS": self._blocks}
            self._fused = Prepared(triangular_fused_kernel, tile, last, ("x_ptr", "lu_ptr", *ends))
        else:
            first = {"sign_ptr": sign, **sizes}
            self._upper = Prepared(triangular_upper_kernel, tile, first, ("x_ptr", "lu_ptr", "t_ptr", "N"))
            self._lower = Prepared(triangular_lower_kernel, tile, last, ("t_ptr", "lu_ptr", *ends))

    def __call__(
        self,
        x: Tensor,
        lu: Tensor,
        bias: Tensor | None,
        *,
        constant: Tensor | None,
        logabsdet: bool,
        save: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        K, N, D = check_layer("x", x, bias, constant, kind=self._kind)
        check_packed(lu, self._sign, self._permutation)
        check_parameter("lu", lu, (K, D, D))
        y, h, partial = forward_outputs(x, self._blocks, self._active, logabsdet=logabsdet, save=save)
        row_tiles, ends = tiles.ceil_div(N, self._rows), (bias, y, h, partial, constant, N)
        if self._fused is not None:
            self._fused((row_tiles, K, 1), x, lu, *ends)
        else:
            assert self._upper is not None
            grid, t = (row_tiles * self._blocks, K, 1), torch.empty_like(x, dtype=torch.float32)
            self._upper(grid, x, lu, t, N)
            self._lower(grid, t, lu, *ends)
        return y, row_totals(x, partial, constant) if logabsdet else None, h


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
    check_rows("x", x)
    run = Forward(x, sign, permutation, slopes, precision=precision)
    return run(x, lu, bias, constant=constant, logabsdet=logabsdet, save=save)

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False
"""y = φ(W x + b) and log|det J| in one launch, W = Pᵀ L U already formed.

Forming W costs D³ once for a batch; then one product does the work of two, and bias, φ and the row's
Σ log φ′ are done on the accumulator before it leaves the chip.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lunet_fast.kernels import tiles
from lunet_fast.kernels.activation import Slopes, family_arguments, load_family, log_phi_derivative, phi
from lunet_fast.kernels.launch import (
    INTERPRETED,
    check_parameter,
    check_precision,
    check_rows,
    on_device_of,
)


@triton.jit
def finish_tile(
    h,  # [ROWS, COLUMNS] float32, x Wᵀ
    y_ptr,
    h_ptr,
    partial_ptr,
    constant_ptr,
    bias_ptr,
    slopes_ptr,
    a,
    c,
    kappa,
    log_low,
    log_high,
    first_row,  # int64, of the tile, counted over all members
    rows,  # [ROWS], from the tile's first row
    here,  # [ROWS, 1], which rows there are
    cols,  # [COLUMNS]
    block,
    blocks,
    member,
    D,
    PER_COLUMN: tl.constexpr,
    ACTIVATION: tl.constexpr,
    FAST: tl.constexpr,
):
    """The end of a layer's forward, on a tile that is still on the chip: bias, φ, the sums of log φ′.

    φ is taken of the float32 accumulator, not of the h that is stored. Column block 0 adds the constant.
    """
    if bias_ptr is not None:
        h += tl.load(bias_ptr + member * D + cols, mask=cols < D, other=0.0).to(tl.float32)[None, :]
    offsets = rows[:, None] * D + cols[None, :]
    valid = here & (cols[None, :] < D)
    y_ptr += first_row * D
    if h_ptr is not None:
        tl.store(h_ptr + first_row * D + offsets, h.to(h_ptr.dtype.element_ty), mask=valid)
    if ACTIVATION:
        family = load_family(slopes_ptr, a, c, kappa, log_low, log_high, cols, D, PER_COLUMN)
        tl.store(y_ptr + offsets, phi(h, family, FAST).to(y_ptr.dtype.element_ty), mask=valid)
        if partial_ptr is not None:
            total = tl.sum(tl.where(valid, log_phi_derivative(h, family, FAST), 0.0), 1)  # [ROWS]
            if constant_ptr is not None:
                total += tl.where(block == 0, tl.load(constant_ptr + member), 0.0)
            partial_ptr += first_row * blocks + block
            tl.store(partial_ptr + rows[:, None] * blocks, total[:, None], mask=here)
    else:
        tl.store(y_ptr + offsets, h.to(y_ptr.dtype.element_ty), mask=valid)


@triton.jit(do_not_specialize=["N"])
def layer_fwd_kernel(
    x_ptr,  # [K, N, D]
    weight_ptr,  # [K, D, D], W
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
    TRANSPOSED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    FAST: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
):
    """h = x Wᵀ + b, or x W + b, y = φ(h), and in ``partial`` the sums of log φ′(h) over blocks of columns.

    One program computes a tile [ROWS, COLUMNS] of one member. The blocks of columns of the same rows come
    one after the other, so that they find x in the L2 cache.
    """
    blocks = tl.cdiv(D, COLUMNS)
    block = tl.program_id(0) % blocks
    # A tile's first address is 64 bits wide, the rest counts from it in 32: half the registers.
    first = (tl.program_id(0) // blocks).to(tl.int64) * ROWS
    member = tl.program_id(1).to(tl.int64)
    first_row = member * N + first
    rows = tl.arange(0, ROWS)
    cols = block * COLUMNS + tl.arange(0, COLUMNS)
    inner = tl.arange(0, INNER)
    here = rows[:, None] < N - first

    x_ptrs = x_ptr + first_row * D + (rows[:, None] * D + inner[None, :])  # [ROWS, INNER]
    # [INNER, COLUMNS], of Wᵀ or, transposed, of W.
    if TRANSPOSED:
        w_ptrs = weight_ptr + member * D * D + (inner[:, None] * D + cols[None, :])
    else:
        w_ptr = weight_ptr + (member * D + block * COLUMNS) * D
        w_ptrs = w_ptr + (tl.arange(0, COLUMNS)[None, :] * D + inner[:, None])
    h = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, D, INNER):
        there = inner < D - start
        x = tl.load(x_ptrs, mask=here & there[None, :], other=0.0)
        w = tl.load(w_ptrs, mask=(cols[None, :] < D) & there[:, None], other=0.0)
        if UPCAST:  # the interpreter multiplies the raw bits of bfloat16
            x = x.to(tl.float32)
            w = w.to(tl.float32)
        h = tl.dot(x, w, h, input_precision=PRECISION)
        x_ptrs += INNER
        w_ptrs += INNER * D if TRANSPOSED else INNER

    finish_tile(
        *(h, y_ptr, h_ptr, partial_ptr, constant_ptr, bias_ptr, slopes_ptr, a, c, kappa, log_low, log_high),
        *(first_row, rows, here, cols, block, blocks, member, D, PER_COLUMN, ACTIVATION, FAST),
    )


def layer_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    slopes: Slopes | None,
    *,
    logabsdet: bool,
    save: bool,
    precision: str,
    constant: Tensor | None = None,
    transposed: bool = False,
    fast: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(y = φ(x Wᵀ + b) [K, N, D], log|det J| [K, N] float32 or None, h = x Wᵀ + b [K, N, D] or None).

    x [K, N, D] and ``weight`` W [K, D, D] are contiguous and of one dtype, float32 or bfloat16; ``bias``
    [K, D] may differ in dtype. ``slopes`` is None for no activation, and then h is y and is not returned.
    ``constant`` [K], float32, is log|det W|, added to each row's Σ log φ′(h).
    ``transposed`` takes Wᵀ for W: x W instead of x Wᵀ.
    ``precision`` is the arithmetic of a float32 product: "ieee", "tf32x3" or "tf32". Sums are float32.
    """
    check_rows("x", x)
    K, N, D = x.shape
    check_parameter("weight", weight, (K, D, D), x.dtype)
    check_parameter("bias", bias, (K, D))
    check_parameter("constant", constant, (K,), torch.float32)
    check_precision(precision)

    tile = tiles.layer_tile(D, x.dtype, precision, tiles.architecture(x))
    blocks = triton.cdiv(D, tile.columns)
    active = slopes is not None
    y = torch.empty_like(x)
    h = torch.empty_like(x) if save and active else None
    partial: Tensor | None = None
    if logabsdet and active:
        partial = torch.empty((K, N, blocks), dtype=torch.float32, device=x.device)
    if x.numel() > 0:
        family: dict[str, Any] = family_arguments((1.0, 1.0, 1.0) if slopes is None else slopes, D)
        with on_device_of(x):
            layer_fwd_kernel[(triton.cdiv(N, tile.rows) * blocks, K)](
                x,
                weight,
                bias,
                y,
                h,
                partial,
                constant,
                **family,
                N=N,
                D=D,
                TRANSPOSED=transposed,
                ACTIVATION=active,
                PRECISION=precision,
                UPCAST=INTERPRETED,
                FAST=fast,
                ROWS=tile.rows,
                COLUMNS=tile.columns,
                INNER=tile.inner,
                num_warps=tile.warps,
                num_stages=tile.stages,
                enable_fp_fusion=True,
            )
    return y, row_totals(x, partial, constant) if logabsdet else None, h


def row_totals(x: Tensor, partial: Tensor | None, constant: Tensor | None) -> Tensor:
    """[K, N]: the column blocks' sums added in one fixed order; of the identity, the constant alone."""
    if partial is not None:
        return partial[..., 0] if partial.shape[-1] == 1 else partial.sum(-1)
    total = torch.zeros(x.shape[:-1], dtype=torch.float32, device=x.device)
    return total if constant is None else total + constant.unsqueeze(-1)

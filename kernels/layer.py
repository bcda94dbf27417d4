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
from lunet_fast.kernels.activation import (
    Slopes,
    check_rows,
    family_arguments,
    load_family,
    log_phi_derivative,
    phi,
)

PRECISIONS = ("ieee", "tf32x3", "tf32")


@triton.jit(do_not_specialize=["N"])
def layer_fwd_kernel(
    x_ptr,  # [N, D]
    weight_ptr,  # [D, D], W
    bias_ptr,  # [D], or None
    y_ptr,  # [N, D]
    h_ptr,  # [N, D], or None
    partial_ptr,  # [N, column blocks] float32, or None
    constant_ptr,  # [] float32, log|det W|, or None
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
    UPCAST: tl.constexpr,
    FAST: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
):
    """h = x Wᵀ + b and y = φ(h); with ``partial`` the sums of log φ′(h) over each block of columns.

    One program computes a tile [ROWS, COLUMNS]. The blocks of columns of the same rows come one after the
    other, so that they find x in the L2 cache. φ is taken of the float32 accumulator, not of the h that is
    stored. Column block 0 adds the constant to its partial sums.
    """
    blocks = tl.cdiv(D, COLUMNS)
    block = tl.program_id(0) % blocks
    # A tile's first address is 64 bits wide, the rest counts from it in 32: half the registers.
    first = (tl.program_id(0) // blocks).to(tl.int64) * ROWS
    rows = tl.arange(0, ROWS)
    cols = block * COLUMNS + tl.arange(0, COLUMNS)
    inner = tl.arange(0, INNER)
    here = rows[:, None] < N - first

    x_ptrs = x_ptr + first * D + (rows[:, None] * D + inner[None, :])  # [ROWS, INNER]
    w_ptr = weight_ptr + block.to(tl.int64) * COLUMNS * D
    w_ptrs = w_ptr + (tl.arange(0, COLUMNS)[None, :] * D + inner[:, None])  # [INNER, COLUMNS], of Wᵀ
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
        w_ptrs += INNER

    if bias_ptr is not None:
        h += tl.load(bias_ptr + cols, mask=cols < D, other=0.0).to(tl.float32)[None, :]
    offsets = rows[:, None] * D + cols[None, :]
    valid = here & (cols[None, :] < D)
    y_ptr += first * D
    if h_ptr is not None:
        tl.store(h_ptr + first * D + offsets, h.to(h_ptr.dtype.element_ty), mask=valid)
    if ACTIVATION:
        family = load_family(slopes_ptr, a, c, kappa, log_low, log_high, cols, D, PER_COLUMN)
        tl.store(y_ptr + offsets, phi(h, family, FAST).to(y_ptr.dtype.element_ty), mask=valid)
        if partial_ptr is not None:
            total = tl.sum(tl.where(valid, log_phi_derivative(h, family, FAST), 0.0), 1)  # [ROWS]
            if constant_ptr is not None:
                total += tl.where(block == 0, tl.load(constant_ptr), 0.0)
            tl.store(partial_ptr + first * blocks + (rows * blocks + block), total, mask=rows < N - first)
    else:
        tl.store(y_ptr + offsets, h.to(y_ptr.dtype.element_ty), mask=valid)


#: Whether Triton was imported under TRITON_INTERPRET=1.
INTERPRETED = not isinstance(layer_fwd_kernel, triton.JITFunction)


def _check_parameter(name: str, tensor: Tensor | None, shape: tuple[int, ...]) -> None:
    if tensor is not None and (tensor.shape != shape or not tensor.is_contiguous()):
        raise ValueError(f"{name} must be contiguous {list(shape)}, got {list(tensor.shape)}")


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
    fast: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(y = φ(x Wᵀ + b) [N, D], log|det J| [N] float32 or None, h = x Wᵀ + b [N, D] or None).

    x [N, D] and ``weight`` W [D, D] are contiguous and of one dtype, float32 or bfloat16; ``bias`` [D] may
    differ in dtype. ``slopes`` is None for no activation, and then h is y and is not returned.
    ``constant``, a float32 scalar on x's device, is log|det W|, added to each row's Σ log φ′(h).
    ``precision`` is the arithmetic of a float32 product: "ieee", "tf32x3" or "tf32". Sums are float32.
    """
    check_rows("x", x)
    N, D = x.shape
    _check_parameter("weight", weight, (D, D))
    _check_parameter("bias", bias, (D,))
    _check_parameter("constant", constant, ())
    if weight.dtype != x.dtype:
        raise ValueError(f"weight must be of x's dtype {x.dtype}, got {weight.dtype}")
    if constant is not None and constant.dtype != torch.float32:
        raise ValueError(f"constant must be float32, got {constant.dtype}")
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")

    tile = tiles.layer_tile(D, x.dtype, precision, tiles.architecture(x))
    blocks = triton.cdiv(D, tile.columns)
    active = slopes is not None
    y = torch.empty_like(x)
    h = torch.empty_like(x) if save and active else None
    partial: Tensor | None = None
    if logabsdet and active:
        partial = torch.empty((N, blocks), dtype=torch.float32, device=x.device)
    if N > 0:
        family: dict[str, Any] = family_arguments((1.0, 1.0, 1.0) if slopes is None else slopes, D)
        with tiles.on_device_of(x):
            layer_fwd_kernel[(triton.cdiv(N, tile.rows) * blocks,)](
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
    return y, _row_totals(x, partial, constant) if logabsdet else None, h


def _row_totals(x: Tensor, partial: Tensor | None, constant: Tensor | None) -> Tensor:
    """[N]: the column blocks' sums added in one fixed order; of the identity, the constant alone."""
    if partial is not None:
        return partial[:, 0] if partial.shape[1] == 1 else partial.sum(1)
    total = torch.zeros(x.shape[0], dtype=torch.float32, device=x.device)
    return total if constant is None else total + constant

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False
# mypy: disable-error-code=assignment
# ruff: noqa: RUF005 (the compiler knows a sum of tuples, not what ruff would have instead)
"""The gradients of x = U⁻¹ L⁻¹ P (φ⁻¹(y) − b) and its log-determinant, by substitution in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lunet_fast.kernels import tiles
from lunet_fast.kernels.activation import (
    Slopes,
    activation_of,
    load_family,
    located,
    memory_for_sums,
    phi_backward,
    row_gradients,
    slope_gradients,
    slope_rows,
    split_sums,
    store_sums,
)
from lunet_fast.kernels.launch import check_parameter, check_rows, launch, load_tile
from lunet_fast.kernels.leaky_softplus import PARAMETERS
from lunet_fast.kernels.matrix import permuted
from lunet_fast.kernels.solve import (
    at_least_tf32x3,
    blocks_held,
    check_factors,
    running,
    solve_block,
    solve_descending,
    solve_held,
)
from lunet_fast.kernels.spline import Spline


@triton.jit
def _store_gradients(
    part,
    ld,
    grad_right_ptr,
    grad_y_ptr,
    h_ptr,
    sums_ptr,
    permutation_ptr,
    activation,
    j,
    here,
    D,
    RIGHT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Block j of L⁻ᵀ U⁻ᵀ g to its places in A⁻ᵀ g, where RIGHT; through φ⁻¹ to the gradient of y; sums for
    the slopes."""
    source = permuted(permutation_ptr, j * BLOCK + tl.arange(0, BLOCK), D)
    valid = here & (source[None, :] < D)
    offsets = tl.arange(0, ROWS)[:, None] * D + source[None, :]
    if RIGHT:
        tl.store(grad_right_ptr + offsets, part.to(grad_right_ptr.dtype.element_ty), mask=valid)
    if h_ptr is not None:
        family = load_family(activation, 0, source, D)
        h = tl.load(h_ptr + offsets, mask=valid, other=0.0).to(tl.float32)
        at = located(h, family, activation)
        grad_y = phi_backward(part, ld, at, family, activation, True)
        tl.store(grad_y_ptr + offsets, grad_y.to(grad_y_ptr.dtype.element_ty), mask=valid)
        if sums_ptr is not None:
            terms = slope_gradients(-grad_y, None if ld is None else -ld, at, family, activation)
            sums = ()
            for k in tl.static_range(PARAMETERS):
                sums = sums + (tl.sum(tl.where(valid, terms[k], 0.0), 0),)
            store_sums(sums_ptr, sums, source, D, False, PARAMETERS)


@triton.jit(do_not_specialize=["N"])
def layer_inv_bwd_kernel(
    grad_x_ptr,  # [K, N, D]
    grad_logabsdet_ptr,  # [K, N] float32, of −Σ log φ′(h) − log|det W|, or None
    h_ptr,  # [K, N, D], or None
    lu_ptr,  # [K, D, D]
    inverses_ptr,  # [K, 2, blocks, BLOCK, BLOCK] float32
    permutation_ptr,  # [D] int64, or None
    running_ptr,  # [K, N, D] float32, or None: grad_right itself, or registers
    grad_right_ptr,  # [K, N, D]
    grad_y_ptr,  # [K, N, D], or None without an activation
    sums_ptr,  # [K, programs, 3, D] float32, or None
    activation,
    N,
    D,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    INNER: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """ROWS rows of g_r = Pᵀ L⁻ᵀ U⁻ᵀ g and of g_y, and this program's sums of the slopes' terms."""
    first = tl.program_id(0).to(tl.int64) * ROWS
    member = tl.program_id(1).to(tl.int64)
    first_row = member * N + first
    blocks = tl.cdiv(D, BLOCK)
    rows = tl.arange(0, ROWS)
    here = rows[:, None] < N - first
    grad_x_ptr += first_row * D
    grad_right_ptr += first_row * D
    if h_ptr is not None:
        h_ptr += first_row * D
        grad_y_ptr += first_row * D
    if sums_ptr is not None:
        sums_ptr += (member * tl.num_programs(0) + tl.program_id(0)) * PARAMETERS * D
    ld = None
    if grad_logabsdet_ptr is not None:
        ld = tl.load(grad_logabsdet_ptr + first_row + rows, mask=rows < N - first, other=0.0)[:, None]
    lu_ptr += member * D * D
    inverses_ptr += member * 2 * blocks * BLOCK * BLOCK

    if BLOCKS > 0:
        parts = ()
        for j in tl.static_range(BLOCKS):
            parts = parts + (load_tile(grad_x_ptr, j * BLOCK, here, D, ROWS, BLOCK),)
        parts = solve_held(parts, lu_ptr, inverses_ptr, D, True, PRECISION, ROWS, BLOCK, BLOCKS)
        for j in tl.static_range(BLOCKS):
            _store_gradients(
                parts[j],
                ld,  # it may be None, which a tuple must not hold
                *(grad_right_ptr, grad_y_ptr, h_ptr, sums_ptr, permutation_ptr, activation),
                *(j, here, D, True, ROWS, BLOCK),
            )
    else:
        # Where grad_right itself holds the blocks solved so far, it has them already, in their order.
        RIGHT: tl.constexpr = running_ptr is not None
        solved_ptr = grad_right_ptr if running_ptr is None else running_ptr + first_row * D
        upper_ptr = inverses_ptr + blocks * BLOCK * BLOCK
        for j in range(blocks):
            solve_block(
                load_tile(grad_x_ptr, j * BLOCK, here, D, ROWS, BLOCK),
                *(solved_ptr, lu_ptr, upper_ptr, j, 0, j * BLOCK, here, D),
                *(True, PRECISION, ROWS, BLOCK, INNER),
            )
        for step in range(blocks):
            j = blocks - 1 - step
            part = solve_descending(
                *(here, solved_ptr, lu_ptr, inverses_ptr, j, here, D),
                *(True, PRECISION, ROWS, BLOCK, INNER),
            )
            _store_gradients(
                part,
                ld,
                *(grad_right_ptr, grad_y_ptr, h_ptr, sums_ptr, permutation_ptr, activation),
                *(j, here, D, RIGHT, ROWS, BLOCK),
            )


def layer_inverse_backward(
    grad_x: Tensor,
    grad_logabsdet: Tensor | None,
    h: Tensor | None,
    lu: Tensor,
    inverses: Tensor,
    slopes: Slopes | None,
    *,
    permutation: Tensor | None,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(g_r = A⁻ᵀ g_x [K, N, D], gradient of y [K, N, D], of ``slopes`` in float32 if they are a tensor).

    ``grad_x`` [K, N, D] is contiguous, float32 or bfloat16, the gradients and h = φ⁻¹(y) of its dtype; h is
    None without an activation, and then the gradient of y is g_r itself. ``grad_logabsdet`` [K, N], float32,
    is the gradient of the inverse's log-determinant. The rest is as in ``layer_inverse``.

    g_y = (g_r − g_ld·φ″/φ′)/φ′ and g_θ = −Σ g_y·∂φ/∂θ + g_ld·∂log φ′/∂θ, at h. The gradients of ``lu`` and
    ``bias`` follow from g_r: −g_rᵀ x and −Σ g_r. 2·N·D² flops and up, one launch and, for slopes, the sum of
    its programs' sums in a fixed order. Of a spline, whose sums would be a large part of N·D numbers for one
    tile of rows to a program, φ⁻¹ is a launch of its own.
    """
    check_rows("grad_x", grad_x)
    K, N, D = grad_x.shape
    precision = at_least_tf32x3(precision)
    check_factors(lu, inverses, permutation, K, D)
    check_parameter("grad_logabsdet", grad_logabsdet, (K, N), torch.float32)
    check_parameter("h", h, (K, N, D), grad_x.dtype)
    if (h is None) != (slopes is None):
        raise ValueError("h and slopes must be given together")

    tile = tiles.substitution_tile(D, precision, tiles.architecture(grad_x))
    row_wise = isinstance(slopes, Spline)
    fused = None if row_wise else slopes
    grad_right = torch.empty_like(grad_x)
    grad_y = grad_right if fused is None else torch.empty_like(grad_x)
    scratch = running(grad_right, tile, scattered=permutation is not None)
    programs = tiles.ceil_div(N, tile.rows)
    sums = memory_for_sums(grad_x, programs, False, slope_rows(fused))
    launch(
        *(layer_inv_bwd_kernel, (programs, K), tile),
        *(grad_x, None if fused is None else grad_logabsdet, None if fused is None else h),
        *(lu, inverses, permutation, scratch, grad_right, None if fused is None else grad_y),
        *(sums, activation_of(fused, D), N, D),
        PRECISION=precision,
        **tile.triangle,
        BLOCKS=blocks_held(tile, D),
    )
    if h is not None and slopes is not None and row_wise:
        grad_y, _, grad_slopes = row_gradients(
            grad_right, grad_logabsdet, h, slopes, inverse=True, column_sums=False
        )
        return grad_right, grad_y, grad_slopes
    return grad_right, grad_y, split_sums(sums, fused, False)[1]

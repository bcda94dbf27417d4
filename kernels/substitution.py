# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False
# mypy: disable-error-code=assignment
# ruff: noqa: RUF005 (the compiler knows a sum of tuples, not what ruff would have instead)
"""x = U⁻¹ L⁻¹ P (φ⁻¹(y) − b), its log-determinant and its gradients, each in one launch.

Blocked substitution. With the diagonal blocks of L and U inverted ahead, a triangular solve is products of
small blocks: block j of the solution of T x = r is T_jj⁻¹ (r_j − Σ T_ji x_i), where the sum takes the blocks
already solved. The blocks T_ji are read straight out of the packed matrix: one that is strictly below its
diagonal is all L, one above it all U, and nothing else is touched.

Two orders serve everything. L is solved from its first block on, U from its last. Transposed, Uᵀ is lower and
comes first, Lᵀ upper; so inverse and gradient are both an ascending pass and then a descending one, over
the same tiles read with rows and columns exchanged.

Where the rows of a program are meanwhile. Small ones stay in registers, as a tuple of blocks; for longer ones
the blocks solved so far are in the output itself (or in a float32 scratch where that would not hold them),
which is the program's own and stays in the caches.

W⁻¹. For large D a product with the explicit inverse keeps the tensor cores busier. It is as accurate unless
the factors are badly conditioned, and that is known on the device only: both kernels are launched, both read
the condition there, and the one that is not wanted returns at once. The host waits for nothing, and a
CUDA graph can record it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lunet_fast.kernels import tiles
from lunet_fast.kernels.activation import (
    LEARNT_STEPS,
    Slopes,
    activation_kernel,
    family_arguments,
    inverse_steps,
    load_family,
    log_phi_derivative,
    phi_backward,
    phi_inverse,
    slope_gradients,
    split_sums,
)
from lunet_fast.kernels.launch import check_parameter, check_precision, check_rows, on_device_of
from lunet_fast.kernels.matrix import check_packed, diagonal, log_diagonal, lower_tile, upper_tile
from lunet_fast.ops.precision import LOG_DIAGONAL_BOUND

#: Skeel's condition of the factors, ‖|W⁻¹| |L| |U|‖∞, up to which W⁻¹ is used: three digits of seven.
EXPLICIT_INVERSE_LIMIT: tl.constexpr = tl.constexpr(1e3)


# --- preparation: the diagonal blocks inverted ----------------------------------------------------------


@triton.jit
def invert_blocks_kernel(
    lu_ptr,  # [K, D, D]
    sign_ptr,  # [K, D], or None
    inverses_ptr,  # [K, 2, blocks, BLOCK, BLOCK] float32
    logabsdet_ptr,  # [K] float32
    D,
    BOUND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """T⁻¹ of one diagonal block T of L or U by substitution; the last program adds up log|u_ii|."""
    blocks = tl.cdiv(D, BLOCK)
    member = tl.program_id(1).to(tl.int64)
    lu_ptr += member * D * D
    if sign_ptr is not None:
        sign_ptr += member * D
    if tl.program_id(0) == 2 * blocks:
        total = tl.zeros([256], tl.float32)
        for start in range(0, D, 256):
            total += log_diagonal(lu_ptr, start + tl.arange(0, 256), D, BOUND)
        tl.store(logabsdet_ptr + member, tl.sum(total, 0))
    else:
        upper = tl.program_id(0) >= blocks
        start = (tl.program_id(0) % blocks) * BLOCK
        span = tl.arange(0, BLOCK)
        rows = span[:, None]
        cols = span[None, :]
        beside = rows < cols if upper else rows > cols
        inside = beside & (rows < D - start) & (cols < D - start)
        block = tl.load(lu_ptr + start * (D + 1) + (rows * D + cols), mask=inside, other=0.0).to(tl.float32)
        reciprocal = tl.full([BLOCK], 1.0, tl.float32)
        if upper:
            reciprocal /= diagonal(lu_ptr, sign_ptr, start + span, D, BOUND)
        # Row j of the inverse is final once the rows before it (of U: after it) have been subtracted.
        inverse = tl.where(rows == cols, 1.0, 0.0)
        for step in range(BLOCK):
            j = BLOCK - 1 - step if upper else step
            scale = tl.sum(tl.where(span == j, reciprocal, 0.0), 0)
            pivot = tl.sum(tl.where(rows == j, inverse, 0.0), 0) * scale
            column = tl.sum(tl.where(cols == j, block, 0.0), 1)
            inverse = tl.where(rows == j, pivot[None, :], inverse - column[:, None] * pivot[None, :])
        inverses_ptr += (member * 2 * blocks + tl.program_id(0)) * BLOCK * BLOCK
        tl.store(inverses_ptr + (rows * BLOCK + cols), inverse)


# --- blocked substitution -------------------------------------------------------------------------------


@triton.jit
def _coupling(lu_ptr, k, n, D, TRANSPOSED: tl.constexpr, INNER: tl.constexpr, BLOCK: tl.constexpr):
    """What multiplies the solution's columns k… in the equations n…: [INNER, BLOCK] of Tᵀ, or of T."""
    inner = k + tl.arange(0, INNER)[:, None]
    outer = n + tl.arange(0, BLOCK)[None, :]
    offsets = inner * D + outer if TRANSPOSED else outer * D + inner
    return tl.load(lu_ptr + offsets, mask=(inner < D) & (outer < D), other=0.0).to(tl.float32)


@triton.jit
def _solve_diagonal(
    right, inverse_ptr, j, TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr
):
    """Rows r T_jj⁻ᵀ, or r T_jj⁻¹."""
    inner = tl.arange(0, BLOCK)[:, None]
    outer = tl.arange(0, BLOCK)[None, :]
    offsets = inner * BLOCK + outer if TRANSPOSED else outer * BLOCK + inner
    return tl.dot(right, tl.load(inverse_ptr + j * BLOCK * BLOCK + offsets), input_precision=PRECISION)


@triton.jit
def _substitute_held(
    parts,
    lu_ptr,
    inverse_ptr,
    D,
    DESCENDING: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """One pass over rows held as blocks [ROWS, BLOCK], from the first block on or from the last."""
    done = ()
    for step in tl.static_range(BLOCKS):
        j = BLOCKS - 1 - step if DESCENDING else step
        right = parts[BLOCKS - 1 - step if DESCENDING else step]
        if step > 0:
            known = tl.zeros([ROWS, BLOCK], tl.float32)
            for index in tl.static_range(step):
                i = j + 1 + index if DESCENDING else index
                coupling = _coupling(lu_ptr, i * BLOCK, j * BLOCK, D, TRANSPOSED, BLOCK, BLOCK)
                known = tl.dot(done[index], coupling, known, input_precision=PRECISION)
            right -= known
        solution = _solve_diagonal(right, inverse_ptr, j, TRANSPOSED, PRECISION, BLOCK)
        if DESCENDING:
            done = (solution,) + done
        else:
            done = done + (solution,)
    return done


@triton.jit
def _solve_block(
    right,
    running_ptr,
    lu_ptr,
    inverse_ptr,
    j,
    low,
    high,
    here,
    D,
    TRANSPOSED: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    INNER: tl.constexpr,
):
    """Block j of the solution, from its right side and the columns low…high solved before, in running."""
    rows = tl.arange(0, ROWS)[:, None]
    inner = tl.arange(0, INNER)[None, :]
    known = tl.zeros([ROWS, BLOCK], tl.float32)
    for k in range(low, high, INNER):
        valid = here & (inner < D - k)
        solved = tl.load(running_ptr + (rows * D + (k + inner)), mask=valid, other=0.0)
        coupling = _coupling(lu_ptr, k, j * BLOCK, D, TRANSPOSED, INNER, BLOCK)
        known = tl.dot(solved, coupling, known, input_precision=PRECISION)
    return _solve_diagonal(right - known, inverse_ptr, j, TRANSPOSED, PRECISION, BLOCK)


@triton.jit
def _store_running(running_ptr, part, j, here, D, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """running[:, block j] ← part, seen by every thread; what they still read there is waited for."""
    cols = j * BLOCK + tl.arange(0, BLOCK)[None, :]
    tl.debug_barrier()
    tl.store(running_ptr + (tl.arange(0, ROWS)[:, None] * D + cols), part, mask=here & (cols < D))
    tl.debug_barrier()


@triton.jit
def _load_running(running_ptr, j, here, D, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    cols = j * BLOCK + tl.arange(0, BLOCK)[None, :]
    return tl.load(running_ptr + (tl.arange(0, ROWS)[:, None] * D + cols), mask=here & (cols < D), other=0.0)


@triton.jit
def _source(permutation_ptr, j, D, BLOCK: tl.constexpr):
    """The features that P brings to the columns of block j; D and up where there are none."""
    cols = j * BLOCK + tl.arange(0, BLOCK)
    if permutation_ptr is not None:
        cols = tl.load(permutation_ptr + cols, mask=cols < D, other=D).to(tl.int32)
    return cols


# --- the inverse ----------------------------------------------------------------------------------------


@triton.jit
def _right_side(
    y_ptr,
    h_ptr,
    bias_ptr,
    permutation_ptr,
    slopes,
    j,
    here,
    D,
    PER_COLUMN: tl.constexpr,
    LOGABSDET: tl.constexpr,
    STEPS: tl.constexpr,
    FAST: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Block j of P(φ⁻¹(y) − b), zero where there is nothing, and Σ log φ′ over its columns, [ROWS]."""
    source = _source(permutation_ptr, j, D, BLOCK)
    valid = here & (source[None, :] < D)
    offsets = tl.arange(0, ROWS)[:, None] * D + source[None, :]
    right = tl.load(y_ptr + offsets, mask=valid, other=0.0).to(tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    if STEPS > 0:
        family = load_family(*slopes, source, D, PER_COLUMN)
        right = phi_inverse(right, family, STEPS, FAST)
        if h_ptr is not None:
            tl.store(h_ptr + offsets, right.to(h_ptr.dtype.element_ty), mask=valid)
        if LOGABSDET:
            total = tl.sum(tl.where(valid, log_phi_derivative(right, family, FAST), 0.0), 1)
    if bias_ptr is not None:
        right -= tl.load(bias_ptr + source, mask=source < D, other=0.0).to(tl.float32)[None, :]
    return tl.where(valid, right, 0.0), total


@triton.jit(do_not_specialize=["N"])
def layer_inv_kernel(
    y_ptr,  # [K, N, D]
    lu_ptr,  # [K, D, D]
    inverses_ptr,  # [K, 2, blocks, BLOCK, BLOCK] float32, of the diagonal blocks of L and of U
    bias_ptr,  # [K, D], or None
    permutation_ptr,  # [D] int64, or None
    x_ptr,  # [K, N, D]
    running_ptr,  # [K, N, D] float32, or None: x itself, or registers
    h_ptr,  # [K, N, D], or None
    logabsdet_ptr,  # [K, N] float32, or None
    constant_ptr,  # [K] float32, log|det W|, or None
    condition_ptr,  # [K] float32, or None
    slopes_ptr,  # [3] or [3, D], or None
    a,
    c,
    kappa,
    log_low,
    log_high,
    N,
    D,
    PER_COLUMN: tl.constexpr,
    STEPS: tl.constexpr,
    PRECISION: tl.constexpr,
    FAST: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    INNER: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """ROWS rows of one member: h = φ⁻¹(y), P(h − b), L⁻¹, U⁻¹; −log|det W| − Σ log φ′(h).

    STEPS of φ⁻¹; 0: no activation. BLOCKS blocks of a row are held in registers; 0: any number, in memory.
    With a condition within the limit nothing is done: x comes from the product with W⁻¹.
    """
    member = tl.program_id(1).to(tl.int64)
    if condition_ptr is not None:
        condition = tl.load(condition_ptr + member)
        if condition <= EXPLICIT_INVERSE_LIMIT:
            return
    # The first row's address is 64 bits wide, the rest of a tile counts from it in 32: half the registers.
    first = tl.program_id(0).to(tl.int64) * ROWS
    first_row = member * N + first
    blocks = tl.cdiv(D, BLOCK)
    rows = tl.arange(0, ROWS)
    here = rows[:, None] < N - first
    y_ptr += first_row * D
    x_ptr += first_row * D
    if h_ptr is not None:
        h_ptr += first_row * D
    if bias_ptr is not None:
        bias_ptr += member * D
    lu_ptr += member * D * D
    lower_ptr = inverses_ptr + member * 2 * blocks * BLOCK * BLOCK
    upper_ptr = lower_ptr + blocks * BLOCK * BLOCK
    slopes = (slopes_ptr, a, c, kappa, log_low, log_high)
    inputs = (y_ptr, h_ptr, bias_ptr, permutation_ptr, slopes)
    LOGABSDET: tl.constexpr = logabsdet_ptr is not None
    total = tl.zeros([ROWS], tl.float32)

    if BLOCKS > 0:
        parts = ()
        for j in tl.static_range(BLOCKS):
            right, part = _right_side(*inputs, j, here, D, PER_COLUMN, LOGABSDET, STEPS, FAST, ROWS, BLOCK)
            total += part
            parts = parts + (right,)
        parts = _substitute_held(parts, lu_ptr, lower_ptr, D, False, False, PRECISION, ROWS, BLOCK, BLOCKS)
        parts = _substitute_held(parts, lu_ptr, upper_ptr, D, True, False, PRECISION, ROWS, BLOCK, BLOCKS)
        for j in tl.static_range(BLOCKS):
            cols = j * BLOCK + tl.arange(0, BLOCK)[None, :]
            x = parts[j].to(x_ptr.dtype.element_ty)
            tl.store(x_ptr + (rows[:, None] * D + cols), x, mask=here & (cols < D))
    else:
        if running_ptr is None:
            solved_ptr = x_ptr
        else:
            solved_ptr = running_ptr + first_row * D
        for j in range(blocks):
            right, part = _right_side(*inputs, j, here, D, PER_COLUMN, LOGABSDET, STEPS, FAST, ROWS, BLOCK)
            total += part
            part = _solve_block(
                *(right, solved_ptr, lu_ptr, lower_ptr, j, 0, j * BLOCK, here, D),
                *(False, PRECISION, ROWS, BLOCK, INNER),
            )
            _store_running(solved_ptr, part, j, here, D, ROWS, BLOCK)
        for step in range(blocks):
            j = blocks - 1 - step
            part = _solve_block(
                _load_running(solved_ptr, j, here, D, ROWS, BLOCK),
                *(solved_ptr, lu_ptr, upper_ptr, j, (j + 1) * BLOCK, D, here, D),
                *(False, PRECISION, ROWS, BLOCK, INNER),
            )
            _store_running(solved_ptr, part, j, here, D, ROWS, BLOCK)
            if running_ptr is not None:
                cols = j * BLOCK + tl.arange(0, BLOCK)[None, :]
                x = part.to(x_ptr.dtype.element_ty)
                tl.store(x_ptr + (rows[:, None] * D + cols), x, mask=here & (cols < D))

    if logabsdet_ptr is not None:
        if constant_ptr is not None:
            total += tl.load(constant_ptr + member)
        tl.store(logabsdet_ptr + first_row + rows, -total, mask=rows < N - first)


# --- the inverse by W⁻¹ ---------------------------------------------------------------------------------


@triton.jit
def magnitudes_kernel(
    lu_ptr,  # [K, D, D]
    sign_ptr,  # [K, D], or None
    vector_ptr,  # [K, D] float32, v; or None: all ones
    out_ptr,  # [K, D] float32
    D,
    UPPER: tl.constexpr,
    BOUND: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """|U| v, or |L| v, ROWS rows to a program."""
    member = tl.program_id(1).to(tl.int64)
    lu_ptr += member * D * D
    out_ptr += member * D
    if sign_ptr is not None:
        sign_ptr += member * D
    if vector_ptr is not None:
        vector_ptr += member * D
    first = tl.program_id(0) * ROWS
    rows = first + tl.arange(0, ROWS)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(first if UPPER else 0, D if UPPER else first + ROWS, COLUMNS):
        cols = start + tl.arange(0, COLUMNS)
        if UPPER:
            diagonal_there = diagonal(lu_ptr, sign_ptr, rows, D, BOUND)[:, None]
            part = upper_tile(lu_ptr, diagonal_there, rows[:, None], cols[None, :], D)
        else:
            part = lower_tile(lu_ptr, rows[:, None], cols[None, :], D)
        part = tl.abs(part)
        if vector_ptr is not None:
            part *= tl.load(vector_ptr + cols, mask=cols < D, other=0.0)[None, :]
        total += part
    tl.store(out_ptr + rows, tl.sum(total, 1), mask=rows < D)


@triton.jit
def inverse_weight_kernel(
    lu_ptr,  # [K, D, D]
    inverses_ptr,  # [K, 2, blocks, BLOCK, BLOCK] float32
    permutation_ptr,  # [D] int64, or None
    magnitudes_ptr,  # [K, D] float32, |L| |U| 1
    running_ptr,  # [K, D, D] float32, or None: W⁻¹ itself
    weight_ptr,  # [K, D, D] float32, W⁻¹
    conditions_ptr,  # [K, D] float32
    D,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    INNER: tl.constexpr,
):
    """ROWS rows of W⁻¹ = U⁻¹ L⁻¹ P, and of |U⁻¹ L⁻¹| |L| |U| 1. Row r of T⁻¹ solves x T = e_r."""
    member = tl.program_id(1).to(tl.int64)
    blocks = tl.cdiv(D, BLOCK)
    first = tl.program_id(0) * ROWS
    start = first // BLOCK
    rows = first + tl.arange(0, ROWS)
    here = rows[:, None] < D
    lu_ptr += member * D * D
    weight_ptr += (member * D + first) * D
    if running_ptr is None:
        solved_ptr = weight_ptr
    else:
        solved_ptr = running_ptr + (member * D + first) * D
    lower_ptr = inverses_ptr + member * 2 * blocks * BLOCK * BLOCK
    upper_ptr = lower_ptr + blocks * BLOCK * BLOCK

    # In the columns before its diagonal U⁻¹ is zero.
    for j in range(start, blocks):
        cols = (j * BLOCK + tl.arange(0, BLOCK))[None, :]
        part = _solve_block(
            tl.where((rows[:, None] == cols) & here, 1.0, 0.0),
            *(solved_ptr, lu_ptr, upper_ptr, j, start * BLOCK, j * BLOCK, here, D),
            *(True, PRECISION, ROWS, BLOCK, INNER),
        )
        _store_running(solved_ptr, part, j, here, D, ROWS, BLOCK)
    condition = tl.zeros([ROWS], tl.float32)
    for step in range(blocks):
        j = blocks - 1 - step
        part = _solve_block(
            _load_running(solved_ptr, j, here & (rows[:, None] < (j + 1) * BLOCK), D, ROWS, BLOCK),
            *(solved_ptr, lu_ptr, lower_ptr, j, (j + 1) * BLOCK, D, here, D),
            *(True, PRECISION, ROWS, BLOCK, INNER),
        )
        _store_running(solved_ptr, part, j, here, D, ROWS, BLOCK)
        cols = j * BLOCK + tl.arange(0, BLOCK)
        magnitudes = tl.load(magnitudes_ptr + member * D + cols, mask=cols < D, other=0.0)
        condition += tl.sum(tl.abs(part) * magnitudes[None, :], 1)
        if running_ptr is not None:
            source = _source(permutation_ptr, j, D, BLOCK)[None, :]
            offsets = tl.arange(0, ROWS)[:, None] * D + source
            tl.store(weight_ptr + offsets, part, mask=here & (source < D))
    tl.store(conditions_ptr + member * D + rows, condition, mask=rows < D)


@triton.jit(do_not_specialize=["N"])
def inverse_product_kernel(
    h_ptr,  # [K, N, D] float32, φ⁻¹(y), or y where φ is the identity
    weight_ptr,  # [K, D, D] float32, W⁻¹
    bias_ptr,  # [K, D], or None
    x_ptr,  # [K, N, D]
    logabsdet_ptr,  # [K, N] float32, or None
    constant_ptr,  # [K] float32, log|det W|, or None
    condition_ptr,  # [K] float32
    N,
    D,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
):
    """x = (h − b) W⁻ᵀ, a tile [ROWS, COLUMNS]; nothing if the condition passes the limit.

    The log-determinant holds −Σ log φ′(h) already if there is an activation; log|det W| is subtracted. The
    blocks of columns of the same rows come one after the other, so that they find h in the L2 cache.
    """
    member = tl.program_id(1).to(tl.int64)
    if (tl.load(condition_ptr + member) <= EXPLICIT_INVERSE_LIMIT) == 0:  # NaN is no condition to trust
        return
    blocks = tl.cdiv(D, COLUMNS)
    block = tl.program_id(0) % blocks
    first = (tl.program_id(0) // blocks).to(tl.int64) * ROWS
    first_row = member * N + first
    rows = tl.arange(0, ROWS)
    cols = block * COLUMNS + tl.arange(0, COLUMNS)
    inner = tl.arange(0, INNER)
    here = rows[:, None] < N - first
    if bias_ptr is not None:
        bias_ptr += member * D

    h_ptrs = h_ptr + first_row * D + (rows[:, None] * D + inner[None, :])  # [ROWS, INNER]
    w_ptrs = weight_ptr + member * D * D + (cols[None, :] * D + inner[:, None])  # [INNER, COLUMNS], of W⁻ᵀ
    x = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, D, INNER):
        there = inner < D - start
        h = tl.load(h_ptrs, mask=here & there[None, :], other=0.0).to(tl.float32)
        if bias_ptr is not None:
            h -= tl.load(bias_ptr + start + inner, mask=there, other=0.0).to(tl.float32)[None, :]
        w = tl.load(w_ptrs, mask=(cols[None, :] < D) & there[:, None], other=0.0)
        x = tl.dot(h, w, x, input_precision=PRECISION)
        h_ptrs += INNER
        w_ptrs += INNER
    valid = here & (cols[None, :] < D)
    tl.store(
        x_ptr + first_row * D + (rows[:, None] * D + cols[None, :]), x.to(x_ptr.dtype.element_ty), mask=valid
    )
    # The first test is the compiler's, the second the program's.
    if logabsdet_ptr is not None:
        first_block = block == 0
        if first_block:
            total = tl.zeros([ROWS], tl.float32)
            if ACTIVATION:
                total = tl.load(logabsdet_ptr + first_row + rows, mask=rows < N - first, other=0.0)
            if constant_ptr is not None:
                total -= tl.load(constant_ptr + member)
            tl.store(logabsdet_ptr + first_row + rows, total, mask=rows < N - first)


# --- the inverse's gradient -----------------------------------------------------------------------------


@triton.jit
def _store_gradients(
    part,
    ld,
    grad_right_ptr,
    grad_y_ptr,
    h_ptr,
    sums_ptr,
    permutation_ptr,
    slopes,
    j,
    here,
    D,
    RIGHT: tl.constexpr,
    PER_COLUMN: tl.constexpr,
    FAST: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Block j of L⁻ᵀ U⁻ᵀ g to its places in A⁻ᵀ g, where RIGHT; through φ⁻¹ to the gradient of y; sums for
    the slopes."""
    source = _source(permutation_ptr, j, D, BLOCK)
    valid = here & (source[None, :] < D)
    offsets = tl.arange(0, ROWS)[:, None] * D + source[None, :]
    if RIGHT:
        tl.store(grad_right_ptr + offsets, part.to(grad_right_ptr.dtype.element_ty), mask=valid)
    if h_ptr is not None:
        family = load_family(*slopes, source, D, PER_COLUMN)
        h = tl.load(h_ptr + offsets, mask=valid, other=0.0).to(tl.float32)
        grad_y = phi_backward(part, ld, h, family, True, FAST)
        tl.store(grad_y_ptr + offsets, grad_y.to(grad_y_ptr.dtype.element_ty), mask=valid)
        if sums_ptr is not None:
            by_a, by_c, by_kappa = slope_gradients(-grad_y, None if ld is None else -ld, h, family, FAST)
            tl.store(sums_ptr + source, tl.sum(tl.where(valid, by_a, 0.0), 0), mask=source < D)
            tl.store(sums_ptr + D + source, tl.sum(tl.where(valid, by_c, 0.0), 0), mask=source < D)
            tl.store(sums_ptr + 2 * D + source, tl.sum(tl.where(valid, by_kappa, 0.0), 0), mask=source < D)


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
    slopes_ptr,  # [3] or [3, D], or None
    a,
    c,
    kappa,
    log_low,
    log_high,
    N,
    D,
    PER_COLUMN: tl.constexpr,
    PRECISION: tl.constexpr,
    FAST: tl.constexpr,
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
        sums_ptr += (member * tl.num_programs(0) + tl.program_id(0)) * 3 * D
    ld = None
    if grad_logabsdet_ptr is not None:
        ld = tl.load(grad_logabsdet_ptr + first_row + rows, mask=rows < N - first, other=0.0)[:, None]
    lu_ptr += member * D * D
    lower_ptr = inverses_ptr + member * 2 * blocks * BLOCK * BLOCK
    upper_ptr = lower_ptr + blocks * BLOCK * BLOCK
    slopes = (slopes_ptr, a, c, kappa, log_low, log_high)
    # ld is no member: Triton takes an argument that is None into a tuple, but not a variable set to None.
    outputs = (grad_right_ptr, grad_y_ptr, h_ptr, sums_ptr, permutation_ptr, slopes)

    if BLOCKS > 0:
        parts = ()
        for j in tl.static_range(BLOCKS):
            cols = j * BLOCK + tl.arange(0, BLOCK)[None, :]
            part = tl.load(grad_x_ptr + (rows[:, None] * D + cols), mask=here & (cols < D), other=0.0)
            parts = parts + (part.to(tl.float32),)
        parts = _substitute_held(parts, lu_ptr, upper_ptr, D, False, True, PRECISION, ROWS, BLOCK, BLOCKS)
        parts = _substitute_held(parts, lu_ptr, lower_ptr, D, True, True, PRECISION, ROWS, BLOCK, BLOCKS)
        for j in tl.static_range(BLOCKS):
            _store_gradients(parts[j], ld, *outputs, j, here, D, True, PER_COLUMN, FAST, ROWS, BLOCK)
    else:
        # Where grad_right itself holds the blocks solved so far, it has them already, in their order.
        RIGHT: tl.constexpr = running_ptr is not None
        if running_ptr is None:
            solved_ptr = grad_right_ptr
        else:
            solved_ptr = running_ptr + first_row * D
        for j in range(blocks):
            cols = j * BLOCK + tl.arange(0, BLOCK)[None, :]
            part = tl.load(grad_x_ptr + (rows[:, None] * D + cols), mask=here & (cols < D), other=0.0)
            part = _solve_block(
                *(part.to(tl.float32), solved_ptr, lu_ptr, upper_ptr, j, 0, j * BLOCK, here, D),
                *(True, PRECISION, ROWS, BLOCK, INNER),
            )
            _store_running(solved_ptr, part, j, here, D, ROWS, BLOCK)
        for step in range(blocks):
            j = blocks - 1 - step
            part = _solve_block(
                _load_running(solved_ptr, j, here, D, ROWS, BLOCK),
                *(solved_ptr, lu_ptr, lower_ptr, j, (j + 1) * BLOCK, D, here, D),
                *(True, PRECISION, ROWS, BLOCK, INNER),
            )
            _store_running(solved_ptr, part, j, here, D, ROWS, BLOCK)
            _store_gradients(part, ld, *outputs, j, here, D, RIGHT, PER_COLUMN, FAST, ROWS, BLOCK)


# --- launchers ------------------------------------------------------------------------------------------


class PreparedInverse(NamedTuple):
    """What ``layer_inverse`` needs of a matrix, computed once for any number of rows.

    inverses [K, 2, blocks, block, block] of the diagonal blocks of L and U, log|det W| [K]; and W⁻¹ [K, D, D]
    with its condition [K] where the table has it tried, else None. All float32.
    """

    inverses: Tensor
    logabsdet: Tensor
    weight: Tensor | None
    condition: Tensor | None


def prepare_inverse(
    lu: Tensor, sign: Tensor | None, permutation: Tensor | None, *, precision: str, many_rows: bool = True
) -> PreparedInverse:
    """Invert what ``layer_inverse`` wants inverted of packed ``lu`` [K, D, D]: one launch, with W⁻¹ five.

    W⁻¹ only for ``many_rows``: for few it costs more than it saves.
    """
    check_precision(precision)
    D = lu.shape[-1]
    inverses, logabsdet = invert_blocks(lu, sign, block=tiles.substitution_block(D))
    if not (many_rows and tiles.tries_inverse_weight(D)):
        return PreparedInverse(inverses, logabsdet, None, None)
    weight, condition = inverse_weight(lu, sign, permutation, inverses, precision=precision)
    return PreparedInverse(inverses, logabsdet, weight, condition)


def invert_blocks(lu: Tensor, sign: Tensor | None, *, block: int) -> tuple[Tensor, Tensor]:
    """(inverses [K, 2, ⌈D/block⌉, block, block] of L's and U's diagonal blocks, log|det W| [K]), float32.

    ``lu`` [K, D, D] is packed, float32 or bfloat16; ``sign`` [K, D], or None for +1; ``block`` is a power of
    two, 16 or more. Beyond D the blocks are those of the identity. Substitution in float32, one launch.
    """
    check_packed(lu, sign, None)
    if block < 16 or block & (block - 1):
        raise ValueError(f"block must be a power of two, 16 or more, got {block}")
    K, D = lu.shape[:2]
    blocks = triton.cdiv(D, block)
    inverses = torch.empty((K, 2, blocks, block, block), dtype=torch.float32, device=lu.device)
    logabsdet = torch.empty((K,), dtype=torch.float32, device=lu.device)
    if K:
        with on_device_of(lu):
            invert_blocks_kernel[(2 * blocks + 1, K)](
                lu,
                sign,
                inverses,
                logabsdet,
                D=D,
                BOUND=LOG_DIAGONAL_BOUND[lu.dtype],
                BLOCK=block,
                num_warps=1 if block <= 32 else 4,
                num_stages=1,
                enable_fp_fusion=True,
            )
    return inverses, logabsdet


def inverse_weight(
    lu: Tensor, sign: Tensor | None, permutation: Tensor | None, inverses: Tensor, *, precision: str
) -> tuple[Tensor, Tensor]:
    """(W⁻¹ = U⁻¹ L⁻¹ P [K, D, D], its condition [K]), float32, of packed ``lu`` [K, D, D].

    ``sign`` [K, D] or None for +1, ``permutation`` [D] int64 or None, ``inverses`` from ``invert_blocks``
    with the table's block. Substitution on the rows of the identity, D³ flops and up, in ``precision`` as in
    ``layer_inverse``. Four launches; with triangular solves and products of PyTorch's they would be ten and
    more, and the products might round to tf32.

    The condition is Skeel's, of the factors: ‖|U⁻¹ L⁻¹| |L| |U|‖∞. Row by row W⁻¹ is found with a residual
    W⁻¹ W − I of |W⁻¹| |L| |U| times the rounding unit, the product adds |W⁻¹| |W x| ≤ |W⁻¹| |L| |U| |x| of
    them, and substitution's own bound holds the same matrix. κ(L)·κ(U) is an upper bound of it, but a loose
    one: for random factors at D = 512 with κ₂(W) = 6 it is 2e4, Skeel's 7e2, and the two errors of one size.
    """
    check_packed(lu, sign, permutation)
    K, D = lu.shape[:2]
    precision = at_least_tf32x3(precision)
    architecture = tiles.architecture(lu)
    tile = tiles.inverse_weight_tile(D, precision, architecture)
    _check_matrix(lu, inverses, permutation, K, D, tile)
    weight = torch.empty((K, D, D), dtype=torch.float32, device=lu.device)
    running = None if permutation is None else torch.empty_like(weight)
    conditions = torch.empty((K, D), dtype=torch.float32, device=lu.device)
    if K:
        with on_device_of(lu):
            inverse_weight_kernel[(triton.cdiv(D, tile.rows), K)](
                lu,
                inverses,
                permutation,
                _magnitudes(lu, sign, _magnitudes(lu, sign, None, upper=True), upper=False),
                running,
                weight,
                conditions,
                D=D,
                PRECISION=precision,
                ROWS=tile.rows,
                BLOCK=tile.columns,
                INNER=tile.inner,
                num_warps=tile.warps,
                num_stages=tile.stages,
                enable_fp_fusion=True,
            )
    return weight, conditions.amax(-1)


def _magnitudes(lu: Tensor, sign: Tensor | None, vector: Tensor | None, *, upper: bool) -> Tensor:
    """|U| v or |L| v [K, D]."""
    K, D = lu.shape[:2]
    tile = tiles.magnitudes_tile(D)
    out = torch.empty((K, D), dtype=torch.float32, device=lu.device)
    magnitudes_kernel[(triton.cdiv(D, tile.rows), K)](
        lu,
        sign,
        vector,
        out,
        D=D,
        UPPER=upper,
        BOUND=LOG_DIAGONAL_BOUND[lu.dtype],
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        num_warps=tile.warps,
        num_stages=tile.stages,
        enable_fp_fusion=True,
    )
    return out


def layer_inverse(
    y: Tensor,
    lu: Tensor,
    inverses: Tensor,
    bias: Tensor | None,
    slopes: Slopes | None,
    *,
    permutation: Tensor | None,
    logabsdet: bool,
    save: bool,
    precision: str,
    constant: Tensor | None = None,
    weight: Tensor | None = None,
    condition: Tensor | None = None,
    steps: int | None = None,
    fast: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(x = U⁻¹ L⁻¹ P (h − b) [K, N, D], its log-determinant [K, N] float32 or None, h = φ⁻¹(y) or None).

    y [K, N, D], contiguous, float32 or bfloat16, gives x and h their dtype; ``lu`` [K, D, D] packed and
    ``bias`` [K, D] may differ in dtype; ``permutation`` [D] int64 or None, K = 1 only. ``slopes`` is None for
    no activation, and then h is y and is not returned. ``inverses`` come from ``invert_blocks`` with the
    table's block, ``constant`` [K] with them: log|det W|, subtracted from −Σ log φ′(h).
    ``precision`` is "ieee" or "tf32x3"; "tf32" is raised to tf32x3. ``steps`` as in ``activation_inverse``.

    One launch, 2·N·D² flops and up. With ``weight`` W⁻¹ and ``condition``, from ``inverse_weight``, x is the
    product (h − b) W⁻ᵀ where the condition allows it: φ⁻¹, the product and substitution are launched, and of
    the last two one returns at once.
    """
    check_rows("y", y)
    K, N, D = y.shape
    precision = at_least_tf32x3(precision)
    tile = tiles.substitution_tile(D, precision, tiles.architecture(y))
    _check_matrix(lu, inverses, permutation, K, D, tile)
    check_parameter("bias", bias, (K, D))
    check_parameter("constant", constant, (K,), torch.float32)
    check_parameter("weight", weight, (K, D, D), torch.float32)
    check_parameter("condition", condition, (K,), torch.float32)
    if (weight is None) != (condition is None):
        raise ValueError("weight and condition must be given together")
    if slopes is None:
        steps = 0
    elif steps is None:
        steps = LEARNT_STEPS if isinstance(slopes, Tensor) else inverse_steps(slopes[0] / slopes[1])
    elif steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")

    family = family_arguments((1.0, 1.0, 1.0) if slopes is None else slopes, D)
    x = torch.empty_like(y)
    h = torch.empty_like(y) if save and slopes is not None else None
    total = torch.empty((K, N), dtype=torch.float32, device=y.device) if logabsdet else None
    if y.numel() == 0:
        return x, total, h
    with on_device_of(y):
        if weight is not None:
            wide_h = y
            if slopes is not None:
                # What the product is taken of keeps float32's digits also where y and h have fewer.
                wide_h = (
                    h
                    if h is not None and h.dtype == torch.float32
                    else torch.empty_like(y, dtype=torch.float32)
                )
                _invert_activation(y, wide_h, total, family, steps, fast)
                if h is not None and h is not wide_h:
                    h.copy_(wide_h)
            _multiply(wide_h, weight, bias, x, total, constant, condition, slopes is not None, precision)
        layer_inv_kernel[(triton.cdiv(N, tile.rows), K)](
            y,
            lu,
            inverses,
            bias,
            permutation,
            x,
            _running(x, tile),
            h,
            total,
            constant,
            condition,
            **family,
            N=N,
            D=D,
            STEPS=steps,
            PRECISION=precision,
            FAST=fast,
            ROWS=tile.rows,
            BLOCK=tile.columns,
            INNER=tile.inner,
            BLOCKS=_blocks_held(tile, D),
            num_warps=tile.warps,
            num_stages=tile.stages,
            enable_fp_fusion=True,
        )
    return x, total, h


def _invert_activation(
    y: Tensor, h: Tensor, total: Tensor | None, family: dict[str, Any], steps: int, fast: bool
) -> None:
    """h ← φ⁻¹(y) and total ← −Σ log φ′(h), row by row."""
    K, N, D = y.shape
    tile = tiles.activation_tile("inverse", D)
    activation_kernel[(triton.cdiv(K * N, tile.rows),)](
        y,
        h,
        total,
        **family,
        N=K * N,
        D=D,
        STEPS=steps,
        FAST=fast,
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        num_warps=tile.warps,
        num_stages=tile.stages,
        enable_fp_fusion=True,
    )


def _multiply(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    x: Tensor,
    total: Tensor | None,
    constant: Tensor | None,
    condition: Tensor | None,
    active: bool,
    precision: str,
) -> None:
    """x ← (h − b) W⁻ᵀ and total ← total − log|det W|, if the condition allows it."""
    K, N, D = h.shape
    tile = tiles.inverse_product_tile(D, precision, tiles.architecture(h))
    inverse_product_kernel[(triton.cdiv(N, tile.rows) * triton.cdiv(D, tile.columns), K)](
        h,
        weight,
        bias,
        x,
        total,
        constant,
        condition,
        N=N,
        D=D,
        ACTIVATION=active,
        PRECISION=precision,
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        INNER=tile.inner,
        num_warps=tile.warps,
        num_stages=tile.stages,
        enable_fp_fusion=True,
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
    fast: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(g_r = A⁻ᵀ g_x [K, N, D], gradient of y [K, N, D], of ``slopes`` in float32 if they are a tensor).

    ``grad_x`` [K, N, D] is contiguous, float32 or bfloat16, the gradients and h = φ⁻¹(y) of its dtype; h is
    None without an activation, and then the gradient of y is g_r itself. ``grad_logabsdet`` [K, N], float32,
    is the gradient of the inverse's log-determinant. The rest is as in ``layer_inverse``.

    g_y = (g_r − g_ld·φ″/φ′)/φ′ and g_θ = −Σ g_y·∂φ/∂θ + g_ld·∂log φ′/∂θ, at h. The gradients of ``lu`` and
    ``bias`` follow from g_r: −g_rᵀ x and −Σ g_r. 2·N·D² flops and up, one launch and, for slopes, the sum of
    its programs' sums in a fixed order.
    """
    check_rows("grad_x", grad_x)
    K, N, D = grad_x.shape
    precision = at_least_tf32x3(precision)
    tile = tiles.substitution_tile(D, precision, tiles.architecture(grad_x))
    _check_matrix(lu, inverses, permutation, K, D, tile)
    check_parameter("grad_logabsdet", grad_logabsdet, (K, N), torch.float32)
    check_parameter("h", h, (K, N, D), grad_x.dtype)
    if (h is None) != (slopes is None):
        raise ValueError("h and slopes must be given together")

    family = family_arguments((1.0, 1.0, 1.0) if slopes is None else slopes, D)
    grad_right = torch.empty_like(grad_x)
    grad_y = grad_right if h is None else torch.empty_like(grad_x)
    programs = triton.cdiv(N, tile.rows)
    sums: Tensor | None = None
    if isinstance(slopes, Tensor):
        sums = torch.empty((K, programs, 3, D), dtype=torch.float32, device=grad_x.device)
    if grad_x.numel() > 0:
        with on_device_of(grad_x):
            layer_inv_bwd_kernel[(programs, K)](
                grad_x,
                grad_logabsdet,
                h,
                lu,
                inverses,
                permutation,
                _running(grad_right, tile, scattered=permutation is not None),
                grad_right,
                None if h is None else grad_y,
                sums,
                **family,
                N=N,
                D=D,
                PRECISION=precision,
                FAST=fast,
                ROWS=tile.rows,
                BLOCK=tile.columns,
                INNER=tile.inner,
                BLOCKS=_blocks_held(tile, D),
                num_warps=tile.warps,
                num_stages=tile.stages,
                enable_fp_fusion=True,
            )
    return grad_right, grad_y, split_sums(sums, slopes, False)[1]


def at_least_tf32x3(precision: str) -> str:
    """Substitution and inverses amplify rounding by the condition: tf32's would be all that is left."""
    check_precision(precision)
    return "tf32x3" if precision == "tf32" else precision


def _check_matrix(
    lu: Tensor, inverses: Tensor, permutation: Tensor | None, K: int, D: int, tile: tiles.Tile
) -> None:
    check_packed(lu, None, permutation)
    check_parameter("lu", lu, (K, D, D))
    shape = (K, 2, triton.cdiv(D, tile.columns), tile.columns, tile.columns)
    check_parameter("inverses", inverses, shape, torch.float32)


def _blocks_held(tile: tiles.Tile, D: int) -> int:
    """Blocks of a row that a program keeps in registers; 0 for none."""
    return 0 if tile.inner else triton.cdiv(D, tile.columns)


def _running(out: Tensor, tile: tiles.Tile, scattered: bool = False) -> Tensor | None:
    """Memory for the blocks solved so far where ``out`` cannot hold them."""
    if not tile.inner or (out.dtype == torch.float32 and not scattered):
        return None
    return torch.empty_like(out, dtype=torch.float32)

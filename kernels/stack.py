# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False
# mypy: disable-error-code=assignment
# ruff: noqa: RUF005 (the compiler knows a sum of tuples, not what ruff would have instead)
"""M small layers in one launch: h_m = W_m x_{m−1} + b_m, x_m = φ_m(h_m), its inverse and their gradients.

A program keeps its rows in registers from the first layer to the last, so that of M layers only the first
input and the last output meet memory; the weights come from the L2 cache. All M layers are of one width D,
which ``tiles.stack_tile`` bounds: beyond, the rows of a program no longer fit its registers.

Rows are held as a tuple of tiles [ROWS, CHUNK], D of them in all. A register tile cannot be sliced, and a
tuple can: substitution takes its steps of CHUNK columns, and a product that is unrolled (ieee) is not
unrolled over more than CHUNK.

Nothing is saved for a gradient. Its programs are few and take one tile of rows after another; for each they
run the layers forward again, leave the pre-activations in a scratch of their own that stays in the L2 cache,
and walk back. Written by the forward pass and read by the backward pass, those pre-activations would be
2·(M − 1)·N·D numbers through memory, which by the roofline takes longer than to recompute them at D ≤ 64,
and (M − 1)·N·D of memory. So depth costs no memory, and the inverse's gradient, too, starts from x.

The gradient of W_m is a sum over rows. Each program adds its tiles' gradᵀ x to its own slice of a scratch
[programs, M, D, D], which again stays in the cache; the slices are added up in one order at the end. No
atomics, so two runs give the same bits. Sent through memory to a product of its own, the gradients and
inputs of each layer would be 4·M·N·D numbers.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lunet_fast.kernels import tiles
from lunet_fast.kernels.activation import (
    LEARNT_STEPS,
    Slopes,
    family_arguments,
    inverse_steps,
    load_family,
    log_phi_derivative,
    phi,
    phi_backward,
    phi_inverse,
    slope_gradients,
)
from lunet_fast.kernels.launch import (
    INTERPRETED,
    check_parameter,
    check_precision,
    check_rows,
    on_device_of,
)

# --- rows in chunks -------------------------------------------------------------------------------------


@triton.jit
def _load_rows(ptr, left, D, ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr):
    """Rows [ROWS, D] at ptr, of which ``left`` are there, as chunks of
    float32; zeros where nothing is."""
    rows = tl.arange(0, ROWS)
    chunks = ()
    for j in tl.static_range(COLUMNS // CHUNK):
        cols = j * CHUNK + tl.arange(0, CHUNK)
        valid = (rows[:, None] < left) & (cols[None, :] < D)
        x = tl.load(ptr + (rows[:, None] * D + cols[None, :]), mask=valid, other=0.0)
        chunks = chunks + (x.to(tl.float32),)
    return chunks


@triton.jit
def _store_rows(ptr, chunks, left, D, ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr):
    rows = tl.arange(0, ROWS)
    for j in tl.static_range(COLUMNS // CHUNK):
        cols = j * CHUNK + tl.arange(0, CHUNK)
        valid = (rows[:, None] < left) & (cols[None, :] < D)
        ptrs = ptr + (rows[:, None] * D + cols[None, :])
        tl.store(ptrs, chunks[j].to(ptr.dtype.element_ty), mask=valid)


@triton.jit
def _load_block(ptr, height, width, D, TRANSPOSED: tl.constexpr, CHUNK: tl.constexpr):
    """The block [CHUNK, CHUNK] at ptr of a matrix with rows of length D, or its transpose.

    Only height rows of width numbers are there; zeros elsewhere.
    """
    down = tl.arange(0, CHUNK)[:, None]
    across = tl.arange(0, CHUNK)[None, :]
    if TRANSPOSED:
        return tl.load(ptr + (across * D + down), mask=(across < height) & (down < width), other=0.0)
    return tl.load(ptr + (down * D + across), mask=(down < height) & (across < width), other=0.0)


@triton.jit
def _dot(x, w, total, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """total + x·w, x rounded to w's dtype."""
    x = x.to(w.dtype)
    if UPCAST:  # the interpreter multiplies the raw bits of bfloat16
        x = x.to(tl.float32)
        w = w.to(tl.float32)
    return tl.dot(x, w, total, input_precision=PRECISION)


@triton.jit
def _times(
    x,
    matrix_ptr,
    D,
    TRANSPOSED: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Rows x A, or x Aᵀ, for A [D, D], float32."""
    chunks = ()
    for j in tl.static_range(COLUMNS // CHUNK):
        total = tl.zeros([ROWS, CHUNK], tl.float32)
        for i in tl.static_range(COLUMNS // CHUNK):
            if TRANSPOSED:
                ptr = matrix_ptr + (j * CHUNK * D + i * CHUNK)
                block = _load_block(ptr, D - j * CHUNK, D - i * CHUNK, D, True, CHUNK)
            else:
                ptr = matrix_ptr + (i * CHUNK * D + j * CHUNK)
                block = _load_block(ptr, D - i * CHUNK, D - j * CHUNK, D, False, CHUNK)
            total = _dot(x[i], block, total, PRECISION, UPCAST)
        chunks = chunks + (total,)
    return chunks


@triton.jit
def _layer(
    x,
    weight_ptr,
    bias_ptr,
    m,
    D,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """h = x W_mᵀ + b_m, chunks of float32."""
    h = _times(x, weight_ptr + m * D * D, D, True, PRECISION, UPCAST, ROWS, COLUMNS, CHUNK)
    if bias_ptr is not None:
        h = _add_bias(h, bias_ptr + m * D, D, 1.0, COLUMNS, CHUNK)
    return h


@triton.jit
def _add_bias(h, bias_ptr, D, factor, COLUMNS: tl.constexpr, CHUNK: tl.constexpr):
    """h + factor·b."""
    chunks = ()
    for j in tl.static_range(COLUMNS // CHUNK):
        cols = j * CHUNK + tl.arange(0, CHUNK)
        bias = tl.load(bias_ptr + cols, mask=cols < D, other=0.0).to(tl.float32)
        chunks = chunks + (h[j] + factor * bias[None, :],)
    return chunks


@triton.jit
def _family(slopes, m, start, D, PER_COLUMN: tl.constexpr, SIZE: tl.constexpr):
    """φ's family in layer m, of SIZE columns from ``start``; slopes are a kernel's, from slopes_ptr on."""
    slopes_ptr, a, c, kappa, log_low, log_high = slopes
    if slopes_ptr is not None:
        slopes_ptr += m * (3 * D if PER_COLUMN else 3)
    cols = start + tl.arange(0, SIZE)
    return load_family(slopes_ptr, a, c, kappa, log_low, log_high, cols, D, PER_COLUMN)


@triton.jit
def _activate(
    h,
    slopes,
    m,
    D,
    PER_COLUMN: tl.constexpr,
    FAST: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """φ_m(h), chunks of float32."""
    chunks = ()
    for j in tl.static_range(COLUMNS // CHUNK):
        family = _family(slopes, m, j * CHUNK, D, PER_COLUMN, CHUNK)
        chunks = chunks + (phi(h[j], family, FAST),)
    return chunks


@triton.jit
def _deactivate(
    y,
    slopes,
    m,
    D,
    PER_COLUMN: tl.constexpr,
    STEPS: tl.constexpr,
    FAST: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """φ_m⁻¹(y), chunks of float32."""
    chunks = ()
    for j in tl.static_range(COLUMNS // CHUNK):
        family = _family(slopes, m, j * CHUNK, D, PER_COLUMN, CHUNK)
        chunks = chunks + (phi_inverse(y[j], family, STEPS, FAST),)
    return chunks


@triton.jit
def _log_derivative_sum(
    h,
    slopes,
    m,
    D,
    PER_COLUMN: tl.constexpr,
    FAST: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Σ log φ_m′(h) over each row, [ROWS]."""
    total = tl.zeros([ROWS], tl.float32)
    for j in tl.static_range(COLUMNS // CHUNK):
        family = _family(slopes, m, j * CHUNK, D, PER_COLUMN, CHUNK)
        there = (j * CHUNK + tl.arange(0, CHUNK) < D)[None, :]
        total += tl.sum(tl.where(there, log_phi_derivative(h[j], family, FAST), 0.0), 1)
    return total


# --- forward --------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["N", "M", "active"])
def stack_fwd_kernel(
    x_ptr,  # [N, D]
    weight_ptr,  # [M, D, D]
    bias_ptr,  # [M, D], or None
    y_ptr,  # [N, D]
    logabsdet_ptr,  # [N] float32, or None
    constant_ptr,  # [M] float32, log|det W_m|, or None
    slopes_ptr,  # [active, 3] or [active, 3, D], or None
    a,
    c,
    kappa,
    log_low,
    log_high,
    N,
    M,
    active,
    D,
    PER_COLUMN: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    FAST: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """ROWS rows through M layers, of which the first ``active`` have an activation."""
    slopes = (slopes_ptr, a, c, kappa, log_low, log_high)
    first = tl.program_id(0).to(tl.int64) * ROWS
    left = tl.minimum(N - first, ROWS).to(tl.int32)
    x = _load_rows(x_ptr + first * D, left, D, ROWS, COLUMNS, CHUNK)
    total = tl.zeros([ROWS], tl.float32)
    for m in range(M):
        h = _layer(x, weight_ptr, bias_ptr, m, D, PRECISION, UPCAST, ROWS, COLUMNS, CHUNK)
        if logabsdet_ptr is not None and constant_ptr is not None:
            total += tl.load(constant_ptr + m)
        if m < active:
            if logabsdet_ptr is not None:
                total += _log_derivative_sum(
                    h,
                    slopes,
                    m,
                    D,
                    PER_COLUMN,
                    FAST,
                    ROWS,
                    COLUMNS,
                    CHUNK,
                )
            h = _activate(h, slopes, m, D, PER_COLUMN, FAST, COLUMNS, CHUNK)
        x = h
    _store_rows(y_ptr + first * D, x, left, D, ROWS, COLUMNS, CHUNK)
    if logabsdet_ptr is not None:
        rows = tl.arange(0, ROWS)
        tl.store(logabsdet_ptr + first + rows, total, mask=rows < left)


# --- inverse --------------------------------------------------------------------------------------------


@triton.jit
def _substitute(
    right,
    lu_ptr,
    blocks_ptr,
    D,
    UPPER: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Rows of T⁻¹ r, or T⁻ᵀ r, for T = L or U, packed in lu [D, D], of which blocks hold the inverses of the
    diagonal blocks [COLUMNS/CHUNK, CHUNK, CHUNK]."""
    COUNT: tl.constexpr = COLUMNS // CHUNK
    DOWN: tl.constexpr = UPPER == TRANSPOSED
    done = ()
    for k in tl.static_range(COUNT):
        j = k if DOWN else COUNT - 1 - k
        width = D - j * CHUNK
        total = tl.zeros([ROWS, CHUNK], tl.float32)
        for q in tl.static_range(k):
            i = q if DOWN else COUNT - 1 - q
            if TRANSPOSED:
                block = _load_block(
                    lu_ptr + (i * CHUNK * D + j * CHUNK), D - i * CHUNK, width, D, False, CHUNK
                )
            else:
                block = _load_block(
                    lu_ptr + (j * CHUNK * D + i * CHUNK), width, D - i * CHUNK, D, True, CHUNK
                )
            total = _dot(done[q], block.to(tl.float32), total, PRECISION, False)
        inverse = _load_block(blocks_ptr + j * CHUNK * CHUNK, width, width, CHUNK, not TRANSPOSED, CHUNK)
        zero = tl.zeros([ROWS, CHUNK], tl.float32)
        done = done + (_dot(right[k if DOWN else COUNT - 1 - k] - total, inverse, zero, PRECISION, False),)
    chunks = ()
    for j in tl.static_range(COUNT):
        chunks = chunks + (done[j if DOWN else COUNT - 1 - j],)
    return chunks


@triton.jit(do_not_specialize=["N", "M", "active"])
def stack_inv_kernel(
    y_ptr,  # [N, D]
    lu_ptr,  # [M, D, D], packed
    blocks_ptr,  # [M, 2, COLUMNS/CHUNK, CHUNK, CHUNK] float32, inverses of L's and U's diagonal blocks
    bias_ptr,  # [M, D], or None
    x_ptr,  # [N, D]
    logabsdet_ptr,  # [N] float32, or None
    constant_ptr,  # [M] float32, log|det W_m|, or None
    slopes_ptr,  # [active, 3] or [active, 3, D], or None
    a,
    c,
    kappa,
    log_low,
    log_high,
    N,
    M,
    active,
    D,
    PER_COLUMN: tl.constexpr,
    STEPS: tl.constexpr,
    PRECISION: tl.constexpr,
    FAST: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """ROWS rows back through M layers: φ⁻¹ where there is one, minus the bias, then L⁻¹ and U⁻¹."""
    slopes = (slopes_ptr, a, c, kappa, log_low, log_high)
    first = tl.program_id(0).to(tl.int64) * ROWS
    left = tl.minimum(N - first, ROWS).to(tl.int32)
    x = _load_rows(y_ptr + first * D, left, D, ROWS, COLUMNS, CHUNK)
    total = tl.zeros([ROWS], tl.float32)
    for step in range(M):
        m = M - 1 - step
        h = x
        if logabsdet_ptr is not None and constant_ptr is not None:
            total -= tl.load(constant_ptr + m)
        if m < active:
            h = _deactivate(h, slopes, m, D, PER_COLUMN, STEPS, FAST, COLUMNS, CHUNK)
            if logabsdet_ptr is not None:
                total -= _log_derivative_sum(
                    h,
                    slopes,
                    m,
                    D,
                    PER_COLUMN,
                    FAST,
                    ROWS,
                    COLUMNS,
                    CHUNK,
                )
        if bias_ptr is not None:
            h = _add_bias(h, bias_ptr + m * D, D, -1.0, COLUMNS, CHUNK)
        matrix = lu_ptr + m * D * D
        inverses = blocks_ptr + m * 2 * COLUMNS * CHUNK
        h = _substitute(h, matrix, inverses, D, False, False, PRECISION, ROWS, COLUMNS, CHUNK)
        inverses += COLUMNS * CHUNK
        x = _substitute(h, matrix, inverses, D, True, False, PRECISION, ROWS, COLUMNS, CHUNK)
    _store_rows(x_ptr + first * D, x, left, D, ROWS, COLUMNS, CHUNK)
    if logabsdet_ptr is not None:
        rows = tl.arange(0, ROWS)
        tl.store(logabsdet_ptr + first + rows, total, mask=rows < left)


# --- backward -------------------------------------------------------------------------------------------


@triton.jit
def _add_outer(
    total_ptr,  # [D, D]
    g_ptr,  # [ROWS, COLUMNS]
    h_ptr,  # [ROWS, COLUMNS]
    left,
    again,
    slopes,
    m,
    D,
    PER_COLUMN: tl.constexpr,
    NEGATED: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    FAST: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    INNER: tl.constexpr,
):
    """gᵀ x, or −gᵀ x, added to total, or stored there unless ``again``; x is φ_{m−1}(h), or h for m = 0.

    Only ``left`` rows of h are there. Its loops are loops, not unrolled: while it runs, the rows of the walk
    are in the registers too.
    """
    COUNT: tl.constexpr = (COLUMNS + BLOCK - 1) // BLOCK
    span = tl.arange(0, BLOCK)
    inner = tl.arange(0, INNER)
    before = tl.maximum(m - 1, 0)
    for block in range(COUNT * COUNT):
        i = (block // COUNT) * BLOCK
        j = (block % COUNT) * BLOCK
        valid = (i + span < D)[:, None] & (j + span < D)[None, :]
        ptrs = total_ptr + ((i + span)[:, None] * D + (j + span)[None, :])
        family = _family(slopes, before, j, D, PER_COLUMN, BLOCK)
        total = tl.load(ptrs, mask=valid & again, other=0.0)
        for start in range(0, ROWS, INNER):
            rows = start + inner
            g_ptrs = g_ptr + (rows[None, :] * COLUMNS + (i + span)[:, None])
            g = tl.load(g_ptrs, mask=(i + span < COLUMNS)[:, None], other=0.0)
            h_ptrs = h_ptr + (rows[:, None] * COLUMNS + (j + span)[None, :])
            here = (rows < left)[:, None] & (j + span < COLUMNS)[None, :]
            h = tl.load(h_ptrs, mask=here, other=0.0)
            x = tl.where(m > 0, phi(h, family, FAST), h)
            total = _dot((-g if NEGATED else g).to(DTYPE), x.to(DTYPE), total, PRECISION, UPCAST)
        tl.store(ptrs, total, mask=valid)


@triton.jit
def _add_columns(ptr, x, again, D, factor, j: tl.constexpr, CHUNK: tl.constexpr):
    """factor·Σ_rows x of chunk j, added to [D] at ptr; stored there unless ``again``."""
    cols = j * CHUNK + tl.arange(0, CHUNK)
    total = tl.load(ptr + cols, mask=(cols < D) & again, other=0.0)
    tl.store(ptr + cols, total + factor * tl.sum(x, 0), mask=cols < D)


@triton.jit
def _activation_backward(
    g,
    ld,
    h,
    grad_slopes_ptr,
    again,
    slopes,
    m,
    D,
    PER_COLUMN: tl.constexpr,
    INVERSE: tl.constexpr,
    FAST: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """The gradient of h_m from that of φ_m(h_m), or, INVERSE, the reverse; adds that of the slopes [3, D]."""
    chunks = ()
    for j in tl.static_range(COLUMNS // CHUNK):
        family = _family(slopes, m, j * CHUNK, D, PER_COLUMN, CHUNK)
        out = phi_backward(g[j], ld, h[j], family, INVERSE, FAST)
        if grad_slopes_ptr is not None:
            # Of the inverse, −g_y·∂φ/∂θ − ld·∂log φ′/∂θ.
            sums = slope_gradients(out if INVERSE else g[j], ld, h[j], family, FAST)
            for k in tl.static_range(3):
                ptr = grad_slopes_ptr + (m * 3 + k) * D
                _add_columns(ptr, sums[k], again, D, -1.0 if INVERSE else 1.0, j, CHUNK)
        chunks = chunks + (out,)
    return chunks


@triton.jit(do_not_specialize=["N", "M", "active", "tiles"])
def stack_bwd_kernel(
    grad_ptr,  # [N, D], the gradient of y; INVERSE: of x
    grad_logabsdet_ptr,  # [N] float32, or None
    x_ptr,  # [N, D]
    weight_ptr,  # [M, D, D]
    lu_ptr,  # INVERSE: [M, D, D], packed
    blocks_ptr,  # INVERSE: [M, 2, COLUMNS/CHUNK, CHUNK, CHUNK] float32
    bias_ptr,  # [M, D], or None
    out_ptr,  # [N, D], the gradient of x; INVERSE: of y
    rows_ptr,  # [programs, active + 2, ROWS, COLUMNS] float32: x, the h of active layers, a gradient
    grad_weight_ptr,  # [programs, M, D, D] float32, or None
    grad_bias_ptr,  # [programs, M, D] float32, or None
    grad_slopes_ptr,  # [programs, active, 3, D] float32, or None
    slopes_ptr,  # [active, 3] or [active, 3, D], or None
    a,
    c,
    kappa,
    log_low,
    log_high,
    N,
    M,
    active,
    tiles,
    D,
    PER_COLUMN: tl.constexpr,
    INVERSE: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    FAST: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    INNER: tl.constexpr,
):
    """Tiles program, program + programs, … of ROWS rows: forward through the layers, and gradients back.

    A product of the forward stack takes operands of weight's dtype; of the inverse, all are float32.
    """
    slopes = (slopes_ptr, a, c, kappa, log_low, log_high)
    program = tl.program_id(0)
    rows_ptr += program.to(tl.int64) * (active + 2) * (ROWS * COLUMNS)
    if grad_weight_ptr is not None:
        grad_weight_ptr += program.to(tl.int64) * M * D * D
    if grad_bias_ptr is not None:
        grad_bias_ptr += program.to(tl.int64) * M * D
    if grad_slopes_ptr is not None:
        grad_slopes_ptr += program.to(tl.int64) * active * 3 * D
    rows = tl.arange(0, ROWS)
    for visit in range(tl.cdiv(tiles - program, tl.num_programs(0))):
        again = visit > 0
        first = (program + visit * tl.num_programs(0)).to(tl.int64) * ROWS
        left = tl.minimum(N - first, ROWS).to(tl.int32)

        x = _load_rows(x_ptr + first * D, left, D, ROWS, COLUMNS, CHUNK)
        _store_rows(rows_ptr, x, ROWS, COLUMNS, ROWS, COLUMNS, CHUNK)
        for m in range(active):
            h = _layer(x, weight_ptr, bias_ptr, m, D, PRECISION, UPCAST, ROWS, COLUMNS, CHUNK)
            _store_rows(rows_ptr + (m + 1) * (ROWS * COLUMNS), h, ROWS, COLUMNS, ROWS, COLUMNS, CHUNK)
            x = _activate(h, slopes, m, D, PER_COLUMN, FAST, COLUMNS, CHUNK)
        tl.debug_barrier()  # the h are read by other threads than wrote them

        g = _load_rows(grad_ptr + first * D, left, D, ROWS, COLUMNS, CHUNK)
        ld = None
        if grad_logabsdet_ptr is not None:
            ld = tl.load(grad_logabsdet_ptr + first + rows, mask=rows < left, other=0.0)[:, None]
        for step in range(M):
            if INVERSE:
                m = step
                matrix = lu_ptr + m * D * D
                inverses = blocks_ptr + m * 2 * COLUMNS * CHUNK
                g = _substitute(
                    g, matrix, inverses + COLUMNS * CHUNK, D, True, True, PRECISION, ROWS, COLUMNS, CHUNK
                )
                g = _substitute(g, matrix, inverses, D, False, True, PRECISION, ROWS, COLUMNS, CHUNK)
            else:
                m = M - 1 - step
                if m < active:
                    h = _load_rows(rows_ptr + (m + 1) * (ROWS * COLUMNS), left, COLUMNS, ROWS, COLUMNS, CHUNK)
                    g = _activation_backward(
                        g, ld, h, grad_slopes_ptr, again, slopes, m, D,
                        PER_COLUMN, False, FAST, COLUMNS, CHUNK,
                    )  # fmt: skip
            # Here g is the gradient of h_m, of the inverse that of −h_m.
            if grad_bias_ptr is not None:
                for j in tl.static_range(COLUMNS // CHUNK):
                    _add_columns(grad_bias_ptr + m * D, g[j], again, D, -1.0 if INVERSE else 1.0, j, CHUNK)
            if grad_weight_ptr is not None:
                g_ptr = rows_ptr + (active + 1) * (ROWS * COLUMNS)
                _store_rows(g_ptr, g, ROWS, COLUMNS, ROWS, COLUMNS, CHUNK)
                tl.debug_barrier()  # g is read by other threads than wrote it
                _add_outer(
                    grad_weight_ptr + m * D * D, g_ptr, rows_ptr + m * (ROWS * COLUMNS), left, again,
                    slopes, m, D, PER_COLUMN, INVERSE, weight_ptr.dtype.element_ty, PRECISION, UPCAST, FAST,
                    ROWS, COLUMNS, BLOCK, INNER,
                )  # fmt: skip
                tl.debug_barrier()  # the next layer overwrites it
            if INVERSE:
                if m < active:
                    h = _load_rows(rows_ptr + (m + 1) * (ROWS * COLUMNS), left, COLUMNS, ROWS, COLUMNS, CHUNK)
                    g = _activation_backward(
                        g, ld, h, grad_slopes_ptr, again, slopes, m, D,
                        PER_COLUMN, True, FAST, COLUMNS, CHUNK,
                    )  # fmt: skip
            else:
                g = _times(g, weight_ptr + m * D * D, D, False, PRECISION, UPCAST, ROWS, COLUMNS, CHUNK)
        if out_ptr is not None:
            _store_rows(out_ptr + first * D, g, left, D, ROWS, COLUMNS, CHUNK)
        tl.debug_barrier()  # the next tile overwrites the h, and adds to the sums


# --- launchers ------------------------------------------------------------------------------------------


def _stack_arguments(
    kernel: str, x: Tensor, biases: Tensor | None, slopes: Slopes, M: int, active: int, precision: str
) -> tuple[tiles.Tile, dict[str, Any]]:
    """The tile, and the arguments that all kernels of a stack share; refuses what does not fit."""
    check_rows("rows", x, dims=2)
    check_precision(precision)
    N, D = x.shape
    check_parameter("biases", biases, (M, D))
    learnt = isinstance(slopes, Tensor)
    tile = tiles.stack_tile(kernel, D, x.dtype, precision, tiles.architecture(x), learnt=learnt)
    if tile is None:
        raise ValueError(
            f"a stack of {D} features does not go in one launch in {precision}: call layer by layer"
        )
    if isinstance(slopes, Tensor) and active > 0:
        if slopes.shape not in ((active, 3), (active, 3, D)) or not slopes.is_contiguous():
            raise ValueError(
                f"slopes must be contiguous [{active}, 3] or [{active}, 3, {D}], got {list(slopes.shape)}"
            )
        # Of one layer: all that the kernel needs besides the address.
        family = family_arguments(torch.empty(slopes.shape[1:], device=slopes.device), D)
        family["slopes_ptr"] = slopes
    else:
        family = family_arguments((1.0, 1.0, 1.0) if isinstance(slopes, Tensor) else slopes, D)
    return tile, {
        **family,
        "bias_ptr": biases,
        "N": N,
        "M": M,
        "active": active,
        "D": D,
        "PRECISION": precision,
        "ROWS": tile.rows,
        "COLUMNS": tile.columns,
        "CHUNK": tile.inner,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
        "enable_fp_fusion": True,
        # Left to itself ptxas aims at a number of programs on a multiprocessor and spills to reach it; the
        # large kernels it does better left to itself.
        "maxnreg": None if kernel.endswith("backward") and precision != "ieee" else 255,
    }


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
    fast: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """(y [N, D], log|det J| [N] float32 or None) of x through M layers; 2·N·M·D² flops, 8·N·D bytes.

    x [N, D] and ``weights`` [M, D, D] are contiguous and of one dtype, float32 or bfloat16; ``biases``
    [M, D] may differ. The last layer has no activation unless ``activate_last``; of the A = M − 1 or M layers
    that have, ``slopes`` are three floats for all, or a tensor [A, 3] or [A, 3, D]. ``constant`` [M],
    float32, is log|det W_m|, added to each row's Σ log φ′. ``precision`` is that of a float32 product.
    Nothing else is kept for ``stack_backward``. ValueError where ``tiles.stack_tile`` has no row for this.
    """
    M, D = weights.shape[0], x.shape[-1]
    active = M if activate_last else M - 1
    tile, arguments = _stack_arguments("forward", x, biases, slopes, M, active, precision)
    check_parameter("weights", weights, (M, D, D), x.dtype)
    check_parameter("constant", constant, (M,), torch.float32)
    y = torch.empty_like(x)
    total = torch.empty(len(x), dtype=torch.float32, device=x.device) if logabsdet else None
    if len(x) > 0:
        with on_device_of(x):
            stack_fwd_kernel[(triton.cdiv(len(x), tile.rows),)](
                x_ptr=x,
                weight_ptr=weights,
                y_ptr=y,
                logabsdet_ptr=total,
                constant_ptr=constant,
                UPCAST=INTERPRETED,
                FAST=fast,
                **arguments,
            )
    return y, total


def stack_inverse(
    y: Tensor,
    lu: Tensor,
    blocks: Tensor,
    biases: Tensor | None,
    slopes: Slopes,
    *,
    constant: Tensor | None,
    logabsdet: bool,
    precision: str,
    activate_last: bool = False,
    steps: int | None = None,
    fast: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """(x [N, D], the inverse's own log-determinant [N] float32 or None) of y [N, D]; 2·N·M·D² flops and up.

    ``lu`` [M, D, D], float32 or bfloat16, is packed (and unpermuted: the columns of a row in registers cannot
    be gathered); ``blocks`` [M, 2, ⌈D/block⌉, block, block], float32, are the inverses of the diagonal blocks
    of L and U, with zeros in their other triangle, block = ``tiles.stack_tile("inverse", …).inner``.
    ``precision`` is "ieee" or "tf32x3", of float32 arithmetic whatever y's dtype. ``steps`` of Halley's
    iteration: as for ``activation_inverse``. Else as for ``stack_forward``.
    """
    M, D = lu.shape[0], y.shape[-1]
    active = M if activate_last else M - 1
    _check_inverse_precision(precision)
    tile, arguments = _stack_arguments("inverse", y, biases, slopes, M, active, precision)
    _check_factors(lu, blocks, M, D, tile)
    check_parameter("constant", constant, (M,), torch.float32)
    if steps is None:
        steps = LEARNT_STEPS if isinstance(slopes, Tensor) else inverse_steps(slopes[0] / slopes[1])
    x = torch.empty_like(y)
    total = torch.empty(len(y), dtype=torch.float32, device=y.device) if logabsdet else None
    if len(y) > 0:
        with on_device_of(y):
            stack_inv_kernel[(triton.cdiv(len(y), tile.rows),)](
                y_ptr=y,
                lu_ptr=lu,
                blocks_ptr=blocks,
                x_ptr=x,
                logabsdet_ptr=total,
                constant_ptr=constant,
                STEPS=steps,
                FAST=fast,
                **arguments,
            )
    return x, total


def stack_backward(
    grad_y: Tensor,
    grad_logabsdet: Tensor | None,
    x: Tensor,
    weights: Tensor,
    biases: Tensor | None,
    slopes: Slopes,
    *,
    needs_x: bool,
    needs_weights: bool,
    precision: str,
    activate_last: bool = False,
    fast: bool = False,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of (x [N, D], weights [M, D, D], biases [M, D], slopes) of ``stack_forward``, from its x.

    ``grad_y`` [N, D] in x's dtype, ``grad_logabsdet`` [N] float32 or None. Those of weights and biases are
    float32 and of what was given (None without biases, or without ``needs_weights``); of slopes, float32, if
    they are a tensor. 6·N·M·D² flops, 12·N·D bytes of memory; scratch of a fixed size.
    """
    M, D = weights.shape[0], x.shape[-1]
    active = M if activate_last else M - 1
    tile, arguments = _stack_arguments("backward", x, biases, slopes, M, active, precision)
    check_parameter("weights", weights, (M, D, D), x.dtype)
    return _backward(
        grad_y, grad_logabsdet, x, weights, None, None, slopes, needs_x, needs_weights, fast, tile, arguments
    )


def stack_inverse_backward(
    grad_x: Tensor,
    grad_logabsdet: Tensor | None,
    x: Tensor,
    weights: Tensor,
    lu: Tensor,
    blocks: Tensor,
    biases: Tensor | None,
    slopes: Slopes,
    *,
    needs_weights: bool,
    precision: str,
    activate_last: bool = False,
    fast: bool = False,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of (y [N, D], weights [M, D, D], biases [M, D], slopes) of ``stack_inverse``, from its x.

    Of each layer g_h = W⁻ᵀ g_x, g_W = −g_hᵀ x, g_b = −Σ g_h, g_y = (g_h − g_ld·φ″/φ′)/φ′ at h, which is
    computed forward from x: so ``weights`` [M, D, D] are needed too, float32. Else as for ``stack_inverse``
    and ``stack_backward``.
    """
    M, D = lu.shape[0], x.shape[-1]
    active = M if activate_last else M - 1
    _check_inverse_precision(precision)
    tile, arguments = _stack_arguments("inverse backward", x, biases, slopes, M, active, precision)
    _check_factors(lu, blocks, M, D, tile)
    check_parameter("weights", weights, (M, D, D), torch.float32)
    return _backward(
        grad_x, grad_logabsdet, x, weights, lu, blocks, slopes, True, needs_weights, fast, tile, arguments
    )


def _check_inverse_precision(precision: str) -> None:
    if precision == "tf32":
        raise ValueError("nothing is inverted in tf32: give 'ieee' or 'tf32x3'")


def _check_factors(lu: Tensor, blocks: Tensor, M: int, D: int, tile: tiles.Tile) -> None:
    check_parameter("lu", lu, (M, D, D))
    block = tile.inner
    check_parameter("blocks", blocks, (M, 2, triton.cdiv(D, block), block, block), torch.float32)


def _backward(
    grad: Tensor,
    grad_logabsdet: Tensor | None,
    x: Tensor,
    weights: Tensor,
    lu: Tensor | None,
    blocks: Tensor | None,
    slopes: Slopes,
    needs_rows: bool,
    needs_weights: bool,
    fast: bool,
    tile: tiles.Tile,
    arguments: dict[str, Any],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of either direction: launches ``stack_bwd_kernel`` and adds up its programs' sums."""
    N, D, M, active = (arguments[name] for name in ("N", "D", "M", "active"))
    check_parameter("the gradient of the rows", grad, (N, D), x.dtype)
    check_parameter("grad_logabsdet", grad_logabsdet, (N,), torch.float32)
    block, inner = tiles.stack_outer_block(tile, weights.dtype, arguments["PRECISION"])
    count = triton.cdiv(N, tile.rows)
    programs = min(count, tiles.stack_programs(tiles.architecture(x)))

    def scratch(*shape: int) -> Tensor:
        return torch.empty((programs, *shape), dtype=torch.float32, device=x.device)

    out = torch.empty_like(x) if needs_rows else None
    grad_weights = scratch(M, D, D) if needs_weights else None
    grad_biases = scratch(M, D) if needs_weights and arguments["bias_ptr"] is not None else None
    grad_slopes = scratch(active, 3, D) if isinstance(slopes, Tensor) else None
    if count > 0:
        with on_device_of(x):
            stack_bwd_kernel[(programs,)](
                grad_ptr=grad,
                grad_logabsdet_ptr=grad_logabsdet,
                x_ptr=x,
                weight_ptr=weights,
                lu_ptr=lu,
                blocks_ptr=blocks,
                out_ptr=out,
                rows_ptr=scratch(active + 2, tile.rows, tile.columns),
                grad_weight_ptr=grad_weights,
                grad_bias_ptr=grad_biases,
                grad_slopes_ptr=grad_slopes,
                tiles=count,
                BLOCK=block,
                INNER=inner,
                INVERSE=lu is not None,
                UPCAST=INTERPRETED,
                FAST=fast,
                **arguments,
            )
    # One order for each number of programs.
    sums = [None if total is None else total.sum(0) for total in (grad_weights, grad_biases, grad_slopes)]
    if isinstance(slopes, Tensor) and slopes.dim() == 2 and sums[2] is not None:
        sums[2] = sums[2].sum(-1)
    return out, sums[0], sums[1], sums[2]

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False
# mypy: disable-error-code=assignment
# ruff: noqa: RUF005 (the compiler knows a sum of tuples, not what ruff would have instead)
"""The gradients of a stack of small layers and of its inverse, each in one launch.

Nothing is saved for a gradient. Its programs are few and take one tile of rows after another; for each they
run the layers forward again, leave the pre-activations in a scratch of their own that stays in the L2 cache,
and walk back. Written by the forward pass and read by the backward pass, those pre-activations would be
2·(M − 1)·N·D numbers through memory, which by the roofline takes longer than to recompute them at D ≤ 64,
and (M − 1)·N·D of memory. So depth costs no memory, and the inverse's gradient, too, starts from x.

The gradient of W_m is a sum over rows. Each program adds its tiles' gradᵀ x to its own slice of a scratch
[programs, M, D, D], which again stays in the cache; the slices are added up in one order at the end. No
atomics, so two runs give the same bits. Sent through memory to a product of its own, the gradients and
inputs of each layer would be 4·M·N·D numbers.

A product of the forward stack takes operands of the weights' dtype; of the inverse, all are float32.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lunet_fast.kernels import spline, tiles
from lunet_fast.kernels.activation import (
    Slopes,
    is_learnt,
    load_family,
    located,
    phi,
    phi_backward,
    slope_gradients,
    slope_rows,
    slopes_gradient,
)
from lunet_fast.kernels.launch import check_parameter, dot, launch
from lunet_fast.kernels.leaky_softplus import PARAMETERS
from lunet_fast.kernels.solve import solve_held
from lunet_fast.kernels.stack import (
    activate,
    affine,
    check_inverse,
    load_rows,
    stack_arguments,
    store_rows,
    times,
)


@triton.jit
def _add_outer(
    total_ptr,  # [M, D, D]
    g,
    rows_ptr,  # [active + 2, ROWS, COLUMNS]: x, the pre-activations, room for g
    active,
    left,
    again,
    activation,
    m,
    D,
    NEGATED: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    INNER: tl.constexpr,
):
    """gᵀ x, or −gᵀ x, added to the total of layer m, or stored there unless ``again``.

    x is φ_{m−1}(h_{m−1}), for m = 0 what stands in its place; only ``left`` rows of it are there. Its loops
    are loops, not unrolled: while it runs, the rows of the walk are in the registers too.
    """
    COUNT: tl.constexpr = (COLUMNS + BLOCK - 1) // BLOCK
    total_ptr += m * D * D
    h_ptr = rows_ptr + m * (ROWS * COLUMNS)
    g_ptr = rows_ptr + (active + 1) * (ROWS * COLUMNS)
    span = tl.arange(0, BLOCK)
    inner = tl.arange(0, INNER)
    before = tl.maximum(m - 1, 0)
    store_rows(g_ptr, g, ROWS, COLUMNS, ROWS, COLUMNS, CHUNK)
    tl.debug_barrier()  # g is read by other threads than wrote it
    for block in range(COUNT * COUNT):
        i = (block // COUNT) * BLOCK
        j = (block % COUNT) * BLOCK
        valid = (i + span < D)[:, None] & (j + span < D)[None, :]
        ptrs = total_ptr + ((i + span)[:, None] * D + (j + span)[None, :])
        family = load_family(activation, before, j + span, D)
        total = tl.load(ptrs, mask=valid & again, other=0.0)
        for start in range(0, ROWS, INNER):
            rows = start + inner
            g_ptrs = g_ptr + (rows[None, :] * COLUMNS + (i + span)[:, None])
            gradient = tl.load(g_ptrs, mask=(i + span < COLUMNS)[:, None], other=0.0)
            h_ptrs = h_ptr + (rows[:, None] * COLUMNS + (j + span)[None, :])
            here = (rows < left)[:, None] & (j + span < COLUMNS)[None, :]
            h = tl.load(h_ptrs, mask=here, other=0.0)
            x = tl.where(m > 0, phi(located(h, family, activation), family, activation), h)
            total = dot(-gradient if NEGATED else gradient, x.to(DTYPE), total, PRECISION)
        tl.store(ptrs, total, mask=valid)
    tl.debug_barrier()  # the next layer overwrites g


@triton.jit
def _add_chunk(ptr, x, again, D, factor, j: tl.constexpr, CHUNK: tl.constexpr):
    """factor·Σ_rows x of chunk j, added to [D] at ptr; stored there unless ``again``."""
    cols = j * CHUNK + tl.arange(0, CHUNK)
    total = tl.load(ptr + cols, mask=(cols < D) & again, other=0.0)
    tl.store(ptr + cols, total + factor * tl.sum(x, 0), mask=cols < D)


@triton.jit
def _add_columns(ptr, x, again, D, NEGATED: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr):
    """Σ_rows x, or −Σ_rows x, added to [D] at ptr; stored there unless ``again``."""
    for j in tl.static_range(COLUMNS // CHUNK):
        _add_chunk(ptr, x[j], again, D, -1.0 if NEGATED else 1.0, j, CHUNK)


@triton.jit
def _add_spline_sums(ld, g, at, ptr, again, family, activation, cols, D, NEGATED: tl.constexpr):
    """The sums of ``spline.add_gradient_sums``, or those of −g and −ld."""
    if NEGATED:
        g = -g
        if ld is not None:
            ld = -ld
    spline.add_gradient_sums(ptr, again, g, ld, at, family, cols, D, activation.BINS)


@triton.jit
def _activation_backward(
    ld,
    g,
    rows_ptr,  # [active + 1, ROWS, COLUMNS]: x and the pre-activations
    active,
    left,
    grad_slopes_ptr,
    again,
    activation,
    m,
    D,
    INVERSE: tl.constexpr,
    SLOPE_SUMS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """The gradient of h_m from that of φ_m(h_m), or, INVERSE, the reverse; adds the slopes' terms.

    g itself for a layer without activation.
    """
    if m < active:
        h = load_rows(rows_ptr + (m + 1) * (ROWS * COLUMNS), left, COLUMNS, ROWS, COLUMNS, CHUNK)
        chunks = ()
        for j in tl.static_range(COLUMNS // CHUNK):
            family = load_family(activation, m, j * CHUNK + tl.arange(0, CHUNK), D)
            at = located(h[j], family, activation)
            out = phi_backward(g[j], ld, at, family, activation, INVERSE)
            if grad_slopes_ptr is not None and activation.BINS > 0:
                _add_spline_sums(
                    ld,
                    *(out if INVERSE else g[j], at, grad_slopes_ptr + m * SLOPE_SUMS * D, again, family),
                    *(activation, j * CHUNK + tl.arange(0, CHUNK), D, INVERSE),
                )
            if grad_slopes_ptr is not None and activation.BINS == 0:
                # Of the inverse, −g_y·∂φ/∂θ − ld·∂log φ′/∂θ.
                sums = slope_gradients(out if INVERSE else g[j], ld, at, family, activation)
                for k in tl.static_range(PARAMETERS):
                    ptr = grad_slopes_ptr + (m * PARAMETERS + k) * D
                    _add_chunk(ptr, sums[k], again, D, -1.0 if INVERSE else 1.0, j, CHUNK)
            chunks = chunks + (out,)
        g = chunks
    return g


@triton.jit
def _keep_preactivations(
    x_ptr,
    rows_ptr,  # [active + 1, ROWS, COLUMNS]
    weight_ptr,
    bias_ptr,
    activation,
    active,
    left,
    D,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """x and, of each layer with an activation, h, to memory, where every thread sees them."""
    x = load_rows(x_ptr, left, D, ROWS, COLUMNS, CHUNK)
    store_rows(rows_ptr, x, ROWS, COLUMNS, ROWS, COLUMNS, CHUNK)
    for m in range(active):
        h = affine(x, weight_ptr, bias_ptr, m, D, PRECISION, ROWS, COLUMNS, CHUNK)
        store_rows(rows_ptr + (m + 1) * (ROWS * COLUMNS), h, ROWS, COLUMNS, ROWS, COLUMNS, CHUNK)
        x = activate(h, activation, m, D, False, COLUMNS, CHUNK)
    tl.debug_barrier()


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
    grad_slopes_ptr,  # [programs, active, SLOPE_SUMS, D] float32, or None
    activation,
    N,
    M,
    active,
    tiles,
    D,
    INVERSE: tl.constexpr,
    SLOPE_SUMS: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    INNER: tl.constexpr,
):
    """Tiles program, program + programs, … of ROWS rows: forward through the layers, and gradients back."""
    program = tl.program_id(0)
    rows_ptr += program.to(tl.int64) * (active + 2) * (ROWS * COLUMNS)
    if grad_weight_ptr is not None:
        grad_weight_ptr += program.to(tl.int64) * M * D * D
    if grad_bias_ptr is not None:
        grad_bias_ptr += program.to(tl.int64) * M * D
    if grad_slopes_ptr is not None:
        grad_slopes_ptr += program.to(tl.int64) * active * SLOPE_SUMS * D
    for visit in range(tl.cdiv(tiles - program, tl.num_programs(0))):
        again = visit > 0
        first = (program + visit * tl.num_programs(0)).to(tl.int64) * ROWS
        left = tl.minimum(N - first, ROWS).to(tl.int32)
        _keep_preactivations(
            *(x_ptr + first * D, rows_ptr, weight_ptr, bias_ptr, activation, active, left, D),
            *(PRECISION, ROWS, COLUMNS, CHUNK),
        )
        g = load_rows(grad_ptr + first * D, left, D, ROWS, COLUMNS, CHUNK)
        ld = None
        if grad_logabsdet_ptr is not None:
            rows = tl.arange(0, ROWS)
            ld = tl.load(grad_logabsdet_ptr + first + rows, mask=rows < left, other=0.0)[:, None]
        for step in range(M):
            if INVERSE:
                m = step
                own = blocks_ptr + m * 2 * COLUMNS * CHUNK
                g = solve_held(g, lu_ptr + m * D * D, own, D, True, PRECISION, ROWS, CHUNK, COLUMNS // CHUNK)
            else:
                m = M - 1 - step
                g = _activation_backward(
                    ld,  # it may be None, which a tuple must not hold
                    *(g, rows_ptr, active, left, grad_slopes_ptr, again, activation, m, D),
                    *(False, SLOPE_SUMS, ROWS, COLUMNS, CHUNK),
                )
            if grad_bias_ptr is not None:  # g is the gradient of h_m, of the inverse that of −h_m
                _add_columns(grad_bias_ptr + m * D, g, again, D, INVERSE, COLUMNS, CHUNK)
            if grad_weight_ptr is not None:
                _add_outer(
                    *(grad_weight_ptr, g, rows_ptr, active, left, again, activation, m, D, INVERSE),
                    *(weight_ptr.dtype.element_ty, PRECISION, ROWS, COLUMNS, CHUNK, BLOCK, INNER),
                )
            if INVERSE:
                g = _activation_backward(
                    ld,  # it may be None, which a tuple must not hold
                    *(g, rows_ptr, active, left, grad_slopes_ptr, again, activation, m, D),
                    *(True, SLOPE_SUMS, ROWS, COLUMNS, CHUNK),
                )
            else:
                g = times(g, weight_ptr + m * D * D, D, False, PRECISION, ROWS, COLUMNS, CHUNK)
        if out_ptr is not None:
            store_rows(out_ptr + first * D, g, left, D, ROWS, COLUMNS, CHUNK)
        tl.debug_barrier()  # the next tile overwrites the h, and adds to the sums


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
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of (x [N, D], weights [M, D, D], biases [M, D], slopes) of ``stack_forward``, from its x.

    ``grad_y`` [N, D] in x's dtype, ``grad_logabsdet`` [N] float32 or None. Those of weights and biases are
    float32 and of what was given (None without biases, or without ``needs_weights``); of slopes, float32, if
    they are a tensor. 6·N·M·D² flops, 12·N·D bytes of memory; scratch of a fixed size.
    """
    M, D = weights.shape[0], x.shape[-1]
    tile, arguments = stack_arguments(
        "backward", x, biases, slopes, M, precision, activate_last=activate_last
    )
    check_parameter("weights", weights, (M, D, D), x.dtype)
    return _backward(
        grad_y, grad_logabsdet, x, weights, None, None, slopes, needs_x, needs_weights, tile, arguments
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
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of (y [N, D], weights [M, D, D], biases [M, D], slopes) of ``stack_inverse``, from its x.

    Of each layer g_h = W⁻ᵀ g_x, g_W = −g_hᵀ x, g_b = −Σ g_h, g_y = (g_h − g_ld·φ″/φ′)/φ′ at h, which is
    computed forward from x: so ``weights`` [M, D, D] are needed too, float32. Else as for ``stack_inverse``
    and ``stack_backward``.
    """
    M, D = lu.shape[0], x.shape[-1]
    tile, arguments = stack_arguments(
        "inverse backward", x, biases, slopes, M, precision, activate_last=activate_last
    )
    check_inverse(lu, blocks, M, D, tile, precision)
    check_parameter("weights", weights, (M, D, D), torch.float32)
    return _backward(
        grad_x, grad_logabsdet, x, weights, lu, blocks, slopes, True, needs_weights, tile, arguments
    )


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
    tile: tiles.Tile,
    arguments: dict[str, Any],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of either direction: launches ``stack_bwd_kernel`` and adds up its programs' sums."""
    N, D, M, active = (arguments[name] for name in ("N", "D", "M", "active"))
    check_parameter("the gradient of the rows", grad, (N, D), x.dtype)
    check_parameter("grad_logabsdet", grad_logabsdet, (N,), torch.float32)
    block, inner = tiles.stack_outer_block(tile, weights.dtype, arguments["PRECISION"])
    count = tiles.ceil_div(N, tile.rows)
    programs = min(count, tiles.stack_programs(tiles.architecture(x)))

    def scratch(*shape: int) -> Tensor:
        return torch.empty((programs, *shape), dtype=torch.float32, device=x.device)

    out = torch.empty_like(x) if needs_rows else None
    grad_weights = scratch(M, D, D) if needs_weights else None
    grad_biases = scratch(M, D) if needs_weights and arguments["bias_ptr"] is not None else None
    grad_slopes = scratch(active, slope_rows(slopes), D) if is_learnt(slopes) else None
    launch(
        *(stack_bwd_kernel, (programs,), tile, grad, grad_logabsdet, x, weights, lu, blocks),
        out_ptr=out,
        rows_ptr=scratch(active + 2, tile.rows, tile.columns),
        grad_weight_ptr=grad_weights,
        grad_bias_ptr=grad_biases,
        grad_slopes_ptr=grad_slopes,
        tiles=count,
        BLOCK=block,
        INNER=inner,
        INVERSE=lu is not None,
        SLOPE_SUMS=slope_rows(slopes),
        **arguments,
    )
    # One order for each number of programs.
    sums = [None if total is None else total.sum(0) for total in (grad_weights, grad_biases, grad_slopes)]
    if sums[2] is not None:
        sums[2] = slopes_gradient(sums[2], slopes)
    return out, sums[0], sums[1], sums[2]

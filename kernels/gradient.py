# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False
# mypy: disable-error-code="assignment, var-annotated"
# ruff: noqa: RUF005, SIM102 (the compiler has no unpacking of tuples, and no ``and`` of None and a number)
"""The backward of y = φ(x Wᵀ + b), W = Pᵀ L U already formed.

With h = x Wᵀ + b and g_h the gradient of h, from those of y and of Σ log φ′(h):

    g_h = g_y·φ′(h) + g_ld·φ″(h)/φ′(h),   g_x = g_h W,   g_W = g_hᵀ x,   g_b = Σ g_h.

Up to D = 128 memory is the limit and h is computed again. Up to D = 64 all of it is one launch, which reads
x and g_y once and writes g_x; each of a fixed number of programs keeps sums of g_W, g_b and the slopes'
gradient over the rows that it walks. Where that spills, one launch forms g_h, and g_x and g_W are two
products; so too beyond D = 128, where h was saved and g_h is formed row by row, and without an activation,
where g_h is g_y. Partial sums are added up in one order: no atomics, so two runs give the same bits.
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
    activation_of,
    is_learnt,
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
from lunet_fast.kernels.launch import (
    check_layer,
    check_parameter,
    check_precision,
    check_rows,
    dot,
    launch,
    load_row,
    store_tile,
)
from lunet_fast.kernels.layer import layer_forward
from lunet_fast.kernels.leaky_softplus import PARAMETERS, repeated
from lunet_fast.kernels.spline import Spline


@triton.jit
def _gradient_of_h(
    grad_y_ptr,  # at the tile's first row
    grad_logabsdet_ptr,  # at the tile's first row, or None
    x_ptr,  # at the tile's first row
    weight_ptr,  # [D, D], W
    bias_ptr,  # [D], or None
    left,  # rows that are left from the tile's first one on
    cols,  # [COLUMNS]
    sums,  # as store_sums takes them
    slope_ptr,  # a program's own sums of the slopes' terms, where they are not in ``sums``, or None
    again,  # whether there are such already
    family,
    activation,
    D,
    COLUMN_SUMS: tl.constexpr,
    SLOPE_SUMS: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
):
    """g_h [ROWS, COLUMNS], zero outside, and ``sums`` with this tile's added."""
    rows = tl.arange(0, ROWS)
    inner = tl.arange(0, INNER)
    here = rows[:, None] < left
    valid = here & (cols[None, :] < D)
    ld = None
    if grad_logabsdet_ptr is not None:
        ld = tl.load(grad_logabsdet_ptr + rows, mask=rows < left, other=0.0)[:, None]
    g = tl.load(grad_y_ptr + (rows[:, None] * D + cols[None, :]), mask=valid, other=0.0).to(tl.float32)
    h = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, D, INNER):
        # Offsets anew, not pointers carried along: those take twice the registers, and spilled.
        there = start + inner
        x_offsets = rows[:, None] * D + there[None, :]
        w_offsets = cols[None, :] * D + there[:, None]  # [INNER, COLUMNS], of Wᵀ
        x = tl.load(x_ptr + x_offsets, mask=here & (there[None, :] < D), other=0.0)
        w = tl.load(weight_ptr + w_offsets, mask=(cols[None, :] < D) & (there[:, None] < D), other=0.0)
        h = dot(x, w, h, PRECISION)
    if bias_ptr is not None:
        h += load_row(bias_ptr, cols, D)
    at = located(h, family, activation)
    new_sums = ()
    if slope_ptr is not None:
        spline.add_gradient_sums(slope_ptr, again, g, ld, at, family, cols, D, activation.BINS)
        tl.debug_barrier()  # the next tile adds to what other threads have stored
    HELD: tl.constexpr = SLOPE_SUMS > 0 and activation.BINS == 0
    if HELD:
        terms = slope_gradients(g, ld, at, family, activation)
    for k in tl.static_range(PARAMETERS):
        total = sums[k]
        if HELD:
            total += tl.sum(tl.where(valid, terms[k], 0.0), 0)
        new_sums = new_sums + (total,)
    grad_h = tl.where(valid, phi_backward(g, ld, at, family, activation, False), 0.0)
    total = sums[PARAMETERS]
    if COLUMN_SUMS:
        total += tl.sum(grad_h, 0)
    return grad_h, new_sums + (total,)


@triton.jit
def _store_share(
    sums_ptr,
    grad_weight_ptr,
    sums,
    grad_weight,
    share,
    start,
    D,
    COLUMN_SUMS: tl.constexpr,
    SLOPE_SUMS: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """A program's sums, and its rows of g_W, for the columns of h from ``start`` on."""
    columns = tl.arange(0, COLUMNS)
    cols = start + columns
    if sums_ptr is not None:
        share_ptr = sums_ptr + share * (COLUMN_SUMS + SLOPE_SUMS) * D
        store_sums(share_ptr, sums, cols, D, COLUMN_SUMS, SLOPE_SUMS)
    if grad_weight_ptr is not None:
        width = tl.arange(0, WIDTH)
        inside = (cols[:, None] < D) & (width[None, :] < D)
        block_ptr = grad_weight_ptr + (share * D + start) * D
        tl.store(block_ptr + (columns[:, None] * D + width[None, :]), grad_weight, mask=inside)


@triton.jit(do_not_specialize=["N"])
def layer_bwd_kernel(
    grad_y_ptr,  # [K, N, D]
    grad_logabsdet_ptr,  # [K, N] float32, or None
    x_ptr,  # [K, N, D]
    weight_ptr,  # [K, D, D], W
    bias_ptr,  # [K, D], or None
    grad_x_ptr,  # [K, N, D], or None
    grad_weight_ptr,  # [K, programs, D, D] float32, or None
    sums_ptr,  # [K, programs, COLUMN_SUMS + SLOPE_SUMS, D] float32, or None
    activation,
    N,
    D,
    COLUMN_SUMS: tl.constexpr,
    SLOPE_SUMS: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,  # at least D
    COLUMNS: tl.constexpr,
    BLOCKS: tl.constexpr,
    INNER: tl.constexpr,
):
    """All of the backward but a spline's: g_x, and a program's sums over rows of g_W, g_b, slopes' terms.

    A program walks the tiles of ROWS rows of one member, in steps of all the programs. It forms g_h in BLOCKS
    blocks of COLUMNS, so that no more than one block of h, g_h and W is in registers at a time.
    """
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    member = tl.program_id(1).to(tl.int64)
    rows = tl.arange(0, ROWS)
    width = tl.arange(0, WIDTH)
    columns = tl.arange(0, COLUMNS)
    tile_offsets = rows[:, None] * D + width[None, :]
    block_offsets = columns[:, None] * D + width[None, :]
    weight_ptr += member * D * D
    if bias_ptr is not None:
        bias_ptr += member * D
    grad_weight = ()
    sums = ()
    for _ in tl.static_range(BLOCKS):
        grad_weight = grad_weight + (tl.zeros([COLUMNS, WIDTH], tl.float32),)
        sums = sums + (repeated(tl.zeros([COLUMNS], tl.float32), 1 + PARAMETERS),)

    for first in range(program.to(tl.int64) * ROWS, N, programs.to(tl.int64) * ROWS):
        row = member * N + first
        valid = (rows[:, None] < N - first) & (width[None, :] < D)
        grad_x = tl.zeros([ROWS, WIDTH], tl.float32)
        next_weight = ()
        next_sums = ()
        for i in tl.static_range(BLOCKS):
            cols = i * COLUMNS + columns
            grad_h, block_sums = _gradient_of_h(
                grad_y_ptr + row * D,
                None if grad_logabsdet_ptr is None else grad_logabsdet_ptr + row,
                *(x_ptr + row * D, weight_ptr, bias_ptr, N - first, cols, sums[i]),
                None,
                *(False, load_family(activation, 0, cols, D), activation, D),
                *(COLUMN_SUMS, SLOPE_SUMS, PRECISION, ROWS, COLUMNS, INNER),
            )
            next_sums = next_sums + (block_sums,)
            grad_h = grad_h.to(x_ptr.dtype.element_ty)
            if grad_x_ptr is not None:
                inside = (cols[:, None] < D) & (width[None, :] < D)
                w = tl.load(weight_ptr + i * COLUMNS * D + block_offsets, mask=inside, other=0.0)
                grad_x = dot(grad_h, w, grad_x, PRECISION)
            block = grad_weight[i]
            if grad_weight_ptr is not None:
                x = tl.load(x_ptr + row * D + tile_offsets, mask=valid, other=0.0)
                block = dot(tl.trans(grad_h), x, block, PRECISION)
            next_weight = next_weight + (block,)
        sums = next_sums
        grad_weight = next_weight
        if grad_x_ptr is not None:
            store_tile(grad_x_ptr + row * D, grad_x, 0, rows[:, None] < N - first, D, ROWS, WIDTH)

    for i in tl.static_range(BLOCKS):
        _store_share(
            *(sums_ptr, grad_weight_ptr, sums[i], grad_weight[i], member * programs + program),
            *(i * COLUMNS, D, COLUMN_SUMS, SLOPE_SUMS, WIDTH, COLUMNS),
        )


@triton.jit(do_not_specialize=["N"])
def preactivation_bwd_kernel(
    grad_y_ptr,  # [K, N, D]
    grad_logabsdet_ptr,  # [K, N] float32, or None
    x_ptr,  # [K, N, D]
    weight_ptr,  # [K, D, D], W
    bias_ptr,  # [K, D], or None
    grad_h_ptr,  # [K, N, D]
    sums_ptr,  # [K, programs, COLUMN_SUMS + SLOPE_SUMS, D] float32, or None
    activation,
    N,
    D,
    COLUMN_SUMS: tl.constexpr,
    SLOPE_SUMS: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
):
    """h again and g_h, and sums over this program's rows of g_h and of the slopes' terms.

    A program keeps one block of columns and walks the tiles of ROWS rows of one member, in steps of all the
    programs of its block.
    """
    blocks = tl.cdiv(D, COLUMNS)
    block = tl.program_id(0) % blocks
    program = tl.program_id(0) // blocks
    programs = tl.num_programs(0) // blocks
    member = tl.program_id(1).to(tl.int64)
    rows = tl.arange(0, ROWS)
    cols = block * COLUMNS + tl.arange(0, COLUMNS)
    weight_ptr += member * D * D
    if bias_ptr is not None:
        bias_ptr += member * D
    family = load_family(activation, 0, cols, D)
    sums = repeated(tl.zeros([COLUMNS], tl.float32), 1 + PARAMETERS)
    slope_ptr = None
    if SLOPE_SUMS > 0 and activation.BINS > 0:
        slope_ptr = sums_ptr + ((member * programs + program) * (COLUMN_SUMS + SLOPE_SUMS) + COLUMN_SUMS) * D
    for first in range(program.to(tl.int64) * ROWS, N, programs.to(tl.int64) * ROWS):
        row = member * N + first
        grad_h, sums = _gradient_of_h(
            grad_y_ptr + row * D,
            None if grad_logabsdet_ptr is None else grad_logabsdet_ptr + row,
            *(x_ptr + row * D, weight_ptr, bias_ptr, N - first, cols, sums),
            slope_ptr,
            *(first > program * ROWS, family, activation, D),
            *(COLUMN_SUMS, SLOPE_SUMS, PRECISION, ROWS, COLUMNS, INNER),
        )
        tl.store(
            grad_h_ptr + row * D + (rows[:, None] * D + cols[None, :]),
            grad_h.to(grad_h_ptr.dtype.element_ty),
            mask=(rows[:, None] < N - first) & (cols[None, :] < D),
        )
    if sums_ptr is not None:
        HELD: tl.constexpr = SLOPE_SUMS if activation.BINS == 0 else 0
        share_ptr = sums_ptr + (member * programs + program) * (COLUMN_SUMS + SLOPE_SUMS) * D
        store_sums(share_ptr, sums, cols, D, COLUMN_SUMS, HELD)


@triton.jit(do_not_specialize=["N"])
def weight_gradient_kernel(
    grad_h_ptr,  # [K, N, D]
    x_ptr,  # [K, N, D]
    grad_weight_ptr,  # [K, splits, D, D] float32
    grad_bias_ptr,  # [K, splits, D] float32, or None
    N,
    D,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
):
    """A tile [ROWS, COLUMNS] of g_hᵀ x, and ROWS of Σ g_h, over one split of the rows of the batch.

    The splits take INNER rows in turn. The tiles of one split come one after the other, so that they find its
    rows in the L2 cache.
    """
    across = tl.cdiv(D, COLUMNS)
    tiles_of_split = tl.cdiv(D, ROWS) * across
    tile = tl.program_id(0) % tiles_of_split
    split = tl.program_id(0) // tiles_of_split
    splits = tl.num_programs(0) // tiles_of_split
    member = tl.program_id(1).to(tl.int64)
    rows = (tile // across) * ROWS + tl.arange(0, ROWS)
    cols = (tile % across) * COLUMNS + tl.arange(0, COLUMNS)
    inner = tl.arange(0, INNER)

    left_offsets = inner[:, None] * D + rows[None, :]
    right_offsets = inner[:, None] * D + cols[None, :]
    grad_weight = tl.zeros([ROWS, COLUMNS], tl.float32)
    grad_bias = tl.zeros([INNER, ROWS], tl.float32)
    for first in range(split.to(tl.int64) * INNER, N, splits * INNER):
        base = (member * N + first) * D
        here = inner[:, None] < N - first
        grad_h = tl.load(grad_h_ptr + base + left_offsets, mask=here & (rows[None, :] < D), other=0.0)
        x = tl.load(x_ptr + base + right_offsets, mask=here & (cols[None, :] < D), other=0.0)
        if grad_bias_ptr is not None:
            grad_bias += grad_h.to(tl.float32)
        grad_weight = dot(tl.trans(grad_h), x, grad_weight, PRECISION)

    share = member * splits + split
    valid = (rows[:, None] < D) & (cols[None, :] < D)
    tl.store(grad_weight_ptr + share * D * D + (rows[:, None] * D + cols[None, :]), grad_weight, mask=valid)
    if grad_bias_ptr is not None:
        # The blocks of columns have all added up the same numbers; one of them stores.
        if tile % across == 0:
            tl.store(grad_bias_ptr + share * D + rows, tl.sum(grad_bias, 0), mask=rows < D)


# --- launchers ------------------------------------------------------------------------------------------


def layer_backward(
    grad_y: Tensor,
    grad_logabsdet: Tensor | None,
    x: Tensor,
    h: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    slopes: Slopes | None,
    *,
    needs_x: bool,
    needs_weight: bool,
    needs_bias: bool,
    precision: str,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of (x [K, N, D], W [K, D, D], b [K, D], ``slopes``) of y = φ(h), h = x Wᵀ + b.

    ``grad_y``, x and ``weight`` are contiguous and of one dtype, float32 or bfloat16, and so is the gradient
    of x; ``grad_logabsdet`` [K, N] is that of each row's Σ log φ′(h), without W's share, and float32, as are
    all other gradients. That of ``slopes`` comes whenever they are a tensor, the others if needed.
    ``slopes`` None is no activation: h = y, and ``grad_logabsdet`` has no influence.

    h is computed again from ``bias`` where ``tiles.recomputes(D)``, and must be given beyond (ValueError).
    ``precision`` is as in ``layer_forward``. 4·K·N·D² flops, 6·K·N·D² with h.
    """
    check_precision(precision)
    K, N, D = check_layer("x", x, bias, None)
    check_parameter("grad_y", grad_y, (K, N, D), x.dtype)
    check_parameter("grad_logabsdet", grad_logabsdet, (K, N), torch.float32)
    check_parameter("h", h, (K, N, D), x.dtype)
    check_parameter("weight", weight, (K, D, D), x.dtype)
    if not (needs_x or needs_weight or needs_bias or is_learnt(slopes)):
        return None, None, None, None
    if slopes is not None and h is None and not tiles.recomputes(D):
        raise ValueError(f"h must be given for D = {D}: it is not computed again")

    grad_h = grad_y
    grad_x, grad_weight, grad_bias, grad_slopes = None, None, None, None
    if slopes is not None and h is not None:
        grad_h, grad_bias, grad_slopes = row_gradients(
            grad_y, grad_logabsdet, h, slopes, inverse=False, column_sums=needs_bias
        )
    elif slopes is not None:
        tile = tiles.layer_backward_tile(D, x.dtype, precision, tiles.architecture(x), is_learnt(slopes))
        # A spline takes the registers that g_W would want, and its sums of g_h were not alike in all lanes.
        tile = None if isinstance(slopes, Spline) else tile
        if tile is not None:
            return _fused_backward(
                *(grad_y, grad_logabsdet, x, weight, bias, slopes, tile),
                needs_x=needs_x,
                needs_weight=needs_weight,
                needs_bias=needs_bias,
                precision=precision,
            )
        grad_h, grad_bias, grad_slopes = _preactivation_backward(
            *(grad_y, grad_logabsdet, x, weight, bias, slopes), needs_bias=needs_bias, precision=precision
        )
    elif needs_bias and not needs_weight:
        grad_bias = grad_h.sum(1, dtype=torch.float32)
    if needs_weight:
        summed = needs_bias and grad_bias is None
        grad_weight, sums = _weight_gradient(grad_h, x, precision, bias=summed)
        grad_bias = sums if summed else grad_bias
    if needs_x:
        # g_h W is the layer of Wᵀ.
        grad_x, _, _ = layer_forward(
            *(grad_h, weight, None, None), logabsdet=False, save=False, precision=precision, transposed=True
        )
    return grad_x, grad_weight, grad_bias, grad_slopes


def _fused_backward(
    grad_y: Tensor,
    grad_logabsdet: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    slopes: Slopes,
    tile: tiles.Tile,
    *,
    needs_x: bool,
    needs_weight: bool,
    needs_bias: bool,
    precision: str,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """``layer_backward`` in one launch and the sums of its programs' sums."""
    K, N, D = x.shape
    slope_sums = slope_rows(slopes)
    programs = min(tiles.ceil_div(N, tile.rows), tiles.programs(8 // tile.warps, K, tiles.architecture(x)))
    grad_x = torch.empty_like(x) if needs_x else None
    weights: Tensor | None = None
    if needs_weight:
        weights = torch.empty((K, programs, D, D), dtype=torch.float32, device=x.device)
    sums = memory_for_sums(x, programs, needs_bias, slope_sums)
    launch(
        *(layer_bwd_kernel, (programs, K), tile),
        *(grad_y, grad_logabsdet, x, weight, bias, grad_x, weights, sums, activation_of(slopes, D), N, D),
        COLUMN_SUMS=needs_bias,
        SLOPE_SUMS=slope_sums,
        PRECISION=precision,
        ROWS=tile.rows,
        WIDTH=max(16, triton.next_power_of_2(D)),
        COLUMNS=tile.columns,
        BLOCKS=tiles.ceil_div(D, tile.columns),
        INNER=tile.inner,
    )
    grad_bias, grad_slopes = split_sums(sums, slopes, needs_bias)
    return grad_x, None if weights is None else weights.sum(1), grad_bias, grad_slopes


def _preactivation_backward(
    grad_y: Tensor,
    grad_logabsdet: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    slopes: Slopes,
    *,
    needs_bias: bool,
    precision: str,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of (h [K, N, D], b [K, D] if needed, ``slopes`` if a tensor), h = x Wᵀ + b computed again.

    Arguments as those of ``layer_backward``, which checks them.
    """
    K, N, D = x.shape
    slope_sums = slope_rows(slopes)
    architecture = tiles.architecture(x)
    tile = tiles.preactivation_tile(D, x.dtype, precision, slope_sums > 0)
    blocks = tiles.ceil_div(D, tile.columns)
    programs = min(tiles.ceil_div(N, tile.rows), tiles.programs(16 // tile.warps, K * blocks, architecture))
    grad_h = torch.empty_like(x)
    sums = memory_for_sums(x, programs, needs_bias, slope_sums)
    launch(
        *(preactivation_bwd_kernel, (programs * blocks, K), tile),
        *(grad_y, grad_logabsdet, x, weight, bias, grad_h, sums, activation_of(slopes, D), N, D),
        COLUMN_SUMS=needs_bias,
        SLOPE_SUMS=slope_sums,
        PRECISION=precision,
        **tile.blocks,
    )
    return grad_h, *split_sums(sums, slopes, needs_bias)


def weight_gradient(grad_h: Tensor, x: Tensor, *, precision: str) -> Tensor:
    """g_hᵀ x [K, D, D] float32 of contiguous rows [K, N, D] of one dtype, float32 or bfloat16.

    The rows are split over a number of programs that D, K and the table give; their sums are added up in one
    order. 2·K·N·D² flops. ``precision`` is as in ``layer_forward``.
    """
    return _weight_gradient(grad_h, x, precision, bias=False)[0]


def weight_and_bias_gradients(grad_h: Tensor, x: Tensor, *, precision: str) -> tuple[Tensor, Tensor]:
    """(g_hᵀ x [K, D, D], Σ g_h [K, D]), as ``weight_gradient``; the sums cost no further reading."""
    return _weight_gradient(grad_h, x, precision, bias=True)


def _weight_gradient(grad_h: Tensor, x: Tensor, precision: str, *, bias: bool) -> tuple[Tensor, Any]:
    check_rows("x", x)
    K, N, D = x.shape
    check_parameter("grad_h", grad_h, (K, N, D), x.dtype)
    check_precision(precision)
    architecture = tiles.architecture(x)
    tile = tiles.weight_gradient_tile(D, x.dtype, precision, architecture)
    blocks = tiles.ceil_div(D, tile.rows) * tiles.ceil_div(D, tile.columns)
    splits = min(tiles.ceil_div(N, tile.inner), tiles.programs(8 // tile.warps, K * blocks, architecture))
    weights = torch.empty((K, splits, D, D), dtype=torch.float32, device=x.device)
    sums = torch.empty((K, splits, D), dtype=torch.float32, device=x.device) if bias else None
    launch(
        *(weight_gradient_kernel, (blocks * splits, K), tile),
        *(grad_h, x, weights, sums, N, D),
        PRECISION=precision,
        **tile.blocks,
    )
    # One split is the sum: no second launch.
    grad_weight = weights[:, 0] if splits == 1 else weights.sum(1)
    if sums is None:
        return grad_weight, None
    return grad_weight, sums[:, 0] if splits == 1 else sums.sum(1)

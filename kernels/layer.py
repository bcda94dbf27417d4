# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False
"""y = φ(W x + b) and log|det J| in one launch, W = Pᵀ L U already formed.

Forming W costs D³ once for a batch; then one product does the work of two, and bias, φ and the row's
Σ log φ′ are done on the accumulator before it leaves the chip.
"""

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
    log2_phi_derivative,
    phi,
)
from lunet_fast.kernels.launch import (
    Prepared,
    check_layer,
    check_parameter,
    check_precision,
    check_rows,
    dot,
    load_row,
)
from lunet_fast.kernels.leaky_softplus import LN2


@triton.jit
def finish_tile(
    h,  # [ROWS, COLUMNS] float32, x Wᵀ
    y_ptr,
    h_ptr,
    partial_ptr,
    constant_ptr,
    bias_ptr,
    activation,
    first_row,  # int64, of the tile, counted over all members
    rows,  # [ROWS], from the tile's first row
    here,  # [ROWS, 1], which rows there are
    cols,  # [COLUMNS]
    block,
    blocks,
    member,
    D,
):
    """The end of a layer's forward, on a tile that is still on the chip: bias, φ, the sums of log φ′.

    φ is taken of the float32 accumulator, not of the h that is stored. Column block 0 adds the constant.
    """
    if bias_ptr is not None:
        h += load_row(bias_ptr + member * D, cols, D)
    offsets = rows[:, None] * D + cols[None, :]
    valid = here & (cols[None, :] < D)
    y_ptr += first_row * D
    if h_ptr is not None:
        tl.store(h_ptr + first_row * D + offsets, h.to(h_ptr.dtype.element_ty), mask=valid)
    if activation.ACTIVE:
        family = load_family(activation, 0, cols, D)
        at = located(h, family, activation)
        tl.store(y_ptr + offsets, phi(at, family, activation).to(y_ptr.dtype.element_ty), mask=valid)
        if partial_ptr is not None:
            logs = tl.where(valid, log2_phi_derivative(at, family, activation), 0.0)
            total = tl.sum(logs, 1) * LN2  # [ROWS]
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
    activation,
    N,
    D,
    TRANSPOSED: tl.constexpr,
    PRECISION: tl.constexpr,
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
    span = tl.arange(0, COLUMNS)
    cols = block * COLUMNS + span
    here = rows[:, None] < N - first
    inner = tl.arange(0, INNER)
    x_ptrs = x_ptr + first_row * D + (rows[:, None] * D + inner[None, :])  # [ROWS, INNER]
    # [INNER, COLUMNS], of Wᵀ or, transposed, of W.
    weight_ptr += member * D * D
    if TRANSPOSED:
        w_ptrs = weight_ptr + (inner[:, None] * D + cols[None, :])
    else:
        w_ptrs = weight_ptr + block * COLUMNS * D + (span[None, :] * D + inner[:, None])
    h = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, D, INNER):
        there = inner < D - start
        x = tl.load(x_ptrs, mask=here & there[None, :], other=0.0)
        w = tl.load(w_ptrs, mask=(cols[None, :] < D) & there[:, None], other=0.0)
        h = dot(x, w, h, PRECISION)
        x_ptrs += INNER
        w_ptrs += INNER * D if TRANSPOSED else INNER
    finish_tile(
        *(h, y_ptr, h_ptr, partial_ptr, constant_ptr, bias_ptr, activation),
        *(first_row, rows, here, cols, block, blocks, member, D),
    )


class Forward:
    """``layer_forward`` of layers of one kind: what depends neither on the rows nor on the numbers in weights
    and biases is found out once."""

    def __init__(
        self, rows: Tensor, slopes: Slopes | None, *, precision: str, transposed: bool = False
    ) -> None:
        """For ``rows`` of this D, dtype and device."""
        check_precision(precision)
        D = rows.shape[-1]
        activation = activation_of(slopes, D)
        tile = tiles.layer_tile(D, rows.dtype, precision, tiles.architecture(rows))
        if activation.PER_COLUMN or activation.BINS:
            tile = tiles.narrowed(tile)
        self._kind, self._active = (D, rows.dtype), slopes is not None
        self._rows, self._blocks = tile.rows, tiles.ceil_div(D, tile.columns)
        arguments = {"activation": activation, "D": D, "TRANSPOSED": transposed, "PRECISION": precision}
        tensors = ("x_ptr", "weight_ptr", "bias_ptr", "y_ptr", "h_ptr", "partial_ptr", "constant_ptr")
        self._launch = Prepared(layer_fwd_kernel, tile, arguments | tile.blocks, (*tensors, "N"))

    def __call__(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        *,
        constant: Tensor | None,
        logabsdet: bool,
        save: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        K, N, D = check_layer("x", x, bias, constant, kind=self._kind)
        check_parameter("weight", weight, (K, D, D), x.dtype)
        y, h, partial = forward_outputs(x, self._blocks, self._active, logabsdet=logabsdet, save=save)
        grid = (tiles.ceil_div(N, self._rows) * self._blocks, K, 1)
        self._launch(grid, x, weight, bias, y, h, partial, constant, N)
        return y, row_totals(x, partial, constant) if logabsdet else None, h


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
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(y = φ(x Wᵀ + b) [K, N, D], log|det J| [K, N] float32 or None, h = x Wᵀ + b [K, N, D] or None).

    x [K, N, D] and ``weight`` W [K, D, D] are contiguous and of one dtype, float32 or bfloat16; ``bias``
    [K, D] may differ in dtype. ``slopes`` is None for no activation, and then h is y and is not returned.
    ``constant`` [K], float32, is log|det W|, added to each row's Σ log φ′(h).
    ``transposed`` takes Wᵀ for W: x W instead of x Wᵀ.
    ``precision`` is the arithmetic of a float32 product: "ieee", "tf32x3" or "tf32". Sums are float32.
    """
    check_rows("x", x)
    run = Forward(x, slopes, precision=precision, transposed=transposed)
    return run(x, weight, bias, constant=constant, logabsdet=logabsdet, save=save)


def forward_outputs(
    x: Tensor, blocks: int, active: bool, *, logabsdet: bool, save: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Memory for what ``finish_tile`` stores of rows like x: y, h if saved, sums of ``blocks`` of columns;
    ``active``: there is an activation."""
    y = torch.empty_like(x)
    h = torch.empty_like(x) if save and active else None
    if not (logabsdet and active):
        return y, h, None
    return y, h, torch.empty((*x.shape[:-1], blocks), dtype=torch.float32, device=x.device)


def row_totals(x: Tensor, partial: Tensor | None, constant: Tensor | None) -> Tensor:
    """[K, N]: the column blocks' sums added in one fixed order; of the identity, the constant alone."""
    if partial is not None:
        return partial[..., 0] if partial.shape[-1] == 1 else partial.sum(-1)
    total = torch.zeros(x.shape[:-1], dtype=torch.float32, device=x.device)
    return total if constant is None else total + constant.unsqueeze(-1)

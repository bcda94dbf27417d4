# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False
# mypy: disable-error-code=assignment
"""The inverse of a layer: by a product with W⁻¹ where its condition allows it, by substitution elsewhere.

A product with the explicit inverse keeps the tensor cores busier. It is as accurate unless the
factors are badly conditioned, and that is known on the device only: both kernels are launched, both read
the condition there, and the one that is not wanted returns at once. The host waits for nothing, and a
CUDA graph can record it.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lunet_fast.kernels import tiles
from lunet_fast.kernels.activation import (
    Activation,
    Slopes,
    activation_of,
    load_family,
    located_inverse,
    log2_phi_derivative,
    outputs_by_row,
    row_wise,
    steps_of,
)
from lunet_fast.kernels.launch import (
    Prepared,
    check_layer,
    check_parameter,
    check_rows,
    dot,
    launch,
    load_row,
    store_tile,
)
from lunet_fast.kernels.leaky_softplus import LN2
from lunet_fast.kernels.matrix import check_packed, diagonal, lower_tile, permuted, upper_tile
from lunet_fast.kernels.solve import (
    EXPLICIT_INVERSE_LIMIT,
    InvertBlocks,
    Substitution,
    at_least_tf32x3,
    check_factors,
    solve_block,
    solve_descending,
)


@triton.jit
def magnitudes_kernel(
    lu_ptr,  # [K, D, D]
    sign_ptr,  # [K, D], or None
    vector_ptr,  # [K, D] float32, v; or None: all ones
    out_ptr,  # [K, D] float32
    D,
    UPPER: tl.constexpr,
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
            diagonal_there = diagonal(lu_ptr, sign_ptr, rows, D)[:, None]
            part = upper_tile(lu_ptr, diagonal_there, rows[:, None], cols[None, :], D)
        else:
            part = lower_tile(lu_ptr, rows[:, None], cols[None, :], D)
        part = tl.abs(part)
        if vector_ptr is not None:
            part *= load_row(vector_ptr, cols, D)
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
    solved_ptr = weight_ptr if running_ptr is None else running_ptr + (member * D + first) * D
    lower_ptr = inverses_ptr + member * 2 * blocks * BLOCK * BLOCK
    upper_ptr = lower_ptr + blocks * BLOCK * BLOCK

    # In the columns before its diagonal U⁻¹ is zero.
    for j in range(start, blocks):
        cols = (j * BLOCK + tl.arange(0, BLOCK))[None, :]
        solve_block(
            tl.where((rows[:, None] == cols) & here, 1.0, 0.0),
            *(solved_ptr, lu_ptr, upper_ptr, j, start * BLOCK, j * BLOCK, here, D),
            *(True, PRECISION, ROWS, BLOCK, INNER),
        )
    condition = tl.zeros([ROWS], tl.float32)
    for step in range(blocks):
        j = blocks - 1 - step
        solved = here & (rows[:, None] < (j + 1) * BLOCK)
        part = solve_descending(
            *(solved, solved_ptr, lu_ptr, lower_ptr, j, here, D), *(True, PRECISION, ROWS, BLOCK, INNER)
        )
        cols = j * BLOCK + tl.arange(0, BLOCK)
        condition += tl.sum(tl.abs(part) * load_row(magnitudes_ptr + member * D, cols, D), 1)
        if running_ptr is not None:
            source = permuted(permutation_ptr, cols, D)[None, :]
            offsets = tl.arange(0, ROWS)[:, None] * D + source
            tl.store(weight_ptr + offsets, part, mask=here & (source < D))
    tl.store(conditions_ptr + member * D + rows, condition, mask=rows < D)


@triton.jit(do_not_specialize=["N"])
def inverse_product_kernel(
    y_ptr,  # [K, N, D], or φ⁻¹(y) where the activation is the identity
    weight_ptr,  # [K, D, D] float32, W⁻¹
    bias_ptr,  # [K, D], or None
    x_ptr,  # [K, N, D]
    h_ptr,  # [K, N, D], or None
    logabsdet_ptr,  # [K, N] float32, or None
    constant_ptr,  # [K] float32, log|det W|, or None
    condition_ptr,  # [K] float32
    activation,
    N,
    D,
    BEGUN: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
):
    """x = (φ⁻¹(y) − b) W⁻ᵀ, a tile [ROWS, COLUMNS]; nothing if the condition passes the limit.

    Each block of columns takes φ⁻¹ of all its rows: with an activation there is one block. The first stores
    the log-determinant; BEGUN: −Σ log φ′(h) stands there already. Blocks of the same rows come one after the
    other, so that they find y in the L2 cache.
    """
    member = tl.program_id(1).to(tl.int64)
    if (tl.load(condition_ptr + member) <= EXPLICIT_INVERSE_LIMIT) == 0:  # NaN is no condition to trust
        return
    blocks = tl.cdiv(D, COLUMNS)
    block = tl.program_id(0) % blocks
    first = (tl.program_id(0) // blocks).to(tl.int64) * ROWS
    first_row = member * N + first
    rows = tl.arange(0, ROWS)
    here = rows[:, None] < N - first
    cols = block * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inner = tl.arange(0, INNER)
    y_ptr += first_row * D
    weight_ptr += member * D * D
    if bias_ptr is not None:
        bias_ptr += member * D
    if h_ptr is not None:
        h_ptr += first_row * D
    x = tl.zeros([ROWS, COLUMNS], tl.float32)
    total = tl.zeros([ROWS, INNER], tl.float32)
    for start in range(0, D, INNER):
        source = start + inner
        valid = here & (source[None, :] < D)
        offsets = rows[:, None] * D + source[None, :]
        h = tl.load(y_ptr + offsets, mask=valid, other=0.0).to(tl.float32)
        if activation.ACTIVE:
            family = load_family(activation, 0, source, D)
            at = located_inverse(h, family, activation)
            h = at[0]
            if h_ptr is not None:
                tl.store(h_ptr + offsets, h.to(h_ptr.dtype.element_ty), mask=valid)
            if logabsdet_ptr is not None:
                total += tl.where(source[None, :] < D, log2_phi_derivative(at, family, activation), 0.0)
        if bias_ptr is not None:
            h -= load_row(bias_ptr, source, D)
        w_offsets = cols * D + source[:, None]  # [INNER, COLUMNS], of W⁻ᵀ
        w = tl.load(weight_ptr + w_offsets, mask=(cols < D) & (source[:, None] < D), other=0.0)
        x = dot(h, w, x, PRECISION)
    store_tile(x_ptr + first_row * D, x, block * COLUMNS, here, D, ROWS, COLUMNS)
    # The first test is the compiler's, the second the program's.
    if logabsdet_ptr is not None:
        first_block = block == 0
        if first_block:
            ptrs = logabsdet_ptr + first_row + rows
            sums = -tl.sum(total, 1) * LN2
            if BEGUN:
                sums = tl.load(ptrs, mask=rows < N - first, other=0.0)
            if constant_ptr is not None:
                sums -= tl.load(constant_ptr + member)
            # Each warp has loaded all rows, of which others store some.
            tl.debug_barrier()
            tl.store(ptrs, sums, mask=rows < N - first)


# --- launchers ------------------------------------------------------------------------------------------


class PreparedInverse(NamedTuple):
    """What ``layer_inverse`` needs of a matrix, computed once for any number of rows.

    inverses [K, 2, blocks, block, block] of the diagonal blocks of L and U, log|det W| [K]; and W⁻¹ [K, D, D]
    with its condition [K] where the table has it tried, else None. All float32. No inverses where W⁻¹ is
    known to be used.
    """

    inverses: Tensor | None
    logabsdet: Tensor
    weight: Tensor | None
    condition: Tensor | None


class Preparation:
    """``prepare_inverse`` as a function of ``lu`` and N alone."""

    def __init__(
        self, lu: Tensor, sign: Tensor | None, permutation: Tensor | None, *, precision: str
    ) -> None:
        self._sign, self._permutation, self._precision = sign, permutation, at_least_tf32x3(precision)
        self._blocks = InvertBlocks(lu, sign, block=tiles.substitution_block(lu.shape[-1]))

    def __call__(self, lu: Tensor, N: int | None) -> PreparedInverse:
        """Of one of the same shape and dtype, contiguous."""
        inverses, logabsdet = self._blocks(lu)
        if not tiles.tries_inverse_weight(lu.shape[-1], N):
            return PreparedInverse(inverses, logabsdet, None, None)
        given = (lu, self._sign, self._permutation, inverses)
        return PreparedInverse(inverses, logabsdet, *inverse_weight(*given, precision=self._precision))


def prepare_inverse(
    lu: Tensor, sign: Tensor | None, permutation: Tensor | None, *, precision: str, N: int | None = None
) -> PreparedInverse:
    """Invert what ``layer_inverse`` wants inverted of packed ``lu`` [K, D, D]: one launch, with W⁻¹ five.

    W⁻¹ only where the table has it tried for N rows (None: as many as one likes): for few it costs more than
    it saves.
    """
    return Preparation(lu, sign, permutation, precision=precision)(lu, N)


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
    check_factors(lu, inverses, permutation, K, D)
    tile = tiles.inverse_weight_tile(D)
    weight = torch.empty((K, D, D), dtype=torch.float32, device=lu.device)
    running = None if permutation is None else torch.empty_like(weight)
    conditions = torch.empty((K, D), dtype=torch.float32, device=lu.device)
    magnitudes = _magnitudes(lu, sign, _magnitudes(lu, sign, None, upper=True), upper=False)
    launch(
        *(inverse_weight_kernel, (tiles.ceil_div(D, tile.rows), K), tile),
        *(lu, inverses, permutation, magnitudes, running, weight, conditions),
        D=D,
        PRECISION=precision,
        **tile.triangle,
    )
    return weight, conditions.amax(-1)


def _magnitudes(lu: Tensor, sign: Tensor | None, vector: Tensor | None, *, upper: bool) -> Tensor:
    """|U| v or |L| v [K, D]."""
    K, D = lu.shape[:2]
    tile = tiles.magnitudes_tile()
    out = torch.empty((K, D), dtype=torch.float32, device=lu.device)
    launch(
        *(magnitudes_kernel, (tiles.ceil_div(D, tile.rows), K), tile),
        *(lu, sign, vector, out),
        D=D,
        UPPER=upper,
        ROWS=tile.rows,
        COLUMNS=tile.columns,
    )
    return out


class Inverse:
    """``layer_inverse`` of layers of one kind: what depends neither on the rows nor on the numbers in
    matrices and biases is found out once."""

    def __init__(
        self,
        rows: Tensor,
        permutation: Tensor | None,
        slopes: Slopes | None,
        *,
        precision: str,
        steps: int | None = None,
    ) -> None:
        """For ``rows`` of this D, dtype and device."""
        precision = at_least_tf32x3(precision)
        D = rows.shape[-1]
        activation = activation_of(slopes, D, steps=0 if slopes is None else steps_of(slopes, steps))
        self._kind, self._active = (D, rows.dtype), slopes is not None
        self._given, self._permutation = (rows.new_empty((0, D)), activation, precision), permutation

    @cached_property
    def _substitute(self) -> Substitution:
        return Substitution(*self._given, permutation=self._permutation)

    @cached_property
    def _multiply(self) -> Multiplication:
        return Multiplication(*self._given)

    def __call__(
        self,
        y: Tensor,
        lu: Tensor,
        inverses: Tensor | None,
        bias: Tensor | None,
        *,
        logabsdet: bool,
        save: bool,
        constant: Tensor | None,
        weight: Tensor | None,
        condition: Tensor | None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """``inverses`` None: the caller has seen that the condition is within the limit."""
        K, _, D = check_layer("y", y, bias, constant, kind=self._kind)
        check_parameter("weight", weight, (K, D, D), torch.float32)
        check_parameter("condition", condition, (K,), torch.float32)
        if (weight is None) != (condition is None):
            raise ValueError("weight and condition must be given together")
        x, total = outputs_by_row(y, logabsdet)
        h = torch.empty_like(y) if save and self._active else None
        if weight is not None:
            self._multiply(y, weight, bias, x, h, total, constant=constant, condition=condition)
        if inverses is not None:
            self._substitute(y, lu, inverses, bias, x, h, total, constant=constant, condition=condition)
        return x, total, h


class Multiplication:
    """x ← (φ⁻¹(y) − b) W⁻ᵀ, h ← φ⁻¹(y) and total ← −log|det W| − Σ log φ′(h), if the condition allows it, for
    layers of one kind.

    One launch where a program has whole rows of x and one φ for all columns (it spilled with more); else φ⁻¹
    is a launch of its own, whatever the condition.
    """

    def __init__(self, rows: Tensor, activation: Activation, precision: str) -> None:
        """For ``rows`` of this D, dtype and device."""
        D = rows.shape[-1]
        tile = tiles.inverse_product_tile(D, precision, tiles.architecture(rows))
        self._rows, self._blocks = tile.rows, tiles.ceil_div(D, tile.columns)
        begun = bool(activation.ACTIVE) and (self._blocks > 1 or bool(activation.PER_COLUMN))
        self._before = activation if begun else None
        arguments = {
            "activation": activation_of(None, D) if begun else activation,
            "D": D,
            "BEGUN": begun,
            "PRECISION": precision,
        }
        varying = ("y_ptr", "weight_ptr", "bias_ptr", "x_ptr", "h_ptr", "logabsdet_ptr", "constant_ptr")
        self._launch = Prepared(
            inverse_product_kernel, tile, arguments | tile.blocks, (*varying, "condition_ptr", "N")
        )

    def __call__(
        self,
        y: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        x: Tensor,
        h: Tensor | None,
        total: Tensor | None,
        *,
        constant: Tensor | None,
        condition: Tensor | None,
    ) -> None:
        K, N = y.shape[:2]
        if self._before is not None:
            y, h = _wide_preactivation(y, h, total, self._before), None
        grid = (tiles.ceil_div(N, self._rows) * self._blocks, K, 1)
        self._launch(grid, y, weight, bias, x, h, total, constant, condition, N)


def _wide_preactivation(y: Tensor, h: Tensor | None, total: Tensor | None, activation: Activation) -> Tensor:
    """φ⁻¹(y) in float32, also where y and h have fewer digits; h ← φ⁻¹(y) and total ← −Σ log φ′(h)."""
    wide = h if h is not None and h.dtype == torch.float32 else torch.empty_like(y, dtype=torch.float32)
    row_wise(y, wide, total, activation, inverse=True)
    if h is not None and h is not wide:
        h.copy_(wide)
    return wide


def layer_inverse(
    y: Tensor,
    lu: Tensor,
    inverses: Tensor,
    bias: Tensor | None,
    slopes: Slopes | None,
    *,
    permutation: Tensor | None,
    precision: str,
    steps: int | None = None,
    constant: Tensor | None = None,
    weight: Tensor | None = None,
    condition: Tensor | None = None,
    logabsdet: bool,
    save: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(x = U⁻¹ L⁻¹ P (h − b) [K, N, D], its log-determinant [K, N] float32 or None, h = φ⁻¹(y) or None).

    y [K, N, D], contiguous, float32 or bfloat16, gives x and h their dtype; ``lu`` [K, D, D] packed and
    ``bias`` [K, D] may differ in dtype; ``permutation`` [D] int64 or None, K = 1 only. ``slopes`` is None for
    no activation, and then h is y and is not returned. ``inverses`` come from ``invert_blocks`` with the
    table's block, ``constant`` [K] with them: log|det W|, subtracted from −Σ log φ′(h).
    ``precision`` is "ieee" or "tf32x3"; "tf32" is raised to tf32x3. ``steps`` as in ``activation_inverse``.

    One launch, 2·N·D² flops and up. With ``weight`` W⁻¹ and ``condition``, from ``inverse_weight``, x is the
    product (h − b) W⁻ᵀ where the condition allows it: the product and substitution are launched, and one of
    them returns at once. φ⁻¹ is part of the product, or for long rows a launch before it.
    """
    check_rows("y", y)
    run = Inverse(y, permutation, slopes, precision=precision, steps=steps)
    given: dict[str, Any] = {"constant": constant, "weight": weight, "condition": condition}
    return run(y, lu, inverses, bias, logabsdet=logabsdet, save=save, **given)

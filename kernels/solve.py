# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False
# mypy: disable-error-code=assignment
# ruff: noqa: RUF005 (the compiler knows a sum of tuples, not what ruff would have instead)
"""x = U⁻¹ L⁻¹ P (φ⁻¹(y) − b) and its log-determinant by blocked substitution, in one launch.

With the diagonal blocks of L and U inverted ahead, a triangular solve is products of small blocks: block j
of the solution of T x = r is T_jj⁻¹ (r_j − Σ T_ji x_i), where the sum takes the blocks already solved. The
blocks T_ji are read straight out of the packed matrix: one that is strictly below its diagonal is all L, one
above it all U, and nothing else is touched.

Two orders serve everything. L is solved from its first block on, U from its last. Transposed, Uᵀ is lower and
comes first, Lᵀ upper; so inverse and gradient are both an ascending pass and then a descending one, over
the same tiles read with rows and columns exchanged.

Where the rows of a program are meanwhile. Small ones stay in registers, as a tuple of blocks; for longer ones
the blocks solved so far are in the output itself (or in a float32 scratch where that would not hold them),
which is the program's own and stays in the caches.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lunet_fast.kernels import tiles
from lunet_fast.kernels.activation import Activation, load_family, located_inverse, log2_phi_derivative
from lunet_fast.kernels.launch import (
    Prepared,
    check_parameter,
    check_precision,
    dot,
    load_row,
    load_tile,
    store_tile,
)
from lunet_fast.kernels.leaky_softplus import LN2
from lunet_fast.kernels.matrix import check_packed, diagonal, log_diagonal, permuted

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
            total += log_diagonal(lu_ptr, start + tl.arange(0, 256), D)
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
            reciprocal /= diagonal(lu_ptr, sign_ptr, start + span, D)
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
    right, inverse_ptr, j, size, TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr
):
    """Rows r T_jj⁻ᵀ, or r T_jj⁻¹, of whose BLOCK rows and columns ``size`` are read."""
    inner = tl.arange(0, BLOCK)[:, None]
    outer = tl.arange(0, BLOCK)[None, :]
    offsets = inner * BLOCK + outer if TRANSPOSED else outer * BLOCK + inner
    ptrs = inverse_ptr + j * BLOCK * BLOCK + offsets
    inverse = tl.load(ptrs, mask=(inner < size) & (outer < size), other=0.0)
    return tl.dot(right, inverse, input_precision=PRECISION)


@triton.jit
def _substitute(
    parts,
    lu_ptr,  # [D, D]
    inverse_ptr,  # [BLOCKS, BLOCK, BLOCK], of the diagonal blocks of L, or of U
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
                known = dot(done[index], coupling, known, PRECISION)
            right -= known
        solution = _solve_diagonal(right, inverse_ptr, j, D - j * BLOCK, TRANSPOSED, PRECISION, BLOCK)
        if DESCENDING:
            done = (solution,) + done
        else:
            done = done + (solution,)
    return done


@triton.jit
def solve_held(
    parts,
    lu_ptr,  # [D, D]
    inverses_ptr,  # [2, BLOCKS, BLOCK, BLOCK], of the diagonal blocks of L and of U
    D,
    TRANSPOSED: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """U⁻¹ L⁻¹ r, or L⁻ᵀ U⁻ᵀ r, of rows held as blocks [ROWS, BLOCK]."""
    upper_ptr = inverses_ptr + BLOCKS * BLOCK * BLOCK
    first_ptr = upper_ptr if TRANSPOSED else inverses_ptr
    last_ptr = inverses_ptr if TRANSPOSED else upper_ptr
    parts = _substitute(parts, lu_ptr, first_ptr, D, False, TRANSPOSED, PRECISION, ROWS, BLOCK, BLOCKS)
    return _substitute(parts, lu_ptr, last_ptr, D, True, TRANSPOSED, PRECISION, ROWS, BLOCK, BLOCKS)


@triton.jit
def solve_block(
    right,
    solved_ptr,
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
    """Block j of the solution, from its right side and the columns low…high of the rows solved before.

    It goes beside them, and is seen there by every thread; what they still read there is waited for.
    """
    known = tl.zeros([ROWS, BLOCK], tl.float32)
    for k in range(low, high, INNER):
        solved = load_tile(solved_ptr, k, here, D, ROWS, INNER)
        coupling = _coupling(lu_ptr, k, j * BLOCK, D, TRANSPOSED, INNER, BLOCK)
        known = dot(solved, coupling, known, PRECISION)
    solution = _solve_diagonal(right - known, inverse_ptr, j, BLOCK, TRANSPOSED, PRECISION, BLOCK)
    tl.debug_barrier()
    store_tile(solved_ptr, solution, j * BLOCK, here, D, ROWS, BLOCK)
    tl.debug_barrier()
    return solution


@triton.jit
def solve_descending(
    there,
    solved_ptr,
    lu_ptr,
    inverse_ptr,
    j,
    here,
    D,
    TRANSPOSED: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    INNER: tl.constexpr,
):
    """Block j of a pass from the last block to the first, whose right side stands where the solution goes,
    or is zero but for the rows ``there``."""
    return solve_block(
        load_tile(solved_ptr, j * BLOCK, there, D, ROWS, BLOCK),
        *(solved_ptr, lu_ptr, inverse_ptr, j, (j + 1) * BLOCK, D, here, D),
        *(TRANSPOSED, PRECISION, ROWS, BLOCK, INNER),
    )


# --- the inverse ----------------------------------------------------------------------------------------


@triton.jit
def _right_side(
    y_ptr,
    h_ptr,
    bias_ptr,
    permutation_ptr,
    activation,
    total,
    member,
    j,
    here,
    D,
    LOGABSDET: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Block j of P(φ⁻¹(y) − b), zero where there is nothing, and total [ROWS] + its columns' Σ log φ′."""
    source = permuted(permutation_ptr, j * BLOCK + tl.arange(0, BLOCK), D)
    valid = here & (source[None, :] < D)
    offsets = tl.arange(0, ROWS)[:, None] * D + source[None, :]
    right = tl.load(y_ptr + offsets, mask=valid, other=0.0).to(tl.float32)
    if activation.ACTIVE:
        family = load_family(activation, 0, source, D)
        at = located_inverse(right, family, activation)
        right = at[0]
        if h_ptr is not None:
            tl.store(h_ptr + offsets, right.to(h_ptr.dtype.element_ty), mask=valid)
        if LOGABSDET:
            logs = tl.where(valid, log2_phi_derivative(at, family, activation), 0.0)
            total += tl.sum(logs, 1) * LN2
    if bias_ptr is not None:
        right -= load_row(bias_ptr + member * D, source, D)
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
    activation,
    N,
    D,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    INNER: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """ROWS rows of one member: h = φ⁻¹(y), P(h − b), L⁻¹, U⁻¹; −log|det W| − Σ log φ′(h).

    BLOCKS blocks of a row are held in registers; 0: any number, in memory. Nothing is done where the
    condition is within the limit: x comes from the product with W⁻¹.
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
    lu_ptr += member * D * D
    inverses_ptr += member * 2 * blocks * BLOCK * BLOCK
    total = tl.zeros([ROWS], tl.float32)
    if BLOCKS > 0:
        parts = ()
        for j in tl.static_range(BLOCKS):
            right, total = _right_side(
                *(y_ptr, h_ptr, bias_ptr, permutation_ptr, activation, total, member, j, here, D),
                *(logabsdet_ptr is not None, ROWS, BLOCK),
            )
            parts = parts + (right,)
        parts = solve_held(parts, lu_ptr, inverses_ptr, D, False, PRECISION, ROWS, BLOCK, BLOCKS)
        for j in tl.static_range(BLOCKS):
            store_tile(x_ptr, parts[j], j * BLOCK, here, D, ROWS, BLOCK)
    else:
        solved_ptr = x_ptr if running_ptr is None else running_ptr + first_row * D
        for j in range(blocks):
            right, total = _right_side(
                *(y_ptr, h_ptr, bias_ptr, permutation_ptr, activation, total, member, j, here, D),
                *(logabsdet_ptr is not None, ROWS, BLOCK),
            )
            solve_block(
                *(right, solved_ptr, lu_ptr, inverses_ptr, j, 0, j * BLOCK, here, D),
                *(False, PRECISION, ROWS, BLOCK, INNER),
            )
        upper_ptr = inverses_ptr + blocks * BLOCK * BLOCK
        for step in range(blocks):
            j = blocks - 1 - step
            part = solve_descending(
                *(here, solved_ptr, lu_ptr, upper_ptr, j, here, D),
                *(False, PRECISION, ROWS, BLOCK, INNER),
            )
            if running_ptr is not None:
                store_tile(x_ptr, part, j * BLOCK, here, D, ROWS, BLOCK)
    if logabsdet_ptr is not None:
        if constant_ptr is not None:
            total += tl.load(constant_ptr + member)
        tl.store(logabsdet_ptr + first_row + rows, -total, mask=rows < N - first)


# --- launchers ------------------------------------------------------------------------------------------


class InvertBlocks:
    """``invert_blocks`` as a function of ``lu`` alone."""

    def __init__(self, lu: Tensor, sign: Tensor | None, *, block: int) -> None:
        check_packed(lu, sign, None)
        if block < 16 or block & (block - 1):
            raise ValueError(f"block must be a power of two, 16 or more, got {block}")
        K, D = lu.shape[:2]
        blocks = tiles.ceil_div(D, block)
        self._shape, self._grid = (K, 2, blocks, block, block), (2 * blocks + 1, K, 1)
        tile = tiles.Tile(block, block, 0, 1 if block <= 32 else 4, 1)
        arguments = {"sign_ptr": sign, "D": D, "BLOCK": block}
        varying = ("lu_ptr", "inverses_ptr", "logabsdet_ptr")
        self._launch = Prepared(invert_blocks_kernel, tile, arguments, varying)

    def __call__(self, lu: Tensor) -> tuple[Tensor, Tensor]:
        """Of one of the same shape and dtype, contiguous."""
        inverses = torch.empty(self._shape, dtype=torch.float32, device=lu.device)
        logabsdet = torch.empty(len(lu), dtype=torch.float32, device=lu.device)
        self._launch(self._grid, lu, inverses, logabsdet)
        return inverses, logabsdet


def invert_blocks(lu: Tensor, sign: Tensor | None, *, block: int) -> tuple[Tensor, Tensor]:
    """(inverses [K, 2, ⌈D/block⌉, block, block] of L's and U's diagonal blocks, log|det W| [K]), float32.

    ``lu`` [K, D, D] is packed, float32 or bfloat16; ``sign`` [K, D], or None for +1; ``block`` is a power of
    two, 16 or more. Beyond D the blocks are those of the identity. Substitution in float32, one launch.
    """
    return InvertBlocks(lu, sign, block=block)(lu)


class Substitution:
    """x ← U⁻¹ L⁻¹ P (φ⁻¹(y) − b), h ← φ⁻¹(y), ``total`` ← −log|det W| − Σ log φ′(h), for layers of one kind.

    Arguments as those of ``inverse.layer_inverse``, which checks them all but ``lu`` and ``inverses``.
    """

    def __init__(
        self, rows: Tensor, activation: Activation, precision: str, *, permutation: Tensor | None
    ) -> None:
        """For ``rows`` of this D, dtype and device."""
        D = rows.shape[-1]
        self._tile = tile = tiles.substitution_tile(D, precision, tiles.architecture(rows))
        self._permutation = permutation
        arguments = {"permutation_ptr": permutation, "activation": activation, "D": D, "PRECISION": precision}
        varying = ("y_ptr", "lu_ptr", "inverses_ptr", "bias_ptr", "x_ptr", "running_ptr", "h_ptr")
        self._launch = Prepared(
            layer_inv_kernel,
            tile,
            {**arguments, **tile.triangle, "BLOCKS": blocks_held(tile, D)},
            (*varying, "logabsdet_ptr", "constant_ptr", "condition_ptr", "N"),
        )

    def __call__(
        self,
        y: Tensor,
        lu: Tensor,
        inverses: Tensor,
        bias: Tensor | None,
        x: Tensor,
        h: Tensor | None,
        total: Tensor | None,
        *,
        constant: Tensor | None,
        condition: Tensor | None,
    ) -> None:
        K, N, D = y.shape
        check_factors(lu, inverses, self._permutation, K, D)
        self._launch(
            (tiles.ceil_div(N, self._tile.rows), K, 1),
            *(y, lu, inverses, bias, x, running(x, self._tile), h, total, constant, condition, N),
        )


def at_least_tf32x3(precision: str) -> str:
    """Substitution and inverses amplify rounding by the condition: tf32's would be all that is left."""
    check_precision(precision)
    return "tf32x3" if precision == "tf32" else precision


def check_factors(lu: Tensor, inverses: Tensor, permutation: Tensor | None, K: int, D: int) -> None:
    """Refuse factors that are not those of K matrices of D×D, and inverses not from ``invert_blocks``."""
    check_packed(lu, None, permutation)
    check_parameter("lu", lu, (K, D, D))
    block = tiles.substitution_block(D)
    check_parameter("inverses", inverses, (K, 2, tiles.ceil_div(D, block), block, block), torch.float32)


def blocks_held(tile: tiles.Tile, D: int) -> int:
    """Blocks of a row that a program keeps in registers; 0 for none."""
    return 0 if tile.inner else tiles.ceil_div(D, tile.columns)


def running(out: Tensor, tile: tiles.Tile, scattered: bool = False) -> Tensor | None:
    """Memory for the blocks solved so far where ``out`` cannot hold them."""
    if not tile.inner or (out.dtype == torch.float32 and not scattered):
        return None
    return torch.empty_like(out, dtype=torch.float32)

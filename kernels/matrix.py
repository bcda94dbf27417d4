# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False
"""The packed matrix: W = Pᵀ L U from its one square of numbers, and its gradient back into that square.

``lu`` [D, D] holds L strictly below its diagonal, U strictly above it, and on it s with
u_ii = sign_i·exp(s_i). Triangles are cut out as blocks are loaded: no dense L or U is ever written, blocks
that are zero are not loaded, and a launch replaces the eight that tril, triu, exp and products take.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lunet_fast.kernels import tiles
from lunet_fast.kernels.launch import Prepared, check_parameter, launch

#: |s_i| beyond this counts as this, so that exp(s_i) and exp(−s_i) are normal, finite numbers. Of both dtypes
#: that the kernels take, and the same as ``lunet_fast.ops.precision.LOG_DIAGONAL_BOUND``.
LOG_DIAGONAL_BOUND: tl.constexpr = tl.constexpr(80.0)


@triton.jit
def log_diagonal(lu_ptr, i, D):
    """log|u_ii| of rows i, clamped; 0 beyond D. NaN stays NaN."""
    s = tl.load(lu_ptr + i * (D + 1), mask=i < D, other=0.0).to(tl.float32)
    s = tl.where(s < -LOG_DIAGONAL_BOUND, -LOG_DIAGONAL_BOUND, s)
    return tl.where(s > LOG_DIAGONAL_BOUND, LOG_DIAGONAL_BOUND, s)


@triton.jit
def _exp(s):
    """exp(s) for |s| ≤ 80, to rounding: ``tl.exp`` on a GPU is 2^(s·log₂e) with s·log₂e rounded first."""
    n = tl.floor(s * 1.4426950408889634 + 0.5)
    # n·0.693359375 is exact; the two constants make log 2 to 12 digits.
    rest = (s - n * 0.693359375) + n * 2.12194440e-4
    return tl.exp2(rest * 1.4426950408889634) * tl.exp2(n)


@triton.jit
def diagonal(lu_ptr, sign_ptr, i, D):
    """u_ii of rows i; 1 beyond D."""
    u = _exp(log_diagonal(lu_ptr, i, D))
    if sign_ptr is not None:
        u *= tl.load(sign_ptr + i, mask=i < D, other=1.0).to(tl.float32)
    return u


@triton.jit
def permuted(permutation_ptr, i, D):
    """Where P has rows i of L U from: permutation[i], or i itself without one; D or more beyond D."""
    if permutation_ptr is not None:
        i = tl.load(permutation_ptr + i, mask=i < D, other=D).to(tl.int32)
    return i


@triton.jit
def lower_tile(lu_ptr, i, k, D):
    """L[i, k] for index tiles that broadcast to a tile, in either orientation; 0 beyond D."""
    below = tl.load(lu_ptr + i * D + k, mask=(k < i) & (i < D), other=0.0).to(tl.float32)
    return tl.where((i == k) & (i < D), 1.0, below)


@triton.jit
def upper_tile(lu_ptr, u, i, k, D):
    """U[i, k] for index tiles that broadcast to a tile, in either orientation; 0 beyond D.

    u holds U's diagonal along i or along k.
    """
    above = tl.load(lu_ptr + i * D + k, mask=(i < k) & (k < D), other=0.0).to(tl.float32)
    return tl.where((i == k) & (i < D), u, above)


@triton.jit
def compose_kernel(
    lu_ptr,  # [K, D, D]
    sign_ptr,  # [K, D], or None
    permutation_ptr,  # [D] int64, or None
    weight_ptr,  # [K, D, D]
    logabsdet_ptr,  # [K] float32
    D,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """W = Pᵀ L U, tile by tile, and log|det W|. Row i of L U is row permutation[i] of W."""
    blocks = tl.cdiv(D, BLOCK)
    block_i = tl.program_id(0) // blocks
    block_j = tl.program_id(0) % blocks
    member = tl.program_id(1).to(tl.int64)
    lu_ptr += member * D * D
    if sign_ptr is not None:
        sign_ptr += member * D
    span = tl.arange(0, BLOCK)
    i = block_i * BLOCK + span
    j = block_j * BLOCK + span
    u = diagonal(lu_ptr, sign_ptr, j, D)[None, :]
    weight = tl.zeros([BLOCK, BLOCK], tl.float32)
    for block_k in range(tl.minimum(block_i, block_j) + 1):
        k = block_k * BLOCK + span
        lower = lower_tile(lu_ptr, i[:, None], k[None, :], D)
        upper = upper_tile(lu_ptr, u, k[:, None], j[None, :], D)
        weight = tl.dot(lower, upper, weight, input_precision=PRECISION)
    row = permuted(permutation_ptr, i, D)
    weight_ptr += member * D * D
    inside = (i[:, None] < D) & (j[None, :] < D)
    tl.store(
        weight_ptr + (row[:, None] * D + j[None, :]), weight.to(weight_ptr.dtype.element_ty), mask=inside
    )
    if tl.program_id(0) == 0:
        total = tl.zeros([BLOCK], tl.float32)
        for start in range(0, D, BLOCK):
            total += log_diagonal(lu_ptr, start + span, D)
        tl.store(logabsdet_ptr + member, tl.sum(total, 0))


@triton.jit
def compose_bwd_kernel(
    grad_weight_ptr,  # [K, D, D] float32
    grad_logabsdet_ptr,  # [K] float32, or None
    lu_ptr,  # [K, D, D]
    sign_ptr,  # [K, D], or None
    permutation_ptr,  # [D] int64, or None
    grad_lu_ptr,  # [K, D, D]
    D,
    DIRECTION: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """tril(G Uᵀ, −1) + triu(Lᵀ G) with G = P·grad_W, times DIRECTION; the diagonal's is that of s.

    Blocks below the diagonal take the first product only, blocks above it the second, and each starts
    where its triangle does.
    """
    blocks = tl.cdiv(D, BLOCK)
    block_i = tl.program_id(0) // blocks
    block_j = tl.program_id(0) % blocks
    member = tl.program_id(1).to(tl.int64)
    lu_ptr += member * D * D
    grad_weight_ptr += member * D * D
    if sign_ptr is not None:
        sign_ptr += member * D
    span = tl.arange(0, BLOCK)
    i = block_i * BLOCK + span
    j = block_j * BLOCK + span
    u = diagonal(lu_ptr, sign_ptr, j, D)[None, :]

    below = tl.zeros([BLOCK, BLOCK], tl.float32)
    if block_i >= block_j:
        row = permuted(permutation_ptr, i, D)
        for block_k in range(block_j, blocks):
            k = block_k * BLOCK + span
            inside = (i[:, None] < D) & (k[None, :] < D)
            grad = tl.load(grad_weight_ptr + (row[:, None] * D + k[None, :]), mask=inside, other=0.0)
            upper = upper_tile(lu_ptr, u, j[None, :], k[:, None], D)  # Uᵀ
            below = tl.dot(grad, upper, below, input_precision=PRECISION)
    above = tl.zeros([BLOCK, BLOCK], tl.float32)
    if block_i <= block_j:
        for block_k in range(block_i, blocks):
            k = block_k * BLOCK + span
            row = permuted(permutation_ptr, k, D)
            inside = (k[:, None] < D) & (j[None, :] < D)
            grad = tl.load(grad_weight_ptr + (row[:, None] * D + j[None, :]), mask=inside, other=0.0)
            lower = lower_tile(lu_ptr, k[None, :], i[:, None], D)  # Lᵀ
            above = tl.dot(lower, grad, above, input_precision=PRECISION)

    # On the diagonal: du_ii/ds_i = u_ii, the log-determinant's share, and nothing where s_i was clamped.
    on_diagonal = above * u
    if grad_logabsdet_ptr is not None:
        on_diagonal += tl.load(grad_logabsdet_ptr + member)
    s = tl.load(lu_ptr + j * (D + 1), mask=j < D, other=0.0).to(tl.float32)
    on_diagonal = tl.where((tl.abs(s) > LOG_DIAGONAL_BOUND)[None, :], 0.0, on_diagonal)
    grad = tl.where(i[:, None] > j[None, :], below, tl.where(i[:, None] < j[None, :], above, on_diagonal))
    if DIRECTION < 0:
        grad = -grad
    inside = (i[:, None] < D) & (j[None, :] < D)
    grad_lu_ptr += member * D * D
    tl.store(grad_lu_ptr + (i[:, None] * D + j[None, :]), grad.to(grad_lu_ptr.dtype.element_ty), mask=inside)


#: What a grid's second axis can count, and what 32 bits can of D².
LARGEST_K, LARGEST_D = 65_535, 46_340


def check_packed(lu: Tensor, sign: Tensor | None, permutation: Tensor | None) -> None:
    """Refuse a packed matrix that the kernels do not address."""
    shape = lu.shape
    if len(shape) != 3 or shape[1] != shape[2] or shape[1] == 0 or not lu.is_contiguous():
        raise ValueError(f"lu must be contiguous [K, D, D] with D ≥ 1, got {list(shape)}")
    if lu.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"lu must be float32 or bfloat16, got {lu.dtype}")
    if shape[0] > LARGEST_K or shape[1] > LARGEST_D:
        raise ValueError(
            f"lu must be at most {LARGEST_K} layers of {LARGEST_D} features in one launch, got "
            f"{list(shape)}; set the backend to 'reference' for more"
        )
    check_parameter("sign", sign, shape[:2])
    check_parameter("permutation", permutation, shape[2:], torch.int64)
    if permutation is not None and lu.shape[0] != 1:
        raise ValueError(f"permutation must be None for stacked layers, of which there are {lu.shape[0]}")


class Compose:
    """``compose`` as a function of ``lu`` alone."""

    def __init__(
        self, lu: Tensor, sign: Tensor | None, permutation: Tensor | None, dtype: torch.dtype
    ) -> None:
        check_packed(lu, sign, permutation)
        self._dtype, D = dtype, lu.shape[-1]
        tile = tiles.matrix_tile(D, tiles.architecture(lu))
        self._grid = (tiles.ceil_div(D, tile.rows) ** 2, lu.shape[0], 1)
        arguments: dict[str, Any] = {
            "sign_ptr": sign,
            "permutation_ptr": permutation,
            "D": D,
            "BLOCK": tile.rows,
        }
        arguments["PRECISION"] = tiles.MATRIX_PRECISION
        varying = ("lu_ptr", "weight_ptr", "logabsdet_ptr")
        self._launch = Prepared(compose_kernel, tile, arguments, varying)

    def __call__(self, lu: Tensor) -> tuple[Tensor, Tensor]:
        """Of one of the same shape and dtype, contiguous."""
        weight = torch.empty_like(lu, dtype=self._dtype)
        logabsdet = torch.empty(len(lu), dtype=torch.float32, device=lu.device)
        self._launch(self._grid, lu, weight, logabsdet)
        return weight, logabsdet


def compose(
    lu: Tensor, sign: Tensor | None, permutation: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(W = Pᵀ L U [K, D, D] in ``dtype``, log|det W| [K] float32) of packed ``lu`` [K, D, D].

    ``sign`` [K, D] or None for +1; ``permutation`` [D] int64 or None, with K = 1 only. Formed with
    float32's accuracy in 2·D³/3 flops; one launch.
    """
    return Compose(lu, sign, permutation, dtype)(lu)


def compose_backward(
    grad_weight: Tensor,
    grad_logabsdet: Tensor | None,
    lu: Tensor,
    sign: Tensor | None,
    permutation: Tensor | None,
    *,
    direction: int = 1,
) -> Tensor:
    """The gradient of ``lu`` [K, D, D], in its dtype, from those of W [K, D, D] and log|det W| [K], float32.

    direction = −1 negates it: the gradient through W⁻¹ is minus the one through W. 4·D³/3 flops, one launch.
    """
    check_packed(lu, sign, permutation)
    K, D = lu.shape[:2]
    check_parameter("grad_weight", grad_weight, (K, D, D), torch.float32)
    check_parameter("grad_logabsdet", grad_logabsdet, (K,), torch.float32)
    grad_lu = torch.empty_like(lu)
    tile = tiles.matrix_tile(D, tiles.architecture(lu))
    launch(
        *(compose_bwd_kernel, (tiles.ceil_div(D, tile.rows) ** 2, K), tile),
        *(grad_weight, grad_logabsdet, lu, sign, permutation, grad_lu),
        D=D,
        DIRECTION=direction,
        PRECISION=tiles.MATRIX_PRECISION,
        BLOCK=tile.rows,
    )
    return grad_lu

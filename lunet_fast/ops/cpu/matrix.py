"""The packed matrix of a layer: formed, multiplied with, solved with, and its gradient.

Why two ways through the matrix. With more rows than columns, W = L U is formed once and one product
does the work of two (2·N·D² flops). With fewer, forming W (2·D³/3) would cost more than it saves and the
rows go through U and then L, panel by panel, straight out of the packed matrix: no D×D copy is made, so
a single row costs one pass over the D² numbers, as in a plain linear layer. Small layers with gradients
copy both factors once instead, for forward and backward, and so does a substitution of many rows with U.

Why blocks. Triangular matrices are worked on in panels of ``BLOCK`` columns, so that the half that is
zero costs nothing and nearly all the work is matrix products.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from lunet_fast.ops.reference import log_diagonal
from lunet_fast.ops.values import Matrix

#: Columns in a panel of a triangular matrix.
BLOCK = 128

#: Columns up to which L and U are multiplied as dense matrices: panels save flops there, and cost calls.
DENSE = 256

#: Rows that are so few that a copy of U costs as much as a product or a solution with it, and the columns of
#: the blocks in which it is copied there, and of the panels: calls cost more than the zeros in them.
FEW_ROWS, FEW_ROWS_BLOCK = 32, 256

#: κ₁(L)·κ₁(U), or κ₁(A) where A⁻¹ was formed in more digits, up to which a product with the explicit A⁻¹ is
#: as accurate as substitution for our use.
EXPLICIT_INVERSE_LIMIT = 1e3


def _unit_lower(lu: Tensor) -> Tensor:
    """L [..., D, D], dense, its unit diagonal written out."""
    lower = lu.tril(-1)
    lower.diagonal(dim1=-2, dim2=-1).fill_(1.0)
    return lower


def _upper(lu: Tensor, diagonal: Tensor) -> Tensor:
    """U [..., D, D], dense, with this diagonal [..., D]."""
    upper = lu.triu(1)
    upper.diagonal(dim1=-2, dim2=-1).copy_(diagonal)
    return upper


class Packed(NamedTuple):
    """``lu`` [D, D] as float32 or wider, log|u_ii| [D], U's diagonal [D], the row permutation or None."""

    lu: Tensor
    log_diagonal: Tensor
    diagonal: Tensor
    permutation: Tensor | None

    @classmethod
    def of(cls, matrix: Matrix) -> Packed:
        logs = log_diagonal(matrix.lu)
        diagonal = logs.exp()
        if matrix.sign is not None:
            diagonal.mul_(matrix.sign)
        return cls(matrix.lu.to(diagonal.dtype), logs, diagonal, matrix.permutation)

    @property
    def size(self) -> int:
        return self.lu.shape[0]

    def panels(self, width: int = 0) -> Iterator[slice]:
        """Columns in panels of ``width``, or of BLOCK."""
        width = width or BLOCK
        for start in range(0, self.size, width):
            yield slice(start, min(start + width, self.size))

    def lower_block(self, panel: slice) -> Tensor:
        """The diagonal block of L in this panel, dense."""
        return _unit_lower(self.lu[panel, panel])

    def upper_block(self, panel: slice) -> Tensor:
        """The diagonal block of U in this panel, dense."""
        return _upper(self.lu[panel, panel], self.diagonal[panel])

    def lower_panel(self, panel: slice) -> Tensor:
        """L[panel.start:, panel], a copy."""
        if panel.stop == self.size:
            return self.lower_block(panel)
        return torch.cat([self.lower_block(panel), self.lu[panel.stop :, panel]])

    def upper_panel(self, panel: slice) -> Tensor:
        """U[panel, panel.start:], a copy."""
        if panel.stop == self.size:
            return self.upper_block(panel)
        return torch.cat([self.upper_block(panel), self.lu[panel, panel.stop :]], dim=1)


def composes(rows: int, columns: int) -> bool:
    """Whether a batch of ``rows`` goes through W = L U formed once, or through U and then L.

    A single column always does: it mixes nothing, and a product with L − I = 0 would make NaN of infinity.
    """
    return rows > columns or columns == 1


def compose(packed: Packed) -> Tensor:
    """A = Pᵀ L U [D, D], about 2·D³/3 flops."""
    if packed.size <= DENSE:
        return compose_dense(packed)
    first, *rest = packed.panels()
    weight = packed.lower_panel(first) @ packed.upper_panel(first)
    for panel in rest:
        weight[panel.start :, panel.start :].addmm_(packed.lower_panel(panel), packed.upper_panel(panel))
    if packed.permutation is not None:
        weight = weight[packed.permutation.argsort()]
    return weight


def compose_dense(packed: Packed) -> Tensor:
    """A of one layer or of stacked ones, [..., D, D], as U + (L − I) U: L's diagonal need not be written."""
    upper, below = _upper(packed.lu, packed.diagonal), packed.lu.tril(-1)
    if packed.lu.dim() == 3:
        return torch.baddbmm(upper, below, upper)
    weight = torch.addmm(upper, below, upper)
    return weight if packed.permutation is None else weight[packed.permutation.argsort()]


def compose_dense_backward(grad_weight: Tensor, packed: Packed) -> Tensor:
    """``compose_backward`` of ``compose_dense``."""
    return by_factors(grad_weight, _upper(packed.lu, packed.diagonal), packed.lu.tril(-1))


def by_factors(grad_weight: Tensor, upper: Tensor, below: Tensor) -> Tensor:
    """tril(G Uᵀ, −1) + triu(G + (L − I)ᵀ G) [..., D, D] from U and L − I."""
    by_lower = (grad_weight @ upper.mT).tril_(-1)
    add_product = torch.addmm if upper.dim() == 2 else torch.baddbmm
    return by_lower.add_(add_product(grad_weight, below.mT, grad_weight).triu_())


def compose_backward(grad_weight: Tensor, packed: Packed) -> Tensor:
    """The gradient of ``lu`` with U's diagonal in place of s, from that of A: tril(G Uᵀ, −1) + triu(Lᵀ G)."""
    if packed.permutation is not None:
        grad_weight = grad_weight[packed.permutation]
    if packed.size <= DENSE:
        return compose_dense_backward(grad_weight, packed)
    grad = torch.empty_like(packed.lu)
    for panel in packed.panels():
        lower, upper = packed.lower_panel(panel), packed.upper_panel(panel)
        corner = grad_weight[panel.start :, panel.start :]
        by_lower = corner @ upper.T
        by_upper = lower.T @ corner
        width = panel.stop - panel.start
        grad[panel, panel] = by_lower[:width].tril_(-1).add_(by_upper[:, :width].triu_())
        grad[panel.stop :, panel] = by_lower[width:]
        grad[panel, panel.stop :] = by_upper[:, width:]
    return grad


def _panel_width(rows: int) -> int:
    return FEW_ROWS_BLOCK if rows <= FEW_ROWS else BLOCK


def rows_backward(grad_v: Tensor, t: Tensor, grad_t: Tensor, x: Tensor, packed: Packed) -> Tensor:
    """The gradient of ``lu`` (U's diagonal in place of s) from the rows themselves, 2·N·D² flops.

    v = L t, t = U x, so g_L = tril(g_vᵀ t, −1) and g_U = triu(g_tᵀ x).
    """
    grad = torch.empty_like(packed.lu)
    for panel in packed.panels(_panel_width(len(x))):
        v, g_t = grad_v[:, panel.start :].T, grad_t[:, panel].T
        # Straight into the columns under the diagonal and, where the blocks of both meet, over U's share.
        torch.mm(v, t[:, panel], out=grad[panel.start :, panel])
        by_upper = torch.mm(g_t, x[:, panel]).triu_()
        grad[panel, panel].tril_(-1).add_(by_upper)
        if panel.stop < packed.size:
            torch.mm(g_t, x[:, panel.stop :], out=grad[panel, panel.stop :])
    return grad


def times(x: Tensor, packed: Packed, *, upper: bool, transposed: bool) -> Tensor:
    """Rows of T x or, transposed, Tᵀ x, for T = L or U: N·D² flops and up."""
    out = x * packed.diagonal if upper else x.clone()
    for panel in packed.panels(_panel_width(len(x))):
        block = packed.lu[panel, panel].triu(1) if upper else packed.lu[panel, panel].tril(-1)
        part = out[:, panel].addmm_(x[:, panel], block if transposed else block.T)
        beside = slice(panel.stop, packed.size) if upper != transposed else slice(0, panel.start)
        if beside.stop > beside.start:
            couple = packed.lu[beside, panel] if transposed else packed.lu[panel, beside].T
            part.addmm_(x[:, beside], couple)
    return out


# --- triangular solves ----------------------------------------------------------------------------------


def _invert_triangular(block: Tensor, *, upper: bool) -> Tensor:
    """T⁻¹ [..., D, D] of triangles T, solved for as X T = I: in float32 half the time of T X = I at D 64."""
    eye = torch.eye(block.shape[-1], dtype=block.dtype, device=block.device).expand_as(block)
    return torch.linalg.solve_triangular(block, eye, upper=upper, left=False)


def _substitute(right: Tensor, packed: Packed, *, upper: bool, transposed: bool) -> Tensor:
    """Rows of T⁻¹ r or, transposed, T⁻ᵀ r, for T = L or U, by LAPACK: N·D² flops.

    L is solved with as it is stored, for its unit diagonal is not read. For a few rows a copy of U costs as
    much as the solution; there only the blocks on its diagonal are copied, ``FEW_ROWS_BLOCK`` columns each.
    """
    if not upper:
        return _solve_rows(packed.lu, right, upper=False, transposed=transposed, unit=True)
    if right.shape[0] > FEW_ROWS or packed.size <= FEW_ROWS_BLOCK:
        triangle = _upper(packed.lu, packed.diagonal)
        return _solve_rows(triangle, right, upper=True, transposed=transposed)
    solved = right.clone()
    panels = list(packed.panels(FEW_ROWS_BLOCK))
    for panel in panels if transposed else reversed(panels):
        done = slice(0, panel.start) if transposed else slice(panel.stop, packed.size)
        part = solved[:, panel]
        if done.stop > done.start:
            couple = packed.lu[done, panel] if transposed else packed.lu[panel, done].T
            part.addmm_(solved[:, done], couple, alpha=-1)
        part.copy_(_solve_rows(packed.upper_block(panel), part, upper=True, transposed=transposed))
    return solved


def _solve_rows(
    triangle: Tensor, right: Tensor, *, upper: bool, transposed: bool, unit: bool = False
) -> Tensor:
    """Rows of T⁻¹ r or T⁻ᵀ r by LAPACK; with ``unit`` the diagonal and the other triangle are not read."""
    matrix, up = (triangle.T, not upper) if transposed else (triangle, upper)
    # As columns: LAPACK writes columns one after another, which are the rows of what is returned.
    solved = torch.linalg.solve_triangular(matrix, right.T, upper=up, unitriangular=unit)
    return solved.T.contiguous()


def inverse_of_factors(lower: Tensor, upper: Tensor) -> Tensor | None:
    """U⁻¹ L⁻¹ [..., D, D] of factors [..., D, D]; None where κ₁(L)·κ₁(U) of one is too large, or NaN."""
    lower_inverse = _invert_triangular(lower, upper=False)
    upper_inverse = _invert_triangular(upper, upper=True)
    condition = lower.new_ones(())
    for matrix in (lower, upper, lower_inverse, upper_inverse):
        condition = condition * _norm(matrix)
    if not float(condition.amax()) <= EXPLICIT_INVERSE_LIMIT:
        return None
    return upper_inverse @ lower_inverse


def least_rows_for_inverse(size: int) -> int:
    """Rows [N, D] from which on A⁻¹ [D, D] is worth its D³: LAPACK's substitution is slower than a product
    for thousands of rows alone."""
    return max(2048, (4 if size <= 2 * BLOCK else 10) * size)


def explicit_inverse(packed: Packed, rows: int) -> Tensor | None:
    """(L U)⁻¹ [D, D] by triangular inversion, or None where substitution is better.

    Worth its D³ only for many more rows than columns; refused when κ₁(L)·κ₁(U) says that it would cost
    accuracy. Never on a device where reading the condition back would stall the queue.
    """
    if packed.lu.device.type != "cpu" or rows < least_rows_for_inverse(packed.size):
        return None
    return inverse_of_factors(_unit_lower(packed.lu), _upper(packed.lu, packed.diagonal))


def dense_inverse(packed: Packed) -> Tensor | None:
    """A⁻¹ = U⁻¹ L⁻¹ P [D, D], to be kept; None where products with it would not be accurate.

    Formed in float64, so that of κ₁(L)·κ₁(U), which grows with D for factors of a given size, nothing is
    left in it: what A⁻¹'s own rounding costs is κ₁(A) alone, and that is what is bounded. Factors that are
    float64 themselves have no wider type, and are bounded by κ₁(L)·κ₁(U). Waits for the device."""
    lower, upper = _unit_lower(packed.lu), _upper(packed.lu, packed.diagonal)
    if packed.lu.dtype == torch.float64:
        inverse = inverse_of_factors(lower, upper)
    else:
        lower, upper = lower.double(), upper.double()
        right = _invert_triangular(lower, upper=False)
        inverse = torch.linalg.solve_triangular(upper, right, upper=True)
        condition = _norm(lower @ upper) * _norm(inverse)
        inverse = inverse.to(packed.lu.dtype) if float(condition) <= EXPLICIT_INVERSE_LIMIT else None
    if inverse is None or packed.permutation is None:
        return inverse
    return inverse[:, packed.permutation.argsort()]


def _norm(matrix: Tensor) -> Tensor:
    """‖T‖₁ [...] of T [..., D, D]; ``matrix_norm`` takes three times as long at D 64."""
    return matrix.abs().sum(-2).amax(-1)


def solve(h: Tensor, packed: Packed, bias: Tensor | None, *, own: bool) -> Tensor:
    """Rows of A⁻¹ (h − b) = U⁻¹ L⁻¹ P (h − b); with ``own``, h is the caller's to be overwritten."""
    inverse = explicit_inverse(packed, h.shape[0])
    if inverse is not None:
        right = permute(h, packed)
        if bias is None:
            return right @ inverse.T
        shift = inverse @ (bias if packed.permutation is None else bias[packed.permutation])
        return torch.addmm(shift, right, inverse.T, beta=-1)
    if bias is not None:
        right = permute(h.sub_(bias) if own else h - bias, packed)
    elif packed.permutation is not None:
        right = permute(h, packed)
    else:
        right = h
    right = _substitute(right, packed, upper=False, transposed=False)
    return _substitute(right, packed, upper=True, transposed=False)


def solve_transposed(grad: Tensor, packed: Packed) -> tuple[Tensor, Tensor | None]:
    """Rows of v = L⁻ᵀ U⁻ᵀ g (so A⁻ᵀ g = Pᵀ v), and of U⁻ᵀ g with rows so few that it is of use."""
    inverse = explicit_inverse(packed, grad.shape[0])
    if inverse is not None:
        return grad @ inverse, None
    middle = _substitute(grad, packed, upper=True, transposed=True)
    solved = _substitute(middle, packed, upper=False, transposed=True)
    return solved, None if composes(*grad.shape) else middle


# --- the permutation ---------------------------------------------------------------------------------------


def unpermute(v: Tensor, packed: Packed) -> Tensor:
    """Rows of Pᵀ v."""
    return v if packed.permutation is None else v[:, packed.permutation.argsort()]


def permute(h: Tensor, packed: Packed) -> Tensor:
    """Rows of P h."""
    return h if packed.permutation is None else h[:, packed.permutation]

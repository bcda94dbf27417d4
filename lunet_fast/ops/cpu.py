"""The operations of LU layers in fast PyTorch, for any device that PyTorch has.

These are the raw computations behind the operations of ``dispatch.py``: no autograd, gradients are computed
by hand. Rows are
the batch: x, y and h are [N, D] and contiguous. ``reference.py`` states the same formulas plainly.

Why two ways through the matrix. With more rows than columns, W = L U is formed once and one product
does the work of two (2·N·D² flops). With fewer, forming W (2·D³/3) would cost more than it saves and the
rows go through U and then L, panel by panel, straight out of the packed matrix: no D×D copy is made, so
a single row costs one pass over the D² numbers, as in a plain linear layer.

Why blocks. Triangular matrices are worked on in panels of ``BLOCK`` columns, so that the half that is
zero costs nothing and nearly all the work is matrix products.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lunet_fast.ops.reference import LOG_DIAGONAL_BOUND, log_diagonal, wide

_softplus_out = torch.ops.aten.softplus.out
_softplus_backward_out = torch.ops.aten.softplus_backward.grad_input
_hardtanh_backward_out = torch.ops.aten.hardtanh_backward.grad_input

#: Columns in a panel of a triangular matrix.
BLOCK = 128

#: Columns up to which L and U are multiplied as dense matrices: panels save flops there, and cost calls.
DENSE = 256

#: The same for so few rows that calls cost more than arithmetic.
FEW_ROWS_BLOCK = 256

#: Elements a thread that one sweep of elementwise work covers before the next begins, so that what one
#: pass writes the next still finds in the cache.
SWEEP = 1 << 18

#: Rows that a matrix product is given at least when done in sweeps: with fewer, its threads wait too often.
PRODUCT_ROWS = 4096

#: Elements that a sweep with a matrix product in it covers at least: fewer cost more in calls than the cache
#: gives back.
PRODUCT_SWEEP = 1 << 20

#: κ₁(L)·κ₁(U) up to which a product with the explicit A⁻¹ is as accurate as substitution for our use.
EXPLICIT_INVERSE_LIMIT = 1e3


# --- activation -----------------------------------------------------------------------------------------


class Family(NamedTuple):
    """(a, c, κ) of φ(x) = a·x + (c/κ)·softplus(κ·x): floats, or tensors that broadcast to [N, D]."""

    a: float | Tensor
    c: float | Tensor
    kappa: float | Tensor

    @classmethod
    def of(cls, slopes: Tensor | None, a: float, c: float, kappa: float, dtype: torch.dtype) -> Family:
        """The family that an op's arguments describe: ``slopes`` if given, else the three floats."""
        if slopes is None:
            return cls(a, c, kappa)
        if slopes.dim() == 1 and slopes.device.type == "cpu":
            return cls(*slopes.tolist())
        return cls(*slopes.to(dtype).unbind(0))

    def scaled(self, slopes: Tensor | None) -> tuple[float, Family]:
        """(c, (a/c, 1, κ/c)): φ(h) is the latter's function of c·h, which takes a pass over memory less.

        (1, the family itself) where there is nothing to gain, as without activation, or where ``slopes`` are
        learnt and their gradients taken.
        """
        a, c, kappa = self
        if slopes is None and c not in (0.0, 1.0):
            return float(c), Family(a / c, 1.0, kappa / c)
        return 1.0, self

    @property
    def linear(self) -> bool:
        """Whether φ is the identity: how an op is told that a layer has no activation."""
        return isinstance(self.c, float) and self.c == 0.0


def _threshold(dtype: torch.dtype) -> float:
    """Where softplus(t) = t to rounding: log1p(exp(−t)) < eps·t."""
    return 40.0 if dtype == torch.float64 else 20.0


def _scale_(t: Tensor, factor: float | Tensor) -> Tensor:
    """t ← factor·t."""
    return t if isinstance(factor, float) and factor == 1.0 else t.mul_(factor)


def _add_scaled_(t: Tensor, factor: float | Tensor, x: Tensor) -> Tensor:
    """t ← t + factor·x."""
    return t.add_(x, alpha=factor) if isinstance(factor, float) else t.addcmul_(x, factor)


def _mix_(t: Tensor, x: Tensor, family: Family) -> Tensor:
    """t ← c·t + a·x. (``lerp_`` is one pass, but takes the difference of the two: NaN for infinities.)"""
    return _add_scaled_(_scale_(t, family.c), family.a, x)


def _sweep_rows(t: Tensor, product: bool) -> int:
    """Rows of t [N, D] in one sweep, with a matrix product or without; all where no cache is to stay in."""
    rows, columns = t.shape
    if t.device.type != "cpu":
        return rows
    if product:
        return max(PRODUCT_ROWS, PRODUCT_SWEEP // max(1, columns))
    return max(1, SWEEP * torch.get_num_threads() // max(1, columns))


def _is_one_sweep(t: Tensor, *, product: bool) -> bool:
    return t.shape[0] <= _sweep_rows(t, product)


def _sweeps(*tensors: Tensor, product: bool = False) -> Iterator[tuple[Tensor, ...]]:
    """The same runs of rows of several tensors of N rows; the first, [N, D], gives their length."""
    step = _sweep_rows(tensors[0], product)
    rows = tensors[0].shape[0]
    if rows <= step:
        yield tensors
        return
    for start in range(0, rows, step):
        yield tuple(t[start : start + step] for t in tensors)


def _sigmoid(h: Tensor, kappa: float | Tensor) -> Tensor:
    """σ(κ·h), in memory of its own."""
    if isinstance(kappa, float) and kappa == 1.0:
        return torch.sigmoid(h)
    return torch.mul(h, kappa).sigmoid_()


def _soft(h: Tensor, kappa: float | Tensor, out: Tensor | None = None) -> Tensor:
    """softplus(κ·h)/κ."""
    threshold = _threshold(h.dtype)
    if isinstance(kappa, float):
        if out is None:
            return F.softplus(h, beta=kappa, threshold=threshold)
        return _softplus_out(h, kappa, threshold, out=out)
    return torch.div(F.softplus(h * kappa, threshold=threshold), kappa, out=out)


def _activate_into(y: Tensor, h: Tensor, family: Family) -> None:
    """y ← φ(h); bfloat16 and float16 are computed in float32."""
    if h.dtype == wide(h.dtype):
        _mix_(_soft(h, family.kappa, out=y), h, family)
    else:
        x = h.float()
        y.copy_(_mix_(_soft(x, family.kappa), x, family))


def activate(h: Tensor, family: Family) -> Tensor:
    """φ(h) [N, D]."""
    if _is_one_sweep(h, product=False) and h.dtype == wide(h.dtype):
        return _mix_(_soft(h, family.kappa), h, family)
    y = torch.empty_like(h)
    for h_part, y_part in _sweeps(h, y):
        _activate_into(y_part, h_part, family)
    return y


def _log_derivative_sum_into(total: Tensor, h: Tensor, family: Family) -> None:
    torch.sum(_slope(h.to(total.dtype), family).log_(), -1, out=total)


def log_derivative_sum(h: Tensor, family: Family) -> Tensor:
    """Σ log φ′(h) over each row, [N], float32 or wider."""
    total = torch.empty(h.shape[0], dtype=wide(h.dtype), device=h.device)
    for h_part, total_part in _sweeps(h, total):
        _log_derivative_sum_into(total_part, h_part, family)
    return total


def _slope(x: Tensor, family: Family) -> Tensor:
    """φ′(x) in memory of its own."""
    return _scale_(_sigmoid(x, family.kappa), family.c).add_(family.a)


def _activation_backward_into(
    grad_h: Tensor, grad_y: Tensor, h: Tensor, ld: Sequence[Tensor], family: Family, totals: Tensor | None
) -> None:
    """grad_h ← g_y·φ′(h) + g_ld·φ″(h)/φ′(h), and the slopes' gradient added to ``totals``.

    ``ld`` holds the gradient of Σ log φ′(h) as a column, or nothing.
    """
    if isinstance(family.kappa, float) and h.dtype == wide(h.dtype):
        _softplus_backward_out(grad_y, h, family.kappa, _threshold(h.dtype), grad_input=grad_h)
        _mix_(grad_h, grad_y, family)
    else:
        grad_h.copy_(_slope(h.to(wide(h.dtype)), family).mul_(grad_y))
    if ld:
        grad_h.add_((ld[0] * _log_slope_derivative(h, family)).to(grad_h.dtype))
    if totals is not None:
        _accumulate_slopes(totals, grad_y, ld[0] if ld else None, h, family)


def activation_backward(
    grad_y: Tensor, grad_logabsdet: Tensor | None, h: Tensor, family: Family, slopes: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Gradients of h and of ``slopes`` from those of y = φ(h) and of Σ log φ′(h)."""
    grad_h = torch.empty_like(h)
    totals = _slope_totals(slopes, h)
    for g, x, out, *ld in _sweeps(grad_y, h, grad_h, *_column(grad_logabsdet)):
        _activation_backward_into(out, g, x, ld, family, totals)
    return grad_h, _finish_slopes(totals, slopes)


def activation_inverse_backward(
    grad_h: Tensor, grad_logabsdet: Tensor | None, h: Tensor, family: Family, slopes: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Gradients of y and of ``slopes`` from those of h = φ⁻¹(y) and of −Σ log φ′(h).

    g_y = (g_h − g_ld·φ″(h)/φ′(h)) / φ′(h), and g_θ = −g_y·∂φ/∂θ − g_ld·∂log φ′/∂θ.
    """
    grad_y = torch.empty_like(h)
    totals = _slope_totals(slopes, h)
    for g, x, out, *ld in _sweeps(grad_h, h, grad_y, *_column(grad_logabsdet)):
        if ld:
            g = g - (ld[0] * _log_slope_derivative(x, family)).to(g.dtype)
        out.copy_(torch.div(g, _slope(x.to(wide(x.dtype)), family)))
        if totals is not None:
            _accumulate_slopes(totals, -out, -ld[0] if ld else None, x, family)
    return grad_y, _finish_slopes(totals, slopes)


def _column(row_values: Tensor | None) -> tuple[Tensor, ...]:
    return () if row_values is None else (row_values.unsqueeze(-1),)


def _log_slope_derivative(x: Tensor, family: Family) -> Tensor:
    """φ″(x)/φ′(x), float32 or wider."""
    sigmoid = _sigmoid(x.to(wide(x.dtype)), family.kappa)
    slope = sigmoid * family.c + family.a
    return sigmoid.addcmul_(sigmoid, sigmoid, value=-1).mul_(family.c).mul_(family.kappa).div_(slope)


def _slope_totals(slopes: Tensor | None, h: Tensor) -> Tensor | None:
    if slopes is None:
        return None
    return torch.zeros(slopes.shape, dtype=wide(h.dtype), device=h.device)


def _accumulate_slopes(totals: Tensor, g: Tensor, ld: Tensor | None, x: Tensor, family: Family) -> None:
    """totals ← totals + Σ (g·∂φ/∂θ + ld·∂log φ′/∂θ) for θ = a, c, κ."""
    x = x.to(totals.dtype)
    g = g.to(totals.dtype)
    sigmoid = _sigmoid(x, family.kappa)
    soft = _soft(x, family.kappa)
    by_kappa = (x * sigmoid - soft) * (family.c / family.kappa)
    terms = [g * x, g * soft, g * by_kappa]
    if ld is not None:
        share = ld / (sigmoid * family.c + family.a)
        bend = (sigmoid - sigmoid * sigmoid) * x * family.c
        terms = [terms[0] + share, terms[1] + share * sigmoid, terms[2] + share * bend]
    for total, term in zip(totals.unbind(0), terms, strict=True):
        total.add_(term.sum(0) if total.dim() else term.sum())


def _finish_slopes(totals: Tensor | None, slopes: Tensor | None) -> Tensor | None:
    return None if totals is None or slopes is None else totals.to(slopes.dtype)


@functools.cache
def _halley_steps(log2_low: int, dtype: torch.dtype) -> int:
    """Steps that bring every t to the rounding floor of ``dtype`` when r ≥ 2^log2_low.

    Counted by running the iteration itself in float64 over a grid of w: the hardest w lie where eᵗ and
    r·t are of one size, and how many steps they need grows with log(1/r).
    """
    r = 2.0**log2_low
    magnitudes = torch.logspace(-12, 4, 400, dtype=torch.float64)
    w = torch.cat([-magnitudes, magnitudes, torch.zeros(1, dtype=torch.float64)])
    tolerance = 1.5 * torch.finfo(dtype).eps * (w.abs() + math.log(2.0))
    t, *scratch = (torch.empty_like(w) for _ in range(4))
    _halley_start(w, r, t, scratch[0])
    for steps in range(1, 1000):
        _halley_step_(t, w, r, scratch)
        residual = (F.softplus(t, threshold=40.0) + r * t - w).abs()
        if bool((residual <= tolerance).all()):
            return steps
    raise AssertionError(f"Halley's iteration did not converge for r = {r}")


def _halley_start(w: Tensor, r: float | Tensor, out: Tensor, scratch: Tensor) -> None:
    """A t not left of the solution of softplus(t) + r·t = w: the least of those of three tangents."""
    torch.sub(w, math.log(2.0), out=out).div_(r + 0.5)
    torch.minimum(out, torch.div(w, 1.0 + r, out=scratch), out=out)
    torch.minimum(out, torch.div(w, r, out=scratch), out=out)


def _halley_step_(t: Tensor, w: Tensor, r: float | Tensor, scratch: Sequence[Tensor]) -> None:
    """One step of Halley's iteration on f(t) = softplus(t) + r·t − w, in place.

    t ← t − f·f′/(f′² − f·f″/2). f·f″ ≤ f′² right of the solution (softplus(t) ≤ eᵗ), so the denominator is
    at least f′²/2. ``scratch`` is three tensors like t.
    """
    f, bend, slope = scratch
    _add_scaled_(_softplus_out(t, 1.0, _threshold(t.dtype), out=f), r, t).sub_(w)
    torch.sigmoid(t, out=bend)
    torch.add(bend, r, out=slope)
    bend.addcmul_(bend, bend, value=-1).mul_(f)
    f.mul_(slope)
    t.sub_(f.div_(slope.mul_(slope).sub_(bend, alpha=0.5)))


def activation_inverse(y: Tensor, family: Family) -> Tensor:
    """φ⁻¹(y) [N, D]: Halley's iteration from the nearest of three tangents, ±inf and NaN passed through.

    With t = κ·x, r = a/c and w = κ·y/c the equation φ(x) = y is softplus(t) + r·t = w.
    bfloat16 and float16 are computed in float32.
    """
    dtype = wide(y.dtype)
    a, c, kappa = family
    r = a / c
    if not isinstance(r, Tensor):
        # Below, it would be 0 in this dtype, and 0/0 at y = 0; φ⁻¹ is as good with this one, to rounding.
        r = max(r, torch.finfo(dtype).tiny)
    low = float(r.min()) if isinstance(r, Tensor) else r
    low = (
        low if 0.0 < low < math.inf else 1.0
    )  # slopes that are NaN, or no slopes, give NaN in any number of steps
    # Where a ≫ c, φ is nearly linear and softplus a small correction: 2¹⁰ needs no more steps than 2⁹⁹. Nor
    # does 2⁻⁹⁹⁹ than 2⁻⁵⁰⁰, below which the squared slope is 0 on the far left and the asymptote exact.
    steps = _halley_steps(min(max(math.floor(math.log2(low)), -500), 10), dtype)
    x = torch.empty_like(y)
    scratch: list[Tensor] = []
    for y_part, x_part in _sweeps(y, x):
        if not scratch:
            scratch = [torch.empty_like(y_part, dtype=dtype) for _ in range(5)]
        w, t, *rest = (buffer[: len(y_part)] for buffer in scratch)
        torch.mul(y_part.to(dtype), kappa / c, out=w)
        _halley_start(w, r, t, rest[0])
        for _ in range(steps):
            _halley_step_(t, w, r, rest)
        torch.div(t, kappa, out=t)
        if not (t.device.type == "cpu" and math.isfinite(t.sum().item())):
            # Where w overflows, and at ±inf, φ is its asymptote; NaN stays NaN.
            wide_y = y_part.to(dtype)
            t = torch.where(t.isfinite(), t, torch.minimum(wide_y / a, wide_y / (a + c)))
        x_part.copy_(t)
    return x


# --- the packed matrix ----------------------------------------------------------------------------------


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
    def of(cls, lu: Tensor, sign: Tensor | None, permutation: Tensor | None) -> Packed:
        logs = log_diagonal(lu)
        diagonal = logs.exp()
        if sign is not None:
            diagonal.mul_(sign)
        return cls(lu.to(diagonal.dtype), logs, diagonal, permutation)

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
    """Whether a batch of ``rows`` goes through W = L U formed once, or through U and then L."""
    return rows > columns


def compose(packed: Packed) -> Tensor:
    """A = Pᵀ L U [D, D], about 2·D³/3 flops."""
    if packed.size <= DENSE:
        return _compose_dense(packed)
    first, *rest = packed.panels()
    weight = packed.lower_panel(first) @ packed.upper_panel(first)
    for panel in rest:
        weight[panel.start :, panel.start :].addmm_(packed.lower_panel(panel), packed.upper_panel(panel))
    if packed.permutation is not None:
        weight = weight[packed.permutation.argsort()]
    return weight


def _compose_dense(packed: Packed) -> Tensor:
    """A of one layer or of stacked ones, [..., D, D], as U + (L − I) U: L's diagonal need not be written."""
    upper, below = _upper(packed.lu, packed.diagonal), packed.lu.tril(-1)
    if packed.lu.dim() == 3:
        return torch.baddbmm(upper, below, upper)
    weight = torch.addmm(upper, below, upper)
    return weight if packed.permutation is None else weight[packed.permutation.argsort()]


def _compose_dense_backward(grad_weight: Tensor, packed: Packed) -> Tensor:
    """``compose_backward`` of ``_compose_dense``."""
    return _by_factors(grad_weight, _upper(packed.lu, packed.diagonal), packed.lu.tril(-1))


def _by_factors(grad_weight: Tensor, upper: Tensor, below: Tensor) -> Tensor:
    """tril(G Uᵀ, −1) + triu(G + (L − I)ᵀ G) [..., D, D] from U and L − I."""
    by_lower = (grad_weight @ upper.mT).tril_(-1)
    add_product = torch.addmm if upper.dim() == 2 else torch.baddbmm
    return by_lower.add_(add_product(grad_weight, below.mT, grad_weight).triu_())


def compose_backward(grad_weight: Tensor, packed: Packed) -> Tensor:
    """The gradient of ``lu`` with U's diagonal in place of s, from that of A: tril(G Uᵀ, −1) + triu(Lᵀ G)."""
    if packed.permutation is not None:
        grad_weight = grad_weight[packed.permutation]
    if packed.size <= DENSE:
        return _compose_dense_backward(grad_weight, packed)
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


def rows_backward(grad_v: Tensor, t: Tensor, grad_t: Tensor, x: Tensor, packed: Packed) -> Tensor:
    """The gradient of ``lu`` (U's diagonal in place of s) from the rows themselves, 2·N·D² flops.

    v = L t, t = U x, so g_L = tril(g_vᵀ t, −1) and g_U = triu(g_tᵀ x).
    """
    grad = torch.empty_like(packed.lu)
    for panel in packed.panels():
        by_lower = grad_v[:, panel].T @ t[:, panel]
        by_upper = grad_t[:, panel].T @ x[:, panel]
        grad[panel, panel] = by_lower.tril_(-1).add_(by_upper.triu_())
        grad[panel.stop :, panel] = grad_v[:, panel.stop :].T @ t[:, panel]
        grad[panel, panel.stop :] = grad_t[:, panel].T @ x[:, panel.stop :]
    return grad


def _times(x: Tensor, packed: Packed, *, upper: bool, transposed: bool) -> Tensor:
    """Rows of T x or, transposed, Tᵀ x, for T = L or U: N·D² flops and up."""
    out = torch.empty_like(x)
    for panel in packed.panels(FEW_ROWS_BLOCK if _few(x.shape[0]) else BLOCK):
        block = packed.upper_block(panel) if upper else packed.lower_block(panel)
        product = x[:, panel] @ (block if transposed else block.T)
        beside = slice(panel.stop, packed.size) if upper != transposed else slice(0, panel.start)
        if beside.stop > beside.start:
            couple = packed.lu[beside, panel] if transposed else packed.lu[panel, beside].T
            product.addmm_(x[:, beside], couple)
        out[:, panel] = product
    return out


# --- triangular solves ----------------------------------------------------------------------------------


def _invert_triangular(block: Tensor, *, upper: bool) -> Tensor:
    """T⁻¹ [..., D, D] of triangles T, solved for as X T = I: in float32 half the time of T X = I at D 64."""
    eye = torch.eye(block.shape[-1], dtype=block.dtype, device=block.device).expand_as(block)
    return torch.linalg.solve_triangular(block, eye, upper=upper, left=False)


def _few(rows: int) -> bool:
    """Whether there are too few right-hand sides for inverting a block of a triangle first to pay."""
    return rows <= BLOCK // 4


def _substitute_(right: Tensor, packed: Packed, *, upper: bool, transposed: bool) -> Tensor:
    """right ← rows of T⁻¹ r or, transposed, T⁻ᵀ r, for T = L or U: blocked substitution, N·D² flops and up.

    In place, panel by panel: memory of the size of the batch, fresh from the system, costs as much time as
    some of the arithmetic. With many rows each diagonal block is inverted, so that all work is products.
    """
    few = _few(right.shape[0])
    if few and not upper:
        # The unit diagonal of L is not read, so it can be solved with as it is stored.
        return right.copy_(_solve_rows(packed.lu, right, upper=False, transposed=transposed, unit=True))
    forwards = upper == transposed
    panels = list(packed.panels(FEW_ROWS_BLOCK if few else BLOCK))
    scratch = None if few else right.new_empty(right.shape[0], min(BLOCK, packed.size))
    for panel in panels if forwards else reversed(panels):
        done = slice(0, panel.start) if forwards else slice(panel.stop, packed.size)
        part = right[:, panel]
        if done.stop > done.start:
            couple = packed.lu[done, panel] if transposed else packed.lu[panel, done].T
            part.addmm_(right[:, done], couple, alpha=-1)
        block = packed.upper_block(panel) if upper else packed.lower_block(panel)
        if scratch is None:
            part.copy_(_solve_rows(block, part, upper=upper, transposed=transposed))
        else:
            inverse = _invert_triangular(block, upper=upper)
            solved = scratch[:, : part.shape[1]]
            part.copy_(torch.mm(part, inverse if transposed else inverse.T, out=solved))
    return right


def _solve_rows(
    triangle: Tensor, right: Tensor, *, upper: bool, transposed: bool, unit: bool = False
) -> Tensor:
    """Rows of T⁻¹ r or T⁻ᵀ r by LAPACK; with ``unit`` the diagonal and the other triangle are not read."""
    matrix = triangle if transposed else triangle.T
    up = upper if transposed else not upper
    return torch.linalg.solve_triangular(matrix, right, upper=up, left=False, unitriangular=unit)


def inverse_of_factors(lower: Tensor, upper: Tensor) -> Tensor | None:
    """U⁻¹ L⁻¹ [..., D, D] of factors [..., D, D]; None where κ₁(L)·κ₁(U) of one is too large, or NaN."""
    lower_inverse = _invert_triangular(lower, upper=False)
    upper_inverse = _invert_triangular(upper, upper=True)
    condition = lower.new_ones(())
    for matrix in (lower, upper, lower_inverse, upper_inverse):
        # matrix_norm takes three times as long at D 64.
        condition = condition * matrix.abs().sum(-2).amax(-1)
    if not float(condition.amax()) <= EXPLICIT_INVERSE_LIMIT:
        return None
    return upper_inverse @ lower_inverse


def least_rows_for_inverse(size: int) -> int:
    """Rows [N, D] from which on A⁻¹ [D, D] is worth its D³: the more blocks, the faster is substitution."""
    return (4 if size <= 2 * BLOCK else 10) * size


def explicit_inverse(packed: Packed, rows: int) -> Tensor | None:
    """(L U)⁻¹ [D, D] by triangular inversion, or None where substitution is better.

    Worth its D³ only for many more rows than columns; refused when κ₁(L)·κ₁(U) says that it would cost
    accuracy. Never on a device where reading the condition back would stall the queue.
    """
    if packed.lu.device.type != "cpu" or rows < least_rows_for_inverse(packed.size):
        return None
    return inverse_of_factors(_unit_lower(packed.lu), _upper(packed.lu, packed.diagonal))


def solve(h: Tensor, packed: Packed, bias: Tensor | None, *, own: bool) -> Tensor:
    """Rows of A⁻¹ (h − b) = U⁻¹ L⁻¹ P (h − b); with ``own``, h is the caller's to be overwritten."""
    inverse = explicit_inverse(packed, h.shape[0])
    if inverse is not None:
        right = _permute(h, packed)
        if bias is None:
            return right @ inverse.T
        shift = inverse @ (bias if packed.permutation is None else bias[packed.permutation])
        return torch.addmm(shift, right, inverse.T, beta=-1)
    if bias is not None:
        right = _permute(h.sub_(bias) if own else h - bias, packed)
    elif packed.permutation is not None:
        right = _permute(h, packed)
    else:
        right = h if own else h.clone()
    right = _substitute_(right, packed, upper=False, transposed=False)
    return _substitute_(right, packed, upper=True, transposed=False)


def solve_transposed(grad: Tensor, packed: Packed) -> tuple[Tensor, Tensor | None]:
    """Rows of v = L⁻ᵀ U⁻ᵀ g (so A⁻ᵀ g = Pᵀ v), and of U⁻ᵀ g with rows so few that it is of use."""
    inverse = explicit_inverse(packed, grad.shape[0])
    if inverse is not None:
        return grad @ inverse, None
    middle = _substitute_(grad.clone(), packed, upper=True, transposed=True)
    kept = None if composes(*grad.shape) else middle.clone()
    return _substitute_(middle, packed, upper=False, transposed=True), kept


# --- the layer ------------------------------------------------------------------------------------------


def _unpermute(v: Tensor, packed: Packed) -> Tensor:
    """Rows of Pᵀ v."""
    return v if packed.permutation is None else v[:, packed.permutation.argsort()]


def _permute(h: Tensor, packed: Packed) -> Tensor:
    """Rows of P h."""
    return h if packed.permutation is None else h[:, packed.permutation]


def layer_forward(
    x: Tensor, packed: Packed, bias: Tensor | None, family: Family, *, logabsdet: bool, save: bool
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """(y, log|det J| or None, h or None if φ is the identity, A or None if it was not formed).

    Without ``save`` h need not be whole at any time, and what is returned for it may be None.
    """
    weight = None
    if composes(*x.shape):
        weight = compose(packed).to(x.dtype)
        if not family.linear:
            parts = _activated_product(x, weight, packed, bias, family, logabsdet=logabsdet, save=save)
            return *parts, weight
        h = _affine(x, weight, bias)
    else:
        v = _times(
            _times(x.to(packed.lu.dtype), packed, upper=True, transposed=False),
            packed,
            upper=False,
            transposed=False,
        )
        h = _unpermute(v, packed)
        if bias is not None:
            h = h + bias
        h = h.to(x.dtype)
    if family.linear:
        return h, _constant_logabsdet(packed, x.shape[0]) if logabsdet else None, None, weight
    total = None
    if logabsdet:
        total = log_derivative_sum(h, family).add_(packed.log_diagonal.sum())
    return activate(h, family), total, h, weight


def keeps_factors(x: Tensor, lu: Tensor) -> bool:
    """Whether a layer's forward keeps U and L − I beside A for backward, which need not form them again."""
    return lu.dim() == 2 and lu.shape[0] <= DENSE and x.dtype == lu.dtype == wide(x.dtype)


def factored_forward(
    x: Tensor,
    packed: Packed,
    bias: Tensor | None,
    family: Family,
    slopes: Tensor | None,
    *,
    logabsdet: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    """``layer_forward`` to be saved, A formed for any number of rows: (y, log|det J| or None, c·h or None,
    (c·A, U, L − I) [3, D, D]), with c of ``Family.scaled``."""
    scale, family = family.scaled(slopes)
    kept = x.new_empty(3, packed.size, packed.size)
    weight, upper, below = kept.unbind(0)
    torch.triu(packed.lu, out=upper)
    upper.diagonal().copy_(packed.diagonal)
    torch.tril(packed.lu, -1, out=below)
    if packed.permutation is None:
        torch.addmm(upper, below, upper, beta=scale, alpha=scale, out=weight)
    else:
        weight[packed.permutation] = torch.addmm(upper, below, upper, beta=scale, alpha=scale)
    if bias is not None and scale != 1.0:
        bias = bias * scale
    if family.linear:
        total = _constant_logabsdet(packed, x.shape[0]) if logabsdet else None
        return _affine(x, weight, bias), total, None, kept
    y, total, h = _activated_product(x, weight, packed, bias, family, logabsdet=logabsdet, save=True)
    if total is not None and scale != 1.0:
        total.add_(packed.size * math.log(scale))
    return y, total, h, kept


def factored_backward(
    grad_y: Tensor,
    grad_logabsdet: Tensor | None,
    x: Tensor,
    h: Tensor | None,
    kept: Tensor,
    lu: Tensor,
    permutation: Tensor | None,
    family: Family,
    slopes: Tensor | None,
    *,
    needs_x: bool,
    needs_lu: bool,
    has_bias: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of (x, lu, bias, slopes) from what ``factored_forward`` kept."""
    scale, family = family.scaled(slopes)
    weight, upper, below = kept.unbind(0)
    totals = None if h is None else _slope_totals(slopes, h)
    grad_x, grad_weight, grad_bias = _product_gradients(
        *(grad_y, grad_logabsdet, x, h, weight, family, totals, scale),
        needs_x=needs_x,
        needs_weight=needs_lu,
        has_bias=has_bias,
    )
    grad_lu = None
    if grad_weight is not None:
        if permutation is not None:
            grad_weight = grad_weight[permutation]
        grad_lu = _by_factors(grad_weight, upper, below)
        diagonal = grad_lu.diagonal()
        diagonal.mul_(upper.diagonal())
        if grad_logabsdet is not None:
            diagonal.add_(grad_logabsdet.sum())
        bound = LOG_DIAGONAL_BOUND[lu.dtype]
        # A clamped s_i has no influence.
        _hardtanh_backward_out(diagonal, lu.diagonal(), -bound, bound, grad_input=diagonal)
    return grad_x, grad_lu, grad_bias, _finish_slopes(totals, slopes)


def _affine(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Rows of A x + b."""
    return torch.mm(x, weight.T) if bias is None else torch.addmm(bias.to(x.dtype), x, weight.T)


def _activated_product(
    x: Tensor,
    weight: Tensor,
    packed: Packed,
    bias: Tensor | None,
    family: Family,
    *,
    logabsdet: bool,
    save: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(φ(A x + b), log|det J| or None, h = A x + b or None); φ meets each run of rows still in the cache."""
    if _is_one_sweep(x, product=True):
        whole = _affine(x, weight, bias)
        logs = log_derivative_sum(whole, family).add_(packed.log_diagonal.sum()) if logabsdet else None
        return activate(whole, family), logs, whole
    y = torch.empty_like(x)
    h = torch.empty_like(x) if save else None
    total = torch.empty(x.shape[0], dtype=wide(x.dtype), device=x.device) if logabsdet else None
    bias = None if bias is None else bias.to(x.dtype)
    scratch = None
    start = 0
    for x_part, y_part in _sweeps(x, y, product=True):
        rows = slice(start, start + len(x_part))
        start = rows.stop
        if h is not None:
            h_part = h[rows]
        else:
            scratch = torch.empty_like(x_part) if scratch is None else scratch
            h_part = scratch[: len(x_part)]
        if bias is None:
            torch.mm(x_part, weight.T, out=h_part)
        else:
            torch.addmm(bias, x_part, weight.T, out=h_part)
        _activate_into(y_part, h_part, family)
        if total is not None:
            _log_derivative_sum_into(total[rows], h_part, family)
    return y, None if total is None else total.add_(packed.log_diagonal.sum()), h


def _constant_logabsdet(packed: Packed, rows: int) -> Tensor:
    return packed.log_diagonal.sum().repeat(rows)


def layer_backward(
    grad_y: Tensor,
    grad_logabsdet: Tensor | None,
    x: Tensor,
    h: Tensor | None,
    weight: Tensor | None,
    packed: Packed,
    family: Family,
    slopes: Tensor | None,
    *,
    needs_x: bool,
    needs_lu: bool,
    has_bias: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of (x, lu, bias, slopes)."""
    dtype = packed.lu.dtype
    totals = None if h is None else _slope_totals(slopes, h)
    grad_x = grad_lu = None
    if weight is not None:
        grad_x, grad_weight, grad_bias = _product_gradients(
            *(grad_y, grad_logabsdet, x, h, weight, family, totals, 1.0),
            needs_x=needs_x,
            needs_weight=needs_lu,
            has_bias=has_bias,
        )
        if grad_weight is not None:
            grad_lu = compose_backward(grad_weight, packed)
    else:
        grad_h = grad_y
        if h is not None:
            grad_h = torch.empty_like(h)
            _activation_backward_into(grad_h, grad_y, h, _column(grad_logabsdet), family, totals)
        grad_bias = grad_h.sum(0, dtype=dtype) if has_bias else None
        grad_v = _permute(grad_h.to(dtype), packed)
        grad_t = _times(grad_v, packed, upper=False, transposed=True)
        if needs_x:
            grad_x = _times(grad_t, packed, upper=True, transposed=True).to(x.dtype)
        if needs_lu:
            wide_x = x.to(dtype)
            grad_lu = rows_backward(
                grad_v, _times(wide_x, packed, upper=True, transposed=False), grad_t, wide_x, packed
            )
    if grad_lu is not None:
        _finish_lu_(grad_lu, packed, _row_sum(grad_logabsdet), 1.0)
    return grad_x, grad_lu, grad_bias, _finish_slopes(totals, slopes)


def _product_gradients(
    grad_y: Tensor,
    grad_logabsdet: Tensor | None,
    x: Tensor,
    h: Tensor | None,
    weight: Tensor,
    family: Family,
    totals: Tensor | None,
    scale: float,
    *,
    needs_x: bool,
    needs_weight: bool,
    has_bias: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of (x, A, b), float32 or wider but for x, through y = φ(h) with h = ``scale``·(A x + b) and
    ``weight`` = ``scale``·A."""
    dtype = wide(x.dtype)
    if _is_one_sweep(x, product=True):
        grad_h = grad_y
        if h is not None:
            grad_h = torch.empty_like(h)
            _activation_backward_into(grad_h, grad_y, h, _column(grad_logabsdet), family, totals)
        grad_weight = grad_bias = None
        if needs_weight:
            grad_weight = torch.addmm(weight, grad_h.T, x, beta=0, alpha=scale).to(dtype)
        if has_bias:
            grad_bias = _scale_(grad_h.sum(0, dtype=dtype), scale)
        return torch.mm(grad_h, weight) if needs_x else None, grad_weight, grad_bias
    grad_x = torch.empty_like(x) if needs_x else None
    grad_weight = torch.zeros_like(weight, dtype=dtype) if needs_weight else None
    grad_bias = x.new_zeros(x.shape[1], dtype=dtype) if has_bias else None
    for grad_h, rows in _preactivation_gradients(grad_y, grad_logabsdet, h, family, totals):
        if grad_x is not None:
            torch.mm(grad_h, weight, out=grad_x[rows])
        if grad_weight is not None:
            _add_product_(grad_weight, grad_h.T, x[rows], scale)
        if grad_bias is not None:
            grad_bias.add_(grad_h.sum(0, dtype=dtype), alpha=scale)
    return grad_x, grad_weight, grad_bias


def _preactivation_gradients(
    grad_y: Tensor, grad_logabsdet: Tensor | None, h: Tensor | None, family: Family, totals: Tensor | None
) -> Iterator[tuple[Tensor, slice]]:
    """The gradient of h for one run of rows after another, in memory that is used again for the next.

    The products that need it follow while it is in the cache, and it is never there as a whole: memory of
    its size, fresh from the system, would cost more time than computing it.
    """
    everything = slice(0, grad_y.shape[0])
    if h is None:
        yield grad_y, everything
        return
    scratch = None
    start = 0
    parts = _sweeps(grad_y, h, *_column(grad_logabsdet), product=True)
    for g, h_part, *ld in parts:
        scratch = torch.empty_like(h_part) if scratch is None else scratch[: len(h_part)]
        _activation_backward_into(scratch, g, h_part, ld, family, totals)
        yield scratch, slice(start, start + len(h_part))
        start += len(h_part)


def _add_product_(total: Tensor, left: Tensor, right: Tensor, scale: float) -> None:
    """total ← total + scale·left·right, summed over the runs in the dtype of ``total``."""
    if left.dtype == total.dtype:
        total.addmm_(left, right, alpha=scale)
    else:
        total.add_(left @ right, alpha=scale)


def _row_sum(grad_logabsdet: Tensor | None) -> Tensor | None:
    return None if grad_logabsdet is None else grad_logabsdet.sum()


def _finish_lu_(grad_lu: Tensor, packed: Packed, grad_logabsdet: Tensor | None, direction: float) -> None:
    """Turn the gradient of u_ii into that of s_i (du_ii/ds_i = u_ii) and add the log-determinant's share.

    ``grad_logabsdet`` is summed over the rows, broadcasting to [..., D].
    """
    diagonal = grad_lu.diagonal(dim1=-2, dim2=-1)
    diagonal.mul_(packed.diagonal)
    if grad_logabsdet is not None:
        diagonal.add_(grad_logabsdet.to(diagonal.dtype), alpha=direction)
    # A clamped s_i has no influence.
    diagonal.masked_fill_(packed.lu.diagonal(dim1=-2, dim2=-1) != packed.log_diagonal, 0.0)


def layer_inverse(
    y: Tensor, packed: Packed, bias: Tensor | None, family: Family, *, logabsdet: bool, save: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(x, the inverse's own log-determinant or None, h = φ⁻¹(y) to ``save`` or None; None if φ is linear)."""
    h = y if family.linear else activation_inverse(y, family)
    total = None
    if logabsdet:
        total = _constant_logabsdet(packed, y.shape[0]).neg_()
        if not family.linear:
            total.sub_(log_derivative_sum(h, family))
    right = h.to(packed.lu.dtype)
    own = right is not h or not (family.linear or save)
    bias = None if bias is None else bias.to(right.dtype)
    x = solve(right, packed, bias, own=own).to(y.dtype)
    return x, total, h if save and not family.linear else None


def layer_inverse_backward(
    grad_x: Tensor,
    grad_logabsdet: Tensor | None,
    x: Tensor,
    h: Tensor | None,
    packed: Packed,
    family: Family,
    slopes: Tensor | None,
    *,
    needs_lu: bool,
    has_bias: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of (y, lu, bias, slopes): g_r = A⁻ᵀ g_x, g_A = −g_rᵀ x, g_b = −Σ g_r, g_y = g_r/φ′(h)."""
    grad_v, grad_t = solve_transposed(grad_x.to(packed.lu.dtype), packed)
    grad_right = _unpermute(grad_v, packed)
    grad_bias = grad_right.sum(0).neg_() if has_bias else None
    grad_lu = None
    if needs_lu:
        wide_x = x.to(packed.lu.dtype)
        if composes(*x.shape):
            grad_lu = compose_backward(grad_right.T @ wide_x, packed)
        else:
            if grad_t is None:
                grad_t = _times(grad_v, packed, upper=False, transposed=True)
            grad_lu = rows_backward(
                grad_v, _times(wide_x, packed, upper=True, transposed=False), grad_t, wide_x, packed
            )
        _finish_lu_(grad_lu.neg_(), packed, _row_sum(grad_logabsdet), -1.0)
    grad_right = grad_right.to(x.dtype)
    if h is None:
        return grad_right, grad_lu, grad_bias, None
    grad_y, grad_slopes = activation_inverse_backward(grad_right, grad_logabsdet, h, family, slopes)
    return grad_y, grad_lu, grad_bias, grad_slopes


# --- stacked layers -------------------------------------------------------------------------------------


def stacked_forward(
    x: Tensor, packed: Packed, bias: Tensor | None, family: Family, *, logabsdet: bool, save: bool
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    """``layer_forward`` for K layers at once: x [K, N, D], lu [K, D, D], bias [K, D]; A is always formed.

    Meant for many small layers, where one call for each would cost more than its arithmetic; so the
    factors are multiplied as dense matrices, 2·D³ flops a layer.
    """
    weight = _compose_dense(packed).to(x.dtype)
    transposed = weight.mT
    h = (
        torch.bmm(x, transposed)
        if bias is None
        else torch.baddbmm(bias.unsqueeze(1).to(x.dtype), x, transposed)
    )
    constant = packed.log_diagonal.sum(-1, keepdim=True)
    if family.linear:
        return h, constant.expand(x.shape[:2]).contiguous() if logabsdet else None, None, weight
    rows = h.flatten(0, 1)
    total = log_derivative_sum(rows, family).reshape(x.shape[:2]).add_(constant) if logabsdet else None
    return activate(rows, family).reshape(x.shape), total, h if save else None, weight


def stacked_backward(
    grad_y: Tensor,
    grad_logabsdet: Tensor | None,
    x: Tensor,
    h: Tensor | None,
    weight: Tensor,
    packed: Packed,
    family: Family,
    slopes: Tensor | None,
    *,
    needs_x: bool,
    needs_lu: bool,
    has_bias: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of (x, lu, bias, slopes) for stacked layers; slopes are shared by them."""
    grad_h, grad_slopes = grad_y, None
    if h is not None:
        flat_ld = None if grad_logabsdet is None else grad_logabsdet.flatten()
        grad_h, grad_slopes = activation_backward(
            grad_y.flatten(0, 1), flat_ld, h.flatten(0, 1), family, slopes
        )
        grad_h = grad_h.reshape(x.shape)
    grad_bias = grad_h.sum(1, dtype=packed.lu.dtype) if has_bias else None
    grad_x = torch.bmm(grad_h, weight) if needs_x else None
    grad_lu = None
    if needs_lu:
        grad_lu = _compose_dense_backward(torch.bmm(grad_h.mT, x).to(packed.lu.dtype), packed)
        row_sums = None if grad_logabsdet is None else grad_logabsdet.sum(-1, keepdim=True)
        _finish_lu_(grad_lu, packed, row_sums, 1.0)
    return grad_x, grad_lu, grad_bias, grad_slopes

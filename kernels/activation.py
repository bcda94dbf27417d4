# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False
# mypy: disable-error-code="assignment, var-annotated"
# ruff: noqa: RUF005 (the compiler knows a sum of tuples, not what ruff would have instead)
"""φ(x) = a·x + (c/κ)·softplus(κ·x), its inverse and the logarithm of its slope.

Everything is computed in float32 from v = exp(−|κx|) ∈ [0, 1], which neither overflows nor cancels:
with s = v/(1 + v) = σ(−|κx|),

    φ(x)      = a·x + c·max(x, 0) + (c/κ)·log1p(v)
    φ′(x)     = κx ≥ 0 ?  a + c·(1 − s)                          :  a + c·s
    log φ′(x) = κx ≥ 0 ?  log(a + c) + log1p(−c/(a + c)·s)       :  log a + log1p(c/a·s)

so that log φ′ keeps its digits where φ′ is near a + c (zero, when that is 1) as well as where it is near a.

Why logarithms are written out here: ``tl.log`` compiles to 28 instructions and loses log1p's small
arguments, ``libdevice.log1p`` to 29 and Triton's interpreter lacks it; these polynomials take 10 and about
20, are the same arithmetic on every device, and need no division.

FAST exchanges exp, reciprocals and the logarithm of the slope for single approximate instructions of NVIDIA
GPUs. It is off unless asked for: what it costs in accuracy has to be measured on a GPU first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lunet_fast.kernels import tiles
from lunet_fast.kernels.launch import check_parameter, check_rows, launch

Slopes = Sequence[float] | Tensor

LN2: tl.constexpr = tl.constexpr(math.log(2.0))
LOG2E: tl.constexpr = tl.constexpr(1.0 / math.log(2.0))
LARGEST: tl.constexpr = tl.constexpr(torch.finfo(torch.float32).max)

#: Steps of the inverse for slopes in a tensor, whose values the host does not wait for: enough for
#: a/c ≥ 2^-13. ``inverse_steps`` says how many are needed.
LEARNT_STEPS = 5


# --- elementary functions -------------------------------------------------------------------------------


@triton.jit
def _exp_of_negative(t, FAST: tl.constexpr):
    """exp(t) for t ≤ 0; FAST flushes results below 2^-126 to zero."""
    if FAST:
        return tl.exp2(t * LOG2E)
    return tl.exp(t)


@triton.jit
def _reciprocal(d, FAST: tl.constexpr):
    """1/d for a normal d > 0."""
    if FAST:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [d], dtype=tl.float32, is_pure=True, pack=1
        )
    return 1.0 / d


@triton.jit
def _log1p_unit(v):
    """log(1 + v) for v in [0, 1], relative error below 3e-7: v times a minimax polynomial of degree 8."""
    p = v * 0.00523269410982686 - 0.02950523727631827
    p = v * p + 0.0782259478173932
    p = v * p - 0.13663245295851173
    p = v * p + 0.19106006444399673
    p = v * p - 0.2484298210970902
    p = v * p + 0.33319096791560926
    p = v * p - 0.4999949313968335
    p = v * p + 0.9999999698796846
    return v * p


@triton.jit
def _log1p(z, FAST: tl.constexpr):
    """log(1 + z) for −1 < z < ∞ with 1 + z a normal number; NaN for NaN.

    1 + z = 2^e·(1 + p) with p in [−1/3, 1/3); for e = 0, p is z itself, so the rounding of 1 + z does not
    matter where it would. FAST has only absolute accuracy, about 2e-7.
    """
    u = 1.0 + z
    if FAST:
        log2 = tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [u], dtype=tl.float32, is_pure=True, pack=1
        )
        return log2 * LN2
    bits = u.to(tl.int32, bitcast=True)
    e = (bits - 0x3F2AAAAB) >> 23  # 0x3F2AAAAB is 2/3
    p = tl.where(e == 0, z, (bits - (e << 23)).to(tl.float32, bitcast=True) - 1.0)
    q = p * 0.14056113084249489 - 0.15403197669183544
    q = p * q + 0.13987650846046296
    q = p * q - 0.1641279117291298
    q = p * q + 0.20011944368838142
    q = p * q - 0.2500802725603879
    q = p * q + 0.3333316870455926
    q = p * q - 0.4999993212222057
    q = p * q + 1.000000003565205
    # 0·z: the bits of a NaN have lost it on the way.
    return p * q + (e.to(tl.float32) * LN2 + z * 0.0)


# --- the activation as kernels see it -------------------------------------------------------------------
#
# Kernels hand on an ``Activation`` and what ``load_family`` read of it, and look into neither: this file
# alone knows what an activation is made of. They are two because a jitted function returns no constants, nor
# does a tuple of local values keep them.


class Activation(NamedTuple):
    """φ as one argument of a kernel."""

    slopes: Tensor | None
    """[3] or [3, D], of several layers [layers, 3] or [layers, 3, D]; None: the five numbers."""
    a: float
    c: float
    kappa: float
    log_low: float
    log_high: float
    ACTIVE: tl.constexpr
    """False: the identity."""
    PER_COLUMN: tl.constexpr
    """Whether the slopes differ from column to column."""
    STEPS: tl.constexpr
    """Steps of the inverse."""
    FAST: tl.constexpr


#: How many parameters φ has, whose gradients ``slope_gradients`` gives.
PARAMETERS: tl.constexpr = tl.constexpr(3)


@triton.jit
def load_family(activation, layer, cols, D):
    """φ of a layer in these columns [COLUMNS], which the functions below take with the activation itself.

    (a, c, κ, log a, log(a + c)): scalars, or for slopes that differ by column [1, COLUMNS].
    """
    a = activation.a
    c = activation.c
    kappa = activation.kappa
    log_low = activation.log_low
    log_high = activation.log_high
    if activation.slopes is not None:
        if activation.PER_COLUMN:
            ptrs = activation.slopes + layer * (3 * D) + cols[None, :]
            valid = cols[None, :] < D
            # 1 in columns that are not there: nothing in them may divide by zero.
            a = tl.load(ptrs, mask=valid, other=1.0).to(tl.float32)
            c = tl.load(ptrs + D, mask=valid, other=1.0).to(tl.float32)
            kappa = tl.load(ptrs + 2 * D, mask=valid, other=1.0).to(tl.float32)
        else:
            ptr = activation.slopes + layer * 3
            a = tl.load(ptr).to(tl.float32)
            c = tl.load(ptr + 1).to(tl.float32)
            kappa = tl.load(ptr + 2).to(tl.float32)
        log_low = tl.log(a)
        log_high = tl.log(a + c)
    return a, c, kappa, log_low, log_high


@triton.jit
def phi(x, family, activation):
    """φ(x), elementwise."""
    v = _exp_of_negative(-tl.abs(x * family[2]), activation.FAST)
    # c·max(x, 0), not (c/κ)·max(κx, 0): κx may overflow where φ does not.
    return x * family[0] + (tl.maximum(x, 0.0) * family[1] + _log1p_unit(v) * (family[1] / family[2]))


@triton.jit
def phi_derivative(x, family, activation):
    """φ′(x), elementwise."""
    t = x * family[2]
    v = _exp_of_negative(-tl.abs(t), activation.FAST)
    w = _reciprocal(1.0 + v, activation.FAST)
    return tl.where(t < 0.0, v * w, w) * family[1] + family[0]


@triton.jit
def log_phi_derivative(x, family, activation):
    """log φ′(x), elementwise."""
    t = x * family[2]
    v = _exp_of_negative(-tl.abs(t), activation.FAST)
    s = v * _reciprocal(1.0 + v, activation.FAST)
    low = t < 0.0
    scale = tl.where(low, family[1] / family[0], -family[1] / (family[0] + family[1]))
    return tl.where(low, family[3], family[4]) + _log1p(scale * s, activation.FAST)


@triton.jit
def phi_inverse(y, family, activation):
    """φ⁻¹(y), elementwise: steps of Halley's iteration from the nearest of three tangents.

    With t = κx, r = a/c and w = κy/c the equation is f(t) = softplus(t) + r·t − w = 0. f is convex, so each
    tangent's root is not left of the solution and the least of them is the nearest; there f·f″ ≤ f′², so the
    denominator f′² − f·f″/2 of the step f·f′/(f′² − f·f″/2) is at least f′²/2. Where t is not finite (y is
    not, or κy/c overflowed) φ is its asymptote.
    """
    r = family[0] / family[1]
    w = y * (family[2] / family[1])
    t = tl.minimum(w * (1.0 / (1.0 + r)), w * (1.0 / r))  # tangents at +∞ and −∞
    t = tl.minimum(t, (w - LN2) * (1.0 / (0.5 + r)))  # and at 0
    for _ in tl.static_range(activation.STEPS):
        v = _exp_of_negative(-tl.abs(t), activation.FAST)
        inverse = _reciprocal(1.0 + v, activation.FAST)
        small = v * inverse
        f = (tl.maximum(t, 0.0) - w) + r * t + _log1p_unit(v)
        slope = tl.where(t < 0.0, small, inverse) + r
        t -= f * slope * _reciprocal(slope * slope - 0.5 * f * (small * inverse), activation.FAST)
    asymptote = tl.minimum(y * (1.0 / family[0]), y * (1.0 / (family[0] + family[1])))
    return tl.where(tl.abs(t) <= LARGEST, t * (1.0 / family[2]), asymptote)


@triton.jit
def phi_backward(g, ld, x, family, activation, INVERSE: tl.constexpr):
    """g·φ′(x) + ld·φ″(x)/φ′(x), the gradient of x from g, that of φ(x), and ld, that of log φ′(x) or None.

    INVERSE: (g − ld·φ″/φ′)/φ′, the gradient of y from those of x = φ⁻¹(y) and of −log φ′(x).
    """
    t = x * family[2]
    v = _exp_of_negative(-tl.abs(t), activation.FAST)
    w = _reciprocal(1.0 + v, activation.FAST)
    s = v * w
    slope = tl.where(t < 0.0, s, w) * family[1] + family[0]
    if INVERSE:
        if ld is not None:
            g -= ld * ((s * w) * (family[1] * family[2]) * _reciprocal(slope, activation.FAST))
        return g * _reciprocal(slope, activation.FAST)
    if ld is not None:
        return g * slope + ld * ((s * w) * (family[1] * family[2]) * _reciprocal(slope, activation.FAST))
    return g * slope


@triton.jit
def slope_gradients(g, ld, x, family, activation):
    """g·∂φ/∂θ + ld·∂log φ′/∂θ at x for θ = a, c, κ, elementwise; ld may be None.

    Of softplus, x·σ(κx) − softplus(κx)/κ is −|x|·s − log1p(v)/κ: no difference of large numbers.
    """
    t = x * family[2]
    v = _exp_of_negative(-tl.abs(t), activation.FAST)
    w = _reciprocal(1.0 + v, activation.FAST)
    s = v * w
    soft = _log1p_unit(v) * (1.0 / family[2])
    by_a = g * x
    by_c = g * (tl.maximum(x, 0.0) + soft)
    by_kappa = -(g * (tl.abs(x) * s + soft)) * (family[1] / family[2])
    if ld is not None:
        sigmoid = tl.where(t < 0.0, s, w)
        share = ld * _reciprocal(sigmoid * family[1] + family[0], activation.FAST)
        by_a += share
        by_c += share * sigmoid
        by_kappa += share * ((s * w) * x * family[1])
    return by_a, by_c, by_kappa


# --- row-wise kernels -----------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["N"])
def activation_kernel(
    x_ptr,  # [N, D]
    y_ptr,  # [N, D]
    logabsdet_ptr,  # [N] float32, or None
    activation,
    N,
    D,
    INVERSE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """y = φ(x), and Σ_d log φ′(x_d) for each row; INVERSE, y = φ⁻¹(x) and −Σ_d log φ′(y_d).

    One program does ROWS rows, each added up in one order.
    """
    # The first row's address is 64 bits wide, the rest of a tile counts from it in 32: half the registers.
    first = tl.program_id(0).to(tl.int64) * ROWS
    x_ptr += first * D
    y_ptr += first * D
    rows = tl.arange(0, ROWS)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, D, COLUMNS):
        cols = start + tl.arange(0, COLUMNS)
        valid = (rows[:, None] < N - first) & (cols[None, :] < D)
        offsets = rows[:, None] * D + cols[None, :]
        family = load_family(activation, 0, cols, D)
        x = tl.load(x_ptr + offsets, mask=valid, other=0.0).to(tl.float32)
        if INVERSE:
            y = phi_inverse(x, family, activation)
        else:
            y = phi(x, family, activation)
        tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=valid)
        if logabsdet_ptr is not None:
            if INVERSE:
                total -= tl.where(valid, log_phi_derivative(y, family, activation), 0.0)
            else:
                total += tl.where(valid, log_phi_derivative(x, family, activation), 0.0)
    if logabsdet_ptr is not None:
        tl.store(logabsdet_ptr + first + rows, tl.sum(total, 1), mask=rows < N - first)


@triton.jit
def store_sums(sums_ptr, sums, cols, D, COLUMN_SUMS: tl.constexpr, SLOPE_SUMS: tl.constexpr):
    """Sums over rows in these columns: of the slopes' terms and, last, of the rows themselves, if asked for.

    In memory the rows' stand first, and the others below.
    """
    if COLUMN_SUMS:
        tl.store(sums_ptr + cols, sums[PARAMETERS], mask=cols < D)
    if SLOPE_SUMS:
        for k in tl.static_range(PARAMETERS):
            tl.store(sums_ptr + (COLUMN_SUMS + k) * D + cols, sums[k], mask=cols < D)


@triton.jit(do_not_specialize=["N"])
def activation_bwd_kernel(
    grad_ptr,  # [K, N, D], of φ(x); INVERSE: of x = φ⁻¹(y)
    grad_logabsdet_ptr,  # [K, N] float32, of Σ log φ′(x); INVERSE: of −Σ log φ′(x); or None
    x_ptr,  # [K, N, D]
    out_ptr,  # [K, N, D], the gradient of x; INVERSE: of y
    sums_ptr,  # [K, programs, COLUMN_SUMS + 3·SLOPE_SUMS, D] float32, or None
    activation,
    N,
    D,
    INVERSE: tl.constexpr,
    COLUMN_SUMS: tl.constexpr,
    SLOPE_SUMS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Gradients through φ or φ⁻¹; sums over this program's rows of what it stores and of the slopes' terms.

    A program keeps one block of columns and walks the tiles of ROWS rows, in steps of all the programs.
    """
    blocks = tl.cdiv(D, COLUMNS)
    program = tl.program_id(0) // blocks
    programs = tl.num_programs(0) // blocks
    member = tl.program_id(1).to(tl.int64)
    rows = tl.arange(0, ROWS)
    cols = (tl.program_id(0) % blocks) * COLUMNS + tl.arange(0, COLUMNS)
    family = load_family(activation, 0, cols, D)
    offsets = rows[:, None] * D + cols[None, :]
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    slope_totals = (total,) * PARAMETERS
    # 64 bits for the step too: without sums it is N rounded up, which may pass 2³¹ where N does not.
    for first in range(program.to(tl.int64) * ROWS, N, programs.to(tl.int64) * ROWS):
        base = (member * N + first) * D
        here = rows < N - first
        valid = here[:, None] & (cols[None, :] < D)
        x = tl.load(x_ptr + base + offsets, mask=valid, other=0.0).to(tl.float32)
        g = tl.load(grad_ptr + base + offsets, mask=valid, other=0.0).to(tl.float32)
        ld = None
        if grad_logabsdet_ptr is not None:
            ld = tl.load(grad_logabsdet_ptr + member * N + first + rows, mask=here, other=0.0)[:, None]
        out = phi_backward(g, ld, x, family, activation, INVERSE)
        tl.store(out_ptr + base + offsets, out.to(out_ptr.dtype.element_ty), mask=valid)
        if COLUMN_SUMS:
            total += tl.where(valid, out, 0.0)
        if SLOPE_SUMS:
            if INVERSE:
                terms = slope_gradients(-out, None if ld is None else -ld, x, family, activation)
            else:
                terms = slope_gradients(g, ld, x, family, activation)
            sums = ()
            for k in tl.static_range(PARAMETERS):
                sums = sums + (slope_totals[k] + tl.where(valid, terms[k], 0.0),)
            slope_totals = sums
    if sums_ptr is not None:
        sums_ptr += (member * programs + program) * (COLUMN_SUMS + PARAMETERS * SLOPE_SUMS) * D
        column_sum = tl.sum(total, 0)
        sums = ()
        for k in tl.static_range(PARAMETERS):
            sums = sums + (tl.sum(slope_totals[k], 0),)
        store_sums(sums_ptr, sums + (column_sum,), cols, D, COLUMN_SUMS, SLOPE_SUMS)


# --- launchers ------------------------------------------------------------------------------------------


def activation_of(
    slopes: Slopes | None, D: int, *, layers: int | None = None, steps: int = 0, fast: bool = False
) -> Activation:
    """The kernels' argument that describes φ, of three floats (a, c, κ) or a tensor [3] or [3, D]; None: the
    identity. With ``layers`` a tensor has their number as leading dimension, and of none it is the identity.
    """
    leading = () if layers is None else (layers,)
    if isinstance(slopes, Tensor) and layers != 0:
        if slopes.shape not in ((*leading, 3), (*leading, 3, D)) or not slopes.is_contiguous():
            shapes = [[*leading, 3], [*leading, 3, D]]
            raise ValueError(
                f"slopes must be contiguous {shapes[0]} or {shapes[1]}, got {list(slopes.shape)}"
            )
        numbers: tuple[float, ...] = (0.0,) * 5
        given, per_column = slopes, slopes.dim() == len(leading) + 2
    else:
        a, c, kappa = (1.0, 1.0, 1.0) if slopes is None or isinstance(slopes, Tensor) else map(float, slopes)
        # The logarithms in float64: log(a + c) is exactly 0 where a + c is 1, whatever a and c round to.
        numbers = (a, c, kappa, math.log(a), math.log(a + c))
        given, per_column = None, False
    constants = (slopes is not None, per_column, steps, fast)
    return Activation(given, *numbers, *map(tl.constexpr, constants))


def inverse_steps(r: float) -> int:
    """Steps of ``phi_inverse`` to the rounding floor of float32 for r = a/c: 2 for r ≥ 1/16, one more for
    each factor of 8 below. Counted on a grid of w; the hardest lie where eᵗ and r·t are of one size."""
    return 2 + math.ceil(max(0.0, -4.0 - math.log2(r)) / 3.0)


def steps_of(slopes: Slopes, steps: int | None) -> int:
    """``steps`` of the inverse, or where None as many as float slopes need, ``LEARNT_STEPS`` for a tensor."""
    if steps is None:
        return LEARNT_STEPS if isinstance(slopes, Tensor) else inverse_steps(slopes[0] / slopes[1])
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    return steps


def activation_forward(
    x: Tensor, slopes: Slopes, *, logabsdet: bool, fast: bool = False
) -> tuple[Tensor, Tensor | None]:
    """(φ(x) [N, D], Σ log φ′ [N] float32 or None) of contiguous rows x [N, D], float32 or bfloat16."""
    check_rows("x", x, dims=2)
    y, total = outputs_by_row(x, logabsdet)
    row_wise(x, y, total, activation_of(slopes, x.shape[1], fast=fast), inverse=False)
    return y, total


def activation_inverse(
    y: Tensor, slopes: Slopes, *, logabsdet: bool, steps: int | None = None, fast: bool = False
) -> tuple[Tensor, Tensor | None]:
    """(φ⁻¹(y) [N, D], −Σ log φ′ [N] float32 or None) of contiguous rows y [N, D], float32 or bfloat16.

    ``steps`` ≥ 1 of Halley's iteration: by default as many as float slopes need, or ``LEARNT_STEPS`` for a
    tensor, since to look at its values the host would have to wait for the device.
    """
    check_rows("y", y, dims=2)
    x, total = outputs_by_row(y, logabsdet)
    activation = activation_of(slopes, y.shape[1], steps=steps_of(slopes, steps), fast=fast)
    row_wise(y, x, total, activation, inverse=True)
    return x, total


def outputs_by_row(x: Tensor, logabsdet: bool) -> tuple[Tensor, Tensor | None]:
    """Memory for rows like x [..., D] and, if asked for, a float32 for each."""
    total = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device) if logabsdet else None
    return torch.empty_like(x), total


def row_wise(x: Tensor, y: Tensor, total: Tensor | None, activation: Activation, *, inverse: bool) -> None:
    """y ← φ(x) and total ← Σ log φ′(x), or, ``inverse``, φ⁻¹(x) and −Σ log φ′(y), of rows [..., D]."""
    D = x.shape[-1]
    N = x.numel() // D
    tile = tiles.activation_tile("inverse" if inverse else "forward", D)
    launch(
        *(activation_kernel, (triton.cdiv(N, tile.rows),), tile),
        *(x, y, total, activation, N, D),
        INVERSE=inverse,
        ROWS=tile.rows,
        COLUMNS=tile.columns,
    )


def activation_backward(
    grad_y: Tensor, grad_logabsdet: Tensor | None, x: Tensor, slopes: Slopes, *, fast: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Gradients of x [N, D], and of ``slopes`` if a tensor, from those of φ(x) [N, D] and of Σ log φ′(x) [N].

    g_x = g_y·φ′ + g_ld·φ″/φ′, and g_θ = Σ g_y·∂φ/∂θ + g_ld·∂log φ′/∂θ for θ = a, c, κ. ``grad_y`` and x are
    contiguous and of one dtype, float32 or bfloat16, and so is the gradient of x; ``grad_logabsdet`` and the
    gradient of slopes, in their shape, are float32. One launch, and one sum of its programs' sums.
    """
    grad_x, _, grad_slopes = row_gradients(
        *_one_member(grad_y, grad_logabsdet, x), slopes, inverse=False, column_sums=False, fast=fast
    )
    return grad_x.squeeze(0), grad_slopes


def activation_inverse_backward(
    grad_x: Tensor, grad_logabsdet: Tensor | None, x: Tensor, slopes: Slopes, *, fast: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Gradients of y [N, D], and of ``slopes`` if a tensor, from those of x = φ⁻¹(y) and of −Σ log φ′(x) [N].

    g_y = (g_x − g_ld·φ″/φ′)/φ′, and g_θ = −Σ g_y·∂φ/∂θ + g_ld·∂log φ′/∂θ for θ = a, c, κ, all at x, which
    the inverse returned; otherwise as ``activation_backward``.
    """
    grad_y, _, grad_slopes = row_gradients(
        *_one_member(grad_x, grad_logabsdet, x), slopes, inverse=True, column_sums=False, fast=fast
    )
    return grad_y.squeeze(0), grad_slopes


def _one_member(grad: Tensor, grad_logabsdet: Tensor | None, x: Tensor) -> tuple[Any, Any, Any]:
    """Rows [N, D] as those of K = 1 member."""
    check_rows("x", x, dims=2)
    return (
        grad.unsqueeze(0),
        None if grad_logabsdet is None else grad_logabsdet.unsqueeze(0),
        x.unsqueeze(0),
    )


def row_gradients(
    grad: Tensor,
    grad_logabsdet: Tensor | None,
    x: Tensor,
    slopes: Slopes,
    *,
    inverse: bool,
    column_sums: bool,
    fast: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(gradient of x, its sums over the rows [K, D] or None, gradient of ``slopes`` or None).

    ``activation_backward``, or, ``inverse``, ``activation_inverse_backward``, for the rows [K, N, D] of K
    members, ``grad_logabsdet`` [K, N]; with ``column_sums``, float32, in the same launch.
    """
    check_rows("x", x)
    K, N, D = x.shape
    check_parameter("the gradient of the rows", grad, (K, N, D), x.dtype)
    check_parameter("grad_logabsdet", grad_logabsdet, (K, N), torch.float32)
    slope_sums = isinstance(slopes, Tensor)
    tile = tiles.activation_tile("backward", D)
    blocks, programs = triton.cdiv(D, tile.columns), triton.cdiv(N, tile.rows)
    out = torch.empty_like(x)
    if column_sums or slope_sums:
        programs = min(programs, tiles.programs(8, K * blocks, tiles.architecture(x)))
    sums = memory_for_sums(x, programs, column_sums, slope_sums)
    launch(
        *(activation_bwd_kernel, (programs * blocks, K), tile),
        *(grad, grad_logabsdet, x, out, sums, activation_of(slopes, D, fast=fast), N, D),
        INVERSE=inverse,
        COLUMN_SUMS=column_sums,
        SLOPE_SUMS=slope_sums,
        ROWS=tile.rows,
        COLUMNS=tile.columns,
    )
    return out, *split_sums(sums, slopes, column_sums)


def memory_for_sums(x: Tensor, programs: int, column_sums: bool, slope_sums: bool) -> Tensor | None:
    """For the sums over rows x [K, N, D] that each program keeps with ``store_sums``; None for none."""
    K, _, D = x.shape
    if not (column_sums or slope_sums):
        return None
    shape = (K, programs, column_sums + PARAMETERS.value * slope_sums, D)
    return torch.empty(shape, dtype=torch.float32, device=x.device)


def split_sums(
    sums: Tensor | None, slopes: Slopes | None, column_sums: bool
) -> tuple[Tensor | None, Tensor | None]:
    """([K, D] or None, gradient of ``slopes`` or None) of the programs' sums [K, programs, 1, 3 or 4, D]."""
    if sums is None:
        return None, None
    totals = sums.sum(1)
    columns = totals[:, 0].contiguous() if column_sums else None
    if not isinstance(slopes, Tensor):
        return columns, None
    by_slope = totals[:, -PARAMETERS.value :].sum(0)
    return columns, by_slope if slopes.dim() == 2 else by_slope.sum(-1)

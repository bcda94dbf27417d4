# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False
# mypy: disable-error-code="assignment, var-annotated"
"""φ(x) = a·x + (c/κ)·softplus(κ·x), its inverse and the logarithm of its slope.

Everything is computed in float32 from v = exp(−|κx|) ∈ [0, 1], which neither overflows nor cancels:
with w = 1/(1 + v) = σ(|κx|) and s = v·w = σ(−|κx|),

    φ(x)  = (x ≥ 0 ? a + c : a)·x + (c/κ)·log1p(v)
    φ′(x) = a + c·(x ≥ 0 ? w : s)

Exponential, reciprocal and the logarithm of the slope are single approximate instructions of NVIDIA GPUs.
What the PTX manual documents of them keeps float32's accuracy: a reciprocal is off by one unit in the last
place at most, the exponential by two beside what the rounding of its argument does. The logarithm has only
absolute accuracy, 2e-7: where φ′ is near 1, log φ′ has the rounding error of φ′, as a sum with log|det W| has
in any case. log1p, which counts in φ itself, is a polynomial of 10 instructions, where ``tl.log`` takes 28.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from lunet_fast.kernels.launch import INTERPRETED

LN2: tl.constexpr = tl.constexpr(math.log(2.0))
LOG2E: tl.constexpr = tl.constexpr(1.0 / math.log(2.0))
#: The least a/c for which φ⁻¹ takes one step from seven tangents, and how far to the left of their roots it
#: starts, since none lies left of the solution: in κx, for a/c → 0.
AT_ONCE_FROM = 0.1
SHIFT: tl.constexpr = tl.constexpr(0.0381)
#: The same of Halley's steps.
HALLEY_SHIFT: tl.constexpr = tl.constexpr(0.335)
LARGEST: tl.constexpr = tl.constexpr(torch.finfo(torch.float32).max)

#: How many parameters φ has, whose gradients ``slope_gradients`` gives.
PARAMETERS: tl.constexpr = tl.constexpr(3)


@triton.jit
def repeated(value, times: tl.constexpr):
    """A tuple of ``times`` the value: Triton 3.6's interpreter does not multiply a tuple by a constexpr."""
    values = ()
    for _ in tl.static_range(times):
        values = values + (value,)  # noqa: RUF005
    return values


# --- elementary functions -------------------------------------------------------------------------------


@triton.jit
def _exp2(t):
    """2^t; results below 2^-126 are zero."""
    if INTERPRETED:
        return tl.exp2(t)
    return tl.inline_asm_elementwise(
        "ex2.approx.ftz.f32 $0, $1;", "=f,f", [t], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def reciprocal(d):
    """1/d for a normal d > 0; 0 for infinity."""
    if INTERPRETED:
        return 1.0 / d
    return tl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;", "=f,f", [d], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def log2(u):
    """log₂ u for a normal u > 0, or NaN; absolute error below 2.4e-7 in [1/2, 2], beyond relative."""
    if INTERPRETED:
        return tl.log2(u)
    return tl.inline_asm_elementwise(
        "lg2.approx.ftz.f32 $0, $1;", "=f,f", [u], dtype=tl.float32, is_pure=True, pack=1
    )


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
def _sigmoids(x, kappa):
    """(v, w, s) at x: exp(−|κx|), σ(|κx|) and σ(−|κx|)."""
    v = _exp2(-tl.abs(x * (kappa * LOG2E)))
    w = reciprocal(1.0 + v)
    return v, w, v * w


# --- φ --------------------------------------------------------------------------------------------------


@triton.jit
def load_family(activation, layer, cols, D):
    """(a, c, κ) of a layer in these columns [COLUMNS], which the functions below take: scalars, or for slopes
    that differ by column [1, COLUMNS]."""
    a = activation.a
    c = activation.c
    kappa = activation.kappa
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
    return a, c, kappa


@triton.jit
def phi(x, family):
    """φ(x), elementwise."""
    a, c, kappa = family
    v = _exp2(-tl.abs(x * (kappa * LOG2E)))
    # A slope times x, not times κx: that may overflow where φ does not.
    return x * tl.where(x < 0.0, a, a + c) + _log1p_unit(v) * (c / kappa)


@triton.jit
def phi_derivative(x, family):
    """φ′(x), elementwise. Where the exponential overflows, σ(κx) is 0."""
    a, c, kappa = family
    return reciprocal(1.0 + _exp2(x * (-kappa * LOG2E))) * c + a


@triton.jit
def _below_tangent(y, x, family, T: tl.constexpr, SOFTPLUS: tl.constexpr, SIGMOID: tl.constexpr):
    """The lesser of x and the root of φ's tangent at κx = T, ``SHIFT``·c/(a + c) to the left; softplus(T),
    σ(T)."""
    a, c, kappa = family
    per_slope = 1.0 / (a + c * SIGMOID)
    root = T - SHIFT * (c / (a + c)) - (a * T + c * SOFTPLUS) * per_slope
    return tl.minimum(x, y * per_slope + root * (1.0 / kappa))


@triton.jit
def _phi_inverse_at_once(y, family):
    """φ⁻¹(y), elementwise, for a/c ≥ ``AT_ONCE_FROM``: one step of fourth order from the nearest of seven
    tangents. Where these are, and ``SHIFT``, makes the greatest error least: 2.5e-8 of |y| + φ(0), rounding
    apart.

    With f = φ(x) − y, e = exp(κx), α = a/(a + (a + c)·e) and β = 1/(1 + e), f″/f′ = κ(β − α) and f‴/f″ =
    κ(2β − 1): so −u·(1 + u/2·f″/f′·(1 + u·(f″/f′ − f‴/(3·f″)))) with u = f/f′, the step, takes two
    reciprocals. Where e overflows it is NaN, and so it is for an infinite y: then ``tl.minimum`` takes the
    tangent at infinity, which is φ to rounding there.
    """
    a, c, kappa = family
    bound = tl.minimum(y * (1.0 / a), y * (1.0 / (a + c)))  # tangents at −∞ and +∞
    x = _below_tangent(y, bound, family, -2.986, 0.0492558, 0.0480624)
    x = _below_tangent(y, x, family, -1.488, 0.2036132, 0.1842221)
    x = _below_tangent(y, x, family, -0.439, 0.4975463, 0.3919793)
    x = _below_tangent(y, x, family, 0.752, 1.1382298, 0.6796143)
    x = _below_tangent(y, x, family, 3.354, 3.3883476, 0.9662356)
    e = _exp2(x * (kappa * LOG2E))
    d = 1.0 + e
    f = x * a - y + log2(d) * (c / kappa * LN2)
    per_d = reciprocal(d)
    per_n = reciprocal(e * (a + c) + a)
    u = f * (d * per_n)
    bend = per_d - per_n * a
    half = 0.5 * kappa
    third = half * kappa / 3.0
    curve = per_d * third + third - per_n * (a * half * kappa)
    return tl.minimum(x - u * (u * bend * (u * curve + half) + 1.0), bound)


@triton.jit
def phi_inverse(y, family, STEPS: tl.constexpr):
    """φ⁻¹(y), elementwise: steps of Halley's iteration from the nearest of five tangents; STEPS = 1:
    ``_phi_inverse_at_once``.

    With t = κx, r = a/c and w = κy/c the equation is f(t) = softplus(t) + r·t − w = 0. f is convex, so each
    tangent's root is not left of the solution and the least of them is the nearest; there f·f″ ≤ f′², so the
    denominator f′² − f·f″/2 of the step f·f′/(f′² − f·f″/2) is at least f′²/2, and left of the solution it
    is greater than f′². So the start may lie a little to the left of the root, where it is nearer. Where the
    three tangents between those at −∞ and +∞ are, and ``HALLEY_SHIFT``, makes the greatest error of two steps
    least over all r ≥ 2⁻¹³, 9e-10 of |t| + |w|/f′. Where t is not finite (y is not, or κy/c overflowed) φ is
    its asymptote. Of f only the last step needs every digit.
    """
    if STEPS == 1:
        return _phi_inverse_at_once(y, family)
    a, c, kappa = family
    r = a / c
    w = y * (kappa / c)
    per_most = 1.0 / (1.0 + r)
    t = tl.minimum(w * per_most, w * (1.0 / r))  # tangents at +∞ and −∞
    t = tl.minimum(t, (w - 0.0116161) * (1.0 / (0.00155612 + r)))
    t = tl.minimum(t, (w - 0.0976447) * (1.0 / (0.01989873 + r)))
    t = tl.minimum(t, (w - 0.5218270) * (1.0 / (0.21602212 + r)))
    t -= HALLEY_SHIFT * per_most
    for step in tl.static_range(STEPS):
        v, inverse, small = _sigmoids(t, 1.0)
        soft = _log1p_unit(v) if step == STEPS - 1 else log2(1.0 + v) * LN2
        f = (tl.maximum(t, 0.0) - w) + r * t + soft
        slope = tl.where(t < 0.0, small, inverse) + r
        t -= f * slope * reciprocal(slope * slope - 0.5 * f * (small * inverse))
    asymptote = tl.minimum(y * (1.0 / a), y * (1.0 / (a + c)))
    return tl.where(tl.abs(t) <= LARGEST, t * (1.0 / kappa), asymptote)


@triton.jit
def phi_backward(g, ld, x, family, INVERSE: tl.constexpr):
    """g·φ′(x) + ld·φ″(x)/φ′(x), the gradient of x from g, that of φ(x), and ld, that of log φ′(x) or None.

    INVERSE: (g − ld·φ″/φ′)/φ′, the gradient of y from those of x = φ⁻¹(y) and of −log φ′(x).
    """
    a, c, kappa = family
    _, w, s = _sigmoids(x, kappa)
    slope = tl.where(x < 0.0, s, w) * c + a
    if INVERSE:
        per_slope = reciprocal(slope)
        if ld is not None:
            g -= ld * ((s * w) * (c * kappa) * per_slope)
        return g * per_slope
    if ld is not None:
        return g * slope + ld * ((s * w) * (c * kappa) * reciprocal(slope))
    return g * slope


@triton.jit
def slope_gradients(g, ld, x, family):
    """g·∂φ/∂θ + ld·∂log φ′/∂θ at x for θ = a, c, κ, elementwise; ld may be None.

    Of softplus, x·σ(κx) − softplus(κx)/κ is −|x|·s − log1p(v)/κ: no difference of large numbers.
    """
    a, c, kappa = family
    v, w, s = _sigmoids(x, kappa)
    soft = _log1p_unit(v) * (1.0 / kappa)
    by_a = g * x
    by_c = g * (tl.maximum(x, 0.0) + soft)
    by_kappa = -(g * (tl.abs(x) * s + soft)) * (c / kappa)
    if ld is not None:
        sigmoid = tl.where(x < 0.0, s, w)
        share = ld * reciprocal(sigmoid * c + a)
        by_a += share
        by_c += share * sigmoid
        by_kappa += share * ((s * w) * x * c)
    return by_a, by_c, by_kappa


def inverse_steps(r: float) -> int:
    """Steps of ``phi_inverse`` to the rounding floor of float32 for r = a/c: 1 for r ≥ ``AT_ONCE_FROM``, 2
    for r ≥ 2⁻¹³, one more for each factor of 8 below. Counted on a grid of w; the hardest lie where eᵗ and
    r·t are of one size."""
    if r >= AT_ONCE_FROM:
        return 1
    return 2 + math.ceil(max(0.0, -13.0 - math.log2(r)) / 3.0)

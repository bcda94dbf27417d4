# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False
# mypy: disable-error-code="assignment, var-annotated"
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

import torch
import triton
import triton.language as tl

LN2: tl.constexpr = tl.constexpr(math.log(2.0))
LOG2E: tl.constexpr = tl.constexpr(1.0 / math.log(2.0))
LARGEST: tl.constexpr = tl.constexpr(torch.finfo(torch.float32).max)

#: How many parameters φ has, whose gradients ``slope_gradients`` gives.
PARAMETERS: tl.constexpr = tl.constexpr(3)


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
    """log(1 + z) for −1 < z < ∞ with 1 + z a normal number; NaN for NaN."""
    return log(1.0 + z, z, FAST)


@triton.jit
def log(u, z, FAST: tl.constexpr):
    """log u for a normal number u, of which z = u − 1; NaN for NaN.

    u = 2^e·(1 + p) with p in [−1/3, 1/3); for e = 0, p is z itself, so where u is 1 + z, its rounding does
    not matter where it would. FAST has only absolute accuracy, about 2e-7.
    """
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


# --- φ --------------------------------------------------------------------------------------------------


@triton.jit
def load_family(activation, layer, cols, D):
    """φ of a layer in these columns [COLUMNS], which the functions below take with the activation itself:

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


def inverse_steps(r: float) -> int:
    """Steps of ``phi_inverse`` to the rounding floor of float32 for r = a/c: 2 for r ≥ 1/16, one more for
    each factor of 8 below. Counted on a grid of w; the hardest lie where eᵗ and r·t are of one size."""
    return 2 + math.ceil(max(0.0, -4.0 - math.log2(r)) / 3.0)

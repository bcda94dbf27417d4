# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False
# mypy: disable-error-code="assignment, no-redef"
"""The monotone quadratic spline: its table, an element in its bin, and the sums for its parameters' gradient.

The slope is linear in each of K bins of width s from ``low`` on, and constant outside. With i the bin,
t = x − low − i·s and w = t clamped to [0, s],

    φ′(x) = d_i + w·b_i,   φ(x) = base_i + t·φ′(x) − w²·b_i/2,

where base_i is φ at the bin's left end, d_i the slope there and b_i its rise per unit of x. An element needs
three numbers of a table [3·K + 4, D], which ``table_of`` makes in one launch from the parameters.

Where the table is: in memory, from which each element fetches its three; of a layer it is a few KiB and stays
in the multiprocessor's L1 cache. With K = 8 this is 31 instructions an element for φ, loads and stores of the
rows included, and no more for any K. ``tl.gather`` from a tile takes 67 (a shuffle for each row of the tile
that a thread holds), a loop over the knots that selects 62, and 127 with K = 16.

The gradient of the parameters is a sum over rows of what each element gives to its bin and to the heights of
all before it. c_k = (x − low)/s − k clamped to [0, 1] says how far the element has come through bin k: so

    φ(x) = … + s·Σ_k (d_k·c_k + (d_{k+1} − d_k)·c_k²/2),   φ′(x) = d_0 + Σ_k (d_{k+1} − d_k)·c_k

and two sums for each bin are enough, without asking in which bin an element is. A program adds those of a
tile to its own rows in memory, one bin after another: registers hold one bin's at a time, and there are no
atomics.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lunet_fast.kernels.launch import launch
from lunet_fast.kernels.leaky_softplus import reciprocal
from lunet_fast.kernels.tiles import Tile, ceil_div

#: The most bins: the inverse looks at the ends of all, and so do the sums.
MOST_BINS = 64

TINY: tl.constexpr = tl.constexpr(torch.finfo(torch.float32).tiny)
ALL_NAN: tl.constexpr = tl.constexpr(tl.PropagateNan.ALL)

#: Rows of a table before φ at the knots: low, the step and its reciprocal.
HEAD: tl.constexpr = tl.constexpr(3)

#: Rows of sums that are no bin's: of φ to the left and the right of all bins, and of the gradient itself.
OUTSIDE: tl.constexpr = tl.constexpr(3)


class Spline(NamedTuple):
    """A spline where launchers take slopes: ``parameters`` [K + 3, D] are low, step and φ′ at K + 1 knots.

    Those of several layers have their number in front.
    """

    parameters: Tensor

    @property
    def bins(self) -> int:
        """K."""
        return self.parameters.shape[-2] - 3


# --- the table ------------------------------------------------------------------------------------------


@triton.jit
def spline_table_kernel(
    parameters_ptr,  # [layers, BINS + 3, D]
    table_ptr,  # [layers, 3·BINS + 4, D] float32
    D,
    BINS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Low, step, 1/step; φ at the BINS + 1 knots; the slopes at the bins' left ends; their rises per unit."""
    layer = tl.program_id(1)
    cols = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    there = cols < D
    slopes_ptr = parameters_ptr + (layer * (BINS + 3) + 2) * D + cols
    base_ptr = table_ptr + (layer * (3 * BINS + 4) + HEAD) * D + cols
    low = tl.load(slopes_ptr - 2 * D, mask=there, other=0.0).to(tl.float32)
    step = tl.load(slopes_ptr - D, mask=there, other=1.0).to(tl.float32)
    tl.store(base_ptr - HEAD * D, low, mask=there)
    tl.store(base_ptr - (HEAD - 1) * D, step, mask=there)
    tl.store(base_ptr - (HEAD - 2) * D, 1.0 / step, mask=there)

    # The middle of the bins maps to itself. Heights are sums of positive numbers that are subtracted again:
    # in float64 nothing of them is lost.
    width = step.to(tl.float64)
    left = tl.load(slopes_ptr, mask=there, other=1.0).to(tl.float64)
    height = low.to(tl.float64) + (0.5 * BINS) * width
    for k in range(BINS // 2):
        right = tl.load(slopes_ptr + (k + 1) * D, mask=there, other=1.0).to(tl.float64)
        height -= 0.5 * width * (left + right)
        left = right
    if BINS % 2 == 1:
        right = tl.load(slopes_ptr + (BINS // 2 + 1) * D, mask=there, other=1.0).to(tl.float64)
        height -= 0.125 * width * (3.0 * left + right)
    left = tl.load(slopes_ptr, mask=there, other=1.0).to(tl.float64)
    for k in range(BINS):
        right = tl.load(slopes_ptr + (k + 1) * D, mask=there, other=1.0).to(tl.float64)
        tl.store(base_ptr + k * D, height.to(tl.float32), mask=there)
        tl.store(base_ptr + (BINS + 1 + k) * D, left.to(tl.float32), mask=there)
        tl.store(base_ptr + (2 * BINS + 1 + k) * D, ((right - left) / width).to(tl.float32), mask=there)
        height += 0.5 * width * (left + right)
        left = right
    tl.store(base_ptr + BINS * D, height.to(tl.float32), mask=there)


def table_of(spline: Spline, D: int, layers: int | None) -> Tensor:
    """What kernels read of a spline, or of those of so many layers: [layers or 1, 3·K + 4, D] float32."""
    parameters, leading = spline.parameters, () if layers is None else (layers,)
    if parameters.shape != (*leading, spline.bins + 3, D) or not parameters.is_contiguous():
        raise ValueError(
            f"the spline's parameters must be contiguous {[*leading, 'K + 3', D]}, "
            f"got {list(parameters.shape)}"
        )
    if not 1 <= spline.bins <= MOST_BINS:
        raise ValueError(f"the spline must have 1 to {MOST_BINS} bins, got {spline.bins}")
    shape = (1 if layers is None else layers, 3 * spline.bins + 4, D)
    table = torch.empty(shape, dtype=torch.float32, device=parameters.device)
    tile = Tile(1, min(128, triton.next_power_of_2(D)), 0, 1, 1)
    launch(
        *(spline_table_kernel, (ceil_div(D, tile.columns), shape[0]), tile),
        *(parameters, table),
        D=D,
        BINS=spline.bins,
        COLUMNS=tile.columns,
    )
    return table


# --- an element in its bin ------------------------------------------------------------------------------


@triton.jit
def load_spline(table_ptr, layer, cols, D, BINS: tl.constexpr):
    """A layer's spline in these columns [COLUMNS]: (low, step, 1/step, cols) as [1, COLUMNS], the address of
    φ at the knots, and D.

    Columns that are not there have the spline of the first: no load from the table needs a mask.
    """
    cols = tl.where(cols < D, cols, 0)[None, :]
    table_ptr += layer * ((3 * BINS + 4) * D)
    low = tl.load(table_ptr + cols)
    step = tl.load(table_ptr + D + cols)
    per_step = tl.load(table_ptr + 2 * D + cols)
    # A jitted function returns no constants, and D may be one.
    return low, step, per_step, cols, table_ptr + HEAD * D, tl.full([1, 1], 0, tl.int32) + D


@triton.jit
def _slope_in(place, own, BINS: tl.constexpr):
    """(d_i, b_i) of the elements at these places in a table."""
    base_ptr, stride = own[4], own[5]
    place += (BINS + 1) * stride
    return tl.load(base_ptr + place), tl.load(base_ptr + (place + BINS * stride))


@triton.jit
def in_bin(x, own, BINS: tl.constexpr):
    """(x, its place in a table, t, w, d_i, b_i); NaN in bin 0, with w NaN."""
    from_low = x - own[0]
    i = tl.minimum(tl.maximum(from_low * own[2], 0.0), BINS - 1.0).to(tl.int32)
    t = from_low - i.to(tl.float32) * own[1]
    w = tl.minimum(tl.maximum(t, 0.0, propagate_nan=ALL_NAN), own[1], propagate_nan=ALL_NAN)
    place = i * own[5] + own[3]
    start, bend = _slope_in(place, own, BINS)
    return x, place, t, w, start, bend


@triton.jit
def in_bin_of_value(y, own, BINS: tl.constexpr):
    """``in_bin`` of φ⁻¹(y): the bin by φ at the knots, and w from w·(d_i + w·b_i/2) = y − base_i.

    The root is 2v/(d_i + √(d_i² + 2·v·b_i)), which subtracts nothing. Beyond the bins w is 0 or the step
    exactly, as in ``in_bin``: what were wrong in it, the far right would multiply.
    """
    base_ptr, stride = own[4], own[5]
    i = tl.zeros_like(y).to(tl.int32)
    for k in range(1, BINS):
        i += (y >= tl.load(base_ptr + (k * stride + own[3]))).to(tl.int32)
    first = tl.load(base_ptr + own[3])
    last = tl.load(base_ptr + (BINS * stride + own[3]))
    place = i * stride + own[3]
    start, bend = _slope_in(place, own, BINS)
    inside = tl.minimum(tl.maximum(y, first, propagate_nan=ALL_NAN), last, propagate_nan=ALL_NAN)
    beyond = y - inside
    above = inside - tl.load(base_ptr + place)
    slope = tl.sqrt(tl.maximum(start * start + 2.0 * above * bend, TINY))
    w = tl.where(beyond > 0.0, own[1], 2.0 * above * reciprocal(start + slope))
    t = w + beyond * reciprocal(start + w * bend)
    return (own[0] + i.to(tl.float32) * own[1]) + t, place, t, w, start, bend


@triton.jit
def value(at, own):
    """φ(x) of an element in its bin."""
    half = 0.5 * at[3] * at[3] * at[5]
    return tl.load(own[4] + at[1]) + (at[2] * (at[4] + at[3] * at[5]) - half)


@triton.jit
def slope(at):
    """φ′(x) > 0."""
    return at[4] + at[3] * at[5]


@triton.jit
def backward(g, ld, at, INVERSE: tl.constexpr):
    """``activation.phi_backward``."""
    derivative = slope(at)
    per_slope = reciprocal(derivative)
    if ld is not None:
        # φ″ is 0 outside of the bins, where w is not t.
        share = ld * (tl.where(at[2] == at[3], at[5], 0.0) * per_slope)
        if INVERSE:
            return (g - share) * per_slope
        return g * derivative + share
    if INVERSE:
        return g * per_slope
    return g * derivative


# --- the parameters' gradient ---------------------------------------------------------------------------


@triton.jit
def _add_rows(ptr, terms, again, cols, D):
    """Σ_rows of terms [ROWS, COLUMNS] added to [D] at ptr, or stored there unless ``again``.

    Loaded before the sum, in which the warps that hold the same columns meet: none of them reads what another
    has stored already.
    """
    total = tl.load(ptr + cols, mask=cols < tl.where(again, D, 0), other=0.0)
    tl.store(ptr + cols, total + tl.sum(terms, 0), mask=cols < D)


@triton.jit
def add_gradient_sums(ptr, again, g, ld, at, own, cols, D, BINS: tl.constexpr):
    """The sums of this tile's elements, added to a program's own [2·BINS + 3, D], or stored there unless
    ``again``: ``parameter_gradient`` makes the gradient of the parameters from them.

    g is the gradient of φ, ld [ROWS, 1] that of log φ′ or None; where there is no element, both are 0. What
    one call stores the next one reads, by another thread: between two calls is a barrier.
    """
    u = (at[0] - own[0]) * own[2]
    # Infinities count as standing a bin outside: their gradient would be infinite, or NaN.
    near = tl.minimum(tl.maximum(u, -1.0), BINS + 1.0)
    u = tl.where(tl.abs(u) == float("inf"), near, u)
    g = g * own[1]
    share = tl.zeros_like(g)
    if ld is not None:
        share += ld * reciprocal(slope(at))
    _add_rows(ptr, g * tl.minimum(u, 0.0) + share, again, cols, D)
    _add_rows(ptr + D, g * tl.maximum(u - BINS, 0.0), again, cols, D)
    _add_rows(ptr + 2 * D, g, again, cols, D)
    ptr += OUTSIDE * D
    for k in range(BINS):
        c = tl.minimum(tl.maximum(u - k, 0.0), 1.0)
        first = g * c
        _add_rows(ptr, first, again, cols, D)
        _add_rows(ptr + D, (0.5 * first + share) * c, again, cols, D)
        ptr += 2 * D


def gradient_rows(spline: Spline) -> int:
    """How many rows of sums the parameters' gradient takes."""
    return 2 * spline.bins + OUTSIDE.value


@functools.lru_cache(maxsize=32)
def _from_sums(bins: int, device: torch.device) -> Tensor:
    """The matrix [K + 3, 2·K + 3] from sums to the gradient of low, step (which have none) and the slopes."""
    K, half = bins, bins // 2
    matrix = torch.zeros(K + 3, 2 * K + OUTSIDE.value, dtype=torch.float64)
    of_slopes, by_bin = matrix[2:], torch.arange(K)
    of_slopes[0, 0], of_slopes[K, 1] = 1.0, 1.0
    # What the middle's height takes from all: the slopes' share in it.
    centre = of_slopes[:, 2]
    centre[:half] -= 0.5
    centre[1 : half + 1] -= 0.5
    if K % 2:
        centre[half] -= 0.375
        centre[half + 1] -= 0.125
    columns = OUTSIDE.value + 2 * by_bin
    of_slopes[by_bin, columns] = 1.0
    of_slopes[by_bin, columns + 1] -= 1.0
    of_slopes[by_bin + 1, columns + 1] += 1.0
    return matrix.to(device)


def parameter_gradient(sums: Tensor) -> Tensor:
    """The gradient [..., K + 3, D] of a spline's parameters, float32, from the sums [..., 2·K + 3, D] over
    all rows. In float64, whatever precision float32 products are allowed."""
    bins = (sums.shape[-2] - OUTSIDE.value) // 2
    return (_from_sums(bins, sums.device) @ sums.double()).float()

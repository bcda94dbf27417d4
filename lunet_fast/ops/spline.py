"""The monotone quadratic spline in differentiable PyTorch: what each implementation of it has to equal.

Its slope is continuous and piecewise linear on K + 1 uniform knots x_k = low + k·step and constant outside of
them. With u = (x − low)/step, the bin i = ⌊u⌋ in 0 … K − 1, t = u − i, w = t clamped to [0, 1], knot slopes d
and Δ = d_{i+1} − d_i,

    φ′(x) = d_i + w·Δ,   φ(x) = middle + step·(Y_i − c + t·φ′(x) − w²·Δ/2),   Y_k = Σ_{j<k} (d_j + d_{j+1})/2,

where c is what makes the middle of the interval map to itself. An ``Activation`` of this kind has
``parameters`` [K + 3, D]: low, step and d_0 … d_K > 0. Low and step say where the spline is; they are not
learnt, and have no gradient.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lunet_fast.ops.precision import wide

KIND = "monotone_spline"


class Knots(NamedTuple):
    """low, step and middle [D], in x's units; slopes d and heights Y − c, in steps, [K + 1, D]."""

    low: Tensor
    step: Tensor
    middle: Tensor
    slopes: Tensor
    heights: Tensor


def knots(parameters: Tensor) -> Knots:
    """The knots of ``parameters`` [K + 3, D]."""
    low, step, slopes = parameters[0].detach(), parameters[1].detach(), parameters[2:]
    bins = slopes.shape[0] - 1
    rises = 0.5 * (slopes[1:] + slopes[:-1])
    heights = torch.cat([torch.zeros_like(rises[:1]), rises.cumsum(0)])
    half = bins // 2
    centre = heights[half]
    if bins % 2:
        centre = centre + 0.125 * (3.0 * slopes[half] + slopes[half + 1])
    return Knots(low, step, low + (0.5 * bins) * step, slopes, heights - centre)


def _at(table: Tensor, index: Tensor) -> Tensor:
    """table[index, column] for index [..., D] and table [K, D]."""
    return table.gather(0, index.reshape(-1, index.shape[-1])).reshape(index.shape)


def _bend(slopes: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """(d_i, d_{i+1} − d_i) [..., D]."""
    return _at(slopes, index), _at(slopes[1:] - slopes[:-1], index)


def _located(x: Tensor, own: Knots) -> tuple[Tensor, Tensor, Tensor]:
    """(i, t, w) [..., D]; NaN in bin 0."""
    u = (x - own.low) / own.step
    last = own.slopes.shape[0] - 2
    index = u.detach().clamp(0, last).nan_to_num(0.0).long()
    t = u - index
    return index, t, t.clamp(0.0, 1.0)


def forward(x: Tensor, parameters: Tensor) -> Tensor:
    """φ(x) [..., D]."""
    own = knots(parameters.to(wide(x.dtype)))
    index, t, w = _located(x.to(own.low.dtype), own)
    start, bend = _bend(own.slopes, index)
    y = _at(own.heights, index) + t * (start + w * bend) - 0.5 * w * w * bend
    return (own.middle + own.step * y).to(x.dtype)


def log_derivative(x: Tensor, parameters: Tensor) -> Tensor:
    """log φ′(x) [..., D], float32 or wider."""
    own = knots(parameters.to(wide(x.dtype)))
    index, _, w = _located(x.to(own.low.dtype), own)
    start, bend = _bend(own.slopes, index)
    return (start + w * bend).log()


def inverse(y: Tensor, parameters: Tensor) -> Tensor:
    """φ⁻¹(y) [..., D]: the bin by its heights, and w from w·(d_i + w·Δ/2) = v, v the height above its start.

    The root is 2v/(d_i + √(d_i² + 2vΔ)), which subtracts nothing: the square root is φ′(x).
    """
    own = knots(parameters.to(wide(y.dtype)))
    height = (y.to(own.low.dtype) - own.middle) / own.step
    rows = height.detach().reshape(-1, height.shape[-1])
    inner = own.heights[1:-1].detach().T.contiguous()
    index = torch.searchsorted(inner, rows.T.contiguous(), right=True).T.reshape(height.shape)
    start, bend = _bend(own.slopes, index)
    inside = torch.minimum(torch.maximum(height, own.heights[0]), own.heights[-1])
    above = inside - _at(own.heights, index)
    slope = (start * start + 2.0 * above * bend).clamp_min(torch.finfo(start.dtype).tiny).sqrt()
    beyond = height - inside
    # The far right multiplies what is wrong in w: there it is 1 exactly, as in ``forward``.
    w = torch.where(beyond > 0, 1.0, 2.0 * above / (start + slope))
    return (own.low + own.step * (index + w + beyond / (start + w * bend))).to(y.dtype)

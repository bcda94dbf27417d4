"""The monotone quadratic spline of ``ops/spline.py``, elementwise on rows.

Per row and coordinate: the bin, three look-ups in tables [K, D], a few products. Nothing of K times the size
of the rows is made.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lunet_fast.ops import spline
from lunet_fast.ops.cpu.elementwise import KINDS, Elementwise
from lunet_fast.ops.cpu.sweeps import sweeps
from lunet_fast.ops.values import Activation

_hardtanh_backward_out = torch.ops.aten.hardtanh_backward.grad_input


class _Located(NamedTuple):
    """Rows in their bins: flat places in the tables, t and w, step·φ′ and step·Δ."""

    place: Tensor
    t: Tensor
    w: Tensor
    slope: Tensor
    bend: Tensor


class MonotoneSpline(Elementwise):
    """``parameters`` [K + 3, D] are low, step and the slopes at the knots."""

    def __init__(self, activation: Activation, dtype: torch.dtype) -> None:
        parameters = activation.parameters
        assert parameters is not None
        self.parameters = parameters
        self.dtype = dtype
        own = spline.knots(parameters.to(dtype))
        self.low, self.step, self.middle = own.low, own.step, own.middle
        self.per_step = own.step.reciprocal()
        self.bins = own.slopes.shape[0] - 1
        # In units of x, so that no pass over the rows has to multiply with the step.
        self.slopes = own.slopes * own.step
        self.bends = self.slopes[1:] - self.slopes[:-1]
        self.heights = torch.addcmul(own.middle, own.heights, own.step)

    @classmethod
    def of(cls, activation: Activation, dtype: torch.dtype) -> MonotoneSpline:
        return cls(activation, dtype)

    @functools.cached_property
    def _log_step(self) -> Tensor:
        return self.step.log().sum()

    def _places(self, index: Tensor) -> Tensor:
        """Flat places in a table [K, D] of bins [N, D] that are whole numbers in floating point.

        As floating point they are vectorised, as integers not; but there they are exact up to a size only.
        """
        columns = self.low.shape[0]
        across = torch.arange(columns, dtype=index.dtype, device=index.device)
        if self.bins * columns < 1 / torch.finfo(index.dtype).eps:
            place = torch.add(across, index, alpha=columns).long()
        else:
            place = index.long() * columns + across.long()
        return place.reshape(-1)

    def _look_up(self, table: Tensor, place: Tensor, like: Tensor) -> Tensor:
        return table.reshape(-1).index_select(0, place).reshape(like.shape)

    def _locate(self, h: Tensor) -> _Located:
        u = torch.sub(h.to(self.dtype), self.low).mul_(self.per_step)
        index = u.clamp(0, self.bins - 1).floor_()
        if not (h.device.type == "cpu" and math.isfinite(h.sum().item())):
            index.nan_to_num_(0.0)  # NaN is in no bin
        t = u.sub_(index)
        w = t.clamp(0.0, 1.0)
        place = self._places(index)
        bend = self._look_up(self.bends, place, w)
        slope = self._look_up(self.slopes, place, w).addcmul_(w, bend)
        return _Located(place, t, w, slope, bend)

    # --- forward ---

    def _value(self, at: _Located) -> Tensor:
        y = self._look_up(self.heights, at.place, at.w).addcmul_(at.t, at.slope)
        return y.addcmul_(at.w.square(), at.bend, value=-0.5)

    def _log_sum(self, slope: Tensor) -> Tensor:
        return slope.log().sum(-1).sub_(self._log_step)

    def activated(self, h: Tensor, *, logabsdet: bool) -> tuple[Tensor, Tensor | None]:
        y = torch.empty_like(h)
        total = torch.empty(h.shape[0], dtype=self.dtype, device=h.device) if logabsdet else None
        for h_part, y_part, *total_part in sweeps(h, y, *(() if total is None else (total,))):
            self.activated_into(y_part, total_part[0] if total_part else None, h_part)
        return y, total

    def activated_into(self, y: Tensor, total: Tensor | None, h: Tensor) -> None:
        at = self._locate(h)
        y.copy_(self._value(at))
        if total is not None:
            total.copy_(self._log_sum(at.slope))

    def activate_into(self, y: Tensor, h: Tensor) -> None:
        y.copy_(self._value(self._locate(h)))

    def log_derivative_sum_into(self, total: Tensor, h: Tensor) -> None:
        total.copy_(self._log_sum(self._locate(h).slope))

    # --- gradients ---

    def backward_into(
        self, grad_h: Tensor, grad_y: Tensor, h: Tensor, ld: Sequence[Tensor], totals: Tensor | None
    ) -> None:
        at, g = self._locate(h), grad_y.to(self.dtype)
        share = torch.div(ld[0], at.slope) if ld else None
        result = g * at.slope
        if share is not None:
            result.add_(_within(share * at.bend, at.t))
        grad_h.copy_(result.mul_(self.per_step))
        if totals is not None:
            self._accumulate(totals, g, share, at)

    def inverse_backward_into(
        self, grad_y: Tensor, grad_h: Tensor, h: Tensor, ld: Sequence[Tensor], totals: Tensor | None
    ) -> None:
        at, g = self._locate(h), grad_h.to(self.dtype)
        share = torch.div(ld[0], at.slope) if ld else None
        if share is not None:
            g = torch.addcmul(g, _within(share * at.bend, at.t), self.per_step, value=-1.0)
        g = (g / at.slope).mul_(self.step)
        grad_y.copy_(g)
        if totals is not None:
            self._accumulate(totals, -g, None if share is None else -share, at)

    def _accumulate(self, totals: Tensor, g: Tensor, share: Tensor | None, at: _Located) -> None:
        """totals ← totals + the slopes' gradient from g of φ and ``share`` = ld/(step·φ′) of step·φ′."""
        by_slope = g * at.t
        if share is not None:
            by_slope.add_(share)
        half = (g * at.w).mul_(-0.5).add_(by_slope)  # of bend: w·(by_slope − g·w/2)
        of_heights, of_slopes, of_bends = (
            torch.zeros(self.bins * self.low.shape[0], dtype=g.dtype, device=g.device)
            .scatter_add_(0, at.place, values.reshape(-1))
            .view(self.bins, -1)
            for values in (g, by_slope, half.mul_(at.w))
        )
        slopes = totals[2:]
        of_slopes = (of_slopes - of_bends).mul_(self.step)
        slopes[:-1].add_(of_slopes)
        slopes[1:].addcmul_(of_bends, self.step)
        of_heights.mul_(self.step)
        of_rises = (of_heights.sum(0) - of_heights.cumsum(0)).mul_(0.5)
        middle, whole = self.bins // 2, of_heights.sum(0)
        of_rises[:middle].sub_(whole, alpha=0.5)
        if self.bins % 2:
            slopes[middle].sub_(whole, alpha=0.375)
            slopes[middle + 1].sub_(whole, alpha=0.125)
        slopes[:-1].add_(of_rises)
        slopes[1:].add_(of_rises)

    # --- inverse ---

    def inverse(self, y: Tensor) -> Tensor:
        x = torch.empty_like(y)
        for y_part, x_part in sweeps(y, x):
            v = y_part.to(self.dtype)
            index = self._bins_of(v)
            place = self._places(index)
            start, bend = (self._look_up(t, place, v) for t in (self.slopes, self.bends))
            inside = torch.minimum(torch.maximum(v, self.heights[0]), self.heights[-1])
            above = inside - self._look_up(self.heights, place, v)
            slope = torch.addcmul(start.square(), above, bend, value=2.0)
            slope = slope.clamp_min_(torch.finfo(slope.dtype).tiny).sqrt_()
            beyond = torch.sub(v, inside, out=inside)
            w = above.mul_(2.0).div_(slope.add_(start)).masked_fill_(beyond > 0, 1.0)
            t = beyond.div_(torch.addcmul(start, w, bend)).add_(w).add_(index)
            x_part.copy_(torch.addcmul(self.low, t, self.step))
        return x

    def _bins_of(self, v: Tensor) -> Tensor:
        """The bins [N, D] whose heights hold v, as whole numbers in its dtype; NaN in the last one."""
        inner = self.heights[1:-1].T.contiguous()
        return torch.searchsorted(inner, v.T.contiguous(), right=True).T.to(v.dtype)


def _within(values: Tensor, t: Tensor) -> Tensor:
    """``values`` where 0 ≤ t ≤ 1, else 0."""
    info = torch.finfo(t.dtype)
    return _hardtanh_backward_out(values, t, -info.tiny, 1.0 + 2.0 * info.eps, grad_input=values)


KINDS[spline.KIND] = MonotoneSpline

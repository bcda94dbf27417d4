"""The monotone quadratic spline of ``ops/spline.py``, elementwise on rows.

Per row and coordinate: the bin, three look-ups in tables [K + 2, D], a few products. Nothing of K times the
size of the rows is made. The tails are bins too, the first and the last, in which the slope does not bend: so
nothing has to ask where an element is.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lunet_fast.ops import spline
from lunet_fast.ops.cpu.elementwise import KINDS, Elementwise, Gradients, Recorded
from lunet_fast.ops.cpu.sweeps import column, is_one_sweep, sweeps
from lunet_fast.ops.values import Activation

#: Bins from which a search for a bin is faster than a look at each.
SEARCHED = 32


@functools.lru_cache(maxsize=32)
def _from_slopes(bins: int, device: torch.device) -> Tensor:
    """The matrix [3·(K + 2), K + 1] from slopes at the knots to the three tables: at the left ends of the
    bins the heights Y − c and the slopes, and how much the slope rises in a bin.

    The first bin ends where the second starts, a step further. In float64, so that its products are what they
    are whatever precision float32 products are allowed.
    """
    eye = torch.eye(bins + 1, dtype=torch.float64)
    heights = spline.knots(torch.cat([eye.new_zeros(1, bins + 1), eye.new_ones(1, bins + 1), eye])).heights
    none = eye.new_zeros(1, bins + 1)
    return torch.cat(
        [heights[:1] - eye[:1], heights, eye[:1], eye, none, eye[1:] - eye[:-1], none],
    ).to(device)


@functools.lru_cache(maxsize=32)
def _columns(bins: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The places of the second bin's columns in a flat table [K + 2, D].

    In floating point the arithmetic of places is vectorised, in integers not; but it is exact up to a size.
    """
    exact = (bins + 2) * columns < 1 / torch.finfo(dtype).eps
    return torch.arange(columns, 2 * columns, device=device, dtype=dtype if exact else torch.int64)


class _Located(NamedTuple):
    """Rows in their bins: flat places in the tables, t = x − the bin's left end, φ′, and φ″ there.

    Infinities stand in a tail and NaN anywhere, with their slope; ``odd``, if given, says where.
    """

    place: Tensor
    t: Tensor
    slope: Tensor
    bend: Tensor
    odd: Tensor | None = None


class MonotoneSpline(Elementwise):
    """``parameters`` [K + 3, D] are low, step and the slopes at the knots."""

    def __init__(self, activation: Activation, dtype: torch.dtype) -> None:
        parameters = activation.parameters
        assert parameters is not None
        self.parameters, self.dtype, self.bins = parameters, dtype, parameters.shape[0] - 3
        own = parameters.to(dtype)
        self.low, self.step = own[0], own[1]
        self.per_step = self.step.reciprocal()
        self.start = torch.mul(self.low, self.per_step).neg_()
        tables = (_from_slopes(self.bins, own.device) @ own[2:].double()).to(dtype)
        heights, slopes, rises = tables.view(3, self.bins + 2, -1).unbind()
        # In units of x, so that no pass over the rows has to multiply with the step.
        middle = torch.add(self.low, self.step, alpha=0.5 * self.bins)
        self.heights = torch.addcmul(middle, heights, self.step).view(-1)
        self.slopes, self.bends = slopes.reshape(-1), torch.mul(rises, self.per_step).view(-1)
        self.columns = _columns(self.bins, own.shape[1], dtype, own.device)

    @classmethod
    def of(cls, activation: Activation, dtype: torch.dtype) -> MonotoneSpline:
        return cls(activation, dtype)

    def _places(self, index: Tensor) -> Tensor:
        """Flat places in a table of bins −1 … K [N, D], whole numbers in floating point."""
        index = index.to(self.columns.dtype)
        return torch.add(self.columns, index, alpha=len(self.columns)).long().view(-1)

    def _look_up(self, table: Tensor, place: Tensor, like: Tensor) -> Tensor:
        return table.index_select(0, place).view(like.shape)

    def _locate(self, h: Tensor) -> _Located:
        u = torch.addcmul(self.start, h.to(self.dtype), self.per_step)
        if h.device.type == "cpu":
            try:
                at = self._located(u)
                # To look for infinities and NaN beforehand would take more passes over the rows.
                if math.isfinite(at.slope.sum().item()):
                    return at
            except IndexError:  # NaN is in no bin
                pass
        u = torch.addcmul(self.start, h.to(self.dtype), self.per_step)
        at = self._located(u.nan_to_num(0.0, self.bins + 1.0, -2.0))
        return at._replace(slope=torch.where(u.isnan(), u, at.slope), odd=u)

    def _located(self, u: Tensor) -> _Located:
        """At u = (x − low)/step, in its memory."""
        index = u.clamp(-1.0, self.bins).floor_()
        place = self._places(index)
        bend = self._look_up(self.bends, place, u)
        t = u.sub_(index).mul_(self.step)
        slope = self._look_up(self.slopes, place, u).addcmul_(t, bend)
        return _Located(place, t, slope, bend)

    # --- forward ---

    def _value(self, at: _Located) -> Tensor:
        """Height + t·(the mean slope from 0 to t)."""
        mean = torch.addcmul(at.slope, at.t, at.bend, value=-0.5)
        y = self._look_up(self.heights, at.place, at.t).addcmul_(at.t, mean)
        return y if at.odd is None else torch.where(at.odd.isfinite(), y, at.odd)

    def _log_sum(self, slope: Tensor) -> Tensor:
        """Σ log φ′; of products of four where that saves logarithms: ``MonotoneSpline.bound`` keeps them from
        running out of the range."""
        if slope.shape[-1] % 4 == 0:
            first, second, third, fourth = slope.chunk(4, -1)
            slope = (first * second).mul_(third).mul_(fourth)
        return slope.log().sum(-1)

    def activated(self, h: Tensor, *, logabsdet: bool) -> tuple[Tensor, Tensor | None]:
        if is_one_sweep(h, product=False):
            at = self._locate(h)
            return self._value(at).to(h.dtype), self._log_sum(at.slope) if logabsdet else None
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
        self.activated_into(y, None, h)

    def log_derivative_sum_into(self, total: Tensor, h: Tensor) -> None:
        total.copy_(self._log_sum(self._locate(h).slope))

    # --- gradients ---

    def backward_into(
        self, grad_h: Tensor, grad_y: Tensor, h: Tensor, ld: Sequence[Tensor], totals: Tensor | None
    ) -> None:
        grad_h.copy_(self._located_backward(self._locate(h), grad_y.to(self.dtype), ld, totals))

    def _located_backward(
        self, at: _Located, g: Tensor, ld: Sequence[Tensor], totals: Tensor | None
    ) -> Tensor:
        """``backward_into`` of rows in their bins."""
        share = torch.div(ld[0], at.slope) if ld else None
        result = g * at.slope
        if share is not None:
            result.addcmul_(share, at.bend)
        if totals is not None:
            self._accumulate(totals, g, share, at)
        return result

    def recorded(self, h: Tensor, *, logabsdet: bool) -> Recorded | None:
        if not is_one_sweep(h, product=False):
            return None
        at = self._locate(h)

        def backward(grad_y: Tensor, grad_logabsdet: Tensor | None) -> Gradients:
            totals = self.totals(h)
            grad_h = self._located_backward(at, grad_y.to(self.dtype), column(grad_logabsdet), totals)
            return grad_h.to(h.dtype), totals

        return self._value(at).to(h.dtype), self._log_sum(at.slope) if logabsdet else None, backward

    def inverse_backward_into(
        self, grad_y: Tensor, grad_h: Tensor, h: Tensor, ld: Sequence[Tensor], totals: Tensor | None
    ) -> None:
        at, g = self._locate(h), grad_h.to(self.dtype)
        share = torch.div(ld[0], at.slope) if ld else None
        if share is not None:
            g = torch.addcmul(g, share, at.bend, value=-1.0)
        g = g / at.slope
        grad_y.copy_(g)
        if totals is not None:
            self._accumulate(totals, g.neg(), None if share is None else share.neg(), at)

    def _accumulate(self, totals: Tensor, g: Tensor, share: Tensor | None, at: _Located) -> None:
        """totals ← totals + the slopes' gradient from g of φ and ``share`` = ld/φ′ of φ′."""
        by_slope = g * at.t if share is None else torch.addcmul(share, g, at.t)
        by_bend = torch.addcmul(by_slope, g, at.t, value=-0.5).mul_(at.t)
        tables = torch.zeros(3, len(self.heights), dtype=g.dtype, device=g.device)
        for table, values in zip(tables.unbind(), (g, by_slope, by_bend), strict=True):
            table.scatter_add_(0, at.place, values.view(-1))
        of_heights, _, of_bends = tables.view(3, self.bins + 2, -1).unbind()
        of_heights.mul_(self.step)
        of_bends.mul_(self.per_step)
        totals[2:].add_(_from_slopes(self.bins, g.device).T @ tables.view(3 * (self.bins + 2), -1).double())

    # --- inverse ---

    def inverse(self, y: Tensor) -> Tensor:
        x = torch.empty_like(y)
        for y_part, x_part in sweeps(y, x):
            v = y_part.to(self.dtype)
            if v.device.type == "cpu" and math.isfinite(v.sum().item()):
                x_part.copy_(self._inverse(v))
            else:
                x_part.copy_(torch.where(v.isfinite(), self._inverse(v.nan_to_num(0.0, 0.0, 0.0)), v))
        return x

    def _inverse(self, v: Tensor) -> Tensor:
        """Of finite numbers: the root of t·(start + t·bend/2) = above without a difference."""
        index = self._bins_of(v)
        place = self._places(index)
        start, bend = (self._look_up(t, place, v) for t in (self.slopes, self.bends))
        above = v - self._look_up(self.heights, place, v)
        slope = torch.addcmul(start.square(), above, bend, value=2.0)
        slope = slope.clamp_min_(torch.finfo(slope.dtype).tiny).sqrt_()
        t = above.div_(slope.add_(start).mul_(0.5))
        return t.add_(torch.addcmul(self.low, index, self.step))

    def _bins_of(self, v: Tensor) -> Tensor:
        """The bins −1 … K [N, D] of these heights, as whole numbers in their dtype."""
        ends = self.heights.view(self.bins + 2, -1)[1:]
        if self.bins > SEARCHED:
            places = torch.searchsorted(ends.T.contiguous(), v.T.contiguous(), right=True)
            return places.T.to(v.dtype).contiguous().sub_(1.0)
        # Twice the number of ends below, less their number; on an end, half of one may be missing.
        twice, side = torch.zeros_like(v), torch.empty_like(v)
        for end in ends:
            twice.add_(torch.sign(torch.sub(v, end, out=side), out=side))
        return twice.add_(self.bins - 1.0).mul_(0.5).floor_()


KINDS[spline.KIND] = MonotoneSpline

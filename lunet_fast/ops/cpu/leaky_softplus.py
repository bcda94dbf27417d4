"""φ(x) = a·x + (c/κ)·softplus(κ·x), (2.6) and (2.9), elementwise on rows."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lunet_fast.ops.cpu.elementwise import KINDS, Elementwise
from lunet_fast.ops.cpu.sweeps import SWEEP_OF_MANY, is_one_sweep, sweeps
from lunet_fast.ops.precision import wide
from lunet_fast.ops.values import Activation

_softplus_out = torch.ops.aten.softplus.out
_softplus_backward_out = torch.ops.aten.softplus_backward.grad_input


#: A t whose eᵗ is nothing beside 1, and not so little that products with it are subnormal: with those, a
#: processor takes many times as long.
_NOTHING = {torch.float32: -40.0, torch.float64: -80.0}


def _threshold(dtype: torch.dtype) -> float:
    """Where softplus(t) = t to rounding: log1p(exp(−t)) < eps·t."""
    return 40.0 if dtype == torch.float64 else 20.0


def _scale_(t: Tensor, factor: float | Tensor) -> Tensor:
    """t ← factor·t."""
    return t if isinstance(factor, float) and factor == 1.0 else t.mul_(factor)


def _add_scaled_(t: Tensor, factor: float | Tensor, x: Tensor) -> Tensor:
    """t ← t + factor·x."""
    return t.add_(x, alpha=factor) if isinstance(factor, float) else t.addcmul_(x, factor)


class LeakySoftplus(Elementwise):
    """a, c and κ are floats, or tensors that broadcast to [N, D]; ``parameters`` are (a, c, κ) [3] or [3,
    D]."""

    def __init__(self, slopes: Sequence[float | Tensor], parameters: Tensor | None = None) -> None:
        self.a, self.c, self.kappa = slopes
        self.parameters = parameters

    @classmethod
    def of(cls, activation: Activation, dtype: torch.dtype) -> LeakySoftplus:
        slopes = activation.parameters
        if slopes is None:
            return _of_constants(activation.constants)
        if slopes.dim() == 1 and slopes.device.type == "cpu":
            return cls(slopes.tolist(), slopes)
        return cls(slopes.to(dtype).unbind(0), slopes)

    def scaled_gradient(self) -> tuple[float, LeakySoftplus]:
        """(c, that of a/c, 1, κ); nothing to gain where c = 1, or where the slopes' gradients are taken."""
        if self.parameters is None and self.c != 1.0:
            return float(self.c), _of_constants((self.a / self.c, 1.0, self.kappa))
        return 1.0, self

    # --- forward ---

    def _mix_(self, t: Tensor, x: Tensor, *, finite: bool = False) -> Tensor:
        """t ← c·t + a·x: in one pass where a + c = 1, as in (2.6), and nothing but ``finite`` numbers
        matters, for it takes the difference of the two; of a from ½ on, with a rounding of that."""
        if finite and isinstance(self.a, float) and self.a < 0.5 and self.a + self.c == 1.0:
            return t.lerp_(x, self.a)
        return _add_scaled_(_scale_(t, self.c), self.a, x)

    def _activate_into(self, y: Tensor, h: Tensor) -> Tensor:
        """y ← φ(h), of one dtype, both in the cache."""
        if h.device.type != "cpu" or not isinstance(self.kappa, float):
            return self._mix_(self._soft(h, out=y), h)
        # PyTorch's softplus is one pass, and takes twice as long as these two.
        if self.kappa == 1.0:
            torch.exp(h, out=y).log1p_()
        else:
            torch.mul(h, self.kappa, out=y).exp_().log1p_().div_(self.kappa)
        if math.isfinite(y.sum().item()):
            return self._mix_(y, h, finite=True)
        # Where exp overflows softplus is h to rounding. What becomes of one number must not depend on others.
        torch.where(y < math.inf, y, h, out=y)
        return self._mix_(y, h, finite=True).masked_fill_(h == math.inf, math.inf)

    def _sigmoid(self, h: Tensor) -> Tensor:
        """σ(κ·h), in memory of its own."""
        if isinstance(self.kappa, float) and self.kappa == 1.0:
            return torch.sigmoid(h)
        return torch.mul(h, self.kappa).sigmoid_()

    def _soft(self, h: Tensor, out: Tensor | None = None) -> Tensor:
        """softplus(κ·h)/κ."""
        threshold = _threshold(h.dtype)
        if isinstance(self.kappa, float):
            if out is None:
                return F.softplus(h, beta=self.kappa, threshold=threshold)
            return _softplus_out(h, self.kappa, threshold, out=out)
        return torch.div(F.softplus(h * self.kappa, threshold=threshold), self.kappa, out=out)

    def _slope(self, x: Tensor) -> Tensor:
        """φ′(x) in memory of its own."""
        return _scale_(self._sigmoid(x), self.c).add_(self.a)

    def activate(self, h: Tensor) -> Tensor:
        if is_one_sweep(h, product=False) and h.dtype == wide(h.dtype):
            return self._activate_into(torch.empty_like(h), h)
        return super().activate(h)

    def activate_into(self, y: Tensor, h: Tensor) -> None:
        if h.dtype == wide(h.dtype):
            self._activate_into(y, h)
        else:
            x = h.float()
            y.copy_(self._activate_into(torch.empty_like(x), x))

    def log_derivative_sum_into(self, total: Tensor, h: Tensor) -> None:
        torch.sum(self._slope(h.to(total.dtype)).log_(), -1, out=total)

    # --- gradients ---

    def backward_into(
        self, grad_h: Tensor, grad_y: Tensor, h: Tensor, ld: Sequence[Tensor], totals: Tensor | None
    ) -> None:
        if isinstance(self.kappa, float) and h.dtype == wide(h.dtype):
            _softplus_backward_out(grad_y, h, self.kappa, _threshold(h.dtype), grad_input=grad_h)
            self._mix_(grad_h, grad_y)
        else:
            grad_h.copy_(self._slope(h.to(wide(h.dtype))).mul_(grad_y))
        if ld:
            grad_h.add_((ld[0] * self._log_slope_derivative(h)).to(grad_h.dtype))
        if totals is not None:
            self._accumulate(totals, grad_y, ld[0] if ld else None, h)

    def inverse_backward_into(
        self, grad_y: Tensor, grad_h: Tensor, h: Tensor, ld: Sequence[Tensor], totals: Tensor | None
    ) -> None:
        if ld:
            grad_h = grad_h - (ld[0] * self._log_slope_derivative(h)).to(grad_h.dtype)
        grad_y.copy_(torch.div(grad_h, self._slope(h.to(wide(h.dtype)))))
        if totals is not None:
            self._accumulate(totals, -grad_y, -ld[0] if ld else None, h)

    def _log_slope_derivative(self, x: Tensor) -> Tensor:
        """φ″(x)/φ′(x), float32 or wider."""
        sigmoid = self._sigmoid(x.to(wide(x.dtype)))
        slope = sigmoid * self.c + self.a
        return sigmoid.addcmul_(sigmoid, sigmoid, value=-1).mul_(self.c).mul_(self.kappa).div_(slope)

    def _accumulate(self, totals: Tensor, g: Tensor, ld: Tensor | None, x: Tensor) -> None:
        """totals ← totals + Σ (g·∂φ/∂θ + ld·∂log φ′/∂θ) for θ = a, c, κ."""
        x = x.to(totals.dtype)
        g = g.to(totals.dtype)
        sigmoid = self._sigmoid(x)
        soft = self._soft(x)
        by_kappa = (x * sigmoid - soft) * (self.c / self.kappa)
        terms = [g * x, g * soft, g * by_kappa]
        if ld is not None:
            share = ld / (sigmoid * self.c + self.a)
            bend = (sigmoid - sigmoid * sigmoid) * x * self.c
            terms = [terms[0] + share, terms[1] + share * sigmoid, terms[2] + share * bend]
        for total, term in zip(totals.unbind(0), terms, strict=True):
            total.add_(term.sum(0) if total.dim() else term.sum())

    # --- inverse ---

    def inverse(self, y: Tensor) -> Tensor:
        """Halley's iteration from the nearest of three tangents.

        With t = κ·x, r = a/c and w = κ·y/c the equation φ(x) = y is softplus(t) + r·t = w.
        """
        dtype = wide(y.dtype)
        a, c, kappa = self.a, self.c, self.kappa
        r = a / c
        if not isinstance(r, Tensor):
            # Below, it would be 0 in this dtype, and 0/0 at y = 0; φ⁻¹ is as good with this one, to rounding.
            r = max(r, torch.finfo(dtype).tiny)
        low = float(r.min()) if isinstance(r, Tensor) else r
        # Slopes that are NaN, or no slopes, give NaN in any number of steps.
        low = low if 0.0 < low < math.inf else 1.0
        # Where a ≫ c, φ is nearly linear and softplus a small correction: 2¹⁰ needs no more steps than 2⁹⁹.
        # Nor does 2⁻⁹⁹⁹ than 2⁻⁵⁰⁰, below which the squared slope is 0 on the far left and the asymptote
        # exact.
        steps = _halley_steps(min(max(math.floor(math.log2(low)), -500), 10), dtype)
        x = torch.empty_like(y)
        scratch: list[Tensor] = []
        for y_part, x_part in sweeps(y, x, elements=SWEEP_OF_MANY):
            if not scratch:
                scratch = [torch.empty_like(y_part, dtype=dtype) for _ in range(5 + (y.dtype != dtype))]
            w, *rest = (buffer[: len(y_part)] for buffer in scratch)
            t = x_part if y.dtype == dtype else rest.pop()
            torch.mul(y_part.to(dtype), kappa / c, out=w)
            _halley_start(w, r, t, rest[0])
            for step in range(steps):
                _halley_step_(t, w, r, rest, last=step == steps - 1)
            if isinstance(kappa, Tensor) or kappa != 1.0:
                t.div_(kappa)
            if not (t.device.type == "cpu" and math.isfinite(t.sum().item())):
                # Where w or eᵗ overflows, and at ±inf, φ is its asymptote; NaN stays NaN.
                torch.div(y_part.to(dtype), a, out=w)
                torch.minimum(w, torch.div(y_part.to(dtype), a + c, out=rest[0]), out=w)
                torch.where(torch.abs(t, out=rest[0]) < math.inf, t, w, out=t)
            if t is not x_part:
                x_part.copy_(t)
        return x


@functools.lru_cache(maxsize=64)
def _of_constants(slopes: tuple[float, ...]) -> LeakySoftplus:
    return LeakySoftplus(slopes)


KINDS["leaky_softplus"] = LeakySoftplus


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
    t, *scratch = (torch.empty_like(w) for _ in range(5))
    _halley_start(w, r, t, scratch[0])
    for steps in range(1, 1000):
        _halley_step_(t, w, r, scratch, last=True)
        t.copy_(torch.where(t.isfinite(), t, torch.minimum(w / r, w / (1.0 + r))))
        residual = (F.softplus(t, threshold=40.0) + r * t - w).abs()
        if bool((residual <= tolerance).all()):
            return steps
    raise AssertionError(f"Halley's iteration did not converge for r = {r}")


def _halley_start(w: Tensor, r: float | Tensor, out: Tensor, scratch: Tensor) -> None:
    """A t not left of the solution of softplus(t) + r·t = w: the least of those of three tangents."""
    torch.sub(w, math.log(2.0), out=out).div_(r + 0.5)
    torch.minimum(out, torch.div(w, 1.0 + r, out=scratch), out=out)
    torch.minimum(out, torch.div(w, r, out=scratch), out=out)


def _halley_step_(t: Tensor, w: Tensor, r: float | Tensor, scratch: Sequence[Tensor], *, last: bool) -> None:
    """One step of Halley's iteration on f(t) = softplus(t) + r·t − w, in place.

    t ← t − f·f′/(f′² − f·f″/2). f·f″ ≤ f′² right of the solution (softplus(t) ≤ eᵗ), so the denominator is
    at least f′²/2. With e = eᵗ, u = 1 + e and p = u·f′ = e + r·u that is t − f·u·p/(p² − f·e/2), without a
    division but the one. The ``last`` step alone needs log1p(e), for which log(u) takes half the time.
    ``scratch`` is four tensors like t.
    """
    e, u, f, p = scratch
    torch.clamp_min(t, _NOTHING[t.dtype], out=e).exp_()
    torch.add(e, 1.0, out=u)
    _add_scaled_(torch.log1p(e, out=f) if last else torch.log(u, out=f), r, t).sub_(w)
    if isinstance(r, Tensor):
        torch.addcmul(e, u, r, out=p)
    else:
        torch.add(e, u, alpha=r, out=p)
    e.mul_(f).addcmul_(p, p, value=-2.0)
    t.add_(f.mul_(u).mul_(p).div_(e), alpha=2.0)

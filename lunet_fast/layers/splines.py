"""MonotoneSpline: a learnt monotone function of each coordinate, with a closed-form inverse."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from lunet_fast import functional
from lunet_fast.layers.activations import BijectiveActivation, is_replaced
from lunet_fast.layers.arguments import check_dtype, check_tensor, checked_number, checked_size
from lunet_fast.ops import spline
from lunet_fast.ops.values import Activation

#: What φ is outside of its interval.
TAILS = ("free", "identity")

#: Products of four slopes stay within float32 up to this bound.
MOST_BOUND = 20.0

#: The quantiles of data that ``fit_range`` makes the ends of the interval.
ENDS = (0.0005, 0.9995)


class MonotoneSpline(BijectiveActivation):
    """φ of each coordinate whose slope is piecewise linear on K uniform bins of an interval [low, high].

    φ′ is continuous with the values exp(b·tanh(raw_k/b)) at the K + 1 knots, so it lies between e⁻ᵇ and eᵇ
    and φ, quadratic in each bin, is onto ℝ. Outside of the interval φ is linear. The middle of the interval
    maps to itself. φ starts as the identity.

    The inverse is in closed form: the bin that holds y, and one square root. ±inf and NaN pass through.
    Derivatives of every order are exact but at the knots, where φ″ jumps.

    Args:
        features: D.
        bins: K.
        tails: "free" goes on with the slopes of the first and the last knot, (K + 1)·D numbers; "identity"
            has slope 1 there, (K − 1)·D numbers, and needs two bins or more.
        bound: b, how far log φ′ can be from 0.
        low, high: the interval of every coordinate, until ``fit_range``. The default is for coordinates of
            variance near 1, as between the layers of a whitened ``LUNet``.
        device, dtype: as in ``nn.Linear``.

    The interval is in the buffer ``grid`` [2, D], low and the width of a bin; it is not learnt. A mean of
    several splines' buffers is an interval between theirs, which is one; what is none raises.

    Cost: about 15 passes over the rows and three look-ups in tables [K, D]; the inverse a search of K − 1
    more. No memory beyond a few times that of the rows, whatever K.

    Raises:
        ValueError: features or bins below 1 (2 for identity tails), another word for tails, a bound that is
            not above 0 or above 20, or low not below high; later, where the spline is used, a grid without
            finite numbers and widths above 0 was written to it.
        TypeError: features or bins is not an int, or dtype not a real one.
    """

    grid: Tensor

    # The grid that was last found sound, with PyTorch's count of writes to it.
    _seen: tuple[Tensor, int] | None = None

    def __init__(
        self,
        features: int,
        bins: int = 8,
        tails: str = "free",
        bound: float = 2.5,
        low: float = -3.0,
        high: float = 3.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.features = checked_size("features", features)
        if tails not in TAILS:
            raise ValueError(f"tails must be one of {', '.join(TAILS)}, got {tails!r}")
        self.bins, self.tails = checked_size("bins", bins, 1 if tails == "free" else 2), tails
        self.bound = checked_number("bound", bound)
        self.low, self.high = checked_number("low", low), checked_number("high", high)
        if not 0.0 < self.bound <= MOST_BOUND:
            raise ValueError(f"bound must be above 0 and at most {MOST_BOUND:g}, got {bound}")
        if not (self.low < self.high and math.isfinite(self.high - self.low)):
            raise ValueError(f"low must be below high and both finite, got {low} and {high}")
        check_dtype("dtype", torch.get_default_dtype() if dtype is None else dtype)
        knots = self.bins + (1 if tails == "free" else -1)
        self.raw = nn.Parameter(torch.empty(knots, self.features, device=device, dtype=dtype))
        self.register_buffer("grid", torch.empty(2, self.features, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Back to the identity, with the interval that the spline was made with."""
        nn.init.zeros_(self.raw)
        with torch.no_grad():
            self.grid[0] = self.low
            self.grid[1] = (self.high - self.low) / self.bins

    def slopes(self) -> Tensor:
        """φ′ at the knots [K + 1, D]."""
        inner = torch.exp(self.bound * torch.tanh(self.raw / self.bound))
        if self.tails == "free":
            return inner
        ones = torch.ones_like(inner[:1])
        return torch.cat([ones, inner, ones])

    def fit_range(self, x: Tensor) -> None:
        """Set each coordinate's interval to the quantiles 0.0005 and 0.9995 of data x [..., D].

        A constant coordinate gets the interval of width 2 about it. The slopes stay: on data, call it before
        training. O(N·log N) for N rows.

        Raises:
            ValueError: another last dimension than D, or values that are not finite, or none.
        """
        check_tensor("x", x)
        if x.dim() == 0 or x.shape[-1] != self.features or x.numel() == 0:
            raise ValueError(f"x must be [..., {self.features}] with some rows, got shape {tuple(x.shape)}")
        rows = x.detach().reshape(-1, self.features).to(self.grid.device, torch.float64)
        if not bool(rows.isfinite().all()):
            raise ValueError("x must be finite, and holds infinities or NaN: leave such rows out")
        low, high = _quantiles(rows, ENDS)
        flat = high - low <= 1e-6 * torch.maximum(low.abs(), high.abs())
        low, high = torch.where(flat, low - 1.0, low), torch.where(flat, high + 1.0, high)
        with torch.no_grad():
            self.grid.copy_(torch.stack([low, (high - low) / self.bins]))

    def fused(self) -> Activation:
        self._check_grid()
        return Activation(spline.KIND, torch.cat([self.grid, self.slopes()]), ())

    def _check_grid(self) -> None:
        """Raise ``ValueError`` for a grid that is none; it is looked at where it was written to."""
        grid = self.grid
        if torch.compiler.is_compiling() or type(grid) is not Tensor or grid.is_meta:
            return
        if torch._C._functorch.is_functorch_wrapped_tensor(grid):
            return
        count = -1 if grid.is_inference() else grid._version
        if self._seen is not None and self._seen[0] is grid and self._seen[1] == count:
            return
        if not _is_grid(grid):
            raise ValueError(_NO_GRID)
        self._seen = (grid, count)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        given = state_dict.get(prefix + "grid")
        if given is not None and given.shape == self.grid.shape and not given.is_meta and not _is_grid(given):
            args[4].append(f"{prefix}{_NO_GRID}")
            state_dict = {**state_dict, prefix + "grid": self.grid}
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in super().__getstate__().items() if name != "_seen"}

    def forward(self, x: Tensor) -> Tensor:
        """φ(x)."""
        check_tensor("x", x)
        return functional.activation(x, self.fused(), inverse=False, logabsdet=False)[0]

    def inverse(self, y: Tensor) -> Tensor:
        """φ⁻¹(y)."""
        check_tensor("y", y)
        return functional.activation(y, self.fused(), inverse=True, logabsdet=False)[0]

    def log_derivative(self, x: Tensor) -> Tensor:
        """log φ′(x), elementwise."""
        check_tensor("x", x)
        parameters = self.fused().parameters
        assert parameters is not None
        return spline.log_derivative(x, parameters).to(x.dtype)

    def derivative_range(self, features: int) -> tuple[float, float]:
        """(least, greatest) slope at a knot."""
        if is_replaced(self, MonotoneSpline, hooks=False):
            return super().derivative_range(features)
        low, high = self.slopes().detach().double().aminmax()
        return float(low), float(high)

    def tangent_at(self, point: float, features: int) -> tuple[Tensor | float, Tensor | float]:
        """(p, 1): a fresh spline is the identity."""
        if is_replaced(self, MonotoneSpline, hooks=False):
            return super().tangent_at(point, features)
        return point, 1.0

    def bend_around(self, point: float, deviation: float, features: int) -> float:
        """0: a fresh spline is the identity."""
        if is_replaced(self, MonotoneSpline, hooks=False):
            return super().bend_around(point, deviation, features)
        return 0.0

    def extra_repr(self) -> str:
        return f"features={self.features}, bins={self.bins}, tails={self.tails}, bound={self.bound:g}"


_NO_GRID = (
    "grid must hold finite numbers, and widths above 0 in its second row: fit_range(x) sets it, "
    "reset_parameters() to what the spline was made with"
)


def _is_grid(grid: Tensor) -> bool:
    """Whether a spline can have this [2, D]: its interval's places and widths."""
    return bool(grid.isfinite().all()) and bool((grid[1] > 0).all())


def _quantiles(rows: Tensor, shares: tuple[float, ...]) -> Tensor:
    """The quantiles [len(shares), D] of rows [N, D], linear between neighbours; of any number of rows."""
    ordered = rows.sort(0).values
    places = torch.tensor(shares, dtype=rows.dtype, device=rows.device) * (len(rows) - 1)
    below = places.floor().long()
    above = (below + 1).clamp_max(len(rows) - 1)
    return torch.lerp(ordered[below], ordered[above], (places - below).unsqueeze(-1))

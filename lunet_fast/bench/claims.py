"""Suite ``claims``: is the inverse O(D²) and the log-determinant O(D) a sample? In operations and in time.

Operations are counted twice. ``needed`` is the arithmetic of substitution, one row at a time, counted by
running it on numbers that count (``counted_inverse``). ``executed`` is what our PyTorch code does for one
more row of a batch, counted from the shapes of the operations it calls; blocks make it somewhat more.

Time is fitted from D = 256 on: below, a call costs more than its arithmetic, which the tables show and the
fit leaves out. The peers are LAPACK's on the dense matrix. A dense solve factorises once for all rows of a
call: O(D³) a sample is its cost for one row, and for many rows it is O(D²) too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lunet_fast.bench import layers
from lunet_fast.bench.contenders import ALPHA, Inv, Ours, Problem, Slogdet, Solve
from lunet_fast.bench.contest import OURS, Contest, Row, Spec
from lunet_fast.ops.cpu.elementwise import elementwise
from lunet_fast.ops.cpu.layer import layer_inverse
from lunet_fast.ops.cpu.matrix import Packed
from lunet_fast.ops.reference import family
from lunet_fast.ops.values import Matrix

SUITE = "claims"

FEATURES = (16, 32, 64, 128, 256, 384, 512, 768, 1024, 1536, 2048)
ROWS = (1, 8192)

#: The least D of a fit in time.
FIT_FROM = 256

#: Rows that tell what one more row costs: so few that a batch goes through the layer as without them.
MORE_ROWS = 8

#: (operation, rows): what is timed over D.
CURVES = (
    ("inverse, linear part", 1),
    ("inverse, linear part", 8192),
    ("inverse", 8192),
    ("log-determinant", 1),
    ("φ and its log-determinant", 8192),
)

#: A slope whose band is wider says nothing.
WIDE_BAND = 0.4

#: 97.5 % quantiles of Student's t by degrees of freedom.
_STUDENT = (math.inf, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


def specs(scale: str) -> list[Spec]:
    """Every curve over all D, or over the D of the fit for "quick"."""
    sizes = FEATURES if scale == "all" else [D for D in FEATURES if FIT_FROM <= D <= 1024]
    return [Spec(SUITE, what, D, B) for what, B in CURVES for D in sizes]


def contests(
    specs: Sequence[Spec], scale: str, device: torch.device, dtype: torch.dtype
) -> Iterator[Contest]:
    """The contests of ``specs``, each built when it is its turn."""
    for spec in specs:
        yield layers.build(spec, device, dtype, (Ours, Solve, Slogdet, Inv))


# --- slopes ---------------------------------------------------------------------------------------------


class Slope(NamedTuple):
    """Exponent p of cost ∝ Dᵖ by least squares of logarithms, and half the width of its 95 % band."""

    exponent: float
    band: float

    def __str__(self) -> str:
        return f"{self.exponent:.2f} ± {self.band:.2f}"


def fit(sizes: Sequence[float], costs: Sequence[float]) -> Slope:
    """The slope of log cost over log D; the band is that of the residuals about the line.

    Raises:
        ValueError: there are fewer than three points.
    """
    n = len(sizes)
    if n < 3:
        raise ValueError(f"sizes must be at least 3 to fit a slope with a band, got {n}")
    xs, ys = [math.log(s) for s in sizes], [math.log(c) for c in costs]
    x_mean, y_mean = sum(xs) / n, sum(ys) / n
    spread = sum((x - x_mean) ** 2 for x in xs)
    slope = sum((x - x_mean) * (y - y_mean) for x, y in zip(xs, ys, strict=True)) / spread
    residual = sum((y - y_mean - slope * (x - x_mean)) ** 2 for x, y in zip(xs, ys, strict=True))
    quantile = _STUDENT[min(n - 2, len(_STUDENT) - 1)]
    return Slope(slope, quantile * math.sqrt(residual / (n - 2) / spread))


def time_slopes(rows: Sequence[Row]) -> list[tuple[str, int, str, Slope]]:
    """(operation, batch, contender, slope of its median time from D = 256 on), of three points at least."""
    curves: dict[tuple[str, int, str], dict[int, float]] = {}
    for row in rows:
        if row.suite == SUITE and row.features >= FIT_FROM:
            curves.setdefault((row.what, row.rows, row.contender), {})[row.features] = row.median
    return [
        (*key, fit(list(points), list(points.values()))) for key, points in curves.items() if len(points) >= 3
    ]


# --- operations, needed ---------------------------------------------------------------------------------


class _Counting:
    """A number whose arithmetic is counted in ``counter[0]``."""

    __slots__ = ("counter",)

    def __init__(self, counter: list[int]) -> None:
        self.counter = counter

    def _operate(self, other: object) -> _Counting:
        self.counter[0] += 1
        return self

    __mul__ = __sub__ = __add__ = __truediv__ = _operate


def counted_inverse(features: int) -> int:
    """Operations of A⁻¹ (h − b) for one row, by running substitution on numbers that count.

    x = U⁻¹ L⁻¹ (h − b): D for the bias, D·(D − 1) for L, whose diagonal is 1, D·(D − 1) + D for U.
    """
    counter = [0]
    one = _Counting(counter)
    right = [one - one for _ in range(features)]
    for i in range(features):
        for _ in range(i):
            right[i] = right[i] - one * one
    for i in reversed(range(features)):
        for _ in range(i + 1, features):
            right[i] = right[i] - one * one
        right[i] = right[i] / one
    return counter[0]


def counted_logabsdet(features: int) -> int:
    """Operations of Σ log|u_ii| + Σ log φ′(h_i) for one row: u_ii is stored as its logarithm.

    For each feature φ′ = a + c·σ(κ·h) is a product, a σ, a product and a sum, then a logarithm and two sums.
    """
    counter = [0]
    one = _Counting(counter)
    total = one
    for _ in range(features):
        slope = (one * one / one) * one + one  # κ·h, σ of it as one operation, c·σ, + a
        total = total + (slope / one) + one  # the logarithm as one operation, and both sums
    return counter[0]


# --- operations, executed -------------------------------------------------------------------------------


class _FlopCount(TorchDispatchMode):
    """Counts the arithmetic of every PyTorch operation from its shapes; moving numbers counts nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in ("mm", "bmm"):
            self.flops += 2 * args[0].numel() * args[1].shape[-1]
        elif name in ("addmm", "addmm_", "baddbmm"):
            self.flops += 2 * args[1].numel() * args[2].shape[-1]
        elif name == "linalg_solve_triangular":
            matrix, right = args[:2]
            self.flops += matrix.shape[-1] * right.numel()
        elif torch.Tag.pointwise in func.tags or name == "sum":
            sizes = [t.numel() for t in (*args, result) if isinstance(t, torch.Tensor)]
            self.flops += max(sizes) if name not in ("copy_", "fill_", "zero_", "clone") else 0
        return result


def executed_inverse(features: int, *, active: bool, rows: int = 8192) -> tuple[float, int]:
    """(operations for one more row of a batch of ``rows``, operations that do not depend on the rows).

    Counted from what ``layer_inverse`` calls for ``rows`` and for a few more, which go the same way.
    """
    problem = Problem.draw(features, torch.device("cpu"), torch.float32)
    packed = Packed.of(Matrix(problem.packed.float()))
    phi = elementwise(family((ALPHA, 1.0 - ALPHA, 1.0) if active else None), torch.float32)
    if phi is not None:
        phi.inverse(torch.zeros(1, features))  # the steps that it takes are found once
    counts = []
    for n in (rows, rows + MORE_ROWS):
        y = torch.randn(n, features)
        with _FlopCount() as counter:
            layer_inverse(y, packed, problem.bias.float(), phi, logabsdet=False, save=False)
        counts.append(counter.flops)
    each = (counts[1] - counts[0]) / MORE_ROWS
    return each, round(counts[0] - rows * each)


@dataclass(frozen=True)
class Counts:
    """Operations a sample at one D."""

    features: int
    inverse_needed: int
    inverse_executed: float
    inverse_setup: int
    """Once a batch: A inverted, where the rows are many enough."""
    logabsdet_needed: int


def count_operations(sizes: Sequence[int] = FEATURES) -> list[Counts]:
    """Operations of inverse and log-determinant over D; a minute for the sizes of the fit."""
    found = []
    for D in sizes:
        executed, setup = executed_inverse(D, active=False)
        found.append(Counts(D, counted_inverse(D), executed, setup, counted_logabsdet(D)))
    return found


def _verdict(slope: Slope, promised: float) -> str:
    if slope.band > WIDE_BAND:
        return "neither shown nor refuted, the band is too wide"
    return "holds" if slope.exponent - slope.band <= promised else "does not hold"


def verdicts(rows: Sequence[Row], counts: Sequence[Counts]) -> list[str]:
    """In words: whether each claim holds, and where not."""
    fitted = [c for c in counts if c.features >= FIT_FROM]
    sizes = [c.features for c in fitted]
    lines = []
    if len(fitted) >= 3:
        inverse = fit(sizes, [c.inverse_needed for c in fitted])
        logabsdet = fit(sizes, [c.logabsdet_needed for c in fitted])
        executed = fit(sizes, [c.inverse_executed for c in fitted])
        worst = max(c.inverse_executed / c.inverse_needed for c in fitted)
        lines += [
            f"operations of the inverse a sample ∝ D^{inverse}, of the log-determinant ∝ D^{logabsdet}",
            f"operations that our code executes for the inverse ∝ D^{executed}, "
            f"at most {worst:.2f} of those needed",
        ]
    for what, batch, contender, slope in time_slopes(rows):
        promised = 2.0 if what.startswith("inverse") else 1.0
        verdict = ""
        if contender == OURS:
            verdict = f": O(D^{promised:.0f}) {_verdict(slope, promised)}"
        lines.append(f"time of {what}, B = {batch}, {contender} ∝ D^{slope}{verdict}")
    return lines

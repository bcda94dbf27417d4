"""What is run on the kernels' PTX: the library's modules and the scorer, each compared with float64.

Sizes are the smallest that have masks in every direction, several blocks of columns and several programs.
D = 48 moves 16 bytes at a time and D = 40 four, which is other code; to N = D a layer takes other kernels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.gpu.common import LIMITS, matmul_precision, normwise
from lunet_fast import GeneralizedLeakySoftplus, LeakySoftplus, LUDense, LUNet, MonotoneSpline
from lunet_fast.ops import dispatch, reference
from tests.ptx.launch import Run, executed

FORWARD, INVERSE = "forward_and_logabsdet", "inverse_and_logabsdet"


def findings(runs: list[Run]) -> list[str]:
    """What was wrong with these launches."""
    return [
        f"{run.launch.kernel}, grid {run.grid}: {kind}: {text}"
        for run in runs
        for kind, text in run.findings.each()
    ]


@contextmanager
def on_ptx(architecture: int, **how: Any) -> Iterator[list[Run]]:
    """Let the library run its kernels on CPU tensors, as compiled for an architecture."""
    before = dispatch.get_backend()
    with pytest.MonkeyPatch.context() as patch, executed(architecture, **how) as runs:
        patch.setattr(dispatch, "_interpreting", lambda: True)
        dispatch.set_backend("triton")
        try:
            yield runs
        finally:
            dispatch.set_backend(before)


def fixed() -> LeakySoftplus:
    return LeakySoftplus(0.1)


def learnt() -> GeneralizedLeakySoftplus:
    return GeneralizedLeakySoftplus(1.5, 0.3, learnable=True)


def spline(D: int, bins: int = 4) -> Callable[[], MonotoneSpline]:
    return lambda: MonotoneSpline(D, bins)


@dataclass(frozen=True)
class Case:
    """A module on N rows of D, forward or inverse, and its gradients."""

    name: str
    build: Callable[[], Any]
    N: int
    D: int
    method: str = FORWARD
    precision: str = "highest"
    dtype: torch.dtype = torch.float32
    gradients: bool = True
    thorough: bool = False

    def __str__(self) -> str:
        parts = [self.name, self.method.split("_")[0], f"D={self.D}", f"N={self.N}", self.precision]
        return " ".join(parts + ["bfloat16"] * (self.dtype == torch.bfloat16))

    def errors(self, **on: Any) -> tuple[list[Run], list[tuple[str, float, float]]]:
        """The launches, and (result, error, limit) for each result; ``on``: arguments of ``on_ptx``."""
        torch.manual_seed(0)
        module = disturbed(self.build()).to(self.dtype)
        x = torch.randn(self.N, self.D).to(self.dtype)
        upstream = [torch.randn(self.N, self.D), torch.randn(self.N)]
        with on_ptx(**on) as runs, matmul_precision(self.precision):
            ours = self._results(module, x, upstream)
        wide = module.double()
        dispatch.set_backend("reference")
        try:
            theirs = self._results(wide, x.double(), [g.double() for g in upstream])
        finally:
            dispatch.set_backend("auto")
        loss = conditions(wide) if self.method == INVERSE else 1.0
        limit = LIMITS["bf16"] if self.dtype == torch.bfloat16 else LIMITS[self.precision]
        # An inverse is never below tf32x3, so its condition multiplies float32's error alone.
        limit = max(2 * limit, 4 * LIMITS["highest"] * loss)
        return runs, [
            # A learnt slope's gradient is one sum over everything, which may cancel.
            (name, normwise(ours[name], exact), limit * (12 if exact.numel() == 1 else 1))
            for name, exact in theirs.items()
        ]

    def _results(self, module: Any, x: Tensor, upstream: list[Tensor]) -> dict[str, Tensor]:
        x = x.clone().requires_grad_(self.gradients)
        module.zero_grad()
        with torch.set_grad_enabled(self.gradients):
            outputs = getattr(module, self.method)(x)
        found = {"result": outputs[0].detach(), "logabsdet": outputs[1].detach()}
        if self.gradients:
            leaves = {"gradient of x": x, **{f"gradient of {n}": p for n, p in module.named_parameters()}}
            cotangents = [g.to(o.dtype) for g, o in zip(upstream, outputs, strict=True)]
            gradients = torch.autograd.grad(outputs, list(leaves.values()), cotangents)
            found.update(zip(leaves, gradients, strict=True))
        return found


def disturbed(module: Any) -> Any:
    """The module with its matrices away from the identity."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() > 1:
                parameter.add_(torch.randn_like(parameter) * (0.3 / parameter.shape[-1] ** 0.5))
    return module


def conditions(module: nn.Module) -> float:
    """The product over the layers of κ₂(W) and the slopes' ratio; 1 for an activation alone."""
    worst = 1.0
    for layer in module.modules():
        if isinstance(layer, LUDense):
            worst *= float(torch.linalg.cond(layer.weight.detach()))
        if isinstance(layer, GeneralizedLeakySoftplus | LeakySoftplus):
            a, c, _ = layer.slope_values()
            worst *= float((a + c) / a)
        if isinstance(layer, MonotoneSpline):
            low, high = layer.derivative_range(layer.features)
            worst *= high / low
    return worst


def layer(D: int, activation: Callable[[], Any] | None = fixed) -> Callable[[], LUDense]:
    return lambda: LUDense(D, activation=activation() if activation else None)


def net(D: int, depth: int, activation: Callable[[], Any] = fixed) -> Callable[[], LUNet]:
    return lambda: LUNet(D, depth, activation())


#: Between them these launch every kernel: ``test_kernels.py`` asserts it. The thorough ones are for
#: ``make ptx-check``.
CASES = [
    Case("activation", fixed, 70, 20),
    Case("activation", fixed, 70, 20, INVERSE),
    Case("layer", layer(48), 70, 48),
    Case("layer, learnt slopes", layer(40, learnt), 70, 40),
    Case("layer, few rows", layer(40), 20, 40, gradients=False),
    Case("layer, few rows", layer(72), 20, 72, gradients=False),
    Case("layer", layer(40), 70, 40, INVERSE),
    Case("layer", layer(130), 140, 130, INVERSE, gradients=False),
    Case("layer", layer(48), 70, 48, precision="high"),
    Case("layer", layer(48), 70, 48, dtype=torch.bfloat16),
    Case("net", net(20, 2), 70, 20),
    Case("net", net(20, 2), 70, 20, INVERSE),
    Case("net, learnt slopes", net(20, 2, learnt), 70, 20, INVERSE, gradients=False),
    Case("spline", spline(20), 70, 20),
    Case("spline", spline(20), 70, 20, INVERSE),
    Case("layer, spline", layer(40, spline(40)), 70, 40),
    Case("layer, spline", layer(40, spline(40)), 70, 40, INVERSE),
    Case("net of splines", net(20, 2, spline(20)), 70, 20),
    Case("net of splines", net(20, 2, spline(20)), 70, 20, INVERSE),
    *(
        Case("layer", layer(D, activation), N, D, method, precision, dtype, thorough=True)
        for D, N in ((16, 300), (33, 150), (64, 300), (100, 90), (128, 200), (257, 300))
        for activation in (fixed, learnt)
        for method in (FORWARD, INVERSE)
        for precision, dtype in (
            ("highest", torch.float32),
            ("high", torch.float32),
            ("highest", torch.bfloat16),
        )
    ),
    *(
        Case("net", net(D, 4), 150, D, method, precision, thorough=True)
        for D in (16, 33, 64, 100)
        for method in (FORWARD, INVERSE)
        for precision in ("highest", "high")
    ),
]


@dataclass(frozen=True)
class Scores:
    """The best items of some users, which the kernel keeps as it scores them all."""

    D: int
    layers: int
    precision: str = "tf32x3"
    thorough: bool = False

    def __str__(self) -> str:
        return f"scores D={self.D} layers={self.layers} {self.precision}"

    def errors(self, **on: Any) -> tuple[list[Run], list[tuple[str, float, float]]]:
        from lunet_fast.kernels.score import score_topk

        torch.manual_seed(0)
        users, items, best, slopes = 3, 150, 5, (0.1, 0.9, 1.0)
        p, q = torch.randn(1, users, self.D), torch.randn(1, items, self.D)
        weight = torch.randn(1, self.layers, self.D, self.D) / math.sqrt(self.D)
        bias, readout = torch.randn(1, self.layers, self.D), torch.randn(1, self.D) / math.sqrt(self.D)
        offset, popular = torch.randn(users), torch.randn(items)
        # The first user has seen the first items, the others none.
        seen = torch.tensor([0, 7, 7, 7]), torch.arange(7)
        with on_ptx(**on) as runs:
            scores, chosen = score_topk(
                *(p, q, weight, bias, slopes, readout, None, offset, popular, seen, best),
                activated=False,
                precision=self.precision,
            )
        h = p[0].double()[:, None] + q[0].double()
        for m in range(self.layers):
            h = reference.leaky_softplus(h, slopes) @ weight[0, m].double().T + bias[0, m].double()
        exact = h @ readout[0].double() + offset.double()[:, None] + popular.double()
        exact[0, :7] = -math.inf
        inside = chosen.clamp(0, items - 1)
        limit = 2 * LIMITS[self.precision]
        return runs, [
            ("scores", normwise(scores, exact.gather(1, inside)), limit),
            ("the best", normwise(exact.gather(1, inside), exact.topk(best).values), limit),
            ("items", float((inside != chosen).sum()), 0.0),
        ]


SCORES = [
    Scores(20, 1),
    *(
        Scores(D, layers, precision, thorough=True)
        for D, layers in ((16, 2), (33, 0), (64, 1), (128, 1))
        for precision in ("ieee", "tf32x3", "tf32")
    ),
]

"""Suite ``cached``: one affine layer without gradients whose parameters stay as they are, so that A and A⁻¹
need be formed once, beside an ``nn.Linear`` with the same matrix.

``forward`` is A x + b, ``inverse`` A⁻¹ (y − b), both of ``LUDense`` within :func:`lunet_fast.cached`. What
cannot be avoided for B rows are 2·B·D² flops, and each operand and result moved once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor

from lunet_fast import LUDense, cached
from lunet_fast.bench.contenders import Nflows, Problem, Unavailable, linear_of, require
from lunet_fast.bench.contest import OURS, Contest, Run, Spec
from lunet_fast.bench.layers import CHECKED_ROWS, FEATURES, TOLERANCE
from lunet_fast.bench.machine import relative_error

SUITE = "cached"

ROWS = (1, 32, 1024)
OPERATIONS = ("forward", "inverse")

#: x or y ↦ the other.
Both = dict[str, Callable[[Tensor], Tensor]]


def specs(scale: str) -> list[Spec]:
    """Every size for "all", D = 64 and 256 for "quick"."""
    features = FEATURES if scale == "all" else (64, 256)
    return [Spec(SUITE, what, D, B) for D in features for B in ROWS for what in OPERATIONS]


def ours(problem: Problem, within: ExitStack) -> Both:
    layer = LUDense(problem.features, device=problem.device, dtype=problem.dtype)
    with torch.no_grad():
        layer.lu.copy_(problem.packed)
        assert layer.bias is not None
        layer.bias.copy_(problem.bias)
    within.enter_context(cached(layer))
    return {"forward": layer, "inverse": layer.inverse}


def linear(problem: Problem, within: ExitStack) -> Both:
    """An ``nn.Linear`` for each direction, with matrices formed by hand."""
    inverse = torch.linalg.inv(problem.weight)
    return {
        "forward": linear_of(problem, problem.weight, problem.bias),
        "inverse": linear_of(problem, inverse, -inverse @ problem.bias),
    }


def nflows(problem: Problem, within: ExitStack) -> Both:
    """``LULinear(using_cache=True)`` in evaluation mode; it returns the log-determinants too."""
    require("nflows")
    from nflows.transforms.lu import LULinear

    layer = Nflows.filled(LULinear(problem.features, using_cache=True), problem).eval()
    return {"forward": lambda x: layer(x)[0], "inverse": lambda y: layer.inverse(y)[0]}


CONTENDERS: dict[str, Callable[[Problem, ExitStack], Both]] = {
    OURS: ours,
    "nn.Linear": linear,
    "nflows LULinear, using_cache": nflows,
}


def build(
    spec: Spec, device: torch.device, dtype: torch.dtype = torch.float32, within: ExitStack | None = None
) -> Contest:
    """The contest of one spec; ``within`` holds the caches while it lasts."""
    within = within or ExitStack()
    problem = Problem.draw(spec.features, device, dtype)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(spec.rows, spec.features, generator=generator).to(device, dtype)
    y = (x.double().cpu() @ problem.weight.T + problem.bias).to(x)
    given, truth = (x, y) if spec.what == "forward" else (y, x)
    runs: dict[str, Run] = {}
    missing = {}
    errors = {}
    for name, contender in CONTENDERS.items():
        try:
            call = contender(problem, within)[spec.what]
        except Unavailable as reason:
            missing[name] = str(reason)
            continue
        run = torch.no_grad()(lambda call=call: call(given))
        runs[name] = run
        errors[name] = relative_error(run()[:CHECKED_ROWS].cpu(), truth[:CHECKED_ROWS].double().cpu())
    D, B, size = spec.features, spec.rows, torch.finfo(dtype).bits // 8
    return Contest(
        spec,
        runs,
        errors,
        tolerance=TOLERANCE[dtype][spec.what],
        flops=2.0 * B * D * D,
        bytes_moved=size * (2.0 * B * D + D * D),
        missing=missing,
    )


def contests(
    specs: Sequence[Spec], scale: str, device: torch.device, dtype: torch.dtype
) -> Iterator[Contest]:
    """The contests of ``specs``, each built when it is its turn."""
    for spec in specs:
        with ExitStack() as within:
            yield build(spec, device, dtype, within)

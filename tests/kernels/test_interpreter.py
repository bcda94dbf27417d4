"""Every kernel in Triton's interpreter against float64.

TRITON_INTERPRET is read when a kernel module is imported, so the cases run in a process of their own: this
file, run as a script, prints for each kernel the worst error over all its cases, and the tests judge them.
"""

from __future__ import annotations

import json
import math
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).parents[2]

#: Worst normwise relative error; those of the inverse are already divided by the slope ratio (a + c)/a.
LIMITS = {
    "activation_fwd y": 2e-6,
    "activation_fwd logabsdet": 2e-6,
    "activation_inv x": 2e-6,
    "activation_inv logabsdet": 2e-6,
    "layer_fwd y": 2e-6,
    "layer_fwd h": 2e-6,
    "layer_fwd logabsdet": 2e-6,
    # elementwise, over [−1e30, 1e30]
    "extremes φ": 2e-6,
    "extremes φ′": 2e-6,
    "extremes log φ′": 2e-6,
    "extremes φ⁻¹": 2e-6,
    # bfloat16 keeps 8 bits, and the interpreter cuts where a GPU rounds
    "bfloat16": 8e-3,
}
CHECKS = [
    "inf and NaN",
    "a NaN stays in its row",
    "no write outside",
    "same bits twice",
    "batch does not matter",
    "empty",
    "refused",
]

#: (2.6) and (2.9) at several α, and one that is neither. Where φ′ = 1, log φ′ vanishes and has only absolute
#: accuracy; none of these has that at x = 0, where a sum over small x would be made of nothing else.
FAMILIES = [
    (0.1, 0.9, 1.0),
    (0.01, 0.99, 1.0),
    (0.1, 1.0, 10.0),
    (0.2, 1.0, 0.3),
    (1e-3, 1.0, 1.0),
    (3.0, 0.2, 2.0),
]


# --- in the interpreter's process -----------------------------------------------------------------------


class Worst(dict[str, Any]):
    """The worst error seen for each name, and the case it was seen in."""

    def add(self, name: str, error: float, case: str) -> None:
        # A NaN is the worst of all, and must not lose to a comparison.
        error = math.inf if math.isnan(error) else error
        if name not in self or error > self[name][0]:
            self[name] = (error, case)


def normwise(result: Tensor, expected: Tensor) -> float:
    scale = expected.norm().item()
    return (result.double() - expected).norm().item() / (scale or 1.0)


@contextmanager
def guarded(overwritten: list[str]) -> Iterator[None]:
    """Let torch.empty and empty_like give NaN inside two guards, which must be as they were at the end."""
    plain = torch.empty, torch.empty_like
    buffers: list[tuple[Tensor, Tensor]] = []

    def empty(*size: Any, dtype: torch.dtype | None = None, device: Any = None) -> Tensor:
        shape = size[0] if len(size) == 1 and not isinstance(size[0], int) else size
        count = math.prod(shape)
        buffer = torch.full((count + 256,), 777.0, dtype=dtype or torch.float32)
        buffer[128 : 128 + count] = math.nan
        buffers.append((buffer[:128], buffer[128 + count :]))
        return buffer[128 : 128 + count].view(shape)

    torch.empty = empty
    torch.empty_like = lambda x: empty(tuple(x.shape), dtype=x.dtype)  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.empty, torch.empty_like = plain  # type: ignore[assignment]
    if not all(bool((guard == 777.0).all()) for pair in buffers for guard in pair):
        overwritten.append("a guard was overwritten")


def amid_nan(x: Tensor) -> Tensor:
    """x in memory with NaN before and after it, so that what is read from outside shows."""
    buffer = torch.full((x.numel() + 256,), math.nan, dtype=x.dtype)
    buffer[128 : 128 + x.numel()] = x.reshape(-1)
    return buffer[128 : 128 + x.numel()].view(x.shape)


def shapes(draw: random.Random, count: int) -> list[tuple[int, int]]:
    """Corners, and then random (N, D) with small ones as likely as large ones."""
    corners = [(1, 1), (300, 1), (1, 257), (64, 64), (65, 16), (3, 128), (129, 33)]
    return corners + [
        (round(300 ** draw.random()), round(257 ** draw.random())) for _ in range(count - len(corners))
    ]


def family_for(draw: random.Random, case: int, D: int) -> tuple[Any, Any]:
    """Slopes as the kernel takes them and in float64: floats, a tensor [3], or a tensor [3, D]."""
    floats = FAMILIES[draw.randrange(len(FAMILIES))]
    kind = case % 4
    if kind < 2:
        return floats, floats
    slopes = torch.tensor(floats)
    if kind == 3:
        slopes = (slopes[:, None] * torch.empty(3, D).uniform_(0.8, 1.25)).contiguous()
    return amid_nan(slopes), slopes.double()


def measure(derivative_kernel: Any) -> dict[str, Any]:
    from lunet_fast import reference as ref
    from lunet_fast.kernels import activation as act
    from lunet_fast.kernels import layer

    torch.set_num_threads(1)
    torch.manual_seed(0)
    draw = random.Random(0)
    worst = Worst()
    overwritten: list[str] = []
    checks = dict.fromkeys(CHECKS, True)

    for case, (N, D) in enumerate(shapes(draw, 60)):
        slopes, exact = family_for(draw, case, D)
        x = amid_nan(torch.randn(N, D) * 10.0 ** draw.uniform(-2, 2))
        logabsdet = case % 3 > 0
        name = f"N={N} D={D} {slopes if isinstance(slopes, tuple) else list(slopes.shape)}"
        y64, total64 = ref.leaky_softplus_and_logabsdet(x.double(), exact)
        with guarded(overwritten):
            y, total = act.activation_forward(x, slopes, logabsdet=logabsdet)
        worst.add("activation_fwd y", normwise(y, y64), name)
        if total is not None:
            worst.add("activation_fwd logabsdet", normwise(total, total64), name)

        ratio = (
            float(((exact[0] + exact[1]) / exact[0]).max())
            if isinstance(exact, Tensor)
            else ((exact[0] + exact[1]) / exact[0])
        )
        x64, total64 = ref.leaky_softplus_inverse_and_logabsdet(x.double(), exact)
        with guarded(overwritten):
            back, total = act.activation_inverse(x, slopes, logabsdet=logabsdet)
        worst.add("activation_inv x", normwise(back, x64) / ratio, name)
        if total is not None:
            worst.add("activation_inv logabsdet", normwise(total, total64) / ratio, name)

    def layer_case(N: int, D: int, case: int) -> tuple[Any, ...]:
        slopes, exact = (None, None) if case % 5 == 4 else family_for(draw, case, D)
        x = amid_nan(torch.randn(N, D))
        weight = amid_nan(torch.randn(D, D) / math.sqrt(D))
        bias = amid_nan(torch.randn(D)) if case % 3 else None
        constant = amid_nan(torch.randn(())) if case % 2 else None
        return x, weight, bias, slopes, exact, constant

    for case, (N, D) in enumerate(shapes(draw, 60)):
        x, weight, bias, slopes, exact, constant = layer_case(N, D, case)
        logabsdet, save = case % 3 > 0, case % 2 == 0
        name = f"N={N} D={D} case {case}"
        h64 = x.double() @ weight.double().T + (0.0 if bias is None else bias.double())
        with guarded(overwritten):
            y, total, h = layer.layer_forward(
                *(x, weight, bias, slopes),
                logabsdet=logabsdet,
                save=save,
                precision=layer.PRECISIONS[case % 3],
                constant=constant,
            )
        worst.add("layer_fwd y", normwise(y, h64 if exact is None else ref.leaky_softplus(h64, exact)), name)
        if save and exact is not None:
            worst.add("layer_fwd h", normwise(h, h64), name)
        elif h is not None:
            worst.add("layer_fwd h", math.inf, f"{name}: not asked for")
        if logabsdet:
            total64 = torch.zeros(N).double() if exact is None else ref.log_derivative_sum(h64, exact)
            if constant is not None:
                total64 = total64 + constant.double()
            worst.add("layer_fwd logabsdet", normwise(total, total64), name)
        elif total is not None:
            worst.add("layer_fwd logabsdet", math.inf, f"{name}: not asked for")

    extremes(worst, checks, derivative_kernel)
    bfloat16(worst)

    # The same rows give the same bits whatever batch they are in, and a NaN stays in its row.
    x, weight, bias, slopes, _, _ = layer_case(70, 90, 1)

    def run(rows: Tensor) -> list[Tensor]:
        out = layer.layer_forward(rows, weight, bias, slopes, logabsdet=True, save=True, precision="ieee")
        return [*out, *act.activation_forward(rows, slopes, logabsdet=True),
                *act.activation_inverse(rows, slopes, logabsdet=True)]  # fmt: skip

    whole = run(x)
    checks["same bits twice"] = all(torch.equal(p, q) for p, q in zip(whole, run(x), strict=True))
    # Not of the layer: NumPy's product, which stands in for tl.dot here, depends on a row's place in a tile.
    checks["batch does not matter"] = all(
        torch.equal(p[60:65], q) for p, q in zip(whole[3:], run(x[60:65].clone())[3:], strict=True)
    )
    x[3, 50] = math.nan
    others = torch.arange(70) != 3
    for before, after in zip(whole, run(x), strict=True):
        poisoned = after[3].isnan().any() if after is not None else False
        checks["a NaN stays in its row"] &= bool(poisoned) and torch.equal(before[others], after[others])

    for D in (1, 40):
        none = torch.zeros(0, D)
        out = layer.layer_forward(
            none, torch.eye(D), None, FAMILIES[0], logabsdet=True, save=True, precision="ieee"
        )
        out += act.activation_forward(none, FAMILIES[0], logabsdet=True)
        out += act.activation_inverse(none, FAMILIES[0], logabsdet=True)
        checks["empty"] &= [tuple(t.shape) for t in out if t is not None] == [
            (0, D), (0,), (0, D), (0, D), (0,), (0, D), (0,)
        ]  # fmt: skip

    square = torch.randn(8, 8)
    refusals: list[Callable[[], object]] = [
        lambda: act.activation_forward(square.T, FAMILIES[0], logabsdet=False),
        lambda: act.activation_inverse(square[:, ::2], FAMILIES[0], logabsdet=False),
        lambda: act.activation_forward(square[0].expand(8, 8), FAMILIES[0], logabsdet=False),
        lambda: act.activation_forward(square.double(), FAMILIES[0], logabsdet=False),
        lambda: act.activation_forward(square, torch.ones(3, 7), logabsdet=False),
        lambda: layer.layer_forward(
            square, square.T, None, None, logabsdet=False, save=False, precision="ieee"
        ),
        lambda: layer.layer_forward(
            square, square, None, None, logabsdet=False, save=False, precision="high"
        ),
        lambda: layer.layer_forward(
            square, square.bfloat16(), None, None, logabsdet=False, save=False, precision="ieee"
        ),
    ]
    for refusal in refusals:
        try:
            refusal()
            checks["refused"] = False
        except ValueError:
            pass

    checks["no write outside"] = not overwritten
    return {"worst": worst, "checks": checks}


def extremes(worst: Worst, checks: dict[str, bool], derivative_kernel: Any) -> None:
    """Elementwise, to ±1e30, by the scale of the terms that are added; then inf and NaN."""
    import triton

    from lunet_fast import reference as ref
    from lunet_fast.kernels import activation as act

    magnitudes = torch.logspace(-30, 30, 2001, dtype=torch.float64).float()
    near = torch.linspace(-200.0, 200.0, 4001)
    x = torch.cat([-magnitudes, magnitudes, near]).unsqueeze(1)
    x64 = x.double()
    special = torch.tensor([[math.inf, -math.inf, math.nan, 3.4e38, -3.4e38, 0.0, -0.0, 1e-45]])
    for family in [*FAMILIES, (1e-4, 1.0, 3.0), (1e-6, 1.0, 1.0), (100.0, 1.0, 1.0)]:
        # The same slopes for both sides: those of float32.
        exact = tuple(torch.tensor(family).double().tolist())
        a, c, kappa = exact
        y, log_slope = act.activation_forward(x, exact, logabsdet=True)
        y64 = ref.leaky_softplus(x64, exact)
        # Near its zero φ is a difference of a·x and a softplus: its terms, not itself, set the scale.
        scale = a * x64.abs() + (y64 - a * x64)
        worst.add("extremes φ", ((y.double() - y64).abs() / scale).max().item(), str(family))
        # log φ′ is a constant and a correction that dies out in either tail; where φ′ is near 1 they cancel.
        # The rounding of κx, |κx| times as large in exp(−|κx|), is the correction's own scale.
        s = torch.sigmoid(-(kappa * x64).abs())
        constant = torch.where(x64 >= 0, math.log(a + c), math.log(a))
        correction = torch.log1p(torch.where(x64 >= 0, -c / (a + c), c / a) * s)
        log64 = (constant + correction).squeeze(1)
        scale = (constant.abs() + correction.abs() * (1.0 + 0.1 * (kappa * x64).abs())).squeeze(1)
        error = (log_slope.double() - log64).abs() / scale.clamp_min(1e-37)
        worst.add("extremes log φ′", error.max().item(), f"{family} x={x[error.argmax(), 0].item()}")
        slope = torch.empty_like(x)
        derivative_kernel[(triton.cdiv(x.numel(), 1024),)](x, slope, *exact, x.numel(), BLOCK=1024)
        slope64 = ref.leaky_softplus_derivative(x64, exact)
        worst.add("extremes φ′", ((slope.double() - slope64).abs() / slope64).max().item(), str(family))

        back, _ = act.activation_inverse(x, exact, logabsdet=False)
        back64 = ref.leaky_softplus_inverse(x64, exact)
        # What a rounding of each term of φ(x) = y does to x.
        slope64 = ref.leaky_softplus_derivative(back64, exact)
        terms = a * back64.abs() + (ref.leaky_softplus(back64, exact) - a * back64) + x64.abs()
        scale = back64.abs() + terms / slope64
        worst.add("extremes φ⁻¹", ((back.double() - back64).abs() / scale).max().item(), str(family))

        y, total = act.activation_forward(special.T.contiguous(), exact, logabsdet=True)
        y64 = ref.leaky_softplus(special.double(), exact).float().squeeze(0)
        total64 = ref.leaky_softplus_derivative(special.double(), exact).log().squeeze(0)
        checks["inf and NaN"] &= torch.allclose(y.squeeze(1), y64, rtol=1e-5, equal_nan=True)
        checks["inf and NaN"] &= torch.allclose(total.double(), total64, rtol=1e-5, atol=1e-6, equal_nan=True)
        back, total = act.activation_inverse(special.T.contiguous(), exact, logabsdet=True)
        ends = [math.inf, -math.inf, math.nan]
        checks["inf and NaN"] &= torch.equal(back[:2, 0], torch.tensor(ends[:2])) and bool(back[2].isnan())
        checks["inf and NaN"] &= bool(back[5:].isfinite().all()) and bool(total[2].isnan())
        checks["inf and NaN"] &= torch.allclose(
            total[:2].double(), -torch.tensor([math.log(a + c), math.log(a)]).double(), rtol=1e-5, atol=1e-6
        )


def bfloat16(worst: Worst) -> None:
    """bfloat16 in and out, float32 between: against float64 on the same rounded inputs."""
    from lunet_fast import reference as ref
    from lunet_fast.kernels import activation as act
    from lunet_fast.kernels import layer

    family = FAMILIES[0]
    for N, D in ((5, 7), (70, 33), (130, 96)):
        x, bias = torch.randn(N, D).bfloat16(), torch.randn(D).bfloat16()
        weight = (torch.randn(D, D) / math.sqrt(D)).bfloat16()
        h64 = x.double() @ weight.double().T + bias.double()
        y, total, h = layer.layer_forward(
            x, weight, bias, family, logabsdet=True, save=True, precision="tf32"
        )
        assert y.dtype == h.dtype == torch.bfloat16
        assert total.dtype == torch.float32
        worst.add("bfloat16", normwise(h, h64), f"h {N}x{D}")
        worst.add("bfloat16", normwise(y, ref.leaky_softplus(h64, family)), f"y {N}x{D}")
        # The sum leaves in float32, so it must not have passed through bfloat16.
        worst.add("layer_fwd logabsdet", normwise(total, ref.log_derivative_sum(h64, family)), "bfloat16")
        y, _ = act.activation_forward(x, family, logabsdet=False)
        worst.add("bfloat16", normwise(y, ref.leaky_softplus(x.double(), family)), f"φ {N}x{D}")
        back, _ = act.activation_inverse(x, family, logabsdet=False)
        worst.add("bfloat16", normwise(back, ref.leaky_softplus_inverse(x.double(), family)), f"φ⁻¹ {N}x{D}")


# --- in pytest's process --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def measured() -> dict[str, Any]:
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", __file__],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", LIMITS)
def test_error_against_float64(measured: dict[str, Any], name: str) -> None:
    error, case = measured["worst"][name]
    assert error <= LIMITS[name], f"{name}: {error:.2e} at {case}"


@pytest.mark.parametrize("name", CHECKS)
def test_behaviour(measured: dict[str, Any], name: str) -> None:
    assert measured["checks"][name]


if __name__ == "__main__":
    import triton
    import triton.language as tl

    from lunet_fast.kernels.activation import phi_derivative

    @triton.jit
    def derivative_kernel(x_ptr, y_ptr, a, c, kappa, N, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
        """y = φ′(x), which no kernel stores by itself."""
        i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + i, mask=i < N, other=0.0)
        tl.store(y_ptr + i, phi_derivative(x, (a, c, kappa, 0.0, 0.0), False), mask=i < N)

    print(json.dumps(measure(derivative_kernel)))

"""The errors of the kernels' arithmetic, from compiled code executed on a CPU, and addresses beyond 2³¹.

    python -m benchmarks.gpu.executed      results/executed-kernels.json and .md; 15 minutes, no GPU

``tests/ptx`` executes the PTX that Triton compiles for sm_80 and sm_90: tf32 as tensor cores read it, sums
cut as they cut them, approximate instructions off by up to what is documented. Each error is normwise
against float64; PyTorch's own product in float32 stands beside. Of a tensor of more than 2³¹ numbers
memory is reserved and not touched, and of the grid the first programs and the last are run.
"""

from __future__ import annotations

import itertools
import math
import mmap
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.common import FAMILY, normwise
from benchmarks.machine import open_results, parser
from lunet_fast.ops import reference
from tests.ptx.launch import executed

ARCHITECTURES = (80, 90)
SIZES = (16, 64, 256)

#: On sm_90 the layer alone too: it takes minutes.
LARGEST = 1024
ARITHMETICS = ("tf32x3", "tf32", "bf16")
ROWS = 64

Row = dict[str, Any]


def rows(D: int, kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """x [ROWS, D], W [D, D] and b [D]: normal, or of one sign, where what is cut off adds up."""
    torch.manual_seed(D)
    draw = torch.randn if kind == "normal" else torch.rand
    return draw(ROWS, D), draw(D, D) / math.sqrt(D), 0.1 * torch.randn(D)


def layer_errors(architecture: int, D: int, arithmetic: str, kind: str) -> Row:
    """Of h = W x + b, of y = φ(h), of the sum of log φ′, and the mean of h's signed error."""
    from lunet_fast.kernels.layer import layer_forward

    x, weight, bias = rows(D, kind)
    dtype = torch.bfloat16 if arithmetic == "bf16" else torch.float32
    x, weight, bias = (t.to(dtype) for t in (x, weight, bias))
    with executed(architecture, checked=False) as runs:
        y, total, h = layer_forward(
            *(x[None], weight[None], bias[None], FAMILY),
            logabsdet=True,
            save=True,
            precision="tf32" if arithmetic == "bf16" else arithmetic,
        )
    assert h is not None
    assert total is not None
    exact = x.double() @ weight.double().T + bias.double()
    plain = x @ weight.T + bias
    log = reference.log_derivative_sum(exact, FAMILY)
    return {
        "kernel": runs[-1].launch.kernel,
        "sm": architecture,
        "D": D,
        "arithmetic": arithmetic,
        "data": kind,
        "h": normwise(h[0], exact),
        "y": normwise(y[0], reference.leaky_softplus(exact, FAMILY)),
        "logabsdet": normwise(total[0], log),
        "logabsdet an element": float((total[0].double() - log).abs().max()) / D,
        "bias of h": float((h[0].double() - exact).mean() / exact.abs().mean()),
        "PyTorch": normwise(plain, exact),
    }


def inverse_errors(architecture: int, D: int) -> Row:
    """Of x = W⁻¹(φ⁻¹(y) − b), the gradient's products included, by κ₂(W)."""
    from lunet_fast.kernels.inverse import layer_inverse, prepare_inverse
    from lunet_fast.kernels.inverse_gradient import layer_inverse_backward

    torch.manual_seed(D)
    lu = torch.randn(1, D, D) * (0.5 / math.sqrt(D))
    lu.diagonal(dim1=-2, dim2=-1).uniform_(-0.5, 0.5)
    weight = reference.lu_weight(lu[0].double(), None, None)
    y, grad, ld = torch.randn(1, 64, D), torch.randn(1, 64, D), torch.randn(1, 64)
    with executed(architecture, checked=False):
        prepared = prepare_inverse(lu, None, None, precision="tf32x3")
        x, total, h = layer_inverse(
            *(y, lu, prepared.inverses, None, FAMILY),
            permutation=None,
            logabsdet=True,
            save=True,
            precision="tf32x3",
            constant=prepared.logabsdet,
            weight=prepared.weight,
            condition=prepared.condition,
        )
        assert h is not None
        right, _, _ = layer_inverse_backward(
            *(grad, ld, h, lu, prepared.inverses, FAMILY), permutation=None, precision="tf32x3"
        )
    exact_h, log = reference.leaky_softplus_inverse_and_logabsdet(y[0].double(), FAMILY)
    exact = torch.linalg.solve(weight, exact_h.T).T
    constant = lu[0].double().diagonal().sum()
    plain = torch.linalg.solve(weight.float(), exact_h.float().T).T
    assert total is not None
    return {
        "sm": architecture,
        "D": D,
        "condition": float(torch.linalg.cond(weight)),
        "x": normwise(x[0], exact),
        "logabsdet": normwise(total[0], log - constant),
        "gradient": normwise(right[0], torch.linalg.solve(weight.T, grad[0].double().T).T),
        "PyTorch": normwise(plain, exact),
    }


def gradient_errors(architecture: int, D: int, arithmetic: str) -> Row:
    """Of the layer's gradients of x, W and b."""
    from lunet_fast.kernels.gradient import layer_backward

    x, weight, bias = rows(D, "normal")
    dtype = torch.bfloat16 if arithmetic == "bf16" else torch.float32
    x, weight, bias = (t.to(dtype) for t in (x, weight, bias))
    grad = torch.randn(ROWS, D).to(dtype)
    h = x.double() @ weight.double().T + bias.double()
    with executed(architecture, checked=False):
        by_x, by_weight, by_bias, _ = layer_backward(
            *(grad[None], None, x[None], h.to(dtype)[None], weight[None], bias[None], FAMILY),
            needs_x=True,
            needs_weight=True,
            needs_bias=True,
            precision="tf32" if arithmetic == "bf16" else arithmetic,
        )
    grad_h = grad.double() * reference.leaky_softplus_derivative(h.to(dtype).double(), FAMILY)
    return {
        "sm": architecture,
        "D": D,
        "arithmetic": arithmetic,
        "x": normwise(by_x[0], grad_h @ weight.double()),
        "W": normwise(by_weight[0], grad_h.T @ x.double()),
        "b": normwise(by_bias[0], grad_h.sum(0)),
        "PyTorch": normwise(grad_h.float() @ weight.float(), grad_h @ weight.double()),
    }


# --- more than 2³¹ numbers ------------------------------------------------------------------------------


def reserved(*shape: int) -> Tensor:
    """A float32 tensor of zeros whose memory is taken as it is touched."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    return torch.frombuffer(mmap.mmap(-1, 4 * math.prod(shape), flags=flags), dtype=torch.float32).view(shape)


@contextmanager
def large_tensors_reserved() -> Iterator[None]:
    """Let torch.empty and empty_like reserve what is larger than 2²⁶ numbers."""
    plain = torch.empty, torch.empty_like

    def empty(*size: Any, dtype: torch.dtype | None = None, device: Any = None) -> Tensor:
        shape = size[0] if len(size) == 1 and not isinstance(size[0], int) else size
        return reserved(*shape) if math.prod(shape) > 1 << 26 else plain[0](shape, dtype=dtype)

    def empty_like(x: Tensor, *, dtype: torch.dtype | None = None, **_: Any) -> Tensor:
        return empty(tuple(x.shape), dtype=dtype or x.dtype)

    torch.empty, torch.empty_like = empty, empty_like  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.empty, torch.empty_like = plain  # type: ignore[assignment]


def ends(count: int) -> Sequence[int]:
    """The first programs of a grid, one in the middle and the last: enough for whole rows of every kernel."""
    return range(count) if count <= 48 else [*range(8), count // 2, *range(count - 16, count)]


def large_errors(architecture: int, what: str, run: Callable[[Tensor], Tensor], N: int, D: int) -> Row:
    """``run`` of N·D > 2³¹ numbers: its last rows are what they are by themselves."""
    x = reserved(N, D)
    last = slice(N - 3, N)
    torch.manual_seed(0)
    x[N - 300 :] = torch.randn(300, D)
    with (
        large_tensors_reserved(),
        executed(architecture, checked=False, exact_sums=True, programs=ends) as runs,
    ):
        whole = run(x)
    with executed(architecture, checked=False, exact_sums=True):
        alone = run(x[last].clone())
    return {
        "sm": architecture,
        "what": what,
        "N": N,
        "D": D,
        "beyond": N * D - 2**31,
        "grid": list(runs[-1].grid),
        "same bits": torch.equal(whole[last], alone),
        "out of bounds": sorted({kind for one in runs for kind in one.findings.kinds()}),
    }


def large_rows(architecture: int) -> Iterator[Row]:
    from lunet_fast.kernels.activation import activation_forward, activation_inverse
    from lunet_fast.kernels.layer import layer_forward

    def layer(x: Tensor) -> Tensor:
        torch.manual_seed(1)
        D = x.shape[1]
        weight, bias = torch.randn(1, D, D) / math.sqrt(D), torch.randn(1, D)
        y, _, _ = layer_forward(
            *(x[None], weight, bias, FAMILY), logabsdet=True, save=False, precision="tf32x3"
        )
        return y[0]

    for D in (64, 257):
        yield large_errors(architecture, "layer", layer, 2**31 // D + 1000, D)
    for what, function in (("φ", activation_forward), ("φ⁻¹", activation_inverse)):
        run = lambda x, f=function: f(x, FAMILY, logabsdet=True)[0]  # noqa: E731
        yield large_errors(architecture, what, run, 2**31 // 256 + 1000, 256)


# --- the report -----------------------------------------------------------------------------------------


def table(found: list[Row], columns: Sequence[str]) -> list[str]:
    def cell(value: Any) -> str:
        return f"{value:.1e}" if isinstance(value, float) else str(value)

    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    return [*lines, *("| " + " | ".join(cell(row[column]) for column in columns) + " |" for row in found)]


def report(found: dict[str, list[Row]], machine: dict[str, Any], command: str) -> str:
    """The Markdown file."""
    layer = (
        "sm",
        "D",
        "arithmetic",
        "data",
        "h",
        "bias of h",
        "y",
        "logabsdet",
        "logabsdet an element",
        "PyTorch",
    )
    return "\n".join(
        [
            "# The kernels' errors, from their compiled code",
            "",
            f"{machine['date']}, commit {machine['commit']}, `{command}`. PTX for sm_80 and sm_90, "
            "executed on a CPU by `tests/ptx` as the hardware is documented and measured to round; not run on a "
            "GPU. ‖result − float64‖ / ‖float64‖; PyTorch: the same product (or solve) in float32 on the CPU.",
            "",
            "## One layer",
            "",
            *table(found["layer"], layer),
            "",
            "`bias of h`: mean(error) / mean|h|; `logabsdet an element`: largest error of a row's sum, by D.",
            "",
            "## Gradients of a layer",
            "",
            *table(found["gradient"], ("sm", "D", "arithmetic", "x", "W", "b", "PyTorch")),
            "",
            "## Inverse, tf32x3",
            "",
            *table(found["inverse"], ("sm", "D", "condition", "x", "logabsdet", "gradient", "PyTorch")),
            "",
            "## More than 2³¹ numbers",
            "",
            "The first and the last programs of the grid; the last rows, and the same rows by themselves.",
            "",
            *table(found["large"], ("sm", "what", "N", "D", "beyond", "grid", "same bits", "out of bounds")),
            "",
        ]
    )


def main() -> None:
    options = parser(__doc__).parse_args()
    results = replace(open_results(options, threads=1), command="python -m benchmarks.gpu.executed")
    found: dict[str, list[Row]] = {"layer": [], "gradient": [], "inverse": [], "large": []}

    def keep(kind: str, row: Row) -> None:
        found[kind].append(row)
        print(kind, row, file=sys.stderr, flush=True)

    for architecture in ARCHITECTURES:
        for row in large_rows(architecture):
            keep("large", row)
        for D in (*SIZES, LARGEST) if architecture == 90 else SIZES:
            for arithmetic, kind in itertools.product(ARITHMETICS, ("normal", "one sign")):
                keep("layer", layer_errors(architecture, D, arithmetic, kind))
        for D in SIZES:
            for arithmetic in ARITHMETICS:
                keep("gradient", gradient_errors(architecture, D, arithmetic))
            keep("inverse", inverse_errors(architecture, D))
    results.write("executed-kernels", found, report(found, results.machine, results.command))


if __name__ == "__main__":
    main()

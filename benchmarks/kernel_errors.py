"""How far the compiled kernels are from float64, by kernel, D and arithmetic: executed on the CPU, no GPU.

    python benchmarks/kernel_errors.py                 into results/kernel-errors.json and .md
    python benchmarks/kernel_errors.py --largest 64    smaller sizes only

The machine in ``tests/ptx`` executes what Triton compiles for sm_80 and sm_90: tf32 cut as tensor cores cut
it, their sums cut as measured on A100 and H100, approximate instructions wrong by up to what the PTX manual
allows. An error is ‖result − exact‖ / ‖exact‖, of the result that is worst. A bias is the mean signed error
over the mean magnitude: rounding to nearest leaves it near 0, a cut does not.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.gpu.common import FAMILY, Packed, Place, normwise, packed
from lunet_fast.ops import reference
from machine import open_results, parser, where
from tests.ptx.launch import executed

ARCHITECTURES = (80, 90)
ARITHMETICS = ("ieee", "tf32x3", "tf32", "bf16")
SIZES = (16, 64, 256, 1024)

#: Rows: a few tiles, which says as much of the error as a million.
N = 96

PLACE = Place(torch.device("cpu"), tiny=True, measure=False, deadline=math.inf)

#: (result, exact) by name.
Pairs = dict[str, tuple[Tensor, Tensor]]


def _kinds(arithmetic: str) -> tuple[torch.dtype, str]:
    return (torch.bfloat16, "tf32") if arithmetic == "bf16" else (torch.float32, arithmetic)


def _affine(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    h = x @ weight.T + bias
    return (*reference.leaky_softplus_and_logabsdet(h, FAMILY), h)


def _layer_of(x: Tensor, weight: Tensor, bias: Tensor, arithmetic: str) -> Pairs:
    """Of x [N, D], given the kernel's own (rounded) numbers in float64 too; "float32": PyTorch's product."""
    from lunet_fast.kernels.layer import layer_forward

    exact = _affine(x.double(), weight.double(), bias.double())
    if arithmetic == "float32":
        found: Any = _affine(x, weight, bias)
    else:
        _, precision = _kinds(arithmetic)
        results = layer_forward(
            *(x[None], weight[None], bias[None], FAMILY), logabsdet=True, save=True, precision=precision
        )
        found = [result[0] for result in results if result is not None]
    return dict(zip(("y", "log-det", "h"), zip(found, exact, strict=True), strict=True))


def layer(D: int, arithmetic: str) -> Pairs:
    dtype, _ = _kinds(arithmetic)
    x, weight = torch.randn(N, D).to(dtype), (torch.randn(D, D) / math.sqrt(D)).to(dtype)
    return _layer_of(x, weight, torch.randn(D).to(dtype), arithmetic)


def layer_of_one_sign(D: int, arithmetic: str) -> Pairs:
    """x and W uniform on [0, 1): nothing cancels, and what a cut takes away adds up."""
    dtype, _ = _kinds(arithmetic)
    x, weight = torch.rand(N, D).to(dtype), (torch.rand(D, D) / math.sqrt(D)).to(dtype)
    return {"h": _layer_of(x, weight, torch.zeros(D, dtype=dtype), arithmetic)["h"]}


def gradient(D: int, arithmetic: str) -> Pairs:
    """Gradients of x, W and b."""
    from lunet_fast.kernels.gradient import layer_backward

    dtype, precision = _kinds(arithmetic)
    x, g = torch.randn(N, D).to(dtype), torch.randn(N, D).to(dtype)
    weight, bias, ld = (torch.randn(D, D) / math.sqrt(D)).to(dtype), torch.randn(D), torch.randn(N)

    def through(x: Tensor, weight: Tensor, bias: Tensor, g: Tensor, ld: Tensor) -> tuple[Tensor, ...]:
        leaves = [leaf.clone().requires_grad_() for leaf in (x, weight, bias)]
        y, total, _ = _affine(*leaves)
        return torch.autograd.grad([y, total], leaves, [g, ld])

    given = (x, weight, bias, g, ld)
    exact = through(*(tensor.double() for tensor in given))
    found: Any
    if arithmetic == "float32":
        found = through(*given)
    else:
        h = (x.double() @ weight.double().T + bias.double()).to(dtype)
        results = layer_backward(
            *(g[None], ld[None], x[None], h[None], weight[None], bias[None], FAMILY),
            needs_x=True,
            needs_weight=True,
            needs_bias=True,
            precision=precision,
        )
        found = [result[0] for result in results[:3] if result is not None]
    return dict(zip(("x", "W", "b"), zip(found, exact, strict=True), strict=True))


def inverse(D: int, arithmetic: str) -> Pairs:
    """x of y, W well conditioned (κ₂ about 6): the product with W⁻¹ or substitution, as the table has it."""
    from lunet_fast.kernels.inverse import layer_inverse, prepare_inverse

    p = packed(PLACE, D)
    weight, y = p.weight()[0], torch.randn(N, D)
    h, total = reference.leaky_softplus_inverse_and_logabsdet(y.double(), FAMILY)
    exact = torch.linalg.solve(weight, (h - p.bias[0].double()).T).T, total - p.logabsdet()[0].double()
    if arithmetic == "float32":
        h, total = reference.leaky_softplus_inverse_and_logabsdet(y, FAMILY)
        found: Any = torch.linalg.solve(weight.float(), (h - p.bias[0]).T).T, total - p.logabsdet()[0]
    else:
        prepared = prepare_inverse(p.lu, p.sign, None, precision=arithmetic)
        results = layer_inverse(
            *(y[None], p.lu, prepared.inverses, p.bias, FAMILY),
            permutation=None,
            logabsdet=True,
            save=False,
            precision=arithmetic,
            constant=prepared.logabsdet,
            weight=prepared.weight,
            condition=prepared.condition,
        )
        found = [result[0] for result in results[:2] if result is not None]
    return dict(zip(("x", "log-det"), zip(found, exact, strict=True), strict=True))


def _through_stack(x: Tensor, p: Packed, weights: Tensor) -> tuple[Tensor, Tensor]:
    total = p.logabsdet().to(x.dtype).sum().expand(len(x))
    for m, weight in enumerate(weights):
        x = x @ weight.to(x.dtype).T + p.bias[m].to(x.dtype)
        if m < len(weights) - 1:
            x, share = reference.leaky_softplus_and_logabsdet(x, FAMILY)
            total = total + share
    return x, total


def stack(D: int, arithmetic: str) -> Pairs:
    """8 layers in one launch: an error is carried through the layers after it."""
    from lunet_fast.kernels.stack import stack_forward

    p, x = packed(PLACE, D, 8, spread=0.2), torch.randn(N, D)
    weights = p.weight().float()
    exact = _through_stack(x.double(), p, weights.double())
    if arithmetic == "float32":
        found: Any = _through_stack(x, p, weights)
    else:
        found = stack_forward(
            *(x, weights, p.bias, FAMILY), constant=p.logabsdet(), logabsdet=True, precision=arithmetic
        )
    return dict(zip(("y", "log-det"), zip(found, exact, strict=True), strict=True))


def scores(D: int, arithmetic: str) -> Pairs:
    """The best 10 of 300 items for 4 users, through two layers."""
    from lunet_fast.kernels.score import score_topk

    p, q = torch.randn(1, 4, D), torch.randn(1, 300, D)
    weight, bias = torch.randn(1, 2, D, D) / math.sqrt(D), torch.randn(1, 2, D)
    readout, user, item = torch.randn(1, D) / math.sqrt(D), torch.randn(4), torch.randn(300)

    def dense(dtype: torch.dtype) -> Tensor:
        h = p[0].to(dtype)[:, None] + q[0].to(dtype)
        for W, b in zip(weight[0].to(dtype), bias[0].to(dtype), strict=True):
            h = reference.leaky_softplus(h, FAMILY) @ W.T + b
        return h @ readout[0].to(dtype) + user.to(dtype)[:, None] + item.to(dtype)

    exact = dense(torch.float64)
    if arithmetic == "float32":
        return {"score": (dense(torch.float32), exact)}
    found, chosen = score_topk(
        *(p, q, weight, bias, FAMILY, readout, None, user, item, None, 10),
        activated=False,
        precision=arithmetic,
    )
    return {"score": (found, exact.gather(1, chosen))}


#: (name, what is computed, its sizes at most, the arithmetics that it has)
KERNELS: list[tuple[str, Callable[[int, str], Pairs], int, tuple[str, ...]]] = [
    ("layer", layer, 1024, ARITHMETICS),
    ("layer, x and W ≥ 0", layer_of_one_sign, 1024, ARITHMETICS),
    ("gradient of the layer", gradient, 256, ARITHMETICS),
    ("inverse", inverse, 256, ARITHMETICS[:2]),
    ("8 layers in one launch", stack, 64, ARITHMETICS[:3]),
    ("scores", scores, 64, ARITHMETICS[:3]),
]


def measure(largest: int) -> Iterator[dict[str, Any]]:
    """A row for each kernel, D, arithmetic and architecture; PyTorch's float32 has no architecture."""
    for name, pairs_of, limit, arithmetics in KERNELS:
        for D in [size for size in SIZES if size <= min(limit, largest)]:
            print(f"{name}, D = {D} …", file=sys.stderr, flush=True)
            yield _row(name, D, "float32", None, pairs_of)
            for arithmetic in arithmetics:
                for architecture in ARCHITECTURES:
                    if fits(name, D, arithmetic, architecture):
                        yield _row(name, D, arithmetic, architecture, pairs_of)


def fits(name: str, D: int, arithmetic: str, architecture: int) -> bool:
    """Whether there is a kernel: a stack has one where it fits on the chip."""
    from lunet_fast.kernels import tiles

    if "one launch" not in name:
        return True
    return tiles.stack_tile("forward", D, torch.float32, arithmetic, architecture) is not None


def _row(
    name: str, D: int, arithmetic: str, architecture: int | None, pairs_of: Callable[[int, str], Pairs]
) -> dict[str, Any]:
    torch.manual_seed(D)
    if architecture is None:
        pairs = pairs_of(D, arithmetic)
    else:
        with executed(architecture, checked=False):
            pairs = pairs_of(D, arithmetic)
    return {
        "kernel": name,
        "D": D,
        "arithmetic": arithmetic,
        "architecture": architecture,
        "errors": {result: normwise(found, exact) for result, (found, exact) in pairs.items()},
        "biases": {
            result: float((found.double() - exact).mean() / exact.abs().mean())
            for result, (found, exact) in pairs.items()
        },
    }


def logarithms() -> Iterator[dict[str, Any]]:
    """log φ′ of the row-wise kernel and as PyTorch takes it in float32: the largest error of an element,
    absolute."""
    from lunet_fast.kernels.activation import activation_forward

    torch.manual_seed(0)
    x = 5 * torch.randn(4000, 1)
    for alpha in (0.1, 0.01, 1e-3):
        family = (alpha, 1 - alpha, 1.0)
        exact = reference.log_derivative_sum(x.double(), family)
        theirs = reference.log_derivative_sum(x, family)
        yield {"alpha": alpha, "architecture": None, "error": float((theirs - exact).abs().max())}
        for architecture in ARCHITECTURES:
            with executed(architecture, checked=False):
                _, total = activation_forward(x, family, logabsdet=True)
            assert total is not None
            error = float((total.double() - exact).abs().max())
            yield {"alpha": alpha, "architecture": architecture, "error": error}


def report(rows: list[dict[str, Any]], logs: list[dict[str, Any]]) -> list[str]:
    """The table: the worse of the two architectures, the worst of the results."""
    columns = ("float32", *ARITHMETICS)
    lines = [
        "| kernel | D | PyTorch float32 | " + " | ".join(ARITHMETICS) + " |",
        "|---" * (2 + len(columns)) + "|",
    ]
    keys = list(dict.fromkeys((row["kernel"], row["D"]) for row in rows))
    for kernel, D in keys:
        cells = []
        for arithmetic in columns:
            errors = [
                error
                for row in rows
                if (row["kernel"], row["D"], row["arithmetic"]) == (kernel, D, arithmetic)
                for error in row["errors"].values()
            ]
            cells.append(f"{max(errors):.1e}" if errors else "")
        lines.append(f"| {kernel} | {D} | " + " | ".join(cells) + " |")
    signed = [row for row in rows if "≥ 0" in row["kernel"]]
    lines += ["", "Bias of h where x and W ≥ 0: the mean signed error over the mean magnitude.", ""]
    lines += ["| D | " + " | ".join(f"{a} sm_{s}" for a in ARITHMETICS for s in ARCHITECTURES) + " |"]
    lines += ["|---" * (1 + len(ARITHMETICS) * len(ARCHITECTURES)) + "|"]
    for D in dict.fromkeys(row["D"] for row in signed):
        biases = [
            f"{row['biases']['h']:+.0e}"
            for row in signed
            if row["D"] == D and row["architecture"] is not None
        ]
        lines.append(f"| {D} | " + " | ".join(biases) + " |")
    lines += ["", "log φ′ of an element, the largest absolute error.", ""]
    lines += ["| α | PyTorch float32 | the row-wise kernel |", "|---|---|---|"]
    for alpha in dict.fromkeys(row["alpha"] for row in logs):
        mine = [row for row in logs if row["alpha"] == alpha]
        worst = [
            max(row["error"] for row in mine if (row["architecture"] is None) == theirs)
            for theirs in (True, False)
        ]
        lines.append(f"| {alpha:g} | {worst[0]:.1e} | {worst[1]:.1e} |")
    return lines


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--largest", type=int, default=max(SIZES), help="D at most")
    chosen = options.parse_args()
    results = open_results(chosen, threads=1)
    rows, logs = list(measure(chosen.largest)), list(logarithms())
    values = {"rows": rows, "logarithms": logs, "N": N}
    head = [
        "# Errors of the compiled kernels",
        "",
        f"{where({'machine': results.machine, 'command': results.command})}.",
        "",
        "‖result − exact‖ / ‖exact‖ against float64 of the same (rounded) inputs, the worst of a kernel's "
        f"results and of sm_80 and sm_90; {N} rows. The PTX is executed on a CPU (`tests/ptx`), not a GPU.",
        "",
    ]
    results.write("kernel-errors", values, "\n".join([*head, *report(rows, logs), ""]))


if __name__ == "__main__":
    main()

"""One layer beside what PyTorch offers: times as ratios, each pair measured interleaved in this process.

    python benchmarks/layers.py            prints a table, writes benchmarks/results/layers-cpu.json
    python benchmarks/layers.py --quick    smaller sizes, nothing written

Before anything is timed, both sides of a pair are compared with float64; a pair that disagrees stops the
run, and nothing of it is kept. Medians; the spread is the quartiles of the ratio over the repeats.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lunet_fast import LeakySoftplus, LUDense
from machine import describe, write

Run = Callable[[], object]


@dataclass(frozen=True)
class Pair:
    """Two ways to one end: ``ours`` and ``peer`` are timed in turn."""

    what: str
    features: int
    rows: int
    ours: Run
    peer: Run
    peer_name: str


def layer_of(features: int, activated: bool) -> LUDense:
    """An LUDense with off-diagonals of a trained layer's size, κ₁ of L and U about 4 each."""
    layer = LUDense(features, activation=LeakySoftplus(0.1) if activated else None)
    with torch.no_grad():
        layer.lu.copy_(torch.randn(features, features) * 0.2 / features**0.5)
    return layer


def close(name: str, found: Tensor, truth: Tensor, tolerance: float) -> None:
    error = float((found.double() - truth).norm() / truth.norm())
    if not error <= tolerance:
        raise SystemExit(f"{name}: relative error {error:.2e} is above {tolerance:.0e}; nothing is timed")


def pairs(features: int, rows: int) -> list[Pair]:
    """The comparisons at one size, checked against float64 first."""
    layer, affine = layer_of(features, True), layer_of(features, False)
    linear = affine.to_linear()
    peer = nn.Linear(features, features)
    x = torch.randn(rows, features, requires_grad=True)
    upstream = torch.randn(rows, features)
    plain = x.detach()

    def train(module: Run) -> Run:
        def step() -> None:
            x.grad = None
            module().backward(upstream)  # type: ignore[attr-defined]

        return step

    wide = affine.weight.detach().double()
    truth = plain.double() @ wide.T
    with torch.no_grad():
        close(f"D={features} forward", affine(plain), truth, 2e-6)
        close(f"D={features} inverse", affine.inverse(truth.float()), plain.double(), 2e-5)
        close(f"D={features} round trip", layer.inverse(layer(plain)), plain.double(), 2e-5)
        gap = abs(float(affine.logabsdet()) - float(torch.linalg.slogdet(wide).logabsdet))
        if gap > 1e-4:
            raise SystemExit(f"D={features} log-determinant is off by {gap:.1e}; nothing is timed")
    y = layer(plain).detach()
    weight = linear.weight.detach()

    def no_grad(run: Run) -> Run:
        return torch.no_grad()(run)

    return [
        Pair(
            "forward + backward",
            features,
            rows,
            train(lambda: layer(x)),
            train(lambda: F.softplus(peer(x))),
            "nn.Linear + softplus",
        ),
        Pair(
            "forward",
            features,
            rows,
            no_grad(lambda: layer(plain)),
            no_grad(lambda: F.softplus(peer(plain))),
            "nn.Linear + softplus",
        ),
        Pair(
            "inverse",
            features,
            rows,
            no_grad(lambda: layer.inverse(y)),
            no_grad(lambda: layer(plain)),
            "its own forward",
        ),
        Pair(
            "inverse, affine",
            features,
            rows,
            no_grad(lambda: affine.inverse(plain)),
            no_grad(lambda: torch.linalg.solve(weight, plain.T)),
            "torch.linalg.solve",
        ),
        Pair(
            "log-determinant",
            features,
            1,
            no_grad(lambda: affine.logabsdet()),
            no_grad(lambda: torch.linalg.slogdet(weight)),
            "torch.linalg.slogdet",
        ),
    ]


def measure(pair: Pair, seconds: float) -> dict[str, object]:
    """Medians of both sides and of their ratio, run in turn for about ``seconds``."""
    ours, peer = [], []
    end = time.perf_counter() + seconds
    for turn in range(10_000):
        start = time.perf_counter()
        pair.ours()
        middle = time.perf_counter()
        pair.peer()
        stop = time.perf_counter()
        if turn >= 2:
            ours.append(middle - start)
            peer.append(stop - middle)
        if len(ours) >= 7 and stop > end:
            break
    ratios = sorted(a / b for a, b in zip(ours, peer, strict=True))
    return {
        "what": pair.what,
        "features": pair.features,
        "rows": pair.rows,
        "peer": pair.peer_name,
        "ours_ms": round(1e3 * statistics.median(ours), 4),
        "peer_ms": round(1e3 * statistics.median(peer), 4),
        "ratio": round(statistics.median(ratios), 3),
        "ratio_quartiles": [round(ratios[len(ratios) // 4], 3), round(ratios[3 * len(ratios) // 4], 3)],
        "repeats": len(ours),
    }


def table(rows: list[dict[str, object]]) -> str:
    lines = [
        "| what | D | rows | ours, ms | peer | peer, ms | ours / peer |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        low, high = row["ratio_quartiles"]  # type: ignore[misc]
        lines.append(
            f"| {row['what']} | {row['features']} | {row['rows']} | {row['ours_ms']:.3g} | {row['peer']} | "
            f"{row['peer_ms']:.3g} | {row['ratio']:.3g} ({low:.2g} to {high:.2g}) |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help="small sizes, half a second each, nothing written"
    )
    parser.add_argument("--seconds", type=float, default=4.0, help="time given to each pair (default 4)")
    options = parser.parse_args()
    torch.manual_seed(0)
    sizes = [(64, 1), (64, 256)] if options.quick else [(64, 8192), (256, 8192), (784, 8192), (1024, 1)]
    rows = []
    for features, count in sizes:
        for pair in pairs(features, count):
            print(f"D={features} rows={count}: {pair.what} …", file=sys.stderr, flush=True)
            rows.append(measure(pair, 0.5 if options.quick else options.seconds))
    print(table(rows))
    print(f"{torch.get_num_threads()} threads, {describe()['processor']}")
    if not options.quick:
        print(f"written to {write('layers-cpu', {'rows': rows})}")


if __name__ == "__main__":
    main()

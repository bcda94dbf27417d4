"""LUNet with memory="reversible" beside "saved": what a training step keeps, its peak and its time, on a CPU.

    python benchmarks/reversible.py            prints a table, writes benchmarks/results/reversible-cpu.json
    python benchmarks/reversible.py --quick    a smaller size, nothing written

A step is a forward and a backward of a fresh net. Its bytes are counted once: kept, by the tensors saved for
backward, parameters apart; at the peak, by every allocation of the step. Times are medians of the two in
turn; the spread is the quartiles of the ratio. Gradients of the two are compared before anything is timed.
"""

from __future__ import annotations

import copy
import statistics
import sys
import time

import torch

from lunet_fast import LeakySoftplus, LUNet
from lunet_fast.bench.machine import median_and_quartiles, peak_bytes
from machine import describe, kept_bytes, open_results, parser

#: (α, layers): a float32 net can be inverted to a depth that depends on its activation.
NETS = [(0.1, 4), (0.5, 16), (0.9, 4), (0.9, 16), (0.9, 64)]

#: Largest relative difference between the two gradients.
TOLERANCE = 1e-3


def measure(alpha: float, layers: int, features: int, rows: int, seconds: float) -> dict[str, object]:
    """Both modes of one net: bytes, median times and their ratio over about ``seconds``."""
    saved = LUNet(features, layers, LeakySoftplus(alpha))
    reversible = copy.deepcopy(saved)
    reversible.memory = "reversible"
    x, upstream = torch.randn(rows, features), torch.randn(rows, features)

    def step(net: LUNet) -> None:
        net.zero_grad()
        net(x).backward(upstream)

    step(saved)
    step(reversible)
    for (name, a), b in zip(saved.named_parameters(), reversible.parameters(), strict=True):
        error = float((a.grad - b.grad).norm() / a.grad.norm())  # type: ignore[operator, union-attr]
        if not error <= TOLERANCE:
            raise SystemExit(
                f"α={alpha} M={layers} {name}: gradients differ by {error:.1e}; nothing is timed"
            )
    times: dict[LUNet, list[float]] = {saved: [], reversible: []}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[saved]) < 7:
        for net, spent in times.items():
            start = time.perf_counter()
            step(net)
            spent.append(time.perf_counter() - start)
    ratios = [b / a for a, b in zip(times[saved], times[reversible], strict=True)]
    ratio, low, high = median_and_quartiles(ratios)
    return {
        "alpha": alpha,
        "layers": layers,
        "features": features,
        "rows": rows,
        "saved_kept_bytes": kept_bytes(lambda: saved(x), saved),
        "reversible_kept_bytes": kept_bytes(lambda: reversible(x), reversible),
        "saved_peak_bytes": peak_bytes(lambda: step(saved), x.device),
        "reversible_peak_bytes": peak_bytes(lambda: step(reversible), x.device),
        "saved_ms": round(1e3 * statistics.median(times[saved]), 3),
        "reversible_ms": round(1e3 * statistics.median(times[reversible]), 3),
        "time_ratio": round(ratio, 3),
        "time_ratio_quartiles": [round(low, 3), round(high, 3)],
        "repeats": len(ratios),
    }


def table(rows: list[dict[str, object]]) -> str:
    lines = [
        "| α | M | kept, MB: saved | reversible | peak, MB: saved | reversible | step, ms: saved "
        "| reversible | reversible / saved |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        low, high = row["time_ratio_quartiles"]  # type: ignore[misc]
        sizes = [
            f"{row[f'{mode}_{what}_bytes'] / 1e6:.1f}"  # type: ignore[operator]
            for what in ("kept", "peak")
            for mode in ("saved", "reversible")
        ]
        lines.append(
            f"| {row['alpha']} | {row['layers']} | {' | '.join(sizes)} | {row['saved_ms']:.3g} | "
            f"{row['reversible_ms']:.3g} | {row['time_ratio']:.3g} ({low:.3g} to {high:.3g}) |"
        )
    return "\n".join(lines)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--quick", action="store_true", help="a small size, a second each, nothing written")
    options.add_argument("--seconds", type=float, default=12.0, help="time given to each net (default 12)")
    chosen = options.parse_args()
    results = None if chosen.quick else open_results(chosen)
    torch.manual_seed(0)
    features, count = (16, 512) if chosen.quick else (64, 8192)
    rows = []
    for alpha, layers in NETS:
        print(f"α={alpha} M={layers} …", file=sys.stderr, flush=True)
        rows.append(measure(alpha, layers, features, count, 1.0 if chosen.quick else chosen.seconds))
    print(f"D={features}, {count} rows, float32")
    print(table(rows))
    print(f"{torch.get_num_threads()} threads, {describe()['processor']}")
    if results is not None:
        results.write("reversible-cpu", {"rows": rows})


if __name__ == "__main__":
    main()

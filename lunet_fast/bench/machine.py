"""How fast the machine is at best, and what a run on it takes: time, memory and error."""

from __future__ import annotations

import os
import statistics
import time
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lunet_fast.training.machine import version_of

# PyTorch's profiler, which counts memory, would write a line at each start and stop.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

#: Packages that take part in a benchmark, named with their versions in every result.
PEERS = ("triton", "nflows", "normflows", "zuko", "cornac", "myfm")


def versions() -> dict[str, str]:
    """Versions of the peers that are installed."""
    found = {name: version_of(name) for name in PEERS}
    return {name: version for name, version in found.items() if version}


class Rates(NamedTuple):
    """What the machine reaches at its best: no computation can be faster than its arithmetic at these."""

    flops: float
    """Of a large matrix product, per second (a multiplication and an addition are two)."""

    bytes: float
    """Read and written by a copy that no cache can hold, per second."""

    def floor(self, flops: float, bytes_moved: float) -> float:
        """Seconds that this much takes at least, the two at the same time (a roofline)."""
        return max(flops / self.flops, bytes_moved / self.bytes)


def synchronize(device: torch.device) -> None:
    """Wait for what was started on a GPU; nothing on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure_rates(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Rates:
    """The rates of this machine, from the quickest of a few repeats: a second or two."""
    device = torch.device(device)
    on_gpu = device.type == "cuda"
    size = 8192 if on_gpu else 1536
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(left)
    source = torch.ones((1 << 30 if on_gpu else 1 << 27) // 4, device=device)
    target = torch.empty_like(source)

    def best(run: Any) -> float:
        times = []
        for _ in range(8):
            synchronize(device)
            start = time.perf_counter()
            run()
            synchronize(device)
            times.append(time.perf_counter() - start)
        return min(times)

    product = best(lambda: torch.mm(left, right, out=out))
    copy = best(lambda: target.copy_(source))
    return Rates(2.0 * size**3 / product, 2.0 * source.nbytes / copy)


def peak_bytes(run: Any, device: torch.device) -> int:
    """The most memory allocated at once while ``run`` runs, over what was there before it."""
    if device.type == "cuda":
        synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, profile_memory=True) as profile:
        run()
    results: Any = profile.profiler
    changes = sorted(
        (event.start_ns(), event.nbytes())
        for event in results.kineto_results.events()
        if event.name() == "[memory]"
    )
    most = held = 0
    for _, size in changes:
        held += size
        most = max(most, held)
    return most


def relative_error(found: Tensor, truth: Tensor) -> float:
    """‖found − truth‖ / ‖truth‖ in float64."""
    wide = truth.double()
    return float((found.detach().double() - wide).norm() / wide.norm())


def median_and_quartiles(values: list[float]) -> tuple[float, float, float]:
    """(median, lower quartile, upper quartile)."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return middle, low, high

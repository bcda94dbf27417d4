"""What a call without gradients costs the host, measured where there is no GPU.

    python -m benchmarks.gpu.host_time        benchmarks/results/host-time.json and .md; a minute

The library's own path for CUDA tensors, from the module's call to the driver's ``cuLaunchKernelEx``, on CPU
tensors under a driver that does nothing (``fake_driver.py``). So kernels cost nothing here; what PyTorch's
own operations do, stacking parameters, is computed. What CUDA's driver and allocator take of a real call is
missing. Each number is the least mean of 20 calls among 100 such means, in CPU time of the one thread; times
of another machine compare by the first row.
"""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.gpu import fake_driver
from benchmarks.machine import ROOT, open_results, parser, where

FEATURES, LAYERS, ROWS, FEW = 64, 8, 256, 16

MEANS, CALLS = 100, 20


def microseconds(call: Callable[[], object]) -> float:
    """Of one call, undisturbed."""
    for _ in range(CALLS):
        call()
    found = []
    for _ in range(MEANS):
        start = time.thread_time()
        for _ in range(CALLS):
            call()
        found.append((time.thread_time() - start) / CALLS)
    return 1e6 * min(found)


def calls() -> Iterator[tuple[str, Any, Callable[[], object]]]:
    """(what, what makes the context that it is called in, the call)."""
    from lunet_fast import LeakySoftplus, LUDense, LUNet, cached

    linear = nn.Sequential(nn.Linear(FEATURES, FEATURES), nn.Softplus())
    row, few, x = (torch.randn(rows, FEATURES) for rows in (1, FEW, ROWS))
    yield "nn.Linear and nn.Softplus, one row, on the CPU", nullcontext, lambda: linear(row)
    layer, net = LUDense(FEATURES, activation=LeakySoftplus(0.1)), LUNet(FEATURES, LAYERS)
    for name, module in ((f"LUNet({FEATURES}, {LAYERS})", net), ("layer", layer)):
        within = partial(cached, module)
        for inside, context in (("", nullcontext), (", within cached", within)):
            yield f"{name}, forward{inside}", context, partial(module, x)
            if module is layer:
                yield f"{name}, forward of {FEW} rows{inside}", context, partial(module, few)
            call = partial(module.forward_and_logabsdet, x)
            yield f"{name}, forward with log-det{inside}", context, call
            yield f"{name}, inverse{inside}", context, partial(module.inverse, x)


def measured(library: Any) -> list[dict[str, Any]]:
    launches = ctypes.c_ulonglong.in_dll(library, "launches")
    rows = []
    for what, context, call in calls():
        with torch.no_grad(), context():
            call()
            call()
            before = launches.value
            call()
            row = {"what": what, "launches": launches.value - before, "µs": round(microseconds(call), 1)}
        rows.append(row)
    return rows


def prepare(folder: Path) -> Any:
    """The driver that does nothing, the library sending CPU tensors to it; must come before any launch."""
    # PyTorch's allocator for CUDA keeps what is freed, and so shall malloc.
    for option in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
        ctypes.CDLL(None).mallopt(option, 1 << 30)
    os.environ["TRITON_CACHE_DIR"] = str(folder / "cache")
    library = fake_driver.install(folder)
    from lunet_fast.ops import dispatch

    # For CPU tensors the library asks whether kernels are interpreted.
    dispatch._interpreting = lambda: True
    dispatch.set_backend("triton")
    return library


def main() -> None:
    options = parser(__doc__).parse_args()
    results = open_results(options, threads=1)
    rows = measured(prepare(ROOT / "build" / "host-time"))
    import triton

    values = {"triton": triton.__version__, "rows": rows}
    lines = ["# What a call without gradients costs the host", ""]
    lines += [
        where({"machine": results.machine, "command": results.command}) + f"; Triton {triton.__version__}.",
        "",
    ]
    lines += [f"Under a driver that does nothing, {ROWS} rows; what is counted says the script.", ""]
    lines += ["| call | launches | µs |", "|---|---|---|"]
    lines += [f"| {row['what']} | {row['launches']} | {row['µs']} |" for row in rows]
    results.write("host-time", values, "\n".join([*lines, ""]))


if __name__ == "__main__":
    main()

"""The suites of ``lunet-fast bench`` under pytest-benchmark, for its statistics, storage and comparison.

    pytest benchmarks/test_suites.py -k "layers and 256"
    pytest benchmarks/test_suites.py --device cuda --dtype bfloat16 --benchmark-autosave
    pytest benchmarks/test_suites.py --benchmark-compare

What is timed here is ours; that the others compute the same is checked before. Beside the others it is
``lunet-fast bench`` that times, which lets all take turns: a ratio of two times far apart would be less
steady.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lunet_fast.bench import results
from lunet_fast.bench.contest import Spec
from lunet_fast.bench.machine import synchronize


def test_ours(spec: Spec, benchmark: Any, pytestconfig: pytest.Config) -> None:
    device = torch.device(pytestconfig.getoption("--device"))
    dtype = getattr(torch, pytestconfig.getoption("--dtype"))
    suite = results.SUITES[spec.suite]
    (contest,) = suite.contests([spec], pytestconfig.getoption("--scale"), device, dtype)
    contest.check()
    run = contest.runs[contest.ours]

    def turn() -> None:
        run()
        synchronize(device)

    benchmark.group = f"{spec.suite}: {spec.what}"
    benchmark.extra_info |= {"error": contest.errors[contest.ours], "parameters": dict(contest.parameters)}
    benchmark(turn)

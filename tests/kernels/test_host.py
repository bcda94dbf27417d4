"""What reaches the driver of a CUDA device, seen by a driver that does nothing else, in a process of its own.

A launch whose kernel was found before must be the launch that Triton would have made of the same arguments.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]

PROGRAM = """
import ctypes, json, sys
from pathlib import Path
import torch
from benchmarks.gpu import fake_driver, host_time

library = host_time.prepare(Path(sys.argv[1]))
from lunet_fast import LeakySoftplus, LUDense, LUNet, cached
from lunet_fast.kernels import launch

seen = []

def watch(function, grid, parameters):
    # Of all these kernels: pointers first.
    seen.append([function, [grid[k] for k in range(3)], parameters[0]])

watching = fake_driver.Watch(watch)
ctypes.c_void_p.in_dll(library, "watch").value = ctypes.cast(watching, ctypes.c_void_p).value
asked = []
real = launch.launch

def asking(kernel, *args, **named):
    asked.append(kernel.fn.__name__)
    return real(kernel, *args, **named)

launch.launch = asking
torch.manual_seed(0)
net, found = LUNet(16, 3), []

def call(x, method="forward", of=net):
    seen.clear(), asked.clear()
    getattr(of, method)(x)
    found.append({"seen": [[f, g] for f, g, _ in seen], "asked": list(asked)})

memory = torch.randn(100 * 16 + 1)
x, off = memory[:-1].view(100, 16), memory[1:].view(100, 16)
with torch.no_grad():
    for rows in (x, x, x[:1], off, off, x):
        call(rows)
    for _ in range(2):
        call(x, method="inverse_and_logabsdet")
    with cached(net):
        for _ in range(2):
            call(x)
layer = LUDense(16, activation=LeakySoftplus(0.1))
with torch.no_grad():
    for rows, method in ((x, "forward"), (x[:4], "forward"), (x, "inverse")):
        for _ in range(2):
            call(rows, method, layer)
    with cached(layer):
        for rows, method in ((x, "forward"), (x[:4], "forward_and_logabsdet"), (x, "inverse")):
            for _ in range(2):
                call(rows, method, layer)
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def calls(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path_factory.mktemp("driver"))],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def test_a_second_call_asks_nobody_and_launches_the_same(calls: list[dict[str, Any]]) -> None:
    first, again, one_row = calls[:3]
    assert first["asked"] == ["compose_kernel", "stack_fwd_kernel"]
    assert again == {"seen": first["seen"], "asked": []}
    assert len(first["seen"]) == 2
    # Other rows, the same kernels.
    assert one_row["asked"] == []
    assert [f for f, _ in one_row["seen"]] == [f for f, _ in first["seen"]]
    assert one_row["seen"][1][1] == [1, 1, 1]


def test_rows_at_an_odd_address_are_another_kernels(calls: list[dict[str, Any]]) -> None:
    first, off, off_again, aligned = calls[0], calls[3], calls[4], calls[5]
    assert off["asked"] == ["stack_fwd_kernel"]
    assert off["seen"][1][0] != first["seen"][1][0]
    assert off_again == off
    assert aligned == {"seen": first["seen"], "asked": []}


def test_the_inverse_and_what_is_cached(calls: list[dict[str, Any]]) -> None:
    inverse, inverse_again, kept, kept_again = calls[6:10]
    assert inverse["asked"] == ["invert_blocks_kernel", "stack_inv_kernel"]
    assert inverse_again == {"seen": inverse["seen"], "asked": []}
    assert len(kept["seen"]) == 2
    assert kept_again == {"seen": kept["seen"][1:], "asked": []}


def test_a_layer_alone(calls: list[dict[str, Any]]) -> None:
    """Two launches, one for few rows; within ``cached`` one, whatever the number of rows."""
    of_layer = calls[10:]
    first, again = of_layer[0::2], of_layer[1::2]
    assert [call["asked"] for call in first] == [
        ["compose_kernel", "layer_fwd_kernel"],
        ["triangular_fused_kernel"],
        ["invert_blocks_kernel", "layer_inv_kernel"],
        ["compose_kernel", "layer_fwd_kernel"],
        ["layer_fwd_kernel"],  # with log-determinants
        ["invert_blocks_kernel", "layer_inv_kernel"],
    ]
    assert all(call["asked"] == [] for call in again)
    # What is launched is what Triton launched; within ``cached`` the first of two is not.
    for before, after in zip(first, again, strict=True):
        assert after["seen"] == before["seen"][-len(after["seen"]) :]
    assert [len(call["seen"]) for call in again] == [2, 1, 2, 1, 1, 1]

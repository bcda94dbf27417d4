"""Every kernel compiled for GPUs that need not be there: one configuration to machine code, with nothing
spilled in a loop, shared memory in bounds, tensor cores used where they are promised; and every combination
of optional arguments through the front end, which is where one that is not there can go wrong.

``benchmarks/gpu/kernel_resources.py`` and ``front_end.py`` do the compiling, in processes of their own:
Triton keeps its settings for the life of one. ``make kernels-report`` compiles every configuration.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
ARCHITECTURES = (80, 90)


@pytest.fixture(scope="module")
def compilations(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    triton = pytest.importorskip("triton")
    if not (Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm").exists():
        pytest.skip("this Triton comes without NVIDIA's disassembler")
    # A cache of its own, so that what is judged was compiled now.
    command = [
        *("-m", "benchmarks.gpu.kernel_resources", "--quick", "--json", "--workers", "2"),
        *("--arch", *map(str, ARCHITECTURES), "--cache", str(tmp_path_factory.mktemp("resources"))),
    ]
    return lines_of(command)


@pytest.fixture(scope="module")
def front_end() -> list[dict[str, Any]]:
    """A row for each combination of arguments that launchers make: which are missing, and what was wrong."""
    pytest.importorskip("triton")
    return lines_of(["-m", "tests.kernels.front_end"])


def lines_of(command: list[str]) -> list[dict[str, Any]]:
    # This tree's kernels, wherever the installed package is.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *command],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def written() -> set[str]:
    """The kernels there are."""
    return {
        name
        for file in (ROOT / "kernels").glob("*.py")
        for name in re.findall(r"^def (\w+_kernel)\(", file.read_text(encoding="utf-8"), re.MULTILINE)
    }


def test_every_combination_of_optional_arguments_is_accepted(front_end: list[dict[str, Any]]) -> None:
    """Gradients of an inverse without its log-determinant did not compile, and only a GPU would have told."""
    assert [row for row in front_end if row["refused"]] == []


def test_every_optional_argument_is_tried_both_ways(front_end: list[dict[str, Any]]) -> None:
    """Those whose comment in the kernel says "or None"; a kernel that no call launches is missing here."""
    assert {row["kernel"] for row in front_end} == written(), "front_end.py has no call that launches it"
    for kernel in written():
        rows = [row for row in front_end if row["kernel"] == kernel]
        for argument in rows[0]["optional"]:
            assert {argument in row["missing"] for row in rows} == {False, True}, (kernel, argument)


def test_every_kernel_is_compiled(compilations: list[dict[str, Any]]) -> None:
    for architecture in ARCHITECTURES:
        names = {found["kernel"] for found in compilations if found["arch"] == architecture}
        assert names == written(), "benchmarks/gpu/kernel_resources.py has no call that launches it"


def test_nothing_is_wrong(compilations: list[dict[str, Any]]) -> None:
    """No spills in loops, shared memory in bounds, promised tensor cores used, compiled in time."""
    assert [found for found in compilations if found["findings"]] == []


def test_the_layer_uses_tensor_cores(compilations: list[dict[str, Any]]) -> None:
    """Both tf32 and tf32x3, and on sm_90 the products of whole warpgroups, which only large tiles get."""
    for precision in ("float32 tf32", "float32 tf32x3"):
        layer = {
            found["arch"]: found
            for found in compilations
            if (found["kernel"], found["D"], found["dtype"]) == ("layer_fwd_kernel", 256, precision)
        }
        assert layer[80]["tensor-core instructions"] > 0
        assert layer[90]["warpgroup products"] > 0


def test_what_is_wrong_is_seen() -> None:
    """The judge itself: each of the four findings, one at a time."""
    program = """
from benchmarks.gpu.kernel_resources import Launch, Row
launch = Launch("m", "k", (), (("PRECISION", "tf32"),), (), ())
fine = {"local accesses in loops": 0, "shared": 101_376, "tensor-core instructions": 1, "seconds": 1.0}
changes = [{}, *({what: value + 1} for what, value in fine.items() if what != "seconds"), {"seconds": 31.0}]
changes[3] = {"tensor-core instructions": 0}
print([len(Row("k", 1, None, 80, {}, launch, fine | change).findings()) for change in changes])
"""
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[0, 1, 1, 1, 1]"

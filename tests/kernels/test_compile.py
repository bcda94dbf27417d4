"""Every kernel compiled ahead of time for GPUs that are not there: nothing spilled, shared memory in bounds,
tensor cores used where they are promised.

What is compiled is what the launchers launch: they are called with small tensors and a recorder in the
kernel's place. This file, run as a script, compiles and prints the resources as JSON, in a process of its own
because Triton keeps its settings for the life of one; ``python tests/kernels/test_compile.py all`` does it
for every row of the table of tiles.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]

ARCHITECTURES = (80, 90)

#: Bytes of shared memory that one program may have: sm_80's rows are also meant for sm_86 and sm_89.
SHARED_LIMIT = {80: 101_376, 90: 232_448}

#: The tensor-core instruction of each architecture.
TENSOR_CORE = {80: "HMMA", 90: "HGMMA"}


# --- in the compiling process ---------------------------------------------------------------------------


class Recorder:
    """Stands in for a kernel and keeps the arguments that it would have been launched with."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.arguments: dict[str, Any] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, **kwargs: Any) -> None:
            self.arguments = dict(zip(self.kernel.arg_names, args, strict=False)) | kwargs

        return launch


def recorded(module: Any, name: str, call: Callable[[], object]) -> tuple[Any, dict[str, Any]]:
    """(kernel, what ``call`` launches it with)."""
    recorder = Recorder(getattr(module, name))
    setattr(module, name, recorder)
    try:
        call()
    finally:
        setattr(module, name, recorder.kernel)
    return recorder.kernel, recorder.arguments


def compiled(kernel: Any, arguments: dict[str, Any], architecture: int) -> tuple[Any, float]:
    """The compiled kernel, specialised as Triton's launcher would, and the seconds that it took."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = {torch.float32: "*fp32", torch.bfloat16: "*bf16"}
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for i, parameter in enumerate(kernel.params):
        value = arguments.pop(parameter.name)
        if parameter.is_constexpr or value is None:
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = types[value.dtype]
            attributes[(i,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = "i32"
            if parameter.name == "D" and value % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    start = time.perf_counter()
    # What is left of the arguments are the options: warps, stages, fusion.
    binary = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=arguments)
    return binary, time.perf_counter() - start


def resources(binary: Any, seconds: float, folder: Path) -> dict[str, Any]:
    """Registers, shared memory and instructions of a compiled kernel, read from its machine code."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(binary.asm["cubin"])

    def tool(*command: str) -> str:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    usage = tool(str(tools / "cuobjdump"), "-res-usage", str(cubin))
    code = tool(str(tools / "nvdisasm"), "-c", str(cubin))
    names = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)", code)
    registers = re.search(r"REG:(\d+)", usage)
    assert registers is not None, usage
    return {
        "registers": int(registers[1]),
        "shared": binary.metadata.shared,
        "local loads": names.count("LDL"),
        "local stores": names.count("STL"),
        "HMMA": names.count("HMMA"),
        "HGMMA": names.count("HGMMA"),
        "instructions": len(names) - names.count("NOP"),
        "seconds": round(seconds, 2),
    }


def configurations(
    architecture: int, everything: bool
) -> Iterator[tuple[dict[str, Any], Any, dict[str, Any]]]:
    """(what it is, kernel, arguments) of one configuration of each kernel, or of all of them."""
    from lunet_fast.kernels import activation, layer, tiles

    tiles.architecture = lambda x: architecture
    family = (0.1, 0.9, 1.0)
    sizes = (3, 64, 257, 1024) if everything else (64,)
    dtypes = (torch.float32, torch.bfloat16) if everything else (torch.float32,)
    choices = (False, True) if everything else (False,)
    for D, dtype, fast, learnt in itertools.product(sizes, dtypes, choices, choices):
        what = {"D": D, "dtype": str(dtype)[6:], "precision": "", "fast": fast, "learnt": learnt}
        slopes = torch.ones(3, D) if learnt else family
        for name, launcher in (
            ("activation_fwd_kernel", activation.activation_forward),
            ("activation_inv_kernel", activation.activation_inverse),
        ):
            call = partial(launcher, torch.zeros(2, D, dtype=dtype), slopes, logabsdet=True, fast=fast)
            yield {"kernel": name, **what}, *recorded(activation, name, call)

    chosen = [(D, kind) for kind in (*layer.PRECISIONS, "bf16") for D in (3, 16, 31, 32, 63, 64, 256, 257)]
    if not everything:
        # Where D is no multiple of 16 Triton moves single elements: the most addresses and registers.
        chosen = [(256, "tf32x3"), (256, "tf32"), (257, "tf32x3")]
    for (D, precision), fast, learnt in itertools.product(chosen, choices, choices):
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        layer_call = partial(
            layer.layer_forward,
            torch.zeros(2, D, dtype=dtype),
            torch.zeros(D, D, dtype=dtype),
            torch.zeros(D),
            torch.ones(3, D) if learnt else family,
            logabsdet=True,
            save=True,
            precision="tf32" if precision == "bf16" else precision,
            constant=torch.zeros(()),
            fast=fast,
        )
        what = {"kernel": "layer_fwd_kernel", "D": D, "dtype": str(dtype)[6:], "precision": precision}
        yield {**what, "fast": fast, "learnt": learnt}, *recorded(layer, "layer_fwd_kernel", layer_call)


def compile_for(architecture: int, folder: Path, everything: bool) -> Iterator[dict[str, Any]]:
    for what, kernel, arguments in configurations(architecture, everything):
        yield {"arch": architecture, **what, **resources(*compiled(kernel, arguments, architecture), folder)}


# --- in pytest's process --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compilations(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    triton = pytest.importorskip("triton")
    if not (Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm").exists():
        pytest.skip("this Triton comes without NVIDIA's disassembler")
    # A cache of its own, so that what is judged was compiled now.
    cache = str(tmp_path_factory.mktemp("triton"))
    environment = {**os.environ, "TRITON_CACHE_DIR": cache, "PYTHONPATH": str(ROOT)}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", __file__],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_every_kernel_is_compiled(compilations: list[dict[str, Any]]) -> None:
    names = {found["kernel"] for found in compilations}
    written = {
        name
        for file in (ROOT / "kernels").glob("*.py")
        for name in re.findall(r"^def (\w+_kernel)\(", file.read_text(encoding="utf-8"), re.MULTILINE)
    }
    assert names == written
    assert {found["arch"] for found in compilations} == set(ARCHITECTURES)


def test_nothing_is_spilled(compilations: list[dict[str, Any]]) -> None:
    assert [found for found in compilations if found["local loads"] or found["local stores"]] == []


def test_shared_memory_fits(compilations: list[dict[str, Any]]) -> None:
    assert [found for found in compilations if found["shared"] > SHARED_LIMIT[found["arch"]]] == []


def test_tensor_cores_are_used(compilations: list[dict[str, Any]]) -> None:
    tf32 = [found for found in compilations if found["precision"].startswith("tf32")]
    assert {found["precision"] for found in tf32} == {"tf32", "tf32x3"}
    assert all(found[TENSOR_CORE[found["arch"]]] > 0 for found in tf32)


def test_compilation_is_quick(compilations: list[dict[str, Any]]) -> None:
    assert max(found["seconds"] for found in compilations) < 30.0


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        for arch in ARCHITECTURES:
            for row in compile_for(arch, Path(scratch), everything=sys.argv[1:] == ["all"]):
                print(json.dumps(row), flush=True)

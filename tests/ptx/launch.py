"""Launches of kernels as compiled for a GPU, executed here: the project's launchers, on CPU tensors.

with executed(80) as runs:
    layer_forward(x, weight, bias, slopes, …)
assert not runs[0].findings
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor

from benchmarks.gpu.kernel_resources import Launch, compiled, kernel_modules, specialised, standing_in
from tests.ptx.arithmetic import u1, u4, u8
from tests.ptx.executor import Code, Machine
from tests.ptx.memory import Findings, GlobalMemory, Region
from tests.ptx.program import bits_of
from tests.ptx.translate import translate

#: Threads that run in step: as many programs as have these. Larger arrays fall out of the cache.
TOGETHER = 8192

#: Bytes from one memory to the next, as programs see them: what leaves one does not come to lie in another,
#: as where an allocator puts them side by side.
APART = 2**40


@dataclass(frozen=True)
class How:
    """How launches are executed."""

    architecture: int
    checked: bool = True
    """Whether memory has shadows; bounds and barriers are always watched."""
    exact_sums: bool = False
    """Sums on tensor cores rounded once, in place of the hardware's cuts: several times as fast."""
    programs: Callable[[int], Sequence[int]] = range
    """Which programs of a grid of so many run."""
    change: Callable[[str], str] = field(default=lambda text: text)
    """Of the PTX, before it is executed."""


@dataclass(frozen=True)
class Run:
    """What a launch was, and what was wrong with it."""

    launch: Launch
    grid: tuple[int, ...]
    findings: Findings


class StandIn:
    """Executes in a kernel's place."""

    def __init__(self, kernel: Any, how: How, runs: list[Run]) -> None:
        self.kernel, self.how, self.runs = kernel, how, runs
        self.arg_names = kernel.arg_names

    def __getitem__(self, grid: Any) -> Callable[..., Compiled]:
        def start(*args: Any, **kwargs: Any) -> Compiled:
            given = dict(zip(self.kernel.arg_names, args, strict=False)) | kwargs
            launch = specialised(self.kernel, dict(given))
            values = [value for name, kind in launch.signature for value in _leaves(given.get(name), kind)]
            findings = execute(code_of(launch, self.how), values, (*grid, 1, 1)[:3], self.how)
            self.runs.append(Run(launch, tuple(grid), findings))
            return Compiled(self, {name: kwargs[name] for name in kwargs if name not in self.arg_names})

        return start


@dataclass(frozen=True)
class Compiled:
    """What Triton returns of a launch: compiled for these arguments, started by values alone."""

    kernel: StandIn
    options: dict[str, Any]

    def __getitem__(self, grid: Any) -> Callable[..., Compiled]:
        return partial(self.kernel[grid], **self.options)


def _leaves(value: Any, kind: Any) -> Iterator[tuple[Any, str]]:
    """(value, type) of what is left of an argument at run time, tuples taken apart."""
    if isinstance(kind, tuple):
        for part, part_kind in zip(value, kind, strict=True):
            yield from _leaves(part, part_kind)
    elif kind != "constexpr":
        yield value, kind


@contextmanager
def executed(architecture: int, **how: Any) -> Iterator[list[Run]]:
    """Let launchers execute what Triton compiles for this architecture; ``how`` are fields of ``How``."""
    runs: list[Run] = []
    chosen = How(architecture, **how)
    with standing_in(architecture, lambda kernel: StandIn(kernel, chosen, runs)):
        yield runs


#: What has been translated, by launch, architecture, kind of sums and change.
_codes: dict[tuple[Any, ...], Code] = {}


def code_of(launch: Launch, how: How) -> Code:
    key = (launch, how.architecture, how.exact_sums, how.change)
    if key not in _codes:
        binary = compiled(launch, how.architecture)
        text, shared = how.change(binary.asm["ptx"]), int(binary.metadata.shared)
        _codes[key] = translate(text, shared, how.architecture, exact_sums=how.exact_sums)
    return _codes[key]


def execute(code: Code, values: Sequence[tuple[Any, str]], grid: tuple[int, int, int], how: How) -> Findings:
    """Run a grid of programs on ``values``, each with its Triton type."""
    findings, address = Findings(), _addresses(values)
    regions = [
        Region(f"{number} {kind}", address(value), value.numel() * value.element_size(), value.data_ptr())
        for number, (value, kind) in enumerate(values)
        if isinstance(value, Tensor)
    ]
    granule = code.global_granule if how.checked else 0
    memory = GlobalMemory(regions, granule, code.threads, findings)
    parameters = parameter_bytes(code, [_bits(value, kind, address) for value, kind in values])
    programs = np.asarray(how.programs(int(np.prod(grid))))
    together = max(1, TOGETHER // code.threads)
    with np.errstate(all="ignore"):
        for start in range(0, len(programs), together):
            some = programs[start : start + together]
            Machine(code, memory, parameters, grid, some, findings, checked=how.checked).run()
    return findings


def _addresses(values: Sequence[tuple[Any, str]]) -> Callable[[Tensor], int]:
    """Where a tensor of ``values`` lies for a program: aligned as it is, and in one memory with its views."""
    tensors = [value for value, _ in values if isinstance(value, Tensor)]
    memories = sorted({tensor.untyped_storage().data_ptr() for tensor in tensors})

    def address(tensor: Tensor) -> int:
        start = tensor.untyped_storage().data_ptr()
        return (1 + memories.index(start)) * APART + start % 4096 + tensor.data_ptr() - start

    return address


def _bits(value: Any, kind: str, address: Callable[[Tensor], int]) -> Any:
    if isinstance(value, Tensor):
        return u8(address(value))
    if kind == "fp32":
        return np.float32(value).view(u4)
    return np.int64(value).view(u8) if kind == "i64" else u4(int(value) & 0xFFFFFFFF)


def parameter_bytes(code: Code, values: Sequence[Any]) -> Any:
    """The parameters as they lie in a program's memory; Triton's own scratch, which comes last, is absent."""
    sizes = [bits_of(kind) // 8 for kind, _ in code.parameters.values()]
    offsets = [offset for _, offset in code.parameters.values()]
    raw = np.zeros(8 * (len(sizes) + 1), u1)
    given = [*values, *[u8(0)] * (len(sizes) - len(values))]
    for value, size, offset in zip(given, sizes, offsets, strict=True):
        raw[offset : offset + size] = np.frombuffer(value.tobytes()[:size], u1)
    return raw


def kernels() -> set[str]:
    """The names of all kernels."""
    return {name for module in kernel_modules() for name in vars(module) if name.endswith("_kernel")}

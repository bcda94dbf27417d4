"""Registers, shared memory and instructions of every kernel, compiled for GPUs that need not be there.

    python -m benchmarks.gpu.kernel_resources           all configurations: results/kernel-resources.md
    python -m benchmarks.gpu.kernel_resources --quick   one configuration of each kernel; nothing is written

What is compiled is what the launchers launch: they are called on tensors without data, with a recorder in
every kernel's place. ``kernel_calls.py`` says which calls those are; a new kernel is a few lines there.
D runs over ``SIZES`` and over the first of any other D for which Triton would compile something else, because
the table of tiles or divisibility by 16 makes a difference.

Results are kept in build/kernel-resources by what was compiled, so that a run that was broken off goes on
where it was and a changed kernel alone is compiled again.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import inspect
import itertools
import json
import multiprocessing
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.kernel_calls import CALLS, Call, Setting
from benchmarks.gpu.machine_code import in_loops
from benchmarks.machine import RESULTS, describe, write_text

ROOT = Path(__file__).parents[2]
ARCHITECTURES = (80, 90, 100)

#: Bytes of shared memory that one program may have: sm_80's rows are also meant for sm_86 and sm_89.
SHARED_LIMIT = {80: 101_376, 90: 232_448, 100: 232_448}

#: The tensor-core instructions of each architecture; a tile too small for sm_90's own takes sm_80's.
TENSOR_CORE = {80: ("HMMA",), 90: ("HGMMA", "HMMA"), 100: ("UTCHMMA", "HMMA")}

#: Registers that are spilled where it costs: beside a loop over rows, a few loads and stores are nothing.
SPILLS = "local accesses in loops"

#: Seconds that one compilation may take.
SLOW = 30.0

#: Always in the report: one, a power of two, and neither multiples of 16 nor powers of two.
SIZES = (1, 3, 16, 31, 32, 64, 100, 128, 256, 257, 512, 1000, 1024, 2048)


# --- what is launched -----------------------------------------------------------------------------------


#: Where an argument of a kernel is: its number, and that within a tuple.
Position = tuple[int, ...]


@dataclass(frozen=True)
class Launch:
    """One kernel as Triton would compile it for one launch, without its tensors."""

    module: str
    kernel: str
    signature: tuple[tuple[str, Any], ...]
    """Types by name; of a tuple, a tuple of types."""
    constants: tuple[tuple[str | Position, Any], ...]
    """By name; within a tuple, by position."""
    attributes: tuple[Position, ...]
    """Arguments that are multiples of 16."""
    options: tuple[tuple[str, Any], ...]

    @property
    def promises_tensor_cores(self) -> bool:
        return self.precision.startswith("tf32")

    @property
    def precision(self) -> str:
        """The arithmetic of its float32 products, "" if it has none."""
        return str(dict(self.constants).get("PRECISION", ""))


class Recorder:
    """Stands in for a kernel and keeps what it would have been launched with."""

    def __init__(self, kernel: Any, launches: list[Launch]) -> None:
        self.kernel = kernel
        self.launches = launches

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def launch(*args: Any, **kwargs: Any) -> None:
            self.launches.append(specialised(self.kernel, dict(zip(self.kernel.arg_names, args)) | kwargs))  # noqa: B905

        return launch


_TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.int64: "*i64", torch.int32: "*i32"}


def specialised(kernel: Any, arguments: dict[str, Any]) -> Launch:
    """As Triton's own launch specialises: 1 is a constant, multiples of 16 are known to be such."""
    import triton

    signature: list[tuple[str, Any]] = []
    constants: list[tuple[str | Position, Any]] = []
    attributes: list[Position] = []

    def type_of(value: Any, position: Position, exempt: bool, constant: bool) -> Any:
        if isinstance(value, tuple):
            parts = (type_of(part, (*position, k), exempt, False) for k, part in enumerate(value))
            return type(value)(*parts)
        if isinstance(value, triton.language.constexpr):
            value, constant = value.value, True
        if constant or value is None or (type(value) is int and value == 1 and not exempt):
            constants.append((kernel.params[position[0]].name if len(position) == 1 else position, value))
            return "constexpr"
        if isinstance(value, float):
            return "fp32"
        if isinstance(value, Tensor):
            found, start = _TYPES[value.dtype], value.storage_offset() * value.element_size()
        else:
            found, start = ("i32" if -(2**31) <= value < 2**31 else "i64"), value
        if start % 16 == 0 and not exempt:
            attributes.append(position)
        return found

    for i, parameter in enumerate(kernel.params):
        name = parameter.name
        value = arguments.pop(name) if name in arguments else parameter.default
        signature.append((name, type_of(value, (i,), parameter.do_not_specialize, parameter.is_constexpr)))
    # What is left of the arguments are the options: warps, stages, fusion.
    return Launch(
        kernel.fn.__module__,
        kernel.fn.__name__,
        tuple(signature),
        tuple(constants),
        tuple(attributes),
        tuple(sorted(arguments.items())),
    )


def kernel_modules() -> list[Any]:
    """The modules of lunet_fast.kernels."""
    package = importlib.import_module("lunet_fast.kernels")
    return [
        importlib.import_module(f"{package.__name__}.{m.name}")
        for m in pkgutil.iter_modules(package.__path__)
    ]


@contextmanager
def recording(architecture: int) -> Iterator[list[Launch]]:
    """Let launchers use this architecture's tiles, and keep their launches instead of launching."""
    launches: list[Launch] = []
    with standing_in(architecture, lambda kernel: Recorder(kernel, launches)):
        yield launches


@contextmanager
def standing_in(architecture: int, stand_in: Callable[[Any], Any]) -> Iterator[None]:
    """Let launchers use this architecture's tiles, and start ``stand_in(kernel)`` in place of each kernel."""
    modules = kernel_modules()
    tiles = importlib.import_module("lunet_fast.kernels.tiles")
    saved: list[tuple[Any, str, Any]] = [(tiles, "architecture", tiles.architecture)]
    tiles.architecture = lambda x: architecture  # type: ignore[attr-defined]
    for module in modules:
        for name, value in list(vars(module).items()):
            if name.endswith("_kernel"):
                saved.append((module, name, value))
                setattr(module, name, stand_in(value))
    try:
        yield
    finally:
        for module, name, value in saved:
            setattr(module, name, value)


def launches_of(call: Call, setting: Setting, architecture: int) -> list[Launch]:
    with recording(architecture) as launches:
        call.function(setting)
    return launches


def all_settings(call: Call, architecture: int) -> list[Setting]:
    """SIZES, and the first of every other D whose launches would be compiled anew."""

    def what(D: int, arithmetic: str) -> tuple[Launch, ...]:
        return tuple(launches_of(call, Setting(D, arithmetic, call.variants[0]), architecture))

    sizes: set[int] = {D for D in SIZES if call.largest >= D}
    for arithmetic in call.arithmetics:
        known = {what(D, arithmetic) for D in sorted(sizes)}
        for D in range(1, call.largest + 1):
            found = what(D, arithmetic)
            if found not in known:
                known.add(found)
                sizes.add(D)
    return list(call.settings(sorted(sizes), call.variants))


# --- what comes of it -----------------------------------------------------------------------------------


def source_of(launch: Launch) -> Any:
    """What Triton's compiler is given for a launch."""
    from triton.compiler import ASTSource
    from triton.runtime.jit import JITFunction

    kernel = getattr(importlib.import_module(launch.module), launch.kernel)
    if not isinstance(kernel, JITFunction):  # something stands in for it
        kernel = kernel.kernel
    attributes = {position: [["tt.divisibility", 16]] for position in launch.attributes}
    return ASTSource(kernel, dict(launch.signature), dict(launch.constants), attributes)


def compiled(launch: Launch, architecture: int) -> Any:
    """A launch's kernel as Triton compiles it, or kept it in its cache."""
    import triton
    from triton.backends.compiler import GPUTarget

    target = GPUTarget("cuda", architecture, 32)
    return triton.compile(source_of(launch), target=target, options=dict(launch.options))


def compile_launch(launch: Launch, architecture: int) -> dict[str, Any]:
    """Resources of one kernel: registers, shared memory, instructions, seconds to compile."""
    start = time.perf_counter()
    binary = compiled(launch, architecture)
    seconds = time.perf_counter() - start
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(binary.asm["cubin"])
        usage = tool("cuobjdump", "-res-usage", str(cubin))
        code = tool("nvdisasm", "-c", str(cubin))
    names = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)", code)
    registers = re.search(r"REG:(\d+)", usage)
    if registers is None or len(names) < 10:
        raise RuntimeError(f"no machine code could be read for {launch.kernel} on sm_{architecture}: {usage}")
    return {
        "registers": int(registers[1]),
        "shared": int(binary.metadata.shared),
        "local loads": names.count("LDL"),
        "local stores": names.count("STL"),
        SPILLS: in_loops(code, ("LDL", "STL")),
        "tensor-core instructions": sum(names.count(name) for name in TENSOR_CORE[architecture]),
        "warpgroup products": names.count("HGMMA"),
        "instructions": len(names) - names.count("NOP"),
        "seconds": round(seconds, 2),
    }


def tool(name: str, *arguments: str) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([str(tool), *arguments], capture_output=True, text=True, check=True).stdout


def key_of(launch: Launch, architecture: int) -> str:
    """Of what is compiled: another kernel, callee or Triton, or another way to read it, has another."""
    import triton

    kernel = getattr(importlib.import_module(launch.module), launch.kernel)
    reading = (inspect.getsource(compile_launch), TENSOR_CORE)
    what = (kernel.cache_key, launch, architecture, triton.__version__, reading)
    return hashlib.sha256(repr(what).encode()).hexdigest()[:32]


def _in_worker(launch: Launch, architecture: int, file: Path) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as cache:
        # A cache of its own, so that the seconds are those of a compilation.
        os.environ["TRITON_CACHE_DIR"] = cache
        try:
            found = compile_launch(launch, architecture)
        except Exception as error:
            cause: BaseException = error
            while cause.__cause__ is not None:
                cause = cause.__cause__
            return {"error": f"{type(cause).__name__}: {cause}".replace("\n", " ")}
    write_text(file, json.dumps(found))
    return found


def compile_all(
    wanted: list[tuple[Launch, int]], folder: Path, workers: int
) -> dict[tuple[Launch, int], dict[str, Any]]:
    """Resources of each launch on its architecture, from ``folder`` where known; progress on stderr."""
    folder.mkdir(parents=True, exist_ok=True)
    done: dict[tuple[Launch, int], dict[str, Any]] = {}
    missing: list[tuple[Launch, int, Path]] = []
    for launch, architecture in dict.fromkeys(wanted):
        file = folder / f"{key_of(launch, architecture)}.json"
        if file.exists():
            done[launch, architecture] = json.loads(file.read_text())
        else:
            missing.append((launch, architecture, file))
    if not missing:
        return done
    start, total = time.perf_counter(), len(missing)
    told = start
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        futures = {pool.submit(_in_worker, *each): each for each in missing}
        try:
            for count, future in enumerate(as_completed(futures), 1):
                launch, architecture, _ = futures[future]
                done[launch, architecture] = future.result()
                now = time.perf_counter()
                if now - told > 20 or count == total:
                    told, spent = now, now - start
                    left = spent / count * (total - count)
                    what = f"{launch.kernel} sm_{architecture}"
                    print(
                        f"{count}/{total} compiled in {spent:.0f} s, about {left:.0f} s left: {what}",
                        file=sys.stderr,
                    )
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return done


@dataclass(frozen=True)
class Row:
    kernel: str
    D: int
    rows: torch.dtype
    architecture: int
    options: dict[str, Any]
    launch: Launch
    found: dict[str, Any]

    @property
    def dtype(self) -> str:
        """Of the rows; of float32 with the arithmetic of the products."""
        return "bfloat16" if self.rows == torch.bfloat16 else f"float32 {self.launch.precision}".strip()

    def findings(self) -> list[str]:
        """What is wrong with it."""
        found, limit = self.found, SHARED_LIMIT[self.architecture]
        if "error" in found:
            return [f"does not compile: {found['error']}"]
        wrong = {
            f"{found[SPILLS]} {SPILLS}": found[SPILLS] > 0,
            f"{found['shared']} bytes of shared memory, limit {limit}": found["shared"] > limit,
            "no tensor-core instructions": self.launch.promises_tensor_cores
            and found["tensor-core instructions"] == 0,
            f"{found['seconds']} s to compile": found["seconds"] > SLOW,
        }
        return [what for what, is_so in wrong.items() if is_so]

    def as_json(self) -> dict[str, Any]:
        what = {"kernel": self.kernel, "D": self.D, "dtype": self.dtype, "arch": self.architecture}
        return {**what, "options": self.options, **self.found, "findings": self.findings()}


def collect(
    architectures: Sequence[int], *, everything: bool, kernels: str, folder: Path, workers: int
) -> list[Row]:
    """A row for each kernel that each call launches, in the order of CALLS."""
    found: list[tuple[Setting, int, Launch]] = []
    for architecture, call in itertools.product(architectures, CALLS):
        settings = all_settings(call, architecture) if everything else call.quick_settings()
        for setting in settings:
            for launch in launches_of(call, setting, architecture):
                if re.search(kernels, launch.kernel):
                    found.append((setting, architecture, launch))
    resources = compile_all([(launch, arch) for _, arch, launch in found], folder, workers)
    return [
        Row(launch.kernel, setting.D, setting.dtype, arch, setting.options, launch, resources[launch, arch])
        for setting, arch, launch in found
    ]


COLUMNS = ("registers", "shared", "local loads", "local stores", "tensor-core instructions")


def table(rows: list[Row]) -> str:
    """One line for each kernel, D, dtype and architecture: the worst of each column over the options."""
    folded: dict[tuple[str, int, str, int], list[Row]] = {}
    for row in rows:
        if "error" in row.found:
            continue
        folded.setdefault((row.kernel, row.D, row.dtype, row.architecture), []).append(row)
    lines = ["| kernel | D | dtype | arch | " + " | ".join(COLUMNS) + " |", "|---" * (4 + len(COLUMNS)) + "|"]
    for (kernel, D, dtype, architecture), group in sorted(folded.items()):
        worst = [max(row.found[column] for row in group) for column in COLUMNS[:-1]]
        worst.append(min(row.found[COLUMNS[-1]] for row in group))
        cells = [kernel, D, dtype, f"sm_{architecture}", *worst]
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    return "\n".join(lines)


def report(rows: list[Row], command: str) -> str:
    """The Markdown file: what it was made with, what is wrong, and the table."""
    import triton

    machine = describe()
    assemblers = ", ".join(
        f"{name} {match[1]}"
        for name in ("ptxas", "ptxas-blackwell")
        if (match := re.search(r"release [\d.]+, V([\d.]+)", tool(name, "--version")))
    )
    wrong = [row for row in rows if row.findings()]
    slowest = max(rows, key=lambda row: row.found.get("seconds", 0.0))
    compiled = len({(row.launch, row.architecture) for row in rows})
    limits = ", ".join(f"sm_{architecture} {limit}" for architecture, limit in SHARED_LIMIT.items())
    lines = [
        f"# Resources of the kernels, Triton {triton.__version__}",
        "",
        f"{machine['date']}, commit {machine['commit']}, `{command}`; {assemblers} (the last for sm_100).",
        "",
        f"{compiled} compilations, the slowest {slowest.found['seconds']:.0f} s ({slowest.kernel}, "
        f"D = {slowest.D}, {slowest.dtype}, sm_{slowest.architecture}). A line is the worst of each column "
        "over the options of a launch (slopes as floats or for each column, "
        "what is asked for besides y): the most registers, bytes of shared memory, local loads and stores, "
        "the fewest tensor-core instructions. Any D up to 2048 that is not listed compiles to one of these.",
        "",
        f"Compilations that fail, spill in a loop, exceed the shared memory (bytes: {limits}), lack promised "
        f"tensor-core instructions or take over {SLOW:.0f} s: {len(wrong)}.",
        "",
    ]
    lines += [_finding(row) for row in wrong] + [""] * bool(wrong)
    return "\n".join([*lines, table(rows), ""])


def _finding(row: Row) -> str:
    options = ", ".join(f"{name}={value}" for name, value in row.options.items())
    what = f"{row.kernel}, D = {row.D}, {row.dtype}, sm_{row.architecture}"
    return f"- {what}{', ' + options if options else ''}: {'; '.join(row.findings())}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one configuration of each kernel")
    parser.add_argument("--check", action="store_true", help="fail if anything is wrong with any of them")
    parser.add_argument("--json", action="store_true", help="print a line of JSON for each, and no table")
    parser.add_argument("--arch", type=int, nargs="+", default=ARCHITECTURES, help="default 80 90 100")
    parser.add_argument(
        "--kernels", default="", help="those whose name this pattern finds; nothing is written"
    )
    parser.add_argument("--triton", help="folder that holds another Triton, which then names the result")
    parser.add_argument("--cache", type=Path, default=ROOT / "build" / "kernel-resources")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    options = parser.parse_args()
    if options.triton:
        sys.path.insert(0, options.triton)
    import triton

    if options.triton and not Path(triton.__file__).is_relative_to(Path(options.triton).resolve()):
        raise SystemExit(f"{options.triton} holds no triton; the one in use is {triton.__file__}")
    rows = collect(
        options.arch,
        everything=not options.quick,
        kernels=options.kernels,
        folder=options.cache,
        workers=options.workers,
    )
    if options.json:
        print("\n".join(json.dumps(row.as_json()) for row in rows))
    elif options.quick or options.kernels:
        print(table(rows))
    else:
        name = f"kernel-resources-triton-{triton.__version__}" if options.triton else "kernel-resources"
        command = " ".join(["python -m benchmarks.gpu.kernel_resources", *sys.argv[1:]])
        print(f"written to {write_text(RESULTS / f'{name}.md', report(rows, command))}")
    wrong = [_finding(row) for row in rows if row.findings()]
    print("\n".join(wrong), file=sys.stderr)
    if options.check and wrong:
        raise SystemExit(1)


if __name__ == "__main__":
    main()

"""How near to an H100's roofline the compiled kernels can come at best; no GPU, and nothing is run.

    python benchmarks/gpu/kernel_roofline.py      into results/kernel-roofline.json and .md
    python benchmarks/gpu/kernel_roofline.py --print --sizes 64 --operations inverse

What the library launches for an operation on ``N`` rows is recorded (tensors without data), compiled for
sm_90 and disassembled. ``machine_code.py`` counts the instructions that are executed; how often a kernel's
loops go round says ``KERNELS`` here, by its arguments, and the products of tensor cores that this makes must
be at least those that the kernel's blocks need, or the script stops. Then, for each launch, five floors in
time:

- issue: a warp's instruction takes one of a multiprocessor's four slots a cycle;
- pipe: those that go to one pipe wait for it: 16 lanes for integers, comparisons and logic, 4 for special
  functions (throughput table of NVIDIA's CUDA programming guide, compute capability 9.0);
- tensor: multiplications of tensor cores at their rate;
- L2: what programs copy to shared memory past the L1 cache (``cp.async`` of 16 bytes), tiles that others have
  copied too among them;
- HBM: every tensor of the launch, moved once.

The longest of them is the least that a launch takes, whatever else it waits for (barriers, latency, few
warps): a prediction, and an optimistic one. The roofline of an operation is the longer of the least bytes
that it must move (rows in and out, a number for each row's log-determinant) and its products, of which
tf32x3 takes three each. Their ratio is the share of the roofline that can be reached. Launches that are made
once whatever N is (W, W⁻¹, the diagonal blocks) and what PyTorch computes are left out.
"""

from __future__ import annotations

import argparse
import itertools
import math
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.gpu.kernel_resources import Launch, compiled, specialised, standing_in, tool
from benchmarks.gpu.machine_code import Counts, Loop, executed
from benchmarks.machine import open_results, parser, where

ARCHITECTURE = 90

#: Rows of an operation, and layers of a stack.
N, LAYERS = 1 << 20, 8

SIZES = (32, 64, 128, 256, 512)
ARITHMETICS = ("tf32", "tf32x3", "bf16")

#: An H100 SXM: multiprocessors, cycles a second, bytes a second of memory and of the L2 cache, and
#: multiplications of tensor cores that large products reach, by the bytes of an operand.
MULTIPROCESSORS, CLOCK, BANDWIDTH, L2 = 132, 1.755e9, 3.35e12, 5.5e12
MULTIPLICATIONS = {4: 200e12, 2: 400e12}

#: What copies 16 bytes to shared memory past the L1 cache.
COPY = "LDGSTS.E.BYPASS.128"

#: Warps of a program that may compute the same product.
MOST_REPEATED = 8

#: Lanes of a quarter of a multiprocessor that do not have all 32: a warp takes 32/lanes cycles.
LANES = {"special": 4, "integer": 16}
PIPES = {
    "special": ("MUFU",),
    "integer": (
        *(
            "FMNMX",
            "FSEL",
            "FSETP",
            "FCHK",
            "IADD3",
            "IABS",
            "ISETP",
            "IMNMX",
            "LEA",
            "LOP3",
            "PLOP3",
            "POPC",
        ),
        *("PRMT", "SEL", "SHF", "SHL", "SHR", "SGXT", "VIADD", "VIMNMX", "BMSK", "F2F", "F2I", "I2F", "F2FP"),
        "I2FP",
    ),
}


# --- kernels --------------------------------------------------------------------------------------------


class Kernel(NamedTuple):
    """What a kernel's source says of its loops, and of the multiplications of its products for a program.

    Both are functions of its numbers by name, with ``programs``, the first axis of the grid.
    """

    loops: Callable[[dict[str, int]], list[Loop]]
    multiplications: Callable[[dict[str, int]], float]


def _up(n: int, block: int) -> int:
    return -(-n // block)


def _tiles(a: dict[str, int]) -> float:
    """Tiles of rows that a program takes, of those that walk."""
    blocks = 1 if "WIDTH" in a else _up(a["D"], a["COLUMNS"])
    return _up(a["N"], a["ROWS"]) * blocks / a["programs"]


def _product(a: dict[str, int]) -> list[Loop]:
    return [Loop(_up(a["D"], a["INNER"]))]


def _product_size(a: dict[str, int]) -> float:
    return a["ROWS"] * a["COLUMNS"] * _up(a["D"], a["INNER"]) * a["INNER"]


def _layer_backward_size(a: dict[str, int]) -> float:
    others = (2 if a["PRODUCTS"] else 0) * a["ROWS"] * a["COLUMNS"] * a["WIDTH"]
    return _tiles(a) * a["BLOCKS"] * (_product_size(a) + others)


def _splits(a: dict[str, int]) -> float:
    """Of the weights' gradient: INNER rows at a time that one program takes."""
    shares = _up(a["D"], a["ROWS"]) * _up(a["D"], a["COLUMNS"])
    return _up(a["N"], a["INNER"]) * shares / a["programs"]


def _substitution(a: dict[str, int]) -> list[Loop]:
    if a["BLOCKS"]:
        return []
    blocks = _up(a["D"], a["BLOCK"])
    before = (blocks - 1) / 2 * (a["BLOCK"] / a["INNER"])
    return [Loop(blocks, (Loop(before),)), Loop(blocks, (Loop(before),))]


def _substitution_size(a: dict[str, int]) -> float:
    blocks = _up(a["D"], a["BLOCK"])
    return 2 * a["ROWS"] * a["BLOCK"] ** 2 * blocks * (blocks + 1) / 2


def _visits(a: dict[str, int]) -> float:
    return a["tiles"] / a["programs"]


def _outer(a: dict[str, int]) -> tuple[Loop, ...]:
    rows = Loop(_up(a["ROWS"], a["INNER"]), fixed=True)
    return (Loop(_up(a["COLUMNS"], a["BLOCK"]) ** 2, (rows,), fixed=True),)


def _stack_backward_size(a: dict[str, int]) -> float:
    return _visits(a) * (a["active"] + 2 * a["M"]) * a["ROWS"] * a["COLUMNS"] ** 2


KERNELS = {
    "layer_fwd_kernel": Kernel(_product, _product_size),
    "inverse_product_kernel": Kernel(_product, _product_size),
    "activation_kernel": Kernel(lambda a: [Loop(_up(a["D"], a["COLUMNS"]))], lambda a: 0),
    "activation_bwd_kernel": Kernel(lambda a: [Loop(_tiles(a))], lambda a: 0),
    "layer_bwd_kernel": Kernel(
        lambda a: [Loop(_tiles(a), tuple(_product(a) * a["BLOCKS"]))], _layer_backward_size
    ),
    "preactivation_bwd_kernel": Kernel(
        lambda a: [Loop(_tiles(a), tuple(_product(a)))], lambda a: _tiles(a) * _product_size(a)
    ),
    "weight_gradient_kernel": Kernel(
        lambda a: [Loop(_splits(a))], lambda a: _splits(a) * a["ROWS"] * a["COLUMNS"] * a["INNER"]
    ),
    "layer_inv_kernel": Kernel(_substitution, _substitution_size),
    "layer_inv_bwd_kernel": Kernel(_substitution, _substitution_size),
    "stack_fwd_kernel": Kernel(lambda a: [Loop(a["M"])], lambda a: a["M"] * a["ROWS"] * a["COLUMNS"] ** 2),
    "stack_inv_kernel": Kernel(
        lambda a: [Loop(a["M"])],
        lambda a: a["M"] * a["ROWS"] * a["COLUMNS"] * (a["COLUMNS"] + a["CHUNK"]),
    ),
    "stack_bwd_kernel": Kernel(
        lambda a: [Loop(_visits(a), (Loop(a["active"]), Loop(a["M"], _outer(a))))], _stack_backward_size
    ),
}


# --- launches -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Started:
    """A launch with its grid and its arguments by name."""

    launch: Launch
    grid: tuple[int, ...]
    arguments: dict[str, Any]

    @property
    def returns(self) -> bool:
        """Whether it does nothing: substitution where the product with W⁻¹ is taken, as is assumed."""
        return self.launch.kernel == "layer_inv_kernel" and self.arguments["condition_ptr"] is not None

    def numbers(self) -> dict[str, int]:
        whole = {name: value for name, value in self.arguments.items() if type(value) is int}
        given = self.arguments.get("grad_x_ptr") is not None
        return {**whole, "programs": self.grid[0], "PRODUCTS": int(given)}

    def bytes(self) -> int:
        """Of its tensors, each moved once."""
        tensors = [value for value in self.arguments.values() if isinstance(value, Tensor)]
        return sum(t.numel() * t.element_size() for t in tensors)


class _Noted:
    """Stands in for a kernel and keeps what it was started with."""

    def __init__(self, kernel: Any, started: list[Started]) -> None:
        self.kernel = kernel
        self.started = started

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, **kwargs: Any) -> None:
            named = dict(zip(self.kernel.arg_names, args, strict=False)) | kwargs
            self.started.append(Started(specialised(self.kernel, dict(named)), grid, named))

        return launch


def launches_of(operation: Operation, D: int, arithmetic: str, architecture: int) -> list[Started]:
    """What the library launches for N rows, but for what does not depend on N."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest" if arithmetic == "tf32x3" else "high")
    started: list[Started] = []
    try:
        with standing_in(architecture, lambda kernel: _Noted(kernel, started)):
            operation.call(D, torch.bfloat16 if arithmetic == "bf16" else torch.float32)
    finally:
        torch.set_float32_matmul_precision(before)
    return [each for each in started if "N" in each.arguments and not each.returns]


def machine_code(launch: Launch, architecture: int) -> str:
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled(launch, architecture).asm["cubin"])
        return tool("nvdisasm", "-c", str(cubin))


def instructions(started: Started, architecture: int) -> tuple[Counts, float, float]:
    """What a warp of a program executes; how often it does each product, for where a product has fewer tiles
    than there are warps, several compute the same; and the copies past L1 that move something. Refused where
    products are done less than once."""
    kernel, numbers = KERNELS[started.launch.kernel], started.numbers()
    code, loops = machine_code(started.launch, architecture), kernel.loops(numbers)
    counts = executed(code, loops)
    # Copies run ahead of their loop: those before it are as many as do nothing at its end.
    before = executed(code, [loop._replace(trips=0) for loop in loops])
    copies = counts.get(COPY, 0) - before.get(COPY, 0)
    passes = 3 if operand_bytes(started) == 4 and started.launch.precision == "tf32x3" else 1
    found = multiplications(counts) * started.arguments["num_warps"]
    needed = kernel.multiplications(numbers) * passes
    repeated = found / needed if needed else 1.0
    if not 1.0 - 1e-9 <= repeated <= MOST_REPEATED or (found > 0) != (needed > 0):
        raise ValueError(
            f"{started.launch.kernel} {numbers}: {found:.6g} multiplications of tensor cores are executed, "
            f"{needed:.6g} are needed: its loops in KERNELS are not the compiled ones"
        )
    return counts, repeated, copies


def multiplications(counts: Counts) -> float:
    """Of tensor cores, for one warp."""
    total = 0.0
    for name, count in counts.items():
        if wide := re.match(r"HGMMA\.64x(\d+)x(\d+)\.", name):  # of four warps
            total += count * 16 * int(wide[1]) * int(wide[2])
        elif narrow := re.match(r"HMMA\.16(8)(\d+)\.", name):
            total += count * 16 * int(narrow[1]) * int(narrow[2])
    return total


def operand_bytes(started: Started) -> int:
    """Of an operand of its products: what the weights are, but for factors, which are taken as float32."""
    arguments = started.arguments
    weights = arguments.get("weight_ptr", arguments.get("x_ptr"))
    factors = "lu_ptr" in arguments and arguments["lu_ptr"] is not None
    return 4 if factors or weights is None else weights.element_size()


def floors(started: Started, counts: Counts, copies: float) -> dict[str, float]:
    """Seconds that a launch takes at least, by what it would be that takes them."""
    warps = math.prod(started.grid) * started.arguments["num_warps"]
    cycles = warps / (4 * MULTIPROCESSORS * CLOCK)
    plain = dict.fromkeys(PIPES, 0.0)
    for name, count in counts.items():
        for pipe, names in PIPES.items():
            plain[pipe] += count * (name.partition(".")[0] in names)
    return {
        "issue": sum(counts.values()) * cycles,
        "pipe": max(plain[pipe] * 32 / LANES[pipe] for pipe in PIPES) * cycles,
        "tensor": multiplications(counts) * warps / MULTIPLICATIONS[operand_bytes(started)],
        "L2": 32 * 16 * copies * warps / L2,
        "HBM": started.bytes() / BANDWIDTH,
    }


# --- operations -----------------------------------------------------------------------------------------


class Operation(NamedTuple):
    """What the library is asked for: tensors of a row that must move, products of D² for it, and the call."""

    name: str
    rows: int
    products: int
    call: Callable[[int, torch.dtype], object]
    layers: int = 1
    precise: bool = False
    """Whether it is never done in tf32, and with bfloat16 rows in float32."""
    largest: int = max(SIZES)


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _given(D: int, layers: int = 0) -> tuple[Any, Any]:
    from lunet_fast.ops.values import Activation, Matrix

    leading = (layers,) if layers else ()
    matrix = Matrix(_empty(*leading, D, D), _empty(*leading, D), None, _empty(*leading, D))
    return matrix, Activation("leaky_softplus", None, (0.1, 0.9, 1.0))


def _forward(D: int, dtype: torch.dtype) -> None:
    from lunet_fast.ops import triton

    triton.layer_forward(_empty(N, D, dtype=dtype), *_given(D), True, False)


def _inverse(D: int, dtype: torch.dtype) -> None:
    from lunet_fast.ops import triton

    triton.layer_inverse(_empty(N, D, dtype=dtype), *_given(D), True, False)


def _backward(D: int, dtype: torch.dtype) -> None:
    from lunet_fast.ops import triton

    x, weight = _empty(N, D, dtype=dtype), _empty(D, D, dtype=dtype)
    triton.layer_backward(x, _empty(N), x, x.clone(), weight, *_given(D), True, True, True)


def _inverse_backward(D: int, dtype: torch.dtype) -> None:
    from lunet_fast.ops import triton

    x = _empty(N, D, dtype=dtype)
    triton.layer_inverse_backward(x, _empty(N), x, x.clone(), *_given(D), True, True, True)


def _net(D: int, dtype: torch.dtype, inverse: bool) -> None:
    from lunet_fast.ops import triton

    triton.net_forward(_empty(N, D, dtype=dtype), *_given(D, LAYERS), True, inverse=inverse)


def _net_backward(D: int, dtype: torch.dtype, inverse: bool) -> None:
    from lunet_fast.ops import triton

    x = _empty(N, D, dtype=dtype)
    triton.net_backward(x, _empty(N), x, *_given(D, LAYERS), True, True, True, inverse=inverse)


OPERATIONS = (
    Operation("forward", 2, 1, _forward),
    Operation("inverse", 2, 1, _inverse, precise=True),
    Operation("backward", 3, 2, _backward),
    Operation("inverse backward", 4, 2, _inverse_backward, precise=True),
    Operation("stack", 2, 1, lambda D, dtype: _net(D, dtype, False), LAYERS, largest=64),
    Operation("stack inverse", 2, 1, lambda D, dtype: _net(D, dtype, True), LAYERS, True, largest=64),
    Operation("stack backward", 3, 3, lambda D, dtype: _net_backward(D, dtype, False), LAYERS, largest=64),
    Operation(
        *("stack inverse backward", 3, 3, lambda D, dtype: _net_backward(D, dtype, True)),
        *(LAYERS, True),
        largest=64,
    ),
)


def roofline(operation: Operation, D: int, arithmetic: str) -> float:
    """Seconds that the operation takes at least, whatever computes it."""
    size = 2 if arithmetic == "bf16" else 4
    moved = N * (operation.rows * D * size + 4)
    operand = 4 if operation.precise else size
    passes = 3 if operation.precise or arithmetic == "tf32x3" else 1
    products = N * operation.products * operation.layers * D * D * passes
    return max(moved / BANDWIDTH, products / MULTIPLICATIONS[operand])


def measure(
    operation: Operation, D: int, arithmetic: str, architecture: int = ARCHITECTURE
) -> dict[str, Any]:
    """A row of the results: instructions for an element (and layer), floors in µs, the share that is left."""
    launches, elements = [], N * D * operation.layers
    for started in launches_of(operation, D, arithmetic, architecture):
        counts, repeated, copies = instructions(started, architecture)
        threads = 32 * math.prod(started.grid) * started.arguments["num_warps"]
        launches.append(
            {
                "kernel": started.launch.kernel,
                "instructions": round(sum(counts.values()) * threads / elements, 2),
                "repeated": round(repeated, 2),
                "floors": {name: round(1e6 * s, 1) for name, s in floors(started, counts, copies).items()},
            }
        )
    best = sum(max(launch["floors"].values()) for launch in launches)
    least = 1e6 * roofline(operation, D, arithmetic)
    return {
        "operation": operation.name,
        "D": D,
        "arithmetic": arithmetic,
        "launches": launches,
        "instructions": round(sum(launch["instructions"] for launch in launches), 2),
        "best": round(best, 1),
        "roofline": round(least, 1),
        "share": round(least / best, 3),
    }


def wanted(sizes: list[int], names: list[str]) -> Iterator[tuple[Operation, int, str]]:
    for operation, D, arithmetic in itertools.product(OPERATIONS, sizes, ARITHMETICS):
        # What is never done in tf32 is the same in both.
        twice = operation.precise and arithmetic == "tf32"
        if operation.name in names and operation.largest >= D and not twice:
            yield operation, D, arithmetic


def report(rows: list[dict[str, Any]]) -> list[str]:
    names = ("issue", "pipe", "tensor", "L2", "HBM")
    lines = [
        f"| operation | D | arithmetic | kernel | i/e | {' | '.join(names)} | roofline | share |",
        "|---" * (7 + len(names)) + "|",
    ]
    for row in rows:
        head = [row["operation"], row["D"], row["arithmetic"]]
        for launch in row["launches"]:
            own = [launch["kernel"], f"{launch['instructions']:.1f}"]
            cells = [*head, *own, *(f"{launch['floors'][name]:.0f}" for name in names)]
            last = launch is row["launches"][-1]
            cells += [f"{row['roofline']:.0f}", f"{row['share']:.0%}"] if last else ["", ""]
            lines.append("| " + " | ".join(map(str, cells)) + " |")
            head = ["", "", ""]
    return lines


def main() -> None:
    import triton

    options = parser(__doc__)
    options.add_argument("--sizes", type=int, nargs="+", default=list(SIZES))
    names = [operation.name for operation in OPERATIONS]
    options.add_argument("--operations", nargs="+", default=names, choices=names)
    options.add_argument("--print", action="store_true", help="print the table, write nothing")
    chosen: argparse.Namespace = options.parse_args()
    results = None if chosen.print else open_results(chosen)
    rows = []
    for operation, D, arithmetic in wanted(chosen.sizes, chosen.operations):
        print(f"{operation.name}, D = {D}, {arithmetic} …", file=sys.stderr, flush=True)
        rows.append(measure(operation, D, arithmetic))
    if results is None:
        print("\n".join(report(rows)))
        return
    head = [
        "# What of an H100's roofline the compiled kernels can reach",
        "",
        f"{where({'machine': results.machine, 'command': results.command})}; Triton {triton.__version__}.",
        "",
        f"Predictions from the machine code for sm_{ARCHITECTURE}; nothing ran on a GPU. N = {N:,} rows, "
        f"with log-determinant; stacks of {LAYERS} layers. i/e: executed instructions a thread for each "
        "element (and layer of a stack). Floors and roofline in µs: issue slots, the fullest pipe, tensor "
        "cores, L2, memory. Share: roofline over the sum of each launch's longest floor. How each is counted "
        "says the script.",
        "",
    ]
    values = {"N": N, "layers": LAYERS, "triton": triton.__version__, "rows": rows}
    results.write("kernel-roofline", values, "\n".join([*head, *report(rows), ""]))


if __name__ == "__main__":
    main()

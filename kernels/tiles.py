"""The one table of block sizes, warps and stages, and the questions about the device that it needs.

Fixed, not tuned at run time: the first step costs what every other one does, and two runs add up their
sums in the same order. A tile never depends on the batch size, so neither does a row's result. The
figures come from compilation (no spills, shared memory in bounds); none has been timed on a GPU.

To tune, once for a GPU: ``benchmarks/gpu/tune_kernels.py`` times other tiles on it and writes the better ones
to a JSON file, which LUNET_FAST_TILES=FILE puts in the table's place.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor


class Tile(NamedTuple):
    """What one program covers, and how many warps and pipeline stages it is compiled for."""

    rows: int
    columns: int
    inner: int
    warps: int
    stages: int

    @property
    def blocks(self) -> dict[str, int]:
        """The sizes as kernels of products take them."""
        return {"ROWS": self.rows, "COLUMNS": self.columns, "INNER": self.inner}

    @property
    def triangle(self) -> dict[str, int]:
        """The same for kernels that walk diagonal blocks."""
        return {"ROWS": self.rows, "BLOCK": self.columns, "INNER": self.inner}


_Choice = TypeVar("_Choice", bound=Callable[..., Any])

#: Tiles that stand in the table's place, by the call that they answer.
_tuned: dict[str, Tile] = {}


def call_name(function: str, *args: Any) -> str:
    """How a call of one of this file's functions is written in a file of tuned tiles."""
    return f"{function}({', '.join(map(str, args))})"


def _tunable(function: _Choice) -> _Choice:
    """Let tuned tiles answer first."""

    @functools.wraps(function)
    def choose(*args: Any) -> Any:
        tile = _tuned.get(call_name(function.__name__, *args)) if _tuned else None
        return function(*args) if tile is None else tile

    return choose  # type: ignore[return-value]


def use_tuned(tiles: dict[str, Tile]) -> None:
    """Put these tiles, by ``call_name``, in the table's place; an empty dictionary restores the table."""
    _tuned.clear()
    _tuned.update(tiles)


def read_tuned(path: str | os.PathLike[str]) -> dict[str, Tile]:
    """The tiles in a file that ``benchmarks/gpu/tune_kernels.py`` wrote.

    Raises:
        ValueError: the file is not such a file; it names the entry.
        OSError: it cannot be read.
    """
    try:
        entries = json.loads(Path(path).read_text(encoding="utf-8"))["tiles"]
        items = entries.items()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a file of tuned tiles: {error}") from None
    tiles = {}
    for call, numbers in items:
        whole = isinstance(numbers, list) and all(type(n) is int and n >= 0 for n in numbers)
        if not whole or len(numbers) != len(Tile._fields):
            raise ValueError(f"{path}: {call} must be {len(Tile._fields)} whole numbers, got {numbers}")
        tiles[call] = Tile(*numbers)
    return tiles


def ceil_div(a: int, b: int) -> int:
    """⌈a / b⌉, in a fraction of the time that ``triton.cdiv`` takes the host."""
    return -(-a // b)


#: Elements that a thread of a row-wise kernel holds at a time. The inverse keeps more of each, and spilled at
#: 16 with slopes for each column.
ACTIVATION_ELEMENTS = {"forward": 16, "inverse": 8, "backward": 8}

#: Of the layer on tensor cores, on every architecture.
_NARROW = ((16, Tile(64, 16, 16, 4, 3)), (32, Tile(64, 32, 32, 4, 3)))

#: (architecture, arithmetic) → (largest D, tile) in ascending order of D; 0 is "any larger D".
#: The architecture is the least that the row is meant for: sm_80's rows also fit the 99 KiB of shared memory
#: of sm_86 and sm_89. The inner block stays small for ieee, whose product is unrolled: with all of D = 128 it
#: compiled for a minute and spilled.
LAYER: dict[tuple[int, str], tuple[tuple[int, Tile], ...]] = {
    (80, "ieee"): ((16, Tile(64, 16, 16, 4, 2)), (32, Tile(64, 32, 16, 4, 2)), (0, Tile(32, 64, 32, 4, 2))),
    (80, "tf32x3"): (*_NARROW, (64, Tile(64, 64, 32, 4, 3)), (0, Tile(128, 64, 32, 8, 3))),
    (80, "tf32"): (*_NARROW, (64, Tile(64, 64, 32, 4, 3)), (0, Tile(128, 64, 32, 8, 3))),
    (80, "bf16"): (*_NARROW, (64, Tile(64, 64, 64, 4, 3)), (0, Tile(128, 64, 64, 8, 3))),
    # A wider tile reads x half as often, from D = 256 on a quarter.
    (90, "tf32x3"): (*_NARROW, (64, Tile(64, 64, 32, 4, 3)), (0, Tile(128, 128, 32, 8, 2))),
    (90, "tf32"): (
        *(*_NARROW, (64, Tile(64, 64, 32, 4, 3)), (255, Tile(128, 128, 32, 8, 3))),
        (0, Tile(128, 256, 32, 8, 2)),
    ),
    (90, "bf16"): (*_NARROW, (64, Tile(64, 64, 64, 4, 3)), (0, Tile(128, 128, 64, 8, 3))),
    (100, "tf32x3"): (*_NARROW, (0, Tile(64, 64, 64, 8, 2))),
    (100, "tf32"): (*_NARROW, (0, Tile(64, 64, 32, 8, 3))),
    (100, "bf16"): (*_NARROW, (0, Tile(64, 64, 64, 8, 3))),
}


@_tunable
def activation_tile(direction: str, D: int) -> Tile:
    """Of the row-wise kernels, "forward", "inverse" or "backward" (of either).

    A row longer than 128 is walked in the blocks that leave fewest lanes idle. At most 512 wide: with slopes
    for each column a thread holds those of its columns, and spilled at 1024.
    """
    widths = [512, 256, 128] if D > 128 else [_power_of_two(D)]
    columns = min(widths, key=lambda width: ceil_div(D, width) * width)
    warps, elements = 4, ACTIVATION_ELEMENTS[direction]
    # Where D is no multiple of 16, each element has an address of its own. The rest spilled under Triton 3.6.
    if direction == "backward" and (D % 16 != 0 or columns == 128):
        elements //= 2
    elif D % 16 != 0 and columns == 128:
        warps, elements = 8, 8
    return Tile(max(1, 32 * warps * elements // columns), columns, 0, warps, 1)


#: Features up to which a net of layers is run as one operation. ``stack_tile`` says what is one launch.
NET_FEATURES = 64

#: Arithmetic of products of D×D matrices: each row's product builds on it, so it keeps float32's accuracy.
MATRIX_PRECISION = "tf32x3"


@_tunable
def matrix_tile(D: int, architecture: int) -> Tile:
    """Of the kernels on the packed matrix: one program forms one square block of D×D."""
    if D > 512 and D % 16 == 0 and architecture >= 90:
        return Tile(64, 64, 64, 8, 2 if architecture < 100 else 3)
    block = 16 if D <= 16 else 32  # with 64, sm_80 spilled
    return Tile(block, block, block, 4, 2)


def fuses_triangles(D: int, precision: str) -> bool:
    """Whether U x stays in registers between the two triangular products, in one launch.

    Beyond 128 columns the unrolled products spill; in float32 and where D is no multiple of 16, beyond 64.
    """
    largest = 64 if precision == "ieee" or D % 16 != 0 else 128
    return largest >= D


@_tunable
def triangular_tile(D: int, architecture: int) -> Tile:
    """Of the products by U and then L, meant for few rows: as few to a program as a tensor core takes.

    Blocks of columns are square blocks of the matrix too.
    """
    block = 16 if D <= 16 else 32
    if 64 < D <= 128 and D % 16 == 0:  # one launch, unrolled over the blocks
        if architecture < 90:
            return Tile(16, 64, 64, 8, 2)
        return Tile(16, 32, 32, 4, 2 if architecture < 100 else 1)
    # Where D is no multiple of 16 every element has an address of its own, and 4 warps spilled.
    many = D > 32 if D % 16 != 0 else D > 64 and architecture < 90
    return Tile(16, block, block, 8 if many else 4, 2)


@_tunable
def layer_tile(D: int, dtype: torch.dtype, precision: str, architecture: int) -> Tile:
    """Of ``layer_fwd_kernel``, D inputs and outputs."""
    arithmetic = _arithmetic(dtype, precision)
    rows = _nearest(LAYER, arithmetic, architecture)
    tile = next(tile for largest, tile in rows if largest == 0 or largest >= D)
    if tile.columns == 256 and D % 256 != 0:
        tile = tile._replace(columns=128)
    if tile.columns == 128 and (D % 16 != 0 or 0 < D % 128 <= 64):  # half of the last block would be idle
        tile = tile._replace(columns=64)
    if D % 16 == 0:
        return tile
    # Every element has an address of its own here: with more than 16 to a thread they spilled, in ieee and
    # for D < 16 on sm_100 with more than 8. Tensor cores from sm_90 want 64 rows; without them, fewer leave
    # more registers.
    if arithmetic == "ieee":
        return tile._replace(rows=16 if tile.columns == 64 else 32)
    if tile.columns == 64:
        return tile._replace(rows=32 if arithmetic == "tf32" and architecture < 90 else 64, warps=8)
    if tile.columns == 16 and architecture >= 100:
        return tile._replace(warps=8)
    return tile


def narrowed(tile: Tile) -> Tile:
    """The tile where φ differs from column to column: with 128 of them their slopes spilled."""
    return tile._replace(columns=min(64, tile.columns))


def _arithmetic(dtype: torch.dtype, precision: str) -> str:
    """The tables' name for products of rows of a dtype."""
    return "bf16" if dtype == torch.bfloat16 else precision


def _nearest(
    table: dict[tuple[int, str], tuple[tuple[int, Tile], ...]], arithmetic: str, architecture: int
) -> tuple[tuple[int, Tile], ...]:
    """The nearest older architecture serves a newer one, the oldest those before it."""
    known = [arch for arch, kind in table if kind == arithmetic]
    return table[max((arch for arch in known if arch <= architecture), default=min(known)), arithmetic]


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


@functools.cache
def _capability(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def architecture(x: Tensor) -> int:
    """90 for sm_90. Tensors on the CPU, in Triton's interpreter, are given sm_90's tiles."""
    return _capability(x.get_device()) if x.is_cuda else 90


# --- backward -------------------------------------------------------------------------------------------

#: Multiprocessors of the GPU that the architecture's rows are meant for: A100 and H100. The number of partial
#: sums follows it, so it is a constant of the table and not asked of the device.
MULTIPROCESSORS = {80: 108, 90: 132}


def programs(per_multiprocessor: int, shares: int, architecture: int) -> int:
    """How many programs walk the rows of each of ``shares`` equal parts of a launch."""
    known = max((arch for arch in MULTIPROCESSORS if arch <= architecture), default=80)
    return max(1, per_multiprocessor * MULTIPROCESSORS[known] // shares)


def recomputes(D: int) -> bool:
    """Whether the backward of a layer computes h = x Wᵀ + b again: up to here memory is the limit.

    Beyond, a third product would cost more than reading h, which the forward then saves.
    """
    return D <= 128


#: Of ``layer_bwd_kernel``: (architecture, arithmetic) → (largest D, tile) in ascending order of D. In a tile
#: ``columns`` are those of h formed at a time, ``inner`` those of x in a step of its product. Larger ones
#: spill.
LAYER_BACKWARD: dict[tuple[int, str], tuple[tuple[int, Tile], ...]] = {
    (80, "ieee"): ((16, Tile(64, 16, 16, 4, 1)), (32, Tile(32, 32, 16, 4, 1)), (64, Tile(16, 32, 16, 8, 1))),
    (80, "tf32x3"): (
        (16, Tile(64, 16, 16, 4, 1)),
        (32, Tile(32, 32, 16, 4, 1)),
        (64, Tile(16, 32, 16, 4, 1)),
    ),
    (80, "tf32"): ((16, Tile(64, 16, 16, 4, 1)), (32, Tile(64, 32, 32, 4, 1)), (64, Tile(64, 32, 32, 8, 1))),
    (80, "bf16"): ((16, Tile(64, 16, 16, 4, 1)), (32, Tile(64, 32, 32, 4, 1)), (64, Tile(64, 64, 64, 8, 1))),
    (90, "ieee"): ((16, Tile(64, 16, 16, 4, 1)), (32, Tile(16, 32, 16, 4, 1)), (64, Tile(16, 32, 16, 8, 1))),
    (90, "tf32x3"): (
        (16, Tile(64, 16, 16, 4, 1)),
        (32, Tile(32, 32, 32, 4, 1)),
        (64, Tile(32, 64, 32, 8, 1)),
    ),
    (90, "tf32"): ((16, Tile(64, 16, 16, 4, 1)), (32, Tile(64, 32, 32, 4, 1)), (64, Tile(64, 64, 32, 8, 1))),
    (100, "tf32"): ((16, Tile(64, 16, 16, 8, 1)), (32, Tile(64, 32, 32, 8, 1)), (64, Tile(64, 64, 32, 8, 1))),
    (100, "bf16"): ((16, Tile(64, 16, 16, 4, 1)), (32, Tile(64, 32, 32, 4, 1)), (64, Tile(64, 32, 64, 8, 1))),
}

#: The same where D is no multiple of 16 or the slopes are learnt: both take registers. What is missing
#: spills, or spills but for tiles so small that three launches take fewer instructions.
LAYER_BACKWARD_TIGHT: dict[tuple[int, str], tuple[tuple[int, Tile], ...]] = {
    (80, "ieee"): ((16, Tile(32, 16, 16, 4, 1)), (32, Tile(32, 32, 16, 4, 1)), (64, Tile(16, 32, 16, 8, 1))),
    (80, "tf32x3"): (
        (16, Tile(64, 16, 16, 4, 1)),
        (32, Tile(16, 32, 16, 4, 1)),
    ),
    (80, "tf32"): ((16, Tile(64, 16, 16, 4, 1)), (32, Tile(32, 32, 32, 4, 1)), (64, Tile(32, 32, 16, 8, 1))),
    (80, "bf16"): ((16, Tile(64, 16, 16, 4, 1)), (32, Tile(32, 32, 32, 4, 1)), (64, Tile(32, 32, 32, 8, 1))),
    (90, "ieee"): ((16, Tile(16, 16, 16, 4, 1)),),
    (90, "tf32x3"): ((16, Tile(32, 16, 16, 4, 1)),),
    (90, "tf32"): ((16, Tile(64, 16, 16, 4, 1)), (32, Tile(32, 32, 32, 4, 1)), (64, Tile(32, 64, 32, 8, 1))),
    (90, "bf16"): ((16, Tile(64, 16, 16, 4, 1)), (32, Tile(32, 32, 32, 4, 1)), (64, Tile(32, 64, 64, 8, 1))),
    (100, "tf32x3"): ((16, Tile(32, 16, 16, 8, 1)),),
    (100, "tf32"): ((16, Tile(32, 16, 16, 8, 1)), (32, Tile(32, 32, 32, 4, 1)), (64, Tile(32, 64, 32, 8, 1))),
    (100, "bf16"): ((16, Tile(64, 16, 16, 8, 1)), (32, Tile(32, 32, 32, 4, 1)), (64, Tile(32, 64, 64, 8, 1))),
}


def layer_backward_tile(
    D: int, dtype: torch.dtype, precision: str, architecture: int, learnt: bool
) -> Tile | None:
    """Of ``layer_bwd_kernel``; None where gradients of h, x and W are formed in launches of their own."""
    arithmetic = _arithmetic(dtype, precision)
    table = LAYER_BACKWARD_TIGHT if learnt or D % 16 != 0 else LAYER_BACKWARD
    rows = _nearest(table, arithmetic, architecture)
    return next((tile for largest, tile in rows if largest >= D), None)


@_tunable
def preactivation_tile(D: int, dtype: torch.dtype, precision: str, learnt: bool) -> Tile:
    """Of ``preactivation_bwd_kernel``: 8 elements to a thread, 16 where that does not spill."""
    arithmetic = _arithmetic(dtype, precision)
    rows = 64 if D % 16 == 0 and not learnt and arithmetic in ("tf32", "bf16") else 32
    if arithmetic == "ieee":
        return Tile(rows, 64, 16, 8, 2)
    return Tile(rows, 64, 64 if arithmetic == "bf16" else 32, 8, 3)


@_tunable
def weight_gradient_tile(D: int, dtype: torch.dtype, precision: str, architecture: int) -> Tile:
    """Of ``weight_gradient_kernel``: rows × columns of g_W, and the rows of the batch at a time."""
    arithmetic = _arithmetic(dtype, precision)
    if D <= 32:
        width = max(16, _power_of_two(D))
        return Tile(width, width, 32, 4, 3)
    if arithmetic == "ieee":
        return Tile(64, 64, 16, 8, 3)
    if D <= 64:
        # In bfloat16, 4 warps spilled everywhere but on sm_90.
        many = arithmetic == "bf16" and not 90 <= architecture < 100
        return Tile(64, 64, 32, 8 if many else 4, 3)
    # Square tiles read least, but spilled with an address for every element, and sm_80's with tf32x3.
    square = D % 16 == 0 and (architecture >= 90 or arithmetic != "tf32x3")
    return Tile(128, 128 if square else 64, 32, 8, 3)


# --- scoring --------------------------------------------------------------------------------------------


def score_tile(D: int, layers: int, precision: str, architecture: int) -> Tile:
    """Of ``score_topk_kernel``: ``rows`` items at a time, their features ``columns`` at a time.

    A program holds a layer's sums for its rows, and of two layers those of the former as well. sm_80's tensor
    cores take their operands from registers too, so there it is few rows where D is large; sm_100's keep the
    sums in a memory of their own.
    """
    if precision == "ieee":
        if D <= 32:
            if architecture >= 90:
                return Tile(64, 16 if D <= 16 else 32, 0, 4, 1)
            return Tile(128, 16, 0, 8, 1) if D <= 16 else Tile(64, 32, 0, 8, 1)
        return Tile(32 if D <= 64 else 16, 32, 0, 8, 1)
    if architecture >= 100:
        # Triton 3.6 does not compile sums of one block of columns in sm_100's memory: with 32 rows they are
        # in registers.
        if D <= 32:
            return Tile(32, 16, 0, 4, 1)
        if D <= 64:
            return Tile(64, 16, 0, 8, 1)
        return Tile(32 if D % 16 == 0 else 64, 64, 0, 8, 1)
    if architecture >= 90:
        if D <= 32:
            return Tile(64, 16 if D <= 16 else 32, 0, 4, 1)
        if D > 64 or (D % 16 != 0 and precision == "tf32x3"):
            return Tile(64, 16, 0, 8, 1)
        return Tile(64, 32, 0, 4, 1)
    if precision == "tf32x3":
        if D <= 32:
            return Tile(64, 16 if D <= 16 else 32, 0, 8, 1)
        return Tile(32 if D <= 64 else 16, 64, 0, 8, 1)
    if D <= 16:
        return Tile(32, 16, 0, 4, 1)
    return Tile(64, 32, 0, 8, 1) if D <= 64 else Tile(32, 64, 0, 8, 1)


def score_splits(users: int, architecture: int) -> int:
    """How many programs share the items of one user: enough to fill the device where users are few."""
    return programs(8, users, architecture)


# --- the whole stack ------------------------------------------------------------------------------------

#: Of a stack's forward on tensor cores, and mostly of its inverse.
_NARROW_STACK = ((16, Tile(64, 16, 16, 4, 2)), (32, Tile(64, 32, 32, 4, 2)))

#: (kernel, arithmetic, architecture) → (largest D, tile) in ascending order of D, beyond which layers go one
#: by one; ``inner`` is the chunk. ieee ends at 32: tf32x3 has its accuracy, and 64 columns unrolled spilled.
STACK: dict[tuple[str, str, int], tuple[tuple[int, Tile], ...]] = {
    ("forward", "ieee", 80): ((16, Tile(64, 16, 16, 4, 1)), (32, Tile(64, 32, 32, 4, 1))),
    ("forward", "tf32x3", 80): (*_NARROW_STACK, (64, Tile(32, 64, 64, 8, 2))),
    ("forward", "tf32x3", 90): (*_NARROW_STACK, (64, Tile(64, 64, 64, 8, 2))),
    ("forward", "tf32", 80): (*_NARROW_STACK, (64, Tile(64, 64, 64, 8, 3))),
    ("forward", "tf32", 90): (*_NARROW_STACK, (64, Tile(64, 64, 64, 8, 2))),
    ("forward", "bf16", 80): (*_NARROW_STACK, (64, Tile(64, 64, 64, 8, 2))),
    ("inverse", "ieee", 80): ((16, Tile(64, 16, 16, 4, 1)), (32, Tile(64, 32, 32, 4, 1))),
    ("inverse", "tf32x3", 80): (*_NARROW_STACK, (64, Tile(16, 64, 32, 4, 1))),
    ("inverse", "tf32x3", 100): (
        (16, Tile(64, 16, 16, 4, 2)),
        (32, Tile(64, 32, 32, 8, 2)),
        (64, Tile(16, 64, 32, 4, 1)),
    ),
    ("backward", "ieee", 80): ((16, Tile(32, 16, 16, 4, 1)), (32, Tile(32, 32, 32, 8, 1))),
    ("backward", "tf32x3", 80): (
        (16, Tile(64, 16, 16, 4, 1)),
        (32, Tile(32, 32, 32, 8, 1)),
        (64, Tile(32, 64, 64, 8, 1)),
    ),
    ("backward", "tf32x3", 90): (
        (16, Tile(64, 16, 16, 8, 1)),
        (32, Tile(64, 32, 32, 8, 1)),
        (64, Tile(32, 64, 64, 8, 1)),
    ),
    ("backward", "tf32x3", 100): (
        (16, Tile(64, 16, 16, 4, 1)),
        (32, Tile(64, 32, 32, 8, 1)),
        (64, Tile(32, 64, 64, 8, 1)),
    ),
    ("backward", "tf32", 80): (
        (16, Tile(64, 16, 16, 8, 1)),
        (32, Tile(64, 32, 32, 8, 1)),
        (64, Tile(64, 64, 64, 8, 1)),
    ),
    ("backward", "tf32", 100): (
        (16, Tile(32, 16, 16, 4, 1)),
        (32, Tile(64, 32, 32, 8, 1)),
        (64, Tile(64, 64, 64, 8, 1)),
    ),
    ("backward", "bf16", 80): (
        (16, Tile(64, 16, 16, 8, 1)),
        (32, Tile(64, 32, 32, 8, 1)),
        (64, Tile(64, 64, 64, 8, 1)),
    ),
    ("inverse backward", "ieee", 80): ((16, Tile(32, 16, 16, 4, 1)), (32, Tile(32, 32, 32, 8, 1))),
    ("inverse backward", "tf32x3", 80): (
        (16, Tile(32, 16, 16, 8, 1)),
        (32, Tile(64, 32, 32, 8, 1)),
        (64, Tile(16, 64, 32, 8, 1)),
    ),
    ("inverse backward", "tf32x3", 90): (
        (16, Tile(64, 16, 16, 8, 1)),
        (32, Tile(32, 32, 32, 4, 1)),
        (64, Tile(16, 64, 32, 8, 1)),
    ),
    ("inverse backward", "tf32x3", 100): (
        (16, Tile(64, 16, 16, 4, 1)),
        (32, Tile(64, 32, 32, 8, 1)),
        (64, Tile(16, 64, 32, 8, 1)),
    ),
}


def stack_tile(
    kernel: str, D: int, dtype: torch.dtype, precision: str, architecture: int, *, learnt: bool = False
) -> Tile | None:
    """Of a stack's "forward", "inverse", "backward" or "inverse backward"; ``inner`` is the chunk.

    ``learnt``: the slopes are a tensor, and have gradients; that changes the rows at most.

    None where a stack does not go in one launch: layer by layer is the way.
    """
    # Rows in bfloat16 are inverted in float32.
    arithmetic = precision if kernel.startswith("inverse") else _arithmetic(dtype, precision)
    known = [arch for name, kind, arch in STACK if (name, kind) == (kernel, arithmetic)]
    if not known:
        return None
    nearest = max((arch for arch in known if arch <= architecture), default=min(known))
    table = STACK[kernel, arithmetic, nearest]
    tile = next((tile for largest, tile in table if largest >= D), None)
    if tile is None or D <= 32:
        return tile
    # An address for every element, or gradients of slopes: with fewer rows, registers are left for them.
    addresses = D % 16 != 0
    if (kernel == "backward" and (addresses or learnt)) or (
        (kernel, arithmetic) == ("forward", "tf32x3") and addresses
    ):
        return tile._replace(rows=32)
    return tile


def stack_outer_block(tile: Tile, dtype: torch.dtype, precision: str) -> tuple[int, int]:
    """(block, rows at a time) of the sum of outer products, the weights' gradient."""
    coarse = dtype == torch.bfloat16 or precision == "tf32"
    block = min(tile.inner, 64 if coarse else 32)
    return block, min(32, block, tile.rows)


def stack_programs(architecture: int) -> int:
    """How many programs walk the rows in a stack's backward: few, so that their scratch stays cached."""
    return programs(1, 1, architecture)


# --- substitution ---------------------------------------------------------------------------------------

#: The longest rows that a program of the inverse keeps in registers: two blocks of 32 spilled.
SUBSTITUTION_HELD = 32

#: The least D for which a product with W⁻¹ is tried.
INVERSE_WEIGHT_FROM = 17

#: N·D from which it is tried for D up to 128: fewer rows are substituted in less than the launches take that
#: form W⁻¹. Beyond, N > D is enough.
INVERSE_WEIGHT_NUMBERS = 1 << 22


def substitution_block(D: int) -> int:
    """Columns of the diagonal blocks of L and U that are inverted ahead."""
    return 16 if D <= 16 else 32


@_tunable
def substitution_tile(D: int, precision: str, architecture: int) -> Tile:
    """Of the inverse and its gradient: rows × the block; ``inner`` is 0 where the rows stay in registers."""
    block = substitution_block(D)
    if block == 16:
        return Tile(64, block, 0, 4 if architecture < 100 else 8, 2)
    # With 4 warps a thread would hold 16 elements of a block of 32, and these spilled. So did in ieee, and
    # where D is no multiple of 16 and every element has an address of its own, a product over 32.
    ieee = precision == "ieee"
    if D <= SUBSTITUTION_HELD:
        return Tile(32 if ieee else 64, block, 0, 8, 2)
    if D % 16 != 0:
        return Tile(16 if ieee else 64, block, 16, 8, 2)
    if ieee:
        return Tile(32, block, 16, 8, 1)
    return Tile(64 if architecture < 90 else 32, block, 32, 8, 2)  # with 64, rows in bfloat16 spilled


def inverse_weight_tile(D: int) -> Tile:
    """Of the rows of W⁻¹: few to a program, there are only D of them."""
    block = substitution_block(D)
    return Tile(16, block, block, 4, 2)


def magnitudes_tile() -> Tile:
    """Of sums along the rows of L and U."""
    return Tile(16, 128, 0, 4, 1)


def tries_inverse_weight(D: int, N: int | None = None) -> bool:
    """Whether the inverse of N rows, or of as many as one likes, tries a product with W⁻¹ before it
    substitutes."""
    many = N is None or (N > D if D > 128 else N * D >= INVERSE_WEIGHT_NUMBERS)
    return many and D >= INVERSE_WEIGHT_FROM


def inverse_product_tile(D: int, precision: str, architecture: int) -> Tile:
    """Of the product with W⁻¹, in whose launch φ⁻¹ is where one block has all columns."""
    if 32 < D <= 64 and D % 16 == 0 and precision == "tf32x3" and 90 <= architecture < 100:
        # One pass over the columns: Triton looks for NaN in each pass of a product in tf32x3.
        return Tile(64, 64, 64, 4, 1)
    return layer_tile(D, torch.float32, precision, architecture)


if os.environ.get("LUNET_FAST_TILES"):
    use_tuned(read_tuned(os.environ["LUNET_FAST_TILES"]))

"""The one table of block sizes, warps and stages, and the questions about the device that it needs.

Fixed, not tuned at run time: the first step costs what every other one does, and two runs add up their
sums in the same order. A tile never depends on the batch size, so neither does a row's result. The
figures come from compilation (no spills, shared memory in bounds); none has been timed on a GPU.
"""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Tile(NamedTuple):
    """What one program covers, and how many warps and pipeline stages it is compiled for."""

    rows: int
    columns: int
    inner: int
    warps: int
    stages: int


#: Elements that a thread of a row-wise kernel holds at a time. The inverse keeps more of each, and spilled at
#: 16 with slopes for each column.
ACTIVATION_ELEMENTS = {"activation_fwd_kernel": 16, "activation_inv_kernel": 8}

#: (architecture, arithmetic) → (largest D, tile) in ascending order of D; 0 is "any larger D".
#: The architecture is the least that the row is meant for: sm_80's rows also fit the 99 KiB of shared memory
#: of sm_86 and sm_89. The inner block stays at 32 for ieee, whose product is unrolled: with all of D = 128 it
#: compiled for a minute and spilled.
LAYER: dict[tuple[int, str], tuple[tuple[int, Tile], ...]] = {
    (80, "ieee"): (
        (16, Tile(64, 16, 16, 4, 2)),
        (32, Tile(64, 32, 32, 4, 2)),
        (0, Tile(64, 64, 32, 4, 2)),
    ),
    (80, "tf32x3"): (
        (16, Tile(64, 16, 16, 4, 3)),
        (32, Tile(64, 32, 32, 4, 3)),
        (64, Tile(64, 64, 32, 4, 3)),
        (0, Tile(128, 64, 32, 8, 3)),
    ),
    (80, "tf32"): (
        (16, Tile(64, 16, 16, 4, 3)),
        (32, Tile(64, 32, 32, 4, 3)),
        (64, Tile(64, 64, 32, 4, 3)),
        (0, Tile(128, 64, 32, 8, 3)),
    ),
    (80, "bf16"): (
        (16, Tile(64, 16, 16, 4, 3)),
        (32, Tile(64, 32, 32, 4, 3)),
        (64, Tile(64, 64, 64, 4, 3)),
        (0, Tile(128, 64, 64, 8, 3)),
    ),
}


def activation_tile(kernel: str, D: int) -> Tile:
    """Of the row-wise kernels. A row longer than 128 is walked in the blocks that leave fewest lanes idle.

    At most 512 wide: with slopes for each column a thread holds those of its columns, and spilled at 1024.
    """
    widths = [512, 256, 128] if D > 128 else [_power_of_two(D)]
    columns = min(widths, key=lambda width: -(-D // width) * width)
    warps = 4
    return Tile(max(1, 32 * warps * ACTIVATION_ELEMENTS[kernel] // columns), columns, 0, warps, 1)


def layer_tile(D: int, dtype: torch.dtype, precision: str, architecture: int) -> Tile:
    """Of ``layer_fwd_kernel``, D inputs and outputs; the nearest older architecture serves a newer one."""
    arithmetic = "bf16" if dtype == torch.bfloat16 else precision
    known = [arch for arch, kind in LAYER if kind == arithmetic and arch <= architecture]
    table = LAYER[max(known, default=min(arch for arch, _ in LAYER)), arithmetic]
    tile = next(tile for largest, tile in table if largest == 0 or largest >= D)
    if D % 16 != 0 and tile.columns == 64:
        # Every element has an address of its own here: with more than 16 to a thread they spilled. sm_90's
        # tensor cores want 64 rows; without them, fewer rows leave the compiler more registers.
        return tile._replace(rows=32) if arithmetic == "ieee" else tile._replace(rows=64, warps=8)
    return tile


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


@functools.cache
def _capability(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def architecture(x: Tensor) -> int:
    """90 for sm_90. Tensors on the CPU, in Triton's interpreter, are given sm_90's tiles."""
    return _capability(x.get_device()) if x.is_cuda else 90


def on_device_of(x: Tensor) -> AbstractContextManager[Any]:
    """A context in which a kernel launches on x's device: Triton launches on the current one."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()

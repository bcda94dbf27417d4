# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False
"""What the kernels share: the checks of a launcher's arguments, how a kernel starts, tiles and their product.

Launchers take tensors that are contiguous and refuse others: they never copy behind one's back. K stacked
layers are one launch: x is [K, N, D] and every parameter has a leading K. A launch covers the members with
the second axis of its grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from operator import itemgetter
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lunet_fast.kernels.tiles import Tile

#: How a float32 product may be computed: in float32, as three tf32 products with float32's accuracy, or in
#: tf32 with its 10 bits. Sums are always float32.
PRECISIONS = ("ieee", "tf32x3", "tf32")


@triton.jit
def _probe() -> None:
    pass


#: Whether Triton was imported under TRITON_INTERPRET=1.
INTERPRETED: tl.constexpr = tl.constexpr(not isinstance(_probe, triton.JITFunction))


@triton.jit
def nearest_tf32(x):
    """x, float32, for a tensor core, which reads tf32's 10 bits of it: those of the nearest, ties away from
    zero; infinity and NaN stay.

    It cuts the other 13 bits off, which would be wrong by twice as much, and always to the same side. So half
    of what the last bit counts is added first, and the cut left to it. ``cvt.rna.tf32``, which cuts as well,
    is four instructions on sm_90; this is two.
    """
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(x == x, bits + 4096, bits).to(tl.float32, bitcast=True)


@triton.jit
def dot(x, w, total, PRECISION: tl.constexpr):
    """total + x·w, x rounded to w's dtype; a float32 product in PRECISION, the sum in float32."""
    x = x.to(w.dtype)
    if INTERPRETED:  # it multiplies the raw bits of bfloat16, and float32 in float32 whatever PRECISION is
        x = x.to(tl.float32)
        w = w.to(tl.float32)
    elif PRECISION == "tf32" and w.dtype == tl.float32:
        x = nearest_tf32(x)
        w = nearest_tf32(w)
    return tl.dot(x, w, total, input_precision=PRECISION)


@triton.jit
def load_tile(ptr, start, here, D, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Columns start … start + COLUMNS of the ROWS rows at ptr, float32; 0 where there are none.

    ``here`` [ROWS, 1] says which rows there are, D how many columns.
    """
    cols = start + tl.arange(0, COLUMNS)[None, :]
    offsets = tl.arange(0, ROWS)[:, None] * D + cols
    return tl.load(ptr + offsets, mask=here & (cols < D), other=0.0).to(tl.float32)


@triton.jit
def store_tile(ptr, tile, start, here, D, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The reverse of ``load_tile``."""
    cols = start + tl.arange(0, COLUMNS)[None, :]
    offsets = tl.arange(0, ROWS)[:, None] * D + cols
    tl.store(ptr + offsets, tile.to(ptr.dtype.element_ty), mask=here & (cols < D))


@triton.jit
def load_row(ptr, cols, D):
    """These columns of a vector [D] as a row [1, COLUMNS], float32; 0 beyond D."""
    return tl.load(ptr + cols, mask=cols < D, other=0.0).to(tl.float32)[None, :]


def launch(kernel: Any, grid: tuple[int, ...], tile: Tile, /, *arguments: Any, **named: Any) -> Any:
    """Start ``kernel`` on the device of its first argument, compiled for the tile's warps and stages; return
    what Triton compiled, None in its interpreter.

    An empty grid starts nothing.
    """
    if 0 in grid:
        return None
    # Triton launches on the current device.
    x = arguments[0]
    with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
        return kernel[grid](
            *arguments,
            **named,
            num_warps=tile.warps,
            num_stages=tile.stages,
            enable_fp_fusion=True,
        )


class Prepared:
    """A kernel whose arguments stay from launch to launch, but for those that ``varying`` names: tensors of
    the same dtypes, and numbers that are exempt from specialisation.

    At each launch Triton looks at every argument to find what it has compiled for such ones, which takes the
    host several times as long as the launch itself. Here it does so once. What it might find else at another
    time, rows at an address that is no multiple of 16, N beyond 32 bits, another current device, goes through
    it again.
    """

    def __init__(self, kernel: Any, tile: Tile, arguments: dict[str, Any], varying: Sequence[str]) -> None:
        """``arguments`` by name, options of the compiler among them; the first that varies is the kernel's
        first."""
        self._kernel, self._tile, self._arguments, self._varying = kernel, tile, arguments, tuple(varying)
        self._compiled: dict[tuple[bool, ...], Any] = {}
        self._fixed: tuple[Any, ...] = ()
        self._in_order: Any = None

    def __call__(self, grid: tuple[int, int, int], *varying: Any) -> None:
        """Launch with these values, None for a tensor that is not there. An empty grid starts nothing."""
        there = tuple([value is not None for value in varying])
        compiled, usual = self._compiled.get(there), _are_usual(varying)
        if compiled is None or not usual:
            named = {**self._arguments, **dict(zip(self._varying, varying, strict=True))}
            first = named.pop(self._varying[0])
            compiled = launch(self._kernel, grid, self._tile, first, **named)
            if usual and compiled is not None:
                self._compiled[there] = compiled
        elif 0 not in grid:
            if self._in_order is None:  # of use from the second launch on
                names = self._kernel.arg_names
                fixed = [name for name in names if name not in self._varying]
                self._fixed = tuple(map(self._arguments.get, fixed))
                self._in_order = itemgetter(*map([*self._varying, *fixed].index, names))
            compiled[grid](*self._in_order(varying + self._fixed))


def _are_usual(values: Sequence[Any]) -> bool:
    """Whether tensors are aligned to 16 bytes, as new memory is, numbers fit 32 bits, and the first tensor,
    which all share their device with, is on the current one."""
    for value in values:
        if type(value) is int:
            if value >= 2**31:
                return False
        elif value is not None and value.data_ptr() % 16:
            return False
    return not values[0].is_cuda or values[0].get_device() == torch.cuda.current_device()


def check_rows(name: str, x: Tensor, dims: int = 3, *, kind: tuple[int, torch.dtype] | None = None) -> None:
    """Refuse rows that the kernels do not address: [K, N, D] (or [N, D], dims=2), float32 or bfloat16; or of
    another (D, dtype) than a launch was prepared for."""
    if x.dim() != dims or x.shape[-1] == 0 or not x.is_contiguous():
        shape = "[K, N, D]" if dims == 3 else "[N, D]"
        raise ValueError(
            f"{name} must be contiguous rows {shape} with D ≥ 1, got {list(x.shape)} of strides {x.stride()}"
        )
    if x.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"{name} must be float32 or bfloat16, got {x.dtype}")
    if kind is not None and kind != (x.shape[-1], x.dtype):
        raise ValueError(f"{name} must have D = {kind[0]} and {kind[1]}, got {list(x.shape)} {x.dtype}")


def check_parameter(
    name: str, tensor: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype | None = None
) -> None:
    """Refuse a tensor that is given and is not contiguous of this shape (and dtype)."""
    if tensor is None:
        return
    if tensor.shape != shape or not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous {list(shape)}, got {list(tensor.shape)}")
    if dtype is not None and tensor.dtype != dtype:
        raise ValueError(f"{name} must be {dtype}, got {tensor.dtype}")


def check_layer(
    name: str,
    x: Tensor,
    bias: Tensor | None,
    constant: Tensor | None,
    *,
    kind: tuple[int, torch.dtype] | None = None,
) -> tuple[int, int, int]:
    """K, N and D of rows x [K, N, D], once all that every launcher of a layer is given has been checked.

    ``bias`` is [K, D], ``constant`` [K] float32; ``kind`` as in ``check_rows``.
    """
    check_rows(name, x, kind=kind)
    K, N, D = x.shape
    check_parameter("bias", bias, (K, D))
    check_parameter("constant", constant, (K,), torch.float32)
    return K, N, D


def check_precision(precision: str) -> None:
    """Refuse a precision that is none of ``PRECISIONS``."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")

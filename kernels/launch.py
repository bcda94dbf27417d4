"""What every launcher shares: the checks of its arguments, and where and how a kernel starts.

Launchers take tensors that are contiguous and refuse others: they never copy behind one's back. K stacked
layers are one launch: x is [K, N, D] and every parameter has a leading K. A launch covers the members with
the second axis of its grid.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
from torch import Tensor

#: How a float32 product may be computed: in float32, as three tf32 products with float32's accuracy, or in
#: tf32 with its 10 bits. Sums are always float32.
PRECISIONS = ("ieee", "tf32x3", "tf32")


@triton.jit  # type: ignore[untyped-decorator]
def _probe() -> None:
    pass


#: Whether Triton was imported under TRITON_INTERPRET=1.
INTERPRETED = not isinstance(_probe, triton.JITFunction)


def on_device_of(x: Tensor) -> AbstractContextManager[Any]:
    """A context in which a kernel launches on x's device: Triton launches on the current one."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def check_rows(name: str, x: Tensor, dims: int = 3) -> None:
    """Refuse rows that the kernels do not address: [K, N, D] (or [N, D], dims=2), float32 or bfloat16."""
    if x.dim() != dims or x.shape[-1] == 0 or not x.is_contiguous():
        shape = "[K, N, D]" if dims == 3 else "[N, D]"
        raise ValueError(
            f"{name} must be contiguous rows {shape} with D ≥ 1, got {list(x.shape)} of strides {x.stride()}"
        )
    if x.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"{name} must be float32 or bfloat16, got {x.dtype}")


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


def check_precision(precision: str) -> None:
    """Refuse a precision that is none of ``PRECISIONS``."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")

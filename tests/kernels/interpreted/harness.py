"""What the tests of kernels share: inputs amid NaN, outputs between guards, errors by norm, φ's slopes."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

#: Worst normwise relative error of a float32 result; the inverse's times κ. The interpreter computes tf32 in
#: float32; in compiled code it has its 10 bits, and what float32's accuracy is there ``tests/ptx`` says.
LIMIT = 2e-3 if "PTX_ARCHITECTURE" in os.environ else 2e-6

#: (2.6) and (2.9) at several α, and one that is neither. Where φ′ = 1, log φ′ vanishes and has only absolute
#: accuracy; none of these has that at x = 0, where a sum over small x would be made of nothing else.
FAMILIES = [
    (0.1, 0.9, 1.0),
    (0.01, 0.99, 1.0),
    (0.1, 1.0, 10.0),
    (0.2, 1.0, 0.3),
    (1e-3, 1.0, 1.0),
    (3.0, 0.2, 2.0),
]

#: Rows and features: small ones as likely as large ones, the largest of the specification included.
ROWS = st.one_of(st.integers(0, 20), st.integers(0, 300))
FEATURES = st.one_of(st.integers(1, 40), st.sampled_from([64, 128, 256, 257]), st.integers(1, 257))


def normwise(result: Tensor, expected: Tensor) -> float:
    """‖result − expected‖ / ‖expected‖ over all elements; NaN counts as infinite."""
    if result.numel() == 0:
        return 0.0
    error = (result.double() - expected).norm().item() / (expected.norm().item() or 1.0)
    return math.inf if math.isnan(error) else error


@contextmanager
def guarded(fill: float = math.nan) -> Iterator[None]:
    """Let torch.empty and empty_like give ``fill`` between two guards, which must be untouched at the end."""
    plain = torch.empty, torch.empty_like
    buffers: list[Tensor] = []

    def empty(*size: Any, dtype: torch.dtype | None = None, device: Any = None) -> Tensor:
        shape = size[0] if len(size) == 1 and not isinstance(size[0], int) else size
        count = math.prod(shape)
        buffer = torch.full((count + 256,), 77, dtype=dtype or torch.float32)
        junk = fill if buffer.is_floating_point() else torch.iinfo(buffer.dtype).max
        buffer[128 : 128 + count] = junk
        buffers.append(buffer)
        return buffer[128 : 128 + count].view(shape)

    def empty_like(x: Tensor, *, dtype: torch.dtype | None = None, **_: Any) -> Tensor:
        return empty(tuple(x.shape), dtype=dtype or x.dtype)

    torch.empty, torch.empty_like = empty, empty_like  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.empty, torch.empty_like = plain  # type: ignore[assignment]
    for buffer in buffers:
        guards = torch.cat([buffer[:128], buffer[-128:]])
        assert bool((guards == 77).all()), "a kernel wrote outside its output"


def amid_nan(x: Tensor | None) -> Any:
    """x in memory with NaN before and after it, so that what is read from outside shows."""
    if x is None:
        return None
    buffer = torch.full((x.numel() + 256,), 77, dtype=x.dtype)
    if x.is_floating_point():
        buffer.fill_(math.nan)
    buffer[128 : 128 + x.numel()] = x.reshape(-1)
    return buffer[128 : 128 + x.numel()].view(x.shape)


@st.composite
def slopes(draw: Any, D: int, none: bool = True) -> tuple[Any, Any]:
    """(slopes as a launcher takes them, the same in float64): None, three floats, a tensor [3] or [3, D]."""
    kinds = ["floats", "tensor", "per column"] + ["none"] * none
    kind = draw(st.sampled_from(kinds))
    floats = draw(st.sampled_from(FAMILIES))
    if kind == "none":
        return None, None
    if kind == "floats":
        return floats, floats
    tensor = torch.tensor(floats)
    if kind == "per column":
        generator = torch.Generator().manual_seed(D)
        tensor = tensor[:, None] * (0.8 + 0.45 * torch.rand(3, D, generator=generator))
    return amid_nan(tensor), tensor.double()


def slope_ratio(exact: Any) -> float:
    """(a + c)/a, the condition of φ⁻¹; 1 without an activation."""
    if exact is None:
        return 1.0
    ratio = (exact[0] + exact[1]) / exact[0]
    return float(ratio.max()) if isinstance(ratio, Tensor) else ratio


def random_lu(D: int, spread: float = 0.5, K: int | None = None) -> Tensor:
    """A packed matrix [D, D] or [K, D, D] of well-conditioned factors: log-diagonals within ± spread."""
    shape = (D, D) if K is None else (K, D, D)
    lu = torch.randn(shape) * (0.5 / math.sqrt(D))
    lu.diagonal(dim1=-2, dim2=-1).uniform_(-spread, spread)
    return lu

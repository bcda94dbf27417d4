"""What the stages of ``check.py`` share: where they run, problems to solve, and the rows they give."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lunet_fast.ops import reference

#: A line of the result: {"kind": "check" | "time" | "ceiling" | "note", …}.
Row = dict[str, Any]
Stage = Callable[["Place"], Iterator[Row]]

#: Worst normwise relative error by the arithmetic of the products. tf32 keeps 10 bits, bfloat16 7.
LIMITS = {
    "highest": 2e-6,
    "ieee": 2e-6,
    "tf32x3": 2e-6,
    "high": 1e-3,
    "tf32": 1e-3,
    "medium": 1e-2,
    "bf16": 1e-2,
}

FAMILY = (0.1, 0.9, 1.0)


@dataclass(frozen=True)
class Place:
    """Where a stage runs: on a device, in full or tiny sizes, with times taken or not, until a deadline."""

    device: torch.device
    tiny: bool
    measure: bool
    deadline: float
    share: tuple[int, int] = (0, 1)
    """Which of how many parts of the sizes."""

    @property
    def is_gpu(self) -> bool:
        return self.device.type == "cuda"

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def choose(self, full: Any, tiny: Any) -> Any:
        return tiny if self.tiny else full

    def mine(self, full: Sequence[Any], tiny: Sequence[Any]) -> Sequence[Any]:
        """This process's share of the full sizes, or all the tiny ones."""
        part, parts = self.share
        return tiny if self.tiny else full[part::parts]

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device)

    def milliseconds(self, run: Callable[[], object]) -> float | None:
        """Median of ``run`` with the L2 cache flushed before each, or None where nothing is measured."""
        if not self.measure:
            run()
            return None
        from triton.testing import do_bench

        return float(do_bench(run, warmup=10, rep=60, return_mode="median"))

    def captured(self, run: Callable[[], object]) -> Callable[[], object] | None:
        """``run`` as a CUDA graph, in whose replay the host has no part; None off a GPU, and where it cannot
        be captured, as it waits for the device."""
        if not self.is_gpu:
            return None
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                run()
        except RuntimeError:
            return None
        return graph.replay

    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """torch.compile for one shape; in tiny sizes without its slow code generator."""
        torch.compiler.reset()
        return torch.compile(function, dynamic=False, backend="eager" if self.tiny else "inductor")


@contextmanager
def matmul_precision(name: str) -> Iterator[None]:
    """Products in torch.get_float32_matmul_precision() = ``name``."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class Packed(NamedTuple):
    """A layer's matrix Pᵀ L U [K, D, D] and bias [K, D], and its κ₂."""

    lu: Tensor
    sign: Tensor
    bias: Tensor

    def weight(self) -> Tensor:
        """[K, D, D] in float64."""
        members = zip(self.lu.double(), self.sign.double(), strict=True)
        return torch.stack([reference.lu_weight(lu, sign, None) for lu, sign in members])

    def condition(self) -> float:
        """The worst member's."""
        return float(torch.linalg.cond(self.weight()).max())

    def logabsdet(self) -> Tensor:
        """[K] in float32."""
        return self.lu.double().diagonal(dim1=-2, dim2=-1).sum(-1).float()


def packed(place: Place, D: int, K: int = 1, spread: float = 0.5) -> Packed:
    """Random factors with log-diagonals within ± spread, of either sign."""
    lu = place.randn(K, D, D) * (0.5 / math.sqrt(D))
    lu.diagonal(dim1=-2, dim2=-1).uniform_(-spread, spread)
    sign = torch.where(place.randn(K, D) < 0, -1.0, 1.0)
    return Packed(lu, sign, 0.1 * place.randn(K, D))


def normwise(result: Tensor, expected: Tensor) -> float:
    """‖result − expected‖ / ‖expected‖ over all elements; NaN counts as infinite."""
    error = float((result.double() - expected).norm() / expected.norm().clamp_min(1e-300))
    return math.inf if math.isnan(error) else error


def check(what: str, error: float, limit: float) -> Row:
    return {"kind": "check", "what": what, "error": error, "limit": limit, "ok": bool(error <= limit)}


def holds(what: str, condition: bool) -> Row:
    """A check of something that is so or not."""
    return check(what, 0.0 if condition else math.inf, 0.0)


def compare(
    what: str, results: Mapping[str, Any], truth: Mapping[str, Tensor], limit: float
) -> Iterator[Row]:
    """A check for each result by the name that truth has it under."""
    for name, expected in truth.items():
        result = results[name]
        error = math.inf if result is None else normwise(result, expected)
        yield check(f"{what}: {name}", error, limit)

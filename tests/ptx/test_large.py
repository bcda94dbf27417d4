"""More numbers than 2³¹: the first and last programs of grids over 2³¹ numbers and more, against float64.

Tensors are address space that is reserved, and memory where something is written: the rows at both ends are
random numbers, the others zero. An address that wraps lies outside of its tensor, or holds another row's
numbers.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from benchmarks.gpu.common import FAMILY, Place, normwise, packed
from benchmarks.gpu.correctness import RATIO
from lunet_fast.ops import reference
from tests.ptx.launch import Run, executed

pytestmark = pytest.mark.ptx
pytest.importorskip("triton")

#: Programs at each end of a grid that run, and rows at each end that hold numbers.
ENDS, ROWS = 24, 200

#: Rows for each D: N·D is beyond 2³¹, and the last tile of rows is not full.
N_OF = {64: 2**25 + 5, 256: 2**23 + 77, 257: 2**23 + 77}

HERE = Place(torch.device("cpu"), tiny=False, measure=False, deadline=math.inf)

#: Numbers from which on a tensor is reserved, not filled.
LARGE = 1 << 20


def reserved(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Zeros that take memory where they are written."""
    size = math.prod(shape) * dtype.itemsize
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    return torch.frombuffer(mmap.mmap(-1, size, flags=flags), dtype=dtype).view(shape)


def rows(N: int, D: int) -> Tensor:
    """[N, D], random at both ends."""
    x = reserved(N, D)
    for part in (x[:ROWS], x[-ROWS:]):
        part.normal_()
    return x


def last(x: Tensor, D: int) -> Tensor:
    """Of [N, …] the rows of the last tile, which the last programs compute whatever the tile's size."""
    return x[-(N_OF[D] % 128) :]


@contextmanager
def large_outputs() -> Iterator[None]:
    """Let torch.empty and empty_like reserve what is large."""
    plain = torch.empty

    def empty(*size: Any, dtype: torch.dtype | None = None, **options: Any) -> Tensor:
        shape = size[0] if len(size) == 1 and not isinstance(size[0], int) else size
        if math.prod(shape) < LARGE:
            return plain(shape, dtype=dtype, **options)
        return reserved(*shape, dtype=dtype or torch.float32)

    def empty_like(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        return empty(tuple(x.shape), dtype=dtype or x.dtype)

    with mock.patch.object(torch, "empty", empty), mock.patch.object(torch, "empty_like", empty_like):
        yield


def ends(programs: int) -> Sequence[int]:
    if programs <= 3 * ENDS:
        return range(programs)
    middle = programs // 2
    return [*range(ENDS), middle, *range(programs - ENDS, programs)]


@contextmanager
def at_the_ends(architecture: int) -> Iterator[list[Run]]:
    """Execute the ends of grids, and let kernels that walk over tiles have 2¹⁶ programs."""
    many = "lunet_fast.kernels.tiles"
    with (
        mock.patch(f"{many}.programs", return_value=1 << 16),
        large_outputs(),
        executed(architecture, checked=False, exact_sums=True, programs=ends) as runs,
    ):
        yield runs


def assert_right(runs: list[Run], pairs: dict[str, tuple[Any, Tensor]], limit: float = 4e-6) -> None:
    assert runs
    assert [found for run in runs for found in run.findings.each()] == []
    assert {name: normwise(found, exact) for name, (found, exact) in pairs.items()} == {
        name: pytest.approx(0, abs=limit) for name in pairs
    }


architectures = pytest.mark.parametrize("architecture", [80, 90])


@architectures
@pytest.mark.parametrize(("D", "precision"), [(64, "ieee"), (256, "tf32x3"), (257, "tf32x3")])
def test_layer(D: int, precision: str, architecture: int) -> None:
    from lunet_fast.kernels.layer import layer_forward

    x, weight, bias = rows(N_OF[D], D), torch.randn(D, D) / math.sqrt(D), torch.randn(D)
    with at_the_ends(architecture) as runs:
        y, total, h = layer_forward(
            *(x[None], weight[None], bias[None], FAMILY), logabsdet=True, save=True, precision=precision
        )
    exact = last(x, D).double() @ weight.double().T + bias.double()
    y64, total64 = reference.leaky_softplus_and_logabsdet(exact, FAMILY)
    assert y is not None
    assert h is not None
    assert total is not None
    pairs = {"h": (last(h[0], D), exact), "y": (last(y[0], D), y64), "log-det": (last(total[0], D), total64)}
    assert_right(runs, pairs)


@architectures
def test_activation(architecture: int) -> None:
    from lunet_fast.kernels import activation

    D = 256
    x, g, ld = rows(N_OF[D], D), rows(N_OF[D], D), torch.randn(N_OF[D])
    with at_the_ends(architecture) as runs:
        y, total = activation.activation_forward(x, FAMILY, logabsdet=True)
        back, _ = activation.activation_inverse(y, FAMILY, logabsdet=True)
        gradient, _ = activation.activation_backward(g, ld, x, FAMILY)
    leaf = last(x, D).double().requires_grad_()
    y64, total64 = reference.leaky_softplus_and_logabsdet(leaf, FAMILY)
    exact = torch.autograd.grad([y64, total64], leaf, [last(g, D).double(), last(ld, D).double()])[0]
    pairs = {
        "y": (last(y, D), y64),
        "log-det": (last(total, D), total64),
        "gradient": (last(gradient, D), exact),
    }
    pairs = {name: (found, truth.detach()) for name, (found, truth) in pairs.items()}
    assert_right(runs, pairs)
    assert_right(runs, {"inverse": (last(back, D), leaf.detach())}, 4e-6 * RATIO)


@architectures
def test_gradient(architecture: int) -> None:
    """Of x and of W; that of W is a sum over all rows, most of them zero."""
    from lunet_fast.kernels import gradient

    D = 64
    g, x, weight = rows(N_OF[D], D), rows(N_OF[D], D), torch.randn(D, D) / math.sqrt(D)
    options = {"needs_x": True, "needs_weight": False, "needs_bias": False, "precision": "tf32x3"}
    with at_the_ends(architecture) as runs:
        by_x = gradient.layer_backward(
            *(g[None], None, x[None], x[None], weight[None], None, FAMILY), **options
        )[0]
        by_weight, by_bias = gradient.weight_and_bias_gradients(g[None], x[None], precision="tf32x3")
    h = last(x, D).double().requires_grad_()
    y = reference.leaky_softplus(h, FAMILY)
    exact = torch.autograd.grad(y, h, last(g, D).double())[0] @ weight.double()
    both = [torch.cat([part[:ROWS], part[-ROWS:]]).double() for part in (g, x)]
    assert by_x is not None
    pairs = {
        "x": (last(by_x[0], D), exact),
        "W": (by_weight[0], both[0].T @ both[1]),
        "b": (by_bias[0], both[0].sum(0)),
    }
    assert_right(runs, pairs, 1e-5)


@architectures
@pytest.mark.parametrize("D", [64, 256])
def test_inverse(D: int, architecture: int) -> None:
    """By substitution and, at D = 256, the product with W⁻¹; and its gradient."""
    from lunet_fast.kernels import inverse, inverse_gradient

    p, y, g = packed(HERE, D), rows(N_OF[D], D), rows(N_OF[D], D)
    with executed(architecture, checked=False, exact_sums=True):
        prepared = inverse.prepare_inverse(p.lu, p.sign, None, precision="tf32x3")
    ways = [prepared._replace(weight=None, condition=None)] + [prepared] * (prepared.weight is not None)
    weight = p.weight()[0]
    h64 = reference.leaky_softplus_inverse(last(y, D).double(), FAMILY)
    exact = torch.linalg.solve(weight, (h64 - p.bias[0].double()).T).T
    right64 = torch.linalg.solve(weight.T, last(g, D).double().T).T
    limit = 2e-6 * RATIO * p.condition()
    for way in ways:
        with at_the_ends(architecture) as runs:
            x, _, _ = inverse.layer_inverse(
                *(y[None], p.lu, way.inverses, p.bias, FAMILY),
                permutation=None,
                logabsdet=True,
                save=False,
                precision="tf32x3",
                constant=way.logabsdet,
                weight=way.weight,
                condition=way.condition,
            )
        assert_right(runs, {"x": (last(x[0], D), exact)}, limit)
    with at_the_ends(architecture) as runs:
        right, _, _ = inverse_gradient.layer_inverse_backward(
            *(g[None], None, y[None], p.lu, prepared.inverses, FAMILY), permutation=None, precision="tf32x3"
        )
    assert_right(runs, {"gradient of h": (last(right[0], D), right64)}, limit)


@architectures
def test_stack(architecture: int) -> None:
    from lunet_fast.kernels.stack import stack_forward

    D, M = 64, 2
    x, weights, biases = rows(N_OF[D], D), torch.randn(M, D, D) / math.sqrt(D), torch.randn(M, D)
    with at_the_ends(architecture) as runs:
        y, total = stack_forward(
            *(x, weights, biases, FAMILY), constant=None, logabsdet=True, precision="tf32x3"
        )
    h = last(x, D).double() @ weights[0].double().T + biases[0].double()
    middle, total64 = reference.leaky_softplus_and_logabsdet(h, FAMILY)
    exact = middle @ weights[1].double().T + biases[1].double()
    pairs: dict[str, tuple[Any, Tensor]] = {
        "y": (last(y, D), exact),
        "log-det": (None if total is None else last(total, D), total64),
    }
    assert_right(runs, pairs)

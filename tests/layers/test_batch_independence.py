"""A row's result on a CPU, alone, in a batch, in another order and beside spoilt rows; and twice.

Twice the same call, and rows that are spoilt beside it, leave a row its bits. Its place and the number of
rows do not: PyTorch's BLAS sums products at the edge of a tile in another order, one row goes another way
than many, and so do N ≤ D and N > D rows. There a row is the same to rounding, which is what is asserted.
The kernels' own rows have their bits whatever their place (``tests/kernels/interpreted/test_canaries.py``).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import truth
from torch import Tensor

from lunet_fast import LeakySoftplus, LUDense, LUNet, functional

#: Rows and features on either side of N = D, 10·D and every tile; odd, so that tiles have edges.
SIZES = [(1, 1), (7, 1), (3, 5), (67, 5), (31, 33), (67, 33), (65, 65), (700, 65), (67, 131), (140, 131)]
DTYPES = [torch.float32, torch.float64]
SLOPES = (0.1, 0.9, 1.0)

sizes = pytest.mark.parametrize(("rows", "d"), SIZES)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])


def layer_of(d: int, dtype: torch.dtype) -> LUDense:
    layer = LUDense(d, activation=LeakySoftplus(0.1), dtype=dtype)
    truth.randomise(layer, 1)
    return layer


def layer_function(name: str) -> Callable[[int, torch.dtype], Callable[[Tensor], tuple[Tensor, ...]]]:
    def build(d: int, dtype: torch.dtype) -> Callable[[Tensor], tuple[Tensor, ...]]:
        layer = layer_of(d, dtype)
        function = getattr(functional, name)
        return lambda x: function(x, layer.lu, layer.bias, sign=layer.sign, slopes=SLOPES)

    return build


def activation_function(name: str) -> Callable[[int, torch.dtype], Callable[[Tensor], tuple[Tensor, ...]]]:
    return lambda d, dtype: lambda x: getattr(functional, name)(x, SLOPES)


def net_method(name: str) -> Callable[[int, torch.dtype], Callable[[Tensor], tuple[Tensor, ...]]]:
    return lambda d, dtype: getattr(LUNet(d, 3, dtype=dtype), name)


FUNCTIONS: dict[str, Callable[[int, torch.dtype], Callable[[Tensor], Any]]] = {
    **{
        f"{name}{suffix}": activation_function(f"{name}{suffix}")
        for name in ("leaky_softplus", "leaky_softplus_inverse")
        for suffix in ("", "_and_logabsdet")
    },
    **{
        f"{name}{suffix}": layer_function(f"{name}{suffix}")
        for name in ("lu_dense", "lu_dense_inverse")
        for suffix in ("", "_and_logabsdet")
    },
    "net": net_method("forward_and_logabsdet"),
    "net inverse": net_method("inverse_and_logabsdet"),
}

functions = pytest.mark.parametrize("name", FUNCTIONS)


def results(function: Callable[[Tensor], Any], x: Tensor) -> list[Tensor]:
    """What the function gives, and the gradient by its rows of a sum that treats every row alike."""
    leaf = x.clone().requires_grad_()
    found = function(leaf)
    found = list(found) if isinstance(found, tuple) else [found]
    (gradient,) = torch.autograd.grad(sum((each * each).sum() for each in found), leaf)
    return [*(each.detach() for each in found), gradient]


def rounded_alike(mine: Tensor, other: Tensor, d: int) -> bool:
    """Within roundings of the row's own length, as sums of d terms have; a log-determinant is one number."""
    if mine.dim() == 1:
        mine, other = mine[:, None], other[:, None]
    length = other.abs().amax(-1, keepdim=True).clamp(min=1.0)
    # In the inverses, times what the layers' condition makes of it.
    return bool(((mine - other).abs() <= 200 * (d + 4) * torch.finfo(mine.dtype).eps * length).all())


@dtypes
@sizes
@functions
def test_the_same_bits_twice(name: str, rows: int, d: int, dtype: torch.dtype) -> None:
    function, x = FUNCTIONS[name](d, dtype), torch.randn(rows, d, dtype=dtype)
    for one, other in zip(results(function, x), results(function, x.clone()), strict=True):
        assert torch.equal(one, other)


@dtypes
@sizes
@functions
def test_spoilt_rows_leave_the_others_their_bits(name: str, rows: int, d: int, dtype: torch.dtype) -> None:
    if rows == 1:
        rows = 2  # one is to be left
    function, x = FUNCTIONS[name](d, dtype), torch.randn(rows, d, dtype=dtype)
    plain = results(function, x)
    good = torch.arange(rows) % 3 != 1
    for junk in (math.nan, 1e30, math.inf):
        spoilt = x.clone()
        spoilt[~good] = junk
        for mine, expected in zip(results(function, spoilt), plain, strict=True):
            assert torch.equal(mine[good], expected[good]), f"rows of {junk}"


@dtypes
@sizes
@functions
def test_order_and_number_of_rows_matter_to_rounding_alone(
    name: str, rows: int, d: int, dtype: torch.dtype
) -> None:
    function, x = FUNCTIONS[name](d, dtype), torch.randn(rows, d, dtype=dtype)
    plain = results(function, x)
    order = torch.randperm(rows)
    for mine, expected in zip(results(function, x[order]), plain, strict=True):
        assert rounded_alike(mine, expected[order], d), "permuted"
    for count in sorted({1, min(2, rows), min(d, rows), min(d + 1, rows), max(1, rows - 1)}):
        for mine, expected in zip(results(function, x[-count:]), plain, strict=True):
            assert rounded_alike(mine, expected[-count:], d), f"the last {count} of {rows}"
    twice = torch.cat((x, x))
    for mine, expected in zip(results(function, twice), plain, strict=True):
        assert rounded_alike(mine[:rows], expected, d), "with as many rows after it"
        assert rounded_alike(mine[rows:], expected, d), "with as many rows before it"


@dtypes
@pytest.mark.parametrize("d", [1, 7, 64])
def test_elementwise_functions_are_a_rounding_off(d: int, dtype: torch.dtype) -> None:
    """Nothing is summed, but PyTorch's exp of the last numbers, which fill no vector, is another one."""
    x = torch.randn(50, d, dtype=dtype)
    order = torch.randperm(50)
    for name in ("leaky_softplus", "leaky_softplus_inverse"):
        function = FUNCTIONS[name](d, dtype)
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(function(x[order]), function(x)[order], rtol=4 * eps, atol=4 * eps)


@dtypes
def test_gradients_of_parameters_are_the_sums_over_the_rows(dtype: torch.dtype) -> None:
    """Of a batch as of its parts; in another order to rounding."""
    x = torch.randn(90, 33, dtype=dtype)

    def gradients(rows: Tensor) -> list[Tensor]:
        layer = layer_of(33, dtype)
        y, logabsdet = layer.forward_and_logabsdet(rows)
        (y.square().sum() + logabsdet.sum()).backward()
        return [each.grad for each in layer.parameters()]

    whole = gradients(x)
    limit = 1e-4 if dtype == torch.float32 else 1e-12
    parts = [sum(pair) for pair in zip(gradients(x[:20]), gradients(x[20:]), strict=True)]
    for other in (parts, gradients(x[torch.randperm(90)])):
        for mine, expected in zip(other, whole, strict=True):
            assert float((mine - expected).norm()) <= limit * float(expected.norm())
    for mine, expected in zip(gradients(x), whole, strict=True):
        assert torch.equal(mine, expected)

"""What ``FlopCounterMode`` counts of a layer: what it counts of ``nn.Linear``, and the forming of L U."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lunet_fast import LeakySoftplus, LUDense, LUNet, functional, reference
from lunet_fast.ops.values import Matrix

D = 24
FORM = 2 * D**3 // 3


def counted(call: Callable[[], Tensor]) -> tuple[Tensor, int]:
    with FlopCounterMode(display=False) as counter:
        result = call()
    return result, counter.get_total_flops()


def both_ways(call: Callable[[Tensor], Tensor], rows: int, *, x_wanted: bool = True) -> tuple[int, int]:
    """Counts of a call on so many rows and of its backward."""
    x = torch.randn(rows, D, requires_grad=x_wanted)
    y, forward = counted(lambda: call(x))
    _, backward = counted(lambda: y.sum().backward())  # type: ignore[func-returns-value]
    return forward, backward


@pytest.mark.parametrize("method", ["forward", "inverse", "forward_and_logabsdet", "inverse_and_logabsdet"])
@pytest.mark.parametrize("rows", [1, D, D + 1, 200])
def test_a_layer_counts_as_a_linear_one(method: str, rows: int) -> None:
    layer = LUDense(D, activation=LeakySoftplus(0.3))

    def call(x: Tensor) -> Tensor:
        found = getattr(layer, method)(x)
        return found if isinstance(found, Tensor) else found[0] + found[1].unsqueeze(-1)

    formed = FORM if rows > D else 0
    forward, backward = both_ways(nn.Linear(D, D), rows)
    assert forward == 2 * rows * D * D
    assert both_ways(call, rows) == (forward + formed, backward + 2 * formed)
    with torch.no_grad():
        assert counted(lambda: call(torch.randn(rows, D)))[1] == forward + formed


def test_gradients_that_nobody_wants_are_not_counted() -> None:
    linear, layer = nn.Linear(D, D), LUDense(D)
    assert both_ways(layer, 10, x_wanted=False) == both_ways(linear, 10, x_wanted=False)
    for module in (linear, layer):
        module.requires_grad_(False)
    assert both_ways(layer, 10) == both_ways(linear, 10)
    # That of the inverse's parameters comes by way of that of its argument.
    layer.requires_grad_(True)
    assert both_ways(layer.inverse, 10, x_wanted=False) == both_ways(layer.inverse, 10)


@pytest.mark.parametrize("method", ["forward", "inverse"])
def test_nets_and_exported_programs(method: str) -> None:
    net = LUNet(D, 3, permutation="random")
    x = torch.randn(10, D)
    expected = 3 * 2 * 10 * D * D
    assert both_ways(getattr(net, method), 10) == (expected, 2 * expected)

    class Call(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor) -> Tensor:
            return getattr(self.net, method)(x)

    program = torch.export.export(Call(), (x,)).module()
    assert counted(lambda: program(x))[1] == expected


@pytest.mark.parametrize("inverse", [False, True])
def test_nets_in_one_operation_and_stacks(inverse: bool) -> None:
    members = [LUDense(D) for _ in range(3)]
    lu = torch.stack([m.lu for m in members]).detach().requires_grad_()
    expected = 3 * 2 * 10 * D * D

    def net(x: Tensor) -> Tensor:
        phi = reference.family((0.1, 0.9, 1.0))
        return functional.net(x, Matrix(lu), phi, inverse=inverse, logabsdet=False)[0]

    # Backward computes the layers again, of which nothing was kept.
    assert both_ways(net, 10) == (expected, 3 * expected)
    stack = functional.lu_dense_inverse if inverse else functional.lu_dense
    stacked = torch.randn(3, 10, D)
    assert counted(lambda: stack(stacked, lu))[1] == expected

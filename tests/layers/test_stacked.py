"""Stacked layers, lu [K, D, D], against the same layers one by one in float64; vmap comes out as the same."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.func import functional_call, stack_module_state, vmap

from lunet_fast import LeakySoftplus, LUDense, LUNet, functional
from lunet_fast.ops import reference

NAMES = ["lu_dense", "lu_dense_and_logabsdet", "lu_dense_inverse", "lu_dense_inverse_and_logabsdet"]
SLOPES = {
    "affine": None,
    "fixed": (0.1, 0.9, 1.0),
    "learnt": torch.tensor([0.2, 1.0, 1.5], dtype=torch.float64),
}


def stack(members: int, features: int, rows: int) -> dict[str, Tensor]:
    """x, lu, bias (all to be differentiated) and sign of K random, well-conditioned layers."""
    tensors = {
        "x": torch.randn(members, rows, features, dtype=torch.float64),
        "lu": torch.randn(members, features, features, dtype=torch.float64) * 0.5 / features**0.5,
        "bias": torch.randn(members, features, dtype=torch.float64),
    }
    sign = torch.randint(0, 2, (members, features)).double() * 2 - 1
    return {**{name: t.requires_grad_() for name, t in tensors.items()}, "sign": sign}


def results(found: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return found if isinstance(found, tuple) else (found,)


def one_by_one(name: str, s: dict[str, Tensor], slopes: object) -> tuple[Tensor, ...]:
    call = getattr(reference, name)
    each = [
        results(call(s["x"][k], s["lu"][k], s["bias"][k], sign=s["sign"][k], slopes=slopes))
        for k in range(len(s["lu"]))
    ]
    return tuple(torch.stack(parts) for parts in zip(*each, strict=True))


def gradients(outputs: tuple[Tensor, ...], inputs: list[Tensor]) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(7)
    loss = sum((t * torch.randn(t.shape, generator=generator, dtype=t.dtype)).sum() for t in outputs)
    return torch.autograd.grad(loss, inputs)


def agree(found: tuple[Tensor, ...], truth: tuple[Tensor, ...]) -> None:
    for a, b in zip(found, truth, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", SLOPES)
@pytest.mark.parametrize("name", NAMES)
@given(members=st.integers(1, 4), features=st.integers(1, 9), rows=st.integers(1, 12))
def test_values_and_gradients(name: str, kind: str, members: int, features: int, rows: int) -> None:
    slopes = SLOPES[kind]
    inputs_of = stack(members, features, rows)
    inputs = [inputs_of[key] for key in ("x", "lu", "bias")]
    if isinstance(slopes, Tensor):
        slopes = slopes.clone().requires_grad_()
        inputs.append(slopes)
    call = getattr(functional, name)

    def single(x: Tensor, lu: Tensor, bias: Tensor, sign: Tensor) -> Tensor | tuple[Tensor, ...]:
        return call(x, lu, bias, sign=sign, slopes=slopes)

    arguments = [inputs_of[key] for key in ("x", "lu", "bias", "sign")]
    native = results(single(*arguments))
    mapped = results(vmap(single)(*arguments))
    truth = one_by_one(name, inputs_of, slopes)
    true_gradients = gradients(truth, inputs)
    for found in (native, mapped):
        agree(found, truth)
        agree(gradients(found, inputs), true_gradients)


@pytest.mark.parametrize("name", NAMES[1::2])
def test_second_derivatives(name: str) -> None:
    s = stack(2, 3, 2)

    def pair(x: Tensor, lu: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        return getattr(functional, name)(x, lu, bias, sign=s["sign"], slopes=SLOPES["fixed"])

    assert torch.autograd.gradgradcheck(pair, (s["x"], s["lu"], s["bias"]))


def test_batch_of_x_alone_keeps_what_backward_needs() -> None:
    """A gradient taken outside vmap reaches x and the parameters of a layer called inside it."""
    layer = LUDense(5, activation=LeakySoftplus(0.1)).double()
    x = torch.randn(4, 7, 5, dtype=torch.float64, requires_grad=True)
    inputs = [x, layer.lu, layer.bias]
    for method in ("forward", "forward_and_logabsdet", "inverse", "inverse_and_logabsdet"):
        call = getattr(layer, method)
        mapped, plain = results(vmap(call)(x)), results(call(x))
        agree(mapped, plain)
        agree(gradients(mapped, inputs), gradients(plain, inputs))


def test_ensemble_of_networks_by_stack_module_state() -> None:
    nets = [LUNet(6, 3).double() for _ in range(3)]
    for net in nets:
        for layer in net.layers:
            torch.nn.init.normal_(layer.lu, std=0.3)
    parameters, buffers = stack_module_state(nets)
    x = torch.randn(11, 6, dtype=torch.float64)
    found = vmap(lambda p, b: functional_call(nets[0], (p, b), (x,)))(parameters, buffers)
    torch.testing.assert_close(found, torch.stack([net(x) for net in nets]))


def test_wrong_shapes_are_named() -> None:
    lu = torch.zeros(3, 4, 4)
    with pytest.raises(ValueError, match=r"x must be \[K, \.\.\., D\].*K = 3.*\(2, 5, 4\)"):
        functional.lu_dense(torch.zeros(2, 5, 4), lu)
    with pytest.raises(ValueError, match="permutation must be None for stacked layers"):
        functional.lu_dense(torch.zeros(3, 5, 4), lu, permutation=torch.arange(4))
    with pytest.raises(ValueError, match="lu must be square"):
        functional.lu_dense(torch.zeros(3, 5, 4), torch.zeros(3, 4, 5))

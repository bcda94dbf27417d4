"""Nets without gradients on kernels: what a net keeps of its making never outlives it."""

from __future__ import annotations

import copy
import os
import pickle
import random
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lunet_fast import GeneralizedLeakySoftplus, LeakySoftplus, LUNet, MonotoneSpline, cached
from lunet_fast.kernels import launch
from lunet_fast.ops import dispatch

D, N = 6, 10


@pytest.fixture(autouse=True)
def on_kernels() -> Iterator[None]:
    random.seed(torch.randint(1 << 30, ()).item())
    before = dispatch.get_backend()
    dispatch.set_backend("triton")
    yield
    dispatch.set_backend(before)


ACTIVATIONS: dict[str, Callable[[], Any]] = {
    "fixed": lambda: LeakySoftplus(0.2),
    "generalized": lambda: GeneralizedLeakySoftplus(2.0, 0.3),
    "learnt": lambda: LeakySoftplus(0.2, learnable=True),
    "spline": lambda: MonotoneSpline(D, 4),
}


def made(activation: str = "fixed", **options: Any) -> LUNet:
    net = LUNet(D, 3, ACTIVATIONS[activation](), signs="random", **options)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return net


def assert_right(net: LUNet, x: Tensor) -> None:
    """Each method gives what the layers one by one give, on PyTorch."""
    for inverse in (False, True):
        y, total = (net.inverse_and_logabsdet if inverse else net.forward_and_logabsdet)(x)
        alone = (net.inverse if inverse else net)(x)
        dispatch.set_backend("reference")
        expected, expected_total = copy.deepcopy(net)._run_each(x, inverse=inverse, logabsdet=True)
        dispatch.set_backend("triton")
        assert y.dtype == x.dtype
        limit = {"rtol": 2e-4, "atol": 2e-4} if x.dtype == torch.float32 else {"rtol": 0.1, "atol": 0.1}
        torch.testing.assert_close(y, expected, **limit)
        torch.testing.assert_close(alone, expected, **limit)
        torch.testing.assert_close(total, expected_total, check_dtype=False, **limit)


def with_data(net: LUNet) -> None:
    """What PyTorch does not count."""
    for parameter in net.parameters():
        parameter.data.mul_(0.8)


def in_place(net: LUNet) -> None:
    for parameter in net.parameters():
        parameter.mul_(0.8)


def other_memory(net: LUNet) -> None:
    for parameter in net.parameters():
        parameter.data = parameter.data * 0.8


def other_parameter(net: LUNet) -> None:
    net.layers[1].lu = nn.Parameter(0.7 * net.layers[1].lu.detach())  # type: ignore[operator, union-attr]


def other_signs(net: LUNet) -> None:
    net.layers[0].sign.neg_()  # type: ignore[operator, union-attr]


def other_activation(net: LUNet) -> None:
    net.layers[0].activation = LeakySoftplus(0.5)


def other_activations(net: LUNet) -> None:
    for layer in net.layers[:-1]:
        layer.activation = LeakySoftplus(0.5)


def another_state(net: LUNet) -> None:
    net.load_state_dict({name: t if "sign" in name else 0.9 * t for name, t in net.state_dict().items()})


def permuted(net: LUNet) -> None:
    net.layers[0].permutation = torch.arange(D - 1, -1, -1)  # type: ignore[assignment]


def hooked(net: LUNet) -> None:
    net.layers[1].register_forward_hook(lambda layer, args, y: y + 1.0)


def without_a_layer(net: LUNet) -> None:
    if len(net.layers) > 2:
        del net.layers[1]


def trained(net: LUNet) -> None:
    with torch.enable_grad():
        net.forward_and_logabsdet(torch.randn(4, D))[1].sum().backward()
    torch.optim.SGD([p for p in net.parameters() if p.grad is not None], lr=0.1).step()


CHANGES = [
    in_place,
    other_memory,
    other_parameter,
    other_signs,
    other_activation,
    other_activations,
    another_state,
    permuted,
    without_a_layer,
    trained,
]


@pytest.mark.parametrize(("activation", "within"), [("fixed", False), ("fixed", True), ("learnt", True)])
def test_no_change_is_missed(activation: str, within: bool) -> None:
    """Within ``cached`` none that PyTorch counts."""
    changes = random.sample(CHANGES, 3) if within else [with_data, *random.sample(CHANGES, 3)]
    net, x = made(activation), torch.randn(N, D)
    with torch.no_grad(), cached(net) if within else nullcontext():
        assert_right(net, x)
        for change in changes:
            change(net)
            assert_right(net, x)


@pytest.mark.parametrize("activation", ["generalized", "spline"])
def test_other_activations(activation: str) -> None:
    net, x = made(activation), torch.randn(N, D)
    with torch.no_grad():
        assert_right(net, x)
        with cached(net):
            assert_right(net, x)


@pytest.mark.parametrize("within", [nullcontext, cached])
def test_hooks_are_called(within: Any) -> None:
    net, x = made(), torch.randn(N, D)
    with torch.no_grad(), within(net) if within is cached else nullcontext():
        before = net(x)
        hooked(net)
        assert not torch.equal(net(x), before)


@pytest.mark.parametrize("shape", [(D,), (2, 3, D)])
def test_any_leading_shape(shape: tuple[int, ...]) -> None:
    net, x = made(), torch.randn(shape)
    with torch.no_grad():
        assert_right(net, x)
        assert net(x).shape == shape
        assert net.forward_and_logabsdet(x)[1].shape == shape[:-1]


def test_rows_of_another_kind_have_a_plan_of_their_own() -> None:
    net, x = made(), torch.randn(N, D)
    with torch.no_grad():
        assert_right(net, x)
        assert_right(net, torch.randn(D, N).mT)
        net.to(torch.bfloat16)
        assert_right(net, x.bfloat16())
        net.to(torch.float32)
        assert_right(net, x)
        with pytest.raises(ValueError, match="features"):
            net(torch.randn(N, D + 1))
        with pytest.raises(TypeError, match="float16"):
            net(x.half())


def test_plans_are_kept_and_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = made(), torch.randn(N, D)
    with torch.no_grad():
        net(x)
        (plan,) = net._plans.values()
        monkeypatch.setattr(LUNet, "_as_one", None)  # what a plan is made with
        in_place(net)
        net(x)
        assert list(net._plans.values()) == [plan]
    assert copy.deepcopy(net)._plans == {}
    assert pickle.loads(pickle.dumps(net))._plans == {}


def test_gradients_are_recorded() -> None:
    net, x = made(), torch.randn(N, D)
    with torch.no_grad():
        net(x)
    assert net(x).requires_grad
    with cached(net):
        assert net(x).requires_grad
        assert net.requires_grad_(False)(x.requires_grad_()).requires_grad


@pytest.mark.skipif("PTX_ARCHITECTURE" in os.environ, reason="what was compiled is started past this")
def test_launches_within_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    """One, once the matrices are there; two outside."""
    names = []
    real = launch.launch

    def watched(kernel: Any, *args: Any, **named: Any) -> Any:
        names.append(getattr(kernel, "__name__", None) or kernel.kernel.__name__)
        return real(kernel, *args, **named)

    monkeypatch.setattr(launch, "launch", watched)
    net, x = made(), torch.randn(N, D)
    with torch.no_grad():
        for context, wanted in ((nullcontext(), 2), (cached(net), 1)):
            with context:
                net(x), net.inverse(x)
                names.clear()
                net(x), net.inverse(x)
                assert len(names) == 2 * wanted, names

"""Nets and layers without gradients on kernels: what one keeps of its making never outlives it."""

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

from lunet_fast import GeneralizedLeakySoftplus, LeakySoftplus, LUDense, LUNet, MonotoneSpline, cached
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


Module = LUNet | LUDense


def made(activation: str = "fixed", *, layer: bool = False) -> Any:
    """A net of three layers, or a layer."""
    phi = ACTIVATIONS[activation]()
    module: Module = LUDense(D, activation=phi) if layer else LUNet(D, 3, phi, signs="random")
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return module


def layers_of(module: Module) -> list[Any]:
    return [module] if isinstance(module, LUDense) else list(module.layers)


def assert_right(module: Module, x: Tensor) -> None:
    """Each method gives what it gives on PyTorch, of a net what its layers one by one give."""
    for inverse in (False, True):
        y, total = (module.inverse_and_logabsdet if inverse else module.forward_and_logabsdet)(x)
        alone = (module.inverse if inverse else module)(x)
        dispatch.set_backend("reference")
        other = copy.deepcopy(module)
        of = other._run_each if isinstance(other, LUNet) else other._run
        expected, expected_total = of(x, inverse=inverse, logabsdet=True)
        dispatch.set_backend("triton")
        assert y.dtype == x.dtype
        limit = {"rtol": 2e-4, "atol": 2e-4} if x.dtype == torch.float32 else {"rtol": 0.1, "atol": 0.1}
        torch.testing.assert_close(y, expected, **limit)
        torch.testing.assert_close(alone, expected, **limit)
        torch.testing.assert_close(total, expected_total, check_dtype=False, **limit)


def with_data(module: Module) -> None:
    """What PyTorch does not count."""
    for parameter in module.parameters():
        parameter.data.mul_(0.8)


def transposed(module: Module) -> None:
    """As little, and the memory stays where it is."""
    lu = layers_of(module)[0].lu
    lu.data = lu.data.mT


def in_place(module: Module) -> None:
    for parameter in module.parameters():
        parameter.mul_(0.8)


def other_memory(module: Module) -> None:
    for parameter in module.parameters():
        parameter.data = parameter.data * 0.8


def other_parameter(module: Module) -> None:
    layer = layers_of(module)[-1]
    layer.lu = nn.Parameter(0.7 * layer.lu.detach())


def other_signs(module: Module) -> None:
    layers_of(module)[0].sign.neg_()


def other_memory_of_signs(module: Module) -> None:
    layer = layers_of(module)[0]
    layer._structure()[0].data = -layer.sign
    layer._check_structure()


def other_activation(module: Module) -> None:
    layers_of(module)[0].activation = LeakySoftplus(0.5)


def other_activations(module: Module) -> None:
    for layer in layers_of(module):
        if layer.activation is not None:
            layer.activation = LeakySoftplus(0.5)


def no_activation(module: Module) -> None:
    layers_of(module)[0].activation = None


def replaced_slopes(module: Module) -> None:
    layers_of(module)[0].activation = LeakySoftplus(0.4)
    with torch.no_grad():
        module(torch.randn(N, D))
    layers_of(module)[0].activation.slopes = lambda: (0.7, 0.3, 1.0)


def another_state(module: Module) -> None:
    fixed = ("sign", "permutation")
    state = module.state_dict()
    module.load_state_dict({n: t if n.endswith(fixed) else 0.9 * t for n, t in state.items()})


def permuted(module: Module) -> None:
    layers_of(module)[0].permutation = torch.arange(D - 1, -1, -1)


def permuted_in_place(module: Module) -> None:
    layer = layers_of(module)[0]
    layer.permutation = torch.arange(D - 1, -1, -1)
    with torch.no_grad():
        module(torch.randn(N, D))
        layer.permutation.copy_(torch.randperm(D))


def hooked(module: Module) -> None:
    layers_of(module)[0].activation.register_forward_hook(lambda phi, args, y: y + 1.0)


def without_a_layer(module: Module) -> None:
    if isinstance(module, LUNet) and len(module.layers) > 2:
        del module.layers[1]


def trained(module: Module) -> None:
    with torch.enable_grad():
        module.forward_and_logabsdet(torch.randn(4, D))[1].sum().backward()
    torch.optim.SGD([p for p in module.parameters() if p.grad is not None], lr=0.1).step()


CHANGES = [
    in_place,
    other_memory,
    other_parameter,
    other_signs,
    other_memory_of_signs,
    other_activation,
    other_activations,
    no_activation,
    replaced_slopes,
    another_state,
    permuted,
    permuted_in_place,
    without_a_layer,
    trained,
]

either = pytest.mark.parametrize("layer", [False, True], ids=["net", "layer"])


@either
@pytest.mark.parametrize(("activation", "within"), [("fixed", False), ("fixed", True), ("learnt", True)])
def test_no_change_is_missed(activation: str, within: bool, layer: bool) -> None:
    """Within ``cached`` none that PyTorch counts."""
    changes = random.sample(CHANGES, 3)
    if not within:
        changes = [with_data, transposed, *changes]
    module, many, few = made(activation, layer=layer), torch.randn(N, D), torch.randn(3, D)
    with torch.no_grad(), cached(module) if within else nullcontext():
        assert_right(module, many)
        for change in changes:
            change(module)
            assert_right(module, random.choice([few, many]))


@either
@pytest.mark.parametrize("activation", ["generalized", "spline"])
def test_other_activations(activation: str, layer: bool) -> None:
    net, x = made(activation, layer=layer), torch.randn(N, D)
    with torch.no_grad():
        assert_right(net, x)
        with cached(net):
            assert_right(net, x)


def test_a_layer_that_is_inverted_by_its_inverse_matrix() -> None:
    """In ``cached`` from D = 17 on, where the condition allows it; after a write, the new condition does."""
    D = 18
    layer, y = LUDense(D, activation=LeakySoftplus(0.3)), torch.randn(N, D)

    def prepared() -> Any:
        assert layer._kept is not None
        return next(value[1][1] for name, (value, _) in layer._kept.values.items() if name[0] is True)

    with torch.no_grad(), cached(layer):
        assert_right(layer, y)
        assert prepared().weight is not None
        assert prepared().inverses is None
        layer.lu.copy_(torch.full((D, D), -1.0).triu(1))  # 2^D in U⁻¹
        assert layer.inverse(y).isfinite().all()
        assert prepared().weight is None
        assert prepared().inverses is not None


@either
@pytest.mark.parametrize("within", [nullcontext, cached])
def test_hooks_are_called(within: Any, layer: bool) -> None:
    net, x = made(layer=layer), torch.randn(N, D)
    with torch.no_grad(), within(net) if within is cached else nullcontext():
        before = net(x)
        hooked(net)
        assert not torch.equal(net(x), before)


@either
@pytest.mark.parametrize("shape", [(D,), (2, 4, D)])
def test_any_leading_shape(shape: tuple[int, ...], layer: bool) -> None:
    net, x = made(layer=layer), torch.randn(shape)
    with torch.no_grad():
        assert_right(net, x)
        assert net(x).shape == shape
        assert net.forward_and_logabsdet(x)[1].shape == shape[:-1]


@either
def test_rows_of_another_kind_have_a_plan_of_their_own(layer: bool) -> None:
    net, x = made(layer=layer), torch.randn(N, D)
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


@either
def test_plans_are_kept_and_not_copied(monkeypatch: pytest.MonkeyPatch, layer: bool) -> None:
    module, x = made(layer=layer), torch.randn(N, D)
    with torch.no_grad():
        module(x)
        ((plan, _),) = module._plans.values.values()
        monkeypatch.setattr(type(module), "_prepared", None)  # what a plan is made by
        in_place(module)
        module(x)
        assert [found for found, _ in module._plans.values.values()] == [plan]
    assert copy.deepcopy(module)._plans is None
    assert pickle.loads(pickle.dumps(module))._plans is None


@either
def test_gradients_are_recorded(layer: bool) -> None:
    net, x = made(layer=layer), torch.randn(N, D)
    with torch.no_grad():
        net(x)
    assert net(x).requires_grad
    with cached(net):
        assert net(x).requires_grad
        assert net.requires_grad_(False)(x.requires_grad_()).requires_grad


@pytest.mark.skipif("PTX_ARCHITECTURE" in os.environ, reason="what was compiled is started past this")
@either
def test_launches_within_cached(monkeypatch: pytest.MonkeyPatch, layer: bool) -> None:
    """One, once the matrices are there; two outside."""
    names = []
    real = launch.launch

    def watched(kernel: Any, *args: Any, **named: Any) -> Any:
        names.append(getattr(kernel, "__name__", None) or kernel.kernel.__name__)
        return real(kernel, *args, **named)

    monkeypatch.setattr(launch, "launch", watched)
    net, x = made(layer=layer), torch.randn(N, D)
    with torch.no_grad():
        for context, wanted in ((nullcontext(), 2), (cached(net), 1)):
            with context:
                net(x), net.inverse(x)
                names.clear()
                net(x), net.inverse(x)
                assert len(names) == 2 * wanted, names

"""``cached``: the same results, kept while the parameters are the same, and never a moment longer."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor, nn

from lunet_fast import (
    BijectiveActivation,
    ConditionalLUNet,
    LeakySoftplus,
    LUDense,
    LUFlow,
    LUNet,
    MonotoneSpline,
    NormalMixture,
    cached,
)

D = 6

ACTIVATIONS: dict[str, Callable[[], BijectiveActivation]] = {
    "leaky": lambda: LeakySoftplus(0.3),
    "learnt": lambda: LeakySoftplus(0.3, learnable=True, features=D),
    "spline": lambda: MonotoneSpline(D, 5),
}


def made(activation: str = "spline", layers: int = 3, **options: object) -> LUNet:
    torch.manual_seed(1)
    net = LUNet(D, layers, ACTIVATIONS[activation](), input=MonotoneSpline(D, 4), **options)  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return net


def results(net: nn.Module, x: Tensor) -> list[Tensor]:
    """What the net gives, both ways, with and without log-determinants."""
    y, forward = net.forward_and_logabsdet(x)  # type: ignore[operator]
    back, inverse = net.inverse_and_logabsdet(x)  # type: ignore[operator]
    return [net(x), y, forward, net.inverse(x), back, inverse]  # type: ignore[operator]


def assert_as_outside(net: nn.Module, x: Tensor) -> None:
    """Within ``cached`` the net gives what a copy of it gives outside."""
    with torch.no_grad():
        for mine, other in zip(results(net, x), results(copy.deepcopy(net), x), strict=True):
            assert mine.shape == other.shape
            torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(D,), (1, D), (40, D), (2, 3, D), (0, D)])
def test_results_are_those_of_outside(activation: str, shape: tuple[int, ...]) -> None:
    net, x = made(activation, permutation="random", signs="random"), torch.randn(shape)
    with cached(net):
        assert_as_outside(net, x)
        assert_as_outside(net, x)


def test_matrices_are_formed_once() -> None:
    net, x = made(), torch.randn(3, D)
    with torch.no_grad(), cached(net):
        net(x), net.inverse(x)
        kept = net.layers[0]._kept.values["weight"][0]  # type: ignore[union-attr]
        net(x), net.inverse(x)
        assert net.layers[0]._kept.values["weight"][0] is kept  # type: ignore[union-attr]
    assert net.layers[0]._kept is None


def step(net: LUNet) -> None:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    net.forward_and_logabsdet(torch.randn(8, D))[1].sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def changed(net: LUNet) -> dict[str, Tensor]:
    """Another state of the same structure."""
    learnt = {name for name, _ in net.named_parameters()}
    return {
        name: value + 0.1 * torch.randn_like(value) if name in learnt else value
        for name, value in net.state_dict().items()
    }


def other_parameter(net: LUNet) -> None:
    layer = net.layers[1]
    layer.lu = nn.Parameter(layer.lu.detach() * 0.5)  # type: ignore[union-attr, operator]


def other_memory(net: LUNet) -> None:
    for parameter in net.parameters():
        parameter.data = parameter.data * 0.9


def other_signs(net: LUNet) -> None:
    net.layers[0].sign.neg_()  # type: ignore[union-attr, operator]


def scaled(net: LUNet) -> None:
    with torch.no_grad():
        torch._foreach_mul_(list(net.parameters()), 0.8)


def one_entry(net: LUNet) -> None:
    with torch.no_grad():
        net.layers[2].lu[3, 1] += 0.5  # type: ignore[union-attr, index]


def wider_spline(net: LUNet) -> None:
    net.input.fit_range(3.0 * torch.randn(100, D))  # type: ignore[union-attr, operator]


CHANGES: dict[str, Callable[[LUNet], object]] = {
    "optimiser": step,
    "load_state_dict": lambda net: net.load_state_dict(changed(net)),
    "load_state_dict, assigned": lambda net: net.load_state_dict(changed(net), assign=True),
    "parameter": other_parameter,
    "data": other_memory,
    "signs": other_signs,
    "foreach": scaled,
    "entry": one_entry,
    "range": wider_spline,
    "reset": lambda net: net.reset_parameters(),
    "whiten": lambda net: net.whiten(torch.randn(50, D)),
    "double and back": lambda net: net.double().float(),
}


@given(changes=st.lists(st.sampled_from(sorted(CHANGES)), min_size=1, max_size=6), seed=st.integers(0, 99))
def test_no_change_is_missed(changes: list[str], seed: int) -> None:
    net = made("spline", permutation="reverse")
    torch.manual_seed(seed)
    x = torch.randn(7, D)
    with cached(net):
        assert_as_outside(net, x)
        for change in changes:
            CHANGES[change](net)
            assert_as_outside(net, x)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_of_parameters_are_those_of_outside(activation: str) -> None:
    net, other = made(activation), made(activation)
    x = torch.randn(9, D)
    with cached(net):
        with torch.no_grad():
            net(x)
        net.forward_and_logabsdet(x)[1].sum().backward()
    other.forward_and_logabsdet(x)[1].sum().backward()
    for mine, theirs in zip(net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)


@pytest.mark.parametrize("way", ["forward_and_logabsdet", "inverse_and_logabsdet"])
def test_a_frozen_net_passes_gradients_of_x(way: str) -> None:
    net = made().requires_grad_(False)
    x = torch.randn(5, D)

    def gradient() -> Tensor:
        rows = x.clone().requires_grad_()
        y, logabsdet = getattr(net, way)(rows)
        (y.square().sum() + logabsdet.sum()).backward()
        assert rows.grad is not None
        return rows.grad

    outside = gradient()
    with cached(net):
        with torch.inference_mode():
            getattr(net, way)(x)  # what is kept must be of use outside of inference mode
        torch.testing.assert_close(gradient(), outside, rtol=1e-4, atol=1e-4)


def test_transforms_and_float16_do_what_they_do_outside() -> None:
    net, x = made("learnt"), torch.randn(4, D)
    outside = torch.func.vmap(torch.func.jacrev(net))(x)
    half = made("leaky").to(torch.bfloat16)
    low = half.inverse(x.bfloat16())
    with cached(net), cached(half), torch.no_grad():
        net(x)
        torch.testing.assert_close(torch.func.vmap(torch.func.jacrev(net))(x), outside)
        assert torch.equal(half.inverse(x.bfloat16()), low)
        with pytest.raises(ValueError, match="features"):
            net(torch.randn(4, D + 1))


def test_a_bad_inverse_is_not_used() -> None:
    layer = LUDense(D)
    with torch.no_grad():
        layer.lu.copy_(torch.diag(torch.linspace(-12, 12, D)) + torch.full((D, D), 3.0).tril(-1))
        y = torch.randn(3, D)
        outside = layer.inverse(y)
        with cached(layer):
            assert torch.equal(layer.inverse(y), outside)


@pytest.mark.parametrize(("features", "noise"), [(64, 0.2), (256, 1.0), (800, 0.2)])
def test_what_is_kept_of_wide_layers_is_as_accurate_as_substitution(features: int, noise: float) -> None:
    """κ₁(L)·κ₁(U) grows with D for factors of one size, but A⁻¹ is of use for as long as κ₁(A) is small."""
    torch.manual_seed(0)
    layer = LUDense(features)
    with torch.no_grad():
        layer.lu.copy_(torch.randn(features, features) * noise / features**0.5)
        layer.lu.diagonal().mul_(features**0.5 / 10)
        x = torch.randn(50, features)
        weight = layer.weight.as_subclass(Tensor).double()
        y = (x.double() @ copy.deepcopy(layer).double().weight.as_subclass(Tensor).T).float()

        def errors(found: Tensor) -> tuple[float, float]:
            """Of x, and of the y that comes from it: relative, of the worst row."""
            there = found.double() @ weight.T
            worst = [((a - b).norm(dim=1) / b.norm(dim=1)).max() for a, b in ((found, x), (there, y))]
            return float(worst[0]), float(worst[1])

        substituted = errors(layer.inverse(y))
        with cached(layer):
            kept = errors(layer.inverse(y))
            assert layer._kept is not None
            assert layer._kept.values["inverse"][0] is not None
    assert kept[0] <= 2 * substituted[0] + 1e-6
    assert kept[1] <= 2 * substituted[1] + 1e-6


def test_a_replaced_method_and_hooks_are_called() -> None:
    net, x = made(), torch.randn(3, D)
    with torch.no_grad(), cached(net):
        before = net(x)
        net.layers[0].forward = lambda rows: rows * 0.0  # type: ignore[union-attr, method-assign, assignment]
        assert not torch.equal(net(x), before)
        del net.layers[0].forward
        handle = net.layers[1].activation.register_forward_hook(lambda *_: torch.zeros(3, D))  # type: ignore
        assert not torch.equal(net(x), before)
        handle.remove()
        torch.testing.assert_close(net(x), before)


def test_blocks_nest_and_copies_keep_nothing() -> None:
    net, x = made(), torch.randn(3, D)
    with torch.no_grad(), cached(net) as same, cached(net.layers[0]):
        assert same is net
        net(x)
        assert copy.deepcopy(net).layers[0]._kept is None
        assert pickle.loads(pickle.dumps(net)).layers[0]._kept is None
    assert all(getattr(module, "_kept", None) is None for module in net.modules())


def test_threads_share_what_is_kept() -> None:
    net, x = made(), torch.randn(16, D)
    wanted = net(x).detach()
    wrong: list[float] = []

    def work() -> None:
        for _ in range(20):
            with torch.no_grad(), cached(net):
                wrong.append(float((net(x) - wanted).abs().max()))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(wrong) < 1e-4
    assert net.layers[0]._kept is None


def test_flows_of_every_kind() -> None:
    flow = LUFlow(made(), NormalMixture(D, 3))
    conditional = LUFlow(ConditionalLUNet(made(), nn.Linear(2, 2 * 3 * D)))
    x, context = torch.randn(5, D), torch.randn(5, 2)
    with torch.no_grad():
        outside = flow.log_prob(x), conditional.log_prob(x, context)
        with cached(flow), cached(conditional):
            torch.testing.assert_close(flow.log_prob(x), outside[0], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(conditional.log_prob(x, context), outside[1], rtol=1e-4, atol=1e-4)
            assert flow.sample(4).shape == (4, D)

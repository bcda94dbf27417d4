"""Small nets and layers, left to PyTorch's own operations: as float64 by plain formulas, to every order."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from lunet_fast import GeneralizedLeakySoftplus, LeakySoftplus, LUDense, LUNet
from lunet_fast.layers import small
from lunet_fast.ops import dispatch, reference

ACTIVATIONS = {
    "leaky": lambda: LeakySoftplus(0.1),
    "general": lambda: GeneralizedLeakySoftplus(2.0, 0.3),
    "learnable": lambda: LeakySoftplus(0.3, learnable=True),
    "learnable, general": lambda: GeneralizedLeakySoftplus(2.0, 0.3, learnable=True),
}


def made(
    features: int, layers: int, activation: str, dtype: torch.dtype, permutation: str | None = None
) -> LUNet:
    if activation == "coordinates":
        net = LUNet(
            features, layers, LeakySoftplus(0.3, True, features), dtype=dtype, permutation=permutation
        )
    else:
        net = LUNet(features, layers, ACTIVATIONS[activation](), dtype=dtype, permutation=permutation)
    with torch.no_grad():
        for layer in net.layers:
            layer.lu.copy_(torch.randn(features, features) * 0.3 / features**0.5)
            layer.sign.copy_(torch.randn(features).sign())
            layer.bias.normal_()
    return net


def truth(net: LUNet, x: Tensor) -> tuple[Tensor, Tensor]:
    """By ``reference``, layer by layer, in x's dtype."""
    total = x.new_zeros(x.shape[:-1])
    for layer in net.layers:
        x, share = reference.lu_dense_and_logabsdet(
            x,
            layer.lu,
            layer.bias,
            sign=layer.sign,
            permutation=layer.permutation,
            slopes=None if layer.activation is None else layer.activation.slopes(),
        )
        total = total + share
    return x, total


@given(
    features=st.integers(1, 40),
    layers=st.integers(1, 4),
    shape=st.sampled_from([(), (0,), (1,), (7,), (3, 30)]),
    activation=st.sampled_from([*sorted(ACTIVATIONS), "coordinates"]),
    permutation=st.sampled_from([None, "random", "reverse"]),
)
def test_values_and_gradients(
    features: int, layers: int, shape: tuple[int, ...], activation: str, permutation: str | None
) -> None:
    net = made(features, layers, activation, torch.float64, permutation)
    x = torch.randn(*shape, features, dtype=torch.float64, requires_grad=True)
    assert small.takes(x, net._layers())
    inputs = [x, *net.parameters()]
    found, expected = net.forward_and_logabsdet(x), truth(net, x)
    weights = [torch.randn_like(t) for t in expected]
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e, rtol=1e-12, atol=1e-12)
    gradients = [torch.autograd.grad(pair, inputs, weights) for pair in (found, expected)]
    for f, e in zip(*gradients, strict=True):
        torch.testing.assert_close(f, e, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(net(x), expected[0], rtol=1e-12, atol=1e-12)


def test_float32_has_its_accuracy() -> None:
    net = made(64, 3, "leaky", torch.float32)
    x = torch.randn(100, 64)
    wide = made(64, 3, "leaky", torch.float64)
    wide.load_state_dict(net.state_dict())
    for f, e in zip(net.forward_and_logabsdet(x), truth(wide, x.double()), strict=True):
        assert (f.double() - e).norm() <= 2e-6 * e.norm()


def test_second_derivatives() -> None:
    net = made(4, 2, "learnable", torch.float64)
    x = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x, *p: net.forward_and_logabsdet(x), (x, *net.parameters()))


def test_a_diagonal_beyond_its_bound_counts_as_the_bound() -> None:
    net = made(3, 2, "leaky", torch.float32)
    with torch.no_grad():
        net.layers[0].lu.fill_diagonal_(100.0)
    x = torch.randn(6, 3)
    y = net(x)
    y.sum().backward()
    assert float(net.layers[0].lu.grad.diagonal().abs().max()) == 0.0
    with torch.no_grad():
        net.layers[0].lu.fill_diagonal_(80.0)
        assert torch.equal(net(x), y.detach())


def test_where_it_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    net = made(8, 2, "leaky", torch.float32)
    layers = net._layers()
    x = torch.randn(4, 8)
    assert small.takes(x, layers)
    with torch.autocast("cpu"):
        assert not small.takes(x, layers)
    assert not small.takes(x.double(), layers)
    assert not small.takes(torch.randn(4, 9), layers)
    assert not small.takes(torch.empty(small.SMALL_NUMBERS // 8 + 1, 8), layers)
    wide = LUNet(small.SMALL_FEATURES + 1, 2)
    assert not small.takes(torch.randn(1, small.SMALL_FEATURES + 1), wide._layers())
    monkeypatch.setattr(dispatch, "_backend", "triton")
    assert not small.takes(x, layers)


@pytest.mark.parametrize("bias", [True, False])
def test_members_side_by_side(bias: bool) -> None:
    members = []
    for _ in range(3):
        net = LUNet(6, 2, bias=bias, dtype=torch.float64)
        members.append(net._layers())
        with torch.no_grad():
            for layer in members[-1]:
                layer.lu.normal_(std=0.2)
    x = torch.randn(3, 5, 6, dtype=torch.float64)
    found = small.stacked_net(x, members)
    for k, layers in enumerate(members):
        torch.testing.assert_close(
            found[k], small.net(x[k], layers, logabsdet=False)[0], rtol=1e-12, atol=1e-12
        )
    assert small.stacked_net(x[:1], members[:1]).shape == (1, 5, 6)


@given(
    features=st.integers(1, 24),
    layers=st.integers(1, 4),
    activation=st.sampled_from([None, *sorted(ACTIVATIONS), "coordinates"]),
    permutation=st.sampled_from([None, "random", "reverse"]),
    bias=st.booleans(),
)
def test_inverse_by_inverse_matrices(
    features: int, layers: int, activation: str | None, permutation: str | None, bias: bool
) -> None:
    net = made(features, layers, activation or "leaky", torch.float64, permutation)
    for layer in net.layers:
        if activation is None:
            layer.activation = None
        if not bias:
            layer.bias = None
    net.requires_grad_(False)
    x = torch.randn(2, 2 * features, features, dtype=torch.float64)
    y, logabsdet = truth(net, x)
    assert small.takes_inverse(y, net._layers())
    found = small.inverse_net(y, net._layers(), logabsdet=True)
    if found is not None:
        torch.testing.assert_close(found[0], x, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(found[1], -logabsdet, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(net.inverse(y), x, rtol=1e-8, atol=1e-8)
    both = net.inverse_and_logabsdet(y)
    torch.testing.assert_close(both[1], -logabsdet, rtol=1e-8, atol=1e-8)


def test_inverse_matrices_are_made_for_good_conditions_alone() -> None:
    torch.manual_seed(0)
    net = made(16, 3, "leaky", torch.float32).requires_grad_(False)
    y = torch.randn(100, 16)
    assert small.inverse_net(y, net._layers(), logabsdet=False) is not None
    wide = made(16, 3, "leaky", torch.float64)
    wide.load_state_dict(net.state_dict())
    expected = wide.inverse(y.double())
    assert (net.inverse(y).double() - expected).norm() <= 2e-6 * expected.norm()
    net.layers[1].lu.fill_diagonal_(3.0)[3, 3] = -5.0
    assert small.inverse_net(y, net._layers(), logabsdet=False) is None
    wide.load_state_dict(net.state_dict())
    x = torch.randn(100, 16)
    kept = (net.inverse(net(x)) - x).norm(dim=-1) / x.norm(dim=-1)
    assert float(kept.max()) <= 1e-2
    net.layers[1].lu.fill_diagonal_(torch.nan)
    assert small.inverse_net(y, net._layers(), logabsdet=False) is None


def test_where_inverse_matrices_are_made() -> None:
    net = made(8, 2, "leaky", torch.float32)
    layers, y = net._layers(), torch.randn(32, 8)
    assert not small.takes_inverse(y, layers)  # a gradient is recorded
    with torch.no_grad():
        assert small.takes_inverse(y, layers)
        assert small.takes_inverse(y.reshape(4, 8, 8), layers)
        assert not small.takes_inverse(y[:31], layers)
        assert not small.takes_inverse(torch.randn(()), layers)
        with torch.autocast("cpu"):
            assert not small.takes_inverse(y, layers)
        states = {name: torch.stack((p, 0.5 * p)) for name, p in net.named_parameters()}

        def inverse(state: dict[str, Tensor]) -> Tensor:
            return torch.func.functional_call(Inverse(net), {f"net.{n}": p for n, p in state.items()}, (y,))

        found = torch.func.vmap(inverse)(states)
        for index in range(2):
            alone = inverse({name: p[index] for name, p in states.items()})
            torch.testing.assert_close(found[index], alone, rtol=1e-5, atol=1e-5)
    assert net.inverse(y).requires_grad
    net.requires_grad_(False)
    assert small.takes_inverse(y, layers)


class Inverse(torch.nn.Module):
    def __init__(self, net: LUNet) -> None:
        super().__init__()
        self.net = net

    def forward(self, y: Tensor) -> Tensor:
        return self.net.inverse(y)


LAYER_ACTIVATIONS = {
    **ACTIVATIONS,
    "coordinates": lambda: LeakySoftplus(0.3, True, 200),
    "none": lambda: None,
}


@pytest.mark.parametrize(
    ("activation", "permuted"), [("leaky", True), *((name, False) for name in LAYER_ACTIVATIONS)]
)
@pytest.mark.parametrize("shape", [(), (1,), (25,), (26,), (5, 20), (101,), (300,)], ids=str)
@pytest.mark.parametrize("features", [2, 100, 200])
def test_a_layer_by_itself(features: int, shape: tuple[int, ...], permuted: bool, activation: str) -> None:
    """Through U and L where rows are few, through A where they are not; and where it is small."""
    phi_of = {"none": lambda: None, "coordinates": lambda: LeakySoftplus(0.3, True, features), **ACTIVATIONS}
    order = torch.randperm(features) if permuted else None
    layer = LUDense(features, activation=phi_of[activation](), permutation=order).double()
    with torch.no_grad():
        layer.lu.copy_(torch.randn(features, features) * 0.3 / features**0.5)
        layer.sign.copy_(torch.randn(features).sign())
        layer.bias.normal_()
    x = torch.randn(*shape, features, dtype=torch.float64, requires_grad=True)
    rows, phi = math.prod(shape), layer._fused()
    assert phi is not None
    assert small.takes_layer(x, layer.lu, phi) == (features <= 128 or rows <= 25)
    slopes = None if layer.activation is None else layer.activation.slopes()
    expected = reference.lu_dense_and_logabsdet(
        x, layer.lu, layer.bias, sign=layer.sign, permutation=order, slopes=slopes
    )
    found = layer.forward_and_logabsdet(x)
    inputs, weights = [x, *layer.parameters()], [torch.randn_like(t) for t in expected]
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer(x), expected[0], rtol=1e-12, atol=1e-12)
    gradients = [torch.autograd.grad(pair, inputs, weights) for pair in (found, expected)]
    for f, e in zip(*gradients, strict=True):
        torch.testing.assert_close(f, e, rtol=1e-10, atol=1e-10)


def test_who_watches_sees_the_operation_of_a_layer() -> None:
    layer, x = LUDense(8, activation=LeakySoftplus(0.1)), torch.randn(3, 8)
    phi = layer._fused()
    assert phi is not None
    assert small.takes_layer(x, layer.lu, phi)
    assert not small.takes_layer(x.double(), layer.lu, phi)
    assert not small.takes_layer(x[:, :1], LUDense(1).lu, phi)  # an infinity in one column stays one
    assert not small.takes_layer(x[:0], layer.lu, phi)
    assert not small.takes_layer(torch.randn(1 << 14, 8), layer.lu, phi)
    with FlopCounterMode(display=False):
        assert not small.takes_layer(x, layer.lu, phi)
    with torch.autocast("cpu", torch.bfloat16):
        assert not small.takes_layer(x, layer.lu, phi)

"""How nets start: near the identity at any depth, and up to four layers to the bit as they always did."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lunet_fast import GeneralizedLeakySoftplus, LeakySoftplus, LUFlow, LUNet, MonotoneSpline
from lunet_fast.layers.activations import BijectiveActivation

FEATURES = 32


class Arsinh(BijectiveActivation):
    """An activation that says nothing of itself: odd, so that it does not bend at 0 but on either side."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.asinh(3.0 * x)

    def inverse(self, y: Tensor) -> Tensor:
        return torch.sinh(y) / 3.0

    def log_derivative(self, x: Tensor) -> Tensor:
        return math.log(3.0) - 0.5 * torch.log1p((3.0 * x).square())


def shortfall(net: LUNet) -> float:
    """By how much of itself mean log p of unit normal data falls short of the base's; gradients are finite
    and a round trip is kept."""
    x = torch.randn(1024, FEATURES)
    flow = LUFlow(net)
    found, wanted = flow.log_prob(x).mean(), flow.base.log_prob(x).mean()
    found.backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.isfinite().all()), name
    with torch.no_grad():
        torch.testing.assert_close(net.inverse(net(x)), x, rtol=0, atol=1e-3)
    return float((found - wanted) / wanted)


@pytest.mark.parametrize("layers", [5, 20, 60, 100])
def test_unit_data_keep_their_density_at_any_depth(layers: int) -> None:
    torch.manual_seed(0)
    assert abs(shortfall(LUNet(FEATURES, layers))) < 0.1


@pytest.mark.parametrize("options", [{}, {"signs": "negative"}, {"signs": "random", "permutation": "random"}])
@pytest.mark.parametrize(
    "activation",
    [
        LeakySoftplus(0.001),
        LeakySoftplus(0.3, learnable=True, features=FEATURES),
        GeneralizedLeakySoftplus(5.0, 0.2),
        MonotoneSpline(FEATURES, 8),
        Arsinh(),
    ],
    ids=lambda phi: type(phi).__name__,
)
def test_so_with_every_activation_and_structure(
    activation: BijectiveActivation, options: dict[str, str]
) -> None:
    torch.manual_seed(1)
    net = LUNet(FEATURES, 20, activation, **options)  # type: ignore[arg-type]
    assert abs(shortfall(net.double().float())) < 0.1


def test_scale_of_all_coordinates_is_kept() -> None:
    torch.manual_seed(2)
    z = LUNet(FEATURES, 60)(torch.randn(4096, FEATURES))
    torch.testing.assert_close(z.std(0), torch.ones(FEATURES), rtol=0, atol=0.15)
    torch.testing.assert_close(z.mean(0), torch.zeros(FEATURES), rtol=0, atol=0.15)


@pytest.mark.parametrize("layers", [1, 2, 4])
def test_a_shallow_net_starts_to_the_bit_from_the_formula(layers: int) -> None:
    """u_ii = 1/φ′(0), b = −A φ(0)·1 and off-diagonals N(0, 0.01/D), one draw of D² numbers a layer."""
    torch.manual_seed(3)
    net = LUNet(FEATURES, layers)
    torch.manual_seed(3)
    assert all(bool((layer.sign == 1).all()) for layer in net.layers)
    for index, layer in enumerate(net.layers):
        # As the layers are made each draws once, and the net resets them all after.
        torch.empty(FEATURES, FEATURES).normal_()
        assert index > 0 or not bool(layer.bias.any())
    for index, layer in enumerate(net.layers):
        noise = torch.empty(FEATURES, FEATURES).normal_(0.0, 0.1 / math.sqrt(FEATURES))
        slope = torch.tensor(1.0 if index == 0 else 0.1 + 0.5 * 0.9, dtype=torch.float64).float()
        assert torch.equal(layer.lu.tril(-1), noise.tril(-1))
        assert torch.equal(layer.lu.triu(1), noise.triu(1) / slope)
        logs = torch.full((FEATURES,), -math.log(1.0 if index == 0 else 0.1 + 0.5 * 0.9))
        assert torch.equal(layer.lu.diagonal(), logs)


def test_layers_reset_one_by_one_start_as_the_net_does() -> None:
    net = LUNet(6, 12)
    for reset in (net, *net.layers):
        torch.manual_seed(4)
        reset.reset_parameters()
    torch.manual_seed(4)
    for layer in net.layers:
        layer.reset_parameters()
    one_by_one = [layer.lu.clone() for layer in net.layers]
    torch.manual_seed(4)
    net.reset_parameters()
    for layer, lu in zip(net.layers, one_by_one, strict=True):
        assert torch.equal(layer.lu, lu)
    point = float(net.layers[0].bias[0])
    assert point > 1
    # Each but the first undoes the tangent at the point where activations begin.
    slope = 0.1 + 0.9 / (1 + math.exp(-point))
    for layer in net.layers[1:]:
        torch.testing.assert_close(layer.logabsdet(), torch.tensor(-6 * math.log(slope)))
    assert float(net(torch.zeros(6)).abs().max()) < 1e-5


def test_a_deep_net_on_meta_starts_as_one_that_was_there() -> None:
    torch.manual_seed(5)
    here = LUNet(8, 10, LeakySoftplus(0.2, learnable=True, features=8))
    with torch.device("meta"):
        net = LUNet(8, 10, LeakySoftplus(0.2, learnable=True, features=8))
    net.to_empty(device="cpu")
    torch.manual_seed(5)
    net.reset_parameters()
    torch.manual_seed(5)
    here.reset_parameters()
    for name, value in here.state_dict().items():
        assert torch.equal(value, net.state_dict()[name]), name

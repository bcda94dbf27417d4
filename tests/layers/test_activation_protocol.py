"""Every activation, the library's and one that is defined here, through all that takes an activation.

An activation of a user's own is the class ``SinhArcsinh`` below. Another of the library's is one more entry
of ``ACTIVATIONS``.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lunet_fast import (
    BijectiveActivation,
    ConditionalLUNet,
    GeneralizedLeakySoftplus,
    LeakySoftplus,
    LUDense,
    LUFlow,
    LUNet,
    MonotoneSpline,
)

D = 5


class SinhArcsinh(BijectiveActivation):
    """φ(x) = sinh(δ·asinh(x) + ε), of Jones and Pewsey (2009), with δ = eᵗ and ε learnt for each
    coordinate."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.t = nn.Parameter(torch.full((features,), -0.2))
        self.shift = nn.Parameter(torch.full((features,), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.sinh(self.t.exp() * torch.asinh(x) + self.shift)

    def inverse(self, y: Tensor) -> Tensor:
        return torch.sinh((torch.asinh(y) - self.shift) / self.t.exp())

    def log_derivative(self, x: Tensor) -> Tensor:
        u = self.t.exp() * torch.asinh(x) + self.shift
        return self.t + torch.cosh(u).log() - 0.5 * torch.log1p(x.square())


class Bent(LeakySoftplus):
    """A subclass that replaces the formulas: what it says must be what is computed."""

    def forward(self, x: Tensor) -> Tensor:
        return 2.0 * x + torch.tanh(x)

    def inverse(self, y: Tensor) -> Tensor:
        x = y / 2.5
        for _ in range(60):  # Newton from the tangent; y is moderate in these tests
            x = x - (self.forward(x) - y) / self.log_derivative(x).exp()
        return x

    def log_derivative(self, x: Tensor) -> Tensor:
        return torch.log(3.0 - torch.tanh(x).square())


def spline(**options: object) -> MonotoneSpline:
    """A spline with knots where no number of these tests is, and slopes that are not all 1."""
    phi = MonotoneSpline(D, low=-2.37, high=3.11, **options)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        phi.raw.copy_(0.4 * torch.randn(phi.raw.shape, generator=generator))
    return phi


ACTIVATIONS: dict[str, Callable[[], BijectiveActivation]] = {
    "LeakySoftplus": lambda: LeakySoftplus(0.2),
    "LeakySoftplus, learnt": lambda: LeakySoftplus(0.3, learnable=True, features=D),
    "GeneralizedLeakySoftplus": lambda: GeneralizedLeakySoftplus(2.0, 0.4),
    "GeneralizedLeakySoftplus, learnt": lambda: GeneralizedLeakySoftplus(0.7, 0.5, learnable=True),
    "MonotoneSpline": spline,
    "MonotoneSpline, identity tails": lambda: spline(bins=5, tails="identity"),
    "a user's own": lambda: SinhArcsinh(D),
    "a subclass": lambda: Bent(0.2),
}

each = pytest.mark.parametrize("make", ACTIVATIONS.values(), ids=ACTIVATIONS.keys())


def rows(count: int = 7, seed: int = 0) -> Tensor:
    return torch.randn(count, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def net_of(make: Callable[[], BijectiveActivation], layers: int = 3, **options: object) -> LUNet:
    torch.manual_seed(0)
    net = LUNet(D, layers, make(), **options).double()  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return net


def jacobian_logabsdet(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    jacobians = torch.stack([torch.autograd.functional.jacobian(function, row) for row in x])
    return torch.linalg.slogdet(jacobians).logabsdet


# --- by itself ------------------------------------------------------------------------------------------


@each
@given(seed=st.integers(0, 1000), scale=st.sampled_from([0.1, 1.0, 4.0]))
def test_the_inverse_and_the_derivative_are_those_of_the_function(
    make: Callable[[], BijectiveActivation], seed: int, scale: float
) -> None:
    phi, x = make().double(), rows(seed=seed) * scale
    y, total = phi.forward_and_logabsdet(x)
    torch.testing.assert_close(phi.inverse(y), x, rtol=1e-9, atol=1e-9)
    back, inverse_total = phi.inverse_and_logabsdet(y)
    torch.testing.assert_close((back, inverse_total), (x, -total), rtol=1e-9, atol=1e-9)
    leaf = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(phi(leaf).sum(), leaf)
    torch.testing.assert_close(phi.log_derivative(x), slope.log())
    assert phi.log_derivative(x).shape == x.shape
    torch.testing.assert_close(total, slope.log().sum(-1))
    assert bool((slope > 0).all())


@each
def test_gradients_of_both_directions(make: Callable[[], BijectiveActivation]) -> None:
    phi, x = make().double(), rows(3).requires_grad_()
    assert torch.autograd.gradcheck(phi.forward_and_logabsdet, x)
    assert torch.autograd.gradcheck(phi.inverse_and_logabsdet, x)
    assert torch.autograd.gradgradcheck(phi.forward_and_logabsdet, x)


@each
def test_shapes_and_dtypes(make: Callable[[], BijectiveActivation]) -> None:
    phi = make()
    for shape in ((D,), (0, D), (2, 3, D)):
        x = torch.randn(shape)
        y, total = phi.forward_and_logabsdet(x)
        assert (y.shape, y.dtype, total.shape, total.dtype) == (x.shape, x.dtype, shape[:-1], torch.float32)


# --- in a layer and a net -------------------------------------------------------------------------------


@each
@pytest.mark.parametrize("rows_", [3, 40], ids=["few", "many"])
def test_in_a_layer(make: Callable[[], BijectiveActivation], rows_: int) -> None:
    layer = LUDense(D, activation=make(), permutation=torch.randperm(D)).double()
    x, phi = rows(rows_), layer.activation
    assert phi is not None
    y, total = layer.forward_and_logabsdet(x)
    torch.testing.assert_close(y, phi(layer.to_linear()(x)))
    torch.testing.assert_close(y, layer(x))
    torch.testing.assert_close(total[:3], jacobian_logabsdet(layer, x[:3]))
    back, inverse_total = layer.inverse_and_logabsdet(y)
    torch.testing.assert_close((back, inverse_total), (x, -total), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(layer.inverse(y), x, rtol=1e-8, atol=1e-8)


@each
def test_in_a_net(make: Callable[[], BijectiveActivation]) -> None:
    net, x = net_of(make), rows()
    y, total = net.forward_and_logabsdet(x)
    torch.testing.assert_close(total, jacobian_logabsdet(net, x))
    torch.testing.assert_close(net.inverse_and_logabsdet(y), (x, -total), rtol=1e-7, atol=1e-7)
    assert torch.autograd.gradcheck(net.forward_and_logabsdet, x.clone().requires_grad_())
    z = x
    for layer in net.layers:
        z = layer(z)
    torch.testing.assert_close(net(x), z)


@each
def test_a_net_starts_near_the_identity(make: Callable[[], BijectiveActivation]) -> None:
    torch.manual_seed(0)
    net = LUNet(D, 2, make()).double()
    net.reset_parameters()
    origin = torch.zeros(1, D, dtype=torch.float64)
    torch.testing.assert_close(net(origin), origin, rtol=0, atol=1e-6)
    slope = torch.autograd.functional.jacobian(lambda x: net(x)[0], origin)[:, 0]
    assert float((slope - torch.eye(D, dtype=torch.float64)).abs().max()) < 0.5


@each
def test_gradients_of_every_parameter(make: Callable[[], BijectiveActivation]) -> None:
    """Against finite differences of the loss, the activation's own parameters among them."""
    net, x = net_of(make), rows(4)

    def loss() -> Tensor:
        y, total = net.forward_and_logabsdet(x)
        return y.square().sum() - total.sum()

    loss().backward()
    for name, parameter in net.named_parameters():
        direction = torch.randn_like(parameter)
        with torch.no_grad():
            values = []
            for step in (1e-6, -1e-6):
                parameter.add_(direction, alpha=step)
                values.append(loss())
                parameter.sub_(direction, alpha=step)
        assert parameter.grad is not None, name
        expected = (values[0] - values[1]) / 2e-6
        torch.testing.assert_close((parameter.grad * direction).sum(), expected, rtol=1e-5, atol=1e-6)


@each
def test_reversible_memory_gives_the_same_gradients(make: Callable[[], BijectiveActivation]) -> None:
    net, x = net_of(make), rows(20)
    gradients = []
    for memory in ("saved", "reversible"):
        net.memory = memory
        leaf = x.clone().requires_grad_()
        y, total = net.forward_and_logabsdet(leaf)
        gradients.append(torch.autograd.grad(y.square().sum() - total.sum(), [leaf, *net.parameters()]))
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-6, atol=1e-8)


@each
def test_a_flow_integrates_to_one_and_samples_what_it_says(make: Callable[[], BijectiveActivation]) -> None:
    torch.manual_seed(0)
    net = LUNet(1, 3, _of_one(make())).double()
    flow = LUFlow(net)
    line = torch.linspace(-60, 60, 24001, dtype=torch.float64)
    mass = torch.trapezoid(flow.log_prob(line.unsqueeze(-1)).exp(), line)
    torch.testing.assert_close(mass, torch.ones_like(mass), rtol=2e-3, atol=0)
    x, log_prob = flow.sample_and_log_prob(50)
    torch.testing.assert_close(log_prob, flow.log_prob(x))


def _of_one(phi: BijectiveActivation) -> BijectiveActivation:
    """The activation for one coordinate instead of D."""
    for name, parameter in phi.named_parameters():
        if parameter.shape[-1:] == (D,):
            setattr(phi, name, nn.Parameter(parameter.detach()[..., :1].clone()))
    for name, buffer in phi.named_buffers():
        phi.register_buffer(name, buffer[..., :1].clone())
    return phi


@each
def test_given_a_context(make: Callable[[], BijectiveActivation]) -> None:
    net = ConditionalLUNet(net_of(make), 2).double()
    nn.init.normal_(net.conditioner.weight, std=0.1)
    given_, x = net.given(torch.randn(7, 2, dtype=torch.float64)), rows()
    y, total = given_.forward_and_logabsdet(x)
    torch.testing.assert_close(given_.inverse_and_logabsdet(y), (x, -total), rtol=1e-7, atol=1e-7)


@each
def test_condition_and_whiten(make: Callable[[], BijectiveActivation]) -> None:
    net, x = net_of(make), 3.0 * rows(200) + 1.0
    net.whiten(x)
    h = net.layers[0].to_linear()(x)
    torch.testing.assert_close(h.mean(0), torch.zeros(D, dtype=torch.float64), rtol=0, atol=1e-8)
    assert float((h.var(0) - 1.0).abs().max()) < 0.2
    for condition in (net.condition(), net.condition(x)):
        assert condition.is_good
        assert all(0.0 < layer.slope_low <= layer.slope_high for layer in condition.layers)


# --- what modules have to bear ----------------------------------------------------------------------------


@each
def test_saved_loaded_and_copied(make: Callable[[], BijectiveActivation]) -> None:
    net, x = net_of(make), rows()
    other = LUNet(D, 3, make()).double()
    file = io.BytesIO()
    torch.save(net.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    for same in (other, copy.deepcopy(net)):
        assert torch.equal(same(x), net(x))
    assert net.layers[0].activation is not net.layers[1].activation


@each
def test_compiled_and_mapped(make: Callable[[], BijectiveActivation]) -> None:
    torch._dynamo.reset()  # it compiles one function a few times only
    net, x = net_of(make).float(), rows().float()
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), net(x))
    torch.testing.assert_close(torch.func.vmap(net)(x), net(x), rtol=1e-5, atol=1e-5)


@each
def test_hooks_are_called(make: Callable[[], BijectiveActivation]) -> None:
    net, x, seen = net_of(make), rows(), []
    net.layers[0].activation.register_forward_hook(lambda *_: seen.append(1))
    net(x)
    assert seen == [1]


def test_what_is_no_activation_is_refused() -> None:
    with pytest.raises(TypeError, match="activation must be a BijectiveActivation or None, got Tanh"):
        LUDense(D, activation=nn.Tanh())  # type: ignore[arg-type]


def test_a_method_that_is_missing_is_named() -> None:
    class Half(BijectiveActivation):
        def forward(self, x: Tensor) -> Tensor:
            return 0.5 * x

    with pytest.raises(TypeError, match="Half.*inverse.*log_derivative"):
        LUDense(D, activation=Half())

"""MonotoneSpline against quadrature of its slope, at its ends and beyond, and before the first matrix."""

from __future__ import annotations

import copy
import io
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lunet_fast import ConditionalLUNet, LUFlow, LUNet, MonotoneSpline
from lunet_fast.ops import autograd, reference
from lunet_fast.ops.values import Activation

KINDS = ["free", "identity"]


def spline(
    features: int = 3, bins: int = 8, tails: str = "free", seed: int = 0, scale: float = 0.8, **options: float
) -> MonotoneSpline:
    phi = MonotoneSpline(features, bins, tails, **options).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        phi.raw.copy_(scale * torch.randn(phi.raw.shape, generator=generator, dtype=torch.float64))
    return phi


def by_quadrature(phi: MonotoneSpline, x: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """(φ(x), φ′(x)) [N, D] from the knots' slopes: the slope by ``np.interp``, φ as its integral from the
    middle, where the trapezoidal rule between knots is exact."""
    values, slopes = np.empty(x.shape), np.empty(x.shape)
    at_knots = (phi.bound * torch.tanh(phi.raw / phi.bound)).exp().detach().numpy()
    for d in range(x.shape[1]):
        low, step = (float(v) for v in phi.grid[:, d])
        knots = low + step * np.arange(phi.bins + 1)
        heights = at_knots[:, d]
        if phi.tails == "identity":
            heights = np.concatenate([[1.0], heights, [1.0]])
        middle = low + step * phi.bins / 2
        for n in range(x.shape[0]):
            end = float(x[n, d])
            between = knots[(knots > min(middle, end)) & (knots < max(middle, end))]
            points = np.concatenate([[min(middle, end)], between, [max(middle, end)]])
            area = np.trapezoid(np.interp(points, knots, heights), points)
            values[n, d] = middle + math.copysign(1.0, end - middle) * area
            slopes[n, d] = np.interp(end, knots, heights)
    return values, slopes


# --- the function -------------------------------------------------------------------------------------------


@given(
    bins=st.integers(1, 17),
    tails=st.sampled_from(KINDS),
    seed=st.integers(0, 10_000),
    spread=st.sampled_from([0.5, 3.0, 50.0]),
    low=st.floats(-5.0, 2.0),
    width=st.floats(0.01, 20.0),
)
def test_it_is_the_integral_of_its_slope(
    bins: int, tails: str, seed: int, spread: float, low: float, width: float
) -> None:
    bins = max(bins, 2) if tails == "identity" else bins
    phi = spline(4, bins, tails, seed, low=low, high=low + width)
    x = spread * torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    expected, slopes = (torch.from_numpy(values) for values in by_quadrature(phi, x))
    y, total = phi.forward_and_logabsdet(x)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(phi(x), expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(total, slopes.log().sum(-1), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(phi.log_derivative(x), slopes.log(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(phi.inverse(y), x, rtol=1e-9, atol=1e-9 * (1 + width))


@given(bins=st.integers(1, 9), seed=st.integers(0, 1000), inverse=st.booleans(), logabsdet=st.booleans())
def test_what_computes_it_equals_the_formula(bins: int, seed: int, inverse: bool, logabsdet: bool) -> None:
    """Results and gradients of the operation against autograd through ``reference``."""
    parameters = spline(4, bins, seed=seed).fused().parameters
    assert parameters is not None
    generator = torch.Generator().manual_seed(seed)
    x = 2.5 * torch.randn(9, 4, dtype=torch.float64, generator=generator)
    found = []
    for fast in (True, False):
        leaf, theta = x.clone().requires_grad_(), parameters.detach().clone().requires_grad_()
        phi = Activation("monotone_spline", theta, ())
        if fast:
            name = "activation_inverse" if inverse else "activation_forward"
            y, total = autograd.apply(name, leaf, None, phi, logabsdet)
        else:
            y, total = reference.activation(leaf, phi, inverse=inverse, logabsdet=logabsdet)  # type: ignore
        loss = (y * y.detach().sin()).sum() + (0.0 if not logabsdet else (total * total.detach()).sum())
        found.append((y.detach(), *torch.autograd.grad(loss, [leaf, theta])))
    for fast_one, plain in zip(*found, strict=True):
        torch.testing.assert_close(fast_one, plain, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("tails", KINDS)
def test_gradients_to_the_second_order(tails: str) -> None:
    phi = spline(2, 5, tails)
    x = torch.tensor([[-4.0, 0.3], [1.1, 5.0], [-1.0, 2.2]], dtype=torch.float64, requires_grad=True)
    raw = phi.raw.detach().clone().requires_grad_()

    def both(x: Tensor, raw: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        slopes = (phi.bound * torch.tanh(raw / phi.bound)).exp()
        if tails == "identity":
            slopes = torch.nn.functional.pad(slopes, (0, 0, 1, 1), value=1.0)
        value = Activation("monotone_spline", torch.cat([phi.grid, slopes]), ())
        name = "activation_inverse" if inverse else "activation_forward"
        return autograd.apply(name, x, None, value, logabsdet=True)

    for inverse in (False, True):
        assert torch.autograd.gradcheck(lambda *a, i=inverse: both(*a, i), (x, raw))
        assert torch.autograd.gradgradcheck(lambda *a, i=inverse: both(*a, i), (x, raw))
        assert torch.autograd.gradcheck(
            lambda *a, i=inverse: both(*a, i), (x, raw), check_forward_ad=True, check_backward_ad=False
        )


@pytest.mark.parametrize("bins", [1, 8, 9])
def test_it_starts_as_the_identity(bins: int) -> None:
    phi, x = MonotoneSpline(4, bins, low=-1.7, high=2.1), 3.0 * torch.randn(200, 4)
    y, total = phi.forward_and_logabsdet(x)
    torch.testing.assert_close(y, x, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(total, torch.zeros(200), rtol=0, atol=1e-5)
    assert phi.raw.shape == (bins + 1, 4)
    assert MonotoneSpline(4, max(bins, 2), "identity").raw.shape == (max(bins, 2) - 1, 4)


@given(bins=st.integers(1, 9), seed=st.integers(0, 1000))
def test_the_middle_maps_to_itself(bins: int, seed: int) -> None:
    phi = spline(3, bins, seed=seed, low=-2.0, high=5.0)
    middle = torch.full((3,), 1.5, dtype=torch.float64)
    torch.testing.assert_close(phi(middle), middle)
    torch.testing.assert_close(phi.inverse(middle), middle)


@pytest.mark.parametrize("tails", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_far_outside_nothing_is_lost(dtype: torch.dtype, tails: str) -> None:
    phi = spline(1, tails=tails).to(dtype)
    x = torch.logspace(1, 30, 100, dtype=dtype).unsqueeze(-1)
    for side in (x, -x):
        torch.testing.assert_close(phi.inverse(phi(side)), side, rtol=20 * torch.finfo(dtype).eps, atol=0)
        first, last = phi.slopes()[[0, -1], 0].tolist()
        expected = side[-1] * (last if side is x else first)
        torch.testing.assert_close(phi(side)[-1], expected, rtol=1e-5, atol=0)


def test_infinities_and_nan_pass_through_and_reach_no_other_row() -> None:
    phi, odd = spline(2).float(), [math.inf, -math.inf, math.nan]
    for value in odd:
        x = torch.tensor([[0.3, 1.0], [value, -0.4], [2.0, 0.1]])
        for function in (phi.forward_and_logabsdet, phi.inverse_and_logabsdet):
            y, total = function(x)
            torch.testing.assert_close(y[1, 0], x[1, 0], equal_nan=True)
            clean = function(x[[0, 2]])
            assert torch.equal(y[[0, 2]], clean[0])
            assert torch.equal(total[[0, 2]], clean[1])
        leaf = x.clone().requires_grad_()
        phi.forward_and_logabsdet(leaf)[1].sum().backward()
        assert leaf.grad is not None
        assert bool(leaf.grad[[0, 2]].isfinite().all())


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_steepest_slopes_have_logarithms(sign: float) -> None:
    phi = MonotoneSpline(8, bound=20.0)
    with torch.no_grad():
        phi.raw.fill_(sign * 1e4)
    total = phi.forward_and_logabsdet(torch.zeros(2, 8))[1]
    torch.testing.assert_close(total, torch.full((2,), sign * 160.0))


def test_at_the_knots_either_side_may_speak() -> None:
    """Values and first derivatives of φ are continuous there; the inverse finds the knot again."""
    phi = spline(1, 4)
    knots = phi.grid[0] + phi.grid[1] * torch.arange(5, dtype=torch.float64).unsqueeze(-1)
    torch.testing.assert_close(phi.log_derivative(knots), phi.slopes().log())
    torch.testing.assert_close(phi.inverse(phi(knots)), knots)


@given(st.sampled_from([torch.float32, torch.float64]), st.integers(0, 100))
def test_round_trip(dtype: torch.dtype, seed: int) -> None:
    phi = spline(5, 16, seed=seed, scale=3.0).to(dtype)
    x = 3.0 * torch.randn(50, 5, generator=torch.Generator().manual_seed(seed)).to(dtype)
    y = phi(x)
    # A rounding of y is one of x by the slope.
    rounding = torch.finfo(dtype).eps * (1.0 + y.abs().amax()) / phi.derivative_range(5)[0]
    assert bool(((phi.inverse(y) - x).abs() < 10.0 * rounding).all())


# --- slopes and intervals -----------------------------------------------------------------------------------


def test_slopes_stay_within_the_bound() -> None:
    phi = spline(3, scale=1e6, bound=1.5)
    low, high = phi.derivative_range(3)
    assert math.exp(-1.5) * 0.999 <= low < high <= math.exp(1.5) * 1.001
    net = LUNet(3, 3, phi).double()
    assert all(layer.slope_high <= math.exp(1.5) * 1.001 for layer in net.condition().layers)


def test_fit_range() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20_000, 3, generator=generator) * torch.tensor([1.0, 100.0, 0.0]) + 7.0
    phi = MonotoneSpline(3, 16)
    phi.fit_range(x.reshape(2, -1, 3))
    ends = torch.stack([phi.grid[0], phi.grid[0] + 16 * phi.grid[1]])
    expected = torch.quantile(x[:, :2], torch.tensor([0.0005, 0.9995]), dim=0)
    torch.testing.assert_close(ends[:, :2], expected, rtol=1e-5, atol=1e-4)
    assert ends[:, 2].tolist() == [6.0, 8.0]  # a constant coordinate
    torch.testing.assert_close(phi(x), x, rtol=1e-5, atol=1e-3)
    phi.reset_parameters()
    assert phi.grid[0].tolist() == [-3.0] * 3


@pytest.mark.parametrize("x", [torch.randn(5, 2), torch.randn(0, 3), torch.tensor([[1.0, math.nan, 0.0]])])
def test_what_fit_range_refuses(x: Tensor) -> None:
    with pytest.raises(ValueError, match="x must be"):
        MonotoneSpline(3).fit_range(x)


@pytest.mark.parametrize("spoil", [lambda g: g.zero_(), lambda g: g.fill_(math.nan), lambda g: g[1].neg_()])
def test_a_grid_that_is_none_raises_where_it_is_used(spoil: object) -> None:
    phi = MonotoneSpline(2)
    phi(torch.zeros(1, 2))
    with torch.no_grad():
        spoil(phi.grid)  # type: ignore[operator]
    with pytest.raises(ValueError, match="grid must hold finite numbers"):
        phi(torch.zeros(1, 2))


@pytest.mark.parametrize(
    ("options", "error", "told"),
    [
        ({"features": 0}, ValueError, "features must be at least 1"),
        ({"bins": 0}, ValueError, "bins must be at least 1"),
        ({"bins": 1, "tails": "identity"}, ValueError, "bins must be at least 2"),
        ({"bins": 2.5}, TypeError, "bins must be an int"),
        ({"tails": "none"}, ValueError, "tails must be one of free, identity"),
        ({"bound": 0.0}, ValueError, "bound must be above 0"),
        ({"bound": 21.0}, ValueError, "bound must be above 0 and at most 20"),
        ({"low": 3.0}, ValueError, "low must be below high"),
        ({"dtype": torch.int64}, TypeError, "dtype is torch.int64"),
    ],
)
def test_what_cannot_be_made(options: dict, error: type[Exception], told: str) -> None:
    with pytest.raises(error, match=told):
        MonotoneSpline(**{"features": 3, **options})


def test_rows_of_another_width_are_refused() -> None:
    for x in (torch.randn(4, 2), torch.randn(())):
        with pytest.raises(ValueError, match="must have 3 features"):
            MonotoneSpline(3)(x)


def test_low_precision_is_computed_in_float32() -> None:
    phi = spline(4).to(torch.bfloat16)
    x = torch.randn(30, 4, dtype=torch.bfloat16)
    y, total = phi.forward_and_logabsdet(x)
    assert (y.dtype, total.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(y.float(), copy.deepcopy(phi).float()(x.float()), rtol=1e-2, atol=1e-2)


# --- before the first matrix --------------------------------------------------------------------------------


def net_with_input(layers: int = 3, **options: object) -> LUNet:
    torch.manual_seed(0)
    net = LUNet(3, layers, spline(3, 6), input=spline(3, 16, seed=1), **options).double()  # type: ignore
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return net


X = torch.randn(20, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("memory", ["saved", "reversible"])
def test_input_comes_first_and_its_inverse_last(memory: str) -> None:
    net = net_with_input(memory=memory)
    assert net.input is not None
    y, total = net.forward_and_logabsdet(X)
    z = net.input(X)
    for layer in net.layers:
        z = layer(z)
    torch.testing.assert_close(y, z)
    jacobians = torch.stack([torch.autograd.functional.jacobian(net, row) for row in X])
    torch.testing.assert_close(total, torch.linalg.slogdet(jacobians).logabsdet)
    torch.testing.assert_close(net.inverse_and_logabsdet(y), (X, -total), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(net.inverse(y), X, rtol=1e-8, atol=1e-8)
    leaf = X[:4].clone().requires_grad_()
    assert torch.autograd.gradcheck(net.forward_and_logabsdet, leaf)
    net.zero_grad()
    net.forward_and_logabsdet(X)[1].sum().backward()
    assert net.input.raw.grad is not None
    assert float(net.input.raw.grad.abs().max()) > 0


def test_input_in_condition_whiten_and_files() -> None:
    net = net_with_input()
    assert [layer.name for layer in net.condition(X).layers][:2] == ["input", "layers.0"]
    assert net.input is not None
    x = torch.exp(X)
    net.input.fit_range(x)
    net.whiten(x)
    h = net.layers[0].to_linear()(net.input(x))
    torch.testing.assert_close(h.mean(0), torch.zeros(3).double(), rtol=0, atol=1e-8)
    other = LUNet(3, 3, MonotoneSpline(3, 6), input=MonotoneSpline(3, 16)).double()
    file = io.BytesIO()
    torch.save(net.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other(x), net(x))
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), net(x))
    net.reset_parameters()
    assert float(net.input.raw.abs().max()) == 0.0


def test_a_net_pickled_without_an_input_has_none() -> None:
    net = LUNet(3, 2)
    state = net.__dict__.copy()
    state["_modules"] = {name: module for name, module in net._modules.items() if name != "input"}
    old = LUNet.__new__(LUNet)
    old.__setstate__(state)
    assert old.input is None
    assert torch.equal(old(X.float()), net(X.float()))


def test_input_of_a_conditional_net() -> None:
    net = ConditionalLUNet(net_with_input(), 2).double()
    torch.nn.init.normal_(net.conditioner.weight, std=0.1)
    mapped = net.given(torch.randn(20, 2, dtype=torch.float64))
    y, total = mapped.forward_and_logabsdet(X)
    torch.testing.assert_close(mapped.inverse_and_logabsdet(y), (X, -total), rtol=1e-8, atol=1e-8)
    same = ConditionalLUNet(net_with_input(), 2).given(torch.zeros(2, dtype=torch.float64))
    torch.testing.assert_close(same.forward_and_logabsdet(X), net_with_input().forward_and_logabsdet(X))


def test_what_is_no_input_is_refused() -> None:
    with pytest.raises(TypeError, match="input must be a BijectiveActivation or None, got Tanh"):
        LUNet(3, 2, input=torch.nn.Tanh())  # type: ignore[arg-type]


@settings(max_examples=10)
@given(seed=st.integers(0, 100))
def test_a_flow_of_splines_integrates_to_one(seed: int) -> None:
    torch.manual_seed(seed)
    flow = LUFlow(LUNet(1, 3, spline(1, seed=seed), input=spline(1, 16, seed=seed + 1)).double())
    line = torch.linspace(-200, 200, 80_001, dtype=torch.float64)
    mass = torch.trapezoid(flow.log_prob(line.unsqueeze(-1)).exp(), line)
    torch.testing.assert_close(mass, torch.ones_like(mass), rtol=5e-3, atol=0)


def test_exported_and_compiled() -> None:
    torch._dynamo.reset()  # it compiles one function a few times only
    net = net_with_input().float()
    x = X.float()
    program = torch.export.export(net, (x,))
    torch.testing.assert_close(program.module()(x), net(x))
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), net(x))


@pytest.mark.parametrize("wrong", [0.0, -1.0, math.inf, math.nan])
def test_a_state_with_a_grid_that_is_none_is_refused(wrong: float) -> None:
    spline = MonotoneSpline(3, 4)
    before = spline.grid.clone()
    state = {name: value.clone() for name, value in spline.state_dict().items()}
    state["grid"][1, 2] = wrong
    with pytest.raises(RuntimeError, match="grid must hold finite numbers, and widths above 0"):
        spline.load_state_dict(state)
    assert torch.equal(spline.grid, before)

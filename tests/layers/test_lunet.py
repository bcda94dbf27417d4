"""LUNet: a stack of layers, its round trip, its log-determinant and its report of condition."""

from __future__ import annotations

import copy
import functools
import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import truth
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import parametrize

from lunet_fast import ConditionWarning, GeneralizedLeakySoftplus, LeakySoftplus, LUDense, LUNet

ACTIVATIONS = {
    "leaky": lambda: LeakySoftplus(0.1),
    "leaky-flat": lambda: LeakySoftplus(0.7),
    "generalized": lambda: GeneralizedLeakySoftplus(2.0, 0.3),
    "learnable": lambda: LeakySoftplus(0.2, learnable=True),
    "generalized-learnable": lambda: GeneralizedLeakySoftplus(1.5, 0.4, learnable=True),
}
METHODS = ["forward", "inverse", "forward_and_logabsdet", "inverse_and_logabsdet"]
BOUND = 6.0

activations = pytest.mark.parametrize("activation", ACTIVATIONS)
depths = pytest.mark.parametrize("layers", [1, 2, 3, 4])


def make(
    d: int,
    layers: int,
    activation: str = "leaky",
    *,
    seed: int = 0,
    bias: bool = True,
    dtype: torch.dtype = torch.float64,
    **scales: float,
) -> LUNet:
    net = LUNet(d, layers, ACTIVATIONS[activation](), bias, None, dtype)
    for index, layer in enumerate(net.layers):
        truth.randomise(layer, 100 * seed + index, **({"coupling": 0.3} | scales))
    return net


def states(net: LUNet) -> list[truth.Layer]:
    return [truth.read(layer) for layer in net.layers]


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    rng = torch.Generator().manual_seed(seed + 2)
    return torch.randn(shape, generator=rng, dtype=torch.float64).to(dtype)


def exact_forward(x: Tensor, layers: list[truth.Layer]) -> tuple[Tensor, Tensor]:
    total = torch.zeros(x.shape[:-1], dtype=torch.float64)
    for layer in layers:
        x, logabsdet = truth.forward(x, layer)
        total = total + logabsdet
    return x, total


def exact_inverse(y: Tensor, layers: list[truth.Layer]) -> tuple[Tensor, Tensor]:
    total = torch.zeros(y.shape[:-1], dtype=torch.float64)
    for layer in reversed(layers):
        y, logabsdet = truth.inverse(y, layer)
        total = total + logabsdet
    return y, total


# ---- construction


@depths
def test_the_last_layer_is_linear(layers: int) -> None:
    net = LUNet(5, layers)
    assert len(net.layers) == layers
    assert all(isinstance(layer, LUDense) for layer in net.layers)
    assert net.layers[-1].activation is None
    assert all(layer.activation.alpha == 0.1 for layer in net.layers[:-1])
    assert sum(p.numel() for p in net.parameters()) == layers * (25 + 5)


def test_arguments() -> None:
    net = LUNet(5, 3, GeneralizedLeakySoftplus(2.0, 0.5), False, "cpu", torch.float64)
    assert all(layer.bias is None for layer in net.layers)
    assert all(p.dtype == torch.float64 for p in net.parameters())
    assert net.layers[0].activation.slopes() == (0.5, 1.0, 2.0)


@pytest.mark.parametrize(
    ("features", "layers", "named"), [(0, 2, "features"), (4, 0, "layers"), (4, -1, "layers")]
)
def test_impossible_sizes_are_named(features: int, layers: int, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        LUNet(features, layers)


@pytest.mark.parametrize("activation", ["leaky", "learnable", "generalized-learnable"])
def test_each_layer_owns_its_activation(activation: str) -> None:
    given_ = ACTIVATIONS[activation]()
    net = LUNet(4, 4, given_)
    own = [layer.activation for layer in net.layers[:-1]]
    assert len({id(a) for a in [*own, given_]}) == 4
    parameters = [p for a in own for p in a.parameters()]
    assert len({p.data_ptr() for p in parameters}) == len(parameters)
    if parameters:
        with torch.no_grad():
            parameters[0].add_(1.0)
        assert not torch.equal(own[0].slopes(), own[1].slopes())
        assert torch.equal(own[1].slopes(), own[2].slopes())


def test_the_default_activation_is_not_shared_between_nets() -> None:
    first, second = LUNet(3, 2), LUNet(3, 2)
    assert first.layers[0].activation is not second.layers[0].activation


@activations
@depths
@pytest.mark.parametrize("d", [1, 16, 64])
def test_starts_near_the_identity(activation: str, layers: int, d: int) -> None:
    net = LUNet(d, layers, ACTIVATIONS[activation](), dtype=torch.float64)
    zero = torch.zeros(d, dtype=torch.float64)
    assert net(zero).abs().max() < 1e-6
    jacobian = torch.autograd.functional.jacobian(net, zero)
    assert torch.linalg.matrix_norm(jacobian - torch.eye(d), 2) < 0.25 * layers
    x = 0.1 * normal(50, d)
    assert (net(x) - x).norm() < 0.3 * layers * x.norm()


def test_reset_parameters_starts_near_the_identity_again() -> None:
    net = make(8, 3, dtype=torch.float32, offset=5.0)
    net.reset_parameters()
    x = 0.1 * normal(50, 8, dtype=torch.float32)
    assert (net(x) - x).norm() < x.norm()


# ---- values


@activations
@depths
@pytest.mark.parametrize("shape", [(), (1,), (0,), (7,), (3, 2), (200,)], ids=str)
def test_values_and_shapes(activation: str, layers: int, shape: tuple[int, ...]) -> None:
    net = make(6, layers, activation)
    x = normal(*shape, 6)
    exact, exact_logabsdet = exact_forward(x, states(net))
    y, logabsdet = net.forward_and_logabsdet(x)
    torch.testing.assert_close(y, exact, rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(net(x), exact, rtol=1e-10, atol=1e-11)
    assert logabsdet.shape == shape
    torch.testing.assert_close(logabsdet, exact_logabsdet, rtol=1e-10, atol=1e-10)
    back, inverse_logabsdet = net.inverse_and_logabsdet(exact)
    torch.testing.assert_close(back, x, rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(net.inverse(exact), x, rtol=1e-7, atol=1e-8)
    assert inverse_logabsdet.shape == shape
    torch.testing.assert_close(inverse_logabsdet, -exact_logabsdet, rtol=1e-7, atol=1e-8)


@activations
@given(
    d=st.integers(1, 129),
    layers=st.integers(1, 4),
    shape=st.sampled_from([(1,), (3, 5), (1, 1, 2), (65,), (530,)]),
    seed=st.integers(0, 1000),
    spread=st.sampled_from([0.0, 0.5, 1.5]),
    offset=st.sampled_from([0.0, 1.0, 10.0]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_round_trips(
    activation: str,
    d: int,
    layers: int,
    shape: tuple[int, ...],
    seed: int,
    spread: float,
    offset: float,
    dtype: torch.dtype,
) -> None:
    """Both directions, to eps times the product over the layers of kappa(W) max phi'/min phi'."""
    net = make(d, layers, activation, seed=seed, dtype=dtype, spread=spread, offset=offset)
    eps = torch.finfo(dtype).eps
    with torch.no_grad():
        x = normal(*shape, d, seed=seed, dtype=dtype)
        error = (net.inverse(net(x)).double() - x.double()).norm(dim=-1)
        assert (error <= BOUND * truth.round_trip_bound(x.double(), states(net), eps)).all()
        y = net(normal(*shape, d, seed=seed + 1, dtype=dtype))
        back = net.inverse(y)
        error = (net(back).double() - y.double()).norm(dim=-1)
        assert (error <= BOUND * truth.inverse_round_trip_bound(back.double(), states(net), eps)).all()


def test_a_large_bias_is_subtracted_after_the_activation_is_undone() -> None:
    """(2.2) as printed subtracts it before, which looks right only while the bias is small."""
    net = make(6, 3, offset=50.0)
    x = normal(20, 6)
    torch.testing.assert_close(net.inverse(net(x)), x, rtol=1e-8, atol=1e-8)


@pytest.mark.slow
@activations
@given(d=st.integers(1, 200), layers=st.integers(1, 8), rows=st.integers(1, 900), seed=st.integers(0, 10**6))
def test_round_trips_at_length(activation: str, d: int, layers: int, rows: int, seed: int) -> None:
    net = make(d, layers, activation, seed=seed)
    x = normal(rows, d, seed=seed)
    error = (net.inverse(net(x)) - x).norm(dim=-1)
    assert (error <= BOUND * truth.round_trip_bound(x, states(net), torch.finfo(torch.float64).eps)).all()


# ---- log-determinants and gradients


@activations
@given(d=st.integers(1, 10), layers=st.integers(1, 4), seed=st.integers(0, 1000), bias=st.booleans())
def test_logabsdet_against_the_jacobian(activation: str, d: int, layers: int, seed: int, bias: bool) -> None:
    net = make(d, layers, activation, seed=seed, bias=bias)
    x = normal(d, seed=seed)
    y, logabsdet = net.forward_and_logabsdet(x)
    explicit = torch.func.jacrev(lambda v: exact_forward(v, states(net))[0])(x)
    for jacobian in (explicit, torch.autograd.functional.jacobian(net, x)):
        torch.testing.assert_close(logabsdet, torch.linalg.slogdet(jacobian)[1], rtol=1e-8, atol=1e-8)
    inverse_logabsdet = net.inverse_and_logabsdet(y)[1]
    jacobian = torch.autograd.functional.jacobian(net.inverse, y)
    torch.testing.assert_close(inverse_logabsdet, torch.linalg.slogdet(jacobian)[1], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("activation", ["leaky", "learnable", "generalized-learnable"])
@pytest.mark.parametrize("rows", [3, 40])
def test_gradients(method: str, activation: str, rows: int) -> None:
    """Every parameter of every layer, the learnable slopes of each included."""
    net = make(5, 3, activation)
    x = normal(rows, 5).requires_grad_()
    exact_x = x.detach().clone().requires_grad_()
    layers, leaves = [], []
    for layer, state in zip(net.layers, states(net), strict=True):
        values = [state.lu.clone().requires_grad_(), state.bias.clone().requires_grad_()]
        slopes = state.slopes
        if isinstance(slopes, Tensor):
            slopes = slopes.clone().requires_grad_()
        layers.append(state._replace(lu=values[0], bias=values[1], slopes=slopes))
        leaves.append((layer, values, slopes))
    exact = (exact_inverse if "inverse" in method else exact_forward)(exact_x, layers)
    found = getattr(net, method)(x)
    if not isinstance(found, tuple):
        found, exact = (found,), exact[:1]
    cotangents = [normal(*v.shape, seed=7) for v in exact]
    torch.autograd.backward(found, cotangents)
    torch.autograd.backward(exact, cotangents)
    pairs = [(x.grad, exact_x.grad)]
    for layer, (lu, bias), slopes in leaves:
        pairs += [(layer.lu.grad, lu.grad), (layer.bias.grad, bias.grad)]
        if isinstance(slopes, Tensor):
            # From the gradient of (a, c, kappa) to that of the stored parameters.
            parameters = list(layer.activation.parameters())
            true = torch.autograd.grad(layer.activation.slopes(), parameters, slopes.grad)
            pairs += [(p.grad, t) for p, t in zip(parameters, true, strict=True)]
            assert all(p.grad.abs() > 0 for p in parameters)
    for f, t in pairs:
        assert (f - t).norm() <= 1e-9 * (t.norm() + 1)


def test_gradient_through_a_round_trip_is_that_of_the_identity() -> None:
    """inverse(f(x)) = x whatever the parameters: dx/dx = I and nothing for the parameters."""
    net = make(6, 3, "learnable")
    x = normal(30, 6).requires_grad_()
    cotangent = normal(30, 6, seed=5)
    gradients = torch.autograd.grad(net.inverse(net(x)), [x, *net.parameters()], cotangent)
    torch.testing.assert_close(gradients[0], cotangent, rtol=1e-9, atol=1e-9)
    for gradient in gradients[1:]:
        assert gradient.abs().max() < 1e-7


def test_training_keeps_the_net_invertible() -> None:
    """A few hundred steps at a rate far too high: finite, and still its own inverse."""
    net = LUNet(8, 3, LeakySoftplus(0.1, learnable=True))
    x, target = normal(64, 8, dtype=torch.float32), normal(64, 8, seed=9, dtype=torch.float32)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.05)
    losses = []
    for _ in range(150):
        optimizer.zero_grad()
        loss = (net(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]
    bound = truth.round_trip_bound(x.double(), states(net), torch.finfo(torch.float32).eps)
    assert ((net.inverse(net(x)).double() - x.double()).norm(dim=-1) <= BOUND * bound).all()


# ---- condition


def test_condition_against_linalg() -> None:
    """kappa_1 of L and U of each layer."""
    net = make(20, 3, spread=1.0)
    report = net.condition()
    assert len(report.layers) == 3
    for row, state in zip(report.layers, states(net), strict=True):
        lower, upper = truth.factors(state.lu, state.sign)
        for found, matrix in ((row.kappa_lower, lower), (row.kappa_upper, upper)):
            assert found == pytest.approx(float(torch.linalg.cond(matrix, p=1)), rel=1e-9)


def test_condition_slope_ranges() -> None:
    net = make(5, 3)
    x = normal(40, 5)
    on_data, without = net.condition(x), net.condition()
    for index, (row, state) in enumerate(zip(on_data.layers, states(net), strict=True)):
        if state.slopes is None:
            assert (row.slope_low, row.slope_high) == (1.0, 1.0)
        else:
            slope = truth.phi_prime(truth.pre_activation(x, state), state.slopes)
            assert row.slope_low == pytest.approx(float(slope.min()), rel=1e-9)
            assert row.slope_high == pytest.approx(float(slope.max()), rel=1e-9)
            # Without data, the whole range the activation has.
            assert without.layers[index].slope_low == pytest.approx(state.slopes[0])
            assert without.layers[index].slope_high == pytest.approx(state.slopes[0] + state.slopes[1])
        x = truth.forward(x, state)[0]
    assert on_data.digits_lost < without.digits_lost


def test_condition_names_the_layer_that_is_at_fault() -> None:
    net = LUNet(6, 3)
    with torch.no_grad():
        net.layers[1].lu[2, 2] = -14.0
    with pytest.warns(ConditionWarning, match="layers.1 can lose most"):
        report = net.condition()
    lost = [layer.digits_lost for layer in report.layers]
    assert lost[1] == max(lost)
    assert lost[1] > 5
    assert report.digits_lost == pytest.approx(sum(lost))
    text = str(report)
    assert sum(name in text for name in ("layers.0", "layers.1", "layers.2")) == 3
    assert len(text.splitlines()) >= 4


def test_condition_bounds_what_a_round_trip_loses() -> None:
    net = make(12, 3, dtype=torch.float32, spread=1.5)
    x = normal(100, 12, dtype=torch.float32)
    report = net.condition(x)
    relative = (net.inverse(net(x)) - x).norm() / x.norm()
    assert -math.log10(float(relative)) > report.digits_left
    assert report.digits == pytest.approx(-math.log10(torch.finfo(torch.float32).eps))
    assert LUNet(4, 2, dtype=torch.float64).condition().digits == pytest.approx(15.65, abs=0.01)


@pytest.mark.filterwarnings("error")
def test_condition_leaves_no_graph_and_changes_nothing() -> None:
    net = make(5, 2, "learnable")
    before = {k: v.clone() for k, v in net.state_dict().items()}
    x = normal(4, 3, 5).requires_grad_()
    net.condition(x)
    assert x.grad is None
    for key, value in net.state_dict().items():
        assert torch.equal(value, before[key])


# ---- state and structure


def test_state_round_trip() -> None:
    source, target = make(5, 3, "learnable"), make(5, 3, "learnable", seed=7)
    target.load_state_dict(source.state_dict())
    x = normal(9, 5)
    assert torch.equal(target(x), source(x))
    assert torch.equal(target.inverse(x), source.inverse(x))


def test_an_inverse_is_never_stale() -> None:
    """Nothing is cached across a change of parameters, by an optimiser, by loading or by hand."""
    net = make(5, 2)
    x = normal(9, 5)
    net.inverse(net(x))
    for change in (
        lambda: net.load_state_dict(make(5, 2, seed=3).state_dict()),
        lambda: net.layers[0].lu.data.mul_(1.5),
        lambda: net.to(torch.float32).to(torch.float64),
    ):
        change()
        torch.testing.assert_close(net.inverse(net(x)), x, rtol=1e-8, atol=1e-8)


def test_follows_dtype() -> None:
    net = LUNet(4, 3, LeakySoftplus(0.2, learnable=True))
    x = normal(6, 4)
    assert net.double()(x).dtype == torch.float64
    torch.testing.assert_close(net.inverse(net(x)), x)


def test_layers_with_permutations_can_be_put_in() -> None:
    net = make(5, 2)
    linear = nn.Linear(5, 5, dtype=torch.float64)
    net.layers[0] = LUDense.from_linear(linear, LeakySoftplus(0.3))
    x = normal(9, 5)
    torch.testing.assert_close(net.inverse(net(x)), x)
    expected = truth.forward(truth.phi(linear(x), (0.3, 0.7, 1.0)), truth.read(net.layers[1]))[0]
    torch.testing.assert_close(net(x), expected)


# ---- permutations and data-dependent initialisation


@pytest.mark.parametrize("kind", ["random", "reverse"])
def test_permutations_mix_what_layers_pass_on(kind: str) -> None:
    torch.manual_seed(0)
    net = LUNet(6, 4, LeakySoftplus(0.5), dtype=torch.float64, permutation=kind)
    orders = [layer.permutation for layer in net.layers]
    assert orders[-1] is None
    if kind == "reverse":
        assert all(order.tolist() == [5, 4, 3, 2, 1, 0] for order in orders[:-1])
    else:
        assert len({tuple(order.tolist()) for order in orders[:-1]}) > 1
    kept = [None if order is None else order.clone() for order in orders]
    net.reset_parameters()
    assert all(
        (a is None and b is None) or torch.equal(a, b)
        for a, b in zip(kept, [layer.permutation for layer in net.layers], strict=True)
    )
    x = normal(7, 6)
    y, logabsdet = net.forward_and_logabsdet(x)
    exact, total = x, 0.0
    for state in states(net):
        exact, share = truth.forward(exact, state)
        total = total + share
    torch.testing.assert_close(y, exact, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(logabsdet, total, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(net.inverse(y), x, rtol=1e-9, atol=1e-9)
    again = LUNet(6, 4, LeakySoftplus(0.5), dtype=torch.float64)
    again.load_state_dict(net.state_dict())
    assert torch.equal(again(x), y)


def test_an_unknown_permutation() -> None:
    with pytest.raises(ValueError, match="permutation must be one of reverse, random or None, got 'shuffle'"):
        LUNet(3, 2, permutation="shuffle")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("permutation", [None, "random"])
def test_whiten_makes_every_layers_output_white(permutation: str | None, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    mixed = torch.randn(5, 5, dtype=dtype)
    x = torch.randn(4000, 5, dtype=dtype).exp() @ mixed + 7 * torch.randn(5, dtype=dtype)
    net = LUNet(5, 3, LeakySoftplus(0.3, True, 5), dtype=dtype, permutation=permutation)
    net.whiten(x)
    before = x
    for layer in net.layers:
        h = before @ layer.weight.mT + layer.bias
        assert float(h.mean(0).abs().max()) < 1e-3
        # The covariance is drawn to its mean diagonal by D/(D + N).
        assert float((torch.cov(h.mT) - torch.eye(5, dtype=dtype)).abs().max()) < 0.15
        before = layer(before)
    torch.testing.assert_close(before, net(x))


@pytest.mark.parametrize("signs", ["negative", "random"])
def test_signs_turn_coordinates_round(signs: str) -> None:
    torch.manual_seed(0)
    net = LUNet(5, 4, LeakySoftplus(0.5), dtype=torch.float64, permutation="random", signs=signs)
    kept = [layer.sign.clone() for layer in net.layers]
    assert all(bool((each == -1).all()) for each in kept) == (signs == "negative")
    assert all(bool((each.abs() == 1).all()) for each in kept)
    torch.testing.assert_close(net(torch.zeros(5, dtype=torch.float64)), torch.zeros(5, dtype=torch.float64))
    x = normal(4000, 5) @ (torch.eye(5) + 0.3 * normal(5, 5)) + 3
    net.whiten(x)
    for layer, sign in zip(net.layers, kept, strict=True):
        assert torch.equal(layer.sign, sign)
    h = x
    for layer in net.layers:
        white = h @ layer.weight.mT + layer.bias
        assert float((torch.cov(white.mT) - torch.eye(5)).abs().max()) < 0.2
        # Turned back, A is the symmetric root that is nearest to the identity.
        order = torch.arange(5) if layer.permutation is None else layer.permutation
        root = layer.sign.unsqueeze(-1) * layer.weight[order]
        torch.testing.assert_close(root, root.mT, rtol=1e-8, atol=1e-8)
        h = layer(h)
    torch.testing.assert_close(net.inverse(h), x, rtol=1e-8, atol=1e-8)


def test_unknown_signs() -> None:
    with pytest.raises(ValueError, match="signs must be one of positive, negative, random, got 'plus'"):
        LUNet(3, 2, signs="plus")


def test_whiten_matches_the_symmetric_root_of_scipy_or_numpy() -> None:
    """A = C^(-1/2) of the shrunk covariance, by an eigendecomposition of numpy's."""
    import numpy as np

    x = normal(50, 4) @ normal(4, 4)
    net = LUNet(4, 1, dtype=torch.float64)
    net.whiten(x)
    covariance = np.cov(x.numpy().T)
    share = 4 / (4 + 50)
    shrunk = (1 - share) * covariance + share * np.mean(np.diag(covariance)) * np.eye(4)
    values, vectors = np.linalg.eigh(shrunk)
    root = vectors @ np.diag(values**-0.5) @ vectors.T
    torch.testing.assert_close(net.layers[0].weight.detach(), torch.from_numpy(root), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("rows", [2, 3])
def test_whiten_takes_fewer_rows_than_features_and_constant_columns(rows: int) -> None:
    x = normal(rows, 6)
    x[:, 2] = 5.0
    net = LUNet(6, 3, LeakySoftplus(0.5), dtype=torch.float64)
    net.whiten(x)
    assert all(bool(torch.isfinite(parameter).all()) for parameter in net.parameters())
    torch.testing.assert_close(net.inverse(net(x)), x, rtol=1e-7, atol=1e-7)


def test_whiten_refuses() -> None:
    net = LUNet(3, 2)
    with pytest.raises(ValueError, match="at least 2 rows"):
        net.whiten(torch.zeros(1, 3))
    with pytest.raises(ValueError, match="all finite"):
        net.whiten(torch.tensor([[1.0, 2.0, 3.0], [1.0, float("nan"), 3.0]]))
    with pytest.raises(ValueError, match="3 features"):
        net.whiten(torch.zeros(5, 4))
    with pytest.raises(ValueError, match="bias=True"):
        LUNet(3, 2, bias=False).whiten(torch.randn(5, 3))


# ---- structure and starts


@pytest.mark.parametrize("options", [{"permutation": "random"}, {"signs": "random"}])
def test_random_structure_is_drawn_from_its_own_seed(options: dict[str, str]) -> None:
    made = []
    for seed in (0, 1):  # seed + rank, as trainers do
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        with torch.device("meta" if seed else "cpu"):
            made.append(LUNet(8, 4, **options).to_empty(device="cpu"))
        made[-1].reset_parameters()
        assert seed or not torch.equal(torch.get_rng_state(), before)
    one, two = (state_of_structure(net) for net in made)
    assert one == two
    assert len(set(one)) > 1  # each layer its own
    other = LUNet(8, 4, **options, structure_seed=1)
    assert state_of_structure(other) != one
    made[0].reset_parameters()
    assert state_of_structure(made[0]) == one
    with pytest.raises(TypeError, match="structure_seed must be an int"):
        LUNet(3, 2, structure_seed=0.5)


def state_of_structure(net: LUNet) -> list[tuple[tuple[float, ...], tuple[int, ...] | None]]:
    return [
        (
            tuple(layer.sign.tolist()),
            None if layer.permutation is None else tuple(layer.permutation.tolist()),
        )
        for layer in net.layers
    ]


@pytest.mark.parametrize("order", ["modules", "children first", "layers", "net"])
def test_a_start_on_meta_is_the_start_of_a_net(order: str) -> None:
    options = {"permutation": "random", "signs": "random"}
    torch.manual_seed(0)
    whole = LUNet(7, 3, LeakySoftplus(0.3, learnable=True), **options)
    with torch.device("meta"):
        net = LUNet(7, 3, LeakySoftplus(0.3, learnable=True), **options)
    net.to_empty(device="cpu")
    modules = list(net.modules())
    if order == "children first":
        modules.reverse()
    elif order == "layers":
        modules = [m for m in modules if not isinstance(m, LUNet)]
    elif order == "net":
        modules = [net]
    for module in modules:
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert state_of_structure(net) == state_of_structure(whole)
    for name, value in net.named_parameters():
        assert bool(value.isfinite().all()), name
    for layer, like in zip(net.layers, whole.layers, strict=True):
        torch.testing.assert_close(layer.lu.diagonal(), like.lu.diagonal())
    zero = torch.zeros(7)
    torch.testing.assert_close(net(zero), zero, rtol=0, atol=1e-6)
    x = normal(5, 7, dtype=torch.float32)
    torch.testing.assert_close(net.inverse(net(x)), x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("memory", ["saved", "reversible"])
def test_replicas_of_data_parallel(memory: str) -> None:
    def replica(module: nn.Module) -> nn.Module:  # what torch.nn.parallel.replicate makes
        made = module._replicate_for_data_parallel()
        for name, child in module._modules.items():
            if child is not None:
                setattr(made, name, replica(child))
        for name, parameter in module._parameters.items():
            if parameter is not None:
                setattr(made, name, parameter.clone())
        for name, buffer in module._buffers.items():
            if buffer is not None:
                setattr(made, name, buffer.clone())
        return made

    net = LUNet(6, 3, memory=memory, permutation="random", signs="random")
    x = normal(5, 6, dtype=torch.float32)
    for method in ("forward", "inverse"):
        found = getattr(replica(net), method)(x)
        torch.testing.assert_close(found, getattr(net, method)(x))
    found.sum().backward()
    assert all(p.grad is not None for p in net.parameters())


# ---- what somebody replaced


@pytest.mark.parametrize("memory", ["saved", "reversible"])
@pytest.mark.parametrize("what", ["layer", "activation", "class"])
@pytest.mark.parametrize("method", METHODS)
def test_what_is_replaced_in_a_layer_is_called(method: str, what: str, memory: str) -> None:
    plain = LUNet(6, 3, memory=memory)
    net = copy.deepcopy(plain)
    seen = []
    target = net.layers[1].activation if what == "activation" else net.layers[1]
    original = getattr(type(target), method)

    def mine(self: nn.Module, x: Tensor) -> object:
        seen.append(method)
        result = original(self, x)
        return (2.0 * result[0], *result[1:]) if isinstance(result, tuple) else 2.0 * result

    if what == "class":
        target.__class__ = type("Mine", (LUDense,), {method: mine})
    else:
        setattr(target, method, functools.partial(mine, target))
    x = normal(9, 6, dtype=torch.float32)
    found, expected = (getattr(each, method)(x) for each in (net, plain))
    found, expected = (each[0] if isinstance(each, tuple) else each for each in (found, expected))
    assert seen == [method]
    assert not torch.allclose(found, expected)
    # An activation's methods with a log-determinant are made of those without, unless they are replaced too.
    followers = {method, f"{method}_and_logabsdet"} if what == "activation" else {method}
    for other in set(METHODS) - followers:
        torch.testing.assert_close(getattr(net, other)(x), getattr(plain, other)(x))
    assert seen == [method]


@pytest.mark.parametrize("memory", ["saved", "reversible"])
def test_hooks_on_all_modules_see_layers_and_activations(memory: str) -> None:
    net, seen = LUNet(6, 3, memory=memory), []
    x = normal(9, 6, dtype=torch.float32).requires_grad_()
    plain = net(x)
    hooks = [
        nn.modules.module.register_module_forward_hook(lambda m, a, y: seen.append(type(m).__name__)),
        nn.modules.module.register_module_full_backward_hook(lambda m, g, h: seen.append("backward")),
    ]
    try:
        found = net(x)
        found.sum().backward()
    finally:
        for hook in hooks:
            hook.remove()
    torch.testing.assert_close(found, plain)
    assert [name for name in seen if name != "backward"] == ["LeakySoftplus", "LUDense"] * 2 + [
        "LUDense",
        "LUNet",
    ]
    assert seen.count("backward") == 6


def test_another_slope_of_a_subclass_is_taken() -> None:
    class Half(LeakySoftplus):
        def slopes(self) -> Tensor:
            return torch.stack([0.5 * self.alpha, 1.0 - self.alpha, torch.ones_like(self.alpha)])

    net = LUNet(6, 2, Half(0.4, learnable=True))
    x = normal(9, 6, dtype=torch.float32)
    one, last = net.layers
    torch.testing.assert_close(net(x), last(one(x)))


def test_offloaded_by_accelerate() -> None:
    accelerate = pytest.importorskip("accelerate")
    net = LUNet(6, 3, LeakySoftplus(0.2, learnable=True), permutation="random", signs="random")
    x = normal(4, 6, dtype=torch.float32)
    expected = net(x)
    for offload_buffers in (False, True):
        made = accelerate.cpu_offload(copy.deepcopy(net), "cpu", offload_buffers=offload_buffers)
        torch.testing.assert_close(made(x), expected)


class Doubled(nn.Module):
    def forward(self, t: Tensor) -> Tensor:
        return 2.0 * t


class Halved(Doubled):
    def right_inverse(self, t: Tensor) -> Tensor:
        return 0.5 * t


def test_whiten_writes_through_a_parametrisation() -> None:
    x = 3 * normal(4000, 5) @ (torch.eye(5) + 0.3 * normal(5, 5)) + 2
    net, plain = (LUNet(5, 2, dtype=torch.float64) for _ in range(2))
    for layer in net.layers:
        parametrize.register_parametrization(layer, "lu", Halved())
        parametrize.register_parametrization(layer, "bias", Halved())
    net.whiten(x)
    plain.whiten(x)
    torch.testing.assert_close(net(x), plain(x))
    net.reset_parameters()
    torch.testing.assert_close(net(torch.zeros(5, dtype=torch.float64)), torch.zeros(5, dtype=torch.float64))


def test_whiten_says_why_it_cannot_write() -> None:
    net = LUNet(5, 2)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    parametrize.register_parametrization(net.layers[1], "lu", Doubled())
    with pytest.raises(ValueError, match="lu is parametrised by Doubled, which has no right_inverse"):
        net.whiten(normal(50, 5, dtype=torch.float32))
    assert torch.equal(net.layers[0].lu, before["layers.0.lu"])  # before any work


@pytest.mark.parametrize("method", ["forward_and_logabsdet", "inverse_and_logabsdet"])
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("features", [6, 200])
def test_a_log_determinant_may_be_added_to_in_place(method: str, layers: int, features: int) -> None:
    net = LUNet(features, layers)
    x = normal(70, features, dtype=torch.float32)
    for recorded in (True, False):
        with torch.set_grad_enabled(recorded):
            logabsdet = getattr(net, method)(x)[1]
            expected = logabsdet + torch.arange(70.0)
            logabsdet += torch.arange(70.0)
        torch.testing.assert_close(logabsdet, expected)


# ---- two processes


def in_two_processes(rank: int, file: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    x = torch.ones(3, 6)

    def same_everywhere(y: Tensor) -> bool:
        found = [torch.empty_like(y) for _ in range(2)]
        dist.all_gather(found, y.detach())
        return torch.equal(*found)

    options = {"permutation": "random", "signs": "random"}
    torch.manual_seed(rank)
    net = LUNet(6, 3, **options)
    fully_shard(net)  # shards the weights of each process as they are, and no buffers
    assert same_everywhere(net(x))

    # What only the first process has, DistributedDataParallel gives to all.
    torch.manual_seed(rank)
    layer = LUDense.from_linear(nn.Linear(6, 6))
    layer = layer if layer.permutation is not None else LUDense(6, permutation=torch.randperm(6))
    assert not same_everywhere(layer(x))
    parallel = nn.parallel.DistributedDataParallel(layer)
    assert same_everywhere(parallel(x))
    assert same_everywhere(layer.inverse(x))
    # So does a broadcast by hand.
    torch.manual_seed(rank)
    layer = LUDense(6, permutation=torch.randperm(6))
    for tensor in (*layer.parameters(), *layer.buffers()):
        dist.broadcast(tensor.data, 0)
    assert same_everywhere(layer(x))
    assert same_everywhere(layer.double()(x.double()))

    # The contract of fully_shard on the meta device: every module is reset, in the order of modules().
    for whole in (False, True):
        with torch.device("meta"):
            net = LUNet(6, 3, LeakySoftplus(0.3, learnable=True), **options)
        for layer in () if whole else net.layers:
            fully_shard(layer)
        fully_shard(net)
        net.to_empty(device="cpu")
        torch.manual_seed(rank)
        for module in net.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        y = net(x)
        assert same_everywhere(y)
        torch.testing.assert_close(net(torch.zeros(2, 6)), torch.zeros(2, 6), rtol=0, atol=1e-6)
        y.sum().backward()
    net = LUNet(6, 3, **options)
    fully_shard(net)
    torch.manual_seed(0)
    rows = torch.randn(100, 6) * 3 + 1
    net.whiten(rows)
    found = net(rows).detach()
    whole = LUNet(6, 3, **options)
    whole.whiten(rows)
    torch.testing.assert_close(found, whole(rows).detach(), rtol=1e-4, atol=1e-4)
    dist.destroy_process_group()


@pytest.mark.slow
def test_structure_in_two_processes(tmp_path: Path) -> None:
    mp.spawn(in_two_processes, (str(tmp_path / "meeting"),), 2)

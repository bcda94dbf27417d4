"""LUDense: the drop-in for nn.Linear, its inverse, its log-determinant and its gradients."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
import truth
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from lunet_fast import GeneralizedLeakySoftplus, LeakySoftplus, LUDense, functional

ACTIVATIONS: dict[str, Callable[[], nn.Module | None]] = {
    "none": lambda: None,
    "leaky": lambda: LeakySoftplus(0.1),
    "leaky-steep": lambda: LeakySoftplus(1e-3),
    "generalized": lambda: GeneralizedLeakySoftplus(2.0, 0.3),
    "generalized-sharp": lambda: GeneralizedLeakySoftplus(50.0, 0.02),
}
LEARNABLE: dict[str, Callable[[], nn.Module]] = {
    "leaky": lambda: LeakySoftplus(0.2, learnable=True),
    "generalized": lambda: GeneralizedLeakySoftplus(1.5, 0.3, learnable=True),
}
DTYPES = [torch.float32, torch.float64]
SHAPES = [(), (1,), (0,), (5,), (300,), (3, 0, 2), (2, 3), (2, 1, 4, 3)]
METHODS = ["forward", "inverse", "forward_and_logabsdet", "inverse_and_logabsdet"]
#: Multiples of the first-order bounds of truth.py that rounding may reach.
BOUND = 6.0

activations = pytest.mark.parametrize("activation", ACTIVATIONS)
methods = pytest.mark.parametrize("method", METHODS)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])


def make(
    d: int,
    activation: str = "none",
    *,
    seed: int = 0,
    bias: bool = True,
    permuted: bool = True,
    dtype: torch.dtype = torch.float64,
    **scales: float,
) -> LUDense:
    """A layer with random parameters, signs and order of rows."""
    rng = torch.Generator().manual_seed(seed + 1)
    permutation = torch.randperm(d, generator=rng) if permuted else None
    layer = LUDense(d, d, bias, None, dtype, activation=ACTIVATIONS[activation](), permutation=permutation)
    truth.randomise(layer, seed, **scales)
    return layer


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64, scale: float = 1.0) -> Tensor:
    rng = torch.Generator().manual_seed(seed + 2)
    return (scale * torch.randn(shape, generator=rng, dtype=torch.float64)).to(dtype)


# ---- the shape of the module


def test_takes_the_positional_arguments_of_linear() -> None:
    layer = LUDense(4, 4, False, "cpu", torch.float64)
    assert (layer.in_features, layer.out_features, layer.bias) == (4, 4, None)
    assert layer.lu.dtype == torch.float64
    assert LUDense(4).out_features == 4
    assert LUDense(4, 4).bias.shape == (4,)
    assert LUDense(4, activation=LeakySoftplus(0.1)).activation.alpha == 0.1
    assert LUDense(4).activation is None


def test_replaces_linear_in_a_model() -> None:
    model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), LUDense(8, 8), nn.Linear(8, 1))
    loss = model(torch.randn(5, 3)).square().mean()
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert "in_features=8, out_features=8, bias=True" in repr(model)


def test_non_square_is_refused() -> None:
    with pytest.raises(ValueError, match=r"(?s)out_features.*5|5.*out_features"):
        LUDense(4, 5)


@pytest.mark.parametrize("permutation", [[0, 0, 1], [0, 1], [0, 1, 3], [-1, 0, 1]], ids=str)
def test_what_is_no_permutation_is_refused(permutation: list[int]) -> None:
    with pytest.raises(ValueError, match="permutation"):
        LUDense(3, permutation=torch.tensor(permutation))


@pytest.mark.parametrize("bias", [True, False])
def test_has_as_many_numbers_as_linear(bias: bool) -> None:
    layer, linear = LUDense(7, 7, bias), nn.Linear(7, 7, bias)
    assert sum(p.numel() for p in layer.parameters()) == sum(p.numel() for p in linear.parameters())
    names = {n for n, _ in layer.named_parameters()}
    assert names == ({"lu", "bias"} if bias else {"lu"})
    assert {"sign"} <= {n for n, _ in layer.named_buffers()}


@activations
def test_starts_near_an_invertible_identity(activation: str) -> None:
    layer = LUDense(64, activation=ACTIVATIONS[activation]())
    singular = torch.linalg.svdvals(layer.weight)
    assert singular[0] / singular[-1] < 3
    off = layer.weight - torch.diag(layer.weight.diagonal())
    assert off.norm() < 0.5 * layer.weight.diagonal().norm()


def test_reset_parameters_starts_again() -> None:
    layer = make(6, dtype=torch.float32)
    permutation = layer.permutation.clone()
    layer.reset_parameters()
    assert torch.equal(layer.sign, torch.ones(6))
    assert torch.equal(layer.bias, torch.zeros(6))
    # Its own identity is P^T: the order of rows is no parameter and is kept.
    assert torch.equal(layer.permutation, permutation)
    assert (layer.weight[permutation] - torch.eye(6)).abs().max() < 0.3
    assert layer.lu.detach().abs().max() > 0


@pytest.mark.parametrize("permuted", [False, True])
def test_weight_is_the_matrix_and_read_only(permuted: bool) -> None:
    layer = make(6, permuted=permuted)
    exact = truth.weight(layer.lu, layer.sign, layer.permutation)
    torch.testing.assert_close(layer.weight, exact, rtol=1e-14, atol=1e-15)
    assert "weight" not in dict(layer.named_parameters())
    for value in (torch.eye(6), nn.Parameter(torch.eye(6))):
        with pytest.raises((AttributeError, KeyError)):
            layer.weight = value
    torch.testing.assert_close(layer.weight, exact, rtol=1e-14, atol=1e-15)
    cotangent = normal(6, 6)
    found = torch.autograd.grad((layer.weight * cotangent).sum(), layer.lu)
    true = torch.autograd.grad((exact * cotangent).sum(), layer.lu)
    torch.testing.assert_close(found, true, rtol=1e-12, atol=1e-13)


def test_logabsdet_is_a_scalar_with_its_gradient() -> None:
    layer = make(9, "leaky")
    logabsdet = layer.logabsdet()
    assert logabsdet.shape == ()
    torch.testing.assert_close(logabsdet, torch.linalg.slogdet(layer.weight)[1], rtol=1e-12, atol=1e-12)
    (gradient,) = torch.autograd.grad(logabsdet, layer.lu)
    assert torch.equal(gradient, torch.eye(9, dtype=torch.float64))


# ---- values


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("permuted", [False, True])
@given(
    d=st.integers(1, 129),
    rows=st.sampled_from([1, 2, 5, 33, 130, 600]),
    seed=st.integers(0, 1000),
    dtype=st.sampled_from(DTYPES),
)
def test_equals_linear_with_the_same_weight(
    bias: bool, permuted: bool, d: int, rows: int, seed: int, dtype: torch.dtype
) -> None:
    layer = make(d, bias=bias, permuted=permuted, seed=seed, dtype=dtype)
    state = truth.read(layer)
    weight = truth.weight(state.lu, state.sign, state.permutation)
    linear = nn.Linear(d, d, bias, dtype=torch.float64)
    with torch.no_grad():
        linear.weight.copy_(weight)
        if bias:
            linear.bias.copy_(layer.bias)
    x = normal(rows, d, seed=seed, dtype=dtype)
    y, exact = layer(x), linear(x.double())
    assert y.dtype == dtype
    size = torch.linalg.matrix_norm(weight, 2) * x.double().norm(dim=-1) + (linear.bias.norm() if bias else 0)
    error = (y.double() - exact).norm(dim=-1)
    assert (error <= 4 * torch.finfo(dtype).eps * size).all()


@activations
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_leading_shapes(activation: str, shape: tuple[int, ...]) -> None:
    d = 5
    layer = make(d, activation)
    state = truth.read(layer)
    x = normal(*shape, d).requires_grad_()
    y = layer(x)
    exact, exact_logabsdet = truth.forward(x, state)
    torch.testing.assert_close(y, exact, rtol=1e-11, atol=1e-12)
    pair, logabsdet = layer.forward_and_logabsdet(x)
    torch.testing.assert_close(pair, exact, rtol=1e-11, atol=1e-12)
    assert logabsdet.shape == shape
    torch.testing.assert_close(logabsdet, exact_logabsdet, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(layer.inverse(y), x, rtol=1e-8, atol=1e-9)
    back, inverse_logabsdet = layer.inverse_and_logabsdet(y)
    torch.testing.assert_close(back, x, rtol=1e-8, atol=1e-9)
    assert inverse_logabsdet.shape == shape
    torch.testing.assert_close(inverse_logabsdet, -exact_logabsdet, rtol=1e-9, atol=1e-9)
    total = y.sum() + logabsdet.sum() + back.sum() + inverse_logabsdet.sum()
    gradients = torch.autograd.grad(total, [x, layer.lu, layer.bias])
    assert gradients[0].shape == x.shape
    assert all(g.isfinite().all() for g in gradients)
    if x.numel() == 0:
        assert all((g == 0).all() for g in gradients)


def test_a_column_of_one_feature() -> None:
    layer = make(1, "leaky")
    x = normal(7, 1)
    torch.testing.assert_close(layer(x), truth.forward(x, truth.read(layer))[0])
    torch.testing.assert_close(layer.inverse(layer(x)), x)


@methods
def test_layouts_of_the_input(method: str) -> None:
    """Strided, transposed and expanded inputs give the values and gradients of their contiguous copies."""
    d = 6
    layer = make(d, "leaky")
    views = {
        "every second": lambda b: b[::2],
        "columns with gaps": lambda b: torch.cat([b, b], 1).as_strided((12, d), (2 * d, 2)),
        "transposed": lambda b: b.reshape(d, 12).t(),
        "expanded": lambda b: b[:1].expand(9, d),
        "expanded in the middle": lambda b: b[:4, None].expand(4, 3, d),
        "permuted": lambda b: b.reshape(3, 4, d).permute(1, 0, 2),
        "offset": lambda b: b.reshape(-1)[5 : 5 + 4 * d].view(4, d),
    }
    for name, view in views.items():
        base = normal(12, d).requires_grad_()
        copy_ = base.detach().clone().requires_grad_()
        results = []
        for leaf, x in ((base, view(base)), (copy_, view(copy_).contiguous())):
            out = getattr(layer, method)(x)
            out = out if isinstance(out, tuple) else (out,)
            loss = sum((v * normal(*v.shape, seed=4)).sum() for v in out)
            results.append([*out, *torch.autograd.grad(loss, [leaf, layer.lu, layer.bias])])
        for found, true in zip(*results, strict=True):
            torch.testing.assert_close(found, true, rtol=1e-10, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("d", [6, 150])
@activations
def test_rows_do_not_depend_on_the_batch_they_are_in(activation: str, d: int) -> None:
    """Few rows and many rows take different ways to the same numbers."""
    layer = make(d, activation, coupling=0.3)
    x = normal(4 * d + 5, d)
    everything = [*layer.forward_and_logabsdet(x), *layer.inverse_and_logabsdet(x)]
    for rows in (slice(0, 1), slice(3, 5), slice(0, d), slice(0, d + 1), slice(7, 2 * d)):
        part = [*layer.forward_and_logabsdet(x[rows]), *layer.inverse_and_logabsdet(x[rows])]
        for few, many in zip(part, everything, strict=True):
            torch.testing.assert_close(few, many[rows], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("d", [127, 128, 129, 257])
@pytest.mark.parametrize("rows", [1, 20, 40, 600, 2600])
def test_sizes_around_the_blocks_of_a_triangle(d: int, rows: int) -> None:
    """Values and packed gradients of both directions, with several panels and with one."""
    layer = make(d, "leaky", coupling=0.4, seed=d)
    x = normal(rows, d).requires_grad_()
    lu = layer.lu.detach().clone().requires_grad_()
    bias = layer.bias.detach().clone().requires_grad_()
    state = truth.read(layer)._replace(lu=lu, bias=bias)
    for method, exact_function in (
        ("forward_and_logabsdet", truth.forward),
        ("inverse_and_logabsdet", truth.inverse),
    ):
        found, exact = getattr(layer, method)(x), exact_function(x, state)
        cotangents = [normal(*v.shape, seed=8) for v in exact]
        found = [*found, *torch.autograd.grad(found, [x, layer.lu, layer.bias], cotangents)]
        exact = [*exact, *torch.autograd.grad(exact, [x, lu, bias], cotangents)]
        for f, e in zip(found, exact, strict=True):
            assert (f - e).norm() <= 1e-11 * e.norm()


@methods
def test_unbatched_equals_one_row(method: str) -> None:
    layer = make(8, "generalized")
    x = normal(8)
    single, row = getattr(layer, method)(x), getattr(layer, method)(x[None])
    for s, r in zip(
        single if isinstance(single, tuple) else (single,),
        row if isinstance(row, tuple) else (row,),
        strict=True,
    ):
        torch.testing.assert_close(s, r[0])


@activations
@pytest.mark.parametrize("rows", [1, 3, 50])
def test_pairs_agree_with_the_single_functions(activation: str, rows: int) -> None:
    layer = make(6, activation, dtype=torch.float32)
    x = normal(rows, 6, dtype=torch.float32)
    torch.testing.assert_close(layer.forward_and_logabsdet(x)[0], layer(x), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(layer.inverse_and_logabsdet(x)[0], layer.inverse(x), rtol=1e-5, atol=1e-5)


@methods
def test_arguments_are_left_alone(method: str) -> None:
    layer = make(5, "leaky")
    x = normal(40, 5)
    kept = [v.clone() for v in (x, layer.lu, layer.bias, layer.sign, layer.permutation)]
    getattr(layer, method)(x)
    for now, before in zip((x, layer.lu, layer.bias, layer.sign, layer.permutation), kept, strict=True):
        assert torch.equal(now, before)


def test_wrong_number_of_features_is_named() -> None:
    layer = LUDense(8, activation=LeakySoftplus(0.1))
    for method in METHODS:
        with pytest.raises((ValueError, RuntimeError), match=r"(?s)5.*8|8.*5"):
            getattr(layer, method)(torch.randn(3, 5))


def test_another_dtype_is_refused_as_linear_refuses_it() -> None:
    with pytest.raises((ValueError, RuntimeError, TypeError)):
        LUDense(4)(torch.randn(3, 4, dtype=torch.float64))


# ---- round trips


@activations
@given(
    d=st.integers(1, 129),
    shape=st.sampled_from([(1,), (3,), (2, 5), (1, 1, 7), (64,), (540,)]),
    seed=st.integers(0, 1000),
    spread=st.sampled_from([0.0, 0.5, 3.0]),
    coupling=st.sampled_from([0.02, 0.5]),
    offset=st.sampled_from([0.0, 1.0, 30.0]),
    scale=st.sampled_from([1e-4, 1.0, 1e3]),
    permuted=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
def test_round_trips(
    activation: str,
    d: int,
    shape: tuple[int, ...],
    seed: int,
    spread: float,
    coupling: float,
    offset: float,
    scale: float,
    permuted: bool,
    dtype: torch.dtype,
) -> None:
    """inverse(forward(x)) = x and forward(inverse(y)) = y to eps kappa(W) max phi'/min phi', row by row."""
    layer = make(
        d,
        activation,
        seed=seed,
        permuted=permuted,
        dtype=dtype,
        spread=spread,
        coupling=coupling,
        offset=offset,
    )
    state = truth.read(layer)
    eps = torch.finfo(dtype).eps
    x = normal(*shape, d, seed=seed, dtype=dtype, scale=scale)
    with torch.no_grad():
        error = (layer.inverse(layer(x)).double() - x.double()).norm(dim=-1)
        assert (error <= BOUND * truth.round_trip_bound(x.double(), [state], eps)).all()
        y = layer(normal(*shape, d, seed=seed + 1, dtype=dtype, scale=scale))
        back = layer.inverse(y)
        error = (layer(back).double() - y.double()).norm(dim=-1)
        assert (error <= BOUND * truth.inverse_round_trip_bound(back.double(), [state], eps)).all()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("rows", [3, 700])
@dtypes
def test_round_trip_of_an_ill_conditioned_layer(dtype: torch.dtype, rows: int, seed: int) -> None:
    """u_ii over six decades: an explicit inverse of W would still do, one by normal equations would not."""
    layer = make(40, "leaky", seed=seed, dtype=dtype, spread=7.0, coupling=1.0)
    state = truth.read(layer)
    x = normal(rows, 40, seed=seed, dtype=dtype)
    bound = truth.round_trip_bound(x.double(), [state], torch.finfo(dtype).eps)
    error = (layer.inverse(layer(x)).double() - x.double()).norm(dim=-1)
    assert (error <= BOUND * bound).all()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("rows", [8, 100, 700])
def test_the_residual_of_a_solve_does_not_grow_with_the_condition(rows: int, seed: int) -> None:
    """|A x - y| <= c eps | |L||U| | |x| with kappa(A) near 1e6: what triangular solves give, a product with
    A^-1 would leave a residual of eps kappa(A) |y|, a thousand times as much."""
    layer = make(40, bias=False, permuted=False, seed=seed, dtype=torch.float32, coupling=4.0)
    state = truth.read(layer)
    lower, upper = truth.factors(state.lu, state.sign)
    matrix = lower @ upper
    assert torch.linalg.cond(matrix) > 1e5
    y = layer(normal(rows, 40, seed=seed, dtype=torch.float32))
    x = layer.inverse(y).double()
    size = torch.linalg.matrix_norm(lower.abs() @ upper.abs(), 2) * x.norm(dim=-1)
    residual = (x @ matrix.T - y.double()).norm(dim=-1)
    assert (residual <= 60 * torch.finfo(torch.float32).eps * size).all()


@activations
@dtypes
def test_the_inverse_is_as_accurate_as_a_float64_solve_allows(activation: str, dtype: torch.dtype) -> None:
    """inverse(y) against the float64 inverse, not only against the layer's own forward."""
    layer = make(30, activation, dtype=dtype)
    state = truth.read(layer)
    for rows in (2, 300):
        y = layer(normal(rows, 30, dtype=dtype)).detach()
        exact, exact_logabsdet = truth.inverse(y.double(), state)
        x, logabsdet = layer.inverse_and_logabsdet(y)
        bound = truth.round_trip_bound(exact, [state], torch.finfo(dtype).eps)
        assert ((x.double() - exact).norm(dim=-1) <= BOUND * bound).all()
        forward_logabsdet = layer.forward_and_logabsdet(x)[1]
        tolerance = 2e-4 if dtype == torch.float32 else 1e-10
        torch.testing.assert_close(logabsdet.double(), exact_logabsdet, rtol=tolerance, atol=tolerance * 30)
        torch.testing.assert_close(logabsdet, -forward_logabsdet, rtol=tolerance, atol=tolerance * 30)


@pytest.mark.slow
@activations
@given(
    d=st.integers(1, 300),
    rows=st.integers(1, 1500),
    seed=st.integers(0, 10**6),
    spread=st.floats(0, 6),
    dtype=st.sampled_from(DTYPES),
)
def test_round_trips_at_length(
    activation: str, d: int, rows: int, seed: int, spread: float, dtype: torch.dtype
) -> None:
    layer = make(d, activation, seed=seed, dtype=dtype, spread=spread)
    x = normal(rows, d, seed=seed, dtype=dtype)
    bound = truth.round_trip_bound(x.double(), [truth.read(layer)], torch.finfo(dtype).eps)
    error = (layer.inverse(layer(x)).double() - x.double()).norm(dim=-1)
    assert (error <= BOUND * bound).all()


# ---- log-determinants and gradients


@activations
@given(d=st.integers(1, 12), seed=st.integers(0, 1000), permuted=st.booleans(), bias=st.booleans())
def test_logabsdet_against_the_jacobian(
    activation: str, d: int, seed: int, permuted: bool, bias: bool
) -> None:
    """Both directions, against slogdet of autograd's Jacobian of the library and of the explicit formula."""
    layer = make(d, activation, seed=seed, permuted=permuted, bias=bias)
    state = truth.read(layer)
    x = normal(d, seed=seed)
    y, logabsdet = layer.forward_and_logabsdet(x)
    assert logabsdet.shape == ()
    for jacobian in (
        torch.func.jacrev(lambda v: truth.forward(v, state)[0])(x),
        torch.autograd.functional.jacobian(layer, x),
    ):
        torch.testing.assert_close(logabsdet, torch.linalg.slogdet(jacobian)[1], rtol=1e-9, atol=1e-9)
    back, inverse_logabsdet = layer.inverse_and_logabsdet(y)
    torch.testing.assert_close(back, x, rtol=1e-8, atol=1e-8)
    jacobian = torch.autograd.functional.jacobian(layer.inverse, y)
    torch.testing.assert_close(inverse_logabsdet, torch.linalg.slogdet(jacobian)[1], rtol=1e-8, atol=1e-8)


@methods
@pytest.mark.parametrize("activation", LEARNABLE)
@pytest.mark.parametrize("rows", [2, 60])
@dtypes
def test_gradients_of_every_parameter(method: str, activation: str, rows: int, dtype: torch.dtype) -> None:
    """x, lu, bias and the learnable slopes, against float64 autograd through explicit L and U."""
    d = 10
    learnable = LEARNABLE[activation]().to(dtype)
    layer = LUDense(d, activation=learnable, dtype=dtype)
    truth.randomise(layer, 4)
    exact_activation = copy.deepcopy(learnable).double()
    x = normal(rows, d, dtype=dtype).requires_grad_()
    exact_x = x.detach().double().requires_grad_()
    lu = layer.lu.detach().double().requires_grad_()
    bias = layer.bias.detach().double().requires_grad_()
    state = truth.Layer(lu, bias, layer.sign.double(), None, exact_activation.slopes())
    exact = (truth.inverse if "inverse" in method else truth.forward)(exact_x, state)
    found = getattr(layer, method)(x)
    if not isinstance(found, tuple):
        found, exact = (found,), exact[:1]
    cotangents = [normal(*v.shape, seed=7) for v in exact]
    found = torch.autograd.grad(
        found, [x, layer.lu, layer.bias, *learnable.parameters()], [c.to(dtype) for c in cotangents]
    )
    exact = torch.autograd.grad(exact, [exact_x, lu, bias, *exact_activation.parameters()], cotangents)
    for f, e in zip(found, exact, strict=True):
        assert f.dtype == dtype
        assert (f.double() - e).norm() <= 300 * torch.finfo(dtype).eps * (e.norm() + rows**0.5)


@pytest.mark.parametrize("rows", [3, 30])
def test_slopes_of_another_dtype_than_the_layer(rows: int) -> None:
    """A float32 activation in a float64 layer: float64 results, a float32 gradient of its parameter."""
    layer = LUDense(4, activation=LeakySoftplus(0.2, learnable=True), dtype=torch.float64)
    x = normal(rows, 4).requires_grad_()
    y, logabsdet = layer.forward_and_logabsdet(x)
    back, _ = layer.inverse_and_logabsdet(y)
    assert {v.dtype for v in (y, logabsdet, back)} == {torch.float64}
    torch.testing.assert_close(back, x, rtol=1e-12, atol=1e-12)
    (y.sum() + logabsdet.sum()).backward()
    raw = layer.activation.raw_alpha
    assert raw.grad.dtype == torch.float32
    same = LUDense(4, activation=copy.deepcopy(layer.activation).double(), dtype=torch.float64)
    same.load_state_dict(layer.state_dict())
    y, logabsdet = same.forward_and_logabsdet(x)
    (y.sum() + logabsdet.sum()).backward()
    torch.testing.assert_close(raw.grad.double(), same.activation.raw_alpha.grad, rtol=1e-5, atol=1e-5)


@methods
@pytest.mark.parametrize("activation", ["none", "leaky"])
def test_gradients_accumulate_through_a_training_step(method: str, activation: str) -> None:
    """The same layer used twice in one graph."""
    layer = make(4, activation)
    state = truth.read(layer)
    lu, bias = state.lu.clone().requires_grad_(), state.bias.clone().requires_grad_()
    state = state._replace(lu=lu, bias=bias)
    x = normal(11, 4)

    def first(result: Tensor | tuple[Tensor, Tensor]) -> Tensor:
        return result[0] if isinstance(result, tuple) else result

    exact = truth.inverse if "inverse" in method else truth.forward
    function = getattr(layer, method)
    first(function(first(function(x)))).square().sum().backward()
    first(exact(first(exact(x, state)), state)).square().sum().backward()
    for found, true in ((layer.lu.grad, lu.grad), (layer.bias.grad, bias.grad)):
        assert (found - true).norm() <= 1e-10 * true.norm()


def test_inference_mode_and_no_grad() -> None:
    layer = make(4, "leaky")
    x = normal(9, 4)
    with torch.inference_mode():
        inside = layer.inverse_and_logabsdet(layer(x))
    with torch.no_grad():
        y = layer(x)
        assert not y.requires_grad
    for a, b in zip(inside, layer.inverse_and_logabsdet(layer(x)), strict=True):
        torch.testing.assert_close(a.clone(), b)


# ---- extreme parameters


@dtypes
@pytest.mark.parametrize("s", [1e4, -1e4, math.inf, -math.inf])
def test_a_runaway_diagonal_stays_invertible(dtype: torch.dtype, s: float) -> None:
    """u_ii is neither 0 nor inf, and the log-determinant is that of the clamped matrix."""
    bound = 80.0 if dtype == torch.float32 else 700.0
    layer = LUDense(3, bias=False, dtype=dtype)
    with torch.no_grad():
        layer.lu.zero_().diagonal()[1] = s
    diagonal = layer.weight.diagonal()
    assert diagonal.isfinite().all()
    assert (diagonal != 0).all()
    assert float(diagonal[1].double().log()) == pytest.approx(math.copysign(bound, s), rel=1e-6)
    assert float(layer.logabsdet()) == pytest.approx(math.copysign(bound, s), rel=1e-6)
    x = torch.tensor([[1.0, 2.0, 3.0]], dtype=dtype)
    for rows in (1, 20):
        y, logabsdet = layer.forward_and_logabsdet(x.expand(rows, 3))
        assert float(logabsdet[0]) == pytest.approx(math.copysign(bound, s), rel=1e-6)
        torch.testing.assert_close(layer.inverse(y), x.expand(rows, 3), rtol=1e-5, atol=1e-6)
        (gradient,) = torch.autograd.grad(y[:, 0].sum() + logabsdet.sum(), layer.lu)
        assert gradient.isfinite().all()
        # Beyond the bound s has no influence, on either result.
        assert gradient[1, 1] == 0
        assert gradient[0, 0] == 2 * rows


@pytest.mark.parametrize("permuted", [False, True])
def test_weight_decay_pulls_to_the_identity(permuted: bool) -> None:
    layer = make(5, permuted=permuted)
    target = torch.eye(5, dtype=torch.float64)
    with torch.no_grad():
        layer.sign.fill_(1)
    if permuted:
        target = target[torch.argsort(layer.permutation)]
    optimizer = torch.optim.SGD([layer.lu], lr=0.1, weight_decay=0.5)
    for _ in range(400):
        optimizer.zero_grad()
        (0 * layer(normal(6, 5)).sum()).backward()
        optimizer.step()
    torch.testing.assert_close(layer.weight, target, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("activation", ["none", "leaky"])
def test_half_precision_forward(dtype: torch.dtype, activation: str) -> None:
    layer = make(24, activation, dtype=torch.float32, coupling=0.3).to(dtype)
    state = truth.read(layer)
    eps = torch.finfo(dtype).eps
    for rows in (3, 100):
        x = normal(rows, 24, dtype=dtype)
        y, logabsdet = layer.forward_and_logabsdet(x)
        exact, exact_logabsdet = truth.forward(x.double(), state)
        assert y.dtype == dtype
        assert logabsdet.dtype == torch.float32
        weight_norm = torch.linalg.matrix_norm(truth.weight(state.lu, state.sign, state.permutation), 2)
        size = weight_norm * x.double().norm(dim=-1) + state.bias.norm()
        assert ((y.double() - exact).norm(dim=-1) <= 3 * eps * size).all()
        # h is known to eps of its size, and log phi' moves with it by at most 0.3 a unit here.
        assert ((logabsdet.double() - exact_logabsdet).abs() <= 3 * eps * 24**0.5 * size).all()
        y.float().sum().backward()
        assert layer.lu.grad.dtype == layer.lu.dtype == torch.float32
        assert layer.lu.grad.isfinite().all()


def relative(found: Tensor, exact: Tensor) -> float:
    return float((found.detach().double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("rows", [64, 600])
@pytest.mark.parametrize("d", [32, 256])
def test_half_precision_is_as_good_as_a_linear_layer(d: int, rows: int, dtype: torch.dtype) -> None:
    """Factors in the low dtype would lose ten times as much: pivoting makes them large beside A."""
    linear, x = nn.Linear(d, d), normal(rows, d, dtype=torch.float32)
    exact = (x.double() @ linear.weight.double().T + linear.bias.double()).detach()
    layer = LUDense.from_linear(linear).to(dtype)
    y = layer(x.to(dtype))
    assert (y.dtype, layer.dtype, layer.lu.dtype) == (dtype, dtype, torch.float32)
    assert relative(y, exact) <= 1.2 * relative(linear.to(dtype)(x.to(dtype)), exact)


def test_half_precision_and_back_keeps_the_factors() -> None:
    layer = make(24, "leaky", dtype=torch.float32, coupling=0.3)
    layer(normal(4, 24, dtype=torch.float32)).sum().backward()
    kept, gradient = layer.lu.detach().clone(), layer.lu.grad.clone()
    for low in (torch.bfloat16, torch.float16):
        layer = layer.to(low)
        assert layer.to_linear().weight.dtype == layer.weight.dtype == low
        layer = layer.to(torch.float32)
        assert torch.equal(layer.lu, kept)
        assert torch.equal(layer.lu.grad, gradient)
    assert layer.double().lu.dtype == torch.float64
    assert layer.bfloat16().lu.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_a_half_precision_layer_is_trained(dtype: torch.dtype) -> None:
    layer, x = LUDense(8, dtype=dtype), normal(40, 8, dtype=dtype)
    target = x.flip(-1)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.3)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        losses.append((layer(x) - target).float().square().mean())
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.7 * losses[0]
    with pytest.raises(TypeError, match="use autocast"):
        LUDense(8)(x)


@pytest.mark.parametrize("rows", [3, 100])
def test_bfloat16_inverse_is_the_inverse_of_what_was_stored(rows: int) -> None:
    """Solved in float32: the result is off by the rounding of y and of x, not by a solve in bfloat16."""
    layer = make(24, "leaky", dtype=torch.float32, coupling=0.3).to(torch.bfloat16)
    y = normal(rows, 24, dtype=torch.bfloat16)
    x, logabsdet = layer.inverse_and_logabsdet(y)
    exact, exact_logabsdet = truth.inverse(y.double(), truth.read(layer))
    assert logabsdet.dtype == torch.float32
    assert ((x.double() - exact).norm(dim=-1) <= 0.02 * exact.norm(dim=-1)).all()
    assert ((logabsdet.double() - exact_logabsdet).abs() <= 0.02 * (1 + exact_logabsdet.abs())).all()


# ---- nn.Linear


@given(
    d=st.integers(1, 64),
    seed=st.integers(0, 10_000),
    dtype=st.sampled_from([torch.bfloat16, torch.float16]),
    scale=st.sampled_from([1e-3, 1.0, 30.0]),
)
@settings(max_examples=60, deadline=None)
def test_from_linear_takes_sound_low_weights(d: int, seed: int, dtype: torch.dtype, scale: float) -> None:
    """Their digits are few, but exact: whether they are singular is for the factorisation to say."""
    generator = torch.Generator().manual_seed(seed)
    linear = nn.Linear(d, d, dtype=dtype)
    with torch.no_grad():
        # Singular values within 1 of 4: sound by construction, whatever rounding does.
        basis = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64))[0]
        linear.weight.copy_(scale * (basis * torch.linspace(3, 5, d, dtype=torch.float64)))
    layer = LUDense.from_linear(linear)
    assert layer.dtype == dtype
    exact = linear.weight.detach().double()
    state = truth.read(layer)
    assert relative(truth.weight(state.lu, state.sign, state.permutation), exact) <= 1e-5
    assert torch.equal(layer.to_linear().weight, linear.weight) or (
        relative(layer.to_linear().weight, exact) <= torch.finfo(dtype).eps
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_from_linear_refuses_singular_weights_of_any_dtype(dtype: torch.dtype) -> None:
    linear = nn.Linear(20, 20, dtype=dtype)
    with torch.no_grad():
        linear.weight[3] = 2 * linear.weight[11]
    with pytest.raises(ValueError, match="singular to working precision"):
        LUDense.from_linear(linear)


@dtypes
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("d", [1, 2, 17, 100])
def test_from_linear_and_back(d: int, bias: bool, dtype: torch.dtype) -> None:
    linear = nn.Linear(d, d, bias, dtype=dtype)
    layer = LUDense.from_linear(linear)
    assert layer.lu.dtype == dtype
    assert (layer.bias is not None) == bias
    exact = linear.weight.detach().double()
    state = truth.read(layer)
    lower, upper = truth.factors(state.lu, state.sign)
    # |L||U| bounds what rounding the factors does to A; exp(log u) is off by |log u| eps.
    size = (lower.abs() @ upper.abs()).norm() * (2 + state.lu.diagonal().abs().max())
    for weight in (layer.weight, layer.to_linear().weight):
        assert (weight.double() - exact).norm() <= 2 * torch.finfo(dtype).eps * size
    back = layer.to_linear()
    assert isinstance(back, nn.Linear)
    assert back.weight.dtype == dtype
    assert isinstance(back.weight, nn.Parameter)
    if bias:
        assert torch.equal(layer.bias, linear.bias)
        assert torch.equal(back.bias, linear.bias)
    else:
        assert back.bias is None
    x = normal(6, d, dtype=dtype)
    tolerance = 1e-4 if dtype == torch.float32 else 1e-11
    torch.testing.assert_close(layer(x), linear(x), rtol=tolerance, atol=tolerance)


def test_from_linear_shares_no_memory() -> None:
    linear = nn.Linear(4, 4)
    before = linear.bias.detach().clone()
    layer = LUDense.from_linear(linear)
    with torch.no_grad():
        layer.bias.add_(1)
        layer.to_linear().bias.add_(1)
    assert torch.equal(linear.bias, before)


@pytest.mark.parametrize(
    "weight",
    [
        [[0.0, 1.0], [1.0, 0.0]],
        [[0.0, 2.0, 1.0], [3.0, 0.0, 1.0], [1.0, 1.0, 0.0]],
        [[1.0, 2.0, 0.0], [2.0, 4.0, 1.0], [0.0, 1.0, 1.0]],
        [[0.0, 0.0, 5.0], [-2.0, 0.0, 0.0], [0.0, 3.0, 0.0]],
    ],
    ids=["swap", "zero diagonal", "zero second minor", "cycle"],
)
def test_from_linear_where_no_factorisation_exists_without_pivoting(weight: list[list[float]]) -> None:
    linear = nn.Linear(len(weight), len(weight), dtype=torch.float64)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor(weight))
    layer = LUDense.from_linear(linear)
    assert layer.permutation is not None
    torch.testing.assert_close(layer.weight, linear.weight, rtol=1e-14, atol=1e-14)
    x = normal(5, len(weight))
    torch.testing.assert_close(layer.inverse(linear(x)), x)
    torch.testing.assert_close(layer.logabsdet(), torch.linalg.slogdet(linear.weight)[1])


def test_from_linear_with_an_activation() -> None:
    linear = nn.Linear(4, 4, dtype=torch.float64)
    layer = LUDense.from_linear(linear, LeakySoftplus(0.2))
    x = normal(5, 4)
    torch.testing.assert_close(layer(x), truth.phi(linear(x), (0.2, 0.8, 1.0)), rtol=1e-12, atol=1e-13)
    # to_linear is the affine part.
    torch.testing.assert_close(layer.to_linear()(x), linear(x), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(
    "weight",
    [
        torch.zeros(3, 3),
        torch.ones(3, 3),
        torch.diag(torch.tensor([1.0, 1.0, 1e-8])),
        torch.diag(torch.tensor([1.0, math.nan, 1.0])),
        torch.diag(torch.tensor([1.0, math.inf, 1.0])),
    ],
    ids=["zero", "rank one", "below D eps", "nan", "inf"],
)
def test_from_linear_refuses_a_singular_weight(weight: Tensor) -> None:
    linear = nn.Linear(3, 3)
    with torch.no_grad():
        linear.weight.copy_(weight)
    with pytest.raises(ValueError, match="(?i)singular|finite|weight"):
        LUDense.from_linear(linear)


def test_from_linear_accepts_what_is_only_ill_conditioned() -> None:
    linear = nn.Linear(3, 3, dtype=torch.float64)
    with torch.no_grad():
        linear.weight.copy_(torch.diag(torch.tensor([1e6, 1.0, 1e-6])))
    layer = LUDense.from_linear(linear)
    torch.testing.assert_close(layer.weight, linear.weight, rtol=1e-13, atol=0)


def test_from_linear_refuses_a_weight_that_is_not_square() -> None:
    with pytest.raises(ValueError, match=r"(?s)3.*4|4.*3"):
        LUDense.from_linear(nn.Linear(3, 4))


# ---- state


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("nested", [False, True])
def test_the_state_of_a_linear_is_refused(strict: bool, nested: bool) -> None:
    """It has as many numbers of the same shapes; loading them as L and U would be silently wrong."""
    layer: nn.Module = LUDense(4, 4)
    linear: nn.Module = nn.Linear(4, 4)
    if nested:
        layer, linear = nn.Sequential(layer), nn.Sequential(linear)
    with pytest.raises(RuntimeError, match="from_linear"):
        layer.load_state_dict(linear.state_dict(), strict=strict)


@pytest.mark.parametrize("bias", [True, False])
def test_state_round_trip_into_a_fresh_layer(bias: bool) -> None:
    """Signs and the order of rows are part of the state."""
    linear = nn.Linear(5, 5, bias, dtype=torch.float64)
    with torch.no_grad():
        linear.weight.copy_(torch.eye(5).flip(0) * torch.tensor([1.0, -2.0, 3.0, -4.0, 5.0]))
    source = LUDense.from_linear(linear)
    state = source.state_dict()
    for fresh in (
        LUDense(5, 5, bias, dtype=torch.float64),
        LUDense(5, 5, bias, dtype=torch.float64, permutation=torch.tensor([4, 3, 1, 2, 0])),
    ):
        fresh.load_state_dict(state)
        assert torch.equal(fresh.weight, source.weight)
        assert torch.equal(fresh.permutation, source.permutation)
        x = normal(6, 5)
        assert torch.equal(fresh(x), source(x))
        assert torch.equal(fresh.inverse(x), source.inverse(x))
        # Copied, not shared.
        with torch.no_grad():
            fresh.lu.add_(1)
            fresh.permutation.zero_()
        assert not torch.equal(fresh.lu, source.lu)
        assert source.permutation.any()


@pytest.mark.parametrize("strict", [True, False])
def test_state_without_a_permutation_does_not_keep_an_old_one(strict: bool) -> None:
    source = make(4, permuted=False)
    target = make(4, permuted=True, seed=3)
    target.load_state_dict(source.state_dict(), strict=strict)
    assert target.permutation is None
    assert torch.equal(target.weight, source.weight)


def test_state_with_what_is_no_permutation_is_refused() -> None:
    state = make(4, permuted=True).state_dict()
    state["permutation"] = torch.tensor([0, 0, 1, 2])
    with pytest.raises((ValueError, RuntimeError), match="permutation"):
        make(4).load_state_dict(state)


def test_state_round_trip_in_place_by_assignment() -> None:
    source = make(4, permuted=True)
    with torch.device("meta"):
        target = LUDense(4, dtype=torch.float64)
    target.load_state_dict(source.state_dict(), assign=True)
    x = normal(6, 4)
    assert torch.equal(target(x), source(x))


def test_conversions_of_dtype_carry_the_buffers() -> None:
    layer = make(4, "leaky", dtype=torch.float32)
    x = normal(6, 4)
    assert layer.double()(x).dtype == torch.float64
    assert layer.permutation.dtype == torch.int64
    torch.testing.assert_close(layer.inverse(layer(x)), x)


@pytest.mark.parametrize("rows", [2999, 3000], ids=["by substitution", "by the explicit inverse"])
def test_inverse_of_many_rows_by_either_way(rows: int) -> None:
    layer = LUDense(300, activation=LeakySoftplus(0.1))
    wide = LUDense(300, activation=LeakySoftplus(0.1), dtype=torch.float64)
    with torch.no_grad():
        layer.lu.normal_(std=0.2 / 300**0.5)
        layer.bias.normal_()
    wide.load_state_dict(layer.state_dict())
    y = torch.randn(rows, 300)
    with torch.no_grad():
        found, truth = layer.inverse(y).double(), wide.inverse(y.double())
    assert (found - truth).norm() <= 1e-5 * truth.norm()


# ---- structure: signs and permutation under averages, moves and meta


def structured(seed: int = 0) -> LUDense:
    return make(9, "leaky", seed=seed, dtype=torch.float32)


def same(a: LUDense, b: LUDense) -> bool:
    return torch.equal(a.sign, b.sign) and torch.equal(a.permutation, b.permutation)


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9, 0.95, 0.999, 0.9999])
@pytest.mark.parametrize("compiled", [False, True])
def test_averaged_weights_keep_the_structure(decay: float, compiled: bool) -> None:
    layer, x = structured(), normal(4, 9, dtype=torch.float32)
    torch.compiler.reset()
    model = torch.compile(layer, backend="eager") if compiled else layer
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
    for _ in range(25):
        averaged.update_parameters(model)
    found = averaged(x)  # where compiled, nothing of the layer's own is called before
    assert torch.equal(found, model(x))
    made = averaged.module._orig_mod if compiled else averaged.module
    assert same(made, layer)
    torch.testing.assert_close(made.inverse(found), x, rtol=1e-4, atol=1e-4)
    assert torch.equal(
        averaged.state_dict()["module." + ("_orig_mod." if compiled else "") + "sign"], layer.sign
    )


@pytest.mark.parametrize("first", ["state_dict", "to", "deepcopy", "pickle"])
def test_what_an_average_left_is_put_right_wherever_it_is_seen_first(first: str) -> None:
    layer = structured()
    averaged = AveragedModel(layer, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    for _ in range(5):
        averaged.update_parameters(layer)
    made = averaged.module
    assert not torch.equal(dict(made.named_buffers())["permutation"], layer.permutation)  # it does harm
    if first == "state_dict":
        fresh = LUDense(9, activation=LeakySoftplus(0.1))
        fresh.load_state_dict(made.state_dict())
        made = fresh
    elif first == "to":
        made = made.double().float()
    elif first == "deepcopy":
        made = copy.deepcopy(made)
    else:
        file = io.BytesIO()
        torch.save(made, file)
        file.seek(0)
        made = torch.load(file, weights_only=False)
    assert same(made, layer)


def test_an_average_of_layers_of_other_structure_raises() -> None:
    layer, other = structured(), structured(1)
    for name in ("sign", "permutation"):
        averaged = AveragedModel(layer, use_buffers=True)
        averaged.update_parameters(layer)
        mixed = structured()
        setattr(mixed, name, getattr(other, name).clone())
        averaged.update_parameters(mixed)
        for use in (lambda made: made(torch.zeros(2, 9)), lambda made: made.state_dict()):
            with pytest.raises(ValueError, match=f"{name} must hold .*average nets of one structure"):
                use(averaged.module)
    # Without buffers in the average they are copied, and are those of the layer that came last.
    averaged = AveragedModel(layer)
    averaged.update_parameters(layer)
    averaged.update_parameters(other)
    assert same(averaged.module, other)


def test_merged_state_dicts() -> None:
    layer, x = structured(), normal(3, 9, dtype=torch.float32)
    states = [layer.state_dict(), copy.deepcopy(layer).state_dict(), layer.state_dict()]
    merged = {name: sum(state[name] for state in states) / 3 for name in states[0]}
    assert merged["permutation"].is_floating_point()
    fresh = LUDense(9, activation=LeakySoftplus(0.1))
    fresh.load_state_dict(merged)
    assert same(fresh, layer)
    assert fresh.permutation.dtype == torch.int64
    torch.testing.assert_close(fresh(x), layer(x))
    states[1] = structured(1).state_dict()
    merged = {name: sum(state[name] for state in states) / 3 for name in states[0]}
    with pytest.raises(RuntimeError, match=r"sign must hold 9 signs[^$]*permutation must hold each of"):
        fresh.load_state_dict(merged)
    assert same(fresh, layer)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_structure_survives_dtypes(dtype: torch.dtype) -> None:
    layer = LUDense(
        5000, device="meta", permutation=torch.arange(4999, -1, -1)
    )  # no dtype of 16 bits holds 4999
    layer.to_empty(device="cpu").to(dtype)
    assert layer.sign.dtype == dtype
    assert layer.permutation.tolist() == list(range(4999, -1, -1))


def test_signs_and_a_permutation_that_are_written_are_the_layers_own() -> None:
    layer, other, x = structured(), structured(1), normal(3, 9, dtype=torch.float32)
    layer.load_state_dict({"lu": other.lu, "bias": other.bias}, strict=False)
    with torch.no_grad():
        layer.sign.copy_(other.sign)
    layer.permutation = other.permutation.clone()
    assert torch.equal(layer(x), other(x))
    assert same(layer.double(), other.double())  # not only in its buffers
    layer.permutation = None
    assert layer.float().permutation is None
    layer.permutation = torch.zeros(9, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"permutation must hold each of 0..8 once, got \[0, 0"):
        layer(x)
    layer = structured()
    layer.sign[0] = math.nan
    with pytest.raises(ValueError, match="sign must hold 9 signs, 1 and -1, got .*nan"):
        layer(x)


def test_buffers_broadcast_by_hand_are_followed() -> None:
    layer, other = structured(), structured(1)
    for mine, theirs in zip(layer.buffers(), other.buffers(), strict=True):
        mine.data.copy_(theirs)  # as dist.broadcast, not counted as a write by PyTorch
    assert same(layer, other)
    assert same(layer.double(), other.double())


@pytest.mark.parametrize("where", ["made on meta", "moved to meta"])
def test_to_empty_keeps_the_structure(where: str) -> None:
    layer = structured()
    permutation, sign = layer.permutation.clone(), layer.sign.clone()
    if where == "made on meta":
        with torch.device("meta"):
            layer = LUDense(9, permutation=permutation)
        sign = torch.ones(9)
    else:
        layer.to("meta")
    assert layer.permutation.is_meta
    layer.to_empty(device="cpu")
    assert torch.equal(layer.permutation, permutation)
    assert torch.equal(layer.sign, sign)
    layer.reset_parameters()
    assert torch.equal(layer.permutation, permutation)
    y = layer(normal(4, 9, dtype=torch.float32))
    assert bool(y.isfinite().all())


def test_memory_put_in_place_of_a_buffer_is_filled_by_reset_parameters() -> None:
    layer = structured()
    permutation = layer.permutation.clone()
    layer._buffers["permutation"] = torch.empty(9, dtype=torch.int64)  # as loaders do, without to_empty
    layer._buffers["sign"] = torch.empty(9)
    layer.reset_parameters()
    assert torch.equal(layer.permutation, permutation)
    assert torch.equal(layer.sign, torch.ones(9))


def test_functional_calls_take_the_structure_that_is_given() -> None:
    layers, x = [structured(seed) for seed in range(3)], normal(5, 9, dtype=torch.float32)
    for layer in layers:
        layer.permutation = None
    parameters, buffers = stack_module_state(layers)
    base = copy.deepcopy(layers[0]).to("meta")
    found = vmap(lambda p, b: functional_call(base, (p, b), (x,)))(parameters, buffers)
    torch.testing.assert_close(found, torch.stack([layer(x) for layer in layers]))
    one, other = structured(), structured(1)
    torch.testing.assert_close(functional_call(one, other.state_dict(), (x,)), other(x))
    assert torch.equal(one(x), structured()(x))


# ---- writes to the weight


def init_by(name: str) -> Callable[[Tensor], object]:
    return lambda weight: getattr(nn.init, name)(weight)


WRITES: dict[str, Callable[[Tensor], object]] = {
    **{
        name: init_by(name)
        for name in ("xavier_uniform_", "kaiming_normal_", "zeros_", "eye_", "orthogonal_")
    },
    "normal_": lambda w: w.normal_(),
    ".data.normal_": lambda w: w.data.normal_(),
    ".data = ": lambda w: setattr(w, "data", torch.eye(4)),
    ".detach().copy_": lambda w: w.detach().copy_(torch.eye(4)),
    "copy_": lambda w: w.copy_(torch.eye(4)),
    "a row": lambda w: w[0].fill_(0.0),
    "a part": lambda w: w.T.chunk(2)[1].zero_(),
    "an index": lambda w: w.__setitem__((0, 0), 1.0),
    "+=": lambda w: w.__iadd__(1.0),
    "out=": lambda w: torch.add(torch.eye(4), 1.0, out=w),
    "_foreach": lambda w: torch._foreach_mul_([w], 2.0),
}


@pytest.mark.parametrize("write", WRITES)
def test_a_write_to_the_weight_raises(write: str) -> None:
    layer = LUDense(4)
    before = layer.lu.detach().clone()
    for weight in (layer.weight, layer.requires_grad_(False).weight):
        with torch.no_grad(), pytest.raises(RuntimeError, match=r"LUDense\.from_linear"):
            WRITES[write](weight)
    assert torch.equal(layer.lu, before)


def test_the_weight_takes_part_in_computations() -> None:
    layer, x = structured(), normal(5, 9, dtype=torch.float32)
    weight = layer.weight
    assert {type(each) for each in (weight @ x.T, weight + 1.0, weight.clone())} == {Tensor}
    h = x @ weight.T + layer.bias
    torch.testing.assert_close(h, layer.activation.inverse(layer(x)), rtol=1e-4, atol=1e-4)
    (found,) = torch.autograd.grad((layer.weight @ x.T).square().sum(), layer.lu)
    lu = layer.lu.detach().clone().requires_grad_()
    plain = functional.lu_weight(lu, layer.sign, layer.permutation)
    torch.testing.assert_close(found, torch.autograd.grad((plain @ x.T).square().sum(), lu)[0])
    kept = layer.weight.clone()
    kept.detach().zero_()  # one's own
    linear = nn.Linear(9, 9)
    with torch.no_grad():
        linear.weight.copy_(weight)
    torch.testing.assert_close(linear.weight, weight)
    assert weight.detach().numpy().shape == (9, 9)
    file = io.BytesIO()
    torch.save(weight.detach(), file)
    file.seek(0)
    assert torch.equal(torch.load(file), weight)
    assert type(copy.deepcopy(weight.detach())) is Tensor
    assert torch.compile(lambda w: w @ x.T, backend="eager")(layer.weight).shape == (9, 5)


# ---- what somebody replaced


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("how", ["instance", "subclass"])
def test_an_activations_own_methods_are_called(method: str, how: str) -> None:
    activation = LeakySoftplus(0.3)
    seen = []

    def mine(self: nn.Module, x: Tensor) -> object:
        seen.append(method)
        return getattr(LeakySoftplus, method)(self, x)

    if how == "instance":
        setattr(activation, method, partial(mine, activation))
    else:
        activation = type("Mine", (LeakySoftplus,), {method: mine})(0.3)
    layer = LUDense(5, activation=activation)
    plain = LUDense(5, activation=LeakySoftplus(0.3))
    plain.load_state_dict(layer.state_dict())
    x = normal(6, 5, dtype=torch.float32)
    torch.testing.assert_close(getattr(layer, method)(x), getattr(plain, method)(x))
    assert seen == [method]


def test_hooks_on_an_activation_are_called() -> None:
    layer, seen = LUDense(5, activation=LeakySoftplus(0.3, learnable=True)), []
    activation, x = layer.activation, normal(6, 5, dtype=torch.float32)
    plain = layer(x)
    hooks = [
        activation.register_forward_pre_hook(lambda m, a: seen.append("pre")),
        activation.register_forward_hook(lambda m, a, kw, y: seen.append("kwargs"), with_kwargs=True),
        activation.register_forward_hook(lambda m, a, y: 2.0 * y),
        activation.register_full_backward_pre_hook(lambda m, g: seen.append("backward pre")),
        activation.register_full_backward_hook(lambda m, g, h: seen.append("backward")),
    ]
    found = layer(x)
    torch.testing.assert_close(found, 2.0 * plain)
    found.sum().backward()
    assert seen == ["pre", "kwargs", "backward pre", "backward"]
    for hook in hooks:
        hook.remove()
    assert torch.equal(layer(x), plain)

"""phi, its inverse and their derivatives, against mpmath (float64) and float64 (float32)."""

from __future__ import annotations

import copy
import math
from typing import Any

import mpmath
import pytest
import torch
import truth
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import lunet_fast
from lunet_fast import GeneralizedLeakySoftplus, LeakySoftplus

LEAKY = [1e-6, 1e-4, 1e-3, 0.01, 0.1, 0.5, 0.9, 0.999, 0.999999]
GENERAL = [
    (1.0, 0.1),
    (1.0, 1e-6),
    (1e-4, 1e-4),
    (1e-4, 1e3),
    (0.02, 5.0),
    (30.0, 0.01),
    (1e4, 1e-6),
    (1e4, 1e3),
]
FIXED = [(LeakySoftplus, (alpha,)) for alpha in LEAKY] + [(GeneralizedLeakySoftplus, p) for p in GENERAL]
MILD = [(LeakySoftplus, (0.1,)), (LeakySoftplus, (0.9,)), (GeneralizedLeakySoftplus, (2.0, 0.3))]
DTYPES = [torch.float32, torch.float64]


def name(case: object) -> str:
    if isinstance(case, tuple):
        return f"{case[0].__name__}{case[1]}".replace(" ", "")
    return str(case).removeprefix("torch.")


fixed = pytest.mark.parametrize("case", FIXED, ids=name)
mild = pytest.mark.parametrize("case", MILD, ids=name)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=name)


def slopes_of(case: tuple) -> tuple[float, float, float]:
    """(a, c, kappa) from the paper's parameters, not from the library."""
    kind, parameters = case
    if kind is LeakySoftplus:
        return parameters[0], 1.0 - parameters[0], 1.0
    return parameters[1], 1.0, parameters[0]


def exact_phi(x: float, slopes: tuple[float, float, float]) -> mpmath.mpf:
    a, c, kappa = (mpmath.mpf(s) for s in slopes)
    x = mpmath.mpf(x)
    t = kappa * x
    # exp(-|t|) below 10^-100 is lost in 60 digits, and mpmath would take long for e^(10^30).
    tail = mpmath.log1p(mpmath.exp(-abs(t))) if abs(t) < 500 else mpmath.mpf(0)
    return a * x + (c / kappa) * (max(t, mpmath.mpf(0)) + tail)


def targets(slopes: tuple[float, float, float], dtype: torch.dtype, points: int) -> Tensor:
    """y of both signs from 1e-30 to 1e30, and densely where phi bends and where it crosses zero."""
    size = torch.logspace(-30, 30, points, dtype=torch.float64)
    a, c, kappa = slopes
    crossing = float(truth.phi_inverse(torch.zeros((), dtype=torch.float64), slopes))
    bend = torch.linspace(-40.0, 40.0, points, dtype=torch.float64) / kappa
    near = crossing * (1 + torch.linspace(-1e-3, 1e-3, 41, dtype=torch.float64))
    y = torch.cat([size, -size, torch.zeros(1), truth.phi(bend, slopes), truth.phi(near, slopes)])
    return y[y.abs() <= 1e30].to(dtype)


def difference(x: Tensor, y: Tensor, slopes: tuple[float, float, float]) -> Tensor:
    """phi(x) - y with phi evaluated well beyond the precision of x."""
    if x.dtype == torch.float32:
        return truth.phi(x.double(), slopes) - y.double()
    with mpmath.workdps(60):
        return torch.tensor(
            [
                float(exact_phi(p, slopes) - mpmath.mpf(q))
                for p, q in zip(x.tolist(), y.tolist(), strict=True)
            ],
            dtype=torch.float64,
        )


# ---- values


def test_the_truth_itself_agrees_with_mpmath() -> None:
    x = torch.linspace(-60, 60, 101, dtype=torch.float64)
    slopes = (0.1, 0.9, 1.3)
    with mpmath.workdps(40):
        exact = torch.tensor([float(exact_phi(v, slopes)) for v in x.tolist()], dtype=torch.float64)
    torch.testing.assert_close(truth.phi(x, slopes), exact, rtol=1e-15, atol=1e-16)
    torch.testing.assert_close(truth.phi_inverse(exact, slopes), x, rtol=1e-14, atol=1e-14)


def test_leaky_softplus_is_equation_2_6() -> None:
    x = torch.linspace(-30, 30, 241, dtype=torch.float64)
    expected = x + (1 - 0.2) * torch.log(1 + torch.exp(-x))
    torch.testing.assert_close(LeakySoftplus(0.2)(x), expected, rtol=1e-13, atol=1e-14)


def test_generalized_leaky_softplus_is_equation_2_9() -> None:
    x = torch.linspace(-10, 10, 241, dtype=torch.float64)
    expected = torch.log(1 + torch.exp(3.0 * x)) / 3.0 + 0.2 * x
    torch.testing.assert_close(GeneralizedLeakySoftplus(3.0, 0.2)(x), expected, rtol=1e-13, atol=1e-14)


def test_defaults_and_readable_parameters() -> None:
    leaky, general = LeakySoftplus(), GeneralizedLeakySoftplus()
    assert leaky.alpha == 0.1
    assert (general.alpha, general.beta) == (1.0, 0.1)
    assert leaky.slopes() == pytest.approx((0.1, 0.9, 1.0), rel=1e-15)
    assert GeneralizedLeakySoftplus(4.0, 0.25).slopes() == (0.25, 1.0, 4.0)
    assert not list(leaky.parameters())
    assert not list(general.parameters())
    assert "0.1" in repr(leaky)


@pytest.mark.filterwarnings("error")
def test_repr_names_the_parameters_of_learnable_activations_too() -> None:
    assert "0.3" in repr(LeakySoftplus(0.3, learnable=True))
    assert "2" in repr(GeneralizedLeakySoftplus(2.0, 0.3, learnable=True))


@fixed
@dtypes
def test_forward_is_accurate_on_the_whole_line(case: tuple, dtype: torch.dtype) -> None:
    slopes = a, c, kappa = slopes_of(case)
    size = torch.logspace(-30, 30, 61, dtype=torch.float64)
    bend = torch.linspace(-60, 60, 121, dtype=torch.float64) / kappa
    x = torch.cat([size, -size, bend]).to(dtype)
    y = case[0](*case[1])(x)
    wide = x.double()
    # The size of what is added up, and what rounding kappa * x does to softplus.
    scale = (a * wide).abs() + (c / kappa) * truth.softplus(kappa * wide)
    scale = scale + c * wide.abs() * torch.sigmoid(kappa * wide)
    if dtype == torch.float64:
        with mpmath.workdps(60):
            error = [
                float(exact_phi(p, slopes) - mpmath.mpf(q))
                for p, q in zip(x.tolist(), y.tolist(), strict=True)
            ]
        error = torch.tensor(error, dtype=torch.float64)
    else:
        error = truth.phi(wide, slopes) - y.double()
    assert y.dtype == dtype
    worst = (error.abs() / (4 * torch.finfo(dtype).eps * scale)).max()
    assert worst <= 1


def test_softplus_is_not_cut_off_in_float64() -> None:
    """F.softplus returns x beyond 20, which is off by 2e-9 there."""
    x = torch.linspace(19.5, 36.0, 34, dtype=torch.float64)
    excess = LeakySoftplus(0.5)(x) - x
    torch.testing.assert_close(excess, 0.5 * torch.log1p(torch.exp(-x)), rtol=0, atol=1.5e-14)
    logabsdet = LeakySoftplus(0.5).forward_and_logabsdet(x[:, None])[1]
    torch.testing.assert_close(logabsdet, torch.log1p(-0.5 * torch.sigmoid(-x)), rtol=0, atol=5e-16)


@mild
@dtypes
def test_forward_does_not_overflow_before_its_value_does(case: tuple, dtype: torch.dtype) -> None:
    a, c, _ = slopes_of(case)
    large = torch.finfo(dtype).max / 4
    y = case[0](*case[1])(torch.tensor([large, -large], dtype=dtype))
    expected = torch.tensor([(a + c) * large, -a * large], dtype=dtype)
    torch.testing.assert_close(y, expected, rtol=4 * torch.finfo(dtype).eps, atol=0)


# ---- the inverse


@fixed
@dtypes
def test_inverse_bound(case: tuple, dtype: torch.dtype) -> None:
    """|phi(x) - y| <= 4 eps (|y| + phi(0)) for |y| from 1e-30 to 1e30."""
    slopes = slopes_of(case)
    y = targets(slopes, dtype, 241 if dtype == torch.float32 else 91)
    x = case[0](*case[1]).inverse(y)
    assert x.dtype == dtype
    bound = 4 * torch.finfo(dtype).eps * (y.double().abs() + truth.phi_zero(slopes))
    worst = difference(x, y, slopes).abs() / bound
    assert worst.max() <= 1, f"at y = {y[worst.argmax()].item()!r}"


@given(
    alpha=st.floats(1e-6, 0.999999),
    y=st.lists(st.floats(1e-30, 1e30), min_size=1, max_size=8),
    exponent=st.floats(-30, 30),
    negative=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
def test_inverse_bound_leaky(
    alpha: float, y: list[float], exponent: float, negative: bool, dtype: torch.dtype
) -> None:
    values = torch.tensor([*y, 10.0**exponent], dtype=dtype).clamp(max=1e30)
    values = -values if negative else values
    slopes = (alpha, 1.0 - alpha, 1.0)
    bound = 4 * torch.finfo(dtype).eps * (values.double().abs() + truth.phi_zero(slopes))
    assert (difference(LeakySoftplus(alpha).inverse(values), values, slopes).abs() <= bound).all()


@given(
    alpha=st.floats(-4, 4).map(lambda e: 10.0**e),
    beta=st.floats(-6, 3).map(lambda e: 10.0**e),
    y=st.lists(st.floats(-30, 30), min_size=1, max_size=8),
    negative=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
def test_inverse_bound_generalized(
    alpha: float, beta: float, y: list[float], negative: bool, dtype: torch.dtype
) -> None:
    values = torch.tensor([10.0**e for e in y], dtype=dtype).clamp(max=1e30)
    values = -values if negative else values
    slopes = (beta, 1.0, alpha)
    bound = 4 * torch.finfo(dtype).eps * (values.double().abs() + truth.phi_zero(slopes))
    x = GeneralizedLeakySoftplus(alpha, beta).inverse(values)
    assert (difference(x, values, slopes).abs() <= bound).all()


@pytest.mark.parametrize(
    "activation",
    [
        LeakySoftplus(0.1, learnable=True),
        LeakySoftplus(0.002, learnable=True),
        LeakySoftplus(0.99, learnable=True),
        GeneralizedLeakySoftplus(2.0, 0.3, learnable=True),
        GeneralizedLeakySoftplus(50.0, 0.01, learnable=True),
    ],
    ids=str,
)
@dtypes
def test_inverse_bound_learnable(activation: torch.nn.Module, dtype: torch.dtype) -> None:
    activation = copy.deepcopy(activation).to(dtype)
    slopes = tuple(activation.slopes().detach().double().tolist())
    y = targets(slopes, dtype, 61)
    x = activation.inverse(y).detach()
    bound = 4 * torch.finfo(dtype).eps * (y.double().abs() + truth.phi_zero(slopes))
    assert (difference(x, y, slopes).abs() / bound).max() <= 1


@fixed
@dtypes
def test_subnormal_y(case: tuple, dtype: torch.dtype) -> None:
    slopes = slopes_of(case)
    tiny = torch.finfo(dtype).tiny
    y = torch.tensor([tiny / 4, -tiny / 4, tiny / 1024, tiny, -tiny, 0.0, -0.0], dtype=dtype)
    x = case[0](*case[1]).inverse(y)
    bound = 4 * torch.finfo(dtype).eps * (y.double().abs() + truth.phi_zero(slopes))
    assert (difference(x, y, slopes).abs() <= bound).all()


@fixed
@dtypes
def test_infinity_and_nan_pass_through(case: tuple, dtype: torch.dtype) -> None:
    activation = case[0](*case[1])
    a, c, _ = slopes_of(case)
    x = torch.tensor([math.inf, -math.inf, math.nan, 1.0], dtype=dtype)
    for function in (activation, activation.inverse):
        y = function(x)
        torch.testing.assert_close(y[:3], x[:3], equal_nan=True)
        # And they leave their neighbours alone.
        assert y[3] == function(x[3:])
    logabsdet = activation.forward_and_logabsdet(x[:2, None])[1]
    expected = torch.tensor([a + c, a], dtype=dtype).log()
    torch.testing.assert_close(logabsdet, expected, rtol=1e-5, atol=4 * torch.finfo(dtype).eps)
    back = activation.inverse_and_logabsdet(x[:2, None])[1]
    torch.testing.assert_close(back, -expected, rtol=1e-5, atol=4 * torch.finfo(dtype).eps)


@mild
def test_large_tensors_in_every_layout(case: tuple) -> None:
    """More elements than any block the inverse is worked in, and not a multiple of one."""
    activation = case[0](*case[1])
    slopes = slopes_of(case)
    rng = torch.Generator().manual_seed(3)
    y = 5 * torch.randn(70_001, 3, generator=rng)
    layouts = [y, y.t(), y[::2, 1:], y[:1].expand(50_001, 3), y.reshape(3, 70_001, 1).permute(2, 0, 1)]
    for view in layouts:
        x = activation.inverse(view)
        assert x.shape == view.shape
        error = (truth.phi(x.double(), slopes) - view.double()).abs()
        bound = 4 * torch.finfo(torch.float32).eps * (view.double().abs() + truth.phi_zero(slopes))
        assert (error <= bound).all()


@mild
@pytest.mark.parametrize("shape", [(), (0,), (1,), (5,), (3, 0, 2), (2, 3, 4)], ids=str)
def test_shapes(case: tuple, shape: tuple[int, ...]) -> None:
    activation = case[0](*case[1])
    x = torch.randn(shape)
    assert activation(x).shape == shape
    assert activation.inverse(x).shape == shape
    if shape:
        for function in (activation.forward_and_logabsdet, activation.inverse_and_logabsdet):
            y, logabsdet = function(x)
            assert y.shape == shape
            assert logabsdet.shape == shape[:-1]
    torch.testing.assert_close(activation.inverse(activation(x)), x, rtol=1e-5, atol=1e-5)


@mild
def test_input_is_left_alone(case: tuple) -> None:
    activation = case[0](*case[1])
    x = torch.randn(40, 3)
    kept = x.clone()
    activation.inverse_and_logabsdet(activation.forward_and_logabsdet(x)[0])
    activation.inverse(x)
    assert torch.equal(x, kept)


@mild
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name)
def test_half_precision_forward_rounds_once_or_twice(case: tuple, dtype: torch.dtype) -> None:
    slopes = a, c, kappa = slopes_of(case)
    x = torch.linspace(-9, 9, 181).to(dtype)
    y = case[0](*case[1])(x)
    wide = x.double()
    scale = (a * wide).abs() + (c / kappa) * truth.softplus(kappa * wide) + c * wide.abs()
    assert y.dtype == dtype
    assert ((y.double() - truth.phi(wide, slopes)).abs() <= 4 * torch.finfo(dtype).eps * scale).all()


# ---- derivatives


@fixed
@dtypes
def test_derivative_of_forward(case: tuple, dtype: torch.dtype) -> None:
    a, c, kappa = slopes = slopes_of(case)
    size = torch.logspace(-8, 20, 57, dtype=torch.float64)
    bend = torch.linspace(-50, 50, 101, dtype=torch.float64) / kappa
    x = torch.cat([size, -size, bend]).to(dtype).requires_grad_()
    (gradient,) = torch.autograd.grad(case[0](*case[1])(x).sum(), x)
    t = kappa * x.detach().double()
    expected = truth.phi_prime(x.detach().double(), slopes)
    # sigma(t) changes by |t| sigma (1 - sigma) for each relative rounding of t.
    sensitivity = expected + c * t.abs() * torch.sigmoid(t) * torch.sigmoid(-t)
    error = (gradient.double() - expected).abs() / (8 * torch.finfo(dtype).eps * sensitivity)
    assert gradient.dtype == dtype
    assert error.max() <= 1


@fixed
@dtypes
def test_derivative_of_inverse(case: tuple, dtype: torch.dtype) -> None:
    slopes = a, c, kappa = slopes_of(case)
    y = targets(slopes, dtype, 61).requires_grad_()
    (gradient,) = torch.autograd.grad(case[0](*case[1]).inverse(y).sum(), y)
    wide = y.detach().double()
    x = truth.phi_inverse(wide, slopes)
    slope = truth.phi_prime(x, slopes)
    t = kappa * x
    eps = torch.finfo(dtype).eps
    bend = c * kappa * torch.sigmoid(t) * torch.sigmoid(-t)
    # x is known to 4 eps (|y| + phi(0)) / phi', which moves the slope by phi'' times that.
    wrong = (
        8 * eps * (slope + bend * x.abs()) + bend * 4 * eps * (wide.abs() + truth.phi_zero(slopes)) / slope
    )
    # Where that is as large as the slope itself, no accuracy is left to ask for.
    known = wrong < 0.5 * slope
    assert known.any()
    error = (gradient.double() * slope - 1).abs() * slope / (2 * wrong)
    assert error[known].max() <= 1
    assert ((gradient > 0) & (gradient.double() <= 1.01 / a)).all()


@mild
def test_logabsdet_is_the_sum_of_log_derivatives(case: tuple) -> None:
    activation = case[0](*case[1])
    slopes = slopes_of(case)
    x = 3 * torch.randn(4, 5, 7, dtype=torch.float64)
    y, logabsdet = activation.forward_and_logabsdet(x)
    expected = torch.log(truth.phi_prime(x, slopes)).sum(-1)
    torch.testing.assert_close(logabsdet, expected, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(y, truth.phi(x, slopes), rtol=1e-13, atol=1e-14)
    back, inverse_logabsdet = activation.inverse_and_logabsdet(y)
    torch.testing.assert_close(back, x, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(inverse_logabsdet, -expected, rtol=1e-11, atol=1e-12)


@fixed
def test_pairs_agree_with_the_single_functions(case: tuple) -> None:
    activation = case[0](*case[1])
    x = torch.randn(6, 5) * 4
    assert torch.equal(activation.forward_and_logabsdet(x)[0], activation(x))
    torch.testing.assert_close(
        activation.inverse_and_logabsdet(x)[0], activation.inverse(x), rtol=1e-6, atol=1e-6
    )


@mild
@pytest.mark.parametrize(
    "method", ["forward", "inverse", "forward_and_logabsdet", "inverse_and_logabsdet"], ids=str
)
def test_gradcheck(case: tuple, method: str) -> None:
    function = getattr(case[0](*case[1]), method)
    x = torch.tensor([[-3.0, -0.7, 0.0], [0.2, 1.5, 6.0]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(function, (x,))
    assert torch.autograd.gradgradcheck(function, (x,))


@pytest.mark.parametrize(
    "method", ["forward", "inverse", "forward_and_logabsdet", "inverse_and_logabsdet"], ids=str
)
@pytest.mark.parametrize(
    "activation",
    [LeakySoftplus(0.2, learnable=True), GeneralizedLeakySoftplus(1.5, 0.3, learnable=True)],
    ids=str,
)
def test_gradcheck_of_learnable_parameters(activation: torch.nn.Module, method: str) -> None:
    activation = copy.deepcopy(activation).double()
    names = [n for n, _ in activation.named_parameters()]
    assert names

    class Call(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.activation = activation

        def forward(self, x: Tensor) -> object:
            return getattr(self.activation, method)(x)

    call = Call()
    values = [p.detach().clone().requires_grad_() for p in call.parameters()]

    def function(x: Tensor, *parameters: Tensor) -> object:
        state = dict(zip([n for n, _ in call.named_parameters()], parameters, strict=True))
        return torch.func.functional_call(call, state, (x,))

    x = torch.tensor([[-3.0, -0.7, 0.1], [0.2, 1.5, 6.0]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(function, (x, *values))
    assert torch.autograd.gradgradcheck(function, (x, *values))


def test_derivatives_at_infinity_are_the_asymptotes() -> None:
    """A saturated input must not turn a gradient into NaN."""
    activation = LeakySoftplus(0.25)
    x = torch.tensor([[math.inf], [-math.inf]], requires_grad=True)
    y, logabsdet = activation.forward_and_logabsdet(x)
    (gradient,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
    torch.testing.assert_close(gradient, torch.tensor([[1.0], [0.25]]))
    (gradient,) = torch.autograd.grad(logabsdet.sum(), x)
    torch.testing.assert_close(gradient, torch.zeros(2, 1))


# ---- parameters and their ranges


@pytest.mark.parametrize("learnable", [False, True])
@pytest.mark.parametrize("alpha", [0.0, 1.0, -0.1, 1.5, math.nan, math.inf])
def test_leaky_alpha_outside_its_range(alpha: float, learnable: bool) -> None:
    with pytest.raises(ValueError, match="alpha"):
        LeakySoftplus(alpha, learnable=learnable)


@pytest.mark.parametrize("learnable", [False, True])
@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_generalized_parameters_outside_their_range(value: float, learnable: bool) -> None:
    with pytest.raises(ValueError, match="alpha"):
        GeneralizedLeakySoftplus(value, 0.1, learnable=learnable)
    # beta = 0 with alpha = 1 is what the paper calls the base configuration: plain softplus, not onto R.
    with pytest.raises(ValueError, match="beta"):
        GeneralizedLeakySoftplus(1.0, value, learnable=learnable)


@pytest.mark.parametrize("alpha", [0.0005, 0.9995])
def test_a_learnable_alpha_starts_within_its_narrower_range(alpha: float) -> None:
    """Learnt values are kept where float32 can invert them; a start outside is refused, not moved."""
    with pytest.raises(ValueError, match=r"alpha.*0\.001.*0\.999"):
        LeakySoftplus(alpha, learnable=True)


@pytest.mark.parametrize("value", [1e-4, 2e3])
def test_learnable_generalized_parameters_start_within_their_narrower_range(value: float) -> None:
    with pytest.raises(ValueError, match=r"alpha.*0\.001.*1000"):
        GeneralizedLeakySoftplus(value, 0.1, learnable=True)
    with pytest.raises(ValueError, match=r"beta.*0\.001.*1000"):
        GeneralizedLeakySoftplus(1.0, value, learnable=True)


@pytest.mark.parametrize("alpha", [0.002, 0.1, 0.5, 0.99])
def test_learnable_starts_at_the_value_given(alpha: float) -> None:
    activation = LeakySoftplus(alpha, learnable=True)
    assert activation.alpha.item() == pytest.approx(alpha, rel=1e-5)
    slopes = activation.slopes()
    assert slopes.shape == (3,)
    expected = torch.tensor([alpha, 1 - alpha, 1.0])
    torch.testing.assert_close(slopes.detach(), expected, rtol=1e-5, atol=1e-6)
    x = torch.randn(50) * 5
    torch.testing.assert_close(activation(x).detach(), LeakySoftplus(alpha)(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 0.1), (20.0, 0.01), (0.05, 3.0)])
def test_generalized_learnable_starts_at_the_values_given(alpha: float, beta: float) -> None:
    activation = GeneralizedLeakySoftplus(alpha, beta, learnable=True)
    assert activation.alpha.item() == pytest.approx(alpha, rel=1e-5)
    assert activation.beta.item() == pytest.approx(beta, rel=1e-5)
    expected = torch.tensor([beta, 1.0, alpha])
    torch.testing.assert_close(activation.slopes().detach(), expected, rtol=1e-5, atol=1e-7)


def in_range(activation: torch.nn.Module) -> bool:
    """Within the range the class documents, to the rounding of its ends."""
    alpha = activation.alpha.item()
    rounding = 1 + 2 * torch.finfo(activation.alpha.dtype).eps
    if isinstance(activation, LeakySoftplus):
        return 0.001 / rounding <= alpha <= 0.999 * rounding and alpha < 1
    return all(0.001 / rounding**8 <= v <= 1000 * rounding**8 for v in (alpha, activation.beta.item()))


LEARNABLE = [
    lambda: LeakySoftplus(0.1, learnable=True),
    lambda: GeneralizedLeakySoftplus(1.0, 0.1, learnable=True),
]


@pytest.mark.parametrize("make", LEARNABLE, ids=["leaky", "generalized"])
@pytest.mark.parametrize("direction", [1.0, -1.0])
@pytest.mark.parametrize("rate", [1.0, 1e3, 1e8])
def test_learnable_parameters_stay_in_range_under_huge_steps(make, direction: float, rate: float) -> None:
    activation = make()
    optimizer = torch.optim.SGD(activation.parameters(), lr=rate)
    x = torch.linspace(-3, 3, 25)
    for _ in range(20):
        optimizer.zero_grad()
        (direction * activation(x).sum()).backward()
        assert all(p.grad.isfinite().all() for p in activation.parameters())
        optimizer.step()
        assert in_range(activation)
    y = activation(x)
    assert y.isfinite().all()
    assert activation.inverse(y).isfinite().all()
    assert activation.forward_and_logabsdet(x)[1].isfinite()


@pytest.mark.parametrize("make", LEARNABLE, ids=["leaky", "generalized"])
@pytest.mark.parametrize("raw", [1e30, 1e4, 100.0, -100.0, -1e4, -1e30])
@pytest.mark.parametrize("dtype", [torch.bfloat16, *DTYPES], ids=name)
def test_no_raw_value_leaves_the_range(make, dtype: torch.dtype, raw: float) -> None:
    activation = make().to(dtype)
    with torch.no_grad():
        for parameter in activation.parameters():
            parameter.fill_(raw)
    assert in_range(activation)
    a, c, kappa = activation.slopes().detach().tolist()
    assert min(a, c, kappa) > 0
    x = torch.linspace(-2, 2, 9).to(dtype)
    y = activation(x)
    assert y.isfinite().all()
    assert activation.inverse(y.detach()).isfinite().all()


@pytest.mark.parametrize("make", LEARNABLE, ids=["leaky", "generalized"])
def test_learnable_parameters_learn(make) -> None:
    """Fitting phi of other parameters finds them."""
    activation, x = make().double(), torch.linspace(-4, 4, 81, dtype=torch.float64)
    target = (
        LeakySoftplus(0.4)(x)
        if isinstance(activation, LeakySoftplus)
        else GeneralizedLeakySoftplus(2.0, 0.5)(x)
    )
    optimizer = torch.optim.Adam(activation.parameters(), lr=0.05)
    for _ in range(300):
        optimizer.zero_grad()
        (activation(x) - target).square().mean().backward()
        optimizer.step()
    found = [activation.alpha.item()] + (
        [] if isinstance(activation, LeakySoftplus) else [activation.beta.item()]
    )
    expected = [0.4] if isinstance(activation, LeakySoftplus) else [2.0, 0.5]
    assert found == pytest.approx(expected, rel=0.02)


def test_fixed_values_do_not_lose_digits_in_other_dtypes() -> None:
    """Python floats, not a float32 buffer: float64 gets 0.1, not 0.10000000149."""
    activation = LeakySoftplus(0.1).double()
    x = torch.tensor([-1e6], dtype=torch.float64)
    torch.testing.assert_close(activation(x), 0.1 * x, rtol=1e-15, atol=0)
    assert not activation.state_dict()


def test_public_names() -> None:
    assert lunet_fast.LeakySoftplus is LeakySoftplus
    assert lunet_fast.GeneralizedLeakySoftplus is GeneralizedLeakySoftplus


# ---- slopes for each coordinate


@pytest.mark.parametrize("make", [LeakySoftplus, GeneralizedLeakySoftplus])
def test_slopes_for_each_coordinate_are_those_of_one_activation_each(make: Any) -> None:
    torch.manual_seed(0)
    phi = make(0.3, learnable=True, features=4).double()
    for raw in phi.parameters():
        assert raw.shape == (4,)
        torch.nn.init.normal_(raw)
    x = torch.randn(6, 4, dtype=torch.float64)
    y, logabsdet = phi.forward_and_logabsdet(x)
    total = 0.0
    for column in range(4):
        one = make(0.3, learnable=True).double()
        with torch.no_grad():
            for raw, of_all in zip(one.parameters(), phi.parameters(), strict=True):
                raw.copy_(of_all[column])
        exact, share = one.forward_and_logabsdet(x[:, column : column + 1])
        torch.testing.assert_close(y[:, column : column + 1], exact, rtol=1e-13, atol=1e-13)
        total = total + share
    torch.testing.assert_close(logabsdet, total, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(phi.inverse(y), x, rtol=1e-10, atol=1e-10)
    low, high = phi.slope_values()[0].min(), phi.slope_values()[0].max()
    assert low < high
    assert "…" in repr(phi)
    phi.reset_parameters()
    assert float(phi.slope_values()[0].std()) < 1e-12


def test_slopes_for_each_coordinate_must_be_learnt() -> None:
    with pytest.raises(ValueError, match="features=3 asks for a slope for each coordinate"):
        LeakySoftplus(0.3, features=3)
    with pytest.raises(ValueError, match="features must be at least 1, got 0"):
        GeneralizedLeakySoftplus(learnable=True, features=0)

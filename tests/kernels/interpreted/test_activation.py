"""φ, φ⁻¹, their log-determinants and gradients, row by row, against the float64 reference."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from harness import FAMILIES, FEATURES, LIMIT, ROWS, amid_nan, guarded, normwise, slope_ratio, slopes
from lunet_fast.kernels import activation, tiles
from lunet_fast.kernels.activation import LEARNT_STEPS, activation_of, load_family
from lunet_fast.kernels.leaky_softplus import inverse_steps, phi_derivative
from lunet_fast.ops import reference

#: bfloat16 keeps 8 bits, and the interpreter cuts where a GPU rounds.
BFLOAT16 = 8e-3

#: Where the activation is hard: nearly flat, and nearly linear.
EXTREME_FAMILIES = [*FAMILIES, (1e-4, 1.0, 3.0), (1e-6, 1.0, 1.0), (100.0, 1.0, 1.0)]


@triton.jit
def derivative_kernel(x_ptr, y_ptr, activation, N, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """y = φ′(x), which no kernel stores by itself."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < N, other=0.0)
    family = load_family(activation, 0, i, N)
    tl.store(y_ptr + i, phi_derivative(x, family), mask=i < N)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


SCALES = st.floats(-2.0, 2.0).map(lambda exponent: 10.0**exponent)


# --- forward --------------------------------------------------------------------------------------------


@given(data=st.data(), N=ROWS, D=FEATURES, scale=SCALES, logabsdet=st.booleans())
def test_forward(data: Any, N: int, D: int, scale: float, logabsdet: bool) -> None:
    given_slopes, exact = data.draw(slopes(D, none=False))
    x = amid_nan(normal(N, D, seed=N) * scale)
    with guarded():
        y, total = activation.activation_forward(x, given_slopes, logabsdet=logabsdet)
    y64, total64 = reference.leaky_softplus_and_logabsdet(x.double(), exact)
    assert normwise(y, y64) <= LIMIT
    assert (total is not None) == logabsdet
    assert total is None or normwise(total, total64) <= LIMIT


@given(data=st.data(), N=ROWS, D=FEATURES, scale=SCALES, logabsdet=st.booleans())
def test_inverse(data: Any, N: int, D: int, scale: float, logabsdet: bool) -> None:
    given_slopes, exact = data.draw(slopes(D, none=False))
    y = amid_nan(normal(N, D, seed=N) * scale)
    with guarded():
        x, total = activation.activation_inverse(y, given_slopes, logabsdet=logabsdet)
    x64, total64 = reference.leaky_softplus_inverse_and_logabsdet(y.double(), exact)
    limit = LIMIT * slope_ratio(exact)
    assert normwise(x, x64) <= limit
    assert (total is not None) == logabsdet
    assert total is None or normwise(total, total64) <= limit


# --- backward -------------------------------------------------------------------------------------------


def gradients(
    grad: Tensor, grad_logabsdet: Tensor | None, x: Tensor, exact: Any, inverse: bool
) -> tuple[Tensor, ...]:
    """(gradient of the input, of each element's own copy of the slopes [3, N, D], in float64)."""
    x = x.double()
    triple = torch.as_tensor(exact).double().reshape(3, 1, -1).expand(3, *x.shape).clone().requires_grad_()
    if inverse:
        point = reference.leaky_softplus(x, triple).detach().requires_grad_()
        out = reference.leaky_softplus_inverse(point, triple)
        total = -reference.log_derivative_sum(out, triple)
    else:
        point = x.clone().requires_grad_()
        out, total = reference.leaky_softplus_and_logabsdet(point, triple)
    if x.numel() == 0:
        return torch.zeros_like(x), torch.zeros_like(triple)
    outputs, seeds = [out], [grad.double()]
    if grad_logabsdet is not None:
        outputs.append(total)
        seeds.append(grad_logabsdet.double())
    return torch.autograd.grad(outputs, [point, triple], seeds)


def assert_sum_close(result: Tensor, terms: Tensor, over: tuple[int, ...], limit: float) -> None:
    """Normwise, times what cancels: the sum of the terms' magnitudes over the sum's own."""
    expected, magnitude = terms.sum(over), terms.abs().sum(over)
    assert result.shape == expected.shape
    assert result.dtype == torch.float32
    cancelled = (magnitude.norm() / expected.norm()).item() if expected.norm() > 0 else 1.0
    assert normwise(result, expected) <= limit * cancelled


BACKWARD = {False: activation.activation_backward, True: activation.activation_inverse_backward}


@pytest.mark.parametrize("inverse", [False, True])
@given(data=st.data(), N=ROWS, D=FEATURES, programs=st.integers(1, 3))
def test_backward(inverse: bool, data: Any, N: int, D: int, programs: int) -> None:
    given_slopes, exact = data.draw(slopes(D, none=False))
    x, g = amid_nan(normal(N, D, seed=N) * 2.0), amid_nan(normal(N, D, seed=D))
    ld = amid_nan(normal(N, seed=1)) if data.draw(st.booleans()) else None
    # Few programs, so that each walks several tiles of even a short batch.
    with guarded(), mock.patch.object(tiles, "programs", return_value=programs):
        grad, grad_slopes = BACKWARD[inverse](g, ld, x, given_slopes)
    expected, terms = gradients(g, ld, x, exact, inverse)
    limit = LIMIT * (slope_ratio(exact) if inverse else 1.0)
    assert normwise(grad, expected) <= limit
    if isinstance(given_slopes, Tensor):
        assert_sum_close(grad_slopes, terms, (1,) if given_slopes.dim() == 2 else (1, 2), limit)
    else:
        assert grad_slopes is None


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("learnt", [False, True])
@pytest.mark.parametrize("D", [3, 40, 300])
def test_column_sums_of_members(D: int, learnt: bool, inverse: bool) -> None:
    K, N = 2, 70
    family = torch.tensor(FAMILIES[0])
    x, g, ld = amid_nan(normal(K, N, D)), amid_nan(normal(K, N, D, seed=1)), amid_nan(normal(K, N, seed=2))
    with guarded(), mock.patch.object(tiles, "programs", return_value=2):
        grad, sums, grad_slopes = activation.row_gradients(
            g, ld, x, family if learnt else FAMILIES[0], inverse=inverse, column_sums=True
        )
    flat = (g.flatten(0, 1), ld.flatten(), x.flatten(0, 1), family, inverse)
    expected, terms = gradients(*flat)
    limit = LIMIT * (slope_ratio(FAMILIES[0]) if inverse else 1.0)
    assert normwise(grad, expected.view(K, N, D)) <= limit
    assert_sum_close(sums, expected.view(K, N, D), (1,), limit)
    if learnt:
        assert_sum_close(grad_slopes, terms, (1, 2), limit)
    else:
        assert grad_slopes is None


# --- extremes -------------------------------------------------------------------------------------------


def to_1e30() -> Tensor:
    magnitudes = torch.logspace(-30, 30, 2001, dtype=torch.float64).float()
    return torch.cat([-magnitudes, magnitudes, torch.linspace(-200.0, 200.0, 4001)]).unsqueeze(1)


def in_float32(family: tuple[float, ...]) -> Any:
    """The same slopes for both sides: those of float32."""
    return tuple(torch.tensor(family).double().tolist())


@pytest.mark.parametrize("family", EXTREME_FAMILIES)
def test_extremes_of_the_forward(family: tuple[float, ...]) -> None:
    """Elementwise, by the scale of the terms that are added."""
    exact = in_float32(family)
    a, c, kappa = exact
    x = to_1e30()
    x64 = x.double()
    y, log_slope = activation.activation_forward(x, exact, logabsdet=True)
    y64 = reference.leaky_softplus(x64, exact)
    # Near its zero φ is a difference of a·x and a softplus: its terms, not itself, set the scale.
    scale = a * x64.abs() + (y64 - a * x64)
    assert ((y.double() - y64).abs() / scale).max() <= LIMIT
    # log φ′ is a constant and a correction that dies out in either tail; where φ′ is near 1 they cancel, and
    # the logarithm of the rounded φ′ is off by that rounding. The rounding of κx, |κx| times as large in
    # exp(−|κx|), is the correction's own scale.
    s = torch.sigmoid(-(kappa * x64).abs())
    constant = torch.where(x64 >= 0, math.log(a + c), math.log(a))
    correction = torch.log1p(torch.where(x64 >= 0, -c / (a + c), c / a) * s)
    log64 = (constant + correction).squeeze(1)
    scale = (constant.abs() + correction.abs() * (1.0 + 0.1 * (kappa * x64).abs())).squeeze(1)
    assert ((log_slope.double() - log64).abs() / scale.clamp_min(0.1)).max() <= LIMIT


@pytest.mark.skipif("PTX_ARCHITECTURE" in os.environ, reason="what launches this kernel is here")
@pytest.mark.parametrize("family", EXTREME_FAMILIES)
def test_extremes_of_the_derivative(family: tuple[float, ...]) -> None:
    exact = in_float32(family)
    x = to_1e30()
    slope = torch.empty_like(x)
    described = activation_of(exact, 1)
    derivative_kernel[(triton.cdiv(x.numel(), 1024),)](x, slope, described, x.numel(), BLOCK=1024)
    slope64 = reference.leaky_softplus_derivative(x.double(), exact)
    assert ((slope.double() - slope64).abs() / slope64).max() <= LIMIT


@pytest.mark.parametrize("family", EXTREME_FAMILIES)
def test_extremes_of_the_inverse(family: tuple[float, ...]) -> None:
    exact = in_float32(family)
    a = exact[0]
    y = to_1e30()
    x, _ = activation.activation_inverse(y, exact, logabsdet=False)
    x64 = reference.leaky_softplus_inverse(y.double(), exact)
    # What a rounding of each term of φ(x) = y does to x.
    terms = a * x64.abs() + (reference.leaky_softplus(x64, exact) - a * x64) + y.double().abs()
    scale = x64.abs() + terms / reference.leaky_softplus_derivative(x64, exact)
    assert ((x.double() - x64).abs() / scale).max() <= LIMIT


@pytest.mark.parametrize("ratio", [0.1, 1 / 9, 0.3, 1.0, 30.0, 1e4])
def test_the_inverse_in_one_step(ratio: float) -> None:
    """φ(x̂) is a few roundings of |y| + φ(0) from y, wherever y lies between the tangents it starts from."""
    a, c, kappa = exact = in_float32((ratio, 1.0, 0.7))
    assert inverse_steps(a / c) == 1
    y = torch.cat([torch.linspace(-50.0, 50.0, 15 * 1024), torch.linspace(-1e-3, 1e-3, 1024)]).view(-1, 128)
    x, _ = activation.activation_inverse(y, exact, logabsdet=False)
    error = (reference.leaky_softplus(x.double(), exact) - y.double()).abs()
    assert (error / (y.double().abs() + c / kappa * math.log(2.0))).max() <= 8 * 2.0**-24
    ends = torch.tensor([[math.inf], [-math.inf], [math.nan]])
    found, _ = activation.activation_inverse(ends, exact, logabsdet=False)
    assert torch.equal(found[:2], ends[:2])
    assert bool(found[2].isnan())


@pytest.mark.parametrize("ratio", [2.0**-13, 1e-3, 0.03, 0.5, 30.0, 1e4])
def test_the_inverse_in_two_steps(ratio: float) -> None:
    """Slopes in a tensor, whatever they are, and float ones below 0.1: x is within a few roundings."""
    exact = in_float32((ratio, 1.0, 0.7))
    turn = math.log(ratio) / 0.7  # where both terms of φ have one slope
    x = torch.cat([torch.linspace(-60.0, 60.0, 8192), torch.linspace(turn - 15.0, turn + 15.0, 8192)])
    y = reference.leaky_softplus(x.double(), exact).float().view(-1, 128)
    x64 = reference.leaky_softplus_inverse(y.double(), exact)
    scale = x64.abs() + y.double().abs() / reference.leaky_softplus_derivative(x64, exact)
    assert inverse_steps(exact[0]) <= LEARNT_STEPS == 2
    for kind in [torch.tensor(exact)] + [exact] * (ratio < 0.1):
        found, _ = activation.activation_inverse(y, kind, logabsdet=False)
        assert ((found.double() - x64).abs() / scale).max() <= 5 * 2.0**-24


@pytest.mark.parametrize("family", EXTREME_FAMILIES)
@pytest.mark.parametrize("inverse", [False, True])
def test_extremes_of_the_backward(family: tuple[float, ...], inverse: bool) -> None:
    """Elementwise and without a NaN: φ′ and φ″/φ′ = κ·cσ(1 − σ)/φ′, whose σ has κx's rounding times |κx|."""
    exact = in_float32(family)
    a, c, kappa = exact
    x = to_1e30()
    t = kappa * x.double()
    ones = torch.ones_like(x)
    grad, _ = BACKWARD[inverse](ones, ones.squeeze(1), x, exact)
    s = torch.sigmoid(-t.abs())
    slope = a + c * torch.sigmoid(t)
    bend = kappa * c * s * (1.0 - s) / slope
    expected = (1.0 - bend) / slope if inverse else slope + bend
    scale = (1.0 + bend) / slope if inverse else slope + bend
    error = (grad.double() - expected).abs() / (scale * (1.0 + 0.1 * t.abs().clamp_max(100.0)))
    assert error.max() <= LIMIT


@pytest.mark.parametrize("family", EXTREME_FAMILIES)
def test_inf_and_nan(family: tuple[float, ...]) -> None:
    exact = in_float32(family)
    a, c, _ = exact
    special = torch.tensor([math.inf, -math.inf, math.nan, 3.4e38, -3.4e38, 0.0, -0.0, 1e-45]).unsqueeze(1)
    y, total = activation.activation_forward(special, exact, logabsdet=True)
    y64 = reference.leaky_softplus(special.double(), exact).float()
    slope64 = reference.leaky_softplus_derivative(special.double(), exact)
    assert torch.allclose(y, y64, rtol=1e-5, equal_nan=True)
    assert torch.allclose(total.double(), slope64.log().squeeze(1), rtol=1e-5, atol=1e-6, equal_nan=True)

    x, total = activation.activation_inverse(special, exact, logabsdet=True)
    assert torch.equal(x[:2], special[:2])
    assert bool(x[2].isnan())
    assert bool(x[5:].isfinite().all())
    assert bool(total[2].isnan())
    ends = -torch.tensor([math.log(a + c), math.log(a)]).double()
    assert torch.allclose(total[:2].double(), ends, rtol=1e-5, atol=1e-6)

    # At ±inf φ is its asymptote: the slope passes on and the bend is zero.
    ones = torch.ones_like(special)
    for inverse in (False, True):
        grad, _ = BACKWARD[inverse](ones, ones.squeeze(1), special, exact)
        slope = 1.0 / slope64[:2] if inverse else slope64[:2]
        assert torch.allclose(grad[:2].double(), slope, rtol=1e-5)
        assert bool(grad[2].isnan())
        assert bool(grad[3:].isfinite().all())


# --- the rest -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("N", "D"), [(5, 7), (70, 33), (60, 96)])
def test_bfloat16(N: int, D: int) -> None:
    """bfloat16 in and out, float32 between: against float64 on the same rounded inputs."""
    family = torch.tensor(FAMILIES[0])
    x, g, ld = normal(N, D).bfloat16(), normal(N, D, seed=1).bfloat16(), normal(N, seed=2)
    y, total = activation.activation_forward(x, FAMILIES[0], logabsdet=True)
    assert y.dtype == torch.bfloat16
    assert normwise(y, reference.leaky_softplus(x.double(), FAMILIES[0])) <= BFLOAT16
    # Sums leave in float32, so they must not have passed through bfloat16.
    assert normwise(total, reference.log_derivative_sum(x.double(), FAMILIES[0])) <= LIMIT
    back, _ = activation.activation_inverse(x, FAMILIES[0], logabsdet=False)
    assert normwise(back, reference.leaky_softplus_inverse(x.double(), FAMILIES[0])) <= BFLOAT16
    for inverse in (False, True):
        grad, grad_slopes = BACKWARD[inverse](g, ld, x, family)
        expected, terms = gradients(g, ld, x, family, inverse)
        assert grad.dtype == torch.bfloat16
        assert normwise(grad, expected) <= BFLOAT16
        assert_sum_close(grad_slopes, terms, (1, 2), LIMIT * (slope_ratio(FAMILIES[0]) if inverse else 1.0))


def everything(x: Tensor, given_slopes: Any) -> list[Tensor]:
    """All that is computed row by row, of these rows and gradients that go with them."""
    g, ld = x.cos(), x.sum(1).sin()
    return [
        *activation.activation_forward(x, given_slopes, logabsdet=True),
        *activation.activation_inverse(x, given_slopes, logabsdet=True),
        BACKWARD[False](g, ld, x, given_slopes)[0],
        BACKWARD[True](g, ld, x, given_slopes)[0],
    ]


@pytest.mark.parametrize("D", [1, 90, 200])
def test_same_bits_whatever_the_batch(D: int) -> None:
    x = normal(70, D)
    whole = everything(x, torch.tensor(FAMILIES[1]))
    assert all(
        torch.equal(p, q) for p, q in zip(whole, everything(x, torch.tensor(FAMILIES[1])), strict=True)
    )
    part = everything(x[60:65].clone(), torch.tensor(FAMILIES[1]))
    assert all(torch.equal(p[60:65], q) for p, q in zip(whole, part, strict=True))


def test_slopes_gradient_has_the_same_bits_twice() -> None:
    x, g = normal(200, 90), normal(200, 90, seed=1)
    with mock.patch.object(tiles, "programs", return_value=3):
        first, second = (BACKWARD[False](g, None, x, torch.ones(3, 90))[1] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("D", [5, 90])
def test_a_nan_stays_in_its_row(D: int) -> None:
    x = normal(30, D)
    before = everything(x, FAMILIES[0])
    x[3, D // 2] = math.nan
    others = torch.arange(30) != 3
    for p, q in zip(before, everything(x, FAMILIES[0]), strict=True):
        assert bool(q[3].isnan().any())
        assert torch.equal(p[others], q[others])


@pytest.mark.parametrize("D", [1, 40])
def test_empty(D: int) -> None:
    none = torch.zeros(0, D)
    shapes = [tuple(t.shape) for t in everything(none, FAMILIES[0])]
    assert shapes == [(0, D), (0,), (0, D), (0,), (0, D), (0, D)]
    for per_column in ((3,), (3, D)):
        _, grad_slopes = BACKWARD[False](none, torch.zeros(0), none, torch.ones(per_column))
        assert torch.equal(grad_slopes, torch.zeros(per_column))


_ROWS = normal(8, 8)
_FAMILY = FAMILIES[0]


@pytest.mark.parametrize(
    "refused",
    [
        lambda: activation.activation_forward(_ROWS.T, _FAMILY, logabsdet=False),
        lambda: activation.activation_inverse(_ROWS[:, ::2], _FAMILY, logabsdet=False),
        lambda: activation.activation_inverse(_ROWS, _FAMILY, logabsdet=False, steps=0),
        lambda: activation.activation_forward(_ROWS[0].expand(8, 8), _FAMILY, logabsdet=False),
        lambda: activation.activation_forward(_ROWS.double(), _FAMILY, logabsdet=False),
        lambda: activation.activation_forward(_ROWS, torch.ones(3, 7), logabsdet=False),
        lambda: activation.activation_backward(_ROWS.T, None, _ROWS, _FAMILY),
        lambda: activation.activation_backward(_ROWS[0].expand(8, 8), None, _ROWS, _FAMILY),
        lambda: activation.activation_backward(_ROWS, None, _ROWS.T, _FAMILY),
        lambda: activation.activation_backward(_ROWS, None, _ROWS.bfloat16(), _FAMILY),
        lambda: activation.activation_inverse_backward(_ROWS, _ROWS[0, :7], _ROWS, _FAMILY),
        lambda: activation.activation_inverse_backward(_ROWS, _ROWS[0].double(), _ROWS, _FAMILY),
        lambda: activation.activation_inverse_backward(_ROWS[:5], None, _ROWS, _FAMILY),
        lambda: activation.activation_backward(_ROWS, None, _ROWS, torch.ones(2)),
    ],
)
def test_refusals(refused: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match="must be"):
        refused()

"""Numbers at the ends of their range: large and small u_ii and slopes, subnormals, NaN, infinities, D = 1.

What is exact is compared with float64; what cannot be is held to its documented behaviour.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import truth
from torch import Tensor

from lunet_fast import ConditionWarning, GeneralizedLeakySoftplus, LeakySoftplus, LUDense, LUNet

INF, NAN = math.inf, math.nan
DTYPES = [torch.float32, torch.float64]
#: Rows and features on either side of every size at which another way is taken.
#: Few rows and many, of one panel and of several; 2,100 are solved for with an explicit A⁻¹.
SIZES = [(1, 1), (70, 1), (3, 5), (2100, 5), (9, 64), (200, 64), (20, 131), (300, 131), (9, 270)]
METHODS = ["forward", "inverse", "forward_and_logabsdet", "inverse_and_logabsdet"]

sizes = pytest.mark.parametrize(("rows", "d"), SIZES)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])


def results(module: Any, method: str, x: Tensor) -> tuple[Tensor, ...]:
    with torch.no_grad():
        found = getattr(module, method)(x)
    return found if isinstance(found, tuple) else (found,)


def layer_of(
    d: int, dtype: torch.dtype, activation: Any = None, *, diagonal: Tensor | float = 0.0, seed: int = 0
) -> LUDense:
    """Random factors with the given log-diagonal; a row of U is scaled with it, a column of L not at all."""
    layer = LUDense(d, activation=activation, dtype=dtype)
    truth.randomise(layer, seed, spread=0.0)
    with torch.no_grad():
        s = torch.as_tensor(diagonal, dtype=torch.float64).expand(d)
        upper = layer.lu.double().triu(1) * s.exp()[:, None]
        layer.lu.copy_(layer.lu.double().tril(-1) + upper + torch.diag(s))
    return layer


def close(found: Tensor, exact: Tensor, ulps: float) -> bool:
    """Whether each row is right to so many roundings of its length; equal infinities are."""
    exact = exact.to(torch.float64)
    error = torch.where(found.double() == exact, 0.0, found.double() - exact)
    length = exact.abs().amax(-1, keepdim=True)
    return bool((error.abs() <= ulps * torch.finfo(found.dtype).eps * length).all())


# ---- large and small u_ii


@dtypes
@sizes
@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_a_scale_of_the_matrix_costs_nothing(rows: int, d: int, size: float, dtype: torch.dtype) -> None:
    """|u_ii| = 1e±30: A is well-conditioned, whatever its size, and so is the inverse."""
    layer = layer_of(d, dtype, diagonal=math.log(size))
    with torch.no_grad():
        layer.bias.zero_()
    x = torch.randn(rows, d, dtype=dtype)
    state = truth.read(layer)
    y, logabsdet = results(layer, "forward_and_logabsdet", x)
    exact, exact_logabsdet = truth.forward(x.double(), state)
    assert 1e-33 < abs(float(y.abs().mean())) < 1e33
    assert close(y, exact, 60 * d)
    torch.testing.assert_close(logabsdet.double(), exact_logabsdet.expand(rows), rtol=1e-6, atol=0)
    back, inverse_logabsdet = results(layer, "inverse_and_logabsdet", y)
    assert close(back, truth.inverse(y.double(), state)[0], 200 * d)
    assert close(back, x.double(), 400 * d)
    assert torch.equal(inverse_logabsdet, -logabsdet)


@dtypes
@sizes
def test_a_diagonal_of_every_size_is_inverted_column_by_column(rows: int, d: int, dtype: torch.dtype) -> None:
    """|u_ii| from 1e-30 to 1e30 in one layer, L = I: each coordinate keeps its own digits."""
    diagonal = torch.linspace(-69, 69, d, dtype=torch.float64) if d > 1 else torch.tensor([-69.0])
    layer = layer_of(d, dtype)
    with torch.no_grad():
        layer.lu.copy_(torch.diag(diagonal))
        layer.bias.zero_()
    x = torch.randn(rows, d, dtype=dtype)
    y, logabsdet = results(layer, "forward_and_logabsdet", x)
    exact = x.double() * torch.exp(layer.lu.detach().double().diagonal()) * layer.sign.double()
    torch.testing.assert_close(y.double(), exact, rtol=40 * torch.finfo(dtype).eps, atol=0)
    torch.testing.assert_close(layer.inverse(y), x, rtol=80 * torch.finfo(dtype).eps, atol=0)
    assert bool((logabsdet.abs() < 100).all())


@pytest.mark.parametrize("size", [1e-30, 1e30])
@pytest.mark.parametrize("rows", [3, 40])
def test_gradients_at_large_and_small_scales(size: float, rows: int) -> None:
    """Finite and right where the results are."""
    layer = layer_of(6, torch.float32, diagonal=math.log(size))
    x = torch.randn(rows, 6, requires_grad=True)
    layer(x).sum().backward()
    wide = layer_of(6, torch.float32, diagonal=math.log(size)).double()
    exact_x = x.detach().double().requires_grad_()
    (exact_x @ truth.weight(wide.lu, wide.sign).T + wide.bias).sum().backward()
    for found, exact in (
        (x.grad, exact_x.grad),
        (layer.lu.grad, wide.lu.grad),
        (layer.bias.grad, wide.bias.grad),
    ):
        assert found is not None
        assert exact is not None
        assert float((found.double() - exact).norm() / exact.norm()) < 1e-5


# ---- slopes near zero


SMALL_SLOPES: list[tuple[str, Callable[[], Any], float]] = [
    *((f"alpha={a:g}", lambda a=a: LeakySoftplus(a), a) for a in (1e-3, 1e-6, 1e-12, 1e-30, 1e-300)),
    *(
        (f"beta={b:g}", lambda b=b: GeneralizedLeakySoftplus(1.0, b), b)
        for b in (1e-3, 1e-6, 1e-12, 1e-30, 1e-300)
    ),
    *((f"kappa={k:g}", lambda k=k: GeneralizedLeakySoftplus(k, 0.1), 0.1) for k in (1e-6, 1e-3, 1e3, 1e6)),
]


@dtypes
@pytest.mark.parametrize(
    ("activation", "slope"), [case[1:] for case in SMALL_SLOPES], ids=[c[0] for c in SMALL_SLOPES]
)
def test_slopes_near_zero(activation: Callable[[], Any], slope: float, dtype: torch.dtype) -> None:
    """A layer and its round trip, within what rounding y makes of x: a slope of 1e-6 divides by it."""
    layer = layer_of(5, dtype, activation())
    eps = torch.finfo(dtype).eps
    x = 4 * torch.randn(300, 5, dtype=dtype)
    state = truth.read(layer)
    y, logabsdet = results(layer, "forward_and_logabsdet", x)
    exact, exact_logabsdet = truth.forward(x.double(), state)
    zero = truth.phi_zero(state.slopes)
    assert bool(((y.double() - exact).abs() <= 60 * eps * (exact.abs().amax(-1, keepdim=True) + zero)).all())
    if slope >= torch.finfo(dtype).tiny:
        torch.testing.assert_close(
            logabsdet.double(), exact_logabsdet, rtol=1e-5 if eps > 1e-8 else 1e-9, atol=1e-6
        )
    back = results(layer, "inverse", y)[0]
    assert bool(back.isfinite().all())
    bound = truth.round_trip_bound(x.double(), [state], eps)
    assert bool(((back.double() - x.double()).norm(dim=-1) <= 4 * bound).all())


@dtypes
@pytest.mark.parametrize("alpha", [1e-3, 1e-12, 1e-30])
def test_the_far_left_is_inverted_by_the_small_slope(alpha: float, dtype: torch.dtype) -> None:
    """There φ(x) = α·x to rounding, and φ⁻¹ divides by α, as long as the quotient is a number."""
    activation = LeakySoftplus(alpha)
    y = -torch.logspace(-4, 4, 60, dtype=dtype)
    exact = truth.phi_inverse(y.double(), (alpha, 1 - alpha, 1.0))
    found = activation.inverse(y)
    torch.testing.assert_close(found.double(), exact, rtol=200 * torch.finfo(dtype).eps, atol=0)


@dtypes
@pytest.mark.parametrize("alpha", [1e-30, 1e-150, 1e-200, 1e-300, 5e-324])
@pytest.mark.parametrize("generalized", [False, True])
def test_the_smallest_slopes_are_inverted_to_the_residual(
    alpha: float, generalized: bool, dtype: torch.dtype
) -> None:
    """φ(φ⁻¹(y)) = y to roundings of |y| + φ(0), where φ⁻¹(y) is a number at all."""
    activation = GeneralizedLeakySoftplus(1.0, alpha) if generalized else LeakySoftplus(alpha)
    magnitudes = torch.logspace(-300 if dtype == torch.float64 else -37, 4, 400, dtype=torch.float64)
    y = torch.cat([magnitudes, -magnitudes, torch.zeros(1, dtype=torch.float64)]).to(dtype)
    x = activation.inverse(y).double()
    assert not bool(x.isnan().any())
    assert bool((x[y >= 0].isfinite()).all())
    residual = (truth.phi(x, activation.slopes()) - y.double()).abs()
    beyond = (y.double() / alpha).abs() > torch.finfo(dtype).max / 4
    limit = 30 * torch.finfo(dtype).eps * (y.double().abs() + math.log(2.0))
    assert bool(((residual <= limit) | (beyond & (y < 0))).all())


# ---- small numbers


@dtypes
@sizes
def test_subnormal_rows(rows: int, d: int, dtype: torch.dtype) -> None:
    """Numbers below the smallest normal one have an absolute accuracy, that of the last bit there is."""
    layer = layer_of(d, dtype)
    with torch.no_grad():
        layer.bias.zero_()
    tiny = torch.finfo(dtype).smallest_normal
    x = torch.randn(rows, d, dtype=dtype) * tiny
    assert bool((x != 0).any())
    exact = truth.forward(x.double() / tiny, truth.read(layer))[0]
    y = results(layer, "forward", x)[0]
    assert bool(((y.double() / tiny - exact).abs() <= 100 * d * torch.finfo(dtype).eps).all())
    back = results(layer, "inverse", y)[0]
    assert bool((((back - x) / tiny).abs() <= 400 * d * torch.finfo(dtype).eps).all())


@dtypes
def test_zero_comes_back_as_zero(dtype: torch.dtype) -> None:
    for net in (LUNet(1, 3, dtype=dtype), LUNet(7, 3, dtype=dtype)):
        x = torch.zeros(4, net.features, dtype=dtype)
        assert float(net.inverse(net(x)).abs().max()) < 10 * torch.finfo(dtype).eps


# ---- one feature


@dtypes
@pytest.mark.parametrize("rows", [0, 1, 2, 70])
@pytest.mark.parametrize("activation", [None, LeakySoftplus, GeneralizedLeakySoftplus])
def test_one_feature(activation: Any, rows: int, dtype: torch.dtype) -> None:
    layer = layer_of(1, dtype, activation and activation(), diagonal=-0.7, seed=3)
    x = torch.randn(rows, 1, dtype=dtype)
    state = truth.read(layer)
    y, logabsdet = results(layer, "forward_and_logabsdet", x)
    exact, exact_logabsdet = truth.forward(x.double(), state)
    rtol = 1e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(y.double(), exact, rtol=rtol, atol=rtol)
    torch.testing.assert_close(logabsdet.double(), exact_logabsdet, rtol=rtol, atol=rtol)
    back, inverse_logabsdet = results(layer, "inverse_and_logabsdet", y)
    torch.testing.assert_close(back, x, rtol=20 * rtol, atol=20 * rtol)
    torch.testing.assert_close(inverse_logabsdet, -logabsdet, rtol=20 * rtol, atol=20 * rtol)


def test_a_net_of_one_feature_is_a_flow() -> None:
    net = LUNet(1, 4, dtype=torch.float64)
    x = torch.linspace(-5, 5, 41, dtype=torch.float64)[:, None]
    y, logabsdet = results(net, "forward_and_logabsdet", x)
    assert bool((y.diff(dim=0) > 0).all()), "an increasing function of one number"
    step = 1e-5
    slope = (net(x + step) - net(x - step)).squeeze(-1) / (2 * step)
    torch.testing.assert_close(logabsdet, slope.log().detach(), rtol=1e-6, atol=1e-6)
    assert [row.kappa_lower for row in net.condition().layers] == [1.0] * 4


# ---- NaN and infinities


BUILDS: dict[str, Callable[[int, torch.dtype], Any]] = {
    "layer": lambda d, dtype: layer_of(d, dtype, LeakySoftplus(0.1)),
    "linear": lambda d, dtype: layer_of(d, dtype),
    "generalized": lambda d, dtype: layer_of(d, dtype, GeneralizedLeakySoftplus(2.0, 0.2)),
    "learnable": lambda d, dtype: layer_of(d, dtype, LeakySoftplus(0.3, learnable=True)),
    "net": lambda d, dtype: LUNet(d, 3, dtype=dtype),
    "reversible": lambda d, dtype: LUNet(d, 3, dtype=dtype, memory="reversible"),
}


@dtypes
@sizes
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("build", BUILDS)
def test_a_bad_row_is_bad_alone(build: str, bad: float, rows: int, d: int, dtype: torch.dtype) -> None:
    """No finite number in its result, and the others' rows as they are without it."""
    module = BUILDS[build](d, dtype)
    x = torch.randn(rows, d, dtype=dtype)
    place, column = rows // 2, d // 2
    spoilt = x.clone()
    spoilt[place, column] = bad
    others = torch.arange(rows) != place
    for method in METHODS:
        plain, found = results(module, method, x), results(module, method, spoilt)
        assert not bool(found[0][place].isfinite().any()), method
        for before, after in zip(plain, found, strict=True):
            assert bool(after[others].isfinite().all()), method
            torch.testing.assert_close(after[others], before[others], rtol=1e-4, atol=1e-5)
        if math.isnan(bad):
            assert bool(found[0][place].isnan().any()), method


@dtypes
@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("rows", [1, 40])
def test_infinity_of_one_feature_is_kept(build: str, rows: int, dtype: torch.dtype) -> None:
    """D = 1 mixes nothing: φ(±∞) = ±∞, and back. A small net on a CPU makes NaN of +∞, in fewer calls."""
    module = BUILDS[build](1, dtype)
    sign = 1.0 if isinstance(module, LUNet) else float(module.sign[0])
    for bad in (INF, -INF):
        x = torch.full((rows, 1), bad, dtype=dtype)
        for method in METHODS:
            found = results(module, method, x)[0]
            if build == "net" and "inverse" not in method:
                found = found.nan_to_num(nan=bad, posinf=INF, neginf=-INF)
            assert torch.equal(found, sign * x), method
        for method in METHODS[3:] if build == "net" else METHODS[2:]:
            assert bool(results(module, method, x)[1].isfinite().all()), method


@dtypes
@sizes
@pytest.mark.parametrize("place", ["diagonal", "lower", "upper", "bias", "slope"])
def test_a_nan_in_a_parameter_is_in_every_row(place: str, rows: int, d: int, dtype: torch.dtype) -> None:
    if d == 1 and place in ("lower", "upper"):
        place = "diagonal"  # one number has no triangles
    layer = layer_of(d, dtype, LeakySoftplus(0.3, learnable=True))
    with torch.no_grad():
        target = {
            "diagonal": lambda: layer.lu[d // 2, d // 2],
            "lower": lambda: layer.lu[d - 1, 0],
            "upper": lambda: layer.lu[0, d - 1],
            "bias": lambda: layer.bias[d - 1],
            "slope": lambda: layer.activation.raw_alpha[0],
        }[place]()
        target.fill_(NAN)
    for method in METHODS:
        found = results(layer, method, torch.randn(rows, d, dtype=dtype))
        assert bool(found[0].isnan().any(-1).all()), method
        if len(found) > 1 and place in ("diagonal", "slope"):
            assert bool(found[1].isnan().all()), method


@pytest.mark.parametrize("memory", ["saved", "reversible"])
def test_a_nan_in_a_net_is_in_every_row(memory: str) -> None:
    for layer in range(3):
        net = LUNet(6, 3, memory=memory)
        with torch.no_grad():
            net.layers[layer].lu[2, 2] = NAN
        for method in METHODS:
            assert bool(results(net, method, torch.randn(50, 6))[0].isnan().any(-1).all()), method


@sizes
def test_rows_that_overflow_do_so_alone(rows: int, d: int) -> None:
    """Products beyond the largest number are infinite or NaN, and the other rows are right."""
    layer = layer_of(d, torch.float32, LeakySoftplus(0.1), diagonal=20.0)
    x = torch.randn(rows, d)
    x[0] = 3e38
    y = results(layer, "forward", x)[0]
    assert not bool(y[0].isfinite().all())
    exact = truth.forward(x[1:].double(), truth.read(layer))[0]
    assert close(y[1:], exact, 100 * d)


# ---- condition() warns


def warned(net: LUNet, x: Tensor | None = None) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        net.condition(x)
    return [str(each.message) for each in caught if issubclass(each.category, ConditionWarning)]


@pytest.mark.parametrize("d", [1, 2, 16, 64, 300])
@pytest.mark.parametrize("alpha", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("layers", [1, 4, 6])
@dtypes
def test_a_fresh_net_gives_no_warning(d: int, alpha: float, layers: int, dtype: torch.dtype) -> None:
    net = LUNet(d, layers, LeakySoftplus(alpha), dtype=dtype)
    assert warned(net) == []
    assert warned(net, torch.randn(100, d, dtype=dtype)) == []


def kept_digits(net: LUNet, x: Tensor) -> float:
    """Of the round trip as a whole, with nothing of the library's way to count."""
    with torch.no_grad():
        error = (net.inverse(net(x)) - x).double().norm() / x.double().norm()
    return -math.log10(max(float(error), 1e-30)) if math.isfinite(float(error)) else -INF


@dtypes
@pytest.mark.parametrize("way", ["diagonal", "off-diagonal", "depth", "one pivot"])
def test_the_warning_comes_before_the_digits_are_gone(way: str, dtype: torch.dtype) -> None:
    """However a net goes bad: without a warning, half of the digits are there, on other rows too."""
    digits = -math.log10(torch.finfo(dtype).eps)
    x = torch.randn(500, 12, dtype=dtype)
    silent_below = []
    for grade in range(40):
        torch.manual_seed(1)
        # Without biases nothing at the start makes up for depth.
        net = LUNet(12, 2 + grade if way == "depth" else 3, bias=way != "depth", dtype=dtype)
        with torch.no_grad():
            for layer in net.layers:
                if way == "diagonal":
                    layer.lu.diagonal().add_(0.4 * grade * torch.linspace(-1, 1, 12, dtype=dtype))
                elif way == "depth":
                    layer.lu.add_(0.1 * torch.randn(12, 12, dtype=dtype).fill_diagonal_(0))
                elif way == "off-diagonal":
                    layer.lu.add_(0.1 * grade * torch.randn(12, 12, dtype=dtype).fill_diagonal_(0))
                elif way == "one pivot":
                    layer.lu[5, 5] -= 0.8 * grade
        kept = kept_digits(net, x)
        if warned(net):
            # Not early either: a warning means that a good part is lost, in the worst row at least.
            assert net_worst(net, x) < digits / 2 + 1.5, f"a false alarm at grade {grade}"
        else:
            silent_below.append(kept)
    assert min(silent_below) > digits / 2 - 0.5
    assert len(silent_below) < 40, "never bad enough to say anything of the warning"


def net_worst(net: LUNet, x: Tensor) -> float:
    with torch.no_grad():
        error = (net.inverse(net(x)) - x).double().norm(dim=-1) / x.double().norm(dim=-1)
    worst = float(error.max())
    return -math.log10(worst) if math.isfinite(worst) else -INF


def test_the_warning_names_the_layer_and_what_to_do() -> None:
    net = LUNet(6, 3)
    with torch.no_grad():
        net.layers[1].lu[2, 2] = -30.0
    (message,) = warned(net)
    assert "layers.1 can lose most" in message
    for part in ("standard normal rows", "of 6.9 digits in torch.float32", "a wider dtype"):
        assert part in message
    (message,) = warned(net, torch.randn(10, 6))
    assert "a round trip of x keeps" in message


def test_a_net_that_is_not_finite_is_warned_of() -> None:
    for bad in (NAN, INF):
        net = LUNet(6, 3)
        with torch.no_grad():
            net.layers[1].lu[3, 1] = bad
        (message,) = warned(net)
        assert "keeps 0.0 of 6.9 digits" in message
        assert "layers.1" in message
    assert len(warned(LUNet(6, 2), torch.full((2, 6), NAN))) == 1


def test_data_on_which_nothing_is_lost() -> None:
    net = LUNet(6, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert net.condition(torch.zeros(3, 6)).is_good
        assert net.condition(torch.empty(0, 6)).is_good
        assert "measured, it keeps" in str(net.condition(torch.randn(6)))

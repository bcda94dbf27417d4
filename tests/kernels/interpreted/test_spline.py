"""The monotone spline in every kernel that has an activation, against the float64 reference."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from harness import FEATURES, LIMIT, ROWS, amid_nan, guarded, normwise, random_lu
from lunet_fast.kernels import (
    activation,
    gradient,
    inverse,
    inverse_gradient,
    layer,
    stack,
    stack_gradient,
    tiles,
    triangular,
)
from lunet_fast.kernels import matrix as packed
from lunet_fast.kernels import spline as kernels
from lunet_fast.kernels.solve import invert_blocks
from lunet_fast.ops import reference, spline
from lunet_fast.ops.values import IDENTITY, Activation, Matrix

#: bfloat16 keeps 8 bits, and the interpreter cuts where a GPU rounds.
BFLOAT16 = 8e-3

BINS = st.one_of(st.integers(1, 9), st.sampled_from([16, 33]))

#: Log-slopes at the knots are within ± this.
BOUND = 2.5


def parameters(bins: int, D: int, *leading: int, seed: int = 0, bound: float = BOUND) -> Tensor:
    """[*leading, bins + 3, D]: slopes up to their bound, intervals that differ from column to column."""
    generator = torch.Generator().manual_seed(seed)
    low = -3.0 + torch.rand(*leading, 1, D, generator=generator)
    step = (4.0 + 2.0 * torch.rand(*leading, 1, D, generator=generator)) / bins
    slopes = (bound * torch.tanh(torch.randn(*leading, bins + 1, D, generator=generator))).exp()
    return torch.cat([low, step, slopes], -2)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def walked_by(programs: int) -> Any:
    """So many programs, so that each walks several tiles of even a short batch."""
    return mock.patch.object(tiles, "programs", return_value=programs)


class Truth(NamedTuple):
    """Results in float64, and the gradients of inputs from those of results."""

    results: tuple[Tensor, ...]
    gradients: tuple[Tensor, ...]


def truth(function: Callable[..., tuple[Tensor, ...]], inputs: list[Tensor], seeds: list[Tensor]) -> Truth:
    """Of a function of float64 tensors."""
    wide = [t.double().detach().requires_grad_() for t in inputs]
    results = function(*wide)
    loss = sum((r * s.double()).sum() for r, s in zip(results, seeds, strict=True))
    gradients = torch.autograd.grad(loss, wide)
    return Truth(tuple(r.detach() for r in results), gradients)


def close(found: Tensor | None, expected: Tensor, limit: float = LIMIT) -> None:
    assert found is not None
    assert found.shape == expected.shape
    assert normwise(found, expected) <= limit


def forward64(x: Tensor, given: Tensor) -> tuple[Tensor, Tensor]:
    return spline.forward(x, given), spline.log_derivative(x, given).sum(-1)


def inverse64(y: Tensor, given: Tensor) -> tuple[Tensor, Tensor]:
    x = spline.inverse(y, given)
    return x, -spline.log_derivative(x, given).sum(-1)


def bend(given: Tensor, inverse: bool) -> float:
    """How much a rounding of x, relative to the interval, can do to φ′, or to 1/φ′: what bounds the error of
    gradients. In a bin slopes go from one knot's to the next one's."""
    slopes = given[..., 2:, :].double()
    ratio = (slopes[..., 1:, :] / slopes[..., :-1, :]).log().abs().exp().max()
    return float(ratio ** (2.0 if inverse else 1.0)) * slopes.shape[-2]


# --- row by row -----------------------------------------------------------------------------------------


@settings(max_examples=15)
@given(N=ROWS, D=FEATURES, bins=BINS, scale=st.sampled_from([0.1, 1.0, 3.0, 100.0]), logabsdet=st.booleans())
def test_forward(N: int, D: int, bins: int, scale: float, logabsdet: bool) -> None:
    given_, x = parameters(bins, D, seed=N), normal(N, D, seed=N) * scale
    with guarded():
        y, total = activation.activation_forward(
            amid_nan(x), kernels.Spline(amid_nan(given_)), logabsdet=logabsdet
        )
    y64, total64 = forward64(x.double(), given_.double())
    close(y, y64)
    assert (total is not None) == logabsdet
    if total is not None:
        assert normwise(total, total64) <= LIMIT * (1.0 + bins * math.sqrt(total64.numel()))
        assert float((total - total64).abs().max() if N else 0.0) <= 2e-6 * D * bins


@settings(max_examples=15)
@given(N=ROWS, D=FEATURES, bins=BINS, scale=st.sampled_from([0.1, 1.0, 3.0, 100.0]), logabsdet=st.booleans())
def test_inverse(N: int, D: int, bins: int, scale: float, logabsdet: bool) -> None:
    given_, y = parameters(bins, D, seed=N), normal(N, D, seed=N) * scale
    with guarded():
        x, total = activation.activation_inverse(
            amid_nan(y), kernels.Spline(amid_nan(given_)), logabsdet=logabsdet
        )
    x64, total64 = inverse64(y.double(), given_.double())
    close(x, x64, LIMIT * math.exp(BOUND))
    if total is not None:
        assert float((total - total64).abs().max() if N else 0.0) <= 2e-5 * D * bins


@pytest.mark.parametrize("inverse_", [False, True])
@settings(max_examples=8)
@given(data=st.data(), N=st.integers(1, 200), D=FEATURES, bins=BINS, programs=st.integers(1, 3))
def test_backward(inverse_: bool, data: Any, N: int, D: int, bins: int, programs: int) -> None:
    given_, g = parameters(bins, D, seed=N), normal(N, D, seed=D)
    x, ld = normal(N, D, seed=N) * 2.0, normal(N, seed=1) if data.draw(st.booleans()) else None
    start = spline.forward(x.double(), given_.double()) if inverse_ else x
    seeds = [g, torch.zeros(N) if ld is None else ld]
    expected = truth(inverse64 if inverse_ else forward64, [start, given_], seeds)
    if inverse_:
        x = expected.results[0].float()
    launcher = activation.activation_inverse_backward if inverse_ else activation.activation_backward
    with guarded(), walked_by(programs):
        found = launcher(amid_nan(g), amid_nan(ld), amid_nan(x), kernels.Spline(amid_nan(given_)))
    limit = LIMIT * bend(given_, inverse_)
    close(found[0], expected.gradients[0], limit)
    close(found[1], expected.gradients[1], limit)
    assert found[1] is not None
    assert found[1].dtype == torch.float32


@pytest.mark.parametrize("bins", [1, 2, 7, 8])
def test_at_and_between_the_knots(bins: int) -> None:
    """Elementwise: knots, both sides of them, and far outside, where digits must stay."""
    given_ = torch.tensor([[-2.0], [4.0 / bins], *([0.3 + 0.9 * (k % 3)] for k in range(bins + 1))])
    knots = -2.0 + 4.0 / bins * torch.arange(bins + 1, dtype=torch.float64)
    near = torch.cat([knots, knots - 1e-4, knots + 1e-4]).float()
    far = torch.logspace(1, 30, 40).float()
    x = torch.cat([near, far, -far]).unsqueeze(1)
    y, total = activation.activation_forward(x, kernels.Spline(given_), logabsdet=True)
    y64, total64 = forward64(x.double(), given_.double())
    assert ((y - y64).abs() / y64.abs().clamp_min(1.0)).max() <= 1e-6
    assert (total - total64).abs().max() <= 2e-6
    x_, total_ = activation.activation_inverse(y64.float(), kernels.Spline(given_), logabsdet=True)
    assert ((x_ - x.double()).abs() / x.double().abs().clamp_min(1.0)).max() <= 5e-6
    assert (total_ + total64).abs().max() <= 5e-5


@pytest.mark.parametrize("bins", [1, 5, 8])
def test_inf_and_nan(bins: int) -> None:
    """They pass through with their tail's slope; no derivative is NaN but that at NaN."""
    given_ = parameters(bins, 1)
    ends = given_[[2, -1], 0]
    special = torch.tensor([-math.inf, math.inf, math.nan, 3.4e38 * 0.05, -3.4e38 * 0.05]).unsqueeze(1)
    y, total = activation.activation_forward(special, kernels.Spline(given_), logabsdet=True)
    x, back = activation.activation_inverse(special, kernels.Spline(given_), logabsdet=True)
    for found, log in ((y, total), (x, -back)):
        assert torch.equal(found[:2], special[:2])
        assert bool(found[2].isnan())
        assert bool(found[3:].isfinite().all())
        assert torch.allclose(log[[0, 1, 4, 3]], ends.log().repeat(2), atol=1e-6)
        assert bool(log[2].isnan())
    ones = torch.ones_like(special)
    for launcher, slope in (
        (activation.activation_backward, ends),
        (activation.activation_inverse_backward, 1.0 / ends),
    ):
        grad, _ = launcher(ones, ones.squeeze(1), special, kernels.Spline(given_))
        assert torch.allclose(grad[:2, 0], slope, rtol=1e-6)
        assert bool(grad[2].isnan())
        of_finite = launcher(ones[:2], ones[:2].squeeze(1), special[:2], kernels.Spline(given_))[1]
        assert bool(of_finite.isfinite().all())


@pytest.mark.parametrize(("N", "D"), [(70, 33), (60, 96)])
def test_bfloat16(N: int, D: int) -> None:
    given_, x, g = parameters(8, D), normal(N, D).bfloat16(), normal(N, D, seed=1).bfloat16()
    expected = truth(forward64, [x, given_], [g, normal(N, seed=2)])
    y, total = activation.activation_forward(x, kernels.Spline(given_), logabsdet=True)
    assert y.dtype == torch.bfloat16
    close(y, expected.results[0], BFLOAT16)
    close(total, expected.results[1], 1e-4)
    grad, of_given = activation.activation_backward(g, normal(N, seed=2), x, kernels.Spline(given_))
    assert grad.dtype == torch.bfloat16
    close(grad, expected.gradients[0], BFLOAT16)
    close(of_given, expected.gradients[1], 1e-4)
    back, _ = activation.activation_inverse(x, kernels.Spline(given_), logabsdet=False)
    close(back, spline.inverse(x.double(), given_.double()), BFLOAT16)


def test_gradients_have_the_same_bits_twice() -> None:
    x, g, given_ = normal(200, 90), normal(200, 90, seed=1), parameters(8, 90)
    with walked_by(3):
        first, second = (activation.activation_backward(g, None, x, kernels.Spline(given_)) for _ in range(2))
    assert all(torch.equal(p, q) for p, q in zip(first, second, strict=True))


@pytest.mark.parametrize(
    "refused",
    [
        lambda x: activation.activation_forward(x, kernels.Spline(parameters(8, 7)), logabsdet=False),
        lambda x: activation.activation_forward(x, kernels.Spline(parameters(8, 8)[:3]), logabsdet=False),
        lambda x: activation.activation_forward(x, kernels.Spline(parameters(65, 8)), logabsdet=False),
        lambda x: activation.activation_forward(x, kernels.Spline(parameters(8, 8, 2)), logabsdet=False),
        lambda x: activation.activation_forward(x, kernels.Spline(parameters(5, 8).T), logabsdet=False),
    ],
)
def test_refusals(refused: Callable[[Tensor], object]) -> None:
    with pytest.raises(ValueError, match="must"):
        refused(normal(8, 8))


# --- in a layer -----------------------------------------------------------------------------------------


class LayerCase:
    """A layer's arguments, and what float64 says of it and its inverse."""

    def __init__(self, N: int, D: int, bins: int, permuted: bool = False) -> None:
        torch.manual_seed(N + D)
        self.lu, self.sign = random_lu(D), torch.where(torch.rand(D) < 0.5, -1.0, 1.0)
        self.order = torch.randperm(D) if permuted else None
        self.bias, self.x, self.given = (
            0.3 * torch.randn(D),
            torch.randn(N, D),
            parameters(bins, D, bound=1.0),
        )
        self.g, self.ld = torch.randn(N, D), torch.randn(N)
        self.forward = truth(
            self._function(False), [self.x, self.lu, self.bias, self.given], [self.g, self.ld]
        )
        self.y = self.forward.results[0].float()
        self.inverse = truth(
            self._function(True), [self.y, self.lu, self.bias, self.given], [self.g, self.ld]
        )

    def _function(self, backwards: bool) -> Callable[..., Any]:
        def function(x: Tensor, lu: Tensor, bias: Tensor, given_: Tensor) -> Any:
            matrix = Matrix(lu, self.sign.double(), self.order, bias)
            phi = Activation(spline.KIND, given_, ())
            return reference.layer(x, matrix, phi, inverse=backwards, logabsdet=True)

        return function

    @property
    def spline(self) -> kernels.Spline:
        return kernels.Spline(amid_nan(self.given))

    @property
    def h(self) -> Tensor:
        matrix = Matrix(
            *(None if t is None else t for t in (self.lu.double(), self.sign.double(), self.order))
        )
        matrix = matrix._replace(bias=self.bias.double())
        return reference.layer(self.x.double(), matrix, IDENTITY, inverse=False, logabsdet=False)[0]

    @property
    def weight(self) -> Tensor:
        return amid_nan(reference.lu_weight(self.lu.double(), self.sign.double(), self.order).float()[None])


LAYERS = [
    (1, 1, 3),
    (70, 16, 8),
    (65, 31, 8),
    (40, 64, 5),
    (33, 100, 8),
    (20, 128, 16),
    pytest.param(20, 257, 8, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("N", "D", "bins"), LAYERS)
def test_layer_forward(N: int, D: int, bins: int) -> None:
    case = LayerCase(N, D, bins, permuted=True)
    constant = reference.lu_logabsdet(case.lu)[None]
    options: dict[str, Any] = {"logabsdet": True, "save": True, "precision": "ieee", "constant": constant}
    x, bias = amid_nan(case.x[None]), amid_nan(case.bias[None])
    with guarded():
        whole = layer.layer_forward(x, case.weight, bias, case.spline, **options)
        rows = triangular.layer_forward_rows(
            *(x, amid_nan(case.lu[None]), amid_nan(case.sign[None]), case.order, bias, case.spline), **options
        )
    for y, total, h in (whole, rows):
        close(y[0], case.forward.results[0], LIMIT * 3)
        assert total is not None
        assert (total[0] - case.forward.results[1]).abs().max() <= 1e-5 * D
        assert h is not None
        close(h[0], case.h)


@pytest.mark.parametrize("saved", [False, True])
@pytest.mark.parametrize(("N", "D", "bins"), LAYERS)
def test_layer_backward(N: int, D: int, bins: int, saved: bool) -> None:
    case = LayerCase(N, D, bins)
    if not tiles.recomputes(D) and not saved:
        return
    h = amid_nan(case.h.float()[None]) if saved else None
    with guarded(), walked_by(2):
        grad_x, grad_weight, grad_bias, grad_given = gradient.layer_backward(
            *(amid_nan(case.g[None]), amid_nan(case.ld[None]), amid_nan(case.x[None]), h),
            *(case.weight, amid_nan(case.bias[None]), case.spline),
            needs_x=True,
            needs_weight=True,
            needs_bias=True,
            precision="ieee",
        )
    assert grad_x is not None
    assert grad_weight is not None
    assert grad_bias is not None
    expected, limit = case.forward.gradients, LIMIT * bend(case.given, False)
    close(grad_x[0], expected[0], limit)
    row_sum = case.ld.sum()[None]
    grad_lu = packed.compose_backward(grad_weight, row_sum, case.lu[None], case.sign[None], None)
    close(grad_lu[0], expected[1], limit * 3)
    close(grad_bias[0], expected[2], limit)
    close(grad_given, expected[3], limit)


@pytest.mark.parametrize("few", [False, True])
@pytest.mark.parametrize(("N", "D", "bins"), LAYERS)
def test_layer_inverse_and_its_backward(N: int, D: int, bins: int, few: bool) -> None:
    case = LayerCase(N, D, bins, permuted=True)
    lu, sign, y = amid_nan(case.lu[None]), amid_nan(case.sign[None]), amid_nan(case.y[None])
    prepared = inverse.prepare_inverse(lu, sign, case.order, precision="ieee", N=0 if few else None)
    with guarded(), walked_by(2):
        x, total, h = inverse.layer_inverse(
            *(y, lu, prepared.inverses, amid_nan(case.bias[None]), case.spline),
            permutation=case.order,
            logabsdet=True,
            save=True,
            precision="ieee",
            constant=prepared.logabsdet,
            weight=prepared.weight,
            condition=prepared.condition,
        )
        grad_right, grad_y, grad_given = inverse_gradient.layer_inverse_backward(
            *(amid_nan(case.g[None]), amid_nan(case.ld[None]), h, lu, prepared.inverses, case.spline),
            permutation=case.order,
            precision="ieee",
        )
    condition = float(torch.linalg.cond(case.weight.double()))
    limit = LIMIT * condition * math.e
    close(x[0], case.inverse.results[0], limit)
    assert total is not None
    assert (total[0] - case.inverse.results[1]).abs().max() <= 1e-5 * D
    limit = LIMIT * condition * bend(case.given, True)
    close(grad_y[0], case.inverse.gradients[0], limit)
    close(-grad_right[0].sum(0), case.inverse.gradients[2], limit)
    close(grad_given, case.inverse.gradients[3], limit)


# --- in a stack -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["ieee", "tf32x3"])
@pytest.mark.parametrize(
    ("N", "M", "D", "bins"), [(1, 2, 1, 3), (70, 3, 16, 8), (65, 4, 17, 8), (40, 2, 64, 5)]
)
def test_stack(N: int, M: int, D: int, bins: int, precision: str) -> None:
    torch.manual_seed(N)
    if tiles.stack_tile("inverse backward", D, torch.float32, precision, 90) is None:
        return
    lu, sign = random_lu(D, K=M), torch.where(torch.rand(M, D) < 0.5, -1.0, 1.0)
    bias, x, given_ = 0.3 * torch.randn(M, D), torch.randn(N, D), parameters(bins, D, M - 1, bound=1.0)
    g, ld = torch.randn(N, D), torch.randn(N)

    def function(backwards: bool) -> Callable[..., Any]:
        def net(x: Tensor, lu: Tensor, bias: Tensor, given_: Tensor) -> Any:
            phi = Activation(spline.KIND, given_, ())
            return reference.net(
                x, Matrix(lu, sign.double(), None, bias), phi, inverse=backwards, logabsdet=True
            )

        return net

    forward = truth(function(False), [x, lu, bias, given_], [g, ld])
    y = forward.results[0].float()
    backward = truth(function(True), [y, lu, bias, given_], [g, ld])
    learnt, biases = kernels.Spline(amid_nan(given_)), amid_nan(bias)
    weights, constant = packed.compose(lu, sign, None, torch.float32)
    options: dict[str, Any] = {"precision": precision}

    def blocks(kernel: str) -> Tensor:
        tile = tiles.stack_tile(kernel, D, torch.float32, precision, 90)
        assert tile is not None
        return invert_blocks(lu, sign, block=tile.inner)[0]

    few = mock.patch.object(tiles, "stack_programs", return_value=2)
    with guarded(), few:
        found_y, total = stack.stack_forward(
            amid_nan(x), weights, biases, learnt, constant=constant, logabsdet=True, **options
        )
        found_x, back = stack.stack_inverse(
            *(amid_nan(y), lu, blocks("inverse"), biases, learnt),
            constant=constant,
            logabsdet=True,
            **options,
        )
        seeds = (amid_nan(g), amid_nan(ld))
        of_forward = stack_gradient.stack_backward(
            *(*seeds, amid_nan(x), weights, biases, learnt), needs_x=True, needs_weights=True, **options
        )
        of_inverse = stack_gradient.stack_inverse_backward(
            *(*seeds, amid_nan(backward.results[0].float()), weights, lu, blocks("inverse backward"), biases),
            learnt,
            needs_weights=True,
            **options,
        )
    condition = float(torch.linalg.cond(weights.double()).prod()) * math.e ** (M - 1)
    close(found_y, forward.results[0], LIMIT * 10)
    close(found_x, backward.results[0], LIMIT * condition)
    assert total is not None
    assert back is not None
    assert (total - forward.results[1]).abs().max() <= 1e-5 * D * M
    assert (back - backward.results[1]).abs().max() <= 1e-5 * D * M * math.sqrt(condition)
    for found, expected, limit in (
        (of_forward, forward, LIMIT * 30),
        (of_inverse, backward, LIMIT * condition * 30),
    ):
        close(found[0], expected.gradients[0], limit)
        close(found[2], expected.gradients[2], limit)
        close(found[3], expected.gradients[3], limit)
    of_lu = packed.compose_backward(of_forward[1], ld.sum().expand(M).contiguous(), lu, sign, None)
    close(of_lu, forward.gradients[1], LIMIT * 30)

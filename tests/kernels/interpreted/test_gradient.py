"""The backward of a layer and the weight's gradient, against autograd through the float64 reference."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from harness import FAMILIES, LIMIT, ROWS, amid_nan, guarded, normwise, slopes
from lunet_fast.kernels import gradient, tiles
from lunet_fast.kernels.launch import PRECISIONS
from lunet_fast.ops import reference

#: bfloat16 keeps 8 bits, and the interpreter cuts where a GPU rounds.
BFLOAT16 = 8e-3

SMALL = st.one_of(st.integers(1, 40), st.sampled_from([64, 96, 128]), st.integers(1, 128))
LARGE = st.sampled_from([129, 160, 200, 256, 257])


def walked_by(programs: int) -> Any:
    """So many programs, so that each walks several tiles of even a short batch."""
    return mock.patch.object(tiles, "programs", return_value=programs)


def inputs(K: int, N: int, D: int, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1000 * N + 10 * D + K)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return {
        "grad_y": amid_nan(normal(K, N, D).to(dtype)),
        "grad_logabsdet": amid_nan(normal(K, N)),
        "x": amid_nan(normal(K, N, D).to(dtype)),
        "weight": amid_nan((normal(K, D, D) / math.sqrt(D)).to(dtype)),
        "bias": amid_nan(normal(K, D).to(dtype)),
    }


def preactivation(case: dict[str, Any]) -> Tensor:
    """h [K, N, D] in float64."""
    h = case["x"].double() @ case["weight"].double().mT
    return h if case["bias"] is None else h + case["bias"].double().unsqueeze(1)


def truth(case: dict[str, Any], exact: Any) -> list[tuple[Tensor, Tensor]]:
    """(gradient in float64, the same sums with every term's magnitude) of x, W, b and slopes."""
    x, weight, g = (case[name].double() for name in ("x", "weight", "grad_y"))
    terms = []
    if exact is not None:
        h = preactivation(case).requires_grad_()
        # One copy of the slopes for each element, so that their gradient is that of its term.
        triple = torch.as_tensor(exact).double()
        triple = triple.reshape(3, 1, 1, -1).expand(3, *h.shape).clone().requires_grad_()
        outputs, seeds = [reference.leaky_softplus(h, triple)], [g]
        if case["grad_logabsdet"] is not None:
            outputs.append(reference.log_derivative_sum(h, triple))
            seeds.append(case["grad_logabsdet"].double())
        g, by_slope = torch.autograd.grad(outputs, [h, triple], seeds)
        if isinstance(exact, Tensor):
            over = (1, 2) if exact.dim() == 2 else (1, 2, 3)
            terms = [(by_slope.sum(over), by_slope.abs().sum(over))]
    return [
        (g @ weight, g.abs() @ weight.abs()),
        (g.mT @ x, g.abs().mT @ x.abs()),
        (g.sum(1), g.abs().sum(1)),
        *terms,
    ]


def assert_close(results: Any, expected: list[tuple[Tensor, Tensor]], limit: float = LIMIT) -> None:
    """Normwise, times what cancels: the sum of the terms' magnitudes over the sum's own."""
    for result, (value, magnitude) in itertools.zip_longest(results, expected, fillvalue=(None, None)):
        if value is None:
            assert result is None
        elif result is not None:
            assert result.shape == value.shape
            cancelled = max(1.0, (magnitude.norm() / value.norm()).item()) if value.norm() > 0 else 1.0
            assert normwise(result, value) <= limit * cancelled


def backward(case: dict[str, Any], given_slopes: Any, h: Tensor | None, **options: Any) -> tuple[Any, ...]:
    options = {"needs_x": True, "needs_weight": True, "needs_bias": True, "precision": "ieee"} | options
    return gradient.layer_backward(
        *(case["grad_y"], case["grad_logabsdet"], case["x"], h, case["weight"], case["bias"], given_slopes),
        **options,
    )


@given(data=st.data(), K=st.integers(1, 3), N=ROWS, D=st.one_of(SMALL, LARGE), programs=st.integers(1, 3))
def test_layer_backward(data: Any, K: int, N: int, D: int, programs: int) -> None:
    case = inputs(K, N, D)
    given_slopes, exact = data.draw(slopes(D))
    for name in ("bias", "grad_logabsdet"):
        if data.draw(st.booleans(), label=f"no {name}"):
            case[name] = None
    needs = [data.draw(st.sampled_from([True, True, False])) for _ in range(3)]
    h = None
    if exact is not None and (not tiles.recomputes(D) or data.draw(st.booleans(), label="h saved")):
        h = amid_nan(preactivation(case).float())
    with guarded(), walked_by(programs):
        results = backward(
            case,
            given_slopes,
            h,
            **dict(zip(("needs_x", "needs_weight", "needs_bias"), needs, strict=True)),
            precision=data.draw(st.sampled_from(PRECISIONS)),
        )
    assert [result is not None for result in results] == [*needs, isinstance(given_slopes, Tensor)]
    assert all(result.dtype == torch.float32 for result in results if result is not None)
    expected = truth(case, exact)
    assert_close(results, expected + [(None, None)] * (4 - len(expected)))


@pytest.mark.parametrize("D", [16, 31, 32, 60, 64, 100, 128])
@pytest.mark.parametrize("fused", [True, False])
def test_both_ways_with_recomputation(D: int, fused: bool) -> None:
    """The weight's gradient in the same launch and apart, whichever of them the table has chosen."""
    table = tiles.layer_backward_tile
    case = inputs(2, 70, D)
    tensor = torch.tensor(FAMILIES[0]).unsqueeze(1) * torch.linspace(0.8, 1.2, D)
    with (
        guarded(),
        walked_by(2),
        mock.patch.object(tiles, "layer_backward_tile", lambda *key: table(*key) if fused else None),
    ):
        results = backward(case, amid_nan(tensor), None)
    assert_close(results, truth(case, tensor.double()))


@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("D", [5, 17, 64, 65, 128, 130])
def test_every_row_of_the_table(D: int, precision: str, architecture: int) -> None:
    case = inputs(1, 70, D)
    h = None if tiles.recomputes(D) else preactivation(case).float()
    with guarded(), walked_by(2), mock.patch.object(tiles, "architecture", return_value=architecture):
        results = backward(case, FAMILIES[0], h, precision=precision)
    assert_close(results, [*truth(case, FAMILIES[0]), (None, None)])


@given(K=st.integers(1, 3), N=ROWS, D=st.one_of(SMALL, LARGE), splits=st.integers(1, 3))
def test_weight_gradient(K: int, N: int, D: int, splits: int) -> None:
    case = inputs(K, N, D)
    expected = truth(case, None)[1:]
    with guarded(), walked_by(splits):
        alone = gradient.weight_gradient(case["grad_y"], case["x"], precision="tf32x3")
        both = gradient.weight_and_bias_gradients(case["grad_y"], case["x"], precision="tf32x3")
    assert_close([alone], expected[:1])
    assert_close(both, expected)


@pytest.mark.parametrize(("N", "D"), [(5, 7), (70, 33), (130, 96), (70, 160)])
@pytest.mark.parametrize("fused", [True, False])
def test_bfloat16(N: int, D: int, fused: bool) -> None:
    table = tiles.layer_backward_tile
    case = inputs(1, N, D, torch.bfloat16)
    h = None if tiles.recomputes(D) else preactivation(case).bfloat16()
    with mock.patch.object(tiles, "layer_backward_tile", lambda *key: table(*key) if fused else None):
        results = backward(case, torch.tensor(FAMILIES[0]), h)
    assert [result.dtype for result in results] == [torch.bfloat16] + [torch.float32] * 3
    assert_close(results, truth(case, torch.tensor(FAMILIES[0]).double()), BFLOAT16)
    if h is None and fused:
        # Sums leave in float32 and must not have passed through bfloat16.
        assert_close(results[2:], truth(case, torch.tensor(FAMILIES[0]).double())[2:])


@pytest.mark.parametrize("D", [1, 40, 150])
@pytest.mark.parametrize("K", [1, 2])
def test_empty(D: int, K: int) -> None:
    case = inputs(K, 0, D)
    grad_x, *others = backward(case, torch.ones(3, D), case["x"] if D > 128 else None)
    assert grad_x.shape == (K, 0, D)
    assert [tuple(other.shape) for other in others] == [(K, D, D), (K, D), (3, D)]
    assert all(bool((other == 0).all()) for other in others)


def test_nothing_needed() -> None:
    case = inputs(1, 5, 6)
    none = {"needs_x": False, "needs_weight": False, "needs_bias": False}
    assert backward(case, FAMILIES[0], None, **none) == (None, None, None, None)


@pytest.mark.parametrize("D", [40, 100, 130])
def test_same_bits_twice(D: int) -> None:
    case = inputs(1, 100, D)
    h = preactivation(case).float() if D > 128 else None
    with walked_by(3):
        first, second = (backward(case, torch.tensor(FAMILIES[1]), h) for _ in range(2))
    assert all(torch.equal(p, q) for p, q in zip(first, second, strict=True))


@pytest.mark.parametrize(("D", "name"), [(40, "grad_y"), (40, "grad_logabsdet"), (100, "x"), (130, "x")])
def test_a_nan_stays_in_its_row(D: int, name: str) -> None:
    case = inputs(2, 20, D)
    before, *_ = backward(case, FAMILIES[0], preactivation(case).float() if D > 128 else None)
    case[name][1, 3] = math.nan
    after, weight, *_ = backward(case, FAMILIES[0], preactivation(case).float() if D > 128 else None)
    assert bool(after[1, 3].isnan().all())
    assert bool(weight[0].isfinite().all())
    after[1, 3] = before[1, 3]
    assert torch.equal(after, before)


_CASE = inputs(1, 6, 8)


@pytest.mark.parametrize(
    "refused",
    [
        lambda: backward(_CASE | {"x": _CASE["x"].mT}, None, None),
        lambda: backward(_CASE | {"x": _CASE["x"].double()}, None, None),
        lambda: backward(_CASE | {"grad_y": _CASE["grad_y"][0, 0].expand(1, 6, 8)}, None, None),
        lambda: backward(_CASE | {"grad_y": _CASE["grad_y"].bfloat16()}, None, None),
        lambda: backward(_CASE | {"weight": _CASE["weight"].bfloat16()}, None, None),
        lambda: backward(_CASE | {"weight": _CASE["weight"].mT}, None, None),
        lambda: backward(_CASE | {"bias": torch.ones(1, 7)}, None, None),
        lambda: backward(_CASE | {"grad_logabsdet": torch.ones(1, 6).double()}, FAMILIES[0], None),
        lambda: backward(_CASE, torch.ones(3, 7), None),
        lambda: backward(_CASE, FAMILIES[0], torch.ones(1, 6, 7)),
        lambda: backward(_CASE, None, None, precision="high"),
        lambda: backward(inputs(1, 6, 129), FAMILIES[0], None),
        lambda: gradient.weight_gradient(_CASE["x"], _CASE["x"][:, :5].contiguous(), precision="ieee"),
        lambda: gradient.weight_gradient(_CASE["x"], _CASE["x"], precision="highest"),
    ],
)
def test_refusals(refused: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match="must be|D = 129"):
        refused()

"""y = φ(W x + b), h and log|det J| in one launch, of one layer and of K stacked ones, against float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from harness import FAMILIES, FEATURES, LIMIT, ROWS, amid_nan, guarded, normwise, slopes
from lunet_fast.kernels.launch import PRECISIONS
from lunet_fast.kernels.layer import layer_forward
from lunet_fast.ops import reference

#: Corners of (N, D): one row, one column, whole tiles, one more than a tile.
CORNERS = [(1, 1), (300, 1), (1, 257), (64, 64), (65, 16), (3, 128), (129, 33), (0, 5)]


class Case:
    """A layer's arguments amid NaN, and what float64 says of them."""

    def __init__(self, K: int, N: int, D: int, kind: tuple[Any, Any], flags: tuple[bool, ...]) -> None:
        self.transposed, has_bias, has_constant = flags
        self.slopes, exact = kind
        x, weight = torch.randn(K, N, D), torch.randn(K, D, D) / math.sqrt(D)
        bias = torch.randn(K, D) if has_bias else None
        constant = torch.randn(K) if has_constant else None
        self.x, self.weight = amid_nan(x), amid_nan(weight)
        self.bias, self.constant = amid_nan(bias), amid_nan(constant)
        matrix = weight.double() if self.transposed else weight.double().mT
        self.h = x.double() @ matrix + (0.0 if bias is None else bias.double().unsqueeze(1))
        self.y, self.logabsdet = self.h, torch.zeros(K, N).double()
        if exact is not None:
            self.y = reference.leaky_softplus(self.h, exact)
            self.logabsdet = reference.log_derivative_sum(self.h, exact)
        if constant is not None:
            self.logabsdet = self.logabsdet + constant.double().unsqueeze(1)

    def run(
        self, *, logabsdet: bool, save: bool, precision: str
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        with guarded():
            return layer_forward(
                *(self.x, self.weight, self.bias, self.slopes),
                logabsdet=logabsdet,
                save=save,
                precision=precision,
                constant=self.constant,
                transposed=self.transposed,
            )


def check(case: Case, *, logabsdet: bool, save: bool, precision: str) -> None:
    y, total, h = case.run(logabsdet=logabsdet, save=save, precision=precision)
    assert y is not None
    assert normwise(y, case.y) <= LIMIT
    assert (total is not None) == logabsdet
    assert (h is not None) == (save and case.slopes is not None)
    if total is not None:
        assert total.shape == case.x.shape[:2]
        assert normwise(total, case.logabsdet) <= LIMIT
    if h is not None:
        assert normwise(h, case.h) <= LIMIT


@st.composite
def cases(draw: Any) -> Case:
    K, N, D = draw(st.sampled_from([1, 1, 2, 3])), draw(ROWS), draw(FEATURES)
    flags = tuple(draw(st.booleans()) for _ in range(3))
    return Case(K, N, D, draw(slopes(D)), flags)


@settings(max_examples=60)
@given(cases(), st.booleans(), st.booleans(), st.sampled_from(PRECISIONS))
def test_against_float64(case: Case, logabsdet: bool, save: bool, precision: str) -> None:
    check(case, logabsdet=logabsdet, save=save, precision=precision)


@pytest.mark.parametrize(("N", "D"), CORNERS)
@pytest.mark.parametrize("K", [1, 2])
def test_corners(K: int, N: int, D: int) -> None:
    for number, transposed in enumerate((False, True)):
        floats = FAMILIES[(N + D + number) % len(FAMILIES)]
        case = Case(K, N, D, (floats, floats), (transposed, True, True))
        check(case, logabsdet=True, save=True, precision=PRECISIONS[(N + number) % 3])


@pytest.mark.parametrize(("N", "D"), [(5, 7), (70, 33), (130, 96)])
def test_bfloat16(N: int, D: int) -> None:
    """In and out in bfloat16, float32 between: against float64 of the same rounded inputs."""
    x, bias = torch.randn(1, N, D).bfloat16(), torch.randn(1, D).bfloat16()
    weight = (torch.randn(1, D, D) / math.sqrt(D)).bfloat16()
    h64 = x.double() @ weight.double().mT + bias.double()
    with guarded():
        y, total, h = layer_forward(
            *(amid_nan(x), amid_nan(weight), amid_nan(bias), FAMILIES[0]),
            logabsdet=True,
            save=True,
            precision="tf32",
        )
    assert y.dtype == torch.bfloat16
    assert h is not None
    assert h.dtype == torch.bfloat16
    assert total is not None
    assert total.dtype == torch.float32
    # 8 bits, and the interpreter cuts where a GPU rounds.
    assert normwise(h, h64) <= 8e-3
    assert normwise(y, reference.leaky_softplus(h64, FAMILIES[0])) <= 8e-3
    # The sum leaves in float32, so it must not have passed through bfloat16.
    assert normwise(total, reference.log_derivative_sum(h64, FAMILIES[0])) <= LIMIT


def outcome(x: Tensor, case: Case) -> list[Tensor]:
    results = layer_forward(
        *(x, case.weight, case.bias, case.slopes),
        logabsdet=True,
        save=True,
        precision="ieee",
        constant=case.constant,
    )
    return [result for result in results if result is not None]


def test_same_bits_twice_and_nan_stays_in_its_row() -> None:
    case = Case(2, 70, 90, (FAMILIES[1], FAMILIES[1]), (False, True, True))
    whole = outcome(case.x, case)
    assert len(whole) == 3
    assert all(torch.equal(p, q) for p, q in zip(whole, outcome(case.x, case), strict=True))
    x = case.x.clone()
    x[1, 3, 50] = math.nan
    others = torch.ones(2, 70, dtype=torch.bool)
    others[1, 3] = False
    for before, after in zip(whole, outcome(x, case), strict=True):
        assert bool(after[1, 3].isnan().any())
        assert torch.equal(before[others], after[others])


def test_infinity_is_kept() -> None:
    """±inf in a row gives the asymptotes of φ and log φ′; NaN is not made of them where W has one sign."""
    x = torch.full((1, 3, 8), 1.0)
    x[0, 0, 2], x[0, 1, 2] = math.inf, -math.inf
    case = Case(1, 3, 8, (FAMILIES[0], FAMILIES[0]), (False, False, False))
    case.weight = torch.full((1, 8, 8), 0.5)
    y, total, h = outcome(x, case)
    a, c, _ = FAMILIES[0]
    for row, sign, slope in ((0, 1.0, a + c), (1, -1.0, a)):
        assert torch.equal(y[0, row], torch.full((8,), sign * math.inf))
        assert torch.equal(h[0, row], torch.full((8,), sign * math.inf))
        assert total[0, row].item() == pytest.approx(8 * math.log(slope), rel=1e-6, abs=1e-7)
    assert bool(y[0, 2].isfinite().all())


@pytest.mark.parametrize("D", [1, 40])
@pytest.mark.parametrize("K", [0, 2])
def test_empty(K: int, D: int) -> None:
    N = 3 if K == 0 else 0
    results = layer_forward(
        *(torch.zeros(K, N, D), torch.zeros(K, D, D), None, FAMILIES[0]),
        logabsdet=True,
        save=True,
        precision="ieee",
    )
    assert [tuple(t.shape) for t in results if t is not None] == [(K, N, D), (K, N), (K, N, D)]


x8 = torch.randn(2, 8, 8)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": x8.mT}, "x must be contiguous rows"),
        ({"x": x8[0]}, "x must be contiguous rows"),
        ({"x": x8[:, :1].expand(2, 8, 8)}, "x must be contiguous rows"),
        ({"x": x8.double()}, "float32 or bfloat16"),
        ({"weight": x8.mT}, "weight must be contiguous"),
        ({"weight": x8[0]}, "weight must be contiguous"),
        ({"weight": x8.bfloat16()}, "weight must be torch.float32"),
        ({"bias": torch.zeros(8)}, "bias must be contiguous"),
        ({"constant": torch.zeros(())}, "constant must be contiguous"),
        ({"constant": torch.zeros(2).double()}, "constant must be torch.float32"),
        ({"slopes": torch.ones(3, 7)}, "slopes must be contiguous"),
        ({"precision": "high"}, "precision must be one of"),
    ],
)
def test_refusals(changed: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"x": x8, "weight": x8, "bias": None, "slopes": None, "precision": "ieee"}
    with pytest.raises(ValueError, match=message):
        layer_forward(**(arguments | changed), logabsdet=False, save=False)

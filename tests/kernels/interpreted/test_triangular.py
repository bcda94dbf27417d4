"""Rows through U and then L, straight from the packed matrix: against float64, and that zeros are skipped."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from harness import FEATURES, LIMIT, ROWS, amid_nan, guarded, normwise, random_lu, slopes
from lunet_fast.kernels import tiles, triangular
from lunet_fast.ops import reference


def exact(
    x: Tensor, lu: Tensor, sign: Tensor | None, permutation: Tensor | None, bias: Tensor | None, slopes: Any
) -> tuple[Tensor, Tensor]:
    """(y, log|det J|) in float64, member by member."""
    results = [
        reference.lu_dense_and_logabsdet(
            x[k].double(),
            lu[k].double(),
            None if bias is None else bias[k].double(),
            sign=None if sign is None else sign[k].double(),
            permutation=permutation,
            slopes=slopes,
        )
        for k in range(len(x))
    ]
    y, total = (torch.stack(parts) for parts in zip(*results, strict=True))
    return y, total


@given(st.data())
def test_against_float64(data: st.DataObject) -> None:
    D, N = data.draw(FEATURES), data.draw(ROWS)
    K = data.draw(st.sampled_from([1, 1, 2]))
    given, exactly = data.draw(slopes(D))
    x, lu = torch.randn(K, N, D), random_lu(D, K=K)
    sign = torch.where(torch.rand(K, D) < 0.5, -1.0, 1.0) if data.draw(st.booleans()) else None
    permutation = torch.randperm(D) if K == 1 and data.draw(st.booleans()) else None
    bias = torch.randn(K, D) if data.draw(st.booleans()) else None
    constant = lu.diagonal(dim1=-2, dim2=-1).sum(-1)
    with guarded():
        y, total, h = triangular.layer_forward_rows(
            *(amid_nan(x), amid_nan(lu), amid_nan(sign), permutation, amid_nan(bias), given),
            logabsdet=True,
            save=True,
            precision=data.draw(st.sampled_from(["ieee", "tf32x3", "tf32"])),
            constant=amid_nan(constant),
        )
    y64, total64 = exact(x, lu, sign, permutation, bias, exactly)
    assert normwise(y, y64) <= LIMIT
    if exactly is None:
        assert h is None
    else:
        assert normwise(h, exact(x, lu, sign, permutation, bias, None)[0]) <= LIMIT
    if N and exactly is not None:
        # Of cancelling terms; those set the scale.
        scale = total64.abs() + lu.double().diagonal(dim1=-2, dim2=-1).abs().sum(-1, keepdim=True)
        assert bool(((total - total64).abs() <= LIMIT * scale).all())


@pytest.mark.parametrize("D", [300, 517])
def test_in_two_launches(D: int) -> None:
    x, lu, bias, permutation = torch.randn(1, 3, D), random_lu(D, K=1), torch.randn(1, D), torch.randperm(D)
    family = (0.1, 0.9, 1.0)
    with guarded():
        y, total, h = triangular.layer_forward_rows(
            *(amid_nan(x), amid_nan(lu), None, permutation, amid_nan(bias), family),
            logabsdet=True,
            save=False,
            precision="tf32x3",
        )
    y64, total64 = exact(x, lu, None, permutation, bias, family)
    assert normwise(y, y64) <= LIMIT
    assert total is not None
    assert normwise(total, total64 - lu.double().diagonal(dim1=-2, dim2=-1).sum(-1)) <= LIMIT


@pytest.mark.parametrize("D", [100, 128, 300])
def test_each_triangle_is_read_where_it_counts_and_nowhere_else(D: int) -> None:
    """NaN at L[i, j] reaches output i alone; NaN at U[i, j] reaches t_i, so outputs from its block on."""
    clean = random_lu(D, K=1)
    x = torch.randn(1, 4, D)

    def touched(lu: Tensor) -> list[int]:
        y, _, _ = triangular.layer_forward_rows(
            x, lu, None, None, None, None, logabsdet=False, save=False, precision="tf32x3"
        )
        assert torch.equal(y[0].isnan().any(0), y[0].isnan().all(0))
        return y[0].isnan().any(0).nonzero().flatten().tolist()

    lu = clean.clone()
    lu[0, 70, 3] = torch.nan
    assert touched(lu) == [70]
    lu = clean.clone()
    lu[0, 70, 75] = torch.nan
    # Within one block NaN meets the zeros above L's diagonal, as in any product of dense blocks.
    found = touched(lu)
    assert 70 in found
    assert min(found) >= 64


@pytest.mark.parametrize(("D", "N"), [(128, 5), (96, 40), (320, 3)])
def test_blocks_that_are_zero_are_not_loaded(D: int, N: int, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = {"upper_tile": 0, "lower_tile": 0}
    for name in counts:
        plain = getattr(triangular, name)

        def counting(*args: Any, _plain: Any = plain, _name: str = name, **kwargs: Any) -> Any:
            counts[_name] += 1
            return _plain(*args, **kwargs)

        monkeypatch.setattr(triangular, name, counting)
    x, lu = torch.randn(1, N, D), random_lu(D, K=1)
    y, _, _ = triangular.layer_forward_rows(
        x, lu, None, None, None, None, logabsdet=False, save=False, precision="tf32x3"
    )
    assert normwise(y, exact(x, lu, None, None, None, None)[0]) <= LIMIT
    tile = tiles.triangular_tile(D, 90)
    blocks, row_tiles = -(-D // tile.columns), -(-N // tile.rows)
    half = row_tiles * blocks * (blocks + 1) // 2
    assert counts == {"upper_tile": half, "lower_tile": half}


def test_a_nan_stays_in_its_row_and_rows_do_not_depend_on_the_batch() -> None:
    D = 50
    x, lu, family = torch.randn(1, 20, D), random_lu(D, K=1), (0.1, 1.0, 10.0)

    def run(rows: Tensor) -> Tensor:
        return triangular.layer_forward_rows(
            rows, lu, None, None, None, family, logabsdet=True, save=True, precision="ieee"
        )[0]

    before = run(x)
    assert torch.equal(before, run(x))
    assert torch.equal(before[:, 16:], run(x[:, 16:].clone()))
    x[0, 3, 7] = torch.nan
    after = run(x)
    others = torch.arange(20) != 3
    assert torch.equal(after[0, others], before[0, others])
    assert bool(after[0, 3].isnan().any())


def test_bfloat16_is_rounded_once() -> None:
    x, lu, bias = torch.randn(1, 9, 70).bfloat16(), random_lu(70, K=1), torch.randn(1, 70)
    y, _, _ = triangular.layer_forward_rows(
        x, lu, None, None, bias, (0.1, 0.9, 1.0), logabsdet=False, save=False, precision="tf32"
    )
    assert y.dtype == torch.bfloat16
    assert normwise(y, exact(x, lu, None, None, bias, (0.1, 0.9, 1.0))[0]) <= 4e-3


def test_refused() -> None:
    x, lu = torch.randn(1, 4, 8), random_lu(8, K=1)
    options: dict[str, Any] = {"logabsdet": False, "save": False, "precision": "ieee"}
    with pytest.raises(ValueError, match="x must be contiguous rows"):
        triangular.layer_forward_rows(x.mT, lu, None, None, None, None, **options)
    with pytest.raises(ValueError, match="lu must be contiguous"):
        triangular.layer_forward_rows(x, random_lu(9, K=1), None, None, None, None, **options)
    with pytest.raises(ValueError, match="precision must be one of"):
        triangular.layer_forward_rows(
            x, lu, None, None, None, None, logabsdet=False, save=False, precision="high"
        )

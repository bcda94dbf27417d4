"""W = Pᵀ L U formed from the packed matrix, and its gradient, against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from harness import FEATURES, LIMIT, amid_nan, guarded, normwise, random_lu
from lunet_fast.kernels import matrix
from lunet_fast.ops import reference
from lunet_fast.ops.precision import LOG_DIAGONAL_BOUND


@st.composite
def packed(draw: Any) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(lu [K, D, D], sign or None, permutation or None)."""
    D, K = draw(FEATURES), draw(st.sampled_from([1, 1, 3]))
    lu = random_lu(D, K=K)
    sign = torch.where(torch.rand(K, D) < 0.5, -1.0, 1.0) if draw(st.booleans()) else None
    permutation = torch.randperm(D) if K == 1 and draw(st.booleans()) else None
    return lu, sign, permutation


def exact(lu: Tensor, sign: Tensor | None, permutation: Tensor | None) -> Tensor:
    signs = [None] * len(lu) if sign is None else list(sign.double())
    weights = [reference.lu_weight(m.double(), s, permutation) for m, s in zip(lu, signs, strict=True)]
    return torch.stack(weights)


@given(packed())
def test_compose(given: tuple[Tensor, Tensor | None, Tensor | None]) -> None:
    lu, sign, permutation = given
    with guarded():
        weight, logabsdet = matrix.compose(amid_nan(lu), amid_nan(sign), permutation, torch.float32)
    assert normwise(weight, exact(lu, sign, permutation)) <= LIMIT
    logs = lu.double().diagonal(dim1=-2, dim2=-1)  # a sum that may cancel: its terms set the scale
    assert bool(((logabsdet - logs.sum(-1)).abs() <= LIMIT * logs.abs().sum(-1)).all())


@given(packed(), st.sampled_from([1, -1]), st.booleans())
def test_compose_backward(
    given: tuple[Tensor, Tensor | None, Tensor | None], direction: int, with_logabsdet: bool
) -> None:
    lu, sign, permutation = given
    gradient = torch.randn_like(lu)
    share = torch.randn(len(lu)) if with_logabsdet else None
    with guarded():
        result = matrix.compose_backward(
            *(amid_nan(gradient), amid_nan(share), amid_nan(lu), amid_nan(sign), permutation),
            direction=direction,
        )
    leaf = lu.double().requires_grad_()
    value = (exact(leaf, sign, permutation) * gradient).sum()
    if share is not None:
        value = value + (leaf.diagonal(dim1=-2, dim2=-1).sum(-1) * share).sum()
    value.backward()
    assert leaf.grad is not None
    assert normwise(result, direction * leaf.grad) <= LIMIT


def test_a_clamped_diagonal_counts_as_the_bound_and_has_no_gradient() -> None:
    lu = random_lu(5, K=1)
    lu[0, 1, 1], lu[0, 3, 3] = 95.0, -95.0
    weight, logabsdet = matrix.compose(lu, None, None, torch.float32)
    inside = lu.clone()
    inside[0, 1, 1], inside[0, 3, 3] = 80.0, -80.0
    assert torch.equal(weight, matrix.compose(inside, None, None, torch.float32)[0])
    assert logabsdet.item() == pytest.approx(inside[0].diagonal().sum().item(), abs=1e-4)
    gradient = torch.zeros(1, 5, 5)
    gradient[0, 0, 0] = 1.0
    result = matrix.compose_backward(gradient, torch.ones(1), lu, None, None)
    assert result[0].diagonal()[[1, 3]].tolist() == [0.0, 0.0]
    assert result[0].diagonal()[[2, 4]].tolist() == [1.0, 1.0]


def test_one_triangle_does_not_reach_where_only_the_other_counts() -> None:
    """NaN at L[i, j] reaches row i of W and no other, NaN at U[i, j] column j and no other."""
    D = 70
    clean = random_lu(D, K=1)
    lu = clean.clone()
    lu[0, 40, 7] = torch.nan
    weight, logabsdet = matrix.compose(lu, None, None, torch.float32)
    rows = weight[0].isnan().any(1)
    assert rows.nonzero().flatten().tolist() == [40]
    assert logabsdet.isfinite().all()
    lu = clean.clone()
    lu[0, 7, 40] = torch.nan
    weight, _ = matrix.compose(lu, None, None, torch.float32)
    assert weight[0].isnan().any(0).nonzero().flatten().tolist() == [40]


def test_bfloat16() -> None:
    lu = random_lu(48, K=2).bfloat16()
    weight, _ = matrix.compose(lu, None, None, torch.bfloat16)
    assert weight.dtype == torch.bfloat16
    assert normwise(weight, exact(lu, None, None)) <= 8e-3
    wide, _ = matrix.compose(lu, None, None, torch.float32)
    assert normwise(wide, exact(lu, None, None)) <= LIMIT
    assert matrix.compose_backward(wide, None, lu, None, None).dtype == torch.bfloat16


def test_the_log_diagonal_is_bounded_where_the_reference_bounds_it() -> None:
    """The kernels import nothing of the library, so the number stands in both."""
    for dtype in (torch.float32, torch.bfloat16):
        assert matrix.LOG_DIAGONAL_BOUND.value == LOG_DIAGONAL_BOUND[dtype]


@pytest.mark.parametrize(
    "lu", [torch.eye(4), torch.eye(4)[None].mT[..., ::2], torch.eye(4).double()[None], torch.empty(1, 0, 0)]
)
def test_refused(lu: Tensor) -> None:
    with pytest.raises(ValueError, match="lu must be"):
        matrix.compose(lu, None, None, torch.float32)


def test_a_permutation_of_stacked_layers_is_refused() -> None:
    with pytest.raises(ValueError, match="permutation must be None"):
        matrix.compose(random_lu(4, K=2), None, torch.arange(4), torch.float32)

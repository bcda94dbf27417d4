"""Dequantisation, logit, standardisation: Jacobians by autograd, inverses, exact bits of known data."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lunet_fast.density.preprocessing import Preprocessing


@given(levels=st.sampled_from([2, 17, 256]), features=st.integers(1, 6), seed=st.integers(0, 1000))
def test_integers_come_back_whatever_the_noise(levels: int, features: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(levels, (9, features), generator=generator).double()
    y, logabsdet = Preprocessing(levels).forward(x, generator)
    assert bool(torch.isfinite(y).all())
    assert logabsdet.shape == (9,)
    assert torch.equal(Preprocessing(levels).inverse(y), x)


def test_levels_jacobian_by_autograd() -> None:
    x = torch.rand(5, dtype=torch.float64) * 16

    def forward(x: torch.Tensor) -> torch.Tensor:
        return Preprocessing(17).forward(x, torch.Generator().manual_seed(0))[0]

    jacobian = torch.autograd.functional.jacobian(forward, x)
    found = Preprocessing(17).forward(x, torch.Generator().manual_seed(0))[1]
    torch.testing.assert_close(found, jacobian.slogdet().logabsdet, rtol=1e-12, atol=1e-12)


def test_standardising_jacobian_and_inverse() -> None:
    rows = torch.randn(50, 3) * torch.tensor([1.0, 10.0, 0.1]) + 5
    preprocessing = Preprocessing.of(rows, None)
    y, logabsdet = preprocessing.forward(rows)
    torch.testing.assert_close(y.mean(0), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(y.std(0), torch.ones(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(preprocessing.inverse(y), rows, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logabsdet[0], -rows.double().std(0).log().sum().float())


def test_uniform_data_cost_log2_of_the_levels() -> None:
    """A density that is uniform on [0, 17) has log2 17 bits a dimension: that of v is a density of 1."""
    preprocessing = Preprocessing(17)
    x = torch.randint(17, (2000, 3)).double()
    y, logabsdet = preprocessing.forward(x)
    # p(y) of a uniform v, by hand: inside, dv/dy = s (1 - s) / (1 - 2 lambda).
    s = torch.sigmoid(y)
    log_prob_y = (s * (1 - s) / 0.98).log().sum(-1)
    bits = preprocessing.loss(log_prob_y + logabsdet, 3)
    torch.testing.assert_close(bits, torch.full_like(bits, math.log2(17)), rtol=1e-9, atol=1e-9)
    assert preprocessing.unit == "bits/dim"
    assert Preprocessing().unit == "nats"


def test_a_constant_column_has_no_density() -> None:
    rows = torch.randn(20, 3)
    rows[:, 1] = 4.0
    with pytest.raises(ValueError, match=r"column 1 \(from 0\) is constant"):
        Preprocessing.of(rows, None)


def test_standardised_integers() -> None:
    """Of columns with ranges of their own, one of them constant and one with a value far off."""
    generator = torch.Generator().manual_seed(0)
    columns = [
        torch.randint(low, high, (4000,), generator=generator)
        for low, high in ((0, 9), (900, 30_000), (5, 6))
    ]
    rows = torch.stack(columns, -1).double()
    rows[0, 0] = 39_999
    preprocessing = Preprocessing.of(rows, 40_000, standardise=True)
    y, logabsdet = preprocessing.forward(rows, generator)
    torch.testing.assert_close(y.mean(0), torch.zeros(3).double(), atol=0.05, rtol=0)
    torch.testing.assert_close(y.std(0), torch.ones(3).double(), atol=0.02, rtol=0)
    assert torch.equal(preprocessing.inverse(y), rows)
    assert preprocessing.unit == "bits/dim"
    plain = Preprocessing.of(rows, 40_000).forward(rows, torch.Generator().manual_seed(1))[1]
    found = preprocessing.forward(rows, torch.Generator().manual_seed(1))[1]
    assert preprocessing.scale is not None
    torch.testing.assert_close(found, plain - preprocessing.scale.log().sum())

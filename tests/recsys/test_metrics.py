from __future__ import annotations

import math

import pytest
import torch

from lunet_fast.recsys import metrics


def test_known_answers() -> None:
    prediction, rating = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([1.0, 4.0, 3.0])
    assert metrics.mse(prediction, rating) == pytest.approx(5 / 3, rel=1e-15)
    assert metrics.rmse(prediction, rating) == pytest.approx(math.sqrt(5 / 3), rel=1e-15)
    x = torch.tensor([[3.0, 4.0], [0.0, 1.0]])
    assert metrics.squared_norm(x) == 13.0
    assert metrics.reconstruction_error(x, x + torch.tensor([[1.0, 1.0], [0.0, 2.0]])) == 3.0
    assert metrics.reconstruction_error(x, x) == 0.0


def test_small_differences_are_not_rounded_away() -> None:
    # 1e8 + 1 is not a float32, so the sum of 1e8 squares and one small one is taken in float64.
    prediction, rating = torch.tensor([1e4, 1.0]), torch.tensor([0.0, 0.0])
    assert metrics.mse(prediction, rating) == (1e8 + 1) / 2
    x = torch.full((1, 4), 1e3)
    moved = torch.nextafter(x, torch.full_like(x, 2e3))
    step = float(moved[0, 0].double() - 1e3)
    assert metrics.reconstruction_error(x, moved) == pytest.approx(4 * step**2, rel=1e-12)


def test_leading_dimensions_are_all_rows() -> None:
    x = torch.randn(3, 5, 4)
    assert metrics.squared_norm(x) == pytest.approx(metrics.squared_norm(x.reshape(15, 4)), rel=1e-12)


def test_refuses_what_has_no_mean_or_does_not_match() -> None:
    with pytest.raises(ValueError, match="no pairs"):
        metrics.mse(torch.empty(0), torch.empty(0))
    with pytest.raises(ValueError, match=r"prediction has shape \(2,\), rating \(2, 1\)"):
        metrics.mse(torch.zeros(2), torch.zeros(2, 1))
    with pytest.raises(ValueError, match="its reconstruction"):
        metrics.reconstruction_error(torch.zeros(2, 3), torch.zeros(1, 3))

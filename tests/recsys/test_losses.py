from __future__ import annotations

import pytest
import torch

from lunet_fast.recsys.config import TrainConfig
from lunet_fast.recsys.losses import rating_loss
from lunet_fast.recsys.model import Output

# Two members, two pairs, D = 2.
OUTPUT = Output(
    x=torch.tensor([[[1.0, 0.0], [0.0, 2.0]], [[1.0, 1.0], [0.0, 0.0]]]),
    z=torch.tensor([[[2.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [2.0, 2.0]]]),
    prediction=torch.tensor([[3.0, 4.0], [1.0, 4.0]]),
    bias=torch.tensor([[[1.0, 1.0], [0.0, 0.0]], [[0.0, 2.0], [0.0, 0.0]]]),
)
RATING = torch.tensor([2.0, 4.0])


def loss(**weights: float) -> float:
    off = {"l2_latent": 0.0, "l2_embedding": 0.0, "l2_bias": 0.0}
    return rating_loss(OUTPUT, RATING, TrainConfig.from_dict({**off, **weights}))[0].item()


def test_members_are_fitted_one_by_one() -> None:
    # The mean prediction (2, 4) is exactly right, but each member is off by one on the first pair of two.
    assert loss() == 0.5 + 0.5


@pytest.mark.parametrize(
    ("weight", "mean"), [("l2_latent", 12 / 2), ("l2_embedding", 7 / 2), ("l2_bias", 6 / 2)]
)
def test_each_penalty_is_a_mean_over_the_batch_and_a_sum_over_members(weight: str, mean: float) -> None:
    assert loss(**{weight: 0.1}) == pytest.approx(1 + 0.1 * mean)


def test_reports_the_error_of_the_mean_prediction() -> None:
    third = torch.tensor([3.5, 4.0])
    assert rating_loss(OUTPUT, third, TrainConfig(l2_latent=10.0))[1].item() == 1.5**2 / 2


def test_models_without_biases_have_no_penalty_for_them() -> None:
    total, _ = rating_loss(
        OUTPUT._replace(bias=None), RATING, TrainConfig(l2_bias=10.0, l2_latent=0.0, l2_embedding=0.0)
    )
    assert total.item() == 1


def test_does_not_depend_on_the_batch_size() -> None:
    assert OUTPUT.bias is not None
    tensors = (OUTPUT.x, OUTPUT.z, OUTPUT.prediction, OUTPUT.bias)
    repeated = Output(*(part.repeat_interleave(3, dim=1) for part in tensors))
    once, many = (
        rating_loss(o, r, TrainConfig())
        for o, r in ((OUTPUT, RATING), (repeated, RATING.repeat_interleave(3)))
    )
    torch.testing.assert_close(once, many)

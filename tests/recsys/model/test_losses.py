from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lunet_fast.recsys.model.config import TrainConfig
from lunet_fast.recsys.model.losses import hybrid_loss
from lunet_fast.recsys.model.network import Output, RatingModel

# Two members, two pairs, D = 2.
OUTPUT = Output(
    x=torch.tensor([[[1.0, 0.0], [0.0, 2.0]], [[1.0, 1.0], [0.0, 0.0]]]),
    z=torch.tensor([[[2.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [2.0, 2.0]]]),
    score=torch.tensor([[3.0, 4.0], [1.0, 4.0]]),
    logit=None,
    bias=torch.tensor([[[1.0, 1.0], [0.0, 0.0]], [[0.0, 2.0], [0.0, 0.0]]]),
)
RATING = torch.tensor([2.0, 4.0])
OFF = {"l2_latent": 0.0, "l2_embedding": 0.0, "l2_bias": 0.0}


def model_of(ratings: Tensor | None = None, **settings: object) -> RatingModel:
    """A model for its settings alone: its users and items are not those of the outputs here."""
    config = TrainConfig.from_dict({"members": 2, "embedding_size": 1, **OFF, **settings})
    ratings = torch.tensor([1.0, 2.0, 3.0]) if ratings is None else ratings
    place = torch.arange(len(ratings))
    return RatingModel(config, place, place, ratings, len(ratings), len(ratings))


def loss(output: Output = OUTPUT, rating: Tensor = RATING, **settings: object) -> float:
    return hybrid_loss(model_of(**settings), output, rating).objective.item()


class TestRatings:
    def test_members_are_fitted_one_by_one(self) -> None:
        # The mean (2, 4) is exactly right, but each member is off by one on the first pair of two.
        assert loss() == 0.5 + 0.5

    @pytest.mark.parametrize(
        ("weight", "mean"), [("l2_latent", 12 / 2), ("l2_embedding", 7 / 2), ("l2_bias", 6 / 2)]
    )
    def test_each_penalty_is_a_mean_over_the_batch_and_a_sum_over_members(
        self, weight: str, mean: float
    ) -> None:
        assert loss(**{weight: 0.1}) == pytest.approx(1 + 0.1 * mean)

    def test_reports_the_error_of_the_mean_rating(self) -> None:
        third = torch.tensor([3.5, 4.0])
        reported = hybrid_loss(model_of(l2_latent=10.0), OUTPUT, third).reported
        assert reported.item() == 1.5**2 / 2

    def test_models_without_biases_have_no_penalty_for_them(self) -> None:
        assert loss(OUTPUT._replace(bias=None), l2_bias=10.0) == 1

    def test_does_not_depend_on_the_batch_size(self) -> None:
        repeated = OUTPUT._replace(
            **{
                name: part.repeat_interleave(3, dim=1)
                for name, part in OUTPUT._asdict().items()
                if part is not None
            }
        )
        settings = {"l2_latent": 0.1, "l2_embedding": 0.2, "l2_bias": 0.3}
        assert loss(**settings) == pytest.approx(loss(repeated, RATING.repeat_interleave(3), **settings))

    def test_huber_is_the_square_near_zero_and_linear_beyond_one(self) -> None:
        # Errors (1, 0) and (-3, 0): delta 1 makes 1/2 and 3 - 1/2 of them.
        output = OUTPUT._replace(score=torch.tensor([[3.0, 4.0], [-1.0, 4.0]]))
        assert loss(output, loss="huber") == pytest.approx(0.5 / 2 + 2.5 / 2)


class TestOrdinal:
    RATINGS = torch.tensor([1.0, 1.0, 2.0, 4.0, 4.0, 4.0, 5.0, 5.0])

    def test_starts_at_the_distribution_of_the_ratings(self) -> None:
        model = model_of(self.RATINGS, loss="ordinal")
        # A score of 0 for everything: the expectation is the mean rating.
        assert model.rating(torch.zeros(3)).tolist() == pytest.approx([26 / 8] * 3)

    def test_is_minus_the_log_of_the_probability_of_the_level(self) -> None:
        model = model_of(self.RATINGS, loss="ordinal")
        assert model.thresholds is not None
        with torch.no_grad():
            model.thresholds.add_(torch.randn_like(model.thresholds) / 3)
        thresholds = model.increasing_thresholds().double()
        assert bool((thresholds.diff(dim=-1) > 0).all())
        score, rating = torch.randn(2, 4), torch.tensor([1.0, 2.0, 4.0, 5.0])
        above = torch.sigmoid(score.double().unsqueeze(-1) - thresholds.unsqueeze(1))
        edges = torch.cat((torch.ones(2, 4, 1), above, torch.zeros(2, 4, 1)), -1)
        probability = -edges.diff(dim=-1)  # [2, 4, levels]
        torch.testing.assert_close(probability.sum(-1), torch.ones(2, 4, dtype=torch.float64))
        expected = -probability[:, torch.arange(4), torch.arange(4)].log().mean(-1).sum()
        output = Output(torch.zeros(2, 4, 2), torch.zeros(2, 4, 2), score, None, None)
        assert hybrid_loss(model, output, rating).objective.item() == pytest.approx(expected.item(), rel=1e-5)

    def test_far_from_the_thresholds_neither_the_loss_nor_its_gradient_overflows(self) -> None:
        model = model_of(self.RATINGS, loss="ordinal")
        score = torch.tensor([[-300.0, 300.0, 300.0, -300.0]] * 2, requires_grad=True)
        output = Output(torch.zeros(2, 4, 2), torch.zeros(2, 4, 2), score, None, None)
        total = hybrid_loss(model, output, torch.tensor([1.0, 2.0, 4.0, 5.0])).objective
        total.backward()
        assert score.grad is not None
        assert math.isfinite(total.item())
        assert bool(torch.isfinite(score.grad).all())

    def test_ratings_stay_within_the_levels_and_grow_with_the_score(self) -> None:
        model = model_of(self.RATINGS, loss="ordinal")
        rating = model.rating(torch.linspace(-9, 9, 100))
        assert 1 <= rating[0] < 1.01
        assert 4.99 < rating[-1] <= 5
        assert bool((rating.diff() > 0).all())

    def test_needs_a_few_different_ratings(self) -> None:
        for ratings in (torch.full((3,), 4.0), torch.rand(50)):
            with pytest.raises(ValueError, match="ordinal.*different ratings"):
                model_of(ratings, loss="ordinal")


class TestInteractions:
    """Two training pairs with two drawn ones each, so six pairs."""

    LOGIT = torch.tensor([[2.0, -1.0, 0.5, 0.0, -3.0, 1.0], [0.0, 0.0, 0.0, 0.0, 0.0, 0.0]])

    def output(self) -> Output:
        generator = torch.Generator().manual_seed(0)
        x, z = torch.randn(2, 6, 4, generator=generator), torch.randn(2, 6, 4, generator=generator)
        score = torch.tensor([[3.0, 4.0, 9.0, 9.0, 9.0, 9.0], [1.0, 4.0, 9.0, 9.0, 9.0, 9.0]])
        return Output(x, z, score, self.LOGIT, None)

    def cross_entropy(self) -> float:
        labels = torch.tensor([1.0, 1, 0, 0, 0, 0]).expand(2, 6)
        each = torch.nn.functional.binary_cross_entropy(torch.sigmoid(self.LOGIT), labels, reduction="none")
        return each.mean(-1).sum().item()

    def test_cross_entropy_over_observed_and_drawn_pairs(self) -> None:
        settings = {"gamma": 0.0, "embedding_size": 2, "negatives": 2}
        found = hybrid_loss(model_of(**settings), self.output(), RATING)
        assert found.objective.item() == pytest.approx(self.cross_entropy(), rel=1e-6)
        assert found.reported.item() == pytest.approx(self.cross_entropy() / 2, rel=1e-6)

    def test_gamma_weighs_the_two(self) -> None:
        # Ratings see the first two pairs alone: errors (1, 0) and (-1, 0).
        total = loss(self.output(), gamma=0.3, embedding_size=2, negatives=2)
        assert total == pytest.approx(0.3 * 1.0 + 0.7 * self.cross_entropy(), rel=1e-6)

    def test_bpr_compares_a_pair_with_those_drawn_for_it(self) -> None:
        total = loss(self.output(), gamma=0.0, loss="bpr", embedding_size=2, negatives=2)
        first, second = self.LOGIT[0, :2].tolist()
        drawn = self.LOGIT[0, 2:].tolist()
        gaps = [first - drawn[0], first - drawn[1], second - drawn[2], second - drawn[3]]
        expected = sum(math.log1p(math.exp(-gap)) for gap in gaps) / 4 + math.log(2)
        assert total == pytest.approx(expected, rel=1e-6)

    def test_penalties_weigh_each_kinds_own_coordinates(self) -> None:
        # k = 2, one coordinate of each half for each kind: ratings 0 and 2, interactions 1 and 3.
        output, base = self.output(), {"gamma": 0.5, "embedding_size": 2, "negatives": 2}
        plain = loss(output, **base)
        for name, vectors, coordinates, pairs in (
            ("l2_latent", output.z, [0, 2], 2),
            ("l2_embedding", output.x, [0, 2], 2),
            ("l2_interaction_latent", output.z, [1, 3], 6),
            ("l2_interaction_embedding", output.x, [1, 3], 6),
        ):
            penalty = vectors[:, :pairs, coordinates].square().sum(-1).mean(-1).sum().item()
            assert loss(output, **base, **{name: 0.7}) - plain == pytest.approx(0.35 * penalty, rel=1e-4)

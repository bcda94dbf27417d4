"""Which ratings are choices, and how much each counts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lunet_fast.recsys.data.ratings import Ratings, from_frame, read_ratings
from lunet_fast.recsys.measures.protocols import Parts, evaluate_ranking
from lunet_fast.recsys.model.config import TrainConfig
from lunet_fast.recsys.model.losses import confidence_weights, hybrid_loss
from lunet_fast.recsys.model.network import Output, RatingModel
from lunet_fast.recsys.model.training import train
from lunet_fast.recsys.serving.recommend import LUNetRecommender
from tests.recsys.synthetic import latent_frame, latent_ratings, quick_config

RATING = torch.tensor([1.0, 4.0, 5.0])
POSITIVE = torch.tensor([[0.3, -0.4, 1.2], [0.1, 0.2, -2.0]])
NEGATIVE = torch.tensor([[[0.5, -1.0], [0.0, 2.0], [1.0, 1.0]], [[0.0, 0.1], [0.2, 0.3], [-1.0, 0.4]]])


def loss_of(weight: Tensor | None = None, **settings: object) -> float:
    config = TrainConfig.from_dict(
        {"members": 2, "embedding_size": 1, "gamma": 0.0, "negatives": 2, "l2_latent": 0.0, **settings}
    )
    place = torch.arange(3)
    model = RatingModel(config, place, place, RATING, 3, 3)
    logit = torch.cat((POSITIVE, NEGATIVE.flatten(1)), dim=1)
    blank = torch.zeros(2, 9, 2)
    return hybrid_loss(model, Output(blank, blank, None, logit, None), RATING, weight).objective.item()


def by_hand(wanted: dict[int, float], unwanted: list[int]) -> float:
    """Of these pairs with these weights, and those that are not wanted."""
    total = 0.0
    for pair, weight in wanted.items():
        total += float(
            (weight * F.softplus(-POSITIVE[:, pair]) + F.softplus(NEGATIVE[:, pair]).sum(-1)).sum()
        )
    total += sum(float(F.softplus(POSITIVE[:, pair]).sum()) for pair in unwanted)
    return total / 3 / 3


class TestLoss:
    def test_by_default_every_rating_is_a_choice(self) -> None:
        assert loss_of() == pytest.approx(by_hand({0: 1, 1: 1, 2: 1}, []), rel=1e-6)

    def test_a_rating_below_is_a_dislike_or_nothing(self) -> None:
        assert loss_of(positive_from=4.0) == pytest.approx(by_hand({1: 1, 2: 1}, [0]), rel=1e-6)
        ignored = loss_of(positive_from=4.0, below="ignore")
        assert ignored == pytest.approx(by_hand({1: 1, 2: 1}, []), rel=1e-6)

    def test_weights_are_those_of_the_chosen_pairs(self) -> None:
        weight = torch.tensor([7.0, 2.0, 0.5])
        assert loss_of(weight) == pytest.approx(by_hand({0: 7, 1: 2, 2: 0.5}, []), rel=1e-6)
        found = loss_of(weight, positive_from=4.0)
        assert found == pytest.approx(by_hand({1: 2, 2: 0.5}, [0]), rel=1e-6)

    def test_bpr_weighs_and_leaves_out_as_well(self) -> None:
        weight = torch.tensor([7.0, 2.0, 0.5])
        each = F.softplus(NEGATIVE - POSITIVE.unsqueeze(-1)).mean(-1).sum(0)
        assert loss_of(loss="bpr") == pytest.approx(float(each.mean()), rel=1e-6)
        found = loss_of(weight, loss="bpr", positive_from=5.0, below="ignore")
        assert found == pytest.approx(float(0.5 * each[2]) / 3, rel=1e-6)

    def test_confidence_of_counts(self) -> None:
        counts = torch.tensor([1.0, 2.0, 30.0])
        raw = torch.tensor([1 + 3 * np.log(1.5), 1 + 3 * np.log(2), 1 + 3 * np.log(16)])
        found = confidence_weights(counts, 3.0)
        torch.testing.assert_close(found, (raw / raw.mean()).float())


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"positive_from": 4.0}, r"positive_from=4 is for interactions, which gamma=1.0 leaves out: lower"),
        ({"confidence": 2.0}, r"confidence=2 is for interactions, which gamma=1.0 leaves out: lower gamma"),
        ({"gamma": 0.0, "loss": "bpr", "positive_from": 4.0}, r"choose below='ignore', or loss='mse'"),
        ({"gamma": 0.0, "below": "hate"}, r"below"),
        ({"gamma": 0.0, "positive_from": float("nan")}, r"positive_from"),
    ],
)
def test_settings_that_cannot_work_are_told(settings: dict[str, object], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        TrainConfig.from_dict(settings)


class TestTraining:
    def test_a_threshold_above_all_ratings_is_told(self) -> None:
        with pytest.raises(ValueError, match=r"positive_from=6 is above every .* highest is 5: lower it"):
            train(latent_ratings(), quick_config(gamma=0.0, positive_from=6.0, split="none"))

    def test_confidence_needs_counts(self) -> None:
        with pytest.raises(ValueError, match=r"confidence=1 is of counts, which latent has none of"):
            train(latent_ratings(), quick_config(gamma=0.0, confidence=1.0, split="none"))

    def test_a_threshold_below_all_ratings_changes_nothing(self) -> None:
        base = quick_config(gamma=0.5, split="none", epochs=1)
        plain = train(latent_ratings(), base).trained.model
        same = train(latent_ratings(), base.replace(positive_from=0.5)).trained.model
        for name, parameter in plain.named_parameters():
            torch.testing.assert_close(parameter, dict(same.named_parameters())[name], rtol=1e-4, atol=1e-6)

    def test_counts_of_one_change_nothing_and_others_do(self) -> None:
        ratings, config = latent_ratings(), quick_config(gamma=0.0, split="none", epochs=1)
        ones = replace(ratings, weight=torch.ones(len(ratings)))
        counts = replace(ratings, weight=ratings.rating.pow(3))
        plain = train(ratings, config).trained.model.user_embedding.weight.detach()
        config = config.replace(confidence=2.0)
        same, other = (
            train(given, config).trained.model.user_embedding.weight.detach() for given in (ones, counts)
        )
        torch.testing.assert_close(plain, same, rtol=1e-4, atol=1e-6)
        assert float((plain - other).abs().max()) > 1e-3

    def test_liked_items_are_ranked_before_disliked_ones(self) -> None:
        """Of the pairs that it was trained on: whether the logit tells likes from dislikes."""
        frame = latent_frame()
        liked = (frame["rating"] >= 4).to_numpy()
        quick = {"recipe": "best", "members": 1, "embedding_size": 8, "epochs": 12, "batch_size": 128}
        gap = {}
        for name, settings in {"all": {}, "liked": {"positive_from": 4.0}}.items():
            model = LUNetRecommender(gamma=0.0, learning_rate=0.02, **quick, **settings).fit(frame)
            logit = model.score(frame["user"], frame["item"])
            gap[name] = float(logit[liked].mean() - logit[~liked].mean()) / float(logit.std())
        assert gap["liked"] > gap["all"] + 0.5


class TestMeasures:
    def parts(self) -> Parts:
        return Parts.of(latent_ratings(), "joint", 0)

    def test_what_is_below_is_not_to_be_found(self) -> None:
        parts = self.parts()
        assert parts.held_out is not None
        assert parts.test is not None
        scores = torch.rand(60, 40, generator=torch.Generator().manual_seed(0))
        found = evaluate_ranking(lambda users: scores[users].clone(), parts, 0, 4.0).metrics
        liked = parts.held_out.rating >= 4
        assert 0 < int(liked.sum()) < len(liked)
        ranks = torch.tensor(
            [
                1 + int((scores[u, c[c >= 0]] > scores[u, i]).sum())
                for u, i, c in zip(parts.held_out.user, parts.held_out.item, parts.candidates, strict=True)
            ]
        )[liked]
        assert found["hr@10"] == pytest.approx(float((ranks <= 10).double().mean()))
        # Among all items: other known pairs stay out, those that are not liked as well.
        known = torch.zeros(60, 40, dtype=torch.bool)
        for part in (parts.training, parts.test):
            known[part.user, part.item] = True
        hits = [
            int((scores[u] > scores[u, i]).logical_and(~known[u]).sum()) < 10
            for u, i in zip(parts.held_out.user[liked], parts.held_out.item[liked], strict=True)
        ]
        assert found["full_hr@10"] == pytest.approx(float(np.mean(hits)))

    def test_no_threshold_leaves_all(self) -> None:
        parts = self.parts()
        assert parts.chosen(None) is parts
        assert parts.chosen(6.0).held_out is None


class TestServing:
    def test_popularity_counts_choices(self) -> None:
        ratings = latent_ratings()
        config = quick_config(gamma=0.0, positive_from=4.0, split="none", epochs=1)
        model = train(ratings, config).trained.model
        liked = torch.bincount(ratings.item[ratings.rating >= 4], minlength=40).float()
        torch.testing.assert_close(model.popularity(), torch.log((liked + 1) / (60 - liked + 1)))

    def test_a_new_user_is_known_by_what_it_likes(self, tmp_path: object) -> None:
        quick = {"recipe": "best", "members": 1, "embedding_size": 4, "epochs": 2, "batch_size": 128}
        model = LUNetRecommender(gamma=0.0, positive_from=4.0, **quick).fit(latent_frame(), scale=(1, 5))
        likes, dislikes = (model.fold_in(dict.fromkeys(range(6), stars)) for stars in (5, 1))
        assert likes.score(list(range(6))).mean() > dislikes.score(list(range(6))).mean() + 0.02
        alone = model.fold_in(list(range(6)))
        np.testing.assert_allclose(alone.score([7, 8]), likes.score([7, 8]), rtol=1e-5)

    def test_a_saved_model_keeps_its_meaning(self, tmp_path: object) -> None:
        quick = {"recipe": "best", "members": 1, "embedding_size": 4, "epochs": 1, "batch_size": 128}
        model = LUNetRecommender(gamma=0.0, positive_from=4.0, **quick).fit(latent_frame())
        model.save(str(tmp_path))
        loaded = LUNetRecommender.load(str(tmp_path))
        assert (loaded.trained.model.config.positive_from, loaded.settings["below"]) == (4.0, "dislike")
        np.testing.assert_array_equal(loaded.score(["?"] * 3, [0, 1, 2]), model.score(["?"] * 3, [0, 1, 2]))


def test_ratings_may_be_the_weights_as_well(tmp_path: Path) -> None:
    frame = latent_frame()
    frame.to_csv(tmp_path / "r.csv", index=False)
    frame.to_parquet(tmp_path / "r.parquet")
    frame.to_json(tmp_path / "r.jsonl", orient="records", lines=True)
    read: list[Ratings] = [read_ratings(file, weight="rating") for file in sorted(tmp_path.glob("r.*"))]
    for ratings in (from_frame(frame, weight="rating"), *read):
        assert ratings.weight is not None
        assert torch.equal(ratings.weight, ratings.rating)
    with pytest.raises(ValueError, match="roles must have different columns"):
        from_frame(frame, weight="item")

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lunet_fast import LUNetRecommender
from lunet_fast.recsys.data.ids import IdMap
from lunet_fast.recsys.data.ratings import Ratings, from_frame
from lunet_fast.recsys.data.splits import random_split
from lunet_fast.recsys.measures.protocols import Parts
from lunet_fast.recsys.model import auto
from lunet_fast.recsys.model.auto import auto_config, plan, shrunk_factor
from lunet_fast.recsys.model.offsets import shrunk_biases
from lunet_fast.recsys.model.plain import plain_figures
from lunet_fast.recsys.model.scoring import ItemScorer
from lunet_fast.recsys.model.training import train
from lunet_fast.recsys.model.transform import Transform
from tests.recsys.synthetic import latent_frame, latent_ratings, quick_config

SHORT: dict[str, Any] = {"epochs": 2, "members": 2}
AUTO: dict[str, Any] = {
    "transform": "standard",
    "offset": "biases",
    "strength": 0.7,
    "mlp": False,
    "dropout": 0.0,
}


def noise(users: int, items: int, ratings: int, seed: int = 0) -> Ratings:
    """Biases and noise alone: nothing for a network to find."""
    rng = np.random.default_rng(seed)
    pairs = rng.permutation(users * items)[:ratings]
    user, item = pairs // items, pairs % items
    rating = rng.normal(0, 1, users)[user] + rng.normal(0, 1, items)[item] + rng.normal(0, 1, ratings)
    return from_frame(pd.DataFrame({"user": user, "item": item, "rating": rating}))


class TestTransform:
    @settings(max_examples=30)
    @given(
        st.lists(st.floats(0, 1e4, width=32), min_size=2, max_size=30, unique=True),
        st.sampled_from(["none", "standard", "log", "rank"]),
    )
    def test_is_increasing_and_comes_back(self, values: list[float], kind: Any) -> None:
        ratings = torch.tensor(sorted(values), dtype=torch.float64)
        transform = Transform(kind).double()
        transform.fit_(ratings)
        y = transform(ratings)
        assert bool((y.diff() >= 0).all())
        torch.testing.assert_close(transform.inverse(y), ratings, rtol=1e-5, atol=1e-5 * max(values))

    @pytest.mark.parametrize("kind", ["standard", "log", "rank"])
    def test_does_not_depend_on_the_unit(self, kind: Any) -> None:
        ratings = torch.rand(500, dtype=torch.float64) ** 3 * 5
        found = []
        for unit in (1, 1e-3, 20, 1e4):
            transform = Transform(kind)
            transform.fit_(ratings * unit)
            found.append(transform(ratings * unit).float())
        for other in found[1:]:
            torch.testing.assert_close(other, found[0], rtol=1e-5, atol=1e-5)
        if kind != "rank":
            assert float(found[0].std()) == pytest.approx(1.125, rel=0.01)

    def test_a_rank_is_that_of_the_normal_distribution(self) -> None:
        transform = Transform("rank")
        transform.fit_(torch.tensor([1.0, 2.0, 2.0, 9.0]))
        expected = 1.125 * torch.special.ndtri(torch.tensor([1 / 8, 1 / 2, 7 / 8]))
        torch.testing.assert_close(transform(torch.tensor([1.0, 2.0, 9.0])), expected)
        assert transform.inverse(torch.tensor([-9.0, 9.0])).tolist() == [1, 9]


def test_biases_are_the_ridge_solution() -> None:
    """Against the normal equations in float64."""
    ratings = latent_ratings(12, 9, 60)
    residual = ratings.rating.double() - ratings.rating.double().mean()
    rows = torch.zeros(60, 21, dtype=torch.float64)
    rows[torch.arange(60), ratings.user] = 1
    rows[torch.arange(60), 12 + ratings.item] = 1
    penalty = torch.cat((torch.full((12,), 3.0), torch.full((9,), 7.0))).double()
    expected = torch.linalg.solve(rows.T @ rows + penalty.diag(), rows.T @ residual)
    found = torch.cat(shrunk_biases(ratings.user, ratings.item, residual, (12, 9), (3.0, 7.0)))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


class TestModel:
    @pytest.mark.parametrize("change", [{}, {"readout": "linear"}, {"strength": 0.0}, {"gamma": 0.5}])
    def test_ranks_as_it_predicts(self, change: dict[str, Any]) -> None:
        ratings = latent_ratings()
        result = train(ratings, quick_config(**{**AUTO, "split": "none", "epochs": 1, **change}))
        model = result.trained.model
        scorer = ItemScorer(model, model.histories(), readout="rating")
        users, items = torch.arange(60).repeat_interleave(40), torch.arange(40).repeat(60)
        free = ~model.interactions.contains(users, items)
        scores = model.rating(scorer.scores(torch.arange(60)).flatten())[free]
        with torch.no_grad():
            expected = model(users, items)[free]
        torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-4)

    def test_without_strength_it_is_the_biases(self) -> None:
        ratings = latent_ratings()
        config = quick_config(**{**AUTO, "strength": 0.0}, offset_l2_user=2.0, epochs=1, split="none")
        model = train(ratings, config).trained.model
        mean = ratings.rating.double().mean()
        biases = shrunk_biases(ratings.user, ratings.item, ratings.rating - mean, (60, 40), (2.0, 5.0))
        expected = (mean + biases[0][ratings.user] + biases[1][ratings.item]).float()
        with torch.no_grad():
            torch.testing.assert_close(model(ratings.user, ratings.item), expected, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("transform", ["standard", "log", "rank"])
    def test_survives_saving(self, transform: str, tmp_path: Path) -> None:
        fitted = LUNetRecommender(**{**AUTO, **SHORT, "transform": transform}).fit(
            latent_frame(), scale=(1, 5)
        )
        fitted.save(tmp_path)
        loaded = LUNetRecommender.load(tmp_path)
        users, items = np.arange(-1, 59), np.arange(60) % 41
        expected = fitted.predict(users, items)
        np.testing.assert_array_equal(loaded.predict(users, items), expected)
        assert 1 <= expected.min() < expected.max() <= 5
        ann: Any = loaded.fold_in({3: 5.0, 4: 1.0, 8: 4.0})
        best = ann.recommend(5)
        np.testing.assert_allclose(ann.predict(best["item"]), best["score"], rtol=1e-4)
        folded: list[Any] = [loaded.fold_in({3: r, 4: r, 8: r}) for r in (5.0, 1.0)]
        bright, dull = (one.predict(range(40)).mean() for one in folded)
        assert bright > dull + 0.3


class TestAuto:
    def test_does_not_depend_on_the_unit(self) -> None:
        ratings = latent_ratings()
        found = []
        for unit in (1.0, 1e-3, 1e4):
            scale = (unit, 5 * unit)
            scaled = replace(ratings, rating=ratings.rating * unit, scale=scale)
            config = auto_config(scaled, **SHORT)
            result = train(scaled, config)
            found.append((config.l2_latent, config.offset_l2_user, result.metrics["test_mse"] / unit**2))
        for penalty, l2, mse in found[1:]:
            assert (penalty, l2) == found[0][:2]
            assert mse == pytest.approx(found[0][2], abs=1e-3)

    def test_finds_nothing_where_nothing_is(self) -> None:
        """The error is that of the biases, which are those that made the ratings."""
        ratings = noise(80, 60, 1200)
        config = auto_config(ratings, **SHORT)
        assert config.strength < 0.35
        parts = Parts.of(ratings, "random", 0)
        metrics = train(ratings, config).metrics
        assert metrics["test_mse"] <= 1.02 * plain_figures(parts, config)["biases_test_mse"]
        assert metrics["biases_test_mse"] == plain_figures(parts, config)["biases_test_mse"]

    def test_looks_at_no_tested_rating(self) -> None:
        ratings = latent_ratings()
        tested = random_split(ratings, 0).test
        other = ratings.rating.clone()
        other[tested] = 6 - other[tested]
        assert auto_config(replace(ratings, rating=other), **SHORT) == auto_config(ratings, **SHORT)

    def test_keeps_what_is_given(self) -> None:
        ratings = latent_ratings()
        config = auto_config(ratings, **SHORT, l2_latent=0.3, batch_size=77, transform="none", seed=3)
        assert (config.l2_latent, config.batch_size, config.transform, config.seed) == (0.3, 77, "none", 3)
        assert (config.recipe, config.epochs, config.members) == ("auto", 2, 2)
        assert auto_config(ratings, gamma=0, **SHORT).offset == "mean"

    def test_another_kind_of_settings_must_be_surely_better(self) -> None:
        ratings = latent_ratings()
        poor = plan(ratings, **SHORT).config
        assert poor.offset == "biases"
        good = poor.replace(offset="mean", epochs=20, learning_rate=0.03)
        search = auto._Search(ratings, poor, 2, "cpu")
        assert search.network([good]) == good
        worse = good.replace(epochs=1, learning_rate=1e-6)
        chosen = auto._Search(ratings, poor, 2, "cpu").network([worse, worse.replace(loss="huber")])
        assert chosen.offset == "biases"

    def test_samples_of_the_posterior_are_taken_where_they_err_less(self) -> None:
        ratings = latent_ratings()
        config = auto._sampled(ratings, {"seed": 0})
        assert config is not None
        assert (config.inference, config.offset, config.transform) == ("gibbs", "mean", "standard")
        poor = plan(ratings, epochs=1, members=1).config
        search = auto._Search(ratings, poor, 2, "cpu")
        found = search.sampled(config)
        assert found is not None
        assert len(found.errors) == sum(len(part) for _, part in search.folds)
        assert search.network([], found) == found.config
        worse = found._replace(errors=100 * found.errors)
        assert auto._Search(ratings, poor, 2, "cpu").network([], worse).inference == "gradient"

    def test_the_posterior_is_not_sampled_for_a_network_that_is_given_or_too_many_rows(self) -> None:
        ratings = latent_ratings()
        assert auto._sampled(ratings, {"layers": 3}) is None
        many = replace(ratings, users=IdMap(list(range(auto.MOST_SAMPLED))))
        assert auto._sampled(many, {}) is None

    def test_size_follows_the_data(self) -> None:
        small, large = plan(noise(100, 40, 1000)).config, plan(noise(900, 1700, 100_000)).config
        assert small.batch_size < large.batch_size == 1024
        assert small.embedding_size < large.embedding_size
        ids = {"users": IdMap(list(range(20_000))), "items": IdMap(list(range(100_000)))}
        sparse = plan(replace(noise(20, 20, 300), users=ids["users"], items=ids["items"]))
        assert sparse.parameters < 5_000_000
        assert (sparse.config.members, sparse.config.embedding_size) == (1, 4)
        assert sparse.bytes < 2**28

    def test_ratings_of_one_value_are_refused(self) -> None:
        frame = latent_frame().assign(rating=3.0)
        with pytest.raises(ValueError, match=r"all 1,200 ratings are 3.*gamma=0"):
            LUNetRecommender("auto").fit(frame)
        assert len(LUNetRecommender("auto", gamma=0.0, **SHORT).fit(frame).recommend(3, k=4)) == 4

    def test_counts_are_told_of(self) -> None:
        frame = latent_frame()
        frame["rating"] = np.exp(2.5 * np.random.default_rng(0).normal(size=len(frame)))
        (note,) = plan(from_frame(frame)).notes
        assert "transform='log'" in note
        assert plan(from_frame(frame), transform="log").notes == []
        assert plan(latent_ratings()).notes == []


def test_shrunk_factor() -> None:
    network = torch.randn(4000, dtype=torch.float64)
    noise_ = torch.randn(4000, dtype=torch.float64)
    factor, error = shrunk_factor(network, 0.6 * network + noise_)
    assert factor == pytest.approx(0.6, abs=0.06)
    assert error == pytest.approx(1.0, abs=0.1)
    assert shrunk_factor(network, -network)[0] == 0
    assert 1.1 < shrunk_factor(network, 9 * network)[0] <= 1.2
    assert shrunk_factor(torch.zeros(5), torch.ones(5)) == (0.0, 1.0)

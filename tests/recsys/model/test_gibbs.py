from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from lunet_fast import LUNetRecommender
from lunet_fast.recsys.data.ratings import Ratings, from_frame
from lunet_fast.recsys.data.splits import random_split
from lunet_fast.recsys.model.config import TrainConfig, recipe
from lunet_fast.recsys.model.gibbs import PRIOR_RATE, Chain
from lunet_fast.recsys.model.network import RatingModel
from lunet_fast.recsys.model.scoring import ItemScorer
from lunet_fast.recsys.model.training import train
from tests.recsys.synthetic import latent_frame, latent_ratings

FEW: dict[str, Any] = {"members": 3, "epochs": 6, "embedding_size": 2, "transform": "none"}
PLAIN: dict[str, Any] = {"user_history": False, "item_history": False}


def settings(**changes: Any) -> TrainConfig:
    given = {"inference": "gibbs", "noise": 0.0, "mlp": False, "split": "none"}
    return recipe("best", 1000, **{**given, **FEW, **changes})


def chain_of(ratings: Ratings, config: TrainConfig, features: torch.Tensor | None = None) -> Chain:
    triple = ratings.user, ratings.item, ratings.rating
    model = RatingModel(config, *triple, ratings.n_users, ratings.n_items, user_features=features)
    return Chain(model, *triple)


def test_a_draw_is_of_the_conditional_posterior() -> None:
    """Mean and covariance of one user's vector and bias, against the normal equations of its own ratings."""
    ratings = latent_ratings(12, 9, 60)
    chain = chain_of(ratings, settings(noise=0.3, **PLAIN))
    chain.sweep()
    user, item = chain.user_side, chain.item_side
    own = ratings.user == 4
    rows = item.vectors[ratings.item[own]]
    design = torch.cat((rows[:, :-1], torch.ones(int(own.sum()), 1)), 1).double()
    left = chain.residual[own] - rows[:, -1]
    precision = design.T @ design / 0.3 + user.precision.diag()
    mean = torch.linalg.solve(precision, design.T @ left / 0.3 + user.precision * user.mean)
    drawn = []
    for _ in range(2000):
        user.draw(chain.residual, item, 0.3, chain.rng)
        drawn.append(user.vectors[4])
    torch.testing.assert_close(user.expected[4], mean)
    found = torch.stack(drawn)
    covariance = torch.linalg.inv(precision)
    error = covariance.diag().sqrt() / 2000**0.5
    assert bool(((found.mean(0) - mean).abs() < 5 * error).all())
    torch.testing.assert_close(found.T.cov(), covariance, rtol=0, atol=0.15 * float(covariance.diag().max()))


def test_what_features_add_is_of_its_posterior() -> None:
    """Mean of the drawn weights, against ridge regression of the vectors on the features."""
    ratings = latent_ratings(12, 9, 60)
    features = torch.from_numpy(np.random.default_rng(0).random((12, 3))).float()
    chain = chain_of(ratings, settings(**PLAIN), features)
    side = chain.user_side
    side.vectors = torch.from_numpy(np.random.default_rng(1).normal(size=(12, 3)))
    known, eye = features.double(), torch.eye(3, dtype=torch.float64)
    expected, drawn = [], []
    for _ in range(1500):
        penalty = side.weights_precision
        side.draw_prior(chain.rng)
        expected.append(
            torch.linalg.solve(known.T @ known + penalty * eye, known.T @ (side.vectors - side.mean))
        )
        drawn.append(side.weights)
    gap = torch.stack(drawn) - torch.stack(expected)
    assert bool((gap.mean(0).abs() < 5 * gap.std(0) / 1500**0.5 + 1e-3).all())
    # Conjugate gradients against the direct solution.
    right = torch.ones(3, 3, dtype=torch.float64)
    direct = torch.linalg.solve(known.T @ known + side.weights_precision * eye, right)
    torch.testing.assert_close(side._solved(right), direct, rtol=1e-2, atol=1e-2)


def test_sweeps_leave_the_joint_distribution_as_it_is() -> None:
    """Geweke (2004): with ratings drawn anew from the state before each sweep, the state has its prior."""
    users, items = torch.arange(4).repeat_interleave(3), torch.arange(3).repeat(4)
    frame = pd.DataFrame({"user": users, "item": items, "rating": torch.arange(12) % 5})
    ratings = from_frame(frame)
    features = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 1.0], [0.0, 0.0]])
    chain = chain_of(ratings, settings(embedding_size=1, **PLAIN), features)
    sides, found = (chain.user_side, chain.item_side), []
    for _ in range(3000):
        error = chain.noise**0.5 * torch.from_numpy(chain.rng.standard_normal(12))
        chain.residual = chain.predicted(users, items) + error
        chain.sweep()
        logs = [float(log) for side in sides for log in side.precision.log()]
        found.append([*logs, float(np.log(chain.user_side.weights_precision)), -np.log(chain.noise)])
    # E log x of x ~ Gamma(a, b) is digamma(a) - log b.
    of_precision = torch.special.digamma(torch.tensor(1.0)).item() - np.log(PRIOR_RATE)
    of_weights = torch.special.digamma(torch.tensor(0.5)).item() - np.log(0.5)
    expected = np.array([of_precision] * 4 + [of_weights, torch.special.digamma(torch.tensor(1.0)).item()])
    batches = np.array(found).reshape(30, 100, -1).mean(1)
    error_of_mean = batches.std(0, ddof=1) / 30**0.5
    assert (np.abs(batches.mean(0) - expected) < 4 * error_of_mean).all(), (batches.mean(0), expected)
    assert (error_of_mean < 0.5).all(), error_of_mean


def test_priors_are_found() -> None:
    """The variances of biases that made the ratings, and of the noise."""
    rng = np.random.default_rng(0)
    users, items = torch.arange(60).repeat_interleave(40), torch.arange(40).repeat(60)
    of_user, of_item = torch.from_numpy(rng.normal(0, 0.8, 60)), torch.from_numpy(rng.normal(0, 0.3, 40))
    rating = 3 + of_user[users] + of_item[items] + torch.from_numpy(rng.normal(0, 0.5, 2400))
    config = settings(**PLAIN)
    chain = Chain(RatingModel(config, users, items, rating, 60, 40), users, items, rating)
    found = []
    for sweep in range(200):
        chain.sweep()
        if sweep >= 50:
            stds = chain.user_side.precision[-1] ** -0.5, chain.item_side.precision[-1] ** -0.5
            found.append([float(stds[0]), float(stds[1]), chain.noise**0.5])
    means = np.mean(found, axis=0)
    assert means == pytest.approx([0.8, 0.3, 0.5], rel=0.25)


def test_predicts_better_than_biases_and_as_the_mean_of_members() -> None:
    ratings = latent_ratings()
    split = random_split(ratings, 0)
    training, test = ratings.select(split.train), ratings.select(split.test)
    config = settings(members=20, epochs=60, embedding_size=4, transform="standard", **PLAIN)
    result = train(training, config.replace(recipe="auto"), test=test)
    assert result.metrics["test_mse"] < 0.9 * result.metrics["biases_test_mse"]
    assert len(result.curve.train) == len(result.curve.test) == 60
    # The last sweep's is that of all members, but that of users these have the expectation.
    assert result.curve.test[-1] == pytest.approx(result.metrics["test_mse"], rel=0.1)


@pytest.mark.parametrize("change", [{}, PLAIN])
def test_a_member_is_the_state_of_the_chain(change: dict[str, Any]) -> None:
    """The model says of new pairs what the chain does, with histories apart or without, and ranks by it."""
    ratings = latent_ratings()
    features = torch.from_numpy(np.random.default_rng(0).random((60, 3))).float()
    chain = chain_of(ratings, settings(members=1, noise=0.5, **change), features)
    for _ in range(3):
        chain.sweep()
    chain.write_(0)
    model = chain.model
    users, items = torch.arange(60).repeat_interleave(40), torch.arange(40).repeat(60)
    free = ~model.interactions.contains(users, items)
    users, items = users[free], items[free]
    chain.user_side.vectors = chain.user_side.expected
    expected = (model.mean + chain.predicted(users, items)).float()
    with torch.no_grad():
        torch.testing.assert_close(model(users, items), expected, rtol=1e-4, atol=1e-4)
        scores = ItemScorer(model, model.histories()).scores(torch.arange(60)).flatten()[free]
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-4)


def test_of_an_unknown_user_the_prior_speaks() -> None:
    ratings = latent_ratings()
    chain = chain_of(ratings, settings(members=2, **PLAIN))
    expected = torch.zeros(40)
    for member in range(2):
        chain.sweep()
        chain.write_(member)
        item, mean = chain.item_side.vectors, chain.user_side.mean
        expected += (item[:, :-1] @ mean[:-1] + item[:, -1] + mean[-1]).float() / 2
    with torch.no_grad():
        found = chain.model(torch.full((40,), -1), torch.arange(40))
    torch.testing.assert_close(found, chain.model.mean + expected)


def test_is_repeated() -> None:
    ratings = latent_ratings()
    config = settings(transform="standard", noise=0.4)
    first, second = (train(ratings, config).trained.model.state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_saves_and_folds_in(tmp_path: Path) -> None:
    asked: dict[str, Any] = {"inference": "gibbs", **FEW, "seed": 1}
    fitted = LUNetRecommender(**asked).fit(latent_frame(), scale=(1, 5))
    fitted.save(tmp_path)
    loaded = LUNetRecommender.load(tmp_path)
    users, items = np.arange(-1, 59), np.arange(60) % 41
    np.testing.assert_array_equal(loaded.predict(users, items), fitted.predict(users, items))
    folded: list[Any] = [loaded.fold_in({3: r, 4: r, 8: r}) for r in (5.0, 1.0)]
    bright, dull = (one.predict(range(40)).mean() for one in folded)
    assert bright > dull + 0.3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"network": "lu-net"}, "network is 'lu-net': choose network='identity'"),
        ({"loss": "huber"}, "choose loss='mse'"),
        ({"gamma": 0.5}, "choose gamma=1.0"),
        ({"epochs": 2}, "epochs=2 sweeps .* no 3 members"),
        ({"inference": "gradient", "noise": 0.5}, "noise=0.5 is of inference='gibbs'"),
    ],
)
def test_what_cannot_be_sampled_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settings(**change)

"""Data at the ends: one user, one item, one rating, equal ratings, every pair rated.

Each trains to finite numbers that float64 confirms and the scale bounds, or is refused with what to do.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from lunet_fast import LUNetRecommender
from lunet_fast.recsys.data.ratings import Ratings, from_frame
from lunet_fast.recsys.evaluation.baselines import BASELINES, missing
from lunet_fast.recsys.model.config import TrainConfig
from lunet_fast.recsys.model.network import RatingModel
from lunet_fast.recsys.model.training import train
from tests.recsys.synthetic import quick_config


def frame(users: int, items: int, rating: float | None = None) -> pd.DataFrame:
    """Every pair of ``users`` and ``items``, rated 1 to 5 by turns, or all the same."""
    pairs = [(user, item) for user in range(users) for item in range(items)]
    ratings = [1.0 + i % 5 if rating is None else rating for i in range(len(pairs))]
    return pd.DataFrame({"user": [u for u, _ in pairs], "item": [i for _, i in pairs], "rating": ratings})


DATA: dict[str, pd.DataFrame] = {
    "one user": frame(1, 8),
    "one item": frame(8, 1),
    "one rating": frame(1, 1),
    "two ratings": frame(2, 1),
    "all equal": frame(5, 4, 3.0).iloc[::2],
    "all the lowest": frame(5, 4, 1.0).iloc[::2],
    "every pair": frame(5, 4),
    "an item of nobody": frame(5, 4)[lambda table: table["item"] != 2],
}

SETTINGS: dict[str, dict[str, Any]] = {
    "ratings": {},
    "paper": {"readout": "linear", "biases": False, "user_history": False, "item_history": False},
    "huber": {"loss": "huber"},
    "both": {"gamma": 0.5},
    "interactions": {"gamma": 0.0},
    "bpr": {"gamma": 0.0, "loss": "bpr"},
    "ordinal": {"loss": "ordinal"},
}


def config(**changes: Any) -> TrainConfig:
    return quick_config(**{"split": "none", "mlp": False, "epochs": 3, "layers": 2, **changes})


def table(name: str, scale: tuple[float, float] | None = (1, 5)) -> Ratings:
    return from_frame(DATA[name], scale=scale)


def refused(name: str, settings: str) -> str | None:
    """The refusal that this combination must meet: what it lacks."""
    ratings = set(DATA[name]["rating"])
    if settings == "ordinal" and len(ratings) < 2:
        return "loss='ordinal' needs 2 to 20 different ratings"
    # A pair without interaction has to be there to be drawn.
    everything = len(DATA[name]) == DATA[name]["user"].nunique() * DATA[name]["item"].nunique()
    if SETTINGS[settings].get("gamma", 1) < 1 and everything:
        return "leaves none to learn from"
    return None


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("name", DATA)
def test_trains_or_says_why_not(name: str, settings: str, tmp_path: Path) -> None:
    ratings, wanted = table(name), config(**SETTINGS[settings])
    reason = refused(name, settings)
    if reason is not None:
        with pytest.raises(ValueError, match=reason):
            train(ratings, wanted)
        return
    trained = train(ratings, wanted, out=tmp_path / "run").trained
    recommender = LUNetRecommender.load(tmp_path / "run")
    users, items = [*ratings.users.ids.tolist(), "nobody"], [*ratings.items.ids.tolist(), "nothing"]
    pairs = [(user, item) for user in users for item in items]
    given = [user for user, _ in pairs], [item for _, item in pairs]
    gamma = wanted.gamma
    if gamma > 0:
        predicted = recommender.predict(*given)
        assert np.isfinite(predicted).all()
        assert ((predicted >= 1) & (predicted <= 5)).all()
        np.testing.assert_allclose(predicted, in_float64(trained.model, ratings, given), atol=1e-4)
    if gamma < 1:
        assert np.isfinite(recommender.score(*given)).all()
    for seen in (False, True):
        found = recommender.recommend(users, k=20, exclude_seen=seen)
        assert np.isfinite(found["score"]).all()
        assert not found.duplicated(["user", "item"]).any()
        assert set(found["item"]) <= set(items)
    new = recommender.fold_in({items[0]: 3.0} if gamma > 0 else [items[0]])
    assert np.isfinite(new.recommend(k=3)["score"]).all()


def in_float64(model: RatingModel, ratings: Ratings, given: tuple[list[Any], list[Any]]) -> np.ndarray:
    """Ratings by a copy of the model in float64, clipped."""
    counts = ratings.n_users, ratings.n_items
    wide = RatingModel.from_state(model.config, model.state_dict(), *counts).double()
    users, items = (
        torch.from_numpy(ids.index(each))
        for ids, each in zip((ratings.users, ratings.items), given, strict=True)
    )
    with torch.no_grad():
        found: np.ndarray = wide(users, items).clamp(1, 5).numpy()
    return found


@pytest.mark.parametrize("rating", [1.0, 3.0, 5.0])
def test_equal_ratings_are_predicted(rating: float) -> None:
    """With nothing to learn the answer is the mean, for what is known and for what is not."""
    ratings = from_frame(frame(6, 5, rating).iloc[::2], scale=(1, 5))
    model = train(ratings, config(epochs=12)).trained.model
    with torch.no_grad():
        every = torch.cartesian_prod(torch.arange(6), torch.arange(5))
        found = model(every[:, 0], every[:, 1])
        unknown = model(torch.tensor([-1, -1, 0]), torch.tensor([-1, 0, -1]))
    assert float((found - rating).abs().max()) < 0.5
    torch.testing.assert_close(unknown, torch.full((3,), rating))
    assert bool((model.user_deviation == 0).all())


def test_a_scale_of_one_number() -> None:
    """Taken from the data, it is (3, 3), and every prediction is clipped to it."""
    recommender = LUNetRecommender(**config().replace(seed=0).to_dict()).fit(DATA["all equal"])
    assert recommender.trained.scale == (3.0, 3.0)
    assert recommender.predict([0, 0, "nobody"], [0, 1, "nothing"]).tolist() == [3.0] * 3


@pytest.mark.parametrize("split", ["random", "per-user", "leave-one-out", "joint"])
@pytest.mark.parametrize("name", ["one user", "one item", "one rating", "two ratings", "all equal"])
@pytest.mark.parametrize("gamma", [1.0, 0.5])
def test_splits_of_little(name: str, split: str, gamma: float) -> None:
    """A part without rows is named, with another split; where both have some, the metrics are numbers."""
    wanted = config(split=split, gamma=gamma, epochs=1)
    try:
        result = train(table(name), wanted)
    except ValueError as error:
        message = str(error)
        assert any(word in message for word in ("empty", "split", "leaves none to learn from")), message
        assert "\n" not in message
        return
    numbers = [value for value in result.metrics.values() if isinstance(value, float)]
    assert np.isfinite(numbers).all()


@pytest.mark.parametrize("name", ["one user", "two ratings", "all equal"])
def test_the_control_trains_on_little(name: str) -> None:
    whole = table(name)
    rows = torch.arange(len(whole))
    result = train(whole.select(rows[:-1]), config(mlp=True), test=whole.select(rows[-1:]))
    assert np.isfinite(result.metrics["mlp_test_mse"])
    assert np.isfinite(result.metrics["test_mse"])


@pytest.mark.parametrize("name", ["one user", "one item", "one rating", "all equal", "every pair"])
@pytest.mark.parametrize("key", ["biases", "popularity", "ease", "mf"])
def test_baselines_on_little(key: str, name: str) -> None:
    if missing(BASELINES[key]) is not None:
        pytest.skip("the package is not installed")
    ratings = table(name)
    fitted = BASELINES[key].fit(ratings, 0, "ml-100k")
    predicted, scores = (
        fitted.predict(ratings.user, ratings.item),
        fitted.score_items(torch.arange(ratings.n_users)),
    )
    for values in (predicted, scores):
        assert values is None or bool(values.isfinite().all())
    if predicted is not None and "equal" in name:
        torch.testing.assert_close(predicted, torch.full_like(predicted, 3.0), atol=0.3, rtol=0)


def test_interactions_alone_of_one_user_and_item() -> None:
    """Clicks: without ratings, for a model of gamma 0."""
    clicks = pd.DataFrame({"user": ["ann", "ann", "bob", "bob"], "item": ["x", "y", "y", "z"]})
    settings = config(gamma=0.0).to_dict()
    recommender = LUNetRecommender(**settings).fit(clicks, rating=None)
    assert np.isfinite(recommender.score(["ann", "bob"], ["x", "x"])).all()
    assert recommender.recommend("bob", k=5)["item"].tolist() == ["x"]


@pytest.mark.parametrize("rating", [float("nan"), float("inf"), -float("inf")])
def test_ratings_that_are_no_numbers_are_refused(rating: float) -> None:
    """Also where no file reader has looked: a table made by hand."""
    good = table("every pair")
    values = good.rating.clone()
    values[3] = rating
    bad = Ratings("made", good.user, good.item, values, None, good.users, good.items, (1.0, 5.0))
    with pytest.raises(ValueError, match="rating .* in row 3"):
        train(bad, config())


def test_an_empty_table_is_refused() -> None:
    good = table("every pair")
    with pytest.raises(ValueError, match="is empty"):
        train(good.select([]), config())

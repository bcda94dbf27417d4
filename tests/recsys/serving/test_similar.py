from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from lunet_fast.recsys.serving.recommend import LUNetRecommender
from lunet_fast.recsys.serving.vectors import item_vectors
from tests.recsys.synthetic import latent_frame, quick_config

QUICK: dict[str, Any] = {
    name: value
    for name, value in quick_config().to_dict().items()
    if name in ("recipe", "members", "embedding_size", "epochs", "batch_size", "learning_rate")
}


@pytest.fixture(scope="module", params=[1.0, 0.0])
def fitted(request: pytest.FixtureRequest) -> LUNetRecommender:
    """Users 0 to 59, items 0 to 39; of ratings, and of interactions."""
    return LUNetRecommender(**QUICK, gamma=request.param).fit(latent_frame(), scale=(1, 5))


def test_similar_items_are_those_of_the_highest_cosine(fitted: LUNetRecommender) -> None:
    vectors = item_vectors(fitted.trained.model, torch.arange(40)).double().numpy()
    vectors = vectors - vectors.mean(0)
    cosine = vectors @ vectors.T / np.outer(*[np.linalg.norm(vectors, axis=1)] * 2)
    np.fill_diagonal(cosine, -np.inf)
    found = fitted.similar_items([7, "unknown", "3"], k=5)
    assert found["item"].tolist() == [7] * 5 + ["3"] * 5
    assert found["rank"].tolist() == [1, 2, 3, 4, 5] * 2
    for item, asked in ((7, 7), (3, "3")):
        rows = found[found["item"] == asked]
        expected = np.argsort(-cosine[item])[:5]
        assert rows["similar"].tolist() == expected.tolist()
        np.testing.assert_allclose(rows["similarity"], cosine[item][expected], rtol=1e-4, atol=1e-5)
    assert len(fitted.similar_items(3, k=1000)) == 39
    assert len(fitted.similar_items("unknown")) == 0
    everyone = fitted.similar_users(fitted.users.ids, k=2)
    assert everyone["user"].tolist() == np.repeat(np.arange(60), 2).tolist()
    with pytest.raises(ValueError, match="k must be an integer of at least 1"):
        fitted.similar_items(3, k=0)


def test_reasons_are_what_the_score_loses_without_an_item(fitted: LUNetRecommender) -> None:
    """Against the model whose interactions, and nothing else, lack the item."""
    model, frame = fitted.trained.model, latent_frame()
    mine = sorted(frame.loc[frame["user"] == 5, "item"])
    free = next(item for item in range(40) if item not in mine)
    for item in (free, mine[0]):
        found = fitted.explain(5, item, k=100)
        assert sorted(found["item"]) == [other for other in mine if other != item]
        effects = found["effect"].to_numpy()
        assert (np.diff(effects) <= 0).all()
        user, pair = torch.tensor([5]), torch.tensor([item])
        read = model if fitted.ranks_by == "rating" else model.interaction
        histories = model.histories()
        with torch.no_grad():
            whole = read(user, pair, histories)
            assert model.user_history is not None
            assert histories.user is not None
            for other, effect in list(found.itertuples(index=False))[:3]:
                counts = model.interactions.user_counts
                less = histories.user.clone()
                less[5] -= model.user_history.weight[other]
                counts[5] -= 1
                lower = read(user, pair, histories._replace(user=less))
                counts[5] += 1
                assert float(whole - lower) == pytest.approx(effect, abs=1e-4)


def test_who_cannot_be_explained_is_named(fitted: LUNetRecommender) -> None:
    with pytest.raises(ValueError, match="user='nobody' has no rating"):
        fitted.explain("nobody", 3)
    with pytest.raises(ValueError, match=r"item=\[3, 4\] must be one id"):
        fitted.explain(3, [3, 4])
    without = LUNetRecommender(**QUICK, user_history=False).fit(latent_frame())
    with pytest.raises(ValueError, match="train with user_history=True"):
        without.explain(3, 4)


class TestParameters:
    def test_are_those_that_make_it_again(self) -> None:
        first = LUNetRecommender("best", 3, epochs=2, members=1)
        again = LUNetRecommender(**first.get_params())
        assert again.get_params() == first.get_params() | {"recipe": "best", "seed": 3}
        changed = again.set_params(epochs=5, recipe="paper")
        assert changed is again
        assert (again.recipe, again.settings["epochs"], first.settings["epochs"]) == ("paper", 5, 2)
        with pytest.raises(ValueError, match="unknown setting 'epoch'"):
            again.set_params(epoch=5)
        assert again.settings["epochs"] == 5

    def test_as_scikit_learn_takes_them(self) -> None:
        base = pytest.importorskip("sklearn.base")
        copy = base.clone(LUNetRecommender("best", seed=2, epochs=4))
        assert copy.get_params()["epochs"] == 4


def test_cross_validation_is_of_every_rating_once() -> None:
    frame = latent_frame()
    recommender = LUNetRecommender(**QUICK)
    found = recommender.cross_validate(frame.rename(columns={"rating": "stars"}), 3, rating="stars")
    assert found["fold"].tolist() == [1, 2, 3]
    assert found["test_ratings"].sum() == 1200
    assert (found["mse"] < frame["rating"].var()).all()
    np.testing.assert_allclose(found["rmse"] ** 2, found["mse"])
    pd.testing.assert_frame_equal(recommender.cross_validate(frame, 3), found)
    assert "not trained" in repr(recommender)
    with pytest.raises(ValueError, match="folds must be an integer of at least 2"):
        recommender.cross_validate(frame, 1)
    with pytest.raises(ValueError, match="trained with gamma=0"):
        LUNetRecommender(**QUICK, gamma=0.0).cross_validate(frame, 2)

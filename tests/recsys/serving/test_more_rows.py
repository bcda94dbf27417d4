"""Further ratings in a trained model."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from lunet_fast.recsys.data.ratings import from_frame
from lunet_fast.recsys.serving.recommend import LUNetRecommender
from tests.recsys.synthetic import latent_frame

QUICK: dict[str, Any] = {"members": 1, "embedding_size": 4, "epochs": 2, "batch_size": 128}


def fitted(recipe: str = "best", text_ids: bool = False, **settings: Any) -> LUNetRecommender:
    frame = latent_frame(text_ids=text_ids)
    return LUNetRecommender(recipe, **{**QUICK, "learning_rate": 0.02, **settings}).fit(frame, scale=(1, 5))


def some_rows(model: LUNetRecommender, user: Any, items: list[Any], rating: float) -> pd.DataFrame:
    return pd.DataFrame({"user": [user] * len(items), "item": items, "rating": [rating] * len(items)})


def unseen_items(model: LUNetRecommender, user: int, count: int) -> list[Any]:
    found = model.recommend([user], k=count)["item"].tolist()
    assert len(found) == count
    return found


@pytest.mark.parametrize("settings", [{}, {"gamma": 0.5}, {"recipe": "auto", "strength": 0.7}])
def test_moves_what_the_rows_name_and_nothing_else(settings: dict[str, Any]) -> None:
    model = fitted(**settings)
    before = {name: tensor.clone() for name, tensor in model.trained.model.state_dict().items()}
    items = unseen_items(model, 7, 3)
    assert model.partial_fit(some_rows(model, 7, items, 5.0), epochs=2) is model
    after = model.trained.model.state_dict()
    moved_users, moved_items = torch.tensor([7]), torch.tensor(sorted(items))
    for name, tensor in after.items():
        if name.startswith("interactions."):
            continue
        index = moved_users if name.startswith("user_") else moved_items if name.startswith("item_") else None
        if (
            name in ("user_history.weight", "item_history.weight", "user_feature", "item_feature")
            or index is None
        ):
            assert torch.equal(tensor, before[name]), name
            continue
        rest = torch.ones(len(tensor), dtype=torch.bool)
        rest[index] = False
        assert torch.equal(tensor[rest], before[name][rest]), name
        assert bool((tensor[index] != before[name][index]).all()), name
    # The pairs are known now.
    assert not set(items) & set(model.recommend(7, k=40)["item"])
    assert model.user_counts()[7] == model.trained.model.interactions.user_counts[7]


def test_the_error_on_the_new_rows_falls() -> None:
    model = fitted()
    items = unseen_items(model, 3, 8)
    rows = some_rows(model, 3, items, 1.0)
    before = float(np.mean((model.predict(3, items) - 1) ** 2))
    model.partial_fit(rows, epochs=10)
    assert float(np.mean((model.predict(3, items) - 1) ** 2)) < 0.7 * before


@pytest.mark.parametrize("offset", ["mean", "biases"])
def test_shrunk_means_are_those_of_all_ratings(offset: str) -> None:
    """With the means of the others as they were: of users against a sum over all rows."""
    frame = latent_frame()
    model = fitted(offset=offset, transform="standard")
    old = model.trained.model
    rows = pd.concat([some_rows(model, u, unseen_items(model, u, 4), 5.0) for u in (2, 9)])
    model.partial_fit(rows)
    new, whole = model.trained.model, from_frame(pd.concat([frame, rows]), scale=(1, 5))
    residual = old.transform(whole.rating.double()) - old.mean
    l2 = 10.0
    if offset == "biases":
        residual = residual - old.item_deviation[whole.item]
        l2 = old.config.offset_l2_user
    total = torch.zeros(60, dtype=torch.float64).index_add_(0, whole.user, residual)
    expected = total / (torch.bincount(whole.user, minlength=60) + l2)
    torch.testing.assert_close(new.user_deviation.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("text_ids", [False, True])
def test_a_new_user_starts_as_folded_in_and_the_others_keep_their_places(text_ids: bool) -> None:
    model = fitted(gamma=0.5, text_ids=text_ids)
    frame = latent_frame(text_ids=text_ids)
    users, items = frame["user"][:50], frame["item"][:50]
    # In the order of ids before all others, and so are all indices changed.
    new = "a newcomer" if text_ids else -5
    chosen = list(dict.fromkeys(frame["item"]))[:5]
    rows = some_rows(model, new, chosen, 4.0)
    alone = model.fold_in(dict.fromkeys(chosen, 4.0))._alone.trained.model.user_embedding.weight[0]
    before = model.trained.model
    place = torch.from_numpy(model.users.index(users))
    model.partial_fit(rows)
    after = model.trained.model
    assert model.users.index([new]).tolist() == [0]
    moved = torch.from_numpy(model.users.index(users))
    torch.testing.assert_close(after.user_embedding.weight[moved], before.user_embedding.weight[place])
    assert after.interactions.contains(moved, torch.from_numpy(model.items.index(items))).all()
    # A pass of at least five steps of the rate at most.
    assert float((after.user_embedding.weight[0] - alone).abs().max()) <= 5 * 0.02 * 1.1
    assert not set(chosen) & set(model.recommend(new, k=40)["item"])
    assert len(model.predict(new, chosen)) == 5


def test_a_saved_model_is_the_one_in_memory(tmp_path: Any) -> None:
    model = fitted(gamma=0.5, positive_from=4.0)
    model.partial_fit(some_rows(model, 99, [1, 2, 3], 5.0))
    model.save(tmp_path)
    again = LUNetRecommender.load(tmp_path)
    np.testing.assert_array_equal(again.predict([99, 3], [8, 8]), model.predict([99, 3], [8, 8]))


class TestWhatCannotBe:
    def test_new_items(self) -> None:
        model = fitted()
        with pytest.raises(
            ValueError, match=r"1 items .* such as 400, .*: leave their rows out, or fit\(\) all"
        ):
            model.partial_fit([(1, 400, 3.0)])

    def test_ratings_outside_the_scale(self) -> None:
        with pytest.raises(ValueError, match=r"have the rating 9, and the scale of the model is 1 to 5"):
            fitted().partial_fit([(1, 4, 9.0)])

    def test_levels(self) -> None:
        with pytest.raises(ValueError, match=r"must be among \[1.0, .*: round the new"):
            fitted(loss="ordinal").partial_fit([(1, 4, 3.5)])

    def test_epochs_counts_and_recipe(self) -> None:
        model = fitted()
        with pytest.raises(ValueError, match=r"epochs must be an integer of at least 1, got 0"):
            model.partial_fit([(1, 4, 3.0)], epochs=0)
        with pytest.raises(RuntimeError, match="not trained yet"):
            LUNetRecommender().partial_fit([(1, 4, 3.0)])
        config = model.trained.model.config.replace(gamma=0.5, confidence=1.0)
        model._prepared().trained.model.config = config
        with pytest.raises(ValueError, match=r"confidence=1 is of counts: name their column by weight="):
            model.partial_fit([(1, 4, 3.0)])

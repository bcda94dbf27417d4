from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from lunet_fast.recsys.data.features import side_features
from lunet_fast.recsys.data.ratings import Ratings
from lunet_fast.recsys.model.model_files import load_model, save_model
from lunet_fast.recsys.model.training import train
from tests.recsys.synthetic import latent_ratings, quick_config


def described(seed: int = 0) -> Ratings:
    """Ratings with what is known of their 60 users and 40 items."""
    rng = np.random.default_rng(seed)
    users = pd.DataFrame(
        {
            "age": rng.integers(10, 70, 60),
            "gender": rng.choice(["F", "M"], 60),
            "occupation": rng.choice(["artist", "other", "writer"], 60),
            "zip": [f"{n:05}" for n in range(60)],
        }
    )
    genres = rng.choice(["Action", "Action|Comedy", "Comedy|Drama|War", ""], 40)
    items = pd.DataFrame({"title": [f"film {n}" for n in range(40)], "genres": genres})
    return replace(latent_ratings(), user_info=users, item_info=items)


def test_ones_where_a_value_is_known() -> None:
    ratings = described()
    assert ratings.user_info is not None
    assert ratings.item_info is not None
    users, items = side_features(ratings)
    assert users is not None
    assert items is not None
    assert items.shape == (40, 4)  # Action, Comedy, Drama, War; titles and zip codes are left out
    for row, genres in zip(items, ratings.item_info["genres"], strict=True):
        known = [genre in genres.split("|") for genre in ("Action", "Comedy", "Drama", "War")]
        expected = torch.tensor(known) / max(sum(known), 1) ** 0.5
        torch.testing.assert_close(row, expected.float())
    torch.testing.assert_close(users.square().sum(1), torch.ones(60))
    same = ratings.user_info.groupby(["gender", "occupation"]).indices
    for members in same.values():
        group = np.searchsorted(
            [18, 25, 35, 45, 50, 56], ratings.user_info["age"].to_numpy()[members], "right"
        )
        for one, other in itertools.combinations(range(len(members)), 2):
            equal = bool(group[one] == group[other])
            assert torch.equal(users[members[one]], users[members[other]]) == equal


def test_missing_values_and_missing_tables() -> None:
    ratings = described()
    assert ratings.user_info is not None
    holes = ratings.user_info.assign(age=[None, "x", *ratings.user_info["age"][2:]], gender=None)
    users, _ = side_features(replace(ratings, user_info=holes, item_info=None))
    assert users is not None
    assert bool(torch.isfinite(users).all())
    assert (users[0] > 0).sum() == 1  # the occupation alone
    assert side_features(latent_ratings()) == (None, None)


def test_embedding_adds_the_features_vectors() -> None:
    ratings = described()
    model = train(ratings, quick_config(epochs=1, mlp=False)).trained.model.double()
    bare = train(ratings, quick_config(epochs=1, mlp=False, side_features=False)).trained.model
    assert bare.user_features is None
    pairs = torch.tensor([3, 17]), torch.tensor([5, 30])
    with torch.no_grad():
        with_them = model.embed(*pairs, model.histories(), False)
        without = model.embed(
            *pairs, model.histories()._replace(user_features=None, item_features=None), False
        )
    users, items = side_features(ratings)
    assert users is not None
    assert items is not None
    assert model.user_feature is not None
    assert model.item_feature is not None
    for member in range(2):
        part = slice(4 * member, 4 * member + 4)
        expected = torch.cat(
            (
                users[pairs[0]].double() @ model.user_feature.weight[:, part],
                items[pairs[1]].double() @ model.item_feature.weight[:, part],
            ),
            -1,
        )
        torch.testing.assert_close(with_them[member] - without[member], expected)


def test_survive_saving(tmp_path: Path) -> None:
    trained = train(described(), quick_config(epochs=1, mlp=False)).trained
    save_model(tmp_path / "model.safetensors", trained)
    loaded = load_model(tmp_path / "model.safetensors").model
    pairs = torch.arange(40) % 60, torch.arange(40)
    with torch.no_grad():
        assert torch.equal(loaded(*pairs), trained.model(*pairs))


@pytest.mark.parametrize("side", ["user_info", "item_info"])
def test_one_side_alone(side: str) -> None:
    ratings = replace(described(), **{side: None})
    values = train(ratings, quick_config(epochs=2, mlp=False)).metrics
    assert values["test_mse"] > 0

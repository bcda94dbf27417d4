"""Ratings made from known factors, for tests of what is trained on ratings."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import torch

from lunet_fast.recsys.data.ratings import Ratings, from_frame
from lunet_fast.recsys.model.config import TrainConfig
from lunet_fast.recsys.model.sequence_config import SequenceConfig


def latent_frame(
    users: int = 60, items: int = 40, ratings: int = 1200, seed: int = 0, text_ids: bool = False
) -> pd.DataFrame:
    """Whole ratings from 1 to 5 of distinct pairs: biases and two factors explain most of their variance."""
    rng = np.random.default_rng(seed)
    pairs = rng.permutation(users * items)[:ratings]
    user, item = pairs // items, pairs % items
    score = (
        3.2
        + rng.normal(0, 0.6, users)[user]
        + rng.normal(0, 0.6, items)[item]
        + (rng.normal(0, 0.7, (users, 2))[user] * rng.normal(0, 0.7, (items, 2))[item]).sum(1)
        + rng.normal(0, 0.2, ratings)
    )
    frame = pd.DataFrame({"user": user, "item": item, "rating": np.clip(np.rint(score), 1, 5)})
    if text_ids:
        frame["user"] = [f"user {u} ü" for u in user]
        frame["item"] = [f"item-{i}, vol. 2" for i in item]
    return frame


def latent_ratings(users: int = 60, items: int = 40, ratings: int = 1200, seed: int = 0) -> Ratings:
    """The same as a table."""
    return from_frame(latent_frame(users, items, ratings, seed), scale=(1, 5), name="latent")


def quick_config(**changes: object) -> TrainConfig:
    """Settings with which a training on :func:`latent_ratings` takes well under a second."""
    settings: dict[str, object] = {
        "members": 2,
        "embedding_size": 4,
        "item_history": True,
        "epochs": 4,
        "batch_size": 128,
        "learning_rate": 0.02,
        "net_learning_rate": 0.002,
        "l2_latent": 0.05,
        "dropout": 0.1,
        "mlp_epochs": 3,
        "mlp_embedding_size": 4,
        "mlp_hidden": (8, 6),
    }
    return TrainConfig.from_dict({**settings, **changes})


def cyclic_ratings(users: int = 40, items: int = 30, each: int = 12, seed: int = 0) -> Ratings:
    """Users who step through the items one after the other, from a place of their own; every other user steps
    backwards, which only the order tells."""
    rng = np.random.default_rng(seed)
    start = np.arange(users) * 7 % items
    user = np.repeat(np.arange(users), each)
    step = np.tile(np.arange(each), users)
    frame = pd.DataFrame(
        {
            "user": user,
            "item": (start[user] + step * (1 - 2 * (user % 2))) % items,
            "rating": rng.integers(1, 6, users * each),
            "timestamp": 1_000_000 + user * 1000 + step * 10,
        }
    )
    return from_frame(frame.sample(frac=1, random_state=seed), scale=(1, 5), name="cyclic")


def paused_ratings() -> Ratings:
    """:func:`cyclic_ratings`, the last rating of every user of an even number ten days after the others."""
    ratings = cyclic_ratings()
    assert ratings.timestamp is not None
    time = ratings.timestamp
    latest = torch.zeros(ratings.n_users, dtype=torch.int64).scatter_reduce(0, ratings.user, time, "amax")
    late = (time == latest[ratings.user]) & (ratings.user % 2 == 0)
    return replace(ratings, timestamp=time + 864_000 * late, name="paused")


def quick_sequence_config(**changes: object) -> SequenceConfig:
    """Settings with which a training on :func:`cyclic_ratings` takes well under a second."""
    settings: dict[str, object] = {
        "embedding_size": 8,
        "length": 6,
        "decays": 2,
        "epochs": 4,
        "batch_size": 200,
        "negatives": 100,
        "learning_rate": 0.02,
        "dropout": 0.0,
    }
    return SequenceConfig.from_dict({**settings, **changes})

"""What is known of users and items beside their ratings, as numbers."""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from lunet_fast.recsys.data.ratings import Ratings

AGES = (18, 25, 35, 45, 50, 56)
"""Ages at which a new group begins: ML-1M's own, so that its codes and ML-100K's years mean the same."""


def side_features(ratings: Ratings) -> tuple[Tensor | None, Tensor | None]:
    """(users' ``[n_users, F]``, items' ``[n_items, G]``), float32; None for a side of which nothing is known.

    Of ``user_info`` the columns age, gender and occupation, of ``item_info`` genres, each value a column of
    0 and 1. A row is divided by the root of the number of its ones, so that an item of five genres weighs
    no more than one of one. O((users + items) values).
    """
    users: list[pd.DataFrame] = []
    if ratings.user_info is not None:
        info = ratings.user_info
        if "age" in info.columns:
            age = pd.to_numeric(info["age"], errors="coerce")
            group = np.searchsorted(np.array(AGES), age.to_numpy(dtype=float), side="right")
            users.append(pd.get_dummies(pd.Series(group).mask(age.isna().to_numpy())))
        users += [
            pd.get_dummies(info[name].astype("string")) for name in ("gender", "occupation") if name in info
        ]
    items: list[pd.DataFrame] = []
    if ratings.item_info is not None and "genres" in ratings.item_info.columns:
        genres = ratings.item_info["genres"].fillna("").astype(str)
        items.append(genres.str.get_dummies().drop(columns="", errors="ignore"))
    return _table(users), _table(items)


def _table(parts: list[pd.DataFrame]) -> Tensor | None:
    if not parts or not any(part.shape[1] for part in parts):
        return None
    ones = np.concatenate([part.to_numpy(dtype=np.float32) for part in parts], axis=1)
    return torch.from_numpy(ones / np.sqrt(np.maximum(ones.sum(axis=1, keepdims=True), 1)))

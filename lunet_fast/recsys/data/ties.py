"""Who knows or trusts whom, from a file."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from lunet_fast.recsys.data.ratings import Ratings, Ties, read_table
from lunet_fast.recsys.data.values import weight_values


def with_friends(
    ratings: Ratings,
    file: str | os.PathLike[str],
    *,
    user: str = "user",
    friend: str = "friend",
    weight: str | None = None,
) -> Ratings:
    """``ratings`` with the ties between its users, in ``friends``.

    A row of the file, in the formats of :func:`~.ratings.read_ratings`, says that ``user`` knows or trusts
    ``friend``, by a ``weight`` above 0 where that column is named, else 1; friendship is two rows. Ties of
    users without ratings, and with oneself, are left out. ``RatingFileError`` for a file that is not so, and
    where it knows none of the users.
    """
    table = read_table(Path(file), user=user, friend=friend, weight=weight)
    ends = []
    for role in ("user", "friend"):
        table.refuse_empty(role)
        column = table.columns[role]
        ends.append(ratings.users.index(column.texts)[column.codes])
    kept = (ends[0] >= 0) & (ends[1] >= 0) & (ends[0] != ends[1])
    if not kept.any():
        everybody = range(len(table.columns["user"].texts))
        problem = f"{{text}} and its friend are not both users of {ratings.name}"
        table.fail("user", everybody, problem)
    weights = np.ones(len(kept), np.float32) if weight is None else weight_values(table)
    of_user, of_friend = (torch.from_numpy(end[kept]) for end in ends)
    return replace(ratings, friends=Ties(of_user, of_friend, torch.from_numpy(weights[kept])))

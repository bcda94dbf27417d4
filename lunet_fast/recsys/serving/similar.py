"""Who is like whom, and which of a user's items speak for another one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from lunet_fast.recsys.data.ids import IdMap, listed
from lunet_fast.recsys.model.model_files import TrainedModel
from lunet_fast.recsys.model.scoring import ranking_readout
from lunet_fast.recsys.serving.best_items import Ready, place_in_row
from lunet_fast.recsys.serving.vectors import item_vectors, user_vectors

ROWS = 256
"""Whose similarities to all others are in memory at once."""


def most_similar(ready: Ready, side: str, given: Any, k: int) -> pd.DataFrame:
    """For each of ``given`` the k others of ``side``, ``user`` or ``item``, with the most similar vectors.

    Columns: the side's name, ``rank`` from 1, ``similar`` and ``similarity``, the cosine of the vectors that
    ``lunet-fast export`` writes, less their mean over all with training ratings. Those without any are left
    out; an id without any has no row. O(n K k) each for n users or items.
    """
    trained, model = ready.trained, ready.trained.model
    ids: IdMap = trained.users if side == "user" else trained.items
    counts = model.interactions.user_counts if side == "user" else model.interactions.item_counts
    rated = torch.where(counts > 0)[0]
    make = user_vectors if side == "user" else item_vectors
    vectors = make(model, rated, ready.histories())
    vectors = torch.nn.functional.normalize(vectors - vectors.mean(0), dim=1)
    names = listed(given)
    place = torch.full((len(ids),), -1)
    place[rated] = torch.arange(len(rated))
    index = torch.from_numpy(ids.index(names))
    known = torch.where((index >= 0) & (counts[index.clamp(min=0)] > 0))[0]
    k = min(k, len(rated) - 1)
    rows, others, values = [], [], []
    for some in known.split(ROWS):
        own = place[index[some]]
        cosine = vectors[own] @ vectors.T
        cosine[torch.arange(len(own)), own] = -torch.inf
        best = cosine.topk(k, dim=1)
        rows.append(some.repeat_interleave(k))
        others.append(rated[best.indices].flatten())
        values.append(best.values.flatten())
    row, other, value = (_joined(parts) for parts in (rows, others, values))
    return pd.DataFrame(
        {
            side: pd.Series(np.array(names, dtype=object)[row], dtype=object).infer_objects(),
            "rank": place_in_row(row) + 1,
            "similar": pd.Series(ids.ids[other], dtype=ids.ids.dtype).infer_objects(),
            "similarity": value,
        }
    )


def _joined(parts: list[Tensor]) -> Any:
    return torch.cat(parts).numpy() if parts else np.empty(0, dtype=np.int64)


@torch.no_grad()
def reasons(ready: Ready, user: Any, item: Any, k: int) -> pd.DataFrame:
    """The k items of a user's history whose absence would lower the score of ``item`` most.

    Columns ``item`` and ``effect``: the score that ranks, a rating before it is clipped or a logit, less that
    with the one item left out of the user's history; the user's own vector and bias stay. ``ValueError`` for
    an id without training ratings and for a model without ``user_history``. O(K (n k + n M D²)) for n items.
    """
    trained, model = ready.trained, ready.trained.model
    u, i = _known(trained, "user", user), _known(trained, "item", item)
    if model.user_history is None:
        raise ValueError("this model has no history of users to explain by: train with user_history=True")
    seen, histories = model.interactions, ready.histories()
    _, others = seen.of_users(torch.tensor([u]))
    others = others[others != i]
    pair = torch.tensor([u]), torch.tensor([i])
    size, members = model.config.embedding_size, model.config.members
    x = model.embed(*pair, histories, None)
    sums = histories.user
    assert sums is not None
    own = bool(seen.contains(*pair))
    left = sums[u] - (model.user_history(pair[1])[0] if own else 0)
    count = int(seen.user_counts[u]) - own
    power = model.config.history_power
    before = left * max(count, 1) ** -power
    after = (left - model.user_history(others)) * max(count - 1, 1) ** -power
    change = (after - before).unflatten(-1, (members, size)).transpose(0, 1)
    without = x.expand(-1, len(others), -1).clone()
    without[..., :size] += change
    both = torch.cat((x, without), dim=1)
    score = _read(model, both, *(side.expand(both.shape[1]) for side in pair))
    effect = (score[0] - score[1:]).numpy()
    best = np.argsort(-effect, kind="stable")[:k]
    ids = trained.items.ids
    shown = pd.Series(ids[others.numpy()[best]], dtype=ids.dtype).infer_objects()
    return pd.DataFrame({"item": shown, "effect": effect[best]})


def _read(model: Any, x: Tensor, users: Tensor, items: Tensor) -> Tensor:
    """The score that ranks, ``[B]``, of inputs x ``[K, B, D]``."""
    output = model.read(x, model.network(x), users, items)
    if ranking_readout(model) == "interaction":
        result: Tensor = output.logit.mean(0)
    else:
        result = model.rating(output.score.mean(0))
    return result


def _known(trained: TrainedModel, side: str, given: Any) -> int:
    ids = trained.users if side == "user" else trained.items
    counts = trained.model.interactions
    found = ids.index(given)
    if len(found) != 1:
        raise ValueError(f"{side}={given!r} must be one id")
    rated = counts.user_counts if side == "user" else counts.item_counts
    if found[0] < 0 or rated[found[0]] == 0:
        raise ValueError(f"{side}={given!r} has no rating in the training data")
    return int(found[0])

"""The vectors of users and items: the halves of the network's input that no pair changes."""

from __future__ import annotations

import torch
from torch import Tensor

from lunet_fast.recsys.model.embeddings import Histories
from lunet_fast.recsys.model.network import RatingModel


def user_vectors(model: RatingModel, users: Tensor, histories: Histories | None = None) -> Tensor:
    """The vectors ``[N, K k]`` of ``users``, int64 ``[N]``; float32. O(N K k), after ``model.histories()``
    where ``histories`` is not given."""
    return _halves(model, users, torch.zeros_like(users), histories, item=False)


def item_vectors(model: RatingModel, items: Tensor, histories: Histories | None = None) -> Tensor:
    """The vectors ``[N, K k]`` of ``items``, int64 ``[N]``; as :func:`user_vectors`."""
    return _halves(model, torch.zeros_like(items), items, histories, item=True)


@torch.no_grad()
def _halves(
    model: RatingModel, users: Tensor, items: Tensor, histories: Histories | None, *, item: bool
) -> Tensor:
    histories = model.histories() if histories is None else histories
    # With no pair taken for a training rating, one half does not depend on the other: any index does there.
    x = model.embed(users, items, histories, False)
    k = model.config.embedding_size
    half = x[..., k:] if item else x[..., :k]
    return half.transpose(0, 1).flatten(1)

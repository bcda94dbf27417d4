"""The network's input: x = [user's half; item's half], each half a sum of sources.

The sources of a half are the identity (an embedding), the history (a second embedding, summed over what the
user rated, or who rated the item) and the side features.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lunet_fast.recsys.model.config import TrainConfig
from lunet_fast.recsys.model.interactions import Interactions
from lunet_fast.training.distributed import Workers
from lunet_fast.training.sharding import draw_own_rows_


class Histories(NamedTuple):
    """What :meth:`Embeddings.histories` computes for all users and items at once; None for what is not."""

    user: Tensor | None
    """``[n_users, K k]``: sums of the vectors of each user's items."""
    item: Tensor | None
    """``[n_items, K k]``: sums of the vectors of each item's users."""
    user_features: Tensor | None = None
    """``[n_users, K k]``: what the side features add to each user's half."""
    item_features: Tensor | None = None
    """``[n_items, K k]``"""


class Embeddings(nn.Module):
    """The tables of a recommender, and x of pairs of user and item; the part of ``RatingModel`` before f.

    The vectors of K members lie side by side in a table, and apart in x. A subclass sets ``config`` and
    ``interactions``, then calls :meth:`_build_tables`, and :meth:`_draw_tables` once all else is built.
    """

    config: TrainConfig
    interactions: Interactions
    user_features: Tensor | None
    item_features: Tensor | None

    def _build_tables(
        self, user_features: Tensor | None, item_features: Tensor | None, workers: Workers | None
    ) -> None:
        """With ``workers`` the tables of users and items have this process's rows alone."""
        config, n_users, n_items = self.config, self.interactions.n_users, self.interactions.n_items
        width = config.members * config.embedding_size
        self.user_embedding = _table(n_users, width, workers)
        self.item_embedding = _table(n_items, width, workers)
        # One vector for each item as part of a user's history, and the other way round.
        self.user_history = nn.Embedding(n_items, width) if config.user_history else None
        self.item_history = nn.Embedding(n_users, width) if config.item_history else None
        self.register_buffer("user_features", user_features)
        self.register_buffer("item_features", item_features)
        # One vector for each feature, as many as the buffer has columns.
        self.user_feature = None if user_features is None else nn.Embedding(user_features.shape[1], width)
        self.item_feature = None if item_features is None else nn.Embedding(item_features.shape[1], width)

    def _draw_tables(self, workers: Workers | None) -> None:
        """The first values of all tables, normal with the standard deviation of the settings."""
        std = self.config.embedding_std
        with torch.no_grad():
            if workers is None:
                for table in self.tables():
                    table.weight.normal_(std=std)
            else:
                counts = self.interactions.n_users, self.interactions.n_items
                for table, rows in zip((self.user_embedding, self.item_embedding), counts, strict=True):
                    draw_own_rows_(table.weight, rows, std, workers)

    def tables(self) -> list[nn.Embedding]:
        """The embedding tables, each ``[users, items or features, K k]``."""
        tables = (self.user_embedding, self.item_embedding, self.user_history, self.item_history)
        features = (self.user_feature, self.item_feature)
        return [table for table in (*tables, *features) if table is not None]

    def tables_of_users(self) -> list[nn.Embedding]:
        """Those whose sum is the users' halves: of the users themselves, their histories, their features."""
        tables = (self.user_embedding, self.user_history, self.user_feature)
        return [table for table in tables if table is not None]

    def tables_of_items(self) -> list[nn.Embedding]:
        """The same of the items."""
        tables = (self.item_embedding, self.item_history, self.item_feature)
        return [table for table in tables if table is not None]

    def histories(self) -> Histories:
        """The sums over all histories and features: compute them once for many passes without a change.

        O(K k (nnz + users F + items G)).
        """
        user = item = None
        if self.user_history is not None:
            user = self.interactions.sum_over_items(self.user_history.weight)
        if self.item_history is not None:
            item = self.interactions.sum_over_users(self.item_history.weight)
        features = (
            (self.user_features, self.user_feature),
            (self.item_features, self.item_feature),
        )
        return Histories(
            user,
            item,
            *(None if t is None or values is None else values @ t.weight for values, t in features),
        )

    def embed(
        self, users: Tensor, items: Tensor, histories: Histories, observed: bool | Tensor | None
    ) -> Tensor:
        """x ``[K, B, D]``, the network's input: the user's half, then the item's.

        ``observed`` says of the pairs, of all or bool ``[B]``, whether they are training ratings, whose own
        entry is left out of both histories; None looks each up. Without a pair's own entry the user's half
        does not depend on the item, nor the item's on the user.
        """
        seen = self.interactions
        own = seen.contains(users, items) if observed is None else observed
        user, item = self.user_embedding(users), self.item_embedding(items)
        if histories.user_features is not None:
            user = user + F.embedding(users, histories.user_features)
        if histories.item_features is not None:
            item = item + F.embedding(items, histories.item_features)
        if self.user_history is not None and histories.user is not None:
            entry = self.user_history(items)
            user = user + self._history(histories.user, users, entry, own, seen.user_counts)
        if self.item_history is not None and histories.item is not None:
            entry = self.item_history(users)
            item = item + self._history(histories.item, items, entry, own, seen.item_counts)
        members = self.config.members
        x = torch.cat([half.unflatten(-1, (members, -1)) for half in (user, item)], dim=-1)
        return x.transpose(0, 1)

    def _history(
        self, sums: Tensor, rows: Tensor, entry: Tensor, own: Tensor | bool, counts: Tensor
    ) -> Tensor:
        """Normalised histories ``[B, K k]`` of the rows, less the pair's own entry where it has one."""
        rest, count = F.embedding(rows, sums), counts[rows]
        if isinstance(own, Tensor):
            rest, count = rest - entry * own.unsqueeze(-1), count - own.long()
        elif own:
            rest, count = rest - entry, count - 1
        scale = count.clamp(min=1).to(sums.dtype).pow(-self.config.history_power)
        return rest * scale.unsqueeze(-1)


def _table(rows: int, width: int, workers: Workers | None) -> nn.Embedding:
    """A table with PyTorch's initial values, or this process's rows of it."""
    if workers is None:
        return nn.Embedding(rows, width)
    own = torch.empty(len(range(workers.rank, rows, workers.world_size)), width)
    draw_own_rows_(own, rows, 1.0, workers)
    return nn.Embedding(len(own), width, _weight=own)

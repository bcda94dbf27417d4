"""What a model that reads sequences knows of users and items beside the sequences."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from lunet_fast.recsys.data.features import side_features
from lunet_fast.recsys.data.ratings import Ratings
from lunet_fast.recsys.model.interactions import Interactions, runs
from lunet_fast.recsys.model.sequence_config import SequenceConfig


class Bags(NamedTuple):
    """Items with weights, those of B users one after the other."""

    items: Tensor
    """int64 ``[E]``"""
    weights: Tensor
    """float32 ``[E]``"""
    counts: Tensor
    """int64 ``[B]``"""


class SideOfUsers(NamedTuple):
    """Of B users; zeros and no items for those who are not in training."""

    features: Tensor | None
    """float32 ``[B, F]``"""
    friends: Bags | None
    """What a user's friends have chosen."""


NO_SIDE = SideOfUsers(None, None)

TABLES = ("item_features", "item_text", "user_features", "friends_indptr", "friends_items", "friends_weights")


class Side(nn.Module):
    """Buffers, all saved, None where nothing is known or asked for.

    ``item_features`` float32 ``[n_items, G]``, ``item_text`` float32 ``[n_items, T]``, ``user_features``
    float32 ``[n_users, F]``; the bags of friends' items ``friends_indptr`` int64 ``[n_users + 1]``,
    ``friends_items`` int32 ``[E]``, ``friends_weights`` float32 ``[E]``.
    """

    item_features: Tensor | None
    item_text: Tensor | None
    user_features: Tensor | None
    friends_indptr: Tensor | None
    friends_items: Tensor | None
    friends_weights: Tensor | None

    def __init__(self, **tables: Tensor) -> None:
        super().__init__()
        for name in TABLES:
            self.register_buffer(name, tables.get(name))

    @classmethod
    def of(cls, training: Ratings, config: SequenceConfig) -> Side:
        """What ``config`` asks for; ``ValueError`` where ``training`` does not have it."""
        tables: dict[str, Tensor | None] = {}
        if config.side_features:
            tables["user_features"], tables["item_features"] = side_features(training)
            if tables["user_features"] is None and tables["item_features"] is None:
                raise ValueError(f"side_features=True: {training.name} has no features of users or items")
        if config.text:
            tables["item_text"] = training.item_text
            if training.item_text is None:
                raise ValueError(
                    f"text=True: {training.name} has no texts: read them with with_text(ratings, FILE)"
                )
        if config.confidence and training.weight is None:
            raise ValueError(
                f"confidence={config.confidence:g}: {training.name} has no weights: name their column with "
                "weight=..."
            )
        if config.social:
            tables |= _friends_items(training)
        return cls(**{name: table for name, table in tables.items() if table is not None})

    @classmethod
    def from_state(cls, state: dict[str, Tensor], n_users: int, n_items: int) -> Side:
        """From the saved buffers; ``ValueError`` where they are not of these users and items."""
        for name, table in state.items():
            if name not in TABLES:
                raise ValueError(f"side: {name!r} is too many")
            rows = {"item": n_items, "user": n_users}.get(name.split("_")[0])
            fits = rows is None or (
                table.ndim == 2
                and table.dtype == torch.float32
                and table.shape[0] == rows
                and table.shape[1] > 0
            )
            if not fits or (table.is_floating_point() and not bool(torch.isfinite(table).all())):
                raise ValueError(f"side: {name} is not that of {n_users} users and {n_items} items")
        bags = [state.get(f"friends_{name}") for name in ("indptr", "items", "weights")]
        if any(table is not None for table in bags) and not _are_bags(bags, n_users, n_items):
            raise ValueError("side: the tensors of friends do not fit")
        return cls(**state)

    @property
    def describes_items(self) -> bool:
        """Whether an item that nobody has chosen is told from others."""
        return self.item_features is not None or self.item_text is not None

    def of_users(self, users: Tensor) -> SideOfUsers:
        """Of ``users``, int64 ``[B]``, -1 for somebody unknown."""
        known = users >= 0
        place = users.clamp(min=0)
        features = friends = None
        if self.user_features is not None:
            features = self.user_features[place] * known.unsqueeze(1)
        if self.friends_indptr is not None:
            assert self.friends_items is not None
            assert self.friends_weights is not None
            first = self.friends_indptr[place]
            counts = (self.friends_indptr[place + 1] - first) * known
            row, inside = runs(counts)
            spot = first[row] + inside
            friends = Bags(self.friends_items[spot].long(), self.friends_weights[spot], counts)
        return SideOfUsers(features, friends)


def _are_bags(bags: list[Tensor | None], n_users: int, n_items: int) -> bool:
    kinds = (torch.int64, torch.int32, torch.float32)
    for table, kind in zip(bags, kinds, strict=True):
        if table is None or table.ndim != 1 or table.dtype != kind:
            return False
    indptr, items, weights = (table for table in bags if table is not None)
    return (
        len(indptr) == n_users + 1
        and int(indptr[0]) == 0
        and bool((indptr.diff() >= 0).all())
        and int(indptr[-1]) == len(items) == len(weights)
        and bool(((items >= 0) & (items < n_items)).all())
    )


def _friends_items(training: Ratings) -> dict[str, Tensor | None]:
    """The bags of what each user's friends have chosen in training.

    The weight of item i for user u is the sum over the friends v who chose it of w_uv / sqrt(n_v), over the
    root of the sum of w_uv², w being the weights of the ties and n_v the friend's number of items. A user's
    own choices are in no bag of its own. O(sum over ties of n_v).
    """
    ties = training.friends
    if ties is None:
        raise ValueError(
            f"social=True: {training.name} has no ties between users: read them with "
            "with_friends(ratings, FILE)"
        )
    seen = Interactions(training.user, training.item, training.n_users, training.n_items)
    counts = seen.user_counts[ties.friend]
    tie, item = seen.of_users(ties.friend)
    norm = torch.zeros(training.n_users).index_add_(0, ties.user, ties.weight.square())
    weight = ties.weight / norm[ties.user].clamp(min=1e-12).sqrt()
    weight = (weight / counts.clamp(min=1).sqrt())[tie]
    pair, where = torch.unique(ties.user[tie] * training.n_items + item, return_inverse=True)
    total = torch.zeros(len(pair)).index_add_(0, where, weight)
    users = torch.bincount(pair // training.n_items, minlength=training.n_users)
    return {
        "friends_indptr": torch.cat((users.new_zeros(1), users.cumsum(0))),
        "friends_items": (pair % training.n_items).int(),
        "friends_weights": total,
    }

"""Who chose what, in which order: the training part of a model that reads sequences."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from lunet_fast.recsys.data.order import GAPS, by_time, gap_classes
from lunet_fast.recsys.data.ratings import Ratings
from lunet_fast.recsys.model.interactions import Interactions

MOST_LEVELS = 20
"""Different ratings that each have a vector; more are put into as many classes of equal size."""


class Windows(NamedTuple):
    """B stretches of S or fewer neighbouring entries of sequences, and what was before each.

    What stands after the end of a shorter stretch is any item: it has no influence on what is before.
    """

    items: Tensor
    """int64 ``[B, S]``"""
    levels: Tensor
    """int64 ``[B, S]``, the class of the rating."""
    gaps: Tensor
    """int64 ``[B, S]``, the class of the time since the entry before."""
    lengths: Tensor
    """int64 ``[B]``"""
    earlier: Tensor
    """int64 ``[E]``, the items before the stretches, one stretch's after the other's."""
    earlier_counts: Tensor
    """int64 ``[B]``, how many of them are whose."""


class Sequences(nn.Module):
    """The entries of each user in order of time, one user after the other.

    Buffers, all saved: ``indptr`` int64 ``[n_users + 1]``; of the entries ``items`` int32, ``levels`` and
    ``gaps`` uint8; ``bounds`` float32 ``[levels - 1]``, ascending, between the classes of ratings.
    """

    indptr: Tensor
    items: Tensor
    levels: Tensor
    gaps: Tensor
    bounds: Tensor

    def __init__(
        self, indptr: Tensor, items: Tensor, levels: Tensor, gaps: Tensor, bounds: Tensor, n_items: int
    ) -> None:
        super().__init__()
        self.n_items = n_items
        for name, tensor in {
            "indptr": indptr,
            "items": items,
            "levels": levels,
            "gaps": gaps,
            "bounds": bounds,
        }.items():
            self.register_buffer(name, tensor)
        counts = torch.bincount(items.long(), minlength=n_items)
        self.register_buffer("item_counts", counts, persistent=False)

    item_counts: Tensor

    @classmethod
    def of(cls, ratings: Ratings, seed: int) -> Sequences:
        """Those of a table of ratings; entries that tie in time are in an order drawn by the seed."""
        order = by_time(ratings, seed)
        user = ratings.user.cpu().numpy()[order]
        time = np.zeros(len(order), np.int64)
        if ratings.timestamp is not None:
            time = ratings.timestamp.cpu().numpy()[order]
        rows = torch.from_numpy(order)
        rating = ratings.rating.cpu()[rows]
        bounds = _bounds(rating)
        counts = torch.bincount(torch.from_numpy(user), minlength=ratings.n_users)
        return cls(
            torch.cat((counts.new_zeros(1), counts.cumsum(0))),
            ratings.item.cpu()[rows].int(),
            torch.bucketize(rating, bounds, right=True).to(torch.uint8),
            torch.from_numpy(gap_classes(user, time)),
            bounds,
            ratings.n_items,
        )

    @classmethod
    def from_state(cls, state: dict[str, Tensor], n_users: int, n_items: int) -> Sequences:
        """From the saved buffers; ``ValueError`` where they are not sequences of these users and items."""
        kinds = {
            "indptr": torch.int64,
            "items": torch.int32,
            "levels": torch.uint8,
            "gaps": torch.uint8,
            "bounds": torch.float32,
        }
        for name, kind in kinds.items():
            tensor = state.get(name)
            if tensor is None or tensor.ndim != 1 or tensor.dtype != kind:
                raise ValueError(f"sequences: {name} must be there, {kind} in one dimension")
        indptr, items, levels, gaps, bounds = (state[name] for name in kinds)
        fit = (
            len(indptr) == n_users + 1
            and int(indptr[0]) == 0
            and bool((indptr.diff() >= 0).all())
            and int(indptr[-1]) == len(items) == len(levels) == len(gaps)
            and bool(((items >= 0) & (items < n_items)).all())
            and len(bounds) < MOST_LEVELS
            and bool((bounds.diff() > 0).all())
            and bool((levels <= len(bounds)).all())
            and bool((gaps < GAPS).all())
        )
        if not fit:
            raise ValueError(f"sequences: the tensors are not those of {n_users} users and {n_items} items")
        return cls(indptr, items, levels, gaps, bounds, n_items)

    @property
    def n_users(self) -> int:
        return len(self.indptr) - 1

    @property
    def n_levels(self) -> int:
        return len(self.bounds) + 1

    @property
    def user_counts(self) -> Tensor:
        """int64 ``[n_users]``"""
        return self.indptr.diff()

    def interactions(self) -> Interactions:
        """The pairs, without their order."""
        users = torch.repeat_interleave(torch.arange(self.n_users), self.user_counts)
        return Interactions(users, self.items.long(), self.n_users, self.n_items)

    def windows(self, users: Tensor, start: Tensor, stop: Tensor) -> Windows:
        """Entries ``start`` to ``stop``, the latter excluded, of each of ``users``; all int64 ``[B]``."""
        first, lengths = self.indptr[users], stop - start
        steps = int(lengths.max()) if len(users) else 0
        # After the end of one sequence stands another, and after the end of all the last entry.
        place = (first + start).unsqueeze(1) + torch.arange(steps, device=users.device)
        place = place.clamp_(max=max(len(self.items) - 1, 0))
        row = torch.repeat_interleave(torch.arange(len(users), device=users.device), start)
        before = torch.arange(len(row), device=users.device) - (start.cumsum(0) - start)[row]
        return Windows(
            self.items[place].long(),
            self.levels[place].long(),
            self.gaps[place].long(),
            lengths,
            self.items[first[row] + before].long(),
            start,
        )

    def after_each(self, users: Tensor, start: Tensor, stop: Tensor) -> Tensor:
        """The items ``[T]`` that follow the entries of these windows, one window after the other."""
        lengths = stop - start
        row = torch.repeat_interleave(torch.arange(len(users), device=users.device), lengths)
        inside = torch.arange(len(row), device=users.device) - (lengths.cumsum(0) - lengths)[row]
        return self.items[self.indptr[users][row] + start[row] + inside + 1].long()

    def last(self, users: Tensor, length: int) -> Windows:
        """The last ``length`` entries of each of ``users``, int64 ``[B]``, or all where there are fewer."""
        counts = self.indptr[users + 1] - self.indptr[users]
        return self.windows(users, (counts - length).clamp(min=0), counts)


def _bounds(rating: Tensor) -> Tensor:
    """Between every two different ratings; where there are too many, between classes of equal size."""
    values = torch.unique(rating)
    if len(values) <= MOST_LEVELS:
        return (values[1:] + values[:-1]) / 2
    share = torch.arange(1, MOST_LEVELS, dtype=torch.float64) / MOST_LEVELS
    sorted_ = rating.sort().values
    return torch.unique(sorted_[(share * len(sorted_)).long()])

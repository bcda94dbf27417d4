"""Who chose what, in which order: the training part of a model that reads sequences."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from lunet_fast.recsys.data.order import ELAPSED, GAPS, by_time, gap_classes, time_keys
from lunet_fast.recsys.data.ratings import Ratings
from lunet_fast.recsys.model.interactions import Interactions, runs
from lunet_fast.recsys.model.side import NO_SIDE, SideOfUsers

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
    elapsed: Tensor
    """int64 ``[B, S]``, by :data:`~lunet_fast.recsys.data.order.ELAPSED`: the time from an entry to the next
    one, and from the last one of all to the request."""
    lengths: Tensor
    """int64 ``[B]``"""
    earlier: Tensor
    """int64 ``[E]``, the items before the stretches, one stretch's after the other's."""
    earlier_counts: Tensor
    """int64 ``[B]``, how many of them are whose."""
    users: Tensor
    """int64 ``[B]``, -1 for somebody who is not in training."""
    side: SideOfUsers
    """What is known of the users beside their entries."""


class Sequences(nn.Module):
    """The entries of each user in order of time, one user after the other.

    Buffers, all saved: ``indptr`` int64 ``[n_users + 1]``; of the entries ``items`` int32, ``levels`` and
    ``gaps`` uint8; ``bounds`` float32 ``[levels - 1]``, ascending, between the classes of ratings; ``latest``
    int64 ``[n_users]``, the time of a user's last entry, 0 where unknown.
    """

    indptr: Tensor
    items: Tensor
    levels: Tensor
    gaps: Tensor
    bounds: Tensor
    latest: Tensor

    def __init__(
        self,
        indptr: Tensor,
        items: Tensor,
        levels: Tensor,
        gaps: Tensor,
        bounds: Tensor,
        latest: Tensor,
        n_items: int,
    ) -> None:
        super().__init__()
        self.n_items = n_items
        for name, tensor in {
            "indptr": indptr,
            "items": items,
            "levels": levels,
            "gaps": gaps,
            "bounds": bounds,
            "latest": latest,
        }.items():
            self.register_buffer(name, tensor)
        counts = torch.bincount(items.long(), minlength=n_items)
        self.register_buffer("item_counts", counts, persistent=False)
        self.register_buffer("log_weights", None, persistent=False)
        self.register_buffer("untimed", None, persistent=False)

    item_counts: Tensor
    untimed: Tensor | None
    """int32 of the entries, ascending, equal where neither time nor place says which was first; for training,
    and not saved."""
    log_weights: Tensor | None
    """float32, of the entries, log(1 + w / the median) where they have weights; for training, and not saved.
    """

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
        bounds = between_levels(rating)
        counts = torch.bincount(torch.from_numpy(user), minlength=ratings.n_users)
        ends = counts.cumsum(0)
        last = torch.from_numpy(time)[(ends - 1).clamp(min=0)] if len(time) else torch.zeros_like(ends)
        found = cls(
            torch.cat((counts.new_zeros(1), ends)),
            ratings.item.cpu()[rows].int(),
            torch.bucketize(rating, bounds, right=True).to(torch.uint8),
            torch.from_numpy(gap_classes(user, time)),
            bounds,
            last * (counts > 0),
            ratings.n_items,
        )
        if ratings.weight is not None:
            weight = ratings.weight.cpu()[rows]
            found.log_weights = torch.log1p(weight / weight.median())
        place, known = (key[order] for key in time_keys(ratings))
        tied = (user[1:] == user[:-1]) & (place[1:] == place[:-1]) & (known[1:] == 0) & (known[:-1] == 0)
        if tied.any():
            found.untimed = torch.from_numpy(np.insert(~tied, 0, False).cumsum(dtype=np.int32))
        return found

    def drawn_anew(self, generator: torch.Generator) -> Sequences:
        """The same with what has no time in an order drawn by the generator; itself where all have times.

        O(n log n). So training reads the same choices in another order each epoch, and learns none by heart.
        """
        if self.untimed is None:
            return self
        device = self.untimed.device
        draw = torch.rand(len(self.untimed), generator=generator, device=device, dtype=torch.float64)
        order = torch.argsort(self.untimed + draw)
        tensors = self.indptr, self.items[order], self.levels[order], self.gaps, self.bounds, self.latest
        found = Sequences(*tensors, self.n_items)
        found.untimed = self.untimed
        found.log_weights = None if self.log_weights is None else self.log_weights[order]
        return found

    @classmethod
    def from_state(cls, state: dict[str, Tensor], n_users: int, n_items: int) -> Sequences:
        """From the saved buffers; ``ValueError`` where they are not sequences of these users and items."""
        kinds = {
            "indptr": torch.int64,
            "items": torch.int32,
            "levels": torch.uint8,
            "gaps": torch.uint8,
            "bounds": torch.float32,
            "latest": torch.int64,
        }
        for name, kind in kinds.items():
            tensor = state.get(name)
            if tensor is None or tensor.ndim != 1 or tensor.dtype != kind:
                raise ValueError(f"sequences: {name} must be there, {kind} in one dimension")
        indptr, items, levels, gaps, bounds, latest = (state[name] for name in kinds)
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
            and len(latest) == n_users
        )
        if not fit:
            raise ValueError(f"sequences: the tensors are not those of {n_users} users and {n_items} items")
        return cls(indptr, items, levels, gaps, bounds, latest, n_items)

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

    def windows(self, users: Tensor, start: Tensor, stop: Tensor, elapsed: Tensor | None = None) -> Windows:
        """Entries ``start`` to ``stop``, the latter excluded, of each of ``users``; all int64 ``[B]``.

        ``elapsed``, int64 ``[B]``, is the class of the time from a user's last entry to the request, where it
        is known.
        """
        first, lengths = self.indptr[users], stop - start
        steps = int(lengths.max()) if len(users) else 0
        # After the end of one sequence stands another, and after the end of all the last entry.
        place = (first + start).unsqueeze(1) + torch.arange(steps, device=users.device)
        end = max(len(self.items) - 1, 0)
        place = place.clamp_(max=end)
        row, before = runs(start)
        return Windows(
            self.items[place].long(),
            self.levels[place].long(),
            self.gaps[place].long(),
            self._elapsed(users, place, elapsed),
            lengths,
            self.items[first[row] + before].long(),
            start,
            users,
            NO_SIDE,
        )

    def _elapsed(self, users: Tensor, place: Tensor, request: Tensor | None) -> Tensor:
        """The classes from the entries ``place`` ``[B, S]`` to their next ones."""
        table = torch.tensor(ELAPSED, device=place.device)
        found = table[self.gaps[(place + 1).clamp(max=max(len(self.items) - 1, 0))].long()]
        last = place == self.indptr[users + 1].unsqueeze(1) - 1
        asked = torch.zeros_like(users) if request is None else request
        return torch.where(last, asked.unsqueeze(1), found)

    def after_each(self, users: Tensor, start: Tensor, stop: Tensor) -> Tensor:
        """The items ``[T]`` that follow the entries of these windows, one window after the other."""
        return self.items[self._following(users, start, stop)].long()

    def _following(self, users: Tensor, start: Tensor, stop: Tensor) -> Tensor:
        """The places of those entries."""
        row, inside = runs(stop - start)
        return self.indptr[users][row] + start[row] + inside + 1

    def confidence(self, users: Tensor, start: Tensor, stop: Tensor, share: float) -> Tensor | None:
        """Weights ``[T]`` of the items of :meth:`after_each`, 1 in the mean of all; None for 1 each."""
        if self.log_weights is None or not share:
            return None
        logs = self.log_weights[self._following(users, start, stop)]
        return (1 + share * logs) / (1 + share * self.log_weights.mean())

    def last(self, users: Tensor, length: int, elapsed: Tensor | None = None) -> Windows:
        """The last ``length`` entries of each of ``users``, int64 ``[B]``, or all where there are fewer.

        ``elapsed`` as for :meth:`windows`.
        """
        counts = self.indptr[users + 1] - self.indptr[users]
        return self.windows(users, (counts - length).clamp(min=0), counts, elapsed)


def between_levels(rating: Tensor, most: int = MOST_LEVELS) -> Tensor:
    """Ascending, between each two different ratings; of more than ``most``, between classes of equal size."""
    values = torch.unique(rating)
    if len(values) <= most:
        return (values[1:] + values[:-1]) / 2
    share = torch.arange(1, most, dtype=torch.float64) / most
    sorted_ = rating.sort().values
    return torch.unique(sorted_[(share * len(sorted_)).long()])

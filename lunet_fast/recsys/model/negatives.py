"""Pairs without interaction, Y- of (2.13), drawn while training."""

from __future__ import annotations

import torch
from torch import Tensor

from lunet_fast.recsys.model.network import RatingModel

ROUNDS = 20
"""Draws of a pair before the items that are left for its user are listed."""

POPULARITY_POWER = 0.75
"""Of an item's count, with ``negative_sampling`` ``popularity``."""


class NegativeSampler:
    """Draws items that a user has no interaction with.

    ``known`` are the pairs that are never drawn, as ``user * n_items + item``: int64, sorted and unique.
    ``weights``, ``[n_items]``, are proportional to the probability of each item; None draws uniformly.
    ``ValueError`` where a user has every item.
    """

    def __init__(self, known: Tensor, n_items: int, weights: Tensor | None = None) -> None:
        counts = torch.bincount(torch.div(known, n_items, rounding_mode="floor"))
        if len(counts) and int(counts.max()) >= n_items:
            raise ValueError(
                f"a user has interactions with all {n_items} items, which leaves none to learn from: leave "
                "such users out, or train with gamma=1"
            )
        self.known, self.n_items, self.weights = known, n_items, weights

    @classmethod
    def of(cls, model: RatingModel, known: Tensor) -> NegativeSampler:
        """As the model's settings say. ``known``, int64, are the pairs of all parts of the data.

        They are left out with ``negatives_outside`` ``known``, the training pairs alone with ``training``.
        """
        config, interactions = model.config, model.interactions
        pairs = interactions.pairs
        if config.negatives_outside == "known":
            pairs = torch.unique(torch.cat((pairs, known)))
        weights = None
        if config.negative_sampling == "popularity":
            # An item that nobody chose can be drawn as well, if seldom.
            weights = (interactions.item_counts.double() + 1).pow(POPULARITY_POWER)
        return cls(pairs, interactions.n_items, weights)

    def draw(self, users: Tensor, count: int, generator: torch.Generator) -> Tensor:
        """Items ``[B, count]`` for ``users`` ``[B]``, both int64: independent draws, so one may come twice.

        Expected O(B count log pairs) where users have a small share of the items.
        """
        rows = users.repeat_interleave(count)
        items = self._items(len(rows), generator)
        for _ in range(ROUNDS):
            taken = self._is_known(rows, items).nonzero().squeeze(1)
            if not len(taken):
                return items.view(-1, count)
            items[taken] = self._items(len(taken), generator)
        for place in self._is_known(rows, items).nonzero().squeeze(1).tolist():
            items[place] = self._one_left(rows[place], generator)
        return items.view(-1, count)

    def _items(self, count: int, generator: torch.Generator) -> Tensor:
        if self.weights is not None:
            return torch.multinomial(self.weights, count, replacement=True, generator=generator)
        return torch.randint(self.n_items, (count,), generator=generator, device=self.known.device)

    def _is_known(self, users: Tensor, items: Tensor) -> Tensor:
        if not len(self.known):
            return torch.zeros_like(items, dtype=torch.bool)
        wanted = users * self.n_items + items
        place = torch.searchsorted(self.known, wanted).clamp_(max=len(self.known) - 1)
        return self.known[place] == wanted

    def _one_left(self, user: Tensor, generator: torch.Generator) -> Tensor:
        every = torch.arange(self.n_items, device=self.known.device)
        left = every[~self._is_known(user.expand_as(every), every)]
        weights = torch.ones(len(left), dtype=torch.float64, device=left.device)
        if self.weights is not None:
            weights = self.weights[left]
        return left[torch.multinomial(weights, 1, generator=generator)].squeeze()

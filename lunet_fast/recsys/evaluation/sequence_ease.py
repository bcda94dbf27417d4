"""A linear method that reads order, in closed form: the next item from recency-weighted histories."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from lunet_fast.recsys.data.ratings import Ratings
from lunet_fast.recsys.evaluation.fitted import Fitted
from lunet_fast.recsys.evaluation.peer_settings import Settings
from lunet_fast.recsys.model.sequences import Sequences

DECAYS = (0.5, 0.9)
"""Of the histories, beside the one without a decay."""
LENGTH = 500
"""Of a longer sequence the last entries are read."""


def sequence_ease(training: Ratings, seed: int, settings: Settings) -> Fitted:
    """Scores x W; W minimises the squares of x_t W - (the item after t) over all prefixes, plus l2 |W|².

    x_t has for each decay and each item the item's weight after t entries: sqrt(1 - decay²) decay^age, or
    1/sqrt(t) without a decay. With A of these and N items: O(sum n³ A² + (A N)³) time for sequences of n,
    O((A N)²) memory.
    """
    sequences = Sequences.of(training, seed)
    kinds, n_items = len(DECAYS) + 1, training.n_items
    gram = torch.zeros(kinds * n_items, kinds * n_items)
    both = torch.zeros(kinds * n_items, n_items)
    offset = torch.arange(kinds).unsqueeze(1) * n_items
    ends: list[tuple[Tensor, Tensor]] = []
    for first, last in pairwise(sequences.indptr.tolist()):
        items = sequences.items[max(first, last - LENGTH) : last].long()
        weights = _weights(len(items))  # [entries as states, kinds, entries as items]
        places = (offset + items).flatten()
        ends.append((places, weights[-1].flatten() if len(items) else torch.zeros(0)))
        if len(items) < 2:
            continue
        inputs = weights[:-1].flatten(1)
        gram[places.unsqueeze(1), places] += inputs.T @ inputs
        both[places.unsqueeze(1), items[1:]] += inputs.T
    gram.diagonal().add_(settings["l2"])
    solution = torch.cholesky_solve(both, torch.linalg.cholesky(gram))

    def score_items(users: Tensor) -> Tensor:
        rows = torch.zeros(len(users), kinds * n_items)
        for row, user in zip(rows, users.tolist(), strict=True):
            places, weight = ends[user]
            row[places] = weight
        return rows @ solution

    return Fitted(solution.numel(), score_items=score_items)


def _weights(count: int) -> Tensor:
    """``[count, kinds, count]``: of each entry after each."""
    age = torch.arange(count).unsqueeze(1) - torch.arange(count)
    past = (age >= 0).float()
    kinds = [past * (1 - decay**2) ** 0.5 * decay ** age.clamp(min=0) for decay in DECAYS]
    kinds.append(past / torch.arange(1, count + 1).sqrt().unsqueeze(1))
    return torch.stack(kinds, 1)

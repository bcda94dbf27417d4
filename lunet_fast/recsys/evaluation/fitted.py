"""A trained baseline, and the forms that its predictions and scores have."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lunet_fast.recsys.data.ratings import Ratings
from lunet_fast.recsys.model.interactions import Interactions, runs
from lunet_fast.recsys.model.negatives import NegativeSampler

#: Numbers held at once while all items are scored: bounds the memory.
CHUNK = 2**22

#: Pairs without interaction that are drawn for each one with, where cross-entropy is trained.
NEGATIVES = 4


@dataclass(frozen=True)
class Fitted:
    """A trained method. Users and items are indices of the training part's ``Ratings``, int64.

    A user or item without training ratings is served too: ratings fall back to the biases that are known, or
    to what the method itself makes of it; rankings of such a user to (about) popularity, or to equal scores.
    """

    parameters: int
    """Of the trained method; 0 for one that has none to speak of."""
    predict: Callable[[Tensor, Tensor], Tensor | None] = lambda users, items: None
    """(users ``[N]``, items ``[N]``) -> ratings float32 ``[N]``, not clipped to the scale; None from a method
    that does not predict ratings."""
    score_items: Callable[[Tensor], Tensor | None] = lambda users: None
    """users ``[U]`` -> scores float32 ``[U, n_items]``, finite, higher is better, of all items, those of the
    training part included; None from a method that does not rank. U n_items numbers of memory."""


def biased_product(
    mean: Tensor,
    user_bias: Tensor,
    item_bias: Tensor,
    vectors: tuple[Tensor, Tensor] | None = None,
) -> Fitted:
    """Ratings mean + b_u + b_i + p_u.q_i; ``vectors`` are the users' and the items'."""

    def predict(users: Tensor, items: Tensor) -> Tensor:
        found = mean + user_bias[users] + item_bias[items]
        if vectors is not None:
            found = found + (vectors[0][users] * vectors[1][items]).sum(1)
        return found.float()

    tables = (user_bias, item_bias, *(vectors or ()))
    return Fitted(1 + sum(table.numel() for table in tables), predict=predict)


def product(user_vectors: Tensor, item_vectors: Tensor, item_bias: Tensor | None = None) -> Fitted:
    """Scores p_u.q_i + b_i."""

    def score_items(users: Tensor) -> Tensor:
        scores = user_vectors[users] @ item_vectors.T
        return scores if item_bias is None else scores + item_bias

    tables = (user_vectors, item_vectors, item_bias)
    return Fitted(sum(table.numel() for table in tables if table is not None), score_items=score_items)


def mean_of(runs: Sequence[Fitted]) -> Fitted:
    """The mean of the predictions and of the scores of several runs of a method."""

    def predict(users: Tensor, items: Tensor) -> Tensor | None:
        return _mean([run.predict(users, items) for run in runs])

    def score_items(users: Tensor) -> Tensor | None:
        return _mean([run.score_items(users) for run in runs])

    return Fitted(sum(run.parameters for run in runs), predict=predict, score_items=score_items)


def _mean(found: Sequence[Tensor | None]) -> Tensor | None:
    there = [each for each in found if each is not None]
    return torch.stack(there).mean(0) if there else None


def over_all_items(
    logits: Callable[[Tensor, Tensor], Tensor], n_items: int, width: int
) -> Callable[[Tensor], Tensor]:
    """``score_items`` from the scores of pairs, each of which takes ``width`` numbers of memory."""

    @torch.no_grad()
    def score_items(users: Tensor) -> Tensor:
        items = torch.arange(n_items)
        parts = [
            logits(some.repeat_interleave(n_items), items.repeat(len(some))).view(len(some), n_items)
            for some in users.split(rows_at_once(width * n_items))
        ]
        return torch.cat(parts)

    return score_items


def labelled_batches(
    training: Ratings, size: int, seed: int
) -> Callable[[], Iterator[tuple[Tensor, Tensor, Tensor]]]:
    """At each call an epoch of batches (users, items, labels float32), for cross-entropy.

    A batch has ``size`` interactions, labelled 1, then NEGATIVES items for each that its user has not rated,
    labelled 0. Users who have rated all items are left out.
    """
    counts = torch.bincount(training.user, minlength=training.n_users)
    training = training.select(counts[training.user] < training.n_items)
    sampler = NegativeSampler(interactions_of(training).pairs, training.n_items)
    generator = torch.Generator().manual_seed(seed)

    def epoch() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for rows in torch.randperm(len(training), generator=generator).split(size):
            users, items = training.user[rows], training.item[rows]
            drawn = sampler.draw(users, NEGATIVES, generator).flatten()
            labels = (torch.arange(len(rows) * (1 + NEGATIVES)) < len(rows)).float()
            yield torch.cat((users, users.repeat_interleave(NEGATIVES))), torch.cat((items, drawn)), labels

    return epoch


def zero_unrated(vectors: Any, rated: Tensor) -> Tensor:
    """``vectors`` [n, k] with zeros in the rows that ``rated`` [N] does not name, which nothing trained."""
    table = torch.from_numpy(vectors)
    return table * (torch.bincount(rated, minlength=len(table)) > 0).unsqueeze(1)


def shape_of(training: Ratings) -> tuple[int, int]:
    return training.n_users, training.n_items


def interactions_of(training: Ratings) -> Interactions:
    return Interactions(training.user, training.item, *shape_of(training))


def rated_rows(seen: Interactions, users: Tensor) -> Tensor:
    """Rows float32 ``[U, n_items]``, 1 where the user rated the item and 0 elsewhere."""
    row, inside = runs(seen.user_counts[users])
    rows = torch.zeros(len(users), seen.n_items)
    rows[row, seen.indices[seen.indptr[users][row] + inside].long()] = 1.0
    return rows


def rows_at_once(width: int) -> int:
    """How many rows of ``width`` numbers are held at once."""
    return max(CHUNK // width, 1)


def count_parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())

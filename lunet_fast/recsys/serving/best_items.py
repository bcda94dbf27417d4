"""The best items of some users, as indices: what a model scores, what it cannot, and what is left out."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from lunet_fast.recsys.model.embeddings import Histories
from lunet_fast.recsys.model.model_files import TrainedModel
from lunet_fast.recsys.model.network import RatingModel
from lunet_fast.recsys.model.prediction import CHUNK
from lunet_fast.recsys.model.scoring import ItemScorer
from lunet_fast.recsys.serving.fold_in import FoldIn


class Ranked(NamedTuple):
    """Recommendations for a batch of users: sorted by row, and best first within one."""

    row: npt.NDArray[np.int64]
    item: npt.NDArray[np.int64]
    score: npt.NDArray[np.float32]


class Ready:
    """A trained model and what its predictions have in common, computed at first use.

    A recommender refers to one of these, and a call to the one that it began with alone: threads may predict
    while another trains the recommender anew. Two that come first both compute, and the same.
    """

    def __init__(self, trained: TrainedModel, histories: Histories | None = None) -> None:
        self.trained = trained
        self._histories = histories
        self._scorer: ItemScorer | None = None
        self._fold_in: FoldIn | None = None

    @torch.no_grad()
    def histories(self) -> Histories:
        """The sums over all histories, which no prediction changes."""
        if self._histories is None:
            self._histories = self.trained.model.histories()
        return self._histories

    def scorer(self, device: torch.device) -> ItemScorer:
        """All items as the network needs them, on ``device``."""
        scorer = self._scorer
        if scorer is None or scorer.device != device:
            rated = self.trained.rated()
            self._scorer = scorer = ItemScorer(self.trained.model, self.histories(), device, rated=rated)
        return scorer

    def fold_in(self) -> FoldIn:
        """What new users start from."""
        if self._fold_in is None:
            self._fold_in = FoldIn(self.trained, self.histories())
        return self._fold_in


@torch.no_grad()
def ranked(
    ready: Ready,
    device: torch.device,
    users: torch.Tensor,
    k: int,
    exclude_seen: bool,
    candidates: torch.Tensor | None,
    unseen: int,
) -> Ranked:
    """The k best for each of ``users``, int64 ``[U]``, -1 for unseen ones, with scores not clipped.

    ``candidates`` are the places of known items, ascending, or None for all of them; ``unseen`` items
    without a place count on from the last known one.
    """
    model, scorer, rated = ready.trained.model, ready.scorer(device), ready.trained.rated()
    n_items = len(ready.trained.items)
    counts = model.interactions.item_counts
    known = torch.arange(n_items) if candidates is None else candidates
    cold = torch.cat((known[counts[known] == 0], n_items + torch.arange(unseen)))
    has_ratings = (users >= 0) & (model.interactions.user_counts[users.clamp(min=0)] > 0)
    warm_rows, cold_rows = torch.where(has_ratings)[0], torch.where(~has_ratings)[0]
    warm = users[warm_rows]

    found: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
    scores, items = scorer.best(warm, k, candidates, training_only=not exclude_seen)
    rates = scorer.readout == "rating"
    if rates:
        # -inf stands for no item at all, of which no rating is to be made.
        scores = torch.where(items < 0, scores, model.rating(scores))
    popularity = torch.cat((model.popularity(), _nobodys_choice(model).expand(unseen)))
    found.append((warm_rows.repeat_interleave(k), items.flatten(), scores.flatten()))
    # As many more as may be left out at the end.
    cold = cold[: k + _most(rated.user_counts[warm] - model.interactions.user_counts[warm], exclude_seen)]
    unrated = popularity[cold]
    if rates:
        unrated = model.transform.inverse(model.mean + model.user_deviation[warm]).unsqueeze(1)
    found.append(_every_pair(warm_rows, cold, unrated))
    if not exclude_seen:
        # A training rating is predicted with its own entry left out: another x than scorer's.
        rows, items = model.interactions.of_users(warm)
        if candidates is not None:
            inside = torch.isin(items, candidates)
            rows, items = rows[inside], items[inside]
        if len(rows):
            read = model if rates else model.interaction
            found.append((warm_rows[rows], items, in_chunks(read, ready.histories(), warm[rows], items)))
    if len(cold_rows):
        places = torch.cat((known, n_items + torch.arange(unseen)))
        score = popularity[places]
        if rates:
            score = model.mean.expand(len(places)).clone()
            score[: len(known)] += model.item_deviation[known] * (counts[known] > 0)
            score = model.transform.inverse(score)
        of_each = rated.user_counts[users[cold_rows].clamp(min=0)] * (users[cold_rows] >= 0)
        best = score.sort(descending=True, stable=True).indices[: k + _most(of_each, exclude_seen)]
        found.append(_every_pair(cold_rows, places[best], score[best]))

    rows, items, scores = (torch.cat(side) for side in zip(*found, strict=True))
    if exclude_seen:
        place = users[rows]
        inside = (place >= 0) & (items >= 0) & (items < n_items)
        left = ~(inside & rated.contains(place, items))
        rows, items, scores = rows[left], items[left], scores[left]
    row, item, values = rows.numpy(), items.numpy(), scores.numpy()
    order = np.lexsort((item, -values, row))
    order = order[values[order] > -np.inf]
    order = order[place_in_row(row[order]) < k]
    return Ranked(row[order], item[order], values[order])


@torch.no_grad()
def in_chunks(
    read: Callable[[torch.Tensor, torch.Tensor, Histories], torch.Tensor],
    histories: Histories,
    users: torch.Tensor,
    items: torch.Tensor,
) -> torch.Tensor:
    """``read``, the model or its ``interaction``, of pairs of indices, int64 ``[B]``; CHUNK at a time."""
    parts = [
        read(user, item, histories) for user, item in zip(users.split(CHUNK), items.split(CHUNK), strict=True)
    ]
    return torch.cat(parts) if len(users) else torch.empty(0)


def _most(counts: torch.Tensor, counted: bool) -> int:
    return int(counts.max()) if counted and len(counts) else 0


def _nobodys_choice(model: RatingModel) -> torch.Tensor:
    """The popularity ``[1]`` of an item that training has not seen."""
    return -torch.log(torch.tensor([model.interactions.n_users + 1.0]))


def _every_pair(
    rows: torch.Tensor, items: torch.Tensor, score: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(row, item, score) of each row with each item; ``score`` broadcasts to ``[rows, items]``."""
    shape = (len(rows), len(items))
    sides = (rows.unsqueeze(1), items, score)
    row, item, wide = (side.expand(shape).flatten() for side in sides)
    return row, item, wide


def place_in_row(row: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """0, 1, ... within each run of equal rows, which are sorted."""
    return np.arange(len(row)) - np.searchsorted(row, row)

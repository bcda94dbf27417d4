"""The recommender as a person uses it: in the ids of one's own file."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch

from lunet_fast.recsys.data.ids import IdMap
from lunet_fast.recsys.data.ratings import Ratings, from_frame, read_ratings
from lunet_fast.recsys.model.config import TrainConfig
from lunet_fast.recsys.model.embeddings import Histories
from lunet_fast.recsys.model.model_files import (
    TrainedModel,
    TrainedSequences,
    is_of_sequences,
    load_model,
    load_sequences,
    save_model,
    save_sequences,
)
from lunet_fast.recsys.model.network import RatingModel
from lunet_fast.recsys.model.prediction import CHUNK
from lunet_fast.recsys.model.scoring import ItemScorer, ranking_readout, training_pairs
from lunet_fast.recsys.model.sequence_config import SEQUENCE, SequenceConfig, settings_of
from lunet_fast.recsys.model.sequence_training import train_sequence
from lunet_fast.recsys.model.training import train
from lunet_fast.recsys.serving.fold_in import METHODS, FoldIn, given_items
from lunet_fast.recsys.serving.sequence import SequenceServing, Session
from lunet_fast.training.files import RunFolder, write_json
from lunet_fast.training.loop import Progress

USERS = 1024
"""Users that are scored at a time: bounds the memory of a recommendation, whatever the number of users."""


class _Ranked(NamedTuple):
    """Recommendations for a batch of users: sorted by row, and best first within one."""

    row: npt.NDArray[np.int64]
    item: npt.NDArray[np.int64]
    score: npt.NDArray[np.float32]


class _Ready:
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
            self._scorer = scorer = ItemScorer(self.trained.model, self.histories(), device)
        return scorer

    def fold_in(self) -> FoldIn:
        """What new users start from."""
        if self._fold_in is None:
            self._fold_in = FoldIn(self.trained, self.histories())
        return self._fold_in


class LUNetRecommender:
    """Predicts ratings by an invertible LU-Net over user and item embeddings.

    >>> recommender = LUNetRecommender(seed=1).fit("ratings.csv")      # doctest: +SKIP
    >>> recommender.predict(["ann", "bob"], ["film-7", "film-9"])      # doctest: +SKIP
    array([4.12, 2.87], dtype=float32)

    ``recipe`` is ``best`` or ``paper``; ``settings`` override single fields of
    :class:`~lunet_fast.recsys.model.config.TrainConfig`, such as ``epochs=5``. ``sequence`` ranks what a user
    may choose next by the order of what it chose before, and predicts no ratings; its settings are those of
    :class:`~lunet_fast.recsys.model.sequence_config.SequenceConfig`. ``device`` is where training
    and :meth:`recommend` run; single pairs are predicted on the CPU.

    A trained model is not to be changed: what its predictions have in common is computed once and kept.
    Several threads may call one recommender, and get the bits that one thread would.
    """

    def __init__(
        self, recipe: str = "best", seed: int = 0, device: torch.device | str = "cpu", **settings: Any
    ) -> None:
        self.recipe, self.seed, self.device, self.settings = recipe, seed, device, settings
        self._config(1)  # a wrong name or value is told now, not after the data are read
        self._ready: _Ready | SequenceServing | None = None

    def _config(self, n_ratings: int) -> TrainConfig | SequenceConfig:
        fixed: dict[str, Any] = {"seed": self.seed, "split": "none"}
        if self.recipe != SEQUENCE:
            fixed["mlp"] = False
        return settings_of(self.recipe, n_ratings, **{**fixed, **self.settings})

    def fit(
        self,
        ratings: Ratings | pd.DataFrame | str | os.PathLike[str],
        *,
        user: str = "user",
        item: str = "item",
        rating: str | None = "rating",
        timestamp: str | None = "timestamp",
        weight: str | None = None,
        scale: tuple[float, float] | None = None,
        progress: Progress | None = None,
    ) -> LUNetRecommender:
        """Train on all of ``ratings``: a file, a data frame or a :class:`Ratings`; returns itself.

        The column names and ``scale`` apply to files and frames, as in
        :func:`~lunet_fast.recsys.data.ratings.read_ratings`, whose errors are raised; ``rating=None`` reads
        interactions without ratings, which need gamma 0 or recipe ``sequence``. Sizes other than MovieLens'
        take the settings of the MovieLens set nearest in size.
        """
        config = self._config(1)
        if rating is None and isinstance(config, TrainConfig) and config.gamma > 0:
            raise ValueError("rating=None leaves no ratings to train on: make LUNetRecommender(gamma=0)")
        columns: dict[str, Any] = {
            "user": user,
            "item": item,
            "rating": rating,
            "timestamp": timestamp,
            "weight": weight,
            "scale": scale,
        }
        if isinstance(ratings, pd.DataFrame):
            ratings = from_frame(ratings, **columns)
        elif not isinstance(ratings, Ratings):
            ratings = read_ratings(ratings, **columns)
        config = self._config(len(ratings))
        if isinstance(config, TrainConfig):
            self._set_trained(train(ratings, config, device=self.device, progress=progress).trained)
        else:
            self._set_trained(train_sequence(ratings, config, device=self.device, progress=progress).trained)
        return self

    def _set_trained(self, trained: TrainedModel | TrainedSequences) -> None:
        self._ready = _Ready(trained) if isinstance(trained, TrainedModel) else SequenceServing(trained)

    def predict(self, users: Any, items: Any) -> npt.NDArray[np.float32]:
        """Ratings of pairs, float32 ``[N]``, clipped to the scale of the training data.

        ``users`` and ``items`` are ids as in the training data, N each; a single id on one side goes with
        each of the other. Ids that training has not seen raise no error: such a pair is predicted by ``mean +
        d_user + d_item``, the mean of the training ratings and the mean deviations of the user and of the
        item from it, shrunk by n / (n + 10) for n ratings and 0 for what is unseen. So a pair unknown on both
        sides gets the mean. ``ValueError`` with gamma 0, whose training knows no ratings. Cost: O(nnz) once
        for nnz training ratings, then O(D^2) a pair.
        """
        ready = self._prepared()
        ratings = _in_chunks(ready.trained.model, ready.histories(), *_pairs(ready.trained, users, items))
        result: npt.NDArray[np.float32] = ratings.clamp_(*ready.trained.scale).cpu().numpy()
        return result

    def score(self, users: Any, items: Any) -> npt.NDArray[np.float32]:
        """Logits of an interaction, float32 ``[N]``: the higher, the sooner the user would choose the item.

        ``users`` and ``items`` as for :meth:`predict`. The sigmoid is the probability (2.14) of an
        interaction among the pairs of training, where ``negatives`` without stand beside each one with: an
        order of items, not a frequency. Where training has not seen the user or the item, the logit is that
        of the item's popularity, log of (n + 1) / (users - n + 1) for n users who chose it.

        With recipe ``sequence`` it is z·e_i + b_i, to compare items of one user by; of an unseen user the
        popularity, and of an unseen item the user's lowest.

        ``ValueError`` with gamma 1, whose training knows no interactions. Cost as :meth:`predict`'s.
        """
        ready = self._trained()
        if isinstance(ready, SequenceServing):
            return ready.score(users, items)
        pairs = _pairs(ready.trained, users, items)
        logits = _in_chunks(ready.trained.model.interaction, ready.histories(), *pairs)
        result: npt.NDArray[np.float32] = logits.cpu().numpy()
        return result

    def recommend(
        self,
        users: Any,
        k: int = 10,
        *,
        exclude_seen: bool = True,
        items: Any = None,
        at: int | None = None,
    ) -> pd.DataFrame:
        """The k best items of each user, best first: columns ``user``, ``rank`` from 1, ``item``, ``score``.

        >>> recommender.recommend(["ann", "bob"], k=2)                     # doctest: +SKIP
          user  rank    item  score
        0  ann     1  film-3   4.81
        1  ann     2  film-9   4.52
        2  bob     1  film-9   4.77
        3  bob     2  film-1   4.19

        ``users`` are ids as in the training data, one or many; they keep their order. ``items`` are the ids
        to choose from, by default all of the training data; ``exclude_seen`` leaves out what the user rated
        in training. A user gets fewer rows where fewer than k items are left.

        With gamma below 1 the items are ranked by :meth:`score`, which is trained to rank, and that is the
        column ``score``. With gamma 1 it is what :meth:`predict` gives for the pair, clipped to the scale;
        the order is that of the rating before it is clipped. Of equal ones the item comes first that does in
        :attr:`items`.

        Ids that training has not seen raise no error and have the fall-back of :meth:`score` or
        :meth:`predict`: an unseen user gets the most popular items, or with gamma 1 those of the highest mean
        deviation d_item; an unseen item stands where nobody's choice does, or at mean + d_user.

        With recipe ``sequence`` unseen items are left out, and users are scored on the CPU by one product
        each with all items. ``at``, in Unix seconds, is when they are asked for, for a model with
        ``elapsed``; by default that is soon after each user's last choice.

        Cost: O(K M D²) for a user and item, on ``device``; what depends on one of them alone is computed
        once. Memory: :func:`~lunet_fast.recsys.model.scoring.score_topk`'s for USERS users, and the result.

        ``ValueError`` where k is not a whole number of at least 1, for ``at`` before a user's last choice,
        and for a model that does not look at it.
        """
        if isinstance(k, bool) or not isinstance(k, (int, np.integer)) or k < 1:
            raise ValueError(f"k={k!r} must be a whole number of at least 1")
        ready, given = self._trained(), _listed(users)
        if isinstance(ready, SequenceServing):
            return ready.recommend(given, int(k), exclude_seen, items, at)
        if at is not None:
            raise ValueError(f"at={at} is for models of recipe 'sequence' with elapsed=True")
        trained, device = ready.trained, torch.device(self.device)
        index = torch.from_numpy(trained.users.index(given))
        item_ids, candidates, unseen = trained.items.ids, None, 0
        if items is not None:
            wanted = _listed(items)
            known = trained.items.index(wanted)
            candidates = torch.from_numpy(np.unique(known[known >= 0]))
            # They follow the known ones, in the order given.
            strangers = list(dict.fromkeys(item for item, i in zip(wanted, known, strict=True) if i < 0))
            unseen = len(strangers)
            item_ids = np.array([*item_ids.tolist(), *strangers], dtype=object)
        parts = [
            _ranked(ready, device, batch, int(k), exclude_seen, candidates, unseen)
            for batch in index.split(USERS)
        ]
        row = np.concatenate([part.row + n * USERS for n, part in enumerate(parts)])
        item, score = (np.concatenate(side) for side in list(zip(*parts, strict=True))[1:])
        user_ids = [
            trained.users.ids[i] if i >= 0 else user for user, i in zip(given, index.tolist(), strict=True)
        ]
        if ranking_readout(trained.model) == "rating":
            score = score.clip(*trained.scale)
        return pd.DataFrame(
            {
                "user": pd.Series(np.array(user_ids, dtype=object)[row], dtype=object).infer_objects(),
                "rank": _place_in_row(row) + 1,
                "item": pd.Series(item_ids[item], dtype=item_ids.dtype).infer_objects(),
                "score": score,
            }
        )

    def fold_in(
        self, ratings: pd.DataFrame | Mapping[Any, float] | Sequence[Any], *, method: str = "fit"
    ) -> FoldedUser:
        """A user whom training has not seen, from what it has rated or chosen; this model stays as it is.

        >>> ann = recommender.fold_in({"film-7": 5, "film-9": 2})          # doctest: +SKIP
        >>> ann.recommend(k=2)                                             # doctest: +SKIP
           rank    item  score
        0     1  film-3   4.81
        1     2  film-1   4.44

        ``ratings`` are ratings by item, a frame with the columns ``item`` and ``rating``, or items alone, as
        a sequence or a frame without ``rating``. Items that training has not seen say nothing and raise no
        error; where none is left, the user is predicted like one never heard of. A model of gamma 0 looks
        only at the items, and to one of gamma 1 items alone say little.

        The new user starts as the mean of the trained ones, side features included, with the items given as
        its history. Method ``fit`` then finds the vector and the bias of least training loss on what is
        given, held to that start by a quadratic prior; ``history`` fits the bias alone. The items' histories
        stay as trained. The same model and ``ratings`` give the same user.

        With recipe ``sequence`` nothing is to be fitted, and :meth:`session` takes the place of this.

        ``ValueError`` for a model of that recipe, for an unknown method, and for ratings that are no numbers
        within the scale or that are of one item. Cost: O(users + items) once; then O(K n (k + M D²)) a step
        for n items, at most 25 or so, of some milliseconds each where n is below 100.
        """
        if method not in METHODS:
            raise ValueError(f"method={method!r} is unknown: choose one of {', '.join(METHODS)}")
        ready = self._trained()
        if isinstance(ready, SequenceServing):
            raise ValueError(
                "a model of recipe 'sequence' fits nothing to a new user: use session(), which takes the same"
            )
        items, values = given_items(ratings, ready.trained)
        alone = LUNetRecommender(self.recipe, self.seed, self.device)
        alone.settings = self.settings
        alone._ready = _Ready(*ready.fold_in()(items, values, method))
        return FoldedUser(alone)

    def session(self, recent_items: Any = ()) -> Session:
        """Someone whom training need not have seen, by what it has chosen; only with recipe ``sequence``.

        >>> session = recommender.session(["film-7", "film-9"])            # doctest: +SKIP
        >>> session.add("film-3", rating=5)                                # doctest: +SKIP
        >>> session.recommend(k=2)                                         # doctest: +SKIP
           rank    item  score
        0     1  film-4   7.81
        1     2  film-1   7.44

        ``recent_items`` are ids, the oldest first, ratings by item, or a frame with the column ``item`` and,
        where known, ``rating`` and ``timestamp``. ``ValueError`` for a model of another recipe.
        """
        ready = self._trained()
        if not isinstance(ready, SequenceServing):
            raise ValueError(
                "this model knows no order: train LUNetRecommender('sequence'), or use fold_in()"
            )
        return ready.session(recent_items)

    def next_items(self, recent_items: Any, k: int = 10) -> pd.DataFrame:
        """The k most likely next items after ``recent_items``: columns ``rank``, ``item``, ``score``.

        As ``session(recent_items).recommend(k)``. ``ValueError`` for a model of another recipe.
        """
        return self.session(recent_items).recommend(k)

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write ``model.safetensors`` and ``config.json`` into ``directory``, which is made if needed.

        Each file is replaced as a whole. The model file alone is what :meth:`load` reads.
        """
        trained, folder = self._trained().trained, RunFolder(Path(directory))
        folder.path.mkdir(parents=True, exist_ok=True)
        if isinstance(trained, TrainedModel):
            save_model(folder.model, trained)
        else:
            save_sequences(folder.model, trained)
        write_json(folder.config, trained.model.config.to_dict())

    @classmethod
    def load(cls, directory: str | os.PathLike[str]) -> LUNetRecommender:
        """The recommender in a folder that :meth:`save` or ``lunet-fast train`` wrote.

        ``FileNotFoundError`` where there is no model, ``CheckpointError`` where its file is damaged or of a
        newer format. Nothing in the file is executed.
        """
        folder = RunFolder(Path(directory))
        if not folder.model.is_file():
            raise FileNotFoundError(
                f"{folder.model}: no such file; load() takes a folder with a trained model"
            )
        load = load_sequences if is_of_sequences(folder.model) else load_model
        trained: TrainedModel | TrainedSequences = load(folder.model)
        config = trained.model.config
        recommender = cls(config.recipe, config.seed)
        recommender.settings = config.to_dict()
        recommender._set_trained(trained)
        return recommender

    @property
    def trained(self) -> TrainedModel:
        """The model with its ids; ``RuntimeError`` before :meth:`fit` or :meth:`load`.

        ``ValueError`` with recipe ``sequence``, whose model is :attr:`sequences`.
        """
        return self._prepared().trained

    @property
    def sequences(self) -> TrainedSequences:
        """The model of recipe ``sequence`` with its ids; ``ValueError`` for another recipe."""
        ready = self._trained()
        if not isinstance(ready, SequenceServing):
            raise ValueError(f"this model is of recipe {self.recipe!r}, not of 'sequence'")
        return ready.trained

    def _trained(self) -> _Ready | SequenceServing:
        """The model that a call goes on with, whatever happens to the recommender meanwhile."""
        ready = self._ready
        if ready is None:
            raise RuntimeError("this recommender is not trained yet: call fit() or load() first")
        return ready

    def _prepared(self) -> _Ready:
        """The same, of a model of pairs."""
        ready = self._trained()
        if isinstance(ready, SequenceServing):
            raise ValueError(
                "a model of recipe 'sequence' ranks what comes next, and this needs one of pairs of user and "
                "item: train recipe 'best'"
            )
        return ready

    @property
    def _histories(self) -> Histories:
        return self._prepared().histories()

    @property
    def users(self) -> IdMap:
        """The ids of the users known."""
        return self._trained().trained.users

    @property
    def items(self) -> IdMap:
        """The ids of the items known."""
        return self._trained().trained.items

    @property
    def scale(self) -> tuple[float, float]:
        """The lowest and the highest rating possible."""
        return self._trained().trained.scale

    @property
    def item_info(self) -> pd.DataFrame | None:
        """Titles and genres in the order of :attr:`items`, where they are known."""
        return self._trained().trained.item_info

    @property
    def config(self) -> TrainConfig | SequenceConfig:
        """The settings that the model was trained with."""
        return self._trained().trained.model.config

    @property
    def ranks_by(self) -> str:
        """What :meth:`recommend` ranks by: ``rating``, ``interaction``, or ``next`` with ``sequence``."""
        ready = self._trained()
        return "next" if isinstance(ready, SequenceServing) else ranking_readout(ready.trained.model)

    def user_counts(self) -> npt.NDArray[np.int64]:
        """How many training ratings each of :attr:`users` has, int64 ``[n_users]``."""
        ready = self._trained()
        if isinstance(ready, SequenceServing):
            counts = ready.trained.model.sequences.user_counts
        else:
            counts = ready.trained.model.interactions.user_counts
        result: npt.NDArray[np.int64] = counts.cpu().numpy()
        return result

    def __repr__(self) -> str:
        state = "not trained" if self._ready is None else f"{len(self.users)} users, {len(self.items)} items"
        return f"LUNetRecommender(recipe={self.recipe!r}, seed={self.seed}, {state})"


class FoldedUser:
    """A user made by :meth:`LUNetRecommender.fold_in`; items are in the ids of the training data.

    What it was made of counts as its training ratings: their own entry is left out of the history where they
    are predicted, and :meth:`recommend` leaves them out unless told otherwise.
    """

    def __init__(self, alone: LUNetRecommender) -> None:
        self._alone = alone  # of a model whose only user, 0, is this one

    def predict(self, items: Any) -> npt.NDArray[np.float32]:
        """Ratings ``[N]`` of one or many items, as :meth:`LUNetRecommender.predict`."""
        return self._alone.predict(0, items)

    def score(self, items: Any) -> npt.NDArray[np.float32]:
        """Logits of an interaction, ``[N]``, as :meth:`LUNetRecommender.score`."""
        return self._alone.score(0, items)

    def recommend(self, k: int = 10, *, exclude_seen: bool = True, items: Any = None) -> pd.DataFrame:
        """The k best items, as :meth:`LUNetRecommender.recommend`: columns ``rank``, ``item``, ``score``."""
        return self._alone.recommend(0, k, exclude_seen=exclude_seen, items=items).drop(columns="user")

    def __repr__(self) -> str:
        model = self._alone.trained.model
        return f"FoldedUser({int(model.interactions.user_counts[0])} of {len(self._alone.items)} items)"


@torch.no_grad()
def _ranked(
    ready: _Ready,
    device: torch.device,
    users: torch.Tensor,
    k: int,
    exclude_seen: bool,
    candidates: torch.Tensor | None,
    unseen: int,
) -> _Ranked:
    """The k best for each of ``users``, int64 ``[U]``, -1 for unseen ones, with scores not clipped.

    ``candidates`` are the places of known items, ascending, or None for all of them; ``unseen`` items
    without a place count on from the last known one.
    """
    model, scorer = ready.trained.model, ready.scorer(device)
    n_items = len(ready.trained.items)
    counts = model.interactions.item_counts
    known = torch.arange(n_items) if candidates is None else candidates
    cold = torch.cat((known[counts[known] == 0], n_items + torch.arange(unseen)))[:k]
    has_ratings = (users >= 0) & (model.interactions.user_counts[users.clamp(min=0)] > 0)
    warm_rows, cold_rows = torch.where(has_ratings)[0], torch.where(~has_ratings)[0]
    warm = users[warm_rows]

    found: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
    scores, items = scorer.best(warm, k, candidates)
    rates = scorer.readout == "rating"
    if rates:
        # -inf stands for no item at all, of which no rating is to be made.
        scores = torch.where(items < 0, scores, model.rating(scores))
    popularity = torch.cat((model.popularity(), _nobodys_choice(model).expand(unseen)))
    found.append((warm_rows.repeat_interleave(k), items.flatten(), scores.flatten()))
    unrated = (model.mean + model.user_deviation[warm]).unsqueeze(1) if rates else popularity[cold]
    found.append(_every_pair(warm_rows, cold, unrated))
    if not exclude_seen:
        # A training rating is predicted with its own entry left out: another x than scorer's.
        rows, items = training_pairs(model, warm)
        if candidates is not None:
            inside = torch.isin(items, candidates)
            rows, items = rows[inside], items[inside]
        if len(rows):
            read = model if rates else model.interaction
            found.append((warm_rows[rows], items, _in_chunks(read, ready.histories(), warm[rows], items)))
    if len(cold_rows):
        places = torch.cat((known, n_items + torch.arange(unseen)))
        score = popularity[places]
        if rates:
            score = model.mean.expand(len(places)).clone()
            score[: len(known)] += model.item_deviation[known] * (counts[known] > 0)
        best = score.sort(descending=True, stable=True).indices[:k]
        found.append(_every_pair(cold_rows, places[best], score[best]))

    row, item, values = (torch.cat(side).numpy() for side in zip(*found, strict=True))
    order = np.lexsort((item, -values, row))
    order = order[values[order] > -np.inf]
    order = order[_place_in_row(row[order]) < k]
    return _Ranked(row[order], item[order], values[order])


@torch.no_grad()
def _in_chunks(
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


def _pairs(trained: TrainedModel, users: Any, items: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices, int64 ``[N]`` each, of ids; a single one on one side goes with each of the other."""
    user, item = (
        torch.from_numpy(ids.index(given)) for ids, given in ((trained.users, users), (trained.items, items))
    )
    if len(user) != len(item) and 1 not in (len(user), len(item)):
        raise ValueError(f"users has {len(user)} ids and items {len(item)}: give as many of each, or one")
    place = trained.model.mean.device
    user, item = (side.clone().to(place) for side in torch.broadcast_tensors(user, item))
    return user, item


def _listed(ids: Any) -> list[Any]:
    """One id, or a sequence, array or tensor of them, as a list."""
    if isinstance(ids, torch.Tensor):
        ids = ids.detach().cpu().numpy()
    values: list[Any] = np.asarray(ids, dtype=object).reshape(-1).tolist()
    return values


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


def _place_in_row(row: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """0, 1, ... within each run of equal rows, which are sorted."""
    return np.arange(len(row)) - np.searchsorted(row, row)

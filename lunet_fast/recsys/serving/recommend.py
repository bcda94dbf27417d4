"""The recommender as a person uses it: in the ids of one's own file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch

from lunet_fast.recsys.data.errors import check_whole
from lunet_fast.recsys.data.ids import IdMap, id_text, listed
from lunet_fast.recsys.data.objects import ratings_frame
from lunet_fast.recsys.data.ratings import Ratings, from_frame, read_ratings
from lunet_fast.recsys.measures import metrics
from lunet_fast.recsys.model.auto import AUTO, auto_config
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
from lunet_fast.recsys.model.scoring import ranking_readout
from lunet_fast.recsys.model.sequence_config import SEQUENCE, SequenceConfig, settings_of
from lunet_fast.recsys.model.sequence_training import train_sequence
from lunet_fast.recsys.model.training import train
from lunet_fast.recsys.serving.best_items import Ready, in_chunks, place_in_row, ranked
from lunet_fast.recsys.serving.fold_in import METHODS, given_items
from lunet_fast.recsys.serving.more_rows import with_more_rows
from lunet_fast.recsys.serving.sequence import SequenceServing, Session
from lunet_fast.recsys.serving.similar import most_similar, reasons
from lunet_fast.training.files import RunFolder, write_json
from lunet_fast.training.loop import Callback, Progress
from lunet_fast.training.run import checked_callbacks

USERS = 1024
"""Users that are scored at a time: bounds the memory of a recommendation, whatever the number of users."""


class LUNetRecommender:
    """Predicts ratings by an invertible LU-Net over user and item embeddings.

    >>> recommender = LUNetRecommender(seed=1).fit("ratings.csv")      # doctest: +SKIP
    >>> recommender.predict(["ann", "bob"], ["film-7", "film-9"])      # doctest: +SKIP
    array([4.12, 2.87], dtype=float32)

    ``recipe`` is ``auto``, for ratings of any unit and size
    (:func:`~lunet_fast.recsys.model.auto.auto_config`), or ``best`` or ``paper``, which have MovieLens'
    settings; ``settings`` override single fields of
    :class:`~lunet_fast.recsys.model.config.TrainConfig`, such as ``epochs=5``. ``sequence`` ranks what a user
    may choose next by the order of what it chose before, and predicts no ratings; its settings are those of
    :class:`~lunet_fast.recsys.model.sequence_config.SequenceConfig`. ``device`` is where training
    and :meth:`recommend` run; single pairs are predicted on the CPU.

    A trained model is not to be changed: what its predictions have in common is computed once and kept.
    Several threads may call one recommender, and get the bits that one thread would.
    """

    def __init__(
        self, recipe: str = AUTO, seed: int = 0, device: torch.device | str = "cpu", **settings: Any
    ) -> None:
        self.recipe, self.seed, self.device, self.settings = recipe, seed, device, settings
        self._config(1)  # a wrong name or value is told now, not after the data are read
        self._ready: Ready | SequenceServing | None = None

    def _config(self, n_ratings: int) -> TrainConfig | SequenceConfig:
        return settings_of(self.recipe, n_ratings, **self._overrides())

    def _overrides(self) -> dict[str, Any]:
        """What is not the recipe's."""
        fixed: dict[str, Any] = {"seed": self.seed, "split": "none"}
        if self.recipe != SEQUENCE:
            fixed["mlp"] = False
        return {**fixed, **self.settings}

    def fit(
        self,
        ratings: Any,
        *,
        user: str = "user",
        item: str = "item",
        rating: str | None = "rating",
        timestamp: str | None = "timestamp",
        weight: str | None = None,
        scale: tuple[float, float] | None = None,
        duplicates: str = "error",
        sep: str | None = None,
        header: bool = True,
        progress: Progress | None = None,
        callbacks: Sequence[Callback] = (),
    ) -> LUNetRecommender:
        """Train on all of ``ratings``; returns itself.

        They are a file's path, a :class:`Ratings`, a data frame of pandas or polars, a scipy.sparse matrix of
        users by items, rows (user, item, rating, maybe time) as a list or an array,
        ``{user: {item: rating}}``, or a pandas Series by user and item
        (:func:`~lunet_fast.recsys.data.objects.ratings_frame`).

        The column names, ``scale`` and ``duplicates`` apply to files and frames, ``sep`` and ``header`` to
        files, as in :func:`~lunet_fast.recsys.data.ratings.read_ratings`, whose errors are raised, and
        ``TypeError`` for an object of another kind; ``rating=None`` reads
        interactions without ratings, which need gamma 0 or recipe ``sequence``. Recipe ``auto`` makes a short
        search on validation parts first; ``best`` takes the settings of the MovieLens set nearest in size.

        ``callbacks`` are functions (epoch, figures) that are told of each epoch of the training itself, from
        1, with ``train_loss`` and ``seconds``; where one returns true, training ends with that epoch and the
        model is as it is then. To have the number of epochs chosen on a validation part, make
        ``LUNetRecommender(patience=3)`` of recipe ``auto``.
        """
        told: Any = {"progress": progress, "callbacks": checked_callbacks(callbacks)}
        columns = {"user": user, "item": item, "rating": rating, "timestamp": timestamp, "weight": weight}
        reading = {"scale": scale, "duplicates": duplicates, "sep": sep, "header": header}
        ratings = self._read(ratings, **columns, **reading)
        config = self._config(len(ratings))
        if isinstance(config, TrainConfig):
            if self.recipe == AUTO:
                config = auto_config(ratings, device=self.device, **self._overrides())
            self._set_trained(train(ratings, config, device=self.device, **told).trained)
        else:
            self._set_trained(train_sequence(ratings, config, device=self.device, **told).trained)
        return self

    def partial_fit(self, ratings: Any, *, epochs: int = 1, **columns: Any) -> LUNetRecommender:
        """Go on from the trained model with new rows alone, ``epochs`` times over them; returns itself.

        ``ratings`` and ``columns`` are those of :meth:`fit`, whose errors are raised. What the vectors and
        biases of the users and items in them say changes, and their pairs join the histories; a new user
        starts as :meth:`fold_in` makes it, and is known by its id from then on. Networks and everybody else's
        vectors stay. The model has no ratings of before to hold against the new ones: for many rows, or for
        new items, :meth:`fit` all of them anew
        (:func:`~lunet_fast.recsys.serving.more_rows.with_more_rows`).

        ``ValueError`` for items that training does not know, ratings outside the scale, and for recipe
        ``sequence``, whose users are what they choose: :meth:`session`.
        """
        passes = check_whole("epochs", epochs, 1)
        ready = self._prepared()
        rows = self._read(ratings, **columns)
        self._set_trained(with_more_rows(ready.trained, ready.fold_in(), rows, passes))
        return self

    def _read(self, ratings: Any, **columns: Any) -> Ratings:
        """What :meth:`fit` is given, as a table."""
        config = self._config(1)
        names = {"user": "user", "item": "item", "rating": "rating", "timestamp": "timestamp", **columns}
        if names["rating"] is None and isinstance(config, TrainConfig) and config.needs_ratings:
            raise ValueError(
                "rating=None leaves no ratings to train on: make LUNetRecommender(gamma=0), without "
                "positive_from"
            )
        if isinstance(ratings, Ratings):
            return ratings
        if isinstance(ratings, (str, os.PathLike)):
            return read_ratings(ratings, **names)
        for of_files in ("sep", "header"):
            names.pop(of_files, None)
        roles = [names[role] for role in ("user", "item", "rating", "timestamp") if names[role] is not None]
        return from_frame(ratings_frame(ratings, roles), **names)

    def _set_trained(self, trained: TrainedModel | TrainedSequences) -> None:
        self._ready = Ready(trained) if isinstance(trained, TrainedModel) else SequenceServing(trained)

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
        ratings = in_chunks(ready.trained.model, ready.histories(), *_pairs(ready.trained, users, items))
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
        logits = in_chunks(ready.trained.model.interaction, ready.histories(), *pairs)
        result: npt.NDArray[np.float32] = logits.cpu().numpy()
        return result

    def recommend(
        self,
        users: Any,
        k: int = 10,
        *,
        exclude_seen: bool = True,
        items: Any = None,
        exclude: Any = None,
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
        to choose from, by default all of the training data, and ``exclude`` those that nobody gets.
        ``exclude_seen`` leaves out what the user rated anywhere in the data that :meth:`fit` or
        ``lunet-fast train`` was given, tested and held-out ratings too. A user gets fewer rows where fewer
        than k items are left.

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
        once. Memory: :func:`~lunet_fast.recsys.model.scoring.score_topk`'s for USERS users, and the result,
        users × min(k, items) rows.

        ``ValueError`` where k is not a whole number of at least 1, for ``at`` before a user's last choice,
        and for a model that does not look at it; ``TypeError`` for what are no ids.
        """
        if isinstance(k, bool) or not isinstance(k, (int, np.integer)) or k < 1:
            raise ValueError(f"k={k!r} must be a whole number of at least 1")
        ready, given = self._trained(), listed(users)
        if isinstance(ready, SequenceServing):
            return ready.recommend(given, int(k), exclude_seen, items, exclude, at)
        if at is not None:
            raise ValueError(f"at={at} is for models of recipe 'sequence' with elapsed=True")
        trained, device = ready.trained, torch.device(self.device)
        index = torch.from_numpy(trained.users.index(given))
        item_ids, candidates, unseen = self._choice(trained.items, items, exclude)
        k = min(int(k), max(len(item_ids), 1))
        parts = [
            ranked(ready, device, batch, k, exclude_seen, candidates, unseen) for batch in index.split(USERS)
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
                "rank": place_in_row(row) + 1,
                "item": pd.Series(item_ids[item], dtype=item_ids.dtype).infer_objects(),
                "score": score,
            }
        )

    @staticmethod
    def _choice(known_items: IdMap, items: Any, exclude: Any) -> tuple[Any, torch.Tensor | None, int]:
        """Ids, the indices that :meth:`recommend` may take (None for all), and how many of the ids, the last
        ones, training has not seen."""
        item_ids: Any = known_items.ids
        candidates, unseen = None, 0
        if items is not None:
            wanted = listed(items)
            known = known_items.index(wanted)
            candidates = torch.from_numpy(np.unique(known[known >= 0]))
            # They follow the known ones, in the order given.
            never = {id_text(item) for item in ([] if exclude is None else listed(exclude))}
            new = (item for item, i in zip(wanted, known, strict=True) if i < 0)
            strangers = [item for item in dict.fromkeys(new) if id_text(item) not in never]
            unseen = len(strangers)
            item_ids = np.array([*item_ids.tolist(), *strangers], dtype=object)
        if exclude is not None:
            there = torch.arange(len(known_items)) if candidates is None else candidates
            candidates = there[~torch.isin(there, torch.from_numpy(known_items.index(exclude)))]
        return item_ids, candidates, unseen

    def fold_in(self, ratings: Any, *, method: str = "fit") -> FoldedUser:
        """A user whom training has not seen, from what it has rated or chosen; this model stays as it is.

        >>> ann = recommender.fold_in({"film-7": 5, "film-9": 2})          # doctest: +SKIP
        >>> ann.recommend(k=2)                                             # doctest: +SKIP
           rank    item  score
        0     1  film-3   4.81
        1     2  film-1   4.44

        ``ratings`` are ratings by item, a frame with the columns ``item`` and ``rating``, or items alone, as
        a sequence or a frame without ``rating``; or a pandas Series of ratings whose index are the items,
        rows (item, rating), one row of a scipy.sparse matrix. Items that training has not seen say nothing
        and raise no error; where none is left, the user is predicted like one never heard of. A model of
        gamma 0 without ``positive_from`` looks only at the items, and to one of gamma 1 items alone say
        little; with ``positive_from`` items alone are all liked.

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
        alone._ready = Ready(*ready.fold_in()(items, values, method))
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

    def similar_items(self, items: Any, k: int = 10) -> pd.DataFrame:
        """The k items most like each of ``items``: columns ``item``, ``rank``, ``similar``, ``similarity``.

        >>> recommender.similar_items("film-7", k=2)                       # doctest: +SKIP
             item  rank similar  similarity
        0  film-7     1  film-3        0.81
        1  film-7     2  film-1        0.64

        By the cosine of what the network is given of them, less the mean item
        (:func:`~lunet_fast.recsys.serving.similar.most_similar`). Items without training ratings have no row.
        ``ValueError`` for recipe ``sequence``.
        """
        return most_similar(self._prepared(), "item", items, check_whole("k", k, 1))

    def similar_users(self, users: Any, k: int = 10) -> pd.DataFrame:
        """The k users most like each of ``users``, as :meth:`similar_items`; the first column is ``user``."""
        return most_similar(self._prepared(), "user", users, check_whole("k", k, 1))

    def explain(self, user: Any, item: Any, k: int = 10) -> pd.DataFrame:
        """Which of a user's items speak for ``item``: columns ``item`` and ``effect``, the largest first.

        The effect is what the score that ranks loses where the one item is left out of the user's history
        (:func:`~lunet_fast.recsys.serving.similar.reasons`): a negative one speaks against. ``ValueError``
        for ids without training ratings, a model without ``user_history``, and recipe ``sequence``.
        """
        return reasons(self._prepared(), user, item, check_whole("k", k, 1))

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """The arguments that make the same recommender, not trained; as scikit-learn has it."""
        return {"recipe": self.recipe, "seed": self.seed, "device": self.device, **self.settings}

    def set_params(self, **params: Any) -> LUNetRecommender:
        """Change arguments for the next :meth:`fit`; ``ValueError`` for a wrong one. Returns itself."""
        changed = LUNetRecommender(**{**self.get_params(), **params})
        self.recipe, self.seed = changed.recipe, changed.seed
        self.device, self.settings = changed.device, changed.settings
        return self

    def cross_validate(self, ratings: Any, folds: int = 5, **columns: Any) -> pd.DataFrame:
        """Errors of predicted ratings on each of ``folds`` parts, trained on the others.

        Columns ``fold`` from 1, ``test_ratings``, ``mse``, ``rmse``. ``ratings`` and ``columns`` are those of
        :meth:`fit`, whose errors are raised; parts are drawn by the seed. This recommender stays as it is.
        ``ValueError`` where folds is below 2 or more than there are ratings, and with gamma 0.
        """
        table = self._read(ratings, **columns)
        if check_whole("folds", folds, 2) > len(table):
            raise ValueError(f"folds={folds!r} must be at most the number of ratings, {len(table)}")
        order = torch.from_numpy(np.random.default_rng(self.seed).permutation(len(table)))
        rows = []
        for fold, part in enumerate(order.tensor_split(folds)):
            rest = order[~torch.isin(order, part)].sort().values
            fitted = LUNetRecommender(**self.get_params()).fit(table.select(rest))
            ready, test = fitted._prepared(), table.select(part)
            found = in_chunks(ready.trained.model, ready.histories(), test.user, test.item)
            mse = metrics.mse(found.clamp_(*table.scale), test.rating)
            rows.append({"fold": fold + 1, "test_ratings": len(part), "mse": mse, "rmse": mse**0.5})
        return pd.DataFrame(rows)

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

    def _trained(self) -> Ready | SequenceServing:
        """The model that a call goes on with, whatever happens to the recommender meanwhile."""
        ready = self._ready
        if ready is None:
            raise RuntimeError("this recommender is not trained yet: call fit() or load() first")
        return ready

    def _prepared(self) -> Ready:
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

    def recommend(
        self, k: int = 10, *, exclude_seen: bool = True, items: Any = None, exclude: Any = None
    ) -> pd.DataFrame:
        """The k best items, as :meth:`LUNetRecommender.recommend`: columns ``rank``, ``item``, ``score``."""
        chosen = self._alone.recommend(0, k, exclude_seen=exclude_seen, items=items, exclude=exclude)
        return chosen.drop(columns="user")

    def __repr__(self) -> str:
        model = self._alone.trained.model
        return f"FoldedUser({int(model.interactions.user_counts[0])} of {len(self._alone.items)} items)"


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

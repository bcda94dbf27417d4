"""The recommender as a person uses it: in the ids of one's own file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch

from lunet_fast.recsys.checkpoints import RunFolder, TrainedModel, load_model, save_model, write_json
from lunet_fast.recsys.config import TrainConfig, recipe
from lunet_fast.recsys.evaluation import predict_ratings
from lunet_fast.recsys.ratings import IdMap, Ratings, from_frame, read_ratings
from lunet_fast.recsys.training import Progress, train


class LUNetRecommender:
    """Predicts ratings by an invertible LU-Net over user and item embeddings.

    >>> recommender = LUNetRecommender(seed=1).fit("ratings.csv")      # doctest: +SKIP
    >>> recommender.predict(["ann", "bob"], ["film-7", "film-9"])      # doctest: +SKIP
    array([4.12, 2.87], dtype=float32)

    ``recipe`` is ``best`` or ``paper``; ``settings`` override single fields of
    :class:`~lunet_fast.recsys.config.TrainConfig`, such as ``epochs=5``. ``device`` is where training runs; a
    trained model predicts on the CPU.
    """

    def __init__(
        self, recipe: str = "best", seed: int = 0, device: torch.device | str = "cpu", **settings: Any
    ) -> None:
        self.recipe, self.seed, self.device, self.settings = recipe, seed, device, settings
        self._config(1)  # a wrong name or value is told now, not after the data are read
        self._trained: TrainedModel | None = None

    def _config(self, n_ratings: int) -> TrainConfig:
        fixed = {"seed": self.seed, "split": "none", "mlp": False}
        return recipe(self.recipe, n_ratings, **{**fixed, **self.settings})

    def fit(
        self,
        ratings: Ratings | pd.DataFrame | str | os.PathLike[str],
        *,
        user: str = "user",
        item: str = "item",
        rating: str = "rating",
        timestamp: str | None = "timestamp",
        scale: tuple[float, float] | None = None,
        progress: Progress | None = None,
    ) -> LUNetRecommender:
        """Train on all of ``ratings``: a file, a data frame or a :class:`Ratings`; returns itself.

        The column names and ``scale`` apply to files and frames, as in
        :func:`~lunet_fast.recsys.ratings.read_ratings`, whose errors are raised. Sizes other than MovieLens'
        take the settings of the MovieLens set nearest in size.
        """
        columns: dict[str, Any] = {
            "user": user,
            "item": item,
            "rating": rating,
            "timestamp": timestamp,
            "scale": scale,
        }
        if isinstance(ratings, pd.DataFrame):
            ratings = from_frame(ratings, **columns)
        elif not isinstance(ratings, Ratings):
            ratings = read_ratings(ratings, **columns)
        result = train(ratings, self._config(len(ratings)), device=self.device, progress=progress)
        self._trained = result.trained
        return self

    def predict(self, users: Any, items: Any) -> npt.NDArray[np.float32]:
        """Ratings of pairs, float32 ``[N]``, clipped to the scale of the training data.

        ``users`` and ``items`` are ids as in the training data, N each; a single id on one side goes with
        each of the other. Ids that training has not seen raise no error: such a pair is predicted by ``mean +
        d_user + d_item``, the mean of the training ratings and the mean deviations of the user and of the
        item from it, shrunk by n / (n + 10) for n ratings and 0 for what is unseen. So a pair unknown on both
        sides gets the mean. Cost: O(nnz) once for nnz training ratings, then O(D^2) a pair.
        """
        trained = self.trained
        user, item = (
            torch.from_numpy(ids.index(given))
            for ids, given in ((trained.users, users), (trained.items, items))
        )
        if len(user) != len(item) and 1 not in (len(user), len(item)):
            raise ValueError(f"users has {len(user)} ids and items {len(item)}: give as many of each, or one")
        user, item = (side.clone() for side in torch.broadcast_tensors(user, item))
        if not len(user):
            return np.empty(0, dtype=np.float32)
        prediction: npt.NDArray[np.float32] = predict_ratings(
            trained.model, user, item, trained.scale
        ).numpy()
        return prediction

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write ``model.safetensors`` and ``config.json`` into ``directory``, which is made if needed.

        Each file is replaced as a whole. The model file alone is what :meth:`load` reads.
        """
        trained, folder = self.trained, RunFolder(Path(directory))
        folder.path.mkdir(parents=True, exist_ok=True)
        save_model(folder.model, trained)
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
        trained = load_model(folder.model)
        config = trained.model.config
        recommender = cls(config.recipe, config.seed)
        recommender.settings = config.to_dict()
        recommender._trained = trained
        return recommender

    @property
    def trained(self) -> TrainedModel:
        """The model with its ids; ``RuntimeError`` before :meth:`fit` or :meth:`load`."""
        if self._trained is None:
            raise RuntimeError("this recommender is not trained yet: call fit() or load() first")
        return self._trained

    @property
    def users(self) -> IdMap:
        """The ids of the users known."""
        return self.trained.users

    @property
    def items(self) -> IdMap:
        """The ids of the items known."""
        return self.trained.items

    def __repr__(self) -> str:
        state = (
            "not trained" if self._trained is None else f"{len(self.users)} users, {len(self.items)} items"
        )
        return f"LUNetRecommender(recipe={self.recipe!r}, seed={self.seed}, {state})"

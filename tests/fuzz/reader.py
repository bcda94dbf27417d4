"""Reads one input with the reader that it is for, and judges how that ended."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import warnings
from pathlib import Path
from typing import Any

from tests.fuzz import inputs
from tests.fuzz.inputs import CASES, Case


class Failure(Exception):
    """An input that ended as none may."""


class Reader:
    """Reads inputs in a folder of its own, and says how each ended."""

    def __init__(self, folder: Path) -> None:
        from lunet_fast.cli import predict, recommend
        from lunet_fast.recsys.data import datasets, movielens, ratings
        from lunet_fast.recsys.model import model_files
        from lunet_fast.training import files

        self.folder = folder
        self.ratings, self.movielens, self.files, self.model_files = ratings, movielens, files, model_files
        self.predict, self.recommend = predict, recommend
        self.known = ratings.IdMap.of(["1", "=1+1", "'=1", "ann"])
        spec = movielens.DATASETS["ml-1m"]
        parts = {
            "ratings.dat": inputs.RATINGS_DAT,
            "movies.dat": inputs.MOVIES_DAT,
            "users.dat": inputs.USERS_DAT,
        }
        movielens.DATASETS["ml-1m"] = dataclasses.replace(
            spec,
            sha256={name: hashlib.sha256(data).hexdigest() for name, data in parts.items()},
            counts=datasets.Counts(2, 2, {3.0: 1, 4.0: 1, 5.0: 1}),
        )

    def ending(self, data: bytes) -> str:
        """How reading ``data`` ends: "result" or the name of our error. Raises Failure for all else."""
        case = CASES[data[0] % len(CASES)] if data else CASES[0]
        file = self.folder / case.name
        file.write_bytes(data[1:])
        expected = {
            "ratings": (self.ratings.RatingFileError,),
            "like": (self.ratings.RatingFileError,),
            "pairs": (self.ratings.RatingFileError,),
            "users": (self.ratings.RatingFileError, ValueError),
            "archive": (self.movielens.DataNotFoundError,),
            "model": (self.files.CheckpointError,),
        }[case.kind]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of zipfile, on a name that occurs twice
                self._read(case, file)
        except expected as error:
            if type(error) not in expected:
                raise Failure(f"{type(error).__name__}: {error}") from error
            self._check_message(case, file, str(error))
            return type(error).__name__
        except Exception as error:
            raise Failure(f"{type(error).__name__}: {error}") from error
        return "result"

    def _read(self, case: Case, file: Path) -> None:
        if case.kind == "ratings":
            self._check_ratings(self.ratings.read_ratings(file, **case.options))
        elif case.kind == "like":
            dataset = "ml-1m" if case.sep == "::" else "ml-100k"
            self._check_ratings(self.movielens.read_like(dataset, file))
        elif case.kind == "pairs":
            table = self.predict._read_pairs(file, ("user", "item"), ("user", "item"), None)
            ids = [self.predict._ids(table, role, self.known) for role in ("user", "item")]
            if not len(ids[0]) == len(ids[1]) > 0:
                raise Failure(f"{len(ids[0])} users and {len(ids[1])} items")
        elif case.kind == "users":
            self.recommend._read_ids("--users-file", file)
        elif case.kind == "archive":
            self._check_ratings(self.movielens.load("ml-1m", self.folder))
        else:
            trained = self.model_files.load_model(file)
            import torch

            with torch.no_grad():
                trained.model(torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))

    def _check_ratings(self, ratings: Any) -> None:
        import torch

        n = len(ratings)
        good = (
            n > 0
            and bool(torch.isfinite(ratings.rating).all())
            and all(math.isfinite(end) for end in ratings.scale)
            and int(ratings.user.min()) >= 0
            and int(ratings.item.min()) >= 0
            and int(ratings.user.max()) < ratings.n_users <= n
            and int(ratings.item.max()) < ratings.n_items <= n
            and len(torch.unique(torch.stack((ratings.user, ratings.item)), dim=1).T) == n
            and ratings.scale[0]
            <= float(ratings.rating.min())
            <= float(ratings.rating.max())
            <= ratings.scale[1]
        )
        if not good:
            raise Failure(f"{ratings!r} is not consistent")
        json.dumps(ratings.describe(), allow_nan=False)

    def _check_message(self, case: Case, file: Path, message: str) -> None:
        named = file.name if case.kind == "archive" else str(file)
        if named not in message:
            raise Failure(f"the message does not name {named}: {message!r}")
        lines = message.split("\n") if case.kind == "archive" else [message]
        if len(message) > 3000 or not all(line.isprintable() for line in lines):
            raise Failure(f"the message is not fit for a terminal: {message!r}")

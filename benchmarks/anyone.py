"""Recipe auto on rating files of other kinds: errors, units, and what a person would be recommended.

    python benchmarks/anyone.py errors      MSE on four files beside tuned biases and the methods of compare
    python benchmarks/anyone.py units       synthetic ratings times s; 1,000 ratings
    python benchmarks/anyone.py large       100,000 ratings by 10,000 users of 100,000 items: time, memory
    python benchmarks/anyone.py optimizer   a step on a million items: what of it is Adam's
    python benchmarks/anyone.py movielens   ML-100K beside recipe best

``errors`` and ``movielens`` read the files in $LUNET_FAST_DATA (foreign/, filmtrust/, MovieLens). 20 % of the
ratings are tested, three splits; the biases' L2 are chosen on a tenth of the training part, and recipe auto
chooses on its own parts of it. ``--only`` takes single data sets. Parts that are measured are kept in
benchmarks/results/anyone.json and not measured again by the same code and constants.
"""

from __future__ import annotations

import itertools
import json
import resource
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from lunet_fast.recsys.data import movielens
from lunet_fast.recsys.data.ratings import Ratings, from_frame, read_ratings
from lunet_fast.recsys.data.splits import holdout, random_split
from lunet_fast.recsys.evaluation.baselines import BASELINES
from lunet_fast.recsys.model.auto import BIAS_L2, auto_config
from lunet_fast.recsys.model.config import recipe
from lunet_fast.recsys.model.model_files import TrainedModel
from lunet_fast.recsys.model.network import RatingModel
from lunet_fast.recsys.model.offsets import shrunk_biases
from lunet_fast.recsys.model.training import rating_objective, rating_optimizer, train
from lunet_fast.recsys.serving.recommend import LUNetRecommender
from machine import Results, open_results, parser

NAME = "anyone"
SEEDS = (0, 1, 2)
FILES = {
    "FilmTrust": "filmtrust",
    "digital music": "digitalmusic",
    "Jester": "jester1k",
    "restaurants": "restaurant",
}
PEERS = ("knn", "mf", "svd++", "bayesian-fm")
UNITS = (1.0, 1e-3, 20.0, 1e4)


def read(folder: Path, name: str) -> Ratings:
    """One of FILES. FilmTrust's four parts are one data set; of its repeated pairs the last counts."""
    if name != "filmtrust":
        return read_ratings(folder / "foreign" / f"{name}.csv")
    files = sorted((folder / "filmtrust").glob("ratings_*.txt"))
    parts = [pd.read_csv(file, sep=" ", names=["user", "item", "rating"]) for file in files]
    return from_frame(pd.concat(parts), timestamp=None, duplicates="latest", name=name)


def tuned_biases(training: Ratings, seed: int) -> Callable[[Tensor, Tensor], Tensor]:
    """mean + b_u + b_i, whose two L2 are the best of all pairs on a tenth of ``training``."""

    def fitted(part: Ratings, l2: tuple[float, float]) -> Callable[[Tensor, Tensor], Tensor]:
        mean = part.rating.double().mean()
        sizes = (part.n_users, part.n_items)
        of_user, of_item = shrunk_biases(part.user, part.item, part.rating - mean, sizes, l2)
        return lambda users, items: (mean + of_user[users] + of_item[items]).float()

    rest, part = (training.select(rows) for rows in holdout(torch.arange(len(training)), 0.1, seed))
    tried = {
        l2: error(fitted(rest, l2)(part.user, part.item), part, training)
        for l2 in itertools.product(BIAS_L2, BIAS_L2)
    }
    return fitted(training, min(tried, key=tried.__getitem__))


def error(predicted: Tensor | None, test: Ratings, training: Ratings) -> float:
    """MSE of ratings clipped to the scale."""
    assert predicted is not None
    return float((predicted.clamp(*training.scale) - test.rating).double().square().mean())


def ours(name: str, training: Ratings, test: Ratings, seed: int) -> tuple[float, TrainedModel]:
    """Recipe ``auto`` or ``best``."""
    if name == "auto":
        config = auto_config(training, test, seed=seed)
    else:
        config = recipe(name, len(training) + len(test), seed=seed, mlp=False)
    result = train(training, config, test=test)
    return result.metrics["test_mse"], result.trained


def parts_of(ratings: Ratings, seed: int) -> tuple[Ratings, Ratings]:
    split = random_split(ratings, seed)
    return ratings.select(split.train), ratings.select(split.test)


def rivals(training: Ratings, test: Ratings, seed: int) -> dict[str, Callable[[], Tensor | None]]:
    """By name what predicts the test part once it is trained."""
    pairs = test.user, test.item

    def peer(key: str) -> Callable[[], Tensor | None]:
        return lambda: BASELINES[key].fit(training, seed, "ml-100k").predict(*pairs)

    return {
        "biases, tuned": lambda: tuned_biases(training, seed)(*pairs),
        **{key: peer(key) for key in PEERS},
    }


def errors_of(ratings: Ratings) -> dict[str, Any]:
    """MSE by method and seed, CPU seconds of one training, and the share of recommendations rated already."""
    found: dict[str, list[float]] = {}
    seconds: dict[str, list[float]] = {}
    rated, known = [], set(zip(ratings.user.tolist(), ratings.item.tolist(), strict=True))
    for seed in SEEDS:
        training, test = parts_of(ratings, seed)
        methods = rivals(training, test, seed)
        for name, method in methods.items():
            began = time.process_time()
            found.setdefault(name, []).append(error(method(), test, training))
            seconds.setdefault(name, []).append(time.process_time() - began)
        for name in ("best", "auto"):
            began = time.process_time()
            mse, trained = ours(name, training, test, seed)
            found.setdefault(f"ours, {name}", []).append(mse)
            seconds.setdefault(f"ours, {name}", []).append(time.process_time() - began)
        recommender = LUNetRecommender("best")
        recommender._set_trained(trained)
        best = recommender.recommend(ratings.users.ids)
        places = ratings.users.index(best["user"]), ratings.items.index(best["item"])
        shown = zip(*(side.tolist() for side in places), strict=True)
        rated.append(statistics.fmean(pair in known for pair in shown))
        last = {name: round(values[-1], 4) for name, values in found.items()}
        print(seed, last, file=sys.stderr, flush=True)
    return {
        "users": ratings.n_users,
        "items": ratings.n_items,
        "ratings": len(ratings),
        "mse": found,
        "seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "already_rated": statistics.fmean(rated),
    }


def errors_in(folder: Path, name: str) -> dict[str, Any]:
    return errors_of(read(folder, name))


# Synthetic -------------------------------------------------------------------------------------------------


def made(users: int, items: int, ratings: int, seed: int, noise: float = 0.4) -> Ratings:
    """Biases of standard deviation .5, three factors whose product has .45, and noise."""
    rng = np.random.default_rng(seed)
    pairs = rng.choice(users * items, ratings, replace=False)
    user, item = pairs // items, pairs % items
    taste = rng.normal(0, 0.5, (users, 3))[user] * rng.normal(0, 0.5, (items, 3))[item]
    rating = 3 + rng.normal(0, 0.5, users)[user] + rng.normal(0, 0.5, items)[item] + taste.sum(1)
    rating += rng.normal(0, noise, ratings)
    return from_frame(pd.DataFrame({"user": user, "item": item, "rating": rating}), name="made")


def scaled(ratings: Ratings, unit: float) -> Ratings:
    frame = {"user": ratings.user.numpy(), "item": ratings.item.numpy()}
    return from_frame(pd.DataFrame({**frame, "rating": ratings.rating.double().numpy() * unit}))


def units() -> dict[str, Any]:
    """MSE/s² for ratings times s, and the errors on 1,000 ratings."""
    by_unit: dict[str, list[float]] = {}
    small: dict[str, list[float]] = {}
    for seed in SEEDS:
        ratings = made(300, 100, 6000, seed)
        for unit in UNITS:
            training, test = parts_of(scaled(ratings, unit), seed)
            by_unit.setdefault(f"{unit:g}", []).append(ours("auto", training, test, seed)[0] / unit**2)
            biases = error(tuned_biases(training, seed)(test.user, test.item), test, training)
            by_unit.setdefault(f"biases {unit:g}", []).append(biases / unit**2)
        training, test = parts_of(made(100, 40, 1000, seed), seed)
        for name in ("best", "auto"):
            small.setdefault(f"ours, {name}", []).append(ours(name, training, test, seed)[0])
        for key in ("mf", "bayesian-fm"):
            fitted = BASELINES[key].fit(training, seed, "ml-100k")
            small.setdefault(key, []).append(error(fitted.predict(test.user, test.item), test, training))
        of_biases = tuned_biases(training, seed)(test.user, test.item)
        small.setdefault("biases, tuned", []).append(error(of_biases, test, training))
        print(by_unit, small, file=sys.stderr, flush=True)
    return {"units": by_unit, "small": small}


def large() -> dict[str, Any]:
    """10,000 users, 100,000 items with a rating each: training, then the best ten of all items for all.

    The same by implicit's ALS, whose best ten may be rated already: it leaves nothing out here.
    """
    rng = np.random.default_rng(0)
    frame = {"user": rng.integers(0, 10_000, 100_000), "item": np.arange(100_000)}
    ratings = from_frame(pd.DataFrame({**frame, "rating": rng.integers(1, 6, 100_000)}), name="large")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    recommender = LUNetRecommender("auto")
    began = time.process_time()
    recommender.fit(ratings)
    trained = time.process_time() - began
    began = time.process_time()
    found = recommender.recommend(recommender.users.ids, 10)
    took = time.process_time() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.process_time()
    factors = BASELINES["als"].fit(ratings, 0, "ml-100k")
    als_trained = time.process_time() - began
    began = time.process_time()
    for users in torch.arange(ratings.n_users).split(256):
        scores = factors.score_items(users)
        assert scores is not None
        scores.topk(10)
    als_took = time.process_time() - began
    return {
        "training_seconds": trained,
        "recommend_seconds": took,
        "als_training_seconds": als_trained,
        "als_recommend_seconds": als_took,
        "rows": len(found),
        "peak_mib": peak / 1024,
        "before_mib": before / 1024,
    }


def optimizer() -> dict[str, Any]:
    """Steps of recipe best with one member, vectors of 16 and histories, on a million items with a rating
    each: seconds of a step and those of Adam's part of it, bytes, and the rows that a batch has gradients of.
    """
    rng = np.random.default_rng(0)
    users, items = 10_000, 1_000_000
    pairs = torch.from_numpy(rng.integers(0, users, items)), torch.from_numpy(rng.permutation(items))
    ratings = torch.from_numpy(rng.integers(1, 6, items)).float()
    config = recipe("best", items, members=1, embedding_size=16, mlp=False)
    model = RatingModel(config, *pairs, ratings, users, items)
    adam, generator = rating_optimizer(model), torch.Generator().manual_seed(0)
    whole, own, touched = [], [], []
    for rows in torch.arange(6 * config.batch_size).split(config.batch_size):
        began = time.process_time()
        loss, _ = rating_objective(model, *(side[rows] for side in (*pairs, ratings)), generator)
        adam.zero_grad()
        loss.backward()
        before = time.process_time()
        adam.step()
        ended = time.process_time()
        whole.append(ended - began)
        own.append(ended - before)
        gradients = [table.weight.grad for table in model.tables()]
        touched.append(sum(int(g.abs().sum(1).gt(0).sum()) for g in gradients if g is not None))
    # The first step makes the moments.
    return {
        "step_seconds": statistics.median(whole[1:]),
        "adam_seconds": statistics.median(own[1:]),
        "touched_rows": statistics.median(touched),
        "rows": sum(len(table.weight) for table in model.tables()),
        "parameters_mib": sum(p.numel() for p in model.parameters()) / 2**18,
        "moments_mib": sum(state["exp_avg"].numel() * 2 for state in adam.state.values()) / 2**18,
        "batch": config.batch_size,
    }


def movielens_rows(folder: str | None) -> dict[str, Any]:
    ratings = movielens.load("ml-100k", None if folder is None else Path(folder))
    found: dict[str, list[float]] = {}
    for seed in SEEDS:
        training, test = parts_of(ratings, seed)
        for name in ("best", "auto"):
            found.setdefault(f"ours, {name}", []).append(ours(name, training, test, seed)[0])
        print(found, file=sys.stderr, flush=True)
    return {"mse": found}


def measure(results: Results, wanted: dict[str, Callable[[], dict[str, Any]]]) -> None:
    """Each part that this code has not measured yet, written as soon as it has."""
    path = results.path(f"{NAME}.json")
    parts = json.loads(path.read_text())["parts"] if path.exists() else {}
    for name, run in wanted.items():
        if parts.get(name, {}).get("code") != results.code:
            parts[name] = {**run(), "commit": results.machine["commit"], "code": results.code}
            results.write(NAME, {"parts": parts})


def main() -> None:
    options = parser(__doc__, data=True)
    options.add_argument("part", choices=["errors", "units", "large", "optimizer", "movielens"])
    options.add_argument("--only", nargs="+", choices=[*FILES], help="of errors, these data sets")
    given = options.parse_args()
    results = open_results(given, threads=1)
    wanted: dict[str, Callable[[], dict[str, Any]]] = {}
    if given.part == "errors":
        if given.data_dir is None:
            raise SystemExit("errors reads foreign/ and filmtrust/: name their folder with --data-dir")
        for name in given.only or FILES:
            wanted[name] = partial(errors_in, Path(given.data_dir), FILES[name])
    elif given.part == "movielens":
        wanted["movielens"] = lambda: movielens_rows(given.data_dir)
    else:
        wanted[given.part] = {"units": units, "large": large, "optimizer": optimizer}[given.part]
    measure(results, wanted)


if __name__ == "__main__":
    main()

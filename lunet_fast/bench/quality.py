"""Time to a test error on real ratings: whole trainings of recipe ``best`` and of other recommenders.

A training's clock is of training alone: no reading, no splitting, no evaluation.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lunet_fast.bench.contenders import Unavailable
from lunet_fast.recsys.data.movielens import load
from lunet_fast.recsys.data.ratings import Ratings
from lunet_fast.recsys.data.splits import random_split
from lunet_fast.recsys.evaluation.adapters import matrix_factorisation
from lunet_fast.recsys.evaluation.baselines import BASELINES, missing
from lunet_fast.recsys.evaluation.fitted import Fitted
from lunet_fast.recsys.evaluation.peer_settings import settings_for
from lunet_fast.recsys.measures import metrics
from lunet_fast.recsys.model.config import TrainConfig, nearest_dataset, recipe
from lunet_fast.recsys.model.network import RatingModel
from lunet_fast.recsys.model.training import train

OURS_BEST = "LU-Net, recipe best"

#: Numbers of CPU threads to train with, where a method can use more than one.
THREADS = (1, 2)


@dataclass(frozen=True)
class Quality:
    """One method trained once: how long it took, and how well it predicts the test part."""

    dataset: str
    seed: int
    method: str
    settings: str
    threads: int
    seconds: float | None = None
    """Of training alone: no reading, no evaluation; a peer's with its own form of the data. None where it is
    missing."""
    test_mse: float | None = None
    """Of predictions clipped to the scale, after the last epoch or sample."""
    ours_seconds: float | None = None
    """Seconds in which our training, with as many threads, first had this MSE or less at the end of an epoch;
    None if it never had."""
    curve: list[tuple[float, float]] = field(default_factory=list)
    """Of ours: (seconds, test MSE) at the end of each epoch."""
    missing: str = ""
    """Why a peer could not take part."""


@dataclass(frozen=True)
class Timed:
    """What a peer's training gave: seconds, and predictions [N] of the test pairs, not clipped."""

    seconds: float
    prediction: Tensor


def fit_cornac(training: Ratings, test: Ratings, seed: int, threads: int) -> Timed:
    """cornac's MF with biases. With more than one thread it is not reproducible, and takes no seed.

    Raises:
        Unavailable: cornac is not installed.
    """
    settings = settings_for("mf", nearest_dataset(len(training) + len(test)))
    return _fit("mf", test, lambda: matrix_factorisation(training, seed, settings, threads))


def fit_myfm(key: str, training: Ratings, test: Ratings, seed: int, threads: int = 1) -> Timed:
    """A Bayesian factorisation machine of myFM's, the baseline of that key; it has one thread.

    Raises:
        Unavailable: myFM is not installed.
    """
    size = nearest_dataset(len(training) + len(test))
    return _fit(key, test, lambda: BASELINES[key].fit(training, seed, size))


def _fit(key: str, test: Ratings, fit: Callable[[], Fitted]) -> Timed:
    """What ``fit`` trains, the baseline of that key, timed; its package is imported before."""
    reason = missing(BASELINES[key])
    if reason is not None:
        raise Unavailable(reason)
    began = time.perf_counter()
    fitted = fit()
    seconds = time.perf_counter() - began
    prediction = fitted.predict(test.user, test.item)
    assert prediction is not None
    return Timed(seconds, prediction)


class Peer(NamedTuple):
    """A recommender to compare with: what it is called, its settings, and how it is trained."""

    name: str
    settings: str
    threads: Sequence[int]
    fit: Callable[[Ratings, Ratings, int, int], Timed]
    """(training part, test part, seed, threads)."""


def peers(n_ratings: int, threads: Sequence[int] = THREADS) -> list[Peer]:
    """The peers with their settings for data of ``n_ratings`` ratings; myFM samples on one thread."""
    size = nearest_dataset(n_ratings)
    mf, one = settings_for("mf", size), [count for count in threads if count == 1] or [1]
    factors = f"k = {mf['factors']}, rate {mf['rate']:g}, L2 {mf['l2']:g}, {mf['epochs']} epochs"
    found = [Peer("cornac MF with biases", factors, threads, fit_cornac)]
    for name, key in (("myFM", "bayesian-fm"), ("myFM, implicit blocks", "bayesian-svd++")):
        gibbs = settings_for(key, size)
        sampling = f"rank {gibbs['rank']}, {gibbs['samples']} Gibbs samples"
        found.append(Peer(name, sampling, one, partial(fit_myfm, key)))
    return found


def time_to_quality(
    data_dir: Path | str | None,
    datasets: Sequence[str] = ("ml-100k",),
    seed: int = 0,
    *,
    threads: Sequence[int] = THREADS,
    told: Callable[[Quality], None] = lambda quality: None,
) -> list[Quality]:
    """Whole trainings of recipe ``best`` and of the peers on a random 80/20 split by ``seed``.

    ML-100K takes about a minute, ML-1M about ten.

    Args:
        data_dir: folder with the MovieLens files; None looks where ``movielens.load`` says.
        datasets: names of bundled data sets.
        threads: CPU threads to train with, each in turn; myFM has one.
        told: called after each training.

    Raises:
        ValueError: an unknown data set, or a number of threads below 1.
        DataNotFoundError: no source has the data set.
    """
    found: list[Quality] = []
    for name in datasets:
        ratings = load(name, data_dir)
        config = recipe("best", len(ratings), seed=seed, mlp=False)
        found += compare(ratings, config, peers(len(ratings), threads), threads=threads, told=told)
    return found


def compare(
    ratings: Ratings,
    config: TrainConfig,
    against: Sequence[Peer],
    *,
    threads: Sequence[int] = THREADS,
    told: Callable[[Quality], None] = lambda quality: None,
) -> list[Quality]:
    """``config`` trained with each number of threads, and the peers, on the random split by its seed.

    Raises:
        ValueError: ``threads`` is empty or holds a number below 1.
    """
    if not threads or min(threads) < 1:
        raise ValueError(f"threads must be one or more numbers of at least 1, got {list(threads)}")
    split = random_split(ratings, config.seed)
    training, test = ratings.select(split.train), ratings.select(split.test)
    results = []

    def note(quality: Quality) -> None:
        results.append(quality)
        told(quality)

    for count in threads:
        note(_train_ours(training, test, config.replace(threads=count)))
    ours = {quality.threads: quality for quality in results}
    for peer in against:
        for count in peer.threads:
            quality = Quality(ratings.name, config.seed, peer.name, peer.settings, count)
            try:
                fitted = peer.fit(training, test, config.seed, count)
            except Unavailable as reason:
                note(replace(quality, missing=str(reason)))
                continue
            mse = metrics.mse(fitted.prediction.clamp(*ratings.scale), test.rating)
            reached = None if count not in ours else first_reached(ours[count].curve, mse)
            note(replace(quality, seconds=fitted.seconds, test_mse=mse, ours_seconds=reached))
    return results


def _train_ours(training: Ratings, test: Ratings, config: TrainConfig) -> Quality:
    began = time.perf_counter()
    with torch.random.fork_rng(devices=[]):
        shape = (training.n_users, training.n_items)
        RatingModel(config, training.user, training.item, training.rating, *shape)
    # The trainer's clock runs in its epochs alone; making the model is a part of training too.
    making = time.perf_counter() - began
    result = train(training, config, test=test)
    seconds = [making + elapsed for elapsed in result.curve.elapsed]
    curve = list(zip(seconds, result.curve.test, strict=True))
    settings = (
        f"K = {config.members}, k = {config.embedding_size}, M = {config.layers}, {config.epochs} epochs"
    )
    mse = result.metrics["test_mse"]
    return Quality(
        training.name, config.seed, OURS_BEST, settings, config.threads, seconds[-1], mse, seconds[-1], curve
    )


def first_reached(curve: Sequence[tuple[float, float]], mse: float) -> float | None:
    """Seconds at the first point of (seconds, test MSE) that is no worse than ``mse``, None if none is."""
    return next((seconds for seconds, error in curve if error <= mse), None)


def line(quality: Quality) -> str:
    """One training in words."""
    head = f"{quality.dataset}, {quality.method}, {quality.threads} thread" + "s" * (quality.threads > 1)
    if quality.missing:
        return f"{head}: missing, {quality.missing}"
    tail = ""
    if not quality.curve:
        reached = quality.ours_seconds
        tail = ", which ours had " + ("never" if reached is None else f"after {reached:.2f} s")
    return f"{head}: {quality.seconds:.2f} s to test MSE {quality.test_mse:.4f}{tail}"

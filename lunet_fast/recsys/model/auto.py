"""Recipe ``auto``: settings for ratings of any unit and size, chosen on a part of the training data alone.

What is learnt is standardised and added to shrunk biases. Size and batch follow the numbers of ratings, users
and items; the strengths of the biases, the network's penalty, and the factor that its rating is multiplied by
are found on validation folds of the training part. Where the data say no more than biases do, the factor goes
to 0 and biases are left. Where they surely say more, biases are learnt with the network, or ratings by their
levels (loss ``ordinal``). Beside the network stand samples of a posterior with f the identity (inference
``gibbs``), whose average over what few ratings leave open no single optimum has: the better of the two is
taken, where the network is not surely so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lunet_fast.recsys.data.ratings import Ratings
from lunet_fast.recsys.measures.protocols import Parts
from lunet_fast.recsys.model.config import TrainConfig, recipe
from lunet_fast.recsys.model.network import MOST_LEVELS, RatingModel
from lunet_fast.recsys.model.offsets import shrunk_biases
from lunet_fast.recsys.model.training import train
from lunet_fast.recsys.model.transform import Transform
from lunet_fast.training.files import RunFolder, RunFolderError, read_json
from lunet_fast.training.loop import Callback

AUTO = "auto"
PENALTIES = (0.04, 0.08, 0.2)
"""Of z, that are tried: recipe ``best`` has the first on ML-100K."""
ALTERNATIVES = 2
"""Settings of another kind that are tried at most."""
NOISES = (0.75, 0.5, 0.25, 0.0)
MORE_NOISE = 1.0
"""Of inference ``gibbs``, that are tried in this order up to the first that is worse; where that is the
second, MORE_NOISE is tried too. The variance of standardised ratings is 1.27. Sampled, which 0 stands for, it
falls too low where most users have few ratings, and alike ones."""
RANK, RANK_OF_FEW, RANK_OF_MANY = 8, 4, 16
MANY = 12_000
"""Ratings from which one validation part is large enough, and a higher rank is tried, not a lower one."""
SAMPLED_TRIAL = {"epochs": 160, "members": 50}
"""Sweeps and members of a trial: fewer show the errors of few samples, which the whole does not have."""
MOST_SWEPT, LEAST_SWEEPS = 80_000_000, 250
"""Ratings that all sweeps of a sampling go over: where they are many, sweeps are fewer."""
MOST_SAMPLED = 20_000
"""Users and items whose vectors are sampled: each sweep solves a system for each of them."""
BIAS_L2 = (0.3, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)
TRIAL_MEMBERS = 4
LARGE = 300_000
"""Ratings from which the settings are those of recipe ``best``, found on ML-1M, with standardised ratings: a
search takes longer than it gains there."""
STEPS, LEAST_BATCH = 100, 64
"""Steps an epoch: few teach nothing."""
MOST_NUMBERS = 4_000_000
"""In the tables of all members."""
MOST_SCORED = 10**10
"""Numbers of a layer of all members for all pairs of user and item: what recommendations for all users
compute."""
SKEWED = 3.0
"""Skewness of ratings from which a transform is proposed; that of an exponential distribution is 2."""

Told = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """What a training will take."""

    config: TrainConfig
    notes: list[str] = field(default_factory=list)
    folds: int = 0
    parameters: int = 0
    bytes: int = 0
    seconds: float = 0.0
    """Of one core, the search included; within a factor of two or three."""


def auto_config(
    ratings: Ratings,
    test: Ratings | None = None,
    *,
    device: torch.device | str = "cpu",
    told: Told | None = None,
    **given: Any,
) -> TrainConfig:
    """The settings of recipe ``auto`` for these ratings; those ``given`` are kept.

    ``ratings`` and ``test`` are what :func:`~lunet_fast.recsys.model.training.train` is to be called with:
    what it will test on is not looked at. The same arguments give the same settings. ``told`` is told what
    was chosen. ``ValueError`` for a setting that cannot work, and where all ratings are equal, which leaves
    nothing to predict.
    """
    made = plan(ratings, **given)
    if told is not None:
        for note in made.notes:
            told(note)
    config = made.config
    if not made.folds and config.patience is None:
        return config
    training = ratings if test is not None else Parts.of(ratings, config.split, config.seed).training
    search = _Search(training, config, max(made.folds, 1), device)
    if made.folds and "offset_l2_user" not in given and "offset_l2_item" not in given:
        config = search.biases()
    if made.folds and config.offset == "biases" and not {"strength", "l2_latent"} & given.keys():
        sampled = search.sampled(_sampled(training, given))
        config = search.network(_alternatives(training, given), sampled)
    if config.patience is not None:
        most, config = config.epochs, search.epochs(config.patience)
        if told is not None:
            told(f"recipe auto: {config.epochs} of at most {most} epochs (chosen on a validation part)")
    if made.folds and told is not None:
        parts = "a validation part" if made.folds == 1 else f"{made.folds} validation parts"
        told(f"recipe auto: {_in_words(config)}, chosen on {parts}")
    return config


def _in_words(config: TrainConfig) -> str:
    if config.inference == "gibbs":
        noise = f"noise of variance {config.noise:g}" if config.noise else "noise that is sampled too"
        return (
            f"{config.members} samples of the posterior (inference gibbs), vectors of "
            f"{config.embedding_size}, {noise}, {'with' if config.user_history else 'without'} histories"
        )
    if config.offset == "biases":
        return (
            f"biases of users and items with L2 {config.offset_l2_user:g} and {config.offset_l2_item:g}, the "
            f"network's penalty {config.l2_latent:g}, its rating times {config.strength:.2f}"
        )
    learnt = "the levels of ratings (loss ordinal)" if config.loss == "ordinal" else "ratings"
    return f"{learnt} less their mean, with learnt biases, the network's penalty {config.l2_latent:g}"


def _sampled(training: Ratings, given: Mapping[str, Any]) -> TrainConfig | None:
    """The settings of inference ``gibbs`` but for what is searched, unless those ``given`` are the network's
    or there is too much to sample."""
    apart = given.keys() - {"recipe", "seed", "split", "threads", "transform", "side_features", "mlp"}
    if apart or training.n_users + training.n_items > MOST_SAMPLED:
        return None
    return _sized(len(training), training.n_users, training.n_items, {**given, "inference": "gibbs"})


def _alternatives(training: Ratings, given: Mapping[str, Any]) -> list[TrainConfig]:
    """What may predict better than a network on shrunk biases, where ratings are many: biases learnt with it,
    and of few levels their probabilities."""
    sizes = len(training), training.n_users, training.n_items
    found = []
    if not {"offset", "transform"} & given.keys():
        found.append(_sized(*sizes, {**given, "offset": "mean"}))
        levels = torch.unique(training.rating)
        if "loss" not in given and 2 <= len(levels) <= MOST_LEVELS:
            found.append(_sized(*sizes, {**given, "loss": "ordinal"}))
    return found


def found_before(out: Path, given: Mapping[str, Any]) -> TrainConfig | None:
    """The settings that a training of recipe ``auto`` in the run folder ``out`` began with, to resume it.

    None where none has begun, or of another recipe. ``RunFolderError`` where they are damaged, or other than
    those ``given``; that the data are the same is seen when the training goes on.
    """
    folder = RunFolder(out)
    recorded = read_json(folder.config) if folder.config.is_file() else {}
    if recorded.get("recipe") != AUTO:
        return None
    try:
        config = TrainConfig.from_dict({k: v for k, v in recorded.items() if k in TrainConfig.model_fields})
    except ValueError as error:
        raise RunFolderError(
            f"{folder.config}: {error}: it is not as the training wrote it; start anew with overwrite=True"
        ) from error
    looked_for = {"epochs"} if config.patience is not None else set()
    for name, value in given.items():
        found = getattr(config, name, None)
        if name not in looked_for and found != value:
            raise RunFolderError(
                f"{folder.path} was trained with {name}={found!r}, not {value!r}: give the same settings to "
                "resume it, or choose another out=FOLDER"
            )
    return config


def plan(ratings: Ratings, **given: Any) -> Plan:
    """The settings but for what is found by trying, and what a training with them takes. O(N)."""
    n, n_users, n_items = len(ratings), ratings.n_users, ratings.n_items
    config = _sized(n, n_users, n_items, given)
    notes = []
    if config.gamma > 0 and n:
        r = ratings.rating.double()
        spread = float(r.std(correction=0))
        if spread == 0 or float(r.min()) == float(r.max()):
            raise ValueError(
                f"all {n:,} ratings are {float(r[0]):g}, which leaves nothing to predict: to learn who chose "
                "what, train with gamma=0"
            )
        skewness = float(((r - r.mean()) / spread).pow(3).mean())
        if abs(skewness) > SKEWED and config.transform == "standard":
            notes.append(
                f"ratings from {float(r.min()):g} to {float(r.max()):g} with a median of "
                f"{float(r.median()):g} are very skewed (skewness {skewness:.0f}), as counts are: consider "
                "transform='log' or transform='rank', or gamma=0"
            )
    searched = config.gamma == 1 and config.loss != "ordinal" and n < LARGE and config.offset == "biases"
    folds = (4 if n < 3000 else 2 if n < MANY else 1) if searched and n >= 20 else 0
    return estimated(config, ratings, folds, notes)


def estimated(config: TrainConfig, ratings: Ratings, folds: int = 0, notes: Sequence[str] = ()) -> Plan:
    """What training all of ``ratings`` takes, with a search on so many ``folds`` before it. O(1)."""
    n = len(ratings)
    numbers = _numbers(config, ratings.n_users, ratings.n_items)
    steps = config.epochs * math.ceil(n / config.batch_size)
    trial = config.replace(members=min(config.members, TRIAL_MEMBERS))
    if config.inference == "gibbs":
        seconds = config.epochs * _seconds_of_a_sweep(config.embedding_size, ratings)
        # Float32 parameters; of each user and item a matrix, its triangle and its factor in float64.
        rows, each = ratings.n_users + ratings.n_items, config.embedding_size + 1
        held = 4 * numbers + 20 * each**2 * rows
    else:
        seconds = steps * _seconds_of_a_step(config, n)
        # Parameters, their gradients and Adam's two averages.
        held = 16 * numbers + 96 * config.batch_size * config.members * 2 * config.embedding_size
    trials = folds * (len(PENALTIES) + ALTERNATIVES) + (config.patience is not None)
    seconds += trials * steps * _seconds_of_a_step(trial, n)
    if folds and ratings.n_users + ratings.n_items <= MOST_SAMPLED:
        sweeps = folds * (len(NOISES) + 3) * SAMPLED_TRIAL["epochs"]
        seconds += sweeps * _seconds_of_a_sweep(RANK, ratings)
    # And a row of ratings while it is read.
    return Plan(config, list(notes), folds, numbers, held + 200 * n, seconds)


def _sized(n: int, n_users: int, n_items: int, given: Mapping[str, Any]) -> TrainConfig:
    """The settings that follow from the numbers of ratings, users and items alone."""
    base = recipe("best", n, **given)
    settings: dict[str, Any] = {"recipe": AUTO, "mlp": False}
    if base.loss != "ordinal" and base.gamma > 0:
        settings["transform"] = "standard"
    if n < LARGE:
        each = n / max(n_users, n_items, 1)
        size = 4 if each < 3 else 8 if each < 12 else base.embedding_size
        batch = 2 ** round(math.log2(max(n / STEPS, 1)))
        settings |= {
            "embedding_size": min(size, base.embedding_size),
            "batch_size": min(max(batch, LEAST_BATCH), base.batch_size),
        }
        if base.inference == "gibbs":
            sweeps = max(MOST_SWEPT // max(n, 1), LEAST_SWEEPS)
            settings |= {"embedding_size": RANK, "epochs": min(sweeps, base.epochs)}
        settings["members"] = _members(base, settings["embedding_size"], n_users, n_items)
        if base.inference != "gibbs" and base.gamma == 1 and base.loss != "ordinal":
            settings["offset"] = "biases"
    return base.replace(**{**settings, **{k: v for k, v in given.items() if k != "recipe"}})


def _members(base: TrainConfig, size: int, n_users: int, n_items: int) -> int:
    """As many as ``base`` has where tables and recommendations for everybody stay within bounds."""
    tables = (1 + int(base.user_history or base.item_history)) * (n_users + n_items) * size
    pairs = n_users * n_items * 2 * size
    return max(min(MOST_NUMBERS // max(tables, 1), MOST_SCORED // max(pairs, 1), base.members), 1)


def _numbers(config: TrainConfig, n_users: int, n_items: int) -> int:
    """Parameters, of side features aside."""
    size, members, heads = config.embedding_size, config.members, 2 - (config.gamma in (0, 1))
    rows = n_users * (1 + config.item_history) + n_items * (1 + config.user_history)
    alone = (n_users + n_items) * int(config.biases and config.gamma > 0) + n_items * int(config.gamma < 1)
    nets = config.depth * (4 * size * size + 2 * size) + heads * (2 * size + 1)
    return members * (rows * size + alone + nets)


def _seconds_of_a_step(config: TrainConfig, n: int) -> float:
    """Of one core of 2024, measured on rating files of 1,000 to 100,000 rows."""
    size, members = config.embedding_size, config.members
    network = 3 * config.batch_size * members * 4 * size * size * config.depth
    histories = n * members * size * (int(config.user_history) + int(config.item_history))
    return 4e-3 + 3e-10 * network + 3e-10 * histories


def _seconds_of_a_sweep(size: int, ratings: Ratings) -> float:
    """The same of inference ``gibbs``."""
    each, rows = size + 1, ratings.n_users + ratings.n_items
    return 2e-3 + 4e-8 * each * (1 + each / 64) * len(ratings) + 5e-10 * each**3 * rows


class _Search:
    """What is found by trying on folds of the training part, each part of it by itself."""

    def __init__(self, training: Ratings, config: TrainConfig, folds: int, device: Any) -> None:
        self.config, self.device = config, device
        order = np.random.default_rng((config.seed, 5)).permutation(len(training))
        share = max(len(order) // (5 if folds > 1 else 8), 1)
        self.folds = []
        for fold in range(folds):
            part = order[fold * share : (fold + 1) * share]
            rest = np.setdiff1d(order, part)
            rows = (training.select(torch.from_numpy(np.sort(which))) for which in (rest, part))
            self.folds.append(tuple(rows))

    def biases(self) -> TrainConfig:
        """The strengths of the biases' L2 with the least error, by turns over BIAS_L2."""
        chosen = [self.config.offset_l2_user, self.config.offset_l2_item]
        learnt = [_learnt(part, self.config) for part in self.folds]
        for side in (1, 0, 1, 0):
            tried = {}
            for l2 in BIAS_L2:
                chosen[side] = l2
                tried[l2] = sum(_error_of_biases(*part, (chosen[0], chosen[1])) for part in learnt)
            chosen[side] = min(tried, key=tried.__getitem__)
        self.config = self.config.replace(offset_l2_user=chosen[0], offset_l2_item=chosen[1])
        return self.config

    def sampled(self, config: TrainConfig | None) -> _Found | None:
        """Noise, histories and rank of inference ``gibbs`` with the least error, one after the other."""
        if config is None:
            return None

        def better(best: _Found, **change: Any) -> _Found:
            found = self._found(best.config.replace(**change))
            return found if found.errors.mean() < best.errors.mean() else best

        first = best = self._found(config.replace(noise=NOISES[0]))
        for noise in NOISES[1:]:
            before, best = best, better(best, noise=noise)
            if best is before:
                break
        if best is first:
            best = better(best, noise=MORE_NOISE)
        best = better(best, user_history=False, item_history=False)
        return better(best, embedding_size=RANK_OF_MANY if len(self.folds) == 1 else RANK_OF_FEW)

    def _found(self, config: TrainConfig) -> _Found:
        trial = config.replace(**SAMPLED_TRIAL)
        return _Found(config, torch.cat([self._tried(trial, *fold).errors() for fold in self.folds]))

    def network(self, alternatives: Sequence[TrainConfig], sampled: _Found | None = None) -> TrainConfig:
        """The penalty of z with the least error, on a ladder up to the first that is worse, and the strength
        of the network's rating; or one of ``alternatives``, if it errs less by more than the standard error
        of the difference; or what is ``sampled``, unless it errs more by that much. Where it surely errs
        less, no more is tried."""
        best: tuple[float, float, float] | None = None
        errors = torch.empty(0)
        for penalty in PENALTIES:
            trial = self.config.replace(l2_latent=penalty, strength=1.0)
            tried = [self._tried(trial, *fold) for fold in self.folds]
            network, left = (torch.cat([getattr(one, name) for one in tried]) for name in ("network", "left"))
            strength, error = shrunk_factor(network, left)
            if best is not None and error >= best[0]:
                break
            best = (error, penalty, strength)
            errors = torch.cat([one.errors(one.offset + strength * one.network) for one in tried])
            if sampled is not None and _surely_positive(errors - sampled.errors):
                self.config = sampled.config
                return self.config
        assert best is not None
        self.config = self.config.replace(l2_latent=best[1], strength=round(best[2], 3))
        # Where the network finds nothing, learnt biases would find no more than the shrunk ones.
        for other in alternatives if best[2] > 0 else ():
            found = torch.cat([self._tried(other, *fold).errors() for fold in self.folds])
            if _surely_positive(errors - found):
                errors, self.config = found, other
        if sampled is not None and not _surely_positive(sampled.errors - errors):
            self.config = sampled.config
        return self.config

    def epochs(self, patience: int) -> TrainConfig:
        """The number of epochs with the least error, once that has not fallen for ``patience`` of them."""
        rest, part = self.folds[0]
        trial = self.config.replace(members=min(self.config.members, TRIAL_MEMBERS), split="none", mlp=False)
        errors = train(
            rest, trial, test=part, device=self.device, callbacks=[_has_not_fallen(patience)]
        ).curve.test
        self.config = self.config.replace(epochs=1 + errors.index(min(errors)))
        return self.config

    @torch.no_grad()
    def _tried(self, trial: TrainConfig, rest: Ratings, part: Ratings) -> _Tried:
        """What a model of few members, trained on ``rest``, says of the rows of ``part``."""
        most = trial.members if trial.inference == "gibbs" else TRIAL_MEMBERS
        trial = trial.replace(members=min(trial.members, most), split="none", mlp=False)
        with torch.enable_grad():
            model = train(rest, trial, device=self.device).trained.model
        score = model.output(part.user, part.item, observed=False).score
        assert score is not None
        predicted = model(part.user, part.item)
        seen = model.interactions
        known = (seen.user_counts[part.user] > 0) & (seen.item_counts[part.item] > 0)
        offset = model.offset(part.user, part.item)
        return _Tried(model, score.mean(0), offset, known, part.rating, predicted)


class _Found(NamedTuple):
    """Settings, and the squares of their errors on all validation folds."""

    config: TrainConfig
    errors: Tensor


def _surely_positive(gain: Tensor) -> bool:
    """Whether the mean is more than its standard error."""
    return bool(gain.mean() > gain.std() / math.sqrt(len(gain)))


class _Tried(NamedTuple):
    """Of each row of a validation part: read-out, offset, whether user and item are known, rating, and what
    the model predicts."""

    model: RatingModel
    score: Tensor
    offset: Tensor
    known: Tensor
    rating: Tensor
    predicted: Tensor

    @property
    def network(self) -> Tensor:
        """The network's rating, as it is learnt; 0 for whom it does not know."""
        return ((self.score - self.offset) * self.known).double()

    @property
    def left(self) -> Tensor:
        """What the offset leaves of the ratings, as they are learnt."""
        return (self.model.transform(self.rating) - self.offset).double()

    @torch.no_grad()
    def errors(self, score: Tensor | None = None) -> Tensor:
        """The squares of the errors of the ratings that belong to ``score``, or of the model's own."""
        low, high = float(self.rating.min()), float(self.rating.max())
        rating = self.predicted if score is None else self.model.rating(score.float())
        return (rating.clamp(low, high) - self.rating).double().square()


def _has_not_fallen(patience: int) -> Callback:
    """Ends a training once its error on the test part has had its least ``patience`` epochs ago."""
    errors: list[float] = []

    def enough(epoch: int, figures: dict[str, float]) -> bool:
        errors.append(figures["test_loss"])
        return epoch - 1 - errors.index(min(errors)) >= patience

    return enough


def shrunk_factor(network: Tensor, left: Tensor) -> tuple[float, float]:
    """(factor, error): least squares of ``left`` ``[N]`` by factor · ``network``, shrunk by its own error.

    factor · max(0, 1 - se² / factor²), the positive-part estimate of James and Stein, and at most 1.2; the
    error is the mean square of what the unshrunk factor leaves.
    """
    size = float(network.square().sum())
    if size == 0 or len(left) < 3:
        return 0.0, float(left.square().mean())
    factor = float((network * left).sum()) / size
    factor = min(max(factor, 0.0), 1.2)
    error = float((left - factor * network).square().mean())
    variance = error / size
    return (factor * max(0.0, 1 - variance / factor**2) if factor > 0 else 0.0), error


def _learnt(fold: tuple[Ratings, ...], config: TrainConfig) -> tuple[Ratings, Ratings, Tensor, Tensor]:
    """Both parts of a fold, and what is learnt of their ratings, less its mean in the first."""
    rest, part = fold
    transform = Transform(config.transform)
    transform.fit_(rest.rating)
    ours, theirs = (transform(side.rating).double() for side in (rest, part))
    return rest, part, ours - ours.mean(), theirs - ours.mean()


def _error_of_biases(
    rest: Ratings, part: Ratings, ours: Tensor, theirs: Tensor, l2: tuple[float, float]
) -> float:
    of_user, of_item = shrunk_biases(rest.user, rest.item, ours, (rest.n_users, rest.n_items), l2)
    return float((theirs - of_user[part.user] - of_item[part.item]).square().sum())

"""The same search for every method that ``compare`` runs, ours among them.

The test part is taken away first and never read. What is left is divided again in the same way: a trial
learns from the one part and is judged on the other. Every method has the same seconds of processor time for
trials, the same sampler, and begins with the settings that are declared; these and the best of the others
are then trained in full, as a comparison trains them, and what is better on the same part is chosen.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from lunet_fast.recsys.data.ratings import Ratings
from lunet_fast.recsys.evaluation.baselines import BASELINES, missing
from lunet_fast.recsys.evaluation.compare import METHODS, judged
from lunet_fast.recsys.evaluation.peer_settings import SETTINGS, chosen
from lunet_fast.recsys.evaluation.ranges import Choice, Range
from lunet_fast.recsys.evaluation.tuning import of_a_trial, ranges_of
from lunet_fast.recsys.measures.protocols import Parts
from lunet_fast.recsys.model.config import TrainConfig
from lunet_fast.recsys.model.training import train
from lunet_fast.training.loop import DivergenceError

MEMBERS = 4
"""Of ours in a trial, at most: more only cost time."""

FINALISTS = 1
"""How many of the trials are trained in full, beside those of settings known before."""

MEASURES: dict[str, tuple[str, Literal["minimize", "maximize"]]] = {
    "rating": ("test_mse", "minimize"),
    "ranking": ("ndcg@10", "maximize"),
}


@dataclass(frozen=True)
class Trial:
    """Settings that were tried."""

    settings: dict[str, Any]
    value: float | None
    """The figure on the validation part; None where the training failed."""
    cpu_seconds: float
    full: bool = False
    """Whether it was trained as a comparison trains it."""
    error: str = ""


@dataclass(frozen=True)
class Found:
    """What a search of one method has found."""

    measure: str
    direction: str
    seconds: float
    """Of processor time that the trials had together; the last one was finished."""
    seed: int
    first: dict[str, Any]
    """The settings before the search, those of its first trial."""
    trials: list[Trial]
    """In order; those in full are the last ones, of the settings known before and of the best others. A value
    that is not among a trial's settings is the declared one."""
    settings: dict[str, Any]
    """The best of those in full."""
    value: float
    at_ends: dict[str, str] = field(default_factory=dict)
    """Of ``settings`` those at an end of their range, ``low`` or ``high``: the range should be wider."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class _Searched:
    """One method as a search sees it."""

    ranges: dict[str, Range | Choice]
    first: dict[str, Any]
    train: Callable[[dict[str, Any], bool], float]
    """(settings, in full) -> the figure on the validation part."""


def searchable() -> list[str]:
    """The keys of the methods with settings to search, in the order of tables."""
    return [
        key
        for key, method in METHODS.items()
        if method.settings_key == key and len(method.kinds) == 1 and _ranges(key)
    ]


def _ranges(key: str) -> dict[str, Range | Choice]:
    method = METHODS[key]
    if not method.is_lu_net:
        return {name: each.range for name, each in SETTINGS[key].items() if each.range is not None}
    if method.recipe != "best":
        return {}
    return ranges_of(_config(key, 0, 0))


def _config(key: str, n_ratings: int, seed: int) -> TrainConfig:
    """The settings of a row of ours before the search."""
    config = METHODS[key].config(n_ratings, seed, searched=False)
    assert isinstance(config, TrainConfig)
    return config


def search(
    ratings: Ratings,
    key: str,
    *,
    seconds: float,
    seed: int = 0,
    told: Callable[[Trial], None] = lambda trial: None,
) -> Found:
    """Search the settings of one method, of :func:`searchable`, for ``seconds`` of processor time.

    The trial that begins before they are over is finished, so that there is one at least beside those of the
    settings that are known already; trainings in full, of the known and of the best others, come on top.
    ``seed`` is that of the splits, of the methods' draws and of Optuna's sampler. ``told`` hears of each
    trial.

    ``ImportError`` without Optuna or the method's package; ``ValueError`` for a key that has nothing to
    search, and where every training has failed.
    """
    if key not in searchable():
        raise ValueError(f"method {key!r} has no settings to search: choose from {', '.join(searchable())}")
    try:
        import optuna
    except ImportError as error:
        raise ImportError('tuning needs Optuna: pip install "lunet-fast[tune]"') from error
    measure, direction = MEASURES[METHODS[key].kind]
    if key in BASELINES and (reason := missing(BASELINES[key])) is not None:
        raise ImportError(reason)
    searched = (_ours if METHODS[key].is_lu_net else _peers)(ratings, key, seed)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction=direction, sampler=optuna.samplers.TPESampler(seed=seed))
    known = _known(key, searched)
    for settings in known:
        study.enqueue_trial(settings)
    trials: list[Trial] = []

    def tried(settings: dict[str, Any], full: bool) -> Trial:
        began = time.process_time()
        value, error = None, ""
        try:
            value = searched.train(settings, full)
        except (DivergenceError, ArithmeticError, ValueError) as wrong:
            error = f"{type(wrong).__name__}: {wrong}"
        found = Trial(settings, value, time.process_time() - began, full, error)
        trials.append(found)
        told(found)
        return found

    while len(trials) <= len(known) or sum(trial.cpu_seconds for trial in trials) < seconds:
        asked = study.ask()
        trial = tried({name: where.drawn(asked, name) for name, where in searched.ranges.items()}, False)
        study.tell(asked, trial.value, None if trial.value is not None else optuna.trial.TrialState.FAIL)
    sign = 1 if direction == "minimize" else -1

    def order(trial: Trial) -> float:
        return float("inf") if trial.value is None else sign * trial.value

    begun, others = trials[: len(known)], sorted(trials[len(known) :], key=order)[:FINALISTS]
    finals = [tried(trial.settings, True) for trial in (*begun, *others) if trial.value is not None]
    best = min(finals, key=order, default=None)
    if best is None or best.value is None:
        raise ValueError(f"{key}: no training has succeeded; the last one: {trials[-1].error}")
    ends = {name: where.end(best.settings[name]) for name, where in searched.ranges.items()}
    return Found(
        *(measure, direction, seconds, seed, trials[0].settings, trials, best.settings, best.value),
        {name: end for name, end in ends.items() if end},
    )


def _known(key: str, searched: _Searched) -> list[dict[str, Any]]:
    """Where a search begins: from the settings before any, and from those that another has chosen, so that a
    method never loses what it had."""
    first = {name: searched.first[name] for name in searched.ranges}
    again = {name: chosen().get(key, {}).get(name, value) for name, value in first.items()}
    return [first] if again == first else [first, again]


def _peers(ratings: Ratings, key: str, seed: int) -> _Searched:
    baseline = BASELINES[key]
    split = "random" if METHODS[key].kind == "rating" else "leave-one-out"
    parts = Parts.of(Parts.of(ratings, split, seed).training, split, seed)
    own = SETTINGS[key]
    first = {name: each.small for name, each in own.items()}
    cheap = {name: each.in_search for name, each in own.items() if each.in_search is not None}
    measure, _ = MEASURES[METHODS[key].kind]

    def train_peer(settings: dict[str, Any], full: bool) -> float:
        settings = {**first, **({} if full else cheap), **settings}
        return float(judged(baseline.fit_with(parts.training, seed, settings), parts, seed)[measure])

    return _Searched(_ranges(key), first, train_peer)


def _ours(ratings: Ratings, key: str, seed: int) -> _Searched:
    base = _config(key, len(ratings), seed)
    cheap = of_a_trial(base.inference, min(base.members, MEMBERS))
    rest = Parts.of(ratings, base.split, seed).training
    measure, _ = MEASURES[METHODS[key].kind]

    def train_ours(settings: dict[str, Any], full: bool) -> float:
        config = base.replace(**({} if full else cheap), **settings)
        return float(train(rest, config).metrics[measure])

    return _Searched(_ranges(key), base.to_dict(), train_ours)

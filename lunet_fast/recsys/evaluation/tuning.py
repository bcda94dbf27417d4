"""A search for settings on a validation part of the training data, by Optuna."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lunet_fast.recsys.data.ratings import Ratings
from lunet_fast.recsys.evaluation.ranges import Choice, Range
from lunet_fast.recsys.measures.protocols import Parts
from lunet_fast.recsys.model.auto import SAMPLED_TRIAL
from lunet_fast.recsys.model.config import TrainConfig, recipe
from lunet_fast.recsys.model.training import train
from lunet_fast.training.files import MOST_JSON_BYTES, CheckpointError, opened
from lunet_fast.training.loop import DivergenceError
from lunet_fast.training.schema import shown

if TYPE_CHECKING:
    import optuna
    import torch
    from optuna.storages.journal import JournalFileSymlinkLock

MEMBERS = 2
"""Of the model of a trial, unless they are given: more cost more time and order settings alike. Of inference
``gibbs`` a trial has what one of recipe ``auto`` has."""

RANGES: dict[str, Range | Choice] = {
    "embedding_size": Choice((4, 8, 16, 24, 32, 48, 64)),
    "layers": Range(1, 3),
    "epochs": Range(4, 32),
    "history_power": Range(0.1, 0.9),
    "learning_rate": Range(1e-3, 2e-2, log=True),
    "net_learning_rate": Range(5e-5, 3e-3, log=True),
    "dropout": Range(0.0, 0.3),
    "noise": Range(0.3, 1.5, log=True),
    "l2_latent": Range(5e-3, 0.3, log=True),
    "l2_interaction_embedding": Range(1e-5, 1e-2, log=True),
    "negatives": Range(1, 20),
    "interaction_share": Range(0.3, 0.8),
}
"""What a search varies, as far as it matters; the recipe's own values are its first trial."""
OF_SAMPLES = ("embedding_size", "history_power", "noise")
"""What there is to vary of inference ``gibbs``."""


@dataclass(frozen=True)
class Tuned:
    """What :func:`tune` found."""

    settings: dict[str, Any]
    """Fields of ``TrainConfig`` that the best trial had, beside those asked for."""
    value: float
    """Its figure on the validation part."""
    measure: str
    trials: int
    """Finished trials of the study, earlier ones included."""


def measure_of(gamma: float) -> tuple[str, Literal["minimize", "maximize"]]:
    """(what a trial is judged by, the direction): the MSE where ratings alone are learnt, else NDCG@10.

    Between gamma 0 and 1 both count: NDCG@10 less the MSE, so that .01 of one is worth .01 of the other.
    """
    if gamma == 1:
        return "test_mse", "minimize"
    return ("ndcg@10" if gamma == 0 else "ndcg@10 - test_mse"), "maximize"


def ranges_of(config: TrainConfig) -> dict[str, Range | Choice]:
    """The RANGES that matter with the gamma and the inference of these settings."""
    if config.inference == "gibbs":
        return {name: RANGES[name] for name in OF_SAMPLES}
    gamma = config.gamma
    unused = {
        "noise": True,
        "l2_latent": gamma == 0,
        "l2_interaction_embedding": gamma == 1,
        "negatives": gamma == 1,
        "interaction_share": gamma in (0, 1),
    }
    return {name: where for name, where in RANGES.items() if not unused.get(name)}


def of_a_trial(inference: str, members: int) -> dict[str, int]:
    """What makes a trial cheap: so many members, or as many samples as recipe ``auto`` tries with."""
    return SAMPLED_TRIAL if inference == "gibbs" else {"members": members}


def suggested(trial: optuna.Trial, config: TrainConfig) -> dict[str, Any]:
    """Settings of one trial, around those of recipe ``best``."""
    return {name: where.drawn(trial, name) for name, where in ranges_of(config).items()}


def opened_study(
    storage: Path | None, direction: Literal["minimize", "maximize"], seed: int, what: dict[str, Any]
) -> optuna.Study:
    """The study of ``what`` in a file, or a new one, in memory without a file.

    ``ImportError`` without Optuna, ``ValueError`` for a file that holds none, or one of something else.
    """
    try:
        import optuna
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock
    except ImportError as error:
        raise ImportError('tuning needs Optuna: pip install "lunet-fast[tune]"') from error

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    journal = None
    if storage is not None:
        # The lock is a link to the file: a relative one that a killed process left would lead nowhere, and
        # Optuna would wait for it for ever.
        storage = storage.absolute()
        lock = JournalFileSymlinkLock(str(storage))
        _cut_torn_line(storage, lock)
    try:
        if storage is not None:
            journal = JournalStorage(JournalFileBackend(str(storage), lock))
        study = optuna.create_study(
            study_name="lunet-fast", storage=journal, direction=direction, load_if_exists=True
        )
        if study.directions != [getattr(optuna.study.StudyDirection, direction.upper())]:
            raise ValueError(f"its direction is not to {direction}")
        before = study.trials
        _check_trials(before)
        recorded = study.user_attrs.get("what", what)
        if not isinstance(recorded, dict):
            raise TypeError(f"what it searches is {shown(recorded)}")
    except OSError:
        raise
    except Exception as error:  # of any kind: Optuna takes a journal as it comes
        raise ValueError(
            f"{storage}: no study to go on with ({type(error).__name__}: {shown(str(error))}): name another "
            "file"
        ) from error
    for name in sorted(what.keys() | recorded.keys()):
        if what.get(name) != recorded.get(name):
            told = name if name in what else shown(name)
            raise ValueError(
                f"{storage} holds a study with {told}={shown(recorded.get(name))}, not {what.get(name)!r}: "
                "name another file, or ask for the same"
            )
    # By the number of trials, too: a study that goes on would draw again what it began with.
    study.sampler = optuna.samplers.TPESampler(seed=(seed + len(before)) % 2**32)
    study.set_user_attr("what", what)
    return study


def _check_trials(trials: list[optuna.trial.FrozenTrial]) -> None:
    """``ValueError`` for trials that :func:`suggested` could not have made: the sampler trusts them."""
    import optuna

    known: dict[str, Any] = {}
    kinds: tuple[dict[str, Any], ...] = ({"gamma": 0.0}, {"gamma": 0.5}, {"inference": "gibbs"})
    for kind in kinds:
        drawn = optuna.create_study().ask()
        suggested(drawn, recipe("best", 0, **kind))
        known |= drawn.distributions
    for trial in trials:
        for name, value in trial.params.items():
            if trial.distributions.get(name) != known.get(name):
                raise ValueError(f"trial {trial.number} has drawn {shown(name)} otherwise")
            if not known[name]._contains(known[name].to_internal_repr(value)):
                raise ValueError(f"trial {trial.number} has {name}={shown(value)}")
        figures = trial.values or []
        complete = trial.state is optuna.trial.TrialState.COMPLETE
        if len(figures) != complete or not all(map(math.isfinite, figures)):
            raise ValueError(f"trial {trial.number} has the figures {shown(figures)}")


def _cut_torn_line(journal: Path, lock: JournalFileSymlinkLock) -> None:
    """Take off the last line of a journal where a killed process has left it without an end.

    Optuna passes over such a line, but would write the next one right behind it. :class:`CheckpointError` for
    what is no file or larger than any study's.
    """
    if not journal.exists():
        return  # the study begins
    lock.acquire()
    try:
        with opened(journal) as (file, size):
            if size > MOST_JSON_BYTES:
                raise CheckpointError(f"{journal}: has {size} bytes, more than any study")
            text = file.read()
        whole = text.rfind(b"\n") + 1
        if whole < len(text):
            os.truncate(journal, whole)
    finally:
        lock.release()


def tune(
    ratings: Ratings,
    *,
    trials: int,
    storage: Path | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
    told: Callable[[int, float | None, float], None] | None = None,
    **asked: Any,
) -> Tuned:
    """Try ``trials`` more settings and return the best of the study.

    ``asked`` are settings that stay as they are, such as ``gamma``; trials have MEMBERS members, unless they
    are given. The test and held-out parts, by the split and ``seed``, are taken away first and never read;
    what is left is divided again in the same way, and a trial is judged on the second part
    (:func:`measure_of`). ``storage`` is a file that keeps the study, in Optuna's journal format: the same
    call goes on with it. Trials are trained on ``device``; one that diverges counts as failed.
    ``told(number, value, best)`` hears of each finished trial, value None of a failed one.

    ``ImportError`` without Optuna (``pip install "lunet-fast[tune]"``), ``ValueError`` for a wrong setting,
    for a study of other data or settings, and where no trial has succeeded.
    """
    if trials < 1:
        raise ValueError(f"trials={trials} must be at least 1")
    cheap = of_a_trial(asked.get("inference", "gradient"), MEMBERS)
    asked = {**cheap, "seed": seed, "mlp": False, **asked}
    base = recipe("best", len(ratings), **asked)
    rest = Parts.of(ratings, base.split, base.seed).training
    measure, direction = measure_of(base.gamma)
    what = {"dataset": ratings.name, "ratings": len(ratings), "measure": measure, **asked}
    study = opened_study(storage, direction, seed, what)
    if not study.trials:
        study.enqueue_trial({name: getattr(base, name) for name in ranges_of(base) if name not in asked})

    def objective(trial: optuna.Trial) -> float:
        config = recipe("best", len(ratings), **{**suggested(trial, base), **asked})
        values = train(rest, config, device=device).metrics
        if measure in values:
            return float(values[measure])
        return float(values["ndcg@10"] - values["test_mse"])

    def finished(study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
        if told is not None:
            done = [t.value for t in study.trials if t.value is not None]
            best = (min if direction == "minimize" else max)(done, default=float("nan"))
            told(trial.number, trial.value, best)

    study.optimize(objective, n_trials=trials, catch=(DivergenceError,), callbacks=[finished])
    done = [t for t in study.trials if t.value is not None]
    if not done:
        raise ValueError("every trial has diverged: the data may hold a single kind of rating")
    best = {name: value for name, value in study.best_params.items() if name not in asked}
    return Tuned(best, study.best_value, measure, len(done))

"""The settings of other recommenders: what each has, where a search looks, and what it has chosen.

``chosen.json`` beside this file is written by ``benchmarks/search.py`` and holds what was chosen on a
validation part of ML-100K's training data, of the methods that were searched; those of the rest, and of data
of ML-1M's size, are the numbers below, which were tried by hand and are where a search begins.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from lunet_fast.recsys.evaluation.ranges import Choice, Range
from lunet_fast.training.files import CheckpointError, read_json

CHOSEN = Path(__file__).with_name("chosen.json")

SEARCHED_ON = "ml-100k"
"""The data set whose settings are searched."""

Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Setting:
    """One number, or word, of a method."""

    small: Any
    """For data of ML-100K's size, unless a search has chosen another."""
    large: Any
    """For data of ML-1M's."""
    range: Range | Choice | None = None
    """Where a search looks; None for what it leaves alone."""
    in_search: Any = None
    """What trials have of a number that only costs time, of which more is better."""


def _same(value: Any, where: Range | Choice | None = None, in_search: Any = None) -> Setting:
    return Setting(value, value, where, in_search)


def _rate(small: float, large: float) -> Setting:
    return Setting(small, large, Range(5e-4, 0.1, log=True))


_FACTORS, _EPOCHS = Range(4, 400, log=True), Range(5, 400, log=True)
_L2 = Range(1e-3, 0.5, log=True)

_GIBBS = {
    "rank": Setting(16, 10, Range(2, 48, log=True)),
    "samples": Setting(400, 200, in_search=60),
    "burn_in": _same(0.05, Range(0.02, 0.5)),
    "alpha_0": _same(1.0, Range(0.05, 50.0, log=True)),
    "beta_0": _same(1.0, Range(0.05, 50.0, log=True)),
    "gamma_0": _same(1.0, Range(0.05, 50.0, log=True)),
}
"""Of a Bayesian factorisation machine. ``burn_in`` is the share of its samples that predicts nothing; the
priors are Gamma(alpha_0 / 2, beta_0 / 2) of the precisions and Normal(0, 1 / gamma_0) of the means."""

_GIBBS_OF_HISTORIES = {**_GIBBS, "history_power": _same(0.5, Range(0.1, 1.2))}
"""``history_power``: n other features of a user or an item have the value n to minus this power."""

#: By the key of the method. A row that averages several runs has the settings of one.
SETTINGS: dict[str, dict[str, Setting]] = {
    "biases": {
        "l2_user": _same(5.0, Range(0.5, 50.0, log=True)),
        "l2_item": _same(3.0, Range(0.5, 50.0, log=True)),
    },
    "knn": {
        "k": _same(40, Range(5, 300, log=True)),
        "similarity": _same("pearson_baseline", Choice(("pearson_baseline", "pearson", "cosine", "msd"))),
        "shrinkage": _same(100.0, Range(1.0, 3000.0, log=True)),
        "least_common": _same(1, Range(1, 20)),
        "l2_user": _same(15.0, Range(0.5, 50.0, log=True)),
        "l2_item": _same(10.0, Range(0.5, 50.0, log=True)),
    },
    "mf": {
        "factors": Setting(100, 200, _FACTORS),
        "rate": _rate(0.005, 0.01),
        "l2": Setting(0.08, 0.05, _L2),
        "epochs": Setting(100, 30, _EPOCHS),
    },
    "svd++": {
        "factors": _same(20, _FACTORS),
        "rate": _rate(0.01, 0.01),
        "l2": _same(0.08, _L2),
        "l2_shares": _same(0.003, Range(1e-4, 0.5, log=True)),
        "epochs": Setting(30, 20, Range(5, 100, log=True)),
    },
    "rbm": {
        "hidden": _same(100, Range(8, 400, log=True)),
        "rate": _same(0.05, Range(1e-3, 0.5, log=True)),
        "l2": _same(0.01, Range(1e-5, 0.3, log=True)),
        "epochs": Setting(30, 30, _EPOCHS),
        "batch": Setting(64, 128),
    },
    "mlp": {
        # Of recipe ``paper``: the control of table 2, whose settings are named there.
        "mlp_embedding_size": _same(16, Range(4, 128, log=True)),
        "mlp_epochs": _same(50, Range(5, 100, log=True)),
        "mlp_learning_rate": _same(1e-3, Range(1e-4, 1e-2, log=True)),
        "mlp_weight_decay": Setting(1e-2, 3e-4, Range(1e-5, 0.1, log=True)),
        "mlp_net_weight_decay": Setting(1e-3, 3e-5, Range(1e-6, 0.1, log=True)),
    },
    "bayesian-fm": _GIBBS,
    "bayesian-fm-side": _GIBBS,
    "bayesian-svd++": _GIBBS_OF_HISTORIES,
    "bayesian-svd++-side": _GIBBS_OF_HISTORIES,
    "popularity": {},
    "bpr": {
        "factors": _same(50, _FACTORS),
        "rate": _rate(0.02, 0.02),
        "l2": _same(0.01, Range(1e-4, 0.5, log=True)),
        "epochs": Setting(200, 100, _EPOCHS),
    },
    "mlp-ce": {
        "size": _same(32, Range(4, 256, log=True)),
        "hidden": _same((64, 32)),
        "rate": _rate(3e-3, 3e-3),
        "epochs": Setting(20, 10, Range(2, 100, log=True)),
        "batch": Setting(1024, 4096),
    },
    "neumf": {
        "factors": _same(8, Range(4, 64, log=True)),
        "rate": _rate(3e-3, 3e-3),
        "epochs": Setting(20, 10, Range(2, 100, log=True)),
        "batch": Setting(1024, 4096),
    },
    "autoencoder": {
        "size": Setting(50, 100, Range(8, 400, log=True)),
        "hidden": Setting(200, 400, Range(32, 1000, log=True)),
        "beta": _same(0.2, Range(0.01, 2.0, log=True)),
        "rate": _rate(0.001, 0.001),
        "epochs": _same(50, _EPOCHS),
    },
    "cdae": {
        "size": Setting(64, 128, Range(8, 400, log=True)),
        "corruption": _same(0.5, Range(0.1, 0.9)),
        "decay": _same(0.1, Range(1e-3, 1.0, log=True)),
        "rate": _rate(0.01, 0.01),
        "epochs": Setting(100, 50, _EPOCHS),
        "batch": Setting(64, 128),
    },
    "dmf": {
        "size": _same(64, Range(8, 256, log=True)),
        "layers": _same(2, Range(1, 3)),
        "temperature": _same(0.1, Range(0.02, 0.5, log=True)),
        "rate": _rate(3e-3, 3e-3),
        "epochs": Setting(10, 5, Range(2, 100, log=True)),
        "batch": Setting(1024, 4096),
    },
    "als": {
        "factors": _same(64, _FACTORS),
        "l2": _same(30.0, Range(0.1, 1000.0, log=True)),
        "alpha": _same(10.0, Range(0.5, 200.0, log=True)),
        "sweeps": _same(15, Range(3, 60, log=True)),
    },
    "ease": {"l2": Setting(300.0, 1000.0, Range(10.0, 10000.0, log=True))},
    "sequence-ease": {"l2": Setting(100.0, 200.0, Range(1.0, 10000.0, log=True))},
    "gru4rec": {
        "size": Setting(64, 128, Range(16, 256, log=True)),
        "layers": _same(1, Range(1, 3)),
        "length": _same(200),
        "dropout": Setting(0.3, 0.2, Range(0.0, 0.6)),
        "negatives": _same(512),
        "epochs": _same(20, Range(5, 100, log=True)),
        "batch_size": Setting(2048, 4096),
        "learning_rate": _rate(3e-3, 2e-3),
    },
    "sasrec": {
        "size": Setting(64, 128, Range(16, 256, log=True)),
        "layers": _same(2, Range(1, 4)),
        "length": Setting(100, 200),
        "dropout": Setting(0.3, 0.2, Range(0.0, 0.6)),
        "negatives": _same(512),
        "epochs": _same(30, Range(5, 100, log=True)),
        "batch_size": Setting(2048, 4096),
        "learning_rate": _rate(2e-3, 1e-3),
    },
}


def settings_for(key: str, size: str) -> dict[str, Any]:
    """The settings of a method for data of ``size``, ``ml-100k`` or ``ml-1m``.

    ``ValueError`` where ``chosen.json`` holds what the method does not have.
    """
    own = SETTINGS[key]
    found = {name: each.small if size == SEARCHED_ON else each.large for name, each in own.items()}
    if size != SEARCHED_ON:
        return found
    picked = chosen().get(key, {})
    for name, value in picked.items():
        where = own[name].range if name in own else None
        if where is None or not where.holds(value):
            raise ValueError(f"{CHOSEN}: {key} has {name}={value!r}, which no search could have chosen")
    return found | picked


@cache
def chosen() -> dict[str, dict[str, Any]]:
    """What searches have chosen, by the key of the method; of ours too. {} before the first."""
    try:
        found = read_json(CHOSEN)["methods"]
    except FileNotFoundError:
        return {}
    except (CheckpointError, KeyError, TypeError) as error:
        raise ValueError(f"{CHOSEN}: not what benchmarks/search.py writes ({error}): run it again") from error
    return {key: each["settings"] for key, each in found.items()}

"""The recommender and the baselines side by side on the same parts: what ``lunet-fast compare`` runs.

Every method is trained and measured in a process of its own, so that its memory is its own and a crash is
one row of the table.

    python -m lunet_fast.recsys.evaluation.compare RATINGS METHOD SEED SPLIT OUTCOME

is that process: it reads pickled ratings and writes a JSON object.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import pickle
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import lunet_fast
from lunet_fast.recsys.data.features import side_features
from lunet_fast.recsys.data.order import GAP_NAMES
from lunet_fast.recsys.data.ratings import Ratings
from lunet_fast.recsys.evaluation.baselines import BASELINES, missing
from lunet_fast.recsys.evaluation.differences import from_the_best, squared_errors
from lunet_fast.recsys.evaluation.fitted import Fitted
from lunet_fast.recsys.evaluation.peer_settings import SEARCHED_ON, chosen, settings_for
from lunet_fast.recsys.measures import metrics
from lunet_fast.recsys.measures.protocols import Parts, evaluate_ranking
from lunet_fast.recsys.model.config import TrainConfig, nearest_dataset
from lunet_fast.recsys.model.prediction import predict_ratings
from lunet_fast.recsys.model.sequence_config import SEQUENCE, SequenceConfig, settings_of
from lunet_fast.recsys.model.sequence_training import train_sequence
from lunet_fast.recsys.model.training import train
from lunet_fast.training.files import CheckpointError, read_json, write_json
from lunet_fast.training.machine import code, describe, process_memory, reset_peak, version_of

__all__ = ["METHODS", "Comparison", "Method", "allowed", "compare"]

RATING_FIGURES = ("test_mse", "test_rmse")
RANKING_FIGURES = ("hr@10", "ndcg@10", "full_ndcg@10", "full_hr@10")
COSTS = ("reconstruction_error_relative", "train_seconds", "peak_memory_mb", "parameters")

#: What is averaged over the seeds, in the order of tables.
FIGURES = (*RATING_FIGURES, *RANKING_FIGURES, *COSTS)

#: What rankings may be measured on.
SPLITS = ("leave-one-out", "time")

#: A process that computes on one thread, whatever library does the arithmetic.
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")

#: Distributions whose name is not that of the package.
DISTRIBUTIONS = {"surprise": "scikit-surprise"}


@dataclass(frozen=True)
class Method:
    """One row of the table."""

    key: str
    """On the command line."""
    name: str
    package: str
    """``ours``: a baseline written here; ``lunet_fast``: the model this library is for."""
    kinds: tuple[str, ...]
    """``rating``, ``ranking``, or both."""
    recipe: str = ""
    """Of the LU-Net rows, what they are trained by; "" for the baselines."""
    overrides: tuple[tuple[str, Any], ...] = ()
    settings_key: str = ""
    """Where a search leaves what it chose, see :mod:`~lunet_fast.recsys.evaluation.peer_settings`."""
    side: bool = False
    """Whether it reads the side features of users and items, where the data have some."""

    @property
    def is_lu_net(self) -> bool:
        return self.package == "lunet_fast"

    @property
    def kind(self) -> str:
        """``rating``, ``ranking`` or ``both``."""
        return "both" if len(self.kinds) == 2 else self.kinds[0]

    def config(
        self, n_ratings: int, seed: int, split: str = "leave-one-out", *, searched: bool = True
    ) -> TrainConfig | SequenceConfig:
        """The settings of a LU-Net row for data of ``n_ratings`` ratings, ``split`` that of rankings.

        With what a search has chosen for data of that size, or the recipe's alone without ``searched``.
        """
        found = chosen() if searched and nearest_dataset(n_ratings) == SEARCHED_ON else {}
        overrides = {**found.get(self.settings_key, {}), **dict(self.overrides)}
        if self.kind == "ranking":
            overrides["split"] = split
        return settings_of(self.recipe, n_ratings, seed=seed, **overrides)


def _lu_net(
    key: str, name: str, *kinds: str, recipe: str = "best", like: str = "", **overrides: Any
) -> Method:
    """A row of ours; ``like`` is the key of the row whose settings it has, its own by default."""
    if recipe != SEQUENCE:
        # Unless it is said otherwise nobody is told of held-out pairs, not even by what is never a negative.
        overrides = {"mlp": False, "negatives_outside": "training", **overrides}
    side = recipe == "best" and overrides.get("side_features", True)
    return Method(key, name, "lunet_fast", kinds, recipe, tuple(overrides.items()), like or key, side)


_OURS = (
    _lu_net("lunet-paper", "LU-Net, recipe paper (gamma 1)", "rating", recipe="paper", gamma=1.0),
    _lu_net("lunet-ratings", "LU-Net, ratings (gamma 1)", "rating", gamma=1.0),
    _lu_net(
        *("lunet-ratings-identity", "LU-Net, ratings, with f = identity", "rating"),
        like="lunet-ratings",
        gamma=1.0,
        network="identity",
    ),
    _lu_net("lunet-ratings-one", "LU-Net, ratings, one member", "rating", gamma=1.0, members=1),
    _lu_net(
        *("lunet-sampled", "f = identity, samples of the posterior (inference gibbs)", "rating"),
        gamma=1.0,
        inference="gibbs",
    ),
    _lu_net(
        *("lunet-ids", "LU-Net, ratings, without side features", "rating"), gamma=1.0, side_features=False
    ),
    _lu_net(
        *("lunet-sampled-ids", "f = identity, samples, without side features", "rating"),
        gamma=1.0,
        inference="gibbs",
        side_features=False,
    ),
    _lu_net("lunet-interactions", "LU-Net, interactions (gamma 0)", "ranking", gamma=0.0),
    _lu_net("lunet-interactions-one", "LU-Net, interactions, one member", "ranking", gamma=0.0, members=1),
    _lu_net("lunet-both", "LU-Net, both (gamma 0.1)", "rating", "ranking", gamma=0.1),
    _lu_net(
        *("lunet-leaky", "LU-Net, interactions, held-out pairs never drawn as negatives: leaks", "ranking"),
        like="lunet-interactions",
        gamma=0.0,
        negatives_outside="known",
    ),
    _lu_net("lunet-sequence", "LU-Net, order (recipe sequence)", "ranking", recipe=SEQUENCE),
    _lu_net(
        *("lunet-sequence-identity", "The same with f = identity", "ranking"),
        recipe=SEQUENCE,
        like="lunet-sequence",
        network="identity",
    ),
    _lu_net(
        *("lunet-sequence-elapsed", "The same, told when it is asked", "ranking"),
        recipe=SEQUENCE,
        like="lunet-sequence",
        elapsed=True,
    ),
)

#: Every method by its key on the command line, in the order of tables.
METHODS: dict[str, Method] = {
    **{
        key: Method(key, b.name, b.package, b.kinds, settings_key=b.settings_key, side=b.side)
        for key, b in BASELINES.items()
    },
    **{method.key: method for method in _OURS},
}

#: The row whose model was told of the held-out pairs: it is no contender.
LEAKY = "lunet-leaky"


ORDERED = {
    *("sequence-ease", "gru4rec", "sasrec"),
    *("lunet-sequence", "lunet-sequence-identity", "lunet-sequence-elapsed"),
}
"""The rows whose methods read the order of a user's ratings."""


@dataclass(frozen=True)
class Comparison:
    """A comparison, finished or not; its fields are the keys of the JSON file."""

    machine: dict[str, Any]
    versions: dict[str, str]
    """Of the packages that are installed."""
    dataset: str
    split: str
    """Of the methods that rank: ``leave-one-out`` or ``time``."""
    command: str
    seeds: list[int]
    rows: list[dict[str, Any]]
    """One a method: ``key``, ``method``, ``package``, ``kind``, ``seeds`` that its figures are the means of,
    ``FIGURES`` where they apply, each with its standard deviation ``..._sd`` where there are two seeds;
    ``side``, whether it may read side features; ``over_best``, of methods that predict ratings, by how much
    more the MSE is than that of the best row of equal ``side``, see
    :func:`~lunet_fast.recsys.evaluation.differences.from_the_best`;
    ``by_gap``, of rankings, is :attr:`~lunet_fast.recsys.measures.protocols.Ranking.gaps`, means over the
    users of all seeds, and ``users`` their number;
    ``missing`` or ``error`` says why there are none."""
    runs: list[dict[str, Any]]
    """One a method and seed that is finished, also of methods that were not asked for this time: ``key``,
    ``seed``, ``inputs`` (a hash of data, settings and versions), figures."""


def compare(
    ratings: Ratings,
    methods: Sequence[str] | None = None,
    seeds: Sequence[int] = (0,),
    *,
    split: str = "leave-one-out",
    device: str = "cpu",
    file: Path | None = None,
    command: str = "",
    begun: Callable[[str, int], None] = lambda method, seed: None,
    done: Callable[[dict[str, Any]], None] = lambda run: None,
) -> Comparison:
    """Train and measure ``methods`` with every seed, one process at a time, on one thread each.

    Of :mod:`~lunet_fast.recsys.data.splits`, rating methods are measured on ``random_split``, ranking methods
    on ``leave_one_out``, the hybrid model with one set of weights on ``joint_split``, whose training part is
    smaller. A seed is that of the split, of the candidates and of the method.

    Args:
        ratings: the complete data, on the CPU. Without distinct ratings (interactions) there is nothing to
            predict.
        methods: keys of METHODS; by default all that ``ratings`` and ``split`` allow.
        split: ``leave-one-out``, or ``time``, :func:`~lunet_fast.recsys.data.splits.time_split`, which is
            for methods that rank alone: nothing later than what is to be found is trained on, whoever's it
            is.
        device: where LU-Nets are trained; the others know the CPU alone.
        file: JSON file with the finished runs, rewritten whole after each; those that it holds of the same
            data, settings, versions and machine are not repeated, what was missing or failed is.
        command: kept in the result.
        begun: called with method and seed when a process starts.
        done: called with ``key``, ``seed`` and the figures, ``missing`` or ``error`` when it has ended; for
            runs that ``file`` held already too, before any begins.

    Raises:
        ValueError: an unknown method, one that needs ratings where there are none, no or repeated or negative
            seeds, data that cannot be split, or a ``file`` that holds something else.
    """
    if split not in SPLITS:
        raise ValueError(f"split={split!r} is unknown: choose one of {', '.join(SPLITS)}")
    keys = _chosen(ratings, methods, split)
    if not seeds or min(seeds) < 0 or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds must be one or more distinct numbers of at least 0, got {list(seeds)}")
    for each in sorted({"random" if METHODS[key].kind == "rating" else split for key in keys}):
        Parts.of(ratings, each, seeds[0])

    machine = {**describe(device), "threads": 1}
    inputs = _Inputs(ratings, split, machine)
    runs = {} if file is None else _kept(file, inputs)
    outcomes = {(key, seed): runs[key, seed] for key in keys for seed in seeds if (key, seed) in runs}
    for outcome in outcomes.values():
        done(outcome)

    def state() -> Comparison:
        rows = [_row(key, [outcomes[key, s] for s in seeds if (key, s) in outcomes]) for key in keys]
        told = machine, _versions(), ratings.name, split, command, list(seeds)
        return Comparison(*told, [row for row in rows if row], list(runs.values()))

    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "ratings.pickle"
        data.write_bytes(pickle.dumps(ratings))
        for key in keys:
            for seed in seeds:
                if (key, seed) in outcomes:
                    continue
                earlier = [outcomes[key, s] for s in seeds if (key, s) in outcomes]
                if any("missing" in outcome for outcome in earlier):
                    continue
                begun(key, seed)
                outcome = {"key": key, "seed": seed, **_in_a_process(data, key, seed, split, device)}
                outcomes[key, seed] = outcome
                if not {"missing", "error"} & outcome.keys():
                    runs[key, seed] = {**outcome, "inputs": inputs.of(key, seed)}
                    if file is not None:
                        write_json(file, asdict(state()))
                done(outcome)
    result = state()
    from_the_best(ratings, result.rows, runs)
    if file is not None:
        write_json(file, asdict(result))
    return result


def allowed(ratings: Ratings, split: str = "leave-one-out") -> list[str]:
    """The keys of all methods, or of those that rank, where ``split`` is by time or all ratings are equal.

    Without side features of users and items those of other packages that would read them are left out: they
    would repeat the rows without.
    """
    rated = ratings.scale[0] < ratings.scale[1] and split != "time"
    described = _described(ratings)
    return [
        key
        for key, method in METHODS.items()
        if (rated or method.kind == "ranking") and (described or method.is_lu_net or not method.side)
    ]


def _described(ratings: Ratings) -> bool:
    """Whether there are side features."""
    return any(table is not None for table in side_features(ratings))


def _chosen(ratings: Ratings, methods: Sequence[str] | None, split: str) -> list[str]:
    """The keys of ``methods`` in the order of tables."""
    known = allowed(ratings, split)
    if methods is None:
        return known
    for key in methods:
        if key not in METHODS:
            raise ValueError(f"methods {key!r} is unknown: choose from {', '.join(METHODS)}")
        if key not in known and split == "time":
            raise ValueError(
                f"methods {key!r} predicts ratings, and split='time' is for those that rank: choose from "
                f"{', '.join(known)}"
            )
        if key not in known and METHODS[key].side and not _described(ratings):
            raise ValueError(
                f"methods {key!r} reads side features, and {ratings.name} has none: choose from "
                f"{', '.join(known)}"
            )
        if key not in known:
            raise ValueError(
                f"methods {key!r} learns from ratings, and those of {ratings.name} are all "
                f"{ratings.scale[0]:g}: choose from {', '.join(known)}"
            )
    if not methods:
        raise ValueError(f"methods is empty: choose from {', '.join(known)}")
    return [key for key in METHODS if key in methods]


# --- one method -----------------------------------------------------------------------------------------


def measure(
    ratings: Ratings, key: str, seed: int, split: str = "leave-one-out", device: str = "cpu"
) -> dict[str, Any]:
    """One method trained and measured in this process: its FIGURES and ``by_gap``, or why it is ``missing``.

    ``train_seconds`` is without reading, splitting and evaluation; ``peak_memory_mb`` what the process held
    at most while training and evaluating, beyond what it held before with data and packages loaded, in MB of
    10^6 bytes, absent where the system is not Linux. Raises what the method raises.
    """
    method = METHODS[key]
    if method.is_lu_net:
        before = reset_peak()
        config = method.config(len(ratings), seed, split)
        if not isinstance(config, TrainConfig):
            values = train_sequence(ratings, config, device=device).metrics
            return _wanted(method, values) | _peak_over(before)
        result = train(ratings, config, device=device)
        found = _wanted(method, result.metrics) | _peak_over(before)
        if method.kind == "rating":
            test = Parts.of(ratings, config.split, seed).test
            assert test is not None
            prediction = predict_ratings(result.trained.model, test.user, test.item, ratings.scale)
            found["user_errors"] = squared_errors(prediction, test)
        return found
    baseline = BASELINES[key]
    reason = missing(baseline)  # imports the package, which is no part of training
    if reason is not None:
        return {"missing": reason}
    size = nearest_dataset(len(ratings))
    figures: dict[str, Any] = {}
    seconds = 0.0
    for kind in baseline.kinds:
        parts = Parts.of(ratings, "random" if kind == "rating" else split, seed)
        before = reset_peak()
        began = time.perf_counter()
        fitted = baseline.fit(parts.training, seed, size)
        seconds += time.perf_counter() - began
        figures |= judged(fitted, parts, seed)
        figures |= {"parameters": fitted.parameters, **_peak_over(before)}
    return {**figures, "train_seconds": seconds}


def judged(fitted: Fitted, parts: Parts, seed: int) -> dict[str, Any]:
    """What the parts that were held back say of a trained baseline: of ratings where there is a ``test``
    part, with ``user_errors``, else of rankings."""
    if parts.test is not None and parts.held_out is None:
        prediction = fitted.predict(parts.test.user, parts.test.item)
        assert prediction is not None
        prediction = prediction.clamp(*parts.test.scale)
        return {
            "test_mse": metrics.mse(prediction, parts.test.rating),
            "test_rmse": metrics.rmse(prediction, parts.test.rating),
            "user_errors": squared_errors(prediction, parts.test),
        }

    def scores(users: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor | None = fitted.score_items(users)
        assert found is not None
        return found

    values = evaluate_ranking(scores, parts, seed).figures
    return {name: values[name] for name in (*RANKING_FIGURES, "by_gap") if name in values}


def _wanted(method: Method, values: dict[str, Any]) -> dict[str, Any]:
    """Of all metrics of a training those of the method's row."""
    names = [name for kind in method.kinds for name in _figures(kind)]
    return {name: values[name] for name in (*names, *COSTS, "by_gap") if name in values}


def _figures(kind: str) -> tuple[str, ...]:
    return RATING_FIGURES if kind == "rating" else RANKING_FIGURES


def _peak_over(before: int | None) -> dict[str, float]:
    peak = process_memory().get("VmHWM")
    return {} if before is None or peak is None else {"peak_memory_mb": max(peak - before, 0) / 1e6}


def _in_a_process(data: Path, key: str, seed: int, split: str, device: str) -> dict[str, Any]:
    """What :func:`measure` gives in a process of its own, or ``error``."""
    answer = data.with_name("outcome.json")
    answer.unlink(missing_ok=True)
    command = [
        sys.executable,
        "-m",
        "lunet_fast.recsys.evaluation.compare",
        str(data),
        key,
        str(seed),
        split,
        device,
        str(answer),
    ]
    process = subprocess.run(
        command,
        cwd=data.parent,  # which -m looks for modules in first; it is nobody else's
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env=os.environ | ONE_THREAD | _import_path(),
        check=False,
    )
    if process.returncode == 0:
        return read_json(answer)
    if process.returncode < 0:
        try:
            name = signal.Signals(-process.returncode).name
        except ValueError:
            name = str(-process.returncode)
        hint = ", most likely for lack of memory" if name == "SIGKILL" else ""
        return {"error": f"its process was ended by {name}{hint}"}
    last = [line.strip() for line in process.stderr.splitlines() if line.strip()][-1:]
    return {"error": f"its process ended with code {process.returncode}: {''.join(last)}"}


def _import_path() -> dict[str, str]:
    """$PYTHONPATH for a process in another folder."""
    given = os.environ.get("PYTHONPATH", "")
    return {"PYTHONPATH": os.pathsep.join(map(os.path.abspath, given.split(os.pathsep)))} if given else {}


def _main(arguments: Sequence[str]) -> None:
    data, key, seed, split, device, answer = arguments
    ratings = pickle.loads(Path(data).read_bytes())
    try:
        outcome = measure(ratings, key, int(seed), split, device)
        wrong = [name for name in FIGURES if not math.isfinite(outcome.get(name, 0.0))]
        if wrong:
            outcome = {"error": f"{wrong[0]} is {outcome[wrong[0]]}"}
    except Exception as error:  # of any package's making: it is one row of the table
        outcome = {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"}
    write_json(Path(answer), outcome)


# --- what was measured before ---------------------------------------------------------------------------


class _Inputs:
    """Hashes of everything that a run's figures depend on."""

    def __init__(self, ratings: Ratings, split: str, machine: Mapping[str, Any]) -> None:
        self.n_ratings, self.split = len(ratings), split
        self.gpu = machine.get("gpu")
        digest = hashlib.sha256(f"{ratings.n_users} {ratings.n_items} {ratings.scale}".encode())
        for tensor in (ratings.user, ratings.item, ratings.rating, ratings.timestamp, ratings.position):
            digest.update(b"" if tensor is None else tensor.numpy().tobytes())
        ties = ratings.friends
        known = [ratings.weight, ratings.item_text, *((ties.user, ties.friend, ties.weight) if ties else ())]
        for side in known:
            digest.update(b"" if side is None else side.numpy().tobytes())
        for info in (ratings.item_info, ratings.user_info):
            digest.update(b"" if info is None else info.to_csv().encode("utf-8", "surrogatepass"))
        versions = [lunet_fast.__version__, torch.__version__]
        self.common = [digest.hexdigest(), machine["processor"], *versions, code()]

    def of(self, key: str, seed: int) -> str:
        method = METHODS[key]
        size = nearest_dataset(self.n_ratings)
        if not method.is_lu_net:
            own: Any = [_version(method.package), settings_for(method.settings_key, size)]
        else:
            settings = method.config(self.n_ratings, seed, self.split).to_dict()
            own = settings if self.gpu is None else [settings, self.gpu]
        measured = ["by users"] if method.kind == "rating" else [self.split, "by gaps"]
        text = json.dumps([key, seed, own, *measured, *self.common])
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def _kept(file: Path, inputs: _Inputs) -> dict[tuple[str, int], dict[str, Any]]:
    """The runs in ``file`` that would be the same today, by method and seed."""
    if not file.exists():
        return {}
    try:
        runs = read_json(file)["runs"]
        return {
            (run["key"], run["seed"]): run
            for run in runs
            if run["key"] in METHODS and run["inputs"] == inputs.of(run["key"], run["seed"])
        }
    except (CheckpointError, KeyError, TypeError) as error:
        raise ValueError(
            f"{file} is no result of lunet-fast compare ({error}): move it away, or choose another folder"
        ) from error


def _versions() -> dict[str, str]:
    packages = dict.fromkeys(method.package for method in METHODS.values())
    found = {package: _version(package) for package in packages if package not in ("ours", "lunet_fast")}
    return {package: version for package, version in found.items() if version}


def _version(package: str) -> str:
    return version_of(DISTRIBUTIONS.get(package, package))


def _row(key: str, outcomes: list[dict[str, Any]]) -> dict[str, Any]:
    """The mean of a method's runs; {} while there is none."""
    if not outcomes:
        return {}
    method = METHODS[key]
    finished = [outcome for outcome in outcomes if not {"missing", "error"} & outcome.keys()]
    row: dict[str, Any] = {"key": key, "method": method.name, "package": method.package, "kind": method.kind}
    row["side"] = method.side
    row["seeds"] = [outcome["seed"] for outcome in finished]
    for name in FIGURES:
        values = [outcome[name] for outcome in finished if name in outcome]
        if values:
            row[name] = statistics.fmean(values)
        if len(values) > 1:
            row[f"{name}_sd"] = statistics.stdev(values)
    gaps = _mean_gaps([outcome["by_gap"] for outcome in finished if "by_gap" in outcome])
    if gaps:
        row["by_gap"] = gaps
    for outcome in outcomes:
        if "missing" in outcome:
            row.setdefault("missing", outcome["missing"])
        if "error" in outcome:
            row.setdefault("error", f"seed {outcome['seed']}: {outcome['error']}")
    return row


def _mean_gaps(runs: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """The means over the users of all runs, a gap each; ``users`` are those of all runs together."""
    found: dict[str, dict[str, float]] = {}
    for name in GAP_NAMES:
        groups = [run[name] for run in runs if name in run]
        users = sum(group["users"] for group in groups)
        if users:
            figures = [figure for figure in groups[0] if figure != "users"]
            found[name] = {"users": users} | {
                figure: sum(group["users"] * group[figure] for group in groups) / users for figure in figures
            }
    return found


if __name__ == "__main__":
    _main(sys.argv[1:])

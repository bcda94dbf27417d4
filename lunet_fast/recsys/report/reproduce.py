"""The paper's experiments, all of ``lunet-fast reproduce`` behind its arguments."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from lunet_fast.recsys.data import movielens
from lunet_fast.recsys.data.ratings import Ratings
from lunet_fast.recsys.measures.protocols import Parts, evaluate_ranking
from lunet_fast.recsys.model.config import TrainConfig, recipe
from lunet_fast.recsys.model.model_files import TrainedModel
from lunet_fast.recsys.model.scoring import ItemScorer
from lunet_fast.recsys.model.training import train
from lunet_fast.recsys.report.document import Document
from lunet_fast.recsys.report.render import markdown, page
from lunet_fast.recsys.report.reproduction import document
from lunet_fast.recsys.report.results import Committed, Losses, Reproduction, Run
from lunet_fast.training.files import (
    RunFolder,
    RunFolderError,
    read_json,
    read_tensors,
    write_json,
    write_text,
)
from lunet_fast.training.loop import Progress, cpu_threads
from lunet_fast.training.machine import code
from lunet_fast.training.run import Result
from lunet_fast.training.schema import CHECKPOINT_FORMAT, CheckpointHeader

DATASETS = tuple(movielens.DATASETS)

EXPERIMENTS: dict[str, dict[str, Any]] = {
    "paper": {"recipe": "paper"},
    "best": {"recipe": "best", "mlp": False},
    # As for other methods, nothing tells the training which pairs are held out.
    "ranking": {"recipe": "best", "gamma": 0.0, "negatives_outside": "training", "mlp": False},
    "hybrid": {"recipe": "best", "gamma": 0.1, "negatives_outside": "training", "mlp": False},
}
"""What is trained on each data set: settings by name. ``paper`` trains the MLP control too."""

CODE = "code.json"
"""In a run folder, which code trained it."""

_FLAGS = {"gamma": "--gamma", "negatives_outside": "--negatives-outside", "epochs": "--epochs"}


class Planned(NamedTuple):
    """One training of a reproduction."""

    dataset: str
    experiment: str
    seed: int

    @property
    def folder(self) -> str:
        """Its run folder, below that of the reproduction."""
        return f"{self.dataset}/{self.experiment}/seed-{self.seed}"


class Watcher:
    """Hears how a reproduction goes; this one is silent."""

    def begins(self, number: int, total: int, planned: Planned, finished: bool) -> None:
        """Training ``number``, from 1, of ``total`` is next; ``finished`` says that it was done before."""

    def progress(self) -> AbstractContextManager[Progress]:
        """Who hears that training."""
        return nullcontext(Progress())


def plan(datasets: Sequence[str], seeds: Sequence[int], skip: Sequence[str] = ()) -> list[Planned]:
    """The trainings, in order: every seed on ML-100K, the first one alone on the ten times larger ML-1M.

    ``skip`` names experiments to leave out, as ``ml-1m/paper``. ``ValueError`` for an unknown or a repeated
    name.
    """
    known = [f"{data}/{experiment}" for data in DATASETS for experiment in EXPERIMENTS]
    for name, given, allowed in (("datasets", datasets, DATASETS), ("skip", skip, known)):
        for value in given:
            if value not in allowed:
                raise ValueError(f"{name}={value!r} is unknown: choose from {', '.join(allowed)}")
    if not datasets or not seeds:
        raise ValueError("datasets and seeds must not be empty: give at least one of each")
    for values in (datasets, seeds):
        if len(set(values)) != len(values):
            raise ValueError(f"{' '.join(map(str, values))}: give each data set and each seed once")
    return [
        Planned(data, experiment, seed)
        for data in datasets
        for experiment in EXPERIMENTS
        if f"{data}/{experiment}" not in skip
        for seed in (seeds if data != "ml-1m" else seeds[:1])
    ]


def reproduce(
    out: Path,
    machine: Mapping[str, Any],
    *,
    datasets: Sequence[str] = DATASETS,
    seeds: Sequence[int] = (0, 1, 2),
    skip: Sequence[str] = (),
    data_dir: Path | None = None,
    results: Path | None = None,
    device: str = "cpu",
    command: str = "lunet-fast reproduce",
    epochs: int | None = None,
    overrides: Mapping[str, Any] | None = None,
    watcher: Watcher | None = None,
) -> Document:
    """Train everything of :func:`plan` and write ``report.html`` and ``report.md`` into ``out``.

    Beside them ``reproduction.json``, from which :func:`write_report` writes them again. The run folders lie
    below ``out``. A finished training there is used as it is, an interrupted one goes on
    (:func:`~lunet_fast.recsys.model.training.train` with ``resume``); one with other settings, or by other
    code (:func:`~lunet_fast.training.machine.code`), is refused by ``RunFolderError``.

    Args:
        out: the folder, made where it is not there.
        machine: processor, versions, commit and date, for the report.
        datasets, seeds, skip: as for :func:`plan`.
        data_dir: as for :func:`~lunet_fast.recsys.data.movielens.load`.
        results: folder with committed result files, whose parts the report quotes; what was not trained here
            is taken from there too where it can be, and marked.
        device: where to train.
        command: what was typed, for the report.
        epochs: instead of the recipes' own, for a trial, which the report says.
        overrides: other settings instead of the recipes' own; the report lists all settings of each run.
        watcher: hears how it goes.
    """
    watcher = watcher or Watcher()
    changes = dict(overrides or {})
    if epochs is not None:
        changes |= {"epochs": epochs, "mlp_epochs": epochs}
    planned = plan(datasets, seeds, skip)
    out.mkdir(parents=True, exist_ok=True)
    for one in planned:
        _refuse_other_code(RunFolder(out / one.folder))
    runs, described = [], {}
    for data in datasets:
        ratings = movielens.load(data, data_dir)
        described[data] = _described(ratings)
        for number, one in enumerate(planned, 1):
            if one.dataset == data:
                folder = RunFolder(out / one.folder)
                watcher.begins(number, len(planned), one, folder.is_finished())
                runs.append(_run(one, folder, ratings, changes, device, watcher))
    found = Reproduction(runs, described, Committed(results), machine, command, trial=epochs is not None)
    found.save(out)
    return write_report(out, found)


def write_report(out: Path, found: Reproduction) -> Document:
    """Write ``report.html`` and ``report.md`` into ``out``."""
    report = document(found)
    write_text(out / "report.html", page(report))
    write_text(out / "report.md", markdown(report))
    return report


def _described(ratings: Ratings) -> dict[str, Any]:
    ids = ratings.items.ids
    largest = int(ids.max()) if np.issubdtype(ids.dtype, np.integer) and len(ids) else None
    return {**ratings.describe(), "largest_item": largest, "source": ratings.source}


def _config(planned: Planned, ratings: Ratings, changes: Mapping[str, Any]) -> TrainConfig:
    settings = {**EXPERIMENTS[planned.experiment], **changes, "seed": planned.seed}
    return recipe(settings.pop("recipe"), len(ratings), **settings)


def command_of(planned: Planned, changes: Mapping[str, Any]) -> str:
    """The command that trains the same by itself."""
    settings = {**EXPERIMENTS[planned.experiment], **changes}
    words = ["lunet-fast", "train", "--dataset", planned.dataset, "--recipe", settings["recipe"]]
    words += ["--seed", str(planned.seed)]
    for name, flag in _FLAGS.items():
        if name in settings:
            words += [
                flag,
                f"{settings[name]:g}" if isinstance(settings[name], float) else str(settings[name]),
            ]
    if not settings.get("mlp", True) and settings.get("gamma", 1.0) == 1:
        words.append("--no-mlp")
    return shlex.join(words)


def _code() -> str:
    """Of all that computes a run: the package, and what is trained, which stands here."""
    return code(Path(__file__))


def _refuse_other_code(folder: RunFolder) -> None:
    file = folder.path / CODE
    if folder.is_started() and (not file.is_file() or read_json(file).get("code") != _code()):
        raise RunFolderError(
            f"{folder.path} holds a training by other code than today's, whose figures are not those of this "
            "version: move it away, or choose another --out"
        )


def _run(
    planned: Planned,
    folder: RunFolder,
    ratings: Ratings,
    changes: Mapping[str, Any],
    device: str,
    watcher: Watcher,
) -> Run:
    config = _config(planned, ratings, changes)
    folder.prepare(resume=True, overwrite=False)
    write_json(folder.path / CODE, {"code": _code()})
    with watcher.progress() as progress:
        result = train(ratings, config, out=folder.path, resume=True, device=device, progress=progress)
    return Run(
        planned.experiment,
        planned.dataset,
        planned.seed,
        result.metrics,
        command_of(planned, changes),
        read_json(folder.config),
        _losses(folder),
        _groups(folder, result, ratings, config) if config.gamma < 1 else [],
    )


def _losses(folder: RunFolder) -> dict[str, Losses]:
    """By phase; from the checkpoints, since a finished training that is read again has no curve with it."""
    found = {}
    for file in sorted(folder.checkpoints.glob("*.safetensors")):
        _, header = read_tensors(file, CHECKPOINT_FORMAT, CheckpointHeader)
        state = header["state"]
        found[state["phase"]] = Losses(state["train_loss"], state["test_loss"])
    return found


def _groups(
    folder: RunFolder, result: Result[TrainedModel], ratings: Ratings, config: TrainConfig
) -> list[dict[str, Any]]:
    """Ranking by the users' activity, which ``metrics.json`` lacks: kept in ``activity.json``."""
    file = folder.path / "activity.json"
    if not file.is_file():
        model, parts = result.trained.model, Parts.of(ratings, config.split, config.seed)
        with torch.no_grad(), cpu_threads(config.threads):
            scorer: Callable[..., torch.Tensor] = ItemScorer(model, model.histories()).scores
            groups = evaluate_ranking(scorer, parts, config.seed).groups
        write_json(file, {"groups": [group._asdict() for group in groups]})
    return read_json(file)["groups"]

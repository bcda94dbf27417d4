"""What a report is about: trainings, described data, and a folder of committed result files."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from lunet_fast.recsys.report.document import literal
from lunet_fast.training.files import write_json

FILE = "reproduction.json"
"""What a reproduction found, beside its report, which can be written again from it."""

COMPARED = {
    "lunet-paper": "paper",
    "lunet-ratings": "best",
    "lunet-interactions": "ranking",
    "lunet-both": "hybrid",
}
"""The experiments that ``lunet-fast compare`` runs too, by its keys."""


class Losses(NamedTuple):
    """Loss by epoch of a training: of its own batches, and of the test part (empty without one)."""

    train: Sequence[float]
    test: Sequence[float]


@dataclass(frozen=True)
class Run:
    """One training."""

    experiment: str
    """``paper``, ``best``, ``ranking`` or ``hybrid``."""
    dataset: str
    seed: int
    metrics: Mapping[str, Any]
    """The content of its ``metrics.json``."""
    command: str = ""
    """What a user types for it."""
    config: Mapping[str, Any] = field(default_factory=dict)
    losses: Mapping[str, Losses] = field(default_factory=dict)
    """By phase, ``LU-Net`` or ``MLP``."""
    groups: Sequence[Mapping[str, Any]] = ()
    """Ranking by the users' activity: ``least``, ``most``, ``users``, ``metrics``."""
    file: str = ""
    """The file of results that it was taken from; empty for a training of this reproduction."""


@dataclass
class Committed:
    """A folder of result files, some of which may be absent. Remembers which were used."""

    folder: Path | None
    used: dict[str, Any] = field(default_factory=dict)

    def json(self, name: str) -> Any:
        """The content of ``name``, None where it is absent; ``ValueError`` where it is damaged."""
        path = self._path(name)
        if path is None:
            return None
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path}: not a JSON file ({error}): make it again or take it away") from error
        self.used[name] = values.get("machine", {}) if isinstance(values, dict) else {}
        return values

    def text(self, name: str) -> str | None:
        """The text of ``name``, None where it is absent."""
        path = self._path(name)
        return None if path is None else path.read_text(encoding="utf-8")

    def has(self, name: str) -> bool:
        return self._path(name) is not None

    def _path(self, name: str) -> Path | None:
        path = None if self.folder is None else self.folder / name
        return path if path is not None and path.is_file() else None

    def trainings(self) -> list[Run]:
        """Trainings by a recipe as it is: of an earlier reproduction, then of the comparisons.

        One that an earlier file has too stands there once more, later.
        """
        found = [
            Run(run["experiment"], run["dataset"], run["seed"], run["metrics"], run["command"], file=FILE)
            for run in (self.json(FILE) or {}).get("runs", [])
        ]
        for data in ("ml-100k", "ml-1m"):
            name = f"compare-{data}.json"
            for run in (self.json(name) or {}).get("runs", []):
                if run.get("key") in COMPARED and "error" not in run:
                    found.append(Run(COMPARED[run["key"]], data, run["seed"], run, file=name))
        return found


@dataclass(frozen=True)
class Reproduction:
    """All that the report is about."""

    runs: Sequence[Run]
    data: Mapping[str, Mapping[str, Any]]
    """By data set what ``Ratings.describe`` gives, ``largest_item`` and ``source``."""
    committed: Committed
    machine: Mapping[str, Any]
    command: str
    trial: bool = False
    """Whether the trainings were cut short, so that no figure means anything."""
    note: str = ""
    """What else a reader must know of how this was put together."""

    def save(self, folder: Path) -> None:
        """Write all but the committed files to ``reproduction.json``."""
        values = {name: getattr(self, name) for name in ("machine", "command", "trial", "note", "data")}
        write_json(folder / FILE, {**values, "runs": [asdict(run) for run in self.runs]})

    @classmethod
    def load(cls, folder: Path, committed: Committed) -> Reproduction:
        """Read what :meth:`save` wrote; ``ValueError`` where the file is another."""
        try:
            values = json.loads((folder / FILE).read_text(encoding="utf-8"))
            for run in values["runs"]:
                run["losses"] = {phase: Losses(*both) for phase, both in run["losses"].items()}
            runs = [Run(**run) for run in values.pop("runs")]
            return cls(runs, committed=committed, **values)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{folder / FILE}: not what `lunet-fast reproduce` writes: {error}") from error


class Mean(NamedTuple):
    """Over the seeds."""

    value: float
    spread: float | None
    """Standard deviation over the seeds; None for one seed."""

    def text(self, digits: int = 4) -> str:
        spread = "" if self.spread is None else f" ± {self.spread:.{digits}f}"
        return f"{self.value:.{digits}f}{spread}"


def mean(runs: Iterable[Run], name: str) -> Mean | None:
    """Of a metric over runs; None where none of them has it."""
    values = [float(run.metrics[name]) for run in runs if run.metrics.get(name) is not None]
    if not values:
        return None
    return Mean(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)


def dagger(runs: Sequence[Run]) -> str:
    """The mark of figures that were not measured here but taken from a file."""
    return " †" if any(run.file for run in runs) else ""


def finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def is_ours(row: Mapping[str, Any]) -> bool:
    """Whether a row of a comparison is LU-Net's, or this library's with something else in its place."""
    named = str(row.get("method", "")).lower().startswith(("lu-net", "lunet"))
    return named or row.get("package") == "lunet_fast"


def is_dirty(machine: Mapping[str, Any]) -> bool:
    """Whether something was measured with changes that no commit has."""
    return str(machine.get("commit", "")).endswith("-dirty")


def machine_line(machine: Mapping[str, Any]) -> str:
    """Processor, versions, commit and date as a sentence; "" where nothing is known."""
    told = [literal(machine["processor"])] if machine.get("processor") else []
    if machine.get("cores"):
        told.append(f"{machine['cores']} cores")
    told += [
        f"{name.replace('_', '-')} {literal(machine[name])}"
        for name in ("python", "torch", "numpy", "lunet_fast")
        if machine.get(name)
    ]
    if machine.get("commit"):
        changed = " (**with changes that were not committed**)" if is_dirty(machine) else ""
        told.append(f"commit {literal(machine['commit'])}{changed}")
    if machine.get("date"):
        told.append(literal(machine["date"]))
    return ", ".join(told) + "." if told else ""


class Findings:
    """The runs by data set and experiment, those made here before those of committed files."""

    def __init__(self, found: Reproduction, experiments: Iterable[str], datasets: Iterable[str]) -> None:
        self.datasets = list(datasets)
        published = found.committed.trainings()
        here = {(run.dataset, run.experiment) for run in found.runs}
        self.runs: dict[tuple[str, str], list[Run]] = {
            (data, experiment): [] for data in self.datasets for experiment in experiments
        }
        for run in [*found.runs, *published]:
            held = self.runs.get((run.dataset, run.experiment))
            quoted = bool(run.file) and (run.dataset, run.experiment) in here
            if held is not None and not quoted and run.seed not in [other.seed for other in held]:
                held.append(run)
        self.runs = {key: runs for key, runs in self.runs.items() if runs}
        self.controls: dict[str, list[Run]] = {}
        """Runs with the MLP control, by data set."""
        for data in self.datasets:
            for source in (found.runs, published):
                runs = [r for r in source if r.dataset == data and "mlp_test_mse" in r.metrics]
                if runs:
                    self.controls.setdefault(data, runs)
        self.compared = {data: found.committed.json(f"compare-{data}.json") for data in self.datasets}

    def of(self, data: str, experiment: str) -> list[Run]:
        return self.runs.get((data, experiment), [])

    def mean(self, data: str, experiment: str, name: str) -> Mean | None:
        return mean(self.of(data, experiment), name)

    def others(self, data: str, key: str) -> list[dict[str, Any]]:
        """The rows of the comparison that are not LU-Net's and have ``key``, the best first."""
        rows = (self.compared[data] or {}).get("rows", [])
        rows = [row for row in rows if not is_ours(row) and finite(row.get(key))]
        return sorted(rows, key=lambda row: row[key], reverse="mse" not in key)

    def strongest(self, data: str, key: str) -> str:
        """The best of the other methods, and of how many; "" where none was run."""
        others = self.others(data, key)
        if not others:
            return ""
        how = "the only other method run" if len(others) == 1 else f"best of the {len(others)} others run"
        return f"{how}: {literal(others[0]['method'])}, {others[0][key]:.3f}"

    def quoted(self, *experiments: str, data: str = "", controls: bool = False) -> str:
        """What † means after figures of these, of all data sets or one; "" where none is of a file."""
        datasets = [data] if data else self.datasets
        runs = [run for each in datasets for name in experiments for run in self.of(each, name)]
        runs += [run for some in self.controls.values() for run in some] if controls else []
        files = sorted({run.file for run in runs if run.file})
        return (
            f" †: not run here, but taken from {' and '.join(f'`{name}`' for name in files)}."
            if files
            else ""
        )

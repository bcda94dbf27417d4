"""The report's tables and figures of trainings; captions and notes are the template's."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from lunet_fast.recsys.data.datasets import dataset_title
from lunet_fast.recsys.report.document import (
    Cell,
    Curve,
    Panel,
    Panels,
    Row,
    Table,
    literal,
    numbers,
    row,
    texts,
)
from lunet_fast.recsys.report.results import Findings, Mean, Run, dagger, finite, mean
from lunet_fast.recsys.report.run import PRINTED, TABLE_2

TABLE_1: dict[str, dict[str, float]] = {
    "ml-100k": {"users": 943, "items": 1_682, "ratings": 100_000},
    "ml-1m": {"users": 6_040, "items": 3_952, "ratings": 1_000_209, "density": 0.0447},
}
"""The paper's table 1."""

NAMES = {
    "paper": "LU-Net, recipe paper",
    "best": "LU-Net, recipe best",
    "ranking": "LU-Net, interactions alone (γ\u00a0=\u00a00)",
    "hybrid": "LU-Net, hybrid (γ\u00a0=\u00a00.1)",
}
"""The experiments, as tables call them."""

STRONGEST = 3
"""How many of the other methods stand in table 2 and in the table of ranking."""


def data_sets(described: Any) -> Table:
    """Table 1, and what ``described`` says of the files."""
    rows, counts = [], ("users", "items", "ratings")
    for data, printed in TABLE_1.items():
        name = dataset_title(data)
        density = f"{printed['density']:.4f}" if "density" in printed else "—"
        rows.append(row(f"{name}, paper", *(f"{printed[key]:,}" for key in counts), density, ""))
        own = described.get(data)
        if own is not None:
            largest = "" if own.get("largest_item") is None else f"{own['largest_item']:,}"
            cells = [*(f"{own[key]:,}" for key in counts), f"{own['density']:.4f}", largest]
            rows.append(row(f"{name}, the files", *cells, ours=True))
    return Table("", [*texts(""), *numbers(*counts, "density", "largest item id")], rows)


def ratings(results: Findings) -> Table:
    """Table 2, with ours, the control and the strongest of the other methods."""
    rows: list[tuple[str, bool, dict[str, list[Cell]]]] = []
    for model in ("classic MLP", "invertible model"):
        printed = {
            data: [Cell(f"{mse:.4f}", mse), Cell(f"{mse**0.5:.4f}", mse**0.5), Cell(f"{error:.4f}")]
            for data in results.datasets
            for name, of, mse, error in TABLE_2
            if name.endswith(model) and of == dataset_title(data)
        }
        rows.append((f"paper: {model}", False, printed))
    control = {}
    for data, runs in results.controls.items():
        mse, lost = mean(runs, "mlp_test_mse"), mean(runs, "mlp_reconstruction_error")
        if mse is not None:
            root = Cell(f"{mse.value**0.5:.4f}", mse.value**0.5)
            control[data] = [_cell(mse, runs), root, Cell("" if lost is None else f"{lost.value:.4f}")]
    rows.append(("MLP control", True, control))
    for experiment in ("paper", "best"):
        ours = {}
        for data in results.datasets:
            runs = results.of(data, experiment)
            lost = mean(runs, "reconstruction_error")
            if mean(runs, "test_mse") is not None:
                cells = [_cell(mean(runs, key), runs) for key in ("test_mse", "test_rmse")]
                ours[data] = [*cells, Cell("" if lost is None else f"{lost.value:.1e}")]
        rows.append((NAMES[experiment], True, ours))
    for name in strongest(results):
        theirs = {
            data: [*(_row_cell(other, key) for key in ("test_mse", "test_rmse")), Cell("")]
            for data in results.datasets
            for other in results.others(data, "test_mse")
            if other["method"] == name
        }
        rows.append((literal(name), False, theirs))
    columns = texts("model")
    for data in results.datasets:
        group = dataset_title(data)
        columns += numbers("test MSE", "RMSE", best="lowest", group=group)
        columns += numbers("reconstruction error", group=group)
    blank = [Cell("")] * 3
    lines = [
        row(name, *(cell for data in results.datasets for cell in cells.get(data, blank)), ours=ours)
        for name, ours, cells in rows
        if cells
    ]
    return Table("", columns, lines)


def strongest(results: Findings) -> list[str]:
    """The other methods that table 2 shows."""
    found = [
        other["method"] for data in results.datasets for other in results.others(data, "test_mse")[:STRONGEST]
    ]
    return list(dict.fromkeys(found))


def ranking(results: Findings, data: str) -> Table:
    """Leave-one-out, ours and the strongest of the other methods, the best of each column among them."""
    keys = ("hr@10", "ndcg@10", "full_hr@10", "full_ndcg@10")

    def line(name: str, cells: Sequence[Cell], ours: bool) -> Row:
        hits, gain, full_hits, full_gain, error = cells
        return row(name, hits, gain, _tenth(hits), full_hits, full_gain, _tenth(full_hits), error, ours=ours)

    rows = []
    for experiment in ("ranking", "hybrid"):
        runs = results.of(data, experiment)
        if runs:
            cells = [_cell(mean(runs, key), runs) for key in (*keys, "test_mse")]
            rows.append(line(NAMES[experiment], cells, True))
    best = [other["method"] for key in keys for other in results.others(data, key)[:1]]
    for place, other in enumerate(results.others(data, "ndcg@10")):
        if place >= STRONGEST and other["method"] not in best:
            continue
        cells = [_row_cell(other, key) for key in keys]
        rows.append(line(literal(other["method"]), [*cells, Cell("")], False))
    columns = texts("model")
    for group in ("100 candidates", "all items"):
        columns += numbers("HR@10", "NDCG@10", "Precision@10", best="highest", group=group)
    return Table("", [*columns, *numbers("test MSE", best="lowest")], rows)


def test_lists(results: Findings) -> Table:
    """Precision (2.16) of the 80/20 test part."""
    rows = []
    for (data, experiment), runs in results.runs.items():
        runs = [run for run in runs if "precision@10" in run.metrics]
        if runs and experiment != "ranking":
            how = "interaction" if experiment == "hybrid" else "predicted rating"
            cells = [_cell(mean(runs, name), runs) for name in ("precision@10", "recall@10")]
            rows.append(row(f"{dataset_title(data)}: {NAMES[experiment]}", how, *cells, ours=True))
    return Table("", [*texts("model", "ranked by"), *numbers("Precision@10", "Recall@10")], rows)


def activity(results: Findings) -> Table:
    """Full ranking by how active users are."""
    rows = []
    for (data, experiment), runs in results.runs.items():
        for third in zip(*(run.groups for run in runs if run.groups), strict=False):
            least, most = min(g["least"] for g in third), max(g["most"] for g in third)
            cells = [f"{least:,} to {most:,}", f"{third[0]['users']:,}"]
            for name in ("full_hr@10", "full_ndcg@10", "coverage@10"):
                cells.append(f"{statistics.fmean(g['metrics'][name] for g in third):.4f}")
            rows.append(row(f"{dataset_title(data)}: {NAMES[experiment]}", *cells, ours=True))
    columns = numbers("ratings known", "users", "HR@10", "NDCG@10", "coverage@10")
    return Table("", [*texts("model"), *columns], rows)


def losses(results: Findings, data: str) -> Panels:
    """Loss by epoch of the first seed, as figures 3 to 6 of the paper."""
    curves: dict[str, list[Curve]] = {"train": [], "test": []}
    for look, (label, experiment, phase) in enumerate(
        (("best", "best", "LU-Net"), ("paper", "paper", "LU-Net"), ("MLP", "paper", "MLP"))
    ):
        first = next((r for r in results.of(data, experiment) if phase in r.losses), None)
        for part, held in curves.items():
            values = getattr(first.losses[phase], part) if first is not None else ()
            if values:
                held.append(Curve(label, values, look))
    name = dataset_title(data)
    training = Panel(f"{name}: training loss", curves["train"])
    return Panels("", [training, Panel(f"{name}: test loss", curves["test"], ("printed", PRINTED[name]))])


def round_trips(results: Findings) -> Table:
    rows = []
    for (data, experiment), runs in results.runs.items():
        relative, error = (mean(runs, f"reconstruction_error{name}") for name in ("_relative", ""))
        if relative is not None:
            cells = ["" if error is None else f"{error.value:.1e}", f"{relative.value:.1e}"]
            rows.append(row(f"{dataset_title(data)}: {NAMES[experiment]}{dagger(runs)}", *cells, ours=True))
    return Table("", [*texts("model"), *numbers("mean ‖f⁻¹(f(x)) − x‖²", "over mean ‖x‖²")], rows)


def times(results: Findings) -> Table:
    trainings = [
        (f"{dataset_title(data)}: {NAMES[experiment]}", runs, "", runs[0].metrics.get("epochs", ""))
        for (data, experiment), runs in results.runs.items()
    ]
    trainings += [
        (f"{dataset_title(data)}: MLP control", runs, "mlp_", runs[0].config.get("mlp_epochs", ""))
        for data, runs in results.controls.items()
    ]
    rows = []
    for name, runs, prefix, epochs in trainings:
        took, size = mean(runs, f"{prefix}train_seconds"), mean(runs, f"{prefix}parameters")
        if took is not None and size is not None:
            rows.append(row(name + dagger(runs), f"{epochs}", f"{size.value:,.0f}", took.text(0), ours=True))
    return Table("", [*texts("training"), *numbers("epochs", "parameters", "seconds")], rows)


def _cell(value: Mean | None, runs: Sequence[Run]) -> Cell:
    return Cell("") if value is None else Cell(value.text() + dagger(runs), value.value)


def _row_cell(other: dict[str, Any], key: str) -> Cell:
    """Of a row of a comparison."""
    if not finite(other.get(key)):
        return Cell("")
    spread = other.get(f"{key}_sd")
    return Cell(Mean(other[key], spread if finite(spread) else None).text(), other[key])


def _tenth(hits: Cell) -> Cell:
    """Precision@10 from HR@10: each user has one relevant item."""
    return hits if hits.value is None else Cell(f"{hits.value / 10:.4f}", hits.value / 10)

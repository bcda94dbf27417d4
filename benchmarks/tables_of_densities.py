"""The tables of what flows have learnt, from the four files of ``density.py``."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from committed import read_results
from machine import RESULTS
from tables import Cell, load, measured, number, standard_error, table

REACHED = 2.05
"""Bits a dimension on the validation part that most flows get to, for the time to it."""

ROUND_STEPS = 100
"""Steps between two looks at the validation part."""


def rows_of(name: str, folder: Path = RESULTS) -> list[dict[str, Any]]:
    """The rows of density-NAME.json, [] where it is not there."""
    path = folder / f"density-{name}.json"
    return read_results(path)["rows"] if path.is_file() else []


def step_times(folder: Path = RESULTS) -> dict[tuple[str, str, int], dict[str, Any]]:
    """The row of density-speed.json for each family, size and number of components."""
    return {(row["family"], row["size"], row["components"]): row for row in rows_of("speed", folder)}


def training_seconds(row: dict[str, Any], step_ms: float) -> float:
    """The mean time of a flow's trainings: their steps times that of a step."""
    return statistics.fmean(len(run["curve"]) for run in row["runs"]) * ROUND_STEPS * step_ms / 1e3


def _flow(row: dict[str, Any]) -> str:
    return row["family"] if "M = 1" in row["family"] else f"{row['family']}, {row['size']}"


def _reached(row: dict[str, Any], step_ms: float) -> Cell:
    """The mean time to REACHED, where every seed gets there."""
    curves = [run["curve"] for run in row["runs"]]
    first = [next((i for i, loss in enumerate(curve, 1) if loss <= REACHED), None) for curve in curves]
    rounds = [found for found in first if found is not None]
    if len(rounds) < len(curves):
        return Cell("not always" if rounds else "never")
    return number(statistics.fmean(rounds) * ROUND_STEPS * step_ms / 1e3, ".1f")


#: With what the others are compared, on the same parts of the data.
REFERENCE = ("LU-Net", "M")


def digits_table(folder: Path = RESULTS) -> list[str]:
    """Likelihood on digits, the best first, and LU-Net M's lead, paired over seeds; bold is the best."""
    rows = rows_of("digits", folder)
    (own,) = (row for row in rows if (row["family"], row["size"]) == REFERENCE)
    cells: list[list[Cell | str]] = []
    for row in sorted(rows, key=lambda row: row["test"]):
        chosen = row["tuned"]["chosen"]
        ahead = [theirs["test"] - ours["test"] for theirs, ours in zip(row["runs"], own["runs"], strict=True)]
        error = standard_error(statistics.stdev(ahead), len(ahead))
        cells.append(
            [
                _flow(row),
                f"{row['parameters']:,}",
                number(row["test"], ".4f", standard_error(row["test_std"], len(row["runs"]))),
                "" if row is own else number(statistics.fmean(ahead), "+.4f", error).text,
                f"{chosen['learning_rate']:g}",
                f"{chosen['weight_decay']:g}",
                str(chosen["components"]),
                f"{chosen['steps']:,}",
                number(row["auroc"], ".3f"),
            ]
        )
    settings = ["rate", "decay", "Gaussians", "steps"]
    sure = "AUROC, digits 0–4 and 5–9"
    head = ["flow", "parameters", "bits/dim", "more than LU-Net, M", *settings, sure]
    return table(head, cells, {"bits/dim": min, sure: max})


def costs_table(folder: Path = RESULTS) -> list[str]:
    """What the flows of :func:`digits_table` cost, in its order; bold is the least of a column."""
    times = step_times(folder)
    rows: list[list[Cell | str]] = []
    for row in sorted(rows_of("digits", folder), key=lambda row: row["test"]):
        time = times[row["family"], row["size"], row["tuned"]["chosen"]["components"]]
        step = time["step_ms"]
        rows.append(
            [
                _flow(row),
                number(step, ".2f"),
                number(training_seconds(row, step), ".0f"),
                _reached(row, step),
                number(time["sample_ms"], ".1f"),
                number(time["kept_bytes"] / 1e6, ".1f"),
            ]
        )
    costs = ["training step, ms", "training, s", f"to {REACHED} bits, s", "256 samples, ms", "kept, MB"]
    return table(["flow", *costs], rows, dict.fromkeys(costs, min))


def plane_table(folder: Path = RESULTS) -> list[str]:
    """KL of each flow from each known 2-D density, in nats; bold is the least of a column."""
    all_rows = rows_of("plane", folder)
    targets = list(dict.fromkeys(row["target"] for row in all_rows))
    rows: list[list[Cell | str]] = []
    for size in ("S", "M", "L"):
        for family in dict.fromkeys(row["family"] for row in all_rows):
            found = {row["target"]: row for row in all_rows if (row["family"], row["size"]) == (family, size)}
            if len(found) < len(targets):
                continue
            counts = sorted({row["parameters"] for row in found.values()})
            span = "–".join(dict.fromkeys((f"{counts[0]:,}", f"{counts[-1]:,}")))
            errors = {t: standard_error(found[t]["kl_std"], len(found[t]["runs"])) for t in targets}
            cells = [number(found[t]["kl"], ".3f", errors[t]) for t in targets]
            mean = number(statistics.fmean(row["kl"] for row in found.values()), ".3f")
            rows.append([f"{family}, {size}", span, *cells, mean])
    return table(["flow", "parameters", *targets, "mean"], rows, dict.fromkeys([*targets, "mean"], min))


def ablation_table(folder: Path = RESULTS) -> list[str]:
    """LU-Net M with one thing changed: its validation loss beside the unchanged one's, paired over seeds."""
    rows = rows_of("ablation", folder)
    plain = {run["seed"]: run["validation"] for run in rows[0]["runs"]}
    cells: list[list[Cell | str]] = []
    for row in rows:
        runs = [run for run in row["runs"] if "validation" in run]
        change = [run["validation"] - plain[run["seed"]] for run in runs]
        error = standard_error(statistics.stdev(change), len(change)) if len(change) > 1 else None
        cells.append(
            [
                row["group"],
                row["name"],
                f"{row['parameters']:,}" if runs else "",
                number(row["validation"]) if runs else "diverged",
                "" if row is rows[0] or not runs else number(statistics.fmean(change), "+.4f", error).text,
                number(row["round_trip"], ".1e"),
            ]
        )
    head = ["", "", "parameters", "bits/dim, validation", "change", "round trip, worst row"]
    return table(head, cells, {"bits/dim, validation": min})


def _section(make: Callable[[], list[str]], part: str) -> Callable[[], list[str]]:
    command = f"python benchmarks/density.py {part}"
    return lambda: [*make(), "", measured(load(f"density-{part}"), command)]


SECTIONS: dict[str, Callable[[], list[str]]] = {
    "density-digits": _section(digits_table, "digits"),
    "density-costs": _section(costs_table, "speed"),
    "density-2d": _section(plane_table, "plane"),
    "density-ablation": _section(ablation_table, "ablation"),
}

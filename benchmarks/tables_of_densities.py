"""The tables of what flows have learnt, from the four files of ``density.py``."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from machine import RESULTS
from tables import Cell, load, measured, number, standard_error, table

REACHED = 2.15
"""Bits a dimension on the validation part that most flows get to, for the time to it."""

ROUND_STEPS = 100
"""Steps between two looks at the validation part."""


def rows_of(name: str, folder: Path = RESULTS) -> list[dict[str, Any]]:
    """The rows of density-NAME.json, [] where it is not there."""
    path = folder / f"density-{name}.json"
    return json.loads(path.read_text())["rows"] if path.is_file() else []


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


def digits_table(folder: Path = RESULTS) -> list[str]:
    """Likelihood, cost and outliers on digits, the best likelihood first; bold is the best of a column."""
    times = step_times(folder)
    rows: list[list[Cell | str]] = []
    for row in sorted(rows_of("digits", folder), key=lambda row: row["test"]):
        components = row["tuned"]["chosen"]["components"]
        time = times.get((row["family"], row["size"], components), {"step_ms": None, "sample_ms": None})
        step = time["step_ms"]
        rows.append(
            [
                _flow(row),
                f"{row['parameters']:,}",
                number(row["test"], ".4f", standard_error(row["test_std"], len(row["runs"]))),
                str(components),
                number(step, ".2f"),
                number(None if step is None else training_seconds(row, step), ".0f"),
                "" if step is None else _reached(row, step),
                number(time["sample_ms"], ".1f"),
                number(row["auroc"], ".3f"),
            ]
        )
    step, sample, sure = "training step, ms", "256 samples, ms", "AUROC, digits 0–4 and 5–9"
    to = f"to {REACHED} bits, s"
    head = ["flow", "parameters", "bits/dim", "Gaussians in the base", step, "training, s", to, sample, sure]
    return table(head, rows, {**dict.fromkeys(["bits/dim", *head[4:8]], min), sure: max})


#: With what the others are compared, on the same parts of the data.
REFERENCE = ("LU-Net", "M")


def digits_wide_table(folder: Path = RESULTS) -> list[str]:
    """Likelihood on digits after the wide search, the best first, and LU-Net M's lead, paired over seeds."""
    rows = rows_of("digits-wide", folder)
    (own,) = (row for row in rows if (row["family"], row["size"]) == REFERENCE)
    cells: list[list[Cell | str]] = []
    for row in sorted(rows, key=lambda row: row["test"]):
        chosen = row["tuned"]["chosen"]
        ahead = [theirs["test"] - ours["test"] for theirs, ours in zip(row["runs"], own["runs"], strict=True)]
        error = standard_error(statistics.stdev(ahead), len(ahead))
        lead = "" if row is own else number(statistics.fmean(ahead), "+.4f", error).text
        cells.append(
            [
                f"{row['family']}, {row['size']}",
                f"{row['parameters']:,}",
                number(row["test"], ".4f", standard_error(row["test_std"], len(row["runs"]))),
                lead,
                f"{chosen['learning_rate']:g}",
                f"{chosen['weight_decay']:g}",
                str(chosen["components"]),
                f"{chosen['steps']:,}",
                str(len(row["tuned"]["tried"])),
            ]
        )
    head = [
        "flow",
        "parameters",
        "bits/dim",
        "more than LU-Net, M",
        "rate",
        "decay",
        "Gaussians",
        "steps",
        "tries",
    ]
    return table(head, cells, {"bits/dim": min})


def speed_table(folder: Path = RESULTS) -> list[str]:
    """Cost of every flow with either base; bold is the least of a column."""
    rows = [
        [
            _flow(row),
            f"{row['parameters']:,}",
            str(row["components"]),
            number(row["step_ms"], ".2f"),
            number(row["sample_ms"], ".2f"),
            number(row["kept_bytes"] / 1e6, ".1f"),
        ]
        for row in rows_of("speed", folder)
    ]
    costs = ["training step, ms", "256 samples, ms", "kept for backward, MB"]
    return table(["flow", "parameters", "Gaussians in the base", *costs], rows, dict.fromkeys(costs, min))


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


def depth_table(folder: Path = RESULTS) -> list[str]:
    """Likelihood and round trip by depth and start; bold is the least of a column."""
    rows: list[list[Cell | str]] = []
    for row in sorted(rows_of("depth", folder), key=lambda row: (row["layers"], row["start"])):
        first = [str(row["layers"]), row["start"], number(row["first"], ".3g")]
        if row["test"] is None:
            rows.append([*first, "diverged", "", "", ""])
            continue
        errors = [number(row[f"round_trip_{what}"], ".1e") for what in ("median", "worst")]
        rows.append([*first, number(row["test"]), *errors, f"{row['digits_kept']:.1f}"])
    errors = ["round trip, median", "round trip, worst"]
    head = ["layers", "start", "bits/dim, untrained", "bits/dim", *errors, "digits kept"]
    return table(head, rows, dict.fromkeys(head[2:6], min))


def _section(make: Callable[[], list[str]], part: str, file: str = "") -> Callable[[], list[str]]:
    command = f"python benchmarks/density.py {part}"
    return lambda: [*make(), "", measured(load(f"density-{file or part}"), command)]


SECTIONS: dict[str, Callable[[], list[str]]] = {
    "density-digits-wide": _section(digits_wide_table, "digits", "digits-wide"),
    "density-digits": _section(digits_table, "digits"),
    "density-2d": _section(plane_table, "plane"),
    "density-depth": _section(depth_table, "depth"),
}

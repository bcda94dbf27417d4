"""The report's tables and figures of committed result files; captions and notes are the template's."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from lunet_fast.recsys.model.config import recipe
from lunet_fast.recsys.report.document import (
    Cell,
    Column,
    Dot,
    Dots,
    Table,
    literal,
    numbers,
    row,
    signed,
    texts,
)
from lunet_fast.recsys.report.results import Committed, finite, is_dirty, is_ours

Best = Literal["", "lowest", "highest"]

LEAKY = "lunet-leaky"
"""The row of a comparison that was told of the held-out pairs."""

# Key of a row of a comparison, heading, which is best, how it is written.
MEASURES: tuple[tuple[str, str, Best, str], ...] = (
    ("test_mse", "test MSE", "lowest", ".4f"),
    ("test_rmse", "RMSE", "lowest", ".4f"),
    ("hr@10", "HR@10", "highest", ".4f"),
    ("ndcg@10", "NDCG@10", "highest", ".4f"),
    ("full_hr@10", "HR@10, all items", "highest", ".4f"),
    ("full_ndcg@10", "NDCG@10, all items", "highest", ".4f"),
    ("reconstruction_error_relative", "reconstruction, relative", "", ".0e"),
    ("train_seconds", "training, s", "", ",.1f"),
    ("peak_memory_mb", "memory, MB", "", ",.0f"),
    ("parameters", "parameters", "", ",.0f"),
)


def ablation(rows: Sequence[Mapping[str, Any]], keys: Mapping[str, str]) -> Table:
    """All changes; ``keys`` names the figures, the first of which decides what is best."""
    lines = []
    for n, line in enumerate(rows):
        cells: list[Cell | str] = [literal(line["group"]), literal(line["name"])]
        for key in keys:
            value, change, error = (line.get(f"{key}{what}") for what in ("", "_change", "_change_error"))
            if value is None or not finite(value):
                cells += ["", ""]
                continue
            spread = f" ± {error:.4f}" if finite(error) else ""
            told = f"{signed(change)}{spread}" if n and change is not None and finite(change) else ""
            # What was told of the held-out pairs does not compete.
            leaks = line.get("settings", {}).get("negatives_outside") == "known"
            cells += [Cell(f"{value:.4f}", None if leaks else value), told]
        lines.append(row(*cells, ours=not n))
    columns = texts("", "change")
    for key, heading in keys.items():
        columns += [Column(heading, best="lowest" if key == "mse" else "highest"), Column("change")]
    return Table("", columns, lines)


def changes(rows: Sequence[Mapping[str, Any]], key: str) -> Dots | None:
    """The changes of one figure, None where there are none."""
    changed = [line for line in rows[1:] if finite(line.get(f"{key}_change"))]
    if not changed:
        return None
    sizes = sorted(abs(line[f"{key}_change"]) for line in changed)
    # So wide that nine of ten changes are within.
    limit = _round_up(max(sizes[int(0.9 * (len(sizes) - 1))], 1e-4))
    dots = [
        Dot(
            ": ".join(filter(None, (line["group"], str(line["name"])))),
            line[f"{key}_change"],
            line.get(f"{key}_change_error"),
        )
        for line in changed
    ]
    return Dots("", dots, "left" if key == "mse" else "right", limit)


def _round_up(value: float) -> float:
    """The next of 1, 2, 5, 10, ... times a power of ten."""
    unit = 10.0 ** math.floor(math.log10(value))
    return next(unit * m for m in (1, 2, 5, 10) if unit * m >= value * (1 - 1e-9))


def comparison(found: Mapping[str, Any]) -> Table:
    """Every method that has figures."""
    rows = []
    for line in found["rows"]:
        if line.get("missing") or line.get("error"):
            continue
        package = str(line.get("package", ""))
        package = {"lunet_fast": "this one", "ours": "written here"}.get(package, package)
        cells: list[Cell | str] = [literal(line["method"]), literal(package)]
        for key, _, best, form in MEASURES:
            value, spread = line.get(key), line.get(f"{key}_sd")
            if value is None or not finite(value):
                cells.append("")
                continue
            text = f"{value:{form}}" + (f" ± {spread:.4f}" if best and finite(spread) else "")
            # One that was told of the held-out pairs does not compete; nor does the error of one that is
            # measured on another test part.
            apart = line.get("key") == LEAKY or (line.get("kind") == "both" and "test" in key)
            cells.append(Cell(f"{text} ‡" if best and apart else text, value if best and not apart else None))
        rows.append(row(*cells, ours=is_ours(line)))
    return Table(
        "", [*texts("method", "package"), *(Column(name, best=best) for _, name, best, _ in MEASURES)], rows
    )


def fold_in(rows: Sequence[Mapping[str, Any]], key: str) -> Table:
    """A figure by the number n of ratings that are known of a new user."""
    given = sorted(int(name.removeprefix(f"{key}_")) for name in rows[0] if name.startswith(f"{key}_"))
    lines = []
    for line in rows:
        ours = "fold_in" in line["way"]
        cells = [Cell(f"{line[f'{key}_{n}']:.4f}", line[f"{key}_{n}"]) for n in given]
        lines.append(
            row(literal(line["way"]), *cells, f"{line['ms_per_user']:.0f}" if ours else "", ours=ours)
        )
    best: Best = "lowest" if key == "mse" else "highest"
    columns = [*texts(""), *numbers(*(f"n = {n}" for n in given), best=best), *numbers("ms a user")]
    return Table("", columns, lines)


def recipe_today() -> str:
    """Recipe best for ML-100K as ``time-to-quality.json`` writes settings."""
    now = recipe("best", 100_000, mlp=False)
    return f"K = {now.members}, k = {now.embedding_size}, M = {now.layers}, {now.epochs} epochs"


def older_recipe(found: Mapping[str, Any]) -> str:
    """The settings of LU-Net in ``time-to-quality.json`` where they are not today's, "" where they are."""
    measured = {line["settings"] for line in found["trainings"] if is_ours(line) and line.get("settings")}
    return "; ".join(sorted(measured - {recipe_today()}))


def time_to_quality(found: Mapping[str, Any]) -> Table:
    """Whole trainings; when LU-Net reaches the error of another, unless its settings are older."""
    old = bool(older_recipe(found))
    rows = []
    for line in found["trainings"]:
        name = literal(line["method"]) + (" (older recipe)" if old and is_ours(line) else "")
        told = [name, literal(line.get("settings", "")), str(line["threads"])]
        if line.get("missing"):
            rows.append(row(*told, literal(line["missing"]), *([""] if old else ["", ""])))
            continue
        after = line["ours_seconds"]
        reached = "" if line["curve"] else "not in its training" if after is None else f"{after:.1f}"
        took, error = line["seconds"], line["test_mse"]
        cells: list[Cell | str] = [Cell(f"{took:.1f}", took), Cell(f"{error:.4f}", error)]
        cells += [] if old else [reached]
        rows.append(row(*told, *cells, ours=is_ours(line)))
    columns = [*texts("method", "settings"), *numbers("threads")]
    columns += numbers("training, s", "test MSE, stars²", best="lowest")
    return Table("", columns + ([] if old else numbers("LU-Net gets there after, s")), rows)


def files(committed: Committed) -> Table:
    """The result files that were used so far."""
    rows = [
        row(
            f"`{name}`",
            literal(machine.get("date", "")) or "not recorded",
            literal(machine.get("commit", "")) or "not recorded",
            "uncommitted changes" if is_dirty(machine) else "",
        )
        for name, machine in sorted(committed.used.items())
    ]
    return Table("", texts("file", "measured on", "at commit", "warning"), rows)

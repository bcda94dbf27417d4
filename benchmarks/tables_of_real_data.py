"""The tables of what ``density_tables.py`` has measured: real tables, and Fashion-MNIST class by class."""

from __future__ import annotations

import base64
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from machine import RESULTS
from tables import Cell, least_bold, load, measured, standard_error, table
from tables_of_densities import rows_of

LUNET = "LU-Net"


def packed(losses: np.ndarray) -> str:
    """Numbers of test rows for a results file: little-endian float32 in base 64."""
    return base64.b64encode(losses.astype("<f4").tobytes()).decode()


def unpacked(row: dict[str, Any]) -> np.ndarray:
    """The loss of each test row, the mean over the seeds."""
    return np.frombuffer(base64.b64decode(row["test_losses"]["float32"]), "<f4").astype(np.float64)


def _signed(value: float, error: float) -> str:
    places = 3 if abs(value) < 100 else 0
    return f"{value:+.{places}f} ± {error:.{places}f}"


def _against(row: dict[str, Any], own: dict[str, Any]) -> Cell:
    """How much more a flow loses than LU-Net on the same test rows, ± the standard error over them."""
    more = unpacked(row) - unpacked(own)
    return Cell(_signed(float(more.mean()), standard_error(float(more.std(ddof=1)), len(more))), row["test"])


def _line(rows: Sequence[dict[str, Any]], families: Sequence[str]) -> list[Cell]:
    """A cell for each flow: LU-Net's loss, and what the others lose more; the least loss is bold."""
    here = {row["family"]: row for row in rows}
    own = here[LUNET]
    cells = [Cell(f"{own['test']:.3f}", own["test"])]
    cells += [_against(here[f], own) if f in here else Cell("") for f in families if f != LUNET]
    return least_bold(cells)


def _grid(
    rows: Sequence[dict[str, Any]], key: str, about: dict[str, Callable[[dict[str, Any]], str]]
) -> tuple[list[str], list[list[Cell | str]]]:
    """The head and a line for each value of ``key`` for which there is LU-Net."""
    families = [LUNET, *dict.fromkeys(row["family"] for row in rows if row["family"] != LUNET)]
    lines: list[list[Cell | str]] = []
    for value in dict.fromkeys(row[key] for row in rows):
        here = [row for row in rows if row[key] == value]
        own = next((row for row in here if row["family"] == LUNET), None)
        if own is not None:
            lines.append([*(make(own) for make in about.values()), *_line(here, families)])
    return [*about, *families], lines


def real_table(folder: Path = RESULTS) -> list[str]:
    """Test loss of LU-Net on real tables, and what the other flows lose more."""
    about: dict[str, Callable[[dict[str, Any]], str]] = {
        "table": lambda row: row["table"],
        "rows × columns": lambda row: f"{row['train_rows']:,} × {row['features']}",
        "unit": lambda row: row["unit"],
        "parameters": lambda row: f"{row['parameters']:,}",
    }
    head, lines = _grid(rows_of("tables", folder), "table", about)
    return table(head, lines, {})


def fashion_table(folder: Path = RESULTS) -> list[str]:
    """Bits a pixel of Fashion-MNIST by class, and their mean."""
    rows = rows_of("fashion", folder)
    head, lines = _grid(rows, "label", {"class": lambda row: str(row["label"])})
    labels = {row["label"] for row in rows if row["family"] == LUNET}
    mean: list[Cell] = []
    for family in head[1:]:
        here = {row["label"]: row for row in rows if row["family"] == family}
        if set(here) != labels:
            mean.append(Cell(""))
            continue
        tests = [here[label]["test"] for label in labels]
        own = [row for row in rows if row["family"] == LUNET]
        if family == LUNET:
            mean.append(Cell(f"{statistics.fmean(tests):.3f}", statistics.fmean(tests)))
            continue
        more = [unpacked(here[row["label"]]) - unpacked(row) for row in own]
        # The mean of the classes' means: their errors are independent.
        error = math.sqrt(sum(float(m.var(ddof=1)) / len(m) for m in more)) / len(more)
        shift = statistics.fmean(float(m.mean()) for m in more)
        mean.append(Cell(_signed(shift, error), statistics.fmean(tests)))
    return table(head, [*lines, ["mean", *least_bold(mean)]], {})


def _section(make: Callable[[], list[str]], name: str, command: str) -> Callable[[], list[str]]:
    return lambda: [*make(), "", measured(load(name), command)]


SECTIONS: dict[str, Callable[[], list[str]]] = {
    "density-tables": _section(real_table, "density-tables", "python benchmarks/density_tables.py tables"),
    "density-fashion": _section(
        fashion_table, "density-fashion", "python benchmarks/density_tables.py fashion"
    ),
}

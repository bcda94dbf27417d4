"""The table of rating errors on splits of which others have published figures, from ``published.json``."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

from tables import Cell, load, measured, number, table

PRINTED = [
    ("GHRS, Darban and Valipour (2022)", "0.887"),
    ("GLocal-K, Han et al. (2021); its code reports the best epoch on the test part", "0.8889"),
    ("MG-GAT, Leng, Ruiz and Liu (2020)", "0.890"),
    ("IGMC, Zhang and Chen (2020)", "0.905"),
]
"""RMSE of u1 as their authors print it."""


def _rows(runs: list[dict[str, Any]], splits: list[str]) -> list[list[Cell | str]]:
    """A line for each row of the script: the RMSE of each split, and the mean."""
    lines: list[list[Cell | str]] = []
    for name in dict.fromkeys(run["row"] for run in runs):
        found = {run["split"]: run["rmse"] for run in runs if run["row"] == name}
        values = [found[split] for split in splits]
        lines.append([name, *map(number, values), number(statistics.fmean(values))])
    return lines


def folds() -> list[str]:
    """RMSE of the five folds of ML-100K."""
    result = load("published")
    splits = [f"u{fold}" for fold in range(1, 6)]
    rows: list[list[Cell | str]] = [[name, Cell(text, float(text)), *[""] * 5] for name, text in PRINTED]
    rows += _rows([run for run in result["runs"] if run["part"] == "ML-100K"], splits)
    head = ["RMSE", *splits, "mean"]
    best: dict[str, Any] = dict.fromkeys(head[1:], min)
    return [*table(head, rows, best), "", measured(result, "python benchmarks/published.py folds")]


PRINTED_TENTHS = [
    ("GLocal-K, Han et al. (2021)", "0.8227"),
    ("SparseFC, Müller, Martius and Ratsch (2018)", "0.824"),
    ("CF-NADE, Zheng et al. (2016)", "0.829"),
]
"""RMSE of a tenth of ML-1M as their authors print it, each on a split of its own."""


def tenths() -> list[str]:
    """RMSE of a tenth of ML-1M, drawn by each seed that all rows have."""
    result = load("published")
    runs = [run for run in result["runs"] if run["part"] == "ML-1M"]
    names = {run["row"] for run in runs}
    of_split: dict[str, set[str]] = {}
    for run in runs:
        of_split.setdefault(run["split"], set()).add(run["row"])
    splits = [split for split, rows in of_split.items() if rows == names]
    blank = [""] * len(splits)
    rows: list[list[Cell | str]] = [[name, *blank, Cell(text, float(text))] for name, text in PRINTED_TENTHS]
    rows += _rows(runs, splits)
    head = ["RMSE", *splits, "mean"]
    best: dict[str, Any] = dict.fromkeys(head[1:], min)
    return [*table(head, rows, best), "", measured(result, "python benchmarks/published.py ml-1m")]


SECTIONS: dict[str, Callable[[], list[str]]] = {"published-folds": folds, "published-tenths": tenths}

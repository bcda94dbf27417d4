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


SECTIONS: dict[str, Callable[[], list[str]]] = {"published-folds": folds}

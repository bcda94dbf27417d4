"""Markdown tables of committed results: cells with values, the best of a column or row in bold."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from committed import read_results
from machine import RESULTS

Best = Callable[[Iterable[float]], float]
"""``min`` or ``max``."""


class Cell(NamedTuple):
    """What a cell shows, and what it is compared by: None where it takes no part."""

    text: str
    value: float | None = None

    @property
    def bold(self) -> Cell:
        return Cell(f"**{self.text}**", self.value)


EMPTY = Cell("")


def load(name: str) -> dict[str, Any]:
    """benchmarks/results/NAME.json, of a clean commit."""
    return read_results(RESULTS / f"{name}.json")


def number(value: float | None, form: str = ".4f", spread: float | None = None) -> Cell:
    """A value to compare by; with ``spread`` "value ± spread"."""
    if value is None:
        return EMPTY
    text = format(value, form)
    return Cell(text if spread is None else f"{text} ± {format(spread, form.lstrip('+'))}", value)


def table(head: Sequence[str], rows: Iterable[Sequence[Cell | str]], best: Mapping[str, Best]) -> list[str]:
    """Lines of a table; ``best`` names the columns whose best cell of several, all of equal ones, is bold."""
    cells = [[cell if isinstance(cell, Cell) else Cell(cell) for cell in row] for row in rows]
    for name, choose in best.items():
        column = head.index(name)
        values = [row[column].value for row in cells if row[column].value is not None]
        if len(values) < 2:
            continue
        winner = choose(values)
        # What reads the same is equally good: a digit that is not shown makes no winner.
        shown = {row[column].text.split(" ±")[0] for row in cells if row[column].value == winner}
        for row in cells:
            if row[column].value is not None and row[column].text.split(" ±")[0] in shown:
                row[column] = row[column].bold
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    return lines + ["| " + " | ".join(cell.text for cell in row) + " |" for row in cells]


def least_bold(cells: Sequence[Cell]) -> list[Cell]:
    """The cells of one row with the smallest in bold."""
    winner = min(cell.value for cell in cells if cell.value is not None)
    return [cell.bold if cell.value == winner else cell for cell in cells]


def deviation(values: Sequence[float]) -> float | None:
    """The standard deviation of a sample, None of a single value."""
    return statistics.stdev(values) if len(values) > 1 else None


def standard_error(deviation: float, count: int) -> float:
    return deviation / math.sqrt(count)


def measured(
    result: Mapping[str, Any], command: str, *, threads: bool = True, versions: Mapping[str, str] = {}
) -> str:
    """Where, with what and when a result was measured, and the command that measures it again."""
    machine = result["machine"]
    used = f", {machine['threads']} thread{'s' if machine['threads'] > 1 else ''}" if threads else ""
    packages = "".join(f", {name} {version}" for name, version in versions.items())
    return (
        f"Measured on {machine['processor']}, {machine['cores']} cores{used}; Python {machine['python']}, "
        f"torch {machine['torch']}{packages}; {machine['date']}; `{command}`."
    )

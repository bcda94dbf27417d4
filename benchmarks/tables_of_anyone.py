"""Tables of recipe auto on rating files of other kinds, from ``anyone.json``."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

from tables import Cell, deviation, least_bold, load, measured, number, standard_error, table

NAMES = {
    "biases, tuned": "biases, tuned L2",
    "knn": "item KNN with biases (surprise)",
    "mf": "matrix factorisation (cornac)",
    "svd++": "SVD++ (surprise)",
    "bayesian-fm": "Bayesian FM (myfm)",
    "ours, best": "LU-Net, recipe `best`",
    "ours, auto": "LU-Net, recipe `auto`",
}
FILES = ("FilmTrust", "digital music", "Jester", "restaurants")


def _parts() -> tuple[dict[str, Any], dict[str, Any]]:
    """(the whole file, its parts by name)."""
    result = load("anyone")
    return result, result["parts"]


def _command(part: str) -> str:
    return f"python benchmarks/anyone.py {part}"


def _mean(values: list[float], form: str = ".4f") -> Cell:
    spread = deviation(values)
    error = None if spread is None else standard_error(spread, len(values))
    return number(statistics.fmean(values), form, error)


def errors() -> list[str]:
    """MSE by file and method; the best of each file in bold."""
    result, parts = _parts()
    rows: list[list[Cell | str]] = []
    for key, name in NAMES.items():
        rows.append([name, *(_mean(parts[file]["mse"][key]) for file in FILES)])
    rows.append(["rated already, of ten", *(f"{parts[file]['already_rated']:.0%}" for file in FILES)])
    head = [
        "method",
        *(
            f"{file}: {parts[file]['users']:,} × {parts[file]['items']:,}, {parts[file]['ratings']:,} ratings"
            for file in FILES
        ),
    ]
    return [*table(head, rows, dict.fromkeys(head[1:], min)), "", measured(result, _command("errors"))]


def units() -> list[str]:
    """MSE/s² of the same ratings in other units, and MSE on 1,000 ratings."""
    result, parts = _parts()
    found = parts["units"]
    scales = [key for key in found["units"] if not key.startswith("biases")]
    rows: list[list[Cell | str]] = [
        [title, *(_mean(found["units"][prefix + key], ".5f") for key in scales)]
        for title, prefix in (("biases, tuned L2", "biases "), (NAMES["ours, auto"], ""))
    ]
    head = ["MSE/s², 6,000 ratings, 300 × 100", *(f"s = {key}" for key in scales)]
    small = found["small"]
    of_few: list[Cell | str] = ["MSE", *least_bold([_mean(small[key]) for key in NAMES if key in small])]
    few = ["1,000 ratings, 100 × 40", *(NAMES[key] for key in NAMES if key in small)]
    return [
        *table(head, rows, dict.fromkeys(head[1:], min)),
        "",
        *table(few, [of_few], {}),
        "",
        measured(result, _command("units")),
    ]


def large() -> list[str]:
    """Time and memory of 10,000 users and 100,000 items."""
    result, parts = _parts()
    found = parts["large"]
    rows: list[list[Cell | str]] = [
        [
            title,
            number(found[f"{prefix}training_seconds"], ".1f"),
            number(found[f"{prefix}recommend_seconds"], ".1f"),
        ]
        for title, prefix in ((NAMES["ours, auto"], ""), ("ALS (implicit)", "als_"))
    ]
    costs = ["training, s", "the best ten of all items for all users, s"]
    taken = found["peak_mib"] - found["before_mib"]
    return [
        *table(["10,000 users × 100,000 items, 100,000 ratings", *costs], rows, dict.fromkeys(costs, min)),
        "",
        f"Memory of recipe `auto` beyond data and packages: {taken:.0f} MiB. "
        + measured(result, _command("large")),
    ]


def optimizer() -> list[str]:
    """What of a step on a million items is Adam's."""
    result, parts = _parts()
    found = parts["optimizer"]
    rows: list[list[Cell | str]] = [
        ["CPU time, ms", f"{1e3 * found['step_seconds']:.0f}", f"{1e3 * found['adam_seconds']:.0f}"],
        [
            "memory, MiB",
            f"{found['parameters_mib']:.0f} of parameters, as many of gradients",
            f"{found['moments_mib']:.0f} of moments",
        ],
        ["rows of the tables", f"{found['rows']:,}, {found['touched_rows']:,.0f} with gradients", ""],
    ]
    title = f"10,000 users × 1,000,000 items, vectors of 16, batches of {found['batch']:,}"
    return [*table([title, "a step", "of Adam"], rows, {}), "", measured(result, _command("optimizer"))]


def movielens() -> list[str]:
    """Recipe auto beside best where best was made."""
    result, parts = _parts()
    found = parts["movielens"]["mse"]
    rows: list[list[Cell | str]] = [[NAMES[key], _mean(values)] for key, values in found.items()]
    head = ["recipe", "ML-100K, MSE"]
    return [*table(head, rows, {head[1]: min}), "", measured(result, _command("movielens"))]


SECTIONS: dict[str, Callable[[], list[str]]] = {
    "anyone-errors": errors,
    "anyone-units": units,
    "anyone-large": large,
    "anyone-optimizer": optimizer,
    "anyone-movielens": movielens,
}

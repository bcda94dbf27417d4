"""Tables of recipe sequence: beside others, by the time since a user's last rating, and by sources."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from lunet_fast.recsys.data.order import GAP_NAMES
from tables import Cell, load, measured, number, table

FIGURES = {"hr@10": "HR@10", "ndcg@10": "NDCG@10", "full_ndcg@10": "NDCG@10, all items"}
TOLD = "lunet-sequence-elapsed"
"""The row that is told more than the others: it is shown, but never the best of all users."""
TITLES = {
    "ml-100k": "ML-100K, each user's latest item",
    "filmtrust": "FilmTrust, an item of each user at random",
    "lastfm": "LastFM, an item of each user at random",
    "cold": "ML-100K, items that training has not seen",
}
OF_SOURCES = {
    **FIGURES,
    "recall@10": "recall@10",
    "few_ndcg@10": "NDCG@10, at most 5 ratings",
    "few_full_ndcg@10": "the same, all items",
}


def ordered(dataset: str) -> list[str]:
    result = load(f"sequence/compare-{dataset}")
    rows: list[list[Cell | str]] = []
    for row in result["rows"]:
        cells = [number(row[name], ".4f", row.get(f"{name}_sd")) for name in FIGURES]
        if row["key"] == TOLD:
            cells = [Cell(cell.text) for cell in cells]
        rows.append([row["method"], *cells])
    head = ["method", *FIGURES.values()]
    return [
        *table(head, rows, dict.fromkeys(FIGURES.values(), max)),
        "",
        measured(result, result["command"], versions=result["versions"]),
    ]


def gaps() -> list[str]:
    result = load("sequence/compare-ml-100k")
    lines: list[str] = []
    for gap in GAP_NAMES:
        rows = [row for row in result["rows"] if gap in row.get("by_gap", {})]
        users = rows[0]["by_gap"][gap]["users"]
        cells: list[list[Cell | str]] = [
            [row["method"], *(number(row["by_gap"][gap][name]) for name in FIGURES)] for row in rows
        ]
        head = [f"{gap}: {users:,} users", *FIGURES.values()]
        lines += [*table(head, cells, dict.fromkeys(FIGURES.values(), max)), ""]
    return lines[:-1]


def elapsed() -> list[str]:
    result = load("elapsed")
    lines: list[str] = []
    for gap in dict.fromkeys(row["gap"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["gap"] == gap]
        cells: list[list[Cell | str]] = [
            [row["name"], *(number(row[name]) for name in FIGURES)] for row in rows
        ]
        head = [f"{gap}: {rows[0]['events']:,} ratings", *FIGURES.values()]
        lines += [*table(head, cells, dict.fromkeys(FIGURES.values(), max)), ""]
    return [*lines, measured(result, result["command"])]


def sources() -> list[str]:
    result = load("sources")
    lines: list[str] = []
    for data in dict.fromkeys(row["data"] for row in result["rows"]):
        some = [row for row in result["rows"] if row["data"] == data]
        shown = {name: title for name, title in OF_SOURCES.items() if any(name in row for row in some)}
        cells: list[list[Cell | str]] = [
            [row["name"], *(number(row.get(name)) for name in shown), str(row["seeds"])] for row in some
        ]
        users = (
            f"; {some[0]['few_users']:.0f} users have at most 5 ratings" if some[0].get("few_users") else ""
        )
        lines += [f"{TITLES[data]}{users}:", ""]
        head = ["sources", *shown.values(), "seeds"]
        lines += [*table(head, cells, dict.fromkeys(shown.values(), max)), ""]
    return [*lines, measured(result, "python benchmarks/sources.py")]


ORDER_SECTIONS: dict[str, Callable[[], list[str]]] = {
    "ordered": partial(ordered, "ml-100k"),
    "ordered-ml-1m": partial(ordered, "ml-1m"),
    "gaps": gaps,
    "elapsed": elapsed,
    "sources": sources,
}

"""A comparison as people read it: a table, what its figures are, and a picture of error over time."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

from lunet_fast.recsys.data.datasets import dataset_title
from lunet_fast.recsys.data.order import GAP_NAMES
from lunet_fast.recsys.data.spreadsheet import spreadsheet_safe
from lunet_fast.recsys.evaluation.baselines import BASELINES
from lunet_fast.recsys.evaluation.compare import FIGURES, LEAKY, METHODS, ORDERED, Comparison
from lunet_fast.training.figures import BLUE, GREY, INK, new_figure, plain
from lunet_fast.training.files import write_figure, write_text

#: Headings of the table, and what is under them.
COLUMNS = {
    "method": "method",
    "package": "package",
    "MSE": "test_mse",
    "RMSE": "test_rmse",
    "HR@10": "hr@10",
    "NDCG@10": "ndcg@10",
    "NDCG@10 of all items": "full_ndcg@10",
    "reconstruction error": "reconstruction_error_relative",
    "training, s": "train_seconds",
    "peak memory, MB": "peak_memory_mb",
    "parameters": "parameters",
}

RANKINGS = ("hr@10", "ndcg@10", "full_ndcg@10")


def table(comparison: Comparison, *, spreads: bool = True) -> list[list[str]]:
    """The rows as text under COLUMNS, "" where a figure does not apply; with ``spreads`` "mean ± sd"."""
    return [[_cell(row, name, spreads) for name in COLUMNS.values()] for row in comparison.rows]


def _cell(row: dict[str, Any], name: str, spreads: bool) -> str:
    if name not in row:
        return ""
    value, spread = row[name], row.get(f"{name}_sd")
    if name in ("method", "package"):
        return str(value)
    if name == "reconstruction_error_relative":
        return f"{value:.1e}"
    if name in ("parameters", "peak_memory_mb"):
        return f"{value:,.0f}"
    if name == "train_seconds":
        return f"{value:.2f}" if value < 10 else f"{value:.1f}"
    return f"{value:.4f}" + (f" ± {spread:.4f}" if spreads and spread is not None else "")


def reasons(comparison: Comparison) -> list[str]:
    """Why a method has no figures, or not of all seeds."""
    found = []
    for row in comparison.rows:
        if "missing" in row:
            found.append(row["missing"])
        if "error" in row:
            found.append(f"{row['method']} failed, {row['error']}")
    return found


#: Headings of the table by gaps, and what is under them.
GAP_COLUMNS = {"users": "users", "HR@10": "hr@10", "NDCG@10": "ndcg@10", "of all items": "full_ndcg@10"}


def gap_table(comparison: Comparison) -> list[list[str]]:
    """Method, time since the user's last rating, and GAP_COLUMNS: a row each of what is ranked; may be empty.

    The time comes first, so that methods stand beside each other.
    """
    found = []
    for gap in GAP_NAMES:
        for row in comparison.rows:
            figures = row.get("by_gap", {}).get(gap)
            if figures:
                values = [f"{figures[name]:.4f}" for name in list(GAP_COLUMNS.values())[1:]]
                found.append([gap, row["method"], f"{figures['users']:,}", *values])
    return found


#: Headings of the table of differences.
DIFFERENCES = ("method", "MSE above that of", "by", "95 % interval")


def difference_table(comparison: Comparison) -> list[list[str]]:
    """Of each row that has ``over_best`` the cells under DIFFERENCES; the best without side features come
    first. May be empty."""
    found = []
    for row in sorted(comparison.rows, key=lambda row: row.get("side", False)):
        if "over_best" in row:
            over = row["over_best"]
            interval = f"{over['low']:+.4f} to {over['high']:+.4f}"
            found.append([row["method"], METHODS[over["key"]].name, f"{over['mse']:+.4f}", interval])
    return found


def notes(comparison: Comparison) -> list[str]:
    """What the figures are, a sentence or two each."""
    kinds = {row["kind"] for row in comparison.rows}
    keys = {row["key"] for row in comparison.rows}
    found = []
    if kinds & {"rating", "both"}:
        found.append("MSE, RMSE: a random 20 % of the ratings, predictions clipped to the scale.")
    if kinds & {"ranking", "both"}:
        held_out = {
            "leave-one-out": "each user's latest item",
            "time": "each user's first item after one time, which leaves 20 % of all ratings and after which "
            "nothing is trained on,",
        }[comparison.split]
        found.append(
            f"HR@10, NDCG@10: {held_out} among 100 that the user has not rated, drawn by the seed; of all "
            "items: among all that are in no other known pair of the user."
        )
    if "both" in kinds:
        found.append(
            f"{METHODS['lunet-both'].name} has both figures from one set of weights, trained on less than "
            "the others: each user's latest rating and 20 % of the rest are held out together. Its test "
            "ratings are therefore not quite those of the other rows, nor are the items it ranks among all."
        )
    if kinds & {"ranking", "both"} and any(METHODS[key].is_lu_net for key in keys):
        found.append(
            "Items drawn as negatives may be held-out ones, as for every other method "
            '(`negatives_outside="training"`): nobody is told of held-out pairs.'
        )
    if keys & ORDERED:
        found.append(
            "Methods that read the order of a user's ratings (recipe sequence, EASE of ordered histories, "
            "GRU4Rec, SASRec) know what the others do not, such as which ratings were given in the same "
            "sitting."
        )
    if "lunet-sequence-elapsed" in keys:
        found.append(
            f"{METHODS['lunet-sequence-elapsed'].name}: how long before the held-out rating the user's last "
            "one was, as within an hour, a day, 30 days, or longer ago, and nothing finer: what a service "
            "knows when a user comes back, and what no other row is told."
        )
    if any(METHODS[key].side for key in keys):
        readers = ", ".join(METHODS[key].name for key in METHODS if key in keys and METHODS[key].side)
        found.append(
            "Side features of the data set (of MovieLens genres, age, gender and occupation), where it has "
            f"some, are read by: {readers}. No other method reads them."
        )
    if any(BASELINES[key].runs > 1 for key in keys if key in BASELINES):
        found.append("Mean of n: the predictions, or the scores, of n trainings with other seeds, averaged.")
    if any("over_best" in row for row in comparison.rows):
        found.append(
            "Differences of the MSE are from the best row that reads side features, or from the best that "
            "does not; the interval is of 95 %, from drawing users with replacement, each with its test "
            "ratings of all seeds."
        )
    if LEAKY in keys:
        found.append(
            f"{METHODS[LEAKY].name}: trained with the default of `lunet-fast train`, "
            '`negatives_outside="known"`, which is right for a model to be used and wrong for one to be '
            "compared; the row shows what that is worth."
        )
    if any("reconstruction_error_relative" in row for row in comparison.rows):
        found.append("Reconstruction error: mean |f⁻¹(f(x)) − x|² over mean |x|², of the held-out pairs.")
    found.append(
        "One process a method and one thread. Training without reading, splitting and evaluation; memory is "
        "the most held while training and evaluating, over what data and packages took before."
    )
    if len(comparison.seeds) > 1:
        found.append(f"Means over seeds {_seed_list(comparison)}, ± the standard deviation over them.")
    return found


def _competes(row: dict[str, Any], figure: str) -> bool:
    """Whether a figure compares: not that of a model told of held-out pairs, or of a test part of its own."""
    return row["key"] != LEAKY and not (row.get("kind") == "both" and figure.startswith("test"))


def _best(comparison: Comparison) -> dict[str, str]:
    """The best of each figure as it is printed, whosever it is, where there are two or more."""
    found = {}
    for name, first in {"test_mse": min, "test_rmse": min, **dict.fromkeys(RANKINGS, max)}.items():
        rows = [row for row in comparison.rows if name in row and _competes(row, name)]
        if len(rows) > 1:
            found[name] = _cell(first(rows, key=lambda row: row[name]), name, spreads=False)
    return found


def markdown(comparison: Comparison) -> str:
    """The whole comparison: a table with the best in bold, what is missing, and what the figures are."""
    machine = comparison.machine
    peers = "".join(f", {name} {version}" for name, version in comparison.versions.items())
    seeds = f"seed{'s' if len(comparison.seeds) > 1 else ''} {_seed_list(comparison)}"
    lines = [
        f"# Recommenders on {dataset_title(comparison.dataset)}, {seeds}",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|---|---" + "|---:" * (len(COLUMNS) - 2) + "|",
    ]
    best = _best(comparison)
    for row, cells in zip(comparison.rows, table(comparison), strict=True):
        cells = [cell.replace("|", "\\|") for cell in cells]
        for place, name in enumerate(COLUMNS.values()):
            if cells[place] and cells[place].split(" ±")[0] == best.get(name):
                cells[place] = f"**{cells[place]}**" if _competes(row, name) else cells[place]
        if "missing" in row:
            cells[2] = "not installed"
        elif "error" in row and not row["seeds"]:
            cells[2] = "failed"
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", *(f"- {text}" for text in (*reasons(comparison), *notes(comparison)))]
    differences = difference_table(comparison)
    if differences:
        lines += [
            "",
            "## Differences of the MSE, paired over users",
            "",
            "| " + " | ".join(DIFFERENCES) + " |",
            "|---|---|---:|---:|",
            *("| " + " | ".join(cells) + " |" for cells in differences),
        ]
    gaps = gap_table(comparison)
    if gaps:
        lines += [
            "",
            "## By the time since the user's last rating in training",
            "",
            f"| time since | method | {' | '.join(GAP_COLUMNS)} |",
            "|---|---" + "|---:" * len(GAP_COLUMNS) + "|",
            *("| " + " | ".join(cells) + " |" for cells in _best_of_gaps_bold(gaps)),
        ]
    lines += [
        "",
        f"{machine['processor']}, torch {machine['torch']}{peers}, {machine['date']}, commit "
        f"{machine['commit'] or 'unknown'}; `{comparison.command}`.",
    ]
    return "\n".join([*lines, ""])


def _best_of_gaps_bold(rows: list[list[str]]) -> list[list[str]]:
    """The best of each figure of a gap between ``**``, where there are two methods or more."""
    shown = [list(cells) for cells in rows]
    for gap in {cells[0] for cells in rows}:
        group = [place for place, cells in enumerate(rows) if cells[0] == gap]
        for column in range(3, len(rows[0])) if len(group) > 1 else ():
            best = max(float(rows[place][column]) for place in group)
            for place in group:
                if float(rows[place][column]) == best:
                    shown[place][column] = f"**{rows[place][column]}**"
    return shown


def _seed_list(comparison: Comparison) -> str:
    return ", ".join(map(str, comparison.seeds))


def csv_text(comparison: Comparison) -> str:
    """The rows with every digit, a column for each figure and its spread, lists of seeds by spaces; no gaps.

    Texts are :func:`~lunet_fast.recsys.data.spreadsheet.spreadsheet_safe`: what another package says of its
    failure is not ours.
    """
    header = ["key", "method", "package", "kind", "seeds"]
    for name in FIGURES:
        header += [name, f"{name}_sd"]
    stream = io.StringIO()
    writer = csv.DictWriter(
        stream, [*header, "missing", "error"], restval="", extrasaction="ignore", lineterminator="\n"
    )
    writer.writeheader()
    for row in comparison.rows:
        cells = {**row, "seeds": " ".join(map(str, row["seeds"]))}
        writer.writerow({name: spreadsheet_safe(cell) for name, cell in cells.items()})
    return stream.getvalue()


def save(comparison: Comparison, file: Path) -> list[Path]:
    """Write what people read beside the JSON ``file``: .md, .csv and .png; the files written."""
    texts = {".md": markdown(comparison), ".csv": csv_text(comparison)}
    for suffix, text in texts.items():
        write_text(file.with_suffix(suffix), text)
    return [file.with_suffix(suffix) for suffix in texts] + draw(comparison, file.with_suffix(".png"))


#: The panels of the figure: a row's figure, the axis' name, whether less is better.
PANELS = (
    ("test_mse", "test MSE, stars² (lower is better)", True),
    ("ndcg@10", "NDCG@10 among 100 candidates (higher is better)", False),
)


def draw(comparison: Comparison, path: Path) -> list[Path]:
    """Draw error and NDCG@10 of each method as PNG, the best on top, with the time of its training.

    The files written, none where no row has either; a panel without rows is left out. Ours are filled, the
    others are not; bars are standard deviations. Needs matplotlib, of the extra ``lunet-fast[train]``; no
    display.
    """
    panels = [panel for panel in PANELS if any(panel[0] in row for row in comparison.rows)]
    if not panels:
        return []
    counts = [sum(name in row for row in comparison.rows) for name, *_ in panels]
    figure = new_figure(7.4, 0.27 * sum(counts) + 0.9 * len(panels) + 0.3)
    subplots = figure.subplots(len(panels), 1, squeeze=False, height_ratios=counts)[:, 0]
    for axes, (name, label, less) in zip(subplots, panels, strict=True):
        rows = sorted(
            (row for row in comparison.rows if name in row), key=lambda row: row[name], reverse=not less
        )
        for place, row in enumerate(rows):
            ours = METHODS[row["key"]].is_lu_net
            colour = BLUE if ours else GREY
            axes.errorbar(
                row[name],
                place,
                xerr=row.get(f"{name}_sd"),
                fmt="D" if ours else "o",
                color=colour,
                markerfacecolor=colour if ours and row["key"] != LEAKY else "white",
                markersize=6,
                elinewidth=1.2,
                capsize=2,
            )
            seconds = row["train_seconds"]
            axes.annotate(
                f"{seconds:,.{int(seconds < 100)}f} s" if seconds >= 0.05 else "< 0.1 s",
                (1.11, place),
                xycoords=("axes fraction", "data"),
                ha="right",
                va="center",
                fontsize=8,
            )
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_yticks(range(len(rows)))
        axes.set_yticklabels([_short(row, name) for row in rows], fontsize=8, parse_math=False)
        for text, row in zip(axes.get_yticklabels(), rows, strict=True):
            text.set_color(BLUE if METHODS[row["key"]].is_lu_net else INK)
        axes.tick_params(axis="y", length=0)
        axes.tick_params(axis="x", labelsize=8)
        axes.set_title(label, loc="left", fontsize=9)
        axes.annotate("trained in", (1.11, 1.02), xycoords="axes fraction", ha="right", fontsize=8)
        plain(axes, grid="x")
    spread = ", ± standard deviation over them" if len(comparison.seeds) > 1 else ""
    seeds = f"seed{'s' if len(comparison.seeds) > 1 else ''} {_seed_list(comparison)}{spread}"
    figure.suptitle(f"{dataset_title(comparison.dataset)}, {seeds}; blue: LU-Net", fontsize=10)
    write_figure(path, figure)
    return [path]


def _short(row: dict[str, Any], figure: str) -> str:
    if row["key"] == LEAKY:
        return "LU-Net, interactions: told of held-out pairs"
    return f"{row['method']}" + ("" if _competes(row, figure) else ": other test part")

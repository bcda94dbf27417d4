"""A comparison as people read it: a table, what its figures are, and a picture of error over time."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lunet_fast.recsys.data.datasets import dataset_title
from lunet_fast.recsys.data.spreadsheet import spreadsheet_safe
from lunet_fast.recsys.evaluation.compare import FIGURES, LEAKY, METHODS, Comparison
from lunet_fast.training.figures import new_figure, plain
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


def notes(comparison: Comparison) -> list[str]:
    """What the figures are, a sentence or two each."""
    kinds = {row["kind"] for row in comparison.rows}
    keys = {row["key"] for row in comparison.rows}
    found = []
    if kinds & {"rating", "both"}:
        found.append("MSE, RMSE: a random 20 % of the ratings, predictions clipped to the scale.")
    if kinds & {"ranking", "both"}:
        found.append(
            "HR@10, NDCG@10: each user's latest item among 100 that the user has not rated, drawn by the "
            "seed; of all items: among all that are in no other known pair of the user."
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
    if any(METHODS[key].config(1, 0).side_features for key in keys if METHODS[key].is_lu_net):
        found.append(
            "LU-Net by recipe best reads the side features of the data set too (of MovieLens genres, age, "
            "gender and occupation), which the baselines and recipe paper do not."
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


def markdown(comparison: Comparison) -> str:
    """The whole comparison: a table, what is missing, and what the figures are."""
    machine = comparison.machine
    peers = "".join(f", {name} {version}" for name, version in comparison.versions.items())
    seeds = f"seed{'s' if len(comparison.seeds) > 1 else ''} {_seed_list(comparison)}"
    lines = [
        f"# Recommenders on {dataset_title(comparison.dataset)}, {seeds}",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|---|---" + "|---:" * (len(COLUMNS) - 2) + "|",
    ]
    for row, cells in zip(comparison.rows, table(comparison), strict=True):
        cells = [cell.replace("|", "\\|") for cell in cells]
        if METHODS[row["key"]].is_lu_net:
            cells[0] = f"**{cells[0]}**"
        if "missing" in row:
            cells[2] = "not installed"
        elif "error" in row and not row["seeds"]:
            cells[2] = "failed"
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", *(f"- {text}" for text in (*reasons(comparison), *notes(comparison)))]
    lines += [
        "",
        f"{machine['processor']}, torch {machine['torch']}{peers}, {machine['date']}, commit "
        f"{machine['commit'] or 'unknown'}; `{comparison.command}`.",
    ]
    return "\n".join([*lines, ""])


def _seed_list(comparison: Comparison) -> str:
    return ", ".join(map(str, comparison.seeds))


def csv_text(comparison: Comparison) -> str:
    """The rows with every digit, a column for each figure and its spread, lists of seeds by spaces.

    Texts are :func:`~.spreadsheet.spreadsheet_safe`: what another package says of its failure is not ours.
    """
    header = ["key", "method", "package", "kind", "seeds"]
    for name in FIGURES:
        header += [name, f"{name}_sd"]
    stream = io.StringIO()
    writer = csv.DictWriter(stream, [*header, "missing", "error"], restval="", lineterminator="\n")
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


#: The panels of the figure: a row's figure, the axis' name.
PANELS = (("test_mse", "MSE, lower is better"), ("ndcg@10", "NDCG@10, higher is better"))

#: Training times are drawn as this much at least, or the quickest would leave the others no room.
LEAST_SECONDS = 0.1


def draw(comparison: Comparison, path: Path) -> list[Path]:
    """Draw error and NDCG@10 over training time as PNG; the files written, none where no row has either.

    A panel without rows is left out. Ours are filled, the baselines are not; bars are standard deviations.
    Needs matplotlib, of the extra ``lunet-fast[train]``; no display.
    """
    panels = [(name, label) for name, label in PANELS if any(name in row for row in comparison.rows)]
    if not panels:
        return []
    figure = new_figure(6.6 * len(panels), 5.0, dpi=130)
    for axes, (name, label) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        rows = [row for row in comparison.rows if name in row]
        for row in rows:
            ours = METHODS[row["key"]].is_lu_net
            colour = "#d1662b" if ours else "#5b6b7b"
            axes.errorbar(
                _seconds(row),
                row[name],
                yerr=row.get(f"{name}_sd"),
                fmt="D" if ours else "o",
                color=colour,
                markerfacecolor=colour if ours and row["key"] != LEAKY else "white",
                markersize=7 if ours else 5.5,
                elinewidth=1,
                capsize=2,
                zorder=3 if ours else 2,
            )
        axes.set(xscale="log", xlabel="training, seconds on one thread", ylabel=label)
        axes.xaxis.set_major_formatter(lambda seconds, _: f"{seconds:g}")
        axes.xaxis.set_minor_formatter(lambda seconds, _: "")
        axes.margins(x=0.22, y=0.1)
        plain(axes)
        quick = [row for row in rows if row["train_seconds"] < LEAST_SECONDS]
        if quick:
            names = " and ".join(row["method"] for row in quick)
            axes.set_title(f"{names}: less than {LEAST_SECONDS:g} s", fontsize=8, loc="left", color="#666666")
    seeds = f"seed{'s' if len(comparison.seeds) > 1 else ''} {_seed_list(comparison)}"
    figure.suptitle(f"{dataset_title(comparison.dataset)}, {seeds}", fontsize=12)
    figure.canvas.draw()  # the labels' places depend on those of the points
    figure.set_layout_engine("none")
    for axes, (name, _) in zip(figure.axes, panels, strict=True):
        _label_points(axes, [row for row in comparison.rows if name in row], name)
    write_figure(path, figure)
    return [path]


def _seconds(row: dict[str, Any]) -> float:
    return max(row["train_seconds"], LEAST_SECONDS)


def _label_points(axes: Any, rows: Iterable[dict[str, Any]], name: str) -> None:
    """A method's name beside its point, where it covers no point and no other name; ours choose first."""
    from matplotlib.transforms import Bbox

    rows = sorted(rows, key=lambda row: not METHODS[row["key"]].is_lu_net)
    places = [axes.transData.transform((_seconds(row), row[name])) for row in rows]
    taken = [Bbox.from_extents(x - 8, y - 8, x + 8, y + 8) for x, y in places]
    frame = axes.get_window_extent()
    renderer = axes.figure.canvas.get_renderer()
    sides = (
        *(("left", "center", 1.0, 0.0), ("right", "center", -1.0, 0.0)),
        *(("center", "bottom", 0.0, 1.0), ("center", "top", 0.0, -1.0)),
        *(("left", "bottom", 0.6, 0.8), ("left", "top", 0.6, -0.8)),
        *(("right", "bottom", -0.6, 0.8), ("right", "top", -0.6, -0.8)),
    )
    for row in rows:
        ours = METHODS[row["key"]].is_lu_net
        label = axes.annotate(
            _short(row),
            (_seconds(row), row[name]),
            xytext=(0, 0),
            textcoords="offset points",
            fontsize=7.5,
            fontweight="bold" if ours else "normal",
            color="#a3461a" if ours else "#333333",
            zorder=4,
        )
        best = None
        for distance in (8, 14, 22):
            for horizontal, vertical, dx, dy in sides:
                label.set(ha=horizontal, va=vertical)
                label.set_position((distance * dx, distance * dy))
                box = label.get_window_extent(renderer)
                covered = sum(_overlap(box, other) for other in taken)
                outside = box.width * box.height - _overlap(box, frame)
                cost = covered + 2 * outside + distance
                if best is None or cost < best[0]:
                    best = cost, horizontal, vertical, (distance * dx, distance * dy), box
        assert best is not None
        label.set(ha=best[1], va=best[2])
        label.set_position(best[3])
        taken.append(best[4])


def _short(row: dict[str, Any]) -> str:
    name = str(row["method"])
    return name if row["key"] != LEAKY else "LU-Net, interactions: leaks"


def _overlap(a: Any, b: Any) -> float:
    """The area that two boxes share."""
    width = min(a.x1, b.x1) - max(a.x0, b.x0)
    height = min(a.y1, b.y1) - max(a.y0, b.y0)
    return float(max(width, 0.0) * max(height, 0.0))

"""Put the committed results into README.md and docs/, between their markers.

A page says where a table belongs by a pair of comments, <!-- NAME --> and <!-- end NAME -->, and where a
number of a sentence does by <!--=NAME--> and <!--=--> (prose.py).

python benchmarks/readme.py            rewrites the pages
python benchmarks/readme.py --check    exits with 1 if a page and the results differ, or a number has no mark
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from functools import partial
from statistics import fmean
from typing import Any

from tables_of_anyone import SECTIONS as ANYONE_SECTIONS
from tables_of_published import SECTIONS as PUBLISHED_SECTIONS
from tables_of_real_data import SECTIONS as REAL_SECTIONS

import prose
from figures import FIGURES, compared
from lunet_fast.bench.results import seconds_text
from lunet_fast.recsys.evaluation.compare import METHODS
from machine import ROOT, write_text
from tables import Cell, deviation, load, measured, number, standard_error, table
from tables_of_densities import SECTIONS as DENSITY_SECTIONS
from tables_of_densities import step_times
from tables_of_layers import SECTIONS as LAYER_SECTIONS
from tables_of_layers import bench
from tables_of_order import ORDER_SECTIONS

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
DATASETS = {"ml-100k": "ML-100K", "ml-1m": "ML-1M"}

PRINTED = [
    ("classic MLP, as printed", "ML-100K", 0.9200, "0.0050"),
    ("invertible model, as printed", "ML-100K", 0.8880, "0.0000"),
    ("invertible model, as printed", "ML-1M", 0.7955, "0.0000"),
]
"""Table 2 of Tamim, Radid and Rhofir (2026): model, data, test MSE, reconstruction error."""


# --- the recommender ------------------------------------------------------------------------------------


def _seeds(seeds: list[int]) -> str:
    return f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"


def table2() -> list[str]:
    result = load("reproduction")
    rows: list[list[Cell | str]] = [
        [model, data, number(mse), error, "", ""] for model, data, mse, error in PRINTED
    ]
    for dataset, name in DATASETS.items():
        for recipe in ("paper", "best"):
            runs = [
                r["metrics"] for r in result["runs"] if (r["dataset"], r["experiment"]) == (dataset, recipe)
            ]
            for prefix, model in (("mlp_", "MLP control, trained here"), ("", f"LU-Net, recipe `{recipe}`")):
                if runs and f"{prefix}test_mse" in runs[0]:
                    rows.append([model, name, *_errors(runs, prefix), str(len(runs))])
    head = ["model", "data", "test MSE", "reconstruction error", "training, s", "seeds"]
    lines: list[str] = []
    for name in DATASETS.values():
        lines += [*table(head, [row for row in rows if row[1] == name], {"test MSE": min}), ""]
    return [*lines, measured(result, result["command"], threads=False)]


def _errors(runs: list[dict[str, Any]], prefix: str) -> list[Cell | str]:
    """Test MSE, reconstruction error (and the relative one), and seconds of training; means over runs."""
    mse, error, relative, seconds = (
        [run[prefix + key] for run in runs]
        for key in ("test_mse", "reconstruction_error", "reconstruction_error_relative", "train_seconds")
    )
    cell = number(fmean(mse), spread=deviation(mse))
    return [cell, f"{fmean(error):.2g} ({fmean(relative):.1g})", f"{fmean(seconds):.0f}"]


PACKAGES = {"lunet_fast": "lunet-fast", "ours": "control"}
"""Packages of a comparison, where the table calls them otherwise."""


def _package(row: dict[str, Any]) -> str:
    return PACKAGES.get(row["package"], row["package"])


def _methods(
    rows_of: list[dict[str, Any]], figures: list[str], without: str, apart: bool = False
) -> list[list[Cell | str]]:
    """A row for each method that has all of ``figures``; ``without`` is shown, but never the best. With
    ``apart`` how far it is from the best too."""
    rows: list[list[Cell | str]] = []
    for row in rows_of:
        if any(row.get(figure) is None for figure in figures):
            continue
        cells = [number(row[figure], ".4f", row.get(f"{figure}_sd")) for figure in figures]
        cells += [number(row["train_seconds"], ".1f"), number(row["peak_memory_mb"], ".0f")]
        if row["key"] == without:
            cells = [Cell(cell.text) for cell in cells]
        if apart:
            cells.insert(1, Cell(_apart(row)))
        rows.append([row["method"], _package(row), *cells])
    return rows


def _apart(row: dict[str, Any]) -> str:
    over = row.get("over_best")
    return "" if over is None else f"{over['mse']:+.4f} ({over['low']:+.4f} to {over['high']:+.4f})"


TAIL = dict.fromkeys(("training, s", "memory, MB"), min)


APART = (
    "Above the best: the difference of the MSE from the best of the table, and its interval of 95 % where "
    "users are drawn with replacement. It is that of other users, not of other trainings."
)


def _rated(result: dict[str, Any]) -> list[str]:
    """The methods that predict ratings: those that read side features in a table of their own, where the
    results say who does."""
    lines: list[str] = []
    known = any("side" in row for row in result["rows"])
    for side, title in ((False, "Without side features:"), (True, "With side features:")):
        some = [row for row in result["rows"] if row.get("side", False) == side]
        rows = _methods(some, ["test_mse"], "lunet-both", known)  # its test ratings are others
        if rows:
            apart = ["above the best (95 %)"] * known
            head = ["method", "package", "test MSE", *apart, *TAIL]
            lines += [*[title, ""] * known, *table(head, rows, {"test MSE": min, **TAIL}), ""]
    return [*lines, *[APART, ""] * known]


MEASURES = {"test_mse": "MSE", "ndcg@10": "NDCG@10"}
"""What a search judges by, in words."""


def searched() -> list[str]:
    result = load("search-ml-100k")
    rows: list[list[Cell | str]] = []
    for key, found in result["methods"].items():
        tried = [trial for trial in found["trials"] if not trial["full"]]
        full = [trial for trial in found["trials"] if trial["full"]]
        first = next((trial["value"] for trial in full if trial["settings"] == found["first"]), None)
        ends = ", ".join(f"{name} ({end})" for name, end in found["at_ends"].items())
        cells = [number(value).text for value in (first, found["value"])]
        seconds = f"{found['seconds']:g}"
        rows.append([METHODS[key].name, MEASURES[found["measure"]], *cells, str(len(tried)), seconds, ends])
    head = ["method", "measure", "declared", "found", "trials", "their seconds", "at an end of its range"]
    return [*table(head, rows, {}), "", measured(result, result["command"])]


def compare() -> list[str]:
    lines: list[str] = []
    for dataset, name in DATASETS.items():
        result = load(f"compare-{dataset}")
        names = ["HR@10", "NDCG@10", "HR@10, all items", "NDCG@10, all items"]
        ranked = _methods(result["rows"], ["hr@10", "ndcg@10", "full_hr@10", "full_ndcg@10"], "lunet-leaky")
        ranking = table(["method", "package", *names, *TAIL], ranked, {**dict.fromkeys(names, max), **TAIL})
        where = measured(result, result["command"], versions=result["versions"])
        seeds = _seeds(result["seeds"])
        lines += [f"### {name}: predicting ratings, {seeds}", "", *_rated(result)]
        lines += [f"### {name}: ranking, {seeds}", "", *ranking, "", where, ""]
    return lines[:-1]


def equal(dataset: str) -> list[str]:
    """Ratings where every method has the same data."""
    result = load(f"equal/compare-{dataset}")
    return [*_rated(result), measured(result, result["command"], versions=result["versions"])]


def _changes(name: str, metrics: dict[str, str], best: Callable[..., float]) -> list[str]:
    """A line a change of an ablation, with its effect on each metric (key → title) and ± its error."""
    result = load(name)
    rows: list[list[Cell | str]] = []
    for row in result["rows"]:
        cells: list[Cell | str] = [row["group"] or "nothing", row["name"] if row["group"] else ""]
        for metric in metrics:
            change, error = row[f"{metric}_change"], row[f"{metric}_change_error"]
            figure = number(row[metric])
            cells.append(figure.text if "leaks" in row["name"] else figure)
            cells.append(number(change, "+.4f", error).text if row["group"] else "")
        rows.append(cells)
    titles = [title for name in metrics.values() for title in (name, f"change of {name}")]
    found = table(["changed", "to", *titles], rows, dict.fromkeys(metrics.values(), best))
    return [*found, "", measured(result, result["command"])]


def ablation_ratings() -> list[str]:
    return _changes("ablation-ratings", {"mse": "MSE"}, min)


def ablation_ranking() -> list[str]:
    titles = {"hr@10": "HR@10", "ndcg@10": "NDCG@10", "full_ndcg@10": "NDCG@10, all items"}
    return _changes("ablation-ranking", titles, max)


CONFIDENCES = {
    "spread": "spread of the members' predictions",
    "user variance": "variance of the user's training ratings",
    "ends": "nearness of the prediction to an end of the scale",
    "|z|²": "‖z‖², negative",
    "log p": "log p: z = f(x) normal, with log\\|det J\\|",
    "log p, x": "log p: x normal, without f",
    "flow": "log p: a flow trained for it on x",
    "plain together": "the measures without a density, fitted together",
    "plain and flow": "these and the flow, fitted together",
}
"""Measures of how sure a prediction is: the name in inversion.json, and in words."""


def confidence() -> list[str]:
    result = load("inversion")
    ours, identity = (result["mean"][name]["confidence"] for name in ("LU-Net", "identity"))
    rows = [
        [words, *(number(found[name]["area"]) if name in found else "" for found in (ours, identity))]
        for name, words in CONFIDENCES.items()
    ]
    head = ["confidence", "area, LU-Net", "area, f = identity"]
    found = table(head, rows, dict.fromkeys(head[1:], min))
    return [*found, "", measured(result, result["command"])]


def backwards() -> list[str]:
    result = load("inversion")
    ours, identity = (result["mean"][name]["choices"] for name in ("LU-Net", "identity"))
    rows = [[name, number(value, ".3f"), number(identity.get(name), ".3f")] for name, value in ours.items()]
    # The best choice there is, known from the test ratings, is a bound and no method.
    rows = [[name, *(Cell(c.text) if name == "the best there is" else c for c in row)] for name, *row in rows]
    head = ["item put first", "mean rating, LU-Net", "mean rating, f = identity"]
    return [*table(head, rows, dict.fromkeys(head[1:], max)), "", measured(result, result["command"])]


def cold_starts() -> list[str]:
    result = load("embeddings")
    names = {
        "norm": "‖x‖², negative",
        "normal": "log p, normal distribution",
        "mixture": "log p, 30 Gaussians",
        "flow": "log p, LU-Net flow",
        "counts": "log of the number of training ratings",
    }
    mean = result["mean"]
    rows = [
        [
            words,
            number(mean["pairs"][name]["area"]),
            *(number(mean[side][name]["auroc_cold"], ".3f") for side in ("users", "items")),
        ]
        for name, words in names.items()
    ]
    head = ["score", "area, pairs", "AUROC, cold users", "AUROC, cold items"]
    best = {head[1]: min, head[2]: max, head[3]: max}
    return [*table(head, rows, best), "", measured(result, result["command"], threads=False)]


def fold_in() -> list[str]:
    result = load("fold-in")
    counts = (1, 5, 10, 20)
    rows = [
        [row["way"], *(number(row[f"mse_{n}"]) for n in counts), number(row.get("ms_per_user"), ".2g").text]
        for row in result["ratings"]
    ]
    head = ["way", *(f"MSE, n = {n}" for n in counts), "ms a user"]
    return [*table(head, rows, dict.fromkeys(head[1:5], min)), "", measured(result, result["command"])]


def sequence(dataset: str) -> list[str]:
    result = load(f"sequence-{dataset}")
    figures = {"hr@10": "HR@10", "ndcg@10": "NDCG@10", "full_ndcg@10": "NDCG@10, all items"}
    rows = [
        [row["name"], *(number(row[name]) for name in figures), number(row["cpu_seconds"], ".0f").text]
        for row in result["rows"]
    ]
    head = ["what is changed", *figures.values(), "processor time, s"]
    best = dict.fromkeys(figures.values(), max)
    return [*table(head, rows, best), "", measured(result, result["command"])]


# --- large files ----------------------------------------------------------------------------------------


def scale() -> list[str]:
    result = load("scale")
    rows = [
        [
            row["contrast"],
            *(f"{row[name]:,}" for name in ("ratings", "users", "items", "D")),
            number(row["seconds_a_rating"] * 1e6, ".2f").text,
            f"{row['peak_bytes'] / 2**30:.2f}",
        ]
        for row in result["rows"]
    ]
    head = ["varied", "ratings", "users", "items", "D", "training, µs a rating", "peak memory, GiB"]
    return [*table(head, rows, {}), "", measured(result, "python benchmarks/scale.py")]


def sharding() -> list[str]:
    result = load("sharding")
    rows = []
    for row in result["memory"]:
        peaks = [f"{peak / 2**30:.2f}" for peak in row["peak_bytes"]]
        seconds, mse = f"{row['train_seconds']:.0f}", f"{row['test_mse']:.6f}"
        rows.append([str(row["processes"]), peaks[0], ", ".join(peaks[1:]), seconds, mse])
    head = ["processes", "peak memory of the first, GiB", "of the others, GiB", "training, s", "test MSE"]
    return [*table(head, rows, {}), "", measured(result, "python benchmarks/sharding.py --steps --memory")]


# --- the ten figures of the README ----------------------------------------------------------------------


def _pair(what: str, ours: Cell, rival: str, theirs: Cell, best: Callable[..., float]) -> list[str]:
    winner = best([ours.value, theirs.value])
    ours, theirs = (cell.bold if cell.value == winner else cell for cell in (ours, theirs))
    return [what, ours.text, f"{theirs.text}, {rival}"]


def _best_other(result: dict[str, Any], metric: str, best: Callable[..., Any]) -> dict[str, Any]:
    """The row of the strongest method of others, with ``shown``: its name, and whether it is all there is."""
    others = [row for row in result["rows"] if row["package"] != "lunet_fast" and row.get(metric) is not None]
    found = best(others, key=lambda row: row[metric])
    alone = "" if len(others) > 1 else ", the only other method measured"
    return {**found, "shown": f"{found['method']} ({_package(found)}){alone}"}


def _ranked(what: str, result: dict[str, Any], method: str, metric: str, best: Any) -> list[str]:
    """A method of ours beside the best of the other packages'."""
    (ours,) = (row for row in result["rows"] if row["key"] == method)
    rival = _best_other(result, metric, best)
    cells = [number(row[metric], spread=row.get(f"{metric}_sd")) for row in (ours, rival)]
    return _pair(what, cells[0], rival["shown"], cells[1], best)


def _timed(what: str, D: int, B: int, rival: str, shown: str) -> list[str]:
    ours, theirs = (bench("layers").row(what, D, B, name) for name in ("LUDense", rival))
    assert ours is not None
    assert theirs is not None
    cells = [Cell(seconds_text(row.median), row.median) for row in (ours, theirs)]
    titles = {"forward + backward": "Forward and backward", "inverse, linear part": "Inverse"}
    return _pair(f"{titles[what]} of a layer, D = {D}, batch {B:,}", cells[0], shown, cells[1], min)


def _sampled(dataset: str, name: str) -> list[str]:
    with_f = compared(dataset, "lunet-ratings", "test_mse", folder="equal/")
    what = f"{name}, test MSE, side features for all: samples with f = identity (LU-Net {with_f})"
    return _ranked(what, load(f"equal/compare-{dataset}"), "lunet-sampled", "test_mse", min)


def _in_order() -> list[str]:
    result = load("sequence/compare-ml-1m")
    (identity,) = (row for row in result["rows"] if row["key"] == "lunet-sequence-identity")
    straight = number(identity["full_ndcg@10"]).text
    what = f"ML-1M, NDCG@10 among all items, recipe sequence (with f = identity {straight})"
    return _ranked(what, result, "lunet-sequence", "full_ndcg@10", max)


def _digits() -> tuple[dict[str, Any], list[str], list[str]]:
    """LU-Net M; its loss beside the best of other flows of its size, its samples beside the fastest."""
    rows = {row["family"]: row for row in load("density-digits")["rows"] if row["size"] == "M"}
    lu = rows["LU-Net"]
    others = [row for family, row in rows.items() if not family.startswith("LU-Net")]
    best = min(others, key=lambda row: row["test"])
    bits = [number(r["test"], ".4f", standard_error(r["test_std"], len(r["runs"]))) for r in (lu, best)]
    what = f"Digits (64-D), bits a dimension, {lu['parameters']:,} parameters"
    told = f"{best['family']}, {best['parameters']:,}, the best of the others"
    times = step_times()

    def sample(row: dict[str, Any]) -> Cell:
        ms = times[row["family"], row["size"], row["tuned"]["chosen"]["components"]]["sample_ms"]
        return Cell(f"{ms:.1f} ms", ms)

    fastest = min(others, key=lambda row: sample(row).value or 0.0)
    drawn = f"that of {fastest['family']}, the fastest, with {fastest['test']:.4f} bits"
    draw = _pair("256 samples of that flow", sample(lu), drawn, sample(fastest), min)
    return lu, _pair(what, bits[0], told, bits[1], min), draw


def figures() -> list[str]:
    small = load("compare-ml-100k")
    (plain,) = (r for r in load("ablation-ratings")["rows"] if not r["group"])
    (identity,) = (
        r for r in load("ablation-ratings")["rows"] if (r["group"], r["name"]) == ("f", "identity")
    )
    (straight,) = (row for row in small["rows"] if row["key"] == "lunet-sequence-identity")
    lu, *digits = _digits()
    recovery = load("inversion")["mean"]["LU-Net"]["recovery"]
    rows = [
        *(_sampled(dataset, name) for dataset, name in DATASETS.items()),
        _ranked(
            f"ML-100K, NDCG@10 among 100 candidates (with f = identity {straight['ndcg@10']:.4f})",
            *(small, "lunet-sequence", "ndcg@10", max),
        ),
        _in_order(),
        [
            "ML-100K, validation MSE with f, and with f = identity",
            number(plain["mse"]).text,
            f"{identity['mse']:.4f}, so {identity['mse_change']:+.4f} ± {identity['mse_change_error']:.4f}",
        ],
        [
            "Largest relative error of f⁻¹(f(x)), float32, trained model",
            number(recovery["largest_float32"], ".1e").text,
            f"{recovery['largest_float64']:.1e} in float64",
        ],
        *digits,
        _timed("inverse, linear part", 1024, 1, "torch.linalg.solve", "`torch.linalg.solve`"),
        _timed("forward + backward", 64, 8192, "nn.Linear + softplus", "`nn.Linear` + softplus"),
    ]
    lines = table(["", "lunet-fast", "beside it"], rows, {})
    machines = [
        load(name)["machine"]
        for name in (
            "equal/compare-ml-100k",
            "compare-ml-100k",
            "density-digits",
            "density-speed",
            "layers-cpu",
        )
    ]
    dates = sorted(machine["date"] for machine in machines)
    where = "; ".join(sorted({f"{m['processor']}, {m['cores']} cores, torch {m['torch']}" for m in machines}))
    note = (
        "Bold: the better of the two. Lower is better, except for NDCG. ±: standard deviation over "
        f"{len(small['seeds'])} seeds; for f = identity the standard error over {len(plain['mse_seeds'])}, "
        f"for digits over {len(lu['runs'])}. ML-1M: one seed. "
        f"{where}, {dates[0]} to {dates[-1]}."
    )
    return [*lines, "", note]


SECTIONS: dict[str, Callable[[], list[str]]] = {
    "figures": figures,
    "table2": table2,
    "compare": compare,
    "searched": searched,
    "equal": partial(equal, "ml-100k"),
    "equal-ml-1m": partial(equal, "ml-1m"),
    "ablation-ratings": ablation_ratings,
    "ablation-ranking": ablation_ranking,
    "confidence": confidence,
    "backwards": backwards,
    "cold-starts": cold_starts,
    "fold-in": fold_in,
    "scale": scale,
    "sharding": sharding,
    "sequence": lambda: sequence("ml-100k"),
    "sequence-ml-1m": lambda: sequence("ml-1m"),
    **ORDER_SECTIONS,
    **ANYONE_SECTIONS,
    **PUBLISHED_SECTIONS,
    **DENSITY_SECTIONS,
    **REAL_SECTIONS,
    **LAYER_SECTIONS,
}

MARKED = re.compile(r"(<!-- ([a-z0-9-]+) -->\n).*?(<!-- end \2 -->)", re.DOTALL)


def filled(text: str) -> tuple[str, set[str]]:
    """``text`` with every marked section made anew, and the names of these sections."""
    names = {name for _, name, _ in MARKED.findall(text)}
    unknown = names - SECTIONS.keys()
    if unknown:
        raise SystemExit(f"no table is called {', '.join(sorted(unknown))}")
    made = {name: "\n".join(SECTIONS[name]()) for name in names}
    return MARKED.sub(lambda found: f"{found[1]}\n{made[found[2]]}\n\n{found[3]}", text), names


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing, say whether they are right")
    options = parser.parse_args()
    stale, shown = [], set()
    bare = []
    for path in PAGES:
        page = str(path.relative_to(ROOT))
        old = path.read_text()
        new, names = filled(old)
        shown |= names | {name for name, _ in prose.MARKED.findall(new)}
        try:
            new = prose.filled(new, FIGURES)
            bare += [f"{page}: {words}" for words in prose.unmarked(new, prose.NOT_MEASURED.get(page, {}))]
        except ValueError as error:
            sys.exit(f"{page}: {error}")
        if new == old:
            continue
        stale.append(page)
        if not options.check:
            write_text(path, new)
    unused = (SECTIONS.keys() | FIGURES.keys()) - shown
    if unused:
        sys.exit(f"no page shows {', '.join(sorted(unused))}")
    if bare:
        sys.exit("numbers that no results file stands behind, see benchmarks/prose.py:\n" + "\n".join(bare))
    if stale and options.check:
        sys.exit(f"{', '.join(stale)}: not what benchmarks/results/ holds; run python benchmarks/readme.py")


if __name__ == "__main__":
    main()

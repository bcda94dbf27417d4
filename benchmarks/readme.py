"""Put the committed results into README.md, between its markers.

python benchmarks/readme.py            rewrites README.md
python benchmarks/readme.py --check    exits with 1 if README.md and the results differ
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from typing import Any

from density_report import depth_table, digits_table, plane_table
from lunet_fast.bench.claims import verdicts
from lunet_fast.bench.results import Result, seconds_text
from lunet_fast.bench.training import samples_per_second
from machine import RESULTS, ROOT, write_text

PRINTED = [
    ("classic MLP, paper, ML-100K", "0.9200", "0.0050", ""),
    ("invertible model, paper, ML-100K", "0.8880", "0.0000", ""),
    ("invertible model, paper, ML-1M", "0.7955", "0.0000", ""),
]


def load(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text())


def _machine(result: dict[str, Any]) -> str:
    machine = result["machine"]
    return (
        f"{machine['processor']}, {machine['cores']} cores, {machine['threads']} threads, "
        f"torch {machine['torch']}, {machine['date']}"
    )


def table2() -> str:
    result = load("table2")
    lines = ["| model | test MSE | reconstruction error | training, s |", "|---|---|---|---|"]
    lines += [f"| {model} | {mse} | {error} | {seconds} |" for model, mse, error, seconds in PRINTED]
    names = {"ml-100k": "ML-100K", "ml-1m": "ML-1M"}
    for row in result["means"]:
        seeds = f"seed{'s' if len(row['seeds']) > 1 else ''} {', '.join(str(seed) for seed in row['seeds'])}"
        if row["recipe"] == "paper" and "mlp_test_mse" in row:
            lines.append(
                f"| our MLP control, {names[row['dataset']]}, {seeds} | {row['mlp_test_mse']:.4f} | "
                f"{row['mlp_reconstruction_error']:.2g} | |"
            )
        lines.append(
            f"| **LU-Net, recipe `{row['recipe']}`, {names[row['dataset']]}**, {seeds} | "
            f"**{row['test_mse']:.4f}** | {row['reconstruction_error']:.1e} "
            f"(relative {row['reconstruction_error_relative']:.1e}) | {row['train_seconds']:.0f} |"
        )
    (affine,) = load("table2-affine")["means"]
    lines.append(
        f"| recipe `best` with one layer, so f affine, ML-100K, seeds 0, 1, 2 | {affine['test_mse']:.4f} | "
        f"{affine['reconstruction_error']:.1e} | {affine['train_seconds']:.0f} |"
    )
    commands = "`python benchmarks/table2.py`, last row with `--affine`"
    return "\n".join([*lines, "", f"{_machine(result)}; {commands}."])


def bench(suite: str) -> Result:
    return Result.load(RESULTS / f"{suite}-cpu.json")


def _ratios(result: Result, what: str, sizes: list[tuple[int, int]], names: dict[str, str]) -> list[str]:
    """A line a size: our time, its distance from the floor, and the others' times as multiples of ours."""
    lines = ["| D | B | LUDense | times the floor | " + " | ".join(names.values()) + " |"]
    lines.append("|---" * (4 + len(names)) + "|")
    for D, B in sizes:
        ours = result.row(what, D, B, "LUDense")
        if ours is None:
            raise SystemExit(f"the results have no {what}, D = {D}, B = {B}: run make bench-all")
        cells = [str(D), f"{B:,}", seconds_text(ours.median), f"{ours.median / ours.floor:.3g}"]
        for name in names:
            row = result.row(what, D, B, name)
            cells.append("" if row is None else f"{row.ratio:.3g}")
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def layers() -> str:
    result = bench("layers")
    sizes = [(D, B) for B in (8192, 128, 1) for D in (16, 64, 256, 784, 1024)]
    training = {
        "nn.Linear + softplus": "nn.Linear",
        "two triangular products + softplus": "two triangular products",
        "W formed, torch.compile": "torch.compile",
        "nflows LULinear + softplus": "nflows",
        "normflows LULinearPermute + softplus": "normflows",
        "zuko LULinearTransform + softplus": "zuko",
        "dense + slogdet + softplus": "dense + slogdet",
        "original LU-Net's way": "original LU-Net's way",
    }
    inverse = {
        "torch.linalg.solve": "linalg.solve",
        "dense, torch.linalg.inv": "linalg.inv",
        "two triangular products": "two solve_triangular",
        "nflows LULinear": "nflows",
        "normflows LULinearPermute": "normflows",
        "zuko LULinearTransform": "zuko",
        "original LU-Net's way": "original LU-Net's way",
    }
    logabsdet = {
        "torch.linalg.slogdet": "linalg.slogdet",
        "nflows LULinear": "nflows",
        "normflows LULinearPermute": "normflows",
        "zuko LULinearTransform": "zuko",
        "original LU-Net's way": "original LU-Net's way",
    }
    lines = [
        "Forward and backward, with an activation (ours LeakySoftplus, softplus where none is invertible):",
        "",
    ]
    lines += _ratios(result, "forward + backward", sizes, training)
    lines += ["", "Inverse of the linear part:", "", *_ratios(result, "inverse, linear part", sizes, inverse)]
    lines += ["", "Log-determinant of the matrix:", ""]
    lines += _ratios(result, "log-determinant", [(D, 1) for D in (16, 64, 256, 784, 1024)], logabsdet)
    lines += ["", "Inverse of the layer, φ⁻¹ included, beside its own forward and the original's:", ""]
    names = {"its own forward": "its own forward", "original LU-Net's way": "original LU-Net's way"}
    lines += _ratios(result, "inverse", sizes, names)
    return "\n".join([*lines, "", f"{result.where()}; `make bench-all`."])


def claims() -> str:
    result = bench("claims")
    lines = [f"- {verdict}" for verdict in verdicts(result.rows, result.counts)]
    return "\n".join([*lines, "", f"{result.where()}; `lunet-fast bench claims --scale all`."])


def stacks() -> str:
    result = bench("stacks")
    names = ["nflows LULinear, LeakyReLU", "zuko RealNVP", "zuko MAF", "original LU-Net's way"]
    lines = ["| | D | M | B | LUFlow | " + " | ".join(names) + " |", "|---" * 9 + "|"]
    for spec, rows in result.groups().items():
        ours = next(row for row in rows if row.ours)
        found = {row.contender: f"{row.ratio:.3g}" for row in rows}
        cells = [spec.what, str(spec.features), spec.detail.removeprefix("M = "), str(spec.rows)]
        cells += [seconds_text(ours.median), *(found.get(name, "") for name in names)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", f"{result.where()}; `lunet-fast bench stacks --scale all`."])


def training() -> str:
    result = bench("training")
    names = ["nn.Linear MLP", "MLP control of table 2", "LU-Net, torch.compile"]
    lines = [
        "| step of | D | batch | LU-Net | samples a second | " + " | ".join(names) + " |",
        "|---" * 8 + "|",
    ]
    for spec, rows in result.groups().items():
        ours = next(row for row in rows if row.ours)
        found = {row.contender: f"{row.ratio:.3g}" for row in rows}
        cells = [spec.detail, str(spec.features), str(spec.rows), seconds_text(ours.median)]
        cells += [f"{samples_per_second(ours):,.0f}", *(found.get(name, "") for name in names)]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", f"{result.where()}, of which a step uses 1; `lunet-fast bench training --scale all`."]
    quality = load("time-to-quality")
    lines += ["", "Whole trainings, ML-100K, seed 0:", ""]
    lines += [
        "| method | threads | training, s | test MSE | our training had it after, s |",
        "|---" * 5 + "|",
    ]
    for row in quality["trainings"]:
        if row["missing"]:
            lines.append(f"| {row['method']} | | {row['missing']} | | |")
            continue
        after = row["ours_seconds"]
        reached = "" if row["curve"] else "never" if after is None else f"{after:.1f}"
        cells = [row["method"], row["threads"], f"{row['seconds']:.1f}", f"{row['test_mse']:.4f}", reached]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    machine = quality["machine"]
    lines += [
        "",
        f"{machine['processor']}, torch {machine['torch']}, {machine['date']}; "
        "`python benchmarks/time_to_quality.py`.",
    ]
    return "\n".join(lines)


def compare() -> str:
    lines: list[str] = []
    for name, title in (("compare-ml-100k", "ML-100K"), ("compare-ml-1m", "ML-1M")):
        if not (RESULTS / f"{name}.json").is_file():
            continue
        result = load(name)
        seeds = ", ".join(str(seed) for seed in result["seeds"])
        lines += [
            f"{title}, seed{'s' if len(result['seeds']) > 1 else ''} {seeds}:",
            "",
            "| method | package | MSE | HR@10 | NDCG@10 | NDCG@10, all items | training, s | MB |",
            "|---" * 8 + "|",
        ]
        for row in result["rows"]:
            why = row.get("missing") or row.get("error")
            if why:
                lines.append(f"| {row['method']} | {row['package']} | {why} | | | | | |")
                continue
            figures = [row.get(n) for n in ("test_mse", "hr@10", "ndcg@10", "full_ndcg@10")]
            cells = ["" if figure is None else f"{figure:.4f}" for figure in figures]
            cells += [f"{row['train_seconds']:.1f}", f"{row['peak_memory_mb']:.0f}"]
            if row["package"] == "lunet_fast":
                cells = [f"**{cell}**" if cell else "" for cell in cells]
            package = "this one" if row["package"] == "lunet_fast" else row["package"]
            package = "written here" if package == "ours" else package
            lines.append(f"| {row['method']} | {package} | " + " | ".join(cells) + " |")
        lines.append("")
    machine = load("compare-ml-100k")["machine"]
    where = f"{machine['processor']}, one thread a method, torch {machine['torch']}, {machine['date']}"
    return "\n".join([*lines, f"{where}; `lunet-fast compare --dataset ml-100k --seeds 0 1 2`."])


def ablation() -> str:
    rows = load("ablation-ratings")["rows"]
    lines = ["| change | | MSE | change of MSE |", "|---" * 4 + "|"]
    for row in rows:
        if row["group"] in ("activation", "size × layers", "penalty"):
            continue
        error = row["mse_change_error"]
        change = f"{row['mse_change']:+.4f} ± {error:.4f}" if row["group"] else ""
        lines.append(f"| {row['group']} | {row['name']} | {row['mse']:.4f} | {change} |")
    sizes = [row["mse"] for row in rows if row["group"] == "size × layers"]
    slopes = [row["mse"] for row in rows if row["group"] == "activation"]
    return "\n".join(
        [
            *lines,
            "",
            f"Embedding size 8 to 32 × 1 to 4 layers: MSE {min(sizes):.4f} to {max(sizes):.4f}. "
            f"Activations, α and β: {min(slopes):.4f} to {max(slopes):.4f}. Recipe best with 4 members, mean "
            "of seeds 0, 1 and 2, changes ± standard error; `python benchmarks/ablation.py ratings`.",
        ]
    )


def density() -> str:
    result = load("density-digits")
    lines = ["scikit-learn's digits, 64-D, bits a dimension with all Jacobians, less is better:", ""]
    results = "benchmarks/results"
    lines += [
        *digits_table(),
        "",
        f"![digits, samples of LU-Net M, and what lies between two digits]({results}/density-digits.png)",
        "",
        "Points of the plane, KL divergence from the truth in nats:",
        "",
        *plane_table(),
        "",
        f"![densities on the plane: the truth and what was learnt]({results}/density-plane.png)",
        "",
        "Depth, on digits:",
        "",
        *depth_table(),
    ]
    machine = result["machine"]
    where = f"{machine['processor']}, one thread, torch {machine['torch']}, {machine['date']}"
    return "\n".join(
        [
            *lines,
            "",
            f"{where}; `python benchmarks/density.py`, with every flow tuned on the same budget: "
            "[density.md](benchmarks/results/density.md).",
        ]
    )


SECTIONS = {
    "table2": table2,
    "compare": compare,
    "ablation": ablation,
    "claims": claims,
    "layers": layers,
    "stacks": stacks,
    "training": training,
    "density": density,
}


def filled(text: str) -> str:
    """``text`` with every `<!-- NAME -->` … `<!-- end NAME -->` section made anew."""
    for name, make in SECTIONS.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end {name} -->)", re.DOTALL)
        if not pattern.search(text):
            raise SystemExit(f"README.md has no section <!-- {name} --> … <!-- end {name} -->")
        section = make()
        text = pattern.sub(lambda found, section=section: f"{found[1]}{section}\n{found[2]}", text)
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--check", action="store_true", help="change nothing, say whether README.md is up to date"
    )
    options = parser.parse_args()
    path = ROOT / "README.md"
    old = path.read_text()
    new = filled(old)
    if options.check:
        if new != old:
            sys.exit("README.md does not say what benchmarks/results/ holds: run python benchmarks/readme.py")
        return
    write_text(path, new)


if __name__ == "__main__":
    main()

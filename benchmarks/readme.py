"""Put the committed results into README.md, between its markers.

python benchmarks/readme.py            rewrites README.md
python benchmarks/readme.py --check    exits with 1 if README.md and the results differ
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"

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


def layers() -> str:
    result = load("layers-cpu")
    lines = ["| what | D | rows | LUDense, ms | beside | ms | ours / peer |", "|---" * 7 + "|"]
    for row in result["rows"]:
        low, high = row["ratio_quartiles"]
        lines.append(
            f"| {row['what']} | {row['features']} | {row['rows']} | {row['ours_ms']:.3g} | {row['peer']} | "
            f"{row['peer_ms']:.3g} | {row['ratio']:.3g} ({low:.3g} to {high:.3g}) |"
        )
    return "\n".join([*lines, "", f"{_machine(result)}, float32; `make bench`."])


SECTIONS = {"table2": table2, "layers": layers}


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
    temporary = path.with_suffix(".tmp")
    temporary.write_text(new)
    os.replace(temporary, path)


if __name__ == "__main__":
    main()

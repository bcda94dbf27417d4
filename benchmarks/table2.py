"""The paper's table 2: test MSE and reconstruction error, by the command a user would type.

    python benchmarks/table2.py --data-dir DIR        everything, about 12 minutes on 2 cores
    python benchmarks/table2.py --only ml-100k        ML-100K alone, nothing written
    python benchmarks/table2.py --recipe best         one recipe anew, the other's rows stay as they are
    python benchmarks/table2.py --affine              what the nonlinearity adds: recipe best with one layer

Runs `lunet-fast train` for recipes paper and best, seeds 0, 1 and 2 on ML-100K (80/20, random) and seed 0 on
ML-1M, and writes benchmarks/results/table2.json: the metrics of every run, and the means over the seeds.
With --affine, recipe best on ML-100K with M = 1, where f is affine, into table2-affine.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from machine import RESULTS, write

RUNS = [
    *(("ml-100k", recipe, seed) for recipe in ("paper", "best") for seed in (0, 1, 2)),
    ("ml-1m", "best", 0),
]
AFFINE_RUNS = [("ml-100k", "best", seed) for seed in (0, 1, 2)]

AVERAGED = (
    "test_mse",
    "test_rmse",
    "reconstruction_error",
    "reconstruction_error_relative",
    "mlp_test_mse",
    "mlp_reconstruction_error",
    "train_seconds",
    "parameters",
)


def run(
    dataset: str, recipe: str, seed: int, more: list[str], data_dir: str | None, folder: Path
) -> dict[str, object]:
    """The metrics of one training, with the command that made them."""
    command = ["lunet-fast", "train", "--dataset", dataset, "--recipe", recipe, "--seed", str(seed)]
    if recipe != "paper":
        command.append("--no-mlp")  # the control has the budget of recipe paper, and runs there
    command += more
    print(" ".join(command), file=sys.stderr, flush=True)
    full = [sys.executable, "-m", *command, "--out", str(folder)]
    full[2] = "lunet_fast"
    if data_dir is not None:
        full += ["--data-dir", data_dir]
    subprocess.run(full, check=True, stdout=sys.stderr)
    return {"command": " ".join(command), **json.loads((folder / "metrics.json").read_text())}


def means(runs: list[dict[str, object]]) -> list[dict[str, object]]:
    """One row a data set and recipe: the mean of each averaged metric over its seeds."""
    rows = []
    for dataset, recipe in dict.fromkeys((r["dataset"], r["recipe"]) for r in runs):
        group = [r for r in runs if (r["dataset"], r["recipe"]) == (dataset, recipe)]
        row: dict[str, object] = {"dataset": dataset, "recipe": recipe, "seeds": [r["seed"] for r in group]}
        for name in AVERAGED:
            values = [float(r[name]) for r in group if name in r]  # type: ignore[arg-type]
            if values:
                row[name] = statistics.fmean(values)
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data-dir", help="folder with the MovieLens files (default: found or fetched)")
    parser.add_argument("--only", choices=["ml-100k", "ml-1m"], help="one data set; nothing is written")
    parser.add_argument("--recipe", choices=["paper", "best"], help="run one; the others' rows are kept")
    parser.add_argument("--affine", action="store_true", help="recipe best with M = 1 instead")
    options = parser.parse_args()
    wanted, more, name = RUNS, [], "table2"
    if options.affine:
        wanted, more, name = AFFINE_RUNS, ["--layers", "1"], "table2-affine"
    runs: list[dict[str, object]] = []
    if options.recipe:
        wanted = [row for row in RUNS if row[1] == options.recipe]
        runs = [
            r
            for r in json.loads((RESULTS / "table2.json").read_text())["runs"]
            if r["recipe"] != options.recipe
        ]
    with tempfile.TemporaryDirectory() as scratch:
        for dataset, recipe, seed in wanted:
            if options.only in (None, dataset):
                folder = Path(scratch) / f"{dataset}-{recipe}-{seed}"
                runs.append(run(dataset, recipe, seed, more, options.data_dir, folder))
    rows = means(runs)
    print(json.dumps(rows, indent=1))
    if options.only is None:
        print(f"written to {write(name, {'means': rows, 'runs': runs})}")


if __name__ == "__main__":
    main()

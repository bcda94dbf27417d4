"""The paper's table 2: test MSE and reconstruction error, by the command a user would type.

    python benchmarks/table2.py --data-dir DIR        everything, about 12 minutes on 2 cores
    python benchmarks/table2.py --only ml-100k        ML-100K alone, nothing written
    python benchmarks/table2.py --recipe best         one recipe anew, the other's rows stay as they are
    python benchmarks/table2.py --affine              what the nonlinearity adds: recipe best with one layer
    python benchmarks/table2.py --large               ML-1M by both recipes, and the control: 20 minutes

Runs `lunet-fast train` for recipes paper and best, seeds 0, 1 and 2 on ML-100K (80/20, random) and seed 0 on
ML-1M, and writes benchmarks/results/table2.json: the metrics of every run, and the means over the seeds.
With --affine, recipe best on ML-100K with M = 1, where f is affine, into table2-affine.json. With --large,
what table2.json does not have of ML-1M, into ml-1m.json; the control has its own settings at this size.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from machine import Results, open_results, parser

#: (data set, recipe, seed, further options). The control has the budget of recipe paper, and runs there.
Planned = tuple[str, str, int, tuple[str, ...]]

RUNS: list[Planned] = [
    *(("ml-100k", "paper", seed, ()) for seed in (0, 1, 2)),
    *(("ml-100k", "best", seed, ("--no-mlp",)) for seed in (0, 1, 2)),
    ("ml-1m", "best", 0, ("--no-mlp",)),
]
AFFINE: list[Planned] = [("ml-100k", "best", seed, ("--no-mlp", "--layers", "1")) for seed in (0, 1, 2)]
LARGE: list[Planned] = [("ml-1m", "best", 0, ()), ("ml-1m", "paper", 0, ("--no-mlp",))]

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


def run(planned: Planned, commit: str, data_dir: str | None, folder: Path) -> dict[str, object]:
    """The metrics of one training, with the command and the commit that made them."""
    dataset, recipe, seed, more = planned
    words = ["train", "--dataset", dataset, "--recipe", recipe, "--seed", str(seed), *more]
    command = " ".join(["lunet-fast", *words])
    print(command, file=sys.stderr, flush=True)
    where = ["--out", str(folder), *(["--data-dir", data_dir] if data_dir is not None else [])]
    subprocess.run([sys.executable, "-m", "lunet_fast", *words, *where], check=True, stdout=sys.stderr)
    return {"command": command, "commit": commit, **json.loads((folder / "metrics.json").read_text())}


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


def kept(results: Results, but: str) -> list[dict[str, object]]:
    """The runs of table2.json by other recipes than ``but``."""
    content = json.loads(results.path("table2.json").read_text())
    return [run for run in content["runs"] if run["recipe"] != but]


def main() -> None:
    options = parser(__doc__, data=True)
    options.add_argument("--only", choices=["ml-100k", "ml-1m"], help="one data set; nothing is written")
    which = options.add_mutually_exclusive_group()
    which.add_argument("--recipe", choices=["paper", "best"], help="run one; the others' rows are kept")
    which.add_argument("--affine", action="store_true", help="recipe best with M = 1 instead")
    which.add_argument("--large", action="store_true", help="ML-1M by both recipes instead")
    chosen = options.parse_args()
    results = None if chosen.only else open_results(chosen)
    name, planned = "table2", RUNS
    if chosen.affine:
        name, planned = "table2-affine", AFFINE
    if chosen.large:
        name, planned = "ml-1m", LARGE
    if chosen.recipe:
        planned = [each for each in planned if each[1] == chosen.recipe]
    runs = kept(results, chosen.recipe) if chosen.recipe and results is not None else []
    commit = "" if results is None else results.machine["commit"]
    with tempfile.TemporaryDirectory() as scratch:
        for number, each in enumerate(planned):
            if chosen.only in (None, each[0]):
                runs.append(run(each, commit, chosen.data_dir, Path(scratch) / str(number)))
    rows = means(runs)
    print(json.dumps(rows, indent=1))
    if results is not None:
        results.write(name, {"means": rows, "runs": runs})


if __name__ == "__main__":
    main()

"""Recipe sequence: one change at a time, measured on a validation part of the training data.

    python benchmarks/sequence.py --data-dir DIR                     about 15 minutes on 1 core
    python benchmarks/sequence.py --dataset ml-1m --data-dir DIR     some hours
    python benchmarks/sequence.py --only identity                    single rows

Each user's latest rating, the test part, is taken away first and never read; the latest of what is left is
to be found. A row changes the settings that it names. What is finished is kept: the same command goes on
after an interruption. Writes benchmarks/results/sequence-DATASET.{json,md}.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from typing import Any

import torch

from lunet_fast.recsys.data import movielens
from lunet_fast.recsys.data.ratings import Ratings
from lunet_fast.recsys.measures.protocols import Parts
from lunet_fast.recsys.model.sequence_config import sequence_recipe
from lunet_fast.recsys.model.sequence_training import train_sequence
from lunet_fast.training.files import read_json
from machine import Results, open_results, parser

FIGURES = ("hr@10", "ndcg@10", "full_ndcg@10")

ROWS: dict[str, dict[str, Any]] = {
    "none": {},
    "f = identity": {"network": "identity"},
    "no order": {"order": False},
    "no history": {"user_history": False},
    "half the rates": {"learning_rate": 0.5, "net_learning_rate": 0.5},
    "twice the rates": {"learning_rate": 2.0, "net_learning_rate": 2.0},
    "half the epochs": {"epochs": 0.5},
    "twice the epochs": {"epochs": 2.0},
    "half the size": {"embedding_size": 0.5},
    "twice the size": {"embedding_size": 2.0},
    "half the negatives": {"negatives": 0.5},
    "twice the negatives": {"negatives": 2.0},
    "a quarter of the length": {"length": 0.25},
    "dropout 0.2": {"dropout": 0.2},
    "dropout 0.4": {"dropout": 0.4},
    "8 decays": {"decays": 8},
    "2 members": {"members": 2},
    "3 members": {"members": 3},
    "told when it is asked": {"elapsed": True},
}
"""What is changed of a single member: multiples of the recipe's numbers, and other values as they are."""

MULTIPLES = ("half", "twice", "a quarter")


def settings(name: str, n_ratings: int) -> dict[str, Any]:
    """The settings of a row."""
    changes = ROWS[name]
    if name.startswith(MULTIPLES):
        base = sequence_recipe(n_ratings).to_dict()
        changes = {key: type(base[key])(base[key] * factor) for key, factor in changes.items()}
    return {"members": 1, **changes}


def measured(rest: Ratings, seed: int, changes: dict[str, Any]) -> dict[str, float]:
    began = time.process_time()
    values = train_sequence(rest, sequence_recipe(len(rest), seed=seed, **changes)).metrics
    return {**{name: values[name] for name in FIGURES}, "cpu_seconds": time.process_time() - began}


def run(dataset: str, names: list[str], seeds: list[int], data_dir: str | None, results: Results) -> None:
    ratings = movielens.load(dataset, data_dir)
    file = results.path(f"sequence-{dataset}.json")
    runs: dict[str, dict[str, Any]] = read_json(file)["runs"] if file.is_file() else {}
    for seed in seeds:
        rest = Parts.of(ratings, "leave-one-out", seed).training
        for name in names:
            changes = settings(name, len(rest))
            whole = sequence_recipe(len(rest), seed=seed, **changes).to_dict()
            key = json.dumps([name, whole], sort_keys=True)
            if runs.get(key, {}).get("code") != results.code:
                runs[key] = {**measured(rest, seed, changes), "code": results.code}
                print(seed, name, runs[key], file=sys.stderr, flush=True)
            rows = table(runs)
            results.write(f"sequence-{dataset}", {"rows": rows, "runs": runs}, markdown(dataset, rows))


def table(runs: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """The means over seeds, a row for each set of settings."""
    found: dict[str, list[dict[str, Any]]] = {}
    for key, values in runs.items():
        name, whole = json.loads(key)
        del whole["seed"]
        found.setdefault(json.dumps([name, whole], sort_keys=True), []).append(values)
    rows = []
    for key, every in found.items():
        name, whole = json.loads(key)
        means = {figure: statistics.fmean(v[figure] for v in every) for figure in (*FIGURES, "cpu_seconds")}
        rows.append({"name": name, "settings": whole, "seeds": len(every), **means})
    return rows


def markdown(dataset: str, rows: list[dict[str, Any]]) -> str:
    lines = [
        f"# Recipe sequence, {dataset.upper()}, validation part",
        "",
        "| change | HR@10 | NDCG@10 | NDCG@10, all items | CPU s | seeds |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        cells = [f"{row[name]:.4f}" for name in FIGURES]
        lines.append(
            f"| {row['name']} | " + " | ".join(cells) + f" | {row['cpu_seconds']:.0f} | {row['seeds']} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    options = parser(__doc__, data=True)
    options.add_argument("--dataset", choices=["ml-100k", "ml-1m"], default="ml-100k")
    options.add_argument("--seeds", type=int, nargs="+", default=[0])
    options.add_argument("--only", metavar="ROW", nargs="+", help="rows by name; others are kept as they are")
    chosen = options.parse_args()
    unknown = [name for name in chosen.only or [] if name not in ROWS]
    if unknown:
        options.error(f"--only {unknown[0]!r} is no row: choose from {', '.join(ROWS)}")
    torch.set_num_threads(1)
    run(chosen.dataset, chosen.only or list(ROWS), chosen.seeds, chosen.data_dir, open_results(chosen))


if __name__ == "__main__":
    main()

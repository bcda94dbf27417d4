"""Rating prediction on the splits of which others have published figures.

    python benchmarks/published.py folds      u1 ... u5 of ML-100K, GroupLens' five folds    (25 minutes)
    python benchmarks/published.py ml-1m      a tenth of ML-1M at random, three seeds        (an hour)
    python benchmarks/published.py folds --only samples

Recipe best as ``lunet-fast train`` has it, the same with f = identity, with the loss ``ordinal``, which
``ablation.py ratings`` prefers on a validation part, and with f = identity by samples of the posterior
(``--inference gibbs``). The weights of the last epoch count, and no decision reads a test part. The folds
stand in ml-100k.zip of $LUNET_FAST_DATA or --data-dir. A training that was measured is kept in
benchmarks/results/published.json and not repeated by the same code; --only takes single rows, by the last
word of their names.
"""

from __future__ import annotations

import io
import json
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from lunet_fast.recsys.data import movielens
from lunet_fast.recsys.data.ratings import Ratings, from_frame
from lunet_fast.recsys.data.splits import holdout
from lunet_fast.recsys.measures.protocols import Parts
from lunet_fast.recsys.model.config import recipe
from lunet_fast.recsys.model.training import train
from machine import Results, open_results, parser

NAME = "published"
ROWS: dict[str, dict[str, Any]] = {
    "recipe best": {},
    "recipe best, f = identity": {"network": "identity"},
    "recipe best, loss ordinal": {"loss": "ordinal"},
    "f = identity, samples": {"inference": "gibbs"},
}
SEEDS = (11, 12, 13)


def folds(folder: Path) -> dict[str, Parts]:
    """GroupLens' folds, by name, with the ids and what is known of users and items in the whole data."""
    whole = movielens.load("ml-100k", folder)
    found = {}
    with zipfile.ZipFile(folder / "ml-100k" / "ml-100k.zip") as archive:
        for fold in range(1, 6):
            sides = []
            for part in ("base", "test"):
                text = archive.read(f"ml-100k/u{fold}.{part}")
                columns = ["user", "item", "rating", "timestamp"]
                frame = pd.read_csv(io.BytesIO(text), sep="\t", names=columns)
                sides.append(in_whole(whole, frame))
            found[f"u{fold}"] = Parts(*sides, None, None)
    return found


def in_whole(whole: Ratings, frame: pd.DataFrame) -> Ratings:
    """The rows of ``whole`` that a fold names."""
    given = from_frame(frame, users=whole.users, items=whole.items)
    pairs = given.user * whole.n_items + given.item
    return whole.select(torch.isin(whole.user * whole.n_items + whole.item, pairs).nonzero().flatten())


def tenths(folder: Path | None) -> dict[str, Parts]:
    """A tenth of ML-1M for each seed."""
    whole = movielens.load("ml-1m", folder)
    found = {}
    for seed in SEEDS:
        training, test = (whole.select(rows) for rows in holdout(torch.arange(len(whole)), 0.1, seed))
        found[f"seed {seed}"] = Parts(training, test, None, None)
    return found


def run(part: str, splits: dict[str, Parts], rows: list[str], results: Results) -> None:
    path = results.path(f"{NAME}.json")
    runs: list[dict[str, Any]] = json.loads(path.read_text())["runs"] if path.exists() else []
    for split, parts in splits.items():
        for row in rows:
            key = {"part": part, "split": split, "row": row}
            like = [old for old in runs if all(old[name] == value for name, value in key.items())]
            if any(old["code"] == results.code for old in like):
                continue
            assert parts.test is not None
            config = recipe("best", len(parts.training) + len(parts.test), mlp=False, **ROWS[row])
            began = time.process_time()
            rmse = train(parts.training, config, test=parts.test).metrics["test_rmse"]
            new = {**key, "rmse": rmse, "cpu_seconds": time.process_time() - began}
            runs = [old for old in runs if old not in like]
            runs.append({**new, "commit": results.machine["commit"], "code": results.code})
            print(new, file=sys.stderr, flush=True)
            results.write(NAME, {"runs": runs})


def main() -> None:
    options = parser(__doc__, data=True)
    options.add_argument("part", choices=["folds", "ml-1m"])
    words = {name.split()[-1]: name for name in ROWS}
    options.add_argument("--only", nargs="+", choices=list(words), default=list(words), help="single rows")
    given = options.parse_args()
    rows = [words[word] for word in given.only]
    if given.part == "folds" and given.data_dir is None:
        raise SystemExit("folds reads ml-100k.zip: name its folder with --data-dir")
    results = open_results(given, threads=1)
    folder = None if given.data_dir is None else Path(given.data_dir)
    if given.part == "folds":
        assert folder is not None
        run("ML-100K", folds(folder), rows, results)
    else:
        run("ML-1M", tenths(folder), rows, results)


if __name__ == "__main__":
    main()

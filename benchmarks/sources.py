"""Recipe sequence: what each source adds, on data sets that have it.

    python benchmarks/sources.py --data-dir DIR                        about 70 minutes on 1 core
    python benchmarks/sources.py --only filmtrust                      one data set
    python benchmarks/sources.py --validation --seeds 0 --allow-dirty  what settings are chosen by

FilmTrust and LastFM lie in DIR/filmtrust and DIR/lastfm as they are published; MovieLens is found or fetched.
Each user's latest rating, and where there are no times one at random, is to be found among 100 others and
among all; "few" are the users with at most five training ratings. ``cold`` holds a fifth of the items out of
training, and ranks them alone. With ``--validation`` the test part is taken away first. What is finished is
kept. Writes benchmarks/results/sources.{json,md,png}; ``--draw`` makes the picture alone.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from lunet_fast.recsys.data import movielens
from lunet_fast.recsys.data.ratings import Ratings, from_frame
from lunet_fast.recsys.data.texts import with_text
from lunet_fast.recsys.data.ties import with_friends
from lunet_fast.recsys.evaluation import adapters
from lunet_fast.recsys.evaluation.baselines import BASELINES, Baseline
from lunet_fast.recsys.evaluation.fitted import Fitted
from lunet_fast.recsys.evaluation.peer_settings import Settings
from lunet_fast.recsys.measures.protocols import Parts, evaluate_ranking
from lunet_fast.recsys.measures.ranking import full_ranking
from lunet_fast.recsys.model.config import nearest_dataset
from lunet_fast.recsys.model.sequence_config import sequence_recipe
from lunet_fast.recsys.model.sequence_training import evaluate_sequences, train_sequence
from lunet_fast.training.figures import BLUE, GREY, new_figure, plain
from lunet_fast.training.files import read_json, write_figure
from machine import Results, open_results, parser

FEW = 5
COLD_SHARE = 0.2
FIGURES = ("hr@10", "ndcg@10", "full_ndcg@10", "recall@10", "few_users", "few_ndcg@10", "few_full_ndcg@10")

ORDERED: dict[str, dict[str, Any]] = {
    "all that is default": {},
    "no order": {"order": False},
    "no history": {"user_history": False},
    "time since the last choice": {"elapsed": True},
    "side features": {"side_features": True},
    "titles": {"text": True},
}
UNORDERED: dict[str, dict[str, Any]] = {
    "history alone": {"order": False},
    "order, drawn": {},
    "social": {"order": False, "social": True},
}
COUNTED: dict[str, dict[str, Any]] = {
    "counts": {"order": False, "confidence": 1.0},
    "social, counts": {"order": False, "social": True, "confidence": 1.0},
}
COLD: dict[str, dict[str, Any]] = {
    "side features": {"side_features": True},
    "titles": {"text": True},
    "side features, titles": {"side_features": True, "text": True},
}
PEERS = {
    "ml-100k": ("popularity", "ease"),
    "filmtrust": ("popularity", "ease", "als", "bpr", "social bpr"),
    "lastfm": ("popularity", "als", "bpr", "social bpr"),
    "cold": ("popularity", "topic regression"),
}
#: Peers that read a source, and their settings, chosen by ``--validation``.
SOURCED: dict[str, tuple[Baseline, Settings]] = {
    "social bpr": (
        Baseline("social-bpr", "Social BPR", "cornac", ("ranking",), adapters.social_bpr),
        {"factors": 50, "rate": 0.02, "l2": 0.01, "epochs": 200},
    ),
    "topic regression": (
        Baseline("topic-regression", "Topic regression", "cornac", ("ranking",), adapters.topic_regression),
        {"topics": 50, "epochs": 30, "l2": 0.01, "l2_topics": 1.0, "unrated": 0.01},
    ),
}


def ml_100k(data_dir: str | None) -> Ratings:
    return with_text(movielens.load("ml-100k", data_dir), "titles")


def filmtrust(data_dir: str | None) -> Ratings:
    folder = Path(data_dir or ".") / "filmtrust"
    names = ["user", "item", "rating"]
    parts = [pd.read_csv(folder / f"ratings_{n}.txt", sep=r"\s+", names=names) for n in range(4)]
    frame = pd.concat(parts).drop_duplicates(["user", "item"])
    ties = pd.read_csv(folder / "trust.txt", sep=r"\s+", names=["user", "friend", "weight"])
    return _with_ties(from_frame(frame, scale=(0.5, 4), name="filmtrust"), ties)


def lastfm(data_dir: str | None) -> Ratings:
    folder = Path(data_dir or ".") / "lastfm"
    frame = pd.read_csv(folder / "user_artists.dat", sep="\t")
    ratings = from_frame(frame, user="userID", item="artistID", rating=None, weight="weight", name="lastfm")
    ties = pd.read_csv(folder / "user_friends.dat", sep="\t", names=["user", "friend"])
    return _with_ties(ratings, ties)


def _with_ties(ratings: Ratings, ties: pd.DataFrame) -> Ratings:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "ties.csv"
        ties.to_csv(file, index=False)
        return with_friends(ratings, file)


DATA: dict[str, tuple[Callable[[str | None], Ratings], dict[str, dict[str, Any]]]] = {
    "ml-100k": (ml_100k, ORDERED),
    "filmtrust": (filmtrust, UNORDERED),
    "lastfm": (lastfm, {**UNORDERED, **COUNTED}),
    "cold": (ml_100k, COLD),
}


PANELS = {
    "ml-100k": "ML-100K, all items",
    "filmtrust": "FilmTrust, all items",
    "lastfm": "LastFM, all items",
    "cold": "ML-100K, items not seen",
}


def figures(rank: Callable[[Parts], dict[str, float]], parts: Parts) -> dict[str, float]:
    """All users' and those of the users with few training ratings, of ``rank(parts)``."""
    assert parts.held_out is not None
    assert parts.candidates is not None
    counts = torch.bincount(parts.training.user, minlength=parts.training.n_users)
    few = counts[parts.held_out.user] <= FEW
    values = rank(parts)
    found = {name: values[name] for name in ("hr@10", "ndcg@10", "full_ndcg@10")}
    found["few_users"] = int(few.sum())
    if few.any():
        gaps = None if parts.gaps is None else parts.gaps[few]
        some = replace(
            parts, held_out=parts.held_out.select(few), candidates=parts.candidates[few], gaps=gaps
        )
        of_few = rank(some)
        found |= {f"few_{name}": of_few[name] for name in ("ndcg@10", "full_ndcg@10")}
    return found


def peer(name: str, training: Ratings, seed: int) -> Fitted:
    if name not in SOURCED:
        return BASELINES[name].fit(training, seed, nearest_dataset(len(training)))
    baseline, settings = SOURCED[name]
    return baseline.fit_with(training, seed, settings)


def latest(ratings: Ratings, name: str, seed: int, settings: dict[str, Any] | None) -> dict[str, float]:
    """What is measured of a row: of a peer by its key, or of a change of the recipe."""
    parts = Parts.of(ratings, "leave-one-out", seed)
    if settings is None:
        score: Any = peer(name, parts.training, seed).score_items
        return figures(lambda some: evaluate_ranking(score, some, seed).metrics, parts)
    model = train_sequence(ratings, sequence_recipe(len(ratings), seed=seed, **settings)).trained.model
    return figures(lambda some: evaluate_sequences(model, some).metrics, parts)


def cold(ratings: Ratings, name: str, seed: int, settings: dict[str, Any] | None) -> dict[str, float]:
    """As :func:`latest`, of items that training has not seen; ranked among themselves."""
    drawn = np.random.default_rng((seed, 6)).permutation(ratings.n_items)
    is_cold = torch.zeros(ratings.n_items, dtype=torch.bool)
    is_cold[torch.from_numpy(drawn[: int(COLD_SHARE * ratings.n_items)])] = True
    held_out = is_cold[ratings.item]
    training = ratings.select(~held_out)
    if settings is None:
        score: Any = peer(name, training, seed).score_items
    else:
        config = sequence_recipe(len(training), seed=seed, split="none", **settings)
        score = train_sequence(training, config).trained.model.score_users

    def of_cold(users: Tensor) -> Tensor:
        return score(users).masked_fill(~is_cold, -torch.inf)

    found = ratings.select(held_out)
    values = full_ranking(
        of_cold, found.user, found.item, training.user, training.item, ratings.n_items
    ).metrics
    return {
        "hr@10": values["full_hr@10"],
        "ndcg@10": values["full_ndcg@10"],
        "recall@10": values["full_recall@10"],
    }


def rows_of(data: str) -> dict[str, dict[str, Any] | None]:
    peers: dict[str, dict[str, Any] | None] = dict.fromkeys(PEERS[data])
    return {**peers, **DATA[data][1]}


def measure_all(
    names: list[str], seeds: list[int], data_dir: str | None, validation: bool, results: Results
) -> None:
    title = "sources-validation" if validation else "sources"
    file = results.path(f"{title}.json")
    runs: dict[str, dict[str, Any]] = read_json(file)["runs"] if file.is_file() else {}
    for data in names:
        whole = DATA[data][0](data_dir)
        for seed in seeds:
            ratings = whole
            if validation:
                ratings = Parts.of(whole, "leave-one-out", seed).training
            for name, settings in rows_of(data).items():
                own = None if settings is None else sequence_recipe(len(ratings), **settings).to_dict()
                key = json.dumps([data, name, seed, own], sort_keys=True)
                if runs.get(key, {}).get("code") != results.code:
                    began = time.process_time()
                    measure = cold if data == "cold" else latest
                    found = measure(ratings, name, seed, settings)
                    runs = {old: run for old, run in runs.items() if not _is_replaced(old, data, name, seed)}
                    runs[key] = {**found, "cpu_seconds": time.process_time() - began, "code": results.code}
                    print(data, name, seed, runs[key], file=sys.stderr, flush=True)
                    results.write(title, {"rows": table(runs), "runs": runs}, markdown(table(runs)))


def _is_replaced(key: str, *row: str | int) -> bool:
    """Whether the run is of this data set, row and seed, whatever its settings."""
    return json.loads(key)[:3] == list(row)


def table(runs: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """The means over seeds, a row for each data set, name and settings; the peers first."""
    found: dict[str, list[dict[str, Any]]] = {}
    for key, values in runs.items():
        data, name, _, own = json.loads(key)
        found.setdefault(json.dumps([data, name, own]), []).append(values)
    rows = []
    for key, every in found.items():
        data, name, own = json.loads(key)
        means = {
            figure: statistics.fmean(v[figure] for v in every) for figure in every[0] if figure != "code"
        }
        rows.append({"data": data, "name": name, "settings": own, "seeds": len(every), **means})
    return sorted(rows, key=lambda row: row["settings"] is not None)


def markdown(rows: list[dict[str, Any]]) -> str:
    lines = ["# Sources of recipe sequence"]
    for data in dict.fromkeys(row["data"] for row in rows):
        some = [row for row in rows if row["data"] == data]
        shown = [figure for figure in FIGURES if any(figure in row for row in some)]
        lines += [
            "",
            f"## {data}",
            "",
            f"| sources | {' | '.join(shown)} | CPU s | seeds |",
            "|---|" + "---:|" * (len(shown) + 2),
        ]
        for row in some:
            cells = [f"{row[figure]:.4f}" if figure in row else "" for figure in shown]
            lines.append(
                f"| {row['name']} | {' | '.join(cells)} | {row['cpu_seconds']:.0f} | {row['seeds']} |"
            )
    return "\n".join(lines) + "\n"


def draw(results: Results) -> None:
    """sources.png: NDCG@10 of each row, among all items where there is that figure, a panel a data set."""
    rows = read_json(results.path("sources.json"))["rows"]
    names = list(dict.fromkeys(row["data"] for row in rows))
    figure = new_figure(8.6, 6.0, dpi=110)
    for axes, data in zip(figure.subplots(2, 2).flat, names, strict=True):
        some = [row for row in rows if row["data"] == data][::-1]
        values = [row.get("full_ndcg@10", row["ndcg@10"]) for row in some]
        colours = [BLUE if row["settings"] else GREY for row in some]
        bars = axes.barh([row["name"] for row in some], values, color=colours)
        axes.bar_label(bars, fmt="%.3f", fontsize=7, padding=2)
        axes.margins(x=0.18)
        axes.tick_params(labelsize=8)
        plain(axes, grid="x")
        axes.set_title(f"{PANELS[data]}: NDCG@10", loc="left", fontsize=9)
    write_figure(results.path("sources.png"), figure)


def main() -> None:
    options = parser(__doc__, data=True)
    options.add_argument("--seeds", type=int, nargs="+", default=[5, 6, 7])
    options.add_argument(
        "--only", nargs="+", choices=list(DATA), help="data sets; others are kept as they are"
    )
    options.add_argument("--draw", action="store_true", help="the picture of what is measured, and no more")
    options.add_argument("--validation", action="store_true", help="on a part of the training data")
    chosen = options.parse_args()
    torch.set_num_threads(1)
    results = open_results(chosen)
    if not chosen.draw:
        measure_all(chosen.only or list(DATA), chosen.seeds, chosen.data_dir, chosen.validation, results)
    if not chosen.validation:
        draw(results)


if __name__ == "__main__":
    main()

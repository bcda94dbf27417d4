"""Does a density of the recommender's embeddings know where it errs, what is novel, and who is new?

    python benchmarks/embeddings.py --data-dir DIR     15 minutes of 1 core

ML-100K, recipe best for ratings, 80 % of the data, seeds 0, 1 and 2; of 20 % of the users, drawn by the seed,
all but 5 training ratings are taken away before training, so that there are cold users whose errors are
known. Densities of the pairs' vectors x, and of the users' and the items' vectors alone: a normal
distribution, a mixture of Gaussians, and LU-Net as a flow, each fitted on training pairs (or on other users
and items) with the default settings of ``lunet-fast density train`` and stopped by a validation part; beside
them |x|² and the counts of training ratings. No setting was chosen here. Writes
benchmarks/results/embeddings.{json,md}.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from inversion import fitted_error, mean_of, spearman, trained
from lunet_fast.density.config import DensityConfig
from lunet_fast.density.data import Parts as DensityParts
from lunet_fast.density.data import Rows
from lunet_fast.density.evaluation import auroc
from lunet_fast.density.model import DensityModel, build_flow, whiten
from lunet_fast.density.preprocessing import Preprocessing
from lunet_fast.density.training import fit_flow
from lunet_fast.recsys.data import movielens
from lunet_fast.recsys.data.ratings import Ratings
from lunet_fast.recsys.evaluation.inversion import item_vectors, risk_coverage
from lunet_fast.recsys.measures.protocols import Parts
from lunet_fast.recsys.model.config import recipe
from lunet_fast.recsys.model.network import RatingModel
from lunet_fast.training.seeding import seeded
from machine import open_results, parser, where

SEEDS = (0, 1, 2)
COLD_SHARE = 0.2
FEW = 5
"""Training ratings that a cold user keeps, and at most those of a cold item."""
TABLE_MEMBERS = 4
TABLE_FOLDS = 3

FLOW = DensityConfig(activation="leaky_softplus", input_bins=0, weight_decay=0.2, steps=1500, patience=5)
SETTINGS = {
    "mixture": FLOW.replace(layers=1),
    "flow": FLOW,
}
LABELS = {
    "norm": "‖x‖², negative",
    "normal": "log p, normal",
    "mixture": "log p, 30 Gaussians",
    "flow": "log p, LU-Net flow",
    "counts": "log n, training ratings",
}


def with_cold_users(training: Ratings, seed: int) -> tuple[Ratings, Tensor]:
    """(the training part with FEW ratings of each cold user, which users are cold [n_users])."""
    generator = torch.Generator().manual_seed(seed)
    cold = torch.rand(training.n_users, generator=generator) < COLD_SHARE
    order = torch.randperm(len(training), generator=generator)
    user = training.user[order]
    # The place of each rating among its user's, in the drawn order.
    by_user = user.argsort(stable=True)
    starts = torch.bincount(user, minlength=training.n_users).cumsum(0).roll(1)
    starts[0] = 0
    place = torch.empty_like(by_user)
    place[by_user] = torch.arange(len(user)) - starts[user[by_user]]
    kept = order[~cold[user] | (place < FEW)]
    return training.select(kept.sort().values), cold


def fitted(kind: str, rows: Tensor, seed: int) -> Any:
    """log p of rows [B, D] as a function, by what was fitted on rows [N, D]."""
    if kind == "norm":
        return lambda x: -x.double().square().sum(-1)
    if kind == "normal":
        wide = rows.double()
        covariance = torch.cov(wide.mT)
        covariance += 1e-4 * covariance.diagonal().mean() * torch.eye(len(covariance), dtype=torch.float64)
        normal = torch.distributions.MultivariateNormal(wide.mean(0), covariance)
        return lambda x: normal.log_prob(x.double())
    config = SETTINGS[kind].replace(seed=seed)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    held_out = math.ceil(0.1 * len(rows))
    both = Rows("embeddings", rows)
    training, validation = both.where(order[held_out:]), both.where(order[:held_out])
    preprocessing = Preprocessing.of(training.values, None)
    with seeded(seed):
        flow = build_flow(config, rows.shape[1])
        whiten(flow, preprocessing.forward(training.values)[0])
    model = DensityModel(flow, preprocessing, rows.shape[1])
    # The test part is not looked at by fit_flow.
    with torch.enable_grad():
        model, _, _ = fit_flow(model, DensityParts(training, validation, validation), config)
    return lambda x: model.log_prob(x).double()


def pair_scores(model: RatingModel, training: Ratings, test: Ratings, seed: int) -> dict[str, Tensor]:
    """log p [N] of the test pairs, the mean over the members, by name."""
    histories = model.histories()
    x = model.embed(training.user, training.item, histories, True)
    x_test = model.embed(test.user, test.item, histories, None)
    return {
        kind: torch.stack(
            [
                fitted(kind, rows, seed)(rows_test)
                for rows, rows_test in progress(list(zip(x, x_test, strict=True)), f"pairs, {kind}")
            ]
        ).mean(0)
        for kind in ("norm", "normal", "mixture", "flow")
    }


def table_scores(vectors: Tensor, seed: int, what: str) -> dict[str, Tensor]:
    """log p [n] of each row of vectors [K, n, k] by what was fitted on the other folds; mean over members."""
    n = vectors.shape[1]
    fold = torch.randperm(n, generator=torch.Generator().manual_seed(seed)) % TABLE_FOLDS
    found = {}
    for kind in ("norm", "normal", "mixture", "flow"):
        scores = torch.zeros(n, dtype=torch.float64)
        for rows in progress(list(vectors[:TABLE_MEMBERS]), f"{what}, {kind}"):
            for each in range(TABLE_FOLDS):
                scores[fold == each] += fitted(kind, rows[fold != each], seed)(rows[fold == each])
        found[kind] = scores / TABLE_MEMBERS
    return found


def progress(items: list[Any], what: str) -> Iterator[Any]:
    for index, item in enumerate(items):
        print(f"\r{what}: {index + 1} of {len(items)}   ", end="", file=sys.stderr, flush=True)
        yield item
    print(file=sys.stderr)


def mean_error(index: Tensor, error: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """(mean of the errors of each index [size], how many they are [size])."""
    count = torch.bincount(index, minlength=size)
    total = torch.zeros(size, dtype=torch.float64).index_add_(0, index, error.double())
    return total / count.clamp(min=1), count


def measured(ratings: Ratings, seed: int) -> dict[str, Any]:
    config = recipe("best", len(ratings), seed=seed, split="random", mlp=False)
    parts = Parts.of(ratings, config.split, config.seed)
    training, cold_user = with_cold_users(parts.training, seed)
    test = parts.test
    assert test is not None
    print(f"seed {seed}: training", file=sys.stderr, flush=True)
    model = trained(config, replace(parts, training=training))
    with torch.no_grad():
        seen = model.interactions
        error = (model(test.user, test.item).clamp(*test.scale) - test.rating).square()
        user_counts, item_counts = seen.user_counts.double(), seen.item_counts.double()
        log_user, log_item = (counts.clamp(min=0.5).log() for counts in (user_counts, item_counts))
        cold_item = item_counts <= FEW
        of_cold_user, of_cold_item = cold_user[test.user], cold_item[test.item]
        warm = ~of_cold_user & ~of_cold_item

        scores = pair_scores(model, training, test, seed)
        scores["counts"] = log_user[test.user] + log_item[test.item]
        counts = [log_user[test.user], log_item[test.item]]
        pairs = {
            name: {
                "area": float(risk_coverage(score, error).mean()),
                "area_with_counts": float(
                    risk_coverage(
                        -fitted_error(counts if name == "counts" else [*counts, score], error, test.user),
                        error,
                    ).mean()
                ),
                "spearman_error": spearman(score, error),
                "spearman_error_cold_users": spearman(score[of_cold_user], error[of_cold_user]),
                "spearman_error_cold_items": spearman(score[of_cold_item], error[of_cold_item]),
                "spearman_popularity": spearman(score, log_item[test.item]),
                "auroc_cold_users": auroc(score[warm], score[of_cold_user & ~of_cold_item]),
                "auroc_cold_items": auroc(score[warm], score[of_cold_item & ~of_cold_user]),
            }
            for name, score in scores.items()
        }
        sides = {}
        k = config.embedding_size
        histories = model.histories()
        nothing = torch.zeros(training.n_users, dtype=torch.int64)
        users = model.embed(torch.arange(training.n_users), nothing, histories, False)[..., :k]
        for side, vectors, index, logs, cold in (
            ("users", users, test.user, log_user, cold_user),
            ("items", item_vectors(model, histories), test.item, log_item, cold_item),
        ):
            of_side = table_scores(vectors, seed, side)
            of_side["counts"] = logs
            mean, count = mean_error(index, error, len(logs))
            known = count >= 5
            sides[side] = {
                name: {
                    "spearman_error": spearman(score[known], mean[known]),
                    "spearman_count": spearman(score, logs),
                    "auroc_cold": auroc(score[~cold], score[cold]),
                }
                for name, score in of_side.items()
            }
        group_mse = {
            name: float(error[of].double().mean())
            for name, of in (("warm", warm), ("cold users", of_cold_user), ("cold items", of_cold_item))
        }
        shares = {
            "cold_users": int(cold_user.sum()),
            "cold_items": int(cold_item.sum()),
            "pairs_of_cold_users": int(of_cold_user.sum()),
            "pairs_of_cold_items": int(of_cold_item.sum()),
        }
    return {"mse": float(error.double().mean()), **shares, "groups": group_mse, "pairs": pairs, **sides}


def markdown(results: dict[str, Any]) -> str:
    mean, runs = results["mean"], results["runs"]

    def cell(row: dict[str, float], name: str, sign: str = "+") -> str:
        return f"{row[name]:{sign}.3f}"

    lines = [
        "# Does a density of the embeddings know error, novelty and cold start?",
        "",
        f"ML-100K, recipe `best`, means of seeds {', '.join(map(str, results['seeds']))}; "
        f"{where(results)}, {results['cpu_seconds']} s of processor time. "
        f"{100 * COLD_SHARE:.0f} % of the users ({mean['cold_users']:.0f}) kept {FEW} training ratings; "
        f"{mean['cold_items']:.0f} items have {FEW} or fewer. Test MSE {mean['mse']:.4f}: "
        f"{mean['groups']['warm']:.3f} where both are warm, {mean['groups']['cold users']:.3f} of cold users "
        f"({mean['pairs_of_cold_users']:.0f} pairs), {mean['groups']['cold items']:.3f} of cold items "
        f"({mean['pairs_of_cold_items']:.0f} pairs).",
        "",
        "## Pairs: x = [user's half; item's half]",
        "",
        "Every score is higher where a pair is more usual. Area: the mean over all shares kept of the MSE of "
        "the pairs with the highest score, lower is better; *with counts* is that of an error fitted on the "
        "other half of the users from log n_u, log n_i and the score. ρ: Spearman's rank correlation, with "
        "the squared error (below 0 where the score knows it) and with the item's number of training "
        "ratings. AUROC: the probability that a warm pair scores above a cold one; 0.5 knows nothing, and "
        "below 0.5 cold ones are thought more usual.",
        "",
        "| score | area | with counts | ρ error | ρ error, cold users | ρ error, cold items | ρ popularity | "
        "AUROC, cold users | AUROC, cold items |",
        "|---" * 9 + "|",
    ]
    for name, label in LABELS.items():
        row = mean["pairs"][name]
        cells = [f"{row['area']:.4f}", f"{row['area_with_counts']:.4f}"]
        cells += [
            cell(row, each)
            for each in (
                "spearman_error",
                "spearman_error_cold_users",
                "spearman_error_cold_items",
                "spearman_popularity",
            )
        ]
        cells += [cell(row, each, "") for each in ("auroc_cold_users", "auroc_cold_items")]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "Area by seed: "
        + "; ".join(
            f"{LABELS[name]} " + " ".join(f"{run['pairs'][name]['area']:.4f}" for run in runs)
            for name in LABELS
        )
        + ".",
        "",
        "## Users' vectors alone, items' vectors alone",
        "",
        f"Scored by what was fitted on the other two thirds of the users, or items, {TABLE_MEMBERS} members. "
        "ρ error: with the mean squared error of the user's, or item's, test pairs, where there are 5 of "
        "them.",
        "",
        "| score | users: ρ error | ρ count | AUROC, cold | items: ρ error | ρ count | AUROC, cold |",
        "|---" * 7 + "|",
    ]
    for name, label in LABELS.items():
        cells = []
        for side in ("users", "items"):
            row = mean[side][name]
            cells += [cell(row, "spearman_error"), cell(row, "spearman_count"), cell(row, "auroc_cold", "")]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    options = parser(__doc__, data=True).parse_args()
    written = open_results(options, threads=1)
    began = time.process_time()
    ratings = movielens.load("ml-100k", options.data_dir)
    runs = [measured(ratings, seed) for seed in SEEDS]
    results = {
        "cpu_seconds": round(time.process_time() - began),
        "seeds": list(SEEDS),
        "mean": mean_of(runs),
        "runs": runs,
    }
    text = markdown({"machine": written.machine, "command": written.command, **results})
    written.write("embeddings", results, text)
    print(text)


if __name__ == "__main__":
    main()

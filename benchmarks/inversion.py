"""What the inverse of the network is good for in a recommender, each use beside the same without the network.

    python benchmarks/inversion.py --data-dir DIR     6 minutes of 1 core on a busy machine

ML-100K. Recovery of embeddings from z, density of a pair as confidence and as novelty, and items solved for
backwards from a wanted score (lunet_fast/recsys/evaluation/inversion.py). Trains recipe best for ratings on
80 % of the data with seeds 0, 1 and 2, and for ratings and for interactions with each user's last one held
out, seed 0; each of them a second time with f held at the identity. Writes
benchmarks/results/inversion.{json,md,png}.
"""

from __future__ import annotations

import statistics
import sys
import time
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from inversion_report import DENSITY, PLAIN, figure, markdown
from lunet_fast import LeakySoftplus, LUNet
from lunet_fast.layers.flow import LUFlow
from lunet_fast.recsys.data import movielens
from lunet_fast.recsys.data.features import side_features
from lunet_fast.recsys.data.ratings import Ratings
from lunet_fast.recsys.evaluation.inversion import PairDensity, item_vectors, items_for_score, risk_coverage
from lunet_fast.recsys.measures import metrics
from lunet_fast.recsys.measures.protocols import Parts
from lunet_fast.recsys.model.config import TrainConfig, recipe
from lunet_fast.recsys.model.negatives import NegativeSampler
from lunet_fast.recsys.model.network import RatingModel
from lunet_fast.recsys.model.scoring import ItemScorer
from lunet_fast.recsys.model.training import rating_objective, rating_optimizer
from lunet_fast.training.loop import descend
from machine import open_results, parser

SEEDS = (0, 1, 2)
LIKED = 4.0
FLOW_STEPS = 600


def trained(config: TrainConfig, parts: Parts, *, identity: bool = False) -> RatingModel:
    """Trained in the steps of ``lunet-fast train``; ``identity`` holds f at x -> x."""
    part = parts.training
    features = side_features(part) if config.side_features else (None, None)
    torch.manual_seed(config.seed)
    model = RatingModel(
        config.replace(network="identity") if identity else config,
        *(part.user, part.item, part.rating, part.n_users, part.n_items),
        user_features=features[0],
        item_features=features[1],
    )
    sampler = NegativeSampler.of(model, parts.known_pairs()) if config.gamma < 1 else None
    optimizer, generator = rating_optimizer(model), torch.Generator().manual_seed(config.seed)
    rates = [group["lr"] for group in optimizer.param_groups]
    steps = config.epochs * -(-len(part) // config.batch_size)
    step = 0
    for _ in range(config.epochs):
        for rows in torch.randperm(len(part), generator=generator).split(config.batch_size):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * (1 - step / steps)
            batch = part.user[rows], part.item[rows], part.rating[rows]
            descend(optimizer, rating_objective(model, *batch, generator, sampler).objective)
            step += 1
    return model.requires_grad_(False)


# 1. Recovery ------------------------------------------------------------------------------------------------


def recovery(model: RatingModel, users: Tensor, items: Tensor) -> dict[str, float]:
    """How exactly x, and the user's and the item's halves of it, come back from z of the pairs."""
    values = {}
    wide = RatingModel.from_state(
        model.config, model.state_dict(), model.interactions.n_users, model.interactions.n_items
    ).double()
    for name, each in (("float32", model), ("float64", wide.requires_grad_(False))):
        x, z = each.latent(users, items)
        back = each.inverse(z)
        error = (back - x).square().sum(-1)
        values[f"relative_{name}"] = float(error.mean() / x.square().sum(-1).mean())
        values[f"largest_{name}"] = float((error / x.square().sum(-1)).max().sqrt())
        k = x.shape[-1] // 2
        for side, part in (("user", slice(None, k)), ("item", slice(k, None))):
            of_side = (back - x)[..., part].square().sum(-1) / x[..., part].square().sum(-1)
            values[f"largest_{side}_{name}"] = float(of_side.max().sqrt())
        if name == "float32":
            halves = each.embed(
                torch.arange(each.interactions.n_users),
                torch.zeros(each.interactions.n_users, dtype=torch.int64),
                each.histories(),
                False,
            )[..., :k]
            for what, vectors in (("recovered", back), ("z", z)):
                found = torch.cdist(
                    *(v.transpose(0, 1).flatten(1) for v in (vectors[..., :k], halves))
                ).argmin(1)
                values[f"user_named_by_{what}"] = float((found == users).double().mean())
    return values


# 2. Confidence ----------------------------------------------------------------------------------------------


def spearman(a: Tensor, b: Tensor) -> float:
    ranks = [pd.Series(side.double().numpy()).rank().to_numpy() for side in (a, b)]
    return float(np.corrcoef(*ranks)[0, 1])


def flow_log_prob(density: PairDensity, x: Tensor, x_test: Tensor, seed: int) -> Tensor:
    """log p of x_test ``[B, D]``, one member's, by a flow trained on x ``[N, D]``; ``density`` is of x.

    The flow starts near the normal distribution ``density``, whose whitening comes first.
    """
    torch.manual_seed(seed)
    D = x.shape[-1]
    whiten = torch.linalg.inv(density.cholesky[0])
    data, test = (((v.double() - density.mean[0]) @ whiten.T).float() for v in (x, x_test))
    flow = LUFlow(LUNet(D, 3, LeakySoftplus(0.5)))
    optimizer = torch.optim.Adam(flow.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / FLOW_STEPS)
    with torch.enable_grad():
        for _ in range(FLOW_STEPS):
            loss = -flow.log_prob(data[torch.randint(len(data), (512,))]).mean() / D
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(flow.parameters(), 5.0)
            optimizer.step()
            schedule.step()
    return flow.log_prob(test).double() + whiten.diagonal().log().sum()


def fitted_error(features: list[Tensor], error: Tensor, users: Tensor) -> Tensor:
    """The error as a linear function of the features' ranks and their squares, fitted on the other users."""
    columns = [torch.ones(len(error), dtype=torch.float64)]
    for feature in features:
        rank = torch.from_numpy(pd.Series(feature.double().numpy()).rank(pct=True).to_numpy(copy=True)) - 0.5
        columns += [rank, rank.square()]
    table, found = torch.stack(columns, 1), torch.empty(len(error), dtype=torch.float64)
    for half in (users % 2 == 0, users % 2 == 1):
        weights = torch.linalg.lstsq(
            table[~half], error[~half].double().unsqueeze(1), rcond=1e-6, driver="gelsd"
        ).solution
        found[half] = (table[half] @ weights).squeeze(1)
    return found


def confidences(model: RatingModel, parts: Parts) -> tuple[dict[str, Tensor], Tensor]:
    """(confidence of each test prediction by name, higher is surer; its squared error)."""
    training, test = parts.training, parts.test
    assert test is not None
    seen = model.interactions
    output = model.output(test.user, test.item)
    assert output.score is not None
    rating = model(test.user, test.item)
    error = (rating.clamp(*test.scale) - test.rating).square()
    count = seen.user_counts.clamp(min=1)
    zero = torch.zeros(training.n_users)
    mean = zero.index_add(0, training.user, training.rating) / count
    deviation = (training.rating - mean[training.user]).square()
    variance = zero.index_add(0, training.user, deviation) / count
    low, high = test.scale
    counts = [
        side.double().clamp(min=0.5).log()
        for side in (seen.user_counts[test.user], seen.item_counts[test.item])
    ]
    of_z, of_x = PairDensity.fit(model), PairDensity.fit(model, space="input")
    found = {
        "spread": -output.score.std(0),
        "user variance": -variance[test.user],
        "ends": -torch.minimum(rating - low, high - rating),
        "|x|²": -output.x.square().sum(-1).mean(0),
        "|z|²": -output.z.square().sum(-1).mean(0),
        "counts": counts[0] + counts[1],
        "log p": of_z.log_prob(test.user, test.item),
        "log p, x": of_x.log_prob(test.user, test.item),
    }
    x = model.embed(training.user, training.item, of_x.histories, True)
    flows = []
    for member, (each, each_test) in enumerate(zip(x, output.x, strict=True)):
        of_member = replace(of_x, mean=of_x.mean[member, None], cholesky=of_x.cholesky[member, None])
        flows.append(flow_log_prob(of_member, each, each_test, model.config.seed))
    found["flow"] = torch.stack(flows).mean(0)
    plain = [*(found[name] for name in PLAIN if name != "counts"), *counts]
    found["plain together"] = -fitted_error(plain, error, test.user)
    for name in DENSITY:
        found[f"plain and {name}"] = -fitted_error([*plain, found[name]], error, test.user)
    return found, error


def summary(found: dict[str, Tensor], error: Tensor, popularity: Tensor) -> dict[str, dict[str, float]]:
    values = {}
    for name, confidence in found.items():
        curve = risk_coverage(confidence, error)
        at = {share: float(curve[round(share / 100 * len(curve)) - 1]) for share in (50, 80)}
        values[name] = {
            "area": float(curve.mean()),
            "mse_50": at[50],
            "mse_80": at[80],
            "spearman_error": spearman(confidence, error),
            "spearman_popularity": spearman(confidence, popularity),
        }
    return values


# 3. Backwards -----------------------------------------------------------------------------------------------


def hits(model: RatingModel, users: Tensor, wanted: list[float]) -> list[dict[str, float]]:
    """How exactly a wanted rating is hit from the mean item, and how far the item moves for it."""
    histories = model.histories()
    rated = model.interactions.item_counts > 0
    mean = item_vectors(model, histories)[:, rated].mean(1, keepdim=True)
    rows = []
    for goal in wanted:
        found = items_for_score(model, histories, users, goal, 1, readout="rating")
        off = (found.score - goal).abs()
        rows.append(
            {
                "wanted": goal,
                "largest_miss": float(off.max()),
                "within_1e-5": float((off <= 1e-5).double().mean()),
                "moved": float((found.vector - mean).norm(dim=-1).mean()),
                "user_moved_by_inverse": _user_moved(model, users, mean, goal),
            }
        )
    return rows


def _user_moved(model: RatingModel, users: Tensor, item: Tensor, goal: float) -> float:
    """The other way: the z nearest to the pair's with the wanted rating, then x = f^-1(z).

    Returns the share of |change of x|² that falls on the user's half, which a query must not touch.
    """
    k, seen = model.config.embedding_size, model.interactions
    user = model.embed(users, torch.zeros_like(users), model.histories(), False)[..., :k]
    x = torch.cat((user, item.expand_as(user)), -1)
    start = model.network(x)
    assert model.weight is not None
    assert model.intercept is not None
    offset = model.mean + torch.zeros_like(start[..., 0])
    if model.user_bias is not None and model.item_bias is not None:
        offset = offset + model.user_bias[users].t() + model.item_bias[seen.item_counts > 0].mean(0)[:, None]
    z = start.clone()
    for _ in range(30):
        z_user, z_item = z.chunk(2, -1)
        gradient = model.weight.unsqueeze(1) + torch.cat((z_item, z_user), -1)
        missing = goal - offset - model._read_out(z, model.weight, model.intercept, slice(None))
        length = missing + (gradient * (z - start)).sum(-1)
        z = start + gradient * (length / gradient.square().sum(-1)).unsqueeze(-1)
    change = (model.inverse(z) - x).square()
    return float(change[..., :k].sum() / change.sum())


def _distances(found: Any, n_items: int) -> Tensor:
    """Minus each item's distance from the vector solved for, ``[U, n_items]``; -inf for those left out."""
    table = torch.full((len(found.items), n_items + 1), -torch.inf)
    return table.scatter_(1, found.items.clamp(min=-1) % (n_items + 1), -found.distance)[:, :n_items]


def _mean_liked(model: RatingModel, training: Ratings) -> Tensor:
    """The mean vector ``[n_users, K k]`` of the items that each user liked in training."""
    vectors = item_vectors(model, model.histories()).transpose(0, 1).flatten(1)
    liked = training.rating >= LIKED
    users, items = training.user[liked], training.item[liked]
    total = torch.zeros(training.n_users, vectors.shape[1]).index_add_(0, users, vectors[items])
    return total / torch.bincount(users, minlength=training.n_users).clamp(min=1).unsqueeze(1)


def choices(model: RatingModel, parts: Parts, seed: int) -> dict[str, float]:
    """The rating that users gave to the one of their test items which a method puts first: the mean.

    Users with at least two test items and a liked item in training; no method knows which are rated how.
    """
    training, test, histories = parts.training, parts.test, model.histories()
    assert test is not None
    seen, n_items = model.interactions, training.n_items
    rated = seen.item_counts[test.item] > 0
    user, item, rating = test.user[rated], test.item[rated], test.rating[rated]
    liked = training.rating >= LIKED
    able = torch.bincount(user, minlength=training.n_users) >= 2
    able &= torch.bincount(training.user[liked], minlength=training.n_users) > 0
    users = torch.where(able)[0]
    kept = able[user]
    user, item, rating = user[kept], item[kept], rating[kept]
    row = torch.searchsorted(users, user)
    # One liked training item of each user, drawn: what "more like this" starts from.
    order = torch.randperm(int(liked.sum()), generator=torch.Generator().manual_seed(seed))
    given = torch.zeros(training.n_users, dtype=torch.int64)
    given[training.user[liked][order]] = training.item[liked][order]
    given = given[users]

    vectors = item_vectors(model, histories).transpose(0, 1).flatten(1)
    total = torch.zeros(n_items).index_add_(0, training.item, training.rating - training.rating.mean())
    from_mean, from_given = (
        _distances(items_for_score(model, histories, users, 5.0, n_items, near=near), n_items)[row, item]
        for near in (None, given)
    )
    methods = {
        "predicted rating": model(user, item, histories),
        "nearest to the item solved for, from the mean item": from_mean,
        "nearest to the mean of the liked items": -torch.cdist(_mean_liked(model, training)[users], vectors)[
            row, item
        ],
        "nearest to the item solved for, from a liked item": from_given,
        "nearest to that liked item": -torch.cdist(vectors[given], vectors)[row, item],
        "the item's mean rating": (total / (seen.item_counts + 10))[item],
        "at random": torch.rand(len(user), generator=torch.Generator().manual_seed(seed)),
        "the best there is": rating,
    }
    values = {}
    for name, score in methods.items():
        best = torch.zeros(len(users)).scatter_reduce(0, row, score, "amax", include_self=False)
        # Equal ones share the choice.
        first = (score == best[row]).double()
        each = torch.zeros(len(users), dtype=torch.float64).index_add_(0, row, first * rating.double())
        values[name] = float((each / torch.zeros_like(each).index_add_(0, row, first)).mean())
    return values


def held_out_rates(model: RatingModel, parts: Parts, wanted: float | None) -> dict[str, Any]:
    """Share of users whose held-out liked item is among the first 10, or 50, of all items not seen.

    ``wanted`` None asks for the highest score that any item has for the user.
    """
    training, held_out, histories = parts.training, parts.held_out, model.histories()
    assert held_out is not None
    seen, n_items = model.interactions, training.n_items
    liked = (held_out.rating >= LIKED) & (seen.item_counts[held_out.item] > 0)
    users, items = held_out.user[liked], held_out.item[liked]
    scores = ItemScorer(model, histories).scores(users)
    left_out = seen.of_users(users)
    scores[left_out] = -torch.inf
    goal = scores.max(1).values if wanted is None else wanted
    vectors = item_vectors(model, histories).transpose(0, 1).flatten(1)
    methods = {
        "score": scores,
        "nearest to the item solved for": _distances(
            items_for_score(model, histories, users, goal, n_items), n_items
        ),
        "nearest to the mean of the liked items": -torch.cdist(_mean_liked(model, training)[users], vectors),
        "popularity": seen.item_counts.float().expand(len(users), -1),
    }
    values: dict[str, dict[str, float]] = {}
    for name, score in methods.items():
        table = score.clone()
        table[:, seen.item_counts == 0] = -torch.inf
        table[left_out] = -torch.inf
        rank = metrics.ranks(table.gather(1, items.unsqueeze(1)).squeeze(1), table).mean - 0.5
        values[name] = {f"hr@{k}": float((rank <= k).double().mean()) for k in (10, 50)}
    return {"users": len(users), "rates": values}


# All of it --------------------------------------------------------------------------------------------------


def mean_of(rows: list[Any]) -> Any:
    """The mean of numbers that lie at the same place in nested dictionaries and lists."""
    if isinstance(rows[0], dict):
        return {name: mean_of([row[name] for row in rows]) for name in rows[0]}
    if isinstance(rows[0], list):
        return [mean_of(list(parts)) for parts in zip(*rows, strict=True)]
    return statistics.fmean(rows)


def measured(ratings: Ratings) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(all figures, the risk-coverage curves by name, means over the seeds)."""
    runs: list[dict[str, Any]] = []
    curves: list[dict[str, Tensor]] = []
    for seed in SEEDS:
        config = recipe("best", len(ratings), seed=seed, split="random", mlp=False)
        parts = Parts.of(ratings, config.split, config.seed)
        test = parts.test
        assert test is not None
        run: dict[str, Any] = {}
        for name in ("LU-Net", "identity"):
            print(f"seed {seed}, {name}", file=sys.stderr, flush=True)
            model = trained(config, parts, identity=name == "identity")
            with torch.no_grad():
                popularity = model.interactions.item_counts[test.item]
                users = torch.where(model.interactions.user_counts > 0)[0]
                found, error = confidences(model, parts)
                run[name] = {
                    "test_mse": float(error.double().mean()),
                    "confidence": summary(found, error, popularity),
                    "perfect_area": float(risk_coverage(-error, error).mean()),
                    "nats_a_coordinate": {
                        each: float(found[each].mean()) / (2 * config.embedding_size) for each in DENSITY
                    },
                    "choices": choices(model, parts, seed),
                }
                if name == "LU-Net":
                    run[name]["recovery"] = recovery(model, test.user, test.item)
                    vectors = item_vectors(model, model.histories())
                    run[name]["item_norm"] = float(vectors.norm(dim=-1).mean())
                    run[name]["hits"] = hits(model, users, [1.0, 2.0, 3.0, 4.0, 5.0])
                    curves.append({each: risk_coverage(c, error) for each, c in found.items()})
        runs.append(run)
    held_out: dict[str, Any] = {}
    for kind, gamma, wanted in (("ratings", 1.0, 5.0), ("interactions", 0.0, None)):
        config = recipe("best", len(ratings), gamma=gamma, split="leave-one-out", mlp=False)
        if gamma == 0:
            # Half of the recipe's members and of their size, for time.
            config = config.replace(negatives_outside="training", members=2, embedding_size=32)
        parts = Parts.of(ratings, config.split, config.seed)
        for name in ("LU-Net", "identity"):
            print(f"held out, {kind}, {name}", file=sys.stderr, flush=True)
            model = trained(config, parts, identity=name == "identity")
            with torch.no_grad():
                held_out.setdefault(kind, {})[name] = held_out_rates(model, parts, wanted)
    results = {"seeds": list(SEEDS), "mean": mean_of(runs), "runs": runs, "held_out": held_out}
    return results, {name: torch.stack([c[name] for c in curves]).mean(0) for name in curves[0]}


def main() -> None:
    options = parser(__doc__, data=True).parse_args()
    written = open_results(options, threads=1)
    began, began_cpu = time.perf_counter(), time.process_time()
    results, curves = measured(movielens.load("ml-100k", options.data_dir))
    results = {
        "seconds": round(time.perf_counter() - began),
        "cpu_seconds": round(time.process_time() - began_cpu),
        **results,
    }
    text = markdown({"machine": written.machine, "command": written.command, **results})
    written.write("inversion", results, text)
    figure(written.path("inversion.png"), curves)
    print(text)


if __name__ == "__main__":
    main()

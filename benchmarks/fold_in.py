"""New users from 1, 5, 10 and 20 ratings, without training anew: how good are they?

    python benchmarks/fold_in.py --data-dir DIR

A fifth of ML-100K's users is taken out of training. Each is folded in from the first n of its ratings, in a
random order, and tested on those after the 20th, the same for every n. Beside it: what is known without a
model, and the model trained again with the n ratings of every left-out user in it. For ranking, the item at
place 21 is to be found among 100 that the user never rated, and all from place 21 on among all items.

Ratings: recipe best with 4 members; ranking: gamma 0 with 1 member and k = 32, so that all of it takes two
minutes on a core. Writes benchmarks/results/fold-in.json and .md.
"""

from __future__ import annotations

import dataclasses
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lunet_fast.recsys.data import movielens
from lunet_fast.recsys.data.ratings import Ratings
from lunet_fast.recsys.measures import metrics
from lunet_fast.recsys.serving.fold_in import METHODS
from lunet_fast.recsys.serving.recommend import LUNetRecommender
from machine import open_results, parser

GIVEN = (1, 5, 10, 20)
MOST = max(GIVEN)
SEED = 0
RATING: dict[str, Any] = {"members": 4}
RANKING: dict[str, Any] = {"gamma": 0.0, "members": 1, "embedding_size": 32}


class User(NamedTuple):
    """A left-out user: its rows in a random order, and 100 items that it never rated."""

    index: int
    rows: Tensor
    candidates: Tensor


def left_out_users(ratings: Ratings) -> tuple[Tensor, list[User]]:
    """Who is left out of training, bool ``[n_users]``, and those of them that are tested.

    Tested is who has more than MOST ratings of items that others rated.
    """
    order = np.random.default_rng((SEED, 77)).permutation(ratings.n_users)
    out = torch.zeros(ratings.n_users, dtype=torch.bool)
    out[torch.from_numpy(order[: round(0.2 * ratings.n_users)])] = True
    trained = torch.bincount(ratings.item[~out[ratings.user]], minlength=ratings.n_items) > 0
    users = []
    for index in out.nonzero().squeeze(1).tolist():
        rng = np.random.default_rng((SEED, index))
        rows = torch.where((ratings.user == index) & trained[ratings.item])[0]
        if len(rows) > MOST:
            rows = rows[torch.from_numpy(rng.permutation(len(rows)))]
            others = np.setdiff1d(trained.nonzero().squeeze(1).numpy(), ratings.item[rows].numpy())
            users.append(User(index, rows, torch.from_numpy(rng.choice(others, 100, replace=False))))
    return out, users


def squared_error(predict: Callable[[User, int], Any], users: list[User], ratings: Ratings, n: int) -> float:
    """MSE over the ratings after the 20th of all users, clipped to the scale."""
    found = torch.cat([torch.as_tensor(predict(user, n)) for user in users]).clamp(*ratings.scale)
    wanted = torch.cat([ratings.rating[user.rows[MOST:]] for user in users])
    return metrics.mse(found, wanted)


def ranked(
    scores: Callable[[User, int], Tensor], users: list[User], ratings: Ratings, n: int
) -> dict[str, float]:
    """HR@10 and NDCG@10 among 100 candidates, and NDCG@10 among all items, of ``scores`` ``[n_items]``."""
    places, gains = [], []
    for user in users:
        score, items = scores(user, n), ratings.item[user.rows]
        places.append(metrics.ranks(score[items[MOST]].view(1), score[user.candidates].unsqueeze(0)))
        score = score.clone()
        score[items[:MOST]] = -torch.inf  # the same items to choose from whatever n is
        wanted = score[items[MOST:]]
        rows = torch.zeros(len(wanted), dtype=torch.int64)
        ranks = metrics.ranks_of_several(wanted, rows, score.sort(descending=True).values.unsqueeze(0))
        gains.append(float(metrics.ndcg(ranks, rows, 10)))
    rank, pair = metrics.Ranks.cat(places), torch.arange(len(users))
    return {
        "hr@10": float(metrics.hit_rate(rank, pair, 10).mean()),
        "ndcg@10": float(metrics.ndcg(rank, pair, 10).mean()),
        "full_ndcg@10": statistics.fmean(gains),
    }


def rating_rows(ratings: Ratings, out: Tensor, users: list[User]) -> list[dict[str, Any]]:
    """MSE of each way and n."""
    known = ~out[ratings.user]
    recommender = LUNetRecommender("best", SEED, **RATING).fit(ratings.select(known))
    model = recommender.trained.model
    ids = ratings.items.ids

    def biases(user: User, n: int) -> Tensor:
        items, given = ratings.item[user.rows], ratings.rating[user.rows[:n]]
        item = model.mean + model.item_deviation[items]
        return item[MOST:] + (given - item[:n]).sum() / (n + 5)

    def fall_back(user: User, n: int) -> Tensor:
        given = ratings.rating[user.rows[:n]]
        item = model.mean + model.item_deviation[ratings.item[user.rows[MOST:]]]
        return item + (given - model.mean).sum() / (n + 10)

    def folded(method: str) -> Callable[[User, int], Any]:
        def predict(user: User, n: int) -> Any:
            items = ids[ratings.item[user.rows].numpy()]
            given = dict(zip(items[:n].tolist(), ratings.rating[user.rows[:n]].tolist(), strict=True))
            return recommender.fold_in(given, method=method).predict(items[MOST:])

        return predict

    ways = {"mean + d_user + d_item": fall_back, "item mean + user's mean residual": biases}
    ways |= {f"fold_in, {method}": folded(method) for method in METHODS}
    table = []
    for name, predict in ways.items():
        began = time.perf_counter()
        row: dict[str, Any] = {"way": name}
        row |= {f"mse_{n}": squared_error(predict, users, ratings, n) for n in GIVEN}
        row["ms_per_user"] = (time.perf_counter() - began) / (len(users) * len(GIVEN)) * 1000
        table.append(row)
        print(row, file=sys.stderr, flush=True)

    again: dict[str, Any] = {"way": "trained again with the n ratings"}
    for n in GIVEN:
        rows = torch.cat([known.nonzero().squeeze(1), *(user.rows[:n] for user in users)])
        new = LUNetRecommender("best", SEED, **RATING).fit(ratings.select(rows))

        def retrained(user: User, n: int, new: LUNetRecommender = new) -> Any:
            items = ids[ratings.item[user.rows[MOST:]].numpy()]
            return new.predict(ratings.users.ids[user.index], items)

        again[f"mse_{n}"] = squared_error(retrained, users, ratings, n)
    print(again, file=sys.stderr, flush=True)
    return [*table, again]


def ranking_rows(ratings: Ratings, out: Tensor, users: list[User]) -> list[dict[str, Any]]:
    """HR@10 and NDCG@10 of each way and n."""
    recommender = LUNetRecommender("best", SEED, **RANKING).fit(ratings.select(~out[ratings.user]))
    model = recommender.trained.model
    cold = model.interactions.item_counts == 0
    popularity = model.popularity().masked_fill(cold, -torch.inf)
    ids = ratings.items.ids

    def folded(method: str) -> Callable[[User, int], Tensor]:
        def scores(user: User, n: int) -> Tensor:
            items = ids[ratings.item[user.rows[:n]].numpy()].tolist()
            logits = torch.from_numpy(recommender.fold_in(items, method=method).score(ids))
            return logits.masked_fill(cold, -torch.inf)

        return scores

    ways: dict[str, Callable[[User, int], Tensor]] = {"popularity": lambda user, n: popularity}
    ways |= {f"fold_in, {method}": folded(method) for method in METHODS}
    table = []
    for name, scores in ways.items():
        began = time.perf_counter()
        row: dict[str, Any] = {"way": name}
        for n in GIVEN:
            row |= {f"{key}_{n}": value for key, value in ranked(scores, users, ratings, n).items()}
        row["ms_per_user"] = (time.perf_counter() - began) / (len(users) * len(GIVEN)) * 1000
        table.append(row)
        print(row, file=sys.stderr, flush=True)
    return table


def markdown(rating: list[dict[str, Any]], ranking: list[dict[str, Any]], users: int) -> str:
    head = " | ".join(f"n = {n}" for n in GIVEN)
    lines = [
        "# New users folded in from n ratings, ML-100K",
        "",
        f"{users} users whom training has not seen, each known by n ratings; one seed. MSE, in stars²: of "
        "all ratings after the 20th. Among 100 candidates one item is relevant, the 21st; among all items "
        "every one after the 20th is, often dozens, so that the two NDCG do not compare.",
    ]
    tables = [("MSE, stars²", "mse", rating)]
    tables += [
        (title, key, ranking)
        for title, key in (
            ("HR@10 among 100 candidates, one relevant", "hr@10"),
            ("NDCG@10 among 100 candidates, one relevant", "ndcg@10"),
            ("NDCG@10 among all items, all after the 20th relevant", "full_ndcg@10"),
        )
    ]
    for title, key, rows in tables:
        lines += ["", f"| {title} | {head} | ms a user |", "|---|" + "---|" * (len(GIVEN) + 1)]
        for row in rows:
            took = f"{row['ms_per_user']:.0f}" if "fold_in" in row["way"] else ""
            cells = " | ".join(f"{row[f'{key}_{n}']:.4f}" for n in GIVEN)
            lines.append(f"| {row['way']} | {cells} | {took} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    options = parser(__doc__, data=True).parse_args()
    written = open_results(options, threads=1)
    began = time.perf_counter()
    # A new user tells no age: models are compared on what it has rated.
    ratings = dataclasses.replace(movielens.load("ml-100k", options.data_dir), user_info=None)
    out, users = left_out_users(ratings)
    rating, ranking = rating_rows(ratings, out, users), ranking_rows(ratings, out, users)
    text = markdown(rating, ranking, len(users))
    print(text)
    results = {
        "left_out_users": int(out.sum()),
        "tested_users": len(users),
        "settings": {"ratings": RATING, "ranking": RANKING},
        "seconds": round(time.perf_counter() - began),
        "ratings": rating,
        "ranking": ranking,
    }
    written.write("fold-in", results, text)


if __name__ == "__main__":
    main()

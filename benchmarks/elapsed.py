"""Recipe sequence told when it is asked: what comes after a pause, of users whom training has not seen.

    python benchmarks/elapsed.py --data-dir DIR        about 5 minutes on 1 core

Few users of ML-100K have their latest rating after a pause. So here every rating is to be found that came
more than an hour after the one before, and others beside: of a third of the users at a time, held out of
training whole, each from what its user had rated until then, at least ten. Each user's latest rating, the
test part, is taken away first and never read: the choice of ``elapsed`` rests on these figures. Writes
benchmarks/results/elapsed.{json,md}.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lunet_fast.recsys.data import movielens
from lunet_fast.recsys.data.order import GAP_NAMES, GAPS
from lunet_fast.recsys.data.ratings import Ratings
from lunet_fast.recsys.evaluation.fitted import interactions_of, rated_rows
from lunet_fast.recsys.measures import metrics
from lunet_fast.recsys.measures.protocols import Parts
from lunet_fast.recsys.measures.ranking import metrics_of_one_each
from lunet_fast.recsys.model.sequence_config import sequence_recipe
from lunet_fast.recsys.model.sequence_training import train_sequence
from lunet_fast.recsys.model.sequences import Sequences
from machine import Results, open_results, parser

FOLDS, LEAST, CANDIDATES = 3, 10, 100
OTHERS = 2500
"""Ratings of a fold that came within an hour."""
L2 = 300.0
"""Of EASE, as in ``compare``."""
ROWS: dict[str, dict[str, Any] | None] = {
    "EASE": None,
    "recipe sequence, one member": {},
    "the same, told when it is asked": {"elapsed": True},
}


class Events(NamedTuple):
    """Ratings to be found, each ``[E]``: entry ``place`` of a user's sequence."""

    user: Tensor
    place: Tensor
    item: Tensor
    gap: Tensor


def events(sequences: Sequences, out: Tensor, seed: int) -> Events:
    """Of the users ``out``: all after a pause, and OTHERS of the others."""
    user = torch.repeat_interleave(torch.arange(sequences.n_users), sequences.user_counts)
    place = torch.arange(len(user)) - sequences.indptr[user]
    gap = sequences.gaps.long()
    wanted = torch.isin(user, out) & (place >= LEAST) & (gap < GAPS - 1)
    late = (wanted & (gap >= 3)).nonzero().squeeze(1)
    soon = (wanted & (gap < 3)).nonzero().squeeze(1)
    drawn = torch.randperm(len(soon), generator=torch.Generator().manual_seed(seed))[:OTHERS]
    rows = torch.cat((late, soon[drawn]))
    return Events(user[rows], place[rows], sequences.items[rows].long(), gap[rows])


def ease(training: Ratings) -> Callable[[Tensor], Tensor]:
    """Scores of histories, rows of 0 and 1 ``[E, n_items]``."""
    x = rated_rows(interactions_of(training), torch.arange(training.n_users)).double()
    gram = x.T @ x
    gram.diagonal().add_(L2)
    inverse = torch.linalg.inv(gram)
    weight = (inverse / -inverse.diagonal()).fill_diagonal_(0.0).float()
    return lambda rows: rows @ weight


def scores(
    training: Ratings, sequences: Sequences, found: Events, settings: dict[str, Any] | None, seed: int
) -> Tensor:
    """``[E, n_items]`` after what each user had rated until then."""
    if settings is None:
        seen = torch.zeros(len(found.user), sequences.n_items)
        for row, user, place in zip(seen, found.user.tolist(), found.place.tolist(), strict=True):
            first = int(sequences.indptr[user])
            row[sequences.items[first : first + place].long()] = 1.0
        return ease(training)(seen)
    config = sequence_recipe(len(training), seed=seed, **{"members": 1, "split": "none", **settings})
    model = train_sequence(training, config).trained.model
    items, parts = model.item_vectors(), []
    with torch.no_grad():
        for rows in torch.arange(len(found.user)).split(256):
            stop = found.place[rows]
            # The time to the next entry is that to the request.
            windows = sequences.windows(found.user[rows], (stop - config.length).clamp(min=0), stop)
            parts.append(model.scores(model.latent(model.states(windows, items)), items))
    return torch.cat(parts)


def ranks(
    score: Tensor, found: Events, sequences: Sequences, seed: int
) -> tuple[metrics.Ranks, metrics.Ranks]:
    """Among CANDIDATES items that the user has not rated, and among all of these."""
    generator = torch.Generator().manual_seed(seed)
    own = score.gather(1, found.item.unsqueeze(1)).squeeze(1)
    rest, few = score.clone(), torch.empty(len(own), CANDIDATES)
    for n, user in enumerate(found.user.tolist()):
        rated = sequences.items[sequences.indptr[user] : sequences.indptr[user + 1]].long()
        rest[n, rated] = -torch.inf
        unrated = (rest[n] > -torch.inf).nonzero().squeeze(1)
        few[n] = rest[n, unrated[torch.randperm(len(unrated), generator=generator)[:CANDIDATES]]]
    return metrics.ranks(own, few), metrics.ranks(own, rest)


def run(data_dir: str | None, seed: int, results: Results) -> None:
    rest = Parts.of(movielens.load("ml-100k", data_dir), "leave-one-out", seed).training
    sequences = Sequences.of(rest, seed)
    order = torch.randperm(rest.n_users, generator=torch.Generator().manual_seed(seed))
    found: dict[str, list[tuple[metrics.Ranks, metrics.Ranks]]] = {name: [] for name in ROWS}
    gaps = []
    for fold in range(FOLDS):
        out = order[fold::FOLDS]
        training = rest.select(~torch.isin(rest.user, out))
        wanted = events(sequences, out, seed)
        gaps.append(wanted.gap)
        for name, settings in ROWS.items():
            score = scores(training, sequences, wanted, settings, seed)
            found[name].append(ranks(score, wanted, sequences, seed))
            print(f"fold {fold}: {name}", flush=True)
    gap = torch.cat(gaps)
    rows = []
    for name, parts in found.items():
        sampled, full = (metrics.Ranks.cat([part[n] for part in parts]) for n in (0, 1))
        for title, inside in (("within an hour", gap < 3), (GAP_NAMES[3], gap == 3), (GAP_NAMES[4], gap > 3)):
            values = metrics_of_one_each(sampled.where(inside), (10,))
            values |= {f"full_{k}": v for k, v in metrics_of_one_each(full.where(inside), (10,)).items()}
            rows.append({"gap": title, "name": name, "events": int(inside.sum()), **values})
    rows.sort(key=lambda row: row["gap"], reverse=True)
    results.write("elapsed", {"seed": seed, "rows": rows}, markdown(rows))


def markdown(rows: list[dict[str, Any]]) -> str:
    lines = [
        "# After a pause, ML-100K, users out of training",
        "",
        "| time since the last | method | ratings | HR@10 | NDCG@10 | NDCG@10, all items |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for row in rows:
        cells = [f"{row[name]:.4f}" for name in ("hr@10", "ndcg@10", "full_ndcg@10")]
        lines.append(f"| {row['gap']} | {row['name']} | {row['events']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    options = parser(__doc__, data=True)
    options.add_argument("--seed", type=int, default=0)
    chosen = options.parse_args()
    torch.set_num_threads(1)
    run(chosen.data_dir, chosen.seed, open_results(chosen))


if __name__ == "__main__":
    main()

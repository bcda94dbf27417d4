"""What makes the recommender good: one change at a time, measured on a validation part of the training data.

    python benchmarks/ablation.py ratings --data-dir DIR     about 12 minutes on 1 core
    python benchmarks/ablation.py ranking --data-dir DIR     about 30 minutes on 1 core

ML-100K, three seeds. The test part (ratings: 20 %; ranking: each user's latest) is taken away first and never
read; what is left is divided again in the same way, and the second part is the one that the figures are of.
A row changes one thing of recipe best with MEMBERS members, fewer than it has, for time. Writes
benchmarks/results/ablation-{ratings,ranking}.{json,md}.
"""

from __future__ import annotations

import itertools
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from lunet_fast import GeneralizedLeakySoftplus, LUNet
from lunet_fast.recsys.data import movielens
from lunet_fast.recsys.data.features import side_features
from lunet_fast.recsys.measures import metrics
from lunet_fast.recsys.measures.protocols import Parts, evaluate_ranking
from lunet_fast.recsys.model.config import TrainConfig, recipe
from lunet_fast.recsys.model.negatives import NegativeSampler
from lunet_fast.recsys.model.network import RatingModel
from lunet_fast.recsys.model.scoring import ItemScorer
from lunet_fast.recsys.model.training import rating_objective, rating_optimizer
from lunet_fast.training.loop import descend
from machine import open_results, parser

SEEDS = (0, 1, 2)
MEMBERS = {"ratings": 4, "ranking": 1}


# What stands in the place of f -----------------------------------------------------------------------------


class Sharp(RatingModel):
    """The generalised activation (2.9), of sharpness alpha and left slope beta, in the place of (2.6)."""

    alpha, beta = 1.0, 0.1

    def _build(self, config: TrainConfig, *args: Any) -> None:
        super()._build(config, *args)
        phi = GeneralizedLeakySoftplus(self.alpha, self.beta)
        self.nets = nn.ModuleList(
            LUNet(2 * config.embedding_size, config.layers, phi) for _ in range(config.members)
        )


class _Stacked(RatingModel):
    """A network of K members as one module over ``[K, B, D]``."""

    def _build(self, config: TrainConfig, *args: Any) -> None:
        super()._build(config, *args)
        self.nets = nn.ModuleList([self.stacked(config.members, 2 * config.embedding_size, config.layers)])

    def stacked(self, members: int, D: int, layers: int) -> nn.Module:
        raise NotImplementedError

    def network(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.nets[0](x))


class Perceptrons(nn.Module):
    """x + W2 relu(W1 x + b1) + b2 for K members; as many parameters as a net of ``2 D² + 2 D``."""

    def __init__(self, members: int, size: int, hidden: int, out: int) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(members, size, hidden) / math.sqrt(size))
        self.first_bias = nn.Parameter(torch.zeros(members, 1, hidden))
        self.second = nn.Parameter(torch.randn(members, hidden, out) * 0.01)
        self.second_bias = nn.Parameter(torch.zeros(members, 1, out))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(torch.baddbmm(self.first_bias, x, self.first))
        return torch.baddbmm(self.second_bias, h, self.second)


class Residual(nn.Module):
    def __init__(self, members: int, D: int) -> None:
        super().__init__()
        self.inner = Perceptrons(members, D, D, D)

    def forward(self, x: Tensor) -> Tensor:
        return x + cast(Tensor, self.inner(x))


class MLP(_Stacked):
    """A residual MLP with one hidden layer of D units: as many parameters as two LU layers, no inverse."""

    def stacked(self, members: int, D: int, layers: int) -> nn.Module:
        return Residual(members, D)


class Couplings(nn.Module):
    """RealNVP: two affine couplings, the item's half moved by the user's and then the reverse.

    The hidden size makes the parameters those of two LU layers, 2 (D² + D).
    """

    def __init__(self, members: int, D: int) -> None:
        super().__init__()
        k = D // 2
        hidden = max(1, round((2 * (D * D + D) / 2 - 2 * k) / (3 * k + 1)))
        self.nets = nn.ModuleList(Perceptrons(members, k, hidden, 2 * k) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        user, item = x.chunk(2, -1)
        for net in self.nets:
            scale, shift = net(user).chunk(2, -1)
            user, item = item * torch.exp(torch.tanh(scale)) + shift, user
        return torch.cat((user, item), -1)


class RealNVP(_Stacked):
    def stacked(self, members: int, D: int, layers: int) -> nn.Module:
        return Couplings(members, D)


# Training --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One line of the table: what is changed of recipe best."""

    group: str
    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    model: type[RatingModel] = RatingModel
    ending: str = "last"
    """What predicts: ``last`` weights; ``weights``, the mean of those after each epoch of the second half;
    ``cycles``, predictions after each of three cycles of the rate; ``sgld``, predictions after each epoch of
    the second half, at a constant rate and with noise of the gradient's own size in every step."""


def predictors(row: Row, config: TrainConfig, parts: Parts) -> Iterator[RatingModel]:
    """Train, and yield the model in each state whose predictions are averaged."""
    part = parts.training
    torch.manual_seed(config.seed)
    features = side_features(part) if config.side_features else (None, None)
    shape = part.n_users, part.n_items
    model = row.model(
        config,
        *(part.user, part.item, part.rating),
        *shape,
        user_features=features[0],
        item_features=features[1],
    )
    sampler = NegativeSampler.of(model, parts.known_pairs()) if config.gamma < 1 else None
    optimizer, generator = rating_optimizer(model), torch.Generator().manual_seed(config.seed)
    rates = [group["lr"] for group in optimizer.param_groups]
    count = len(part)
    steps = -(-count // config.batch_size)
    cycle = config.epochs * steps // (3 if row.ending == "cycles" else 1)
    total: list[Tensor] = []
    kept = 0
    for epoch in range(config.epochs):
        for step, rows in enumerate(torch.randperm(count, generator=generator).split(config.batch_size)):
            place = epoch * steps + step
            left = 1 - (place % cycle) / cycle if config.schedule == "linear" else 1.0
            if row.ending == "sgld":
                left = max(0.3, 1 - place / (config.epochs * steps / 2))
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * left
            batch = part.user[rows], part.item[rows], part.rating[rows]
            descend(optimizer, rating_objective(model, *batch, generator, sampler).objective)
            if row.ending == "sgld" and epoch >= config.epochs // 2:
                with torch.no_grad():
                    for table in model.tables():
                        table.weight += torch.randn(table.weight.shape, generator=generator) * 1e-3
        late = epoch >= config.epochs // 2
        if row.ending == "weights" and late:
            values = [p.detach().clone() for p in model.parameters()]
            total = [a + b for a, b in zip(total, values, strict=True)] if total else values
            kept += 1
        if (row.ending == "sgld" and late) or (
            row.ending == "cycles" and (epoch + 1) * 3 % config.epochs == 0
        ):
            yield model
    if row.ending == "weights":
        with torch.no_grad():
            for parameter, values in zip(model.parameters(), total, strict=True):
                parameter.copy_(values / kept)
    if row.ending in ("last", "weights"):
        yield model


@torch.no_grad()
def scores_of(model: RatingModel) -> Callable[[Tensor], Tensor]:
    """Scores of all items by the read-out that ranks; pair by pair where the network is no LU-Net."""
    histories = model.histories()
    if type(model) in (RatingModel, Sharp):
        return ItemScorer(model, histories).scores
    every = torch.arange(model.interactions.n_items)

    def score(users: Tensor) -> Tensor:
        rows = []
        for user in users.tolist():
            output = model.output(torch.full_like(every, user), every, histories=histories, observed=False)
            rows.append(cast(Tensor, output.logit).mean(0))
        table = torch.stack(rows)
        return table.masked_fill(model.interactions.item_counts == 0, -torch.inf)

    return torch.no_grad()(score)


def measured(models: Iterator[RatingModel], config: TrainConfig, parts: Parts) -> dict[str, float]:
    values: dict[str, float] = {}
    totals: list[Tensor] = []
    for model in models:
        if config.gamma < 1:
            with torch.no_grad():  # not around the loop, which trains
                found = evaluate_ranking(scores_of(model), parts, config.seed).metrics
            values |= {name: found[name] for name in ("hr@10", "ndcg@10", "full_ndcg@10", "mrr")}
        if config.gamma > 0 and parts.test is not None:
            with torch.no_grad():
                histories = model.histories()
                pairs = zip(parts.test.user.split(8192), parts.test.item.split(8192), strict=True)
                totals.append(torch.cat([model(u, i, histories) for u, i in pairs]))
    if totals and parts.test is not None:
        mean = torch.stack(totals).mean(0).clamp(*parts.test.scale)
        values["mse"] = metrics.mse(mean, parts.test.rating)
    return values


# What is changed -------------------------------------------------------------------------------------------


def shared_rows() -> list[Row]:
    """Changes that both tables have."""
    sharp = [
        type(f"Sharp{alpha}{beta}", (Sharp,), {"alpha": alpha, "beta": beta})
        for alpha, beta in ((1.0, 0.1), (5.0, 0.1), (1.0, 1.0))
    ]
    return [
        Row("", "none"),
        Row("history", "no history of the user", {"user_history": False}),
        Row("history", "no history of the item", {"item_history": False}),
        Row("history", "neither", {"user_history": False, "item_history": False}),
        Row("f", "identity", {"network": "identity"}),
        Row("f", "affine: one LU layer", {"layers": 1}),
        Row("f", "residual MLP, as many parameters", {}, MLP),
        Row("f", "RealNVP, as many parameters", {}, RealNVP),
        Row("f", "four LU layers", {"layers": 4}),
        *(Row("activation", f"(2.6), alpha {a}", {"alpha": a}) for a in (0.01, 0.5, 0.9)),
        *(Row("activation", f"(2.9), alpha {c.alpha:g}, beta {c.beta:g}", {}, c) for c in sharp),
        Row("features", "no genres, age, gender, occupation", {"side_features": False}),
        Row("training", "constant rate", {"schedule": "constant"}),
        Row("training", "mean of the weights of the second half", {}, ending="weights"),
        Row("training", "dropout 0.1", {"dropout": 0.1}),
    ]


def rating_rows() -> list[Row]:
    best = recipe("best", 100_000)
    rows = shared_rows()
    rows += [
        Row("penalty", "on x alone, 0.04", {"l2_latent": 0.0, "l2_embedding": 0.04}),
        Row("penalty", "on x alone, 0.1", {"l2_latent": 0.0, "l2_embedding": 0.1}),
        Row("penalty", "on z, and on x 0.005", {"l2_embedding": 0.005}),
        Row("penalty", "twice as strong", {"l2_latent": 2 * best.l2_latent}),
        Row("loss", "huber", {"loss": "huber"}),
        Row("loss", "ordinal", {"loss": "ordinal", "l2_latent": 0.015}),
        *(Row("averaging", f"{k} member{'s' * (k > 1)}", {"members": k}) for k in (1, 2, 8, 16)),
        Row("averaging", "1 member, more regularised", {"members": 1, "l2_latent": 0.07}),
        Row("averaging", "1 member, snapshots of three cycles", {"members": 1}, ending="cycles"),
        Row("averaging", "1 member, noise and the epochs' mean (SGLD)", {"members": 1}, ending="sgld"),
    ]
    rows += [
        Row("size × layers", f"k {k}, {m} layer{'s' * (m > 1)}", {"embedding_size": k, "layers": m})
        for k, m in itertools.product((8, 16, 32), (1, 2, 4))
        if (k, m)
        not in ((best.embedding_size, best.layers), (best.embedding_size, 1), (best.embedding_size, 4))
    ]
    return rows


def ranking_rows() -> list[Row]:
    best = recipe("best", 100_000, gamma=0.0)
    rows = [row for row in shared_rows() if row.group != "activation" or "0.5" in row.name]
    rows += [
        Row("loss", "bpr", {"loss": "bpr"}),
        *(Row("negatives", f"{n} a pair", {"negatives": n}) for n in (1, 2, 4, 8, 16) if n != best.negatives),
        Row("negatives", "by popularity", {"negative_sampling": "popularity"}),
        Row("negatives", "never those held out either (leaks)", {"negatives_outside": "known"}),
        Row("penalty", "none", {"l2_interaction_embedding": 0.0, "l2_interaction_latent": 0.0}),
        Row("penalty", "on z, 0.003", {"l2_interaction_embedding": 0.0, "l2_interaction_latent": 0.003}),
        *(Row("averaging", f"{k} members", {"members": k}) for k in (2, 4)),
        *(Row("size", f"k {k}", {"embedding_size": k}) for k in (16, 32, 64) if k != best.embedding_size),
    ]
    return rows


def run(table: str, rows: list[Row], data_dir: str | None, seeds: tuple[int, ...]) -> list[dict[str, Any]]:
    ratings = movielens.load("ml-100k", data_dir)
    gamma, split = (1.0, "random") if table == "ratings" else (0.0, "leave-one-out")
    common = {
        "members": MEMBERS[table],
        "gamma": gamma,
        "split": split,
        "negatives_outside": "training",
        "mlp": False,
    }
    done = []
    for row in rows:
        found, seconds = [], []
        for seed in seeds:
            config = recipe("best", len(ratings), **{**common, "seed": seed, **row.settings})
            rest = Parts.of(ratings, config.split, config.seed).training
            parts = Parts.of(rest, config.split, config.seed)
            began = time.perf_counter()
            found.append(measured(predictors(row, config, parts), config, parts))
            seconds.append(time.perf_counter() - began)
        line: dict[str, Any] = {"group": row.group, "name": row.name, "settings": row.settings}
        for name in found[0]:
            values = [f[name] for f in found]
            line[name] = statistics.fmean(values)
            line[f"{name}_seeds"] = values
        line["seconds"] = statistics.fmean(seconds)
        first = done[0] if done else line
        for name in found[0]:
            gaps = [a - b for a, b in zip(line[f"{name}_seeds"], first[f"{name}_seeds"], strict=True)]
            line[f"{name}_change"] = statistics.fmean(gaps)
            line[f"{name}_change_error"] = (
                statistics.stdev(gaps) / math.sqrt(len(gaps)) if len(gaps) > 1 else None
            )
        done.append(line)
        print(row.group, row.name, {n: round(line[n], 4) for n in found[0]}, file=sys.stderr, flush=True)
    return done


def markdown(table: str, lines: list[dict[str, Any]]) -> str:
    shown = ["mse"] if table == "ratings" else ["hr@10", "ndcg@10", "full_ndcg@10"]
    heads = {"mse": "MSE", "hr@10": "HR@10", "ndcg@10": "NDCG@10", "full_ndcg@10": "NDCG@10, all items"}
    out = ["| change | | " + " | ".join(f"{heads[n]} | change" for n in shown) + " | s |"]
    out.append("|---|---|" + "---|---|" * len(shown) + "---|")
    for line in lines:
        cells = []
        for name in shown:
            error = line[f"{name}_change_error"]
            spread = "" if error is None else f" ± {error:.4f}"
            change = "" if line is lines[0] else f"{line[f'{name}_change']:+.4f}{spread}"
            cells += [f"{line[name]:.4f}", change]
        out.append(
            f"| {line['group']} | {line['name']} | " + " | ".join(cells) + f" | {line['seconds']:.0f} |"
        )
    return "\n".join(out) + "\n"


def main() -> None:
    options = parser(__doc__, data=True)
    options.add_argument("table", choices=["ratings", "ranking"])
    options.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    options.add_argument(
        "--only", metavar="TEXT", help="rows whose group or name has this; nothing is written"
    )
    chosen = options.parse_args()
    torch.set_num_threads(1)
    results = None if chosen.only else open_results(chosen)
    rows = rating_rows() if chosen.table == "ratings" else ranking_rows()
    if chosen.only:
        rows = [row for row in rows if chosen.only in f"{row.group} {row.name}"]
    lines = run(chosen.table, rows, chosen.data_dir, tuple(chosen.seeds))
    text = markdown(chosen.table, lines)
    print(text)
    if results is not None:
        seeds = ", ".join(map(str, chosen.seeds))
        head = f"# Ablation: {chosen.table}, ML-100K, validation part, mean of seeds {seeds}\n\n"
        results.write(f"ablation-{chosen.table}", {"rows": lines}, head + text)


if __name__ == "__main__":
    main()

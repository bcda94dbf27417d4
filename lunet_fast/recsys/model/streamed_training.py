"""Training on ratings that are read from Parquet files batch by batch, behind ``lunet-fast train --stream``.

Memory is that of the tables, their gradients' rows and the optimiser's two moments, O((users + items) K k),
and one shuffle buffer; the number of ratings is not in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from lunet_fast.recsys.data.datasets import dataset_title
from lunet_fast.recsys.data.streaming import RatingStream
from lunet_fast.recsys.measures.ranking import full_ranking
from lunet_fast.recsys.model.config import TrainConfig
from lunet_fast.recsys.model.model_files import TrainedModel, load_model, save_model
from lunet_fast.recsys.model.network import RatingModel
from lunet_fast.recsys.model.schema import HEADERS, MODEL_FORMAT
from lunet_fast.recsys.model.scoring import ItemScorer
from lunet_fast.recsys.model.training import (
    described,
    error_limit,
    first_overflow,
    rating_objective,
)
from lunet_fast.training.distributed import Workers, existing_device
from lunet_fast.training.figures import save_loss_figure
from lunet_fast.training.files import read_json, read_tensors, write_json
from lunet_fast.training.loop import Batch, Curve, Phase, cpu_threads
from lunet_fast.training.run import Options, Result, Run
from lunet_fast.training.seeding import seeded
from lunet_fast.training.sharding import DealtTables, pull

if TYPE_CHECKING:
    from typing_extensions import Unpack

RANKED_USERS = 200
"""Users of the test part whose ranking of all items is measured, drawn by ``default_rng((seed, 4))``."""

TEST_BATCH = 1 << 14

STREAM_SETTINGS: dict[str, Any] = {
    "split": "stream",
    "user_history": False,
    "item_history": False,
    "side_features": False,
    "mlp": False,
    "weight_decay": 0.0,
}
"""What a recipe's settings are replaced by: histories need every pair in memory, and Adam's own L2 every row
of the tables at each step."""


class StreamedRows:
    """The training rows of a stream as :class:`~lunet_fast.training.loop.Batches`, on a device."""

    def __init__(self, stream: RatingStream, batch_size: int, seed: int, device: torch.device) -> None:
        self.stream, self.batch_size, self.seed, self.device = stream, batch_size, seed, device
        self.rows = stream.n_rows
        self.steps = -(-self.rows // batch_size)

    def epoch(self, epoch: int, first: int, generator: torch.Generator) -> Iterator[Batch]:
        """As the protocol says; the order is a function of the seed and the epoch, not of ``generator``."""
        batches = self.stream.batches(epoch, self.batch_size, start=first, seed=self.seed)
        return (tuple(column.to(self.device) for column in batch) for batch in batches)


class TableOptimizer(torch.optim.Optimizer):
    """Adam, which for the tables moves only the rows that a batch has touched (``SparseAdam``).

    ``tables`` are parameters with sparse gradients, ``groups`` the others. A row's moments stay as they are
    while it is in no batch; a step costs O(rows of the batch), not O(rows of the table).
    """

    def __init__(self, tables: list[Tensor], learning_rate: float, groups: list[dict[str, Any]]) -> None:
        self.sparse = torch.optim.SparseAdam(tables, lr=learning_rate)
        self.dense = torch.optim.Adam(groups, fused=tables[0].device.type in ("cpu", "cuda"))
        self.sparse.state = self.state = self.dense.state
        self.param_groups = [*self.sparse.param_groups, *self.dense.param_groups]

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.sparse.zero_grad(set_to_none)
        self.dense.zero_grad(set_to_none)

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        self.sparse.step()
        self.dense.step()


def streamed_optimizer(model: RatingModel) -> TableOptimizer:
    """:class:`TableOptimizer` with the settings' rates; from here on the tables have sparse gradients."""
    config = model.config
    tables: list[Tensor] = []
    for table in model.tables():
        table.sparse = True
        tables.append(table.weight)
    tables += [bias for bias in (model.user_bias, model.item_bias) if bias is not None]
    net = list(model.nets.parameters())
    special = {id(p) for p in (*tables, *net)}
    groups: list[dict[str, Any]] = [
        {"params": net, "lr": config.net_learning_rate, "weight_decay": config.net_weight_decay},
        {"params": [p for p in model.parameters() if id(p) not in special], "lr": config.learning_rate},
    ]
    return TableOptimizer(tables, config.learning_rate, groups)


def train_stream(
    stream: RatingStream,
    config: TrainConfig,
    *,
    device: torch.device | str = "cpu",
    workers: Workers | None = None,
    shard_tables: bool = False,
    **options: Unpack[Options],
) -> Result[TrainedModel]:
    """Train the recommender on a stream; as :func:`~.training.train` but for what needs all ratings at hand.

    ``config`` has :data:`STREAM_SETTINGS`: no histories, no side features, gamma 1. The tables are optimised
    by ``SparseAdam``, so an epoch costs O(ratings), whatever the number of users and items. Metrics:
    ``test_mse`` and ``test_rmse`` over the whole test part, and ``full_...`` of RANKED_USERS of its users.
    The model keeps no list of who rated what: recommendations from it may hold rated items, unless the caller
    leaves them out.

    Each of several ``workers`` reads all rows and computes with its share. With ``shard_tables`` each holds,
    of the tables of users and items and of their moments, every N-th row, and fetches those of a batch from
    the others (:mod:`lunet_fast.training.sharding`): the result is the same up to rounding, and so are the
    files, which any number of processes resumes, with or without it. ``trained`` is then read from the
    folder's file as needed at process 0, and has no values (device ``meta``) at the others; ``out`` must be
    given.
    """
    for name, value in STREAM_SETTINGS.items():
        if getattr(config, name) != value:
            raise ValueError(f"{name}={getattr(config, name)!r}: training on a stream needs {name}={value!r}")
    if shard_tables and options.get("out") is None:
        raise ValueError("shard_tables=True needs out=: no process can hold the trained model but in a file")
    run = Run(workers or Workers(device=existing_device(device)), **options)
    recorded = {
        "dataset": stream.name,
        "source": stream.source,
        "users": stream.n_users,
        "items": stream.n_items,
        "scale": list(stream.scale),
        "fingerprint": stream.fingerprint,
        "test_share": stream.test_share,
        "buffer_rows": stream.buffer_rows,
        **config.to_dict(),
    }
    stored = run.finished(recorded)
    if stored is not None:
        return Result(load_model(stored.model), read_json(stored.metrics), Curve())
    with run.begun(recorded), cpu_threads(config.threads):
        return _trained(stream, config, run, shard_tables=shard_tables)


def _trained(
    stream: RatingStream, config: TrainConfig, run: Run, *, shard_tables: bool
) -> Result[TrainedModel]:
    """What :func:`train_stream` does within its folder."""
    workers, folder = run.workers, run.folder
    with seeded(config.seed):
        sums = (stream.user_sum, stream.user_count), (stream.item_sum, stream.item_count)
        # One process alone has every row.
        dealt_to = workers if shard_tables and workers.world_size > 1 else None
        model = RatingModel.of_statistics(config, stream.mean, *sums, dealt_to).to(workers.device)
    dealt = None if dealt_to is None else DealtTables(workers, model.rows())
    # The phase goes with this line, and with it the optimiser's moments.
    curve = run.fit(replace(_phase(stream, model, workers, dealt), callbacks=run.callbacks))
    for table in model.tables():
        table.sparse = False
    trained = TrainedModel(model, stream.users, stream.items, stream.scale)
    if dealt is None:
        model.to("cpu")
    else:
        save_model(None if folder is None else folder.model, trained, dealt)
        _take_whole_tables(model, dealt, None if folder is None else folder.model)
    if not workers.is_first:
        return Result(trained, {}, curve)
    values: dict[str, Any] = {}
    if stream.n_test:
        values["test_mse"] = curve.test[-1]
        values["test_rmse"] = curve.test[-1] ** 0.5
        values |= ranking_of_some(model, stream, config.seed)
    values |= described(stream.name, model, curve, (stream.n_rows, stream.n_test, 0), workers)
    if folder is not None:
        if dealt is None:
            save_model(folder.model, trained)
        title = f"{dataset_title(stream.name)}, recipe {config.recipe}, streamed"
        save_loss_figure(folder.loss, title, curve.train, curve.test, "mean squared error")
        write_json(folder.metrics, values)
    return Result(trained, values, curve)


def _phase(stream: RatingStream, model: RatingModel, workers: Workers, dealt: DealtTables | None) -> Phase:
    """What the loop trains; from here on the model's tables have sparse gradients, unless they are dealt."""
    config, step = model.config, _Step(model)

    def objective(batch: Batch, share: slice, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        if dealt is None:
            return step(batch, share, generator)
        users, items, ratings = batch
        rows, own_users, own_items = _fetched(model, workers, users[share], items[share])
        # Only the share is looked at; the draws are for all.
        places = torch.zeros_like(users), torch.zeros_like(items)
        places[0][share], places[1][share] = own_users, own_items
        return functional_call(
            step,
            {f"model.{name}": tensor for name, tensor in rows.items()},
            ((*places, ratings), share, generator),
        )

    optimizer = streamed_optimizer(model)
    if dealt is not None:
        for table in model.tables():
            table.sparse = False  # the rows that are fetched are few, and all of them used
    return Phase(
        name="LU-Net",
        module=model,
        optimizer=optimizer,
        batches=StreamedRows(stream, config.batch_size, config.seed, workers.device),
        epochs=config.epochs,
        seed=config.seed,
        objective=objective,
        rate=("learning_rate", config.learning_rate),
        test_loss=(lambda: streamed_error(model, stream, workers, dealt)) if stream.n_test else None,
        error_limit=error_limit(stream.scale),
        linear_decay=config.schedule == "linear",
        sparse=[bias for bias in (model.user_bias, model.item_bias) if bias is not None and not dealt],
        dealt=dealt,
        # Which would need rows of others, who are not asked.
        locate=None if dealt else lambda batch: first_overflow(model, *batch[:2]),
    )


class _Step(nn.Module):
    """:func:`~.training.rating_objective` as a module, whose tables ``functional_call`` can replace."""

    def __init__(self, model: RatingModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch, share: slice, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        users, items, ratings = batch
        return rating_objective(self.model, users, items, ratings, generator, None, share)


def _fetched(
    model: RatingModel, workers: Workers, users: Tensor, items: Tensor
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """What to put in the place of the model's tables for some pairs, and which rows of it are theirs.

    By name the rows of the different users and items, and in the same order what is known of each.
    """
    (known_users, own_users), (known_items, own_items) = (
        torch.unique(side, return_inverse=True) for side in (users, items)
    )
    parameters, wanted = dict(model.named_parameters()), model.rows()
    names = [[name for name in wanted if name.startswith(side)] for side in ("user", "item")]
    found = pull(workers, [known_users, known_items], [[parameters[name] for name in side] for side in names])
    rows = {
        name: tensor
        for side, got in zip(names, found, strict=True)
        for name, tensor in zip(side, got, strict=True)
    }
    seen = model.interactions
    for side, known, deviation, counts in (
        ("user", known_users, model.user_deviation, seen.user_counts),
        ("item", known_items, model.item_deviation, seen.item_counts),
    ):
        rows[f"{side}_deviation"] = deviation[known]
        rows[f"interactions.{side}_counts"] = counts[known]
    return rows, own_users, own_items


def _take_whole_tables(model: RatingModel, dealt: DealtTables, file: Path | None) -> None:
    """Put the tables of the model's ``file``, mapped into memory, in the place of this process's rows.

    Without a file, at all processes but the first, the whole model is left without values.
    """
    if file is None:
        model.to("meta")
        return
    model.to("cpu")
    tensors, _ = read_tensors(file, MODEL_FORMAT, HEADERS[MODEL_FORMAT], mapped=True)
    parameters = dict(model.named_parameters())
    for name in dealt.rows:
        parameters[name].data = tensors[f"model.{name}"]


@torch.no_grad()
def streamed_error(
    model: RatingModel, stream: RatingStream, workers: Workers, dealt: DealtTables | None = None
) -> float:
    """Mean squared error of the clipped predictions over the stream's test part.

    Where the tables are dealt all processes call this, and each predicts its share.
    """
    total = torch.zeros((), dtype=torch.float64, device=workers.device)
    for batch in stream.test_batches(TEST_BATCH):
        users, items, ratings = (column.to(workers.device) for column in batch)
        if dealt is None:
            predicted = model(users, items)
        else:
            share = workers.share(len(users))
            rows, own_users, own_items = _fetched(model, workers, users[share], items[share])
            ratings, predicted = ratings[share], functional_call(model, rows, (own_users, own_items))
        total += (predicted.clamp(*stream.scale) - ratings).double().square().sum()
    return float(total if dealt is None else workers.sum(total)) / stream.n_test


def ranking_of_some(
    model: RatingModel, stream: RatingStream, seed: int, count: int = RANKED_USERS
) -> dict[str, float]:
    """``full_...`` metrics of at most ``count`` users with training ratings; ``full_users``, their number.

    Their test items are ranked among all items that they have not rated in training. Two passes over the
    files; scores of USER_CHUNK users at a time.
    """
    known = torch.nonzero(stream.user_count).squeeze(1).numpy()
    drawn = np.random.default_rng((seed, 4)).choice(known, min(count, len(known)), replace=False)
    users = torch.from_numpy(np.sort(drawn))
    relevant, seen = stream.test_pairs(users), stream.seen(users)
    if not len(relevant[0]):
        return {}
    scorer = ItemScorer(model, model.histories())
    ranking = full_ranking(scorer.scores, *relevant, *seen, stream.n_items)
    return {**ranking.metrics, "full_users": ranking.users}

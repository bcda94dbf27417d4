"""How recipe ``sequence`` is trained; :func:`train_sequence` is ``lunet-fast train --recipe sequence``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lunet_fast.recsys.data.datasets import dataset_title
from lunet_fast.recsys.data.order import ELAPSED
from lunet_fast.recsys.data.ratings import Ratings
from lunet_fast.recsys.measures import metrics
from lunet_fast.recsys.measures.protocols import Parts, Ranking, evaluate_ranking
from lunet_fast.recsys.model.interactions import runs
from lunet_fast.recsys.model.model_files import (
    TrainedSequences,
    load_sequences,
    save_candidates,
    save_sequences,
)
from lunet_fast.recsys.model.sequence_config import SequenceConfig
from lunet_fast.recsys.model.sequences import Sequences
from lunet_fast.recsys.model.side import Side
from lunet_fast.recsys.model.softmax import next_item_loss
from lunet_fast.recsys.model.state_network import StateNetwork
from lunet_fast.recsys.model.training import check_ratings, known_of, recorded_settings
from lunet_fast.training.distributed import Workers, existing_device
from lunet_fast.training.figures import save_loss_figure
from lunet_fast.training.files import read_json, write_json
from lunet_fast.training.loop import Batch, Curve, Phase, cpu_threads
from lunet_fast.training.machine import flat_versions
from lunet_fast.training.run import Options, Result, Run
from lunet_fast.training.seeding import seeded

if TYPE_CHECKING:
    from typing_extensions import Unpack


def train_sequence(
    ratings: Ratings,
    config: SequenceConfig,
    *,
    device: torch.device | str = "cpu",
    workers: Workers | None = None,
    **options: Unpack[Options],
) -> Result[TrainedSequences]:
    """Train the state network to predict each user's next item, and rank each user's latest, held out.

    ``ratings`` is split as ``config.split`` and ``config.seed`` say, as for every method that ranks. Metrics
    are those of :func:`~lunet_fast.recsys.measures.protocols.evaluate_ranking`, and the reconstruction error
    of the states of the users ranked. ``options`` and ``workers`` are those of
    :func:`~lunet_fast.recsys.model.training.train`, whose errors are raised; ``ValueError`` too where no user
    has two ratings to train on, of which one is the other's next.
    """
    run = Run(workers or Workers(device=existing_device(device)), **options)
    parts = Parts.of(ratings, config.split, config.seed)
    check_ratings("training", parts.training)
    recorded = {} if run.folder is None else recorded_settings(config, parts)
    stored = run.finished(recorded)
    if stored is not None:
        return Result(load_sequences(stored.model), read_json(stored.metrics), Curve())
    with run.begun(recorded):
        return _trained(config, parts, run)


def _trained(config: SequenceConfig, parts: Parts, run: Run) -> Result[TrainedSequences]:
    """What :func:`train_sequence` does within its folder."""
    training = parts.training
    with cpu_threads(config.threads):
        with seeded(config.seed):
            sequences = Sequences.of(training, config.seed)
            model = StateNetwork(config, sequences, Side.of(training, config))
        model.to(run.workers.device)
        curve = run.fit(replace(_phase(model), callbacks=run.callbacks))
        model.to("cpu")
        ids = training.users, training.items, training.scale, training.item_info
        trained = TrainedSequences(model, *ids, known_of(parts))
        if not run.workers.is_first:
            return Result(trained, {}, curve)
        values: dict[str, Any] = evaluate_sequences(model, parts).figures
    rows = (0 if part is None else len(part) for part in (training, parts.test, parts.held_out))
    values |= {
        "dataset": training.name,
        **{name: getattr(config, name) for name in ("recipe", "split", "seed")},
        "epochs": len(curve.train),
        "train_seconds": round(curve.seconds, 3),
        "parameters": sum(p.numel() for p in model.parameters()),
        **dict(zip(("train_ratings", "test_ratings", "held_out_ratings"), rows, strict=True)),
        "world_size": run.workers.world_size,
        "global_batch": config.batch_size,
        **flat_versions("pandas"),
    }
    if run.folder is not None:
        save_sequences(run.folder.model, trained)
        if parts.candidates is not None:
            save_candidates(run.folder.candidates, parts)
        title = f"{dataset_title(training.name)}, recipe {config.recipe}"
        save_loss_figure(run.folder.loss, title, curve.train, curve.test, "loss of the next item")
        write_json(run.folder.metrics, values)
    return Result(trained, values, curve)


@torch.no_grad()
def evaluate_sequences(model: StateNetwork, parts: Parts) -> Ranking:
    """Metrics of ranking on the held-out part, and how far f⁻¹(f(x)) is from the states x of its users.

    With ``elapsed`` a user is asked for at the time of its held-out rating, of which the classes of
    :data:`~lunet_fast.recsys.data.order.ELAPSED` are told.
    """
    values: dict[str, float] = {}
    elapsed = None
    if parts.held_out is not None:
        if model.config.elapsed and parts.gaps is not None:
            elapsed = torch.zeros(parts.held_out.n_users, dtype=torch.int64)
            elapsed[parts.held_out.user] = torch.tensor(ELAPSED)[parts.gaps.long()]
        items = model.item_vectors()
        error = size = 0.0
        for users in parts.held_out.user.split(256):
            x = model.states(model.sequences.last(users, model.config.length), items)
            error += metrics.reconstruction_error(x, model.inverse(model.latent(x))) * len(users)
            size += metrics.squared_norm(x) * len(users)
        values["reconstruction_error"] = error / len(parts.held_out)
        values["reconstruction_error_relative"] = error / size if size else error

    def score_items(users: Tensor) -> Tensor:
        return model.score_users(users, None if elapsed is None else elapsed[users])

    ranking = evaluate_ranking(score_items, parts, model.config.seed)
    return ranking._replace(metrics={**values, **ranking.metrics})


# One step ---------------------------------------------------------------------------------------------------


def _phase(model: StateNetwork) -> Phase:
    config = model.config
    net = [p for member in model.networks for p in ([] if member.net is None else member.net.parameters())]
    of_net = {id(p) for p in net}
    groups: list[dict[str, Any]] = [
        {"params": [p for p in model.parameters() if id(p) not in of_net], "lr": config.learning_rate}
    ]
    if net:
        groups.append({"params": net, "lr": config.net_learning_rate})
    batches = Stretches(model.sequences, config.length, config.batch_size)
    return Phase(
        name="LU-Net",
        module=model,
        optimizer=torch.optim.Adam(groups, betas=(0.9, 0.98), fused=True),
        batches=batches,
        epochs=config.epochs,
        seed=config.seed,
        objective=partial(next_item_objective, model, batches),
        rate=("learning_rate", config.learning_rate),
        linear_decay=config.schedule == "linear",
    )


def next_item_objective(
    model: StateNetwork, stretches: Stretches, batch: Batch, share: slice, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """The mean loss of the next items in a batch of stretches (user, start, stop), each int64 ``[B]``.

    The entries are those of ``stretches``, in the order of its epoch. ``share`` are the rows whose loss is
    wanted; draws are made for all. The error reported is a sum over the rows' number, so that the loop's
    mean, which weighs it by them, is that over the entries of an epoch. It is the mean of the members'; the
    loss is their sum, since they share no parameter.

    Items that nobody has chosen are no choices where something describes them: they would learn that what
    they are described by is not wanted.
    """
    config, sequences = model.config, stretches.sequences
    device = sequences.items.device
    pool = sequences.item_counts.nonzero().squeeze(1) if model.side.describes_items else None
    choices = sequences.n_items if pool is None else len(pool)
    negatives = pool
    if config.negatives < choices:
        negatives = torch.randperm(choices, generator=generator, device=device)[: config.negatives]
        negatives = negatives if pool is None else pool[negatives]
    lengths = batch[2] - batch[1]
    whole, own = int(lengths.sum()), share.stop - share.start

    def dropout(x: Tensor) -> Tensor:
        if not config.dropout:
            return x
        shape = (len(lengths), int(lengths.max()), x.shape[2])
        kept = torch.rand(shape, generator=generator, device=x.device) >= config.dropout
        return x * kept[share, : x.shape[1]] / (1 - config.dropout)

    users, start, stop = (column[share] for column in batch)
    windows = sequences.windows(users, start, stop)
    windows = windows._replace(side=model.side.of_users(users))
    target = sequences.after_each(users, start, stop)
    confidence = sequences.confidence(users, start, stop, config.confidence)
    losses = []
    for member in model.networks:
        items = member.item_vectors(model.side)
        z = member.latent(member.training_states(windows, items, dropout))
        losses.append(
            next_item_loss(z, items, member.bias, target, negatives, choices=choices, confidence=confidence)
        )
    loss = torch.stack(losses).sum()
    mean = loss * (len(lengths) / (own * whole))
    return mean, loss.detach() / (own * len(losses))


class Stretches:
    """Batches of stretches (user, start, stop) that hold all entries with a next one, about as many in each.

    A sequence of more than ``length`` entries is cut at every ``length``-th, from a place that is drawn anew
    for each epoch; stretches of similar length are in a batch. ``sequences`` are those of the epoch: what
    has no time is in an order drawn anew.
    """

    def __init__(self, sequences: Sequences, length: int, batch_size: int) -> None:
        self.sequences = self._given = sequences
        self.inputs = (sequences.user_counts - 1).clamp(min=0)
        self.length = length
        self.rows = int(self.inputs.sum())
        """Entries, not stretches: what the loop's mean is over."""
        if not self.rows:
            raise ValueError("no user has two training ratings, one to predict from the other")
        self.steps = max(self.rows // batch_size, 1)

    def epoch(self, epoch: int, first: int, generator: torch.Generator) -> Iterator[Batch]:
        self.sequences = self._given.drawn_anew(generator)
        user, start, stop = self._stretches(generator)
        lengths = stop - start
        device = lengths.device
        jitter = torch.rand(len(lengths), generator=generator, device=device) * 4
        order = torch.argsort(lengths + jitter)
        # Each step has an equal share of the entries, and a stretch is never longer than that.
        ends = lengths[order].cumsum(0)
        step = torch.div((ends - 1) * self.steps, self.rows, rounding_mode="floor")
        counts = torch.bincount(step, minlength=self.steps).tolist()
        batches = order.split(counts)
        turns = torch.randperm(self.steps, generator=generator, device=device).tolist()[first:]
        return ((user[rows], start[rows], stop[rows]) for rows in (batches[turn] for turn in turns))

    def _stretches(self, generator: torch.Generator) -> Batch:
        inputs, length = self.inputs, self.length
        # The first cut, 1 to length, of those that are cut at all.
        drawn = torch.randint(length, (len(inputs),), generator=generator, device=inputs.device) + 1
        cut = torch.where(inputs > length, drawn, length)
        count = (1 + torch.div(inputs - cut + length - 1, length, rounding_mode="floor")).clamp(min=1)
        count = count * (inputs > 0)
        user, place = runs(count)
        start = (cut[user] + (place - 1) * length).clamp(min=0)
        stop = torch.minimum(cut[user] + place * length, inputs[user])
        return user, start, stop

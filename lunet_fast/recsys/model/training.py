"""What is trained, and how; :func:`train` is all of ``lunet-fast train`` behind its arguments."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from lunet_fast.layers.lunet import LUNet
from lunet_fast.recsys.data.datasets import dataset_title
from lunet_fast.recsys.data.features import side_features
from lunet_fast.recsys.data.ratings import Ratings
from lunet_fast.recsys.measures import metrics
from lunet_fast.recsys.measures.protocols import Parts, Ranking, evaluate_ranking
from lunet_fast.recsys.model.config import TrainConfig
from lunet_fast.recsys.model.gibbs import Triple
from lunet_fast.recsys.model.interactions import Interactions
from lunet_fast.recsys.model.losses import Losses, confidence_weights, hybrid_loss
from lunet_fast.recsys.model.mlp import MLPModel, perceptron
from lunet_fast.recsys.model.model_files import TrainedModel, load_model, save_candidates, save_model
from lunet_fast.recsys.model.negatives import NegativeSampler
from lunet_fast.recsys.model.network import RatingModel
from lunet_fast.recsys.model.plain import plain_figures
from lunet_fast.recsys.model.prediction import decode, predict_ratings, reconstruct
from lunet_fast.recsys.model.sampling import sampled
from lunet_fast.recsys.model.scoring import ItemScorer
from lunet_fast.recsys.model.sequence_config import SequenceConfig
from lunet_fast.training.distributed import Workers, existing_device
from lunet_fast.training.figures import save_loss_figure
from lunet_fast.training.files import read_json, write_json
from lunet_fast.training.loop import (
    Batch,
    Curve,
    Phase,
    ShuffledRows,
    cpu_threads,
)
from lunet_fast.training.machine import flat_versions
from lunet_fast.training.run import Options, Result, Run
from lunet_fast.training.seeding import seeded

if TYPE_CHECKING:
    from typing_extensions import Unpack


def train(
    ratings: Ratings,
    config: TrainConfig,
    *,
    test: Ratings | None = None,
    device: torch.device | str = "cpu",
    workers: Workers | None = None,
    **options: Unpack[Options],
) -> Result[TrainedModel]:
    """Train the recommender, with gamma 1 and ``config.mlp`` the MLP control too, and evaluate both.

    ``ratings`` is split as ``config.split`` and ``config.seed`` say. With ``test`` given it is the training
    part itself, and the split is called ``files`` (:func:`~lunet_fast.recsys.data.splits.join` gives two
    files one set of ids). Metrics of ranking are those of
    :func:`~lunet_fast.recsys.measures.protocols.evaluate_ranking`. The last epoch's weights are the result:
    the test part is evaluated at each epoch for the loss figure, and nothing decides by it.

    ``options`` are :class:`~lunet_fast.training.run.Options`: the run folder ``out``, ``resume``,
    ``overwrite``, ``checkpoint_seconds``, ``progress``, ``stop`` and ``callbacks``, which hear of the
    recommender's epochs, not of the control's.

    ``workers`` are the processes that train together (:mod:`lunet_fast.training.distributed`): all call this
    with the same arguments and get the same weights, process 0 alone writes and evaluates, and ``metrics``
    are empty for the others. ``config.batch_size`` rows a step are shared by all; a training may be resumed
    by another number of processes.

    Raises :class:`~lunet_fast.training.loop.DivergenceError` when the loss is not finite or absurd,
    ``RunFolderError`` for an unusable folder, ``CheckpointError`` for a damaged checkpoint, ``OSError`` for a
    file that cannot be written, ``ValueError`` for data that cannot be trained on.
    """
    if config.patience is not None and config.recipe != "auto":
        raise ValueError(
            f"patience={config.patience} is of recipe 'auto', which looks for the number of epochs: choose "
            f"it, or leave patience away and say how many epochs recipe {config.recipe!r} shall have"
        )
    run = Run(workers or Workers(device=existing_device(device)), **options)
    if test is not None:
        config = config.replace(split="files")
    parts = Parts.of(ratings, config.split, config.seed) if test is None else Parts(ratings, test, None, None)
    for part, rows in (("training", parts.training), ("test", parts.test)):
        if rows is not None:
            check_ratings(part, rows)
    recorded = {} if run.folder is None else recorded_settings(config, parts)
    defaults = TrainConfig().to_dict()
    stored = run.finished(recorded, defaults)
    if stored is not None:
        return Result(load_model(stored.model), read_json(stored.metrics), Curve())
    with run.begun(recorded, defaults):
        return _trained(config, parts, run)


def _trained(config: TrainConfig, parts: Parts, run: Run) -> Result[TrainedModel]:
    """What :func:`train` does within its folder."""
    phases = _Phases(config, parts, run)
    training, is_first = parts.training, run.workers.is_first
    values: dict[str, Any] = {}
    with cpu_threads(config.threads):
        model, curve = phases.lu_net()
        if is_first:
            values = evaluate(model, parts, run.workers.device).figures
        if config.mlp and config.gamma == 1:
            values |= phases.control()
        if config.recipe == "auto" and is_first:
            values |= plain_figures(parts, config)
    trained = TrainedModel(
        model.to("cpu"), training.users, training.items, training.scale, training.item_info, known_of(parts)
    )
    if not is_first:
        return Result(trained, {}, curve)
    rows = tuple(0 if part is None else len(part) for part in (training, parts.test, parts.held_out))
    values |= described(training.name, model, curve, rows, run.workers)
    if run.folder is not None:
        save_model(run.folder.model, trained)
        if parts.candidates is not None:
            save_candidates(run.folder.candidates, parts)
        title = f"{dataset_title(training.name)}, recipe {config.recipe}"
        ylabel = "mean squared error" if config.gamma > 0 else "loss of interactions"
        save_loss_figure(run.folder.loss, title, curve.train, curve.test, ylabel)
        write_json(run.folder.metrics, values)
    return Result(trained, values, curve)


def described(
    dataset: str, model: RatingModel, curve: Curve, rows: tuple[int, ...], workers: Workers
) -> dict[str, Any]:
    """What ``metrics.json`` says of a training beside its errors; ``rows``: of training, test, held out."""
    config = model.config
    return {
        "dataset": dataset,
        "recipe": config.recipe,
        "network": config.network,
        "split": config.split,
        "seed": config.seed,
        "epochs": len(curve.train),
        "train_seconds": round(curve.seconds, 3),
        "parameters": sum(p.numel() for p in model.learnt()),
        **dict(zip(("train_ratings", "test_ratings", "held_out_ratings"), rows, strict=True)),
        "gamma": config.gamma,
        "world_size": workers.world_size,
        "global_batch": config.batch_size,
        **flat_versions("pandas"),
    }


def check_ratings(part: str, rows: Ratings) -> None:
    """What a table of ratings that no reader has made may hold."""
    if len(rows) == 0:
        raise ValueError(f"the {part} part of {rows.name} is empty")
    bad = (~torch.isfinite(rows.rating)).nonzero()
    if len(bad):
        row = int(bad[0])
        raise ValueError(
            f"the {part} part of {rows.name} has the rating {rows.rating[row].item()} in row {row} (from 0): "
            "leave such rows out"
        )
    for side, index, count in (("user", rows.user, rows.n_users), ("item", rows.item, rows.n_items)):
        low, high = int(index.min()), int(index.max())
        if low < 0 or high >= count:
            raise ValueError(
                f"the {part} part of {rows.name} has {side} indices from {low} to {high}, and there are "
                f"{count} {side}s: an index is from 0 to {count - 1}"
            )


@torch.no_grad()
def evaluate(model: RatingModel, parts: Parts, device: torch.device | str = "cpu") -> Ranking:
    """All metrics of a model on the parts that it was not trained on; the model is on the CPU afterwards.

    ``test_mse`` and ``test_rmse`` of the clipped predictions on the test part; the reconstruction error over
    the test pairs, or else the held-out ones; and those of
    :func:`~lunet_fast.recsys.measures.protocols.evaluate_ranking`. With the threads of ``model.config`` they
    are those of ``metrics.json`` to the last digit.
    """
    values: dict[str, float] = {}
    pairs = parts.test or parts.held_out
    model.to(device)
    if pairs is not None:
        reconstruction = reconstruct(model, pairs.user.to(device), pairs.item.to(device))
        values["reconstruction_error"] = reconstruction.error
        values["reconstruction_error_relative"] = reconstruction.relative
    if parts.test is not None and model.config.gamma > 0:
        test = _Part.of(parts.test, device)
        prediction = predict_ratings(model, test.user, test.item, parts.training.scale)
        values["test_mse"] = metrics.mse(prediction, test.rating)
        values["test_rmse"] = metrics.rmse(prediction, test.rating)
    model.to("cpu")
    scorer = ItemScorer(model, model.histories(), device)
    ranking = evaluate_ranking(scorer.scores, parts, model.config.seed, model.config.positive_from)
    return ranking._replace(metrics={**values, **ranking.metrics})


def known_of(parts: Parts) -> Interactions | None:
    """Every pair of the data for the model's file; None where training had all of them."""
    if not parts.beyond_training():
        return None
    return Interactions.of_pairs(parts.known_pairs(), parts.training.n_users, parts.training.n_items)


def ratings_digest(parts: Parts) -> str:
    """SHA-256 over users, items and ratings of all parts: what ``config.json`` says of the data."""
    digest = hashlib.sha256()
    for part in (parts.training, parts.test, parts.held_out):
        if part is not None:
            for tensor in (part.user, part.item, part.rating):
                digest.update(tensor.cpu().numpy().tobytes())
    return digest.hexdigest()


def ids_digest(parts: Parts) -> str:
    """SHA-256 over the ids of users and items, to which the indices of :func:`ratings_digest` lead."""
    digest = hashlib.sha256()
    for ids in (parts.training.users, parts.training.items):
        digest.update(json.dumps(ids.ids.tolist()).encode())
    return digest.hexdigest()


def recorded_settings(config: TrainConfig | SequenceConfig, parts: Parts) -> dict[str, Any]:
    """The content of ``config.json``: all settings, and what data they were used on."""
    training = parts.training
    return {
        "dataset": training.name,
        "source": training.source,
        "reading": training.reading,
        "users": training.n_users,
        "items": training.n_items,
        "scale": list(training.scale),
        "ratings_sha256": ratings_digest(parts),
        "ids_sha256": ids_digest(parts),
        **config.to_dict(),
    }


# One step, as the benchmark of training takes it too --------------------------------------------------------


def rating_optimizer(model: RatingModel) -> torch.optim.Adam:
    """Adam for the recommender: rates and L2 of their own for the tables and for the network."""
    config = model.config
    tables = [table.weight for table in model.tables()]
    net = list(model.nets.parameters())
    special = {id(p) for p in (*tables, *net)}
    groups: list[dict[str, Any]] = [
        {"params": tables, "lr": config.learning_rate, "weight_decay": config.weight_decay},
        {"params": net, "lr": config.net_learning_rate, "weight_decay": config.net_weight_decay},
        {"params": [p for p in model.parameters() if id(p) not in special], "lr": config.learning_rate},
    ]
    return _adam(groups)


def rating_objective(
    model: RatingModel,
    users: Tensor,
    items: Tensor,
    ratings: Tensor,
    generator: torch.Generator,
    sampler: NegativeSampler | None = None,
    share: slice | None = None,
    weight: Tensor | None = None,
) -> Losses:
    """:func:`~.losses.hybrid_loss` of a batch of training ratings, each argument ``[B]``.

    ``sampler`` draws the pairs without interaction, which gamma below 1 needs; ``generator`` is its own and
    dropout's. ``share`` are the rows whose loss is wanted, all by default; draws are made for all. ``weight``
    is that of the interactions.
    """
    rows, count = len(users), 0
    drawn = None
    if sampler is not None:
        count = model.config.negatives
        drawn = sampler.draw(users, count, generator)
    dropout = model.draw_dropout(rows * (1 + count), generator)
    if share is not None and share != slice(0, rows):
        if dropout is not None:
            negative = slice(rows + share.start * count, rows + share.stop * count)
            dropout = torch.cat((dropout[:, share], dropout[:, negative]), dim=1)
        users, items, ratings = users[share], items[share], ratings[share]
        drawn = None if drawn is None else drawn[share]
        weight = None if weight is None else weight[share]
    observed: bool | Tensor = True
    if drawn is not None:
        observed = torch.arange(len(users) * (1 + count), device=users.device) < len(users)
        users = torch.cat((users, users.repeat_interleave(count)))
        items = torch.cat((items, drawn.flatten()))
    output = model.output(users, items, observed=observed, dropout=dropout, strength=1.0)
    return hybrid_loss(model, output, ratings, weight)


def batch_objective(
    model: RatingModel, sampler: NegativeSampler | None
) -> Callable[[Batch, slice, torch.Generator], Losses]:
    """:func:`rating_objective` as a phase takes it, of batches (users, items, ratings, maybe weights)."""

    def objective(batch: Batch, share: slice, generator: torch.Generator) -> Losses:
        users, items, ratings, *weight = batch
        return rating_objective(model, users, items, ratings, generator, sampler, share, *weight)

    return objective


def control_optimizer(model: MLPModel, config: TrainConfig) -> torch.optim.Adam:
    """Adam for the MLP control: one rate, L2 of their own for the tables and for the layers."""
    tables = [model.user_embedding.weight, model.item_embedding.weight]
    rest = [*model.hidden.parameters(), *model.readout.parameters()]
    groups = [
        {"params": tables, "lr": config.mlp_learning_rate, "weight_decay": config.mlp_weight_decay},
        {"params": rest, "lr": config.mlp_learning_rate, "weight_decay": config.mlp_net_weight_decay},
    ]
    return _adam(groups)


def control_objective(
    model: MLPModel, users: Tensor, items: Tensor, ratings: Tensor
) -> tuple[Tensor, Tensor]:
    """Squared error of the control on a batch, each argument ``[B]``: to differentiate, and to report."""
    loss = F.mse_loss(model(users, items), ratings)
    return loss, loss.detach()


def _adam(groups: list[dict[str, Any]]) -> torch.optim.Adam:
    return torch.optim.Adam(groups, fused=groups[0]["params"][0].device.type in ("cpu", "cuda"))


@dataclass(frozen=True)
class _Part:
    """Ratings as the loop uses them: three tensors on the device, moved there once."""

    user: Tensor
    item: Tensor
    rating: Tensor

    @classmethod
    def of(cls, ratings: Ratings, device: torch.device | str) -> _Part:
        return cls(ratings.user.to(device), ratings.item.to(device), ratings.rating.to(device))

    def __len__(self) -> int:
        return len(self.rating)

    def on_cpu(self) -> Triple:
        return self.user.cpu(), self.item.cpu(), self.rating.cpu()


class _Phases:
    """The phases of one training and what they share."""

    def __init__(self, config: TrainConfig, parts: Parts, run: Run) -> None:
        self.config, self.run, self.device = config, run, run.workers.device
        training, test = parts.training, parts.test
        self.training = _Part.of(training, self.device)
        self.test = None if test is None else _Part.of(test, self.device)
        self.known = parts.known_pairs().to(self.device)
        self.scale = training.scale
        self.weight: tuple[Tensor, ...] = ()
        """Of the training ratings in the interactions' loss, where they count differently."""
        if config.confidence:
            if training.weight is None:
                raise ValueError(
                    f"confidence={config.confidence:g} is of counts, which {training.name} has none of: name "
                    "their column (weight=...)"
                )
            self.weight = (confidence_weights(training.weight, config.confidence).to(self.device),)
        self.shape = training.n_users, training.n_items
        self.features = side_features(training) if config.side_features else (None, None)

    def lu_net(self) -> tuple[RatingModel, Curve]:
        """Train the recommender."""
        config, part = self.config, self.training
        with seeded(config.seed):
            triple = part.on_cpu()
            user_features, item_features = self.features
            model = RatingModel(
                config, *triple, *self.shape, user_features=user_features, item_features=item_features
            )
        if config.inference == "gibbs":
            test = None if self.test is None else self.test.on_cpu()
            curve = sampled(model, part.on_cpu(), test, self.scale, self.run)
            return model.to(self.device), curve
        model.to(self.device)
        sampler = NegativeSampler.of(model, self.known) if config.gamma < 1 else None

        phase = Phase(
            name="LU-Net",
            module=model,
            optimizer=rating_optimizer(model),
            batches=ShuffledRows((part.user, part.item, part.rating, *self.weight), config.batch_size),
            epochs=config.epochs,
            seed=config.seed,
            objective=batch_objective(model, sampler),
            rate=("learning_rate", config.learning_rate),
            test_loss=self._test_loss(model) if config.gamma > 0 else None,
            callbacks=self.run.callbacks,
            error_limit=error_limit(self.scale) if config.gamma > 0 else float("inf"),
            linear_decay=config.schedule == "linear",
            locate=lambda batch: first_overflow(model, *batch[:2]),
        )
        return model, self.run.fit(phase)

    def control(self) -> dict[str, Any]:
        """Train the MLP of table 2, then a decoder from its last hidden layer to x, and evaluate both."""
        config, part = self.config, self.training
        size, hidden = config.mlp_embedding_size, config.mlp_hidden
        with seeded(config.seed):
            mean = part.rating.double().mean().item()
            model = MLPModel(*self.shape, size, hidden, mean, config.embedding_std)
            # The mirror image of the network that it has to undo.
            decoder = perceptron((*reversed(hidden), 2 * size))
        model.to(self.device)
        decoder.to(self.device)

        def objective(batch: Batch, share: slice, generator: torch.Generator) -> tuple[Tensor, Tensor]:
            users, items, ratings = (column[share] for column in batch)
            return control_objective(model, users, items, ratings)

        def decoding_objective(
            batch: Batch, share: slice, generator: torch.Generator
        ) -> tuple[Tensor, Tensor]:
            with torch.no_grad():
                x, h = model.latent(batch[0][share], batch[1][share])
            loss = (decoder(h) - x).square().sum(-1).mean()
            return loss, loss.detach()

        common: dict[str, Any] = {
            "batches": ShuffledRows((part.user, part.item, part.rating), config.mlp_batch_size),
            "epochs": config.mlp_epochs,
            "seed": config.seed,
            "rate": ("mlp_learning_rate", config.mlp_learning_rate),
        }
        curve = self.run.fit(
            Phase(
                name="MLP",
                module=model,
                optimizer=control_optimizer(model, config),
                objective=objective,
                test_loss=self._test_loss(model),
                error_limit=error_limit(self.scale),
                **common,
            )
        )
        if self.test is None:
            return {}
        decoder_rates = [{"params": list(decoder.parameters()), "lr": config.mlp_learning_rate}]
        self.run.fit(
            Phase(
                name="decoder",
                module=decoder,
                optimizer=_adam(decoder_rates),
                objective=decoding_objective,
                **common,
            )
        )
        if not self.run.workers.is_first:
            return {}
        prediction = predict_ratings(model, self.test.user, self.test.item, self.scale)
        reconstruction = decode(model, decoder, self.test.user, self.test.item)
        return {
            "mlp_test_mse": metrics.mse(prediction, self.test.rating),
            "mlp_reconstruction_error": reconstruction.error,
            "mlp_reconstruction_error_relative": reconstruction.relative,
            "mlp_train_seconds": round(curve.seconds, 3),
            "mlp_parameters": sum(p.numel() for p in model.parameters()),
        }

    def _test_loss(self, model: RatingModel | MLPModel) -> Callable[[], float] | None:
        test = self.test
        if test is None:
            return None
        return lambda: metrics.mse(predict_ratings(model, test.user, test.item, self.scale), test.rating)


def error_limit(scale: tuple[float, float]) -> float:
    """A mean squared error that no constant rating within the scale can have."""
    low, high = scale
    return 4 * max((high - low) ** 2, 1.0)


@torch.no_grad()
def first_overflow(model: RatingModel, users: Tensor, items: Tensor) -> str:
    """Where a pass over the pairs, int64 ``[B]``, is first not finite: ``the embeddings``, or a layer's name.

    For messages; member by member and layer by layer.
    """
    x = model.embed(users, items, model.histories(), True)
    if not bool(torch.isfinite(x).all()):
        return "the embeddings with their histories"
    for member, net in enumerate(model.nets):
        z = x[member]
        for place, layer in enumerate(cast(LUNet, net).layers):
            z = layer(z)
            if not bool(torch.isfinite(z).all()):
                return f"the output of nets.{member}.layers.{place}"
    return "the read-out or the loss"

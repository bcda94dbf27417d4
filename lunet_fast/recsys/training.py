"""The training loop, and :func:`train`, which is all of ``lunet-fast train`` behind its arguments."""

from __future__ import annotations

import hashlib
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lunet_fast
from lunet_fast.recsys import metrics, report
from lunet_fast.recsys.checkpoints import (
    RunFolder,
    TrainedModel,
    load_model,
    load_training,
    read_json,
    save_candidates,
    save_model,
    save_training,
    write_json,
)
from lunet_fast.recsys.config import TrainConfig
from lunet_fast.recsys.evaluation import decode, predict_ratings, reconstruct
from lunet_fast.recsys.features import side_features
from lunet_fast.recsys.losses import Losses, hybrid_loss
from lunet_fast.recsys.model import MLPModel, RatingModel, perceptron
from lunet_fast.recsys.negatives import NegativeSampler
from lunet_fast.recsys.protocols import Parts, Ranking, evaluate_ranking
from lunet_fast.recsys.ratings import Ratings
from lunet_fast.recsys.scoring import ItemScorer

CHECK_EVERY = 50
"""Steps between two looks at the loss: each look waits for the device."""


class DivergenceError(ArithmeticError):
    """Training has diverged; the message names the phase, the epoch, the step and the likely remedy."""


class Progress:
    """Hears how a training goes; this one is silent. Phases are ``LU-Net``, ``MLP`` and ``decoder``."""

    def start(self, phase: str, epochs: int, steps: int, done: int) -> None:
        """A phase of ``epochs`` epochs of ``steps`` steps begins; ``done`` of them are finished already."""

    def step(self, phase: str, epoch: int, steps: int) -> None:
        """``steps`` steps of epoch ``epoch`` (from 0) are done; called every CHECK_EVERY steps."""

    def epoch(self, phase: str, epoch: int, train_loss: float, test_loss: float | None) -> None:
        """Epoch ``epoch`` (from 0) is done, its checkpoint written where one was due."""


@dataclass
class Curve:
    """Mean squared error by epoch: while training, and on the test part (empty without one).

    With gamma 0 there are no ratings to be wrong about, and ``train`` is the interactions' loss. ``elapsed``
    is the time spent training up to the end of each epoch, in seconds, without evaluation and files.
    """

    train: list[float] = field(default_factory=list)
    test: list[float] = field(default_factory=list)
    elapsed: list[float] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """The time spent training in all."""
        return self.elapsed[-1] if self.elapsed else 0.0


@dataclass(frozen=True)
class TrainResult:
    """What :func:`train` returns; ``metrics`` is the content of ``metrics.json``."""

    trained: TrainedModel
    metrics: dict[str, Any]
    curve: Curve


@dataclass
class _Phase:
    """One module to train for a number of epochs over the training rows."""

    name: str
    module: nn.Module
    optimizer: torch.optim.Optimizer
    rows: int
    epochs: int
    batch_size: int
    seed: int
    # (row numbers [B], generator for dropout) -> loss to differentiate, squared error to report
    objective: Callable[[Tensor, torch.Generator], tuple[Tensor, Tensor]]
    test_loss: Callable[[], float] | None
    error_limit: float
    rate_setting: str
    linear_decay: bool = False


def train(
    ratings: Ratings,
    config: TrainConfig,
    *,
    test: Ratings | None = None,
    out: Path | str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
    checkpoint_seconds: float = 20.0,
) -> TrainResult:
    """Train the recommender, with gamma 1 and ``config.mlp`` the MLP control too, and evaluate both.

    ``ratings`` is split as ``config.split`` and ``config.seed`` say. With ``test`` given it is the training
    part itself, and the split is called ``files`` (:func:`~lunet_fast.recsys.splits.join` gives two files
    one set of ids). Metrics of ranking are those of
    :func:`~lunet_fast.recsys.protocols.evaluate_ranking`. The last epoch's weights are the result: the test
    part is evaluated at each epoch for the loss figure, and nothing decides by it.

    ``out`` is the run folder to write; without it nothing is written. There, ``resume`` goes on from the
    last checkpoint to the weights that the uninterrupted training would have given, bit for bit on a CPU;
    it starts from the beginning where there is no checkpoint, and returns the stored result (without its
    curve) where the training is finished. A folder with another training is refused unless ``overwrite``.
    Checkpoints are written at the end of an epoch, at least ``checkpoint_seconds`` apart, and at the last.

    Raises :class:`DivergenceError` when the loss is not finite or absurd, ``RunFolderError`` for an unusable
    folder, ``ValueError`` for data that cannot be trained on.
    """
    device = _device(device)
    folder = None if out is None else RunFolder(Path(out))
    if folder is not None:
        folder.prepare(resume=resume, overwrite=overwrite)
    if test is not None:
        config = config.replace(split="files")
    parts = Parts.of(ratings, config) if test is None else Parts(ratings, test, None, None)
    training, test = parts.training, parts.test
    for part, rows in (("training", training), ("test", test)):
        if rows is not None and len(rows) == 0:
            raise ValueError(f"the {part} part of {ratings.name} is empty ({len(ratings)} ratings in all)")
    if folder is not None:
        folder.begin(_resolved(config, parts), resume=resume)
        if resume and folder.is_finished():
            return TrainResult(load_model(folder.model), read_json(folder.metrics), Curve())

    run = _Run(
        config=config,
        training=_Part.of(training, device),
        test=None if test is None else _Part.of(test, device),
        known=parts.known_pairs().to(device),
        scale=training.scale,
        shape=(training.n_users, training.n_items),
        features=side_features(training) if config.side_features else (None, None),
        device=device,
        checkpoints=None if folder is None else folder.checkpoints,
        resume=resume,
        checkpoint_seconds=checkpoint_seconds,
        progress=progress or Progress(),
    )
    with cpu_threads(config.threads):
        model, curve = run.lu_net()
        values: dict[str, Any] = evaluate(model, parts, device).metrics
        if config.mlp and config.gamma == 1:
            values |= run.control()
    trained = TrainedModel(model, training.users, training.items, training.scale, training.item_info)
    values |= {
        "dataset": training.name,
        "recipe": config.recipe,
        "split": config.split,
        "seed": config.seed,
        "epochs": config.epochs,
        "train_seconds": round(curve.seconds, 3),
        "parameters": sum(p.numel() for p in model.parameters()),
        "train_ratings": len(training),
        "test_ratings": 0 if test is None else len(test),
        "held_out_ratings": 0 if parts.held_out is None else len(parts.held_out),
        "gamma": config.gamma,
        **versions(),
    }
    if folder is not None:
        save_model(folder.model, trained)
        if parts.candidates is not None:
            save_candidates(folder.candidates, parts)
        title = f"{report.dataset_title(training.name)}, recipe {config.recipe}"
        ylabel = "mean squared error" if config.gamma > 0 else "loss of interactions"
        report.save_loss_figure(folder.loss, title, curve.train, curve.test, ylabel)
        write_json(folder.metrics, values)
    return TrainResult(trained, values, curve)


def _device(name: torch.device | str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device={str(name)!r} is no device: use 'cpu', 'cuda' or 'cuda:1'") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={str(name)!r}: PyTorch sees no CUDA device here; use device='cpu'")
    return device


def versions() -> dict[str, str]:
    """Versions of what computes the result, as flat keys."""
    return {
        "version_lunet_fast": lunet_fast.__version__,
        "version_python": platform.python_version(),
        "version_torch": torch.__version__,
        "version_numpy": np.__version__,
        "version_pandas": pd.__version__,
    }


@torch.no_grad()
def evaluate(model: RatingModel, parts: Parts, device: torch.device | str = "cpu") -> Ranking:
    """All metrics of a model on the parts that it was not trained on; the model is on the CPU afterwards.

    ``test_mse`` and ``test_rmse`` of the clipped predictions on the test part; the reconstruction error over
    the test pairs, or else the held-out ones; and :func:`~.protocols.evaluate_ranking`'s. With the threads
    of ``model.config`` they are those of ``metrics.json`` to the last digit.
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
    ranking = evaluate_ranking(scorer.scores, parts, model.config.seed)
    return Ranking({**values, **ranking.metrics}, ranking.groups)


def ratings_digest(parts: Parts) -> str:
    """SHA-256 over users, items and ratings of all parts: what ``config.json`` says of the data."""
    digest = hashlib.sha256()
    for part in (parts.training, parts.test, parts.held_out):
        if part is not None:
            for tensor in (part.user, part.item, part.rating):
                digest.update(tensor.cpu().numpy().tobytes())
    return digest.hexdigest()


def _resolved(config: TrainConfig, parts: Parts) -> dict[str, Any]:
    """The content of ``config.json``: all settings, and what data they were used on."""
    training = parts.training
    return {
        "dataset": training.name,
        "source": training.source,
        "users": training.n_users,
        "items": training.n_items,
        "scale": list(training.scale),
        "ratings_sha256": ratings_digest(parts),
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
) -> Losses:
    """:func:`~.losses.hybrid_loss` of a batch of training ratings, each argument ``[B]``.

    ``sampler`` draws the pairs without interaction, which gamma below 1 needs; ``generator`` is its own and
    dropout's.
    """
    observed: bool | Tensor = True
    if sampler is not None:
        count = model.config.negatives
        drawn = sampler.draw(users, count, generator)
        observed = torch.arange(len(users) * (1 + count), device=users.device) < len(users)
        users = torch.cat((users, users.repeat_interleave(count)))
        items = torch.cat((items, drawn.flatten()))
    output = model.output(users, items, observed=observed, dropout_generator=generator)
    return hybrid_loss(model, output, ratings)


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


def descend(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    """Move the parameters by one step of the optimiser on the gradient of ``loss``."""
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


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


@dataclass
class _Run:
    """The phases of one training and what they share."""

    config: TrainConfig
    training: _Part
    test: _Part | None
    known: Tensor
    scale: tuple[float, float]
    shape: tuple[int, int]
    features: tuple[Tensor | None, Tensor | None]
    device: torch.device
    checkpoints: Path | None
    resume: bool
    checkpoint_seconds: float
    progress: Progress

    def lu_net(self) -> tuple[RatingModel, Curve]:
        """Train the recommender."""
        config, part = self.config, self.training
        with _seeded(config.seed):
            triple = part.user.cpu(), part.item.cpu(), part.rating.cpu()
            user_features, item_features = self.features
            model = RatingModel(
                config, *triple, *self.shape, user_features=user_features, item_features=item_features
            )
        model.to(self.device)
        sampler = NegativeSampler.of(model, self.known) if config.gamma < 1 else None

        def objective(rows: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
            batch = part.user[rows], part.item[rows], part.rating[rows]
            return rating_objective(model, *batch, generator, sampler)

        phase = _Phase(
            name="LU-Net",
            module=model,
            optimizer=rating_optimizer(model),
            rows=len(part),
            epochs=config.epochs,
            batch_size=config.batch_size,
            seed=config.seed,
            objective=objective,
            test_loss=self._test_loss(model) if config.gamma > 0 else None,
            error_limit=self._error_limit() if config.gamma > 0 else float("inf"),
            rate_setting="learning_rate",
            linear_decay=config.schedule == "linear",
        )
        return model, self._fit(phase)

    def control(self) -> dict[str, Any]:
        """Train the MLP of table 2, then a decoder from its last hidden layer to x, and evaluate both."""
        config, part = self.config, self.training
        size, hidden = config.mlp_embedding_size, config.mlp_hidden
        with _seeded(config.seed):
            mean = part.rating.double().mean().item()
            model = MLPModel(*self.shape, size, hidden, mean, config.embedding_std)
            # The mirror image of the network that it has to undo.
            decoder = perceptron((*reversed(hidden), 2 * size))
        model.to(self.device)
        decoder.to(self.device)

        def objective(rows: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
            return control_objective(model, part.user[rows], part.item[rows], part.rating[rows])

        def decoding_objective(rows: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
            with torch.no_grad():
                x, h = model.latent(part.user[rows], part.item[rows])
            loss = (decoder(h) - x).square().sum(-1).mean()
            return loss, loss.detach()

        common: dict[str, Any] = {
            "rows": len(part),
            "epochs": config.mlp_epochs,
            "batch_size": config.mlp_batch_size,
            "seed": config.seed,
            "rate_setting": "mlp_learning_rate",
        }
        curve = self._fit(
            _Phase(
                name="MLP",
                module=model,
                optimizer=control_optimizer(model, config),
                objective=objective,
                test_loss=self._test_loss(model),
                error_limit=self._error_limit(),
                **common,
            )
        )
        if self.test is None:
            return {}
        decoder_rates = [{"params": list(decoder.parameters()), "lr": config.mlp_learning_rate}]
        self._fit(
            _Phase(
                name="decoder",
                module=decoder,
                optimizer=_adam(decoder_rates),
                objective=decoding_objective,
                test_loss=None,
                error_limit=float("inf"),
                **common,
            )
        )
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

    def _error_limit(self) -> float:
        """A mean squared error that no constant rating within the scale can have."""
        low, high = self.scale
        return 4 * max((high - low) ** 2, 1.0)

    def _fit(self, phase: _Phase) -> Curve:
        """Run the epochs of a phase, from its checkpoint where one is to be resumed."""
        file = None if self.checkpoints is None else self.checkpoints / f"{phase.name.lower()}.safetensors"
        generator = torch.Generator(self.device).manual_seed(phase.seed)
        curve, first = Curve(), 0
        if self.resume and file is not None and file.is_file():
            state = load_training(file, phase.module, phase.optimizer, generator)
            first = state["epoch"]
            curve = Curve(state["train_loss"], state["test_loss"], state["elapsed"])
        steps = -(-phase.rows // phase.batch_size)
        rates = [group["lr"] for group in phase.optimizer.param_groups]
        self.progress.start(phase.name, phase.epochs, steps, first)
        written = time.monotonic()
        for epoch in range(first, phase.epochs):
            began = time.monotonic()
            error = self._epoch(phase, epoch, steps, rates, generator)
            now = time.monotonic()
            curve.elapsed.append(curve.seconds + now - began)
            curve.train.append(error)
            if phase.test_loss is not None:
                curve.test.append(phase.test_loss())
            last = epoch == phase.epochs - 1
            if file is not None and (last or now - written >= self.checkpoint_seconds):
                state = {
                    "phase": phase.name,
                    "epoch": epoch + 1,
                    "train_loss": curve.train,
                    "test_loss": curve.test,
                    "elapsed": curve.elapsed,
                }
                save_training(file, phase.module, phase.optimizer, generator, state)
                written = now
            self.progress.epoch(phase.name, epoch, error, curve.test[-1] if curve.test else None)
        return curve

    def _epoch(
        self, phase: _Phase, epoch: int, steps: int, rates: list[float], generator: torch.Generator
    ) -> float:
        """One pass over the training rows in random order; the mean squared error on the way."""
        order = torch.randperm(phase.rows, generator=generator, device=self.device)
        errors = torch.zeros(steps, device=self.device)
        for step, rows in enumerate(order.split(phase.batch_size)):
            if phase.linear_decay:
                left = 1 - (epoch * steps + step) / (phase.epochs * steps)
                for group, rate in zip(phase.optimizer.param_groups, rates, strict=True):
                    group["lr"] = rate * left
            loss, error = phase.objective(rows, generator)
            descend(phase.optimizer, loss)
            errors[step] = error * (len(rows) / phase.rows)
            if step % CHECK_EVERY == CHECK_EVERY - 1 or step == steps - 1:
                self._check(phase, epoch, errors[: step + 1])
                self.progress.step(phase.name, epoch, step + 1)
        mean = errors.sum().item()
        if not mean <= phase.error_limit:
            raise DivergenceError(
                f"{phase.name}: the training error of epoch {epoch + 1} is {mean:.3g}, worse than any "
                f"constant rating: {self._remedy(phase)}"
            )
        # The last step's update is in no loss yet.
        for name, parameter in phase.module.named_parameters():
            if not bool(torch.isfinite(parameter).all()):
                raise DivergenceError(
                    f"{phase.name}: {name} is not finite after epoch {epoch + 1}: {self._remedy(phase)}"
                )
        return mean

    def _check(self, phase: _Phase, epoch: int, errors: Tensor) -> None:
        bad = torch.nonzero(~torch.isfinite(errors))
        if len(bad):
            step = int(bad[0]) + 1
            raise DivergenceError(
                f"{phase.name}: the loss is {errors[step - 1].item()} at epoch {epoch + 1}, step {step}: "
                f"{self._remedy(phase)}"
            )

    def _remedy(self, phase: _Phase) -> str:
        rate = getattr(self.config, phase.rate_setting)
        return f"{phase.rate_setting}={rate:g} is most likely too high, try {rate / 5:g}"


@contextmanager
def cpu_threads(count: int) -> Iterator[None]:
    """Inside, PyTorch computes with ``count`` CPU threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Inside, PyTorch's global CPU generator is seeded: modules draw their initial weights from it."""
    # Not the seed of the batches' generator, or first weights and first order would share their numbers.
    mixed = torch.randint(2**62, (), generator=torch.Generator().manual_seed(seed))
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int(mixed))
        yield

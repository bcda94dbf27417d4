"""Training of a density: the loop of the recommender, with a validation part that chooses the weights."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lunet_fast.density.config import DensityConfig
from lunet_fast.density.data import Parts, Rows, source_of, split
from lunet_fast.density.evaluation import evaluate
from lunet_fast.density.files import load_flow, save_flow
from lunet_fast.density.model import DensityModel, build_flow, fit_input, whiten
from lunet_fast.density.preprocessing import Preprocessing
from lunet_fast.layers.fitting import average_, parameter_groups
from lunet_fast.training.distributed import Workers, existing_device
from lunet_fast.training.figures import save_loss_figure
from lunet_fast.training.files import read_json, write_json
from lunet_fast.training.loop import Batch, Curve, Phase, cpu_threads
from lunet_fast.training.machine import flat_versions
from lunet_fast.training.run import Options, Result, Run
from lunet_fast.training.seeding import seeded

if TYPE_CHECKING:
    from typing_extensions import Unpack

VALIDATION_DRAWS = 4
"""Draws of the noise in a look at the validation part, the same at each look."""


def train_density(
    rows: Rows,
    config: DensityConfig,
    *,
    test: Rows | None = None,
    device: torch.device | str = "cpu",
    **options: Unpack[Options],
) -> Result[DensityModel]:
    """Train a flow on 70 % of the rows, choose its weights by 10 %, evaluate it on 20 % or on ``test``.

    ``options`` are :class:`~lunet_fast.training.run.Options`: the run folder ``out``, ``resume``,
    ``overwrite``, ``checkpoint_seconds``, ``progress`` and ``stop``. ``device`` is where it is trained; the
    result is on the CPU.

    Raises :class:`~lunet_fast.training.loop.DivergenceError` when the loss is not finite, ``RunFolderError``
    for an unusable folder, ``CheckpointError`` for a damaged checkpoint, ``ValueError`` for data without a
    density.
    """
    workers = Workers(device=existing_device(device))
    parts = split(rows, config.seed, test)
    config = config.replace(learning_rate=config.rate(rows.features))
    run = Run(workers, **options)
    recorded = _recorded(rows, test, config)
    stored = run.finished(recorded)
    if stored is not None:
        return Result(load_flow(stored.model).model, read_json(stored.metrics), Curve())
    first = _untrained(parts.training, rows.classes, config)
    with run.begun(recorded):
        with cpu_threads(config.threads):
            model, curve, chosen = fit_flow(first, parts, config, run)
            values = evaluate(model, parts)
        metrics = {
            "dataset": rows.name,
            "seed": config.seed,
            "unit": model.preprocessing.unit,
            **values,
            "best_round": chosen,
            "rounds": len(curve.train),
            "train_seconds": round(curve.seconds, 3),
            "parameters": sum(p.numel() for p in first.flow.parameters()),
            "features": rows.features,
            "train_rows": len(parts.training),
            "validation_rows": len(parts.validation),
            "test_rows": len(parts.test),
            **flat_versions(),
        }
        if run.folder is not None:
            save_flow(run.folder.model, model, config, replace(rows, source=source_of(rows, test)))
            save_loss_figure(
                run.folder.loss,
                f"{rows.name}, {config.layers} layers",
                curve.train,
                curve.test,
                f"loss, {model.preprocessing.unit}",
                held_out="validation",
                unit=f"round of {config.round_steps} steps",
            )
            write_json(run.folder.metrics, metrics)
    return Result(model, metrics, curve)


def _recorded(rows: Rows, test: Rows | None, config: DensityConfig) -> dict[str, Any]:
    """What ``config.json`` has. What would say nothing is left out, as it was before it could be chosen."""
    settings = config.to_dict()
    if config.activation == "leaky_softplus" and config.input_bins == 0:
        for name in ("activation", "bins", "input_bins", "tails"):
            del settings[name]
    recorded = {
        "dataset": rows.name,
        "source": source_of(rows, test),
        "rows": len(rows),
        "rows_sha256": _digest(rows, test),
        **settings,
    }
    if rows.levels is not None and rows.image is None:
        recorded["levels"] = rows.levels
        # Runs of before did not standardise these, and cannot be resumed.
        recorded["standardised"] = True
    return recorded


def _digest(rows: Rows, test: Rows | None) -> str:
    """SHA-256 over all that a training sees of its data: values, labels, whose they are, and which part."""
    digest = hashlib.sha256()
    for each in (rows, test):
        if each is not None:
            digest.update(json.dumps([list(each.values.shape), each.label_names]).encode())
            for tensor in (each.values, each.labels, each.part):
                digest.update(b"" if tensor is None else tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def _untrained(training: Rows, classes: int, config: DensityConfig) -> DensityModel:
    """The model before its first step: preprocessing and whitening by the training part."""
    # Pictures have the same range in each coordinate.
    preprocessing = Preprocessing.of(training.values, training.levels, standardise=training.image is None)
    shares = None
    if config.conditional and training.labels is not None:
        counts = torch.bincount(training.labels, minlength=classes)
        shares = counts / counts.sum()
    with seeded(config.seed), cpu_threads(config.threads):
        flow = build_flow(config, training.features, classes)
        noise = torch.Generator().manual_seed(config.seed)
        start = whiten if config.whiten else fit_input
        start(flow, preprocessing.forward(training.values, noise)[0])
    return DensityModel(flow, preprocessing, training.features, shares)


def fit_flow(
    model: DensityModel, parts: Parts, config: DensityConfig, run: Run | None = None
) -> tuple[DensityModel, Curve, int]:
    """Train ``model.flow``, any module with ``log_prob``; return the chosen model, the curve and the round.

    The flow is trained in place; the model that is returned holds another one, with the averaged weights of
    the round (from 1; 0 for the first weights) that the validation part likes best. Both are on the CPU at
    the end. ``run`` says where it is computed and where checkpoints go; by default on the CPU, and nowhere.
    """
    run = run or Run()
    device = run.workers.device
    kept = _Kept(model.flow.to(device)).to(device)
    training, validation = parts.training, parts.validation
    held_out = validation.values.to(device)
    conditional = model.shares is not None
    columns: Batch = (training.values.to(device),)
    if conditional and training.labels is not None:
        columns = (*columns, training.labels.to(device))
    parameters = list(model.flow.parameters())
    groups = parameter_groups(model.flow, config.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=config.rate(model.features), fused=True)
    if config.clip < float("inf"):
        optimizer.register_step_pre_hook(lambda *_: _clip(parameters, config.clip))
    optimizer.register_step_post_hook(lambda *_: kept.update(config.average))

    def objective(batch: Batch, share: slice, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        labels = batch[1] if conditional else None
        loss = model.preprocessing.loss(model.forward(batch[0], labels, generator), model.features).mean()
        return loss, loss.detach()

    def validate() -> float:
        candidate = DensityModel(kept.average, model.preprocessing, model.features, model.shares)
        loss = float(candidate.loss(held_out, VALIDATION_DRAWS).mean())
        kept.offer(loss)
        return loss

    phase = Phase(
        name="flow",
        module=kept,
        optimizer=optimizer,
        batches=_Rounds(columns, config.batch_size, config.round_steps),
        epochs=-(-config.steps // config.round_steps),
        seed=config.seed,
        objective=objective,
        rate=("learning_rate", config.rate(model.features)),
        test_loss=validate,
        enough=lambda curve: len(curve.test) - int(kept.round) >= config.patience,
        callbacks=run.callbacks,
        linear_decay=True,
    )
    curve = run.fit(phase)
    kept.to("cpu")
    chosen = DensityModel(kept.best, model.preprocessing, model.features, model.shares)
    return chosen, curve, int(kept.round)


def _clip(parameters: list[nn.Parameter], longest: float) -> None:
    nn.utils.clip_grad_norm_(parameters, longest, foreach=True)


class _Kept(nn.Module):
    """What a checkpoint holds: the flow in training, the mean of its weights, and the best of these means."""

    counters = ("round", "offered", "updates")
    """Integers that training changes, which a checkpoint may therefore have others of."""

    loss: Tensor
    round: Tensor
    offered: Tensor
    updates: Tensor

    def __init__(self, flow: nn.Module) -> None:
        super().__init__()
        self.flow = flow
        self.average = copy.deepcopy(flow).requires_grad_(False)
        self.best = copy.deepcopy(self.average)
        self.register_buffer("loss", torch.tensor(torch.finfo(torch.float64).max, dtype=torch.float64))
        self.register_buffer("round", torch.tensor(0))
        self.register_buffer("offered", torch.tensor(0))
        self.register_buffer("updates", torch.tensor(0))
        self.averages: list[Tensor] = list(self.average.parameters())
        self.weights: list[Tensor] = list(flow.parameters())

    def update(self, factor: float) -> None:
        self.updates += 1
        average_(self.averages, self.weights, factor, int(self.updates))

    def offer(self, loss: float) -> None:
        """The mean has this validation loss now: keep it if it is the best yet."""
        self.offered += 1
        if loss < float(self.loss):
            self.loss.fill_(loss)
            self.round.copy_(self.offered)
            self.best.load_state_dict(self.average.state_dict())


class _Rounds:
    """Rounds of ``steps`` batches: as many passes over the rows, each in a new order, as that takes."""

    def __init__(self, columns: Batch, batch_size: int, steps: int) -> None:
        self.columns, self.steps = columns, steps
        self.batch_size = min(batch_size, len(columns[0]))
        self.rows = self.batch_size * steps

    def epoch(self, epoch: int, first: int, generator: torch.Generator) -> Iterator[Batch]:
        count = len(self.columns[0])
        passes = [
            torch.randperm(count, generator=generator, device=self.columns[0].device)
            for _ in range(-(-self.rows // count))
        ]
        batches = torch.cat(passes)[: self.rows].split(self.batch_size)[first:]
        return (tuple(column[rows] for column in self.columns) for rows in batches)

"""The training loop: epochs of steps, with checkpoints, resuming, stopping and several processes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lunet_fast.training.checkpoints import (
    check_generator,
    check_progress,
    load_dealt_training,
    load_training,
    save_training,
)
from lunet_fast.training.distributed import Workers
from lunet_fast.training.files import all_finite
from lunet_fast.training.schema import TrainingState
from lunet_fast.training.sharding import DealtTables

CHECK_EVERY = 50
"""Steps between two looks at the loss where looking waits for a GPU; on a CPU each step is looked at."""

CHECKPOINT_SECONDS = 120.0
"""Within an epoch, the time between two checkpoints."""

Batch = tuple[Tensor, ...]
"""Tensors of equal length: the rows of one step."""

Objective = Callable[[Batch, slice, torch.Generator], tuple[Tensor, Tensor]]
"""(batch, this process's rows of it, generator of dropout and draws) -> two means over those rows: the loss
to differentiate, and the error to report. Draws are made for the whole batch."""


Callback = Callable[[int, dict[str, float]], Any]
"""(epoch, figures), at each epoch's end, the first being epoch 1: ``train_loss``, ``test_loss`` where there
is a test part, and ``seconds`` spent training. What is true ends the training there."""


class DivergenceError(ArithmeticError):
    """Training has diverged; the message names the phase, the layer, the step and the likely remedy."""


class Interrupted(KeyboardInterrupt):
    """Training was asked to stop, and has written a checkpoint if it has a folder."""


class Progress:
    """Hears how a training goes; this one is silent. Phases are ``LU-Net``, ``MLP`` and ``decoder``."""

    def start(self, phase: str, epochs: int, steps: int, done: int) -> None:
        """A phase of ``epochs`` epochs of ``steps`` steps begins; ``done`` of them are finished already."""

    def step(self, phase: str, epoch: int, steps: int) -> None:
        """``steps`` steps of epoch ``epoch`` (from 0) are done; called every CHECK_EVERY steps."""

    def epoch(self, phase: str, epoch: int, train_loss: float, test_loss: float | None) -> None:
        """Epoch ``epoch`` (from 0) is done, its checkpoint written."""


@dataclass
class Curve:
    """Error by epoch: while training, and on the test part (empty without one).

    ``elapsed`` is the time spent training up to the end of each epoch, in seconds, without evaluation and
    files.
    """

    train: list[float] = field(default_factory=list)
    test: list[float] = field(default_factory=list)
    elapsed: list[float] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """The time spent training in all."""
        return self.elapsed[-1] if self.elapsed else 0.0


class Stop:
    """A wish to stop, which a training grants after its step and with a checkpoint.

    Outside of :meth:`granting` nobody would hear it: :meth:`ask` then says so by returning False.
    """

    def __init__(self) -> None:
        self.asked = False
        self._granting = False

    def ask(self) -> bool:
        """Ask to stop; False where no training is there to grant it, or where one was asked before."""
        heard = self._granting and not self.asked
        self.asked = True
        return heard

    @contextmanager
    def granting(self) -> Iterator[None]:
        self._granting = True
        try:
            yield
        finally:
            self._granting = False


class Batches(Protocol):
    """The training rows, by batches."""

    rows: int
    """Rows of an epoch."""
    steps: int
    """Batches of an epoch."""

    def epoch(self, epoch: int, first: int, generator: torch.Generator) -> Iterator[Batch]:
        """Batches ``first``, ``first`` + 1, ... of an epoch, in random order.

        The order is drawn from ``generator`` before this returns; it depends on its state and the arguments
        alone.
        """


class ShuffledRows:
    """Batches of the rows of ``columns``, tensors of equal length on one device, in a new order an epoch."""

    def __init__(self, columns: Batch, batch_size: int) -> None:
        self.columns, self.batch_size = columns, batch_size
        self.rows = len(columns[0])
        self.steps = -(-self.rows // batch_size)

    def epoch(self, epoch: int, first: int, generator: torch.Generator) -> Iterator[Batch]:
        order = torch.randperm(self.rows, generator=generator, device=self.columns[0].device)
        batches = order.split(self.batch_size)[first:]
        return (tuple(column[rows] for column in self.columns) for rows in batches)


@dataclass
class Phase:
    """One module to train for a number of epochs."""

    name: str
    module: nn.Module
    """What checkpoints hold."""
    optimizer: torch.optim.Optimizer
    batches: Batches
    epochs: int
    seed: int
    objective: Objective
    rate: tuple[str, float]
    """The setting that is most likely too high when training diverges, and its value."""
    test_loss: Callable[[], float] | None = None
    """The error on the test part, at each epoch."""
    enough: Callable[[Curve], bool] | None = None
    """Asked at each epoch's end: whether to train no further."""
    callbacks: Sequence[Callback] = ()
    """Of process 0 are told of each epoch, and again of those before a resumption; each may end the phase."""
    error_limit: float = math.inf
    """An epoch whose reported error is above has diverged."""
    linear_decay: bool = False
    """All rates fall linearly to zero at the last step."""
    sparse: Sequence[nn.Parameter] = ()
    """Parameters with sparse gradients, those of ``nn.Embedding`` aside."""
    dealt: DealtTables | None = None
    """Parameters of which each process has some rows. Then ``test_loss`` is called by every process, not by
    the first alone."""
    locate: Callable[[Batch], str] | None = None
    """Where in the module a batch whose loss is not finite first was not."""


def fit(
    phase: Phase,
    *,
    file: Path | None = None,
    resume: bool = False,
    checkpoint_seconds: float = CHECKPOINT_SECONDS,
    workers: Workers | None = None,
    stop: Stop | None = None,
    progress: Progress | None = None,
) -> Curve:
    """Train a phase.

    ``file`` gets a checkpoint at the end of each epoch, ``checkpoint_seconds`` after the last one within it,
    and before :class:`Interrupted` is raised because of ``stop``. With ``resume`` training goes on from it,
    if it exists, to what the uninterrupted training would have given: bit for bit on a CPU. Each is written
    only with finite weights, whole or not at all, so the last good one survives whatever ends the training.

    Raises :class:`DivergenceError` when a loss or weight is not finite or the error absurd,
    ``CheckpointError`` for a checkpoint that is damaged or another training's, ``OSError`` where one cannot
    be written.
    """
    loop = _Loop(
        phase,
        file,
        checkpoint_seconds,
        workers or Workers(),
        stop or Stop(),
        progress or Progress(),
        torch.Generator(_device(phase.module)).manual_seed(phase.seed),
    )
    if resume:
        loop.resume()
    with loop.stop.granting():
        loop.run()
    return loop.curve


def descend(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    """Move the parameters by one step of the optimiser on the gradient of ``loss``."""
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def told_to_end(callbacks: Sequence[Callback], curve: Curve, epoch: int, workers: Workers) -> bool:
    """Tell the callbacks of ``epoch`` (from 0): whether one of them ends the phase with it."""
    if not callbacks:
        return False
    asked = False
    if workers.is_first:
        figures = {"train_loss": curve.train[epoch], "seconds": curve.elapsed[epoch]}
        if curve.test:
            figures["test_loss"] = curve.test[epoch]
        for callback in callbacks:  # each is told, whatever another one says
            asked = bool(callback(epoch + 1, dict(figures))) or asked
    return bool(workers.of_first(int(asked)))


class _Weighted(nn.Module):
    """The objective as a module, which DistributedDataParallel takes: the mean over the whole batch once the
    processes' gradients are averaged."""

    def __init__(
        self, module: nn.Module, objective: Objective, workers: Workers, sparse: Sequence[nn.Parameter]
    ) -> None:
        super().__init__()
        # DistributedDataParallel takes gradients for dense unless an nn.Embedding is the first to have them.
        self.sparse = nn.ModuleList(nn.Embedding(1, 1, sparse=True, device="meta") for _ in sparse)
        for table, parameter in zip(self.sparse, sparse, strict=True):
            table.weight = parameter
        self.module, self.objective, self.workers = module, objective, workers

    def forward(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """The loss to differentiate, and this process's part of the batch's mean error."""
        rows, share = len(batch[0]), self.workers.share(len(batch[0]))
        own = share.stop - share.start
        if own == rows:
            return self.objective(batch, share, generator)
        # A process without a row computes one for nothing, because all must take part in the sum.
        loss, error = self.objective(batch, share if own else slice(0, 1), generator)
        return loss * (own * self.workers.world_size / rows), error * (own / rows)


class _Loop:
    """A phase on its way: after ``step`` steps of epoch ``epoch``."""

    def __init__(
        self,
        phase: Phase,
        file: Path | None,
        checkpoint_seconds: float,
        workers: Workers,
        stop: Stop,
        progress: Progress,
        generator: torch.Generator,
    ) -> None:
        self.phase, self.file, self.checkpoint_seconds = phase, file, checkpoint_seconds
        self.workers, self.stop, self.progress, self.generator = workers, stop, progress, generator
        self.rates = [group["lr"] for group in phase.optimizer.param_groups]
        self.curve = Curve()
        self.epoch = self.step = self.looked = 0
        self.due = False
        self.written = time.monotonic()
        self.spent = 0.0
        """Seconds of this epoch before its last checkpoint."""
        self.errors = torch.zeros(phase.batches.steps, device=_device(phase.module))
        """Each step's part of the epoch's mean error; from step ``looked`` on, of this process's rows."""
        self.at_epoch = generator.get_state()
        """The generator's state when this epoch began: its order is drawn from it."""
        self.saved = ""
        """What the last checkpoint holds, in words."""

    def resume(self) -> None:
        phase = self.phase
        trained = phase.module, phase.optimizer, self.generator
        if phase.dealt is not None:
            there = self.file is not None and self.file.is_file()
            if not self.workers.of_first(int(there)):
                return
            file = self.file if there else None
            state, own = load_dealt_training(file, *trained, phase.dealt, self._check)
        else:
            with self.workers.file_of_first(self.file) as file:
                if file is None:
                    return
                state, own = load_training(file, *trained, self._check)
        self.curve = Curve(state.train_loss, state.test_loss, state.elapsed)
        self.epoch, self.step, self.spent = state.epoch, state.step, state.spent
        self.at_epoch = own.get("at_epoch", self.generator.get_state())
        self.errors[: self.step] = own.get("errors", self.errors[:0]).to(self.errors.device)
        self.looked = self.step
        self._remember()

    def _check(self, state: TrainingState, own: dict[str, Tensor]) -> None:
        """``ValueError`` unless a checkpoint is one of this phase."""
        phase = self.phase
        check_progress(state, phase.name, phase.epochs, len(self.errors), phase.test_loss is not None)
        errors = own.get("errors", self.errors[:0])
        if own.keys() - {"errors", "at_epoch"} or (state.step and "at_epoch" not in own):
            raise ValueError("its own tensors must be errors and at_epoch")
        if (errors.shape, errors.dtype) != ((state.step,), self.errors.dtype):
            raise ValueError(f"own.errors must be {self.errors.dtype} [{state.step}]")
        if "at_epoch" in own:
            check_generator(own["at_epoch"], self.generator)

    def run(self) -> None:
        phase, steps = self.phase, self.phase.batches.steps
        self.progress.start(phase.name, phase.epochs, steps, self.epoch)
        weighted = _Weighted(phase.module, phase.objective, self.workers, phase.sparse)
        ended = [self._is_ended(epoch) for epoch in range(self.epoch)]
        if self._is_done() or any(ended):
            return
        apart = [] if phase.dealt is None else phase.dealt.parameters(phase.module)
        compute = self.workers.parallel(weighted, apart)
        self.written = time.monotonic()
        while not self._is_done():
            self._run_epoch(compute)
            mean = self._finish_epoch()
            test = self.curve.test[-1] if self.curve.test else None
            self.progress.epoch(phase.name, self.epoch - 1, mean, test)
            if self._is_ended(self.epoch - 1):
                return

    def _is_ended(self, epoch: int) -> bool:
        return told_to_end(self.phase.callbacks, self.curve, epoch, self.workers)

    def _is_done(self) -> bool:
        enough = self.phase.enough
        at_end = self.epoch == self.phase.epochs
        return at_end or (self.step == 0 and enough is not None and enough(self.curve))

    def _run_epoch(self, compute: nn.Module) -> None:
        phase, steps, rows = self.phase, self.phase.batches.steps, self.phase.batches.rows
        on_cpu = self.errors.device.type == "cpu"
        if self.step == 0:
            self.at_epoch = self.generator.get_state()
            batches = phase.batches.epoch(self.epoch, 0, self.generator)
        else:
            now = self.generator.get_state()
            self.generator.set_state(self.at_epoch)
            batches = phase.batches.epoch(self.epoch, self.step, self.generator)
            self.generator.set_state(now)
            self.progress.step(phase.name, self.epoch, self.step)
        self.began = time.monotonic()
        for batch in batches:
            if phase.linear_decay:
                left = 1 - (self.epoch * steps + self.step) / (phase.epochs * steps)
                for group, rate in zip(phase.optimizer.param_groups, self.rates, strict=True):
                    group["lr"] = rate * left
            loss, error = compute(batch, self.generator)
            self.errors[self.step] = error * (len(batch[0]) / rows)
            if on_cpu and not math.isfinite(error.item()):
                self._diverged(self.step, batch)
            descend(phase.optimizer, loss)
            self.step += 1
            looked = self.step % CHECK_EVERY == 0 or self.step == steps
            if looked:
                self._look()
                self.progress.step(phase.name, self.epoch, self.step)
            # At the epoch's end a checkpoint follows; several processes must agree on one, as they do there.
            if self.step < steps and (looked or self.workers.world_size == 1):
                self._save_if_due()

    def _look(self) -> None:
        """See that the losses are finite, and let the processes agree on them and on what is due."""
        block = self.errors[self.looked : self.step]
        if self.workers.world_size > 1:
            wishes = block.new_tensor([self.stop.asked, self.workers.is_first and self._is_due()])
            summed = self.workers.sum(torch.cat((block, wishes)))
            block.copy_(summed[:-2])
            self.stop.asked, self.due = bool(summed[-2]), bool(summed[-1])
        bad = (~torch.isfinite(block)).nonzero()
        if len(bad):
            self._diverged(self.looked + int(bad[0]), None)
        self.looked = self.step

    def _is_due(self) -> bool:
        return time.monotonic() - self.written >= self.checkpoint_seconds

    def _save_if_due(self) -> None:
        due = self.due if self.workers.world_size > 1 else self._is_due()
        if due or self.stop.asked:
            self.spent += time.monotonic() - self.began
            self._save()
            self._stop_if_asked()
            self.began = time.monotonic()

    def _finish_epoch(self) -> float:
        phase = self.phase
        self.spent += time.monotonic() - self.began
        mean = self.errors.sum().item()
        if not mean <= phase.error_limit:
            raise DivergenceError(
                f"{phase.name}: the training error of epoch {self.epoch + 1} is {mean:.3g}, worse than any "
                f"constant rating: {self._remedy()}"
            )
        self.curve.elapsed.append(self.curve.seconds + self.spent)
        self.curve.train.append(mean)
        if phase.test_loss is not None and (self.workers.is_first or phase.dealt is not None):
            tested = phase.test_loss()
            if not math.isfinite(tested):
                raise DivergenceError(
                    f"{phase.name}: the error on held-out data is {tested} after epoch {self.epoch + 1}: "
                    f"{self._remedy()}"
                )
            self.curve.test.append(tested)
        self.epoch, self.step, self.looked, self.spent = self.epoch + 1, 0, 0, 0.0
        self.at_epoch = self.generator.get_state()
        self._save()
        if not self._is_done():
            self._stop_if_asked()
        return mean

    def _save(self) -> None:
        self._check_weights()
        phase = self.phase
        if phase.dealt is not None or (self.file is not None and self.workers.is_first):
            state = {
                "phase": phase.name,
                "epoch": self.epoch,
                "step": self.step,
                "spent": self.spent,
                "train_loss": self.curve.train,
                "test_loss": self.curve.test,
                "elapsed": self.curve.elapsed,
            }
            own = {"errors": self.errors[: self.step], "at_epoch": self.at_epoch}
            trained = phase.module, phase.optimizer, self.generator
            try:
                save_training(self.file, *trained, state, own, phase.dealt)
            except OSError as error:
                raise type(error)(
                    error.errno, f"cannot write the checkpoint: {error.strerror or error}. {self._kept()}"
                ) from error
            self._remember()
        self.written = time.monotonic()

    def _remember(self) -> None:
        self.saved = f"{self.file} holds the training up to {self._place()}"

    def _kept(self) -> str:
        return self.saved or "There is no earlier checkpoint"

    def _stop_if_asked(self) -> None:
        if self.stop.asked:
            raise Interrupted(
                self._kept() if self.file is not None else "nothing was saved: there is no out="
            )

    # What was not finite, and where

    def _check_weights(self) -> None:
        name = self._spoilt_weight()
        if name is not None:
            raise DivergenceError(
                f"{self.phase.name}: {name} is not finite after {self._place()}: {self._remedy()}"
            )

    def _place(self) -> str:
        return f"epoch {self.epoch + 1}, step {self.step}" if self.step else f"epoch {self.epoch}"

    def _spoilt_weight(self) -> str | None:
        for name, parameter in self.phase.module.named_parameters():
            if not all_finite(parameter):
                return name
        return None

    def _diverged(self, step: int, batch: Batch | None) -> None:
        """Raise for the error of step ``step`` (from 0), with its ``batch`` where no step followed."""
        value = self.errors[step].item()
        where = ""
        if batch is not None:
            name = self._spoilt_weight()
            if name is not None:
                where = f", because {name} is not finite after the step before"
            elif self.phase.locate is not None:
                where = f", first in {self.phase.locate(batch)}"
        elif (name := self._spoilt_weight()) is not None:
            where = f"; {name} is not finite by now"
        raise DivergenceError(
            f"{self.phase.name}: the loss is {value} at epoch {self.epoch + 1}, step {step + 1}{where}: "
            f"{self._remedy()}"
        )

    def _remedy(self) -> str:
        name, rate = self.phase.rate
        kept = f". {self.saved}" if self.saved else ""
        return f"{name}={rate:g} is most likely too high, try {rate / 5:g}{kept}"


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters()).device


@contextmanager
def cpu_threads(count: int) -> Iterator[None]:
    """Inside, PyTorch computes with ``count`` CPU threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)

"""The loop of inference ``gibbs``: sweeps of a chain, its samples written into members, checkpoints of it."""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch
from torch import Tensor

from lunet_fast.recsys.measures.metrics import mse
from lunet_fast.recsys.model.gibbs import Chain, Triple
from lunet_fast.recsys.model.network import RatingModel
from lunet_fast.training.checkpoints import check_progress, load_training, save_training
from lunet_fast.training.loop import Curve, Interrupted, Progress, Stop, told_to_end
from lunet_fast.training.run import Run
from lunet_fast.training.schema import TrainingState

BURN_IN = 0.25
"""Share of the sweeps that no member is taken from."""
PHASE = "LU-Net"
"""What progress is told of, and the name of the checkpoint."""


@torch.no_grad()
def sampled(
    model: RatingModel, training: Triple, test: Triple | None, scale: tuple[float, float], run: Run
) -> Curve:
    """Write samples into the members of ``model``, evenly over the last 1 - BURN_IN of ``epochs`` sweeps.

    ``training`` and ``test`` are the ratings as :class:`~.gibbs.Chain` takes them, on the CPU as the model
    is. What ``run`` tells and asks of epochs is of sweeps, the test error that of the mean of the members so
    far; a callback that ends the sampling leaves those that are not written with the state of its sweep.

    A sweep is short, and a checkpoint holds all members: they are written ``run.checkpoint_seconds`` after
    the last one, at the end, and before ``Interrupted`` is raised because ``run`` is stopped. Resumed, the
    sampling ends with what the uninterrupted one would have given, bit for bit.

    Raises ``CheckpointError`` for a checkpoint that is damaged or another training's, ``OSError`` where one
    cannot be written.
    """
    assert model.weight is not None
    assert model.intercept is not None
    model.weight.zero_()
    model.intercept.zero_()
    sampling = _Sampling(model, training, test, scale, run)
    if run.resume:
        sampling.resume()
    with sampling.stop.granting():
        sampling.run_all()
    return sampling.curve


class _Sampling:
    """A sampling on its way, after ``chain.sweeps`` sweeps."""

    def __init__(
        self,
        model: RatingModel,
        training: Triple,
        test: Triple | None,
        scale: tuple[float, float],
        run: Run,
    ) -> None:
        self.model, self.training, self.test, self.scale, self.run = model, training, test, scale, run
        self.stop, self.progress = run.stop or Stop(), run.progress or Progress()
        self.chain, self.curve = Chain(model, *training), Curve()
        self.sweeps = model.config.epochs
        self.kept = list(_kept(self.sweeps, model.config.members))
        self.summed = torch.zeros(0 if test is None else len(test[2]), dtype=torch.float64)
        """What the members so far say of the test part, less the mean of what is learnt."""
        self.written = time.monotonic()
        folder = run.folder
        self.file = None if folder is None else folder.checkpoints / f"{PHASE.lower()}.safetensors"

    @property
    def members(self) -> int:
        """That are written."""
        return sum(self.kept[: self.chain.sweeps])

    def resume(self) -> None:
        with self.run.workers.file_of_first(self.file) as file:
            if file is None:
                return
            state, own = load_training(file, self.model, None, None, self._check)
        self.curve = Curve(state.train_loss, state.test_loss, state.elapsed)
        self.summed = own.pop("summed")
        self.chain.set_state_(own, state.epoch)

    def _check(self, state: TrainingState, own: dict[str, Tensor]) -> None:
        """``ValueError`` unless a checkpoint is one of this sampling."""
        check_progress(state, PHASE, self.sweeps, 0, self.test is not None)
        rest = dict(own)
        summed = rest.pop("summed", None)
        if summed is None or (summed.shape, summed.dtype) != (self.summed.shape, self.summed.dtype):
            raise ValueError(f"own.summed must be {self.summed.dtype} {list(self.summed.shape)}")
        self.chain.check_state(rest)

    def run_all(self) -> None:
        run, chain, curve = self.run, self.chain, self.curve
        self.progress.start(PHASE, self.sweeps, 1, chain.sweeps)
        told = [told_to_end(run.callbacks, curve, sweep, run.workers) for sweep in range(chain.sweeps)]
        ended = any(told)
        self.written = time.monotonic()
        while chain.sweeps < self.sweeps and not ended:
            self._sweep()
            self.progress.epoch(
                PHASE, chain.sweeps - 1, curve.train[-1], curve.test[-1] if curve.test else None
            )
            ended = told_to_end(run.callbacks, curve, chain.sweeps - 1, run.workers)
            is_done = ended or chain.sweeps == self.sweeps
            if is_done or self.stop.asked or time.monotonic() - self.written >= run.checkpoint_seconds:
                self._save()
            if self.stop.asked and not is_done:
                raise Interrupted(
                    "nothing was saved: there is no out="
                    if self.file is None
                    else f"{self.file} holds the sampling up to sweep {chain.sweeps} of {self.sweeps}"
                )
        for member in range(self.members, self.model.config.members):
            chain.write_(member)

    def _sweep(self) -> None:
        chain, curve, model = self.chain, self.curve, self.model
        began = time.monotonic()
        before = self.members
        chain.sweep()
        kept = self.members > before
        if kept:
            chain.write_(before)
        curve.elapsed.append(curve.seconds + time.monotonic() - began)
        predicted = chain.predicted(*self.training[:2])
        curve.train.append(_error(model, predicted, self.training[2], self.scale))
        if self.test is not None:
            state = chain.predicted(*self.test[:2])
            self.summed = self.summed + state if kept else self.summed
            mean = self.summed / self.members if self.members else state
            curve.test.append(_error(model, mean, self.test[2], self.scale))

    def _save(self) -> None:
        if self.file is not None and self.run.workers.is_first:
            curve = self.curve
            state = {"phase": PHASE, "epoch": self.chain.sweeps, "train_loss": curve.train}
            state |= {"test_loss": curve.test, "elapsed": curve.elapsed}
            own = {**self.chain.state(), "summed": self.summed}
            save_training(self.file, self.model, None, None, state, own)
        self.written = time.monotonic()


def _error(model: RatingModel, score: Tensor, ratings: Tensor, scale: tuple[float, float]) -> float:
    return mse(model.rating((model.mean + score).float()).clamp(*scale), ratings)


def _kept(sweeps: int, members: int) -> Iterator[bool]:
    """Of each sweep, whether a member is taken from it: the last one, and others as evenly as can be."""
    last = sweeps - min(int(BURN_IN * sweeps), sweeps - members)
    for sweep in range(sweeps):
        place = sweep - (sweeps - last)
        yield place >= 0 and (place + 1) * members // last > place * members // last

"""A training from its folder's point of view: begun, resumed, found finished; what all trainings share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypedDict, TypeVar

from lunet_fast.training.distributed import Workers
from lunet_fast.training.files import RunFolder
from lunet_fast.training.loop import CHECKPOINT_SECONDS, Callback, Curve, Phase, Progress, Stop, fit
from lunet_fast.training.schema import shown


class Options(TypedDict, total=False):
    """What every training function takes beside its data and settings, by keyword."""

    out: Path | str | None
    """The run folder to write; without it nothing is written."""
    resume: bool
    """Go on from the last checkpoint in ``out`` to the weights that the uninterrupted training would have
    given, bit for bit on a CPU; from the beginning where there is none. A finished training is not repeated:
    its stored result is returned, without its curve."""
    overwrite: bool
    """Replace another training in ``out``, which is refused otherwise. So is, in any case, a folder that
    another process is training in."""
    checkpoint_seconds: float
    """Checkpoints are written at the end of each epoch, and within one this long after the last; by default
    ``CHECKPOINT_SECONDS``. Of a sampling they are written this long after the last, and at its end."""
    progress: Progress | None
    """Who is told of epochs and steps."""
    stop: Stop | None
    """When it is asked, a checkpoint is written and :class:`~.loop.Interrupted` raised."""
    callbacks: Sequence[Callback]
    """Are told of each epoch, and may end the training: :data:`~.loop.Callback`. Its result is the model as
    it is then. Of several processes all give as many, and those of process 0 are asked."""


Trained = TypeVar("Trained")


@dataclass(frozen=True)
class Result(Generic[Trained]):
    """What a training returns."""

    trained: Trained
    metrics: dict[str, Any]
    """The content of ``metrics.json``."""
    curve: Curve
    """Of a training that was found finished, empty."""


def checked_callbacks(callbacks: Any) -> tuple[Callback, ...]:
    """``TypeError`` unless they are functions in a list or tuple."""
    if not isinstance(callbacks, (list, tuple)) or not all(map(callable, callbacks)):
        raise TypeError(
            f"callbacks={shown(callbacks, 80)} must be a list of functions of an epoch and its figures: "
            "callbacks=[tell]"
        )
    return tuple(callbacks)


class Run:
    """One training: its run folder, its processes, who is told of it and who may stop it.

    The arguments are :class:`Options`. ``out`` is prepared here; process 0 alone has a folder.
    """

    def __init__(
        self,
        workers: Workers | None = None,
        *,
        out: Path | str | None = None,
        resume: bool = False,
        overwrite: bool = False,
        checkpoint_seconds: float = CHECKPOINT_SECONDS,
        progress: Progress | None = None,
        stop: Stop | None = None,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        self.callbacks = checked_callbacks(callbacks)
        self.workers = workers = workers or Workers()
        self.resume, self.overwrite, self.checkpoint_seconds = resume, overwrite, checkpoint_seconds
        self.progress, self.stop = progress, stop
        self.folder = None if out is None or not workers.is_first else RunFolder(Path(out))
        if self.folder is not None:
            self.folder.prepare(resume=resume, overwrite=overwrite)

    def finished(
        self, recorded: dict[str, Any], defaults: Mapping[str, Any] | None = None
    ) -> RunFolder | None:
        """The folder, where it holds the result of this training already and is to be resumed.

        ``recorded`` are the settings as ``config.json`` has them, ``defaults`` what those were that a former
        version did not have. ``ValueError`` for a process without the
        folder: the result is not its to give.
        """
        folder = self.folder
        if not self.workers.of_first(int(self.resume and folder is not None and folder.is_finished())):
            return None
        if folder is None:
            raise ValueError("the training is finished already: there is nothing to do for this process")
        folder.check(recorded, defaults)
        return folder

    @contextmanager
    def begun(self, recorded: dict[str, Any], defaults: Mapping[str, Any] | None = None) -> Iterator[None]:
        """Inside, this process trains in the folder and no other does; ``recorded`` is written or checked."""
        with nullcontext() if self.folder is None else self.folder.locked():
            if self.folder is not None:
                self.folder.begin(recorded, resume=self.resume, overwrite=self.overwrite, defaults=defaults)
            yield

    def fit(self, phase: Phase) -> Curve:
        """:func:`~.loop.fit` with a checkpoint in the folder, named after the phase."""
        folder = self.folder
        return fit(
            phase,
            file=None if folder is None else folder.checkpoints / f"{phase.name.lower()}.safetensors",
            resume=self.resume,
            checkpoint_seconds=self.checkpoint_seconds,
            workers=self.workers,
            stop=self.stop,
            progress=self.progress,
        )

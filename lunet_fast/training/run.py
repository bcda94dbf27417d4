"""A training from its folder's point of view: begun, resumed, found finished; what all trainings share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from lunet_fast.training.distributed import Workers
from lunet_fast.training.files import RunFolder
from lunet_fast.training.loop import CHECKPOINT_SECONDS, Curve, Phase, Progress, Stop, fit


class Run:
    """One training: its run folder, its processes, who is told of it and who may stop it.

    ``out`` is the run folder, prepared here; process 0 alone has one, and none does without ``out``. The
    arguments are those of the training functions, :func:`lunet_fast.recsys.model.training.train` and others.
    """

    def __init__(
        self,
        out: Path | str | None = None,
        workers: Workers | None = None,
        *,
        resume: bool = False,
        overwrite: bool = False,
        checkpoint_seconds: float = CHECKPOINT_SECONDS,
        progress: Progress | None = None,
        stop: Stop | None = None,
    ) -> None:
        self.workers = workers = workers or Workers()
        self.resume, self.checkpoint_seconds = resume, checkpoint_seconds
        self.progress, self.stop = progress, stop
        self.folder = None if out is None or not workers.is_first else RunFolder(Path(out))
        if self.folder is not None:
            self.folder.prepare(resume=resume, overwrite=overwrite)

    def finished(self, recorded: dict[str, Any]) -> RunFolder | None:
        """The folder, where it holds the result of this training already and is to be resumed.

        ``recorded`` are the settings as ``config.json`` has them. ``ValueError`` for a process without the
        folder: the result is not its to give.
        """
        folder = self.folder
        if not self.workers.of_first(int(self.resume and folder is not None and folder.is_finished())):
            return None
        if folder is None:
            raise ValueError("the training is finished already: there is nothing to do for this process")
        folder.check(recorded)
        return folder

    @contextmanager
    def begun(self, recorded: dict[str, Any]) -> Iterator[None]:
        """Inside, this process trains in the folder and no other does; ``recorded`` is written or checked."""
        with nullcontext() if self.folder is None else self.folder.locked():
            if self.folder is not None:
                self.folder.begin(recorded, resume=self.resume)
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

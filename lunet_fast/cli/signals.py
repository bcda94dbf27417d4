"""SIGINT and SIGTERM while a command trains, and how its training may end."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import typer

from lunet_fast.cli.output import fail
from lunet_fast.training.loop import DivergenceError, Stop


class Signals(Stop):
    """A :class:`Stop` that signals ask; ``last`` is the number of the last one."""

    last = int(signal.SIGINT)

    @property
    def exit_code(self) -> int:
        """Of a process that ends because of it, as shells have it."""
        return 128 + self.last


@contextmanager
def heard() -> Iterator[Signals]:
    """Inside, SIGINT and SIGTERM ask the training to stop after its step.

    A second one, or one while nothing is trained, interrupts at once: ``KeyboardInterrupt``.
    """
    stop = Signals()

    def hear(number: int, frame: FrameType | None) -> None:
        stop.last = number
        if not stop.ask():
            raise KeyboardInterrupt

    former = {number: signal.signal(number, hear) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


@contextmanager
def training_told(checkpoints: Path) -> Iterator[Signals]:
    """Inside, signals stop the training; whatever ends it otherwise ends the command with one message.

    Exit codes: 1 where it diverged, 2 for what a user can put right, 128 and the signal's number.
    """
    with heard() as stop:
        try:
            yield stop
        except DivergenceError as error:
            fail(error, 1)
        except (OSError, ValueError, ImportError) as error:
            fail(error, 2)
        except KeyboardInterrupt as error:
            saved = f"{error}. " if str(error) else ""
            rest = (
                f"The same command with --resume goes on from {checkpoints}."
                if any(checkpoints.glob("*.safetensors"))
                else "There is no checkpoint yet: the same command begins anew."
            )
            typer.echo(f"\nInterrupted. {saved}{rest}", err=True)
            raise typer.Exit(stop.exit_code) from None

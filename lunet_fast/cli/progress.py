"""How far a long command is: bars in a terminal, lines in a log."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import typer
from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from lunet_fast.cli.output import Terminal, harmless, printable
from lunet_fast.training.loop import Progress


@contextmanager
def counted(total: int, unit: str, *, quiet: bool = False) -> Iterator[Callable[..., None]]:
    """Gives a function to call with the number of ``unit`` done since the last call, and what the last was.

    What is done is told on stderr, unless ``quiet``.
    """
    if quiet:
        yield lambda count, what=unit: None
        return
    console = Terminal(stderr=True)
    if not console.is_terminal:
        done = 0

        def line(count: int, what: str = unit) -> None:
            nonlocal done
            done += count
            typer.echo(harmless(f"{done:,}/{total:,} {what}"), err=True)

        yield line
        return
    bars = Bars(
        BarColumn(),
        TextColumn("{task.completed:,.0f}/{task.total:,.0f} {task.description}", markup=False),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
    )
    with bars:
        task = bars.add_task(unit, total=total)
        yield lambda count, what=unit: bars.update(task, advance=count, description=printable(what))


def training_progress(
    console: Console, unit: str = "epoch", held_out: str = "test"
) -> AbstractContextManager[Progress]:
    """Bars in a terminal, lines in a log, nothing for a quiet console; ``unit`` and ``held_out`` are what an
    epoch and the part that is not trained on are called."""
    if console.quiet:
        return nullcontext(Progress())
    return _BarProgress(console, unit, held_out) if console.is_terminal else _LineProgress(unit, held_out)


def _losses(train_loss: float, test_loss: float | None, held_out: str) -> str:
    return f"train {train_loss:.4f}" + ("" if test_loss is None else f"  {held_out} {test_loss:.4f}")


class _LineProgress(Progress):
    """A line an epoch, for logs."""

    def __init__(self, unit: str, held_out: str) -> None:
        self.unit, self.held_out = unit, held_out

    def __enter__(self) -> _LineProgress:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def start(self, phase: str, epochs: int, steps: int, done: int) -> None:
        self.epochs = epochs
        if done:
            typer.echo(f"{phase}: {done} of {epochs} {self.unit}s are done already")

    def epoch(self, phase: str, epoch: int, train_loss: float, test_loss: float | None) -> None:
        losses = _losses(train_loss, test_loss, self.held_out)
        typer.echo(f"{phase}  {self.unit} {epoch + 1}/{self.epochs}  {losses}")


class _BarProgress(Progress):
    """A bar for each phase, with its epoch and losses."""

    def __init__(self, console: Console, unit: str, held_out: str) -> None:
        self.held_out = held_out
        self.bars = Bars(
            TextColumn("{task.description:8}"),
            BarColumn(),
            TextColumn(unit),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TextColumn("{task.fields[losses]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
        )

    def __enter__(self) -> _BarProgress:
        self.bars.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.bars.stop()

    def start(self, phase: str, epochs: int, steps: int, done: int) -> None:
        self.steps = steps
        self.task = self.bars.add_task(phase, total=epochs, completed=done, losses="")

    def step(self, phase: str, epoch: int, steps: int) -> None:
        self.bars.update(self.task, completed=epoch + steps / self.steps)

    def epoch(self, phase: str, epoch: int, train_loss: float, test_loss: float | None) -> None:
        self.bars.update(self.task, completed=epoch + 1, losses=_losses(train_loss, test_loss, self.held_out))

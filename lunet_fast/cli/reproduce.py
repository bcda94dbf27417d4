"""``lunet-fast reproduce``: the paper's experiments, and a report on them."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import lunet_fast
from lunet_fast.cli import options
from lunet_fast.cli.output import Output, Terminal, fail, interruption_told
from lunet_fast.cli.signatures import grouped

if TYPE_CHECKING:
    from lunet_fast.recsys.report.reproduce import Planned, Watcher
    from lunet_fast.training.loop import Progress

trainings_option = partial(typer.Option, rich_help_panel="What is trained")


@dataclass(frozen=True)
class Trainings:
    """Which experiments are run."""

    datasets: Annotated[
        list[str] | None,
        trainings_option(metavar="NAME...", help="`ml-100k`, `ml-1m`.", show_default="both"),
    ] = None
    seeds: Annotated[
        list[int] | None,
        trainings_option(
            metavar="N...",
            help="Each fixes a split and all that is drawn; figures are means. ML-1M, ten times as large, is "
            "trained with the first alone.",
            show_default="0 1 2",
        ),
    ] = None
    skip: Annotated[
        list[str] | None,
        trainings_option(
            metavar="NAME/EXPERIMENT...",
            help="Leave these out, such as `ml-1m/paper`; experiments are `paper`, `best`, `ranking`, "
            "`hybrid`. The report then quotes `--results` where that has them, and says so.",
        ),
    ] = None
    epochs: Annotated[
        int | None,
        trainings_option(
            help="For a trial of the command: so many epochs everywhere. The figures then mean nothing.",
            show_default="those of the recipes",
        ),
    ] = None


Results = Annotated[
    Path | None,
    options.data_option(
        metavar="DIR",
        help="Result files of longer measurements, which the report quotes: ablations, other methods, "
        "the uses of the inverse, timings.",
        show_default="benchmarks/results of a checkout",
    ),
]


@grouped
def reproduce_command(
    *,
    out: Annotated[
        Path,
        typer.Option("--out", "-o", metavar="DIR", help="Folder for the report and the run folders."),
    ] = Path("runs/reproduce"),
    trainings: Trainings,
    device: options.Device = "cpu",
    data_dir: options.DataDir = None,
    results: Results = None,
    output: Output,
) -> None:
    """Run the paper's experiments and write a report: `report.html` and `report.md`.

    Table 1 from the data. Table 2 by recipe `paper` (the paper's protocol, with its MLP) and recipe `best`.
    Ranking by leave-one-out, among 100 candidates and among all items: interactions alone (γ = 0), and
    ratings and interactions by one model (γ = 0.1). Loss by epoch, as figures 3 to 6. Beside them what
    `--results` holds, and the paper's errata. `report.html` is one file: open it in a browser, send it,
    print it.

    ML-1M takes most of the time, and `ml-1m/paper` most of that. Interrupted, the same command goes on where
    it was; what is finished is not trained again. A training by other code is refused.

    Examples:

        lunet-fast reproduce

        lunet-fast reproduce --datasets ml-100k --seeds 0 1 2

        lunet-fast reproduce --skip ml-1m/paper --out runs/shorter

        lunet-fast reproduce --epochs 1 --out runs/trial
    """
    from lunet_fast.recsys.report.reproduce import DATASETS, reproduce
    from lunet_fast.training.loop import DivergenceError
    from lunet_fast.training.machine import describe

    with interruption_told(f". The same command goes on from what {out} holds."):
        try:
            report = reproduce(
                out,
                describe(device),
                datasets=trainings.datasets or DATASETS,
                seeds=trainings.seeds or (0, 1, 2),
                skip=trainings.skip or (),
                data_dir=data_dir,
                results=_results(results),
                device=device,
                command=_typed(),
                epochs=trainings.epochs,
                watcher=_watcher(output),
            )
        except DivergenceError as error:
            fail(error, 1)
        except (OSError, ValueError, ImportError, RuntimeError) as error:
            fail(error, 2)
    for highlight in report.highlights:
        typer.echo(f"{highlight.value:>8}  {highlight.what.replace('`', '')}; {highlight.beside}")
    typer.echo(f"written to {out / 'report.html'} and report.md")


def _watcher(output: Output) -> Watcher:
    """Tells which training begins, and how far it is."""
    from lunet_fast.cli.progress import training_progress
    from lunet_fast.recsys.report.reproduce import Watcher

    class Told(Watcher):
        def begins(self, number: int, total: int, planned: Planned, finished: bool) -> None:
            done = "  finished already" if finished else ""
            name = f"{planned.dataset}/{planned.experiment}, seed {planned.seed}"
            output.line(f"{number}/{total}  {name}{done}")

        def progress(self) -> AbstractContextManager[Progress]:
            return training_progress(Terminal(quiet=output.quiet))

    return Told()


def _results(given: Path | None) -> Path | None:
    """The folder of committed results: the one named, or that of the checkout which this package lies in."""
    if given is not None:
        if not given.is_dir():
            raise ValueError(
                f"--results {given}: no such folder: name one with result files, or leave it away"
            )
        return given
    own = Path(lunet_fast.__file__).resolve().parents[1] / "benchmarks" / "results"
    return own if own.is_dir() else None


def _typed() -> str:
    """The command as it was typed, without the places of this machine."""
    words, kept = sys.argv[sys.argv.index("reproduce") :] if "reproduce" in sys.argv else ["reproduce"], []
    private = False
    for word in words:
        if word.startswith("-"):
            private = word.split("=")[0] in ("--data-dir", "--results", "--out", "-o")
        if not private:
            kept.append(word)
    return " ".join(["lunet-fast", *kept])

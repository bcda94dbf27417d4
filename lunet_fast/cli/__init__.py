"""The command line: arguments in, one call, text out.

A module a group of commands. What they compute with is imported when a command runs, so that ``--help`` and a
mistyped option are answered at once.
"""

from __future__ import annotations

from typing import Annotated

import typer

import lunet_fast
from lunet_fast.cli.bench import bench_command
from lunet_fast.cli.compare import compare_command
from lunet_fast.cli.data import data_app
from lunet_fast.cli.density import density_app
from lunet_fast.cli.doctor import doctor_command
from lunet_fast.cli.evaluate import evaluate_command
from lunet_fast.cli.export import export_command
from lunet_fast.cli.predict import predict_command
from lunet_fast.cli.recommend import recommend_command
from lunet_fast.cli.reproduce import reproduce_command
from lunet_fast.cli.signatures import SeveralValues
from lunet_fast.cli.train import TrainCommand, train_command
from lunet_fast.cli.tune import TuneCommand, tune_command
from lunet_fast.cli.words import speak_for

__all__ = ["app"]

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"lunet-fast {lunet_fast.__version__}")
        raise typer.Exit


@app.callback()
def lunet(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and stop."),
    ] = False,
) -> None:
    """LU-Net: an invertible network for recommendation, trained on ratings."""


app.command("train", cls=TrainCommand)(train_command)
app.command("evaluate")(evaluate_command)
app.command("recommend")(recommend_command)
app.command("predict")(predict_command)
app.command("export")(export_command)
app.add_typer(data_app, name="data")
app.add_typer(density_app, name="density")
app.command("tune", cls=TuneCommand)(tune_command)
app.command("compare", cls=SeveralValues)(compare_command)
app.command("reproduce", cls=SeveralValues)(reproduce_command)
app.command("bench")(bench_command)
app.command("doctor")(doctor_command)
speak_for(app)

"""``lunet-fast tune``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lunet_fast.cli.options import Dataset, Device, Source
from lunet_fast.cli.output import FigureOutput, errors_told, interruption_told
from lunet_fast.cli.signatures import grouped, settings_command

TuneCommand = settings_command(
    "lunet_fast.recsys.model.config:TrainConfig",
    {"The same for every trial": ("gamma", "members", "epochs", "seed")},
    {"members": "2", "epochs": "searched"},
)


@grouped
def tune_command(
    *,
    context: typer.Context,
    dataset: Dataset = "ml-100k",
    trials: Annotated[int, typer.Option(help="Settings to try now.")] = 30,
    study: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Keeps the trials: the same command goes on with them."),
    ] = None,
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="FILE", help="Settings found, for `train --settings`.")
    ] = Path("settings.json"),
    source: Source,
    device: Device = "cpu",
    output: FigureOutput,
) -> None:
    """Search settings for your data on a validation part of the training data.

    The part that `train` with the same seed tests on is taken away first and never read. Judged by the MSE
    with gamma 1, NDCG@10 with 0, NDCG@10 less the MSE between. The first trial is recipe `best`; Optuna
    proposes the others. Needs `pip install "lunet-fast[tune]"`.

    Examples:

        lunet-fast tune --dataset ratings.csv --trials 50 --study ratings.study

        lunet-fast train --dataset ratings.csv --settings settings.json
    """
    with errors_told():
        from lunet_fast.recsys.evaluation.tuning import tune
        from lunet_fast.training.files import write_json

        if out.parent != Path() and not out.parent.is_dir():
            raise ValueError(f"--out {out}: there is no folder {out.parent}")
        asked: dict[str, Any] = {"gamma": 1.0, **context.obj}
        seed = asked.pop("seed", 0)
        ratings = source.read(dataset, rated=asked["gamma"] != 0, told=output.note)

        def told(number: int, value: float | None, best: float) -> None:
            figure = "failed" if value is None else f"{value:.4f}"
            output.line(f"trial {number + 1}: {figure}, best {best:.4f}")

        kept = f"what is done is in {study}: the same command goes on" if study else "nothing is kept"
        with interruption_told(f"; {kept}."):
            tuned = tune(ratings, trials=trials, storage=study, seed=seed, device=device, told=told, **asked)
        found = {"recipe": "best", **asked, **tuned.settings}
        write_json(out, found)
        figures = {"trials": tuned.trials, "measure": tuned.measure, "value": tuned.value, "settings": found}
        output.figures(
            figures,
            lambda: typer.echo(
                f"best of {tuned.trials} trials: {tuned.measure} {tuned.value:.4f}; written to {out}\n"
                f"lunet-fast train --dataset {dataset} --seed {seed} --settings {out}"
            ),
        )

"""``lunet-fast tune``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lunet_fast.cli import options
from lunet_fast.cli.options import DATA
from lunet_fast.cli.output import errors_told


def tune_command(
    dataset: Annotated[
        str,
        typer.Option("--dataset", "-d", metavar="NAME|PATH", help="As for `train`.", rich_help_panel=DATA),
    ] = "ml-100k",
    trials: Annotated[int, typer.Option(help="Settings to try now.")] = 30,
    gamma: Annotated[float, typer.Option(help="Weight of the ratings' loss, as for `train`.")] = 1.0,
    members: Annotated[
        int, typer.Option(help="Models of a trial; train more of them with what was found.")
    ] = 2,
    epochs: Annotated[
        int | None, typer.Option(help="The same for every trial.", show_default="searched")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the parts, and of the search.")] = 0,
    study: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Keeps the trials: the same command goes on with them."),
    ] = None,
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="FILE", help="Settings found, for `train --settings`.")
    ] = Path("settings.json"),
    data_dir: options.DataDir = None,
    user_column: options.UserColumn = "user",
    item_column: options.ItemColumn = "item",
    rating_column: options.RatingColumn = "rating",
    timestamp_column: options.TimestampColumn = "timestamp",
    sep: options.Separator = None,
    scale: options.Scale = None,
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
        from lunet_fast.recsys.data import movielens
        from lunet_fast.recsys.evaluation.tuning import tune
        from lunet_fast.training.files import write_json

        columns = options.columns(user_column, item_column, rating_column, timestamp_column, sep, scale)
        if gamma == 0 and dataset not in movielens.DATASETS:
            columns["rating"] = None
        if out.parent != Path() and not out.parent.is_dir():
            raise ValueError(f"--out {out}: there is no folder {out.parent}")
        ratings = options.read_dataset("--dataset", dataset, data_dir, columns)
        asked: dict[str, Any] = {"gamma": gamma, "members": members}
        if epochs is not None:
            asked["epochs"] = epochs

        def told(number: int, value: float | None, best: float) -> None:
            typer.echo(
                f"trial {number + 1}: {'failed' if value is None else f'{value:.4f}'}, best {best:.4f}"
            )

        try:
            tuned = tune(ratings, trials=trials, storage=study, seed=seed, told=told, **asked)
        except KeyboardInterrupt:
            kept = f"what is done is in {study}: the same command goes on" if study else "nothing is kept"
            typer.echo(f"\nInterrupted; {kept}.", err=True)
            raise typer.Exit(130) from None
        write_json(out, {**asked, **tuned.settings})
        typer.echo(f"best of {tuned.trials} trials: {tuned.measure} {tuned.value:.4f}; written to {out}")
        typer.echo(f"lunet-fast train --dataset {dataset} --seed {seed} --settings {out}")

"""``lunet-fast train``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from lunet_fast.cli import options
from lunet_fast.cli.options import DATA
from lunet_fast.cli.output import fail
from lunet_fast.recsys.model.config import (
    LOSSES,
    NEGATIVE_SAMPLINGS,
    NEGATIVES_OUTSIDE,
    RECIPES,
    SPLITS,
    recipe,
)

if TYPE_CHECKING:
    from lunet_fast.recsys.data.ratings import Ratings
    from lunet_fast.recsys.data.streaming import RatingStream
    from lunet_fast.training.files import RunFolder

MODEL, OBJECTIVE = "Model and training", "What is learnt: ratings, interactions or both"


def train_command(
    dataset: Annotated[
        str,
        typer.Option(
            "--dataset",
            "-d",
            metavar="NAME|PATH",
            help="`ml-100k` or `ml-1m`, fetched if need be; or your own CSV, TSV or Parquet file of ratings.",
            rich_help_panel=DATA,
        ),
    ] = "ml-100k",
    recipe_name: Annotated[
        str,
        typer.Option(
            "--recipe",
            "-r",
            metavar="|".join(RECIPES),
            help="`paper`: the paper's protocol (Adam 1e-3, batch 128, 50 epochs, linear read-out). "
            "`best`: the best settings found on a validation part.",
        ),
    ] = "best",
    seed: Annotated[
        int, typer.Option(help="Fixes the split, the first weights and the order of the batches.")
    ] = 0,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Run folder to write.", show_default="runs/DATASET")
    ] = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on from the last checkpoint in the run folder, if there is one."),
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the training in the run folder.")
    ] = False,
    checkpoint_minutes: Annotated[
        float,
        typer.Option(
            min=0, help="Time between checkpoints within an epoch; there is one at each epoch's end too."
        ),
    ] = 2.0,
    split: Annotated[
        str | None,
        typer.Option(
            metavar="|".join(SPLITS),
            help="What is held out for the test: 20 % of all ratings; 20 % of each user's; each user's "
            "latest rating, for ranking; or that and 20 % of the rest.",
            show_default="random; joint with --gamma below 1, leave-one-out with 0",
            rich_help_panel=DATA,
        ),
    ] = None,
    train_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Train on this file, laid out as the files of `--dataset`; goes with `--test-file`.",
            rich_help_panel=DATA,
        ),
    ] = None,
    test_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Test on this file.", rich_help_panel=DATA)
    ] = None,
    stream: Annotated[
        bool,
        typer.Option(
            "--stream",
            help="Read a Parquet file, or a folder of them, batch by batch: memory does not grow with the "
            "number of ratings. Without histories and side features, gamma 1; 20 % are tested, by a rule on "
            "the ids.",
            rich_help_panel=DATA,
        ),
    ] = False,
    shard_tables: Annotated[
        bool,
        typer.Option(
            "--shard-tables",
            help="With --stream under torchrun: each of N processes holds an N-th of the rows of the tables "
            "of users and items and of their optimiser's state, and fetches those of a batch from the "
            "others.",
            rich_help_panel=DATA,
        ),
    ] = False,
    data_dir: options.DataDir = None,
    user_column: options.UserColumn = "user",
    item_column: options.ItemColumn = "item",
    rating_column: options.RatingColumn = "rating",
    timestamp_column: options.TimestampColumn = "timestamp",
    sep: options.Separator = None,
    scale: options.Scale = None,
    settings: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="JSON of settings, as `tune` writes and `config.json` names them; options given here "
            "go before it.",
            rich_help_panel=MODEL,
        ),
    ] = None,
    epochs: Annotated[
        int | None,
        typer.Option(help="Passes over the training ratings, of the MLP control too.", rich_help_panel=MODEL),
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Ratings a step.", rich_help_panel=MODEL)] = None,
    learning_rate: Annotated[
        float | None,
        typer.Option("--learning-rate", "--lr", help="Adam's, of the embeddings.", rich_help_panel=MODEL),
    ] = None,
    net_learning_rate: Annotated[
        float | None, typer.Option(help="Adam's, of the LU layers.", rich_help_panel=MODEL)
    ] = None,
    embedding_size: Annotated[
        int | None, typer.Option(help="k: the network works in D = 2k dimensions.", rich_help_panel=MODEL)
    ] = None,
    layers: Annotated[
        int | None, typer.Option(help="LU layers, the last one linear.", rich_help_panel=MODEL)
    ] = None,
    alpha: Annotated[
        float | None, typer.Option(help="Left slope of LeakySoftplus, 0 to 1.", rich_help_panel=MODEL)
    ] = None,
    members: Annotated[
        int | None, typer.Option(help="Models trained side by side and averaged.", rich_help_panel=MODEL)
    ] = None,
    side_features: Annotated[
        bool | None,
        typer.Option(
            "--side-features/--no-side-features",
            help="Use what the data set says of users and items beside ratings: genres, age, gender, "
            "occupation.",
            show_default="the recipe's",
            rich_help_panel=MODEL,
        ),
    ] = None,
    dropout: Annotated[
        float | None, typer.Option(help="On the network's input.", rich_help_panel=MODEL)
    ] = None,
    gamma: Annotated[
        float | None,
        typer.Option(
            help="Weight of the ratings' loss (2.11), 0 to 1; the interactions' has the rest. Below 1 the "
            "model learns to rank as well, 0 needs no ratings.",
            show_default="1",
            rich_help_panel=OBJECTIVE,
        ),
    ] = None,
    loss: Annotated[
        str | None,
        typer.Option(
            metavar="|".join(LOSSES),
            help="`mse`: squared error and cross-entropy. `huber`, `ordinal`: other losses of the ratings. "
            "`bpr`: another one of the interactions.",
            show_default="mse",
            rich_help_panel=OBJECTIVE,
        ),
    ] = None,
    negatives: Annotated[
        int | None,
        typer.Option(help="Items without interaction drawn for each rating.", rich_help_panel=OBJECTIVE),
    ] = None,
    negative_sampling: Annotated[
        str | None,
        typer.Option(
            metavar="|".join(NEGATIVE_SAMPLINGS),
            help="How they are drawn.",
            show_default="uniform",
            rich_help_panel=OBJECTIVE,
        ),
    ] = None,
    negatives_outside: Annotated[
        str | None,
        typer.Option(
            metavar="|".join(NEGATIVES_OUTSIDE),
            help="Never drawn: the pairs of the training part, or all that are known, held-out ones too. The "
            "second tells the model what is held out and flatters its ranking.",
            show_default="training",
            rich_help_panel=OBJECTIVE,
        ),
    ] = None,
    mlp: Annotated[
        bool,
        typer.Option(
            "--mlp/--no-mlp", help="Train the MLP control of the paper's table 2 too.", rich_help_panel=MODEL
        ),
    ] = True,
    threads: Annotated[
        int | None,
        typer.Option(
            help="CPU threads; another number may change the last digits of the result.",
            rich_help_panel=MODEL,
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="`cpu`, `cuda`, `cuda:1`.", rich_help_panel=MODEL)] = "cpu",
) -> None:
    """Train the recommender and set it beside the paper's table 2.

    Writes `metrics.json`, `config.json`, `model.safetensors`, `loss.png` and `checkpoints/` into the run
    folder. The ratings held out are evaluated for the figure and the result; no decision reads them. Settings
    that are not given are the recipe's for MovieLens data of the nearest size.

    Ctrl-C and SIGTERM save a checkpoint and end the command; after that or anything worse, the same command
    with `--resume` goes on to the same weights. Under `torchrun` several processes share each batch.

    Examples:

        lunet-fast train --dataset ml-100k --recipe best

        lunet-fast train --dataset ml-100k --gamma 0.1

        lunet-fast train --dataset clicks.csv --gamma 0

        lunet-fast train --dataset ml-100k --train-file u1.base --test-file u1.test

        lunet-fast train --dataset my.csv --user-column who --item-column what --scale 0.5 5 --out runs/mine

        lunet-fast train --dataset ratings.parquet --stream --members 1

        torchrun --nproc-per-node 2 -m lunet_fast train --dataset ratings.parquet --stream --shard-tables

        torchrun --nproc-per-node 2 --max-restarts 3 -m lunet_fast train --dataset ml-1m --resume
    """
    from lunet_fast.cli import signals
    from lunet_fast.cli.progress import training_progress
    from lunet_fast.recsys.data import movielens
    from lunet_fast.recsys.model.streamed_training import STREAM_SETTINGS, train_stream
    from lunet_fast.recsys.model.training import train
    from lunet_fast.training.distributed import Workers, workers_of_torchrun
    from lunet_fast.training.files import RunFolder, read_json
    from lunet_fast.training.loop import DivergenceError

    if (train_file is None) != (test_file is None):
        raise typer.BadParameter("--train-file and --test-file go together: give both or none")
    if train_file is not None and split is not None:
        raise typer.BadParameter("--split does not go with --train-file and --test-file, which are the split")
    overrides: dict[str, Any] = {
        "split": split,
        "epochs": epochs,
        "mlp_epochs": epochs,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "net_learning_rate": net_learning_rate,
        "embedding_size": embedding_size,
        "layers": layers,
        "alpha": alpha,
        "members": members,
        "dropout": dropout,
        "side_features": side_features,
        "gamma": gamma,
        "loss": loss,
        "negatives": negatives,
        "negative_sampling": negative_sampling,
        "negatives_outside": negatives_outside,
        "threads": threads,
        "mlp": mlp,
    }
    overrides = {name: value for name, value in overrides.items() if value is not None}
    if settings is not None:
        try:
            overrides = {**read_json(settings), **overrides}
        except (OSError, ValueError) as error:
            fail(ValueError(f"--settings {settings}: {error}"), 2)
    gamma = overrides.get("gamma", gamma)
    columns = options.columns(user_column, item_column, rating_column, timestamp_column, sep, scale)
    if gamma == 0 and dataset not in movielens.DATASETS:
        columns["rating"] = None  # not needed, and clicks have none
    if shard_tables and not stream:
        raise typer.BadParameter(
            "--shard-tables divides the tables of a training on a stream: add --stream, with a Parquet file"
        )
    if stream:
        if dataset in movielens.DATASETS or train_file is not None or sep is not None or scale is not None:
            raise typer.BadParameter(
                "--stream reads Parquet files: --dataset PATH, without --train-file, --sep and --scale"
            )
        for name, value in STREAM_SETTINGS.items():
            if name != "mlp" and overrides.get(name, value) != value:
                raise typer.BadParameter(f"--stream needs {name}={value}, got {overrides[name]!r}")
        overrides |= STREAM_SETTINGS
    name = dataset if dataset in movielens.DATASETS else Path(dataset).name.split(".")[0]
    folder = RunFolder(out or Path("runs") / (name or "ratings"))
    workers = Workers()
    with signals.heard() as stop:
        try:
            recipe(recipe_name, 1, seed=seed, **overrides)  # a wrong value is told before any file is read
            with workers_of_torchrun(device) as workers:
                console = Console(quiet=not workers.is_first)
                if workers.is_first:
                    folder.prepare(resume=resume, overwrite=overwrite)
                if workers.of_first(int(resume and folder.is_finished())):
                    if workers.is_first:
                        data = dataset if dataset in movielens.DATASETS else Path(dataset).name
                        asked = {"recipe": recipe_name, "seed": seed, **overrides}
                        _check_same(folder, asked if train_file is not None else {"dataset": data, **asked})
                        typer.echo(f"{folder.path} holds the finished training; nothing to do.")
                        _show(console, read_json(folder.metrics), folder)
                    return
                common: dict[str, Any] = {
                    "out": folder.path,
                    "resume": resume,
                    "overwrite": overwrite,
                    "checkpoint_seconds": 60 * checkpoint_minutes,
                    "stop": stop,
                    "workers": workers,
                }
                if stream:
                    rows = _open_stream(dataset, columns, seed, console)
                    config = recipe(recipe_name, len(rows), seed=seed, **overrides)
                    with training_progress(console) as progress:
                        result = train_stream(
                            rows, config, progress=progress, shard_tables=shard_tables, **common
                        )
                else:
                    ratings, test = _read(dataset, data_dir, train_file, test_file, columns)
                    size = len(ratings) + (0 if test is None else len(test))
                    config = recipe(recipe_name, size, seed=seed, **overrides)
                    with training_progress(console) as progress:
                        result = train(ratings, config, test=test, progress=progress, **common)
        except DivergenceError as error:
            fail(error, 1)
        except (OSError, ValueError, ImportError) as error:
            fail(error, 2)
        except KeyboardInterrupt as error:
            if workers.is_first:
                typer.echo(f"\n{_interrupted(error, folder)}", err=True)
            raise typer.Exit(stop.exit_code) from None
        except RuntimeError as error:
            if workers.world_size == 1:
                raise
            if stop.asked:  # process 0 has saved, and left first
                raise typer.Exit(stop.exit_code) from None
            fail(RuntimeError(f"process {workers.rank} of {workers.world_size}: {error}"), 1)
    if workers.is_first:
        _show(console, result.metrics, folder)


def _interrupted(error: KeyboardInterrupt, folder: RunFolder) -> str:
    saved = f"{error}. " if str(error) else ""
    return f"Interrupted. {saved}The same command with --resume goes on from {folder.checkpoints}."


def _open_stream(path: str, columns: dict[str, Any], seed: int, console: Console) -> RatingStream:
    from lunet_fast.recsys.data.streaming import RatingStream

    names = {role: columns[role] for role in ("user", "item", "rating", "timestamp")}
    stream = RatingStream.open(path, seed=seed, **names)
    console.print(str(stream), highlight=False)
    return stream


def _read(
    dataset: str,
    data_dir: Path | None,
    train_file: Path | None,
    test_file: Path | None,
    columns: dict[str, Any],
) -> tuple[Ratings, Ratings | None]:
    """All ratings, or the training and the test part where two files hold them."""

    from lunet_fast.recsys.data import movielens
    from lunet_fast.recsys.data.ratings import read_ratings
    from lunet_fast.recsys.data.splits import join

    def read(path: Path) -> Ratings:
        if dataset in movielens.DATASETS:
            return movielens.read_like(dataset, path)
        return read_ratings(path, **columns)

    if train_file is not None and test_file is not None:
        parts = join(read(train_file), read(test_file))
        if dataset in movielens.DATASETS:
            # The results name the data set; which files they were is kept as the source.
            return replace(parts[0], name=dataset), replace(parts[1], name=dataset)
        return parts
    return options.read_dataset("--dataset", dataset, data_dir, columns), None


def _check_same(folder: RunFolder, asked: dict[str, Any]) -> None:
    """Refuse to take a finished training for another one."""
    from lunet_fast.training.files import read_json

    recorded = read_json(folder.config)
    for name, value in asked.items():
        if recorded.get(name) != value:
            raise ValueError(
                f"{folder.path} was trained with {name}={recorded.get(name)!r}, not {value!r}: choose "
                "another --out, or --overwrite instead of --resume"
            )


def _show(console: Console, values: dict[str, Any], folder: RunFolder) -> None:
    from lunet_fast.recsys import report

    if "reconstruction_error" in values and "test_mse" in values:
        table = Table(title="Table 2: test error and reconstruction of the embeddings")
        for heading in ("model", "data"):
            table.add_column(heading)
        for heading in ("test MSE", "reconstruction error"):
            table.add_column(heading, justify="right")
        for row in report.table_2(values):
            table.add_row(*row, style="bold" if row[0].startswith("ours") else None)
        console.print(table)
    elif "test_mse" in values:
        typer.echo(f"test MSE {values['test_mse']:.4f} over {values['test_ratings']:,} ratings")
    if "full_ndcg@10" in values:
        console.print(_ranking_table(values))
    typer.echo(
        f"{values['dataset']}, split {values['split']}, seed {values['seed']}: {values['epochs']} epochs in "
        f"{values['train_seconds']:.0f} s, {values['parameters']:,} parameters; written to {folder.path}"
    )


def _ranking_table(values: dict[str, Any]) -> Table:
    of = "each user's latest" if values["held_out_ratings"] else "test ratings"
    table = Table(title=f"Ranking: {of}, {values['full_users']:,} users")
    table.add_column("among")
    for heading in ("HR@10", "NDCG@10", "MRR"):
        table.add_column(heading, justify="right")
    for among, prefix in (("100 candidates", ""), ("all items not seen", "full_")):
        if f"{prefix}mrr" in values:
            cells = [f"{values[prefix + name]:.4f}" for name in ("hr@10", "ndcg@10", "mrr")]
            table.add_row(among, *cells)
    return table

"""The command line: arguments in, one call, text out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.table import Table

import lunet_fast
from lunet_fast.recsys import movielens, report
from lunet_fast.recsys.checkpoints import RunFolder, read_json
from lunet_fast.recsys.config import RECIPES, SPLITS, recipe
from lunet_fast.recsys.ratings import Ratings, read_ratings
from lunet_fast.recsys.splits import join
from lunet_fast.recsys.training import DivergenceError, Progress, train

app = typer.Typer(
    add_completion=False,
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


DATA, MODEL, FILES = "Data", "Model and training", "Columns of your own file"


@app.command("train")
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
    split: Annotated[
        str | None,
        typer.Option(
            metavar="|".join(SPLITS),
            help="What is held out for the test: 20 % of all ratings, or 20 % of each user's.",
            show_default="random",
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
    data_dir: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Folder with the MovieLens files, zipped or not.",
            show_default="$LUNET_FAST_DATA, else a download",
            rich_help_panel=DATA,
        ),
    ] = None,
    user_column: Annotated[
        str,
        typer.Option(
            "--user-column", "--user-col", metavar="NAME", rich_help_panel=FILES, help="Users' ids."
        ),
    ] = "user",
    item_column: Annotated[
        str,
        typer.Option(
            "--item-column", "--item-col", metavar="NAME", rich_help_panel=FILES, help="Items' ids."
        ),
    ] = "item",
    rating_column: Annotated[
        str,
        typer.Option(
            "--rating-column", "--rating-col", metavar="NAME", rich_help_panel=FILES, help="Numbers."
        ),
    ] = "rating",
    timestamp_column: Annotated[
        str,
        typer.Option(
            "--timestamp-column",
            "--timestamp-col",
            metavar="NAME",
            rich_help_panel=FILES,
            help="Unix seconds or ISO dates; may be absent.",
        ),
    ] = "timestamp",
    sep: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT",
            rich_help_panel=FILES,
            help="What stands between two columns.",
            show_default="by the file's extension",
        ),
    ] = None,
    scale: Annotated[
        tuple[float, float] | None,
        typer.Option(
            metavar="LOW HIGH",
            rich_help_panel=FILES,
            help="Lowest and highest rating possible; others are refused, predictions clipped.",
            show_default="those of the file",
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
    dropout: Annotated[
        float | None, typer.Option(help="On the network's input.", rich_help_panel=MODEL)
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

    Examples:

        lunet-fast train --dataset ml-100k --recipe best

        lunet-fast train --dataset ml-100k --train-file u1.base --test-file u1.test

        lunet-fast train --dataset my.csv --user-column who --item-column what --scale 0.5 5 --out runs/mine
    """
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
        "threads": threads,
        "mlp": mlp,
    }
    overrides = {name: value for name, value in overrides.items() if value is not None}
    columns: dict[str, Any] = {
        "user": user_column,
        "item": item_column,
        "rating": rating_column,
        "timestamp": timestamp_column,
        "sep": sep,
        "scale": scale,
    }
    name = dataset if dataset in movielens.DATASETS else Path(dataset).name.split(".")[0]
    folder = RunFolder(out or Path("runs") / (name or "ratings"))
    console = Console()
    try:
        recipe(recipe_name, 1, seed=seed, **overrides)  # a wrong value is told before any file is read
        folder.prepare(resume=resume, overwrite=overwrite)
        if resume and folder.is_finished():
            data = dataset if dataset in movielens.DATASETS else Path(dataset).name
            asked = {"recipe": recipe_name, "seed": seed, **overrides}
            _check_same(folder, asked if train_file is not None else {"dataset": data, **asked})
            typer.echo(f"{folder.path} holds the finished training; nothing to do.")
            _show(console, read_json(folder.metrics), folder)
            return
        ratings, test = _read(dataset, data_dir, train_file, test_file, columns)
        size = len(ratings) + (0 if test is None else len(test))
        config = recipe(recipe_name, size, seed=seed, **overrides)
        with _progress(console) as progress:
            result = train(
                ratings,
                config,
                test=test,
                out=folder.path,
                resume=resume,
                overwrite=overwrite,
                device=device,
                progress=progress,
            )
    except DivergenceError as error:
        _fail(error, 1)
    except (OSError, ValueError, ImportError) as error:
        _fail(error, 2)
    except KeyboardInterrupt:
        typer.echo(
            f"\nInterrupted. The same command with --resume goes on from {folder.checkpoints}.", err=True
        )
        raise typer.Exit(130) from None
    _show(console, result.metrics, folder)


@app.command("bench")
def bench_command(
    suites: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[SUITE]...",
            help="`layers`: one layer beside what others offer. `claims`: is the inverse O(D²) and the "
            "log-determinant O(D)? `stacks`: flows of M layers. `training`: steps of the recommender.",
            show_default="layers",
        ),
    ] = None,
    scale: Annotated[
        str, typer.Option(metavar="quick|all", help="A few sizes in about a minute a suite, or every size.")
    ] = "quick",
    seconds: Annotated[
        float | None,
        typer.Option(help="For one comparison; three rounds are made in any case.", show_default="3, all: 4"),
    ] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads.", show_default="PyTorch's")] = None,
    device: Annotated[str, typer.Option(help="`cpu`, `cuda`, `cuda:1`.")] = "cpu",
    dtype: Annotated[str, typer.Option(metavar="float32|bfloat16", help="Of weights and rows.")] = "float32",
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="DIR", help="Write JSON, Markdown and plots there.")
    ] = None,
    baseline: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Earlier results, written with --out: their ratios are shown beside the new ones.",
        ),
    ] = None,
) -> None:
    """Time LU layers, flows and training steps on this machine, beside what else there is.

    Contenders take turns in one process, after each has been compared with float64; a result is printed
    only if all of them agree. "times ours" above 1 means that LUDense is the faster one; "times the floor"
    is the distance from what this machine's matrix products and memory allow. Peers that are not installed
    are named: `pip install "lunet-fast[bench]"` brings them.

    Examples:

        lunet-fast bench

        lunet-fast bench claims --scale all --out results

        lunet-fast bench layers stacks --device cuda --dtype bfloat16
    """
    import torch

    from lunet_fast.bench import machine, plots, results
    from lunet_fast.bench.contest import CheckFailed

    chosen = suites or ["layers"]
    for name in chosen:
        if name not in results.SUITES:
            raise typer.BadParameter(f"{name!r} is no suite: choose from {', '.join(results.SUITES)}")
    if scale not in results.SCALES:
        raise typer.BadParameter(f"--scale {scale}: choose {' or '.join(results.SCALES)}")
    if dtype not in ("float32", "bfloat16"):
        raise typer.BadParameter(f"--dtype {dtype}: choose float32 or bfloat16")
    if threads is not None:
        torch.set_num_threads(threads)
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)
    try:
        place = torch.device(device)
        if place.type == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"--device {device}: PyTorch sees no CUDA device here; use cpu")
        for name in chosen:
            before = (
                None
                if baseline is None
                else results.Result.load(baseline / results.file_name(name, place, dtype))
            )
            with _suite_progress(console, len(results.SUITES[name].specs(scale))) as told:
                result = results.run_suite(
                    name, scale, place, getattr(torch, dtype), seconds=seconds, told=told
                )
            _show_suite(console, result, before)
            if out is not None:
                path = result.save(out / results.file_name(name, place, dtype))
                machine.write_text(path.with_suffix(".md"), results.markdown(result))
                plots.draw(result, path.with_suffix(".png"))
                typer.echo(f"written to {path}, .md and .png")
    except CheckFailed as error:
        _fail(error, 1)
    except (OSError, ValueError, RuntimeError) as error:
        _fail(error, 2)


@contextmanager
def _suite_progress(console: Console, contests: int) -> Iterator[Callable[[Any, list[Any]], None]]:
    """A bar over the contests of a suite, or a line for each in a log."""
    if not console.is_terminal:
        done = 0

        def line(spec: Any, rows: list[Any]) -> None:
            nonlocal done
            done += 1
            typer.echo(f"{done}/{contests}  {spec}", err=True)

        yield line
        return
    bars = Bars(
        TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        BarColumn(),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
    )
    with bars:
        task = bars.add_task("", total=contests)
        yield lambda spec, rows: bars.update(task, advance=1, description=f"{spec.suite}: {spec}")


def _show_suite(console: Console, result: Any, before: Any) -> None:
    from lunet_fast.bench import claims, results

    for spec, rows in result.groups().items():
        table = Table(title=str(spec), title_justify="left")
        for place, heading in enumerate((*results.HEADER, *(["ratio before"] if before else []))):
            table.add_column(heading, justify="left" if place == 0 else "right")
        for row in rows:
            table.add_row(*results.cells(row, before), style="bold" if row.ours else None)
        console.print(table)
    reasons = {(name, why) for entry in result.missing.values() for name, why in entry.items()}
    for name, why in sorted(reasons):
        typer.echo(f"{name}: {why}")
    if result.counts:
        typer.echo("\n".join(claims.verdicts(result.rows, result.counts)))
    typer.echo(result.where())


def _read(
    dataset: str,
    data_dir: Path | None,
    train_file: Path | None,
    test_file: Path | None,
    columns: dict[str, Any],
) -> tuple[Ratings, Ratings | None]:
    """All ratings, or the training and the test part where two files hold them."""

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
    if dataset in movielens.DATASETS:
        return movielens.load(dataset, data_dir), None
    if not Path(dataset).is_file():
        known = ", ".join(movielens.DATASETS)
        raise FileNotFoundError(
            f"--dataset {dataset}: neither a known data set ({known}) nor an existing file"
        )
    return read_ratings(dataset, **columns), None


def _check_same(folder: RunFolder, asked: dict[str, Any]) -> None:
    """Refuse to take a finished training for another one."""
    recorded = read_json(folder.config)
    for name, value in asked.items():
        if recorded.get(name) != value:
            raise ValueError(
                f"{folder.path} was trained with {name}={recorded.get(name)!r}, not {value!r}: choose "
                "another --out, or --overwrite instead of --resume"
            )


def _fail(error: Exception, code: int) -> NoReturn:
    typer.echo(f"Error: {error}", err=True)
    raise typer.Exit(code)


def _show(console: Console, values: dict[str, Any], folder: RunFolder) -> None:
    if "test_mse" in values:
        table = Table(title="Table 2: test error and reconstruction of the embeddings")
        for heading in ("model", "data"):
            table.add_column(heading)
        for heading in ("test MSE", "reconstruction error"):
            table.add_column(heading, justify="right")
        for row in report.table_2(values):
            table.add_row(*row, style="bold" if row[0].startswith("ours") else None)
        console.print(table)
    typer.echo(
        f"{values['dataset']}, split {values['split']}, seed {values['seed']}: {values['epochs']} epochs in "
        f"{values['train_seconds']:.0f} s, {values['parameters']:,} parameters; written to {folder.path}"
    )


def _progress(console: Console) -> _BarProgress | _LineProgress:
    return _BarProgress(console) if console.is_terminal else _LineProgress()


def _losses(train_loss: float, test_loss: float | None) -> str:
    return f"train {train_loss:.4f}" + ("" if test_loss is None else f"  test {test_loss:.4f}")


class _LineProgress(Progress):
    """A line an epoch, for logs."""

    def __enter__(self) -> _LineProgress:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def start(self, phase: str, epochs: int, steps: int, done: int) -> None:
        self.epochs = epochs
        if done:
            typer.echo(f"{phase}: {done} of {epochs} epochs are done already")

    def epoch(self, phase: str, epoch: int, train_loss: float, test_loss: float | None) -> None:
        typer.echo(f"{phase}  epoch {epoch + 1}/{self.epochs}  {_losses(train_loss, test_loss)}")


class _BarProgress(Progress):
    """A bar for each phase, with its epoch and losses."""

    def __init__(self, console: Console) -> None:
        self.bars = Bars(
            TextColumn("{task.description:8}"),
            BarColumn(),
            TextColumn("epoch"),
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
        self.bars.update(self.task, completed=epoch + 1, losses=_losses(train_loss, test_loss))

"""``lunet-fast density``: a flow as a density of tables, images and 2-D toy data."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lunet_fast.cli.density_data import DataDir, data_app
from lunet_fast.cli.options import (
    Continuation,
    Device,
    JsonOut,
    TrainedOn,
    dataset_option,
    existing_device,
    run_name,
)
from lunet_fast.cli.output import (
    FigureOutput,
    Output,
    Terminal,
    errors_told,
    prepare_out,
    printable,
    write_csv,
    write_out,
)
from lunet_fast.cli.signatures import grouped, settings_command

if TYPE_CHECKING:
    from lunet_fast.density.data import Rows
    from lunet_fast.density.files import TrainedFlow
    from lunet_fast.density.model import DensityModel

density_app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="Learn a density with LU layers: exact likelihoods, and samples.",
)

density_app.add_typer(data_app, name="data")

TrainCommand = settings_command(
    "lunet_fast.density.config:DensityConfig",
    {
        "The flow": (
            *("layers", "activation", "bins", "input_bins", "tails", "components", "signs", "permutation"),
            *("conditional", "alpha", "slopes"),
        ),
        "Training": ("steps", "patience", "batch_size", "learning_rate", "weight_decay", "seed", "threads"),
    },
)

Dataset = Annotated[
    str,
    dataset_option(
        help="`digits`, `wine`, `breast_cancer`, `diabetes`, `iris` (of scikit-learn); `letter`, `shuttle`, "
        "`satellite`, `vehicle`, `vowel`, `pima`, `spam`, `fashion-mnist` (fetched if need be); `power`, "
        "`gas`, `hepmass`, `miniboone`, `bsds300` (with `--data-dir`); `ring`, `moons`, `spirals`, "
        "`checkerboard` (2-D toy data, their density known); or your own `.csv`, `.tsv`, `.parquet` or "
        "`.npy` of numbers, or MNIST's `train-images-idx3-ubyte.gz`, tested on `t10k-images…` beside it.",
    ),
]
LabelColumn = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="Column of classes in your file: not a number of the density."),
]
ClassOf = Annotated[
    str | None,
    typer.Option("--class", metavar="LABEL", help="The rows of this class alone, of data with labels."),
]
Levels = Annotated[
    int | None,
    typer.Option(
        min=0,
        metavar="N",
        help="Your file's numbers are the integers 0 to N − 1, to be dequantised; 0: real numbers.",
        show_default="found",
    ),
]
TestFile = Annotated[
    str | None,
    typer.Option(metavar="PATH", help="The test rows, in a file of their own; 90 % of the others train."),
]
Run = Annotated[
    Path, typer.Option("--run", metavar="DIR", help="Run folder: what `density train` has as `--out`.")
]


@density_app.command("train", cls=TrainCommand)
@grouped
def train_command(
    *,
    context: typer.Context,
    dataset: Dataset = "digits",
    data_dir: DataDir = None,
    label_column: LabelColumn = None,
    label: ClassOf = None,
    levels: Levels = None,
    test_file: TestFile = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Run folder to write.", show_default="runs/density/DATASET[-LABEL]"),
    ] = None,
    continuation: Continuation,
    device: Device = "cpu",
    output: FigureOutput,
) -> None:
    """Train a flow on a data set, and tell what it is worth on rows that it has not seen.

    70 % of the rows train, 10 % choose when to stop, 20 % are the test; data with test rows of their own
    are tested on these. Integers (images) are dequantised and
    their loss is in bits a dimension; the loss of other numbers is in nats a row. All Jacobians are counted.
    Whether the numbers of a file are integers is found out and told.

    Writes `metrics.json`, `config.json`, `model.safetensors` and pictures into the run folder. Ctrl-C and
    SIGTERM save a checkpoint; the same command with `--resume` goes on to the same weights.

    Examples:

        lunet-fast density train --dataset digits

        lunet-fast density train --dataset digits --conditional --out runs/density/by-class

        lunet-fast density train --dataset fashion-mnist --class 0

        lunet-fast density train --dataset power --data-dir ~/maf/data

        lunet-fast density train --dataset moons --layers 8

        lunet-fast density train --dataset sensors.parquet --label-column kind

        lunet-fast density train --dataset train.csv --test-file test.csv --levels 16
    """
    from lunet_fast.cli.progress import training_progress
    from lunet_fast.cli.signals import training_told
    from lunet_fast.density import data
    from lunet_fast.density.config import DensityConfig
    from lunet_fast.density.training import train_density
    from lunet_fast.training.files import RunFolder

    folder = RunFolder(out or Path("runs") / "density" / _folder_name(dataset, label, data.NAMES))
    with training_told(folder.checkpoints) as stop:
        config = DensityConfig(**context.obj)
        rows = data.read(
            dataset, label_column=label_column, seed=config.seed, levels=levels, data_dir=data_dir
        )
        test = data.read(test_file, label_column=label_column, like=rows) if test_file else None
        rows, test = _of_class(rows, test, label)
        _tell(output, dataset, rows, levels)
        console = Terminal(quiet=not output.told)
        with training_progress(console, unit="round", held_out="validation") as progress:
            result = train_density(
                rows,
                config,
                test=test,
                **continuation.arguments(folder),
                device=device,
                progress=progress,
                stop=stop,
            )
        _save_pictures(folder.path, data.split(rows, config.seed, test).test, result.trained, config.seed)
    output.figures(result.metrics, lambda: _show(Terminal(), result.metrics, dataset))
    output.line(f"written to {folder.path}")


def _folder_name(dataset: str, label: str | None, known: Any) -> str:
    name = run_name(dataset, known) or "data"
    return name if label is None else f"{name}-{re.sub(r'[^A-Za-z0-9]+', '-', label).strip('-') or 'class'}"


def _of_class(rows: Rows, test: Rows | None, label: str | None) -> tuple[Rows, Rows | None]:
    """The rows, and those of the test if in another file, of one class, or all."""
    from lunet_fast.density import data

    if label is None:
        return rows, test
    return data.of_class(rows, label), None if test is None else data.of_class(test, label)


def _tell(output: FigureOutput, dataset: str, rows: Rows, levels: int | None) -> None:
    """What was found out about the numbers of a file, and where published data differ from the published."""
    from lunet_fast.density import data, data_published

    if dataset in data_published.DATASETS:
        differs = data_published.told_of_sizes(dataset, rows)
        if differs:
            output.note(f"Note: {differs}")
    elif levels is None and dataset not in data.NAMES:
        output.line(_told_of_levels(rows))


def _told_of_levels(rows: Rows) -> str:
    name = printable(rows.name)
    if rows.levels is not None:
        return (
            f"{name}: integers from 0 to {rows.levels - 1}, dequantised, loss in bits a dimension "
            "(--levels 0 for real numbers)"
        )
    told = f"{name}: real numbers, loss in nats a row (--levels N for integers from 0 to N − 1)"
    low = int(rows.values.min())
    if low < 0 and bool((rows.values == rows.values.round()).all()):
        told += f"; of integers, as all are, no density is bounded: add {-low}, so that they start at 0"
    return told


def _save_pictures(folder: Path, test: Rows, model: DensityModel, seed: int) -> None:
    """What can be seen of the density: of 2-D toy data a map, of images samples and an interpolation."""
    from lunet_fast.density import pictures

    if test.target is not None:
        pictures.save_heat_maps(folder / "density.png", model, test.target)
    if test.image is not None and test.levels is not None:
        samples = _drawn(model, pictures.SIDE**2, seed)
        pictures.save_samples(folder / "samples.png", samples, test.values, test.image, test.levels)
        pictures.save_interpolation(folder / "interpolation.png", model, test)


@density_app.command("evaluate")
@grouped
def evaluate_command(
    *,
    run: Run = Path("runs/density/digits"),
    dataset: TrainedOn = None,
    data_dir: DataDir = None,
    label_column: LabelColumn = None,
    test_file: TestFile = None,
    against: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|PATH",
            help="Other data of as many features: how well log p tells it from the test rows (AUROC).",
        ),
    ] = None,
    out: JsonOut = None,
    device: Device = "cpu",
    output: FigureOutput,
) -> None:
    """Evaluate a trained flow again, from its files.

    Divides the data as the training did and measures the saved flow: loss of each part, distance of samples
    from data, and of 2-D toy data the divergence from the truth.

    Examples:

        lunet-fast density evaluate --run runs/density/digits

        lunet-fast density evaluate --run runs/density/mine --dataset mine.csv --against others.csv
    """
    from lunet_fast.density import data
    from lunet_fast.density.evaluation import auroc, evaluate
    from lunet_fast.training.files import write_json

    with errors_told():
        prepare_out(out)
        trained = _load(run, device)
        model, seed = trained.model, trained.config.seed
        rows, test = _read_again(run, trained, dataset, data_dir, label_column, test_file)
        parts = data.split(rows, seed, test)
        values = evaluate(model, parts)
        if against is not None:
            levels = model.preprocessing.levels or 0
            others = data.read(
                against,
                label_column=None if against in data.NAMES else label_column,
                levels=levels,
                data_dir=data_dir,
            )
            _check_fits(run, trained, others)
            inside = model.log_prob(parts.test.values, 10)
            values["auroc"] = auroc(inside, model.log_prob(others.values, 10))
        metrics = {"dataset": rows.name, "unit": model.preprocessing.unit, **values}
        if out is not None:
            write_json(out, metrics)
    output.figures(metrics, lambda: _show(Terminal(), metrics, rows.name))


def _read_again(
    run: Path,
    trained: TrainedFlow,
    dataset: str | None,
    data_dir: Path | None,
    label_column: str | None,
    test_file: str | None,
) -> tuple[Rows, Rows | None]:
    """The data of the run, and of its test if in another file; ``ValueError`` where these are others."""
    from lunet_fast.density import data

    known, label = data.split_name(trained.dataset)
    name = dataset or known
    if dataset is None and name not in data.NAMES:
        raise ValueError(
            f"--run {run}: was trained on a file called {printable(name)}: name it with --dataset PATH"
        )
    levels = trained.model.preprocessing.levels or 0
    rows = data.read(
        name, label_column=label_column, seed=trained.config.seed, levels=levels, data_dir=data_dir
    )
    _check_fits(run, trained, rows)
    test = data.read(test_file, label_column=label_column, like=rows) if test_file else None
    rows, test = _of_class(rows, test, label)
    source = data.source_of(rows, test)
    if source != trained.source:
        raise ValueError(
            f"--dataset {name}: is {source}, and the run was trained on {printable(trained.source)}"
        )
    return rows, test


@density_app.command("sample")
@grouped
def sample_command(
    *,
    run: Run = Path("runs/density/digits"),
    n: Annotated[int, typer.Option("-n", "--rows", min=1, help="Rows to draw.")] = 64,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            metavar="FILE",
            help="`.csv`, `.npy`, or `.png` (a sheet of 64, of images).",
            show_default="CSV to the output",
        ),
    ] = None,
    label: Annotated[
        int | None, typer.Option(min=0, help="Of this class, if the flow was trained `--conditional`.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Fixes the draws.")] = 0,
    device: Device = "cpu",
    output: Output,
) -> None:
    """Draw rows from a trained flow; the CSV has the log-likelihood of each.

    Examples:

        lunet-fast density sample --run runs/density/moons -n 1000 --out points.csv

        lunet-fast density sample --run runs/density/digits --out digits.png
    """
    from lunet_fast.density import pictures

    with errors_told():
        prepare_out(out)
        kind = ".csv" if out is None else out.suffix
        if kind not in (".csv", ".npy", ".png"):
            raise ValueError(f"--out {out}: must end in .csv, .npy or .png")
        trained = _load(run, device)
        model = trained.model
        if kind == ".png" and (trained.image is None or model.preprocessing.levels is None):
            raise ValueError(f"--out {out}: the run's rows are no pictures: write .csv or .npy")
        if label is not None and (model.shares is None or label >= len(model.shares)):
            known = (
                "was trained without labels"
                if model.shares is None
                else f"knows 0 to {len(model.shares) - 1}"
            )
            raise ValueError(f"--label {label}: the run {known}")
        rows = _drawn(model, max(n, pictures.SIDE**2) if kind == ".png" else n, seed, label)
        _write_rows(out, rows, trained)
    if out is not None:
        output.line(f"written to {out}")


def _write_rows(out: Path | None, rows: Any, trained: TrainedFlow) -> None:
    """As a sheet of pictures, NumPy's format or CSV with the log-likelihoods, by the extension."""
    import numpy as np
    import torch

    from lunet_fast.density import pictures
    from lunet_fast.training.files import write_atomically

    model, levels = trained.model, trained.model.preprocessing.levels
    if out is not None and out.suffix == ".png" and trained.image is not None and levels is not None:
        pictures.save_sheet(out, rows, trained.image, levels)
    elif out is not None and out.suffix == ".npy":

        def save(temporary: Path) -> None:
            with temporary.open("wb") as file:
                np.save(file, rows.numpy())

        write_atomically(out, save)
    else:
        header = [f"x{i}" for i in range(model.features)] + ["log_prob"]
        table = torch.cat([rows, model.log_prob(rows, 10).unsqueeze(-1).to(rows)], -1)
        write_out(out, lambda stream: write_csv(stream, header, table.tolist()))


def _drawn(model: Any, n: int, seed: int, label: int | None = None) -> Any:
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return model.sample(n, None if label is None else torch.full((n,), label))


def _load(run: Path, device: str) -> TrainedFlow:
    """The flow of a run folder, on ``device``."""
    from lunet_fast.density.files import load_flow
    from lunet_fast.training.files import RunFolder

    place = existing_device(device)
    folder = RunFolder(run)
    if not folder.model.is_file():
        raise FileNotFoundError(
            f"--run {run}: there is no trained flow: train one with  lunet-fast density train --out {run}"
        )
    trained = load_flow(folder.model)
    trained.model.flow.to(place)
    return trained


def _check_fits(run: Path, trained: TrainedFlow, rows: Rows) -> None:
    levels = trained.model.preprocessing.levels
    if rows.features != trained.model.features or rows.levels != levels:
        raise ValueError(
            f"{rows.name} has {rows.features} features and levels {rows.levels}, and the flow of --run {run} "
            f"{trained.model.features} and {levels}: name the data that it was trained on"
        )


_TOLD = {
    "train_loss": "training loss",
    "validation_loss": "validation loss",
    "test_loss": "test loss",
    "kl": "KL from the truth, nats",
    "integral": "integral of the density",
    "test_accuracy": "share of labels found",
    "sample_distance": "samples to test rows, sliced Wasserstein",
    "data_distance": "training to test rows, the same",
    "auroc": "AUROC against the other data",
    "parameters": "parameters",
    "train_seconds": "seconds of training",
}


def _show(console: Console, values: dict[str, Any], dataset: str) -> None:
    table = Table(
        title=Text(f"Density of {printable(values['dataset'])}, losses in {values['unit']}", "table.title")
    )
    table.add_column("figure")
    table.add_column("value", justify="right")
    for name, told in _TOLD.items():
        if name in values:
            value = values[name]
            error = values.get(f"{name}_error")
            text = f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
            table.add_row(told, text + (f" ± {error:.4f}" if error is not None else ""))
    console.print(table)
    from lunet_fast.density import data_published

    if dataset in data_published.DATASETS:
        _show_published(console, values, data_published.DATASETS[dataset].figures)


def _show_published(console: Console, values: dict[str, Any], figures: dict[str, float]) -> None:
    """The test log-likelihood beside those of papers."""
    table = Table(
        title="Test log-likelihood in nats, more is better", caption="others: arXiv 1906.04032, 1810.01367"
    )
    table.add_column("model")
    table.add_column("log p", justify="right")
    error = f" ± {2 * values['test_loss_error']:.2f}" if "test_loss_error" in values else ""
    table.add_row("this flow (± 2 standard errors)", f"{-values['test_loss']:.2f}{error}")
    for model, figure in figures.items():
        table.add_row(model, f"{figure:.2f}")
    console.print(table)

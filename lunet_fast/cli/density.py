"""``lunet-fast density``: a flow as a density of tables, images and points of the plane."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from lunet_fast.cli.output import errors_told, fail, prepare_out

if TYPE_CHECKING:
    from lunet_fast.density.data import Rows
    from lunet_fast.density.files import TrainedFlow

density_app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="Learn a density with LU layers: exact likelihoods, and samples.",
)

MODEL, TRAINING = "The flow", "Training"

Dataset = Annotated[
    str,
    typer.Option(
        "--dataset",
        "-d",
        metavar="NAME|PATH",
        help="`digits`, `wine`, `breast_cancer`, `diabetes`, `iris` (of scikit-learn); `ring`, `moons`, "
        "`spirals`, `checkerboard` (points of the plane, their density known); or your own `.csv`, `.tsv`, "
        "`.parquet` or `.npy` of numbers, or MNIST's `train-images-idx3-ubyte.gz`.",
    ),
]
LabelColumn = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="Column of classes in your file: not a number of the density."),
]
Run = Annotated[
    Path, typer.Option("--run", metavar="DIR", help="Run folder: what `density train` has as `--out`.")
]


@density_app.command("train")
def train_command(
    dataset: Dataset = "digits",
    label_column: LabelColumn = None,
    seed: Annotated[
        int, typer.Option(help="Fixes the split, the first weights, the order of rows and the noise.")
    ] = 0,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Run folder to write.", show_default="runs/density/DATASET"),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoint in the run folder, if any.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the training in the run folder.")
    ] = False,
    layers: Annotated[
        int | None, typer.Option(help="LU layers, the last one linear.", rich_help_panel=MODEL)
    ] = None,
    components: Annotated[
        int | None,
        typer.Option(help="Gaussians in the base; 1: the standard normal.", rich_help_panel=MODEL),
    ] = None,
    alpha: Annotated[
        float | None, typer.Option(help="Where LeakySoftplus' left slope starts.", rich_help_panel=MODEL)
    ] = None,
    slopes: Annotated[
        str | None,
        typer.Option(
            metavar="coordinate|layer|fixed", help="What a slope is learnt for.", rich_help_panel=MODEL
        ),
    ] = None,
    signs: Annotated[
        str | None,
        typer.Option(
            metavar="positive|negative|random",
            help="Of the diagonals of U: with `negative` ones the activations bend to alternate sides.",
            rich_help_panel=MODEL,
        ),
    ] = None,
    permutation: Annotated[
        str | None,
        typer.Option(
            metavar="none|random|reverse",
            help="The order in which a layer passes its coordinates on.",
            rich_help_panel=MODEL,
        ),
    ] = None,
    conditional: Annotated[
        bool | None,
        typer.Option(
            "--conditional/--unconditional",
            help="Learn a density for each label; that of the data is their mixture.",
            rich_help_panel=MODEL,
        ),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Steps at most; less where validation says.", rich_help_panel=TRAINING)
    ] = None,
    patience: Annotated[
        int | None,
        typer.Option(
            help="Rounds (100 steps each) without a better validation loss that end it.",
            rich_help_panel=TRAINING,
        ),
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Rows a step.", rich_help_panel=TRAINING)] = None,
    learning_rate: Annotated[
        float | None,
        typer.Option(
            "--learning-rate",
            "--lr",
            help="Adam's, falling to 0.",
            show_default="5e-3; beyond 64 features 0.32/D",
            rich_help_panel=TRAINING,
        ),
    ] = None,
    weight_decay: Annotated[
        float | None, typer.Option(help="Of the matrices.", rich_help_panel=TRAINING)
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(
            help="CPU threads; another number may change the last digits.", rich_help_panel=TRAINING
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="`cpu`, `cuda`, `cuda:1`.", rich_help_panel=TRAINING)] = "cpu",
) -> None:
    """Train a flow on a data set, and tell what it is worth on rows that it has not seen.

    70 % of the rows train, 10 % choose when to stop, 20 % are the test. Integers (images) are dequantised and
    their loss is in bits a dimension; the loss of other numbers is in nats a row. All Jacobians are counted.

    Writes `metrics.json`, `config.json`, `model.safetensors` and pictures into the run folder. Ctrl-C and
    SIGTERM save a checkpoint; the same command with `--resume` goes on to the same weights.

    Examples:

        lunet-fast density train --dataset digits

        lunet-fast density train --dataset digits --conditional --out runs/density/by-class

        lunet-fast density train --dataset moons --layers 8

        lunet-fast density train --dataset sensors.parquet --label-column kind
    """
    from lunet_fast.cli import signals
    from lunet_fast.cli.progress import training_progress
    from lunet_fast.density import data, pictures
    from lunet_fast.density.config import DensityConfig
    from lunet_fast.density.training import train_density
    from lunet_fast.training.files import RunFolder
    from lunet_fast.training.loop import DivergenceError

    given: dict[str, Any] = {
        "layers": layers,
        "components": components,
        "alpha": alpha,
        "slopes": slopes,
        "signs": signs,
        "conditional": conditional,
        "steps": steps,
        "patience": patience,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "weight_decay": weight_decay,
        "threads": threads,
    }
    given = {name: value for name, value in given.items() if value is not None}
    if permutation is not None:
        given["permutation"] = None if permutation == "none" else permutation
    name = dataset if dataset in data.NAMES else Path(dataset).name.split(".")[0]
    folder = RunFolder(out or Path("runs") / "density" / (name or "data"))
    console = Console()
    with signals.heard() as stop:
        try:
            config = DensityConfig(seed=seed, **given)
            rows = data.read(dataset, label_column=label_column, seed=seed)
            with training_progress(console, unit="round", held_out="validation") as progress:
                result = train_density(
                    rows,
                    config,
                    out=folder.path,
                    resume=resume,
                    overwrite=overwrite,
                    device=device,
                    progress=progress,
                    stop=stop,
                )
            parts = data.split(rows, seed)
            model = result.model
            if rows.target is not None:
                pictures.save_heat_maps(folder.path / "density.png", model, rows.target)
            if rows.image is not None and rows.levels is not None:
                sheet = pictures.SIDE**2
                pictures.save_samples(
                    folder.path / "samples.png",
                    _drawn(model, sheet, seed),
                    parts.test.values,
                    rows.image,
                    rows.levels,
                )
                pictures.save_interpolation(folder.path / "interpolation.png", model, parts.test)
        except DivergenceError as error:
            fail(error, 1)
        except (OSError, ValueError, ImportError) as error:
            fail(error, 2)
        except KeyboardInterrupt as error:
            saved = f"{error}. " if str(error) else ""
            typer.echo(
                f"\nInterrupted. {saved}The same command with --resume goes on from {folder.checkpoints}.",
                err=True,
            )
            raise typer.Exit(stop.exit_code) from None
    _show(console, result.metrics)
    typer.echo(f"written to {folder.path}")


@density_app.command("evaluate")
def evaluate_command(
    run: Run = Path("runs/density/digits"),
    dataset: Annotated[
        str | None,
        typer.Option(
            "--dataset",
            "-d",
            metavar="NAME|PATH",
            help="The data that the run was trained on.",
            show_default="what the run's config.json names",
        ),
    ] = None,
    label_column: LabelColumn = None,
    against: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|PATH",
            help="Other data of as many features: how well log p tells it from the test rows (AUROC).",
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="FILE", help="Write the figures as JSON.")
    ] = None,
) -> None:
    """Evaluate a trained flow again, from its files.

    Divides the data as the training did and measures the saved flow: loss of each part, distance of samples
    from data, and on points of the plane the divergence from the truth.

    Examples:

        lunet-fast density evaluate --run runs/density/digits

        lunet-fast density evaluate --run runs/density/mine --dataset mine.csv --against others.csv
    """
    from lunet_fast.density import data
    from lunet_fast.density.evaluation import auroc, evaluate
    from lunet_fast.training.files import write_json

    with errors_told():
        prepare_out(out)
        trained = _load(run)
        name = dataset or trained.dataset
        if dataset is None and name not in data.NAMES:
            raise ValueError(f"--run {run}: was trained on a file called {name}: name it with --dataset PATH")
        rows = data.read(name, label_column=label_column, seed=trained.config.seed)
        _check_fits(run, trained, rows)
        if rows.source != trained.source:
            raise ValueError(
                f"--dataset {name}: is {rows.source}, and the run was trained on {trained.source}"
            )
        parts = data.split(rows, trained.config.seed)
        values = evaluate(trained.model, parts)
        if against is not None:
            others = data.read(against, label_column=label_column)
            _check_fits(run, trained, others)
            inside = trained.model.log_prob(parts.test.values, 10)
            values["auroc"] = auroc(inside, trained.model.log_prob(others.values, 10))
        metrics = {"dataset": rows.name, "unit": trained.model.preprocessing.unit, **values}
        if out is not None:
            write_json(out, metrics)
    _show(Console(), metrics)


@density_app.command("sample")
def sample_command(
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
) -> None:
    """Draw rows from a trained flow; the CSV has the log-likelihood of each.

    Examples:

        lunet-fast density sample --run runs/density/moons -n 1000 --out points.csv

        lunet-fast density sample --run runs/density/digits --out digits.png
    """
    import numpy as np
    import torch

    from lunet_fast.cli.output import write_csv, write_out
    from lunet_fast.density import pictures
    from lunet_fast.training.files import write_atomically

    with errors_told():
        prepare_out(out)
        kind = ".csv" if out is None else out.suffix
        if kind not in (".csv", ".npy", ".png"):
            raise ValueError(f"--out {out}: must end in .csv, .npy or .png")
        trained = _load(run)
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
        if kind == ".png":
            assert out is not None
            assert trained.image is not None
            assert model.preprocessing.levels is not None
            pictures.save_sheet(out, rows, trained.image, model.preprocessing.levels)
        elif kind == ".npy":
            assert out is not None

            def save(temporary: Path) -> None:
                with temporary.open("wb") as file:
                    np.save(file, rows.numpy())

            write_atomically(out, save)
        else:
            header = [f"x{i}" for i in range(model.features)] + ["log_prob"]
            table = torch.cat([rows, model.log_prob(rows, 10).unsqueeze(-1).to(rows)], -1)
            write_out(out, lambda stream: write_csv(stream, header, table.tolist()))
    if out is not None:
        typer.echo(f"written to {out}")


def _drawn(model: Any, n: int, seed: int, label: int | None = None) -> Any:
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return model.sample(n, None if label is None else torch.full((n,), label))


def _load(run: Path) -> TrainedFlow:
    from lunet_fast.density.files import load_flow
    from lunet_fast.training.files import RunFolder

    folder = RunFolder(run)
    if not folder.model.is_file():
        raise FileNotFoundError(
            f"--run {run}: there is no trained flow: train one with  lunet-fast density train --out {run}"
        )
    return load_flow(folder.model)


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


def _show(console: Console, values: dict[str, Any]) -> None:
    table = Table(title=f"Density of {values['dataset']}, losses in {values['unit']}")
    table.add_column("figure")
    table.add_column("value", justify="right")
    for name, told in _TOLD.items():
        if name in values:
            value = values[name]
            error = values.get(f"{name}_error")
            text = f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
            table.add_row(told, text + (f" ± {error:.4f}" if error is not None else ""))
    console.print(table)

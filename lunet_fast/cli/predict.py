"""``lunet-fast predict``: the ratings that a trained model predicts for given pairs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lunet_fast.cli import options
from lunet_fast.cli.output import (
    WRITERS,
    FigureOutput,
    errors_told,
    given_text,
    prepare_out,
    shortest,
    write_out,
)
from lunet_fast.cli.signatures import grouped

if TYPE_CHECKING:
    from lunet_fast.recsys.data.ids import IdMap
    from lunet_fast.recsys.data.table import Table
    from lunet_fast.recsys.serving.recommend import LUNetRecommender


@grouped
def predict_command(
    *,
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
    out: options.TableOut = None,
    user_column: options.UserColumn = None,
    item_column: options.ItemColumn = None,
    sep: options.Separator = None,
    header: options.Header = None,
    device: options.Device = "cpu",
    output: FigureOutput,
) -> None:
    """Predict ratings: for a file of pairs, or for one user and one item.

    For a file, CSV with the columns `user`, `item` and `prediction`, in the order of the file and with its
    ids; with `--json` a list of such objects. One pair prints one number. A pair whose user or item training
    has not seen is predicted by the mean rating and what is known of the other side, and a note says so.

    The file may be what `recommend` or `predict` wrote. In their CSV, ids that a spreadsheet would run as a
    formula have an apostrophe before them, which is taken off again unless training knows the id with it.

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
        if pairs is None:
            users, items = [given_text("--user", str(user))], [given_text("--item", str(item))]
        else:
            known = options.recorded(run).get("reading") or {}
            first = [user_column or known.get("user"), item_column or known.get("item")]
            # As in the file that the run was trained on, or else with a usual header.
            table = _read_pairs(pairs, first, [user_column, item_column], sep, header is not False)
            for note in table.notes:
                output.note(note)
        recommender = options.load_run(run, device, final=True)
        recommender.trained.model.to(device)
        if pairs is not None:
            users = _ids(table, "user", recommender.users)
            items = _ids(table, "item", recommender.items)
        predictions = recommender.predict(users, items)
        _note_unseen(output, recommender, users, items)
        if one:
            typer.echo(shortest(predictions[0]))
            return

        def rows() -> Iterator[tuple[Any, ...]]:
            for a, b, prediction in zip(users, items, predictions, strict=True):
                yield a, b, shortest(prediction)

        write = WRITERS["json" if output.as_json else "csv"]
        write_out(out, lambda stream: write(stream, ("user", "item", "prediction"), rows()))
    if out is not None:
        output.note(f"{len(users):,} predictions written to {out}")


def _note_unseen(
    output: FigureOutput, recommender: LUNetRecommender, users: list[str], items: list[str]
) -> None:
    counts = recommender.trained.model.interactions
    unseen = ~(
        _rated(recommender.users.index(users), counts.user_counts)
        & _rated(recommender.items.index(items), counts.item_counts)
    )
    if unseen.any():
        output.note(
            f"Note: {int(unseen.sum())} of {len(unseen)} pairs have a user or an item without a rating "
            "in the training data: predicted by the mean and what is known of the other side"
        )


def _rated(index: Any, counts: Any) -> Any:
    """bool ``[N]``: whether the index is known and has training ratings."""
    return (index >= 0) & (counts.cpu().numpy()[index.clip(min=0)] > 0)


def _read_pairs(
    path: Path, first: Sequence[str | None], then: Sequence[str | None], sep: str | None, header: bool = True
) -> Table:
    """The rows of the file, no id of which is empty; ``first`` names the columns, or else ``then``.

    Formats, rules and errors are those of ``read_ratings``, which itself wants a rating and each pair once.
    """
    from lunet_fast.recsys.data.ratings import RatingFileError, read_table

    if not path.is_file():
        raise FileNotFoundError(f"--pairs {path}: no such file")
    chosen = [
        {role: name or role for role, name in zip(("user", "item"), each, strict=True)}
        for each in (first, then)
    ]
    try:
        table = read_table(path, sep, header=header, **chosen[0])
    except RatingFileError:
        if chosen[0] == chosen[1]:
            raise
        table = read_table(path, sep, header=header, **chosen[1])
    for role in ("user", "item"):
        table.refuse_empty(role)
    return table


def _ids(table: Table, role: str, known: IdMap) -> list[str]:
    """The ids of each row, as texts, without the apostrophes that our CSV files have before some."""
    from lunet_fast.recsys.data.spreadsheet import as_it_was

    column = table.columns[role]
    texts = list(column.texts)
    if table.unit == "line":  # Parquet holds ids as they are
        texts = [as_it_was(text) for text in texts]
        as_written, without = known.index(column.texts) >= 0, known.index(texts) >= 0
        changed = [k for k, text in enumerate(texts) if text != column.texts[k] and as_written[k]]
        both = [k for k in changed if without[k]]
        if both:
            problem = f"{{text}} is a known {role}, and is one without its first apostrophe too"
            table.fail(role, both, f"{problem}: give the pairs as Parquet")
        for k in changed:
            texts[k] = column.texts[k]
    return [texts[code] for code in column.codes.tolist()]

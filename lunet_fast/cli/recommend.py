"""``lunet-fast recommend``: the best items for users of a trained model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer
from rich.table import Table
from rich.text import Text

from lunet_fast.cli import options
from lunet_fast.cli.output import (
    WRITERS,
    Output,
    Terminal,
    errors_told,
    given_text,
    plain,
    prepare_out,
    printable,
    shortest,
    wide_console,
    write_out,
)
from lunet_fast.cli.signatures import grouped

if TYPE_CHECKING:
    import pandas as pd

    from lunet_fast.recsys.serving.recommend import LUNetRecommender

BATCH = 256
"""Users whose recommendations are in memory at once, and after which progress is told."""
_HEADER = ("user", "rank", "item", "score", "title")


Format = Annotated[
    str | None,
    typer.Option(
        "--format",
        metavar="|".join(("table", *WRITERS)),
        help="`json` is a list, `jsonl` an object a line.",
        show_default="table, or by the extension of --out",
    ),
]


At = Annotated[
    int | None,
    typer.Option(
        metavar="SECONDS",
        help="When they are asked for, in Unix seconds, for recipe sequence with `--elapsed`.",
        show_default="soon after each user's last choice",
    ),
]


@dataclass(frozen=True)
class Wanted:
    """Which items may be recommended, and when."""

    exclude_seen: Annotated[
        bool,
        typer.Option(
            "--exclude-seen/--include-seen",
            help="Leave out what the user rated anywhere in the file that was trained on.",
        ),
    ] = True
    at: At = None
    items_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Choose from these items alone: ids, one a line.")
    ] = None
    exclude_items_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Items that nobody gets: ids, one a line.")
    ] = None

    def arguments(self) -> dict[str, Any]:
        """As ``LUNetRecommender.recommend`` takes them."""
        found: dict[str, Any] = {"exclude_seen": self.exclude_seen, "at": self.at}
        if self.items_file is not None:
            found["items"] = _read_ids("--items-file", self.items_file)
        if self.exclude_items_file is not None:
            found["exclude"] = _read_ids("--exclude-items-file", self.exclude_items_file)
        return found


@grouped
def recommend_command(
    *,
    run: options.Run = options.DEFAULT_RUN,
    user: Annotated[
        list[str] | None,
        typer.Option(
            "--user", "-u", metavar="ID", help="A user's id as in your file; give it again for more."
        ),
    ] = None,
    users_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Users' ids, one a line, UTF-8.")
    ] = None,
    all_users: Annotated[bool, typer.Option("--all-users", help="Every user of the training data.")] = False,
    k: Annotated[int, typer.Option("-k", "--k", help="Items for each user, where as many are left.")] = 10,
    wanted: Wanted,
    form: Format = None,
    out: options.TableOut = None,
    device: options.Device = "cpu",
    output: Output,
) -> None:
    """Recommend items to users, best first.

    Columns: `user`, `rank` from 1, `item`, `score` and `title` where the data set has one. The score is the
    predicted rating; of a model trained on interactions too (gamma below 1), the logit of choosing the item;
    of recipe sequence, that of choosing it next.
    A user whom training has not seen gets what is best for all, and a note says so. In CSV, ids and titles
    that a spreadsheet would run as a formula have an apostrophe before them, which `predict --pairs` takes
    off again; JSON has them as they are.

    Examples:

        lunet-fast recommend --user 42 -k 5

        lunet-fast recommend --run runs/mine --user ann --user bob --format json

        lunet-fast recommend --users-file newsletter.txt --exclude-items-file old.txt --out mail.csv

        lunet-fast recommend --all-users -k 100 --device cuda --out everyone.jsonl
    """
    from lunet_fast.cli.progress import counted

    _check_users(user, users_file, all_users, k)
    form = _format(form, out)
    if all_users and form == "table":
        raise typer.BadParameter(
            f"--all-users makes no table: give --format {', '.join(WRITERS)}, or an --out with that extension"
        )
    with errors_told():
        ids: list[Any] = [] if user is None else [given_text("--user", text) for text in user]
        if users_file is not None:
            ids += _read_ids("--users-file", users_file)
        limits = wanted.arguments()
        prepare_out(out)
        recommender = options.load_run(run, device, final=True)
        ids = recommender.users.ids.tolist() if all_users else list(dict.fromkeys(ids))
        _note_unseen(output, recommender, ids)
        _note_model(output, run, recommender, wanted.exclude_seen)
        titles = recommender.item_info is not None
        # Bars over rows in a terminal would be unreadable.
        short = len(ids) <= BATCH or out is None
        with counted(len(ids), "users", quiet=output.quiet or short) as told:

            def rows() -> Iterator[tuple[Any, ...]]:
                for start in range(0, len(ids), BATCH):
                    batch = ids[start : start + BATCH]
                    frame = recommender.recommend(batch, k, **limits)
                    yield from _rows(recommender, frame)
                    told(len(batch))

            def write(stream: TextIO) -> None:
                if form == "table":
                    _write_table(None if out is None else stream, list(rows()), titles)
                else:
                    WRITERS[form](stream, _HEADER, rows())

            write_out(out, write)
    if out is not None:
        output.note(f"written to {out}")


def _check_users(user: list[str] | None, users_file: Path | None, all_users: bool, k: int) -> None:
    """``typer.BadParameter`` unless the options name users, and at least one item for each."""
    if all_users and (user or users_file is not None):
        raise typer.BadParameter("--all-users does not go with --user and --users-file, which it includes")
    if not all_users and not user and users_file is None:
        raise typer.BadParameter("no users: give --user ID, --users-file FILE or --all-users")
    if k < 1:
        raise typer.BadParameter(f"-k {k}: give a whole number of at least 1")


def _format(given: str | None, out: Path | None) -> str:
    if given is not None:
        if given != "table" and given not in WRITERS:
            raise typer.BadParameter(f"--format {given}: choose table, {', '.join(WRITERS)}")
        return given
    if out is None:
        return "table"
    extension = out.suffix.lower().removeprefix(".")
    if extension not in WRITERS:
        known = ", ".join(f".{name}" for name in WRITERS)
        raise typer.BadParameter(f"--out {out}: name it {known}, or say which with --format")
    return extension


def _read_ids(option: str, path: Path) -> list[str]:
    """Ids, one a line; blank lines are skipped."""
    from lunet_fast.recsys.data.limits import read_bytes

    if not path.is_file():
        raise FileNotFoundError(f"{option} {path}: no such file")
    try:
        text = read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{option} {path}: the text is not UTF-8 ({error}): save it as UTF-8") from error
    # Not str.splitlines, which ends lines within ids too: at U+2028, U+0085, a form feed.
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    ids = [line.strip() for line in lines if line.strip()]
    if not ids:
        raise ValueError(f"{option} {path}: holds no id: write one a line")
    return ids


def _note_unseen(output: Output, recommender: LUNetRecommender, ids: Sequence[Any]) -> None:
    """A note on stderr where users have no training rating to go by."""
    index = recommender.users.index(list(ids))
    rated = recommender.user_counts()[index.clip(min=0)]
    unseen = [printable(ids[n]) for n in ((index < 0) | (rated == 0)).nonzero()[0]]
    if unseen:
        names = ", ".join(unseen[:5]) + (", ..." if len(unseen) > 5 else "")
        best = "rated best on the whole" if recommender.ranks_by == "rating" else "most chosen"
        output.note(
            f"Note: {len(unseen)} of {len(ids)} users have no rating in the training data ({names}): they "
            f"get the items {best}"
        )


def _note_model(output: Output, run: Path, recommender: LUNetRecommender, exclude_seen: bool) -> None:
    """Notes on stderr where popularity ranked better on the parts that were held out, and where there are no
    pairs to leave out."""
    from lunet_fast.training.files import RunFolder, read_json

    if exclude_seen and recommender.config.split == "stream":
        output.note("Note: a training on a stream keeps no pairs, so what users have rated is not left out")
    metrics = RunFolder(run).metrics
    if recommender.ranks_by == "next" or not metrics.is_file():
        return
    values = read_json(metrics)
    if worse := options.ranks_worse(values):
        ours, popularity = values["full_ndcg@10"], values["popularity_full_ndcg@10"]
        output.note(f"Note: NDCG@10 {ours:.4f}, popularity {popularity:.4f}. {worse}")


def _rows(recommender: LUNetRecommender, frame: pd.DataFrame) -> Iterator[tuple[Any, ...]]:
    import numpy as np

    info = recommender.item_info
    titles: list[Any] = [None] * len(frame)
    if info is not None and "title" in info:
        index = recommender.items.index(frame["item"])
        # -1, of an item that training has not seen, finds the last title, None.
        every = np.array([*info["title"].tolist(), None], dtype=object)
        titles = every[index].tolist()
    for user, rank, item, score, title in zip(
        frame["user"].tolist(),
        frame["rank"].tolist(),
        frame["item"].tolist(),
        frame["score"].to_numpy(),
        titles,
        strict=True,
    ):
        yield plain(user), rank, plain(item), shortest(score), title or None


def _write_table(stream: TextIO | None, rows: list[tuple[Any, ...]], titles: bool) -> None:
    """To ``stream``, or to the terminal without one."""
    console = wide_console() if stream is None else Terminal(file=stream, width=120)
    if not rows:
        console.print("No item is left to recommend: --include-seen allows those rated already.")
        return
    table = Table()
    for heading in _HEADER if titles else _HEADER[:-1]:
        table.add_column(heading, justify="right" if heading in ("rank", "score") else "left")
    for n, (user, rank, item, score, title) in enumerate(rows):
        if n and user != rows[n - 1][0]:
            table.add_section()
        cells: list[str | Text] = [Text(printable(user)), str(rank), Text(printable(item)), f"{score:.3f}"]
        if titles:
            cells.append(Text(printable(title or "")))
        table.add_row(*cells)
    console.print(table)

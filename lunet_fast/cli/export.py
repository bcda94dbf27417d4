"""``lunet-fast export``: a trained model's vectors for a search index."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lunet_fast.cli import options
from lunet_fast.cli.output import Output, errors_told
from lunet_fast.cli.signatures import grouped


@grouped
def export_command(
    *,
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="DIR", help="Folder to write; it is made if needed.")
    ],
    run: options.Run = options.DEFAULT_RUN,
    device: options.Device = "cpu",
    output: Output,
) -> None:
    """Write users' and items' vectors as Parquet, for an index of nearest neighbours.

    `users.parquet` and `items.parquet` have the columns `id`, `vector` (a list of K·k float32 of fixed
    size), `training_ratings` and, for items, `title` where it is known. A vector is that side's half of the
    network's input x, members one after the other: its embedding and its normalised history. Those of
    similar items are near each other; their product is **not** the rating, which is read from f(x): take
    candidates from the index and rank them by `lunet-fast predict`. Needs pyarrow.

    Examples:

        lunet-fast export --out vectors

        lunet-fast export --run runs/mine --out vectors/mine
    """
    with errors_told():
        from lunet_fast.recsys.data.parquet_table import require_pyarrow
        from lunet_fast.recsys.serving.export import export_vectors

        require_pyarrow("writing Parquet")
        if out.exists() and not out.is_dir():
            raise ValueError(f"--out {out}: is a file: name a folder")
        recommender = options.load_run(run, device, final=True)
        for path, rows, size in export_vectors(recommender, out):
            output.line(f"{path}: {rows:,} vectors of {size} numbers")

"""Options that several commands have, and the data and models that they name."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from lunet_fast.recsys.data.ratings import Ratings
    from lunet_fast.recsys.serving.recommend import LUNetRecommender

DATA, FILES = "Data", "Columns of your own file"

DataDir = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="Folder with the MovieLens files, zipped or not.",
        show_default="$LUNET_FAST_DATA, else a download",
        rich_help_panel=DATA,
    ),
]
UserColumn = Annotated[
    str,
    typer.Option("--user-column", "--user-col", metavar="NAME", rich_help_panel=FILES, help="Users' ids."),
]
ItemColumn = Annotated[
    str,
    typer.Option("--item-column", "--item-col", metavar="NAME", rich_help_panel=FILES, help="Items' ids."),
]
RatingColumn = Annotated[
    str,
    typer.Option("--rating-column", "--rating-col", metavar="NAME", rich_help_panel=FILES, help="Numbers."),
]
TimestampColumn = Annotated[
    str,
    typer.Option(
        "--timestamp-column",
        "--timestamp-col",
        metavar="NAME",
        rich_help_panel=FILES,
        help="Unix seconds or ISO dates; may be absent.",
    ),
]
Separator = Annotated[
    str | None,
    typer.Option(
        "--sep",
        metavar="TEXT",
        rich_help_panel=FILES,
        help="What stands between two columns.",
        show_default="by the file's extension",
    ),
]
Scale = Annotated[
    tuple[float, float] | None,
    typer.Option(
        metavar="LOW HIGH",
        rich_help_panel=FILES,
        help="Lowest and highest rating possible; others are refused, predictions clipped.",
        show_default="those of the file",
    ),
]
Run = Annotated[
    Path, typer.Option("--run", metavar="DIR", help="Run folder: what `lunet-fast train` has as `--out`.")
]
DEFAULT_RUN = Path("runs/ml-100k")


def columns(
    user: str, item: str, rating: str, timestamp: str, sep: str | None, scale: tuple[float, float] | None
) -> dict[str, Any]:
    """The options on one's own file as the arguments of ``read_ratings``."""
    return {"user": user, "item": item, "rating": rating, "timestamp": timestamp, "sep": sep, "scale": scale}


def read_dataset(argument: str, dataset: str, data_dir: Path | None, columns: dict[str, Any]) -> Ratings:
    """The bundled data set of that name, fetched if need be, or the file of that path.

    ``columns`` are the arguments of ``read_ratings`` for a file; ``argument`` is what messages call
    ``dataset``.
    """
    from lunet_fast.recsys.data import movielens
    from lunet_fast.recsys.data.ratings import read_ratings

    if dataset in movielens.DATASETS:
        return movielens.load(dataset, data_dir)
    if not Path(dataset).is_file():
        known = ", ".join(movielens.DATASETS)
        raise FileNotFoundError(
            f"{argument} {dataset}: neither a known data set ({known}) nor an existing file"
        )
    return read_ratings(dataset, **columns)


def load_run(run: Path, device: str = "cpu") -> LUNetRecommender:
    """The recommender of a run folder, to compute on ``device``.

    ``FileNotFoundError`` where the folder holds no trained model, ``ValueError`` for a device that is not
    there, and the errors of ``LUNetRecommender.load``.
    """
    import torch

    from lunet_fast.recsys.serving.recommend import LUNetRecommender
    from lunet_fast.training.files import RunFolder

    try:
        place = torch.device(device)
    except RuntimeError:
        raise ValueError(f"--device {device}: no such device; use cpu, cuda or cuda:1") from None
    if place.type == "cuda" and (place.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device {device}: PyTorch sees {torch.cuda.device_count()} CUDA devices; use cpu")
    folder = RunFolder(run)
    if not folder.model.is_file():
        if folder.is_started():
            raise FileNotFoundError(
                f"--run {run}: the training there is not finished: go on with its command and --resume"
            )
        others = sorted(str(model.parent) for model in Path("runs").glob("*/model.safetensors"))
        also = f"; trained already: {', '.join(others)}" if others else ""
        raise FileNotFoundError(
            f"--run {run}: there is no trained model: train one with  lunet-fast train --out {run}  or name "
            f"another run folder{also}"
        )
    recommender = LUNetRecommender.load(run)
    recommender.device = place
    return recommender

"""Options that several commands have, and the data and models that they name."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from lunet_fast.recsys.data.ratings import Ratings
    from lunet_fast.recsys.serving.recommend import LUNetRecommender
    from lunet_fast.training.files import RunFolder

DATA, FILES = "Data", "Columns of your own file"

data_option = partial(typer.Option, rich_help_panel=DATA)
file_option = partial(typer.Option, rich_help_panel=FILES)
dataset_option = partial(data_option, "--dataset", "-d", metavar="NAME|PATH")

Dataset = Annotated[
    str,
    dataset_option(
        help="`ml-100k` or `ml-1m`, fetched if need be; or your own CSV, TSV or Parquet file of ratings.",
    ),
]
TrainedOn = Annotated[
    str | None,
    dataset_option(
        help="The data that the run was trained on, where they are no longer where they were.",
        show_default="what the run's config.json names",
    ),
]
DataDir = Annotated[
    Path | None,
    data_option(
        metavar="DIR",
        help="Folder with the MovieLens files, zipped or not.",
        show_default="$LUNET_FAST_DATA, else a download",
    ),
]
UserColumn = Annotated[
    str,
    file_option("--user-column", "--user-col", metavar="NAME", help="Users' ids."),
]
ItemColumn = Annotated[
    str,
    file_option("--item-column", "--item-col", metavar="NAME", help="Items' ids."),
]
Separator = Annotated[
    str | None,
    file_option(
        "--sep",
        metavar="TEXT",
        help="What stands between two columns.",
        show_default="by the file's extension",
    ),
]
Run = Annotated[
    Path, typer.Option("--run", metavar="DIR", help="Run folder: what `lunet-fast train` has as `--out`.")
]
DEFAULT_RUN = Path("runs/ml-100k")
Device = Annotated[str, typer.Option(help="`cpu`, `cuda`, `cuda:1`.")]
JsonOut = Annotated[
    Path | None, typer.Option("--out", "-o", metavar="FILE", help="Write the figures as JSON.")
]
TableOut = Annotated[
    Path | None,
    typer.Option("--out", "-o", metavar="FILE", help="Write there; the file appears when it is whole."),
]


@dataclass(frozen=True)
class Source:
    """Where MovieLens lies, and what a file of one's own looks like."""

    data_dir: DataDir = None
    user_column: UserColumn = "user"
    item_column: ItemColumn = "item"
    rating_column: Annotated[
        str,
        file_option("--rating-column", "--rating-col", metavar="NAME", help="Numbers."),
    ] = "rating"
    timestamp_column: Annotated[
        str,
        file_option(
            "--timestamp-column",
            "--timestamp-col",
            metavar="NAME",
            help="Unix seconds or ISO dates; may be absent.",
        ),
    ] = "timestamp"
    weight_column: Annotated[
        str | None,
        file_option(
            "--weight-column",
            metavar="NAME",
            help="How often a choice was made, a number above 0; for recipe sequence, see `--confidence`.",
        ),
    ] = None
    sep: Separator = None
    scale: Annotated[
        tuple[float, float] | None,
        file_option(
            metavar="LOW HIGH",
            help="Lowest and highest rating possible; others are refused, predictions clipped.",
            show_default="those of the file",
        ),
    ] = None

    def columns(self, *, rated: bool = True) -> dict[str, Any]:
        """The arguments of ``read_ratings`` for a file; not ``rated``, it needs no column of ratings."""
        return {
            "user": self.user_column,
            "item": self.item_column,
            "rating": self.rating_column if rated else None,
            "timestamp": self.timestamp_column,
            "weight": self.weight_column,
            "sep": self.sep,
            "scale": self.scale,
        }

    def read(self, dataset: str, *, rated: bool = True, argument: str = "--dataset") -> Ratings:
        """The bundled data set of that name, fetched if need be, or the file of that path.

        ``argument`` is what messages call ``dataset``.
        """
        from lunet_fast.recsys.data import movielens
        from lunet_fast.recsys.data.ratings import read_ratings

        if dataset in movielens.DATASETS:
            return movielens.load(dataset, self.data_dir)
        if not Path(dataset).is_file():
            known = ", ".join(movielens.DATASETS)
            raise FileNotFoundError(
                f"{argument} {dataset}: neither a known data set ({known}) nor an existing file"
            )
        return read_ratings(dataset, **self.columns(rated=rated))

    def read_with_or_without_ratings(self, dataset: str) -> tuple[Ratings, bool]:
        """As :meth:`read`, and whether there are ratings: a file without the usual column has none."""
        from lunet_fast.recsys.data.ratings import RatingFileError

        try:
            return self.read(dataset), True
        except RatingFileError as error:
            usual = self.rating_column == "rating" and "no column 'rating' for the rating" in str(error)
            if not usual:
                raise
        return self.read(dataset, rated=False), False


@dataclass(frozen=True)
class Continuation:
    """What becomes of a run folder that holds a training already, and how often there is a checkpoint."""

    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on from the last checkpoint in the run folder, if there is one."),
    ] = False
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the training in the run folder.")
    ] = False
    checkpoint_minutes: Annotated[
        float,
        typer.Option(
            min=0, help="Time between checkpoints within an epoch; there is one at each epoch's end too."
        ),
    ] = 2.0

    def arguments(self, folder: RunFolder) -> dict[str, Any]:
        """As the library's trainings take them."""
        return {
            "out": folder.path,
            "resume": self.resume,
            "overwrite": self.overwrite,
            "checkpoint_seconds": 60 * self.checkpoint_minutes,
        }


def existing_device(device: str) -> Any:
    """``--device`` as PyTorch's; ``ValueError`` where it is none, or a GPU that is not there."""
    import torch

    try:
        place = torch.device(device)
    except RuntimeError:
        raise ValueError(f"--device {device}: no such device; use cpu, cuda or cuda:1") from None
    if place.type == "cuda" and (place.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device {device}: PyTorch sees {torch.cuda.device_count()} CUDA devices; use cpu")
    return place


def load_run(run: Path, device: str = "cpu") -> LUNetRecommender:
    """The recommender of a run folder, to compute on ``device``.

    ``FileNotFoundError`` where the folder holds no trained model, ``ValueError`` for a device that is not
    there, and the errors of ``LUNetRecommender.load``.
    """
    from lunet_fast.recsys.serving.recommend import LUNetRecommender
    from lunet_fast.training.files import RunFolder

    place = existing_device(device)
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


def run_name(dataset: str, known: Any) -> str:
    """What a run on this data is called: the name of a known data set, or the file's up to its first dot."""
    return dataset if dataset in known else Path(dataset).name.split(".")[0]

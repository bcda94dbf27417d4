"""Options that several commands have, and the data and models that they name."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from lunet_fast.recsys.data.ratings import Ratings
    from lunet_fast.recsys.serving.recommend import LUNetRecommender
    from lunet_fast.training.files import RunFolder

Told = Callable[[str], None]
"""Is told what people may want to know."""

FINAL = "final"
"""Within a run folder, the run on all ratings."""


def ranks_worse(figures: Mapping[str, Any]) -> str:
    """What to say of a model with these ``metrics.json``, if popularity ranks better; "" otherwise."""
    if figures.get("full_ndcg@10", 1) >= figures.get("popularity_full_ndcg@10", 0):
        return ""
    if figures.get("gamma", 1) == 1:
        return (
            "As a ranking it is worse than popularity, for it was trained on ratings alone: for "
            "recommendations train with --gamma 0.1, or 0"
        )
    return "As a ranking it is worse than popularity: try more --epochs, or --recipe sequence"


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
USUAL = "a usual name, such as {}"
UserColumn = Annotated[
    str | None,
    file_option(
        "--user-column",
        "--user-col",
        metavar="NAME",
        help="Users' ids.",
        show_default=USUAL.format("user or userId"),
    ),
]
ItemColumn = Annotated[
    str | None,
    file_option(
        "--item-column",
        "--item-col",
        metavar="NAME",
        help="Items' ids.",
        show_default=USUAL.format("item or movieId"),
    ),
]
Separator = Annotated[
    str | None,
    file_option(
        "--sep",
        metavar="TEXT",
        help="What stands between two columns: the text, or comma, tab, semicolon, pipe, colons, space.",
        show_default="by the file's extension, or found",
    ),
]
Header = Annotated[
    bool | None,
    file_option(
        "--header/--no-header",
        help="Whether the first line names the columns. Without it they are users, items, ratings and "
        "times, or those whose numbers, from 1, `--user-column` and the others name.",
        show_default="header",
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
    user_column: UserColumn = None
    item_column: ItemColumn = None
    rating_column: Annotated[
        str | None,
        file_option(
            "--rating-column",
            "--rating-col",
            metavar="NAME",
            help="Numbers.",
            show_default=USUAL.format("rating or stars"),
        ),
    ] = None
    timestamp_column: Annotated[
        str | None,
        file_option(
            "--timestamp-column",
            "--timestamp-col",
            metavar="NAME",
            help="Unix seconds or ISO dates; may be absent; `none` leaves it out.",
            show_default=USUAL.format("timestamp"),
        ),
    ] = None
    weight_column: Annotated[
        str | None,
        file_option(
            "--weight-column",
            metavar="NAME",
            help="How often a choice was made, a number above 0; with gamma below 1, see `--confidence`.",
        ),
    ] = None
    sep: Separator = None
    header: Header = None
    duplicates: Annotated[
        str | None,
        file_option(
            metavar="error|latest|mean|max",
            help="What becomes of several ratings of a pair.",
            show_default="error",
        ),
    ] = None
    scale: Annotated[
        tuple[float, float] | None,
        file_option(
            metavar="LOW HIGH",
            help="Lowest and highest rating possible; others are refused, predictions clipped.",
            show_default="those of the file",
        ),
    ] = None

    def of_run(self, recorded: dict[str, Any] | None) -> Source:
        """The same, with what a run's ``config.json`` says of its file where no option is given."""
        if not recorded:
            return self
        fields = {role: f"{role}_column" for role in ("user", "item", "rating", "timestamp", "weight")}
        known: dict[str, Any] = {fields.get(name, name): value for name, value in recorded.items()}
        names = {field.name for field in dataclasses.fields(self)} & known.keys()
        left = {name: known[name] for name in names if getattr(self, name) is None}
        return dataclasses.replace(self, **left)

    def columns(self, *, rated: bool = True) -> dict[str, Any]:
        """The arguments of ``read_ratings`` for a file; not ``rated``, it needs no column of ratings."""
        return {
            **self.names(rated=rated),
            "weight": self.weight_column,
            "sep": self.sep,
            "header": self.header is not False,
            "duplicates": self.duplicates or "error",
            "scale": self.scale,
        }

    def names(self, *, rated: bool = True) -> dict[str, str | None]:
        """The columns by role."""
        return {
            "user": self.user_column or "user",
            "item": self.item_column or "item",
            "rating": (self.rating_column or "rating") if rated else None,
            "timestamp": None if self.timestamp_column == "none" else self.timestamp_column or "timestamp",
        }

    def read(
        self, dataset: str, *, rated: bool = True, argument: str = "--dataset", told: Told | None = None
    ) -> Ratings:
        """The bundled data set of that name, fetched if need be, or the file of that path.

        ``argument`` is what messages call ``dataset``; ``told`` gets a line for all that was recognised.
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
        ratings = read_ratings(dataset, **self.columns(rated=rated))
        if told is not None:
            for note in ratings.notes:
                told(note)
        return ratings

    def read_with_or_without_ratings(self, dataset: str, told: Told | None = None) -> tuple[Ratings, bool]:
        """As :meth:`read`, and whether there are ratings: a file without the usual column has none."""
        from lunet_fast.recsys.data.ratings import RatingFileError

        try:
            return self.read(dataset, told=told), True
        except RatingFileError as error:
            usual = self.rating_column is None and "no column 'rating' for the rating" in str(error)
            if not usual:
                raise
        return self.read(dataset, rated=False, told=told), False


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
            min=0,
            help="Time between checkpoints within an epoch, or a sampling; there is one at each epoch's end "
            "too.",
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


def load_run(run: Path, device: str = "cpu", *, final: bool = False) -> LUNetRecommender:
    """The recommender of a run folder, to compute on ``device``; ``final``, of all ratings if there is one.

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
    whole = RunFolder(run / FINAL)
    recommender = LUNetRecommender.load(whole.path if final and whole.is_finished() else run)
    recommender.device = place
    return recommender


def recorded(run: Path) -> dict[str, Any]:
    """What the ``config.json`` of a run folder says of its training; {} without one."""
    from lunet_fast.training.files import RunFolder, read_json

    file = RunFolder(run).config
    return read_json(file) if file.is_file() else {}


def run_name(dataset: str, known: Any) -> str:
    """What a run on this data is called: the name of a known data set, or the file's up to its first dot."""
    return dataset if dataset in known else Path(dataset).name.split(".")[0]

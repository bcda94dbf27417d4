"""``lunet-fast train``."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer
from rich.console import Console
from rich.table import Table

from lunet_fast.cli.options import (
    FINAL,
    Continuation,
    Dataset,
    Device,
    Source,
    Told,
    data_option,
    ranks_worse,
    run_name,
)
from lunet_fast.cli.output import FigureOutput, Terminal, fail
from lunet_fast.cli.signatures import grouped, settings_command
from lunet_fast.cli.words import in_options

if TYPE_CHECKING:
    from lunet_fast.cli.signals import Signals
    from lunet_fast.recsys.data.ratings import Ratings
    from lunet_fast.recsys.data.streaming import RatingStream
    from lunet_fast.recsys.model.config import TrainConfig
    from lunet_fast.recsys.model.sequence_config import SequenceConfig
    from lunet_fast.training.distributed import Workers
    from lunet_fast.training.files import RunFolder

MODEL, OBJECTIVE = "Model and training", "What is learnt: ratings, interactions or both"
ORDER = "Recipe sequence: the next item, from those before"

TrainCommand = settings_command(
    "lunet_fast.recsys.model.config:TrainConfig",
    {
        MODEL: (
            *("epochs", "patience", "batch_size", "learning_rate", "net_learning_rate"),
            *("embedding_size", "layers", "network", "alpha", "members", "side_features", "dropout"),
            *("inference", "noise", "mlp", "seed", "threads"),
        ),
        OBJECTIVE: (
            *("gamma", "loss", "transform", "negatives", "negative_sampling", "negatives_outside"),
            *("positive_from", "below", "confidence"),
        ),
        ORDER: ("order", "user_history", "elapsed", "identity", "length", "decays"),
    },
    dict.fromkeys(
        (
            *("epochs", "batch_size", "learning_rate", "net_learning_rate", "embedding_size", "layers"),
            *("members", "side_features", "dropout", "negatives", "transform", "mlp"),
        ),
        "the recipe's",
    ),
    "lunet_fast.recsys.model.sequence_config:SequenceConfig",
)


@dataclass(frozen=True)
class Parts:
    """What is trained on, and what is held out."""

    split: Annotated[
        str | None,
        data_option(
            metavar="random|per-user|leave-one-out|joint|time",
            help="What is held out for the test: 20 % of all ratings; 20 % of each user's; each user's "
            "latest rating, for ranking; that and 20 % of the rest; or the latest 20 % of all.",
            show_default="random; joint with --gamma below 1, leave-one-out with 0",
        ),
    ] = None
    train_file: Annotated[
        Path | None,
        data_option(
            metavar="FILE",
            help="Train on this file, laid out as the files of `--dataset`; goes with `--test-file`.",
        ),
    ] = None
    test_file: Annotated[Path | None, data_option(metavar="FILE", help="Test on this file.")] = None
    stream: Annotated[
        bool,
        data_option(
            "--stream",
            help="Read a Parquet file, or a folder of them, batch by batch: memory does not grow with the "
            "number of ratings. Without histories and side features, gamma 1; 20 % are tested, by a rule on "
            "the ids.",
        ),
    ] = False
    shard_tables: Annotated[
        bool,
        data_option(
            "--shard-tables",
            help="With --stream under torchrun: each of N processes holds an N-th of the rows of the tables "
            "of users and items and of their optimiser's state, and fetches those of a batch from the "
            "others.",
        ),
    ] = False

    def check(self, dataset: str, source: Source, recipe: str) -> None:
        """``typer.BadParameter`` for options that do not go together."""
        from lunet_fast.recsys.data import movielens

        if (self.train_file is None) != (self.test_file is None):
            raise typer.BadParameter("--train-file and --test-file go together: give both or none")
        if self.train_file is not None and self.split is not None:
            raise typer.BadParameter(
                "--split does not go with --train-file and --test-file, which are the split"
            )
        if self.shard_tables and not self.stream:
            raise typer.BadParameter(
                "--shard-tables divides the tables of a training on a stream: add --stream, with a Parquet "
                "file"
            )
        if recipe == "auto" and self.stream:
            raise typer.BadParameter("--recipe auto reads all ratings: leave --stream away")
        if recipe == "sequence" and (self.stream or self.train_file is not None):
            raise typer.BadParameter(
                "--recipe sequence holds each user's latest rating out of one data set: leave --stream, "
                "--train-file and --test-file away"
            )
        text = self.train_file is not None or source.sep is not None or source.scale is not None
        if self.stream and (dataset in movielens.DATASETS or text):
            raise typer.BadParameter(
                "--stream reads Parquet files: --dataset PATH, without --train-file, --sep and --scale"
            )


@dataclass(frozen=True)
class Further:
    """What recipe sequence reads beside the ratings."""

    text: Annotated[
        str | None,
        data_option(
            metavar="FILE|titles",
            help="For recipe sequence, what items are described by: a file with a column of items and one of "
            "texts, an .npz file with the arrays `item` and `vectors`, or the data set's own titles.",
        ),
    ] = None
    text_column: Annotated[str, data_option(metavar="NAME", help="The texts in the file of --text.")] = "text"
    social: Annotated[
        Path | None,
        data_option(
            metavar="FILE",
            help="For recipe sequence, who knows or trusts whom: a file of users, each with a `friend`.",
        ),
    ] = None

    def settings(self, given: dict[str, Any], source: Source) -> dict[str, Any]:
        """``given`` with the settings that these files ask for; ``typer.BadParameter`` for another recipe."""
        asked = {"--text": self.text, "--social": self.social}
        named = [option for option, value in asked.items() if value is not None]
        if named and given["recipe"] != "sequence":
            raise typer.BadParameter(f"{named[0]} is for --recipe sequence: add it, or leave {named[0]} away")
        more: dict[str, Any] = {}
        if self.text is not None:
            more["text"] = True
        if self.social is not None:
            more["social"] = True
        if source.weight_column is not None:
            if given["recipe"] != "sequence" and given.get("gamma", 1) == 1:
                raise typer.BadParameter(
                    "--weight-column weighs choices, and ratings alone (gamma 1) are learnt: add --gamma 0, "
                    "or --recipe sequence"
                )
            more["confidence"] = 1.0
        return {**more, **given}

    def added_to(self, ratings: Ratings, source: Source) -> Ratings:
        """``ratings`` with what these files know."""
        from lunet_fast.recsys.data.texts import with_text
        from lunet_fast.recsys.data.ties import with_friends

        if self.text is not None:
            ratings = with_text(ratings, self.text, item=source.item_column or "item", text=self.text_column)
        if self.social is not None:
            ratings = with_friends(ratings, self.social, user=source.user_column or "user")
        return ratings


@dataclass(frozen=True)
class Extent:
    """How much is done."""

    final: Annotated[
        bool,
        typer.Option(
            "--final",
            help="After the test train once more, on all ratings, into `final` in the run folder, which "
            "`recommend`, `predict` and `export` then use.",
        ),
    ] = False
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Say what would be trained, its memory and time, and train nothing."),
    ] = False


SettingsFile = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="JSON of settings, as `tune` writes and `config.json` names them; options given here "
        "go before it.",
        rich_help_panel=MODEL,
    ),
]


@grouped
def train_command(
    *,
    context: typer.Context,
    dataset: Dataset = "ml-100k",
    recipe: Annotated[
        str | None,
        typer.Option(
            "--recipe",
            "-r",
            metavar="paper|best|auto|sequence",
            help="`paper`: the paper's protocol (Adam 1e-3, batch 128, 50 epochs, linear read-out). `best`: "
            "what was best on MovieLens. `auto`: for any unit and size of ratings, by a short search on a "
            "validation part of yours. `sequence`: each user's next item, from the order of those before; it "
            "ranks and predicts no ratings.",
            show_default="auto; best for ml-100k and ml-1m, and with --stream",
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Run folder to write.", show_default="runs/DATASET")
    ] = None,
    continuation: Continuation,
    parts: Parts,
    further: Further,
    source: Source,
    settings: SettingsFile = None,
    extent: Extent,
    device: Device = "cpu",
    output: FigureOutput,
) -> None:
    """Train the recommender; on MovieLens it is set beside the paper's table 2.

    Writes `metrics.json`, `config.json`, `model.safetensors`, `loss.png` and `checkpoints/` into the run
    folder. The ratings held out are evaluated for the figure and the result; no decision reads them. Settings
    that are not given are the recipe's for MovieLens data of the nearest size.

    Ctrl-C and SIGTERM save a checkpoint and end the command; after that or anything worse, the same command
    with `--resume` goes on to the same weights. Under `torchrun` several processes share each batch.

    Examples:

        lunet-fast train --dataset ml-1m --recipe sequence

        lunet-fast train --dataset clicks.csv --gamma 0

        lunet-fast train --dataset plays.csv --recipe sequence --social friends.csv --weight-column plays

        lunet-fast train --dataset ml-100k --train-file u1.base --test-file u1.test

        lunet-fast train --dataset my.csv --user-column who --item-column what --scale 0.5 5 --final

        lunet-fast train --dataset ratings.parquet --stream --members 1

        torchrun --nproc-per-node 2 -m lunet_fast train --dataset ratings.parquet --stream --shard-tables

        torchrun --nproc-per-node 2 --max-restarts 3 -m lunet_fast train --dataset ml-1m --resume
    """
    from lunet_fast.cli.signals import training_told
    from lunet_fast.recsys.data import movielens
    from lunet_fast.training.distributed import workers_of_torchrun
    from lunet_fast.training.files import RunFolder, read_json

    given = context.obj if recipe is None else {**context.obj, "recipe": recipe}
    usual = "best" if parts.stream or dataset in movielens.DATASETS else "auto"
    chosen = further.settings(_settings(given, settings, parts, usual), source)
    parts.check(dataset, source, chosen["recipe"])
    if extent.final and (parts.stream or parts.train_file is not None):
        raise typer.BadParameter("--final trains on one data set: leave --stream and --train-file away")
    training = Training(dataset, parts, further, source, chosen, output.note)
    folder = RunFolder(out or Path("runs") / (run_name(dataset, movielens.DATASETS) or "ratings"))
    with training_told(folder.checkpoints) as stop:
        training.config(1)  # a wrong value is told before any file is read
        if extent.dry_run:
            output.figures(*training.planned())
            return
        with workers_of_torchrun(device) as workers, _process_told(workers, stop):
            _train(training, folder, continuation, output, extent.final, workers, stop)
    if workers.is_first:
        values = read_json(folder.metrics)
        output.figures(values, lambda: _show(Terminal(), values, folder))


def _train(
    training: Training,
    folder: RunFolder,
    continuation: Continuation,
    output: FigureOutput,
    final: bool,
    workers: Workers,
    stop: Signals,
) -> None:
    """Train, or say that nothing is left to do."""
    from lunet_fast.training.files import RunFolder

    left = final and not RunFolder(folder.path / FINAL).is_finished()
    if training.is_finished(folder, workers, continuation) and not left:
        if workers.is_first:
            output.line(f"{folder.path} holds the finished training; nothing to do.")
        return
    console = Terminal(quiet=not (workers.is_first and output.told))
    training.run(console, final, **continuation.arguments(folder), stop=stop, workers=workers)


def _settings(given: dict[str, Any], file: Path | None, parts: Parts, recipe: str) -> dict[str, Any]:
    """Settings by name: those typed before those of ``--settings``, and what a stream asks for; the recipe is
    ``recipe`` where none is given."""
    from lunet_fast.recsys.model.streamed_training import STREAM_SETTINGS
    from lunet_fast.training.files import read_json

    epochs = given.get("epochs")
    if parts.split is not None:
        given = {**given, "split": parts.split}
    if file is not None:
        try:
            given = {**read_json(file), **given}
        except (OSError, ValueError) as error:
            fail(ValueError(f"--settings {file}: {error}"), 2)
    given = {"recipe": recipe, "seed": 0, **given}
    if epochs is not None and given["recipe"] != "sequence":
        given["mlp_epochs"] = epochs
    if not parts.stream:
        return given
    for name, value in STREAM_SETTINGS.items():
        if name != "mlp" and given.get(name, value) != value:
            raise typer.BadParameter(f"--stream needs {name}={value}, got {given[name]!r}")
    return {**given, **STREAM_SETTINGS}


@contextmanager
def _process_told(workers: Workers, stop: Signals) -> Iterator[None]:
    """Of several processes each names itself in an error, and the first alone tells of an interruption."""
    try:
        yield
    except KeyboardInterrupt:
        if workers.is_first:
            raise
        raise typer.Exit(stop.exit_code) from None
    except typer.Exit:
        raise
    except RuntimeError as error:
        if workers.world_size == 1:
            raise
        if stop.asked:  # process 0 has saved, and left first
            raise typer.Exit(stop.exit_code) from None
        fail(RuntimeError(f"process {workers.rank} of {workers.world_size}: {error}"), 1)


class Training(NamedTuple):
    """What a user asks for."""

    dataset: str
    parts: Parts
    further: Further
    source: Source
    settings: dict[str, Any]
    told: Told

    def config(self, n_ratings: int) -> TrainConfig | SequenceConfig:
        """``ValueError`` for a setting that cannot work."""
        from lunet_fast.recsys.model.sequence_config import settings_of

        overrides = dict(self.settings)
        return settings_of(overrides.pop("recipe"), n_ratings, **overrides)

    @property
    def rated(self) -> bool:
        """Whether a file must have ratings: interactions alone have none."""
        return self.settings.get("gamma") != 0 or self.settings.get("positive_from") is not None

    def is_finished(self, folder: RunFolder, workers: Workers, continuation: Continuation) -> bool:
        """Whether the folder holds this training finished; otherwise it is made ready.

        ``ValueError`` where it holds another one.
        """
        from lunet_fast.recsys.data import movielens

        if workers.is_first:
            folder.prepare(resume=continuation.resume, overwrite=continuation.overwrite)
        if not workers.of_first(int(continuation.resume and folder.is_finished())):
            return False
        if workers.is_first:
            data = self.dataset if self.dataset in movielens.DATASETS else Path(self.dataset).name
            named = {} if self.parts.train_file is not None else {"dataset": data}
            found = "epochs" if "patience" in self.settings else None  # of at most so many
            _check_same(folder, {**named, **{k: v for k, v in self.settings.items() if k != found}})
        return True

    def _given(self) -> dict[str, Any]:
        """The settings but for the recipe's name."""
        return {name: value for name, value in self.settings.items() if name != "recipe"}

    def config_for(self, ratings: Ratings, test: Ratings | None, **more: Any) -> TrainConfig | SequenceConfig:
        """The settings for these data, which recipe auto looks for."""
        from lunet_fast.recsys.model.auto import auto_config

        if self.settings["recipe"] != "auto":
            return self.config(len(ratings) + (0 if test is None else len(test)))
        return auto_config(ratings, test, **more, **self._given())

    def planned(self) -> tuple[dict[str, Any], Callable[[], None]]:
        """(figures of what would be trained, what prints them)."""
        from lunet_fast.recsys.model.auto import estimated, plan
        from lunet_fast.recsys.model.config import TrainConfig

        if self.parts.stream or self.settings["recipe"] == "sequence":
            raise typer.BadParameter("--dry-run knows recipes auto, best and paper, without --stream")
        ratings, test = self.read()
        if self.settings["recipe"] == "auto":
            made = plan(ratings, **self._given())
        else:
            config = self.config(len(ratings) + (0 if test is None else len(test)))
            assert isinstance(config, TrainConfig)
            made = estimated(config, ratings)
        values = {
            "ratings": len(ratings),
            "users": ratings.n_users,
            "items": ratings.n_items,
            **{name: getattr(made, name) for name in ("folds", "parameters", "bytes", "seconds")},
            "settings": made.config.to_dict(),
        }
        return values, partial(_show_plan, values, made.notes)

    def run(self, console: Console, final: bool = False, **arguments: Any) -> None:
        """Train with these further arguments of ``train`` or ``train_stream``; ``final``, on all data too."""
        from lunet_fast.cli.progress import training_progress
        from lunet_fast.recsys.model.auto import found_before
        from lunet_fast.recsys.model.config import TrainConfig
        from lunet_fast.recsys.model.sequence_training import train_sequence
        from lunet_fast.recsys.model.streamed_training import train_stream
        from lunet_fast.recsys.model.training import train

        if self.parts.stream:
            rows = self.open_stream()
            console.print(str(rows), highlight=False)
            streamed = self.config(len(rows))
            assert isinstance(streamed, TrainConfig)
            with training_progress(console) as progress:
                sharded = self.parts.shard_tables
                train_stream(rows, streamed, progress=progress, shard_tables=sharded, **arguments)
            return
        ratings, test = self.read()
        workers = arguments["workers"]
        if workers.is_first and not arguments["resume"]:
            shutil.rmtree(arguments["out"] / FINAL, ignore_errors=True)  # of the training that is replaced
        told = self.told if workers.is_first else None
        config: TrainConfig | SequenceConfig | None = None
        if arguments["resume"] and self.settings["recipe"] == "auto":
            found = found_before(arguments["out"], self._given()) if workers.is_first else None
            config = workers.object_of_first(found)
        if config is None:
            config = self.config_for(ratings, test, device=workers.device, told=told)
        with training_progress(console) as progress:
            if isinstance(config, TrainConfig):
                train(ratings, config, test=test, progress=progress, **arguments)
            else:
                train_sequence(ratings, config, progress=progress, **arguments)
        if not final:
            return
        arguments["out"] = arguments["out"] / FINAL
        with training_progress(console) as progress:
            if isinstance(config, TrainConfig):
                whole = config.replace(split="none", mlp=False)
                train(ratings, whole, progress=progress, **arguments)
            else:
                train_sequence(ratings, config.replace(split="none"), progress=progress, **arguments)

    def open_stream(self) -> RatingStream:
        from lunet_fast.recsys.data.streaming import RatingStream

        names = self.source.names(rated=self.rated)
        return RatingStream.open(self.dataset, seed=self.settings["seed"], **names)  # type: ignore[arg-type]

    def read(self) -> tuple[Ratings, Ratings | None]:
        """All ratings, or the training and the test part where two files hold them."""
        from lunet_fast.recsys.data import movielens
        from lunet_fast.recsys.data.ratings import read_ratings
        from lunet_fast.recsys.data.splits import join

        if self.settings["recipe"] == "sequence":
            ratings = self.source.read_with_or_without_ratings(self.dataset, self.told)[0]
            return self.further.added_to(ratings, self.source), None
        files = [file for file in (self.parts.train_file, self.parts.test_file) if file is not None]
        if not files:
            return self.source.read(self.dataset, rated=self.rated, told=self.told), None
        if self.dataset not in movielens.DATASETS:
            columns = self.source.columns(rated=self.rated)
            return join(*(read_ratings(file, **columns) for file in files))
        parts = join(*(movielens.read_like(self.dataset, file) for file in files))
        # The results name the data set; which files they were is kept as the source.
        return replace(parts[0], name=self.dataset), replace(parts[1], name=self.dataset)


def _check_same(folder: RunFolder, asked: dict[str, Any]) -> None:
    """Refuse to take a finished training for another one."""
    from lunet_fast.training.files import read_json

    recorded = read_json(folder.config)
    for name, value in asked.items():
        if recorded.get(name) != value:
            raise ValueError(
                f"{folder.path} was trained with {name}={recorded.get(name)!r}, not {value!r}: choose "
                "another --out, or --overwrite instead of --resume"
            )


def _show_plan(values: dict[str, Any], notes: list[str]) -> None:
    settings = values["settings"]
    for note in notes:
        typer.echo(in_options(note))
    typer.echo(
        f"{values['ratings']:,} ratings by {values['users']:,} users of {values['items']:,} items: recipe "
        f"{settings['recipe']}, {settings['members']} members of vectors of {settings['embedding_size']}, "
        f"{settings['epochs']} epochs in batches of {settings['batch_size']:,}\n"
        f"{values['parameters']:,} parameters, about {values['bytes'] / 2**20:,.0f} MiB beside the program, "
        f"and {values['seconds']:,.0f} s of one core, within a factor of three"
        + (
            f", a search on {values['folds']} validation parts included, which may find samples of the "
            "posterior (--inference gibbs) better"
            if values["folds"]
            else ""
        )
    )


def _show_beside(console: Console, values: dict[str, Any]) -> None:
    """The model beside biases and popularity on the same parts."""
    columns = {"MSE": "test_mse", "RMSE": "test_rmse"}
    columns |= {"HR@10 of all items": "full_hr@10", "NDCG@10 of all items": "full_ndcg@10"}
    columns = {heading: key for heading, key in columns.items() if key in values}
    table = Table(title=f"Test part: {values['test_ratings'] or values['held_out_ratings']:,} ratings")
    table.add_column("method")
    for heading in columns:
        table.add_column(heading, justify="right")
    methods = ("this model", ""), ("biases of users and items", "biases_"), ("popularity", "popularity_")
    for name, prefix in methods:
        cells = [f"{values[prefix + key]:.4g}" if prefix + key in values else "" for key in columns.values()]
        if any(cells):
            table.add_row(name, *cells, style=None if prefix else "bold")
    console.print(table)
    if worse := ranks_worse(values):
        typer.echo(worse)


def _show(console: Console, values: dict[str, Any], folder: RunFolder) -> None:
    from lunet_fast.recsys import report

    beside = "popularity_full_ndcg@10" in values or "biases_test_mse" in values
    if beside:
        _show_beside(console, values)
    elif "reconstruction_error" in values and "test_mse" in values:
        table = Table(title="Table 2: test error and reconstruction of the embeddings")
        for heading in ("model", "data"):
            table.add_column(heading)
        for heading in ("test MSE", "reconstruction error"):
            table.add_column(heading, justify="right")
        for row in report.table_2(values):
            table.add_row(*row, style="bold" if row[0].startswith("ours") else None)
        console.print(table)
    elif "test_mse" in values:
        typer.echo(f"test MSE {values['test_mse']:.4f} over {values['test_ratings']:,} ratings")
    if "full_ndcg@10" in values and (values["held_out_ratings"] or not beside):
        console.print(_ranking_table(values))
    typer.echo(
        f"{values['dataset']}, split {values['split']}, seed {values['seed']}: {values['epochs']} epochs in "
        f"{values['train_seconds']:.0f} s, {values['parameters']:,} parameters; written to {folder.path}"
    )


def _ranking_table(values: dict[str, Any]) -> Table:
    of = "each user's latest" if values["held_out_ratings"] else "test ratings"
    table = Table(title=f"Ranking: {of}, {values['full_users']:,} users")
    table.add_column("among")
    for heading in ("HR@10", "NDCG@10", "MRR"):
        table.add_column(heading, justify="right")
    for among, prefix in (("100 candidates", ""), ("all items not seen", "full_")):
        if f"{prefix}mrr" in values:
            cells = [f"{values[prefix + name]:.4f}" for name in ("hr@10", "ndcg@10", "mrr")]
            table.add_row(among, *cells)
    return table

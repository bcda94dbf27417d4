"""``lunet-fast evaluate``: a trained model's metrics, from its files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from rich.console import Console
from rich.table import Table

from lunet_fast.cli import options
from lunet_fast.cli.options import data_option
from lunet_fast.cli.output import FigureOutput, Terminal, errors_told
from lunet_fast.cli.signatures import grouped

if TYPE_CHECKING:
    from lunet_fast.recsys.measures.protocols import Parts, Ranking
    from lunet_fast.recsys.serving.recommend import LUNetRecommender


@grouped
def evaluate_command(
    *,
    run: options.Run = options.DEFAULT_RUN,
    dataset: options.TrainedOn = None,
    test_file: Annotated[
        Path | None,
        data_option(
            metavar="FILE",
            help="Instead: the error on a file of ratings of your own. Ids that training has not seen get "
            "the fall-back.",
        ),
    ] = None,
    out: options.JsonOut = None,
    source: options.Source,
    device: options.Device = "cpu",
    output: FigureOutput,
) -> None:
    """Evaluate a trained run again, from its files.

    Divides the data as the training did, checks that they are the same, and measures the saved model on the
    parts that it was not trained on: error of the ratings, reconstruction of the embeddings, ranking among
    candidates and among all items, and that by groups of users with few, some and many ratings and by the
    time since a user's last rating. The figures are those of the run's `metrics.json`.

    Examples:

        lunet-fast evaluate --run runs/ml-100k

        lunet-fast evaluate --run runs/mine --test-file later.csv
    """
    with errors_told():
        from lunet_fast.recsys.measures.protocols import Ranking
        from lunet_fast.training.files import write_json

        if out is not None and not out.parent.is_dir():
            raise ValueError(f"--out {out}: there is no folder {out.parent}")
        recommender = options.load_run(run, device)
        low, high = recommender.scale
        if source.scale is None and low < high:
            source = replace(source, scale=(low, high))  # predictions were clipped to the training's
        source = source.of_run(options.recorded(run).get("reading"))
        if test_file is not None:
            ranking = Ranking(_on_file(recommender, test_file, source), [], {})
        else:
            from lunet_fast.recsys.model.sequence_training import evaluate_sequences
            from lunet_fast.recsys.model.training import evaluate
            from lunet_fast.training.loop import cpu_threads

            parts = _parts(recommender, run, dataset, source)
            with cpu_threads(recommender.config.threads):
                if recommender.ranks_by == "next":
                    ranking = evaluate_sequences(recommender.sequences.model, parts)
                else:
                    ranking = evaluate(recommender.trained.model, parts, device)
        figures = ranking.figures
        if ranking.groups:
            figures["by_activity"] = [group._asdict() for group in ranking.groups]
        if out is not None:
            write_json(out, figures)
        output.figures(figures, lambda: _show(Terminal(), ranking))


def _parts(recommender: LUNetRecommender, run: Path, dataset: str | None, source: options.Source) -> Parts:
    """The parts that the run was trained and tested on."""
    from lunet_fast.recsys.data import movielens
    from lunet_fast.recsys.data.texts import with_items
    from lunet_fast.recsys.measures.protocols import Parts
    from lunet_fast.recsys.model.training import ratings_digest

    config = recommender.config
    recorded = options.recorded(run)
    if config.split in ("files", "stream", "none"):
        why = {"files": "two files", "stream": "a stream", "none": "all ratings"}[config.split]
        raise ValueError(f"--run {run}: was trained on {why}: give --test-file to evaluate it on")
    name = dataset or str(recorded.get("dataset", ""))
    if dataset is None and name not in movielens.DATASETS:
        name = str(recorded.get("source", name))
    if recommender.ranks_by == "next":
        # Among the items may be some that only a file of texts had.
        ratings = with_items(source.read_with_or_without_ratings(name)[0], recommender.items.ids.tolist())
    else:
        ratings = source.read(name, rated=recommender.trained.model.config.needs_ratings)
    parts = Parts.of(ratings, config.split, config.seed)
    if ratings_digest(parts) != recorded.get("ratings_sha256"):
        raise ValueError(
            f"--dataset {name}: these are not the ratings that {run} was trained on: name the right file, or "
            "use --test-file for other ratings"
        )
    return parts


def _on_file(recommender: LUNetRecommender, file: Path, source: options.Source) -> dict[str, float]:
    """Error of the ratings in a file."""
    import torch

    from lunet_fast.recsys.data.ratings import read_ratings
    from lunet_fast.recsys.measures import metrics

    ratings = read_ratings(file, **source.columns())
    users, items = ratings.users.ids[ratings.user], ratings.items.ids[ratings.item]
    prediction = torch.from_numpy(recommender.predict(users, items))
    known = (recommender.users.index(users) >= 0) & (recommender.items.index(items) >= 0)
    return {
        "test_mse": metrics.mse(prediction, ratings.rating),
        "test_rmse": metrics.rmse(prediction, ratings.rating),
        "test_ratings": len(ratings),
        "test_ratings_of_known_pairs": int(known.sum()),
    }


def _show(console: Console, ranking: Ranking) -> None:
    table = Table(title="Metrics", title_justify="left")
    table.add_column("metric")
    table.add_column("value", justify="right")
    for name, value in ranking.metrics.items():
        exponent = name.startswith("reconstruction")
        text = f"{value:,}" if isinstance(value, int) else f"{value:.1e}" if exponent else f"{value:.4f}"
        table.add_row(name, text)
    console.print(table)
    activity = [(f"{g.least} to {g.most}", g.users, g.metrics) for g in ranking.groups]
    _show_groups(
        console,
        "By the number of a user's training ratings",
        "ratings",
        activity,
        ("full_hr@10", "full_ndcg@10", "full_recall@10", "full_mrr"),
    )
    gaps = [(name, int(values["users"]), values) for name, values in ranking.gaps.items()]
    shown = ("hr@10", "ndcg@10", "full_hr@10", "full_ndcg@10")
    _show_groups(console, "By the time since the user's last training rating", "time", gaps, shown)


def _show_groups(
    console: Console,
    title: str,
    heading: str,
    groups: list[tuple[str, int, dict[str, float]]],
    shown: tuple[str, ...],
) -> None:
    """A table of what is measured of (name, users, metrics) each; nothing where there are none."""
    if not groups:
        return
    table = Table(title=title, title_justify="left")
    for column in (heading, "users", *shown):
        table.add_column(column, justify="right")
    for name, users, values in groups:
        table.add_row(name, f"{users:,}", *(f"{values[figure]:.4f}" for figure in shown))
    console.print(table)

"""What the report on the paper's experiments says: trainings and committed results in, a document out."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from lunet_fast.recsys.data.datasets import dataset_title
from lunet_fast.recsys.report import quoted, summary
from lunet_fast.recsys.report.document import (
    Block,
    Cell,
    Code,
    Curve,
    Details,
    Document,
    Heading,
    NotMeasured,
    Panel,
    Panels,
    Paragraph,
    Row,
    Section,
    Table,
    Warned,
    from_markdown,
    literal,
    numbers,
    row,
    texts,
)
from lunet_fast.recsys.report.results import (
    Findings,
    Mean,
    Reproduction,
    Run,
    dagger,
    finite,
    is_dirty,
    machine_line,
    mean,
)
from lunet_fast.recsys.report.run import PRINTED, TABLE_2

TABLE_1: dict[str, dict[str, float]] = {
    "ml-100k": {"users": 943, "items": 1_682, "ratings": 100_000},
    "ml-1m": {"users": 6_040, "items": 3_952, "ratings": 1_000_209, "density": 0.0447},
}
"""The paper's table 1."""

NAMES = {
    "paper": "LU-Net, recipe paper",
    "best": "LU-Net, recipe best",
    "ranking": "LU-Net, interactions alone (γ\u00a0=\u00a00)",
    "hybrid": "LU-Net, hybrid (γ\u00a0=\u00a00.1)",
}
"""The experiments, as tables call them."""

STRONGEST = 3
"""How many of the other methods stand in table 2 and in the table of ranking."""

FIGURES = {"ml-100k": "Figures 3 and 4", "ml-1m": "Figures 5 and 6"}

SPREAD = "± is the standard deviation over the seeds; a figure without it is of one seed"


def document(found: Reproduction) -> Document:
    """The report."""
    results = Findings(found, NAMES, TABLE_1)
    subtitle = (
        "S. Tamim, A. Radid, K. Rhofir, “Invertible Neural Networks for Matrix Factorization in "
        f"Recommendation Systems” (2026), run again by lunet-fast {literal(found.machine['lunet_fast'])} on "
        f"{literal(found.machine['date'])}"
    )
    committed = found.committed
    sections = [
        Section("The data", _data_sets(found)),
        Section("Rating prediction", _ratings(results)),
        Section("Ranking", [*_ranking(results), *_test_lists(results), *_activity(results)]),
        Section("Loss by epoch", _losses(results)),
        Section("What makes it good", quoted.ablations(committed)),
        Section("Beside other methods", quoted.comparison(committed, results)),
        Section("What invertibility buys", [*_round_trips(results), *quoted.inversion(committed)]),
        Section("Users who come later", quoted.fold_in(committed)),
        Section("Time", [*_time(results), *quoted.time_to_quality(committed)]),
        Section("Where the paper is wrong or silent", _errata()),
    ]
    # Last, since it lists the files that the others have used.
    sections.append(Section("How this was made", _provenance(found, results)))
    return Document(
        "LU-Net for recommendation: the paper's experiments, run again",
        subtitle,
        summary.highlights(results),
        summary.reading(found, results),
        sections,
    )


# The paper's tables -----------------------------------------------------------------------------------------


def _data_sets(found: Reproduction) -> list[Block]:
    rows, counts = [], ("users", "items", "ratings")
    for data, printed in TABLE_1.items():
        name = dataset_title(data)
        density = f"{printed['density']:.4f}" if "density" in printed else "—"
        rows.append(row(f"{name}, paper", *(f"{printed[key]:,}" for key in counts), density, ""))
        own = found.data.get(data)
        if own is not None:
            largest = "" if own.get("largest_item") is None else f"{own['largest_item']:,}"
            cells = [*(f"{own[key]:,}" for key in counts), f"{own['density']:.4f}", largest]
            rows.append(row(f"{name}, the files", *cells, ours=True))
    columns = [*texts(""), *numbers(*counts, "density", "largest item id")]
    note = "Density: ratings / (users × items). Items are those that have a rating."
    blocks: list[Block] = [Table("Table 1: the data sets", columns, rows, note)]
    missing = [data for data in TABLE_1 if data not in found.data]
    if missing:
        blocks.append(NotMeasured(" and ".join(map(dataset_title, missing)), _reproduce_command(*missing)))
    return [
        *blocks,
        Paragraph(
            "**Erratum.** The 3,952 items that the paper gives ML-1M are its largest item id. 3,706 items "
            "have ratings, and the density of 0.0447 is computed with those: 1,000,209 / (6,040 × 3,706)."
        ),
    ]


def _ratings(results: Findings) -> list[Block]:
    rows: list[tuple[str, bool, dict[str, list[Cell]]]] = []
    for model in ("classic MLP", "invertible model"):
        printed = {
            data: [Cell(f"{mse:.4f}", mse), Cell(f"{mse**0.5:.4f}", mse**0.5), Cell(f"{error:.4f}")]
            for data in results.datasets
            for name, of, mse, error in TABLE_2
            if name.endswith(model) and of == dataset_title(data)
        }
        rows.append((f"paper: {model}", False, printed))
    control = {}
    for data, runs in results.controls.items():
        mse, error = mean(runs, "mlp_test_mse"), mean(runs, "mlp_reconstruction_error")
        if mse is not None:
            lost = Cell("" if error is None else f"{error.value:.4f}")
            control[data] = [_cell(mse, runs), Cell(f"{mse.value**0.5:.4f}", mse.value**0.5), lost]
    rows.append(("MLP control", True, control))
    for experiment in ("paper", "best"):
        ours = {}
        for data in results.datasets:
            runs = results.of(data, experiment)
            if mean(runs, "test_mse") is not None:
                error = mean(runs, "reconstruction_error")
                lost = Cell("" if error is None else f"{error.value:.1e}")
                ours[data] = [*(_cell(mean(runs, key), runs) for key in ("test_mse", "test_rmse")), lost]
        rows.append((NAMES[experiment], True, ours))
    strongest = dict.fromkeys(
        other["method"] for data in results.datasets for other in results.others(data, "test_mse")[:STRONGEST]
    )
    for name in strongest:
        theirs = {
            data: [*(_row_cell(other, key) for key in ("test_mse", "test_rmse")), Cell("")]
            for data in results.datasets
            for other in results.others(data, "test_mse")
            if other["method"] == name
        }
        rows.append((literal(name), False, theirs))
    columns = texts("model")
    for data in results.datasets:
        group = dataset_title(data)
        columns += numbers("test MSE", "RMSE", best="lowest", group=group)
        columns += numbers("reconstruction error", group=group)
    blank = [Cell("")] * 3
    table = Table(
        "Table 2: test error of the 80/20 split, MSE in stars² and RMSE in stars, and reconstruction of the "
        f"embeddings. {SPREAD}, or as published; bold: the lowest",
        columns,
        [
            row(name, *(cell for data in results.datasets for cell in cells.get(data, blank)), ours=ours)
            for name, ours, cells in rows
            if cells
        ],
        "Predictions are clipped to the scale; the weights are those of the last epoch, and nothing is "
        "chosen on the test part. Reconstruction error: mean of ‖f⁻¹(f(x)) − x‖² in float32; of the MLP, "
        "which has no inverse, that of a decoder trained for it. The paper's RMSE are the roots of its "
        "MSE." + results.quoted("paper", "best", controls=True),
    )
    told = Paragraph(
        "Recipe `paper` is the paper's protocol: Adam at 0.001, batches of 128, 50 epochs, a linear read-out "
        "of z = f(x). Recipe `best` is the same invertible network with histories, biases, genres and the "
        "users' age, gender and occupation, a penalty on z and the mean of several members. Other methods "
        "have the ratings alone, and the comparison below tells what the further data are worth. The control "
        "is an MLP on concatenated embeddings, with the budget of recipe `paper`."
    )
    others = [] if strongest else [NotMeasured("Other methods", quoted.compare_command("ml-100k"))]
    return [told, table, *others]


def _ranking(results: Findings) -> list[Block]:
    blocks: list[Block] = [
        Paragraph(
            "Each user's most recent item is held out (leave-one-out) and ranked: among 100 items drawn "
            "from those the user never rated, as in the paper, and among all items that the user has not "
            "rated, which is what a recommender does. The items without interaction that training draws "
            "may include the held-out one, as they would in use."
        )
    ]
    columns = texts("model")
    for group in ("100 candidates", "all items"):
        columns += numbers("HR@10", "NDCG@10", "Precision@10", best="highest", group=group)
    columns += numbers("test MSE", best="lowest")
    keys = ("hr@10", "ndcg@10", "full_hr@10", "full_ndcg@10")

    def line(name: str, cells: Sequence[Cell], ours: bool) -> Row:
        hits, gain, full_hits, full_gain, *error = cells
        return row(name, hits, gain, _tenth(hits), full_hits, full_gain, _tenth(full_hits), *error, ours=ours)

    for data in results.datasets:
        rows = []
        for experiment in ("ranking", "hybrid"):
            runs = results.of(data, experiment)
            if not runs:
                name = f"{dataset_title(data)}, {NAMES[experiment]}"
                blocks.append(NotMeasured(name, _reproduce_command(data)))
                continue
            cells = [_cell(mean(runs, key), runs) for key in (*keys, "test_mse")]
            rows.append(line(NAMES[experiment], cells, True))
        for other in results.others(data, "ndcg@10")[:STRONGEST]:
            cells = [_row_cell(other, key) for key in keys]
            rows.append(line(literal(other["method"]), [*cells, Cell("")], False))
        caption = f"{dataset_title(data)}: leave-one-out, shares of 1. {SPREAD}; bold: the best"
        note = (
            "With one relevant item a user, Precision@10 is a tenth of HR@10. The hybrid learns ratings too, "
            "from 80 % of what leave-one-out leaves (split `joint`); its test MSE, in stars², is of the "
            "other 20 %." + results.quoted("ranking", "hybrid")
        )
        if rows:
            blocks.append(Table(caption, columns, rows, note))
    return blocks


def _test_lists(results: Findings) -> list[Block]:
    """Precision (2.16) of the 80/20 test part."""
    rows = []
    for data in results.datasets:
        for experiment in ("paper", "best", "hybrid"):
            runs = [r for r in results.of(data, experiment) if "precision@10" in r.metrics]
            if runs:
                how = "interaction" if experiment == "hybrid" else "predicted rating"
                cells = [_cell(mean(runs, name), runs) for name in ("precision@10", "recall@10")]
                rows.append(row(f"{dataset_title(data)}: {NAMES[experiment]}", how, *cells, ours=True))
    if not rows:
        return []
    columns = [*texts("model", "ranked by"), *numbers("Precision@10", "Recall@10")]
    note = (
        "Lists of 10 of all items that the user has not rated in training; relevant are the user's test "
        "ratings, whatever their value. The hybrid's test part is a fifth of what leave-one-out leaves. "
        "To rank by predicted rating is weak: it likes rare items that a few people rated high."
    )
    caption = f"The 80/20 test part, all items ranked, shares of 1. {SPREAD}"
    return [Heading("Precision of lists, (2.16)"), Table(caption, columns, rows, note)]


def _activity(results: Findings) -> list[Block]:
    rows = []
    for data in results.datasets:
        for experiment in ("ranking", "hybrid"):
            runs = [run for run in results.of(data, experiment) if run.groups]
            for third in zip(*(run.groups for run in runs), strict=False):
                least, most = min(g["least"] for g in third), max(g["most"] for g in third)
                cells = [f"{least:,} to {most:,}", f"{third[0]['users']:,}"]
                for name in ("full_hr@10", "full_ndcg@10", "coverage@10"):
                    cells.append(f"{statistics.fmean(g['metrics'][name] for g in third):.4f}")
                rows.append(row(f"{dataset_title(data)}: {NAMES[experiment]}", *cells, ours=True))
    heading = Heading("By how active users are")
    if not rows:
        return [heading, NotMeasured("Users by activity", _reproduce_command("ml-100k"))]
    columns = [*texts("model"), *numbers("ratings known", "users", "HR@10", "NDCG@10", "coverage@10")]
    note = (
        "All items ranked; users in thirds by the number of their ratings that are known. Coverage is "
        "the share of all items in somebody's first ten."
    )
    return [heading, Table("Full ranking by activity, shares of 1, means over seeds", columns, rows, note)]


def _losses(results: Findings) -> list[Block]:
    blocks: list[Block] = []
    for data in results.datasets:
        name = dataset_title(data)
        curves: dict[str, list[Curve]] = {"train": [], "test": []}
        for look, (label, experiment, phase) in enumerate(
            (("best", "best", "LU-Net"), ("paper", "paper", "LU-Net"), ("MLP", "paper", "MLP"))
        ):
            first = next((r for r in results.of(data, experiment) if phase in r.losses), None)
            for part, held in curves.items():
                values = getattr(first.losses[phase], part) if first is not None else ()
                if values:
                    held.append(Curve(label, values, look))
        if not curves["train"]:
            blocks.append(NotMeasured(f"{FIGURES[data]}, {name}", _reproduce_command(data)))
            continue
        panels = [
            Panel(f"{name}: training loss", curves["train"]),
            Panel(f"{name}: test loss", curves["test"], ("printed", PRINTED[name])),
        ]
        caption = (
            f"{FIGURES[data]} of the paper, {name}: mean squared error in stars² by epoch, first seed. "
            "“best” and “paper” are the two recipes of LU-Net, “MLP” is the control; the dotted line is "
            "the test MSE that the paper prints for its invertible model."
        )
        blocks.append(Panels(caption, panels))
        if len(curves["train"]) < 3:
            blocks.append(NotMeasured(f"{name}, the curves of recipe paper", _reproduce_command(data)))
    return blocks


def _round_trips(results: Findings) -> list[Block]:
    rows = []
    for (data, experiment), runs in results.runs.items():
        relative = mean(runs, "reconstruction_error_relative")
        if relative is not None:
            error = mean(runs, "reconstruction_error")
            name = f"{dataset_title(data)}: {NAMES[experiment]}{dagger(runs)}"
            rows.append(
                row(name, "" if error is None else f"{error.value:.1e}", f"{relative.value:.1e}", ours=True)
            )
    columns = [*texts("model"), *numbers("mean ‖f⁻¹(f(x)) − x‖²", "over mean ‖x‖²")]
    caption = "A round trip through f over the held-out pairs, in float32, means over seeds"
    return [Table(caption, columns, rows, results.quoted(*NAMES).strip())] if rows else []


def _time(results: Findings) -> list[Block]:
    rows = []
    trainings = [
        (f"{dataset_title(data)}: {NAMES[experiment]}", runs, "", runs[0].metrics.get("epochs", ""))
        for (data, experiment), runs in results.runs.items()
    ]
    trainings += [
        (f"{dataset_title(data)}: MLP control", runs, "mlp_", runs[0].config.get("mlp_epochs", ""))
        for data, runs in results.controls.items()
    ]
    for name, runs, prefix, epochs in trainings:
        took, size = mean(runs, f"{prefix}train_seconds"), mean(runs, f"{prefix}parameters")
        if took is not None and size is not None:
            rows.append(row(name + dagger(runs), f"{epochs}", f"{size.value:,.0f}", took.text(0), ours=True))
    columns = [*texts("training"), *numbers("epochs", "parameters", "seconds")]
    note = "One thread of a machine which had other work too." + results.quoted(*NAMES, controls=True)
    return [Table(f"Time of the trainings, wall clock. {SPREAD}", columns, rows, note)] if rows else []


# The rest ---------------------------------------------------------------------------------------------------


def _errata() -> list[Block]:
    text = (resources.files(__package__) / "templates" / "errata.md").read_text(encoding="utf-8")
    (table,) = from_markdown(text, Path())
    return [
        Paragraph("None of this touches the idea; each changes what one computes or how one reads it."),
        table,
    ]


def _provenance(found: Reproduction, results: Findings) -> list[Block]:
    blocks: list[Block] = [
        Code(found.command),
        Paragraph(machine_line(found.machine)),
        *([Warned(literal(found.note))] if found.note else []),
        Paragraph(
            "The data is GroupLens Research's: F. M. Harper and J. A. Konstan, “The MovieLens Datasets”, "
            "ACM TiiS 5(4):19, 2015."
        ),
        Heading("Settings of every training"),
    ]
    for (data, experiment), runs in results.runs.items():
        here = [run for run in runs if not run.file]
        if here:
            seeds = ", ".join(str(run.seed) for run in here)
            summary = f"{dataset_title(data)}: {NAMES[experiment]}, seed{'s' * (len(here) > 1)} {seeds}"
            blocks.append(Details(summary, list(_settings(here))))
    used = sorted(found.committed.used.items())
    if not used:
        return blocks
    blocks.append(Heading("Result files that this report quotes"))
    dirty = [f"`{name}`" for name, machine in used if is_dirty(machine)]
    if dirty:
        blocks.append(
            Warned(
                "**Measured with changes that were not committed:** " + ", ".join(dirty) + ". The commit "
                "named beside such a file, which ends in `-dirty`, is not quite the code that was measured."
            )
        )
    rows = [
        row(
            f"`{name}`",
            literal(machine.get("date", "")) or "not recorded",
            literal(machine.get("commit", "")) or "not recorded",
            "uncommitted changes" if is_dirty(machine) else "",
        )
        for name, machine in used
    ]
    return [*blocks, Table("", texts("file", "measured on", "at commit", "warning"), rows)]


def _settings(runs: Sequence[Run]) -> Iterable[Block]:
    # Where the data lay is no setting.
    first = {n: v for n, v in runs[0].config.items() if n != "source"}
    common = {n: v for n, v in first.items() if all(run.config.get(n) == v for run in runs)}
    yield Code("\n".join(run.command for run in runs))
    yield Paragraph("Settings that the seeds share:")
    yield Code(json.dumps(common, indent=1, ensure_ascii=False))
    own = sorted({n for run in runs for n in run.config} - common.keys() - {"source"})
    if own:
        lines = [json.dumps({n: run.config.get(n) for n in own}, ensure_ascii=False) for run in runs]
        yield Paragraph("and those of each:")
        yield Code("\n".join(lines))


def _cell(value: Mean | None, runs: Sequence[Run]) -> Cell:
    return Cell("") if value is None else Cell(value.text() + dagger(runs), value.value)


def _row_cell(other: dict[str, Any], key: str) -> Cell:
    """Of a row of a comparison."""
    if not finite(other.get(key)):
        return Cell("")
    spread = other.get(f"{key}_sd")
    return Cell(Mean(other[key], spread if finite(spread) else None).text(), other[key])


def _tenth(hits: Cell) -> Cell:
    """Precision@10 from HR@10: each user has one relevant item."""
    return hits if hits.value is None else Cell(f"{hits.value / 10:.4f}", hits.value / 10)


def _reproduce_command(*data: str) -> str:
    return f"lunet-fast reproduce --datasets {' '.join(data)}"

"""Sections of the report that quote committed result files: nothing of them is made by a reproduction."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from lunet_fast.recsys.data.datasets import dataset_title
from lunet_fast.recsys.model.config import recipe
from lunet_fast.recsys.report.document import (
    Block,
    Bullets,
    Cell,
    Column,
    Details,
    Dot,
    Dots,
    Heading,
    NotMeasured,
    Paragraph,
    Picture,
    Table,
    Warned,
    from_markdown,
    literal,
    numbers,
    row,
    signed,
    texts,
)
from lunet_fast.recsys.report.results import Committed, Findings, finite, is_ours, machine_line

Best = Literal["", "lowest", "highest"]

LEAKY = "lunet-leaky"
"""The row of a comparison that was told of the held-out pairs."""

# Key of a row of a comparison, heading, which is best, how it is written.
MEASURES: tuple[tuple[str, str, Best, str], ...] = (
    ("test_mse", "test MSE", "lowest", ".4f"),
    ("test_rmse", "RMSE", "lowest", ".4f"),
    ("hr@10", "HR@10", "highest", ".4f"),
    ("ndcg@10", "NDCG@10", "highest", ".4f"),
    ("full_ndcg@10", "NDCG@10, all items", "highest", ".4f"),
    ("reconstruction_error_relative", "reconstruction, relative", "", ".0e"),
    ("train_seconds", "training, s", "", ",.1f"),
    ("peak_memory_mb", "memory, MB", "", ",.0f"),
    ("parameters", "parameters", "", ",.0f"),
)


def compare_command(data: str) -> str:
    return f"lunet-fast compare --dataset {data} --seeds 0 1 2 --out benchmarks/results"


def ablations(committed: Committed) -> list[Block]:
    blocks: list[Block] = [
        Paragraph(
            "Recipe `best` with fewer members than it has (for time), one thing changed at a time, "
            "ML-100K, measured on a validation part of the training data."
        )
    ]
    all_items = {"ndcg@10": "NDCG@10", "hr@10": "HR@10", "full_ndcg@10": "NDCG@10, all items"}
    for kind, title, keys in (
        ("ratings", "Rating prediction", {"mse": "MSE"}),
        ("ranking", "Ranking (γ = 0)", all_items),
    ):
        found = committed.json(f"ablation-{kind}.json")
        blocks.append(Heading(title))
        if found is None:
            blocks.append(NotMeasured(title, f"python benchmarks/ablation.py {kind}"))
        else:
            blocks += _ablation(title, found["rows"], keys)
    return blocks


def _ablation(title: str, rows: Sequence[Mapping[str, Any]], keys: Mapping[str, str]) -> list[Block]:
    first = next(iter(keys))
    seeds = max((len(line.get(f"{first}_seeds", ())) for line in rows), default=0)
    lines = []
    for n, line in enumerate(rows):
        cells: list[Cell | str] = [literal(line["group"]), literal(line["name"])]
        for key in keys:
            value, change, error = (line.get(f"{key}{what}") for what in ("", "_change", "_change_error"))
            if not finite(value):
                cells += ["", ""]
                continue
            spread = f" ± {error:.4f}" if finite(error) else ""
            told = f"{signed(change)}{spread}" if n and finite(change) else ""  # type: ignore[arg-type]
            cells += [Cell(f"{value:.4f}", value), told]
        lines.append(row(*cells, ours=not n))
    best: Best = "lowest" if first == "mse" else "highest"
    columns = texts("", "change")
    for heading in keys.values():
        columns += [Column(heading, best=best), Column("change")]
    over = f"means over {seeds} seeds, ± is the standard error of the change" if seeds > 1 else "one seed"
    unit = "stars²" if first == "mse" else "shares of 1"
    changed = [line for line in rows[1:] if finite(line.get(f"{first}_change"))]
    blocks: list[Block] = []
    if changed:
        sizes = sorted(abs(line[f"{first}_change"]) for line in changed)
        # So wide that nine of ten changes are within.
        limit = _round_up(max(sizes[int(0.9 * (len(sizes) - 1))], 1e-4))
        shown = [
            Dot(
                ": ".join(filter(None, (line["group"], str(line["name"])))),
                line[f"{first}_change"],
                line.get(f"{first}_change_error"),
            )
            for line in changed
        ]
        within = " Hollow: within two standard errors of none." if seeds > 1 else ""
        caption = (
            f"{title}: change of {keys[first]}, {unit}, against the row without a change; {over}.{within}"
        )
        blocks.append(Dots(caption, shown, "left" if first == "mse" else "right", limit))
    table = Table(f"Ablation: {title.lower()}, {unit}; {over}; bold: the best", columns, lines)
    return [*blocks, Details(f"All {len(lines)} rows", [table])]


def _round_up(value: float) -> float:
    """The next of 1, 2, 5, 10, ... times a power of ten."""
    unit = 10.0 ** math.floor(math.log10(value))
    return next(unit * m for m in (1, 2, 5, 10) if unit * m >= value * (1 - 1e-9))


def comparison(committed: Committed, results: Findings) -> list[Block]:
    blocks: list[Block] = []
    for data, found in results.compared.items():
        title = dataset_title(data)
        if found is None:
            blocks.append(NotMeasured(f"{title}, other methods", compare_command(data)))
            continue
        blocks += _compared(title, found)
        alt = f"{title}: test MSE and NDCG@10 of each method, with its training time"
        blocks += committed.picture(f"compare-{data}.png", alt)
    return blocks


def _compared(title: str, found: Mapping[str, Any]) -> list[Block]:
    rows, left_out = [], []
    for line in found["rows"]:
        reason = line.get("missing") or line.get("error")
        if reason:
            left_out.append(f"{literal(line['method'])}: {literal(reason)}")
            continue
        package = str(line.get("package", ""))
        package = {"lunet_fast": "this one", "ours": "written here"}.get(package, package)
        cells: list[Cell | str] = [literal(line["method"]), literal(package)]
        for key, _, best, form in MEASURES:
            value, spread = line.get(key), line.get(f"{key}_sd")
            if not finite(value):
                cells.append("")
                continue
            text = f"{value:{form}}" + (f" ± {spread:.4f}" if best and finite(spread) else "")
            # One that was told of the held-out pairs does not compete; nor does the error of one that is
            # measured on another test part.
            apart = line.get("key") == LEAKY or (line.get("kind") == "both" and "test" in key)
            cells.append(Cell(f"{text} ‡" if best and apart else text, value if best and not apart else None))
        rows.append(row(*cells, ours=is_ours(line)))
    columns = texts("method", "package")
    columns += [Column(heading, best=best) for _, heading, best, _ in MEASURES]
    seeds = [str(seed) for seed in found.get("seeds", [])]
    over = f"means over seeds {', '.join(seeds)}, ±: standard deviation over them" if len(seeds) > 1 else ""
    over = over or f"seed {', '.join(seeds)}"
    note = (
        "MSE in stars², RMSE in stars; HR and NDCG: leave-one-out, among 100 candidates and among all items. "
        "‡: not comparable, so never bold: of the test part that leave-one-out leaves, or told of the "
        "held-out pairs. "
    )
    note += f"`{found['command']}`. " if found.get("command") else ""
    caption = f"{title}: methods; {over}; bold: the best"
    blocks: list[Block] = [Table(caption, columns, rows, note + machine_line(found.get("machine", {})))]
    return [*blocks, Bullets(left_out)] if left_out else blocks


def inversion(committed: Committed) -> list[Block]:
    """The result file as its own Markdown tells it."""
    text = committed.text("inversion.md")
    if text is None or committed.folder is None:
        return [NotMeasured("What the inverse is good for", "python benchmarks/inversion.py")]
    blocks = from_markdown(text, committed.folder)
    if committed.json("inversion.json") is None:
        committed.used["inversion.md"] = {}
    if not any(isinstance(block, Picture) for block in blocks):
        blocks += committed.picture("inversion.png", "What the inverse is good for: figure of inversion")
    return blocks


def fold_in(committed: Committed) -> list[Block]:
    found = committed.json("fold-in.json")
    if found is None:
        what = "Users and items that training has not seen"
        return [NotMeasured(what, "python benchmarks/fold_in.py")]
    blocks: list[Block] = [
        Paragraph(
            f"{found['tested_users']} users of ML-100K whom training has not seen, each known by n of its "
            "ratings. The errors are those of its ratings after the 20th. Among 100 candidates one item is "
            "to be found, the user's 21st; among all items every one after the 20th counts, often dozens, so "
            "that the first ten places are easier to fill: **the two NDCG do not compare**."
        )
    ]
    measures: tuple[tuple[str, str, str, Best], ...] = (
        ("MSE, stars²", "mse", "ratings", "lowest"),
        ("HR@10 among 100 candidates, one of them relevant", "hr@10", "ranking", "highest"),
        ("NDCG@10 among 100 candidates, one of them relevant", "ndcg@10", "ranking", "highest"),
        ("NDCG@10 among all items, all after the 20th relevant", "full_ndcg@10", "ranking", "highest"),
    )
    for title, key, kind, best in measures:
        rows = []
        given = sorted(
            int(name.removeprefix(f"{key}_")) for name in found[kind][0] if name.startswith(f"{key}_")
        )
        for line in found[kind]:
            values = [line[f"{key}_{n}"] for n in given]
            took = f"{line['ms_per_user']:.0f}" if "fold_in" in line["way"] else ""
            cells = [Cell(f"{value:.4f}", value) for value in values]
            rows.append(row(literal(line["way"]), *cells, took, ours="fold_in" in line["way"]))
        columns = [*texts(""), *numbers(*(f"n = {n}" for n in given), best=best), *numbers("ms a user")]
        blocks.append(Table(f"{title}; one seed; bold: the best", columns, rows))
    return [*blocks, Paragraph(machine_line(found.get("machine", {})))]


def time_to_quality(committed: Committed) -> list[Block]:
    heading = Heading("Beside other packages")
    found = committed.json("time-to-quality.json")
    if found is None:
        command = "python benchmarks/time_to_quality.py"
        return [heading, NotMeasured("Whole trainings beside other packages", command)]
    now = recipe("best", 100_000, mlp=False)
    settings = f"K = {now.members}, k = {now.embedding_size}, M = {now.layers}, {now.epochs} epochs"
    measured = {line["settings"] for line in found["trainings"] if is_ours(line) and "settings" in line}
    old = measured - {settings}
    blocks: list[Block] = [heading]
    if old:
        blocks.append(
            Warned(
                f"**Measured with an older recipe** ({literal('; '.join(sorted(old)))}). Today's recipe "
                f"`best` has {settings}: it takes longer and errs less, see the tables above. When LU-Net "
                "gets to the error of another method is therefore left out."
            )
        )
    rows = []
    for line in found["trainings"]:
        name = literal(line["method"]) + (" (older recipe)" if old and is_ours(line) else "")
        told = literal(line.get("settings", ""))
        if line.get("missing"):
            rows.append(
                row(name, told, str(line["threads"]), literal(line["missing"]), *[""] * (2 - bool(old)))
            )
            continue
        after = line["ours_seconds"]
        reached = "" if line["curve"] else "not in its training" if after is None else f"{after:.1f}"
        took, error = line["seconds"], line["test_mse"]
        cells = [Cell(f"{took:.1f}", took), Cell(f"{error:.4f}", error), *([] if old else [reached])]
        rows.append(row(name, told, str(line["threads"]), *cells, ours=is_ours(line)))
    columns = [*texts("method", "settings"), *numbers("threads")]
    columns += numbers("training, s", "test MSE, stars²", best="lowest")
    columns += [] if old else numbers("LU-Net gets there after, s")
    caption = "Whole trainings, ML-100K, one run with seed 0; bold: the lowest"
    return [*blocks, Table(caption, columns, rows, machine_line(found["machine"]))]

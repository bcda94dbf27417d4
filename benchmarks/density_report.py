"""What ``density.py`` has measured, as tables and a picture: density.md and density.png."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

from density_flows import DIGITS, DIGITS_FLOWS, GAUSSIAN, GRID, PLANE_FLOWS
from lunet_fast.density.targets import TARGETS
from lunet_fast.training.figures import BLUE, GREY, MUSTARD, ORANGE, PINK, TEAL, new_figure, plain
from lunet_fast.training.files import write_figure
from machine import RESULTS, Results, write_text


def rows_of(name: str, folder: Path = RESULTS) -> list[dict[str, Any]]:
    """The rows of density-NAME.json, [] where it is not there."""
    path = folder / f"density-{name}.json"
    return json.loads(path.read_text())["rows"] if path.is_file() else []


def _step_times(folder: Path) -> dict[tuple[str, str, int], dict[str, Any]]:
    return {(row["family"], row["size"], row["components"]): row for row in rows_of("speed", folder)}


def digits_table(folder: Path = RESULTS) -> list[str]:
    """Quality, cost and outliers on digits, the best flow first."""
    times = _step_times(folder)
    rows = sorted(rows_of("digits", folder), key=lambda row: row["test"])
    # A likelihood that most flows get to, for the time to it.
    wanted = 2.15
    lines = [
        "| flow | parameters | bits/dim, test | base of | a step, ms | trained, s | "
        f"to {wanted} on validation, s | 256 samples, ms | AUROC 0–4 / 5–9 |",
        "|---" * 9 + "|",
    ]
    for row in rows:
        components = row["tuned"]["chosen"]["components"]
        time_of = times.get((row["family"], row["size"], components))
        step = time_of["step_ms"] if time_of else math.nan
        steps = [len(run["curve"]) * DIGITS.round_steps for run in row["runs"]]
        reached = [
            next((i + 1 for i, loss in enumerate(run["curve"]) if loss <= wanted), None)
            for run in row["runs"]
        ]
        after = [r * DIGITS.round_steps * step / 1e3 for r in reached if r is not None]
        bold = "**" if f"{row['test']:.4f}" == f"{rows[0]['test']:.4f}" else ""  # the best, whosever it is
        name = f"{row['family']}, {row['size']}" if row["family"] != GAUSSIAN else row["family"]
        cells = [
            name,
            f"{row['parameters']:,}",
            f"{bold}{row['test']:.4f}{bold} ± {row['test_std'] / math.sqrt(len(row['runs'])):.4f}",
            "1" if components == 1 else f"{components} Gaussians",
            f"{step:.2f}",
            f"{statistics.fmean(steps) * step / 1e3:.0f}",
            f"{statistics.fmean(after):.1f}"
            if len(after) == len(reached)
            else "never"
            if not after
            else "not always",
            f"{time_of['sample_ms']:.1f}" if time_of else "",
            "" if row["auroc"] is None else f"{row['auroc']:.3f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def speed_table(folder: Path = RESULTS) -> list[str]:
    lines = [
        "| flow | parameters | base of | a training step, ms | 256 samples, ms | kept for backward, MB |",
        "|---" * 6 + "|",
    ]
    for row in rows_of("speed", folder):
        base = "1" if row["components"] == 1 else f"{row['components']} Gaussians"
        lines.append(
            f"| {row['family']}, {row['size']} | {row['parameters']:,} | {base} | {row['step_ms']:.2f} | "
            f"{row['sample_ms']:.2f} | {row['kept_bytes'] / 1e6:.1f} |"
        )
    return lines


def plane_table(folder: Path = RESULTS) -> list[str]:
    """KL of each flow from each known density, in nats; the least of a column is bold."""
    rows = rows_of("plane", folder)
    names = list(TARGETS)
    lines = []
    for size in ("S", "M", "L"):
        for family in PLANE_FLOWS:
            found = {row["target"]: row for row in rows if (row["family"], row["size"]) == (family, size)}
            if not found:
                continue
            sizes = sorted({row["parameters"] for row in found.values()})
            cells = [f"{found[name]['kl']:.3f}" if name in found else "" for name in names]
            mean = statistics.fmean(row["kl"] for row in found.values())
            cells.append(f"{mean:.3f}" if len(found) == len(names) else "")
            span = f"{sizes[0]:,}" if len(sizes) == 1 else f"{sizes[0]:,}–{sizes[-1]:,}"
            lines.append(([f"{family}, {size}", span], cells))
    least = [
        min(filter(None, column), default="") for column in zip(*(cells for _, cells in lines), strict=True)
    ]
    head = "| flow | parameters | " + " | ".join(names) + " | mean |"
    table = [head, "|---" * (len(names) + 3) + "|"]
    for told, cells in lines:
        shown = [f"**{c}**" if c and c == best else c for c, best in zip(cells, least, strict=True)]
        table.append("| " + " | ".join([*told, *shown]) + " |")
    return table


def depth_table(folder: Path = RESULTS) -> list[str]:
    lines = [
        "| layers | start | before training | bits/dim, test | round trip, median | worst | digits kept |",
        "|---" * 7 + "|",
    ]
    for row in sorted(rows_of("depth", folder), key=lambda row: (row["layers"], row["start"])):
        if row["test"] is None:
            lines.append(f"| {row['layers']} | {row['start']} | {row['first']:.3g} | diverged | | | |")
            continue
        lines.append(
            f"| {row['layers']} | {row['start']} | {row['first']:.3g} | {row['test']:.4f} | "
            f"{row['round_trip_median']:.1e} | {row['round_trip_worst']:.1e} | {row['digits_kept']:.1f} |"
        )
    return lines


def report(results: Results) -> None:
    """density.md and density.png."""
    machine = json.loads(results.path("density-digits.json").read_text())["machine"]
    text = [
        "# LU-Net as a density, beside other flows",
        "",
        f"{machine['processor']}, one thread, torch {machine['torch']}, {machine['date']}. Every flow: "
        "the same rows, noise, AdamW with averaged weights, the same stopping; the base, the rate and the "
        f"decay chosen from {len(GRID)} settings by the validation part of seed 0. Means over five seeds, "
        "which also draw the parts anew (± standard error). Times are medians of interleaved steps, and "
        "steps times that for whole trainings.",
        "",
        "## Digits (scikit-learn, 8 × 8, 17 levels, 64-D; all Jacobians counted)",
        "",
        *digits_table(results.folder),
        "",
        "![quality against size and time](density.png)",
        "",
        "![digits, samples, interpolations](density-digits.png)",
        "",
        "## A training step and sampling, batch 256, D 64",
        "",
        *speed_table(results.folder),
        "",
        "## 2-D toy densities: KL(truth ‖ flow), nats",
        "",
        *plane_table(results.folder),
        "",
        "![true and learnt densities](density-plane.png)",
        "",
        "## Depth (digits, base of 30 Gaussians, two seeds)",
        "",
        *depth_table(results.folder),
        "",
    ]
    write_text(results.path("density.md"), "\n".join(text))
    _plot(results.folder)


def _plot(folder: Path) -> None:
    figure = new_figure(8.4, 4.6)
    subplots = figure.subplots(1, 2, sharey=True)
    times = _step_times(folder)
    looks = (BLUE, "D"), (BLUE, "P"), (GREY, "s"), (ORANGE, "o"), (TEAL, "^"), (PINK, "v"), (MUSTARD, "X")
    for family, (colour, marker) in zip(DIGITS_FLOWS, looks, strict=True):
        rows = sorted(
            (row for row in rows_of("digits", folder) if row["family"] == family),
            key=lambda r: r["parameters"],
        )
        if not rows:
            continue
        errors = [row["test_std"] / math.sqrt(len(row["runs"])) for row in rows]
        tests = [row["test"] for row in rows]
        spent = [
            statistics.fmean(len(run["curve"]) for run in row["runs"])
            * DIGITS.round_steps
            * times[(family, row["size"], row["tuned"]["chosen"]["components"])]["step_ms"]
            / 1e3
            for row in rows
        ]
        for axes, across in zip(subplots, ([row["parameters"] for row in rows], spent), strict=True):
            style: dict[str, Any] = {"color": colour, "marker": marker, "markersize": 6, "capsize": 2}
            axes.errorbar(across, tests, errors, label=family, **style)
    for axes, label, ticks in (
        (subplots[0], "parameters", (10_000, 20_000, 50_000)),
        (subplots[1], "seconds of training, one core", (3, 10, 30)),
    ):
        axes.set(xscale="log", xlabel=label)
        axes.set_xticks(ticks, labels=[f"{tick:,}" for tick in ticks])
        axes.xaxis.minorticks_off()
        plain(axes)
    subplots[0].set_ylabel("digits: bits a dimension, test (± standard error)", fontsize=9)
    figure.legend(
        *subplots[0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=4,
        frameon=False,
        fontsize=8.5,
    )
    write_figure(folder / "density.png", figure)

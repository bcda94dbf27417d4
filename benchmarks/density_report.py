"""What ``density.py`` has measured, as tables and a picture: density.md and density.png."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from density_flows import DIGITS_FLOWS
from lunet_fast.training.figures import BLUE, GREY, MUSTARD, ORANGE, PINK, TEAL, new_figure, plain
from lunet_fast.training.files import write_figure
from machine import Results, write_text
from tables_of_densities import (
    ablation_table,
    costs_table,
    digits_table,
    plane_table,
    rows_of,
    step_times,
    training_seconds,
)


def report(results: Results) -> None:
    """density.md and density.png."""
    machine = json.loads(results.path("density-digits.json").read_text())["machine"]
    text = [
        "# LU-Net as a density, beside other flows",
        "",
        f"{machine['processor']}, one thread, torch {machine['torch']}, {machine['date']}. Every flow: "
        "the same rows, noise, AdamW with averaged weights, the same stopping; the rate, the decay, the base "
        "and the number of steps chosen by the validation part of seed 0, rung by rung on the same ladders. "
        "Means over five other seeds, which also draw the parts anew (± standard error). Times are medians "
        "of interleaved steps, and steps times that for whole trainings.",
        "",
        "## Digits (scikit-learn, 8 × 8, 17 levels, 64-D; all Jacobians counted)",
        "",
        *digits_table(results.folder),
        "",
        "![quality against size and time](density.png)",
        "",
        "![digits, samples, interpolations](density-digits.png)",
        "",
        "## What they cost, batch 256",
        "",
        *costs_table(results.folder),
        "",
        "## 2-D toy densities: KL(truth ‖ flow), nats",
        "",
        *plane_table(results.folder),
        "",
        "![true and learnt densities](density-plane.png)",
        "",
    ]
    if rows_of("ablation", results.folder):
        title = "## LU-Net M with one thing changed (digits, validation part)"
        text += [title, "", *ablation_table(results.folder), ""]
    write_text(results.path("density.md"), "\n".join(text))
    _plot(results.folder)


def _plot(folder: Path) -> None:
    figure = new_figure(8.4, 4.6)
    subplots = figure.subplots(1, 2, sharey=True)
    times = step_times(folder)
    looks = (
        *((BLUE, "D"), (ORANGE, "o"), (GREY, "D"), (TEAL, "^"), (PINK, "v"), (MUSTARD, "s"), (BLUE, "P")),
        *((GREY, "s"), (TEAL, "X"), (PINK, "X")),
    )
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
            training_seconds(row, times[family, row["size"], row["tuned"]["chosen"]["components"]]["step_ms"])
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

"""What ``density.py`` has measured, as tables and a picture: density.md and density.png."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

from density_flows import DIGITS, DIGITS_FLOWS, GAUSSIAN, GRID, PLANE_FLOWS
from lunet_fast.density.targets import TARGETS
from lunet_fast.training.figures import new_figure, plain
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
        "| flow | numbers | bits/dim, test | base of | a step, ms | trained, s | "
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
        ours = row["family"] == "LU-Net"
        bold = "**" if ours else ""
        name = f"{row['family']}, {row['size']}" if row["family"] != GAUSSIAN else row["family"]
        cells = [
            f"{bold}{name}{bold}",
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
        "| flow | numbers | base of | a training step, ms | 256 samples, ms | kept for backward, MB |",
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
    rows = rows_of("plane", folder)
    names = list(TARGETS)
    lines = ["| flow | numbers | " + " | ".join(names) + " | mean |", "|---" * (len(names) + 3) + "|"]
    for size in ("S", "M", "L"):
        for family in PLANE_FLOWS:
            found = {row["target"]: row for row in rows if (row["family"], row["size"]) == (family, size)}
            if not found:
                continue
            numbers = sorted({row["parameters"] for row in found.values()})
            cells = [f"{found[name]['kl']:.3f}" if name in found else "" for name in names]
            mean = statistics.fmean(row["kl"] for row in found.values())
            cells.append(f"{mean:.3f}" if len(found) == len(names) else "")
            span = f"{numbers[0]:,}" if len(numbers) == 1 else f"{numbers[0]:,}–{numbers[-1]:,}"
            bold = "**" if family == "LU-Net" else ""
            lines.append(f"| {bold}{family}, {size}{bold} | {span} | " + " | ".join(cells) + " |")
    return lines


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
        "## Points of the plane: KL(truth ‖ flow), nats",
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
    figure = new_figure(9.0, 4.0)
    left, right = figure.subplots(1, 2, sharey=True)
    times = _step_times(folder)
    colours = dict(
        zip(
            DIGITS_FLOWS,
            ("#d1662b", "#e0a080", "#888888", "#1f5f99", "#4c9a5b", "#8d5aa8", "#b8972c"),
            strict=True,
        )
    )
    for family, colour in colours.items():
        rows = sorted(
            (row for row in rows_of("digits", folder) if row["family"] == family),
            key=lambda r: r["parameters"],
        )
        if not rows:
            continue
        errors = [row["test_std"] / math.sqrt(len(row["runs"])) for row in rows]
        tests = [row["test"] for row in rows]
        style: dict[str, Any] = {
            "color": colour,
            "marker": "o",
            "markersize": 4,
            "capsize": 2,
            "label": family,
        }
        left.errorbar([row["parameters"] for row in rows], tests, errors, **style)
        spent = [
            statistics.fmean(len(run["curve"]) for run in row["runs"])
            * DIGITS.round_steps
            * times[(family, row["size"], row["tuned"]["chosen"]["components"])]["step_ms"]
            / 1e3
            for row in rows
        ]
        right.errorbar(spent, tests, errors, **style)
    for axes, label in ((left, "numbers learnt"), (right, "seconds of training, one core")):
        axes.set_xscale("log")
        axes.set_xlabel(label)
        plain(axes)
    left.set_ylabel("digits: bits a dimension, test")
    right.legend(frameon=False, fontsize=8)
    write_figure(folder / "density.png", figure)

"""Pictures of a suite's results."""

from __future__ import annotations

import itertools
import math
import sys
from pathlib import Path
from typing import Any

from lunet_fast.bench import claims
from lunet_fast.bench.contest import OURS, Row, Spec
from lunet_fast.bench.results import Result
from lunet_fast.training.figures import (
    BLUE,
    DIVERGING,
    GREY,
    INK,
    MUSTARD,
    ORANGE,
    PINK,
    TEAL,
    label_ends,
    new_figure,
    plain,
)
from lunet_fast.training.files import write_figure

CURVES = {
    OURS: BLUE,
    "torch.linalg.solve": ORANGE,
    "dense, torch.linalg.inv": TEAL,
    "torch.linalg.slogdet": MUSTARD,
    "its own forward": PINK,
}
"""Colours of the claims' contenders; others are grey."""

FULL = 30.0
"""The colours of ratios end at so many times slower or faster."""


def draw(result: Result, path: Path) -> Path:
    """Write the suite's picture as PNG, whole or not at all.

    ``claims``: seconds over D on two logarithmic axes, a panel an operation, with the fitted exponents.
    Others: the contenders' times as multiples of ours, a cell a contest.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    write_figure(path, _curves(result) if result.suite == claims.SUITE else _ratios(result))
    return path


def _curves(result: Result) -> Any:
    curves: dict[tuple[str, int], dict[str, list[Row]]] = {}
    for row in result.rows:
        curves.setdefault((row.what, row.rows), {}).setdefault(row.contender, []).append(row)
    slopes = {key[:3]: key[3] for key in claims.time_slopes(result.rows)}
    columns = min(2, len(curves))
    lines = math.ceil(len(curves) / columns)
    figure = new_figure(5.2 * columns, 3.0 * lines + 0.4)
    axes = figure.subplots(lines, columns, squeeze=False)
    for axis in axes.flat[len(curves) :]:
        axis.set_visible(False)
    ends = []
    for axis, ((what, batch), contenders) in zip(axes.flat, curves.items(), strict=False):
        labels = []
        for name, rows in contenders.items():
            slope = slopes.get((what, batch, name))
            colour = CURVES.get(name, GREY)
            sizes = [row.features for row in rows]
            times = [row.median for row in rows]
            low, high = ([row.quartiles[i] for row in rows] for i in (0, 1))
            width = 2.2 if name == OURS else 1.3
            axis.plot(sizes, times, "o-", color=colour, markersize=3.5, linewidth=width)
            axis.fill_between(sizes, low, high, color=colour, alpha=0.2, linewidth=0)
            told = name.removeprefix("dense, ") + ("" if slope is None else f"\nD^{slope}")
            labels.append((float(sizes[-1]), times[-1], told, colour))
        largest = max(row.features for rows in contenders.values() for row in rows)
        smallest = min(row.features for rows in contenders.values() for row in rows)
        axis.set(xscale="log", yscale="log", xlabel="D")
        # As much again at the right, for the labels.
        axis.set_xlim(smallest * 0.8, largest * (largest / smallest) ** 0.55)
        axis.axvspan(axis.get_xlim()[0], claims.FIT_FROM * 0.93, color=GREY, alpha=0.1, linewidth=0)
        axis.set_title(f"{what}, B = {batch}", loc="left", fontsize=10)
        ticks = [D for D in (16, 64, 256, 1024) if smallest <= D <= largest]
        axis.set_xticks(ticks, labels=[str(D) for D in ticks])
        axis.xaxis.minorticks_off()
        plain(axis)
        ends.append((axis, labels))
    for axis in axes[:, 0]:
        axis.set_ylabel("seconds a call")
    figure.suptitle(
        "Cost over D: medians with quartiles; exponents ± their 95 % bands are fitted right of the grey",
        fontsize=10,
    )
    figure.draw_without_rendering()
    for axis, labels in ends:
        label_ends(axis, labels, lines=2)
    return figure


def _ratios(result: Result) -> Any:
    """A heat map an operation: contenders down, contests across."""
    from matplotlib import colormaps
    from matplotlib.colors import LogNorm

    groups = {spec: rows for spec, rows in result.groups().items() if len(rows) > 1}
    panels: dict[str, list[Spec]] = {}
    for spec in groups:
        panels.setdefault(spec.what, []).append(spec)
    names = {
        what: list(dict.fromkeys(row.contender for spec in specs for row in groups[spec] if not row.ours))
        for what, specs in panels.items()
    }
    heights = [len(names[what]) for what in panels]
    most = max(map(len, panels.values()))
    headlines = 1 + any(spec.detail for spec in groups)
    height = 0.22 * sum(heights) + (0.6 + 0.15 * headlines) * len(panels) + 0.5
    figure = new_figure(max(2.6 + 0.44 * most, 6.6), height)
    axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
    # Grey where a contender did not take part.
    colours = colormaps[DIVERGING].with_extremes(bad="#e5e7eb")
    norm = LogNorm(1 / FULL, FULL, clip=True)
    for axis, (what, specs) in zip(axes, panels.items(), strict=True):
        ratios = [
            [next((r.ratio for r in groups[spec] if r.contender == name), math.nan) for spec in specs]
            for name in names[what]
        ]
        axis.imshow(ratios, cmap=colours, norm=norm, aspect="auto")
        for y, line in enumerate(ratios):
            for x, ratio in enumerate(line):
                if not math.isnan(ratio):
                    pale = abs(math.log(ratio)) < 0.6 * math.log(FULL)
                    style = {"ha": "center", "va": "center", "fontsize": 7}
                    axis.text(x, y, _times(ratio), color=INK if pale else "white", **style)
        axis.set_yticks(range(len(names[what])))
        axis.set_yticklabels(names[what], fontsize=8, parse_math=False)
        axis.set_xlim(-0.5, most - 0.5)
        axis.set_xticks(range(len(specs)), labels=[_short(spec.rows) for spec in specs], fontsize=7)
        _head(axis, specs)
        axis.set_title(what, loc="left", fontsize=10, fontweight="bold", pad=4 + 12 * headlines)
        axis.tick_params(length=0)
        for side in axis.spines.values():
            side.set_visible(False)
    ours = next(row.contender for row in result.rows if row.ours)
    figure.suptitle(
        f"Time as a multiple of {ours}'s, medians. \nPurple, above 1: {ours} is faster; orange: slower; "
        "grey: not run. Below each column the batch B.",
        fontsize=9,
    )
    return figure


def _head(axis: Any, specs: list[Spec]) -> None:
    """The sizes above their columns, with lines between them."""
    starts = [0, *(n for n in range(1, len(specs)) if _size(specs[n]) != _size(specs[n - 1])), len(specs)]
    for first, after in itertools.pairwise(starts):
        axis.text((first + after - 1) / 2, -0.62, _size(specs[first]), ha="center", va="bottom", fontsize=8)
        if first:
            axis.axvline(first - 0.5, color="white", linewidth=3)


def _size(spec: Spec) -> str:
    return "\n".join(filter(None, (spec.detail, f"D {spec.features}")))


def _short(rows: int) -> str:
    return f"{rows}" if rows < 1024 else f"{rows // 1024}k" if rows % 1024 == 0 else f"{rows:,}"


def _times(ratio: float) -> str:
    return f"{ratio:.2f}" if ratio < 0.995 else f"{ratio:.1f}" if ratio < 9.95 else f"{ratio:,.0f}"


if __name__ == "__main__":
    # python -m lunet_fast.bench.plots benchmarks/results/*-cpu.json: drawn again from what was kept.
    for file in map(Path, sys.argv[1:]):
        draw(Result.load(file), file.with_suffix(".png"))

"""Pictures of a suite's results."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from lunet_fast.bench import claims
from lunet_fast.bench.contest import OURS, Row, Spec
from lunet_fast.bench.results import Result
from lunet_fast.training.files import write_atomically


def draw(result: Result, path: Path) -> Path:
    """Write the suite's picture as PNG, whole or not at all.

    ``claims``: time over D on two logarithmic axes, a panel an operation, with the fitted exponents. Others:
    for each contest the contenders' time as a multiple of ours.
    """
    import matplotlib

    matplotlib.use("Agg")
    figure = _curves(result) if result.suite == claims.SUITE else _ratios(result)
    write_atomically(path, lambda file: figure.savefig(file, dpi=120, format="png", bbox_inches="tight"))
    import matplotlib.pyplot as plt

    plt.close(figure)
    return path


def _colours(names: list[str]) -> dict[str, Any]:
    """One colour a contender, ours the strongest."""
    import matplotlib.pyplot as plt

    # nflows' layer is nflows' layer, with an activation or without.
    others = list(dict.fromkeys(_base(name) for name in names if not name.startswith("LU")))
    palette = plt.get_cmap("tab20")
    order = [*range(2, 20, 2), *range(1, 20, 2)]
    return {
        name: palette(0 if name.startswith("LU") else order[others.index(_base(name)) % len(order)])
        for name in names
    }


def _base(name: str) -> str:
    return name.removesuffix(" + softplus")


def _curves(result: Result) -> Any:
    import matplotlib.pyplot as plt

    curves: dict[tuple[str, int], dict[str, list[Row]]] = {}
    for row in result.rows:
        curves.setdefault((row.what, row.rows), {}).setdefault(row.contender, []).append(row)
    slopes = {key[:3]: key[3] for key in claims.time_slopes(result.rows)}
    names = list(dict.fromkeys(row.contender for row in result.rows))
    colours = _colours(names)
    columns = min(3, len(curves))
    lines = math.ceil(len(curves) / columns)
    figure, axes = plt.subplots(lines, columns, figsize=(4.6 * columns, 3.9 * lines), squeeze=False)
    for axis in axes.flat[len(curves) :]:
        axis.set_visible(False)
    for axis, ((what, batch), contenders) in zip(axes.flat, curves.items(), strict=False):
        for name, rows in contenders.items():
            slope = slopes.get((what, batch, name))
            label = name if slope is None else f"{name}  ∝ D^{slope}"
            sizes = [row.features for row in rows]
            axis.plot(
                sizes,
                [row.median for row in rows],
                "o-",
                color=colours[name],
                label=label,
                markersize=3.5,
                linewidth=1.8 if name == OURS else 1.1,
            )
            low, high = ([row.quartiles[i] for row in rows] for i in (0, 1))
            axis.fill_between(sizes, low, high, color=colours[name], alpha=0.2, linewidth=0)
        axis.axvspan(axis.get_xlim()[0], claims.FIT_FROM * 0.93, color="0.5", alpha=0.08, linewidth=0)
        axis.set(xscale="log", yscale="log", xlabel="D", title=f"{what}, B = {batch}")
        axis.set_xticks([16, 64, 256, 1024], labels=["16", "64", "256", "1024"])
        axis.xaxis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7.5, loc="upper left")
    for axis in axes[:, 0]:
        axis.set_ylabel("seconds a call")
    figure.suptitle(
        "Cost over D; exponents are fitted right of the shaded part, with their 95 % bands", fontsize=11
    )
    figure.tight_layout()
    return figure


def _ratios(result: Result) -> Any:
    import matplotlib.pyplot as plt
    from matplotlib.lines import Line2D

    groups: dict[Spec, list[Row]] = {spec: rows for spec, rows in result.groups().items() if len(rows) > 1}
    names = list(dict.fromkeys(row.contender for row in result.rows if not row.ours))
    colours = _colours(names)
    kinds = list(
        dict.fromkeys(
            (spec.what, spec.detail) if result.suite != "layers" else (spec.what, "") for spec in groups
        )
    )
    columns = min(3, len(kinds))
    lines = math.ceil(len(kinds) / columns)
    tallest = max(
        sum((s.what, s.detail if result.suite != "layers" else "") == kind for s in groups) for kind in kinds
    )
    figure, axes = plt.subplots(
        lines, columns, figsize=(5.4 * columns, (0.42 * tallest + 1.3) * lines), squeeze=False
    )
    for axis in axes.flat[len(kinds) :]:
        axis.set_visible(False)
    for axis, kind in zip(axes.flat, kinds, strict=False):
        chosen = [s for s in groups if (s.what, s.detail if result.suite != "layers" else "") == kind]
        for place, spec in enumerate(chosen):
            for row in groups[spec]:
                if not row.ours:
                    axis.plot(row.ratio, place, "o", color=colours[row.contender], markersize=5)
                    axis.plot(row.ratio_quartiles, [place, place], color=colours[row.contender], linewidth=1)
        axis.axvline(1.0, color="C0", linewidth=1.5)
        axis.set(xscale="log", title=", ".join(filter(None, kind)))
        axis.set_yticks(
            range(len(chosen)), labels=[f"D {s.features}, B {s.rows}" for s in chosen], fontsize=8
        )
        axis.set_ylim(len(chosen) - 0.5, -0.5)
        axis.grid(alpha=0.3, which="both", axis="x")
    handles = [Line2D([], [], marker="o", linestyle="", color=colours[name], label=name) for name in names]
    figure.legend(
        handles=handles, loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=3, fontsize=8, frameon=False
    )
    ours = next(row.contender for row in result.rows if row.ours)
    figure.suptitle(f"Time as a multiple of {ours}'s: right of the line, {ours} is faster", fontsize=11)
    figure.tight_layout()
    return figure

"""How all figures look, and that of a training's losses. matplotlib is imported on use."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lunet_fast.training.files import write_figure

BLUE, ORANGE, TEAL, PINK, MUSTARD = "#1f5f99", "#d1662b", "#159a80", "#b85c9a", "#a8861d"
"""Colours of curves, told apart by the colour-blind; ours is BLUE."""

GREY, INK, GRID = "#6b7280", "#1c2128", "#dddddd"
"""What stands back, text, and lines behind the data."""

DIVERGING = "PuOr"
"""Colour map of what may be less or more than something: orange is less, purple more."""


def new_figure(width: float, height: float, dpi: int = 150) -> Any:
    """A figure of matplotlib, in inches, that needs no display; :func:`~.files.write_figure` writes it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=dpi, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def plain(axes: Any, *, grid: str = "both") -> None:
    """No frame above and right, and a light grid behind the data: ``x``, ``y`` or ``both``."""
    axes.grid(axis=grid, color=GRID)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def apart(wanted: Sequence[float], least: float, lowest: float, highest: float) -> list[float]:
    """The places nearest to ``wanted``, ``least`` apart, in the same order, from ``lowest`` to ``highest``.

    Where there is no room for all, the last ones lie below ``lowest``.
    """
    order = sorted(range(len(wanted)), key=lambda n: wanted[n])
    placed = [0.0] * len(wanted)
    floor = lowest
    for n in order:
        placed[n] = max(wanted[n], floor)
        floor = placed[n] + least
    ceiling = highest
    for n in reversed(order):
        placed[n] = min(placed[n], ceiling)
        ceiling = placed[n] - least
    return placed


def label_ends(
    axes: Any, labels: Sequence[tuple[float, float, str, str]], size: float = 8.0, lines: int = 1
) -> None:
    """Write (x, y, text, colour) to the right of each point, moved up or down so that none covers another.

    Texts have up to ``lines`` lines. The figure must have been drawn once, limits and scales set; a label
    that moved has a thin line to its point.
    """
    figure = axes.figure
    to_share = (axes.transData + axes.transAxes.inverted()).transform
    places = [to_share((x, y)) for x, y, *_ in labels]
    # The height of a text, as a share of the axes.
    line = 1.25 * lines * size / 72 * figure.dpi / axes.get_window_extent().height
    line_to = {"arrowstyle": "-", "linewidth": 0.7, "shrinkA": 1, "shrinkB": 3, "relpos": (0, 0.5)}
    heights = apart([y for _, y in places], line, line / 2, 1 - line / 2)
    for (x, y, text, colour), (across, up), height in zip(labels, places, heights, strict=True):
        moved = abs(height - up) > line / 2
        axes.annotate(
            text,
            (x, y),
            xytext=(across + 0.025 + 0.03 * moved, height),
            textcoords="axes fraction",
            va="center",
            fontsize=size,
            color=colour,
            parse_math=False,
            annotation_clip=False,
            arrowprops={**line_to, "color": colour} if moved else None,
        )


def save_loss_figure(
    path: Path,
    title: str,
    train: Sequence[float],
    test: Sequence[float],
    ylabel: str = "mean squared error",
    *,
    held_out: str = "test",
    unit: str = "epoch",
) -> None:
    """Draw training and test loss by epoch, as figures 3 and 4 of the paper, into a PNG file.

    ``train`` and ``test`` have a number an epoch, of what ``ylabel`` says; ``test`` may be empty.
    ``held_out`` and ``unit`` are what the test part and an epoch are called. Needs matplotlib, of the extra
    ``lunet-fast[train]``; no display.
    """
    from matplotlib.ticker import MaxNLocator

    figure = new_figure(6.4, 4.0)
    axes = figure.add_subplot()
    epochs = range(1, len(train) + 1)
    # Few epochs are told apart by markers, which would run into each other for many.
    style: dict[str, Any] = {"linewidth": 2, "marker": "o" if len(train) <= 25 else "", "markersize": 4}
    for label, values, colour in (("training", train, BLUE), (held_out, test, ORANGE)):
        if values:
            axes.plot(epochs, values, color=colour, label=label, **style)
            # Above the upper curve's end and below the lower one's, so that near ends keep apart.
            upper = values[-1] >= max(train[-1], test[-1] if test else train[-1])
            axes.annotate(
                f"{values[-1]:.3f}",
                (len(values), values[-1]),
                xytext=(6, 0),
                textcoords="offset points",
                va="bottom" if upper else "top",
                color=colour,
            )
    axes.set_title(title, loc="left", fontsize=12)
    axes.set_xlabel(unit)
    axes.set_ylabel(ylabel)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
    axes.margins(x=0.06)
    plain(axes, grid="y")
    axes.legend(frameon=False)
    write_figure(path, figure)

"""Figures as PNG files: how they look, and the losses of a training. matplotlib is imported on use."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lunet_fast.training.files import write_figure


def new_figure(width: float, height: float, dpi: int = 150) -> Any:
    """A figure of matplotlib, in inches, that needs no display; :func:`~.files.write_figure` writes it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=dpi, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def plain(axes: Any, *, grid: str = "both") -> None:
    """No frame above and right, and a light grid behind the data: ``x``, ``y`` or ``both``."""
    axes.grid(axis=grid, color="#dddddd")
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


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
    for label, values, colour in (("training", train, "#1f5f99"), (held_out, test, "#d1662b")):
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

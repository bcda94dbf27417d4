"""The table and the figure of a single training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lunet_fast.training.files import write_figure

TABLE_2 = (
    ("paper: classic MLP", "ML-100K", 0.9200, 0.0050),
    ("paper: invertible model", "ML-100K", 0.8880, 0.0000),
    ("paper: invertible model", "ML-1M", 0.7955, 0.0000),
)
"""The paper's table 2: model, data, test MSE, embedding reconstruction error."""

_TITLES = {"ml-100k": "ML-100K", "ml-1m": "ML-1M"}


def dataset_title(name: str) -> str:
    """A data set's name as the literature writes it."""
    return _TITLES.get(name, name)


def table_2(values: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """Rows (model, data, test MSE, reconstruction error): the paper's table 2, then the run's own figures.

    ``values`` is the content of ``metrics.json``. Our errors are far below the four decimals of the paper, so
    theirs are written as printed and ours with an exponent.
    """
    rows = [(model, data, f"{mse:.4f}", f"{error:.4f}") for model, data, mse, error in TABLE_2]
    data = dataset_title(str(values["dataset"]))
    if "mlp_test_mse" in values:
        error = f"{values['mlp_reconstruction_error']:.4f}"
        rows.append(("ours: classic MLP", data, f"{values['mlp_test_mse']:.4f}", error))
    if "test_mse" in values:
        error = f"{values['reconstruction_error']:.1e}"
        rows.append((f"ours: LU-Net, recipe {values['recipe']}", data, f"{values['test_mse']:.4f}", error))
    return rows


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
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(6.4, 4.0), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
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
    axes.grid(axis="y", color="#dddddd")
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.legend(frameon=False)
    write_figure(path, figure)

"""Pictures of what a flow has learnt, as PNG files. matplotlib, of the extra ``lunet-fast[train]``."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lunet_fast.density.data import Rows
from lunet_fast.density.evaluation import grid
from lunet_fast.density.model import DensityModel
from lunet_fast.density.targets import Target
from lunet_fast.layers.splines import MonotoneSpline
from lunet_fast.training.figures import BLUE, new_figure, plain
from lunet_fast.training.files import write_figure

SIDE = 8
"""Pictures a side of a sheet of samples, and pictures from one end of an interpolation to the other."""


def save_heat_maps(path: Path, model: DensityModel, target: Target) -> None:
    """The true 2-D density and the learnt one beside it, in one colour scale."""
    # An even number of points a side: none lies on an edge of the checkerboard.
    points, _ = grid(target.extent, 300)
    both = {"truth": target.log_prob(points), "learnt": model.log_prob(points.float())}
    figure = new_figure(8.0, 4.2)
    highest = float(both["truth"].exp().max())
    for place, (title, log_prob) in enumerate(both.items(), start=1):
        axes = figure.add_subplot(1, 2, place)
        image = show_density(axes, log_prob, target.extent, highest)
        axes.set_title(f"{target.name}: {title}", loc="left", fontsize=11)
    figure.colorbar(image, ax=figure.axes, label="density", shrink=0.85)
    write_figure(path, figure)


def show_density(axes: Any, log_prob: Tensor, extent: float, highest: float) -> Any:
    """Draw exp(log_prob) [n²] at the points of ``evaluation.grid``; ``highest`` ends the colour scale."""
    side = math.isqrt(len(log_prob))
    # The first coordinate is the slowest of the grid, and across.
    density = log_prob.double().exp().reshape(side, side).T
    return axes.imshow(
        density.numpy(), origin="lower", extent=(-extent, extent) * 2, vmin=0, vmax=highest, cmap="magma"
    )


def show_slopes(axes: Any, spline: MonotoneSpline) -> None:
    """Draw each coordinate's φ′, a line each, over its interval, whose ends are 0 and 1, and beyond."""
    place = torch.linspace(-0.15, 1.15, 261)
    low, bin_width = spline.grid.detach().cpu().float()
    with torch.no_grad():
        x = low + place[:, None] * (bin_width * spline.bins)
        slopes = spline.log_derivative(x.to(spline.raw)).exp().cpu()
    axes.plot(place, slopes, color=BLUE, alpha=0.3, linewidth=0.7)
    axes.set(yscale="log", xlim=(-0.15, 1.15), xticks=(0, 1))
    axes.set_yticks((0.2, 0.5, 1, 2, 5), labels=("0.2", "0.5", "1", "2", "5"))
    axes.minorticks_off()
    plain(axes)


def save_samples(path: Path, samples: Tensor, data: Tensor, size: tuple[int, int], levels: int) -> None:
    """A sheet of samples [64, H·W] beside one of data: pictures of ``size`` with that many greys."""
    figure = new_figure(8.0, 4.4)
    for place, (title, rows) in enumerate((("data", data), ("samples", samples)), start=1):
        axes = figure.add_subplot(1, 2, place)
        show_sheet(axes, rows[: SIDE * SIDE], size, levels)
        axes.set_title(title, loc="left", fontsize=11)
    write_figure(path, figure)


def save_sheet(path: Path, samples: Tensor, size: tuple[int, int], levels: int) -> None:
    """A sheet of samples alone, the first 64."""
    figure = new_figure(4.2, 4.2)
    show_sheet(figure.add_subplot(), samples[: SIDE * SIDE], size, levels)
    write_figure(path, figure)


def save_interpolation(path: Path, model: DensityModel, rows: Rows) -> None:
    """The pictures of :func:`interpolation`, one from one data row to another in each line."""
    image = rows.image
    assert image is not None
    assert model.preprocessing.levels is not None
    figure = new_figure(4.2, 4.4)
    axes = figure.add_subplot()
    show_sheet(axes, interpolation(model, rows).flatten(0, 1), image, model.preprocessing.levels)
    axes.set_title("between two rows of data", loc="left", fontsize=11)
    write_figure(path, figure)


def interpolation(model: DensityModel, rows: Rows) -> Tensor:
    """[L, SIDE, D]: from one data row to another along a straight line between their latents.

    Both ends are data, dequantised; of a conditional flow, those of the first label of all. L is SIDE, or
    less where there are fewer pairs of rows.
    """
    generator = torch.Generator().manual_seed(0)
    context = None
    if model.shares is not None and rows.labels is not None:
        rows = rows.where(rows.labels == rows.labels[0])
        context = torch.full((SIDE, 1), int(rows.labels[0])) if rows.labels is not None else None
    lines = min(SIDE, len(rows) // 2)  # an odd row has no other end
    ends = rows.values[torch.randperm(len(rows), generator=generator)[: 2 * lines]]
    with torch.no_grad():
        y = model.preprocessing.forward(ends, generator)[0].unflatten(0, (-1, 2))
        transform = model.flow.as_transform(None if context is None else context[: len(y)])
        z = transform(y)
        share = torch.linspace(0, 1, SIDE).unsqueeze(-1)
        between = z[:, :1] + share * (z[:, 1:] - z[:, :1])
        return model.preprocessing.inverse(transform.inv(between))


def show_sheet(axes: Any, rows: Tensor, size: tuple[int, int], levels: int, lines: int = SIDE) -> None:
    """Draw ``lines`` lines of SIDE pictures: ``rows`` [n, H·W], n at most lines·SIDE."""
    height, width = size
    sheet = torch.zeros(lines * (height + 1) + 1, SIDE * (width + 1) + 1)
    for index, row in enumerate(rows):
        top, left = (index // SIDE) * (height + 1) + 1, (index % SIDE) * (width + 1) + 1
        sheet[top : top + height, left : left + width] = row.reshape(size)
    axes.imshow(sheet.numpy(), cmap="gray_r", vmin=0, vmax=levels - 1, interpolation="nearest")
    axes.set_axis_off()

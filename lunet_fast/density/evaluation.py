"""What a learnt density is worth: likelihood, distance from the truth, samples beside data, outliers."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lunet_fast.density.data import Parts, Rows
from lunet_fast.density.model import DensityModel
from lunet_fast.density.targets import Target

TEST_DRAWS = 10
"""Draws of the noise of dequantisation in a final loss."""

TRUTH_ROWS = 50_000
"""Draws of a known density that its Kullback–Leibler divergence is measured on."""

GRID = 401
"""Points a side of the grid that a density on the plane is integrated on."""


def evaluate(model: DensityModel, parts: Parts) -> dict[str, Any]:
    """All figures of a model, flat, for ``metrics.json``.

    ``train_loss``, ``validation_loss``, ``test_loss``: mean −log p in the unit of the preprocessing, with
    ``test_loss_error`` its standard error over the test rows. Where the truth is known, ``kl`` and
    ``kl_error`` (:func:`divergence`) and ``integral`` (:func:`integral`). With labels in a conditional flow,
    ``test_accuracy`` of the most probable class. ``sample_distance`` of as many samples as test rows, and
    ``data_distance`` of two halves of the data for comparison (:func:`sliced_distance`).
    """
    values: dict[str, Any] = {}
    for name, rows in (("train", parts.training), ("validation", parts.validation), ("test", parts.test)):
        loss = model.loss(rows.values, TEST_DRAWS)
        values[f"{name}_loss"] = float(loss.double().mean())
        if name == "test":
            values["test_loss_error"] = float(loss.double().std()) / math.sqrt(len(loss))
    target = parts.training.target
    if target is not None:
        values["kl"], values["kl_error"] = divergence(model, target)
        values["integral"] = integral(model, target)
    if model.shares is not None and parts.test.labels is not None:
        values["test_accuracy"] = accuracy(model, parts.test)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        samples = model.sample(len(parts.test))
    values["sample_distance"] = sliced_distance(samples, parts.test.values)
    values["data_distance"] = sliced_distance(parts.training.values[: len(parts.test)], parts.test.values)
    return values


def divergence(
    model: DensityModel, target: Target, rows: int = TRUTH_ROWS, seed: int = 1
) -> tuple[float, float]:
    """(KL(truth ‖ model) in nats, its standard error): the mean of log p − log q over draws of the truth."""
    x = target.sample(rows, torch.Generator().manual_seed(seed))
    ratio = target.log_prob(x) - model.log_prob(x.float()).double()
    return float(ratio.mean()), float(ratio.std()) / math.sqrt(rows)


def integral(model: DensityModel, target: Target) -> float:
    """The model's density summed over a grid that holds the target's mass threefold on each side: near 1."""
    points, area = grid(3.0 * target.extent)
    return float(model.log_prob(points.float()).double().exp().sum()) * area


def grid(extent: float, side: int = GRID) -> tuple[Tensor, float]:
    """(points [side², 2] of [−extent, extent]², the first coordinate slowest; the area of a cell)."""
    line = torch.linspace(-extent, extent, side, dtype=torch.float64)
    return torch.cartesian_prod(line, line), float(line[1] - line[0]) ** 2


def accuracy(model: DensityModel, rows: Rows) -> float:
    """Share of rows whose label a conditional flow finds most probable."""
    assert rows.labels is not None
    with torch.no_grad():
        y = model.preprocessing.forward(rows.values, torch.Generator().manual_seed(0))[0]
        return float((model.class_log_prob(y).argmax(-1) == rows.labels).double().mean())


def sliced_distance(a: Tensor, b: Tensor, directions: int = 256) -> float:
    """Wasserstein's distance of order 1 between two sets of N rows, averaged over directions of the space.

    Each coordinate in units of its standard deviation in ``b``, or of a tenth of the mean one where that is
    more, as in the margins of pictures. The directions are the same at each call.
    """
    scale = b.double().std(0)
    scale = torch.maximum(scale, 0.1 * scale.mean()).clamp_min(torch.finfo(torch.float64).tiny)
    generator = torch.Generator().manual_seed(0)
    along = torch.randn(b.shape[1], directions, generator=generator, dtype=torch.float64)
    along = along / along.norm(dim=0) / scale.unsqueeze(-1)
    count = min(len(a), len(b))
    first, second = ((t[:count].double() @ along).sort(0).values for t in (a, b))
    return float((first - second).abs().mean())


def auroc(inside: Tensor, outside: Tensor) -> float:
    """Probability that a row from inside [N] scores higher than one from outside [M]; ties count half."""
    scores = torch.cat([inside, outside]).double()
    values, place, count = scores.unique(return_inverse=True, return_counts=True)
    last = count.cumsum(0).double()
    rank = (last - (count.double() - 1) / 2)[place]
    n, m = len(inside), len(outside)
    return float((rank[:n].sum() - n * (n + 1) / 2) / (n * m))

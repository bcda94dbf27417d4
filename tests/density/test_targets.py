"""Known densities: they integrate to one, samples follow them, the curves by another quadrature."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import integrate

from lunet_fast.density.evaluation import grid
from lunet_fast.density.targets import TARGETS, Moons, Ring, Spirals


@pytest.mark.parametrize("name", TARGETS)
def test_integrates_to_one_inside_its_extent(name: str) -> None:
    target = TARGETS[name]()
    points, area = grid(target.extent, 241)
    # The checkerboard's jumps lie on the grid's lines, half a cell off on each side.
    tolerance = 0.03 if name == "checkerboard" else 1e-5
    assert float(target.log_prob(points).exp().sum()) * area == pytest.approx(1.0, abs=tolerance)


@pytest.mark.parametrize("name", TARGETS)
def test_samples_follow_the_density(name: str) -> None:
    """Counts in 12 x 12 boxes beside the density's integral over them: chi squared."""
    target = TARGETS[name]()
    drawn = target.sample(20_000, torch.Generator().manual_seed(0))
    assert drawn.shape == (20_000, 2)
    assert float(drawn.abs().max()) < target.extent + 1e-9
    side, fine = 12, 20
    width = 2 * target.extent / side
    line = -target.extent + (torch.arange(side * fine, dtype=torch.float64) + 0.5) * width / fine
    density = target.log_prob(torch.cartesian_prod(line, line)).exp().reshape(side, fine, side, fine)
    expected = density.mean((1, 3)).flatten() * width**2 * len(drawn)
    place = ((drawn + target.extent) / width).long()
    counts = torch.bincount(place[:, 0] * side + place[:, 1], minlength=side**2).double()
    often = expected > 5
    chi = float(((counts - expected)[often].square() / expected[often]).sum())
    freedom = int(often.sum())
    assert chi < freedom + 5 * math.sqrt(2 * freedom) + (40 if name == "checkerboard" else 0)
    assert float(counts[~often].sum()) <= float(expected[~often].sum()) + 5 * math.sqrt(5 * 144)


@pytest.mark.parametrize("make", [Moons, Spirals])
def test_curves_by_another_quadrature(make: type[Moons]) -> None:
    target = make()
    for point in torch.tensor([[0.3, 0.2], [1.0, -0.7], [-1.4, 0.5]], dtype=torch.float64):

        def noise(t: float, arm: int, point: torch.Tensor = point) -> float:
            square = float((point - target.point(torch.tensor(t, dtype=torch.float64), arm)).square().sum())
            return math.exp(-0.5 * square / 0.01) / (2 * math.pi * 0.01)

        exact = sum(
            integrate.quad(noise, 0, 1, args=(arm,), epsabs=0, epsrel=1e-11, limit=500)[0] for arm in (0, 1)
        )
        assert float(target.log_prob(point).exp()) == pytest.approx(exact / 2, rel=1e-8)


def test_ring_at_a_centre() -> None:
    """The nearest other centres are 1.53 away, 7.65 standard deviations."""
    at = Ring().log_prob(torch.tensor([2.0, 0.0]))
    assert float(at) == pytest.approx(math.log(1 / 8 / (2 * math.pi * 0.04)), abs=1e-9)


def test_seed_decides() -> None:
    first, again, other = (Moons().sample(5, torch.Generator().manual_seed(seed)) for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)

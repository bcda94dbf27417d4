"""Densities on the plane that are known exactly: what a flow has learnt can be set beside the truth."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import numpy as np
import torch
from torch import Tensor


class Target(ABC):
    """A density on ℝ². ``log_prob`` takes [..., 2] and is computed in float64; −∞ where there is none."""

    name: str
    extent: float
    """Nearly all of the mass, 1 − 10⁻⁶ and more, lies in [−extent, extent]²."""

    @abstractmethod
    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x) [...], float64."""

    @abstractmethod
    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """n independent draws [n, 2], float64."""


class _Mixture(Target):
    """Round Gaussians of one width, weighted, about points of the plane."""

    def __init__(self, centres: Tensor, weights: Tensor, width: float) -> None:
        self.centres, self.log_weights, self.width = centres, weights.log(), width

    def log_prob(self, x: Tensor) -> Tensor:
        # In pieces: there may be hundreds of centres and millions of points.
        return torch.cat([self._piece(part) for part in x.reshape(-1, 2).double().split(1 << 14)]).reshape(
            x.shape[:-1]
        )

    def _piece(self, x: Tensor) -> Tensor:
        square = (x.unsqueeze(-2) - self.centres).square().sum(-1)
        constant = math.log(2.0 * math.pi * self.width**2)
        return (self.log_weights - 0.5 * square / self.width**2).logsumexp(-1) - constant


class Ring(_Mixture):
    """Eight Gaussians of standard deviation 0.2 on a circle of radius 2."""

    name, extent = "ring", 3.5

    def __init__(self) -> None:
        angle = torch.arange(8, dtype=torch.float64) * (math.pi / 4)
        super().__init__(
            2.0 * torch.stack([angle.cos(), angle.sin()], -1), torch.full((8,), 1 / 8).double(), 0.2
        )

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        which = torch.randint(8, (n,), generator=generator)
        return self.centres[which] + self.width * _normal(n, generator)


class _Curve(_Mixture):
    """A point of one of two curves, at uniform parameter t in [0, 1], and Gaussian noise.

    The density is the integral over t of that of the noise, by Gauss and Legendre's rule with 240 nodes a
    curve: closer together than the noise is wide, so that the error is that of float64.
    """

    def __init__(self, width: float) -> None:
        nodes, weights = np.polynomial.legendre.leggauss(240)
        t = torch.from_numpy((nodes + 1) / 2)
        weight = torch.from_numpy(weights / 4)
        super().__init__(
            torch.cat([self.point(t, arm) for arm in (0, 1)]), torch.cat([weight, weight]), width
        )

    def point(self, t: Tensor, arm: int) -> Tensor:
        """The point [..., 2] at t [...] of curve 0 or 1."""
        raise NotImplementedError

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        t = torch.rand(n, generator=generator, dtype=torch.float64)
        arm = torch.randint(2, (n, 1), generator=generator)
        on_curve = torch.where(arm == 0, self.point(t, 0), self.point(t, 1))
        return on_curve + self.width * _normal(n, generator)


class Moons(_Curve):
    """Two half circles of radius 1 that reach into each other, noise 0.1: scikit-learn's, centred."""

    name, extent = "moons", 2.5

    def __init__(self) -> None:
        super().__init__(0.1)

    def point(self, t: Tensor, arm: int) -> Tensor:
        angle = math.pi * t
        if arm == 0:
            return torch.stack([angle.cos() - 0.5, angle.sin() - 0.25], -1)
        return torch.stack([0.5 - angle.cos(), 0.25 - angle.sin()], -1)


class Spirals(_Curve):
    """Two arms of Archimedes' spiral, a turn and a quarter from radius 0.3 to 2, noise 0.1."""

    name, extent = "spirals", 3.0

    def __init__(self) -> None:
        super().__init__(0.1)

    def point(self, t: Tensor, arm: int) -> Tensor:
        radius, angle = 0.3 + 1.7 * t, 2.5 * math.pi * t + math.pi * arm
        return torch.stack([radius * angle.cos(), radius * angle.sin()], -1)


class Checkerboard(Target):
    """Uniform on every second square of side 1 in [−2, 2]²: a density with jumps, which no flow has."""

    name, extent = "checkerboard", 2.5

    def log_prob(self, x: Tensor) -> Tensor:
        square = torch.floor(x.double())
        inside = (x.abs() <= 2.0).all(-1) & (square.sum(-1) % 2 == 0)
        return torch.where(inside, -math.log(8.0), -math.inf).double()

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        column = torch.randint(4, (n,), generator=generator)
        row = 2 * torch.randint(2, (n,), generator=generator) + column % 2
        corner = torch.stack([column, row], -1).double() - 2.0
        return corner + torch.rand(n, 2, generator=generator, dtype=torch.float64)


def _normal(n: int, generator: torch.Generator) -> Tensor:
    return torch.randn(n, 2, generator=generator, dtype=torch.float64)


TARGETS: dict[str, type[Target]] = {each.name: each for each in (Ring, Moons, Spirals, Checkerboard)}

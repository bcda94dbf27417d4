"""The layers written out with explicit matrices in float64: what the tests compare the library with.

Nothing here comes from the library. L = tril(lu, -1) + I, U = triu(lu, 1) + diag(sign * exp(diag(lu))),
(P A) = L U with (P A)[i] = A[permutation[i]], and phi(x) = a x + (c / kappa) softplus(kappa x).
Every function is differentiable by autograd, phi's inverse up to third derivatives.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Slopes = tuple[float, float, float] | Tensor


def softplus(x: Tensor) -> Tensor:
    # logaddexp has no threshold beyond which it is cut off, as F.softplus has.
    return torch.logaddexp(x, torch.zeros_like(x))


def phi(x: Tensor, slopes: Slopes) -> Tensor:
    a, c, kappa = slopes
    return a * x + (c / kappa) * softplus(kappa * x)


def phi_prime(x: Tensor, slopes: Slopes) -> Tensor:
    a, c, kappa = slopes
    return a + c * torch.sigmoid(kappa * x)


def phi_zero(slopes: Slopes | None) -> float:
    """phi(0), the absolute part of every error bound of phi."""
    return 0.0 if slopes is None else float(slopes[1]) * math.log(2.0) / float(slopes[2])


def phi_inverse(y: Tensor, slopes: Slopes) -> Tensor:
    """Bisection between phi's asymptotes, then two Newton steps that carry the derivatives."""
    with torch.no_grad():
        a, c, kappa = (torch.as_tensor(s, dtype=torch.float64) for s in slopes)
        target = y.double()
        shift = c * math.log(2.0) / kappa
        high = torch.minimum(target / a, target / (a + c))
        low = torch.minimum((target - shift) / a, (target - shift) / (a + c))
        low, high = low - 1e-15 * low.abs(), high + 1e-15 * high.abs()
        for _ in range(160):
            middle = 0.5 * (low + high)
            above = phi(middle, (a, c, kappa)) > target
            high, low = torch.where(above, middle, high), torch.where(above, low, middle)
        x = (0.5 * (low + high)).to(y.dtype)
    for _ in range(2):
        x = x - (phi(x, slopes) - y) / phi_prime(x, slopes)
    return x


def factors(lu: Tensor, sign: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """L [D, D] and U [D, D] of the packed lu [D, D]."""
    diagonal = torch.exp(torch.diagonal(lu))
    if sign is not None:
        diagonal = sign * diagonal
    lower = torch.tril(lu, -1) + torch.eye(lu.shape[0], dtype=lu.dtype)
    return lower, torch.triu(lu, 1) + torch.diag(diagonal)


def weight(lu: Tensor, sign: Tensor | None = None, permutation: Tensor | None = None) -> Tensor:
    lower, upper = factors(lu, sign)
    product = lower @ upper
    return product if permutation is None else product[torch.argsort(permutation)]


class Layer(NamedTuple):
    """The numbers of one layer, detached and in float64."""

    lu: Tensor
    bias: Tensor | None
    sign: Tensor | None
    permutation: Tensor | None
    slopes: Slopes | None


def read(layer: torch.nn.Module) -> Layer:
    """Read a LUDense."""
    slopes = None if layer.activation is None else layer.activation.slopes()
    if isinstance(slopes, Tensor):
        slopes = slopes.detach().double()
    return Layer(
        layer.lu.detach().double(),
        None if layer.bias is None else layer.bias.detach().double(),
        layer.sign.double(),
        layer.permutation,
        slopes,
    )


def pre_activation(x: Tensor, layer: Layer) -> Tensor:
    h = x @ weight(layer.lu, layer.sign, layer.permutation).T
    return h if layer.bias is None else h + layer.bias


def log_diagonal(layer: Layer) -> Tensor:
    return torch.diagonal(layer.lu).sum()


def forward(x: Tensor, layer: Layer) -> tuple[Tensor, Tensor]:
    """y and log|det dy/dx|, by the formulas of the paper."""
    h = pre_activation(x, layer)
    logabsdet = log_diagonal(layer).expand(x.shape[:-1])
    if layer.slopes is None:
        return h, logabsdet
    return phi(h, layer.slopes), logabsdet + torch.log(phi_prime(h, layer.slopes)).sum(-1)


def inverse(y: Tensor, layer: Layer) -> tuple[Tensor, Tensor]:
    """x and log|det dx/dy|, by a dense solve."""
    h = y if layer.slopes is None else phi_inverse(y, layer.slopes)
    logabsdet = -log_diagonal(layer).expand(y.shape[:-1])
    if layer.slopes is not None:
        logabsdet = logabsdet - torch.log(phi_prime(h, layer.slopes)).sum(-1)
    right = h if layer.bias is None else h - layer.bias
    matrix = weight(layer.lu, layer.sign, layer.permutation)
    return torch.linalg.solve(matrix, right.reshape(-1, right.shape[-1]).T).T.reshape(right.shape), logabsdet


def randomise(
    layer: torch.nn.Module, seed: int, *, spread: float = 0.5, coupling: float = 0.5, offset: float = 1.0
) -> None:
    """Give a LUDense random legal parameters and random signs, in place.

    spread bounds |s|, the log-diagonal of U; coupling / sqrt(D) is the standard deviation of the
    off-diagonals (a row of U is scaled with its diagonal, so that spread and condition go together);
    offset is the standard deviation of the bias.
    """
    rng = torch.Generator().manual_seed(seed)
    d = layer.in_features
    s = spread * (2 * torch.rand(d, generator=rng, dtype=torch.float64) - 1)
    off = torch.randn(d, d, generator=rng, dtype=torch.float64) * coupling / math.sqrt(d)
    lu = torch.tril(off, -1) + torch.triu(off, 1) * s.exp()[:, None] + torch.diag(s)
    with torch.no_grad():
        layer.lu.copy_(lu)
        layer.sign.copy_(torch.randint(0, 2, (d,), generator=rng) * 2 - 1)
        if layer.bias is not None:
            layer.bias.copy_(offset * torch.randn(d, generator=rng, dtype=torch.float64))


class _Trace(NamedTuple):
    """Per-row sizes of one layer at given data; each a tensor [B] or a float."""

    norm: float  # of W
    inverse_norm: float  # of W^-1
    slope_min: Tensor  # smallest and largest phi'(h) of the row
    slope_max: Tensor
    input: Tensor  # |x|
    output: Tensor  # |y|
    shift: float  # |b|
    zero: float  # phi(0) sqrt(D)


def _trace(x: Tensor, layers: Sequence[Layer]) -> list[_Trace]:
    traces = []
    for layer in layers:
        singular = torch.linalg.svdvals(weight(layer.lu, layer.sign, layer.permutation))
        h = pre_activation(x, layer)
        slope = torch.ones_like(h) if layer.slopes is None else phi_prime(h, layer.slopes)
        y, _ = forward(x, layer)
        traces.append(
            _Trace(
                float(singular[0]),
                1.0 / float(singular[-1]),
                slope.amin(-1),
                slope.amax(-1),
                x.norm(dim=-1),
                y.norm(dim=-1),
                0.0 if layer.bias is None else float(layer.bias.norm()),
                phi_zero(layer.slopes) * math.sqrt(x.shape[-1]),
            )
        )
        x = y
    return traces


def round_trip_bound(x: Tensor, layers: Sequence[Layer], eps: float) -> Tensor:
    """Bound [B] on |inverse(forward(x)) - x| for each row, to first order in eps.

    A layer's y is wrong by eps (max phi' (|W| |x| + |b|) + |y| + phi(0)); going back through layers
    m .. 1 magnifies that by the product of |W^-1| / min phi'. For one layer without a bias this is
    eps kappa(W) (max phi' / min phi') |x| + eps |W^-1| phi(0) / phi'.
    """
    bound = torch.zeros(x.shape[:-1], dtype=torch.float64)
    magnification = torch.ones_like(bound)
    for t in _trace(x, layers):
        magnification = magnification * t.inverse_norm / t.slope_min
        bound = bound + magnification * (t.slope_max * (t.norm * t.input + t.shift) + t.output + t.zero)
    return eps * bound


def inverse_round_trip_bound(x: Tensor, layers: Sequence[Layer], eps: float) -> Tensor:
    """Bound [B] on |forward(inverse(y)) - y| at y = forward(x), as round_trip_bound but seen from y."""
    bound = torch.zeros(x.shape[:-1], dtype=torch.float64)
    for t in _trace(x, layers):
        kappa = t.norm * t.inverse_norm
        bound = bound * t.slope_max * t.norm
        bound = bound + kappa * t.slope_max * (t.norm * t.input + t.shift) + t.output + t.zero
    return eps * bound

"""Invertible modules as ``torch.distributions`` transforms."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.distributions import Transform, constraints


class InvertibleTransform(Transform):
    """x → module(x) for vectors [D], with the module's exact inverse and log-determinant.

    Holds the module, not a copy, so its parameters are learnt through distributions that use it. ``inv``
    is the other direction. ``cache_size=1`` keeps the last pair, as for every transform of PyTorch.

    Args:
        module: anything with forward, inverse and forward_and_logabsdet: LUDense, LUNet, an activation.
        cache_size: 0 or 1.
    """

    domain = constraints.real_vector
    codomain = constraints.real_vector
    bijective = True

    def __init__(self, module: Any, cache_size: int = 0) -> None:
        super().__init__(cache_size=cache_size)
        self.module = module

    def with_cache(self, cache_size: int = 1) -> InvertibleTransform:
        return self if cache_size == self._cache_size else InvertibleTransform(self.module, cache_size)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, InvertibleTransform) and other.module is self.module

    __hash__ = object.__hash__

    def _call(self, x: Tensor) -> Tensor:
        return self.module(x)

    def _inverse(self, y: Tensor) -> Tensor:
        return self.module.inverse(y)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """log|det ∂y/∂x| [...] at x [..., D]; computed from x, y is not used."""
        return self.module.forward_and_logabsdet(x)[1]

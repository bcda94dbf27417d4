"""What a kind of activation has to bring to be computed inside a layer here, and the kinds there are.

One that brings nothing is applied beside the layer in plain PyTorch (``layers/lu_dense.py``).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lunet_fast.ops.cpu.sweeps import column, sweeps
from lunet_fast.ops.precision import wide
from lunet_fast.ops.values import Activation

Gradients = tuple[Tensor, Tensor | None]

#: φ(h), Σ log φ′(h) or None, and ``Elementwise.backward`` of this h.
Recorded = tuple[Tensor, Tensor | None, Callable[[Tensor, Tensor | None], Gradients]]


class Elementwise(ABC):
    """φ on rows [N, D] in place of memory that is given, and its gradients by hand.

    bfloat16 and float16 are computed in float32. ``parameters`` is what is learnt, or None.
    """

    parameters: Tensor | None

    @classmethod
    @abstractmethod
    def of(cls, activation: Activation, dtype: torch.dtype) -> Elementwise:
        """From its description, to compute in ``dtype``."""

    @abstractmethod
    def activate_into(self, y: Tensor, h: Tensor) -> None:
        """y ← φ(h)."""

    @abstractmethod
    def log_derivative_sum_into(self, total: Tensor, h: Tensor) -> None:
        """total [N] ← Σ log φ′(h) over each row."""

    @abstractmethod
    def inverse(self, y: Tensor) -> Tensor:
        """φ⁻¹(y) [N, D], ±inf and NaN passed through."""

    @abstractmethod
    def backward_into(
        self, grad_h: Tensor, grad_y: Tensor, h: Tensor, ld: Sequence[Tensor], totals: Tensor | None
    ) -> None:
        """grad_h ← g_y·φ′(h) + g_ld·φ″(h)/φ′(h), and the parameters' gradient added to ``totals``.

        ``ld`` holds the gradient of Σ log φ′(h) as a column, or nothing.
        """

    @abstractmethod
    def inverse_backward_into(
        self, grad_y: Tensor, grad_h: Tensor, h: Tensor, ld: Sequence[Tensor], totals: Tensor | None
    ) -> None:
        """The same of h = φ⁻¹(y) and −Σ log φ′(h):
        g_y = (g_h − g_ld·φ″(h)/φ′(h)) / φ′(h), and g_θ = −g_y·∂φ/∂θ − g_ld·∂log φ′/∂θ."""

    def scaled_gradient(self) -> tuple[float, Elementwise]:
        """(f, ψ) with φ′ = f·ψ′, where a product with the gradient takes f for nothing; (1, φ) if not."""
        return 1.0, self

    def activate(self, h: Tensor) -> Tensor:
        """φ(h) [N, D]."""
        y = torch.empty_like(h)
        for h_part, y_part in sweeps(h, y):
            self.activate_into(y_part, h_part)
        return y

    def activated(self, h: Tensor, *, logabsdet: bool) -> tuple[Tensor, Tensor | None]:
        """(φ(h) [N, D], Σ log φ′(h) [N] or None): for a kind for which the two have work in common."""
        return self.activate(h), self.log_derivative_sum(h) if logabsdet else None

    def activated_into(self, y: Tensor, total: Tensor | None, h: Tensor) -> None:
        """y ← φ(h), and total [N] ← Σ log φ′(h) unless None."""
        self.activate_into(y, h)
        if total is not None:
            self.log_derivative_sum_into(total, h)

    def recorded(self, h: Tensor, *, logabsdet: bool) -> Recorded | None:
        """``activated`` with a backward for which something is kept that would have to be found again; None
        where there is nothing of the kind."""
        return None

    def log_derivative_sum(self, h: Tensor) -> Tensor:
        """Σ log φ′(h) over each row, [N], float32 or wider."""
        total = torch.empty(h.shape[0], dtype=wide(h.dtype), device=h.device)
        for h_part, total_part in sweeps(h, total):
            self.log_derivative_sum_into(total_part, h_part)
        return total

    def backward(self, grad_y: Tensor, grad_logabsdet: Tensor | None, h: Tensor) -> Gradients:
        """Gradients of h and of the parameters from those of y = φ(h) and of Σ log φ′(h)."""
        grad_h, totals = torch.empty_like(h), self.totals(h)
        for g, x, out, *ld in sweeps(grad_y, h, grad_h, *column(grad_logabsdet)):
            self.backward_into(out, g, x, ld, totals)
        return grad_h, totals

    def inverse_backward(self, grad_h: Tensor, grad_logabsdet: Tensor | None, h: Tensor) -> Gradients:
        """Gradients of y and of the parameters from those of h = φ⁻¹(y) and of −Σ log φ′(h)."""
        grad_y, totals = torch.empty_like(h), self.totals(h)
        for g, x, out, *ld in sweeps(grad_h, h, grad_y, *column(grad_logabsdet)):
            self.inverse_backward_into(out, g, x, ld, totals)
        return grad_y, totals

    def totals(self, h: Tensor) -> Tensor | None:
        """Zeros in which the parameters' gradient is summed, float32 or wider; None without parameters."""
        if self.parameters is None:
            return None
        return torch.zeros(self.parameters.shape, dtype=wide(h.dtype), device=h.device)


#: The kinds that are computed here, by ``Activation.kind``.
KINDS: dict[str, type[Elementwise]] = {}


def elementwise(activation: Activation, dtype: torch.dtype) -> Elementwise | None:
    """What computes this activation, None for the identity."""
    return None if activation.linear else KINDS[activation.kind].of(activation, wide(dtype))

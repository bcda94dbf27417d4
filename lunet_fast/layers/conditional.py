"""ConditionalLUNet: an LUNet whose biases and log-diagonals depend on a context."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from lunet_fast import functional
from lunet_fast.layers.activations import call, is_replaced
from lunet_fast.layers.arguments import check_tensor, checked_size
from lunet_fast.layers.lu_dense import LUDense
from lunet_fast.layers.lunet import LUNet
from lunet_fast.layers.transforms import InvertibleTransform
from lunet_fast.ops.values import IDENTITY

SCALE_LIMIT = 3.0
"""A context moves log u_ii by less than this, whatever the conditioner says."""


class ConditionalLUNet(nn.Module):
    """f(·; c): in each layer h = e^δ(c) ∘ (A x + b) + β(c), with δ, β [D] from a conditioner.

    An ``input`` of the net comes before them, the same for every context.

    diag(e^δ)·L·U = (diag(e^δ) L diag(e^−δ))·(diag(e^δ) U) is again unit lower times upper: the context adds
    δ_i to log u_ii and leaves the factors triangular, so that inversion stays O(D²) and the log-determinant,
    to which it adds Σ δ_i, O(D).

    Args:
        net: the LUNet, which f(·; c) is where the conditioner gives zeros.
        conditioner: the number of context features C, for a linear map of contexts [..., C] that starts at 0;
            or a module from contexts to [..., 2·M·D], such as ``nn.Embedding(classes, 2·M·D)`` for labels.

    Raises:
        ValueError: C < 1.
        TypeError: net is no LUNet, or conditioner neither a module nor an int.

    Cost for N rows: that of the net, one pass over [N, D] more in each layer, and the conditioner.
    """

    def __init__(self, net: LUNet, conditioner: int | nn.Module) -> None:
        super().__init__()
        if not isinstance(net, LUNet):
            raise TypeError(f"net must be an LUNet, got {type(net).__name__}")
        self.net = net
        self.features = net.features
        if not isinstance(conditioner, nn.Module):
            what = "conditioner, a module or the number of context features,"
            conditioner = checked_size(what, conditioner)
            like = cast(LUDense, net.layers[0]).lu
            conditioner = _ZeroLinear(
                conditioner, 2 * len(net.layers) * net.features, device=like.device, dtype=like.dtype
            )
        self.conditioner = conditioner

    def given(self, context: Tensor) -> GivenContext:
        """f(·; context): the map for one context a row, or for one context that all rows share.

        Raises ``ValueError`` where the conditioner's result does not end in 2·M·D numbers, or context not in
        C; ``TypeError`` where a linear conditioner gets no floating-point tensor.
        """
        moved = self.conditioner(context)
        wanted = 2 * len(self.net.layers) * self.features
        if moved.shape[-1] != wanted:
            raise ValueError(
                f"conditioner must give 2·M·D = {wanted} numbers a context, got shape {tuple(moved.shape)}"
            )
        delta, beta = moved.unflatten(-1, (2, len(self.net.layers), self.features)).unbind(-3)
        return GivenContext(self.net, SCALE_LIMIT * torch.tanh(delta / SCALE_LIMIT), beta)


class _ZeroLinear(nn.Linear):
    """A linear map of contexts that starts at 0, also when it is reset."""

    def forward(self, context: Tensor) -> Tensor:
        check_tensor("context", context)
        if not context.is_floating_point():
            raise TypeError(
                f"context must be a floating-point tensor, got {context.dtype}; convert it with .float(), or "
                "give labels to a ConditionalLUNet with an nn.Embedding"
            )
        if context.dim() == 0 or context.shape[-1] != self.in_features:
            raise ValueError(
                f"context must have {self.in_features} features in its last dimension, got shape "
                f"{tuple(context.shape)}"
            )
        return super().forward(context)

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class GivenContext:
    """f(·; c) for given contexts, with the methods of ``LUNet``; made by ``ConditionalLUNet.given``.

    Args:
        net: the net.
        delta, beta: [..., M, D]; the leading shape, ``shape``, is broadcast with that of the rows.
    """

    def __init__(self, net: LUNet, delta: Tensor, beta: Tensor) -> None:
        self.net = net
        self.delta, self.beta = delta.unbind(-2), beta.unbind(-2)
        self.features = net.features

    @property
    def shape(self) -> torch.Size:
        """The leading shape of the contexts."""
        return self.delta[0].shape[:-1]

    def __call__(self, x: Tensor) -> Tensor:
        return self._forward(x, logabsdet=False)[0]

    def inverse(self, y: Tensor) -> Tensor:
        """The x [..., D] with f(x; c) = y."""
        return self._inverse(y, logabsdet=False)[0]

    def forward_and_logabsdet(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(f(x; c), log|det ∂f/∂x| [...])."""
        return self._forward(x, logabsdet=True)

    def inverse_and_logabsdet(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """(f⁻¹(y; c), the inverse's log|det| at y [...])."""
        return self._inverse(y, logabsdet=True)

    def _forward(self, x: Tensor, *, logabsdet: bool) -> tuple[Tensor, Tensor]:
        check_tensor("x", x)
        total = x.new_zeros(())
        if self.net.input is not None:
            x, own = call(self.net.input, x, inverse=False, logabsdet=logabsdet)
            total = total if own is None else total + own
        for layer, delta, beta in zip(self._layers(), self.delta, self.beta, strict=True):
            h, _ = functional.layer(x, layer._matrix(), IDENTITY, inverse=False, logabsdet=False)
            x = torch.addcmul(beta, delta.exp(), h)
            total = total + layer.logabsdet() + delta.sum(-1)
            if layer.activation is None:
                continue
            if logabsdet:
                x, share = layer.activation.forward_and_logabsdet(x)
                total = total + share
            else:
                x = layer.activation(x)
        return x, _written_out(total, x.shape[:-1])

    def _inverse(self, y: Tensor, *, logabsdet: bool) -> tuple[Tensor, Tensor]:
        check_tensor("y", y)
        total = y.new_zeros(())
        parts = list(zip(self._layers(), self.delta, self.beta, strict=True))
        for layer, delta, beta in reversed(parts):
            if layer.activation is not None and logabsdet:
                y, share = layer.activation.inverse_and_logabsdet(y)
                total = total + share
            elif layer.activation is not None:
                y = layer.activation.inverse(y)
            h = (y - beta) * (-delta).exp()
            y, _ = functional.layer(h, layer._matrix(), IDENTITY, inverse=True, logabsdet=False)
            total = total - layer.logabsdet() - delta.sum(-1)
        if self.net.input is not None:
            y, own = call(self.net.input, y, inverse=True, logabsdet=logabsdet)
            total = total if own is None else total + own
        return y, _written_out(total, y.shape[:-1])

    def as_transform(self) -> InvertibleTransform:
        """f(·; c) as a ``torch.distributions`` transform of vectors [D]."""
        return InvertibleTransform(self)

    def _layers(self) -> list[LUDense]:
        layers = cast("list[LUDense]", list(self.net.layers))
        for index, layer in enumerate(layers):
            # A context works between a layer's matrix and its activation, where no method of it is called.
            if is_replaced(layer, LUDense, hooks=False):
                raise TypeError(
                    f"layers.{index} has a method of its own in place of LUDense's, which a ConditionalLUNet "
                    "does not call: replace the activation's, or use a LUNet"
                )
        return layers


def _written_out(total: Tensor, shape: torch.Size) -> Tensor:
    """``total`` in this shape, each number in memory of its own, so that it may be added to in place."""
    return total if total.shape == shape else total.expand(shape).clone()

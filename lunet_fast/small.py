"""Nets so small that calling an operation costs more than what it computes, on a CPU.

There a layer is best written in the fewest calls of PyTorch, which then differentiates it in C++: with 32
features and 128 rows a training step of two layers takes two thirds of the time that hand-written gradients
take, which are called through Python. ``ops.is_small`` says where; the results are the same to rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from lunet_fast import blocked, functional, ops, reference
from lunet_fast.activations import BijectiveActivation, LeakySoftplus
from lunet_fast.lu_dense import LUDense


def takes(x: Tensor, layers: Sequence[LUDense]) -> bool:
    """Whether these layers on x are small and what ``net`` is written for; what does not fit together is left
    to the layers, which say what is wrong."""
    return ops.is_small(x) and all(
        layer.lu.dtype == x.dtype and layer.in_features == x.shape[-1] for layer in layers
    )


def net(x: Tensor, layers: Sequence[LUDense], *, logabsdet: bool) -> tuple[Tensor, Tensor | None]:
    """(f(x) [..., D], log|det J| [...] or None) of M layers, one after another.

    Cost: 2·M·D³ flops to form the matrices and 2·M·N·D² for N rows, in about 15 + 4·M calls.
    """
    weights, logs = _matrices(layers)
    z, total = x, logs.sum().expand(x.shape[:-1]) if logabsdet else None
    for layer, weight in zip(layers, weights.unbind(), strict=True):
        h = F.linear(z, weight, layer.bias)
        z, share = _activate(h, layer.activation, logabsdet)
        if share is not None and total is not None:
            total = total + share
    return z, total


def takes_inverse(y: Tensor, layers: Sequence[LUDense]) -> bool:
    """Whether ``inverse_net`` may take these layers on y: without gradients, and rows enough for inverses."""
    if not takes(y, layers):
        return False
    rows = y.numel() // max(1, y.shape[-1])
    recorded = torch.is_grad_enabled() and (
        y.requires_grad or any(p.requires_grad for layer in layers for p in layer.parameters())
    )
    return (
        not recorded
        and rows >= blocked.least_rows_for_inverse(y.shape[-1])
        # Under vmap no number can be read, and the condition is one.
        and not any(torch._C._functorch.is_functorch_wrapped_tensor(layer.lu) for layer in layers)
    )


def inverse_net(
    y: Tensor, layers: Sequence[LUDense], *, logabsdet: bool
) -> tuple[Tensor, Tensor | None] | None:
    """(f⁻¹(y) [..., D], log|det| of its Jacobian [...] or None); None where an A⁻¹ would not be accurate.

    All U⁻¹ L⁻¹ are formed at once (``blocked.inverse_of_factors``) and then multiplied with. Cost: 3·M·D³
    flops for the matrices and 2·M·N·D² for N rows.
    """
    below, upper, logs = _factors(layers)
    inverses = blocked.inverse_of_factors(below + torch.eye(y.shape[-1], dtype=y.dtype), upper)
    if inverses is None:
        return None
    x, total = y, -logs.sum().expand(y.shape[:-1]) if logabsdet else None
    for layer, inverse in zip(reversed(layers), reversed(inverses.unbind()), strict=True):
        if layer.activation is not None:
            slopes = layer.activation.slopes()
            x = functional.leaky_softplus_inverse(x, slopes)
            if total is not None:
                total = total - reference.log_derivative_sum(x, slopes)
        if layer.permutation is not None:
            inverse = inverse[:, layer.permutation.argsort()]
        x = F.linear(x, inverse, None if layer.bias is None else -(inverse @ layer.bias))
    return x, total


def stacked_net(x: Tensor, members: Sequence[Sequence[LUDense]]) -> Tensor:
    """f(x), both [K, N, D], of K members' nets side by side; ``members`` holds K nets of M layers.

    The activation of a member's layer is taken for all members, as in ``functional`` for stacked layers.
    """
    if len(members) == 1:
        return net(x, members[0], logabsdet=False)[0]
    columns = list(zip(*members, strict=True))
    weights = _matrices([layer for column in columns for layer in column])[0].split(len(members))
    for column, weight in zip(columns, weights, strict=True):
        if column[0].bias is None:
            h = torch.bmm(x, weight.mT)
        else:
            bias = torch.stack([cast(Tensor, layer.bias) for layer in column])
            h = torch.baddbmm(bias.unsqueeze(1), x, weight.mT)
        x = _activate(h, column[0].activation, False)[0]
    return x


def _matrices(layers: Sequence[LUDense]) -> tuple[Tensor, Tensor]:
    """(A = Pᵀ L U [M, D, D], formed for all layers at once as Pᵀ (U + (L − I) U); log|u_ii| [M, D])."""
    below, upper, logs = _factors(layers)
    weights = torch.baddbmm(upper, below, upper)
    if any(layer.permutation is not None for layer in layers):
        own = torch.arange(upper.shape[-1], device=upper.device)
        orders = [own if layer.permutation is None else layer.permutation.argsort() for layer in layers]
        weights = weights.gather(1, torch.stack(orders).unsqueeze(-1).expand_as(weights))
    return weights, logs


def _factors(layers: Sequence[LUDense]) -> tuple[Tensor, Tensor, Tensor]:
    """(L − I [M, D, D], U [M, D, D], log|u_ii| [M, D])."""
    lu = torch.stack([layer.lu for layer in layers])
    bound = reference.LOG_DIAGONAL_BOUND[lu.dtype]
    # hardtanh is clamp with a derivative in one call, where clamp's takes several.
    logs = F.hardtanh(lu.diagonal(dim1=-2, dim2=-1), -bound, bound)
    diagonal = logs.exp() * torch.stack([layer.sign for layer in layers])
    return lu.tril(-1), lu.triu(1) + torch.diag_embed(diagonal), logs


def _activate(
    h: Tensor, activation: BijectiveActivation | None, logabsdet: bool
) -> tuple[Tensor, Tensor | None]:
    """(φ(h), Σ log φ′(h) over the last dimension or None)."""
    if activation is None:
        return h, None
    slopes = activation.slopes()
    if not isinstance(slopes, Tensor):
        a, c, kappa = slopes
        soft = F.softplus(h, kappa, 40.0)
        if kappa == 1.0 and a + c == 1.0 and a <= 0.5:
            y = torch.lerp(soft, h, a)  # beyond, it would add a rounding of the difference
        else:
            y = torch.add(soft if c == 1.0 else soft * c, h, alpha=a)
        return y, reference.log_derivative_sum(h, slopes) if logabsdet else None
    if not isinstance(activation, LeakySoftplus):
        return reference.leaky_softplus(h, slopes), (
            reference.log_derivative_sum(h, slopes) if logabsdet else None
        )
    # α alone is learnt, where the general formulas would give a gradient to each of (a, c, κ).
    alpha = cast(Tensor, activation.alpha)
    y = torch.lerp(F.softplus(h, 1.0, 40.0), h, alpha)
    if not logabsdet:
        return y, None
    derivative = torch.lerp(torch.sigmoid(h), h.new_ones(()), alpha)
    return y, derivative.log().sum(-1)

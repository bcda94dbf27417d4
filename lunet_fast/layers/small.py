"""Layers and nets so small that calling an operation costs more than what it computes, on a CPU.

There a layer is best written in the fewest calls of PyTorch, which then differentiates it in C++: with 32
features and 128 rows a training step of two layers takes two thirds of the time that hand-written gradients
take, which are called through Python. ``is_small`` says where; the results are the same to rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lunet_fast import functional
from lunet_fast.layers.activations import LeakySoftplus, call
from lunet_fast.layers.cached import is_watched
from lunet_fast.ops import dispatch, reference
from lunet_fast.ops.cpu import matrix
from lunet_fast.ops.precision import LOG_DIAGONAL_BOUND, autocast_enabled
from lunet_fast.ops.values import Activation

if TYPE_CHECKING:
    from lunet_fast.layers.lu_dense import LUDense

#: Numbers in x up to which a net's layers are small on a CPU, and the features that they may have.
SMALL_NUMBERS, SMALL_FEATURES = 1 << 18, matrix.BLOCK

#: The same of a layer by itself.
ONE_SMALL_NUMBERS = 1 << 16

#: Features up to which a layer by itself is small on an eighth as many rows.
FEW_ROWS_FEATURES = matrix.DENSE

#: Rows a feature from which on the matrices of all layers, inverted at once, save more calls than they cost.
ROWS_A_FEATURE = 4

_PLAIN = (Tensor, nn.Parameter)


def is_small(x: Tensor) -> bool:
    """Whether calling a layer's operation on x costs more than what it computes.

    Never while being traced, where the choice must not depend on the batch, nor under autocast or in low
    precision, of which only the operations know what is computed in which dtype.
    """
    return (
        not torch.compiler.is_compiling()
        and torch._C._get_tracing_state() is None
        and _is_of(x, SMALL_NUMBERS, SMALL_FEATURES)
        and not autocast_enabled(x)
    )


def _is_of(x: Tensor, numbers: int, features: int) -> bool:
    """Whether x is of a kind that can be small, and has at most so many numbers and features."""
    return (
        x.device.type == "cpu"
        and dispatch.get_backend() != "triton"
        and x.dtype in (torch.float32, torch.float64)
        and x.numel() <= numbers
        and x.dim() > 0
        and x.shape[-1] <= features
    )


def takes(x: Tensor, layers: Sequence[LUDense]) -> bool:
    """Whether these layers on x are small and what ``net`` is written for; what does not fit together is left
    to the layers, which say what is wrong."""
    return is_small(x) and type(x) in _PLAIN and all(_fits(x, layer.lu) for layer in layers)


def _fits(x: Tensor, lu: Tensor) -> bool:
    return type(lu) in _PLAIN and lu.dtype == x.dtype and lu.is_cpu and lu.shape[-1] == x.shape[-1]


def takes_layer(x: Tensor, lu: Tensor, phi: Activation) -> bool:
    """Whether a layer with this ``lu`` and activation is small by itself on x and fits it, and nobody watches
    the call. One column is none: there an infinity stays one."""
    if x.device.type != "cpu" or is_watched(x):
        return False
    features = FEW_ROWS_FEATURES if _are_few(x, 8) else SMALL_FEATURES
    return (
        _is_of(x, ONE_SMALL_NUMBERS, features)
        and x.numel() > 0
        and x.shape[-1] > 1
        and _fits(x, lu)
        and (phi.parameters is None or phi.parameters.dtype == x.dtype)
    )


def _are_few(x: Tensor, share: int) -> bool:
    """Whether x has at most D/``share`` rows."""
    return x.dim() > 0 and share * x.numel() <= x.shape[-1] ** 2


def layer(x: Tensor, own: LUDense, phi: Activation, *, logabsdet: bool) -> tuple[Tensor, Tensor | None]:
    """(φ(A x + b) [..., D], log|det J| [...] or None) of one layer with its activation as φ.

    Cost: 2·D³ flops to form A and 2·N·D² for N rows; 4·N·D² without A for N ≤ D/2.
    """
    lu, bias = own.lu, own.bias
    sign, permutation = own._structure()
    order = None if permutation is None else permutation.argsort()
    logs = _log_diagonal(lu)
    diagonal = logs.exp() * sign
    if _are_few(x, 2):  # which had better go through U and L themselves
        given = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
        t = torch.addmm(given * diagonal, given, lu.triu(1).T)
        h = torch.addmm(t, t, lu.tril(-1).T)
        h = h if order is None else h[:, order]
        h = h if bias is None else h + bias
        h = h if given is x else h.view(x.shape)
    else:
        upper = lu.triu(1) + torch.diag_embed(diagonal)
        weight = torch.addmm(upper, lu.tril(-1), upper)
        h = F.linear(x, weight if order is None else weight[order], bias)
    y, share = _activate(h, own, phi, logabsdet)
    if not logabsdet:
        return y, None
    return y, logs.sum() + (logs.new_zeros(x.shape[:-1]) if share is None else share)


def _log_diagonal(lu: Tensor) -> Tensor:
    """log|u_ii| [..., D]: hardtanh is clamp with a derivative in one call, where clamp's takes several."""
    bound = LOG_DIAGONAL_BOUND[lu.dtype]
    return F.hardtanh(lu.diagonal(dim1=-2, dim2=-1), -bound, bound)


def net(x: Tensor, layers: Sequence[LUDense], *, logabsdet: bool) -> tuple[Tensor, Tensor | None]:
    """(f(x) [..., D], log|det J| [...] or None) of M layers, one after another.

    Cost: 2·M·D³ flops to form the matrices and 2·M·N·D² for N rows, in about 15 + 4·M calls.
    """
    weights, logs = _matrices(layers)
    # Written out, not expanded: the caller may add to it in place.
    z, total = x, logs.sum() + logs.new_zeros(x.shape[:-1]) if logabsdet else None
    for layer, weight in zip(layers, weights.unbind(), strict=True):
        h = F.linear(z, weight, layer.bias)
        z, share = _activate(h, layer, layer._fused(), logabsdet)
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
        and rows >= ROWS_A_FEATURE * y.shape[-1]
        # Under vmap no number can be read, and the condition is one.
        and not any(torch._C._functorch.is_functorch_wrapped_tensor(layer.lu) for layer in layers)
    )


def inverse_net(
    y: Tensor, layers: Sequence[LUDense], *, logabsdet: bool
) -> tuple[Tensor, Tensor | None] | None:
    """(f⁻¹(y) [..., D], log|det| of its Jacobian [...] or None); None where an A⁻¹ would not be accurate.

    All U⁻¹ L⁻¹ are formed at once (``matrix.inverse_of_factors``) and then multiplied with. Cost: 3·M·D³
    flops for the matrices and 2·M·N·D² for N rows.
    """
    below, upper, logs, permutations = _factors(layers)
    inverses = matrix.inverse_of_factors(below + torch.eye(y.shape[-1], dtype=y.dtype), upper)
    if inverses is None:
        return None
    x, total = y, logs.new_zeros(y.shape[:-1]) - logs.sum() if logabsdet else None
    backwards = zip(reversed(layers), reversed(permutations), reversed(inverses.unbind()), strict=True)
    for layer, permutation, inverse in backwards:
        if layer.activation is not None:
            x, share = call(layer.activation, x, inverse=True, logabsdet=logabsdet)
            if share is not None and total is not None:
                total = total + share
        if permutation is not None:
            inverse = inverse[:, permutation.argsort()]
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
        x = _activate(h, column[0], column[0]._fused(), False)[0]
    return x


def _matrices(layers: Sequence[LUDense]) -> tuple[Tensor, Tensor]:
    """(A = Pᵀ L U [M, D, D], formed for all layers at once as Pᵀ (U + (L − I) U); log|u_ii| [M, D])."""
    below, upper, logs, permutations = _factors(layers)
    weights = torch.baddbmm(upper, below, upper)
    if any(each is not None for each in permutations):
        own = torch.arange(upper.shape[-1], device=upper.device)
        orders = [own if each is None else each.argsort() for each in permutations]
        weights = weights.gather(1, torch.stack(orders).unsqueeze(-1).expand_as(weights))
    return weights, logs


def _factors(layers: Sequence[LUDense]) -> tuple[Tensor, Tensor, Tensor, list[Tensor | None]]:
    """(L − I [M, D, D], U [M, D, D], log|u_ii| [M, D], the permutations)."""
    structures = [layer._structure() for layer in layers]
    lu = torch.stack([layer.lu for layer in layers])
    logs = _log_diagonal(lu)
    diagonal = logs.exp() * torch.stack([sign for sign, _ in structures])
    permutations = [permutation for _, permutation in structures]
    return lu.tril(-1), lu.triu(1) + torch.diag_embed(diagonal), logs, permutations


def _activate(
    h: Tensor, layer: LUDense, phi: Activation | None, logabsdet: bool
) -> tuple[Tensor, Tensor | None]:
    """(φ(h), Σ log φ′(h) over the last dimension or None); ``phi`` is ``layer._fused()``."""
    activation = layer.activation
    if activation is None:
        return h, None
    if phi is None:
        return call(activation, h, inverse=False, logabsdet=logabsdet)
    if phi.kind != "leaky_softplus":
        return functional.activation(h, phi, inverse=False, logabsdet=logabsdet)
    if phi.parameters is None:
        a, c, kappa = phi.constants
        soft = F.softplus(h, kappa, 40.0)
        if kappa == 1.0 and a + c == 1.0 and a < 0.5:
            y = torch.lerp(soft, h, a)  # beyond, it would add a rounding of the difference
        else:
            y = torch.add(soft if c == 1.0 else soft * c, h, alpha=a)
        return y, reference.log_derivative_sum(h, phi.constants) if logabsdet else None
    if type(activation) is not LeakySoftplus or "slopes" in vars(activation):
        return reference.activation(h, phi, inverse=False, logabsdet=logabsdet)
    # α alone is learnt, where the general formulas would give a gradient to each of (a, c, κ).
    alpha = cast(Tensor, activation.alpha)
    y = torch.lerp(F.softplus(h, 1.0, 40.0), h, alpha)
    if not logabsdet:
        return y, None
    derivative = torch.lerp(torch.sigmoid(h), h.new_ones(()), alpha)
    return y, derivative.log().sum(-1)

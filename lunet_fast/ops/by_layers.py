"""A net as its layers one after another, for an implementation that has no kernel for the whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lunet_fast.ops.precision import wide
from lunet_fast.ops.values import IDENTITY, Activation, Matrix

Layer = Callable[..., tuple[Tensor, ...]]


def net_by_layers(
    layer: Layer, x: Tensor, matrix: Matrix, activation: Activation, logabsdet: bool, *, inverse: bool
) -> tuple[Tensor, Tensor]:
    """``net_forward`` by an implementation of ``layer_forward``, ``net_inverse`` by one of
    ``layer_inverse``."""
    total = x.new_empty(0, dtype=wide(x.dtype))
    layers = matrix.lu.shape[0]
    order = list(reversed(range(layers)) if inverse else range(layers))
    for m in order:
        x, share, *_ = layer(x, matrix.member(m), activation.at(m, layers), logabsdet, False)
        total = share if m == order[0] else total + share
    return x, total


def net_backward_by_layers(
    forward: Layer,
    backward: Layer,
    grad: Tensor,
    grad_logabsdet: Tensor | None,
    x: Tensor,
    matrix: Matrix,
    activation: Activation,
    needs_x: bool,
    needs_lu: bool,
    needs_bias: bool,
    *,
    inverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``net_backward`` or, with ``inverse``, ``net_inverse_backward`` by an implementation of
    ``layer_forward`` and of the layer's own backward in that direction.

    x is what the layers start from, whichever way the net was run. Nothing else was kept: the layers are
    computed again from it.
    """
    layers = matrix.lu.shape[0]
    kept: list[tuple[Any, ...]] = []
    for m in range(layers):
        member, phi = matrix.member(m), activation.at(m, layers)
        # What the forward keeps for its own backward; the inverse's wants h, which it need not keep.
        y, _, h, weight = forward(x, member, phi, False, not inverse)
        if inverse:
            h = forward(x, member, IDENTITY, False, False)[0]
        kept.append((x, h, *(() if inverse else (weight,)), member, phi))
        x = y
    gradients: dict[int, tuple[Tensor, ...]] = {}
    order = list(range(layers) if inverse else reversed(range(layers)))
    for m in order:
        needs = (needs_x or m != order[-1], needs_lu, needs_bias)
        gradients[m] = backward(grad, grad_logabsdet, *kept[m], *needs)
        grad = gradients[m][0]
    _, grad_lu, grad_bias, grad_parameters = zip(*(gradients[m] for m in range(layers)), strict=True)
    return (
        grad if needs_x else x.new_empty(0),
        torch.stack(grad_lu) if needs_lu else matrix.lu.new_empty(0),
        torch.stack(grad_bias) if needs_bias else matrix.lu.new_empty(0),
        torch.stack(grad_parameters[:-1]) if activation.parameters is not None else x.new_empty(0),
    )

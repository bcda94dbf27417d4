"""Nets and layers on kernels, without gradients: what does not depend on numbers is found out once.

A call of a small one costs the host more than it costs the GPU: layers are looked at, their matrices
described and checked, kernels looked up. Here a module keeps what came of it, a ``Plan``, and a call sees
whether it still holds, puts the parameters together and launches two kernels. Parameters are read at each
call, so that no write to them can be missed. Within ``cached`` what the first of the two made of them is kept
too, and one launch is left.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lunet_fast.layers.activations import GeneralizedLeakySoftplus, LeakySoftplus, is_replaced
from lunet_fast.layers.cached import Keeping, Kept, is_watched
from lunet_fast.ops import dispatch
from lunet_fast.ops.autograd import records
from lunet_fast.ops.precision import wide

#: Activations of which everything is fixed where they have no parameters.
FIXED = (LeakySoftplus, GeneralizedLeakySoftplus)


class Planned(Keeping):
    """A module that keeps plans: a net of layers, or a layer."""

    # The class of which it is known what a layer computes; a net is none.
    _described: type[nn.Module] | None = None

    _plans: Kept | None = None

    def _on_kernels(self, x: Tensor) -> bool:
        """Whether kernels may have all of it for rows like x, as far as x alone tells."""
        raise NotImplementedError

    def _prepared(self, x: Tensor, *, inverse: bool, many: bool) -> Any:
        """It, or its inverse, as kernels take it for rows like x (``many``: in many calls with the same
        matrices): ``ops.triton.Net``, ``Layer`` or ``LayerInverse``; None where they do not."""
        raise NotImplementedError


class Plan(NamedTuple):
    """A net or layer as kernels take it, whatever the numbers in matrices and biases are."""

    run: Any
    lu: list[Tensor]
    bias: list[Tensor] | None

    def numbers(self, x: Tensor, *, many: bool) -> tuple[Tensor, Any, Tensor | None] | None:
        """The matrices [M, D, D], what is computed of them, and the biases [M, D], as they are now; None
        where they have come to be others than rows x take."""
        lu, bias = _stacked(self.lu), None if self.bias is None else _stacked(self.bias)
        device, dtype, features = x.device, wide(x.dtype), x.shape[-1]
        for found in (lu, bias):
            if found is not None and (
                found.shape[-1] != features or found.dtype != dtype or found.device != device
            ):
                return None
        return lu, self.run.matrices(lu, None if many else x), bias


def _stacked(tensors: list[Tensor]) -> Tensor:
    return tensors[0].unsqueeze(0).contiguous() if len(tensors) == 1 else torch.stack(tensors)


def run(
    module: Planned, layers: Sequence[nn.Module], x: Tensor, *, inverse: bool, logabsdet: bool
) -> tuple[Tensor, Tensor | None] | None:
    """f(x), or with ``inverse`` f⁻¹(x), of a module that consists of these layers, and its log-determinant
    [...] or None; None where it goes another way. For rows x ``_on_kernels``, as a caller has asked."""
    kept = module._kept
    if (kept is None and torch.is_grad_enabled()) or is_watched(x):
        return None
    contents = _contents(layers)
    if contents is None or not x.numel():
        return None
    many = kept is not None
    if many and torch.is_grad_enabled() and records(x, *filter(_is_tensor, contents)):
        return None
    precision = dispatch.implementation("triton", "precision_of")(x)
    name = (inverse, x.dtype, x.shape[-1], x.device, precision)
    plan: Plan | None
    if kept is None:
        plans = module._plans
        if plans is None:
            module._plans = plans = Kept()

        plan = plans.get(name, contents, lambda: _plan(module, layers, contents, x, inverse), _is_structure)
        numbers = None if plan is None else plan.numbers(x, many=False)
    else:

        def make() -> Any:
            plan = _plan(module, layers, contents, x, inverse)
            return None if plan is None else (plan, plan.numbers(x, many=True))

        plan, numbers = kept.get(name, contents, make) or (None, None)
    if plan is None or numbers is None:
        return None
    out, total, *_ = plan.run(x, *numbers, logabsdet=logabsdet)
    return out, total


def _plan(
    module: Planned, layers: Sequence[Any], contents: list[Any], x: Tensor, inverse: bool
) -> Plan | None:
    """A plan for rows like x; None where no kernel has the module, or it does not fit them: that is left to
    the layers, which say what is wrong."""
    many, first = module._kept is not None, layers[0]
    if (
        x.dtype != first.dtype
        or x.shape[-1] != first.lu.shape[-1]
        or any(tensor.device != x.device for tensor in filter(_is_tensor, contents))
        or not (many or all(map(_is_fixed, layers)))
    ):
        return None
    found = module._prepared(x, inverse=inverse, many=many)
    if found is None:
        return None
    bias = None if first.bias is None else [layer.bias for layer in layers]
    return Plan(found, [layer.lu for layer in layers], bias)


def _is_fixed(layer: Any) -> bool:
    """Whether nothing is learnt in the layer's activation."""
    activation = layer.activation
    return activation is None or (
        type(activation) in FIXED and not any(True for _ in activation.parameters())
    )


def _is_tensor(source: Any) -> bool:
    return isinstance(source, Tensor)


def _is_structure(source: Any) -> bool:
    """Whether it is a tensor that a plan is made of: signs and permutations are, parameters are not."""
    return isinstance(source, Tensor) and not isinstance(source, nn.Parameter)


def _contents(layers: Sequence[nn.Module]) -> list[Any] | None:
    """The modules and tensors that these layers consist of; None where one of them may compute anything else
    than an ``LUDense``, or has no parameter of its own, as where one is parametrised."""
    found: list[Any] = []
    # Of a small net's call this is a good part. What is looked up on a module goes by PyTorch's __getattr__.
    for layer in layers:
        if not isinstance(layer, Planned) or is_replaced(layer, type(layer)._described):
            return None
        own = layer.__dict__
        parameters, buffers = own["_parameters"], own["_buffers"]
        if "lu" not in parameters or "bias" not in parameters:
            return None
        found += (parameters["lu"], parameters["bias"], buffers["sign"], buffers["permutation"])
        activation: Any = own["_modules"].get("activation")
        if activation is None:
            continue
        own = activation.__dict__
        if (
            own["_modules"]
            or "slopes" in own
            or "fused" in own
            or is_replaced(activation, type(activation)._described)
        ):
            return None
        found.append(activation)
        found += own["_parameters"].values()
        found += own["_buffers"].values()
    return found

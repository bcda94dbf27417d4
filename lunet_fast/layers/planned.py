"""A net on kernels, without gradients: what does not depend on numbers is found out once.

A call of a small net costs the host more than it costs the GPU: layers are looked at, their matrices
described and checked, kernels looked up. Here a net keeps what came of it, a ``Plan``, and a call sees
whether it still holds, puts the parameters together and launches two kernels. Parameters are read at each
call, so that no write to them can be missed. Within ``cached`` what the first of the two made of them is kept
too, and one launch is left.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lunet_fast.layers.activations import GeneralizedLeakySoftplus, LeakySoftplus, is_replaced
from lunet_fast.layers.cached import Keeping, counts_writes, is_watched, writes_to
from lunet_fast.layers.lu_dense import LUDense
from lunet_fast.ops import dispatch
from lunet_fast.ops.autograd import records
from lunet_fast.ops.precision import wide
from lunet_fast.ops.values import Activation, Matrix

#: Activations of which everything is fixed where they have no parameters.
FIXED = (LeakySoftplus, GeneralizedLeakySoftplus)


class PlannedNet(Keeping):
    """A net that keeps plans."""

    def __init__(self) -> None:
        super().__init__()
        self._plans: dict[Any, Plan] = {}

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_plans": {}}

    def _as_one(self, x: Tensor) -> tuple[Matrix, Activation] | None:
        """All layers as one operation, ``functional.net``, takes them for x, or None if it does not take
        these layers: what it computes, they compute."""
        raise NotImplementedError


class Plan(NamedTuple):
    """A net as kernels take it, and what that was made of."""

    run: Any
    """``ops.triton.Net``, or None where no kernel has the net."""
    contents: list[Any]
    lu: list[Tensor]
    bias: list[Tensor] | None
    signs: list[Tensor]
    writes: list[int]
    """PyTorch's counts of those to the signs."""

    def holds(self, contents: list[Any]) -> bool:
        """Whether it is a plan for these, whatever the numbers in matrices and biases are."""
        return (
            len(contents) == len(self.contents)
            and all(map(is_, contents, self.contents))
            and list(map(writes_to, self.signs)) == self.writes
        )

    def numbers(self, x: Tensor) -> tuple[Any, Tensor | None] | None:
        """What is computed of the matrices, and the biases [M, D], as they are now; None where they have
        come to be others than rows x take."""
        lu, bias = torch.stack(self.lu), None if self.bias is None else torch.stack(self.bias)
        for found in (lu, bias):
            if found is not None and (
                found.shape[-1] != x.shape[-1] or found.dtype != wide(x.dtype) or found.device != x.device
            ):
                return None
        return self.run.matrices(lu), bias


def run(
    net: PlannedNet, layers: Sequence[nn.Module], x: Tensor, *, inverse: bool, logabsdet: bool
) -> tuple[Tensor, Tensor | None] | None:
    """f(x), or with ``inverse`` f⁻¹(x), of a net that consists of these layers, and its log-determinant [...]
    or None; None where the net goes another way."""
    kept = net._kept
    if (kept is None and torch.is_grad_enabled()) or not dispatch.fuses_net(x) or is_watched(x):
        return None
    contents = _contents(layers)
    if contents is None or not x.numel():
        return None
    precision = dispatch.implementation("triton", "precision_of")(x)
    name = (inverse, x.dtype, x.shape[-1], x.device, precision)
    if kept is None:
        plan = net._plans.get(name)
        if plan is None or not plan.holds(contents):
            net._plans[name] = plan = _plan(net, layers, contents, x, inverse)
        numbers = None if plan.run is None else plan.numbers(x)
    else:
        if torch.is_grad_enabled() and records(x, *(each for each in contents if isinstance(each, Tensor))):
            return None

        def make() -> Any:
            plan = _plan(net, layers, contents, x, inverse)
            return plan, None if plan.run is None else plan.numbers(x)

        plan, numbers = kept.get(name, contents, make) or (None, None)
    if plan is None or numbers is None:
        return None
    lead = x.shape[:-1]
    rows = x if x.dim() == 2 else x.reshape(math.prod(lead), x.shape[-1])
    out, total = plan.run(rows.contiguous(), *numbers, logabsdet=logabsdet)
    if x.dim() == 2:
        return out, total
    return out.reshape(x.shape), None if total is None else total.reshape(lead)


def _plan(net: PlannedNet, layers: Sequence[Any], contents: list[Any], x: Tensor, inverse: bool) -> Plan:
    """A plan for rows like x; one that says so where no kernel has the net."""
    tensors = [each for each in contents if isinstance(each, Tensor)]
    fits = (
        all(map(counts_writes, contents))
        and x.dtype == layers[0].dtype
        and all(t.device == x.device for t in tensors)
    )
    fixed = net._kept is not None or all(map(_is_fixed, layers))
    described = net._as_one(x) if fits and fixed else None
    if described is None:  # what does not fit is left to the layers, which say what is wrong
        return Plan(None, contents, [], None, [], [])
    signs = [layer._buffers["sign"] for layer in layers]
    found = dispatch.implementation("triton", "prepare_net")(x, *described, inverse=inverse)
    lu, bias = [layer.lu for layer in layers], [layer.bias for layer in layers]
    return Plan(found, contents, lu, None if bias[0] is None else bias, signs, list(map(writes_to, signs)))


def _is_fixed(layer: LUDense) -> bool:
    """Whether nothing is learnt in the layer's activation, nor can be written to without being seen here."""
    activation = layer.activation
    return activation is None or (
        type(activation) in FIXED
        and not vars(activation).keys() & {"slopes", "fused"}
        and not any(True for _ in activation.parameters())
    )


def _contents(layers: Sequence[nn.Module]) -> list[Any] | None:
    """The modules and tensors that these layers consist of; None where one of them may compute anything else
    than an ``LUDense``, or has no parameter of its own, as where one is parametrised."""
    found: list[Any] = []
    for layer in layers:
        if not isinstance(layer, LUDense) or is_replaced(layer, LUDense):
            return None
        parameters, buffers = layer._parameters, layer._buffers
        if "lu" not in parameters or "bias" not in parameters:
            return None
        found += (parameters["lu"], parameters["bias"], buffers["sign"], buffers["permutation"])
        activation: Any = layer._modules.get("activation")
        if activation is None:
            continue
        if activation._modules or is_replaced(activation, activation._described):
            return None
        found.append(activation)
        found += activation._parameters.values()
        found += activation._buffers.values()
    return found

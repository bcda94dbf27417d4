"""Layers one after another as one node of autograd that keeps nothing between them.

Otherwise autograd keeps the input and the pre-activation of each of M layers, about 2·M·N·D numbers for N
rows. The layers can be inverted, so the node keeps its output alone: its backward walks from the last layer
to the first, recovers each layer's input from that layer's output, recomputes this one layer and takes its
gradients. The walk costs an inverse and a forward of every layer on top of the gradients, and room for one
layer: the peak of a training step is about 7·N·D numbers whatever M.

Guard. What inversion loses, the gradients lose, and nothing in them would show it. So up to ``SAMPLED`` rows
of each layer's input are kept in forward and compared with what backward recovers; beyond ``tolerance``
backward raises and gives no gradient. This reads one value back from the device in each backward.

Derivatives of any order: under ``create_graph=True`` the same walk is recorded. An input recovered from
output and parameters is a function of both whose derivatives are those of the input itself, f⁻¹(f(x)) = x,
so nothing is missing from the second derivative; it keeps what it records, as any backward does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from lunet_fast import functional
from lunet_fast.layers.activations import BijectiveActivation, call
from lunet_fast.ops.autograd import records
from lunet_fast.ops.precision import without_autocast
from lunet_fast.ops.values import IDENTITY, Activation, Matrix

#: Rows of each layer's input that are kept for the guard, evenly spaced; all of them in smaller batches.
SAMPLED = 32

#: What can be inverted without losing what gradients need.
DTYPES = (torch.float32, torch.float64)


class Layer(NamedTuple):
    """A layer as the tensors that it depends on and what is computed of them."""

    matrix: Matrix
    activation: Activation | BijectiveActivation
    """A value if the layer is one operation, a module if it has to be called."""

    def tensors(self) -> list[Tensor | None]:
        """What gradients may be wanted of, and the rest of the matrix."""
        if isinstance(self.activation, Activation):
            return [*self.matrix, self.activation.parameters]
        return [*self.matrix, *self.activation.parameters()]

    def run(
        self, tensors: Sequence[Tensor | None], x: Tensor, *, inverse: bool, logabsdet: bool
    ) -> tuple[Tensor, Tensor | None]:
        """With these in the places of ``tensors()``: the layer or its inverse at x [..., D], and that
        direction's log-determinant [...] if asked for."""
        matrix = Matrix(*tensors[:4])  # type: ignore[arg-type]
        if isinstance(self.activation, Activation):
            phi = self.activation._replace(parameters=tensors[4])
            return functional.layer(x, matrix, phi, inverse=inverse, logabsdet=logabsdet)
        names = (f"module.{name}" for name, _ in self.activation.named_parameters())
        given = dict(zip(names, tensors[4:], strict=True))
        total = None
        if not inverse:
            x, total = functional.layer(x, matrix, IDENTITY, inverse=False, logabsdet=logabsdet)
        module = _Call(self.activation)
        x, share = torch.func.functional_call(module, given, (x, inverse, logabsdet))  # type: ignore[arg-type]
        if inverse:
            x, total = functional.layer(x, matrix, IDENTITY, inverse=True, logabsdet=logabsdet)
        return x, None if total is None else total + share


class _Call(nn.Module):
    """An activation's methods as one that ``functional_call`` can call."""

    def __init__(self, module: BijectiveActivation) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor, inverse: bool, logabsdet: bool) -> tuple[Tensor, Tensor | None]:
        return call(self.module, x, inverse=inverse, logabsdet=logabsdet)


def tolerance(dtype: torch.dtype) -> float:
    """The error of a recovered input above which the guard raises: half of the digits of ``dtype``."""
    return math.sqrt(torch.finfo(dtype).eps)


def applies(x: Tensor, layers: Sequence[Layer]) -> bool:
    """Whether ``run`` is of use for these and can do what is asked: an ordinary backward in eager mode.

    Forward-mode derivatives, ``torch.func`` and ``torch.compile`` need each layer's own node; without a
    gradient to record, or without rows, there is nothing to save.
    """
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined]
    if traced or torch._C._are_functorch_transforms_active():
        return False
    tensors = [x, *(t for layer in layers for t in layer.tensors() if t is not None)]
    return (
        records(*tensors)
        and x.numel() > 0
        and type(x) in (Tensor, nn.Parameter)
        and not x.is_meta
        and all(forward_ad.unpack_dual(t).tangent is None for t in tensors)
    )


def run(
    x: Tensor, layers: Sequence[Layer], *, inverse: bool, logabsdet: bool
) -> tuple[Tensor, Tensor | None]:
    """The layers from first to last at x [..., D], or their inverses from last to first, and the sum of the
    log-determinants [...] if asked for; float32 and float64.

    Kept for backward: the result [..., D], and M·min(N, ``SAMPLED``)·D numbers for the guard. Backward
    raises RuntimeError if a layer's input cannot be recovered to ``tolerance``.
    """
    results = _Run.apply(layers, inverse, logabsdet, x, *(t for layer in layers for t in layer.tensors()))
    return results if logabsdet else (results, None)


def each(
    x: Tensor, layers: Sequence[Layer], *, inverse: bool, logabsdet: bool
) -> tuple[Tensor, Tensor | None]:
    """What ``run`` gives, by the same operations, each layer keeping what its own backward needs."""
    total = None
    for layer in reversed(layers) if inverse else layers:
        x, share = layer.run(layer.tensors(), x, inverse=inverse, logabsdet=logabsdet)
        if share is not None:
            total = share if total is None else total + share
    return x, total


class _Run(torch.autograd.Function):
    """``run``, with the layers' tensors spread out so that autograd sees every one."""

    @staticmethod
    def forward(
        ctx: Any, layers: Sequence[Layer], inverse: bool, logabsdet: bool, x: Tensor, *tensors: Tensor | None
    ) -> Tensor | tuple[Tensor, Tensor | None]:
        ctx.layers, ctx.inverse = layers, inverse
        ctx.set_materialize_grads(False)
        parts = list(zip(layers, _by_layer(layers, tensors), strict=True))
        samples, total = [], None
        for layer, own in reversed(parts) if inverse else parts:
            samples.append(_sample(x))
            x, share = layer.run(own, x, inverse=inverse, logabsdet=logabsdet)
            if share is not None:
                total = share if total is None else total + share
        ctx.save_for_backward(x, torch.stack(samples), *tensors)
        return (x, total) if logabsdet else x

    @staticmethod
    def backward(ctx: Any, grad: Any, grad_logabsdet: Any = None) -> tuple[Tensor | None, ...]:
        x, samples, *tensors = ctx.saved_tensors
        layers: Sequence[Layer] = ctx.layers
        own = _by_layer(layers, tensors)
        needs_x, *needed = ctx.needs_input_grad[3:]
        needs = _by_layer(layers, needed)
        gradients: list[Sequence[Tensor | None]] = [(None,) * len(each) for each in own]
        order = list(range(len(layers)))[:: -1 if ctx.inverse else 1]
        # What lies before the first layer that a gradient is wanted of need not be walked.
        first = 0 if needs_x else next(step for step, index in enumerate(order) if any(needs[index]))
        walk = range(len(order) - 1, first - 1, -1)
        grad = torch.zeros_like(x) if grad is None else grad
        recovered = []
        with without_autocast(x):
            for step in walk:
                index = order[step]
                x, _ = layers[index].run(own[index], x, inverse=not ctx.inverse, logabsdet=False)
                recovered.append(_sample(x))
                grad, gradients[index] = _layer_gradients(
                    *(layers[index], own[index], x, grad, grad_logabsdet),
                    inverse=ctx.inverse,
                    needs_x=needs_x or step > first,
                    needed=needs[index],
                )
        errors = _errors(torch.stack(recovered), samples[first:].flip(0)).tolist()
        for step, error in zip(walk, errors, strict=True):
            _check(order[step], error, x.dtype)
        return (None, None, None, grad, *chain.from_iterable(gradients))


def _by_layer(layers: Sequence[Layer], values: Sequence[Any]) -> list[Sequence[Any]]:
    """One value for each tensor of each layer, in order, split into those of each layer."""
    parts, start = [], 0
    for layer in layers:
        stop = start + len(layer.tensors())
        parts.append(values[start:stop])
        start = stop
    return parts


def _layer_gradients(
    layer: Layer,
    tensors: Sequence[Tensor | None],
    x: Tensor,
    grad: Tensor,
    grad_logabsdet: Tensor | None,
    *,
    inverse: bool,
    needs_x: bool,
    needed: Sequence[bool],
) -> tuple[Any, list[Tensor | None]]:
    """Gradients of x and of the layer's tensors, None where not needed, by recomputing the layer; recorded
    themselves if grad mode is on."""
    recorded = torch.is_grad_enabled()

    def separate(tensor: Any, wanted: bool) -> Any:
        # x depends on the parameters when it was recovered under record, and hooks hang on the parameters:
        # gradients of aliases see neither.
        if not wanted:
            return tensor
        return tensor.view_as(tensor) if recorded else tensor.detach().requires_grad_()

    x = separate(x, needs_x)
    tensors = list(map(separate, tensors, needed))
    with torch.enable_grad():
        result, share = layer.run(tensors, x, inverse=inverse, logabsdet=grad_logabsdet is not None)
    outputs: Any = (result,) if share is None else (result, share)
    cotangents: Any = (grad,) if share is None else (grad, grad_logabsdet)
    wanted: Any = [t for t, wants in zip((x, *tensors), (needs_x, *needed), strict=True) if wants]
    found = iter(torch.autograd.grad(outputs, wanted, cotangents, create_graph=recorded))
    return next(found) if needs_x else None, [next(found) if wants else None for wants in needed]


def _sample(x: Tensor) -> Tensor:
    """At most ``SAMPLED`` evenly spaced rows of x [..., D], a copy."""
    rows = x.detach().reshape(-1, x.shape[-1])
    return rows[:: -(-rows.shape[0] // SAMPLED)].clone()


def _errors(found: Tensor, kept: Tensor) -> Tensor:
    """For each of M layers, rows [M, r, D], the largest error of a row [M]: its root mean square relative to
    that of the layer's rows, s, or to √s if s > 1.

    √s because φ′ turns within about 1 of the origin: an error e makes a share 1/s of the slopes wrong by e,
    which is e/√s of a gradient's norm. Rows that were not finite before cannot be judged and are left out.
    """
    judged = kept.isfinite().all(-1, keepdim=True)
    kept, off = torch.where(judged, kept, 0.0), torch.where(judged, found - kept, 0.0)
    size = (kept.square().mean(-1).sum(-1) / judged.sum((-1, -2)).clamp(min=1)).sqrt()
    unit = torch.where(size == 0.0, 1.0, torch.minimum(size, size.sqrt()))
    return off.square().mean(-1).amax(-1).sqrt() / unit


def _check(index: int, error: float, dtype: torch.dtype) -> None:
    """Raise if this error of what was recovered through ``layers.index`` is above the tolerance, or NaN."""
    limit = tolerance(dtype)
    if error <= limit:
        return
    precise = dtype == torch.float64 or torch.get_float32_matmul_precision() == "highest"
    product = "" if precise else "torch.set_float32_matmul_precision('highest'), "
    raise RuntimeError(
        f"memory='reversible': what backward recovered through layers.{index} is off by a relative "
        f"{error:.1e}, above the {limit:.1e} allowed in {dtype}, so gradients would be wrong; set "
        f"memory='saved', or use {product}float64, fewer layers or better-conditioned ones "
        "(LUNet.condition() tells which layer loses digits)"
    )

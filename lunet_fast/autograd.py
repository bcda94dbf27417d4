"""Autograd for the registered operations: one ``torch.autograd.Function`` each.

First derivatives in eager mode and under ``torch.compile`` are the hand-written ``*_backward`` operations.
Whatever else is asked for (a backward that must itself be differentiable, forward-mode derivatives,
``vmap`` over parameters) goes through the formulas of ``reference.py``, which PyTorch differentiates and
batches itself: slower, and right to every order.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor, unwrap_if_dead
from torch._functorch.autograd_function import (  # type: ignore[attr-defined]
    enable_single_level_autograd_function,
)
from torch.autograd import forward_ad
from torch.nn import Parameter

from lunet_fast import ops, reference, tracing

_ops = torch.ops.lunet_fast

_below_autograd = torch._C._AutoDispatchBelowADInplaceOrView

#: (a, c, κ) as floats; (1, 0, 1) stands for no activation.
Fixed = tuple[float, float, float]

Outputs = tuple[Tensor, Tensor]


def _pair(function: Callable[..., Outputs], tensors: tuple[Tensor | None, ...]) -> Callable[..., Outputs]:
    """``function`` of those of ``tensors`` that are not None, in order; the others stay None."""
    present = [t is not None for t in tensors]

    def of_present(*given: Tensor) -> Outputs:
        values = iter(given)
        return function(*(next(values) if here else None for here in present))

    return of_present


def _vjp(
    function: Callable[..., Outputs], tensors: tuple[Tensor | None, ...], cotangents: Outputs
) -> list[Tensor | None]:
    """Differentiable gradients of ``tensors`` (None for None) of a pair-valued function."""
    primals = [t for t in tensors if t is not None]
    with reference.without_autocast(primals[0]):
        pullback = torch.func.vjp(_pair(function, tensors), *primals)[1]
        gradients = iter(pullback(cotangents))
    return [None if t is None else next(gradients) for t in tensors]


def _jvp(
    function: Callable[..., Outputs],
    tensors: tuple[Tensor | None, ...],
    tangents: tuple[Tensor | None, ...],
) -> Outputs:
    """The tangents of a pair-valued function; a missing tangent is zero.

    By two pullbacks: u ↦ Jᵀ u is linear, so its own pullback is v ↦ J v. PyTorch does not allow a
    forward-mode derivative inside another.
    """
    primals = tuple(t for t in tensors if t is not None)
    directions = tuple(
        torch.zeros_like(t) if d is None else d
        for t, d in zip(tensors, tangents, strict=True)
        if t is not None
    )
    with reference.without_autocast(primals[0]):
        outputs, pullback = torch.func.vjp(_pair(function, tensors), *primals)[:2]
        pushforward = torch.func.vjp(pullback, tuple(torch.zeros_like(t) for t in outputs))[1]
        ((y, logabsdet),) = pushforward(directions)
    return y.contiguous(), logabsdet.contiguous()


def _vmap(
    function: Callable[..., Outputs], tensors: tuple[Tensor | None, ...], dims: tuple[int | None, ...]
) -> Outputs:
    """A pair-valued function batched over those of ``tensors`` that have a batch dimension."""
    given = [(t, d) for t, d in zip(tensors, dims, strict=True) if t is not None]
    mapped = torch.func.vmap(_pair(function, tensors), in_dims=tuple(d for _, d in given))
    with reference.without_autocast(given[0][0]):
        return mapped(*(t for t, _ in given))


def _is_watched(*tensors: Any) -> bool:
    """Whether something besides autograd wants to see an operation on these: tracing, a torch.func
    transform, a forward-mode derivative, a dispatch mode, batched gradients, a tensor subclass."""
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
        or _forward_level() >= 0
        or any(type(t) not in (Tensor, Parameter) or is_legacy_batchedtensor(t) for t in tensors)
    )


def _forward_level() -> int:
    """How many ``forward_ad.dual_level`` are entered, less one."""
    return forward_ad._current_level


def _run(name: str, *args: Any) -> Any:
    """An operation; past PyTorch's dispatcher, which costs as much as a small layer, where nobody watches.

    The first two arguments are what tells: rows and matrix, or the gradients of both results.
    """
    if _is_watched(*(arg for arg in args[:2] if isinstance(arg, Tensor))):
        return getattr(_ops, name)(*args)
    with _below_autograd():
        return ops.IMPLEMENTATIONS[name](*args)


def records(*tensors: Tensor | None) -> bool:
    """Whether autograd will want a backward of a function of these."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _needed(ctx: Any) -> tuple[bool, ...]:
    """Which of (x, lu, bias, slopes) want a gradient. While being traced, all: there torch.compile does not
    know it of a tensor that torch.func differentiates by."""
    return (True,) * 4 if torch.compiler.is_compiling() else ctx.needs_input_grad[:4]


def _whole(
    grad: Tensor | None, grad_logabsdet: Tensor | None, x: Tensor, logabsdet: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of a pair of results, zeros for one that nothing depended on."""
    if grad is None:
        grad = torch.zeros_like(x)
    if grad_logabsdet is None:
        shape = x.shape[:-1] if logabsdet else (0,)
        grad_logabsdet = x.new_zeros(shape, dtype=reference.wide(x.dtype))
    return grad, grad_logabsdet


def _stackable(one: Callable[..., Outputs], sign: Tensor | None) -> Callable[..., Outputs]:
    """``one`` layer's formula as a function of (x, lu, bias, slopes), also for stacked layers."""

    def pair(x: Tensor, lu: Tensor, bias: Tensor | None, slopes: Tensor | None) -> Outputs:
        if lu.dim() == 2:
            return one(x, lu, bias, slopes, sign)
        return _vmap(one, (x, lu, bias, slopes, sign), (0, 0, 0, None, 0))

    return pair


def _batched_natively(
    size: int, dims: tuple[int | None, ...], args: tuple[Any, ...]
) -> tuple[Tensor | None, ...] | None:
    """(x, lu, bias, slopes, sign, permutation) with vmap's dimension as one that the operation has itself.

    A batch of x alone is more rows; a batch of layers is a stack. None if it is neither.
    """
    x, lu, bias, slopes, sign, permutation = args[:6]
    if all(d is None for d in dims[1:6]):
        moved = x.movedim(dims[0], 0)
        # Rows of stacked layers are [K, N, D]: the new dimension goes behind K.
        return (moved, lu, bias, slopes, sign, permutation) if lu.dim() == 2 else None
    if dims[3] is not None or permutation is not None or lu.dim() != 2 + (dims[1] is not None):
        return None

    def stacked(tensor: Tensor | None, dim: int | None) -> Tensor | None:
        if tensor is None:
            return None
        return tensor.movedim(dim, 0) if dim is not None else tensor.expand(size, *tensor.shape)

    return (
        stacked(x, dims[0]),
        stacked(lu, dims[1]),
        stacked(bias, dims[2]),
        slopes,
        stacked(sign, dims[4]),
        None,
    )


def _slopes_or(slopes: Tensor | None, fixed: Fixed) -> reference.Slopes | None:
    if slopes is not None:
        return slopes
    return None if fixed[1] == 0.0 else fixed


class Activation(torch.autograd.Function):
    """(φ(x), Σ log φ′ per row or nothing)."""

    @staticmethod
    def forward(x: Tensor, slopes: Tensor | None, fixed: Fixed, logabsdet: bool) -> Outputs:
        return _run("activation_forward", x, slopes, *fixed, logabsdet)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Outputs) -> None:
        x, slopes, ctx.fixed, ctx.logabsdet = inputs
        ctx.save_for_backward(x, slopes)

    @staticmethod
    def formula(fixed: Fixed, logabsdet: bool) -> Callable[..., Outputs]:
        def pair(x: Tensor, slopes: Tensor | None) -> Outputs:
            triple = fixed if slopes is None else slopes
            y = reference.leaky_softplus(x, triple)
            return y, reference.log_derivative_sum(x, triple) if logabsdet else _none_of(x)

        return pair

    @staticmethod
    def backward(ctx: Any, grad_y: Any, grad_logabsdet: Any) -> tuple[Tensor | None, ...]:
        x, slopes = ctx.saved_tensors
        grad_y, grad_logabsdet = _whole(grad_y, grad_logabsdet, x, ctx.logabsdet)
        if torch.is_grad_enabled():
            pair = Activation.formula(ctx.fixed, ctx.logabsdet)
            grad_x, grad_slopes = _vjp(pair, (x, slopes), (grad_y, grad_logabsdet))
        else:
            grad_x, grad_slopes = _run(
                "activation_backward",
                grad_y,
                grad_logabsdet if ctx.logabsdet else None,
                x,
                slopes,
                *ctx.fixed,
            )
        return grad_x, grad_slopes if slopes is not None else None, None, None

    @staticmethod
    def tangent(ctx: Any, dx: Tensor | None, dslopes: Tensor | None, *_: None) -> Outputs:
        return _jvp(Activation.formula(ctx.fixed, ctx.logabsdet), ctx.saved_tensors, (dx, dslopes))

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple, x: Tensor, slopes: Tensor | None, fixed: Fixed, logabsdet: bool
    ) -> Any:
        outputs = _vmap(Activation.formula(fixed, logabsdet), (x, slopes), in_dims[:2])
        return outputs, (0, 0)


class ActivationInverse(torch.autograd.Function):
    """(φ⁻¹(y), −Σ log φ′ per row or nothing)."""

    @staticmethod
    def forward(y: Tensor, slopes: Tensor | None, fixed: Fixed, logabsdet: bool) -> Outputs:
        return _run("activation_inverse", y, slopes, *fixed, logabsdet)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Outputs) -> None:
        y, slopes, ctx.fixed, ctx.logabsdet = inputs
        ctx.save_for_backward(y, slopes, output[0])

    @staticmethod
    def formula(fixed: Fixed, logabsdet: bool) -> Callable[..., Outputs]:
        def pair(y: Tensor, slopes: Tensor | None) -> Outputs:
            triple = fixed if slopes is None else slopes
            x = reference.leaky_softplus_inverse(y, triple)
            return x, -reference.log_derivative_sum(x, triple) if logabsdet else _none_of(y)

        return pair

    @staticmethod
    def backward(ctx: Any, grad_x: Any, grad_logabsdet: Any) -> tuple[Tensor | None, ...]:
        y, slopes, x = ctx.saved_tensors
        grad_x, grad_logabsdet = _whole(grad_x, grad_logabsdet, y, ctx.logabsdet)
        if torch.is_grad_enabled():
            pair = ActivationInverse.formula(ctx.fixed, ctx.logabsdet)
            grad_y, grad_slopes = _vjp(pair, (y, slopes), (grad_x, grad_logabsdet))
        else:
            grad_y, grad_slopes = _run(
                "activation_inverse_backward",
                grad_x,
                grad_logabsdet if ctx.logabsdet else None,
                x,
                slopes,
                *ctx.fixed,
            )
        return grad_y, grad_slopes if slopes is not None else None, None, None

    @staticmethod
    def tangent(ctx: Any, dy: Tensor | None, dslopes: Tensor | None, *_: None) -> Outputs:
        return _jvp(ActivationInverse.formula(ctx.fixed, ctx.logabsdet), ctx.saved_tensors[:2], (dy, dslopes))

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple, y: Tensor, slopes: Tensor | None, fixed: Fixed, logabsdet: bool
    ) -> Any:
        outputs = _vmap(ActivationInverse.formula(fixed, logabsdet), (y, slopes), in_dims[:2])
        return outputs, (0, 0)


def _none_of(x: Tensor) -> Tensor:
    """The empty tensor that stands for a log-determinant not asked for."""
    return x.new_zeros(0, dtype=reference.wide(x.dtype))


class Layer(torch.autograd.Function):
    """(φ(A x + b), log|det J| per row or nothing, and two results kept for backward)."""

    @staticmethod
    def forward(
        x: Tensor,
        lu: Tensor,
        bias: Tensor | None,
        slopes: Tensor | None,
        sign: Tensor | None,
        permutation: Tensor | None,
        fixed: Fixed,
        logabsdet: bool,
        save: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return _run("layer_forward", x, lu, sign, permutation, bias, slopes, *fixed, logabsdet, save)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
        x, lu, bias, slopes, sign, permutation, ctx.fixed, ctx.logabsdet, _ = inputs
        h, weight = output[2:]
        ctx.mark_non_differentiable(h, weight)
        ctx.save_for_backward(x, lu, bias, slopes, sign, permutation, h, weight)

    @staticmethod
    def formula(
        sign: Tensor | None, permutation: Tensor | None, fixed: Fixed, logabsdet: bool
    ) -> Callable[..., Outputs]:
        def one(
            x: Tensor, lu: Tensor, bias: Tensor | None, slopes: Tensor | None, sign: Tensor | None
        ) -> Outputs:
            options: dict[str, Any] = {
                "sign": sign,
                "permutation": permutation,
                "slopes": _slopes_or(slopes, fixed),
            }
            if logabsdet:
                return reference.lu_dense_and_logabsdet(x, lu, bias, **options)
            return reference.lu_dense(x, lu, bias, **options), _none_of(x)

        return _stackable(one, sign)

    @staticmethod
    def backward(ctx: Any, grad_y: Any, grad_logabsdet: Any, *_: Any) -> tuple[Tensor | None, ...]:
        x, lu, bias, slopes, sign, permutation, h, weight = ctx.saved_tensors
        grad_y, grad_logabsdet = _whole(grad_y, grad_logabsdet, x, ctx.logabsdet)
        if torch.is_grad_enabled():
            pair = Layer.formula(sign, permutation, ctx.fixed, ctx.logabsdet)
            gradients = _vjp(pair, (x, lu, bias, slopes), (grad_y, grad_logabsdet))
            return (*gradients, None, None, None, None, None)
        needs_x, needs_lu, needs_bias, needs_slopes = _needed(ctx)
        has_bias = bias is not None and needs_bias
        grad_x, grad_lu, grad_bias, grad_slopes = _run(
            "layer_backward",
            grad_y,
            grad_logabsdet if ctx.logabsdet else None,
            x,
            h,
            weight,
            lu,
            sign,
            permutation,
            bias,
            slopes,
            *ctx.fixed,
            needs_x,
            needs_lu,
            has_bias,
        )
        return (
            grad_x if needs_x else None,
            grad_lu if needs_lu else None,
            grad_bias if has_bias else None,
            grad_slopes if slopes is not None and needs_slopes else None,
            *(None,) * 5,
        )

    @staticmethod
    def tangent(ctx: Any, dx: Any, dlu: Any, dbias: Any, dslopes: Any, *_: None) -> tuple[Tensor | None, ...]:
        *tensors, sign, permutation = ctx.saved_tensors[:6]
        pair = Layer.formula(sign, permutation, ctx.fixed, ctx.logabsdet)
        return (*_jvp(pair, tuple(tensors), (dx, dlu, dbias, dslopes)), None, None)

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *args: Any) -> Any:
        x, lu, bias, slopes, sign, permutation, fixed, logabsdet, save = args
        native = _batched_natively(info.batch_size, in_dims, args)
        if native is not None:
            # A batched tensor does not tell whether what it wraps requires a gradient; here it is unwrapped.
            save = save or records(*native)
            outputs = EagerLayer.apply(*native, fixed, logabsdet, save)
            active = slopes is not None or fixed[1] != 0.0
            weight_dim = 0 if save and native[1] is not None and native[1].dim() == 3 else None
            return outputs, (0, 0 if logabsdet else None, 0 if save and active else None, weight_dim)

        def pair(x: Tensor, lu: Any, bias: Any, slopes: Any, sign: Any, permutation: Any) -> Outputs:
            return Layer.formula(sign, permutation, fixed, logabsdet)(x, lu, bias, slopes)

        outputs = _vmap(pair, args[:6], in_dims[:6])
        return (*outputs, _none_of(x), _none_of(x)), (0, 0, None, None)


class LayerInverse(torch.autograd.Function):
    """(A⁻¹ (φ⁻¹(y) − b), the inverse's log-determinant per row or nothing, and h kept for backward)."""

    @staticmethod
    def forward(
        y: Tensor,
        lu: Tensor,
        bias: Tensor | None,
        slopes: Tensor | None,
        sign: Tensor | None,
        permutation: Tensor | None,
        fixed: Fixed,
        logabsdet: bool,
        save: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        return _run("layer_inverse", y, lu, sign, permutation, bias, slopes, *fixed, logabsdet, save)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
        y, lu, bias, slopes, sign, permutation, ctx.fixed, ctx.logabsdet, _ = inputs
        x, _, h = output
        ctx.mark_non_differentiable(h)
        ctx.save_for_backward(y, lu, bias, slopes, sign, permutation, x, h)

    @staticmethod
    def formula(
        sign: Tensor | None, permutation: Tensor | None, fixed: Fixed, logabsdet: bool
    ) -> Callable[..., Outputs]:
        def one(
            y: Tensor, lu: Tensor, bias: Tensor | None, slopes: Tensor | None, sign: Tensor | None
        ) -> Outputs:
            options: dict[str, Any] = {
                "sign": sign,
                "permutation": permutation,
                "slopes": _slopes_or(slopes, fixed),
            }
            if logabsdet:
                return reference.lu_dense_inverse_and_logabsdet(y, lu, bias, **options)
            return reference.lu_dense_inverse(y, lu, bias, **options), _none_of(y)

        return _stackable(one, sign)

    @staticmethod
    def backward(ctx: Any, grad_x: Any, grad_logabsdet: Any, *_: Any) -> tuple[Tensor | None, ...]:
        y, lu, bias, slopes, sign, permutation, x, h = ctx.saved_tensors
        grad_x, grad_logabsdet = _whole(grad_x, grad_logabsdet, y, ctx.logabsdet)
        if torch.is_grad_enabled():
            pair = LayerInverse.formula(sign, permutation, ctx.fixed, ctx.logabsdet)
            gradients = _vjp(pair, (y, lu, bias, slopes), (grad_x, grad_logabsdet))
            return (*gradients, None, None, None, None, None)
        needs_y, needs_lu, needs_bias, needs_slopes = _needed(ctx)
        has_bias = bias is not None and needs_bias
        grad_y, grad_lu, grad_bias, grad_slopes = _run(
            "layer_inverse_backward",
            grad_x,
            grad_logabsdet if ctx.logabsdet else None,
            x,
            h,
            lu,
            sign,
            permutation,
            slopes,
            *ctx.fixed,
            needs_lu,
            has_bias,
        )
        return (
            grad_y if needs_y else None,
            grad_lu if needs_lu else None,
            grad_bias if has_bias else None,
            grad_slopes if slopes is not None and needs_slopes else None,
            *(None,) * 5,
        )

    @staticmethod
    def tangent(ctx: Any, dy: Any, dlu: Any, dbias: Any, dslopes: Any, *_: None) -> tuple[Tensor | None, ...]:
        *tensors, sign, permutation = ctx.saved_tensors[:6]
        pair = LayerInverse.formula(sign, permutation, ctx.fixed, ctx.logabsdet)
        return (*_jvp(pair, tuple(tensors), (dy, dlu, dbias, dslopes)), None)

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *args: Any) -> Any:
        y, lu, bias, slopes, sign, permutation, fixed, logabsdet, save = args
        native = _batched_natively(info.batch_size, in_dims, args)
        if native is not None:
            # A batched tensor does not tell whether what it wraps requires a gradient; here it is unwrapped.
            save = save or records(*native)
            outputs = EagerLayerInverse.apply(*native, fixed, logabsdet, save)
            active = slopes is not None or fixed[1] != 0.0
            return outputs, (0, 0 if logabsdet else None, 0 if save and active else None)

        def pair(y: Tensor, lu: Any, bias: Any, slopes: Any, sign: Any, permutation: Any) -> Outputs:
            return LayerInverse.formula(sign, permutation, fixed, logabsdet)(y, lu, bias, slopes)

        outputs = _vmap(pair, args[:6], in_dims[:6])
        return (*outputs, _none_of(y)), (0, 0, None)


class Net(torch.autograd.Function):
    """(f(x) or f⁻¹(x), that direction's log|det J| per row or nothing) of layers one after another.

    lu is [M, D, D], bias and sign [M, D], slopes [M − 1, 3] or [M − 1, 3, D]; the last layer is linear.
    Nothing but x is kept for backward, or for the inverse its result.
    """

    @staticmethod
    def forward(
        x: Tensor,
        lu: Tensor,
        bias: Tensor | None,
        slopes: Tensor | None,
        sign: Tensor | None,
        fixed: Fixed,
        inverse: bool,
        logabsdet: bool,
    ) -> Outputs:
        return _run("net", x, lu, sign, bias, slopes, *fixed, inverse, logabsdet)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Outputs) -> None:
        x, lu, bias, slopes, sign, ctx.fixed, ctx.inverse, ctx.logabsdet = inputs
        ctx.save_for_backward(x, lu, bias, slopes, sign, output[0] if ctx.inverse else None)

    @staticmethod
    def formula(sign: Tensor | None, fixed: Fixed, inverse: bool, logabsdet: bool) -> Callable[..., Outputs]:
        def pair(x: Tensor, lu: Tensor, bias: Tensor | None, slopes: Tensor | None) -> Outputs:
            total = None
            last = lu.shape[0] - 1
            run = reference.lu_dense_inverse_and_logabsdet if inverse else reference.lu_dense_and_logabsdet
            for m in reversed(range(last + 1)) if inverse else range(last + 1):
                own = None if m == last else _slopes_or(None if slopes is None else slopes[m], fixed)
                x, share = run(
                    x,
                    lu[m],
                    None if bias is None else bias[m],
                    sign=None if sign is None else sign[m],
                    slopes=own,
                )
                if logabsdet:
                    total = share if total is None else total + share
            return x, _none_of(x) if total is None else total

        return pair

    @staticmethod
    def backward(ctx: Any, grad: Any, grad_logabsdet: Any) -> tuple[Tensor | None, ...]:
        given, lu, bias, slopes, sign, result = ctx.saved_tensors
        grad, grad_logabsdet = _whole(grad, grad_logabsdet, given, ctx.logabsdet)
        if torch.is_grad_enabled():
            pair = Net.formula(sign, ctx.fixed, ctx.inverse, ctx.logabsdet)
            gradients = _vjp(pair, (given, lu, bias, slopes), (grad, grad_logabsdet))
            return (*gradients, None, None, None, None)
        needs_x, needs_lu, needs_bias, needs_slopes = _needed(ctx)
        has_bias = bias is not None and needs_bias
        grad_x, grad_lu, grad_bias, grad_slopes = _run(
            "net_backward",
            grad,
            grad_logabsdet if ctx.logabsdet else None,
            result if ctx.inverse else given,
            lu,
            sign,
            bias,
            slopes,
            *ctx.fixed,
            ctx.inverse,
            needs_x,
            needs_lu,
            has_bias,
        )
        return (
            grad_x if needs_x else None,
            grad_lu if needs_lu else None,
            grad_bias if has_bias else None,
            grad_slopes if slopes is not None and needs_slopes else None,
            *(None,) * 4,
        )

    @staticmethod
    def tangent(ctx: Any, dx: Any, dlu: Any, dbias: Any, dslopes: Any, *_: None) -> Outputs:
        *tensors, sign = ctx.saved_tensors[:5]
        pair = Net.formula(sign, ctx.fixed, ctx.inverse, ctx.logabsdet)
        return _jvp(pair, tuple(tensors), (dx, dlu, dbias, dslopes))

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *args: Any) -> Any:
        x, lu, bias, slopes, sign, fixed, inverse, logabsdet = args
        if all(d is None for d in in_dims[1:5]):  # more rows
            outputs = EagerNet.apply(x.movedim(in_dims[0], 0), *args[1:])
            return outputs, (0, 0 if logabsdet else None)

        def pair(x: Tensor, lu: Any, bias: Any, slopes: Any, sign: Any) -> Outputs:
            return Net.formula(sign, fixed, inverse, logabsdet)(x, lu, bias, slopes)

        return _vmap(pair, args[:5], in_dims[:5]), (0, 0)


def _eager(traceable: type[torch.autograd.Function], inputs: int) -> Any:
    """The Function for eager mode: with forward-mode derivatives and quick to call.

    torch.compile refuses to trace a Function that defines jvp, so what it traces is the class without.
    And ``Function.apply`` binds its arguments by forward's signature, worked out anew at each call, which
    costs as much as a small layer; here it does so only where a torch.func transform needs it. ``inputs`` is
    how many of the arguments, from the first, are tensors that a tangent is computed from.
    """

    def apply(cls: Any, *args: Any) -> Any:
        if torch._C._are_functorch_transforms_active():
            return super(traceable, cls).apply(*args)
        return record(cls, *args)

    def record(cls: Any, *args: Any) -> Any:
        alive = (unwrap_if_dead(arg) if isinstance(arg, Tensor) else arg for arg in args)
        return super(torch.autograd.Function, cls).apply(*alive)  # type: ignore[misc]

    def forward(*args: Any) -> Any:
        # A gradient is recorded here, so the operation's own autograd (below) need not be asked, nor are
        # its results views of anything.
        with _below_autograd():
            return traceable.forward(*args)

    forward.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]

    def setup_context(ctx: Any, args: tuple[Any, ...], output: Any) -> None:
        traceable.setup_context(ctx, args, output)
        if _forward_level() >= 0:
            ctx.save_for_forward(*args[:inputs])
        ctx.set_materialize_grads(False)

    def jvp(ctx: Any, *tangents: Any) -> Any:
        if _forward_modes() > 1:
            raise NotImplementedError(
                "forward-mode derivatives of forward-mode derivatives are not supported for LU layers; take "
                "the inner or the outer one in reverse mode, as torch.func.hessian does"
            )
        return traceable.tangent(ctx, *tangents)  # type: ignore[attr-defined]

    members = {"forward": forward, "setup_context": setup_context, "jvp": jvp}
    statics: dict[str, Any] = {name: staticmethod(member) for name, member in members.items()}
    statics["apply"] = classmethod(apply)
    statics["record"] = classmethod(record)
    return type(f"Eager{traceable.__name__}", (traceable,), statics)


def _forward_modes() -> int:
    """How many forward-mode derivatives torch.func is taking around this call."""
    stack = torch._C._functorch.get_interpreter_stack() or []
    return sum(level.key() == torch._C._functorch.TransformType.Jvp for level in stack)


EagerActivation = _eager(Activation, 2)
EagerActivationInverse = _eager(ActivationInverse, 2)
EagerLayer = _eager(Layer, 6)
EagerLayerInverse = _eager(LayerInverse, 6)
EagerNet = _eager(Net, 5)


def _apply(traceable: Any, eager: Any, args: tuple[Any, ...]) -> Any:
    return (traceable if torch.compiler.is_compiling() else eager).apply(*args)


def activation(x: Tensor, slopes: Tensor | None, fixed: Fixed, logabsdet: bool) -> Outputs:
    """``Activation`` on its arguments; the operation alone where nothing is recorded."""
    if tracing.is_recording():
        return tracing.activation(x, fixed if slopes is None else slopes, logabsdet)
    if not records(x, slopes) and not _is_watched(x):
        return _run("activation_forward", x, slopes, *fixed, logabsdet)
    return _apply(Activation, EagerActivation, (x, slopes, fixed, logabsdet))


def activation_inverse(y: Tensor, slopes: Tensor | None, fixed: Fixed, logabsdet: bool) -> Outputs:
    """``ActivationInverse`` on its arguments; the operation alone where nothing is recorded."""
    if tracing.is_recording():
        return tracing.activation_inverse(y, fixed if slopes is None else slopes, logabsdet)
    if not records(y, slopes) and not _is_watched(y):
        return _run("activation_inverse", y, slopes, *fixed, logabsdet)
    return _apply(ActivationInverse, EagerActivationInverse, (y, slopes, fixed, logabsdet))


def layer(
    x: Tensor,
    lu: Tensor,
    bias: Tensor | None,
    slopes: Tensor | None,
    sign: Tensor | None,
    permutation: Tensor | None,
    fixed: Fixed,
    logabsdet: bool,
) -> Outputs:
    """The first two results of ``Layer``; the operation alone where nothing is recorded."""
    if tracing.is_recording():
        own = _slopes_or(slopes, fixed)
        return tracing.layer(x, lu, bias, own, sign, permutation, logabsdet, inverse=False)
    save = records(x, lu, bias, slopes)
    if not save and not _is_watched(x, lu):
        return _run("layer_forward", x, lu, sign, permutation, bias, slopes, *fixed, logabsdet, False)[:2]
    return _apply(Layer, EagerLayer, (x, lu, bias, slopes, sign, permutation, fixed, logabsdet, save))[:2]


def layer_inverse(
    y: Tensor,
    lu: Tensor,
    bias: Tensor | None,
    slopes: Tensor | None,
    sign: Tensor | None,
    permutation: Tensor | None,
    fixed: Fixed,
    logabsdet: bool,
) -> Outputs:
    """The first two results of ``LayerInverse``; the operation alone where nothing is recorded."""
    if tracing.is_recording():
        own = _slopes_or(slopes, fixed)
        return tracing.layer(y, lu, bias, own, sign, permutation, logabsdet, inverse=True)
    save = records(y, lu, bias, slopes)
    if not save and not _is_watched(y, lu):
        return _run("layer_inverse", y, lu, sign, permutation, bias, slopes, *fixed, logabsdet, False)[:2]
    arguments = (y, lu, bias, slopes, sign, permutation, fixed, logabsdet, save)
    return _apply(LayerInverse, EagerLayerInverse, arguments)[:2]


def net(*args: Any) -> Outputs:
    """``Net`` on its arguments, in eager mode or while being traced."""
    results = _apply(Net, EagerNet, args)
    return results[0], results[1]


# An exported program calls the operations themselves, with parameters that may be trained further: there
# the Functions above are reached from the operation.


def _from_operation(name: str, function: Callable[..., Any]) -> None:
    operation = getattr(_ops, name).default

    def call(*args: Any) -> Any:
        tensors = [t for t in args if isinstance(t, Tensor)]
        if _forward_modes() or any(forward_ad.unpack_dual(t).tangent is not None for t in tensors):
            raise NotImplementedError(
                "forward-mode derivatives of an exported or compiled LU layer are not supported; take them "
                "of the layer itself, in eager mode"
            )
        if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
            # torch.func has unpacked its own tensors by now: what is left to do is autograd's, a level of it.
            with enable_single_level_autograd_function():
                return function(*args)
        with _below_autograd():
            return operation(*args)

    ops.library.impl(name, call, "Autograd")


def _activation_arguments(x: Tensor, slopes: Tensor | None, *rest: Any) -> tuple[Any, ...]:
    *fixed, logabsdet = rest
    return x, slopes, tuple(fixed), logabsdet


def _layer_arguments(
    x: Tensor, lu: Tensor, sign: Any, permutation: Any, bias: Any, slopes: Any, *rest: Any
) -> tuple[Any, ...]:
    *fixed, logabsdet, _ = rest
    return x, lu, bias, slopes, sign, permutation, tuple(fixed), logabsdet, True


def _net_arguments(x: Tensor, lu: Tensor, sign: Any, bias: Any, slopes: Any, *rest: Any) -> tuple[Any, ...]:
    *fixed, inverse, logabsdet = rest
    return x, lu, bias, slopes, sign, tuple(fixed), inverse, logabsdet


_from_operation("activation_forward", lambda *a: EagerActivation.record(*_activation_arguments(*a)))
_from_operation("activation_inverse", lambda *a: EagerActivationInverse.record(*_activation_arguments(*a)))
_from_operation("layer_forward", lambda *a: EagerLayer.record(*_layer_arguments(*a)))
_from_operation("layer_inverse", lambda *a: EagerLayerInverse.record(*_layer_arguments(*a)))
_from_operation("net", lambda *a: EagerNet.record(*_net_arguments(*a)))

"""Autograd for the registered operations: one ``torch.autograd.Function`` for each and its backward.

First derivatives in eager mode and under ``torch.compile`` are the hand-written ``*_backward`` operations.
Whatever else is asked for (a backward that must itself be differentiable, forward-mode derivatives,
``vmap`` over parameters) goes through the formulas of ``reference.py``, which PyTorch differentiates and
batches itself: slower, and right to every order.

All Functions take the same arguments, (x, lu, bias, parameters, sign, permutation, kind, constants,
logabsdet, save): the tensors that are differentiated first, then the rest of ``Matrix`` and ``Activation``.
An activation by itself has None for the matrix, and only a layer heeds ``save``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor, unwrap_if_dead
from torch._functorch.autograd_function import (  # type: ignore[attr-defined]
    enable_single_level_autograd_function,
)
from torch.autograd import forward_ad
from torch.nn import Parameter

from lunet_fast.ops import dispatch, flops, reference, tracing
from lunet_fast.ops.precision import wide, without_autocast
from lunet_fast.ops.values import Activation, Matrix, WithLogabsdet, flatten, structure

_ops = torch.ops.lunet_fast

_below_autograd = torch._C._AutoDispatchBelowADInplaceOrView

Tensors = tuple[Tensor | None, ...]
Outputs = tuple[Tensor, Tensor]
Pair = Callable[..., Outputs]

#: How many of a Function's arguments, from the first, are differentiated; and how many are tensors.
DIFFERENTIATED, TENSORS = 4, 6


class Operation(NamedTuple):
    """An operation that has a gradient."""

    name: str
    backward: str
    formula: Callable[..., tuple[Tensor, Tensor | None]]
    """The function of ``reference`` that says what is computed."""
    inverse: bool
    kept: int = 0
    """How many results after the first two are for backward; with any, there is a flag ``save``."""


_ACTIVATION, _LAYER, _NET = reference.activation, reference.layer, reference.net

OPERATIONS = [
    Operation("activation_forward", "activation_backward", _ACTIVATION, inverse=False),
    Operation("activation_inverse", "activation_inverse_backward", _ACTIVATION, inverse=True),
    Operation("layer_forward", "layer_backward", _LAYER, inverse=False, kept=2),
    Operation("layer_inverse", "layer_inverse_backward", _LAYER, inverse=True, kept=1),
    Operation("net_forward", "net_backward", _NET, inverse=False),
    Operation("net_inverse", "net_inverse_backward", _NET, inverse=True),
]


# --- derivatives by formula -----------------------------------------------------------------------------


def _none_of(x: Tensor) -> Tensor:
    """The empty tensor that stands for a log-determinant not asked for."""
    return x.new_zeros(0, dtype=wide(x.dtype))


def _pair(operation: Operation, kind: str, constants: tuple[float, ...], logabsdet: bool) -> Pair:
    """The operation's formula as a function of its six tensors."""

    def pair(x: Tensor, *others: Any) -> Outputs:
        values = _values(*others, kind, constants)
        y, total = operation.formula(x, *values, inverse=operation.inverse, logabsdet=logabsdet)
        return y, _none_of(y) if total is None else total

    def stackable(x: Tensor, lu: Any, *others: Any) -> Outputs:
        if operation.kept and lu.dim() == 3:
            return _vmap(pair, (x, lu, *others), (0, 0, 0, None, 0, None))
        return pair(x, lu, *others)

    return stackable


def _of_present(function: Pair, tensors: Tensors) -> Pair:
    """``function`` of those of ``tensors`` that are not None, in order; the others stay None."""
    present = [t is not None for t in tensors]

    def of_present(*given: Tensor) -> Outputs:
        values = iter(given)
        return function(*(next(values) if here else None for here in present))

    return of_present


def _vjp(function: Pair, tensors: Tensors, cotangents: Outputs) -> list[Tensor | None]:
    """Differentiable gradients of ``tensors`` (None for None) of a pair-valued function."""
    primals = [t for t in tensors if t is not None]
    with without_autocast(primals[0]):
        pullback = torch.func.vjp(_of_present(function, tensors), *primals)[1]
        gradients = iter(pullback(cotangents))
    return [None if t is None else next(gradients) for t in tensors]


def _jvp(function: Pair, tensors: Tensors, tangents: Tensors) -> Outputs:
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
    with without_autocast(primals[0]):
        outputs, pullback = torch.func.vjp(_of_present(function, tensors), *primals)[:2]
        pushforward = torch.func.vjp(pullback, tuple(torch.zeros_like(t) for t in outputs))[1]
        ((y, logabsdet),) = pushforward(directions)
    return y.contiguous(), logabsdet.contiguous()


def _vmap(function: Pair, tensors: Tensors, dims: tuple[int | None, ...]) -> Outputs:
    """A pair-valued function batched over those of ``tensors`` that have a batch dimension."""
    given = [(t, d) for t, d in zip(tensors, dims, strict=True) if t is not None]
    mapped = torch.func.vmap(_of_present(function, tensors), in_dims=tuple(d for _, d in given))
    with without_autocast(given[0][0]):
        return mapped(*(t for t, _ in given))


def _batched_natively(size: int, dims: tuple[int | None, ...], tensors: tuple[Any, ...]) -> Tensors | None:
    """A layer's six tensors with vmap's dimension as one that the operation has itself.

    A batch of x alone is more rows; a batch of layers is a stack. None if it is neither.
    """
    x, lu, bias, parameters, sign, permutation = tensors
    if all(d is None for d in dims[1:]):
        # Rows of stacked layers are [K, N, D]: the new dimension would go behind K.
        return (x.movedim(dims[0], 0), *tensors[1:]) if lu.dim() == 2 else None
    if dims[3] is not None or permutation is not None or lu.dim() != 2 + (dims[1] is not None):
        return None

    def stacked(tensor: Tensor | None, dim: int | None) -> Tensor | None:
        if tensor is None:
            return None
        return tensor.movedim(dim, 0) if dim is not None else tensor.expand(size, *tensor.shape)

    x, lu, bias, sign = map(stacked, (x, lu, bias, sign), (*dims[:3], dims[4]))
    return x, lu, bias, parameters, sign, None


# --- who watches ----------------------------------------------------------------------------------------


def _is_watched(*tensors: Any) -> bool:
    """Whether something besides autograd wants to see an operation on these: tracing, a torch.func
    transform, a forward-mode derivative, a dispatch mode, batched gradients, a tensor subclass, a tensor
    without data."""
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
        or forward_ad._current_level >= 0
        or any(
            t is not None and (type(t) not in (Tensor, Parameter) or is_legacy_batchedtensor(t) or t.is_meta)
            for t in tensors
        )
    )


def _run(name: str, *args: Any) -> Any:
    """An operation; past PyTorch's dispatcher, which costs as much as a small layer, where nobody watches.

    Tensors among the first two arguments are what tells, rows or the gradients of both results, and lu.
    """
    second = args[1].lu if isinstance(args[1], Matrix) else args[1]
    if _is_watched(args[0], second if isinstance(second, Tensor) else None):
        flops.tell_counters()
        return getattr(_ops, name)(*flatten(args))
    with _below_autograd():
        return dispatch.run(name, *args)


def records(*tensors: Tensor | None) -> bool:
    """Whether autograd will want a backward of a function of these."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _needed(ctx: Any) -> tuple[bool, ...]:
    """Which of the differentiated arguments want a gradient. While being traced, all: there torch.compile
    does not know it of a tensor that torch.func differentiates by."""
    return (
        (True,) * DIFFERENTIATED if torch.compiler.is_compiling() else ctx.needs_input_grad[:DIFFERENTIATED]
    )


def _values(*fields: Any) -> Sequence[Any]:
    """A Function's arguments from lu to constants as the values that an operation takes."""
    lu, bias, parameters, sign, permutation, kind, constants = fields
    activation = Activation(kind, parameters, constants)
    return (activation,) if lu is None else (Matrix(lu, sign, permutation, bias), activation)


def _whole(grad: Any, grad_logabsdet: Any, x: Tensor, logabsdet: bool) -> Outputs:
    """Gradients of a pair of results, zeros for one that nothing depended on."""
    if grad is None:
        grad = torch.zeros_like(x)
    if grad_logabsdet is None:
        shape = x.shape[:-1] if logabsdet else (0,)
        grad_logabsdet = x.new_zeros(shape, dtype=wide(x.dtype))
    return grad, grad_logabsdet


# --- the Functions --------------------------------------------------------------------------------------


def _function(operation: Operation) -> type[torch.autograd.Function]:
    """The Function of an operation: its results, the first differentiable and those kept for backward not."""
    name, inverse, kept = operation.name, operation.inverse, operation.kept

    # With its arguments written out: torch.compile counts them.
    def forward(
        x: Tensor,
        lu: Tensor | None,
        bias: Tensor | None,
        parameters: Tensor | None,
        sign: Tensor | None,
        permutation: Tensor | None,
        kind: str,
        constants: tuple[float, ...],
        logabsdet: bool,
        save: bool,
    ) -> tuple[Tensor, ...]:
        values = _values(lu, bias, parameters, sign, permutation, kind, constants)
        return _run(name, x, *values, logabsdet, *((save,) if kept else ()))

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.kind, ctx.constants, ctx.logabsdet = inputs[TENSORS : TENSORS + 3]
        ctx.mark_non_differentiable(*output[2:])
        ctx.save_for_backward(*inputs[:TENSORS], output[0] if inverse else None, *output[2:])

    def backward(ctx: Any, grad: Any, grad_logabsdet: Any, *_: Any) -> tuple[Tensor | None, ...]:
        return (*_gradients(operation, ctx, grad, grad_logabsdet), *(None,) * 6)

    def tangent(ctx: Any, *tangents: Any) -> tuple[Tensor | None, ...]:
        pair, tensors = _of_differentiated(operation, ctx)
        return (*_jvp(pair, tensors, tangents[:DIFFERENTIATED]), *(None,) * kept)

    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        return _batched(operation, info.batch_size, in_dims, args)

    members = (forward, setup_context, backward, tangent, vmap)
    title = name.title().replace("_", "")
    return type(title, (torch.autograd.Function,), {f.__name__: staticmethod(f) for f in members})


def _of_differentiated(operation: Operation, ctx: Any) -> tuple[Pair, Tensors]:
    """The formula of what a Function's context describes, and the tensors that it is a function of."""
    tensors = ctx.saved_tensors[:TENSORS]
    pair, fixed = _pair(operation, ctx.kind, ctx.constants, ctx.logabsdet), tensors[DIFFERENTIATED:]

    def of_differentiated(*given: Tensor | None) -> Outputs:
        return pair(*given, *fixed)

    return of_differentiated, tensors[:DIFFERENTIATED]


def _gradients(operation: Operation, ctx: Any, grad: Any, grad_logabsdet: Any) -> Sequence[Tensor | None]:
    """Gradients of (x, lu, bias, parameters) from those of the results, None where not needed."""
    saved = ctx.saved_tensors
    x, lu, bias, parameters, sign, permutation = saved[:TENSORS]
    grad, grad_logabsdet = _whole(grad, grad_logabsdet, x, ctx.logabsdet)
    if torch.is_grad_enabled():
        return _vjp(*_of_differentiated(operation, ctx), (grad, grad_logabsdet))
    start = saved[TENSORS] if operation.inverse else x
    values = _values(lu, bias, parameters, sign, permutation, ctx.kind, ctx.constants)
    needs_x, needs_lu, needs_bias, needs_parameters = _needed(ctx)
    needs_bias = needs_bias and bias is not None
    needs = () if lu is None else (needs_x, needs_lu, needs_bias)
    arguments = (grad, grad_logabsdet if ctx.logabsdet else None, start, *saved[TENSORS + 1 :], *values)
    found = _run(operation.backward, *arguments, *needs)
    return _of_needed(found, (needs_x, needs_lu, needs_bias, parameters is not None and needs_parameters))


def _of_needed(gradients: Sequence[Tensor], needs: Sequence[bool]) -> Sequence[Tensor | None]:
    """Of gradients of (x, lu, bias, parameters), or of (x, parameters), those needed; None for others."""
    grad_x, *grad_matrix, grad_parameters = gradients
    found = (grad_x, *(grad_matrix or (None, None)), grad_parameters)
    return [grad if needed else None for grad, needed in zip(found, needs, strict=True)]


def _batched(operation: Operation, size: int, in_dims: tuple[Any, ...], args: tuple[Any, ...]) -> Any:
    """A Function's results under vmap, and where their new dimension is."""
    tensors, dims, kept = args[:TENSORS], in_dims[:TENSORS], operation.kept
    kind, constants, logabsdet, save = args[TENSORS:]
    eager = _EAGER[operation.name]
    if kept:
        native = _batched_natively(size, dims, tensors)
        if native is not None:
            # A batched tensor does not tell whether what it wraps requires a gradient; here it is unwrapped.
            save = save or records(*native)
            outputs = eager.apply(*native, kind, constants, logabsdet, save)
            h_dim = 0 if save and kind != "identity" else None
            weight_dim = 0 if save and native[1] is not None and native[1].dim() == 3 else None
            return outputs, (0, 0 if logabsdet else None, h_dim, weight_dim)[: 2 + kept]
    elif tensors[1] is not None and all(d is None for d in dims[1:]):
        outputs = eager.apply(tensors[0].movedim(dims[0], 0), *args[1:])  # more rows of a net
        return outputs, (0, 0 if logabsdet else None)
    outputs = _vmap(_pair(operation, kind, constants, logabsdet), tensors, dims)
    return (*outputs, *(_none_of(tensors[0]) for _ in range(kept))), (0, 0, *(None,) * kept)


def _eager(traceable: type[torch.autograd.Function]) -> type[torch.autograd.Function]:
    """The Function for eager mode: with forward-mode derivatives and quick to call.

    torch.compile refuses to trace a Function that defines jvp, so what it traces is the class without.
    And ``Function.apply`` binds its arguments by forward's signature, worked out anew at each call, which
    costs as much as a small layer; here it does so only where a torch.func transform needs it.
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

    def setup_context(ctx: Any, args: tuple[Any, ...], output: Any) -> None:
        traceable.setup_context(ctx, args, output)
        if forward_ad._current_level >= 0:
            ctx.save_for_forward(*args[:TENSORS])
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
    statics["apply"], statics["record"] = classmethod(apply), classmethod(record)
    return type(f"Eager{traceable.__name__}", (traceable,), statics)


def _forward_modes() -> int:
    """How many forward-mode derivatives torch.func is taking around this call."""
    stack = torch._C._functorch.get_interpreter_stack() or []
    return sum(level.key() == torch._C._functorch.TransformType.Jvp for level in stack)


#: What torch.compile traces, and what eager mode calls.
_TRACEABLE: dict[str, Any] = {operation.name: _function(operation) for operation in OPERATIONS}
_EAGER: dict[str, Any] = {name: _eager(traceable) for name, traceable in _TRACEABLE.items()}


class _Recorded(torch.autograd.Function):
    """An operation whose results are there already, with what its implementation keeps for a backward.

    In eager mode, where nobody watches: of a small layer's training step what a Function asks around its
    forward is a good part. What else is asked of the backward goes through the formula.
    """

    @staticmethod
    def forward(
        ctx: Any,
        operation: Operation,
        found: dispatch.Recorded,
        activation: Activation,
        *tensors: Tensor | None,
    ) -> Any:
        ctx.kind, _, ctx.constants = activation
        ctx.operation, ctx.logabsdet, ctx.gradients = operation, found.logabsdet is not None, found.gradients
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, *found.kept)
        return found.y if found.logabsdet is None else (found.y, found.logabsdet)

    @staticmethod
    def backward(ctx: Any, grad: Any, grad_logabsdet: Any = None) -> tuple[Tensor | None, ...]:
        x, lu, bias, parameters, sign, permutation, *kept = ctx.saved_tensors
        if torch.is_grad_enabled() or _is_watched(grad, grad_logabsdet):
            grads = _whole(grad, grad_logabsdet, x, ctx.logabsdet)
            return (None, None, None, *_vjp(*_of_differentiated(ctx.operation, ctx), grads), None, None)
        if grad is None:
            grad = torch.zeros_like(x)
        needs = ctx.needs_input_grad[3 : 3 + DIFFERENTIATED]
        values = _values(lu, bias, parameters, sign, permutation, ctx.kind, ctx.constants)
        with _below_autograd():
            found = ctx.gradients(
                grad, grad_logabsdet, x, kept, *values, *(needs[:3] if lu is not None else ())
            )
        return (None, None, None, *_of_needed(found, needs), None, None)


#: ``_Recorded.apply`` without what it asks for torch.func's sake.
_record: Any = super(torch.autograd.Function, _Recorded).apply

#: The operations for which it is asked whether an implementation keeps something.
_RECORDABLE = {each.name: each for each in OPERATIONS if each.name in ("activation_forward", "layer_forward")}


def apply(name: str, x: Tensor, matrix: Matrix | None, phi: Activation, logabsdet: bool) -> WithLogabsdet:
    """The first two results of the operation ``name`` on x, past its Function where nothing is recorded."""
    values: Any = (phi,) if matrix is None else (matrix, phi)
    if tracing.is_recording():
        # There are no nets here: ``dispatch.fuses_net`` says no.
        recorded: Any = tracing.activation if matrix is None else tracing.layer
        return recorded(x, *values, inverse=name.endswith("inverse"), logabsdet=logabsdet)
    lu, sign, permutation, bias = (None, None, None, None) if matrix is None else matrix
    save = records(x, lu, bias, phi.parameters)
    if not save and not _is_watched(x, lu):
        flags = (logabsdet, False) if name.startswith("layer") else (logabsdet,)
        with _below_autograd():
            y, total, *_ = dispatch.run(name, x, *values, *flags)
        return y, total if logabsdet else None
    operation = _RECORDABLE.get(name)
    if operation is not None and not _is_watched(x, lu):
        with _below_autograd():
            found = dispatch.recorded(x, matrix, phi, logabsdet)
        if found is not None:
            outputs = _record(operation, found, phi, x, lu, bias, phi.parameters, sign, permutation)
            return outputs if logabsdet else (outputs, None)
    kind, parameters, constants = phi
    function = (_TRACEABLE if torch.compiler.is_compiling() else _EAGER)[name]
    arguments = (x, lu, bias, parameters, sign, permutation, kind, constants, logabsdet, save)
    y, total, *_ = function.apply(*arguments)
    return y, total if logabsdet else None


# An exported program calls the operations themselves, with parameters that may be trained further: there
# the Functions above are reached from the operation.


def _from_operation(operation: Operation) -> None:
    overload, schema = getattr(_ops, operation.name).default, dispatch.SCHEMAS[operation.name]
    eager = _EAGER[operation.name]

    def call(*args: Any) -> Any:
        flops.tell_counters()
        tensors = [t for t in args if isinstance(t, Tensor)]
        if _forward_modes() or any(forward_ad.unpack_dual(t).tangent is not None for t in tensors):
            raise NotImplementedError(
                "forward-mode derivatives of an exported or compiled LU layer are not supported; take them "
                "of the layer itself, in eager mode"
            )
        if not records(*tensors):
            with _below_autograd():
                return overload(*args)
        x, *values, logabsdet = structure(args, schema)[: -1 if operation.kept else None]
        lu, sign, permutation, bias = values[0] if len(values) == 2 else (None, None, None, None)
        kind, parameters, constants = values[-1]
        # torch.func has unpacked its own tensors by now: what is left to do is autograd's, a level of it.
        with enable_single_level_autograd_function():
            return eager.record(x, lu, bias, parameters, sign, permutation, kind, constants, logabsdet, True)

    dispatch.library.impl(operation.name, call, "Autograd")


for _operation in OPERATIONS:
    _from_operation(_operation)

"""The registered operations, and the one place that decides who computes them.

Ten operations, ``torch.ops.lunet_fast.*``: the activation and the layer, each forward and inverse, each with
its backward; and a whole net of layers in one, either way, with its backward. They carry no autograd of
their own (``autograd.py`` does) and are opaque to ``torch.compile`` and ``torch.export``, so a choice that
depends on the batch size is made inside them.

Conventions. Inputs have any leading shape and any strides; outputs are contiguous. An activation is
given as a tensor of ``slopes`` [3] or [3, D], or else as the three floats (a, c, kappa); c = 0 means
no activation. With lu [K, D, D] an operation is that of K stacked layers: x is [K, ..., D], bias and sign
are [K, D], slopes are shared and there is no permutation. Results that were not asked for are returned
with zero elements, since an operation's results cannot be optional.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lunet_fast import blocked, tracing
from lunet_fast.blocked import Family, Packed
from lunet_fast.kernels import tiles
from lunet_fast.reference import autocast_enabled, wide

BACKENDS = ("auto", "reference", "triton")

_TRITON_INSTALLED = importlib.util.find_spec("triton") is not None

_backend = "auto"


def set_backend(name: str) -> None:
    """Choose who computes: "auto" (CUDA tensors: Triton; others: PyTorch), "reference" (always PyTorch) or
    "triton" (also for CPU tensors, under TRITON_INTERPRET=1).

    float64 and empty batches take PyTorch under every backend. The starting value is that of the
    environment variable LUNET_FAST_BACKEND when the package is imported.

    Raises:
        ValueError: ``name`` is none of the three.
        RuntimeError: "triton" was asked for where it cannot run: Triton is not installed, or there is
            neither a CUDA device nor TRITON_INTERPRET=1.
    """
    global _backend
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {name!r}")
    if name == "triton":
        _require_triton()
    _backend = name


def get_backend() -> str:
    """The backend in force: "auto", "reference" or "triton"."""
    return _backend


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _require_triton() -> None:
    if not _TRITON_INSTALLED:
        raise RuntimeError(
            "backend 'triton' needs the package triton, which is not installed; "
            "install it or use backend 'reference'"
        )
    if not torch.cuda.is_available() and not _interpreting():
        raise RuntimeError(
            "backend 'triton' needs a CUDA device, and none is available; set TRITON_INTERPRET=1 before "
            "Python starts to run the kernels on the CPU, or use backend 'reference'"
        )


def runs_triton(x: Tensor) -> bool:
    """Whether an operation on x goes to the Triton kernels."""
    return _triton_takes(x) and x.numel() > 0


def _triton_takes(x: Tensor) -> bool:
    """Whether an operation on ``x`` goes to the kernels unless x is empty; the same for fake tensors."""
    if _backend == "reference" or x.dtype not in (torch.float32, torch.bfloat16):
        return False
    if x.is_cuda:
        return _TRITON_INSTALLED
    if _backend == "triton":
        if not _interpreting():
            raise RuntimeError(
                f"backend 'triton' got a tensor on {x.device}, where kernels run only under "
                "TRITON_INTERPRET=1; set it before Python starts, move the tensor to a CUDA device, or "
                "use backend 'auto'"
            )
        return True
    return False


#: Numbers in x up to which a net's layers are small on a CPU, and the features that they may have.
SMALL_NUMBERS, SMALL_FEATURES = 1 << 18, blocked.BLOCK


def is_small(x: Tensor) -> bool:
    """Whether calling a layer's operation on x costs more than what it computes: ``small.py`` is for that.

    Never while being traced, where the choice must not depend on the batch, nor under autocast or in low
    precision, of which only the operations know what is computed in which dtype.
    """
    return (
        not torch.compiler.is_compiling()
        and torch._C._get_tracing_state() is None
        and x.device.type == "cpu"
        and _backend != "triton"
        and x.dtype in (torch.float32, torch.float64)
        and x.numel() <= SMALL_NUMBERS
        and x.dim() > 0
        and x.shape[-1] <= SMALL_FEATURES
        and not autocast_enabled(x)
    )


def _saves_preactivation(x: Tensor) -> bool:
    """Whether a layer's forward saves h: the kernels compute it again where memory is the limit."""
    return not (_triton_takes(x) and tiles.recomputes(x.shape[-1]))


def _keeps_factors(x: Tensor, lu: Tensor) -> bool:
    """Whether a layer's forward that saves keeps L and U too: the kernels form W's gradient from ``lu``."""
    return blocked.keeps_factors(x, lu) and not _triton_takes(x)


def _kept_shape(x: Tensor, lu: Tensor) -> tuple[int, ...]:
    return (3, *lu.shape) if _keeps_factors(x, lu) else tuple(lu.shape)


#: Where the operations are registered; kept for the life of the process.
library = torch.library.Library("lunet_fast", "DEF")

#: What computes each operation, by name: the operation without PyTorch's dispatcher around it.
IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {}

_FAMILY = "Tensor? slopes, float a, float c, float kappa"
_MATRIX = "Tensor lu, Tensor? sign, Tensor? permutation"


def _register(schema: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Define an operation by its schema, computed by the decorated function on every device."""
    name = schema.partition("(")[0]

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        def compute(x: Tensor, *args: Any) -> Any:
            if autocast_enabled(x):
                # Autocast has had its say on x in functional.py; here it would lower the precision in
                # which W is formed and triangles are solved.
                with torch.autocast(x.device.type, enabled=False):
                    return compute(x, *args)
            if runs_triton(x):
                return getattr(importlib.import_module("lunet_fast.triton_ops"), name)(x, *args)
            return function(x, *args)

        IMPLEMENTATIONS[name] = compute
        library.define(schema)
        library.impl(name, compute, "CompositeExplicitAutograd")
        return function

    return decorate


def _rows(x: Tensor) -> Tensor:
    """x as contiguous rows [N, D]; a 0-dimensional x is one row of one."""
    if x.dim() == 2:
        return x.contiguous()
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1] if x.dim() else 1).contiguous()


def _rows_of(x: Tensor, lu: Tensor) -> Tensor:
    """x as contiguous rows [N, D] of a layer, or [K, N, D] of stacked layers."""
    if lu.dim() == 2:
        return _rows(x)
    return x.reshape(lu.shape[0], math.prod(x.shape[1:-1]), x.shape[-1]).contiguous()


def _nothing(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return x.new_empty(0, dtype=x.dtype if dtype is None else dtype)


def _or_nothing(result: Tensor | None, like: Tensor, shape: Any = None) -> Tensor:
    """``result`` in ``shape``, or the empty tensor that stands for a result not asked for."""
    if result is None:
        return _nothing(like)
    return result if shape is None else result.reshape(shape)


def _shaped(rows: Tensor, like: Tensor) -> Tensor:
    """Rows in the shape of ``like``, which they were made of."""
    return rows if rows.dim() == like.dim() else rows.reshape(like.shape)


def _flat(logabsdet_gradient: Tensor | None) -> Tensor | None:
    return None if logabsdet_gradient is None else logabsdet_gradient.reshape(-1).contiguous()


# --- activation -----------------------------------------------------------------------------------------


@_register(f"activation_forward(Tensor x, {_FAMILY}, bool logabsdet) -> (Tensor, Tensor)")
def _activation_forward(
    x: Tensor, slopes: Tensor | None, a: float, c: float, kappa: float, logabsdet: bool
) -> tuple[Tensor, Tensor]:
    family, rows = Family.of(slopes, a, c, kappa, wide(x.dtype)), _rows(x)
    y = blocked.activate(rows, family).reshape(x.shape)
    total = blocked.log_derivative_sum(rows, family) if logabsdet else None
    return y, _or_nothing(total, _nothing(x, wide(x.dtype)), x.shape[:-1])


@_register(
    f"activation_backward(Tensor grad_y, Tensor? grad_logabsdet, Tensor x, {_FAMILY}) -> (Tensor, Tensor)"
)
def _activation_backward(
    grad_y: Tensor,
    grad_logabsdet: Tensor | None,
    x: Tensor,
    slopes: Tensor | None,
    a: float,
    c: float,
    kappa: float,
) -> tuple[Tensor, Tensor]:
    family = Family.of(slopes, a, c, kappa, wide(x.dtype))
    grad_x, grad_slopes = blocked.activation_backward(
        _rows(grad_y), _flat(grad_logabsdet), _rows(x), family, slopes
    )
    return grad_x.reshape(x.shape), _or_nothing(grad_slopes, x)


@_register(f"activation_inverse(Tensor y, {_FAMILY}, bool logabsdet) -> (Tensor, Tensor)")
def _activation_inverse(
    y: Tensor, slopes: Tensor | None, a: float, c: float, kappa: float, logabsdet: bool
) -> tuple[Tensor, Tensor]:
    family = Family.of(slopes, a, c, kappa, wide(y.dtype))
    x = blocked.activation_inverse(_rows(y), family)
    total = blocked.log_derivative_sum(x, family).neg_() if logabsdet else None
    return x.reshape(y.shape), _or_nothing(total, _nothing(y, wide(y.dtype)), y.shape[:-1])


@_register(
    f"activation_inverse_backward(Tensor grad_x, Tensor? grad_logabsdet, Tensor x, {_FAMILY})"
    " -> (Tensor, Tensor)"
)
def _activation_inverse_backward(
    grad_x: Tensor,
    grad_logabsdet: Tensor | None,
    x: Tensor,
    slopes: Tensor | None,
    a: float,
    c: float,
    kappa: float,
) -> tuple[Tensor, Tensor]:
    family = Family.of(slopes, a, c, kappa, wide(x.dtype))
    grad_y, grad_slopes = blocked.activation_inverse_backward(
        _rows(grad_x), _flat(grad_logabsdet), _rows(x), family, slopes
    )
    return grad_y.reshape(x.shape), _or_nothing(grad_slopes, x)


# --- layer ----------------------------------------------------------------------------------------------


@_register(
    f"layer_forward(Tensor x, {_MATRIX}, Tensor? bias, {_FAMILY}, bool logabsdet, bool save)"
    " -> (Tensor, Tensor, Tensor, Tensor)"
)
def _layer_forward(
    x: Tensor,
    lu: Tensor,
    sign: Tensor | None,
    permutation: Tensor | None,
    bias: Tensor | None,
    slopes: Tensor | None,
    a: float,
    c: float,
    kappa: float,
    logabsdet: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(y, log|det J| per row, h, A). The last two are for backward: h is empty without an activation, and
    A holds nothing meaningful when it was not formed (``blocked.composes``). Where ``_keeps_factors`` says so
    they are what ``blocked.factored_forward`` keeps instead: c·h, and [3, D, D]."""
    if save and _keeps_factors(x, lu):
        y, total, h, kept = blocked.factored_forward(
            _rows(x),
            Packed.of(lu, sign, permutation),
            bias,
            Family.of(slopes, a, c, kappa, x.dtype),
            slopes,
            logabsdet=logabsdet,
        )
        total = _nothing(x) if total is None else total.reshape(x.shape[:-1])
        return _shaped(y, x), total, _nothing(x) if h is None else _shaped(h, x), kept
    compute = blocked.stacked_forward if lu.dim() == 3 else blocked.layer_forward
    y, total, h, weight = compute(
        _rows_of(x, lu),
        Packed.of(lu, sign, permutation),
        bias,
        Family.of(slopes, a, c, kappa, wide(x.dtype)),
        logabsdet=logabsdet,
        save=save,
    )
    total = _nothing(x, wide(x.dtype)) if total is None else total.reshape(x.shape[:-1])
    y = _shaped(y, x)
    if not save:
        return y, total, _nothing(x), _nothing(x)
    if weight is None:
        weight = torch.empty_like(lu, dtype=x.dtype)
    h = _nothing(x) if h is None or not _saves_preactivation(x) else _shaped(h, x)
    return y, total, h, weight


@_register(
    f"layer_backward(Tensor grad_y, Tensor? grad_logabsdet, Tensor x, Tensor h, Tensor weight, {_MATRIX},"
    f" Tensor? bias, {_FAMILY}, bool needs_x, bool needs_lu, bool needs_bias)"
    " -> (Tensor, Tensor, Tensor, Tensor)"
)
def _layer_backward(
    grad_y: Tensor,
    grad_logabsdet: Tensor | None,
    x: Tensor,
    h: Tensor,
    weight: Tensor,
    lu: Tensor,
    sign: Tensor | None,
    permutation: Tensor | None,
    bias: Tensor | None,
    slopes: Tensor | None,
    a: float,
    c: float,
    kappa: float,
    needs_x: bool,
    needs_lu: bool,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of (x, lu, bias, slopes)."""
    family = Family.of(slopes, a, c, kappa, wide(x.dtype))
    rows = _rows_of(x, lu)
    if weight.dim() > lu.dim():
        grad_x, grad_lu, grad_bias, grad_slopes = blocked.factored_backward(
            *(_rows(grad_y), _flat(grad_logabsdet), rows, None if family.linear else _rows(h), weight),
            *(lu, permutation, family, slopes),
            needs_x=needs_x,
            needs_lu=needs_lu,
            has_bias=needs_bias,
        )
        return (
            _nothing(x) if grad_x is None else _shaped(grad_x, x),
            _nothing(lu) if grad_lu is None else grad_lu,
            _nothing(lu) if grad_bias is None else grad_bias,
            _or_nothing(grad_slopes, x),
        )
    packed = Packed.of(lu, sign, permutation)
    preactivation = None
    if not family.linear:
        saved = h.numel() == x.numel()
        preactivation = _rows_of(h, lu) if saved else _preactivation(rows, packed, bias)
    compute: Any = blocked.stacked_backward if lu.dim() == 3 else blocked.layer_backward
    grad_x, grad_lu, grad_bias, grad_slopes = compute(
        _rows_of(grad_y, lu),
        None if grad_logabsdet is None else grad_logabsdet.reshape(rows.shape[:-1]).contiguous(),
        rows,
        preactivation,
        weight if lu.dim() == 3 or blocked.composes(*rows.shape) else None,
        packed,
        family,
        slopes,
        needs_x=needs_x,
        needs_lu=needs_lu,
        has_bias=needs_bias,
    )
    return (
        _nothing(x) if grad_x is None else _shaped(grad_x, x),
        _nothing(lu) if grad_lu is None else grad_lu.to(lu.dtype),
        _nothing(lu) if grad_bias is None else grad_bias.to(lu.dtype),
        _or_nothing(grad_slopes, x),
    )


def _preactivation(rows: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
    """h = A x + b, for a backward in PyTorch of a forward that Triton did."""
    compute = blocked.stacked_forward if rows.dim() == 3 else blocked.layer_forward
    return compute(rows, packed, bias, Family(1.0, 0.0, 1.0), logabsdet=False, save=False)[0]


def _at(tensor: Tensor | None, k: int) -> Tensor | None:
    return None if tensor is None else tensor[k]


@_register(
    f"layer_inverse(Tensor y, {_MATRIX}, Tensor? bias, {_FAMILY}, bool logabsdet, bool save)"
    " -> (Tensor, Tensor, Tensor)"
)
def _layer_inverse(
    y: Tensor,
    lu: Tensor,
    sign: Tensor | None,
    permutation: Tensor | None,
    bias: Tensor | None,
    slopes: Tensor | None,
    a: float,
    c: float,
    kappa: float,
    logabsdet: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(x, the inverse's log-determinant per row, h = φ⁻¹(y) for backward)."""
    if lu.dim() == 3:
        rest = (slopes, a, c, kappa, logabsdet, save)
        parts = [
            _layer_inverse(y[k], lu[k], _at(sign, k), None, _at(bias, k), *rest) for k in range(lu.shape[0])
        ]
        stacked = [torch.stack(results) for results in zip(*parts, strict=True)]
        kept = save and (slopes is not None or c != 0.0)
        return (
            stacked[0],
            stacked[1] if logabsdet else stacked[1].flatten(),
            stacked[2] if kept else stacked[2].flatten(),
        )
    family = Family.of(slopes, a, c, kappa, wide(y.dtype))
    x, total, h = blocked.layer_inverse(
        _rows(y), Packed.of(lu, sign, permutation), bias, family, logabsdet=logabsdet, save=save
    )
    total = _nothing(y, wide(y.dtype)) if total is None else total.reshape(y.shape[:-1])
    return _shaped(x, y), total, _nothing(y) if h is None else _shaped(h, y)


@_register(
    f"layer_inverse_backward(Tensor grad_x, Tensor? grad_logabsdet, Tensor x, Tensor h, {_MATRIX}, {_FAMILY},"
    " bool needs_lu, bool has_bias) -> (Tensor, Tensor, Tensor, Tensor)"
)
def _layer_inverse_backward(
    grad_x: Tensor,
    grad_logabsdet: Tensor | None,
    x: Tensor,
    h: Tensor,
    lu: Tensor,
    sign: Tensor | None,
    permutation: Tensor | None,
    slopes: Tensor | None,
    a: float,
    c: float,
    kappa: float,
    needs_lu: bool,
    has_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of (y, lu, bias, slopes)."""
    if lu.dim() == 3:
        members = [
            _layer_inverse_backward(
                grad_x[k],
                _at(grad_logabsdet, k),
                x[k],
                h[k] if h.dim() > 1 else h,
                lu[k],
                _at(sign, k),
                None,
                *(slopes, a, c, kappa, needs_lu, has_bias),
            )
            for k in range(lu.shape[0])
        ]
        stacked = [torch.stack(parts) for parts in zip(*members, strict=True)]
        return (
            stacked[0],
            stacked[1] if needs_lu else stacked[1].flatten(),
            stacked[2] if has_bias else stacked[2].flatten(),
            stacked[3].sum(0),
        )
    family = Family.of(slopes, a, c, kappa, wide(x.dtype))
    grad_y, grad_lu, grad_bias, grad_slopes = blocked.layer_inverse_backward(
        _rows(grad_x),
        _flat(grad_logabsdet),
        _rows(x),
        None if family.linear else _rows(h),
        Packed.of(lu, sign, permutation),
        family,
        slopes,
        needs_lu=needs_lu,
        has_bias=has_bias,
    )
    return (
        grad_y.reshape(x.shape),
        _nothing(lu) if grad_lu is None else grad_lu.to(lu.dtype),
        _nothing(lu) if grad_bias is None else grad_bias.to(lu.dtype),
        _or_nothing(grad_slopes, x),
    )


# --- net ------------------------------------------------------------------------------------------------


@_register(
    f"net(Tensor x, Tensor lu, Tensor? sign, Tensor? bias, {_FAMILY}, bool inverse, bool logabsdet)"
    " -> (Tensor, Tensor)"
)
def _net(
    x: Tensor,
    lu: Tensor,
    sign: Tensor | None,
    bias: Tensor | None,
    slopes: Tensor | None,
    a: float,
    c: float,
    kappa: float,
    inverse: bool,
    logabsdet: bool,
) -> tuple[Tensor, Tensor]:
    """(f(x) or f⁻¹(x), the log-determinant of that direction) of M layers, the last one linear.

    lu is [M, D, D], sign and bias [M, D], a tensor of slopes [M − 1, 3] or [M − 1, 3, D]: the leading
    dimension counts layers one after another, not stacked ones.
    """
    return net_by_layers(
        _layer_inverse if inverse else _layer_forward,
        *(x, lu, sign, bias, slopes, a, c, kappa, inverse, logabsdet),
    )


def net_by_layers(
    layer: Callable[..., tuple[Tensor, ...]],
    x: Tensor,
    lu: Tensor,
    sign: Tensor | None,
    bias: Tensor | None,
    slopes: Tensor | None,
    a: float,
    c: float,
    kappa: float,
    inverse: bool,
    logabsdet: bool,
) -> tuple[Tensor, Tensor]:
    """``net`` through an implementation of ``layer_forward`` or, if inverse, of ``layer_inverse``."""
    total = _nothing(x, wide(x.dtype))
    last = lu.shape[0] - 1
    for m in reversed(range(last + 1)) if inverse else range(last + 1):
        family = _slopes_at(slopes, a, c, kappa, m, last)
        x, share, *_ = layer(x, lu[m], _at(sign, m), None, _at(bias, m), *family, logabsdet, False)
        total = share if m == (last if inverse else 0) else total + share
    return x, total


def _slopes_at(
    slopes: Tensor | None, a: float, c: float, kappa: float, m: int, last: int
) -> tuple[Tensor | None, float, float, float]:
    """Layer m's slopes as an operation on one layer takes them."""
    if m == last:
        return None, 1.0, 0.0, 1.0
    return _at(slopes, m), a, c, kappa


@_register(
    f"net_backward(Tensor grad, Tensor? grad_logabsdet, Tensor x, Tensor lu, Tensor? sign, Tensor? bias,"
    f" {_FAMILY}, bool inverse, bool needs_x, bool needs_lu, bool needs_bias)"
    " -> (Tensor, Tensor, Tensor, Tensor)"
)
def _net_backward(
    grad: Tensor,
    grad_logabsdet: Tensor | None,
    x: Tensor,
    lu: Tensor,
    sign: Tensor | None,
    bias: Tensor | None,
    slopes: Tensor | None,
    a: float,
    c: float,
    kappa: float,
    inverse: bool,
    needs_x: bool,
    needs_lu: bool,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of (the input, lu, bias, slopes) of ``net``.

    x is what the layers start from, whichever way the net was run: f's input, or the inverse's result.
    Nothing else was kept; the layers are computed again from it.
    """
    return net_backward_by_layers(
        _layer_forward,
        _layer_backward,
        _layer_inverse_backward,
        grad,
        grad_logabsdet,
        x,
        lu,
        sign,
        bias,
        slopes,
        a,
        c,
        kappa,
        inverse,
        needs_x,
        needs_lu,
        needs_bias,
    )


def net_backward_by_layers(
    forward: Callable[..., tuple[Tensor, ...]],
    backward: Callable[..., tuple[Tensor, ...]],
    inverse_backward: Callable[..., tuple[Tensor, ...]],
    grad: Tensor,
    grad_logabsdet: Tensor | None,
    x: Tensor,
    lu: Tensor,
    sign: Tensor | None,
    bias: Tensor | None,
    slopes: Tensor | None,
    a: float,
    c: float,
    kappa: float,
    inverse: bool,
    needs_x: bool,
    needs_lu: bool,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``net_backward`` through implementations of ``layer_forward`` and of the layer's two backwards."""
    last = lu.shape[0] - 1
    arguments, families, kept = [], [], []
    for m in range(last + 1):
        families.append(_slopes_at(slopes, a, c, kappa, m, last))
        arguments.append((x, lu[m], _at(sign, m), None))
        # What the forward keeps for its own backward; the inverse's wants h, which it need not keep.
        x, _, h, weight = forward(*arguments[m], _at(bias, m), *families[m], False, not inverse)
        kept.append((h, weight))
    results: dict[int, tuple[Tensor, ...]] = {}
    for m in range(last + 1) if inverse else reversed(range(last + 1)):
        start, *matrix = arguments[m]
        if inverse:
            h = forward(*arguments[m], _at(bias, m), None, 1.0, 0.0, 1.0, False, False)[0]
            results[m] = inverse_backward(
                grad, grad_logabsdet, start, h, *matrix, *families[m], needs_lu, needs_bias
            )
        else:
            results[m] = backward(
                *(grad, grad_logabsdet, start, *kept[m], *matrix, _at(bias, m), *families[m]),
                *(needs_x or m > 0, needs_lu, needs_bias),
            )
        grad = results[m][0]
    _, grad_lu, grad_bias, grad_slopes = zip(*(results[m] for m in range(last + 1)), strict=True)
    return (
        grad if needs_x else _nothing(x),
        torch.stack(grad_lu) if needs_lu else _nothing(lu),
        torch.stack(grad_bias) if needs_bias else _nothing(lu),
        torch.stack(grad_slopes[:-1]) if slopes is not None else _nothing(x),
    )


def fuses_net(x: Tensor) -> bool:
    """Whether layers that are all alike are better run on x as one ``net`` than one by one.

    Decided by what is known while being traced; which kernels the operation launches, it decides itself.
    """
    return (
        _triton_takes(x) and not tracing.is_recording() and x.dim() > 0 and x.shape[-1] <= tiles.NET_FEATURES
    )


# --- shapes without data --------------------------------------------------------------------------------


def _like(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _row_values(x: Tensor, wanted: bool) -> Tensor:
    return x.new_empty(x.shape[:-1] if wanted else (0,), dtype=wide(x.dtype))


def _gradient_of(parameter: Tensor | None, like: Tensor, wanted: bool = True) -> Tensor:
    return _like(parameter) if parameter is not None and wanted else _nothing(like)


@torch.library.register_fake("lunet_fast::activation_forward")
def _(x, slopes, a, c, kappa, logabsdet):  # type: ignore[no-untyped-def]
    return _like(x), _row_values(x, logabsdet)


@torch.library.register_fake("lunet_fast::activation_inverse")
def _(y, slopes, a, c, kappa, logabsdet):  # type: ignore[no-untyped-def]
    return _like(y), _row_values(y, logabsdet)


@torch.library.register_fake("lunet_fast::activation_backward")
def _(grad_y, grad_logabsdet, x, slopes, a, c, kappa):  # type: ignore[no-untyped-def]
    return _like(x), _gradient_of(slopes, x)


@torch.library.register_fake("lunet_fast::activation_inverse_backward")
def _(grad_x, grad_logabsdet, x, slopes, a, c, kappa):  # type: ignore[no-untyped-def]
    return _like(x), _gradient_of(slopes, x)


@torch.library.register_fake("lunet_fast::layer_forward")
def _(x, lu, sign, permutation, bias, slopes, a, c, kappa, logabsdet, save):  # type: ignore[no-untyped-def]
    active = slopes is not None or c != 0.0
    h = _like(x) if save and active and _saves_preactivation(x) else _nothing(x)
    weight = x.new_empty(_kept_shape(x, lu)) if save else _nothing(x)
    return _like(x), _row_values(x, logabsdet), h, weight


@torch.library.register_fake("lunet_fast::layer_inverse")
def _(y, lu, sign, permutation, bias, slopes, a, c, kappa, logabsdet, save):  # type: ignore[no-untyped-def]
    active = slopes is not None or c != 0.0
    return _like(y), _row_values(y, logabsdet), _like(y) if save and active else _nothing(y)


@torch.library.register_fake("lunet_fast::layer_backward")
def _(  # type: ignore[no-untyped-def]
    grad_y,
    grad_logabsdet,
    x,
    h,
    weight,
    lu,
    sign,
    permutation,
    bias,
    slopes,
    a,
    c,
    kappa,
    needs_x,
    needs_lu,
    needs_bias,
):
    return (
        _gradient_of(x, x, needs_x),
        _gradient_of(lu, lu, needs_lu),
        lu.new_empty(lu.shape[:-1] if needs_bias else (0,)),
        _gradient_of(slopes, x),
    )


@torch.library.register_fake("lunet_fast::layer_inverse_backward")
def _(  # type: ignore[no-untyped-def]
    grad_x, grad_logabsdet, x, h, lu, sign, permutation, slopes, a, c, kappa, needs_lu, has_bias
):
    return (
        _like(x),
        _gradient_of(lu, lu, needs_lu),
        lu.new_empty(lu.shape[:-1] if has_bias else (0,)),
        _gradient_of(slopes, x),
    )


@torch.library.register_fake("lunet_fast::net")
def _(x, lu, sign, bias, slopes, a, c, kappa, inverse, logabsdet):  # type: ignore[no-untyped-def]
    return _like(x), _row_values(x, logabsdet)


@torch.library.register_fake("lunet_fast::net_backward")
def _(  # type: ignore[no-untyped-def]
    grad,
    grad_logabsdet,
    x,
    lu,
    sign,
    bias,
    slopes,
    a,
    c,
    kappa,
    inverse,
    needs_x,
    needs_lu,
    needs_bias,
):
    return (
        _gradient_of(x, x, needs_x),
        _gradient_of(lu, lu, needs_lu),
        lu.new_empty(lu.shape[:-1] if needs_bias else (0,)),
        _gradient_of(slopes, x),
    )


try:
    set_backend(os.environ.get("LUNET_FAST_BACKEND", "auto"))
except (ValueError, RuntimeError) as error:
    raise type(error)(f"environment variable LUNET_FAST_BACKEND: {error}") from None

"""The registered operations, and the one place that decides who computes them.

Twelve operations, ``torch.ops.lunet_fast.*``: an activation, a layer and a net of layers, each forward and
inverse, each with its backward. They carry no autograd of their own (``autograd.py`` does) and are opaque to
``torch.compile`` and ``torch.export``, so a choice that depends on the batch size is made inside them.

Conventions. Inputs have any leading shape and any strides; outputs are contiguous. With lu [K, D, D] a layer
is K stacked layers: x is [K, ..., D], bias and sign are [K, D], the activation is shared and there is no
permutation. A net's lu is [M, D, D], its layers stand one after another and the last is linear. Results that
were not asked for have no elements, since an operation's results cannot be optional.

An implementation is a module that says ``@implements("its backend")`` over a function of each operation's
name. It takes the operation's arguments with matrix and activation as the values of ``values.py``. Three
functions more say what this module has to know while shapes alone are known: ``knows(activation)``, whether
there are kernels for this kind; ``kept(x, matrix)``, whether a forward keeps h for its backward, and how many
[D, D] in the place of A; and ``fuses_net(x)``, whether layers that are all alike are better run as one
``net`` operation. PyTorch knows all kinds, and has what another implementation does not know.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lunet_fast.ops import tracing
from lunet_fast.ops.precision import autocast_enabled, wide
from lunet_fast.ops.values import ACTIVATION_SCHEMA, MATRIX_SCHEMA, Activation, Matrix, structure

BACKENDS = ("auto", "reference", "triton")

_TRITON_INSTALLED = importlib.util.find_spec("triton") is not None

_backend = "auto"

#: The functions of each backend by name, and the module that brings them when first needed.
_implementations: dict[str, dict[str, Callable[..., Any]]] = {}
_modules: dict[str, str] = {}


def set_backend(name: str) -> None:
    """Choose who computes: "auto" (CUDA tensors: Triton; others: PyTorch), "reference" (always PyTorch) or
    "triton" (also for CPU tensors, under TRITON_INTERPRET=1).

    float64 and empty batches take PyTorch under every backend. The starting value is that of the
    environment variable LUNET_FAST_BACKEND when the layers are imported.

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


def takes_triton(x: Tensor) -> bool:
    """Whether an operation on ``x`` goes to the kernels unless x is empty; the same for fake tensors."""
    if _backend == "reference" or x.dtype not in (torch.float32, torch.bfloat16):
        return False
    if x.is_cuda:
        return _TRITON_INSTALLED
    if _backend == "triton" and not _interpreting():
        raise RuntimeError(
            f"backend 'triton' got a tensor on {x.device}, where kernels run only under TRITON_INTERPRET=1; "
            "set it before Python starts, move the tensor to a CUDA device, or use backend 'auto'"
        )
    return _backend == "triton"


def runs_triton(x: Tensor) -> bool:
    """Whether an operation on x goes to the Triton kernels, its activation being one that they know."""
    return takes_triton(x) and x.numel() > 0


def fuses(x: Tensor, activation: Activation) -> bool:
    """Whether the implementation that takes a layer's product with x knows its activation too; if not, the
    two are better called one after the other."""
    return not takes_triton(x) or implementation("triton", "knows")(activation)


# --- implementations ------------------------------------------------------------------------------------


def register_module(backend: str, module: str) -> None:
    """Name the module whose import registers the functions of a backend."""
    _modules[backend] = module


def implements(backend: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register the decorated function as this backend's implementation of the operation of its name."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        _implementations.setdefault(backend, {})[function.__name__] = function
        return function

    return register


def implementation(backend: str, name: str) -> Callable[..., Any]:
    """A backend's function of this name."""
    if backend not in _implementations:
        importlib.import_module(_modules[backend])
    return _implementations[backend][name]


def run(name: str, x: Tensor, *args: Any) -> Any:
    """The operation without PyTorch's dispatcher around it, matrix and activation as values."""
    if autocast_enabled(x):
        # Autocast has had its say on x in functional.py; here it would lower the precision in
        # which W is formed and triangles are solved.
        with torch.autocast(x.device.type, enabled=False):
            return run(name, x, *args)
    return implementation(_backend_of(x, args), name)(x, *args)


def _backend_of(x: Tensor, args: Sequence[Any]) -> str:
    """Who computes an operation on x, of which the activation is among ``args``."""
    if not runs_triton(x):
        return "pytorch"
    activation = next(arg for arg in args if isinstance(arg, Activation))
    return "triton" if implementation("triton", "knows")(activation) else "pytorch"


class Recorded(NamedTuple):
    """A forward's results with what is kept for its backward."""

    y: Tensor
    logabsdet: Tensor | None
    kept: Sequence[Tensor | None]
    gradients: Callable[..., Sequence[Tensor]]
    """The results of the operation's backward from (the gradient of y, that of ``logabsdet`` or None, x, what
    was kept, the operation's values, and of a layer which gradients are needed)."""


def recorded(x: Tensor, matrix: Matrix | None, activation: Activation, logabsdet: bool) -> Recorded | None:
    """The forward of an activation or layer where an implementation keeps what it likes for the backward;
    None where it keeps what the operation returns, or x alone."""
    if x.numel() == 0 or _backend_of(x, (activation,)) == "triton":
        return None
    if autocast_enabled(x):
        with torch.autocast(x.device.type, enabled=False):
            return recorded(x, matrix, activation, logabsdet)
    if matrix is None:
        return implementation("pytorch", "activation_recorded")(x, activation, logabsdet)
    return implementation("pytorch", "layer_recorded")(x, matrix, activation, logabsdet)


def kept(x: Tensor, matrix: Matrix, activation: Activation) -> tuple[bool, int]:
    """Whether a layer's forward keeps h for its backward, and how many [D, D] in the place of A."""
    kernels = takes_triton(x) and implementation("triton", "knows")(activation)
    return implementation("triton" if kernels else "pytorch", "kept")(x, matrix)


def fuses_net(x: Tensor) -> bool:
    """Whether layers that are all alike are better run on x as one net than one by one.

    Decided by what is known while being traced; which kernels the operation launches, it decides itself.
    """
    if not takes_triton(x) or tracing.is_recording():
        return False
    return x.dim() > 0 and implementation("triton", "fuses_net")(x)


# --- registration ---------------------------------------------------------------------------------------

#: Where the operations are registered; kept for the life of the process.
library = torch.library.Library("lunet_fast", "DEF")

_LAYER = f"{MATRIX_SCHEMA}, {ACTIVATION_SCHEMA}"
_NEEDS = "bool needs_x, bool needs_lu, bool needs_bias"
_BACKWARD_OF = "Tensor grad, Tensor? grad_logabsdet, Tensor x"
_PAIR = "(Tensor, Tensor)"
_FOUR = "(Tensor, Tensor, Tensor, Tensor)"

#: Arguments and results. ``grad`` is the gradient of the first result and ``grad_logabsdet`` that of the
#: log-determinants [...]. The x of a backward is what the forward got, and of an inverse what it gave.
SCHEMAS = {
    "activation_forward": f"(Tensor x, {ACTIVATION_SCHEMA}, bool logabsdet) -> {_PAIR}",
    "activation_inverse": f"(Tensor x, {ACTIVATION_SCHEMA}, bool logabsdet) -> {_PAIR}",
    "activation_backward": f"({_BACKWARD_OF}, {ACTIVATION_SCHEMA}) -> {_PAIR}",
    "activation_inverse_backward": f"({_BACKWARD_OF}, {ACTIVATION_SCHEMA}) -> {_PAIR}",
    # (y, log|det J|, h, A) and (x, the inverse's log|det|, h): what follows the first two is for backward.
    "layer_forward": f"(Tensor x, {_LAYER}, bool logabsdet, bool save) -> {_FOUR}",
    "layer_inverse": f"(Tensor x, {_LAYER}, bool logabsdet, bool save) -> (Tensor, Tensor, Tensor)",
    # Gradients of (x, lu, bias, the activation's parameters), here and of a net.
    "layer_backward": f"({_BACKWARD_OF}, Tensor h, Tensor weight, {_LAYER}, {_NEEDS}) -> {_FOUR}",
    "layer_inverse_backward": f"({_BACKWARD_OF}, Tensor h, {_LAYER}, {_NEEDS}) -> {_FOUR}",
    "net_forward": f"(Tensor x, {_LAYER}, bool logabsdet) -> {_PAIR}",
    "net_inverse": f"(Tensor x, {_LAYER}, bool logabsdet) -> {_PAIR}",
    "net_backward": f"({_BACKWARD_OF}, {_LAYER}, {_NEEDS}) -> {_FOUR}",
    "net_inverse_backward": f"({_BACKWARD_OF}, {_LAYER}, {_NEEDS}) -> {_FOUR}",
}


def _fake_forward(name: str, args: list[Any]) -> tuple[Tensor, ...]:
    """The results' shapes of an operation that is no backward."""
    x, *values, activation, logabsdet = args[: 3 if name.startswith("activation") else 4]
    total = x.new_empty(x.shape[:-1] if logabsdet else (0,), dtype=wide(x.dtype))
    results = [x.new_empty(x.shape), total]
    if name.startswith("layer"):
        save, (matrix,) = args[4], values
        keeps_h, matrices = kept(x, matrix, activation)
        keeps_h = save and not activation.linear and (keeps_h or name == "layer_inverse")
        results.append(x.new_empty(x.shape if keeps_h else (0,)))
        if name == "layer_forward":
            lead = (matrices,) if matrices else ()
            results.append(x.new_empty((*lead, *matrix.lu.shape) if save else (0,)))
    return tuple(results)


def _fake_backward(name: str, args: list[Any]) -> tuple[Tensor, ...]:
    """The gradients' shapes."""
    x = args[2]
    activation = next(each for each in args if isinstance(each, Activation))
    learnt = activation.parameters
    parameters = x.new_empty(0) if learnt is None else learnt.new_empty(learnt.shape)
    if name.startswith("activation"):
        return x.new_empty(x.shape), parameters
    matrix, (needs_x, needs_lu, needs_bias) = next(e for e in args if isinstance(e, Matrix)), args[-3:]
    lu = matrix.lu
    return (
        x.new_empty(x.shape if needs_x else (0,)),
        lu.new_empty(lu.shape if needs_lu else (0,)),
        lu.new_empty(lu.shape[:-1] if needs_bias else (0,)),
        parameters,
    )


def _register(name: str, schema: str) -> None:
    fake = _fake_backward if name.endswith("backward") else _fake_forward
    library.define(name + schema)
    library.impl(name, lambda *flat: run(name, *structure(flat, schema)), "CompositeExplicitAutograd")
    torch.library.register_fake(
        f"lunet_fast::{name}", lambda *flat: fake(name, structure(flat, schema)), lib=library
    )


for _name, _schema in SCHEMAS.items():
    _register(_name, _schema)

try:
    set_backend(os.environ.get("LUNET_FAST_BACKEND", "auto"))
except (ValueError, RuntimeError) as error:
    raise type(error)(f"environment variable LUNET_FAST_BACKEND: {error}") from None

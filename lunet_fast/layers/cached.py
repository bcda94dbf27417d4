"""``with cached(net)``: the matrices of layers whose parameters stay as they are, formed once for many calls.

A layer stores L and U, and forms A = Pᵀ L U, or solves with the factors, at every call: D³ for what N rows
could have for N·D². Within ``cached`` A, A⁻¹ and what an activation makes of its parameters are kept, so that
a call costs what that of an ``nn.Linear`` costs.

Why not always, wherever there are no gradients: what is written through ``.data``, as in many a mean of
weights, PyTorch does not count, and a product that nobody asked to be kept would be silently stale; and the
last digits of a result would depend on the calls before it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from lunet_fast.ops.autograd import records

Module = TypeVar("Module", bound=nn.Module)

_counting = threading.Lock()


class Kept:
    """What a module keeps: a value for each name, with the tensors that it was made from."""

    def __init__(self) -> None:
        self.users = 0
        self.values: dict[Any, tuple[Any, tuple[Any, ...]]] = {}

    def get(self, name: Any, sources: tuple[Tensor | None, ...], make: Callable[[], Any]) -> Any:
        """The value of this name made from these tensors by ``make()``, kept or new; None where they are not
        of the kind whose writes PyTorch counts.

        It is written as one tuple, so that threads see a whole one, whoever wrote it.
        """
        found = self.values.get(name)
        if found is not None and _unchanged(found[1], sources):
            return found[0]
        if not all(map(_counts_writes, sources)):
            return None
        # The memory of now is held, so that no other can come to lie where it is.
        seen = tuple(None if t is None else (t, t._version, t.data_ptr(), t.detach()) for t in sources)
        with torch.inference_mode(False), torch.no_grad():
            value = make()
        if _unchanged(seen, sources):  # not written to meanwhile
            self.values[name] = value, seen
        return value


def _counts_writes(source: Tensor | None) -> bool:
    return source is None or (
        type(source) in (Tensor, nn.Parameter) and not source.is_inference() and not source.is_meta
    )


def _unchanged(seen: tuple[Any, ...], sources: tuple[Tensor | None, ...]) -> bool:
    """Whether these are the tensors that were seen, with the memory and PyTorch's count of writes of then."""
    for then, now in zip(seen, sources, strict=True):
        if then is None or now is None:
            if then is not now:
                return False
        elif then[0] is not now or then[1] != now._version or then[2] != now.data_ptr():
            return False
    return True


class Keeping(nn.Module):
    """A module that keeps something within ``cached``."""

    _kept: Kept | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_kept"}


def usable(module: Keeping, x: Tensor) -> Kept | None:
    """What this module may use for a call with x: None outside of ``cached``, where a parameter of its own
    wants a gradient, and where somebody watches the operations."""
    kept = module._kept
    # Asked before every call of a small layer: the cheapest way to each answer.
    if (
        kept is None
        or type(x) is not Tensor
        or torch.compiler.is_compiling()
        or torch._C._is_any_autocast_enabled()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._get_tracing_state() is not None
        or forward_ad._current_level >= 0
        or (torch.is_grad_enabled() and records(*module._parameters.values()))
    ):
        return None
    return kept


@contextmanager
def cached(module: Module) -> Iterator[Module]:
    """Within, layers of ``module`` keep A and A⁻¹ for as long as their parameters do not change.

        with torch.no_grad(), cached(flow):
            for _ in range(100):
                samples = flow.sample(1000)

    Each ``LUDense`` in ``module``, itself or below it, forms them when first needed, for 2·D³/3 flops forward
    and 3·D³ for the inverse, D² numbers each; then N rows cost 2·N·D² as in ``nn.Linear``. Splines and learnt
    slopes keep what they compute of their parameters alone.

    They are formed again after any write that PyTorch counts: an optimiser's step, ``copy_``,
    ``load_state_dict``, ``.to()``, another parameter in place of one. A write through ``.data`` is not
    counted: write under ``torch.no_grad()`` instead, or outside of the block. A⁻¹ is not used where A
    (in float64, a factor) is so badly conditioned that substitution is more accurate. Results are those of
    outside to rounding.

    Where a parameter wants a gradient and gradients are recorded, under ``torch.compile`` and ``torch.func``,
    and in layers whose methods are replaced, a call does what it does outside. A gradient of x alone, of a
    net with ``requires_grad_(False)``, passes through what is kept.

    Blocks may be nested, and entered by several threads; what is kept goes at the end of the last.
    """
    members: list[Any] = [each for each in module.modules() if isinstance(each, Keeping)]
    with _counting:
        for each in members:
            each._kept = Kept() if each._kept is None else each._kept
            each._kept.users += 1
    try:
        yield module
    finally:
        with _counting:
            for each in members:
                each._kept.users -= 1
                if not each._kept.users:
                    each._kept = None

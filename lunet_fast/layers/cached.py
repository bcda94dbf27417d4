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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from operator import attrgetter, is_
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from lunet_fast.ops.autograd import records

Module = TypeVar("Module", bound=nn.Module)

_counting = threading.Lock()


class Seen(NamedTuple):
    """What something was made from, with the tensors' memory and PyTorch's counts of writes of then."""

    sources: tuple[Any, ...]
    tensors: tuple[Tensor, ...]
    """Those of them to which writes count."""
    writes: list[int]
    addresses: list[int]
    memory: tuple[Tensor, ...]
    """Held, so that no other tensor can come to lie where it is."""

    @classmethod
    def of(cls, sources: Sequence[Any], counts: Callable[[Any], bool]) -> Seen:
        tensors = tuple(filter(counts, sources))
        writes, addresses = list(map(writes_to, tensors)), list(map(Tensor.data_ptr, tensors))
        return cls(tuple(sources), tensors, writes, addresses, tuple(t.detach() for t in tensors))

    def still(self, sources: Sequence[Any]) -> bool:
        """Whether these are the same, and nothing was written to the tensors among them."""
        # Of a small net's call this is a good part: each line is one loop in C.
        return (
            len(sources) == len(self.sources)
            and all(map(is_, sources, self.sources))
            and list(map(writes_to, self.tensors)) == self.writes
            and list(map(Tensor.data_ptr, self.tensors)) == self.addresses
        )


writes_to = attrgetter("_version")
"""PyTorch's count of the writes to a tensor."""


def _is_tensor(source: Any) -> bool:
    return isinstance(source, Tensor)


class Kept:
    """What a module keeps: a value for each name, with what it was made from."""

    def __init__(self) -> None:
        self.users = 0
        self.values: dict[Any, tuple[Any, Seen]] = {}

    def get(
        self,
        name: Any,
        sources: Sequence[Any],
        make: Callable[[], Any],
        counts: Callable[[Any], bool] = _is_tensor,
    ) -> Any:
        """The value of this name made from these tensors, modules and Nones by ``make()``, kept or new; None
        where a tensor is not of the kind whose writes PyTorch counts.

        ``counts`` says of a source whether a write to it makes the value another: by default of all tensors.
        The value is written as one tuple, so that threads see a whole one, whoever wrote it.
        """
        found = self.values.get(name)
        if found is not None and found[1].still(sources):
            return found[0]
        if not all(map(counts_writes, sources)):
            return None
        seen = Seen.of(sources, counts)
        with torch.inference_mode(False), torch.no_grad():
            value = make()
        if seen.still(sources):  # not written to meanwhile
            self.values[name] = value, seen
        return value


def counts_writes(source: Any) -> bool:
    """Whether PyTorch counts the writes to this tensor; of anything else, true."""
    return not isinstance(source, Tensor) or (
        type(source) in (Tensor, nn.Parameter) and not source.is_inference() and not source.is_meta
    )


class Keeping(nn.Module):
    """A module that keeps something, within ``cached`` or longer; a copy has none of it."""

    _kept: Kept | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_kept", "_plans")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        state.pop("_plans", None)  # pickled when it was
        super().__setstate__(state)


def usable(module: Keeping, x: Tensor) -> Kept | None:
    """What this module may use for a call with x: None outside of ``cached``, where a parameter of its own
    wants a gradient, and where somebody watches the operations."""
    kept = module._kept
    if kept is None or is_watched(x) or (torch.is_grad_enabled() and records(*module._parameters.values())):
        return None
    return kept


def is_watched(x: Tensor) -> bool:
    """Whether somebody wants to see the operations of a call with x, or has a say in them."""
    # Asked before every call of a small layer: the cheapest way to each answer.
    return (
        type(x) is not Tensor
        or torch.compiler.is_compiling()
        or torch._C._is_any_autocast_enabled()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._get_tracing_state() is not None
        or forward_ad._current_level >= 0
    )


@contextmanager
def cached(module: Module) -> Iterator[Module]:
    """Within, layers of ``module`` keep A and A⁻¹ for as long as their parameters do not change.

        with torch.no_grad(), cached(flow):
            for _ in range(100):
                samples = flow.sample(1000)

    Each ``LUDense`` in ``module``, itself or below it, forms them when first needed, for 2·D³/3 flops forward
    and 3·D³ for the inverse, D² numbers each; then N rows cost 2·N·D² as in ``nn.Linear``. Splines and learnt
    slopes keep what they compute of their parameters alone. On kernels an ``LUNet`` that goes in one launch
    keeps what that needs instead, all its matrices or what substitution takes of them, and so does a layer.
    The first inverse of a layer there waits for the device: call it once before a CUDA graph is captured.

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

"""A tensor that takes part in any computation but that nobody can write to."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

# They end as writes do and change no number.
_HARMLESS = frozenset({"requires_grad_", "share_memory_", "rename_"})


class _Related(type(Tensor)):  # type: ignore[misc]
    # torch.testing compares tensors only where one is an instance of the other's class: a parameter too.
    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, Tensor)


class ReadOnlyTensor(Tensor, metaclass=_Related):
    """A tensor computed from others, where a write would change a copy and nothing else.

    Results of operations are plain tensors; those that share its memory, as ``.data``, ``.detach()`` and
    rows, are read-only too. Raises ``RuntimeError`` with ``advice`` at a write.
    """

    advice = "it is read-only; write to a .clone() of it"

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        # Of t.copy_(weight) and torch.add(weight, 1, out=t) the weight is what is read. torch.nn.init gives
        # its tensor by name.
        target = kwargs.get("out")
        if target is None and _writes(func, name):
            target = args[0] if args else kwargs.get("tensor")
        if _has(target, cls):
            raise RuntimeError(f"{name} would write to a computed tensor: {cls.advice}")
        if name in ("__reduce_ex__", "__deepcopy__"):
            args = (args[0].as_subclass(Tensor), *args[1:])
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
            # torch.compile walks from a view to its _base until there is none.
            own_base = name == "__get__" and getattr(func, "__self__", None) is Tensor._base
            if args and _has(args[0], cls) and not own_base:
                return _guarded(result, args[0], cls)
            return result


def _writes(func: Callable[..., Any], name: str) -> bool:
    if name == "__set__":
        return getattr(func, "__self__", None) is Tensor.data
    in_place = name.endswith("_") and not name.endswith("__") and name not in _HARMLESS
    return in_place or name == "__setitem__" or name in _IN_PLACE_OPERATORS


_IN_PLACE_OPERATORS = frozenset(
    f"__i{name}__"
    for name in ("add", "sub", "mul", "div", "truediv", "floordiv", "mod", "pow", "and", "or", "xor")
)


def _has(target: Any, cls: type) -> bool:
    if isinstance(target, (tuple, list)):
        return any(_has(each, cls) for each in target)
    return issubclass(type(target), cls)


def _guarded(result: Any, source: Any, cls: type[ReadOnlyTensor]) -> Any:
    """A result, read-only where it shares the source's memory."""
    if isinstance(result, (tuple, list)):
        guarded = [_guarded(each, source, cls) for each in result]
        return type(result)(guarded) if type(result) in (tuple, list) else result
    shares = (
        type(result) is Tensor
        and not result.is_meta
        and result.layout == torch.strided
        and result.numel() > 0
        and type(source) is cls
        and result.untyped_storage().data_ptr() == source.untyped_storage().data_ptr()
    )
    return result.as_subclass(cls) if shares else result


def read_only(tensor: Tensor, cls: type[ReadOnlyTensor]) -> Tensor:
    """``tensor`` as ``cls``; as it is while something is traced or transformed, where a write would be seen
    to do nothing only by whoever runs the result."""
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined]
    if traced or type(tensor) is not Tensor or torch._C._are_functorch_transforms_active():
        return tensor
    return tensor.as_subclass(cls)

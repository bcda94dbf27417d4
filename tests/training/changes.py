"""Changes of a file of tensors with a header: (tensors by name, header) are changed in place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

Change = Callable[[dict[str, Tensor], dict[str, Any]], None]


def config(**changes: Any) -> Change:
    return lambda tensors, header: header["config"].update(changes)


def head(**changes: Any) -> Change:
    return lambda tensors, header: header.update(changes)


def tensor(name: str, change: Callable[[Tensor], Tensor]) -> Change:
    def apply(tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
        tensors[name] = change(tensors[name]).contiguous()

    return apply


def added(name: str, value: Tensor) -> Change:
    return lambda tensors, header: tensors.update({name: value})


def lacking(name: str) -> Change:
    def apply(tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
        (tensors if name in tensors else header).pop(name)

    return apply

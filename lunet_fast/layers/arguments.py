"""What the modules ask of their arguments, before they do anything."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor

from lunet_fast.ops.precision import LOG_DIAGONAL_BOUND


def checked_size(name: str, value: Any, least: int = 1) -> int:
    """``value`` as an int; ``TypeError`` where it is none, as 4.0, ``ValueError`` below ``least``."""
    try:
        size = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an int, got {value!r} of type {type(value).__name__}") from None
    if size < least:
        raise ValueError(f"{name} must be at least {least}, got {size}")
    return size


def check_dtype(name: str, dtype: torch.dtype) -> None:
    """Raise ``TypeError`` for a dtype in which there are no layers."""
    if dtype not in LOG_DIAGONAL_BOUND:
        known = ", ".join(str(each).removeprefix("torch.") for each in LOG_DIAGONAL_BOUND)
        raise TypeError(f"{name} is {dtype}; a layer's numbers are real: use one of {known}")


def checked_number(name: str, value: Any) -> float:
    """``value`` as a float; ``TypeError`` where it is none, as "0.1"."""
    try:
        return float(operator.pos(value))  # which a text has not
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be a number, got {value!r} of type {type(value).__name__}") from None


def check_tensor(name: str, x: Any) -> None:
    """Raise ``TypeError`` for what is no tensor, and for nested and complex ones."""
    if not isinstance(x, Tensor):
        how = "; use torch.from_numpy" if type(x).__module__ == "numpy" else ""
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__module__}.{type(x).__name__}{how}")
    if x.is_nested:
        raise TypeError(f"{name} is a nested tensor; pass its rows, {name}.values(), and split the result")
    if x.is_complex():
        raise TypeError(
            f"{name} must be real, got {x.dtype}; pass its real part, or both parts by torch.view_as_real"
        )

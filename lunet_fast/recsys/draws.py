"""Initial weights from a generator of one's own, though modules draw them from PyTorch's global one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_DRAWS = frozenset({Tensor.normal_, Tensor.uniform_})


class DrawnFrom(TorchFunctionMode):
    """Inside, ``normal_`` and ``uniform_``, by which modules are initialised, draw from ``generator``.

    In this thread alone, unlike ``torch.random.fork_rng``, which saves and restores the generator of the whole
    process: another thread's numbers would change these, and it would draw again what it has drawn since. With
    a generator of the same seed the numbers are the global one's. A generator that is given stays.
    """

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.generator = generator

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in _DRAWS and kwargs.get("generator") is None:
            kwargs["generator"] = self.generator
        return func(*args, **kwargs)

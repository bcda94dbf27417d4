"""Initial weights from a generator of their own, though PyTorch's modules draw them from the global one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import init
from torch.overrides import TorchFunctionMode

_DRAWS = frozenset(
    {
        Tensor.normal_,
        Tensor.uniform_,
        init.normal_,
        init.uniform_,
        init.kaiming_normal_,
        init.kaiming_uniform_,
        torch.randint,
        torch.randperm,
    }
)
"""By which modules are initialised here."""


class seeded(TorchFunctionMode):
    """Inside, what initialises modules on the CPU draws the numbers of a generator that ``seed`` seeds.

    In this thread alone. ``torch.random.fork_rng`` saves and restores the generator of the whole process:
    another thread's draws would change these, and it would be given again what it has drawn since.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        # Not the seed of the batches' generator, or first weights and first order would share their numbers.
        mixed = torch.randint(2**62, (), generator=torch.Generator().manual_seed(seed))
        self.generator = torch.Generator().manual_seed(int(mixed))

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in _DRAWS and kwargs.get("generator") is None:
            kwargs["generator"] = self.generator
        return func(*args, **kwargs)

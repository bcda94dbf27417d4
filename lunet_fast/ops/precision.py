"""In which precision things are computed."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

#: |s_i| beyond this counts as this, so that exp(s_i) and exp(−s_i) are normal, finite numbers.
LOG_DIAGONAL_BOUND = {torch.float64: 700.0, torch.float32: 80.0, torch.bfloat16: 80.0, torch.float16: 9.0}

#: The devices that torch.compile asks for autocast of.
AUTOCAST_DEVICES = ("cpu", "cuda", "xpu", "mps", "hpu", "xla", "mtia")


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums and matrices are formed for ``dtype``: float32 or wider."""
    return torch.promote_types(dtype, torch.float32)


def autocast_enabled(x: Tensor) -> bool:
    """Whether autocast is on for x's device; devices without autocast, as meta, never have it on."""
    if torch.compiler.is_dynamo_compiling():
        # Which devices have autocast, torch.compile of releases before 2.12 cannot ask.
        return x.device.type in AUTOCAST_DEVICES and torch.is_autocast_enabled(x.device.type)
    if not torch._C._is_any_autocast_enabled():  # asked at every call of a layer, and cheap
        return False
    return torch.amp.is_autocast_available(x.device.type) and torch.is_autocast_enabled(x.device.type)


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """A context in which autocast does not lower the precision of what is done with x."""
    return torch.autocast(x.device.type, enabled=False) if autocast_enabled(x) else nullcontext()

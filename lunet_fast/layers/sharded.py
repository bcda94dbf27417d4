"""Modules whose parameters FSDP2 has cut up over the processes."""

from __future__ import annotations

import sys

from torch import nn

#: What is called of a layer or a net beside ``forward``.
_METHODS = ("inverse", "forward_and_logabsdet", "inverse_and_logabsdet")


def gathers(module: nn.Module) -> None:
    """Let the methods of a module that ``fully_shard`` was given gather its parameters, as its call does.

    A flow calls its net and a net its layers by methods, of which FSDP2 does not hear by itself. O(1) for
    other modules, and after the first time.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None or not isinstance(module, getattr(fsdp, "FSDPModule", ())):
        return
    for name in _METHODS:
        if name not in module.__dict__:
            fsdp.register_fsdp_forward_method(module, name)

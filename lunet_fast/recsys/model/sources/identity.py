"""An item as nothing but itself."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class IdentitySource(nn.Module):
    """A learned vector for each item, all of whose meaning comes from who chose it, when and after what.

    ``unchosen``, a mask ``[n_items]`` or None: items whose vector stays zero, so that their other sources
    speak for them. Costs a row of the gradient for each item of a batch; nothing at serving.
    """

    def __init__(self, n_items: int, size: int, std: float, unchosen: Tensor | None) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.empty(n_items, size).normal_(std=std))
        if unchosen is not None:
            with torch.no_grad():
                self.table[unchosen] = 0.0

    def vectors(self, table: Tensor | None) -> Tensor:
        return self.table

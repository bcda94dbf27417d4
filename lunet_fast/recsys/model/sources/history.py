"""All that the user has chosen, whatever the order."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lunet_fast.recsys.model.sequences import Windows
from lunet_fast.recsys.model.sources import Dropout


class HistorySource(nn.Module):
    """W sum over the n items so far of h_i, over n^power; h is a second vector of each item (SVD++).

    The window and all that is before it count. Costs O(d) an entry before the window, O(d²) one within it.
    """

    def __init__(self, size: int, n_items: int, power: float, std: float) -> None:
        super().__init__()
        self.items = nn.Parameter(torch.empty(n_items, size).normal_(std=std))
        self.mix = nn.Parameter(torch.eye(size) * (0.3 * math.sqrt(size)))
        self.power = power

    def after_each(self, windows: Windows, items: Tensor, dropout: Dropout) -> Tensor:
        entries = F.embedding(windows.items, self.items)
        sums = entries.cumsum(1) + self._before(windows).unsqueeze(1)
        count = windows.earlier_counts.unsqueeze(1) + torch.arange(
            1, entries.shape[1] + 1, device=entries.device
        )
        return dropout(sums * self._scale(count)) @ self.mix

    def after_last(self, windows: Windows, items: Tensor) -> Tensor:
        place = torch.arange(windows.items.shape[1], device=windows.items.device)
        there = (place < windows.lengths.unsqueeze(1)).to(self.items.dtype).unsqueeze(1)
        inside = (there @ F.embedding(windows.items, self.items)).squeeze(1)
        count = windows.earlier_counts + windows.lengths
        return (inside + self._before(windows)) * self._scale(count) @ self.mix

    def _before(self, windows: Windows) -> Tensor:
        ends = windows.earlier_counts.cumsum(0)
        return F.embedding_bag(windows.earlier, self.items, ends - windows.earlier_counts, mode="sum")

    def _scale(self, count: Tensor) -> Tensor:
        return count.clamp(min=1).to(self.items.dtype).pow(-self.power).unsqueeze(-1)

"""What a user's friends have chosen."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lunet_fast.recsys.model.sequences import Windows
from lunet_fast.recsys.model.sources import Dropout


class SocialSource(nn.Module):
    """W sum over the items i of a user's friends of b_ui h_i, b as ``Side`` has them; h as a history's.

    So a user with few entries of its own is known by the company it keeps; one without friends, or who is
    not in training, gets nothing. A friend's choices are those of the whole training part, whenever they
    were made; the user's own are not among them unless a friend made them too. Costs O(E d) a window whose
    friends have E items together, and O(d²).
    """

    def __init__(self, size: int, n_items: int, std: float) -> None:
        super().__init__()
        self.items = nn.Parameter(torch.empty(n_items, size).normal_(std=std))
        self.mix = nn.Parameter(torch.eye(size) * (0.3 * math.sqrt(size)))

    def after_each(self, windows: Windows, items: Tensor, dropout: Dropout) -> Tensor:
        same = self.after_last(windows, items).unsqueeze(1)
        return dropout(same.expand(-1, windows.items.shape[1], -1))

    def after_last(self, windows: Windows, items: Tensor) -> Tensor:
        bags = windows.side.friends
        assert bags is not None
        start = bags.counts.cumsum(0) - bags.counts
        weights = bags.weights.to(self.items.dtype)
        sums = F.embedding_bag(bags.items, self.items, start, mode="sum", per_sample_weights=weights)
        return sums @ self.mix

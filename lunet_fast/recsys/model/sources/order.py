"""The user's last items, the more recent the heavier."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lunet_fast.recsys.data.order import GAPS
from lunet_fast.recsys.model.decays import decayed_sums, last_decayed_sum
from lunet_fast.recsys.model.sequences import Windows
from lunet_fast.recsys.model.sources import Dropout

SLOWEST, FASTEST = 4.5, 0.3
"""The logits of the first decays, between which they are spread."""


class OrderSource(nn.Module):
    """y_t = sum over k of W_k sum over j <= t of sqrt(1 - decay_k) decay_k^(t - j) x_j, j within the window.

    x_j = sqrt(d) e_j + a vector for the class of the rating + one for the class of the time since the entry
    before. The decays, W and the vectors are learned; e are the vectors that items are scored with.

    A window of S entries costs O(S K d (CHUNK + d)) in training, and O(S K d + K d²) at serving.
    """

    def __init__(self, size: int, decays: int, levels: int, std: float) -> None:
        super().__init__()
        self.rate = nn.Parameter(torch.linspace(FASTEST, SLOWEST, decays))
        self.mix = nn.Parameter(torch.eye(size).repeat(decays, 1) * (1.5 / decays))
        self.levels = nn.Parameter(torch.empty(levels, size).normal_(std=std))
        self.gaps = nn.Parameter(torch.empty(GAPS, size).normal_(std=std))

    def after_each(self, windows: Windows, items: Tensor, dropout: Dropout) -> Tensor:
        sums = decayed_sums(dropout(self._entries(windows, items)), self._log_decay())
        return sums.flatten(2) @ self._mixing()

    def after_last(self, windows: Windows, items: Tensor) -> Tensor:
        entries = self._entries(windows, items)
        return last_decayed_sum(entries, windows.lengths, self._log_decay()).flatten(1) @ self._mixing()

    def _entries(self, windows: Windows, items: Tensor) -> Tensor:
        x = F.embedding(windows.items, items) * math.sqrt(items.shape[1])
        both = (self.levels.unsqueeze(1) + self.gaps).flatten(0, 1)
        return x + F.embedding(windows.levels * GAPS + windows.gaps, both)

    def _log_decay(self) -> Tensor:
        return F.logsigmoid(self.rate)

    def _mixing(self) -> Tensor:
        """The W_k, weighted, under one another: ``[K d, d]``."""
        weight = torch.sigmoid(-self.rate).sqrt()  # sqrt(1 - decay)
        return self.mix * weight.repeat_interleave(self.mix.shape[1]).unsqueeze(1)

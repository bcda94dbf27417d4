"""Users and items by what is known of them: features, texts, or any numbers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lunet_fast.recsys.model.sequences import Windows
from lunet_fast.recsys.model.sources import Dropout


class ItemTableSource(nn.Module):
    """t_i W for a table t ``[n_items, columns]``: side features, or the numbers of a text.

    Every item has such a vector, also one that nobody has chosen. Costs O(n_items columns d) a step; at
    serving the vectors are computed once.
    """

    def __init__(self, columns: int, size: int, std: float) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.empty(columns, size).normal_(std=std))

    def vectors(self, table: Tensor | None) -> Tensor:
        assert table is not None
        return table @ self.mix


class UserTableSource(nn.Module):
    """t_u W for a table t ``[n_users, columns]`` of side features; zero for somebody unknown.

    The same at every entry of a window. Costs O(columns d) a window.
    """

    def __init__(self, columns: int, size: int, std: float) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.empty(columns, size).normal_(std=std))

    def after_each(self, windows: Windows, items: Tensor, dropout: Dropout) -> Tensor:
        return self.after_last(windows, items).unsqueeze(1).expand(-1, windows.items.shape[1], -1)

    def after_last(self, windows: Windows, items: Tensor) -> Tensor:
        assert windows.side.features is not None
        return F.linear(windows.side.features, self.mix.T)

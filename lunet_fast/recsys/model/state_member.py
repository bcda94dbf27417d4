"""One network of a recommender that reads sequences: sources -> state x -> LU-Net -> z."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lunet_fast.layers.activations import LeakySoftplus
from lunet_fast.layers.lunet import LUNet
from lunet_fast.recsys.data.order import ELAPSED_CLASSES
from lunet_fast.recsys.model.sequence_config import SequenceConfig
from lunet_fast.recsys.model.sequences import Sequences, Windows
from lunet_fast.recsys.model.side import Side
from lunet_fast.recsys.model.sources import Dropout, ItemSource, Source
from lunet_fast.recsys.model.sources.features import ItemTableSource, UserTableSource
from lunet_fast.recsys.model.sources.history import HistorySource
from lunet_fast.recsys.model.sources.identity import IdentitySource
from lunet_fast.recsys.model.sources.order import OrderSource
from lunet_fast.recsys.model.sources.social import SocialSource


class StateMember(nn.Module):
    """x = LayerNorm(sum of the sources), z = f(x), score of item i = z·e_i + b_i; x = f⁻¹(z).

    e_i is the sum of the item's own sources. f is an LU-Net of D = d, or absent: ``network`` ``identity``.
    With ``config.elapsed`` a source's coordinates are multiplied by exp(g), g learned for each class of the
    time that has passed since the last entry: what is recent counts less where it is long ago.
    """

    def __init__(self, config: SequenceConfig, sequences: Sequences, side: Side) -> None:
        super().__init__()
        size, std = config.embedding_size, config.embedding_std
        n_items = sequences.n_items
        of_items: dict[str, nn.Module] = {}
        if config.identity:
            unchosen = sequences.item_counts == 0 if side.describes_items else None
            of_items["identity"] = IdentitySource(n_items, size, std, unchosen)
        self.bias = nn.Parameter(torch.zeros(n_items))
        sources: dict[str, nn.Module] = {}
        if config.order:
            sources["order"] = OrderSource(size, config.decays, sequences.n_levels, 0.4 * std)
        if config.user_history:
            sources["history"] = HistorySource(size, n_items, config.history_power, std)
        for name in ("item_features", "item_text"):
            table = getattr(side, name)
            if table is not None:
                of_items[name] = ItemTableSource(table.shape[1], size, std)
        if side.user_features is not None:
            sources["user_features"] = UserTableSource(side.user_features.shape[1], size, std)
        if side.friends_indptr is not None:
            sources["social"] = SocialSource(size, n_items, std)
        self.item_sources, self.sources = nn.ModuleDict(of_items), nn.ModuleDict(sources)
        self.elapsed = None
        if config.elapsed:
            self.elapsed = nn.Parameter(torch.zeros(len(sources), ELAPSED_CLASSES, size))
        self.norm = nn.LayerNorm(size)
        self.net = None
        if config.network == "lu-net":
            self.net = LUNet(size, config.layers, LeakySoftplus(config.alpha))

    def item_vectors(self, side: Side) -> Tensor:
        """e ``[n_items, d]``."""
        found = [
            cast(ItemSource, source).vectors(getattr(side, name, None))
            for name, source in self.item_sources.items()
        ]
        total = found[0]
        for each in found[1:]:
            total = total + each
        return total

    def training_states(self, windows: Windows, items: Tensor, dropout: Dropout) -> Tensor:
        """x ``[T, d]`` after each entry of the windows, T their lengths' sum, one window after the other."""
        place = torch.arange(windows.items.shape[1], device=windows.items.device)
        there = (place < windows.lengths.unsqueeze(1)).flatten().nonzero().squeeze(1)
        parts = [source.after_each(windows, items, dropout) for source in self._sources()]
        if self.elapsed is None:
            total = parts[0]
            for each in parts[1:]:
                total = total + each
            return cast(Tensor, self.norm(total.flatten(0, 1)[there]))
        chosen = [part.flatten(0, 1)[there] for part in parts]
        return cast(Tensor, self.norm(self._weighted(chosen, windows.elapsed.flatten()[there])))

    def states(self, windows: Windows, items: Tensor) -> Tensor:
        """x ``[B, d]`` after the last entry of each window."""
        parts = [source.after_last(windows, items) for source in self._sources()]
        if self.elapsed is None:
            return cast(Tensor, self.norm(torch.stack(parts).sum(0)))
        last = windows.elapsed.gather(1, (windows.lengths - 1).unsqueeze(1)).squeeze(1)
        return cast(Tensor, self.norm(self._weighted(parts, last)))

    def _weighted(self, parts: list[Tensor], elapsed: Tensor) -> Tensor:
        """The sum of ``parts``, each ``[T, d]``, by the classes ``elapsed`` ``[T]``."""
        assert self.elapsed is not None
        gates = self.elapsed.exp()
        total = parts[0] * F.embedding(elapsed, gates[0])
        for part, gate in zip(parts[1:], gates[1:], strict=True):
            total = total + part * F.embedding(elapsed, gate)
        return total

    def latent(self, x: Tensor) -> Tensor:
        """z = f(x), ``[..., d]``; O(M d²) a row for M layers."""
        return x if self.net is None else cast(Tensor, self.net(x))

    def inverse(self, z: Tensor) -> Tensor:
        """x = f⁻¹(z), ``[..., d]``."""
        return z if self.net is None else self.net.inverse(z)

    def _sources(self) -> list[Source]:
        return cast("list[Source]", list(self.sources.values()))

"""The recommender that reads sequences: a user's past -> state x -> LU-Net -> z -> scores of items."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from lunet_fast.layers.activations import LeakySoftplus
from lunet_fast.layers.lunet import LUNet
from lunet_fast.recsys.model.sequence_config import SequenceConfig
from lunet_fast.recsys.model.sequences import Sequences, Windows
from lunet_fast.recsys.model.sources import Dropout, Source
from lunet_fast.recsys.model.sources.history import HistorySource
from lunet_fast.recsys.model.sources.order import OrderSource
from lunet_fast.training.schema import check_same_tensors


class StateNetwork(nn.Module):
    """x = LayerNorm(sum of the sources), z = f(x), score of item i = z·e_i + b_i; x = f⁻¹(z).

    The sources read what the user has chosen so far, so the model has no vector of a user: one that training
    has not seen needs but a list of items. f is an LU-Net of D = d, or with ``network`` ``identity`` absent.
    ``sequences`` are the training part. All items are scored by one product, O(n_items d) for a user.
    """

    def __init__(self, config: SequenceConfig, sequences: Sequences) -> None:
        super().__init__()
        self.config, self.sequences = config, sequences
        size, std = config.embedding_size, config.embedding_std
        self.items = nn.Parameter(torch.empty(sequences.n_items, size).normal_(std=std))
        self.bias = nn.Parameter(torch.zeros(sequences.n_items))
        sources: dict[str, nn.Module] = {}
        if config.order:
            sources["order"] = OrderSource(size, config.decays, sequences.n_levels, 0.4 * std)
        if config.user_history:
            sources["history"] = HistorySource(size, sequences.n_items, config.history_power, std)
        self.sources = nn.ModuleDict(sources)
        self.norm = nn.LayerNorm(size)
        self.net = None
        if config.network == "lu-net":
            self.net = LUNet(size, config.layers, LeakySoftplus(config.alpha))

    @classmethod
    def from_state(
        cls, config: SequenceConfig, state: dict[str, Tensor], n_users: int, n_items: int
    ) -> StateNetwork:
        """The model that ``state``, a ``state_dict``, belongs to; ``ValueError`` where it does not fit."""
        own = "sequences."
        saved = {name.removeprefix(own): t for name, t in state.items() if name.startswith(own)}
        sequences = Sequences.from_state(saved, n_users, n_items)
        with torch.device("meta"):
            wanted = cls(config, sequences).state_dict()
        check_same_tensors(wanted, state)
        with torch.random.fork_rng(devices=[]):
            model = cls(config, sequences)
        model.load_state_dict(state)
        return model

    def training_states(self, windows: Windows, dropout: Dropout) -> Tensor:
        """x ``[T, d]`` after each entry of the windows, T their lengths' sum, one window after the other."""
        place = torch.arange(windows.items.shape[1], device=windows.items.device)
        there = (place < windows.lengths.unsqueeze(1)).flatten().nonzero().squeeze(1)
        first, *others = (source.after_each(windows, self.items, dropout) for source in self._sources())
        for each in others:
            first = first + each
        return cast(Tensor, self.norm(first.flatten(0, 1)[there]))

    def states(self, windows: Windows) -> Tensor:
        """x ``[B, d]`` after the last entry of each window."""
        total = torch.stack([source.after_last(windows, self.items) for source in self._sources()]).sum(0)
        return cast(Tensor, self.norm(total))

    def latent(self, x: Tensor) -> Tensor:
        """z = f(x), ``[..., d]``; O(M d²) a row."""
        return x if self.net is None else cast(Tensor, self.net(x))

    def inverse(self, z: Tensor) -> Tensor:
        """x = f⁻¹(z), ``[..., d]``."""
        return z if self.net is None else self.net.inverse(z)

    def scores(self, z: Tensor) -> Tensor:
        """``[B, n_items]`` of z ``[B, d]``."""
        return torch.addmm(self.bias, z, self.items.T)

    def popularity(self) -> Tensor:
        """``[n_items]``: the log of the number of times an item was chosen, and one; for users unknown."""
        return torch.log(self.sequences.item_counts + 1.0)

    @torch.no_grad()
    def score_users(self, users: Tensor) -> Tensor:
        """Scores ``[U, n_items]`` of what ``users``, int64 ``[U]``, may choose next.

        A user without an entry, or -1, has :meth:`popularity`. A row does not depend on the other users.
        """
        place = users.to(self.items.device)
        counts = self.sequences.user_counts[place.clamp(min=0)] * (place >= 0)
        scores = self.popularity().repeat(len(users), 1)
        warm = (counts > 0).nonzero().squeeze(1)
        for rows in warm.split(256):
            x = self.states(self.sequences.last(place[rows], self.config.length))
            scores[rows] = self.scores(self.latent(x))
        return scores

    def _sources(self) -> list[Source]:
        return cast("list[Source]", list(self.sources.values()))

"""The recommender that reads sequences: a user's past -> states -> LU-Nets -> scores of items."""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from lunet_fast.recsys.model.sequence_config import SequenceConfig
from lunet_fast.recsys.model.sequences import Sequences, Windows
from lunet_fast.recsys.model.side import Side
from lunet_fast.recsys.model.state_member import StateMember
from lunet_fast.training.schema import check_same_tensors


class Items(NamedTuple):
    """All items as they are scored, computed once for as long as no parameter changes."""

    vectors: list[Tensor]
    """e of each member, ``[n_items, d]``."""
    table: Tensor
    """Of all members side by side, over their number: ``[n_items, K d]``."""
    bias: Tensor
    """``[n_items]``, the members' mean."""


class StateNetwork(nn.Module):
    """K members; the score of an item is the mean of theirs.

    A member's sources read what the user has chosen so far, so the model has no vector of a user: one that
    training has not seen needs but a list of items. With K members a state is K d numbers, and so is z: all
    items are scored by one product of z with :attr:`Items.table`, O(K n_items d) for a user. ``sequences``
    are the training part, ``side`` what else is known.
    """

    def __init__(self, config: SequenceConfig, sequences: Sequences, side: Side | None = None) -> None:
        super().__init__()
        self.config, self.sequences = config, sequences
        self.side = Side() if side is None else side
        self.members = nn.ModuleList(StateMember(config, sequences, self.side) for _ in range(config.members))
        if not self.networks[0].item_sources:
            raise ValueError(
                "identity=False leaves nothing to know an item by: turn on text or side_features"
            )

    @classmethod
    def from_state(
        cls, config: SequenceConfig, state: dict[str, Tensor], n_users: int, n_items: int
    ) -> StateNetwork:
        """The model that ``state``, a ``state_dict``, belongs to; ``ValueError`` where it does not fit."""
        own = {}
        for kind in ("sequences.", "side."):
            own[kind] = {name.removeprefix(kind): t for name, t in state.items() if name.startswith(kind)}
        sequences = Sequences.from_state(own["sequences."], n_users, n_items)
        side = Side.from_state(own["side."], n_users, n_items)
        with torch.device("meta"):
            wanted = cls(config, sequences, side).state_dict()
        check_same_tensors(wanted, state)
        with torch.random.fork_rng(devices=[]):
            model = cls(config, sequences, side)
        model.load_state_dict(state)
        return model

    def item_vectors(self) -> Items:
        """All items. O(K n_items d (1 + columns)), the columns those of the tables that describe items."""
        members = self.networks
        vectors = [member.item_vectors(self.side) for member in members]
        if len(members) == 1:
            return Items(vectors, vectors[0], members[0].bias)
        table = torch.cat(vectors, 1) / len(members)
        return Items(vectors, table, torch.stack([member.bias for member in members]).mean(0))

    def states(self, windows: Windows, items: Items) -> Tensor:
        """x ``[B, K d]`` after the last entry of each window."""
        windows = self._told(windows)
        states = [m.states(windows, e) for m, e in zip(self.networks, items.vectors, strict=True)]
        return torch.cat(states, 1)

    def latent(self, x: Tensor) -> Tensor:
        """z = f(x), ``[..., K d]``, member by member; O(K M d²) a row for M layers."""
        parts = x.chunk(len(self.members), -1)
        return torch.cat([m.latent(part) for m, part in zip(self.networks, parts, strict=True)], -1)

    def inverse(self, z: Tensor) -> Tensor:
        """x = f⁻¹(z), ``[..., K d]``."""
        parts = z.chunk(len(self.members), -1)
        return torch.cat([m.inverse(part) for m, part in zip(self.networks, parts, strict=True)], -1)

    def scores(self, z: Tensor, items: Items) -> Tensor:
        """``[B, n_items]`` of z ``[B, K d]``."""
        return torch.addmm(items.bias, z, items.table.T)

    def popularity(self) -> Tensor:
        """``[n_items]``: the log of the number of times an item was chosen, and one; for users unknown."""
        return torch.log(self.sequences.item_counts + 1.0)

    @torch.no_grad()
    def score_users(self, users: Tensor, elapsed: Tensor | None = None) -> Tensor:
        """Scores ``[U, n_items]`` of what ``users``, int64 ``[U]``, may choose next.

        ``elapsed``, int64 ``[U]``, is the class of the time since the user's last entry, see
        :data:`~lunet_fast.recsys.data.order.ELAPSED`. A user without an entry, or -1, has :meth:`popularity`.
        A row does not depend on the other users.
        """
        items = self.item_vectors()
        place = users.to(items.table.device)
        asked = torch.zeros_like(place) if elapsed is None else elapsed.to(place.device)
        counts = self.sequences.user_counts[place.clamp(min=0)] * (place >= 0)
        scores = self.popularity().repeat(len(users), 1)
        warm = (counts > 0).nonzero().squeeze(1)
        for rows in warm.split(256):
            x = self.states(self.sequences.last(place[rows], self.config.length, asked[rows]), items)
            scores[rows] = self.scores(self.latent(x), items)
        return scores

    def _told(self, windows: Windows) -> Windows:
        """With what is known of the users beside their entries."""
        return windows._replace(side=self.side.of_users(windows.users))

    @property
    def networks(self) -> list[StateMember]:
        """The K members."""
        return cast("list[StateMember]", list(self.members))

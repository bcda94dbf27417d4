"""The multilayer perceptron that the recommender is compared with."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn


class MLPModel(nn.Module):
    """The classic control of table 2: embeddings -> x = [user; item] -> Linear, ReLU, ... -> rating.

    Same embeddings as the paper's recipe; ``latent`` is the last hidden layer, from which :func:`decoder` has
    to rebuild x. A pair whose user or item has no training rating is predicted like any other.
    """

    mean: Tensor

    def __init__(
        self,
        n_users: int,
        n_items: int,
        embedding_size: int,
        hidden: tuple[int, ...],
        mean: float,
        std: float,
    ) -> None:
        super().__init__()
        self.user_embedding = nn.Embedding(n_users, embedding_size)
        self.item_embedding = nn.Embedding(n_items, embedding_size)
        self.hidden = perceptron((2 * embedding_size, *hidden), last=nn.ReLU)
        self.readout = nn.Linear(hidden[-1], 1)
        self.register_buffer("mean", torch.tensor(mean))
        with torch.no_grad():
            self.user_embedding.weight.normal_(std=std)
            self.item_embedding.weight.normal_(std=std)

    def latent(self, users: Tensor, items: Tensor) -> tuple[Tensor, Tensor]:
        """``(x, h)``: the input ``[B, 2k]`` and the last hidden layer ``[B, hidden[-1]]``."""
        x = torch.cat((self.user_embedding(users), self.item_embedding(items)), dim=-1)
        return x, self.hidden(x)

    def forward(self, users: Tensor, items: Tensor) -> Tensor:
        """Ratings ``[B]``, not clipped."""
        h: Tensor = self.readout(self.latent(users, items)[1])
        return self.mean + h.squeeze(-1)


def perceptron(sizes: tuple[int, ...], last: Callable[[], nn.Module] | None = None) -> nn.Sequential:
    """Linear layers of the given sizes with ReLU between them, and ``last`` after the final one."""
    modules: list[nn.Module] = []
    for i, (size_in, size_out) in enumerate(pairwise(sizes)):
        modules.append(nn.Linear(size_in, size_out))
        if i < len(sizes) - 2:
            modules.append(nn.ReLU())
        elif last is not None:
            modules.append(last())
    return nn.Sequential(*modules)

"""The networks that sequences are usually read by: self-attention and a recurrent one.

Both are trained as recipe ``sequence`` is, on the same stretches by the same softmax with its shared
negatives and its correction, which later work found SASRec to be much better with than with its own
cross-entropy of pairs (Klenitskiy and Vasilev 2023, Petrov and Macdonald 2023). So what differs is how a
sequence is read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lunet_fast.recsys.data.ratings import Ratings
from lunet_fast.recsys.evaluation.fitted import Fitted, count_parameters
from lunet_fast.recsys.model.sequence_config import LEAST_BATCH, STEPS
from lunet_fast.recsys.model.sequence_training import Stretches
from lunet_fast.recsys.model.sequences import Sequences
from lunet_fast.recsys.model.softmax import next_item_loss
from lunet_fast.training.loop import Batch, Phase, fit


@dataclass(frozen=True)
class Settings:
    """Of either network."""

    size: int
    layers: int
    length: int
    dropout: float
    negatives: int
    epochs: int
    batch_size: int
    learning_rate: float


class Reader(nn.Module):
    """Item vectors, tied to the ones that are scored, with a bias; :meth:`read` is the network's own."""

    def __init__(self, n_items: int, settings: Settings) -> None:
        super().__init__()
        self.items = nn.Embedding(n_items, settings.size)
        nn.init.normal_(self.items.weight, std=0.05)
        self.bias = nn.Parameter(torch.zeros(n_items))
        self.dropout = nn.Dropout(settings.dropout)

    def read(self, x: Tensor) -> Tensor:
        """``[B, S, d]`` of x ``[B, S, d]``; no entry depends on a later one."""
        raise NotImplementedError

    def forward(self, items: Tensor) -> Tensor:
        """The states ``[B, S, d]`` after each of the items int64 ``[B, S]``."""
        return self.read(self.items(items) * math.sqrt(self.items.embedding_dim))


class Block(nn.Module):
    """Self-attention of one head, then two layers entry by entry; a norm before each, and both added to x."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.before, self.between = nn.LayerNorm(size), nn.LayerNorm(size)
        self.queries, self.mixed = nn.Linear(size, 3 * size), nn.Linear(size, size)
        self.wide, self.narrow = nn.Linear(size, size), nn.Linear(size, size)

    def forward(self, x: Tensor, dropout: nn.Module) -> Tensor:
        query, key, value = self.queries(self.before(x)).chunk(3, -1)
        seen = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + dropout(self.mixed(seen))
        return x + cast(Tensor, dropout(self.narrow(F.relu(self.wide(self.between(x))))))


class SASRec(Reader):
    """Self-attention with learned positions (Kang and McAuley 2018); O(S d (S + d)) a layer."""

    def __init__(self, n_items: int, settings: Settings) -> None:
        super().__init__(n_items, settings)
        self.places = nn.Parameter(torch.empty(settings.length, settings.size).normal_(std=0.05))
        self.blocks = nn.ModuleList(Block(settings.size) for _ in range(settings.layers))
        self.norm = nn.LayerNorm(settings.size)

    def read(self, x: Tensor) -> Tensor:
        x = self.dropout(x + self.places[: x.shape[1]])
        for block in self.blocks:
            x = block(x, self.dropout)
        return cast(Tensor, self.norm(x))


class GRU4Rec(Reader):
    """Gated recurrent units over a user's whole sequence (Hidasi et al. 2016); O(S d²) a layer."""

    def __init__(self, n_items: int, settings: Settings) -> None:
        super().__init__(n_items, settings)
        self.units = nn.GRU(settings.size, settings.size, settings.layers, batch_first=True)
        self.mix = nn.Linear(settings.size, settings.size)

    def read(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.mix(self.dropout(self.units(self.dropout(x))[0])))


def sasrec(training: Ratings, seed: int, settings: Mapping[str, Any]) -> Fitted:
    """:class:`SASRec`."""
    return fitted(SASRec, Settings(**settings), training, seed)


def gru4rec(training: Ratings, seed: int, settings: Mapping[str, Any]) -> Fitted:
    """:class:`GRU4Rec`."""
    return fitted(GRU4Rec, Settings(**settings), training, seed)


def fitted(kind: type[Reader], settings: Settings, training: Ratings, seed: int) -> Fitted:
    """A network of that kind, trained; users without training ratings get popularity."""
    sequences = Sequences.of(training, seed)
    torch.manual_seed(seed)
    model = kind(training.n_items, settings)
    optimizer = torch.optim.Adam(model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.98), fused=True)
    batch_size = min(settings.batch_size, max(len(training) // STEPS, LEAST_BATCH))
    batches = Stretches(sequences, settings.length, batch_size)
    phase = Phase(
        name=kind.__name__,
        module=model,
        optimizer=optimizer,
        batches=batches,
        epochs=settings.epochs,
        seed=seed,
        objective=partial(_objective, model, batches, settings),
        rate=("learning_rate", settings.learning_rate),
        linear_decay=True,
    )
    model.train()
    fit(phase)
    model.eval()
    popularity = torch.log(sequences.item_counts + 1.0)

    @torch.no_grad()
    def score_items(users: Tensor) -> Tensor:
        scores = popularity.repeat(len(users), 1)
        warm = (sequences.user_counts[users] > 0).nonzero().squeeze(1)
        for rows in warm.split(256) if len(warm) else ():
            windows = sequences.last(users[rows], settings.length)
            states = model(windows.items)[torch.arange(len(rows)), windows.lengths - 1]
            scores[rows] = torch.addmm(model.bias, states, model.items.weight.T)
        return scores

    return Fitted(count_parameters(model), score_items=score_items)


def _objective(
    model: Reader,
    stretches: Stretches,
    settings: Settings,
    batch: Batch,
    share: slice,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """As :func:`~lunet_fast.recsys.model.sequence_training.next_item_objective`, in one process."""
    users, start, stop = batch
    sequences, negatives = stretches.sequences, None
    if settings.negatives < sequences.n_items:
        negatives = torch.randperm(sequences.n_items, generator=generator)[: settings.negatives]
    windows = sequences.windows(users, start, stop)
    there = torch.arange(windows.items.shape[1]) < windows.lengths.unsqueeze(1)
    target = sequences.after_each(users, start, stop)
    loss = next_item_loss(model(windows.items)[there], model.items.weight, model.bias, target, negatives)
    return loss / len(target), loss.detach() / len(users)

"""Sums of a sequence with exponentially decaying weights, for every position at once or for the last one."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 32
"""Positions that are summed by one small matrix; what is before them comes in through a second one."""


def decayed_sums(x: Tensor, log_decay: Tensor) -> Tensor:
    """y_{t,k} = sum over j <= t of decay_k^(t - j) x_j, ``[B, S, K, d]``, of x ``[B, S, d]``.

    ``log_decay`` ``[K]`` is below 0. Chunks of CHUNK positions are summed by a triangular matrix of powers,
    and the sums at their ends by another, so there is no loop over positions: O(B S K d (CHUNK + S / CHUNK²))
    time, B S K d numbers of memory twice.
    """
    batch, steps, size = x.shape
    decays = len(log_decay)
    inside = min(CHUNK, steps)
    chunks = -(-steps // inside)
    x = F.pad(x, (0, 0, 0, chunks * inside - steps))
    within = _powers(log_decay, inside, 0).transpose(0, 1).reshape(inside * decays, inside)
    y = within @ x.reshape(batch * chunks, inside, size)
    y = y.view(batch, chunks, inside, decays, size)
    if chunks > 1:
        carried = torch.einsum("kmj,bjkd->bmkd", _powers(inside * log_decay, chunks, 1), y[:, :, -1])
        age = torch.arange(1, inside + 1, device=x.device).unsqueeze(1)
        y = torch.addcmul(y, carried.unsqueeze(2), (age * log_decay).exp().unsqueeze(2))
    return y.view(batch, chunks * inside, decays, size)[:, :steps]


def last_decayed_sum(x: Tensor, lengths: Tensor, log_decay: Tensor) -> Tensor:
    """The sums ``[B, K, d]`` at the last position of each sequence, ``lengths`` int64 ``[B]``; O(B S K d)."""
    age = lengths.unsqueeze(1) - 1 - torch.arange(x.shape[1], device=x.device)
    weights = (age.clamp(min=0).unsqueeze(1) * log_decay.unsqueeze(1)).exp() * (age >= 0).unsqueeze(1)
    return weights @ x


def _powers(log_decay: Tensor, size: int, delay: int) -> Tensor:
    """``[K, size, size]``: decay_k^(i - j - delay) where that exponent is at least 0, else 0."""
    place = torch.arange(size, device=log_decay.device)
    exponent = place.unsqueeze(1) - place - delay
    powers = (log_decay[:, None, None] * exponent.clamp(min=0)).exp()
    return powers * (exponent >= 0)

"""Exponentially decaying sums against the recurrence, in float64."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lunet_fast.recsys.model.decays import CHUNK, decayed_sums, last_decayed_sum


def recurrence(x: Tensor, log_decay: Tensor) -> Tensor:
    y, rows = torch.zeros(len(x), len(log_decay), x.shape[2], dtype=x.dtype), []
    for step in range(x.shape[1]):
        y = y * log_decay.exp().unsqueeze(1) + x[:, step].unsqueeze(1)
        rows.append(y)
    return torch.stack(rows, 1)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 3), st.integers(1, 3 * CHUNK + 2), st.integers(1, 3), st.integers(0, 99))
def test_the_sums_are_those_of_the_recurrence(batch: int, steps: int, decays: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, steps, 3, dtype=torch.float64, generator=generator)
    log_decay = -torch.rand(decays, dtype=torch.float64, generator=generator) * 3
    wanted = recurrence(x, log_decay)
    torch.testing.assert_close(decayed_sums(x, log_decay), wanted, rtol=1e-10, atol=1e-10)
    lengths = torch.randint(1, steps + 1, (batch,), generator=generator)
    last = wanted[torch.arange(batch), lengths - 1]
    torch.testing.assert_close(last_decayed_sum(x, lengths, log_decay), last, rtol=1e-10, atol=1e-10)


def test_gradients() -> None:
    x = torch.randn(2, CHUNK + 3, 2, dtype=torch.float64, requires_grad=True)
    log_decay = torch.tensor([-0.1, -2.0], dtype=torch.float64, requires_grad=True)
    found = torch.autograd.grad(decayed_sums(x, log_decay).square().sum(), (x, log_decay))
    wanted = torch.autograd.grad(recurrence(x, log_decay).square().sum(), (x, log_decay))
    torch.testing.assert_close(found, wanted)

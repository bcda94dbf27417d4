"""The cross-entropy over items against PyTorch's, and the sampled one against its expectation."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lunet_fast.recsys.model import softmax
from lunet_fast.recsys.model.softmax import next_item_loss

N, T, D = 30, 17, 4


@pytest.fixture
def parts() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    z, items, bias = (
        torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_()
        for shape in ((T, D), (N, D), (N,))
    )
    return z, items, bias, torch.randint(N, (T,), generator=generator)


def compare(loss: Tensor, wanted: Tensor, inputs: tuple[Tensor, ...]) -> None:
    torch.testing.assert_close(loss, wanted)
    torch.testing.assert_close(torch.autograd.grad(loss, inputs), torch.autograd.grad(wanted, inputs))


@pytest.mark.parametrize("chunk", [2**20, 5 * N])
def test_over_all_items(parts: tuple[Tensor, ...], chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(softmax, "CHUNK", chunk)
    z, items, bias, target = parts
    wanted = torch.nn.functional.cross_entropy(z @ items.T + bias, target, reduction="sum")
    compare(next_item_loss(z, items, bias, target), wanted, (z, items, bias))


@pytest.mark.parametrize("chunk", [2**20, 20])
def test_over_a_sample(parts: tuple[Tensor, ...], chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(softmax, "CHUNK", chunk)
    z, items, bias, target = parts
    negatives = torch.tensor([3, 0, 17, 29, 8, 11])
    scores = z @ items.T + bias
    wanted = torch.zeros((), dtype=torch.float64)
    for row, item in enumerate(target.tolist()):
        others = [other for other in negatives.tolist() if other != item]
        raised = scores[row, others] + math.log((N - 1) / len(others))
        wanted = wanted + torch.cat((scores[row, item : item + 1], raised)).logsumexp(0) - scores[row, item]
    compare(next_item_loss(z, items, bias, target, negatives), wanted, (z, items, bias))


def test_a_sample_of_all_items_is_all_items(parts: tuple[Tensor, ...]) -> None:
    z, items, bias, target = parts
    every = torch.randperm(N)
    torch.testing.assert_close(
        next_item_loss(z, items, bias, target, every), next_item_loss(z, items, bias, target)
    )


def test_a_sample_of_the_target_alone_is_no_loss(parts: tuple[Tensor, ...]) -> None:
    z, items, bias, target = parts
    loss = next_item_loss(z[:1], items, bias, target[:1], target[:1])
    gradients = torch.autograd.grad(loss, (z, items, bias))
    assert loss == 0
    assert all(bool((gradient == 0).all()) for gradient in gradients)

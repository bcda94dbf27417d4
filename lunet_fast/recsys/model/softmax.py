"""Cross-entropy over items, all of them or a sample that a batch shares, never holding batch by items."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

CHUNK = 2**20
"""Scores that are held at once."""


def next_item_loss(
    z: Tensor,
    items: Tensor,
    bias: Tensor,
    target: Tensor,
    negatives: Tensor | None = None,
    *,
    choices: int | None = None,
    confidence: Tensor | None = None,
) -> Tensor:
    """The negative log-likelihoods, summed, of ``target`` int64 ``[T]`` by the softmax of scores z·e_i + b_i.

    ``z`` is ``[T, d]``, ``items`` e ``[N, d]``, ``bias`` ``[N]``. ``negatives``, int64 ``[C]`` distinct items
    drawn uniformly, stand for all others; None takes all N. ``choices`` is N where the items to choose from
    are fewer than there are. ``confidence`` ``[T]`` weighs the rows.

    A sampled score is raised by log((N - 1) / c),
    minus the log of the expected number of its draws, with c of the C items not the target: then the sum over
    the sample is an unbiased estimate of that over all other items (sampled softmax with the correction for
    sampling, Bengio and Senécal 2008).

    Gradients are computed with the loss, some rows at a time, and held as ``[T, d]`` and ``[C, d]``: what is
    held beyond that is CHUNK scores, never T C of them. O(T C d).
    """
    of_target = (z * torch.nn.functional.embedding(target, items)).sum(1) + bias[target]
    if negatives is None:
        place = target
        others, offset = items, bias
    else:
        place = torch.full((len(items),), -1, dtype=torch.int64, device=z.device)
        place[negatives] = torch.arange(len(negatives), device=z.device)
        place = place[target]
        others, offset = torch.nn.functional.embedding(negatives, items), bias[negatives]
    weight = torch.ones_like(of_target) if confidence is None else confidence
    n_items = len(items) if choices is None else choices
    loss: Tensor = _SoftmaxBeside.apply(z, others, offset, of_target, place, weight, n_items)
    return loss


class _SoftmaxBeside(torch.autograd.Function):
    """sum over t of a_t (log(exp s_t + w_t sum over the others c of exp(z_t·e_c + b_c)) - s_t), s_t the
    target's score and a_t the row's weight.

    ``place`` is where the target stands among the others, which leaves it out there, or -1; w_t weighs the
    others left, so that they stand for n_items - 1.
    """

    @staticmethod
    def forward(
        ctx: Any,
        z: Tensor,
        others: Tensor,
        offset: Tensor,
        of_target: Tensor,
        place: Tensor,
        of_row: Tensor,
        n_items: int,
    ) -> Tensor:
        count = len(others)
        at_once = max(CHUNK // count, 1)
        grad_z, grad_others = torch.empty_like(z), torch.zeros_like(others)
        grad_offset, grad_target = torch.zeros_like(offset), torch.empty_like(of_target)
        loss = z.new_zeros(())
        for start in range(0, len(z), at_once):
            rows = slice(start, start + at_once)
            score = torch.addmm(offset, z[rows], others.T)
            target, spot, share_of_row = of_target[rows], place[rows], of_row[rows]
            hit = (spot >= 0).nonzero().squeeze(1)
            score[hit, spot[hit]] = -torch.inf
            weight = score.new_full((len(score),), math.log(max(n_items - 1, 1) / count))
            weight[hit] = math.log((n_items - 1) / (count - 1)) if count > 1 else -torch.inf
            top = torch.maximum(score.amax(1) + weight, target)
            share = score.sub_((top - weight).unsqueeze(1)).exp_()
            own = (target - top).exp()
            total = share.sum(1) + own
            loss += (share_of_row * (total.log() + top - target)).sum()
            share *= (share_of_row / total).unsqueeze(1)
            torch.mm(share, others, out=grad_z[rows])
            grad_others.addmm_(share.T, z[rows])
            grad_offset += share.sum(0)
            grad_target[rows] = share_of_row * (own / total - 1)
        ctx.save_for_backward(grad_z, grad_others, grad_offset, grad_target)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return (*(grad * tensor for tensor in ctx.saved_tensors), None, None, None)

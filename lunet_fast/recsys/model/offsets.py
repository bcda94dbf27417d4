"""Biases in closed form: what ratings are apart from any taste."""

from __future__ import annotations

import torch
from torch import Tensor

SWEEPS = 15


def shrunk_biases(
    users: Tensor,
    items: Tensor,
    residual: Tensor,
    sizes: tuple[int, int],
    l2: tuple[float, float],
    sweeps: int = SWEEPS,
) -> tuple[Tensor, Tensor]:
    """(b_u ``[n_users]``, b_i ``[n_items]``), float64, of ``residual`` ``[N]``, ratings less their mean.

    They minimise  Σ (residual - b_u - b_i)² + l2_u Σ b_u² + l2_i Σ b_i²,  by ``sweeps`` over each in turn; 0
    for what has no rating. O(N sweeps).
    """
    residual = residual.double()
    of_user, of_item = (residual.new_zeros(size) for size in sizes)
    n_user, n_item = torch.bincount(users, minlength=sizes[0]), torch.bincount(items, minlength=sizes[1])
    for _ in range(sweeps):
        left = residual - of_user[users]
        of_item = torch.zeros_like(of_item).index_add_(0, items, left) / (n_item + l2[1])
        left = residual - of_item[items]
        of_user = torch.zeros_like(of_user).index_add_(0, users, left) / (n_user + l2[0])
    return of_user, of_item

"""Elementwise work in runs of rows, so that what one pass writes the next still finds in the cache."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

#: Elements a thread that one sweep of elementwise work covers before the next begins.
SWEEP = 1 << 18

#: The same of work on six arrays at once, as φ⁻¹ does it.
SWEEP_OF_MANY = 1 << 15

#: Rows that a matrix product is given at least when done in sweeps: with fewer, its threads wait too often.
PRODUCT_ROWS = 4096

#: Elements that a sweep with a matrix product in it covers at least: fewer cost more in calls than the cache
#: gives back.
PRODUCT_SWEEP = 1 << 20


def sweep_rows(t: Tensor, product: bool, elements: int = SWEEP) -> int:
    """Rows of t [N, D] in one sweep, with a matrix product or of so many ``elements`` a thread; all where no
    cache is to stay in."""
    rows, columns = t.shape
    if t.device.type != "cpu":
        return rows
    if product:
        return max(PRODUCT_ROWS, PRODUCT_SWEEP // max(1, columns))
    return max(1, elements * torch.get_num_threads() // max(1, columns))


def is_one_sweep(t: Tensor, *, product: bool) -> bool:
    return t.shape[0] <= sweep_rows(t, product)


def sweeps(*tensors: Tensor, product: bool = False, elements: int = SWEEP) -> Iterator[tuple[Tensor, ...]]:
    """The same runs of rows of several tensors of N rows; the first, [N, D], gives their length."""
    step = sweep_rows(tensors[0], product, elements)
    rows = tensors[0].shape[0]
    if rows <= step:
        yield tensors
        return
    for start in range(0, rows, step):
        yield tuple(t[start : start + step] for t in tensors)


def column(row_values: Tensor | None) -> tuple[Tensor, ...]:
    """A value for each row as a column [N, 1] for ``sweeps``, or nothing."""
    return () if row_values is None else (row_values.unsqueeze(-1),)

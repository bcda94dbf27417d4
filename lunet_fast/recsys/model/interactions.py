"""Who rated what in the training part: a sparse matrix, and the sums over it that histories are made of."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def runs(counts: Tensor) -> tuple[Tensor, Tensor]:
    """(row, place), int64 ``[sum of counts]``: each row r ``counts[r]`` times, and 0, 1, ... within it."""
    row = torch.repeat_interleave(counts)
    return row, torch.arange(len(row), device=counts.device) - (counts.cumsum(0) - counts)[row]


class Interactions(nn.Module):
    """Which user rated which item in the training part: a set of pairs, kept as a sparse 0/1 matrix S.

    ``users``, ``items``: int64 ``[N]``, duplicates allowed. Buffers: ``indptr`` int64 ``[n_users + 1]`` and
    ``indices`` int32 ``[nnz]`` (rows are users, sorted), which are all that is saved.

    With :meth:`of_counts` no pair is kept, for data with more of them than memory has room for: ``indptr``
    and ``indices`` are those of an empty matrix, and ``user_counts`` and ``item_counts`` are saved too.
    """

    indptr: Tensor
    indices: Tensor
    item_indptr: Tensor
    item_indices: Tensor
    user_counts: Tensor
    item_counts: Tensor
    pairs: Tensor

    def __init__(self, users: Tensor, items: Tensor, n_users: int, n_items: int) -> None:
        super().__init__()
        pairs = torch.unique(users * n_items + items)
        rows = torch.div(pairs, n_items, rounding_mode="floor")
        indptr = F.pad(torch.bincount(rows, minlength=n_users).cumsum(0), (1, 0))
        self._set(indptr, (pairs - rows * n_items).int(), n_items)

    @classmethod
    def from_csr(cls, indptr: Tensor, indices: Tensor, n_items: int) -> Interactions:
        """From the two saved buffers; ``ValueError`` where they are not a sorted sparse 0/1 matrix."""
        valid = (
            (indptr.ndim, indices.ndim) == (1, 1)
            and not (indptr.is_floating_point() or indices.is_floating_point())
            and len(indptr) > 0
            and int(indptr[0]) == 0
            and int(indptr[-1]) == len(indices)
            and bool((indptr.diff() >= 0).all())
            and bool(((indices >= 0) & (indices < n_items)).all())
        )
        made = None
        if valid:
            counts = indptr.diff()
            rows = torch.repeat_interleave(torch.arange(len(counts)), counts)
            made = cls(rows, indices.long(), len(counts), n_items)
        # Sorting changes nothing of what is sorted, and a set leaves nothing out.
        if made is None or not torch.equal(made.indices.to(indices.dtype), indices):
            raise ValueError("interactions: indptr and indices are not a sparse matrix of users by items")
        return made

    @classmethod
    def of_counts(cls, user_counts: Tensor, item_counts: Tensor) -> Interactions:
        """Without the pairs: how many each user ``[n_users]`` and each item ``[n_items]`` has, both int64."""
        none = torch.zeros(0, dtype=torch.int64)
        interactions = cls(none, none, len(user_counts), len(item_counts))
        for name, counts in (("user_counts", user_counts), ("item_counts", item_counts)):
            if counts.ndim != 1 or counts.dtype != torch.int64 or bool((counts < 0).any()):
                raise ValueError(f"interactions: {name} must be int64 numbers of at least 0 in one dimension")
            interactions.register_buffer(name, counts.clone())
        return interactions

    def _set(self, indptr: Tensor, indices: Tensor, n_items: int) -> None:
        n_users = len(indptr) - 1
        counts = indptr.diff()
        rows = torch.repeat_interleave(torch.arange(n_users, device=indptr.device), counts)
        self.n_users, self.n_items = n_users, n_items
        self.register_buffer("indptr", indptr)
        self.register_buffer("indices", indices)
        # Derived: the transposed matrix for the other side's history and for both gradients.
        order = torch.argsort(indices, stable=True)
        item_counts = torch.bincount(indices, minlength=n_items)
        self.register_buffer("item_indptr", F.pad(item_counts.cumsum(0), (1, 0)), persistent=False)
        self.register_buffer("item_indices", rows[order].int(), persistent=False)
        self.register_buffer("user_counts", counts, persistent=False)
        self.register_buffer("item_counts", item_counts, persistent=False)
        self.register_buffer("pairs", rows * n_items + indices, persistent=False)

    @classmethod
    def of_pairs(cls, pairs: Tensor, n_users: int, n_items: int) -> Interactions:
        """Of ``user * n_items + item``, int64 ``[N]``, duplicates allowed."""
        users = torch.div(pairs, n_items, rounding_mode="floor")
        return cls(users, pairs - users * n_items, n_users, n_items)

    def of_users(self, users: Tensor) -> tuple[Tensor, Tensor]:
        """(rows, items), int64: row r of ``users`` ``[U]`` has the item; sorted by row and item."""
        rows, place = runs(self.user_counts[users])
        return rows, self.indices[self.indptr[users][rows] + place].long()

    def contains(self, users: Tensor, items: Tensor) -> Tensor:
        """bool ``[B]``: whether the pair was rated in the training part; O(B log nnz)."""
        wanted = users * self.n_items + items
        if len(self.pairs) == 0:
            return torch.zeros_like(wanted, dtype=torch.bool)
        place = torch.searchsorted(self.pairs, wanted).clamp_(max=len(self.pairs) - 1)
        return self.pairs[place] == wanted

    def sum_over_items(self, table: Tensor) -> Tensor:
        """S table: the sum of the rows of each user's items; ``[n_items, C]`` -> ``[n_users, C]``."""
        out: Tensor = _SparseSum.apply(table, self._rows(table), self._columns(table))
        return out

    def sum_over_users(self, table: Tensor) -> Tensor:
        """S^T table: the sum of the rows of each item's users; ``[n_users, C]`` -> ``[n_items, C]``."""
        out: Tensor = _SparseSum.apply(table, self._columns(table), self._rows(table))
        return out

    def _rows(self, like: Tensor) -> Tensor:
        return _csr(self.indptr, self.indices, (self.n_users, self.n_items), like.dtype)

    def _columns(self, like: Tensor) -> Tensor:
        return _csr(self.item_indptr, self.item_indices, (self.n_items, self.n_users), like.dtype)


def _csr(indptr: Tensor, indices: Tensor, size: tuple[int, int], dtype: torch.dtype) -> Tensor:
    ones = torch.ones(len(indices), dtype=dtype, device=indices.device)
    return torch.sparse_csr_tensor(indptr.int(), indices, ones, size, check_invariants=False)


# PyTorch warns once a process that sparse CSR is in beta; the two products used here are tested. That is over
# after this line, since warnings.catch_warnings around each use would change the filters of all threads.
with warnings.catch_warnings():
    warnings.simplefilter("ignore", UserWarning)
    _csr(torch.zeros(1, dtype=torch.int64), torch.zeros(0, dtype=torch.int32), (0, 0), torch.float32)


class _SparseSum(torch.autograd.Function):
    """matrix @ table, whose gradient takes the transposed matrix that PyTorch would rebuild at each step."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, matrix: Tensor, transposed: Tensor) -> Tensor:
        ctx.transposed = transposed
        return matrix @ table

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return ctx.transposed @ grad.contiguous(), None, None

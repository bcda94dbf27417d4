"""Tables of which each process of a training holds some rows: row i is process i mod N's, in place i div N.

Dealt one by one, not in blocks: ids are often in the order of age, and the oldest users and items have most
of the ratings, so the process with the first block would serve most of every batch.

A step asks for the different rows of its pairs, :func:`pull`: one exchange of their numbers and one of the
rows forward, one of the rows' gradients backward. What is sent is O(rows of the batch), whatever the number
of rows of the tables or of processes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lunet_fast.training.distributed import Workers

BLOCK = 1 << 22
"""Numbers drawn, sent or written at a time where a whole table passes by."""


@dataclass(frozen=True)
class Dealt:
    """A table of ``rows`` rows; ``own`` ``[own rows, ...]`` are this process's. Not differentiable."""

    workers: Workers
    own: Tensor
    rows: int

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the whole table."""
        return (self.rows, *self.own.shape[1:])

    @property
    def dtype(self) -> torch.dtype:
        return self.own.dtype

    def blocks(self) -> Iterator[Tensor]:
        """The whole table from its first row to its last, on the CPU, a block at a time.

        Every process must take them all; at those other than process 0 they are empty.
        """
        count, first = self.workers.world_size, self.workers.is_first
        for start, stop in self._places():
            sent = self._padded(start, stop)
            pieces = [torch.empty_like(sent) for _ in range(count)] if first else None
            dist.gather(sent, pieces)
            rows = torch.stack(pieces, 1).flatten(0, 1) if pieces else sent[:0]
            yield rows[: self.rows - start * count].cpu()

    def fill(self, whole: Tensor | None) -> None:
        """Take this process's rows from process 0's ``whole``; the others give None."""
        count = self.workers.world_size
        for start, stop in self._places():
            received = torch.empty_like(self._padded(start, stop))
            pieces = None
            if whole is not None:
                block = whole[start * count : stop * count].to(received)
                lacking = (stop - start) * count - len(block)
                block = torch.cat((block, block.new_zeros(lacking, *block.shape[1:])))
                pieces = [block[place::count].contiguous() for place in range(count)]
            dist.scatter(received, pieces)
            self.own[start:stop] = received[: len(self.own) - start]

    def _places(self) -> Iterator[tuple[int, int]]:
        """(start, stop) of each block among the own rows of the process that has most of them."""
        most = -(-self.rows // self.workers.world_size)
        step = max(1, BLOCK // (max(1, math.prod(self.shape[1:])) * self.workers.world_size))
        return ((start, min(start + step, most)) for start in range(0, most, step))

    def _padded(self, start: int, stop: int) -> Tensor:
        """Own rows ``start`` to ``stop``; a last one is made up where this process has one row less."""
        rows = self.own[start:stop].detach()
        lacking = stop - start - len(rows)
        return torch.cat((rows, rows.new_zeros(lacking, *rows.shape[1:]))) if lacking else rows


@dataclass(frozen=True)
class DealtTables:
    """The parameters of a module that are dealt: by name the rows of the whole table."""

    workers: Workers
    rows: Mapping[str, int]

    def whole(self, name: str, tensor: Tensor) -> Tensor | Dealt:
        """The table named ``name``, or a tensor of its optimiser that has its shape, as dealt rows; any other
        tensor as it is."""
        return Dealt(self.workers, tensor, self.rows[name]) if name in self.rows and tensor.ndim else tensor

    def parameters(self, module: nn.Module) -> list[nn.Parameter]:
        return [parameter for name, parameter in module.named_parameters() if name in self.rows]


@torch.no_grad()
def draw_own_rows_(own: Tensor, rows: int, std: float, workers: Workers) -> None:
    """Fill ``own`` with the rows that ``torch.empty(rows, c).normal_(std=std)`` would have at their places.

    All numbers are drawn, as ``normal_`` draws them, and those of the others dropped: O(rows c) time,
    O(BLOCK) memory.
    """
    count, width = workers.world_size, own.shape[1]
    # PyTorch draws 16 at a time, and the last 16 anew where they are fewer: so only multiples of 16 rows make
    # of several draws what is one, and nothing shorter than 16 numbers may be left over.
    step = 16 * max(1, BLOCK // (16 * max(1, width)))
    start = 0
    while start < rows:
        stop = min(start + step, rows)
        if (rows - stop) * width < 16:
            stop = rows
        block = torch.empty(stop - start, width, dtype=own.dtype).normal_(std=std)
        mine = block[(workers.rank - start) % count :: count]
        place = -(-(start - workers.rank) // count) if start > workers.rank else 0
        own[place : place + len(mine)] = mine
        start = stop


def pull(workers: Workers, index: Sequence[Tensor], tables: Sequence[Sequence[Tensor]]) -> list[list[Tensor]]:
    """Rows of tables that are dealt: of side s the rows ``index[s]`` of each of ``tables[s]``.

    ``index[s]`` int64 ``[n]``, better without repetition; ``tables[s]`` this process's rows of tables
    ``[rows, c]``. The result is ``[n, c]`` each. All processes call this together, with rows of their own
    choice, and so does its gradient: that of a table is sparse, the *mean* of the processes' sums, as
    DistributedDataParallel makes it of other parameters.
    """
    plan = _Plan(workers, index)
    found = iter(_Pull.apply(plan, [len(side) for side in tables], *chain.from_iterable(tables)))
    return [[next(found) for _ in side] for side in tables]


class _Plan:
    """Who asks whom for which rows."""

    def __init__(self, workers: Workers, index: Sequence[Tensor]) -> None:
        self.workers, count = workers, workers.world_size
        self.order = [torch.argsort(side % count, stable=True) for side in index]
        asked = torch.stack([torch.bincount(side % count, minlength=count) for side in index], 1)
        given = torch.empty_like(asked)
        dist.all_to_all_single(given, asked)
        self.asked: list[list[int]] = asked.t().tolist()
        """By side and process the rows that this one asks for."""
        self.given: list[list[int]] = given.t().tolist()
        """And those that this one is asked for."""
        places = [(side[order] // count).unsqueeze(1) for side, order in zip(index, self.order, strict=True)]
        self.served = [side.squeeze(1) for side in _swap(places, self.asked, self.given)]
        """By side the places of the rows that are asked for, process after process."""


class _Pull(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: _Plan, sizes: list[int], *tables: Tensor) -> tuple[Tensor, ...]:
        ctx.plan, ctx.sizes, ctx.shapes = plan, sizes, [table.shape for table in tables]
        left = iter(tables)
        by_side = [[next(left) for _ in range(size)] for size in sizes]
        rows = [
            torch.cat([table[places] for table in side], 1)
            for side, places in zip(by_side, plan.served, strict=True)
        ]
        found: list[Tensor] = []
        received = _swap(rows, plan.given, plan.asked)
        for side, block, order in zip(by_side, received, plan.order, strict=True):
            whole = torch.empty_like(block)
            whole[order] = block
            found += whole.split([table.shape[1] for table in side], 1)
        return tuple(part.contiguous() for part in found)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        plan, left = ctx.plan, iter(grads)
        by_side = [[next(left) for _ in range(size)] for size in ctx.sizes]
        rows = [torch.cat(side, 1)[order] for side, order in zip(by_side, plan.order, strict=True)]
        shapes, found = iter(ctx.shapes), []
        received = _swap(rows, plan.asked, plan.given)
        for side, places, block in zip(by_side, plan.served, received, strict=True):
            for values in (block / plan.workers.world_size).split([grad.shape[1] for grad in side], 1):
                # A slice of one row counts as contiguous whatever its strides, and PyTorch 2.13 then writes
                # beyond the end of the tensor that it makes of a sparse one.
                values = values.clone(memory_format=torch.contiguous_format)
                gradient = torch.sparse_coo_tensor(
                    places.unsqueeze(0), values, next(shapes), check_invariants=False
                )
                found.append(gradient)
        return None, None, *found


def _swap(sides: Sequence[Tensor], sent: list[list[int]], received: list[list[int]]) -> list[Tensor]:
    """Send each process its rows of every side and get its own, in one message each way.

    ``sides[s]`` is ``[sum(sent[s]), c]``, the rows for process 0 first; so is the result of those received.
    """
    widths = [side.shape[1] for side in sides]

    def sizes(counts: list[list[int]]) -> list[int]:
        return [sum(n * c for n, c in zip(peer, widths, strict=True)) for peer in zip(*counts, strict=True)]

    pieces = [side.split(counts) for side, counts in zip(sides, sent, strict=True)]
    out = torch.cat([piece.flatten() for peer in zip(*pieces, strict=True) for piece in peer])
    into = out.new_empty(sum(sizes(received)))
    dist.all_to_all_single(into, out, sizes(received), sizes(sent))
    lengths = [n * c for peer in zip(*received, strict=True) for n, c in zip(peer, widths, strict=True)]
    found = into.split(lengths)
    return [torch.cat(found[s :: len(sides)]).view(-1, width) for s, width in enumerate(widths)]

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False
# mypy: disable-error-code=assignment
# ruff: noqa: RUF005 (the compiler knows a sum of tuples, not what ruff would have instead)
"""The best items of each user by a network's read-out of every pair, without a tensor of pairs × features.

The network's first layer splits into a user's and an item's part, W x + b = (W_u u + b) + (W_i i), so the
caller brings p = W_u u + b of each user and q = W_i i of each item. One program takes a user and a range of
the items, ROWS at a time, from q to the score on the chip, and keeps the best so far in registers; the only
thing written is k keys a program. Users in the same range of items run side by side and find q and the
weights in the L2 cache.

A key is a score and its item in one integer, so that they are moved and compared as one and a tie has an
answer: above, the bits of the score in an order that integers have, below, the item, the lower the better.
Keys are totally ordered, so the best k do not depend on how the items are cut up, nor on the order in
which they come.

The running best is not sorted. A block's best key is exchanged for the worst kept as long as it is better:
k·(1 + 1/2 + … + 1/blocks) exchanges in all where items come in no particular order, two reductions each,
and never more than k a block; to sort every block and merge takes log²(ROWS) exchanges through shared memory
each time.

The items a user has seen are sorted, as are the blocks, so the program walks along them: 16 at a time are
compared with the items of the block until one lies beyond it. It needs no table of users × items and reads
each entry about once; a binary search would be a chain of dependent loads for each item.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lunet_fast.kernels import tiles
from lunet_fast.kernels.activation import Slopes, activation_of, load_family, located, phi
from lunet_fast.kernels.launch import (
    check_parameter,
    check_precision,
    check_rows,
    dot,
    launch,
    load_row,
    load_tile,
)

#: The widest network whose rows a program can hold, the longest list of winners, and the most items whose
#: numbers, with those of a block beyond the last, are int32.
LARGEST_D = 128
LARGEST_K = 512
LARGEST_I = 2**31 - 1024

#: Below every key of a score, with room for the number of a slot: no two keys are ever equal.
EMPTY: tl.constexpr = tl.constexpr(-(1 << 63))
#: Above every key, for slots that there are only because a tile has a power of two of them.
TAKEN: tl.constexpr = tl.constexpr((1 << 63) - 1)
LARGEST_ITEM: tl.constexpr = tl.constexpr((1 << 31) - 1)


@triton.jit
def _keys(score, items):
    """Keys of scores; EMPTY for −∞ and NaN."""
    bits = tl.where(score == 0.0, 0.0, score).to(tl.int32, bitcast=True)  # −0 ties with 0
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    keys = (ordered.to(tl.int64) << 32) | (items ^ LARGEST_ITEM).to(tl.int64)
    return tl.where(score > float("-inf"), keys, EMPTY)


@triton.jit
def _seen(items, cursor, end, stop, seen_ptr, WALK: tl.constexpr):
    """(which ``items`` are in seen[cursor:end], the cursor of the first entry ≥ ``stop``)."""
    steps = tl.arange(0, WALK)
    hit = tl.zeros_like(items)
    count = tl.full((), WALK, tl.int32)
    while count == WALK:
        entries = tl.load(seen_ptr + cursor + steps, mask=cursor + steps < end, other=LARGEST_ITEM)
        equal = items[:, None] == entries.to(tl.int32)[None, :]
        hit = tl.maximum(hit, tl.max(equal.to(tl.int32), 1))
        count = tl.sum((entries < stop).to(tl.int32), 0)
        cursor += count
    return hit != 0, cursor


@triton.jit
def _first_not_below(item, cursor, end, seen_ptr):
    """The place of the first entry ≥ ``item`` in the sorted seen[cursor:end]."""
    while cursor < end:
        middle = cursor + (end - cursor) // 2
        below = tl.load(seen_ptr + middle) < item
        cursor = tl.where(below, middle + 1, cursor)
        end = tl.where(below, end, middle)
    return cursor


@triton.jit
def _bias(bias_ptr, D, ROWS: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr):
    """CHUNKS tiles [ROWS, CHUNK] with the bias [D] in each row, or zeros without one."""
    h = ()
    for j in tl.static_range(CHUNKS):
        tile = tl.zeros([ROWS, CHUNK], tl.float32)
        if bias_ptr is not None:
            tile += load_row(bias_ptr, j * CHUNK + tl.arange(0, CHUNK), D)
        h = h + (tile,)
    return h


@triton.jit
def _add_product(
    h,  # CHUNKS tiles [ROWS, CHUNK]
    x,  # [ROWS, CHUNK], features ``inner``
    inner,
    weight_ptr,  # [D, D]
    D,
    PRECISION: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """h + W x, of the features of x alone. What stands beyond D in x meets zeros in W."""
    out = ()
    for j in tl.static_range(CHUNKS):
        cols = j * CHUNK + tl.arange(0, CHUNK)
        valid = (cols[None, :] < D) & (inner[:, None] < D)
        w = tl.load(weight_ptr + (cols[None, :] * D + inner[:, None]), mask=valid, other=0.0)
        out = out + (dot(x, w, h[j], PRECISION),)
    return out


@triton.jit
def _load_sum(p_row, q_rows, start, here, D, ROWS: tl.constexpr, CHUNK: tl.constexpr):
    """p + q in the columns from ``start`` on: [ROWS, CHUNK] float32, p where there is no row, 0 beyond D."""
    p = load_row(p_row, start + tl.arange(0, CHUNK), D)
    return p + load_tile(q_rows, start, here[:, None], D, ROWS, CHUNK)


@triton.jit
def _read_out(z, cols, readout_ptr, curvature_ptr, D):
    """z (readout + curvature z) of a tile, elementwise."""
    slope = load_row(readout_ptr, cols, D)
    if curvature_ptr is not None:
        slope += load_row(curvature_ptr, cols, D) * z
    return slope * z


@triton.jit
def _net(
    p_row,
    q_rows,
    here,
    weight_ptr,  # [LAYERS, D, D]
    bias_ptr,  # [LAYERS, D], or None
    activation,
    D,
    LAYERS,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """h_LAYERS of a block of items, CHUNKS tiles [ROWS, CHUNK] float32.

    Its loops over the features that are summed are loops, not unrolled: the compiler would fetch all of W at
    once and spill.
    """
    family = load_family(activation, 0, tl.arange(0, CHUNK), D)
    h = _bias(bias_ptr, D, ROWS, CHUNK, CHUNKS)
    for chunk in range(CHUNKS):
        cols = chunk * CHUNK + tl.arange(0, CHUNK)
        x = _load_sum(p_row, q_rows, chunk * CHUNK, here, D, ROWS, CHUNK)
        x = phi(located(x, family, activation), family, activation)
        h = _add_product(h, x, cols, weight_ptr, D, PRECISION, CHUNK, CHUNKS)
    for layer in range(1, LAYERS):
        weight_ptr += D * D
        if bias_ptr is not None:
            bias_ptr += D
        family = load_family(activation, layer, tl.arange(0, CHUNK), D)
        sums = _bias(bias_ptr, D, ROWS, CHUNK, CHUNKS)
        for chunk in range(CHUNKS):
            cols = chunk * CHUNK + tl.arange(0, CHUNK)
            x = h[0]
            for j in tl.static_range(1, CHUNKS):  # registers have no index
                x = tl.where(chunk == j, h[j], x)
            x = phi(located(x, family, activation), family, activation)
            sums = _add_product(sums, x, cols, weight_ptr, D, PRECISION, CHUNK, CHUNKS)
        h = sums
    return h


@triton.jit
def _add_terms(
    total,
    p_row,
    q_rows,
    here,
    weight_ptr,
    bias_ptr,
    readout_ptr,
    curvature_ptr,
    activation,
    member,
    D,
    LAYERS,
    ACTIVATED: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """total [ROWS, CHUNK] and, chunk by chunk, what one member's read-out of a block of items adds to it."""
    readout_ptr += member * D
    if curvature_ptr is not None:
        curvature_ptr += member * D
    if weight_ptr is not None:
        weight_ptr += member * LAYERS * D * D
    if bias_ptr is not None:
        bias_ptr += member * LAYERS * D
    if weight_ptr is None:
        family = load_family(activation, 0, tl.arange(0, CHUNK), D)
        for chunk in range(CHUNKS):
            z = _load_sum(p_row, q_rows, chunk * CHUNK, here, D, ROWS, CHUNK)
            if ACTIVATED:
                z = phi(located(z, family, activation), family, activation)
            total += _read_out(z, chunk * CHUNK + tl.arange(0, CHUNK), readout_ptr, curvature_ptr, D)
    else:
        h = _net(
            *(p_row, q_rows, here, weight_ptr, bias_ptr, activation, D, LAYERS),
            *(PRECISION, ROWS, CHUNK, CHUNKS),
        )
        family = load_family(activation, LAYERS if ACTIVATED else 0, tl.arange(0, CHUNK), D)
        for j in tl.static_range(CHUNKS):
            z = h[j]
            if ACTIVATED:
                z = phi(located(z, family, activation), family, activation)
            total += _read_out(z, j * CHUNK + tl.arange(0, CHUNK), readout_ptr, curvature_ptr, D)
    return total


@triton.jit
def _keep_best(best, worst, keys):
    """Exchange the block's best keys for the worst kept, as long as they are better."""
    top = tl.max(keys, 0)
    while top > worst:
        best = tl.where(best == worst, top, best)
        keys = tl.where(keys == top, EMPTY, keys)
        worst = tl.min(best, 0)
        top = tl.max(keys, 0)
    return best, worst


@triton.jit(do_not_specialize=["U", "I", "TOP", "splits", "blocks_each"])
def score_topk_kernel(
    p_ptr,  # [K, U, D]
    q_ptr,  # [K, I, D]
    weight_ptr,  # [K, LAYERS, D, D], or None
    bias_ptr,  # [K, LAYERS, D], or None
    readout_ptr,  # [K, D]
    curvature_ptr,  # [K, D], or None
    user_offset_ptr,  # [U]
    item_offset_ptr,  # [I]
    indptr_ptr,  # [U + 1] into seen, or None
    seen_ptr,  # [entries], sorted for each user, or None
    keys_ptr,  # [U, splits, TOP] int64
    activation,
    U,
    I,
    D,
    K,
    LAYERS,
    TOP,
    splits,
    blocks_each,
    ACTIVATED: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    SLOTS: tl.constexpr,
    WALK: tl.constexpr,
):
    """The keys of the TOP best of a range of ``blocks_each`` blocks of items for one user, in no order."""
    user = tl.program_id(0) % U
    split = tl.program_id(0) // U
    first_block = split * blocks_each
    last_block = tl.minimum(first_block + blocks_each, tl.cdiv(I, ROWS))
    rows = tl.arange(0, ROWS)
    slots = tl.arange(0, SLOTS)

    best = tl.where(slots < TOP, slots.to(tl.int64) + (EMPTY + 1), TAKEN)
    worst = tl.min(best, 0)
    user_offset = tl.load(user_offset_ptr + user)
    cursor = 0
    end = 0
    if seen_ptr is not None:
        begin = tl.load(indptr_ptr + user).to(tl.int64)
        end = (tl.load(indptr_ptr + user + 1).to(tl.int64) - begin).to(tl.int32)
        seen_ptr += begin
        cursor = _first_not_below(first_block * ROWS, cursor, end, seen_ptr)

    for block in range(first_block, last_block):
        items = block * ROWS + rows
        here = items < I
        score = tl.load(item_offset_ptr + items, mask=here, other=float("-inf")) + user_offset
        if seen_ptr is not None:
            hit, cursor = _seen(items, cursor, end, (block + 1) * ROWS, seen_ptr, WALK)
            score = tl.where(hit, float("-inf"), score)

        total = tl.zeros([ROWS, CHUNK], tl.float32)
        for member in range(K):
            # The first address of a tile is 64 bits wide, the rest counts from it in 32: half the registers.
            p_row = p_ptr + (tl.cast(member, tl.int64) * U + user) * D
            q_rows = q_ptr + (tl.cast(member, tl.int64) * I + block * ROWS) * D
            total = _add_terms(
                *(total, p_row, q_rows, here, weight_ptr, bias_ptr, readout_ptr, curvature_ptr),
                *(activation, member, D, LAYERS, ACTIVATED, PRECISION, ROWS, CHUNK, CHUNKS),
            )
        score += tl.sum(total, 1) / K
        best, worst = _keep_best(best, worst, _keys(score, items))

    keys_ptr += (user.to(tl.int64) * splits + split) * TOP
    tl.store(keys_ptr + slots, best, mask=slots < TOP)


def score_topk(
    p: Tensor,
    q: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    slopes: Slopes,
    readout: Tensor,
    curvature: Tensor | None,
    user_offset: Tensor,
    item_offset: Tensor,
    seen: tuple[Tensor, Tensor] | None,
    k: int,
    *,
    activated: bool,
    precision: str,
    splits: int | None = None,
) -> tuple[Tensor, Tensor]:
    """(scores [U, k] float32, items [U, k] int64) of the k best items of each user, best first.

    For member m, user u and item i, with L further layers (``weight`` [K, L, D, D], or None for L = 0)

        h_0 = p[m, u] + q[m, i],   h_l = W_l φ_l(h_{l−1}) + b_l,   z = φ_L(h_L) if ``activated`` else h_L
        score = user_offset[u] + item_offset[i] + mean over m of Σ_d z_d (readout_d + curvature_d z_d)

    p [K, U, D], q [K, I, D] and the weights are contiguous and of one dtype, float32 or bfloat16; ``bias``
    [K, L, D], ``readout`` and ``curvature`` [K, D] are of any, the offsets [U] and [I] float32.
    ``slopes``: three floats for every φ, or a tensor [L, 3], of L + 1 rows if ``activated``.
    ``precision`` is the arithmetic of a float32 product: "ieee", "tf32x3" or "tf32". Sums are float32.

    ``seen`` = (indptr [U + 1], items), int32 or int64, are left out; a user's must be sorted. So are pairs
    with a score of NaN or −∞. Where fewer than k are left, score and item are −∞ and −1. Of equal scores the
    lower item comes first. ``splits``, the number of programs that share a user, changes no result.

    Cost: U·I·K·(L·D² multiplications and (L + 1)·D activations). Memory: k·splits keys a user.

    ``ValueError`` where a shape or dtype differs, or D, k or I is beyond ``LARGEST_D``, ``LARGEST_K`` or
    ``LARGEST_I``.
    """
    K, U, I, D, L = _check_network(p, q, weight, bias, readout, curvature)
    check_parameter("user_offset", user_offset, (U,), torch.float32)
    check_parameter("item_offset", item_offset, (I,), torch.float32)
    check_precision(precision)
    if isinstance(slopes, Tensor):
        check_parameter("slopes", slopes, (L + activated, 3))
    if not 1 <= k <= LARGEST_K:
        raise ValueError(f"k must lie between 1 and {LARGEST_K}, got {k}")
    indptr, entries = _check_seen(seen, U)

    if U == 0 or I == 0:
        nothing = torch.full((U, k), -torch.inf, dtype=torch.float32, device=p.device)
        return nothing, torch.full((U, k), -1, dtype=torch.int64, device=p.device)
    tile = tiles.score_tile(D, L, precision, tiles.architecture(p))
    blocks = tiles.ceil_div(I, tile.rows)
    wanted = tiles.score_splits(U, tiles.architecture(p)) if splits is None else splits
    blocks_each = tiles.ceil_div(blocks, min(wanted, blocks))
    splits = tiles.ceil_div(blocks, blocks_each)
    keys = torch.empty((U, splits, k), dtype=torch.int64, device=p.device)
    launch(
        *(score_topk_kernel, (U * splits,), tile),
        *(p, q, weight, bias, readout, curvature, user_offset, item_offset, indptr, entries, keys),
        activation_of(slopes, D, layers=L + activated),
        U=U,
        I=I,
        D=D,
        K=K,
        LAYERS=L,
        TOP=k,
        splits=splits,
        blocks_each=blocks_each,
        ACTIVATED=activated,
        PRECISION=precision if L else "ieee",  # no product, no tensor cores
        ROWS=tile.rows,
        CHUNK=tile.columns,
        CHUNKS=tiles.ceil_div(D, tile.columns),
        SLOTS=max(16, triton.next_power_of_2(k)),
        WALK=16,
    )
    return _unpacked(torch.topk(keys.flatten(1), k).values)


def _check_network(
    p: Tensor,
    q: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    readout: Tensor,
    curvature: Tensor | None,
) -> tuple[int, int, int, int, int]:
    """K, U, I, D and L, once what ``score_topk`` is given of the network has been checked."""
    check_rows("p", p)
    check_rows("q", q)
    K, U, D = p.shape
    I = q.shape[1]
    check_parameter("q", q, (K, I, D), p.dtype)
    L = 0 if weight is None else weight.shape[1] if weight.dim() == 4 else -1
    check_parameter("weight", weight, (K, L, D, D), p.dtype)
    check_parameter("bias", bias, (K, L, D))
    check_parameter("readout", readout, (K, D))
    check_parameter("curvature", curvature, (K, D))
    if D > LARGEST_D:
        raise ValueError(f"p must have at most {LARGEST_D} features, got {D}")
    if I > LARGEST_I:
        raise ValueError(f"q must have at most {LARGEST_I} items, got {I}")
    return K, U, I, D, L


def _check_seen(seen: tuple[Tensor, Tensor] | None, U: int) -> tuple[Tensor, Tensor] | tuple[None, None]:
    if seen is None:
        return None, None
    check_parameter("seen[0]", seen[0], (U + 1,))
    check_parameter("seen[1]", seen[1], (seen[1].numel(),))
    for i, part in enumerate(seen):
        if part.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"seen[{i}] must be int32 or int64, got {part.dtype}")
    return seen


def _unpacked(keys: Tensor) -> tuple[Tensor, Tensor]:
    """(score, item) of each key; (−∞, −1) of the empty ones."""
    ordered = (keys >> 32).int()
    score = (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).view(torch.float32)
    item = (keys & LARGEST_ITEM.value) ^ LARGEST_ITEM.value
    empty = keys < EMPTY.value + (1 << 32)
    return score.masked_fill(empty, -torch.inf), item.masked_fill(empty, -1)

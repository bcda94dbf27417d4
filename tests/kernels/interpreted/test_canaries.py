"""Every operation that goes to a kernel, at odd sizes: what it reads, what it writes, and what it depends on.

Inputs lie between NaN and are compared byte for byte afterwards, NaN and all; results lie between guards, in
memory filled with a number, then with NaN. So a read or write beyond a tensor shows, and so does a result
that nobody wrote. Rows are then permuted, spoilt and cut off: none may depend on another.
"""

from __future__ import annotations

import functools
import math
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from harness import guarded, random_lu
from lunet_fast.ops import triton
from lunet_fast.ops.reference import family
from lunet_fast.ops.values import Activation, Matrix

#: Rows and features: below, at and beyond tiles, and on either side of N = D and D = 128.
SIZES = [(1, 1), (3, 5), (37, 5), (17, 33), (40, 33), (66, 65), (5, 130)]
DTYPES = [torch.float32, torch.bfloat16]
LAYERS = 3

#: What has a row for each sample; the rest are parameters.
BY_ROW = {"x", "g", "ld", "y", "start", "h", "start_h", "z"}

Given = dict[str, Any]


class Fences:
    """Memory around inputs that must stay as it is."""

    def __init__(self) -> None:
        self.buffers: list[tuple[Tensor, Tensor]] = []

    def around(self, given: Given) -> Given:
        return {
            name: self._put(value) if isinstance(value, Tensor) else value for name, value in given.items()
        }

    def _put(self, value: Tensor) -> Tensor:
        junk = math.nan if value.is_floating_point() else torch.iinfo(value.dtype).max
        buffer = torch.full((value.numel() + 256,), junk, dtype=value.dtype)
        buffer[128 : 128 + value.numel()] = value.reshape(-1)
        self.buffers.append((buffer, buffer.clone()))
        return buffer[128 : 128 + value.numel()].view(value.shape)

    def check(self) -> None:
        for buffer, before in self.buffers:
            assert bits(buffer) == bits(before), "a kernel wrote into or beyond what it was given"


def bits(x: Tensor) -> bytes:
    return x.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def same_bits(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype and bits(one) == bits(other)


def inputs(N: int, D: int, dtype: torch.dtype, *, learnt: bool, seed: int = 0) -> Given:
    """What the operations take: rows x and their gradients g and ld, a layer, and a net of LAYERS."""
    torch.manual_seed(seed)
    lu = random_lu(D).to(dtype)
    slopes = torch.tensor([0.1, 0.9, 1.0])
    given: Given = {
        "x": torch.randn(N, D).to(dtype),
        "g": torch.randn(N, D).to(dtype),
        "ld": torch.randn(N),
        "lu": lu,
        "sign": (torch.randint(0, 2, (D,)) * 2.0 - 1.0).to(dtype),
        "order": torch.randperm(D),
        "bias": torch.randn(D).to(dtype),
        "activation": family(slopes if learnt else (0.1, 0.9, 1.0)),
        "nets": random_lu(D, K=LAYERS).to(dtype),
        "net_sign": torch.ones(LAYERS, D, dtype=dtype),
        "net_bias": torch.randn(LAYERS, D).to(dtype),
        "net_activation": family(slopes.repeat(LAYERS - 1, 1) if learnt else (0.1, 0.9, 1.0)),
    }
    # What the forwards leave for the backwards; what nobody is to read, poisoned.
    y, _, h, weight = layer_forward(given)
    given |= {"y": y, "h": h, "weight": weight if N > D else torch.full_like(weight, math.nan)}
    given["start"], _, given["start_h"] = layer_inverse(given)
    given["z"] = triton.net_forward(*net_arguments(given, given["x"]), True)[0]
    return given


def layer_of(given: Given) -> tuple[Matrix, Activation]:
    return Matrix(given["lu"], given["sign"], given["order"], given["bias"]), given["activation"]


def net_arguments(given: Given, x: Tensor) -> tuple[Any, ...]:
    matrix = Matrix(given["nets"], given["net_sign"], None, given["net_bias"])
    return x, matrix, given["net_activation"]


def layer_forward(given: Given) -> tuple[Tensor, ...]:
    return triton.layer_forward(given["x"], *layer_of(given), True, True)


def layer_inverse(given: Given) -> tuple[Tensor, ...]:
    return triton.layer_inverse(given["y"], *layer_of(given), True, True)


def layer_backward(given: Given) -> tuple[Tensor, ...]:
    return triton.layer_backward(
        *(given["g"], given["ld"], given["x"], given["h"], given["weight"]),
        *(*layer_of(given), True, True, True),
    )


def layer_inverse_backward(given: Given) -> tuple[Tensor, ...]:
    return triton.layer_inverse_backward(
        *(given["g"], given["ld"], given["start"], given["start_h"]),
        *(*layer_of(given), True, True, True),
    )


def net_backward(given: Given, inverse: bool) -> tuple[Tensor, ...]:
    # Of an inverse the result is kept, of a forward the rows that went in: x either way.
    backward = triton.net_inverse_backward if inverse else triton.net_backward
    return backward(given["g"], given["ld"], *net_arguments(given, given["x"]), True, True, True)


def activation(name: str, *rows: str) -> Callable[[Given], tuple[Tensor, ...]]:
    function = getattr(triton, name)
    last = () if "backward" in name else (True,)
    return lambda given: function(*(given[row] for row in rows), given["activation"], *last)


#: Operation → how it is called, and how many of its results, from the first, have a row a sample.
OPERATIONS: dict[str, tuple[Callable[[Given], tuple[Tensor, ...]], int]] = {
    "activation_forward": (activation("activation_forward", "x"), 2),
    "activation_inverse": (activation("activation_inverse", "x"), 2),
    "activation_backward": (activation("activation_backward", "g", "ld", "x"), 1),
    "activation_inverse_backward": (activation("activation_inverse_backward", "g", "ld", "x"), 1),
    "layer_forward": (lambda given: layer_forward(given)[:3], 3),
    "layer_inverse": (layer_inverse, 3),
    "layer_backward": (layer_backward, 1),
    "layer_inverse_backward": (layer_inverse_backward, 1),
    "net_forward": (lambda given: triton.net_forward(*net_arguments(given, given["x"]), True), 2),
    "net_inverse": (lambda given: triton.net_inverse(*net_arguments(given, given["z"]), True), 2),
    "net_backward": (lambda given: net_backward(given, False), 1),
    "net_inverse_backward": (lambda given: net_backward(given, True), 1),
}

operations = pytest.mark.parametrize("name", OPERATIONS)


def sized(*quick: tuple[int, int, torch.dtype]) -> Any:
    """Sizes and dtypes: those given, and all others among the slow ones."""
    every = [(*size, dtype) for size in SIZES for dtype in DTYPES]
    slow = [pytest.param(*case, marks=pytest.mark.slow) for case in every if case not in quick]
    return pytest.mark.parametrize(("N", "D", "dtype"), [*quick, *slow])


@functools.lru_cache(maxsize=4)
def shared(N: int, D: int, dtype: torch.dtype, learnt: bool) -> tuple[Given, dict[str, tuple[Tensor, ...]]]:
    """Inputs, and the results that the operations have had for them; computed once, for it takes long."""
    return inputs(N, D, dtype, learnt=learnt), {}


def given_and_plain(
    name: str, N: int, D: int, dtype: torch.dtype, *, learnt: bool = False
) -> tuple[Given, tuple[Tensor, ...]]:
    """Inputs, and what the operation makes of them in memory that was full of a number before."""
    given, known = shared(N, D, dtype, learnt)
    if name not in known:
        with guarded(1e30):
            known[name] = OPERATIONS[name][0](given)
    return given, known[name]


def by_row(name: str, results: tuple[Tensor, ...]) -> list[Tensor]:
    """Results with a row a sample, but those not asked for."""
    return [each for each in results[: OPERATIONS[name][1]] if each.numel()]


@sized((37, 5, torch.bfloat16), (17, 33, torch.float32))
@operations
def test_nothing_beyond_and_nothing_unwritten(name: str, N: int, D: int, dtype: torch.dtype) -> None:
    """And the same bits twice: sums over rows have an order that no scheduler decides."""
    # Slopes that are learnt are loaded, and their gradient is one more result: at every second size.
    given, plain = given_and_plain(name, N, D, dtype, learnt=N < D)
    assert all(bool(each.isfinite().all()) for each in plain)
    fences = Fences()
    with guarded(math.nan):
        results = OPERATIONS[name][0](fences.around(given))
    fences.check()
    for index, (mine, expected) in enumerate(zip(results, plain, strict=True)):
        assert same_bits(mine, expected), f"result {index} has other bits in other memory"


@pytest.fixture
def products_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the interpreter sum every product in one order, as a GPU does: its BLAS does otherwise at edges."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    plain = np.matmul

    def matmul(a: Any, b: Any, dtype: Any = None) -> Any:
        if a.ndim != 2 or b.ndim != 2:
            return plain(a, b, dtype=dtype)
        return np.add.reduce(a.astype(dtype)[:, :, None] * b.astype(dtype)[None], axis=1)

    own = types.SimpleNamespace(**{name: getattr(np, name) for name in dir(np) if not name.startswith("__")})
    own.matmul = matmul
    monkeypatch.setattr(interpreter, "np", own)


def chosen(given: Given, rows: Tensor) -> Given:
    """The same with these rows alone; what is empty, not having been saved, stays so."""
    return {
        name: value[rows] if name in BY_ROW and isinstance(value, Tensor) and value.numel() else value
        for name, value in given.items()
    }


@sized((37, 5, torch.float32))
@operations
@pytest.mark.usefixtures("products_alike")
def test_rows_are_on_their_own(name: str, N: int, D: int, dtype: torch.dtype) -> None:
    """In another order, and beside rows of NaN, each has the bits that it has."""
    call = OPERATIONS[name][0]
    given = shared(N, D, dtype, False)[0]
    plain = call(given)
    order = torch.randperm(N)
    for mine, expected in zip(by_row(name, call(chosen(given, order))), by_row(name, plain), strict=True):
        assert same_bits(mine, expected[order]), "the order of the rows matters"
    spoilt, good = dict(given), torch.arange(N) % 3 != 1
    for row in BY_ROW:
        if spoilt[row].numel():
            spoilt[row] = spoilt[row].clone()
            spoilt[row][~good] = math.nan
    for mine, expected in zip(by_row(name, call(spoilt)), by_row(name, plain), strict=True):
        assert same_bits(mine[good], expected[good]), "NaN leaves its row"
        assert bool(mine[~good].isnan().all())


@sized((37, 5, torch.float32))
@operations
@pytest.mark.usefixtures("products_alike")
def test_a_part_of_the_batch(name: str, N: int, D: int, dtype: torch.dtype) -> None:
    """Rows cut out of the batch have the bits that they have in it, if N stays on its side of D.

    On the other side a layer goes another way (see ``ops.triton``), which is the same to rounding.
    """
    given = shared(N, D, dtype, False)[0]
    plain = OPERATIONS[name][0](given)
    for count in sorted({1, max(1, N - 2)}):
        rows = torch.arange(N - count, N)
        part = chosen(given, rows)
        one_side = (N > D) == (count > D) or "activation" in name or ("net" in name and D <= 64)
        if not one_side:
            part["weight"] = layer_forward(part)[3]
        found = by_row(name, OPERATIONS[name][0](part))
        for mine, expected in zip(found, by_row(name, plain), strict=True):
            if one_side:
                assert same_bits(mine, expected[rows]), f"{count} of {N} rows"
            else:
                rough = 0.1 if dtype == torch.bfloat16 else 1e-4
                torch.testing.assert_close(mine, expected[rows], rtol=rough, atol=rough)

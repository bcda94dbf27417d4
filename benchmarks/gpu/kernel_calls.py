"""The calls of launchers that ``kernel_resources.py`` compiles: for each, the sizes, arithmetics and options.

Kernels are imported inside: the module must be importable before it is known which Triton is meant.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Setting:
    """One way of calling launchers, and the tensors for it: shapes and dtypes without data."""

    D: int
    arithmetic: str
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.arithmetic == "bfloat16" else torch.float32

    @property
    def precision(self) -> str:
        return self.arithmetic if self.arithmetic in PRODUCT[:3] else "tf32"

    def slopes(self, *leading: int) -> Any:
        """Floats, or as the option says a tensor [*leading, 3, D] or [*leading, 3], or a spline of 8 bins."""
        if self.options.get("slopes") == "spline":
            from lunet_fast.kernels.spline import Spline

            return Spline(self.full(*leading, 8 + 3))
        tensors = {"columns": self.full(*leading, 3), "tensor": self.empty(*leading, 3)}
        return tensors.get(self.options.get("slopes", ""), (0.1, 0.9, 1.0))

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def full(self, *leading: int) -> Tensor:
        """[*leading, D] in float32."""
        return self.empty(*leading, self.D)

    def rows(self, *leading: int) -> Tensor:
        """[*leading, D] in the dtype of the rows."""
        return self.empty(*leading, self.D, dtype=self.dtype)

    def matrix(self, *leading: int, dtype: torch.dtype | None = None) -> Tensor:
        """[*leading, D, D], in the dtype of the rows or another."""
        return self.empty(*leading, self.D, self.D, dtype=dtype or self.dtype)


#: Rows of a call: more than any number of programs, and no multiple of anything.
N = 100_003

PRODUCT = ("ieee", "tf32x3", "tf32", "bfloat16")
ELEMENTWISE = ("float32", "bfloat16")
SLOPES: tuple[dict[str, Any], ...] = ({}, {"slopes": "columns"}, {"slopes": "spline"})


@dataclass(frozen=True)
class Call:
    """Calls of launchers over D, arithmetic and options; ``quick`` is the one that the tests compile."""

    function: Callable[[Setting], object]
    arithmetics: Sequence[str]
    variants: Sequence[dict[str, Any]]
    quick: Sequence[tuple[int, str]]
    largest: int

    def quick_settings(self) -> list[Setting]:
        return [Setting(D, arithmetic, self.variants[0]) for D, arithmetic in self.quick]

    def settings(self, sizes: Iterable[int], variants: Sequence[dict[str, Any]]) -> Iterator[Setting]:
        inside = [D for D in sizes if self.largest >= D]
        for D, arithmetic, variant in itertools.product(inside, self.arithmetics, variants):
            yield Setting(D, arithmetic, variant)


CALLS: list[Call] = []


def register(
    arithmetics: Sequence[str],
    *,
    quick: Sequence[tuple[int, str]],
    variants: Sequence[dict[str, Any]] = ({},),
    largest: int = 2048,
) -> Callable[[Callable[[Setting], object]], Callable[[Setting], object]]:
    """Add calls of launchers: for each D ≤ ``largest``, arithmetic and variant of options."""

    def decorate(function: Callable[[Setting], object]) -> Callable[[Setting], object]:
        CALLS.append(Call(function, arithmetics, variants, quick, largest))
        return function

    return decorate


# --- the calls ------------------------------------------------------------------------------------------


# Twice, so that the tests compile the spline's kernels too.
@register(ELEMENTWISE, variants=SLOPES[2:], quick=[(64, "float32")])
@register(ELEMENTWISE, variants=SLOPES[:2], quick=[(64, "float32")])
def _activation(s: Setting) -> None:
    from lunet_fast.kernels import activation

    x, ld = s.rows(N), s.empty(N)
    activation.activation_forward(x, s.slopes(), logabsdet=True)
    activation.activation_inverse(x, s.slopes(), logabsdet=True)
    activation.activation_backward(x, ld, x, s.slopes())
    activation.activation_inverse_backward(x, ld, x, s.slopes())
    activation.row_gradients(x[None], ld[None], x[None], s.slopes(), inverse=False, column_sums=True)


# Where D is no multiple of 16 Triton moves single elements: the most addresses and registers.
@register(PRODUCT, variants=SLOPES, quick=[(256, "tf32x3"), (256, "tf32"), (257, "tf32x3")])
def _layer(s: Setting) -> None:
    from lunet_fast.kernels import layer

    for transposed in (False, True):
        layer.layer_forward(
            *(s.rows(1, N), s.matrix(1), s.full(1), s.slopes()),
            logabsdet=True,
            save=True,
            precision=s.precision,
            constant=s.empty(1),
            transposed=transposed,
        )


@register(PRODUCT, variants=SLOPES, quick=[(32, "tf32x3"), (128, "tf32x3")])
def _gradient(s: Setting) -> None:
    from lunet_fast.kernels import gradient, tiles

    x = s.rows(1, N)
    for h in (None, x) if tiles.recomputes(s.D) else (x,):
        gradient.layer_backward(
            *(x, s.empty(1, N), x, h, s.matrix(1), s.full(1), s.slopes()),
            needs_x=True,
            needs_weight=True,
            needs_bias=True,
            precision=s.precision,
        )
    gradient.weight_and_bias_gradients(x, x, precision=s.precision)


@register(PRODUCT, variants=SLOPES, quick=[(64, "tf32x3"), (257, "tf32")])
def _triangular(s: Setting) -> None:
    from lunet_fast.kernels import triangular

    triangular.layer_forward_rows(
        *(s.rows(1, 33), s.matrix(1), s.full(1), s.empty(s.D, dtype=torch.int64), s.full(1), s.slopes()),
        logabsdet=True,
        save=True,
        precision=s.precision,
        constant=s.empty(1),
    )


@register(ELEMENTWISE, quick=[(256, "float32")])
def _matrix(s: Setting) -> None:
    from lunet_fast.kernels import matrix

    packed = (s.matrix(1), s.full(1), s.empty(s.D, dtype=torch.int64))
    matrix.compose(*packed, s.dtype)
    if s.dtype != torch.float32:  # as under autocast
        matrix.compose(s.matrix(1, dtype=torch.float32), *packed[1:], s.dtype)
    matrix.compose_backward(s.matrix(1, dtype=torch.float32), s.empty(1), *packed)


@register(("ieee", "tf32x3", "bfloat16"), variants=SLOPES, quick=[(64, "tf32x3"), (257, "tf32x3")])
def _inverse(s: Setting) -> None:
    from lunet_fast.kernels import inverse, inverse_gradient

    permutation = s.empty(s.D, dtype=torch.int64)
    packed = (s.matrix(1), s.full(1), permutation)
    prepared = inverse.prepare_inverse(*packed, precision=s.precision)
    inverse.layer_inverse(
        *(s.rows(1, N), packed[0], prepared.inverses, s.full(1), s.slopes()),
        permutation=permutation,
        logabsdet=True,
        save=True,
        precision=s.precision,
        constant=prepared.logabsdet,
        weight=prepared.weight,
        condition=prepared.condition,
    )
    inverse_gradient.layer_inverse_backward(
        *(s.rows(1, N), s.empty(1, N), s.rows(1, N), packed[0], prepared.inverses, s.slopes()),
        permutation=permutation,
        precision=s.precision,
    )


@register(PRODUCT, variants=SLOPES, quick=[(64, "tf32x3")], largest=128)
def _stack(s: Setting) -> None:
    from lunet_fast.kernels import stack, stack_gradient, tiles

    M = 8
    options: dict[str, Any] = {"precision": s.precision}
    x, ld, weights, biases, slopes = s.rows(N), s.empty(N), s.matrix(M), s.full(M), s.slopes(M - 1)

    def tile(kernel: str) -> Any:
        return tiles.stack_tile(kernel, s.D, s.dtype, s.precision, tiles.architecture(x))

    if tile("forward"):
        stack.stack_forward(x, weights, biases, slopes, constant=s.empty(M), logabsdet=True, **options)
    if tile("backward"):
        stack_gradient.stack_backward(
            x, ld, x, weights, biases, slopes, needs_x=True, needs_weights=True, **options
        )
    if s.precision == "tf32":
        return
    for kernel in ("inverse", "inverse backward"):
        if not (found := tile(kernel)):
            continue
        block, lu = found.inner, s.matrix(M)
        blocks = s.empty(M, 2, -(-s.D // block), block, block)
        if kernel == "inverse":
            stack.stack_inverse(x, lu, blocks, biases, slopes, constant=s.empty(M), logabsdet=True, **options)
        else:
            stack_gradient.stack_inverse_backward(
                x, ld, x, weights, lu, blocks, biases, slopes, needs_weights=True, **options
            )


@register(("tf32x3",), quick=[(32, "tf32x3")], largest=64)
def _without_options(s: Setting) -> None:
    """Tensors that may be left out are: the compiler sees None where it else sees an address."""
    from lunet_fast.kernels import inverse, inverse_gradient, score, stack_gradient, tiles

    x, single, lu = s.rows(N), s.rows(1, N), s.matrix(1)
    prepared = inverse.prepare_inverse(lu, None, None, precision=s.precision)
    inverse_gradient.layer_inverse_backward(
        *(single, None, None, lu, prepared.inverses, None), permutation=None, precision=s.precision
    )
    weights = s.matrix(8)
    options: dict[str, Any] = {"needs_weights": True, "precision": s.precision}
    stack_gradient.stack_backward(x, None, x, weights, None, s.slopes(), needs_x=True, **options)
    tile = tiles.stack_tile("inverse backward", s.D, s.dtype, s.precision, tiles.architecture(x))
    if tile:
        blocks = s.empty(8, 2, -(-s.D // tile.inner), tile.inner, tile.inner)
        stack_gradient.stack_inverse_backward(
            *(x, None, x, weights, weights, blocks, None, s.slopes()), **options
        )
    score.score_topk(
        *(s.rows(1, 257), s.rows(1, 10_007), s.matrix(1, 2), None, s.slopes(), s.full(1), None),
        *(s.empty(257), s.empty(10_007), None, 20),
        activated=True,
        precision=s.precision,
    )


@register(PRODUCT, variants=({}, {"slopes": "tensor"}), quick=[(64, "tf32")], largest=128)
def _score(s: Setting) -> None:
    from lunet_fast.kernels import score

    K, L, users, items, k = 1, 2, 257, 10_007, 20
    score.score_topk(
        *(s.rows(K, users), s.rows(K, items), s.matrix(K, L), s.full(K, L)),
        s.empty(L, 3) if isinstance(s.slopes(L), Tensor) else s.slopes(L),  # never for each column
        *(s.full(K), s.full(K), s.empty(users), s.empty(items)),
        (s.empty(users + 1, dtype=torch.int64), s.empty(1000, dtype=torch.int64)),
        k,
        activated=False,
        precision=s.precision,
    )

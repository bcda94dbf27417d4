"""Every launcher against float64 on the same device; ``correctness_public.py``: the public functions.

Each result is compared by norm; then the same call must give the same bits again (a race would show), and a
NaN in one row must stay in that row. New memory is filled with NaN while these run.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.gpu.common import (
    FAMILY,
    LIMITS,
    Packed,
    Place,
    Row,
    Stage,
    compare,
    holds,
    packed,
)
from lunet_fast.ops import reference

Results = dict[str, Any]

#: The steepest over the flattest slope of φ: what an inverse may lose.
RATIO = (FAMILY[0] + FAMILY[1]) / FAMILY[0]


class Case(NamedTuple):
    """A function of rows [N, D], what float64 says of it, and which results have a row for each of x."""

    what: str
    run: Callable[[Tensor], Results]
    truth: Callable[[Tensor], Results]
    limits: dict[str, float]
    by_row: tuple[str, ...]


def verify(x: Tensor, case: Case) -> Iterator[Row]:
    """Errors, the same bits three times, and a NaN that stays in its row."""
    results = case.run(x)
    truth = case.truth(x.double())
    for name, limit in case.limits.items():
        yield from compare(case.what, results, {name: truth[name]}, limit)
    again = [case.run(x) for _ in range(2)]
    same = all(torch.equal(results[name], other[name]) for other in again for name in case.limits)
    yield holds(f"{case.what}: same bits again", same)
    poisoned, row = x.clone(), len(x) // 2
    poisoned[row, x.shape[1] // 2] = math.nan
    others = torch.arange(len(x), device=x.device) != row
    spoilt = case.run(poisoned)
    stays = all(
        torch.equal(spoilt[name][others], results[name][others]) and bool(spoilt[name][row].isnan().any())
        for name in case.by_row
    )
    yield holds(f"{case.what}: NaN stays in its row", stays)


def gradients(
    function: Callable[..., tuple[Tensor, Tensor]], leaves: list[Tensor], cotangents: list[Tensor]
) -> list[Tensor]:
    """Of a function with two results, with respect to the leaves."""
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    results = function(*leaves)
    upstream = [g.to(r.dtype) for g, r in zip(cotangents, results, strict=True)]
    return list(torch.autograd.grad(results, leaves, upstream))


def named(names: tuple[str, ...], results: Iterable[Any]) -> Results:
    return dict(zip(names, results, strict=True))


def first_members(results: Iterable[Tensor | None]) -> tuple[Tensor | None, ...]:
    """What K = 1 member gave, without its dimension."""
    return tuple(None if result is None else result[0] for result in results)


def kinds(arithmetic: str) -> tuple[torch.dtype, str]:
    """(dtype of rows and weights, precision of a float32 product)."""
    return (torch.bfloat16, "tf32") if arithmetic == "bf16" else (torch.float32, arithmetic)


# --- launchers ------------------------------------------------------------------------------------------


def activation(place: Place) -> Iterator[Row]:
    """φ and φ⁻¹ and both gradients, floats and learnt slopes; ±inf."""
    full = itertools.product((64, 257, 1000), (torch.float32, torch.bfloat16))
    for D, dtype in place.mine(list(full), [(5, torch.float32)]):
        yield from _activation(place, D, dtype)
    yield from _activation_ends(place)


def _activation(place: Place, D: int, dtype: torch.dtype) -> Iterator[Row]:
    from lunet_fast.kernels import activation as kernels

    rows = place.choose(20_011, 7)
    x, ld = (5 * place.randn(rows, D)).to(dtype), place.randn(rows)
    slopes = torch.tensor(FAMILY, device=place.device)
    limit = 1e-2 if dtype == torch.bfloat16 else 2e-6
    what = f"φ D={D} {str(dtype)[6:]}"
    grad = place.randn(rows, D).to(dtype)

    def forward(x: Tensor) -> Results:
        return named(("y", "logabsdet"), kernels.activation_forward(x, FAMILY, logabsdet=True))

    def forward_truth(x: Tensor) -> Results:
        return named(("y", "logabsdet"), reference.leaky_softplus_and_logabsdet(x, FAMILY))

    # The logarithm has only absolute accuracy; here its sum is of the size of D.
    limits = {"y": limit, "logabsdet": 2e-6}
    yield from verify(x, Case(what, forward, forward_truth, limits, ("y", "logabsdet")))

    def inverse(y: Tensor) -> Results:
        return named(("x", "logabsdet"), kernels.activation_inverse(y, FAMILY, logabsdet=True))

    def inverse_truth(y: Tensor) -> Results:
        return named(("x", "logabsdet"), reference.leaky_softplus_inverse_and_logabsdet(y, FAMILY))

    limits = {"x": limit * (1 if dtype == torch.bfloat16 else RATIO), "logabsdet": 2e-6 * RATIO}
    yield from verify(x, Case(f"inverse {what}", inverse, inverse_truth, limits, ("x", "logabsdet")))

    def backward(x: Tensor) -> Results:
        found = kernels.activation_backward(grad, ld, x, slopes)
        return named(("grad x", "grad slopes"), found)

    def backward_truth(x: Tensor) -> Results:
        function, leaves = reference.leaky_softplus_and_logabsdet, [x, slopes.double()]
        return named(("grad x", "grad slopes"), gradients(function, leaves, [grad.double(), ld.double()]))

    # The slopes' sums run over rows × D terms of either sign.
    limits = {"grad x": limit, "grad slopes": 2e-5}
    yield from verify(x, Case(f"gradient of {what}", backward, backward_truth, limits, ("grad x",)))


def _activation_ends(place: Place) -> Iterator[Row]:
    from lunet_fast.kernels import activation as kernels

    ends = torch.tensor([[math.inf], [-math.inf], [math.nan]], device=place.device)
    y, total = kernels.activation_forward(ends, FAMILY, logabsdet=True)
    x, _ = kernels.activation_inverse(ends, FAMILY, logabsdet=True)
    a, c, _ = FAMILY
    logs = torch.tensor([math.log(a + c), math.log(a)], device=place.device)
    assert total is not None
    good = torch.equal(y[:2], ends[:2]) and torch.equal(x[:2], ends[:2])
    good &= bool(y[2].isnan().all() and x[2].isnan().all() and total[2].isnan())
    good &= torch.allclose(total[:2], logs, atol=1e-6)
    yield holds("φ at ±inf and NaN", good)


def affine_truth(weight: Tensor, p: Packed) -> Callable[[Tensor], Results]:
    """y, h and log|det J| of rows by W [D, D] and the rest of p's first member, with the activation."""
    bias, constant = p.bias[0].double(), p.logabsdet()[0].double()

    def truth(x: Tensor) -> Results:
        h = x @ weight.double().T + bias
        y, total = reference.leaky_softplus_and_logabsdet(h, FAMILY)
        return {"y": y, "h": h, "logabsdet": total + constant}

    return truth


def layer(place: Place) -> Iterator[Row]:
    """The product with W formed, in every arithmetic, and the triangular one for few rows."""
    for D in place.mine((16, 64, 100, 256, 257, 1024), (9,)):
        p = packed(place, D)
        x = place.randn(place.choose(20_011, 5), D)
        for arithmetic in ("ieee", "tf32x3", "tf32", "bf16"):
            yield from _layer(p, x, arithmetic)
        yield from _matrix(place, p)


def _layer(p: Packed, x: Tensor, arithmetic: str) -> Iterator[Row]:
    from lunet_fast.kernels import layer as kernels
    from lunet_fast.kernels import triangular

    dtype, precision = kinds(arithmetic)
    weight = p.weight().to(dtype)
    names = ("y", "logabsdet", "h")
    options: dict[str, Any] = {"logabsdet": True, "save": True, "precision": precision}

    def forward(x: Tensor) -> Results:
        found = kernels.layer_forward(x[None], weight, p.bias, FAMILY, constant=p.logabsdet(), **options)
        return named(names, first_members(found))

    def few_rows(x: Tensor) -> Results:
        found = triangular.layer_forward_rows(
            *(x[None], p.lu, p.sign, None, p.bias, FAMILY), constant=p.logabsdet(), **options
        )
        return named(names, first_members(found))

    limits = dict.fromkeys(("y", "h", "logabsdet"), LIMITS[arithmetic])
    what = f"layer D={x.shape[1]} {arithmetic}"
    # What float64 is given is what the kernel is given, rounded weights too.
    truth = affine_truth(weight[0], p)
    yield from verify(x.to(dtype), Case(what, forward, truth, limits, ("y", "h", "logabsdet")))
    few = x[:37].contiguous().to(dtype)
    truth = affine_truth(p.weight()[0], p)
    yield from verify(few, Case(f"triangular {what}", few_rows, truth, limits, ("y", "h", "logabsdet")))


def _matrix(place: Place, p: Packed) -> Iterator[Row]:
    from lunet_fast.kernels import matrix

    D = p.lu.shape[-1]
    permutation = torch.randperm(D, device=place.device)
    lu = p.lu[0].double().requires_grad_()
    formed = reference.lu_weight(lu, p.sign[0].double(), permutation)
    upstream = place.randn(1, D, D)
    gradient = torch.autograd.grad(formed, lu, upstream[0].double())[0]
    gradient.diagonal().add_(0.5)
    weight, total = matrix.compose(p.lu, p.sign, permutation, torch.float32)
    share = torch.full((1,), 0.5, device=place.device)
    back = matrix.compose_backward(upstream, share, p.lu, p.sign, permutation)
    results = {"W": weight[0], "log|det W|": total, "gradient": back[0]}
    truths = {"W": formed.detach(), "log|det W|": p.logabsdet().double(), "gradient": gradient}
    yield from compare(f"W = L U D={D}", results, truths, 2e-6)


def gradient(place: Place) -> Iterator[Row]:
    """The layer's gradients, with h saved and, where the table has it, computed again."""
    from lunet_fast.kernels import tiles

    for D in place.mine((16, 64, 100, 128, 257, 1024), (9,)):
        p, rows = packed(place, D), place.choose(20_011, 5)
        x, g, ld = place.randn(rows, D), place.randn(rows, D), place.randn(rows)
        for arithmetic in ("ieee", "tf32x3", "tf32", "bf16"):
            for saved in (True, False) if tiles.recomputes(D) else (True,):
                yield from _gradient(p, x, g, ld, arithmetic, saved=saved)


def _gradient(p: Packed, x: Tensor, g: Tensor, ld: Tensor, arithmetic: str, *, saved: bool) -> Iterator[Row]:
    from lunet_fast.kernels import gradient as kernels

    dtype, precision = kinds(arithmetic)
    weight, upstream = p.weight().to(dtype), g.to(dtype)
    bias, slopes = p.bias[0].double(), torch.tensor(FAMILY, device=x.device)
    h = (x.to(dtype).double() @ weight[0].double().T + bias).to(dtype)

    def run(x: Tensor) -> Results:
        by_x, by_weight, by_bias, by_slopes = kernels.layer_backward(
            *(upstream[None], ld[None], x[None], h[None] if saved else None, weight, p.bias, slopes),
            needs_x=True,
            needs_weight=True,
            needs_bias=True,
            precision=precision,
        )
        return named(("x", "W", "b", "slopes"), (*first_members((by_x, by_weight, by_bias)), by_slopes))

    def forward(x: Tensor, weight: Tensor, bias: Tensor, slopes: Tensor) -> tuple[Tensor, Tensor]:
        return reference.leaky_softplus_and_logabsdet(x @ weight.T + bias, slopes)

    def truth(x: Tensor) -> Results:
        leaves = [x, weight[0].double(), bias, slopes.double()]
        found = gradients(forward, leaves, [upstream.double(), ld.double()])
        return named(("x", "W", "b", "slopes"), found)

    limit = LIMITS[arithmetic]
    # Sums over all rows of terms of either sign: rounding of the terms does not cancel.
    limits = {"x": 2 * limit, "W": 2 * limit, "b": 5 * limit, "slopes": 20 * limit}
    how = "saved" if saved else "computed again"
    what = f"gradient of layer D={x.shape[1]} {arithmetic}, h {how}"
    # With h saved, a NaN in x reaches the sums alone.
    yield from verify(x.to(dtype), Case(what, run, truth, limits, () if saved else ("x",)))


def inverse(place: Place) -> Iterator[Row]:
    """Substitution, the product with W⁻¹, their gradients; a matrix too ill-conditioned for W⁻¹."""
    from lunet_fast.kernels.inverse import prepare_inverse

    for D, spread in place.mine(
        ((16, 0.5), (64, 0.5), (100, 0.5), (256, 0.5), (257, 3.0), (1024, 0.5)), ((9, 0.5),)
    ):
        p = packed(place, D, spread=spread)
        kappa = p.condition() * RATIO
        h = place.randn(place.choose(20_011, 5), D)
        for precision in ("tf32x3", "ieee"):
            prepared = prepare_inverse(p.lu, p.sign, None, precision=precision)
            yield from _inverse(p, kappa, h, prepared._replace(weight=None, condition=None), precision)
            if prepared.weight is not None:
                yield from _inverse(p, kappa, h, prepared, precision)
            yield from _inverse_gradient(place, p, kappa, h, prepared, precision)


def _inverse(p: Packed, kappa: float, y: Tensor, prepared: Any, precision: str) -> Iterator[Row]:
    from lunet_fast.kernels.inverse import layer_inverse

    weight = p.weight()[0]

    def run(y: Tensor) -> Results:
        found = layer_inverse(
            *(y[None], p.lu, prepared.inverses, p.bias, FAMILY),
            permutation=None,
            logabsdet=True,
            save=True,
            precision=precision,
            constant=prepared.logabsdet,
            weight=prepared.weight,
            condition=prepared.condition,
        )
        return named(("x", "logabsdet", "h"), first_members(found))

    def exact(y: Tensor) -> Results:
        h, total = reference.leaky_softplus_inverse_and_logabsdet(y, FAMILY)
        x = torch.linalg.solve(weight, (h - p.bias[0].double()).T).T
        return {"x": x, "h": h, "logabsdet": total - p.logabsdet()[0].double()}

    limits = {"x": 2e-6 * kappa, "h": 2e-6 * RATIO, "logabsdet": 2e-6 * RATIO}
    way = "substitution" if prepared.weight is None else "W⁻¹ if the condition allows it"
    what = f"inverse D={y.shape[1]} {precision} {way}"
    yield from verify(y, Case(what, run, exact, limits, ("x", "h", "logabsdet")))


def _inverse_gradient(
    place: Place, p: Packed, kappa: float, h: Tensor, prepared: Any, precision: str
) -> Iterator[Row]:
    from lunet_fast.kernels.inverse_gradient import layer_inverse_backward

    g, ld, weight = place.randn(*h.shape), place.randn(len(h)), p.weight()[0]

    def backward(h: Tensor) -> Results:
        right, by_y, _ = layer_inverse_backward(
            *(g[None], ld[None], h[None], p.lu, prepared.inverses, FAMILY),
            permutation=None,
            precision=precision,
        )
        return {"grad h": right[0], "grad y": by_y[0]}

    def backward_truth(h: Tensor) -> Results:
        right = torch.linalg.solve(weight.T, g.double().T).T
        y = reference.leaky_softplus(h, FAMILY)
        pair = reference.leaky_softplus_inverse_and_logabsdet
        by_y = gradients(lambda y: pair(y, FAMILY), [y], [right, ld.double()])[0]
        return {"grad h": right, "grad y": by_y}

    limits = dict.fromkeys(("grad h", "grad y"), 2e-6 * kappa)
    what = f"gradient of inverse D={h.shape[1]} {precision}"
    yield from verify(h, Case(what, backward, backward_truth, limits, ("grad y",)))


def stack(place: Place) -> Iterator[Row]:
    """M layers in one launch, forward, inverse and both gradients."""
    from lunet_fast.kernels import tiles

    M = place.choose(8, 2)
    full = itertools.product((16, 32, 50, 64, 128), ("tf32x3", "ieee", "tf32"))
    for D, precision in place.mine(list(full), [(9, "tf32x3")]):
        p = packed(place, D, M, spread=0.2)
        x = place.randn(place.choose(20_011, 5), D)

        def fits(kernel: str, D: int = D, precision: str = precision, x: Tensor = x) -> bool:
            return tiles.stack_tile(kernel, D, x.dtype, precision, tiles.architecture(x)) is not None

        if fits("forward"):
            yield from _stack(p, x, precision)
        if fits("backward"):
            yield from _stack_gradient(place, p, x, precision)
        if precision != "tf32" and fits("inverse"):
            yield from _stack_inverse(p, x, precision)


def _exact_stack(x: Tensor, weights: Tensor, biases: Tensor) -> tuple[Tensor, Tensor]:
    total = weights.det().abs().log().sum().expand(len(x))
    for m, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        x = x @ weight.T + bias
        if m < len(weights) - 1:
            x, share = reference.leaky_softplus_and_logabsdet(x, FAMILY)
            total = total + share
    return x, total


def _exact_stack_inverse(y: Tensor, weights: Tensor, biases: Tensor) -> tuple[Tensor, Tensor]:
    total = -weights.det().abs().log().sum().expand(len(y))
    for m in reversed(range(len(weights))):
        if m < len(weights) - 1:
            y, share = reference.leaky_softplus_inverse_and_logabsdet(y, FAMILY)
            total = total + share
        y = torch.linalg.solve(weights[m], (y - biases[m]).T).T
    return y, total


def _stack(p: Packed, x: Tensor, precision: str) -> Iterator[Row]:
    from lunet_fast.kernels.stack import stack_forward

    M, weights = len(p.lu), p.weight()

    def forward(x: Tensor) -> Results:
        found = stack_forward(
            *(x, weights.float(), p.bias, FAMILY),
            constant=p.logabsdet(),
            logabsdet=True,
            precision=precision,
        )
        return named(("y", "logabsdet"), found)

    def truth(x: Tensor) -> Results:
        return named(("y", "logabsdet"), _exact_stack(x, weights, p.bias.double()))

    names = ("y", "logabsdet")
    # Each layer's own rounding is carried through those after it.
    limits = dict.fromkeys(names, M * LIMITS[precision])
    yield from verify(x, Case(f"stack of {M} D={x.shape[1]} {precision}", forward, truth, limits, names))


def _stack_gradient(place: Place, p: Packed, x: Tensor, precision: str) -> Iterator[Row]:
    from lunet_fast.kernels.stack_gradient import stack_backward

    g, ld = place.randn(*x.shape), place.randn(len(x))
    M, weights = len(p.lu), p.weight()
    names = ("grad x", "grad W", "grad b")

    def backward(x: Tensor) -> Results:
        by_x, by_weights, by_biases, _ = stack_backward(
            *(g, ld, x, weights.float(), p.bias, FAMILY),
            needs_x=True,
            needs_weights=True,
            precision=precision,
        )
        return named(names, (by_x, by_weights, by_biases))

    def rows_only(x: Tensor, weights: Tensor, biases: Tensor) -> tuple[Tensor, Tensor]:
        y, total = _exact_stack(x, weights, biases)
        return y, total - weights.det().abs().log().sum()

    def backward_truth(x: Tensor) -> Results:
        leaves = [x, weights, p.bias.double()]
        return named(names, gradients(rows_only, leaves, [g.double(), ld.double()]))

    limits = dict.fromkeys(names, 2 * M * LIMITS[precision])
    what = f"gradient of stack of {M} D={x.shape[1]} {precision}"
    yield from verify(x, Case(what, backward, backward_truth, limits, ("grad x",)))


def _stack_inverse(p: Packed, x: Tensor, precision: str) -> Iterator[Row]:
    from lunet_fast.kernels import solve, tiles
    from lunet_fast.kernels.stack import stack_inverse

    M, weights, biases = len(p.lu), p.weight(), p.bias.double()
    tile = tiles.stack_tile("inverse", x.shape[1], x.dtype, precision, tiles.architecture(x))
    assert tile is not None
    blocks, _ = solve.invert_blocks(p.lu, p.sign, block=tile.inner)
    y = _exact_stack(x.double(), weights, biases)[0].float()

    def inverse(y: Tensor) -> Results:
        found = stack_inverse(
            *(y, p.lu, blocks, p.bias, FAMILY), constant=p.logabsdet(), logabsdet=True, precision=precision
        )
        return named(("x", "logabsdet"), found)

    def inverse_truth(y: Tensor) -> Results:
        return named(("x", "logabsdet"), _exact_stack_inverse(y, weights, biases))

    limits = dict.fromkeys(("x", "logabsdet"), 2e-6 * M * p.condition() * RATIO)
    what = f"inverse stack of {M} D={x.shape[1]} {precision}"
    yield from verify(y, Case(what, inverse, inverse_truth, limits, ("x", "logabsdet")))


def score(place: Place) -> Iterator[Row]:
    """The best items of each user: those of float64, up to scores that differ by rounding."""
    from lunet_fast.kernels import score as kernels

    users, items, L, k = place.choose((60, 20_011, 2, 20), (3, 70, 1, 4))
    for D, precision in place.mine(
        [(D, p) for D in (16, 64, 128) for p in ("ieee", "tf32x3", "tf32")], [(9, "ieee")]
    ):
        p, q = place.randn(1, users, D), place.randn(1, items, D)
        weight, bias = place.randn(1, L, D, D) / math.sqrt(D), place.randn(1, L, D)
        readout, offset, popular = place.randn(1, D), place.randn(users), place.randn(items)

        def run() -> tuple[Tensor, Tensor]:
            return kernels.score_topk(
                *(p, q, weight, bias, FAMILY, readout, None, offset, popular, None, k),  # noqa: B023
                activated=False,
                precision=precision,  # noqa: B023
            )

        scores, chosen = run()
        h = p[0].double()[:, None] + q[0].double()
        for l in range(L):
            h = reference.leaky_softplus(h, FAMILY) @ weight[0, l].double().T + bias[0, l].double()
        dense = h @ readout[0].double() + offset.double()[:, None] + popular.double()
        del h
        best = dense.topk(k).values
        what = f"scores D={D} {precision}"
        yield from compare(what, {"scores": scores}, {"scores": dense.gather(1, chosen)}, LIMITS[precision])
        yield from compare(what, {"best": dense.gather(1, chosen)}, {"best": best}, LIMITS[precision])
        again = run()
        yield holds(
            f"{what}: same bits again", torch.equal(scores, again[0]) and torch.equal(chosen, again[1])
        )


#: Each runs in a process of its own, beside those of ``correctness_public.py``.
STAGES: dict[str, Stage] = {
    "stack": stack,
    "inverse": inverse,
    "layer": layer,
    "gradient": gradient,
    "scores": score,
    "activation": activation,
}

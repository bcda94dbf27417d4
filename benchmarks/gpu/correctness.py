"""Every launcher and the public functions against float64 on the same device.

Each result is compared by norm; then the same call must give the same bits again (a race would show), and a
NaN in one row must stay in that row. New memory is filled with NaN while these run.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
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
    matmul_precision,
    packed,
)
from lunet_fast import functional
from lunet_fast.ops import reference

Results = dict[str, Any]


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


# --- launchers ------------------------------------------------------------------------------------------


def activation(place: Place) -> Iterator[Row]:
    """φ and φ⁻¹ and both gradients, exact and FAST, floats and learnt slopes; ±inf."""
    from lunet_fast.kernels import activation as act

    slope_ratio = (FAMILY[0] + FAMILY[1]) / FAMILY[0]
    for D, dtype, fast in place.mine(
        [
            (D, dtype, fast)
            for D in (64, 257, 1000)
            for dtype in (torch.float32, torch.bfloat16)
            for fast in (0, 1)
        ],
        [(5, torch.float32, 0)],
    ):
        fast = bool(fast)
        rows = place.choose(20_011, 7)
        x = (5 * place.randn(rows, D)).to(dtype)
        slopes = torch.tensor(FAMILY, device=place.device)
        ld = place.randn(rows)
        limit = 1e-2 if dtype == torch.bfloat16 else 2e-6
        what = f"φ D={D} {str(dtype)[6:]}{' FAST' if fast else ''}"
        grad = place.randn(rows, D).to(dtype)

        def forward(x: Tensor, fast: bool = fast) -> Results:
            y, total = act.activation_forward(x, FAMILY, logabsdet=True, fast=fast)
            return {"y": y, "logabsdet": total}

        def forward_truth(x: Tensor) -> Results:
            y, total = reference.leaky_softplus_and_logabsdet(x, FAMILY)
            return {"y": y, "logabsdet": total}

        # FAST has only absolute accuracy in the logarithm; here its sum is of the size of D.
        yield from verify(
            x, Case(what, forward, forward_truth, {"y": limit, "logabsdet": 2e-6}, ("y", "logabsdet"))
        )

        def inverse(y: Tensor, fast: bool = fast) -> Results:
            x, total = act.activation_inverse(y, FAMILY, logabsdet=True, fast=fast)
            return {"x": x, "logabsdet": total}

        def inverse_truth(y: Tensor) -> Results:
            x, total = reference.leaky_softplus_inverse_and_logabsdet(y, FAMILY)
            return {"x": x, "logabsdet": total}

        limits = {
            "x": limit * (1 if dtype == torch.bfloat16 else slope_ratio),
            "logabsdet": 2e-6 * slope_ratio,
        }
        yield from verify(x, Case(f"inverse {what}", inverse, inverse_truth, limits, ("x", "logabsdet")))

        def backward(
            x: Tensor, grad: Tensor = grad, ld: Tensor = ld, slopes: Tensor = slopes, fast: bool = fast
        ) -> Results:
            by_x, by_slopes = act.activation_backward(grad, ld, x, slopes, fast=fast)
            return {"grad x": by_x, "grad slopes": by_slopes}

        def backward_truth(
            x: Tensor, grad: Tensor = grad, ld: Tensor = ld, slopes: Tensor = slopes
        ) -> Results:
            names = ("grad x", "grad slopes")
            found = gradients(
                reference.leaky_softplus_and_logabsdet, [x, slopes.double()], [grad.double(), ld.double()]
            )
            return dict(zip(names, found, strict=True))

        # The slopes' sums run over rows × D terms of either sign.
        yield from verify(
            x,
            Case(
                f"gradient of {what}",
                backward,
                backward_truth,
                {"grad x": limit, "grad slopes": 2e-5},
                ("grad x",),
            ),
        )
    ends = torch.tensor([[math.inf], [-math.inf], [math.nan]], device=place.device)
    for fast in place.choose((False, True), (False,)):
        y, total = act.activation_forward(ends, FAMILY, logabsdet=True, fast=fast)
        x, _ = act.activation_inverse(ends, FAMILY, logabsdet=True, fast=fast)
        a, c, _ = FAMILY
        logs = torch.tensor([math.log(a + c), math.log(a)], device=place.device)
        good = torch.equal(y[:2], ends[:2]) and torch.equal(x[:2], ends[:2])
        good &= bool(y[2].isnan().all() and x[2].isnan().all() and total[2].isnan())
        good &= torch.allclose(total[:2], logs, atol=1e-6)
        yield holds(f"φ at ±inf and NaN{' FAST' if fast else ''}", good)


def affine_truth(p: Packed, slopes: Any) -> Callable[[Tensor], Results]:
    """y, h and log|det J| of rows by the first member of p."""
    weight, bias, constant = p.weight()[0], p.bias[0].double(), p.logabsdet()[0].double()

    def truth(x: Tensor) -> Results:
        h = x @ weight.T + bias
        if slopes is None:
            return {"y": h, "h": h, "logabsdet": constant.expand(len(x))}
        y, total = reference.leaky_softplus_and_logabsdet(h, slopes)
        return {"y": y, "h": h, "logabsdet": total + constant}

    return truth


def layer(place: Place) -> Iterator[Row]:
    """The product with W formed, in every arithmetic, and the triangular one for few rows."""
    from lunet_fast.kernels import layer as kernels
    from lunet_fast.kernels import matrix, triangular

    for D in place.mine((16, 64, 100, 256, 257, 1024), (9,)):
        p = packed(place, D)
        truth = affine_truth(p, FAMILY)
        x = place.randn(place.choose(20_011, 5), D)
        few = x[:37].contiguous()
        for arithmetic, fast in (
            ("ieee", False),
            ("tf32x3", False),
            ("tf32", False),
            ("bf16", False),
            ("tf32x3", True),
        ):
            if place.tiny and fast:
                continue
            narrow = arithmetic == "bf16"
            dtype = torch.bfloat16 if narrow else torch.float32
            precision = "tf32" if narrow else arithmetic
            weight = p.weight().to(dtype)

            def forward(
                x: Tensor,
                weight: Tensor = weight,
                precision: str = precision,
                fast: bool = fast,
                p: Packed = p,
            ) -> Results:
                y, total, h = kernels.layer_forward(
                    *(x[None], weight, p.bias, FAMILY),
                    logabsdet=True,
                    save=True,
                    precision=precision,
                    constant=p.logabsdet(),
                    fast=fast,
                )
                return {"y": y[0], "h": h[0], "logabsdet": total[0]}

            # What float64 is given is what the kernel is given, rounded weights too.
            rounded = weight[0].double()

            def exact(x: Tensor, rounded: Tensor = rounded, p: Packed = p) -> Results:
                h = x @ rounded.T + p.bias[0].double()
                y, total = reference.leaky_softplus_and_logabsdet(h, FAMILY)
                return {"y": y, "h": h, "logabsdet": total + p.logabsdet()[0].double()}

            limits = dict.fromkeys(("y", "h", "logabsdet"), LIMITS[arithmetic])
            what = f"layer D={D} {arithmetic}{' FAST' if fast else ''}"
            yield from verify(x.to(dtype), Case(what, forward, exact, limits, ("y", "h", "logabsdet")))

            def rows(x: Tensor, precision: str = precision, fast: bool = fast, p: Packed = p) -> Results:
                y, total, h = triangular.layer_forward_rows(
                    *(x[None], p.lu, p.sign, None, p.bias, FAMILY),
                    logabsdet=True,
                    save=True,
                    precision=precision,
                    constant=p.logabsdet(),
                    fast=fast,
                )
                return {"y": y[0], "h": h[0], "logabsdet": total[0]}

            limits = dict.fromkeys(("y", "h", "logabsdet"), LIMITS[arithmetic])
            what = f"triangular layer D={D} {arithmetic}{' FAST' if fast else ''}"
            yield from verify(few.to(dtype), Case(what, rows, truth, limits, ("y", "h", "logabsdet")))

        permutation = torch.randperm(D, device=place.device)
        lu = p.lu[0].double().requires_grad_()
        formed = reference.lu_weight(lu, p.sign[0].double(), permutation)
        upstream = place.randn(1, D, D)
        gradient = torch.autograd.grad(formed, lu, upstream[0].double())[0]
        gradient.diagonal().add_(0.5)
        weight, total = matrix.compose(p.lu, p.sign, permutation, torch.float32)
        back = matrix.compose_backward(
            upstream, torch.full((1,), 0.5, device=place.device), p.lu, p.sign, permutation
        )
        results = {"W": weight[0], "log|det W|": total, "gradient": back[0]}
        truths = {"W": formed.detach(), "log|det W|": p.logabsdet().double(), "gradient": gradient}
        yield from compare(f"W = L U D={D}", results, truths, 2e-6)


def gradient(place: Place) -> Iterator[Row]:
    """The layer's gradients, with h saved and, where the table has it, computed again."""
    from lunet_fast.kernels import gradient as kernels
    from lunet_fast.kernels import tiles

    for D in place.mine((16, 64, 100, 128, 257, 1024), (9,)):
        p = packed(place, D)
        rows = place.choose(20_011, 5)
        x, g, ld = place.randn(rows, D), place.randn(rows, D), place.randn(rows)
        slopes = torch.tensor(FAMILY, device=place.device)
        for arithmetic in ("ieee", "tf32x3", "tf32", "bf16"):
            dtype = torch.bfloat16 if arithmetic == "bf16" else torch.float32
            precision = "tf32" if arithmetic == "bf16" else arithmetic
            weight, upstream = p.weight().to(dtype), g.to(dtype)
            h = (x.to(dtype).double() @ weight[0].double().T + p.bias[0].double()).to(dtype)
            for saved in (True, False) if tiles.recomputes(D) else (True,):

                def run(
                    x: Tensor,
                    h: Tensor | None = h if saved else None,
                    weight: Tensor = weight,
                    upstream: Tensor = upstream,
                    ld: Tensor = ld,
                    p: Packed = p,
                    slopes: Tensor = slopes,
                    precision: str = precision,
                ) -> Results:
                    found = kernels.layer_backward(
                        *(upstream[None], ld[None], x[None], None if h is None else h[None], weight),
                        *(p.bias, slopes),
                        needs_x=True,
                        needs_weight=True,
                        needs_bias=True,
                        precision=precision,
                    )
                    by_x, by_weight, by_bias, by_slopes = found
                    return {"x": by_x[0], "W": by_weight[0], "b": by_bias[0], "slopes": by_slopes}

                def truth(
                    x: Tensor,
                    weight: Tensor = weight,
                    upstream: Tensor = upstream,
                    ld: Tensor = ld,
                    p: Packed = p,
                    slopes: Tensor = slopes,
                ) -> Results:
                    def forward(
                        x: Tensor, weight: Tensor, bias: Tensor, slopes: Tensor
                    ) -> tuple[Tensor, Tensor]:
                        return reference.leaky_softplus_and_logabsdet(x @ weight.T + bias, slopes)

                    leaves = [x, weight[0].double(), p.bias[0].double(), slopes.double()]
                    found = gradients(forward, leaves, [upstream.double(), ld.double()])
                    return dict(zip(("x", "W", "b", "slopes"), found, strict=True))

                limit = LIMITS[arithmetic]
                # Sums over all rows of terms of either sign: rounding of the terms does not cancel.
                limits = {"x": 2 * limit, "W": 2 * limit, "b": 5 * limit, "slopes": 20 * limit}
                what = f"gradient of layer D={D} {arithmetic}, h {'saved' if saved else 'computed again'}"
                # With h saved, a NaN in x reaches the sums alone.
                by_row = () if saved else ("x",)
                yield from verify(x.to(dtype), Case(what, run, truth, limits, by_row))


def inverse(place: Place) -> Iterator[Row]:
    """Substitution, the product with W⁻¹, their gradients; a matrix too ill-conditioned for W⁻¹."""
    from lunet_fast.kernels import substitution

    ratio = (FAMILY[0] + FAMILY[1]) / FAMILY[0]
    for D, spread in place.mine(
        ((16, 0.5), (64, 0.5), (100, 0.5), (256, 0.5), (257, 3.0), (1024, 0.5)), ((9, 0.5),)
    ):
        p = packed(place, D, spread=spread)
        kappa = p.condition() * ratio
        weight = p.weight()[0]
        h = place.randn(place.choose(20_011, 5), D)
        permutation = None
        for precision in ("tf32x3", "ieee"):
            prepared = substitution.prepare_inverse(p.lu, p.sign, permutation, precision=precision)
            ways: dict[str, Any] = {"substitution": (None, None)}
            if prepared.weight is not None:
                ways["W⁻¹ if the condition allows it"] = (prepared.weight, prepared.condition)
            for way, (explicit, condition) in ways.items():

                def run(
                    y: Tensor,
                    prepared: Any = prepared,
                    explicit: Tensor | None = explicit,
                    condition: Tensor | None = condition,
                    precision: str = precision,
                    p: Packed = p,
                ) -> Results:
                    x, total, h = substitution.layer_inverse(
                        *(y[None], p.lu, prepared.inverses, p.bias, FAMILY),
                        permutation=None,
                        logabsdet=True,
                        save=True,
                        precision=precision,
                        constant=prepared.logabsdet,
                        weight=explicit,
                        condition=condition,
                    )
                    return {"x": x[0], "h": h[0], "logabsdet": total[0]}

                def exact(y: Tensor, weight: Tensor = weight, p: Packed = p) -> Results:
                    h, total = reference.leaky_softplus_inverse_and_logabsdet(y, FAMILY)
                    x = torch.linalg.solve(weight, (h - p.bias[0].double()).T).T
                    return {"x": x, "h": h, "logabsdet": total - p.logabsdet()[0].double()}

                limits = {"x": 2e-6 * kappa, "h": 2e-6 * ratio, "logabsdet": 2e-6 * ratio}
                what = f"inverse D={D} {precision} {way}"
                yield from verify(h, Case(what, run, exact, limits, ("x", "h", "logabsdet")))

            g, ld = place.randn(*h.shape), place.randn(len(h))

            def backward(
                h: Tensor,
                g: Tensor = g,
                ld: Tensor = ld,
                prepared: Any = prepared,
                precision: str = precision,
                p: Packed = p,
            ) -> Results:
                right, by_y, _ = substitution.layer_inverse_backward(
                    *(g[None], ld[None], h[None], p.lu, prepared.inverses, FAMILY),
                    permutation=None,
                    precision=precision,
                )
                return {"grad h": right[0], "grad y": by_y[0]}

            def backward_truth(h: Tensor, g: Tensor = g, ld: Tensor = ld, weight: Tensor = weight) -> Results:
                right = torch.linalg.solve(weight.T, g.double().T).T
                y = reference.leaky_softplus(h, FAMILY)
                pair = reference.leaky_softplus_inverse_and_logabsdet
                by_y = gradients(lambda y: pair(y, FAMILY), [y], [right, ld.double()])[0]
                return {"grad h": right, "grad y": by_y}

            limits = dict.fromkeys(("grad h", "grad y"), 2e-6 * kappa)
            what = f"gradient of inverse D={D} {precision}"
            yield from verify(h, Case(what, backward, backward_truth, limits, ("grad y",)))


def stack(place: Place) -> Iterator[Row]:
    """M layers in one launch, forward, inverse and both gradients."""
    from lunet_fast.kernels import stack as kernels
    from lunet_fast.kernels import substitution, tiles

    M = place.choose(8, 2)
    for D, precision in place.mine(
        [(D, p) for D in (16, 32, 50, 64, 128) for p in ("tf32x3", "ieee", "tf32")], [(9, "tf32x3")]
    ):
        p = packed(place, D, M, spread=0.2)
        weights64 = p.weight()
        weights = weights64.float()
        x = place.randn(place.choose(20_011, 5), D)
        g, ld = place.randn(*x.shape), place.randn(len(x))
        arch = tiles.architecture(x)

        def exact(x: Tensor, weights: Tensor, biases: Tensor, slopes: Any = FAMILY) -> tuple[Tensor, Tensor]:
            total = weights.det().abs().log().sum().expand(len(x))
            for m, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
                x = x @ weight.T + bias
                if m < len(weights) - 1:
                    x, share = reference.leaky_softplus_and_logabsdet(x, slopes)
                    total = total + share
            return x, total

        def exact_inverse(y: Tensor, weights: Tensor, biases: Tensor) -> tuple[Tensor, Tensor]:
            total = -weights.det().abs().log().sum().expand(len(y))
            for m in reversed(range(len(weights))):
                if m < len(weights) - 1:
                    y, share = reference.leaky_softplus_inverse_and_logabsdet(y, FAMILY)
                    total = total + share
                y = torch.linalg.solve(weights[m], (y - biases[m]).T).T
            return y, total

        biases64 = p.bias.double()
        limit = LIMITS[precision]
        if tiles.stack_tile("forward", D, x.dtype, precision, arch):

            def forward(
                x: Tensor, p: Packed = p, weights: Tensor = weights, precision: str = precision
            ) -> Results:
                y, total = kernels.stack_forward(
                    x, weights, p.bias, FAMILY, constant=p.logabsdet(), logabsdet=True, precision=precision
                )
                return {"y": y, "logabsdet": total}

            def truth(x: Tensor, weights: Tensor = weights64, biases: Tensor = biases64) -> Results:
                return dict(zip(("y", "logabsdet"), exact(x, weights, biases), strict=True))

            what, names = f"stack of {M} D={D} {precision}", ("y", "logabsdet")
            # Each layer's own rounding is carried through those after it.
            yield from verify(x, Case(what, forward, truth, dict.fromkeys(names, M * limit), names))
        if tiles.stack_tile("backward", D, x.dtype, precision, arch):

            def backward(
                x: Tensor,
                g: Tensor = g,
                ld: Tensor = ld,
                p: Packed = p,
                weights: Tensor = weights,
                precision: str = precision,
            ) -> Results:
                by_x, by_weights, by_biases, _ = kernels.stack_backward(
                    *(g, ld, x, weights, p.bias, FAMILY),
                    needs_x=True,
                    needs_weights=True,
                    precision=precision,
                )
                return {"grad x": by_x, "grad W": by_weights, "grad b": by_biases}

            def backward_truth(
                x: Tensor,
                g: Tensor = g,
                ld: Tensor = ld,
                weights: Tensor = weights64,
                biases: Tensor = biases64,
            ) -> Results:
                def rows_only(x: Tensor, weights: Tensor, biases: Tensor) -> tuple[Tensor, Tensor]:
                    y, total = exact(x, weights, biases)
                    return y, total - weights.det().abs().log().sum()

                found = gradients(rows_only, [x, weights, biases], [g.double(), ld.double()])
                return dict(zip(("grad x", "grad W", "grad b"), found, strict=True))

            limits = dict.fromkeys(("grad x", "grad W", "grad b"), 2 * M * limit)
            yield from verify(x, Case(f"gradient of {what}", backward, backward_truth, limits, ("grad x",)))
        found = None if precision == "tf32" else tiles.stack_tile("inverse", D, x.dtype, precision, arch)
        if found:
            blocks, _ = substitution.invert_blocks(p.lu, p.sign, block=found.inner)
            ratio = (FAMILY[0] + FAMILY[1]) / FAMILY[0]
            kappa = p.condition() * ratio
            y = exact(x.double(), weights64, biases64)[0].float()

            def inverse(
                y: Tensor, p: Packed = p, blocks: Tensor = blocks, precision: str = precision
            ) -> Results:
                x, total = kernels.stack_inverse(
                    *(y, p.lu, blocks, p.bias, FAMILY),
                    constant=p.logabsdet(),
                    logabsdet=True,
                    precision=precision,
                )
                return {"x": x, "logabsdet": total}

            def inverse_truth(y: Tensor, weights: Tensor = weights64, biases: Tensor = biases64) -> Results:
                return dict(zip(("x", "logabsdet"), exact_inverse(y, weights, biases), strict=True))

            limits = {"x": 2e-6 * M * kappa, "logabsdet": 2e-6 * M * kappa}
            yield from verify(y, Case(f"inverse {what}", inverse, inverse_truth, limits, ("x", "logabsdet")))


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


# --- the public functions -------------------------------------------------------------------------------


def _with_sign(function: Callable[..., Any], sign: Tensor) -> Callable[..., tuple[Tensor, Tensor]]:
    """The function of what it is differentiated by: (x, lu, bias, slopes)."""
    return lambda x, lu, bias, slopes: function(x, lu, bias, sign=sign, slopes=slopes)


def public(place: Place) -> Iterator[Row]:
    """The layer's four functions and their gradients in every precision; many rows and few; bfloat16."""
    ratio = (FAMILY[0] + FAMILY[1]) / FAMILY[0]
    single, half = torch.float32, torch.bfloat16
    many, few = place.choose((5003, 7), (12, 3))
    settings = [(many, single, "highest"), (many, single, "high"), (many, single, "medium")]
    settings += [(many, half, "bf16"), (few, single, "highest"), (few, half, "bf16")]
    for D in place.mine((16, 64, 129, 1024), (9,)):
        for rows, dtype, name in settings:
            exact = packed(place, D)
            p = Packed(*(part[0].to(dtype) for part in exact))
            x = place.randn(rows, D).to(dtype)
            g, ld = place.randn(rows, D), place.randn(rows)
            slopes = torch.tensor(FAMILY, device=place.device)
            limit = LIMITS[name]
            kappa = Packed(*(part[None] for part in p)).condition() * ratio
            # The inverse is never below tf32x3; bfloat16 rounds its results.
            inverse_limit = 2e-6 * kappa + (limit if dtype == torch.bfloat16 else 0.0)
            for direction, ours, plain, plain_limit in (
                ("layer", functional.lu_dense_and_logabsdet, reference.lu_dense_and_logabsdet, limit),
                ("inverse layer", functional.lu_dense_inverse_and_logabsdet,
                 reference.lu_dense_inverse_and_logabsdet, inverse_limit),
            ):  # fmt: skip
                what = f"{direction} D={D} rows={rows} {name}"
                leaves = [x, p.lu, p.bias, slopes]
                wide = [leaf.double() for leaf in leaves]
                with matmul_precision("highest" if name == "bf16" else name):
                    results = dict(
                        zip(("result", "logabsdet"), _with_sign(ours, p.sign)(*leaves), strict=True)
                    )
                    found = gradients(_with_sign(ours, p.sign), leaves, [g, ld])
                truth_call = _with_sign(plain, p.sign.double())
                truth = dict(zip(("result", "logabsdet"), truth_call(*wide), strict=True))
                yield from compare(what, results, truth, plain_limit)
                names = ("grad x", "grad lu", "grad bias", "grad slopes")
                true = gradients(truth_call, wide, [g.double(), ld.double()])
                # The gradient of lu and bias of the inverse is a plain product; slopes' sums cancel.
                for label, found_one, true_one in zip(names, found, true, strict=True):
                    wider = 10.0 if label == "grad slopes" else 1.0
                    loose = wider * max(plain_limit, 2 * limit if name != "highest" else 0.0)
                    yield from compare(what, {label: found_one}, {label: true_one}, loose)


def net(place: Place) -> Iterator[Row]:
    """LUNet, which may take one launch for all layers; round trips against the condition number."""
    from lunet_fast import LUNet

    for D in place.mine((16, 64, 128, 256), (9,)):
        torch.manual_seed(0)
        model = LUNet(D, place.choose(8, 3)).to(place.device)
        wide = LUNet(D, place.choose(8, 3)).to(place.device).double()
        with torch.no_grad():
            for one in model.parameters():
                one.add_(0.02 * torch.randn_like(one))
        wide.load_state_dict({name: value.double() for name, value in model.state_dict().items()})
        x = place.randn(place.choose(5003, 12), D)
        for precision in ("highest", "high"):
            M = len(model.layers)
            limit = M * LIMITS[precision]
            with matmul_precision(precision):
                names = list(dict(model.named_parameters()))
                y, total = model.forward_and_logabsdet(x)
                found = torch.autograd.grad((y.sin().sum() + total.sum()), list(model.parameters()))
                back, _ = model.inverse_and_logabsdet(y.detach())
            y64, total64 = wide.forward_and_logabsdet(x.double())
            true = torch.autograd.grad((y64.sin().sum() + total64.sum()), list(wide.parameters()))
            results, truth = {"y": y, "logabsdet": total}, {"y": y64, "logabsdet": total64}
            what = f"LUNet D={D} {precision}"
            yield from compare(what, results, truth, limit)
            for kind in ("lu", "bias"):
                pairs = [(f, t) for n, f, t in zip(names, found, true, strict=True) if n.endswith(kind)]
                joined = [torch.cat([one.flatten() for one in side]) for side in zip(*pairs, strict=True)]
                yield from compare(what, {f"grad {kind}": joined[0]}, {f"grad {kind}": joined[1]}, 10 * limit)
            if precision == "highest":
                kappa = 10.0 ** model.condition(x[:1000]).digits_lost
                yield from compare(
                    what, {"round trip": back}, {"round trip": x.double()}, min(0.1, 2e-6 * kappa)
                )


def capture(place: Place) -> Iterator[Row]:
    """CUDA graphs of a step forward, back and inverse, replayed on new data; four streams at once."""
    from lunet_fast import LUNet

    D, rows = place.choose((64, 1000), (9, 12))
    model = LUNet(D, place.choose(8, 2)).to(place.device)
    parameters = list(model.parameters())
    x = place.randn(rows, D)

    def step(x: Tensor) -> list[Tensor]:
        y, total = model.forward_and_logabsdet(x)
        with torch.no_grad():
            back = model.inverse(y)
        return [y, total, back, *torch.autograd.grad(y.sin().sum() + total.sum(), parameters)]

    for _ in range(3):
        step(x)
    fresh = place.randn(rows, D)
    expected = [t.clone() for t in step(fresh)]
    if place.is_gpu:
        graph = torch.cuda.CUDAGraph()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step(x)
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(graph):
            captured = step(x)
        x.copy_(fresh)
        graph.replay()
        torch.cuda.synchronize()
    else:
        captured = step(fresh)
    same = all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))
    yield holds("a captured CUDA graph, replayed on new rows", same)

    many = [place.randn(place.choose(50_000, 5), D) for _ in range(4)]
    alone = [[t.clone() for t in step(rows)] for rows in many]
    together: list[list[Tensor]] = []
    for rows_of_one in many:
        stream = torch.cuda.Stream() if place.is_gpu else None
        if stream is not None:
            stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream) if stream is not None else contextlib.nullcontext():
            together.append(step(rows_of_one))
    if place.is_gpu:
        torch.cuda.synchronize()
    same = all(
        torch.equal(a, b) for p, q in zip(alone, together, strict=True) for a, b in zip(p, q, strict=True)
    )
    yield holds("four streams at once", same)


def large(place: Place) -> Iterator[Row]:
    """More than 2³¹ numbers: the last rows must be what the same rows are by themselves."""
    p = packed(place, 64)
    lu, sign, bias = (part[0] for part in p)
    rows = place.choose(2**31 // 64 + 1000, 100)
    if place.is_gpu:
        free, _ = torch.cuda.mem_get_info()
        needed = 6 * rows * 64 * 4
        if free < needed:
            yield {"kind": "note", "what": f"B·D > 2³¹: needs {needed >> 30} GiB, {free >> 30} are free"}
            return
    x = torch.empty(rows, 64, device=place.device)
    torch.nn.init.normal_(x)
    last = x[-100:].clone()
    with torch.no_grad():
        for what, function in (
            ("layer", functional.lu_dense_and_logabsdet),
            ("inverse", functional.lu_dense_inverse_and_logabsdet),
        ):
            whole = function(x, lu, bias, sign=sign, slopes=FAMILY)
            alone = function(last, lu, bias, sign=sign, slopes=FAMILY)
            for name, big, small in zip(("result", "logabsdet"), whole, alone, strict=True):
                yield from compare(f"{what} of B·D > 2³¹", {name: big[-100:]}, {name: small.double()}, 2e-6)
            del whole, alone
        y = functional.leaky_softplus(x, FAMILY)
        expected = functional.leaky_softplus(last, FAMILY).double()
        yield from compare("φ of B·D > 2³¹", {"y": y[-100:]}, {"y": expected}, 2e-6)
        del y
    tail = x[-100:]
    only = torch.zeros(rows, 1, device=place.device)
    only[-100:] = 1.0
    weight = lu.detach().requires_grad_()
    with torch.enable_grad():
        y = functional.lu_dense(x, weight, bias, sign=sign, slopes=FAMILY)
    big = torch.autograd.grad(y, weight, only.expand(rows, 64))[0]
    del y
    y = functional.lu_dense(tail, weight, bias, sign=sign, slopes=FAMILY)
    small = torch.autograd.grad(y, weight, torch.ones_like(y))[0]
    yield from compare("gradient of B·D > 2³¹", {"lu": big}, {"lu": small.double()}, 2e-6)


#: Each runs in a process of its own, side by side; the slowest first. ``large`` runs alone.
STAGES: dict[str, Stage] = {
    "stack": stack,
    "public functions": public,
    "inverse": inverse,
    "layer": layer,
    "gradient": gradient,
    "LUNet": net,
    "scores": score,
    "graphs and streams": capture,
    "activation": activation,
}
ALONE: dict[str, Stage] = {"more than 2³¹ numbers": large}

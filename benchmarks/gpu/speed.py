"""Times on a GPU beside what PyTorch offers, each contender compared with float64 before it is timed.

A line says what was done, by whom, in what time, and what the task costs at least: its bytes (each input
read once, each output written once) at the bandwidth of a copy, or its flops at the rate of cuBLAS, whichever
takes longer. Both rates are measured in the same run, by ``ceilings``.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.gpu.common import (
    FAMILY,
    LIMITS,
    Packed,
    Place,
    Row,
    Stage,
    matmul_precision,
    normwise,
    packed,
)
from lunet_fast import LeakySoftplus, LUDense, LUNet, cached, functional
from lunet_fast.ops import reference

#: Rows × columns of the largest rows that are timed: 1 GiB in float32.
LARGEST = 2**28

#: Rows up to which a call may take the host longer than the GPU: they are timed as CUDA graphs, whoever
#: computes, and what calls cost the host is a stage of its own, ``launches``.
HOST_BOUND = 4096

ALPHA = FAMILY[0]


class Task(NamedTuple):
    """What is timed: its size, its least bytes and flops, and in which arithmetic the flops are."""

    what: str
    D: int
    B: int
    precision: str
    bytes: int
    flops: int


class Contender(NamedTuple):
    name: str
    run: Callable[[], Any]
    errors: Callable[[Any], float]
    """The worst error of a result over its limit; above 1 it is wrong."""


def timed(place: Place, task: Task, contenders: list[Contender]) -> Iterator[Row]:
    for name, run, errors in contenders:
        row: Row = {"kind": "time", **task._asdict(), "contender": name}
        try:
            error = errors(run())
            row["error / limit"] = error
            row["ms"] = None
            if not error <= 1.0:
                row["wrong"] = True
            elif place.measure and task.B <= HOST_BOUND:
                replay = place.captured(run)
                row |= {"ms": place.milliseconds(replay or run), "graph": replay is not None}
            else:
                row["ms"] = place.milliseconds(run)
        except torch.cuda.OutOfMemoryError:
            row |= {"ms": None, "failed": "out of memory"}
        except Exception as failure:
            row |= {"ms": None, "failed": f"{type(failure).__name__}: {failure}"[:300]}
        yield row
        if place.left() < 0:
            return


def sizes(place: Place, features: tuple[int, ...], rows: tuple[int, ...]) -> list[tuple[int, int]]:
    """(D, B), a B at a time, each B cut so that a tensor of rows has at most LARGEST numbers."""
    pairs = list(dict.fromkeys((D, min(B, LARGEST // D)) for B in rows for D in features))
    return list(place.mine(pairs, [(9, 20)]))


# --- ceilings -------------------------------------------------------------------------------------------


def ceilings(place: Place) -> Iterator[Row]:
    """The rates of a copy and of cuBLAS, and of this project's product and activation beside them."""
    from lunet_fast.kernels import activation
    from lunet_fast.kernels import layer as kernels

    n = place.choose(2**28, 64)
    source, target = place.randn(n), torch.empty(n, device=place.device)
    ms = place.milliseconds(functools.partial(target.copy_, source))
    yield {"kind": "ceiling", "what": "copy", "unit": "GB/s", "rate": ms and 8 * n / ms / 1e6}
    del source, target
    size = place.choose(8192, 8)
    for name, precision, dtype in (
        ("ieee", "highest", torch.float32),
        ("tf32", "high", torch.float32),
        ("bf16", "highest", torch.bfloat16),
    ):
        x, w = place.randn(size, size).to(dtype), place.randn(size, size).to(dtype)
        with matmul_precision(precision):
            ms = place.milliseconds(functools.partial(torch.mm, x, w))
        yield {"kind": "ceiling", "what": name, "unit": "TFLOP/s", "rate": ms and 2 * size**3 / ms / 1e9}
    del x, w

    for D in place.choose((64, 128, 256, 512, 1024), (9,)):
        B = place.choose(65_536, 20)
        x, weight = place.randn(1, B, D), place.randn(1, D, D) / math.sqrt(D)
        flat, square = x[0], weight[0].T.contiguous()
        truth = flat.double() @ square.double()
        for precision in ("ieee", "tf32x3", "tf32"):
            limit = LIMITS[precision]
            ours = functools.partial(
                kernels.layer_forward, x, weight, None, None, logabsdet=False, save=False, precision=precision
            )
            task = Task("product x Wᵀ", D, B, precision, 8 * B * D, 2 * B * D * D)
            contenders = [Contender("ours", ours, lambda r, t=truth, l=limit: normwise(r[0][0], t) / l)]
            if precision != "tf32x3":
                with matmul_precision("highest" if precision == "ieee" else "high"):
                    cublas = functools.partial(torch.mm, flat, square)
                    contenders.append(
                        Contender("cuBLAS", cublas, lambda r, t=truth, l=limit: normwise(r, t) / l)
                    )
                    yield from timed(place, task, contenders)
            else:
                yield from timed(place, task, contenders)
    D, B = place.choose((64, 2**20), (9, 20))
    x = place.randn(B, D)
    for what, function, exact in (
        ("φ with log-det", activation.activation_forward, reference.leaky_softplus_and_logabsdet),
        ("φ⁻¹ with log-det", activation.activation_inverse, reference.leaky_softplus_inverse_and_logabsdet),
    ):
        part = slice(0, 4096)
        truth = exact(x[part].double(), FAMILY)[0]
        task = Task(what, D, B, "highest", 8 * B * D + 4 * B, 0)
        run = functools.partial(function, x, FAMILY, logabsdet=True)
        right = Contender("ours", run, lambda r, t=truth: normwise(r[0][:4096], t) / 2e-5)
        yield from timed(place, task, [right])


# --- what PyTorch offers --------------------------------------------------------------------------------


def two_products(x: Tensor, lu: Tensor, sign: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """The layer with log-determinant as one would write it: x Uᵀ, then Lᵀ."""
    s = lu.diagonal()
    lower = lu.tril(-1) + torch.eye(len(lu), dtype=lu.dtype, device=lu.device)
    upper = lu.triu(1) + torch.diag(sign * s.exp())
    return _activated((x @ upper.T) @ lower.T + bias, s)


def formed(x: Tensor, lu: Tensor, sign: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """The same with W = L U formed first: the fair opponent where there are more rows than columns."""
    s = lu.diagonal()
    lower = lu.tril(-1) + torch.eye(len(lu), dtype=lu.dtype, device=lu.device)
    upper = lu.triu(1) + torch.diag(sign * s.exp())
    return _activated(x @ (lower @ upper).T + bias, s)


def _activated(h: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    y = ALPHA * h + (1.0 - ALPHA) * F.softplus(h)
    return y, s.sum() + torch.log(ALPHA + (1.0 - ALPHA) * torch.sigmoid(h)).sum(-1)


def stacked(
    layer: Callable[..., tuple[Tensor, Tensor]], p: Packed
) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """M layers, the last one linear, by ``layer`` for those with an activation."""
    M = len(p.lu)

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        total = torch.zeros((), device=x.device)
        for m in range(M - 1):
            x, share = layer(x, p.lu[m], p.sign[m], p.bias[m])
            total = total + share
        s = p.lu[-1].diagonal()
        lower = p.lu[-1].tril(-1) + torch.eye(len(s), device=x.device)
        upper = p.lu[-1].triu(1) + torch.diag(p.sign[-1] * s.exp())
        return x @ (lower @ upper).T + p.bias[-1], total + s.sum()

    return run


# --- one layer ------------------------------------------------------------------------------------------


def layer(place: Place) -> Iterator[Row]:
    """A layer with log-determinant against eager PyTorch, torch.compile, and that with W formed."""
    for D, B in sizes(place, (64, 128, 256, 32, 16, 512, 1024), (2**20, 65_536, 1000)):
        for precision in ("highest", "high") if D in (64, 128, 256) else ("highest",):
            if place.left() < 0:
                return
            p = packed(place, D)
            lu, sign, bias = (part[0] for part in p)
            x = place.randn(B, D)
            part = torch.cat([x[:2048], x[-2048:]])
            y64, total64 = reference.lu_dense_and_logabsdet(
                part.double(), lu.double(), bias.double(), sign=sign.double(), slopes=FAMILY
            )

            def errors(
                result: Any, y64: Tensor = y64, total64: Tensor = total64, precision: str = precision
            ) -> float:
                y, total = (torch.cat([r[:2048], r[-2048:]]) for r in result)
                return max(normwise(y, y64), normwise(total, total64)) / LIMITS[precision]

            def ours(x: Tensor = x, lu: Tensor = lu, sign: Tensor = sign, bias: Tensor = bias) -> Any:
                return functional.lu_dense_and_logabsdet(x, lu, bias, sign=sign, slopes=FAMILY)

            arguments = (x, lu, sign, bias)
            task = Task("layer with log-det", D, B, precision, 8 * B * D + 4 * B + 8 * D * D, 2 * B * D * D)
            with matmul_precision(precision), torch.no_grad():
                yield from timed(
                    place,
                    task,
                    [
                        Contender("ours", ours, errors),
                        Contender("eager", functools.partial(two_products, *arguments), errors),
                        Contender(
                            "torch.compile",
                            functools.partial(place.compiled(two_products), *arguments),
                            errors,
                        ),
                        Contender(
                            "torch.compile, W formed",
                            functools.partial(place.compiled(formed), *arguments),
                            errors,
                        ),
                    ],
                )


# --- the whole stack ------------------------------------------------------------------------------------


def stack(place: Place) -> Iterator[Row]:
    """LUNet of 8 layers with log-determinant: as it comes, layer by layer, and PyTorch's ways."""
    M = place.choose(8, 2)
    for D, B in sizes(place, (64, 32, 128, 16), (2**20, 65_536)):
        for precision in ("highest", "high"):
            if place.left() < 0:
                return
            model = LUNet(D, M).to(place.device)
            p = packed(place, D, M, spread=0.1)
            with torch.no_grad():
                for m, one in enumerate(model.layers):
                    one.lu.copy_(p.lu[m])
                    one.bias.copy_(p.bias[m])
                    one.sign.copy_(p.sign[m])
            x = place.randn(B, D)
            y64, total64 = stacked(formed, Packed(*(part.double() for part in p)))(x[:2048].double())

            def errors(
                result: Any, y64: Tensor = y64, total64: Tensor = total64, precision: str = precision
            ) -> float:
                worst = max(normwise(result[0][:2048], y64), normwise(result[1][:2048], total64))
                return worst / (M * LIMITS[precision])

            def one_by_one(x: Tensor = x, model: LUNet = model) -> tuple[Tensor, Tensor]:
                total: Any = 0.0
                for one in model.layers:
                    x, share = one.forward_and_logabsdet(x)
                    total = total + share
                return x, total

            flops = 2 * B * D * D * M
            task = Task(f"stack of {M} with log-det", D, B, precision, 8 * B * D + 4 * B, flops)
            eager, fair = stacked(two_products, p), stacked(formed, p)
            with matmul_precision(precision), torch.no_grad():
                yield from timed(
                    place,
                    task,
                    [
                        Contender("ours", functools.partial(model.forward_and_logabsdet, x), errors),
                        Contender("ours, a launch a layer", one_by_one, errors),
                        Contender("eager", functools.partial(eager, x), errors),
                        Contender("torch.compile", functools.partial(place.compiled(eager), x), errors),
                        Contender(
                            "torch.compile, W formed", functools.partial(place.compiled(fair), x), errors
                        ),
                    ],
                )


# --- the inverse ----------------------------------------------------------------------------------------


def solve(y: Tensor, lu: Tensor, sign: Tensor, bias: Tensor) -> Tensor:
    """U⁻¹ L⁻¹ (y − b) by two triangular solves, in parts: above 524,280 rows CUDA's is known to be wrong."""
    lower, upper = reference.factors(lu, sign)
    parts = []
    for rows in y.split(524_280):
        right = torch.linalg.solve_triangular(lower, (rows - bias).T, upper=False, unitriangular=True)
        parts.append(torch.linalg.solve_triangular(upper, right, upper=True).T)
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def inverse(place: Place) -> Iterator[Row]:
    """The affine inverse against torch.linalg.solve_triangular, substitution against W⁻¹; with φ⁻¹ too."""
    from lunet_fast.kernels import inverse as kernels

    for D, B in sizes(place, (64, 128, 256, 32, 512, 1024, 16), (2**20, 65_536)):
        if place.left() < 0:
            return
        p = packed(place, D)
        lu, sign, bias = (part[0] for part in p)
        y = place.randn(B, D)
        part = y[:2048].double()
        truth = torch.linalg.solve(p.weight()[0], (part - bias.double()).T).T
        limit = 2e-6 * p.condition()
        task = Task("inverse, affine", D, B, "highest", 8 * B * D + 4 * D * D, 2 * B * D * D)

        def errors(result: Any, truth: Tensor = truth, limit: float = limit) -> float:
            return normwise(result[:2048], truth) / limit

        def ours(y: Tensor = y, lu: Tensor = lu, sign: Tensor = sign, bias: Tensor = bias) -> Tensor:
            return functional.lu_dense_inverse(y, lu, bias, sign=sign)

        def launched(explicit: bool, y: Tensor = y, p: Packed = p) -> Tensor:
            prepared = kernels.prepare_inverse(p.lu, p.sign, None, precision="tf32x3")
            return kernels.layer_inverse(
                *(y[None], p.lu, prepared.inverses, p.bias, None),
                permutation=None,
                logabsdet=False,
                save=False,
                precision="tf32x3",
                weight=prepared.weight if explicit else None,
                condition=prepared.condition if explicit else None,
            )[0][0]

        peers = [
            Contender("ours", ours, errors),
            Contender("torch.linalg.solve_triangular", functools.partial(solve, y, lu, sign, bias), errors),
            Contender("ours, substitution", functools.partial(launched, False), errors),
            Contender("ours, W⁻¹ where the table has it", functools.partial(launched, True), errors),
        ]
        with torch.no_grad():
            yield from timed(place, task, peers)
            x64, total64 = reference.lu_dense_inverse_and_logabsdet(
                part, lu.double(), bias.double(), sign=sign.double(), slopes=FAMILY
            )
            ratio = (FAMILY[0] + FAMILY[1]) / FAMILY[0]

            def both(
                result: Any, x64: Tensor = x64, total64: Tensor = total64, limit: float = ratio * limit
            ) -> float:
                return max(normwise(result[0][:2048], x64), normwise(result[1][:2048], total64)) / limit

            def full(y: Tensor = y, lu: Tensor = lu, sign: Tensor = sign, bias: Tensor = bias) -> Any:
                return functional.lu_dense_inverse_and_logabsdet(y, lu, bias, sign=sign, slopes=FAMILY)

            def forward(y: Tensor = y, lu: Tensor = lu, sign: Tensor = sign, bias: Tensor = bias) -> Any:
                return functional.lu_dense_and_logabsdet(y, lu, bias, sign=sign, slopes=FAMILY)

            task = task._replace(what="inverse with log-det", bytes=task.bytes + 4 * B)
            yield from timed(
                place,
                task,
                [Contender("ours", full, both), Contender("its own forward", forward, lambda r: 0.0)],
            )


# --- training -------------------------------------------------------------------------------------------


def _gradients(module: Callable[[Tensor], Tensor], leaves: list[Tensor], g: Tensor) -> tuple[Tensor, ...]:
    """One step: forward, and back to x and the parameters."""
    return torch.autograd.grad(module(leaves[0]), leaves, g)


def training(place: Place) -> Iterator[Row]:
    """Forward and backward of LUDense with its activation against nn.Linear and softplus; ways backward."""
    for D, B in sizes(place, (64, 128, 256, 32, 512, 1024, 16), (2**20, 65_536, 1000)):
        for precision in ("highest", "high"):
            if place.left() < 0:
                return
            ours = LUDense(D, activation=LeakySoftplus(ALPHA)).to(place.device)
            p = packed(place, D)
            with torch.no_grad():
                ours.lu.copy_(p.lu[0])
            peer = nn.Sequential(nn.Linear(D, D), nn.Softplus()).to(place.device)
            x = place.randn(B, D).requires_grad_()
            g = place.randn(B, D)

            # The gradient of a row's x is that row's alone; that of lu is a sum over all rows.
            wide = LUDense(D, activation=LeakySoftplus(ALPHA)).to(place.device).double()
            wide.load_state_dict({name: value.double() for name, value in ours.state_dict().items()})
            rows = x[:2048].detach().double().requires_grad_()
            truth = torch.autograd.grad(wide(rows), rows, g[:2048].double())[0]

            def errors(result: Any, truth: Tensor = truth, precision: str = precision) -> float:
                if not all(bool(one.isfinite().all()) for one in result):
                    return math.inf
                return normwise(result[0][:2048], truth) / LIMITS[precision]

            own, others = [x, *ours.parameters()], [x, *peer.parameters()]
            task = Task("forward + backward", D, B, precision, 20 * B * D, 6 * B * D * D)
            with matmul_precision(precision):
                yield from timed(
                    place,
                    task,
                    [
                        Contender("ours", functools.partial(_gradients, ours, own, g), errors),
                        Contender(
                            "nn.Linear + softplus, torch.compile",
                            functools.partial(_gradients, place.compiled(peer), others, g),
                            lambda r: 0.0,
                        ),
                        Contender(
                            "nn.Linear + softplus",
                            functools.partial(_gradients, peer, others, g),
                            lambda r: 0.0,
                        ),
                    ],
                )
            yield from _ways_backward(place, D, B, precision)


def _ways_backward(place: Place, D: int, B: int, precision: str) -> Iterator[Row]:
    """The layer's gradient with h computed again, and with h saved."""
    from lunet_fast.kernels import gradient, tiles

    if not tiles.recomputes(D):
        return
    x, g = place.randn(1, B, D), place.randn(1, B, D)
    weight, bias = place.randn(1, D, D) / math.sqrt(D), torch.zeros(1, D, device=place.device)
    h = torch.cat([(rows.double() @ weight[0].double().T).float() for rows in x[0].split(65_536)])[None]
    slope = FAMILY[0] + FAMILY[1] * torch.sigmoid(h[0, :2048].double())
    truth = (g[0, :2048].double() * slope) @ weight[0].double()
    arithmetic = "tf32x3" if precision == "highest" else "tf32"

    def run(h: Tensor | None) -> Any:
        return gradient.layer_backward(
            *(g, None, x, h, weight, bias, FAMILY),
            needs_x=True,
            needs_weight=True,
            needs_bias=True,
            precision=arithmetic,
        )

    def errors(result: Any) -> float:
        return normwise(result[0][0, :2048], truth) / (2 * LIMITS[precision])

    task = Task("backward of a layer", D, B, precision, 12 * B * D, 6 * B * D * D)
    ways = [("ours", None), ("ours, h saved", h)]
    yield from timed(
        place, task, [Contender(name, functools.partial(run, kept), errors) for name, kept in ways]
    )


# --- small batches --------------------------------------------------------------------------------------


def launches(place: Place) -> Iterator[Row]:
    """What a call costs at B = 1000, where the host is the limit: eager, and as a replayed CUDA graph, which
    the host takes no part in; ours, within ``cached`` too, and as many layers of nn.Linear and softplus."""
    D, B = place.choose((64, 1000), (9, 20))
    M = place.choose(8, 2)
    model = LUNet(D, M).to(place.device)
    dense = [layer for _ in range(M) for layer in (nn.Linear(D, D), nn.Softplus())]
    peer = nn.Sequential(*dense[:-1]).to(place.device)
    x = place.randn(B, D)
    upstream = place.randn(B, D)

    def without_gradients(call: Callable[[Tensor], Any]) -> Callable[[], Any]:
        def run() -> Any:
            with torch.no_grad():
                return call(x)

        return run

    def train(net: nn.Module) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(net(x), list(net.parameters()), upstream)

    one = LUDense(D, activation=LeakySoftplus(ALPHA)).to(place.device)
    linear = "nn.Linear + softplus"
    for what, ours, theirs in (("LUNet", model, peer), ("one layer", one, peer[:2])):
        runs = {"ours": without_gradients(ours.forward), linear: without_gradients(theirs)}
        yield from _host_times(place, f"{what} forward", D, B, runs)
        yield from _host_times(place, f"{what} inverse", D, B, {"ours": without_gradients(ours.inverse)})
        yield from _host_times(
            place, f"{what} forward + backward", D, B, {"ours": train(ours), linear: train(theirs)}
        )
        with cached(ours):
            for way in ("forward", "inverse"):
                runs = {"ours, within cached": without_gradients(getattr(ours, way))}
                yield from _host_times(place, f"{what} {way}", D, B, runs)


def _host_times(place: Place, what: str, D: int, B: int, runs: dict[str, Callable[[], Any]]) -> Iterator[Row]:
    for contender, run in runs.items():
        replay = place.captured(run)
        task = Task(f"{what}, host's time", D, B, "highest", 0, 0)
        row: Row = {"kind": "time", **task._asdict()}
        yield row | {"contender": contender, "ms": _wall(place, run)}
        if place.is_gpu:
            ms = None if replay is None else _wall(place, replay)
            yield row | {"contender": f"{contender}, CUDA graph", "ms": ms, "graph": replay is not None}


def _wall(place: Place, run: Callable[[], Any]) -> float | None:
    """Milliseconds a call by the clock, of many calls in a row."""
    count = 200 if place.measure else 1
    for _ in range(3 if place.measure else 0):
        run()
    if place.is_gpu:
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(count):
        run()
    if place.is_gpu:
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start) / count if place.measure else None


#: In order of importance, with the share of the time that each may take.
STAGES: dict[str, tuple[Stage, float]] = {
    "ceilings": (ceilings, 1.0),
    "layer": (layer, 4.0),
    "stack": (stack, 3.0),
    "inverse": (inverse, 2.5),
    "training": (training, 3.5),
    "launches": (launches, 0.5),
}


class Target(NamedTuple):
    """What the kernels are to reach: ``contender`` takes at least ``factor`` times as long as ours."""

    what: str
    contender: str
    factor: float
    largest: int


TARGETS = (
    Target("layer with log-det", "eager", 5.0, 256),
    Target("layer with log-det", "torch.compile, W formed", 1.3, 256),
    Target("stack of 8 with log-det", "torch.compile", 4.0, 64),
    Target("stack of 8 with log-det", "eager", 20.0, 64),
    Target("inverse, affine", "torch.linalg.solve_triangular", 5.0, 256),
    Target("inverse, affine", "torch.linalg.solve_triangular", 1.0, 2048),
    Target("forward + backward", "nn.Linear + softplus, torch.compile", 1.0, 2048),
)

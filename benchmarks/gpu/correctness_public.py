"""The public functions against float64, LUNet, CUDA graphs and streams, and more numbers than 2³¹."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

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
from benchmarks.gpu.correctness import RATIO, gradients, named
from lunet_fast import (
    GeneralizedLeakySoftplus,
    LeakySoftplus,
    LUNet,
    MonotoneSpline,
    cached,
    functional,
)
from lunet_fast.ops import reference


def _with_sign(function: Callable[..., Any], sign: Tensor) -> Callable[..., tuple[Tensor, Tensor]]:
    """The function of what it is differentiated by: (x, lu, bias, slopes)."""
    return lambda x, lu, bias, slopes: function(x, lu, bias, sign=sign, slopes=slopes)


def public(place: Place) -> Iterator[Row]:
    """The layer's four functions and their gradients in every precision; many rows and few; bfloat16."""
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
            kappa = Packed(*(part[None] for part in p)).condition() * RATIO
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
                    results = named(("result", "logabsdet"), _with_sign(ours, p.sign)(*leaves))
                    found = gradients(_with_sign(ours, p.sign), leaves, [g, ld])
                truth_call = _with_sign(plain, p.sign.double())
                truth = named(("result", "logabsdet"), truth_call(*wide))
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


#: Nets other than those that ``net`` checks: what makes them, and the dtype of their rows.
KINDS: dict[str, tuple[Callable[[int], dict[str, Any]], torch.dtype]] = {
    "learnt slopes": (lambda D: {"activation": LeakySoftplus(0.2, learnable=True)}, torch.float32),
    "learnt slopes [3, D]": (
        lambda D: {"activation": GeneralizedLeakySoftplus(1.5, 0.3, learnable=True, features=D)},
        torch.float32,
    ),
    "splines": (lambda D: {"activation": MonotoneSpline(D, 6)}, torch.float32),
    "permutations and signs": (lambda D: {"permutation": "random", "signs": "random"}, torch.float32),
    "bfloat16": (lambda D: {}, torch.bfloat16),
}


def kinds_of_nets(place: Place) -> Iterator[Row]:
    """Both directions of nets of other kinds, with all gradients, and without gradients, twice, within
    ``cached`` and outside; and K stacked layers."""
    full = [(kind, D) for kind in KINDS for D in (16, 64, 100)]
    for kind, D in place.mine(full, [(kind, 5) for kind in KINDS]):
        yield from _kind_of_net(place, kind, D)
    for D in place.mine((64, 200), (5,)):
        yield from _stacked_layers(place, D)


def _kind_of_net(place: Place, kind: str, D: int) -> Iterator[Row]:
    make, dtype = KINDS[kind]
    torch.manual_seed(0)
    M = place.choose(4, 2)
    model = LUNet(D, M, **make(D)).to(place.device)
    with torch.no_grad():
        for one in model.parameters():
            one.add_(0.05 * torch.randn_like(one) / max(1, one.shape[-1]) ** 0.5)
    x = place.randn(place.choose(5003, 12), D).to(dtype)
    lost = 10.0 ** min(3.0, model.condition(x[:1000].float()).digits_lost)
    wide, model, low = copy.deepcopy(model).double(), model.to(dtype), dtype == torch.bfloat16
    names = ("result", "logabsdet", "grad x", "grad parameters")
    for method, limit in (
        ("forward_and_logabsdet", LIMITS["bf16" if low else "highest"] * 2 * M),
        ("inverse_and_logabsdet", 2e-6 * M * lost + (LIMITS["bf16"] * 2 * M if low else 0.0)),
    ):
        found = _with_gradients(model, method, x)
        truth = _with_gradients(wide, method, x.double())
        what = f"net with {kind} D={D} {method.partition('_')[0]}"
        # Sums over rows, of which some cancel.
        for name, mine, true in zip(names, found, truth, strict=True):
            yield from compare(what, {name: mine}, {name: true}, limit * (10 if "param" in name else 1))
        with torch.no_grad():
            plain = [getattr(model, method)(x) for _ in range(2)]
            with cached(model):
                kept = [getattr(model, method)(x) for _ in range(2)]
        for way, pairs in (("without gradients", plain), ("within cached", kept)):
            for results in pairs:
                shown = dict(zip(names[:2], results, strict=True))
                yield from compare(f"{what}, {way}", shown, dict(zip(names, truth[:2], strict=False)), limit)


def _with_gradients(model: Any, method: str, x: Tensor) -> list[Tensor]:
    """Both results, the gradient of x, and those of all parameters, one after the other."""
    x = x.detach().requires_grad_()
    y, total = getattr(model, method)(x)
    parameters = list(model.parameters())
    by_x, *others = torch.autograd.grad(y.double().sin().sum() + total.double().sum(), [x, *parameters])
    return [y.detach(), total.detach(), by_x, torch.cat([one.flatten() for one in others])]


def _stacked_layers(place: Place, D: int) -> Iterator[Row]:
    K, p = 3, packed(place, D, 3)
    x, slopes = place.randn(K, place.choose(5003, 7), D), torch.tensor(FAMILY, device=place.device)
    leaves = [x, p.lu, p.bias, slopes]
    g, ld = place.randn(*x.shape), place.randn(*x.shape[:2])
    names = ("result", "logabsdet", "grad x", "grad lu", "grad bias", "grad slopes")
    for what, ours, plain, limit in (
        ("layers", functional.lu_dense_and_logabsdet, reference.lu_dense_and_logabsdet, 2e-6),
        (
            *("inverse layers", functional.lu_dense_inverse_and_logabsdet),
            *(reference.lu_dense_inverse_and_logabsdet, 2e-6 * p.condition() * RATIO),
        ),
    ):

        def one_by_one(x: Tensor, lu: Tensor, bias: Tensor, slopes: Tensor, plain: Any = plain) -> Any:
            members = [plain(x[k], lu[k], bias[k], sign=p.sign[k].double(), slopes=slopes) for k in range(K)]
            return tuple(map(torch.stack, zip(*members, strict=True)))

        doubles = [leaf.double() for leaf in leaves]
        found = [*_with_sign(ours, p.sign)(*leaves), *gradients(_with_sign(ours, p.sign), leaves, [g, ld])]
        truth = [*one_by_one(*doubles), *gradients(one_by_one, doubles, [g.double(), ld.double()])]
        for name, mine, true in zip(names, found, truth, strict=True):
            loose = 10.0 if name == "grad slopes" else 2.0 if "grad" in name else 1.0
            yield from compare(f"{K} stacked {what} D={D}", {name: mine}, {name: true}, loose * limit)


def capture(place: Place) -> Iterator[Row]:
    """CUDA graphs of a step forward, back and inverse, replayed on new data; four streams at once."""
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


#: ``large`` runs alone, the others side by side.
STAGES: dict[str, Stage] = {
    "public functions": public,
    "LUNet": net,
    "kinds of nets": kinds_of_nets,
    "graphs and streams": capture,
}
ALONE: dict[str, Stage] = {"more than 2³¹ numbers": large}

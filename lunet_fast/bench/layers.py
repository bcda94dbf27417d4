"""Suite ``layers``: one layer forward, trained, inverted and its log-determinant, beside what others offer.

``forward`` and ``forward + backward`` have an activation; ``inverse, linear part`` has none, since only we
and the original LU-Net invert one; ``inverse`` is A⁻¹ (φ⁻¹(y) − b), beside our own forward;
``log-determinant`` is log|det A| of the matrix, once and not for each row.

Work that cannot be avoided, for B rows: 2·B·D² flops forward and inverse, 6·B·D² with the backward; each
operand and result moved once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from lunet_fast.bench.contenders import CONTENDERS, Compiled, Contender, Problem, Unavailable, make
from lunet_fast.bench.contest import OURS, Contest, Run, Spec
from lunet_fast.bench.machine import relative_error

SUITE = "layers"

FEATURES = (16, 64, 256, 784, 1024)
ROWS = (1, 128, 8192, 65_536)

#: Numbers in a batch at most: of 65,536 rows of 784 nothing but the time differs from 8192 of them.
LARGEST_BATCH = 1 << 25

#: Relative error against float64 that is let through.
TOLERANCE = {
    torch.float32: {"forward": 1e-5, "inverse": 1e-4},
    torch.bfloat16: {"forward": 3e-2, "inverse": 5e-2},
}

#: Rows that are compared with float64.
CHECKED_ROWS = 256

#: Bytes of temporaries that a contender may want before it is left out.
MEMORY_LIMIT = 4e9

OPERATIONS = ("forward", "forward + backward", "inverse, linear part", "inverse", "log-determinant")


def specs(scale: str) -> list[Spec]:
    """What is compared: everything for "all", the sizes of the README's claims for "quick"."""
    if scale == "all":
        sizes = [(D, B) for D in FEATURES for B in ROWS if D * B <= LARGEST_BATCH]
    else:
        sizes = [(64, 8192), (256, 8192), (784, 8192), (1024, 1)]
    found = []
    for D, B in sizes:
        for what in OPERATIONS:
            if what != "log-determinant":
                found.append(Spec(SUITE, what, D, B))
            elif (D, 1) not in {(s.features, s.rows) for s in found if s.what == what}:
                found.append(Spec(SUITE, what, D, 1))
    return found


def build(
    spec: Spec,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    kinds: Sequence[type[Contender]] = CONTENDERS,
) -> Contest:
    """The contest of one spec; every contender has been run once and its error is known."""
    problem = Problem.draw(spec.features, device, dtype)
    contenders, missing = make(problem, kinds)
    runs: dict[str, Run] = {}
    errors: dict[str, float] = {}
    parameters = {}
    for contender in contenders:
        try:
            name, run, error = _BUILDERS[spec.what](contender, problem, spec)
        except Unavailable as reason:
            missing[contender.name] = str(reason)
            continue
        if run is None:
            continue
        runs[name], errors[name] = run, error()
        parameters[name] = sum(p.numel() for p in contender.parameters)
        if spec.what == "inverse" and contender.name == OURS:
            forward = _BUILDERS["forward"](contender, problem, spec)
            runs["its own forward"], errors["its own forward"] = forward[1], forward[2]()
    D, B, size = spec.features, spec.rows, torch.finfo(dtype).bits // 8
    products = {"forward": 2.0, "forward + backward": 6.0, "inverse": 2.0, "inverse, linear part": 2.0}.get(
        spec.what, 0.0
    )
    moved = {
        "forward + backward": 5.0 * B * D + 2.0 * D * D,
        "log-determinant": float(D),
        "φ and its log-determinant": 2.0 * B * D + B,
    }
    return Contest(
        spec,
        runs,
        errors,
        tolerance=TOLERANCE[dtype]["forward" if spec.what.startswith("forward") else "inverse"],
        flops=products * B * D * D,
        bytes_moved=size * moved.get(spec.what, 2.0 * B * D + D * D),
        missing=missing,
        parameters=parameters,
    )


_Built = tuple[str, Any, Callable[[], float]]


def _rows(problem: Problem, rows: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(rows, problem.features, generator=generator).to(problem.device, problem.dtype)


def _affine(problem: Problem, x: Tensor) -> Tensor:
    """A x + b in float64 for the rows that are compared."""
    return x[:CHECKED_ROWS].double().cpu() @ (problem.weight).T + problem.bias


def _error(found: Tensor, truth: Tensor) -> float:
    return relative_error(found.detach()[:CHECKED_ROWS].cpu(), truth)


def _no_grad(run: Run) -> Run:
    return torch.no_grad()(run)


def _forward(contender: Contender, problem: Problem, spec: Spec) -> _Built:
    forward = contender.forward
    x = _rows(problem, spec.rows)
    if forward is None:
        return contender.name, None, lambda: 0.0
    run = _no_grad(lambda: forward(x))
    truth = contender.activation(_affine(problem, x))
    return contender.with_activation, run, lambda: _error(run(), truth)  # type: ignore[arg-type]


def _forward_and_backward(contender: Contender, problem: Problem, spec: Spec) -> _Built:
    forward = contender.forward
    if forward is None:
        return contender.name, None, lambda: 0.0
    x = _rows(problem, spec.rows).requires_grad_()
    upstream = _rows(problem, spec.rows).flip(0)

    def run() -> None:
        x.grad = None
        for parameter in contender.parameters:
            parameter.grad = None
        forward(x).backward(upstream)

    def error() -> float:
        run()
        h = _affine(problem, x.detach()).requires_grad_()
        (grad_h,) = torch.autograd.grad(contender.activation(h), h, upstream[:CHECKED_ROWS].double().cpu())
        assert x.grad is not None
        return _error(x.grad, grad_h @ (problem.weight))

    return contender.with_activation, run, error


def _linear_inverse(contender: Contender, problem: Problem, spec: Spec) -> _Built:
    if contender.name.startswith("zuko") and 4.0 * spec.rows * spec.features**2 > MEMORY_LIMIT:
        raise Unavailable("its inverse copies the matrix for every row, more than 4 GB here")
    return _inverted(contender.name, contender.inverse, lambda h: h, problem, spec)


def _inverse(contender: Contender, problem: Problem, spec: Spec) -> _Built:
    return _inverted(contender.name, contender.active_inverse, contender.activation, problem, spec)


def _inverted(
    name: str,
    inverse: Callable[[Tensor], Tensor] | None,
    activation: Callable[[Tensor], Tensor],
    problem: Problem,
    spec: Spec,
) -> _Built:
    """``inverse`` of y = activation(A x + b), made in float64."""
    if inverse is None:
        return name, None, lambda: 0.0
    x = _rows(problem, spec.rows)
    y = activation(x.double().cpu() @ problem.weight.T + problem.bias).to(x)
    run = _no_grad(lambda: inverse(y))
    return name, run, lambda: _error(run(), x[:CHECKED_ROWS].cpu())  # type: ignore[arg-type]


def _logabsdet(contender: Contender, problem: Problem, spec: Spec) -> _Built:
    logabsdet = contender.logabsdet
    if logabsdet is None:
        return contender.name, None, lambda: 0.0
    run = _no_grad(logabsdet)

    def error() -> float:
        # Relative to the sum of magnitudes: the sum itself may be anywhere near zero.
        gap = float(logabsdet().detach()) - float(problem.log_diagonal.sum())
        return abs(gap) / float(problem.log_diagonal.abs().sum())

    return contender.name, run, error


def _activation(contender: Contender, problem: Problem, spec: Spec) -> _Built:
    both = contender.activation_and_logabsdet
    if both is None:
        return contender.name, None, lambda: 0.0
    h = _rows(problem, spec.rows)
    run = _no_grad(lambda: both(h))

    def error() -> float:
        wide = h[:CHECKED_ROWS].double().cpu().requires_grad_()
        y = contender.activation(wide)
        truth = torch.autograd.grad(y.sum(), wide)[0].log().sum(-1)
        found, logabsdet = both(h)
        return max(_error(found, y.detach()), _error(logabsdet, truth))

    return contender.name, run, error


_BUILDERS = {
    "forward": _forward,
    "forward + backward": _forward_and_backward,
    "inverse, linear part": _linear_inverse,
    "inverse": _inverse,
    "log-determinant": _logabsdet,
    "φ and its log-determinant": _activation,
}


def contests(
    specs: Sequence[Spec], scale: str, device: torch.device, dtype: torch.dtype
) -> Iterator[Contest]:
    """The contests of ``specs``, each built when it is its turn; torch.compile, which compiles anew for each
    size, in scale "all" alone."""
    kinds = [kind for kind in CONTENDERS if scale == "all" or kind is not Compiled]
    for spec in specs:
        yield build(spec, device, dtype, kinds)

"""Suite ``stacks``: M layers as a normalising flow: log_prob, sample and a training step, beside other flows.

``nflows`` is the flow with the same layers as ours: LULinear and LeakyReLU M times. ``zuko RealNVP`` has M
coupling layers and as many parameters as ours, ``zuko MAF`` M autoregressive ones and as many parameters.
``original LU-Net's way`` is in ``contenders.py`` for one layer. What each reaches on data is another
matter: these are times at equal depth and size.

Work that cannot be avoided is that of our own matrix products, 2·M·B·D² flops a pass and 6·M·B·D² with the
backward: other flows have other work, so their distance from this floor says how they compare, not how well
they are written.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lunet_fast import LeakySoftplus, LUDense, LUFlow, LUNet
from lunet_fast.bench.contenders import InverseTable, Unavailable, leaky, require
from lunet_fast.bench.contest import Contest, Run, Spec
from lunet_fast.bench.machine import relative_error
from lunet_fast.ops import reference
from lunet_fast.ops.values import Activation

SUITE = "stacks"

OURS = "LUFlow"

#: Slope of every leaky activation on the far left. With 0.1, eight layers of ours, nflows or the original
#: lose the digits of samples in float32: each may take one.
ALPHA = 0.5

OPERATIONS = ("log_prob", "sample", "training step")

#: (D, M, B).
QUICK = ((64, 4, 256),)
ALL = (
    *((64, M, B) for M in (2, 4, 8) for B in (256, 8192)),
    (256, 4, 256),
    (784, 4, 256),
)

#: Relative error against float64 of log_prob, and of the round trip behind samples.
TOLERANCE = 1e-3


class Flow(nn.Module):
    """A flow: x ↦ (z, log|det ∂z/∂x|), its inverse, and the standard normal density of z."""

    name: str

    def transform(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(z [N, D], log-determinant [N])."""
        raise NotImplementedError

    def inverse(self, z: Tensor) -> Tensor:
        """x [N, D]."""
        raise NotImplementedError

    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x) [N]."""
        z, logabsdet = self.transform(x)
        return logabsdet - 0.5 * (z.square().sum(-1) + z.shape[-1] * math.log(2.0 * math.pi))

    def sample(self, like: Tensor) -> Tensor:
        """As many draws as ``like`` has rows."""
        return self.inverse(torch.randn_like(like))


class Ours(Flow):
    name = OURS

    def __init__(self, features: int, layers: int) -> None:
        super().__init__()
        self.flow = LUFlow(LUNet(features, layers, LeakySoftplus(ALPHA)))

    def transform(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.flow.net.forward_and_logabsdet(x)

    def inverse(self, z: Tensor) -> Tensor:
        return self.flow.net.inverse(z)

    def log_prob(self, x: Tensor) -> Tensor:
        return self.flow.log_prob(x)

    def sample(self, like: Tensor) -> Tensor:
        return self.flow.sample((len(like),))


class _Plain(Ours):
    """Ours by the formulas of ``reference.py``: what ours is checked with."""

    def transform(self, x: Tensor) -> tuple[Tensor, Tensor]:
        total = x.new_zeros(len(x))
        for layer in cast("list[LUDense]", list(self.flow.net.layers)):
            phi = cast(Activation, layer._fused())
            x, share = reference.layer(x, layer._matrix(), phi, inverse=False, logabsdet=True)
            total = total + cast(Tensor, share)
        return x, total

    def log_prob(self, x: Tensor) -> Tensor:
        return Flow.log_prob(self, x)


class Nflows(Flow):
    name = "nflows LULinear, LeakyReLU"

    def __init__(self, features: int, layers: int) -> None:
        super().__init__()
        require("nflows")
        from nflows.transforms import CompositeTransform, LeakyReLU
        from nflows.transforms.lu import LULinear

        parts: list[nn.Module] = []
        for m in range(layers):
            linear = LULinear(features)
            with torch.no_grad():
                for entries in (linear.lower_entries, linear.upper_entries):
                    entries.normal_(0.0, 0.2 / math.sqrt(features))
            parts += [linear] if m == layers - 1 else [linear, LeakyReLU(ALPHA)]
        self.net = CompositeTransform(parts)

    def transform(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.net(x)

    def inverse(self, z: Tensor) -> Tensor:
        return self.net.inverse(z)[0]


class _Zuko(Flow):
    """A flow of zuko's with the hidden width that brings it nearest to ``parameters`` numbers."""

    def __init__(self, features: int, layers: int) -> None:
        super().__init__()
        require("zuko")
        wanted = layers * (features * features + features)
        low, high = 1, 8 * features
        while low < high:
            middle = (low + high) // 2
            if _count(self.make(features, layers, middle)) < wanted:
                low = middle + 1
            else:
                high = middle
        self.net = self.make(features, layers, low)

    def make(self, features: int, layers: int, hidden: int) -> Any:
        raise NotImplementedError

    def transform(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.net().transform.call_and_ladj(x)

    def inverse(self, z: Tensor) -> Tensor:
        return self.net().transform.inv(z)


class RealNVP(_Zuko):
    name = "zuko RealNVP"

    def make(self, features: int, layers: int, hidden: int) -> Any:
        from zuko.flows import RealNVP as Made

        return Made(features, transforms=layers, hidden_features=(hidden,))


class MAF(_Zuko):
    name = "zuko MAF"

    def make(self, features: int, layers: int, hidden: int) -> Any:
        from zuko.flows import MAF as Made

        return Made(features, transforms=layers, hidden_features=(hidden,))


class Original(Flow):
    """Dense L and U with masked gradients, two products a layer; general solves and a table back."""

    name = "original LU-Net's way"

    def __init__(self, features: int, layers: int) -> None:
        super().__init__()
        self.lower, self.upper, self.bias = (nn.ParameterList() for _ in range(3))
        for _ in range(layers):
            off = torch.randn(features, features) * 0.2 / math.sqrt(features)
            lower = nn.Parameter(off.tril(-1) + torch.eye(features))
            upper = nn.Parameter(off.triu(1) + torch.eye(features))
            mask = torch.ones_like(off)
            lower.register_hook(lambda grad, mask=mask: grad * mask.to(grad).tril(-1))
            upper.register_hook(lambda grad, mask=mask: grad * mask.to(grad).triu())
            self.lower.append(lower)
            self.upper.append(upper)
            self.bias.append(nn.Parameter(torch.zeros(features)))
        self.table: InverseTable | None = None

    def transform(self, x: Tensor) -> tuple[Tensor, Tensor]:
        total = x.new_zeros(len(x))
        last = len(self.lower) - 1
        for m, (lower, upper, bias) in enumerate(zip(self.lower, self.upper, self.bias, strict=True)):
            x = F.linear(F.linear(x, upper), lower, bias)
            total = total + upper.diagonal().abs().log().sum()
            if m < last:
                total = total + (ALPHA + (1.0 - ALPHA) * torch.sigmoid(x)).log().sum(-1)
                x = leaky(x, ALPHA)
        return x, total

    def inverse(self, z: Tensor) -> Tensor:
        if self.table is None:
            self.table = InverseTable(z.device, ALPHA)
        for m in reversed(range(len(self.lower))):
            if m < len(self.lower) - 1:
                z = self.table(z)
            z = torch.linalg.solve(self.upper[m], torch.linalg.solve(self.lower[m], (z - self.bias[m]).T)).T
        return z


FLOWS: tuple[type[Flow], ...] = (Ours, Nflows, RealNVP, MAF, Original)


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def specs(scale: str) -> list[Spec]:
    """log_prob, sample and a training step at each size."""
    sizes: Sequence[tuple[int, int, int]] = ALL if scale == "all" else QUICK
    return [Spec(SUITE, what, D, B, f"M = {M}") for D, M, B in sizes for what in OPERATIONS]


def build(spec: Spec, device: torch.device, dtype: torch.dtype = torch.float32) -> Contest:
    """The contest of one spec; the flows have the same weights in each of its contests."""
    layers = int(spec.detail.removeprefix("M = "))
    x = torch.randn(spec.rows, spec.features).to(device, dtype)
    runs: dict[str, Run] = {}
    errors: dict[str, float] = {}
    missing: dict[str, str] = {}
    parameters: dict[str, int] = {}
    for kind in FLOWS:
        try:
            with torch.random.fork_rng():
                torch.manual_seed(0)
                flow = kind(spec.features, layers).to(device, dtype)  # type: ignore[call-arg]
        except Unavailable as reason:
            missing[kind.name] = str(reason)
            continue
        runs[kind.name] = _BUILDERS[spec.what](flow, x)
        errors[kind.name] = _error(flow, x, samples=spec.what == "sample")
        parameters[kind.name] = _count(flow)
    D, B, size = spec.features, spec.rows, torch.finfo(dtype).bits // 8
    passes = 6.0 if spec.what == "training step" else 2.0
    return Contest(
        spec,
        runs,
        errors,
        tolerance=TOLERANCE,
        flops=passes * layers * B * D * D,
        bytes_moved=size * (passes * B * D + passes / 2 * layers * D * D),
        ours=OURS,
        missing=missing,
        parameters=parameters,
    )


def _error(flow: Flow, x: Tensor, *, samples: bool) -> float:
    """Of log_prob against float64, and for samples that of z against the z that x = f⁻¹(z) goes back to."""
    wide = copy.deepcopy(flow).double()
    if isinstance(wide, Ours):
        wide.__class__ = _Plain
    x = x[:256]
    with torch.no_grad():
        if samples:
            return relative_error(wide.transform(flow.inverse(x).double())[0], x)
        return relative_error(flow.log_prob(x), wide.log_prob(x.double()))


def _log_prob(flow: Flow, x: Tensor) -> Run:
    return torch.no_grad()(lambda: flow.log_prob(x))


def _sample(flow: Flow, x: Tensor) -> Run:
    return torch.no_grad()(lambda: flow.sample(x))


def _training_step(flow: Flow, x: Tensor) -> Run:
    """Forward, backward and Adam's step, of no size: the weights stay those that were checked."""
    optimizer = torch.optim.Adam(flow.parameters(), lr=0.0)

    def step() -> None:
        optimizer.zero_grad()
        flow.log_prob(x).mean().neg().backward()
        optimizer.step()

    return step


_BUILDERS: dict[str, Callable[[Flow, Tensor], Run]] = {
    "log_prob": _log_prob,
    "sample": _sample,
    "training step": _training_step,
}


def contests(
    specs: Sequence[Spec], scale: str, device: torch.device, dtype: torch.dtype
) -> Iterator[Contest]:
    """The contests of ``specs``, each built when it is its turn."""
    for spec in specs:
        yield build(spec, device, dtype)

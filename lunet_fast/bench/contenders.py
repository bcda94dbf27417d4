"""Ways to compute a dense invertible layer: ours, plain PyTorch, flow libraries', the original LU-Net's.

All hold one and the same matrix A = L U and bias, drawn by ``Problem``, so that one float64 truth checks
every one of them. ``softplus`` stands for the activation of those that bring no invertible one; it costs
less than LeakySoftplus, which gives them the advantage.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lunet_fast import LeakySoftplus, LUDense
from lunet_fast.bench.contest import OURS

ALPHA = 0.1


class Unavailable(Exception):
    """A contender cannot take part here; the message says why."""


@dataclass(frozen=True)
class Problem:
    """L [D, D] with unit diagonal, U [D, D] and its log-diagonal, b [D], all float64 on the CPU.

    The off-diagonals have a trained layer's size: κ₁ of L and U is about 4 each for every D.
    """

    lower: Tensor
    upper: Tensor
    log_diagonal: Tensor
    bias: Tensor
    device: torch.device
    dtype: torch.dtype

    @classmethod
    def draw(cls, features: int, device: torch.device, dtype: torch.dtype, seed: int = 0) -> Problem:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            # In float32 first: every contender then holds exactly these numbers.
            return torch.randn(*shape, generator=generator).double()

        off = (normal(features, features) * 0.2 / math.sqrt(features)).float().double()
        logs = (normal(features) * 0.1).float().double()
        lower = off.tril(-1) + torch.eye(features, dtype=torch.float64)
        upper = off.triu(1) + torch.diag(logs.exp())
        return cls(lower, upper, logs, 0.1 * normal(features), device, dtype)

    @property
    def features(self) -> int:
        return self.bias.shape[0]

    @functools.cached_property
    def weight(self) -> Tensor:
        """A = L U."""
        return self.lower @ self.upper

    @property
    def packed(self) -> Tensor:
        """L, U and log u_ii in one matrix, as ``LUDense`` stores them."""
        return self.lower.tril(-1) + self.upper.triu(1) + torch.diag(self.log_diagonal)

    def to(self, t: Tensor) -> Tensor:
        return t.to(device=self.device, dtype=self.dtype, copy=True).contiguous()


class Contender:
    """What a layer offers; ``None`` in place of a method means that there is no such thing in it."""

    name: str

    #: x ↦ φ(A x + b), trained through.
    forward: Callable[[Tensor], Tensor] | None = None
    #: φ as float64, for checking ``forward``.
    activation: Callable[[Tensor], Tensor] = staticmethod(F.softplus)
    #: y ↦ A⁻¹ (y − b).
    inverse: Callable[[Tensor], Tensor] | None = None
    #: y ↦ A⁻¹ (φ⁻¹(y) − b).
    active_inverse: Callable[[Tensor], Tensor] | None = None
    #: log|det A|.
    logabsdet: Callable[[], Tensor] | None = None
    #: h ↦ (φ(h), Σ log φ′(h) for each row).
    activation_and_logabsdet: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None

    parameters: Sequence[nn.Parameter] = ()

    @property
    def with_activation(self) -> str:
        """Its name where φ is a part of what is timed."""
        return f"{self.name} + softplus" if self.activation is F.softplus else self.name


def leaky(t: Tensor, alpha: float = ALPHA) -> Tensor:
    """LeakySoftplus, plainly."""
    return alpha * t + (1.0 - alpha) * F.softplus(t, threshold=40.0)


class Ours(Contender):
    name = OURS
    activation = staticmethod(leaky)

    def __init__(self, problem: Problem) -> None:
        kwargs: dict[str, Any] = {"device": problem.device, "dtype": problem.dtype}
        active = LUDense(problem.features, activation=LeakySoftplus(ALPHA), **kwargs)
        affine = LUDense(problem.features, **kwargs)
        with torch.no_grad():
            for layer in (active, affine):
                layer.lu.copy_(problem.packed)
                assert layer.bias is not None
                layer.bias.copy_(problem.bias)
        self.parameters = list(active.parameters())
        self.forward = active
        self.inverse = affine.inverse
        self.active_inverse = active.inverse
        self.logabsdet = affine.logabsdet
        self.activation_and_logabsdet = LeakySoftplus(ALPHA).forward_and_logabsdet


def linear_of(problem: Problem, weight: Tensor, bias: Tensor) -> nn.Linear:
    """The ``nn.Linear`` with this weight and bias, of the problem's dtype and device."""
    linear = nn.Linear(problem.features, problem.features, device=problem.device, dtype=problem.dtype)
    with torch.no_grad():
        linear.weight.copy_(weight)
        linear.bias.copy_(bias)
    return linear


class Linear(Contender):
    """What a dense layer costs that cannot be inverted cheaply, and LAPACK on its matrix."""

    name = "nn.Linear"

    def __init__(self, problem: Problem) -> None:
        linear = linear_of(problem, problem.weight, problem.bias)
        self.parameters = list(linear.parameters())
        self.forward = lambda x: F.softplus(linear(x))


class Solve(Contender):
    name = "torch.linalg.solve"

    def __init__(self, problem: Problem) -> None:
        weight, bias = _dense(problem)
        self.inverse = lambda y: torch.linalg.solve(weight, (y - bias).T).T


class Slogdet(Contender):
    name = "torch.linalg.slogdet"

    def __init__(self, problem: Problem) -> None:
        weight, _ = _dense(problem)
        self.logabsdet = lambda: torch.linalg.slogdet(weight).logabsdet


def _dense(problem: Problem) -> tuple[Tensor, Tensor]:
    """A and b for LAPACK."""
    if problem.dtype not in (torch.float32, torch.float64):
        raise Unavailable(f"PyTorch has no LU factorisation in {problem.dtype}")
    return problem.to(problem.weight), problem.to(problem.bias)


class Inv(Contender):
    """A dense matrix, its inverse formed at each call: an invertible 1×1 convolution without LU."""

    name = "dense, torch.linalg.inv"

    def __init__(self, problem: Problem) -> None:
        weight, bias = _dense(problem)
        self.inverse = lambda y: F.linear(y - bias, torch.linalg.inv(weight))


class Glow(Contender):
    """Glow's 1×1 convolution without LU: a dense product, and slogdet at each training step."""

    name = "dense + slogdet"

    def __init__(self, problem: Problem) -> None:
        weight, bias = map(nn.Parameter, _dense(problem))
        self.parameters = [weight, bias]

        def forward(x: Tensor) -> Tensor:
            # The log-determinant enters the result times zero, so that its backward is run as in training.
            return F.softplus(F.linear(x, weight, bias)) + 0.0 * torch.linalg.slogdet(weight).logabsdet

        self.forward = forward


class TwoTriangular(Contender):
    """L and U masked out of a D×D parameter each, two products, two ``solve_triangular``."""

    name = "two triangular products"

    def __init__(self, problem: Problem) -> None:
        lower = nn.Parameter(problem.to(problem.lower.tril(-1)))
        upper = nn.Parameter(problem.to(problem.upper.triu(1)))
        logs = nn.Parameter(problem.to(problem.log_diagonal))
        bias = nn.Parameter(problem.to(problem.bias))
        eye = torch.eye(problem.features, device=problem.device, dtype=problem.dtype)
        self.parameters = [lower, upper, logs, bias]

        def factors() -> tuple[Tensor, Tensor]:
            return lower.tril(-1) + eye, upper.triu(1) + torch.diag(logs.exp())

        def forward(x: Tensor) -> Tensor:
            L, U = factors()
            return F.softplus(F.linear(F.linear(x, U), L, bias))

        def inverse(y: Tensor) -> Tensor:
            L, U = factors()
            middle = torch.linalg.solve_triangular(L, (y - bias).T, upper=False, unitriangular=True)
            return torch.linalg.solve_triangular(U, middle, upper=True).T

        self.forward = forward
        if problem.dtype in (torch.float32, torch.float64):
            self.inverse = inverse
        self.logabsdet = logs.sum


class Compiled(Contender):
    """W = L U formed in the graph, the product and LeakySoftplus, all left to ``torch.compile``."""

    name = "W formed, torch.compile"
    activation = staticmethod(leaky)

    def __init__(self, problem: Problem) -> None:
        if problem.device.type == "cpu" and not _has_compiler():
            raise Unavailable("torch.compile needs a C++ compiler on the CPU")
        packed = nn.Parameter(problem.to(problem.packed))
        bias = nn.Parameter(problem.to(problem.bias))
        self.parameters = [packed, bias]

        def forward(x: Tensor) -> Tensor:
            eye = torch.eye(x.shape[-1], device=x.device, dtype=x.dtype)
            L = packed.tril(-1) + eye
            U = packed.triu(1) + torch.diag(packed.diagonal().exp())
            return leaky(F.linear(x, L @ U, bias))

        torch._dynamo.reset()  # else it would try to make one program of all sizes
        self.forward = torch.compile(forward, dynamic=False)


def _has_compiler() -> bool:
    from torch._inductor import cpp_builder, exc

    try:
        cpp_builder.get_cpp_compiler()
    except exc.InvalidCxxCompiler:
        return False
    return True


def require(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise Unavailable(f"{package} is not installed; pip install 'lunet-fast[bench]'")


def _fill_packed_vectors(layer: Any, problem: Problem) -> None:
    """Give an LULinear with packed vectors and u_ii = softplus(p_i) + ε the problem's numbers."""
    diagonal = problem.log_diagonal.exp() - layer.eps
    with torch.no_grad():
        layer.lower_entries.copy_(problem.lower[layer.lower_indices])
        layer.upper_entries.copy_(problem.upper[layer.upper_indices])
        layer.unconstrained_upper_diag.copy_(diagonal.expm1().log())
        layer.bias.copy_(problem.bias)


class Nflows(Contender):
    name = "nflows LULinear"

    def __init__(self, problem: Problem) -> None:
        require("nflows")
        from nflows.transforms.lu import LULinear

        layer = self.filled(LULinear(problem.features), problem)
        self.parameters = list(layer.parameters())
        self.forward = lambda x: F.softplus(layer(x)[0])
        self.inverse = lambda y: layer.inverse(y)[0]
        self.logabsdet = layer.logabsdet

    @staticmethod
    def filled(layer: Any, problem: Problem) -> Any:
        """A ``LULinear`` with the problem's numbers."""
        layer = layer.to(problem.device, problem.dtype)
        _fill_packed_vectors(layer, problem)
        return layer


class Normflows(Contender):
    """Its flows go from latent to data, so that its "inverse" is the product. The permutation is left in
    place as the identity: it costs what any other does."""

    name = "normflows LULinearPermute"

    def __init__(self, problem: Problem) -> None:
        require("normflows")
        from normflows.flows import LULinearPermute

        layer = LULinearPermute(problem.features)
        layer.permutation._permutation = torch.arange(problem.features)
        layer = layer.to(problem.device, problem.dtype)
        _fill_packed_vectors(layer.linear, problem)
        self.parameters = list(layer.parameters())
        self.forward = lambda x: F.softplus(layer.inverse(x)[0])
        self.inverse = lambda y: layer.forward(y)[0]
        self.logabsdet = layer.linear.logabsdet


class Zuko(Contender):
    """One matrix holds L with its diagonal and U without: L D and D⁻¹ U of ours. It has no bias."""

    name = "zuko LULinearTransform"

    def __init__(self, problem: Problem) -> None:
        require("zuko")
        from zuko.transforms import LULinearTransform

        diagonal = problem.log_diagonal.exp()
        packed = (problem.lower * diagonal).tril() + (problem.upper / diagonal.unsqueeze(1)).triu(1)
        parameter = nn.Parameter(problem.to(packed))
        bias = nn.Parameter(problem.to(problem.bias))
        self.parameters = [parameter, bias]
        # A transform holds tensors made from the parameter, so training makes one for each step.
        self.forward = lambda x: F.softplus(LULinearTransform(parameter)(x) + bias)
        if problem.dtype in (torch.float32, torch.float64):
            self.inverse = lambda y: LULinearTransform(parameter).inv(y - bias)
        point = torch.zeros(problem.features, device=problem.device, dtype=problem.dtype)
        self.logabsdet = lambda: LULinearTransform(parameter).log_abs_det_jacobian(point, point)


class InverseTable:
    """φ⁻¹ by linear interpolation between 2,000,001 knots of φ on [−1000, 1000].

    In float64: in float32 the differences of neighbouring heights have two digits.
    """

    KNOTS, LIMIT = 2_000_001, 1000.0

    def __init__(self, device: torch.device, alpha: float = ALPHA) -> None:
        self.step = 2.0 * self.LIMIT / (self.KNOTS - 1)
        knots = torch.linspace(-self.LIMIT, self.LIMIT, self.KNOTS, dtype=torch.float64)
        self.heights = leaky(knots, alpha).to(device)

    def __call__(self, y: Tensor) -> Tensor:
        wide = y.double()
        right = torch.searchsorted(self.heights, wide).clamp_(1, self.KNOTS - 1)
        low, high = self.heights[right - 1], self.heights[right]
        return (((wide - low) / (high - low) + (right - 1)) * self.step - self.LIMIT).to(y.dtype)


class Original(Contender):
    """The original LU-Net's way, written afresh from its description (it carries no licence).

    L and U are dense, kept triangular by masking their gradients; the forward is two dense products; the
    inverse two general solves and a table of φ⁻¹. Its table is rebuilt at each call, which takes over a
    second: here it is made once and not timed, and looked up linearly, not by a spline.
    """

    name = "original LU-Net's way"
    activation = staticmethod(leaky)

    def __init__(self, problem: Problem) -> None:
        lower = nn.Parameter(problem.to(problem.lower))
        upper = nn.Parameter(problem.to(problem.upper))
        bias = nn.Parameter(problem.to(problem.bias))
        lower_mask = torch.ones_like(lower).tril(-1)
        upper_mask = torch.ones_like(upper).triu()
        lower.register_hook(lambda grad: grad * lower_mask)
        upper.register_hook(lambda grad: grad * upper_mask)
        self.parameters = [lower, upper, bias]
        self.forward = lambda x: leaky(F.linear(F.linear(x, upper), lower, bias))
        self.logabsdet = lambda: upper.diagonal().abs().log().sum()
        if problem.dtype not in (torch.float32, torch.float64):
            return
        table = InverseTable(problem.device)

        def solve(h: Tensor) -> Tensor:
            return torch.linalg.solve(upper, torch.linalg.solve(lower, (h - bias).T)).T

        self.inverse = solve
        self.active_inverse = lambda y: solve(table(y))


CONTENDERS: tuple[type[Contender], ...] = (
    Ours,
    Linear,
    TwoTriangular,
    Compiled,
    Nflows,
    Normflows,
    Zuko,
    Glow,
    Original,
    Solve,
    Slogdet,
    Inv,
)


def make(
    problem: Problem, kinds: Sequence[type[Contender]] = CONTENDERS
) -> tuple[list[Contender], dict[str, str]]:
    """Those of ``kinds`` that can take part, and why the others cannot."""
    made, missing = [], {}
    for kind in kinds:
        try:
            made.append(kind(problem))  # type: ignore[call-arg]
        except Unavailable as reason:
            missing[kind.name] = str(reason)
    return made, missing


@contextmanager
def quietly() -> Iterator[None]:
    """Without the peers' warnings about what they call in PyTorch."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*triangular_solve is deprecated.*")
        warnings.filterwarnings("ignore", category=FutureWarning, module="torch._inductor.*")
        yield

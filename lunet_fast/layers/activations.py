"""Bijective activations: what one is, and the paper's two, φ(x) = a·x + (c/κ)·softplus(κ·x)."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as all_modules

from lunet_fast import functional
from lunet_fast.layers.arguments import check_tensor, checked_number, checked_size
from lunet_fast.layers.cached import Keeping, usable
from lunet_fast.ops import dispatch, reference
from lunet_fast.ops.autograd import records
from lunet_fast.ops.cpu import leaky_softplus, spline  # noqa: F401  (importing a kind registers it)
from lunet_fast.ops.cpu.elementwise import KINDS, elementwise
from lunet_fast.ops.precision import wide
from lunet_fast.ops.reference import Slopes
from lunet_fast.ops.rows import row_values, rows, shaped
from lunet_fast.ops.values import Activation

#: A learnable α of (2.6) stays strictly between these.
SLOPE_RANGE = (1e-3, 1.0 - 1e-3)

#: Learnable α and β of (2.9) stay strictly between these, on a logarithmic scale.
SCALE_RANGE = (1e-3, 1e3)


def _logit(fraction: float) -> float:
    return math.log(fraction) - math.log1p(-fraction)


def _check_inside(name: str, value: float, low: float, high: float) -> None:
    if not low < value < high:
        raise ValueError(f"a learnable {name} must start strictly between {low} and {high}, got {value}")


def _normal_grid(steps: int = 24, reach: float = 6.0) -> list[tuple[float, float]]:
    """(place, weight) for means over a standard normal number."""
    places = [reach * n / steps for n in range(-steps, steps + 1)]
    densities = [math.exp(-x * x / 2.0) for x in places]
    return [(x, density / sum(densities)) for x, density in zip(places, densities, strict=True)]


_NORMAL = _normal_grid()


class BijectiveActivation(Keeping, ABC):
    """φ, an increasing bijection of ℝ, applied to each coordinate of x [..., D].

    A subclass defines ``forward``, ``inverse`` and ``log_derivative`` in PyTorch, with parameters, if any,
    that are scalars or [D]. It then works in every layer, net and flow, with gradients by autograd. What else
    may be defined: ``reset_parameters``, which sets what is learnt back to where it started;
    ``derivative_range``, ``tangent_at`` and ``bend_around``, where more is known than a look at φ tells;
    and ``fused``, for an activation that is computed inside the layer's operation.

    Every method takes [..., D] and keeps shape and dtype; log-determinants sum over the last dimension,
    have shape [...] and are float32 or wider.

    Raises:
        TypeError: the subclass lacks one of the three methods.
    """

    # The class that ``fused`` speaks for: this one, unless it replaced a method and not ``fused``.
    _described: type[BijectiveActivation]

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "fused" in vars(cls) or not _overrides(cls, cls._described):
            cls._described = cls

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """φ(x)."""

    @abstractmethod
    def inverse(self, y: Tensor) -> Tensor:
        """φ⁻¹(y)."""

    @abstractmethod
    def log_derivative(self, x: Tensor) -> Tensor:
        """log φ′(x), elementwise."""

    def forward_and_logabsdet(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(φ(x), Σ log φ′(x))."""
        check_tensor("x", x)
        phi = fused_of(self)
        if phi is not None:
            return functional.activation(x, phi, inverse=False, logabsdet=True)  # type: ignore[return-value]
        return self(x), self.log_derivative(x.to(wide(x.dtype))).sum(-1)

    def inverse_and_logabsdet(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """(φ⁻¹(y), the log-determinant of φ⁻¹ at y)."""
        check_tensor("y", y)
        phi = fused_of(self)
        if phi is not None:
            return functional.activation(y, phi, inverse=True, logabsdet=True)  # type: ignore[return-value]
        x = self.inverse(y)
        return x, -self.log_derivative(x.to(wide(x.dtype))).sum(-1)

    def fused(self) -> Activation | None:
        """φ as the operations of a layer know it, or None if they do not: then a layer calls φ itself."""
        return None

    def reset_parameters(self) -> None:
        """Set what is learnt back to where it started; by default nothing changes."""

    def derivative_range(self, features: int) -> tuple[float, float]:
        """(least, greatest) φ′; by default of x from −1000 to 1000 in every coordinate."""
        like = next(self.parameters(), torch.empty(0))
        grid = torch.logspace(-3, 3, 200, dtype=torch.float64, device=like.device)
        grid = torch.cat([-grid, grid.new_zeros(1), grid]).to(wide(like.dtype))
        with torch.no_grad():
            low, high = self.log_derivative(grid.unsqueeze(-1).expand(-1, features)).aminmax()
        return math.exp(low), math.exp(high)

    def tangent_at(self, point: float, features: int) -> tuple[Tensor | float, Tensor | float]:
        """(φ(p), φ′(p)) at a point p, each [D] or a number: what a following layer undoes to start near the
        identity."""
        like = next(self.parameters(), torch.empty(0))
        places = torch.full((features,), point, device=like.device, dtype=like.dtype)
        with torch.no_grad():
            return self.forward(places), self.log_derivative(places).exp()

    def bend_around(self, point: float, deviation: float, features: int) -> float:
        """Root mean square of log φ′(x) − log φ′(p) for normal x around p, the greatest of any coordinate: by
        it a deep net starts."""
        like = next(self.parameters(), torch.empty(0))
        x, weight = torch.tensor(_NORMAL, dtype=wide(like.dtype), device=like.device).unbind(-1)
        grid = (point + deviation * torch.cat([x.new_zeros(1), x])).unsqueeze(-1).expand(-1, features)
        with torch.no_grad():
            logs = self.log_derivative(grid)
        return float((weight @ (logs[1:] - logs[0]).square()).max().sqrt())


BijectiveActivation._described = BijectiveActivation  # type: ignore[type-abstract]


def call(
    activation: BijectiveActivation, x: Tensor, *, inverse: bool, logabsdet: bool
) -> tuple[Tensor, Tensor | None]:
    """φ or its inverse at x by the module's own methods, and its log-determinant if asked for."""
    if activation._kept is not None:
        found = _from_kept(activation, x, inverse=inverse, logabsdet=logabsdet)
        if found is not None:
            return found
    if logabsdet:
        return (activation.inverse_and_logabsdet if inverse else activation.forward_and_logabsdet)(x)
    return activation.inverse(x) if inverse else activation(x), None


def _from_kept(
    activation: BijectiveActivation, x: Tensor, *, inverse: bool, logabsdet: bool
) -> tuple[Tensor, Tensor | None] | None:
    """``call`` with what the activation keeps, within ``cached``; None where it may not or has nothing."""
    kept = usable(activation, x)
    if (
        kept is None
        or x.device.type != "cpu"
        or dispatch.get_backend() == "triton"
        or x.numel() == 0
        or records(x)
        or activation._modules
        or is_replaced(activation, activation._described)
    ):
        return None
    sources = (*activation._parameters.values(), *activation._buffers.values())

    def make() -> Any:
        phi = activation.fused()
        return None if phi is None or phi.kind not in KINDS else elementwise(phi, x.dtype)

    phi = kept.get(x.dtype, sources, make)
    if phi is None or (phi.parameters is not None and phi.parameters.shape[-1] not in (1, x.shape[-1])):
        return None
    if inverse:
        h = phi.inverse(rows(x))
        total = phi.log_derivative_sum(h).neg_() if logabsdet else None
    else:
        h, total = phi.activated(rows(x), logabsdet=logabsdet)
    return shaped(h, x), row_values(total, x) if logabsdet else None


def fused_of(activation: BijectiveActivation) -> Activation | None:
    """``activation.fused()``, or None where the module has to be called: a subclass or a patch replaced one
    of its methods, or hooks hang on it."""
    if is_replaced(activation, activation._described):
        return None
    return activation.fused()


#: What of a layer or an activation can be replaced.
_METHODS = ("forward", "inverse", "log_derivative", "forward_and_logabsdet", "inverse_and_logabsdet")


def _overrides(cls: Any, base: Any) -> bool:
    return any(getattr(cls, name, None) is not getattr(base, name, None) for name in _METHODS)


def is_replaced(module: nn.Module, base: Any, *, hooks: bool = True) -> bool:
    """Whether calling the module may do anything else than what ``base`` computes.

    So it is where a subclass or a patch replaced a method and, if ``hooks``, where hooks hang on it or on all
    modules.
    """
    own = module.__dict__
    cls: Any = type(module)
    # Every call of a layer comes here, so no loops, nor PyTorch's __getattr__.
    if (cls is not base and _overrides(cls, base)) or (
        "forward" in own
        or "inverse" in own
        or "log_derivative" in own
        or "forward_and_logabsdet" in own
        or "inverse_and_logabsdet" in own
    ):
        return True
    return hooks and bool(
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
        or all_modules._global_forward_hooks
        or all_modules._global_forward_pre_hooks
        or all_modules._global_backward_hooks
        or all_modules._global_backward_pre_hooks
    )


# --- the paper's ----------------------------------------------------------------------------------------


class SoftplusFamily(BijectiveActivation):
    """φ(x) = a·x + (c/κ)·softplus(κ·x): increasing and convex with φ′ between a and a + c.

    So it is onto ℝ and its inverse is unique. Fixed a, c and κ are kept as Python floats. Learnable ones are
    stored unconstrained and mapped into a bounded range by a sigmoid, so that no optimiser step can make the
    activation singular. Cost: O(1) transcendentals an element forward, two or three times that for the
    inverse (see ``functional.leaky_softplus_inverse``).
    """

    @abstractmethod
    def slopes(self) -> Slopes:
        """(a, c, κ): three floats, or a tensor [3] or [3, D] through which the parameters are learnt."""

    @abstractmethod
    def starting_slopes(self) -> tuple[float, float, float]:
        """(a, c, κ) as the activation was made with, of every coordinate."""

    def slope_values(self) -> tuple[Tensor, Tensor, Tensor]:
        """(a, c, κ) as they are now, float64, each a scalar or [D]; no gradient."""
        a, c, kappa = torch.as_tensor(self.slopes(), dtype=torch.float64).detach()
        return a, c, kappa

    def fused(self) -> Activation:
        return reference.family(self.slopes())

    def forward(self, x: Tensor) -> Tensor:
        """φ(x)."""
        check_tensor("x", x)
        return functional.leaky_softplus(x, self.slopes())

    def inverse(self, y: Tensor) -> Tensor:
        """φ⁻¹(y); ±inf and NaN pass through."""
        check_tensor("y", y)
        return functional.leaky_softplus_inverse(y, self.slopes())

    def log_derivative(self, x: Tensor) -> Tensor:
        """log φ′(x), elementwise."""
        check_tensor("x", x)
        return reference.leaky_softplus_derivative(x, self.slopes()).log()

    def derivative_range(self, features: int) -> tuple[float, float]:
        """(least a, greatest a + c)."""
        if self._is_other():
            return super().derivative_range(features)
        a, c, _ = self.slope_values()
        return float(a.min()), float((a + c).max())

    def _is_other(self) -> bool:
        """Whether φ is another function: a subclass or a patch replaced it."""
        return is_replaced(self, self._described, hooks=False)

    def tangent_at(self, point: float, features: int) -> tuple[Tensor | float, Tensor | float]:
        """(φ(p), φ′(p)) of a fresh activation."""
        if self._is_other():
            return super().tangent_at(point, features)
        a, c, kappa = self.starting_slopes()
        risen = max(kappa * point, 0.0) + math.log1p(math.exp(-abs(kappa * point)))
        return a * point + c / kappa * risen, a + c * _sigmoid(kappa * point)

    def bend_around(self, point: float, deviation: float, features: int) -> float:
        """Of a fresh activation."""
        if self._is_other():
            return super().bend_around(point, deviation, features)
        a, c, kappa = self.starting_slopes()
        middle = math.log(a + c * _sigmoid(kappa * point))
        logs = (math.log(a + c * _sigmoid(kappa * (point + deviation * x))) for x, _ in _NORMAL)
        return math.sqrt(sum(w * (log - middle) ** 2 for log, (_, w) in zip(logs, _NORMAL, strict=True)))


def _sigmoid(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x)) if x > -700.0 else 0.0


def _starting(features: int | None, learnable: bool, count: int) -> list[nn.Parameter | None]:
    """``count`` raw parameters to be filled: [1] each, or [D] for ``features`` D; None if not learnable."""
    if features is not None and not learnable:
        raise ValueError(
            f"features={features} asks for a slope for each coordinate, which fixed ones do not have: give "
            "learnable=True with it"
        )
    if features is not None:
        features = checked_size("features", features)
    return [nn.Parameter(torch.empty(features or 1)) if learnable else None for _ in range(count)]


def _shown(raw: Tensor | None, start: float, value: float | Tensor) -> str:
    """A slope for ``extra_repr``: a number, or the range over the coordinates."""
    if raw is None or raw.is_meta or not isinstance(value, Tensor):
        return f"{start:.4g}"
    low, high = (float(end) for end in value.detach().aminmax())
    return f"{low:.4g}" if low == high else f"{low:.4g}…{high:.4g}"


class LeakySoftplus(SoftplusFamily):
    """φ(x) = α·x + (1 − α)·softplus(x), (2.6): slope α on the far left, 1 on the far right.

    Args:
        alpha: α, strictly between 0 and 1; between 0.001 and 0.999 if learnable.
        learnable: make α a parameter (``raw_alpha`` [1]).
        features: D, to learn an α for each coordinate (``raw_alpha`` [D]); None for one α.

    Raises:
        ValueError: alpha outside its range, or features without learnable.
    """

    def __init__(self, alpha: float = 0.1, learnable: bool = False, features: int | None = None) -> None:
        super().__init__()
        alpha = checked_number("alpha", alpha)
        if not 0.0 < alpha < 1.0:
            raise ValueError(f"alpha must lie strictly between 0 and 1, got {alpha}")
        self.learnable, self.features = learnable, features
        self._alpha = alpha
        if learnable:
            _check_inside("alpha", alpha, *SLOPE_RANGE)
        (self.raw_alpha,) = _starting(features, learnable, 1)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set a learnable α back to the value it was made with."""
        low, high = SLOPE_RANGE
        if self.raw_alpha is not None:
            nn.init.constant_(self.raw_alpha, _logit((self._alpha - low) / (high - low)))

    @property
    def alpha(self) -> float | Tensor:
        """α: a float, or when learnable a tensor, scalar or [D]."""
        if self.raw_alpha is None:
            return self._alpha
        low, high = SLOPE_RANGE
        raw = self.raw_alpha.squeeze(0) if self.features is None else self.raw_alpha
        return low + (high - low) * torch.sigmoid(raw)

    def slopes(self) -> Slopes:
        alpha = self.alpha
        if isinstance(alpha, Tensor):
            return torch.stack([alpha, 1.0 - alpha, torch.ones_like(alpha)])
        return alpha, 1.0 - alpha, 1.0

    def starting_slopes(self) -> tuple[float, float, float]:
        return self._alpha, 1.0 - self._alpha, 1.0

    def extra_repr(self) -> str:
        return f"alpha={_shown(self.raw_alpha, self._alpha, self.alpha)}, learnable={self.learnable}"


class GeneralizedLeakySoftplus(SoftplusFamily):
    """φ(x) = (1/α)·softplus(α·x) + β·x, (2.9): slope β on the far left, 1 + β on the far right.

    Args:
        alpha: α > 0, how sharply the slope changes; between 0.001 and 1000 if learnable.
        beta: β > 0; between 0.001 and 1000 if learnable. β = 0 is plain softplus, which is not onto ℝ.
        learnable: make both parameters (``raw_alpha`` [1] and ``raw_beta`` [1]).
        features: D, to learn an α and a β for each coordinate ([D] each); None for one of each.

    Raises:
        ValueError: alpha or beta outside its range, or features without learnable.
    """

    def __init__(
        self, alpha: float = 1.0, beta: float = 0.1, learnable: bool = False, features: int | None = None
    ) -> None:
        super().__init__()
        alpha, beta = checked_number("alpha", alpha), checked_number("beta", beta)
        if not 0.0 < alpha < math.inf:
            raise ValueError(f"alpha must be above 0 and finite, got {alpha}")
        if not 0.0 < beta < math.inf:
            raise ValueError(
                f"beta must be above 0 and finite, got {beta}; with beta = 0 the function is plain softplus, "
                "which is not onto the real line"
            )
        self.learnable, self.features = learnable, features
        self._alpha, self._beta = alpha, beta
        if learnable:
            _check_inside("alpha", alpha, *SCALE_RANGE)
            _check_inside("beta", beta, *SCALE_RANGE)
        self.raw_alpha, self.raw_beta = _starting(features, learnable, 2)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set learnable α and β back to the values they were made with."""
        low, high = SCALE_RANGE
        for raw, value in ((self.raw_alpha, self._alpha), (self.raw_beta, self._beta)):
            if raw is not None:
                nn.init.constant_(raw, _logit(math.log(value / low) / math.log(high / low)))

    def _value(self, raw: Tensor) -> Tensor:
        low, high = SCALE_RANGE
        raw = raw.squeeze(0) if self.features is None else raw
        return torch.exp(math.log(low) + math.log(high / low) * torch.sigmoid(raw))

    @property
    def alpha(self) -> float | Tensor:
        """α: a float, or when learnable a tensor, scalar or [D]."""
        return self._alpha if self.raw_alpha is None else self._value(self.raw_alpha)

    @property
    def beta(self) -> float | Tensor:
        """β: a float, or when learnable a tensor, scalar or [D]."""
        return self._beta if self.raw_beta is None else self._value(self.raw_beta)

    def slopes(self) -> Slopes:
        alpha, beta = self.alpha, self.beta
        if isinstance(alpha, Tensor) and isinstance(beta, Tensor):
            return torch.stack([beta, torch.ones_like(beta), alpha])
        return self._beta, 1.0, self._alpha

    def starting_slopes(self) -> tuple[float, float, float]:
        return self._beta, 1.0, self._alpha

    def extra_repr(self) -> str:
        alpha = _shown(self.raw_alpha, self._alpha, self.alpha)
        beta = _shown(self.raw_beta, self._beta, self.beta)
        return f"alpha={alpha}, beta={beta}, learnable={self.learnable}"

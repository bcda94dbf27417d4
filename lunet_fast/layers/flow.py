"""LUFlow: a normalising flow with an LUNet, density and samples both exact."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributions import Categorical, Distribution, Independent, MixtureSameFamily, Normal

from lunet_fast.layers.arguments import check_dtype, check_tensor, checked_size
from lunet_fast.layers.conditional import ConditionalLUNet, GivenContext
from lunet_fast.layers.fitting import FitRecord, fit
from lunet_fast.layers.lu_dense import LUDense
from lunet_fast.layers.lunet import LUNet
from lunet_fast.layers.sharded import gathers
from lunet_fast.layers.splines import MonotoneSpline
from lunet_fast.layers.transforms import InvertibleTransform
from lunet_fast.ops.precision import wide


class StandardNormal(nn.Module):
    """N(0, I) on ℝᴰ as a module, so that it follows ``.to()`` and ``.double()``.

    Args:
        features: D.
        device, dtype: as in ``nn.Linear``.

    Raises:
        ValueError: features below 1.
        TypeError: features is not an int, or dtype not a real one.
    """

    like: Tensor

    def __init__(
        self, features: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        check_dtype("dtype", torch.get_default_dtype() if dtype is None else dtype)
        self.features = checked_size("features", features)
        # Holds no numbers, only the dtype and device to draw in.
        self.register_buffer("like", torch.empty(0, device=device, dtype=dtype), persistent=False)

    def log_prob(self, z: Tensor) -> Tensor:
        """log N(z; 0, I) = −(|z|² + D·log 2π)/2 [...] for z [..., D], float32 or wider."""
        check_tensor("z", z)
        z = z.to(wide(z.dtype))
        return -0.5 * (z.square().sum(-1) + self.features * math.log(2.0 * math.pi))

    def sample(self, shape: int | Sequence[int] = ()) -> Tensor:
        """[*shape, D] draws, [n, D] for a number n, by PyTorch's global generator."""
        return torch.randn(*_shape(shape), self.features, device=self.like.device, dtype=self.like.dtype)

    def rsample(self, shape: int | Sequence[int] = ()) -> Tensor:
        """``sample``: there are no parameters to give gradients to."""
        return self.sample(shape)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        if self.like.is_meta:
            # Without numbers there is nothing to materialise, so .to("cpu") need not refuse.
            try:
                self.like = fn(self.like)
            except NotImplementedError:
                self.like = fn(torch.empty(0, dtype=self.like.dtype, device="cpu"))
            return self
        return super()._apply(fn, recurse=recurse)


class NormalMixture(nn.Module):
    """Σ_k π_k N(z; μ_k, diag(σ_k²)) on ℝᴰ with learnt π, μ, σ: a base with several modes.

    Starts at π_k = 1/K, σ_k = 1 and μ_k drawn from N(0, spread²·I) by PyTorch's global generator.

    Args:
        features: D.
        components: K ≥ 1.
        spread: of the first means.
        device, dtype: as in ``nn.Linear``.

    Raises:
        ValueError: features or components below 1, or spread below 0.
        TypeError: features or components is not an int, or dtype not a real one.
    """

    def __init__(
        self,
        features: int,
        components: int,
        spread: float = 0.5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        features, components = checked_size("features", features), checked_size("components", components)
        check_dtype("dtype", torch.get_default_dtype() if dtype is None else dtype)
        if not spread >= 0.0:
            raise ValueError(f"spread must be at least 0, got {spread}")
        self.features, self.components, self.spread = features, components, spread
        self.mean = nn.Parameter(torch.empty(components, features, device=device, dtype=dtype))
        self.log_scale = nn.Parameter(torch.empty(components, features, device=device, dtype=dtype))
        self.logits = nn.Parameter(torch.empty(components, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.mean, std=self.spread)
        nn.init.zeros_(self.log_scale)
        nn.init.zeros_(self.logits)

    def component_log_prob(self, z: Tensor) -> Tensor:
        """log π_k + log N(z; μ_k, diag(σ_k²)) [..., K] for z [..., D], float32 or wider.

        By two products with [D, K] matrices, 4·K·D flops a row, without an array [..., K, D]. Squares are
        multiplied out, so the absolute error is about |z − m|²/σ² roundings, m the mean of the means.
        """
        check_tensor("z", z)
        wider = wide(torch.promote_types(z.dtype, self.mean.dtype))
        mean, log_scale = self.mean.to(wider), self.log_scale.to(wider)
        centre = mean.mean(0).detach()
        z, mean = z.to(wider) - centre, mean - centre
        precision = torch.exp(-2.0 * log_scale)
        weighted = mean * precision
        constant = (
            self.logits.to(wider).log_softmax(0)
            - log_scale.sum(-1)
            - 0.5 * ((weighted * mean).sum(-1) + self.features * math.log(2.0 * math.pi))
        )
        return constant + z @ weighted.mT - 0.5 * (z.square() @ precision.mT)

    def log_prob(self, z: Tensor) -> Tensor:
        """log p(z) [...] for z [..., D]."""
        return self.component_log_prob(z).logsumexp(-1)

    def as_distribution(self) -> MixtureSameFamily:
        """The same as a ``torch.distributions`` distribution, with its parameters' gradients."""
        components = Independent(Normal(self.mean, self.log_scale.exp()), 1)
        return MixtureSameFamily(Categorical(logits=self.logits), components)

    def sample(self, shape: int | Sequence[int] = ()) -> Tensor:
        """[*shape, D] draws, [n, D] for a number n, by PyTorch's global generator. No gradient."""
        shape = _shape(shape)
        # torch.distributions draws from every component and keeps one.
        with torch.no_grad():
            count = math.prod(shape)
            which = torch.multinomial(self.logits.softmax(0), max(count, 1), replacement=True)[:count]
            noise = torch.randn(count, self.features, device=self.mean.device, dtype=self.mean.dtype)
            return torch.addcmul(self.mean[which], self.log_scale.exp()[which], noise).reshape(
                *shape, self.features
            )

    def extra_repr(self) -> str:
        return f"features={self.features}, components={self.components}"


class LUFlow(nn.Module):
    """A density on ℝᴰ: z = net(x) for data x, log p(x) = log p_base(z) + log|det ∂z/∂x|.

    Args:
        net: maps data to the latent space; an ``LUNet``, a ``ConditionalLUNet`` or anything with their
            methods.
        base: the latent density, of vectors [D]: a standard normal if None, a module (it then follows
            ``.to()``) or a ``torch.distributions`` distribution with event shape [D]. It has ``log_prob(z)``
            and ``sample(shape)`` or, as in nflows and normflows, ``sample(n)`` for a number n.

    With a ``ConditionalLUNet`` the density is p(x | context), and every method takes the contexts [..., C],
    one a row or one for all; without, none.

    Cost for N points: log_prob one forward pass of net, samples one inverse pass.

    Raises:
        ValueError: base has an event shape other than [D], or a batch shape; later, its log-probabilities or
            draws come in a shape that no density of vectors [D] has.
        TypeError: x is no tensor, n neither an int nor ints, or base computes in another dtype or on another
            device than the net.
    """

    def __init__(self, net: Any, base: Any = None) -> None:
        super().__init__()
        self.net = net
        if base is None:
            parameter = next(net.parameters())
            base = StandardNormal(net.features, device=parameter.device, dtype=parameter.dtype)
        self._check_event(base)
        self.base = base

    def _check_event(self, base: Any) -> None:
        event, features = getattr(base, "event_shape", None), getattr(self.net, "features", None)
        if event is None or features is None:
            return
        event, batch = tuple(event), tuple(getattr(base, "batch_shape", ()))
        if event == (features,) and not batch:
            return
        if (*batch, *event) == (features,):
            fix = "use Independent(base, 1), which sums over the coordinates"
        elif not batch and not event:
            fix = f"use Independent(base.expand([{features}]), 1)"
        else:
            fix = f"give a distribution of vectors [{features}]"
        raise ValueError(
            f"base must have event_shape [{features}] and batch_shape [], got {type(base).__name__} with "
            f"event_shape {list(event)} and batch_shape {list(batch)}: {fix}"
        )

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """``log_prob``, so that wrappers that call a module, as data parallel does, train a flow."""
        return self.log_prob(x, context)

    def log_prob(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """log p(x) or log p(x | context) [...], natural logarithm, for x [..., D]."""
        check_tensor("x", x)
        z, logabsdet = self._map(context).forward_and_logabsdet(x)
        return self._base_log_prob(z) + logabsdet

    def _base_log_prob(self, z: Tensor) -> Tensor:
        try:
            found = self.base.log_prob(z)
        except RuntimeError as error:
            self._check_follows(z, error)
            raise
        if found.shape != z.shape[:-1]:
            raise ValueError(
                f"base must give one log-probability a row: for z of shape {list(z.shape)} it gave shape "
                f"{list(found.shape)}, not {list(z.shape[:-1])}; {type(self.base).__name__} must have "
                "vectors [D] for events, as Independent(base, 1) of torch.distributions has"
            )
        return found

    def _check_follows(self, z: Tensor, error: RuntimeError) -> None:
        """Raise ``TypeError`` from ``error`` where the base computes in another dtype or place than z is."""
        with torch.no_grad():
            drawn = self._draw((), reparametrised=False)
        if (drawn.dtype, drawn.device) != (z.dtype, z.device):
            raise self._does_not_follow(drawn, z.dtype, z.device) from error

    def _does_not_follow(self, drawn: Tensor, dtype: torch.dtype, device: torch.device) -> TypeError:
        return TypeError(
            f"base draws {drawn.dtype} on {drawn.device} and the net computes in {dtype} on {device}: "
            f"{type(self.base).__name__} did not follow the flow's .to(); make LUFlow(net, base) with a base "
            "of that dtype and device, or with one that is an nn.Module"
        )

    def _draw(self, shape: Sequence[int], *, reparametrised: bool) -> Tensor:
        """[*shape, D] draws of the base."""
        name = "rsample" if reparametrised else "sample"
        base, shape = self.base, torch.Size(shape)
        has = getattr(base, "has_rsample", hasattr(base, "rsample"))
        if reparametrised and not (has and hasattr(base, "rsample")):
            raise NotImplementedError(
                f"base must have rsample, and {type(base).__name__} has none: a draw that picks a component, "
                "for one, is no differentiable function of the parameters; use a StandardNormal or a "
                "distribution with has_rsample, or sample() without gradients"
            )
        draw = getattr(base, name)
        if isinstance(base, (StandardNormal, NormalMixture, Distribution)):
            return draw(shape)
        try:
            return draw(shape)
        except TypeError as error:
            # The habit of nflows and normflows: a number of draws, at least 1.
            count = math.prod(shape)
            try:
                rows = draw(max(count, 1))
            except TypeError:
                raise error from None
        return rows[:count].reshape(*shape, *rows.shape[1:])

    def _latent(self, net: Any, n: int | Sequence[int], *, reparametrised: bool = False) -> Tensor:
        """Draws z of the base, as many as the arguments of ``sample`` say."""
        shape = _shape(n) + _leading(net)
        like = self._parameter()
        if like is not None and isinstance(self.base, StandardNormal) and self.base.like.is_meta:
            # load_state_dict(assign=True) materialises all but what has no numbers.
            self.base.to_empty(device=like.device)
        z = self._draw(shape, reparametrised=reparametrised)
        features = getattr(self.net, "features", None)
        if features is not None and z.shape != (*shape, features):
            raise ValueError(
                f"base must draw vectors [{features}]: for shape {list(shape)} it drew {list(z.shape)}; see "
                "Independent(base, 1) of torch.distributions"
            )
        if like is not None and (z.dtype, z.device) != (like.dtype, like.device):
            autocast = torch.amp.is_autocast_available(z.device.type)
            if z.device != like.device or not (autocast and torch.is_autocast_enabled(z.device.type)):
                raise self._does_not_follow(z, like.dtype, like.device)
        return z

    def _parameter(self) -> Tensor | None:
        """A parameter of an LUNet, which says what it computes in; None of other nets."""
        net = self.net.net if isinstance(self.net, ConditionalLUNet) else self.net
        return cast(LUDense, net.layers[0]).lu if isinstance(net, LUNet) else None

    def sample(self, n: int | Sequence[int] = (), context: Tensor | None = None) -> Tensor:
        """n draws [n, D], or [*n, D] for a shape; with contexts [..., C], [*n, ..., D].

        Drawn with PyTorch's global generator. No gradient: see ``rsample``.
        """
        with torch.no_grad():
            net = self._map(context)
            return net.inverse(self._latent(net, n))

    def sample_and_log_prob(
        self, n: int | Sequence[int] = (), context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(draws x as ``sample`` gives them, log p of each) in the one pass of ``sample``. No gradient."""
        with torch.no_grad():
            net = self._map(context)
            z = self._latent(net, n)
            x, logabsdet = net.inverse_and_logabsdet(z)
            return x, self._base_log_prob(z) - logabsdet

    def rsample(self, n: int | Sequence[int] = (), context: Tensor | None = None) -> Tensor:
        """``sample``, differentiable: draws as functions of the parameters of net, base and context.

        So that E f(x) can be trained by the gradient of f at the draws. Raises ``NotImplementedError`` where
        the base cannot do so, as ``NormalMixture``, whose draws pick a component.
        """
        net = self._map(context)
        return net.inverse(self._latent(net, n, reparametrised=True))

    def rsample_and_log_prob(
        self, n: int | Sequence[int] = (), context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(draws x as ``rsample`` gives them, log p of each) in one pass, both differentiable.

        For training by reverse Kullback-Leibler divergence: ``(log_p - target.log_prob(x)).mean()``.
        """
        net = self._map(context)
        z = self._latent(net, n, reparametrised=True)
        x, logabsdet = net.inverse_and_logabsdet(z)
        return x, self._base_log_prob(z) - logabsdet

    def _map(self, context: Tensor | None) -> Any:
        """What takes data to the latent space, for these contexts."""
        if isinstance(self.net, ConditionalLUNet):
            if context is None:
                raise ValueError("context must be given: the net is a ConditionalLUNet")
            return self.net.given(context)
        if context is not None:
            raise ValueError("context must be None: only a flow with a ConditionalLUNet depends on one")
        gathers(self.net)
        return self.net

    @classmethod
    def for_data(
        cls,
        x: Tensor,
        layers: int = 4,
        *,
        bins: int = 8,
        input_bins: int = 16,
        tails: str = "free",
        components: int = 30,
    ) -> LUFlow:
        """A flow made for rows x [N, D], in their dtype and on their device, before its training.

        Splines of 16 bins over the ranges of the data, an ``LUNet`` with splines of 8 bins between its layers
        and negative signs, whitened on x, and a mixture of 30 Gaussians: what the validation part of digits
        chose. Numbers of the size of 1 are not needed, the first splines have the data's. Cost: that of
        ``LUNet.whiten``; (layers − 1)·(bins + 1)·D + (input_bins + 1)·D numbers beside the matrices.

        Args:
            layers: M.
            bins: of the splines between layers.
            input_bins: of those before the first layer.
            tails: of all splines, as in ``MonotoneSpline``; "identity" where a few rows lie far out.
            components: of the base; 1 for a standard normal.

        Raises:
            ValueError: x is not [N, D] with two rows or more, or not finite; a number below its least.
            TypeError: x is no floating-point tensor, or a number no int.
        """
        check_tensor("x", x)
        check_dtype("x.dtype", x.dtype)
        if x.dim() != 2:
            raise ValueError(f"x must be rows [N, D], got shape {tuple(x.shape)}")
        components = checked_size("components", components)
        features, place = x.shape[-1], {"device": x.device, "dtype": x.dtype}
        net = LUNet(
            *(features, layers, MonotoneSpline(features, bins, tails)),
            **place,  # type: ignore[arg-type]
            signs="negative",
            input=MonotoneSpline(features, input_bins, tails),
        )
        cast(MonotoneSpline, net.input).fit_range(x)
        net.whiten(x)
        return cls(net, NormalMixture(features, components, **place) if components > 1 else None)  # type: ignore

    def fit(self, x: Tensor, context: Tensor | None = None, **options: Any) -> tuple[LUFlow, FitRecord]:
        """Train on rows x [N, D] by maximum likelihood; (this flow with the best weights, how it went).

        AdamW with gradients shortened to ``clip``, its rate falling linearly to 0; the validation rows are
        looked at after each round, at the exponential mean of the weights, and choose.

        Args:
            x: rows; integers must be dequantised, or their density has no bound.
            context: [N, …], one for each row, where the net is conditional.
            validation: rows [V, D], or the share of x, drawn by ``seed``, that is held out; 0.1.
            steps: at most; 4000.
            round_steps, patience: 100 steps make a round; after 20 rounds without a better one it ends.
            batch_size: 256.
            learning_rate: 5e-3, and in more than 64 dimensions 0.32/D.
            weight_decay: of matrices and splines, 0.5.
            clip, average: 5 and 0.998.
            seed: of the parts and the batches. The global generator is not used.
            progress: show a bar, where tqdm or rich is there.

        Raises:
            ValueError: x is not [N, D] with two rows or more, or not finite; contexts of another number; an
                option out of its range.
            TypeError: an option is not what it must be.
            ArithmeticError: the loss is infinite or NaN.
        """
        check_tensor("x", x)
        return self, fit(self, x, context, **options)

    def as_transform(self, context: Tensor | None = None) -> InvertibleTransform:
        """Data → latent as a ``torch.distributions`` transform; its ``inv`` turns base draws into data."""
        return InvertibleTransform(self._map(context))


def _leading(net: Any) -> torch.Size:
    return net.shape if isinstance(net, GivenContext) else torch.Size()


def _shape(n: int | Sequence[int]) -> torch.Size:
    """The shape of draws; ``TypeError`` where n is neither an int nor ints, ``ValueError`` below 0."""
    sizes = n if isinstance(n, Sequence) and not isinstance(n, str) else [n]
    return torch.Size([checked_size("n, the number of draws,", size, 0) for size in sizes])

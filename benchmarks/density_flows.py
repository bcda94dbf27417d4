"""The flows that ``density.py`` compares, and the settings that they have in common."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from gaussianization import Gaussianization
from torch import Tensor, nn

from lunet_fast import BijectiveActivation, NormalMixture, StandardNormal
from lunet_fast.density.config import DensityConfig
from lunet_fast.density.model import build_flow, fit_input, whiten

GAUSSIAN = "Gaussian or mixture (M = 1)"

Ladders = dict[str, tuple[float, ...]]

#: How every flow is tuned, one setting after another: from a rung of its ladder up, or else down, for as long
#: as the validation part of seed 0 likes the next one better. The settings before it are as chosen, those
#: after it as ``DIGITS`` has them. All but the number of steps, over which the rate falls to 0, is chosen in
#: short trainings.
LADDERS: Ladders = {
    "learning_rate": (5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2),
    "weight_decay": (0.01, 0.05, 0.2, 0.5, 1.0, 2.0, 3.0),
    "components": (1, 30),
    "steps": (1250, 2500, 5000, 10_000),
}
PLANE_LADDERS: Ladders = {
    "learning_rate": (1e-3, 2e-3, 5e-3, 1e-2, 2e-2),
    "weight_decay": (0.0, 0.05, 0.2, 0.5),
    "components": (1, 32),
}

LEAKY = DensityConfig(activation="leaky_softplus", input_bins=0)
DIGITS = LEAKY.replace(steps=5000, patience=12, learning_rate=5e-3, weight_decay=0.5, components=30)
PLANE = LEAKY.replace(
    steps=2500,
    patience=25,
    batch_size=512,
    signs="random",
    learning_rate=5e-3,
    weight_decay=0.05,
    components=32,
)


class Peer(nn.Module):
    """Another library's transform between standardised rows and a base."""

    def __init__(self, transform: nn.Module, features: int, components: int, rows: Tensor) -> None:
        super().__init__()
        self.transform = transform
        self.base: Any = NormalMixture(features, components) if components > 1 else StandardNormal(features)
        self.register_buffer("shift", rows.mean(0))
        self.register_buffer("scale", rows.std(0))

    def log_prob(self, y: Tensor) -> Tensor:
        z, logabsdet = self.call((y - self.shift) / self.scale)
        return self.base.log_prob(z) + logabsdet - self.scale.log().sum()

    def sample(self, n: int) -> Tensor:
        with torch.no_grad():
            return self.inverse(self.base.sample((n,))) * self.scale + self.shift


class Zuko(Peer):
    def call(self, y: Tensor) -> tuple[Tensor, Tensor]:
        return self.transform().call_and_ladj(y)

    def inverse(self, z: Tensor) -> Tensor:
        return self.transform().inv(z)


class Nflows(Peer):
    def call(self, y: Tensor) -> tuple[Tensor, Tensor]:
        return self.transform(y)

    def inverse(self, z: Tensor) -> Tensor:
        return self.transform.inverse(z)[0]


#: (preprocessed training rows, settings, how many labels) → flow.
Make = Callable[[Tensor, DensityConfig, int], nn.Module]


class RationalQuadratic(BijectiveActivation):
    """The spline of Durkan et al. (2019) on each coordinate, by nflows: 3K − 1 numbers, slope 1 outside."""

    def __init__(self, features: int, bins: int = 8, bound: float = 3.0) -> None:
        super().__init__()
        self.bins, self.bound = bins, bound
        self.raw = nn.Parameter(torch.zeros(features, 3 * bins - 1))

    def _call(self, x: Tensor, *, inverse: bool) -> tuple[Tensor, Tensor]:
        from nflows.transforms.splines.rational_quadratic import unconstrained_rational_quadratic_spline

        raw = self.raw.expand(*x.shape, -1)
        widths, heights, slopes = raw.split((self.bins, self.bins, self.bins - 1), -1)
        one = math.log(math.expm1(1.0 - 1e-3))  # where softplus and nflows' least slope make it 1
        found: tuple[Tensor, Tensor] = unconstrained_rational_quadratic_spline(
            x, widths, heights, slopes + one, inverse=inverse, tails="linear", tail_bound=self.bound
        )
        return found

    def forward(self, x: Tensor) -> Tensor:
        return self._call(x, inverse=False)[0]

    def inverse(self, y: Tensor) -> Tensor:
        return self._call(y, inverse=True)[0]

    def log_derivative(self, x: Tensor) -> Tensor:
        return self._call(x, inverse=False)[1]


def lunet(
    layers: int,
    *,
    by_label: bool = False,
    between: Callable[[int], BijectiveActivation] | None = None,
    **settings: Any,
) -> Make:
    """An LU-Net, whitened unless the settings say otherwise; with LeakySoftplus, or what they say.

    ``between`` makes other activations between its layers, of this many features.
    """

    def make(rows: Tensor, config: DensityConfig, classes: int) -> nn.Module:
        own = config.replace(layers=layers, conditional=by_label, **settings)
        flow = build_flow(own, rows.shape[1], classes)
        if between is not None:
            for layer in flow.net.layers[:-1]:
                layer.activation = between(rows.shape[1])
        (whiten if own.whiten else fit_input)(flow, rows)
        return flow

    return make


#: Splines between the layers and before the first: what ``lunet-fast density train`` does as typed.
SPLINES: dict[str, Any] = {"activation": "spline", "bins": 8, "input_bins": 16}
BOUNDED = {**SPLINES, "tails": "identity"}


def zuko(kind: str, transforms: int, hidden: tuple[int, ...], **options: Any) -> Make:
    def make(rows: Tensor, config: DensityConfig, classes: int) -> nn.Module:
        import zuko.flows

        features = rows.shape[1]
        flow = getattr(zuko.flows, kind)(features, transforms=transforms, hidden_features=hidden, **options)
        return Zuko(flow.transform, features, config.components, rows)

    return make


def nflows(blocks: int, hidden: int) -> Make:
    """LULinear and a rational-quadratic coupling, alternating, as nflows' users stack them."""

    def make(rows: Tensor, config: DensityConfig, classes: int) -> nn.Module:
        from nflows.nn.nets import ResidualNet
        from nflows.transforms import CompositeTransform, PiecewiseRationalQuadraticCouplingTransform
        from nflows.transforms.lu import LULinear
        from nflows.utils import create_alternating_binary_mask

        features = rows.shape[1]
        parts: list[nn.Module] = []
        for block in range(blocks):
            parts += [
                LULinear(features, identity_init=True),
                PiecewiseRationalQuadraticCouplingTransform(
                    create_alternating_binary_mask(features, even=block % 2 == 0),
                    lambda inputs, outputs: ResidualNet(inputs, outputs, hidden, num_blocks=1),
                    num_bins=4,
                    tails="linear",
                    tail_bound=5.0,
                ),
            ]
        return Nflows(CompositeTransform(parts), features, config.components, rows)

    return make


def gaussianization(layers: int, components: int) -> Make:
    def make(rows: Tensor, config: DensityConfig, classes: int) -> nn.Module:
        features = rows.shape[1]
        return Nflows(Gaussianization(features, layers, components), features, config.components, rows)

    return make


#: Family → size → flow, on digits (D 64): at most 14,000, 24,000 and 62,000 parameters, but for MAF and NSF,
#: whose layers come in large pieces.
DIGITS_FLOWS: dict[str, dict[str, Make]] = {
    "LU-Net": {"M": lunet(4, **SPLINES), "S": lunet(2, **SPLINES), "L": lunet(12, **SPLINES)},
    "LULinear + splines (nflows)": {"M": nflows(2, 12), "S": nflows(1, 8), "L": nflows(3, 32)},
    "LU-Net, LeakySoftplus": {"M": lunet(4), "S": lunet(2), "L": lunet(12)},
    "RealNVP (zuko)": {
        "M": zuko("RealNVP", 6, (32,)),
        "S": zuko("RealNVP", 4, (24,)),
        "L": zuko("RealNVP", 6, (96,)),
    },
    "MAF (zuko)": {"M": zuko("MAF", 3, (32,)), "S": zuko("MAF", 2, (24,)), "L": zuko("MAF", 4, (80,))},
    "Gaussianization": {"M": gaussianization(3, 10), "S": gaussianization(2, 4)},
    "LU-Net, a context for each label": {"M": lunet(4, by_label=True, **SPLINES)},
    GAUSSIAN: {"S": lunet(1)},
    "NSF, coupling (zuko)": {
        "M": zuko("NSF", 2, (12,), passes=2, bins=4),
        "S": zuko("NSF", 2, (6,), passes=2, bins=4),
        "L": zuko("NSF", 4, (16,), passes=2, bins=4),
    },
    "NSF, autoregressive (zuko)": {
        "M": zuko("NSF", 1, (16,)),
        "S": zuko("NSF", 1, (8,)),
        "L": zuko("NSF", 2, (24,)),
    },
}

#: LU-Net M with the settings that were chosen for it on digits, but for half of its steps.
ABLATED = DensityConfig(learning_rate=0.02, weight_decay=0.2, components=30, steps=5000, patience=12)

_CONVEX: dict[str, Any] = {"activation": "leaky_softplus", "input_bins": 0}

#: Group → name → what is changed: settings, or what stands between the layers.
ABLATION: dict[str, dict[str, dict[str, Any]]] = {
    "splines": {
        "before the first layer and between layers": {},
        "between layers alone": {"input_bins": 0},
        "before the first layer alone": {"activation": "leaky_softplus"},
        "nowhere": _CONVEX,
        "before the first layer, rational-quadratic ones between layers": {"between": RationalQuadratic},
    },
    "bins between layers": {"4": {"bins": 4}, "16": {"bins": 16}, "32": {"bins": 32}},
    "bins before the first layer": {"8": {"input_bins": 8}, "32": {"input_bins": 32}},
    "slopes outside of the bins": {"1": {"tails": "identity"}},
    "weight decay": {"0": {"weight_decay": 0.0}, "1": {"weight_decay": 1.0}, "3": {"weight_decay": 3.0}},
    "base": {"standard normal": {"components": 1}},
    "signs": {"positive": {"signs": "positive"}, "random": {"signs": "random"}},
    "start": {"near the identity, not whitened": {"whiten": False}},
    "layers": {str(layers): {"layers": layers} for layers in (1, 2, 8, 16, 32)},
    "layers, LeakySoftplus": {str(layers): {**_CONVEX, "layers": layers} for layers in (2, 8, 16, 32)},
}

#: For 2-D toy densities, at three sizes of about 150, 350 and 1,200 parameters.
PLANE_FLOWS: dict[str, dict[str, Make]] = {
    "LU-Net": {"S": lunet(3, **SPLINES), "M": lunet(7, **SPLINES), "L": lunet(24, **SPLINES)},
    "LU-Net, tails of slope 1": {
        "S": lunet(3, **BOUNDED),
        "M": lunet(8, **BOUNDED),
        "L": lunet(28, **BOUNDED),
    },
    "LU-Net, LeakySoftplus": {"S": lunet(8), "M": lunet(16), "L": lunet(32)},
    "RealNVP (zuko)": {
        "S": zuko("RealNVP", 4, (8,)),
        "M": zuko("RealNVP", 6, (12,)),
        "L": zuko("RealNVP", 8, (32,)),
    },
    "NSF (zuko)": {"S": zuko("NSF", 1, (4,)), "M": zuko("NSF", 2, (4,)), "L": zuko("NSF", 3, (12,))},
}

"""The flows that ``density.py`` compares, and the settings that they have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lunet_fast import NormalMixture, StandardNormal
from lunet_fast.density.config import DensityConfig
from lunet_fast.density.model import build_flow, whiten

GAUSSIAN = "Gaussian or mixture (M = 1)"

#: Of each flow: the base, Adam's rate, the decay of matrices.
GRID = tuple(
    {"components": components, "learning_rate": rate, "weight_decay": decay}
    for components in (1, 30)
    for rate, decay in ((1e-3, 0.01), (5e-3, 0.01), (5e-3, 0.2))
)
LEAKY = DensityConfig(activation="leaky_softplus", input_bins=0, weight_decay=0.2)
DIGITS = LEAKY.replace(steps=5000, patience=12, learning_rate=5e-3)
PLANE = LEAKY.replace(steps=2500, patience=25, batch_size=512, weight_decay=0.0, signs="random")


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


def lunet(layers: int, *, by_label: bool = False) -> Make:
    def make(rows: Tensor, config: DensityConfig, classes: int) -> nn.Module:
        flow = build_flow(config.replace(layers=layers, conditional=by_label), rows.shape[1], classes)
        whiten(flow, rows)
        return flow

    return make


def zuko(kind: str, transforms: int, hidden: tuple[int, ...]) -> Make:
    def make(rows: Tensor, config: DensityConfig, classes: int) -> nn.Module:
        import zuko.flows

        features = rows.shape[1]
        flow = getattr(zuko.flows, kind)(features, transforms=transforms, hidden_features=hidden)
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


#: Family → size → flow, on digits (D 64).
DIGITS_FLOWS: dict[str, dict[str, Make]] = {
    "LU-Net": {"S": lunet(2), "M": lunet(4), "L": lunet(12)},
    "LU-Net, a context for each label": {"M": lunet(4, by_label=True)},
    GAUSSIAN: {"S": lunet(1)},
    "RealNVP (zuko)": {
        "S": zuko("RealNVP", 4, (24,)),
        "M": zuko("RealNVP", 6, (32,)),
        "L": zuko("RealNVP", 6, (96,)),
    },
    "MAF (zuko)": {"S": zuko("MAF", 2, (24,)), "M": zuko("MAF", 3, (32,)), "L": zuko("MAF", 4, (80,))},
    "NSF (zuko)": {
        "S": zuko("NSF", 1, (8,)),
        "M": zuko("NSF", 1, (16,)),
        "L": zuko("NSF", 2, (24,)),
    },
    "LULinear + splines (nflows)": {"S": nflows(1, 8), "M": nflows(2, 12), "L": nflows(3, 32)},
}

#: For 2-D toy densities, at three sizes of about 150, 300 and 1,200 parameters.
PLANE_FLOWS: dict[str, dict[str, Make]] = {
    "LU-Net": {"S": lunet(8), "M": lunet(16), "L": lunet(32)},
    "RealNVP (zuko)": {
        "S": zuko("RealNVP", 4, (8,)),
        "M": zuko("RealNVP", 6, (12,)),
        "L": zuko("RealNVP", 8, (32,)),
    },
    "NSF (zuko)": {"S": zuko("NSF", 1, (4,)), "M": zuko("NSF", 2, (4,)), "L": zuko("NSF", 3, (12,))},
}

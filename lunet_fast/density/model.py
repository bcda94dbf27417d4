"""DensityModel: a flow together with what its data goes through, so that it speaks of the data itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from lunet_fast.density.config import DensityConfig
from lunet_fast.density.preprocessing import Preprocessing
from lunet_fast.layers.activations import BijectiveActivation, LeakySoftplus
from lunet_fast.layers.conditional import ConditionalLUNet
from lunet_fast.layers.flow import LUFlow, NormalMixture
from lunet_fast.layers.lunet import LUNet
from lunet_fast.layers.splines import MonotoneSpline

ROWS_AT_ONCE = 8192
"""Rows, times classes, in one pass of an evaluation: what bounds its memory."""


def build_flow(config: DensityConfig, features: int, classes: int = 0) -> LUFlow:
    """The flow of these settings on ℝᴰ, drawn by PyTorch's global generator, not yet whitened.

    ``classes`` are needed where ``config.conditional``: ``ValueError`` without.
    """
    activation: BijectiveActivation
    if config.activation == "spline":
        activation = MonotoneSpline(features, config.bins, config.tails)
    else:
        activation = LeakySoftplus(
            config.alpha,
            learnable=config.slopes != "fixed",
            features=features if config.slopes == "coordinate" else None,
        )
    net: Any = LUNet(
        features,
        config.layers,
        activation,
        permutation=config.permutation,
        signs=config.signs,
        structure_seed=config.seed,
        input=MonotoneSpline(features, config.input_bins, config.tails) if config.input_bins else None,
    )
    if config.conditional:
        if classes < 1:
            raise ValueError("conditional=True needs labels, and the data has none: set it to False")
        conditioner = nn.Embedding(classes, 2 * config.layers * features)
        nn.init.zeros_(conditioner.weight)
        net = ConditionalLUNet(net, conditioner)
    return LUFlow(net, NormalMixture(features, config.components) if config.components > 1 else None)


def fit_input(flow: LUFlow, y: Tensor) -> None:
    """Set the interval of the spline before the first layer, if there is one, to that of rows y [N, D]."""
    spline = _net_of(flow).input
    if isinstance(spline, MonotoneSpline):
        spline.fit_range(y)


def whiten(flow: LUFlow, y: Tensor) -> None:
    """``fit_input``, and ``LUNet.whiten`` of the flow's net on rows y [N, D]."""
    fit_input(flow, y)
    _net_of(flow).whiten(y)


def _net_of(flow: LUFlow) -> LUNet:
    return cast(LUNet, flow.net.net if isinstance(flow.net, ConditionalLUNet) else flow.net)


@dataclass
class DensityModel:
    """A density on data rows [N, D].

    ``shares`` [C] are the classes' shares of the training rows where the flow is conditional, else None. The
    flow may be on any device; shares are on the CPU, and so are samples.
    """

    flow: Any
    preprocessing: Preprocessing
    features: int
    shares: Tensor | None = None

    def forward(self, x: Tensor, labels: Tensor | None, generator: torch.Generator) -> Tensor:
        """log p(x), or log p(x | labels), [N] at one draw of the noise. Differentiable."""
        y, logabsdet = self.preprocessing.forward(x, generator)
        return (self.flow.log_prob(y) if labels is None else self.flow.log_prob(y, labels)) + logabsdet

    def log_prob(self, x: Tensor, draws: int = 1, seed: int = 0) -> Tensor:
        """log p(x) [N] for rows x [N, D], summed over the classes of a conditional flow. No gradient.

        Of integers, the mean of log p(x + u) over ``draws`` draws of the noise from ``seed``, in the mean a
        lower bound of log P(x). Without noise ``draws`` has no effect.
        """
        generator = torch.Generator(x.device).manual_seed(seed)
        draws = draws if self.preprocessing.levels is not None else 1
        rows = max(1, ROWS_AT_ONCE // (1 if self.shares is None else len(self.shares)))
        with torch.no_grad():
            return torch.cat(
                [
                    torch.stack([self._marginal(part, generator) for _ in range(draws)]).mean(0)
                    for part in x.split(rows)
                ]
            )

    def _marginal(self, x: Tensor, generator: torch.Generator) -> Tensor:
        y, logabsdet = self.preprocessing.forward(x, generator)
        if self.shares is None:
            return self.flow.log_prob(y.to(self.device)).to(y.device) + logabsdet
        return self.class_log_prob(y).logsumexp(-1) + logabsdet

    @property
    def device(self) -> torch.device:
        """Where the flow is."""
        return next(parameter.device for parameter in self.flow.parameters())

    def class_log_prob(self, y: Tensor) -> Tensor:
        """log p(y, c) [N, C] of a conditional flow, for preprocessed rows; its softmax says the class."""
        assert self.shares is not None
        classes = torch.arange(len(self.shares), device=self.device)
        found = self.flow.log_prob(y.to(self.device).unsqueeze(-2), classes)
        return found.to(y.device) + self.shares.log().to(y)

    def loss(self, x: Tensor, draws: int = 1, seed: int = 0) -> Tensor:
        """−log p(x) [N] in the unit of the preprocessing, without gradient."""
        return self.preprocessing.loss(self.log_prob(x, draws, seed), self.features)

    def sample(self, n: int, labels: Tensor | None = None) -> Tensor:
        """n rows of data [n, D], by PyTorch's global generator; with ``labels`` [n], of these classes."""
        if self.shares is None:
            if labels is not None:
                raise ValueError("labels must be None: the flow was not trained with labels")
            return self.preprocessing.inverse(self.flow.sample(n).cpu())
        if labels is None:
            labels = torch.multinomial(self.shares, n, replacement=True)
        return self.preprocessing.inverse(self.flow.sample((), labels.to(self.device)).cpu())

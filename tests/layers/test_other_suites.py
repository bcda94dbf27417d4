"""Our nets as transforms of other flow libraries, by adapters of a few lines: what their own tests ask."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lunet_fast import LUFlow, LUNet, MonotoneSpline

nflows = pytest.importorskip("nflows.transforms")
normflows = pytest.importorskip("normflows")

D, N = 5, 12


class OfNflows(nflows.Transform):  # type: ignore[misc]
    """As nflows calls a transform: data to latents, with the log-determinant of each direction."""

    def __init__(self, net: LUNet) -> None:
        super().__init__()
        self.net = net

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.net.forward_and_logabsdet(inputs)

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.net.inverse_and_logabsdet(inputs)


class OfNormflows(normflows.flows.Flow):  # type: ignore[misc]
    """As normflows calls a flow: latents to data forward."""

    def __init__(self, net: LUNet) -> None:
        super().__init__()
        self.net = net

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return self.net.inverse_and_logabsdet(z)

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return self.net.forward_and_logabsdet(z)


def nets() -> list[LUNet]:
    torch.manual_seed(3)
    found = [
        LUNet(D, 1),
        LUNet(D, 3, signs="random", permutation="random"),
        LUNet(D, 2, MonotoneSpline(D), input=MonotoneSpline(D)),
    ]
    for net in found:
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return [net.double() for net in found]


def rows() -> Tensor:
    return torch.randn(N, D, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("net", nets(), ids=["one layer", "three", "splines"])
class TestNflows:
    def test_both_ways_are_the_identity(self, net: LUNet) -> None:
        ours, x = OfNflows(net), rows()
        for order in ([ours, nflows.InverseTransform(ours)], [nflows.InverseTransform(ours), ours]):
            y, logabsdet = nflows.CompositeTransform(order)(x)
            assert y.shape == x.shape
            assert logabsdet.shape == (N,)
            torch.testing.assert_close(y, x)
            torch.testing.assert_close(logabsdet, torch.zeros(N, dtype=x.dtype), atol=1e-9, rtol=0)

    def test_in_a_flow_of_theirs(self, net: LUNet) -> None:
        """Beside their layers; a composite adds log-determinants up in place."""
        from nflows.distributions.normal import StandardNormal
        from nflows.flows.base import Flow

        torch.manual_seed(1)
        theirs = nflows.LULinear(D).double()
        flow = Flow(nflows.CompositeTransform([OfNflows(net), theirs]), StandardNormal([D])).double()
        x = rows()
        found = flow.log_prob(x)
        jacobians = torch.func.vmap(torch.func.jacrev(lambda r: theirs(net(r.unsqueeze(0)))[0].squeeze(0)))(x)
        z = theirs(net(x))[0]
        wanted = torch.distributions.Normal(0, 1).log_prob(z).sum(-1) + torch.linalg.slogdet(jacobians)[1]
        torch.testing.assert_close(found, wanted)
        found.mean().backward()
        assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in net.parameters())
        assert flow.sample(7).shape == (7, D)
        drawn, log_prob = flow.sample_and_log_prob(7)
        torch.testing.assert_close(log_prob.double(), flow.log_prob(drawn).double(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("net", nets(), ids=["one layer", "three", "splines"])
class TestNormflows:
    def test_both_ways_are_the_identity(self, net: LUNet) -> None:
        ours, z = OfNormflows(net), rows()
        x, forth = ours(z)
        back, inverse = ours.inverse(x)
        torch.testing.assert_close(back, z)
        torch.testing.assert_close(forth, -inverse)

    def test_in_a_flow_of_theirs(self, net: LUNet) -> None:
        base = normflows.distributions.DiagGaussian(D).double()
        theirs = normflows.NormalizingFlow(base, [OfNormflows(net)])
        x, ours = rows(), LUFlow(net)
        torch.testing.assert_close(theirs.log_prob(x), ours.log_prob(x))
        # It adds up in float32.
        torch.testing.assert_close(
            theirs.forward_kld(x).double(), -ours.log_prob(x).mean(), rtol=1e-5, atol=1e-5
        )
        theirs.forward_kld(x).backward()
        assert all(p.grad is not None for p in net.parameters())
        drawn, log_prob = theirs.sample(6)
        torch.testing.assert_close(log_prob, ours.log_prob(drawn))
        # The reverse KL divergence draws from the flow and differentiates the draws.
        target = torch.distributions.MultivariateNormal(torch.zeros(D).double(), torch.eye(D).double())
        theirs.p = target
        assert bool(theirs.reverse_kld(50).isfinite())

"""The flows of other libraries that ``benchmarks/density.py`` compares with: their log-determinants are those
of their Jacobians, also where training and its weight decay have moved every parameter."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
FEATURES = 5


@pytest.mark.parametrize(
    "family",
    [
        "LULinear + splines (nflows)",
        "RealNVP (zuko)",
        "MAF (zuko)",
        "NSF, coupling (zuko)",
        "NSF, autoregressive (zuko)",
        "Gaussianization",
    ],
)
def test_log_determinants(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An orthogonal matrix that decay had made singular once gave bits a dimension of −38."""
    pytest.importorskip("zuko")
    pytest.importorskip("nflows")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from density_flows import DIGITS, DIGITS_FLOWS

    torch.manual_seed(0)
    rows = torch.randn(100, FEATURES)
    flow = DIGITS_FLOWS[family]["S"](rows, DIGITS.replace(components=1), 0).double().eval()
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.mul_(0.9).add_(0.05 * torch.randn_like(parameter))
    rows = rows[:4].double()
    z, logabsdet = flow.call(rows)
    jacobians = [torch.autograd.functional.jacobian(lambda x: flow.call(x[None])[0][0], row) for row in rows]
    expected = torch.linalg.slogdet(torch.stack(jacobians)).logabsdet
    torch.testing.assert_close(logabsdet, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(flow.inverse(z), rows, rtol=1e-4, atol=1e-4)

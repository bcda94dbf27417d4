"""LUFlow.for_data and LUFlow.fit: a flow of data in two calls."""

from __future__ import annotations

import math
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

from lunet_fast import ConditionalLUNet, LUFlow, LUNet, MonotoneSpline, NormalMixture, StandardNormal


def skewed(count: int = 1500, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(count, 3, generator=generator) @ torch.tensor([[1.0, 0.4, 0], [0, 1, 0], [0.2, 0, 1]])
    return torch.exp(0.5 * z) * torch.tensor([1.0, 100.0, 0.01])


def test_for_data_starts_at_the_datas_scale() -> None:
    x = skewed()
    flow = LUFlow.for_data(x, 3)
    assert isinstance(flow.net.input, MonotoneSpline)
    assert isinstance(flow.base, NormalMixture)
    gaussian = torch.distributions.MultivariateNormal(x.mean(0), torch.cov(x.T))
    assert float(flow.log_prob(x).mean()) > float(gaussian.log_prob(x).mean()) - 1.0
    z = flow.net(x)
    torch.testing.assert_close(z.mean(0), torch.zeros(3), rtol=0, atol=1e-2)
    plain = LUFlow.for_data(x.double(), 2, bins=4, input_bins=6, tails="identity", components=1)
    assert isinstance(plain.base, StandardNormal)
    assert plain.net.layers[0].lu.dtype == torch.float64
    assert plain.log_prob(x.double()).dtype == torch.float64


def test_fit_finds_a_density_and_keeps_the_best_weights() -> None:
    x = skewed()
    torch.manual_seed(0)
    flow, record = LUFlow.for_data(x, 2, components=4).fit(x, steps=300, round_steps=50, progress=False)
    assert len(record.train) == len(record.validation) == 6
    assert record.steps == 300
    assert record.best == min(record.validation) < record.first
    # Of a lognormal: that of the normal less Σ log(dx/dz).
    root = torch.tensor([[1.0, 0.4, 0], [0, 1, 0], [0.2, 0, 1]])
    normal = torch.distributions.MultivariateNormal(torch.zeros(3), root.T @ root)
    test = skewed(2000, seed=1)
    raw = 2.0 * (test / torch.tensor([1.0, 100.0, 0.01])).log()
    truth = float((normal.log_prob(raw) - (0.5 * test).log().sum(-1)).mean())
    assert truth - 0.6 < float(flow.log_prob(test).mean().detach()) < truth


def test_fit_ends_early_and_in_the_same_weights_by_seed() -> None:
    x = skewed(60)

    def once() -> tuple[LUFlow, int]:
        torch.manual_seed(0)
        options = {"steps": 3000, "round_steps": 10, "patience": 2, "learning_rate": 0.05, "average": 0.0}
        flow, record = LUFlow(LUNet(3, 2)).fit(x, progress=False, **options)
        assert len(record.validation) == record.best_round + 2 < 300
        return flow, record.best_round

    (first, rounds), (again, same) = once(), once()
    assert rounds == same
    assert torch.equal(first.log_prob(x), again.log_prob(x))


def test_fit_of_a_conditional_flow_and_of_given_validation_rows() -> None:
    labels = torch.arange(300) % 2
    x = 0.3 * torch.randn(300, 2, generator=torch.Generator().manual_seed(0)) + 4.0 * labels.unsqueeze(-1)
    context = torch.nn.functional.one_hot(labels).float()
    flow, record = LUFlow(ConditionalLUNet(LUNet(2, 2), 2)).fit(x, context, steps=300, progress=False)
    assert record.best < record.first
    right, wrong = flow.log_prob(x, context).mean(), flow.log_prob(x, 1.0 - context).mean()
    assert float(right) > float(wrong)
    held_out = skewed(40, seed=2)
    flow = LUFlow(LUNet(3, 2))
    _, record = flow.fit(skewed(100), validation=held_out, steps=20, round_steps=20, progress=False)
    torch.testing.assert_close(record.best, -float(flow.log_prob(held_out).mean()), rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not (find_spec("tqdm") or find_spec("rich")), reason="nothing here that shows it")
def test_progress_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    LUFlow(LUNet(3, 1)).fit(skewed(50), steps=20, round_steps=10)
    shown = capsys.readouterr()
    assert "2/2" in shown.err or "rounds" in shown.out


@pytest.mark.parametrize(
    ("x", "options", "told"),
    [
        (torch.zeros(5), {}, "at least 2 rows"),
        (torch.tensor([[1.0, 2, 3], [math.nan, 0, 0]]), {}, "all finite"),
        (torch.randn(9, 3), {"validation": 1.5}, "share between 0 and 1"),
        (torch.randn(9, 3), {"context": torch.zeros(4, 1)}, "one row for each of 9"),
    ],
)
def test_what_cannot_be_fitted(x: Tensor, options: dict, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        LUFlow(LUNet(3, 1)).fit(x, progress=False, **options)


def test_a_loss_that_is_not_finite_ends_it() -> None:
    with pytest.raises(ArithmeticError, match="use a lower learning_rate"):
        LUFlow(LUNet(3, 3)).fit(skewed(50) * 1e30, steps=10, round_steps=5, progress=False)


@pytest.mark.parametrize("x", [torch.randn(3), torch.zeros(1, 3)])
def test_no_flow_for_what_are_no_rows(x: Tensor) -> None:
    with pytest.raises(ValueError, match=r"x must"):
        LUFlow.for_data(x)

"""ConditionalLUNet: the same as an LUNet with moved log-diagonals and biases, inverse and density."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lunet_fast import ConditionalLUNet, LeakySoftplus, LUFlow, LUNet, NormalMixture
from lunet_fast.layers.conditional import SCALE_LIMIT


def made(features: int = 4, layers: int = 3, context: int = 2, seed: int = 0) -> ConditionalLUNet:
    torch.manual_seed(seed)
    net = LUNet(
        features, layers, LeakySoftplus(0.3, True, features), permutation="random", dtype=torch.float64
    )
    conditional = ConditionalLUNet(net, context)
    nn.init.normal_(conditional.conditioner.weight, std=0.5)
    nn.init.normal_(conditional.conditioner.bias, std=0.5)
    return conditional


def moved(conditional: ConditionalLUNet, context: Tensor) -> LUNet:
    """An LUNet whose factors hold one context: diag(e^δ) L U with L′ = diag(e^δ) L diag(e^−δ)."""
    net = conditional.net
    delta, beta = (
        conditional.conditioner(context).detach().unflatten(-1, (2, len(net.layers), net.features)).unbind(0)
    )
    delta = SCALE_LIMIT * torch.tanh(delta / SCALE_LIMIT)
    fixed = LUNet(net.features, len(net.layers), LeakySoftplus(0.3, True, net.features), dtype=torch.float64)
    fixed.load_state_dict(net.state_dict())
    with torch.no_grad():
        for layer, d, b in zip(fixed.layers, delta, beta, strict=True):
            # h = e^δ ∘ (Pᵀ L U x + b): by rows of L U, the δ that P puts there.
            own = d if layer.permutation is None else d[layer.permutation]
            lower = own.exp().unsqueeze(-1) * layer.lu.tril(-1) * (-own).exp()
            upper = own.exp().unsqueeze(-1) * layer.lu.triu(1)
            layer.lu.copy_(lower + upper + torch.diag(layer.lu.diagonal() + own))
            layer.bias.copy_(d.exp() * layer.bias + b)
    return fixed


@pytest.mark.parametrize("seed", range(3))
def test_is_an_lunet_with_other_diagonals_and_biases(seed: int) -> None:
    conditional = made(seed=seed)
    x = torch.randn(6, 4, dtype=torch.float64)
    for context in torch.randn(3, 2, dtype=torch.float64):
        found = conditional.given(context).forward_and_logabsdet(x)
        for f, e in zip(found, moved(conditional, context).forward_and_logabsdet(x), strict=True):
            torch.testing.assert_close(f, e, rtol=1e-12, atol=1e-12)


def test_a_context_a_row_or_one_for_all() -> None:
    conditional = made()
    x, contexts = torch.randn(5, 4, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)
    y, logabsdet = conditional.given(contexts).forward_and_logabsdet(x)
    for row in range(5):
        one, share = conditional.given(contexts[row]).forward_and_logabsdet(x[row])
        torch.testing.assert_close(y[row], one, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(logabsdet[row], share, rtol=1e-12, atol=1e-12)


def test_there_and_back() -> None:
    given = made().given(torch.randn(7, 2, dtype=torch.float64))
    x = torch.randn(7, 4, dtype=torch.float64)
    y, forward = given.forward_and_logabsdet(x)
    back, backward = given.inverse_and_logabsdet(y)
    torch.testing.assert_close(back, x, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(forward, -backward, rtol=1e-10, atol=1e-10)
    jacobian = torch.stack(
        [torch.autograd.functional.jacobian(made_row(given, row), x[row]) for row in range(7)]
    )
    torch.testing.assert_close(jacobian.slogdet().logabsdet, forward, rtol=1e-10, atol=1e-10)


def made_row(given: object, row: int) -> object:
    return lambda x: given(x.expand(7, 4))[row]


def test_starts_as_the_net() -> None:
    net = LUNet(3, 2)
    x = torch.randn(4, 3)
    torch.testing.assert_close(ConditionalLUNet(net, 5).given(torch.randn(4, 5))(x), net(x))


def test_flow_by_labels_integrates_to_one_and_samples_agree() -> None:
    torch.manual_seed(0)
    net = LUNet(2, 3, LeakySoftplus(0.5))
    conditioner = nn.Embedding(3, 2 * 3 * 2)
    nn.init.normal_(conditioner.weight, std=0.3)
    flow = LUFlow(ConditionalLUNet(net, conditioner), NormalMixture(2, 4)).double()
    line = torch.linspace(-25, 25, 701, dtype=torch.float64)
    points = torch.cartesian_prod(line, line)
    with torch.no_grad():
        for label in range(3):
            density = flow.log_prob(points, torch.tensor(label)).exp()
            assert float(density.sum()) * float(line[1] - line[0]) ** 2 == pytest.approx(1.0, abs=1e-3)
    labels = torch.tensor([0, 2])
    x, log_prob = flow.sample_and_log_prob(5, labels)
    assert x.shape == (5, 2, 2)
    torch.testing.assert_close(log_prob, flow.log_prob(x, labels), rtol=1e-9, atol=1e-9)
    transform = flow.as_transform(labels)
    torch.testing.assert_close(transform.inv(transform(x)), x)


def test_context_must_be_given_where_there_is_one_and_nowhere_else() -> None:
    with pytest.raises(ValueError, match="context must be given"):
        LUFlow(ConditionalLUNet(LUNet(2, 1), 1)).log_prob(torch.zeros(2))
    with pytest.raises(ValueError, match="context must be None"):
        LUFlow(LUNet(2, 1)).sample(3, torch.zeros(1))


def test_bad_conditioners() -> None:
    with pytest.raises(ValueError, match="at least 1, got 0"):
        ConditionalLUNet(LUNet(2, 1), 0)
    with pytest.raises(ValueError, match=r"2·M·D = 4 numbers a context, got shape \(3, 7\)"):
        ConditionalLUNet(LUNet(2, 1), nn.Linear(1, 7)).given(torch.zeros(3, 1))


def test_gradients() -> None:
    conditional = made(3, 2)
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    context = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)

    def both(x: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        return conditional.given(context).forward_and_logabsdet(x)

    assert torch.autograd.gradcheck(both, (x, context))


@pytest.mark.parametrize("method", ["forward_and_logabsdet", "inverse_and_logabsdet"])
@pytest.mark.parametrize("layers", [1, 2])
def test_a_log_determinant_may_be_added_to_in_place(method: str, layers: int) -> None:
    conditional = ConditionalLUNet(LUNet(4, layers), 2)
    for context in (torch.randn(2), torch.randn(7, 2)):
        logabsdet = getattr(conditional.given(context), method)(torch.randn(7, 4))[1]
        expected = logabsdet + torch.arange(7.0)
        logabsdet += torch.arange(7.0)
        torch.testing.assert_close(logabsdet, expected)


def test_a_reset_starts_at_the_net_in_any_order() -> None:
    with torch.device("meta"):
        conditional = ConditionalLUNet(LUNet(4, 3, signs="random", permutation="random"), 2)
    conditional.to_empty(device="cpu")
    for module in conditional.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    x = torch.randn(6, 4)
    torch.testing.assert_close(conditional.given(torch.randn(6, 2))(x), conditional.net(x))


def test_replaced_methods_are_called_or_refused() -> None:
    conditional = ConditionalLUNet(LUNet(4, 2), 2)
    given, x = conditional.given(torch.randn(2)), torch.randn(6, 4)
    plain, seen = given(x), []
    activation = conditional.net.layers[0].activation
    activation.register_forward_hook(lambda module, inputs, result: seen.append(1))
    torch.testing.assert_close(given(x), plain)
    assert seen == [1]
    layer = conditional.net.layers[1]
    layer.forward = lambda x: 2.0 * x
    with pytest.raises(TypeError, match=r"layers.1 has a method of its own"):
        given(x)


def test_wrong_arguments() -> None:
    for conditioner in (2.0, "2", None):
        with pytest.raises(
            TypeError, match="conditioner, a module or the number of context features, must be an int"
        ):
            ConditionalLUNet(LUNet(4, 2), conditioner)
    with pytest.raises(ValueError, match="conditioner, .* must be at least 1, got 0"):
        ConditionalLUNet(LUNet(4, 2), 0)
    with pytest.raises(TypeError, match="net must be an LUNet, got Linear"):
        ConditionalLUNet(nn.Linear(4, 4), 2)
    with pytest.raises(TypeError, match=r"x must be a torch.Tensor, got numpy"):
        ConditionalLUNet(LUNet(4, 2), 2).given(torch.randn(2))(torch.zeros(2, 4).numpy())

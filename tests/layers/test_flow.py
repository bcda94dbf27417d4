"""LUFlow: densities with known answers, samples, and torch.distributions."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import pytest
import torch
import truth
from torch import Tensor, nn
from torch.distributions import (
    ComposeTransform,
    Independent,
    Laplace,
    MultivariateNormal,
    Normal,
    Transform,
    TransformedDistribution,
    constraints,
    kl_divergence,
)

from lunet_fast import (
    ConditionalLUNet,
    GeneralizedLeakySoftplus,
    LeakySoftplus,
    LUDense,
    LUFlow,
    LUNet,
    NormalMixture,
    StandardNormal,
)


def make(d: int, layers: int, seed: int = 0, dtype: torch.dtype = torch.float64, **scales: float) -> LUNet:
    net = LUNet(d, layers, LeakySoftplus(0.3), dtype=dtype)
    for index, layer in enumerate(net.layers):
        truth.randomise(layer, 100 * seed + index, **({"coupling": 0.5, "offset": 0.5} | scales))
    return net


def standard(d: int, dtype: torch.dtype = torch.float64) -> Independent:
    return Independent(Normal(torch.zeros(d, dtype=dtype), torch.ones(d, dtype=dtype)), 1)


def exact_log_prob(x: Tensor, net: LUNet) -> Tensor:
    total = torch.zeros(x.shape[:-1], dtype=torch.float64)
    for layer in net.layers:
        x, logabsdet = truth.forward(x, truth.read(layer))
        total = total + logabsdet
    return total - 0.5 * x.square().sum(-1) - 0.5 * x.shape[-1] * math.log(2 * math.pi)


# ---- densities


@pytest.mark.parametrize("d", [1, 2, 7])
def test_a_linear_flow_is_a_multivariate_normal(d: int) -> None:
    """z = A x + b with z ~ N(0, I): x ~ N(-A^-1 b, (A^T A)^-1)."""
    net = make(d, 1)
    flow = LUFlow(net)
    layer = truth.read(net.layers[0])
    matrix = truth.weight(layer.lu, layer.sign, layer.permutation)
    mean = -torch.linalg.solve(matrix, layer.bias)
    exact = MultivariateNormal(mean, precision_matrix=matrix.T @ matrix)
    x = torch.randn(5, 3, d, dtype=torch.float64)
    log_prob = flow.log_prob(x)
    assert log_prob.shape == (5, 3)
    torch.testing.assert_close(log_prob, exact.log_prob(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("layers", [1, 2, 4])
@pytest.mark.parametrize("shape", [(), (0,), (9,), (2, 3)], ids=str)
def test_log_prob_by_the_change_of_variables(layers: int, shape: tuple[int, ...]) -> None:
    net = make(4, layers)
    x = torch.randn(*shape, 4, dtype=torch.float64)
    log_prob = LUFlow(net).log_prob(x)
    assert log_prob.shape == shape
    torch.testing.assert_close(log_prob, exact_log_prob(x, net), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("seed", [0, 1])
def test_integrates_to_one_in_one_dimension(layers: int, seed: int) -> None:
    flow = LUFlow(make(1, layers, seed))
    # The slopes of three layers are above 0.3^2 e^-1.5, so the mass lies within +-12 / 0.02.
    x = torch.linspace(-800, 800, 400_001, dtype=torch.float64)
    with torch.no_grad():
        density = flow.log_prob(x[:, None]).exp()
    assert float(torch.trapezoid(density, x)) == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("seed", [0, 1])
def test_integrates_to_one_in_two_dimensions(seed: int) -> None:
    flow = LUFlow(make(2, 2, seed, spread=0.2, coupling=0.3))
    line = torch.linspace(-40, 40, 801, dtype=torch.float64)
    grid = torch.cartesian_prod(line, line)
    with torch.no_grad():
        density = flow.log_prob(grid).exp()
    step = float(line[1] - line[0])
    assert float(density.sum()) * step**2 == pytest.approx(1.0, abs=1e-4)


def test_another_base() -> None:
    net = make(3, 2)
    zero, one = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    flow = LUFlow(net, Independent(Laplace(zero, one), 1))
    x = torch.randn(6, 3, dtype=torch.float64)
    z, logabsdet = net.forward_and_logabsdet(x)
    exact = -z.abs().sum(-1) - 3 * math.log(2) + logabsdet
    torch.testing.assert_close(flow.log_prob(x), exact, rtol=1e-12, atol=1e-12)
    assert flow.sample(4).shape == (4, 3)


def test_gradient_of_the_likelihood_reaches_the_log_determinant() -> None:
    """Without it, training would only shrink z; the known slip of an earlier code."""
    flow = LUFlow(make(3, 2))
    x = torch.randn(20, 3, dtype=torch.float64)
    names, parameters = zip(*flow.named_parameters(), strict=True)
    found = torch.autograd.grad(flow.log_prob(x).mean(), parameters)
    layers = [truth.read(layer) for layer in flow.net.layers]
    leaves = [(s.lu.clone().requires_grad_(), s.bias.clone().requires_grad_()) for s in layers]
    z, total = x, 0.0
    for state, (lu, bias) in zip(layers, leaves, strict=True):
        z, logabsdet = truth.forward(z, state._replace(lu=lu, bias=bias))
        total = total + logabsdet
    exact = (total - 0.5 * z.square().sum(-1)).mean()
    true = torch.autograd.grad(exact, [leaf for pair in leaves for leaf in pair])
    assert len(names) == 4
    for f, t in zip(found, true, strict=True):
        torch.testing.assert_close(f, t, rtol=1e-9, atol=1e-10)


def test_fitting_by_likelihood_finds_a_normal() -> None:
    rng = torch.Generator().manual_seed(1)
    data = torch.randn(3000, 2, generator=rng) @ torch.tensor([[2.0, 0.0], [1.0, 0.5]]) + torch.tensor(
        [3.0, -1.0]
    )
    flow = LUFlow(LUNet(2, 1))
    optimizer = torch.optim.Adam(flow.parameters(), lr=0.05)
    for _ in range(400):
        optimizer.zero_grad()
        (-flow.log_prob(data).mean()).backward()
        optimizer.step()
    best = MultivariateNormal(data.mean(0), data.T.cov()).log_prob(data).mean()
    assert float(flow.log_prob(data).mean()) == pytest.approx(float(best), abs=0.01)


# ---- samples


@pytest.mark.parametrize(
    ("n", "shape"),
    [(5, (5,)), (0, (0,)), (1, (1,)), ((2, 3), (2, 3)), ((4,), (4,)), ((), ()), ([2], (2,))],
    ids=str,
)
def test_shapes_of_samples(n: int | tuple[int, ...], shape: tuple[int, ...]) -> None:
    flow = LUFlow(make(3, 2))
    assert flow.sample(n).shape == (*shape, 3)
    x, log_prob = flow.sample_and_log_prob(n)
    assert x.shape == (*shape, 3)
    assert log_prob.shape == shape


def test_torch_size_is_a_shape() -> None:
    assert LUFlow(make(3, 2)).sample(torch.Size([2, 2])).shape == (2, 2, 3)


@pytest.mark.parametrize("layers", [1, 3])
def test_sample_and_log_prob_agrees_with_log_prob(layers: int) -> None:
    flow = LUFlow(make(4, layers))
    x, log_prob = flow.sample_and_log_prob((7, 5))
    torch.testing.assert_close(log_prob, flow.log_prob(x), rtol=1e-8, atol=1e-8)


def test_samples_follow_the_density() -> None:
    """Mean and covariance of a linear flow, within five standard errors."""
    net = make(3, 1)
    layer = truth.read(net.layers[0])
    matrix = truth.weight(layer.lu, layer.sign, layer.permutation)
    covariance = torch.linalg.inv(matrix.T @ matrix)
    mean = -torch.linalg.solve(matrix, layer.bias)
    n = 40_000
    x = LUFlow(net).sample(n)
    error = (x.mean(0) - mean).abs() / (covariance.diagonal() / n).sqrt()
    assert error.max() < 5
    found = x.T.cov()
    spread = (covariance.diagonal().outer(covariance.diagonal()) + covariance.square()).div(n).sqrt()
    assert ((found - covariance).abs() / spread).max() < 5


def test_samples_of_a_nonlinear_flow_become_normal() -> None:
    flow = LUFlow(make(2, 3))
    z = flow.net(flow.sample(40_000))
    assert z.mean(0).abs().max() < 5 / 200
    assert (z.T.cov() - torch.eye(2)).abs().max() < 5 * 2**0.5 / 200


def test_samples_repeat_with_the_seed() -> None:
    flow = LUFlow(make(2, 2))
    torch.manual_seed(5)
    first = flow.sample(10)
    torch.manual_seed(5)
    assert torch.equal(first, flow.sample(10))
    assert not torch.equal(first, flow.sample(10))


def test_samples_take_gradients_only_where_they_can() -> None:
    """A draw that silently dropped the parameters' gradient must not claim to have one."""
    flow = LUFlow(make(2, 2))
    x = flow.sample(3)
    if x.requires_grad:
        gradients = torch.autograd.grad(x.sum(), list(flow.parameters()))
        assert all(g.abs().sum() > 0 for g in gradients)


# ---- dtype and state


def test_the_base_follows_the_dtype() -> None:
    flow = LUFlow(LUNet(3, 2)).double()
    x = torch.randn(5, 3, dtype=torch.float64)
    assert flow.log_prob(x).dtype == torch.float64
    assert flow.sample(2).dtype == torch.float64
    assert flow.sample_and_log_prob(2)[1].dtype == torch.float64
    torch.testing.assert_close(flow.log_prob(x), exact_log_prob(x, flow.net), rtol=1e-12, atol=1e-12)
    flow.to(torch.float32)
    assert flow.sample(2).dtype == torch.float32
    # And it is made in the dtype of the net.
    assert LUFlow(LUNet(3, 2, dtype=torch.float64)).sample(2).dtype == torch.float64


def test_the_base_follows_the_device() -> None:
    flow = LUFlow(LUNet(3, 2)).to("meta")
    assert flow.log_prob(torch.empty(5, 3, device="meta")).shape == (5,)
    assert all(b.is_meta for b in flow.buffers())


def test_state_round_trip() -> None:
    source, target = LUFlow(make(3, 2)), LUFlow(make(3, 2, seed=4))
    target.load_state_dict(source.state_dict())
    x = torch.randn(5, 3, dtype=torch.float64)
    assert torch.equal(source.log_prob(x), target.log_prob(x))


# ---- torch.distributions


@pytest.mark.parametrize("kind", ["layer", "net", "flow"])
def test_as_transform(kind: str) -> None:
    net = make(4, 3)
    module = {"layer": net.layers[0], "net": net, "flow": LUFlow(net)}[kind]
    plain = net.layers[0] if kind == "layer" else net
    transform = module.as_transform()
    assert isinstance(transform, Transform)
    assert transform.bijective
    assert transform.domain.event_dim == transform.codomain.event_dim == 1
    assert transform.domain is constraints.real_vector
    x = torch.randn(6, 2, 4, dtype=torch.float64)
    y = transform(x)
    torch.testing.assert_close(y, plain(x))
    torch.testing.assert_close(transform.inv(y), x, rtol=1e-8, atol=1e-8)
    assert transform.inv.inv is transform
    exact = plain.forward_and_logabsdet(x)[1]
    assert transform.log_abs_det_jacobian(x, y).shape == (6, 2)
    torch.testing.assert_close(transform.log_abs_det_jacobian(x, y), exact)
    torch.testing.assert_close(transform.inv.log_abs_det_jacobian(y, x), -exact, rtol=1e-8, atol=1e-8)
    assert transform.forward_shape((6, 4)) == (6, 4)


def test_transformed_distribution_is_the_flow() -> None:
    net = make(4, 2)
    flow = LUFlow(net)
    distribution = TransformedDistribution(standard(4), [net.as_transform().inv])
    x = torch.randn(9, 4, dtype=torch.float64)
    torch.testing.assert_close(distribution.log_prob(x), flow.log_prob(x), rtol=1e-9, atol=1e-9)
    assert distribution.event_shape == (4,)
    assert distribution.batch_shape == ()
    draws = distribution.sample((5, 3))
    assert draws.shape == (5, 3, 4)
    torch.manual_seed(3)
    ours = flow.sample(7)
    torch.manual_seed(3)
    torch.testing.assert_close(distribution.sample((7,)), ours)


def test_transformed_distribution_in_the_other_direction() -> None:
    """y = net(x) for normal x: the density of y divides by the Jacobian."""
    net = make(3, 2)
    distribution = TransformedDistribution(standard(3), [net.as_transform()])
    x = torch.randn(5, 3, dtype=torch.float64)
    y, logabsdet = net.forward_and_logabsdet(x)
    expected = standard(3).log_prob(x) - logabsdet
    torch.testing.assert_close(distribution.log_prob(y), expected, rtol=1e-8, atol=1e-8)


def test_rsample_of_a_transformed_distribution_has_gradients() -> None:
    net = make(3, 2)
    draw = TransformedDistribution(standard(3), [net.as_transform()]).rsample((4,))
    gradients = torch.autograd.grad(draw.sum(), list(net.parameters()))
    assert all(g.abs().sum() > 0 for g in gradients)


def test_composition_of_the_layers_is_the_net() -> None:
    net = make(4, 3)
    composed = ComposeTransform([layer.as_transform() for layer in net.layers])
    x = torch.randn(5, 4, dtype=torch.float64)
    y = composed(x)
    torch.testing.assert_close(y, net(x))
    exact = net.forward_and_logabsdet(x)[1]
    torch.testing.assert_close(composed.log_abs_det_jacobian(x, y), exact)
    torch.testing.assert_close(composed.inv(y), x, rtol=1e-8, atol=1e-8)


def test_a_cached_transform_gives_the_same() -> None:
    transform = make(4, 2).as_transform()
    cached = transform.with_cache()
    x = torch.randn(5, 4, dtype=torch.float64)
    y = cached(x)
    assert cached.inv(y) is x
    torch.testing.assert_close(y, transform(x))
    assert cached.inv(y + 0) is not x


def test_transforms_of_one_module_are_equal_and_of_two_are_not() -> None:
    first, second = make(3, 1), make(3, 1, seed=1)
    assert first.as_transform() == first.as_transform()
    assert first.as_transform() != second.as_transform()


def test_a_transform_follows_later_changes_of_the_module() -> None:
    layer = LUDense(3, activation=GeneralizedLeakySoftplus(2.0, 0.5), dtype=torch.float64)
    transform = layer.as_transform()
    truth.randomise(layer, 3)
    x = torch.randn(5, 3, dtype=torch.float64)
    torch.testing.assert_close(transform(x), truth.forward(x, truth.read(layer))[0])


# ---- bases with several modes


@pytest.mark.parametrize("shape", [(), (5,), (2, 3)], ids=str)
@pytest.mark.parametrize("components", [1, 4])
def test_mixture_is_the_one_of_torch_distributions(components: int, shape: tuple[int, ...]) -> None:
    base = NormalMixture(3, components, dtype=torch.float64)
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.normal_()
        base.mean.add_(50.0)  # far from 0: multiplied-out squares must be taken about the means
    z = 50.0 + torch.randn(*shape, 3, dtype=torch.float64, requires_grad=True)
    found, exact = base.log_prob(z), base.as_distribution().log_prob(z)
    assert found.shape == shape
    torch.testing.assert_close(found, exact, rtol=1e-11, atol=1e-11)
    inputs = [z, *base.parameters()]
    for f, e in zip(
        torch.autograd.grad(found.sum(), inputs), torch.autograd.grad(exact.sum(), inputs), strict=True
    ):
        torch.testing.assert_close(f, e, rtol=1e-9, atol=1e-9)


def test_mixture_float32_has_its_accuracy() -> None:
    base = NormalMixture(64, 30)
    z = torch.randn(100, 64) * 3
    exact = NormalMixture(64, 30, dtype=torch.float64)
    exact.load_state_dict(base.state_dict())
    difference = (base.log_prob(z).double() - exact.log_prob(z.double())).abs().max()
    assert float(difference) < 1e-6 * float(z.square().sum(-1).max())


def test_mixture_samples_have_its_moments() -> None:
    torch.manual_seed(0)
    base = NormalMixture(2, 3, spread=2.0, dtype=torch.float64)
    with torch.no_grad():
        base.logits.copy_(torch.tensor([0.0, 1.0, 2.0]))
        base.log_scale.normal_(std=0.5)
    exact = base.as_distribution()
    drawn = base.sample((40_000,))
    torch.testing.assert_close(drawn.mean(0), exact.mean, atol=0.05, rtol=0)
    torch.testing.assert_close(drawn.var(0), exact.variance, atol=0.15, rtol=0)
    assert base.sample(()).shape == (2,)
    assert base.sample((0, 3)).shape == (0, 3, 2)
    nearest = (drawn.unsqueeze(1) - base.mean.detach()).norm(dim=-1).argmin(-1)
    theirs = (exact.sample((40_000,)).unsqueeze(1) - base.mean.detach()).norm(dim=-1).argmin(-1)
    for k in range(3):
        assert abs(float((nearest == k).double().mean() - (theirs == k).double().mean())) < 0.02


def test_mixture_of_no_rows() -> None:
    assert NormalMixture(3, 2).log_prob(torch.empty(0, 3)).shape == (0,)


def test_mixture_refuses() -> None:
    with pytest.raises(ValueError, match="components must be at least 1"):
        NormalMixture(3, 0)


# ---- zuko's flows and ours in one


def test_zuko_flow_with_our_layers_inside() -> None:
    zuko = pytest.importorskip("zuko")
    torch.manual_seed(0)
    net = LUNet(3, 2, LeakySoftplus(0.4)).double()
    theirs = zuko.flows.RealNVP(3, transforms=2, hidden_features=(8,)).double()
    ours = zuko.flows.UnconditionalTransform(net.as_transform)
    flow = zuko.flows.Flow([*theirs.transform.transforms, ours], theirs.base)
    x = torch.randn(6, 3, dtype=torch.float64)
    y, first = theirs.transform().call_and_ladj(x)
    z, second = net.forward_and_logabsdet(y)
    exact = standard(3).log_prob(z) + first + second
    torch.testing.assert_close(flow().log_prob(x), exact, rtol=1e-10, atol=1e-10)
    flow().log_prob(x).sum().backward()
    assert all(parameter.grad is not None for parameter in net.parameters())
    drawn, log_prob = flow().rsample_and_log_prob((50,))
    torch.testing.assert_close(log_prob, flow().log_prob(drawn), rtol=1e-8, atol=1e-8)


def test_our_flow_with_zukos_coupling_before_it() -> None:
    zuko = pytest.importorskip("zuko")
    torch.manual_seed(0)
    flow = LUFlow(LUNet(3, 2, LeakySoftplus(0.4)).double())
    coupling = zuko.flows.RealNVP(3, transforms=2, hidden_features=(8,)).double().transform()
    # From the base to data: back through our net, then back through zuko's layers.
    both = TransformedDistribution(standard(3), [flow.as_transform().inv, coupling.inv])
    x = torch.randn(6, 3, dtype=torch.float64)
    y, share = coupling.call_and_ladj(x)
    torch.testing.assert_close(both.log_prob(x), flow.log_prob(y) + share, rtol=1e-9, atol=1e-9)
    assert both.sample((4,)).shape == (4, 3)


# ---- bases of all habits


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def test_a_base_of_other_events_is_refused() -> None:
    net = LUNet(4, 2)
    wrong = {
        "event_shape \\[\\] and batch_shape \\[4\\]: use Independent\\(base, 1\\)": Normal(
            torch.zeros(4), torch.ones(4)
        ),
        "use Independent\\(base.expand\\(\\[4\\]\\), 1\\)": Normal(0.0, 1.0),
        "give a distribution of vectors \\[4\\]": MultivariateNormal(torch.zeros(3), torch.eye(3)),
        "event_shape \\[4\\] and batch_shape \\[2\\]": Independent(Normal(torch.zeros(2, 4), 1.0), 1),
    }
    for message, base in wrong.items():
        with pytest.raises(ValueError, match=f"base must have event_shape .*{message}"):
            LUFlow(net, base)
    base = Independent(Normal(torch.zeros(4), torch.ones(4)), 1)
    x = torch.randn(5, 4)
    torch.testing.assert_close(LUFlow(net, base).log_prob(x), LUFlow(net).log_prob(x))


class Bare(nn.Module):
    """A base that says nothing of its shapes, with a log-probability a coordinate."""

    def log_prob(self, z: Tensor) -> Tensor:
        return Normal(0.0, 1.0).log_prob(z)

    def sample(self, shape: torch.Size) -> Tensor:
        return torch.randn(shape)


def test_a_base_whose_results_have_other_shapes_is_refused() -> None:
    flow = LUFlow(LUNet(4, 2), Bare())
    for x in (torch.randn(4), torch.randn(64, 4), torch.randn(4, 4)):
        with pytest.raises(
            ValueError, match=r"base must give one log-probability a row.*Independent\(base, 1\)"
        ):
            flow.log_prob(x)
    for n in ((), 3, (4,)):
        with pytest.raises(ValueError, match=r"base must draw vectors \[4\]"):
            flow.sample(n)


@pytest.mark.parametrize("base", [StandardNormal(3), NormalMixture(3, 2)])
def test_our_bases_take_a_number_or_a_shape(base: Any) -> None:
    torch.manual_seed(0)
    one = base.sample(7)
    torch.manual_seed(0)
    assert torch.equal(one, base.sample((7,)))
    assert base.sample().shape == (3,)
    assert base.sample([2, 0]).shape == (2, 0, 3)


class Counting(nn.Module):
    """Draws by number alone, as nflows and normflows do."""

    def log_prob(self, z: Tensor) -> Tensor:
        return Independent(Normal(torch.zeros(3), 1.0), 1).log_prob(z)

    def sample(self, num_samples: int) -> Tensor:
        if not isinstance(num_samples, int) or num_samples < 1:
            raise TypeError("Number of samples must be a positive integer.")
        return torch.randn(num_samples, 3)


def counting_bases() -> list[Any]:
    bases: list[Any] = [Counting()]
    with contextlib.suppress(ImportError):
        from nflows.distributions.normal import StandardNormal as OfNflows

        bases.append(OfNflows([3]))
    with contextlib.suppress(ImportError):
        from normflows.distributions import DiagGaussian

        bases.append(DiagGaussian(3))
    return bases


@pytest.mark.parametrize("base", counting_bases(), ids=lambda base: type(base).__module__.split(".")[0])
def test_bases_that_draw_by_number(base: Any) -> None:
    flow = LUFlow(LUNet(3, 2), base)
    for n, shape in (((), ()), (5, (5,)), ((2, 3), (2, 3)), (0, (0,))):
        assert flow.sample(n).shape == (*shape, 3)
    x, log_prob = flow.sample_and_log_prob(6)
    torch.testing.assert_close(log_prob, flow.log_prob(x), rtol=1e-4, atol=1e-4)


def test_numbers_of_draws_are_checked() -> None:
    flow = LUFlow(LUNet(3, 2))
    for draw in (flow.sample, flow.rsample, flow.base.sample, NormalMixture(3, 2).sample):
        with pytest.raises(ValueError, match="n, the number of draws, must be at least 0, got -1"):
            draw(-1)
        with pytest.raises(TypeError, match="n, the number of draws, must be an int, got 10.0"):
            draw(10.0)
        with pytest.raises(TypeError, match="must be an int, got '7'"):
            draw("7")
    with pytest.raises(TypeError, match=r"x must be a torch.Tensor, got numpy.ndarray; use torch.from_numpy"):
        flow.log_prob(torch.zeros(2, 3).numpy())
    for make_base in (StandardNormal, lambda features: NormalMixture(features, 2)):
        with pytest.raises(TypeError, match="features must be an int, got 3.0"):
            make_base(3.0)


class Fixed:
    """Of one dtype: it has products, which do not promote as sums do."""

    def log_prob(self, z: Tensor) -> Tensor:
        return -(z @ torch.eye(3)).square().sum(-1)

    def sample(self, shape: torch.Size) -> Tensor:
        return torch.randn(*shape, 3)


def test_a_base_that_does_not_follow_says_so() -> None:
    flow = LUFlow(LUNet(3, 2), MultivariateNormal(torch.zeros(3), torch.eye(3))).double()
    message = (
        r"base draws torch.float32 on cpu and the net computes in torch.float64.*MultivariateNormal did not"
    )
    for call in (flow.sample, flow.rsample):
        with pytest.raises(TypeError, match=message):
            call(2)
    flow = LUFlow(LUNet(3, 2), Fixed()).double()
    with pytest.raises(TypeError, match=message.replace("MultivariateNormal", "Fixed")):
        flow.log_prob(normal(2, 3))
    flow = LUFlow(LUNet(3, 2), NormalMixture(3, 2)).double()
    assert flow.sample(2).dtype == torch.float64


def test_a_flow_made_on_meta_and_loaded_by_assignment() -> None:
    source = LUFlow(LUNet(4, 2))
    for materialise in (lambda flow: flow, lambda flow: flow.to("cpu"), lambda flow: flow.double()):
        with torch.device("meta"):
            flow = LUFlow(LUNet(4, 2))
        flow.load_state_dict(source.state_dict(), assign=True)
        flow = materialise(flow)
        drawn = flow.sample(3)
        assert drawn.device.type == "cpu"
        assert bool(flow.log_prob(drawn).isfinite().all())


# ---- reparametrised draws


def affine_flow(base: Any = None) -> LUFlow:
    return LUFlow(make(3, 1), base)


@pytest.mark.parametrize("of", ["standard", "torch"])
def test_reverse_kl_has_the_gradient_of_its_closed_form(of: str) -> None:
    """One linear layer draws N(μ, Σ), x = A⁻¹(z − b), whose divergence from a Gaussian is known."""
    torch.manual_seed(0)
    location, scale = normal(3).requires_grad_(), (0.5 + normal(3).abs()).requires_grad_()
    base = None if of == "standard" else Independent(Normal(location, scale), 1)
    flow = affine_flow(base)
    layer = flow.net.layers[0]
    target = MultivariateNormal(torch.ones(3, dtype=torch.float64), 0.5 * torch.eye(3, dtype=torch.float64))
    parameters = [layer.lu, layer.bias, *(() if base is None else (location, scale))]
    inverse = torch.linalg.inv(layer.weight)
    mean, root = (0.0, inverse) if base is None else (location, inverse * scale)
    drawn = MultivariateNormal(inverse @ (mean - layer.bias), root @ root.T)
    expected = torch.autograd.grad(kl_divergence(drawn, target), parameters)
    x, log_prob = flow.rsample_and_log_prob(200_000)
    found = torch.autograd.grad((log_prob - target.log_prob(x)).mean(), parameters)
    for one, other in zip(found, expected, strict=True):
        # The mean over draws, each of which is off by about the size of x.
        assert float((one - other).norm()) < 0.02 * float(1.0 + other.norm())
    torch.testing.assert_close(log_prob, flow.log_prob(x), rtol=1e-9, atol=1e-9)


def test_reparametrised_draws_are_those_of_sample() -> None:
    for flow in (LUFlow(make(3, 3)), LUFlow(make(3, 2), Independent(Normal(normal(3), 1.0), 1))):
        for n in ((), 5, (2, 4)):
            torch.manual_seed(0)
            expected = flow.sample(n)
            torch.manual_seed(0)
            found = flow.rsample(n)
            torch.testing.assert_close(found, expected)
            assert found.requires_grad
            assert not expected.requires_grad


def test_a_gradient_of_a_draw() -> None:
    flow = LUFlow(make(3, 3))

    def draw(*parameters: Tensor) -> Tensor:
        torch.manual_seed(0)
        x, log_prob = flow.rsample_and_log_prob(2)
        return torch.cat([x, log_prob.unsqueeze(-1)], -1)

    assert torch.autograd.gradcheck(draw, tuple(flow.parameters()))


def test_bases_without_differentiable_draws_are_refused() -> None:
    mixture = NormalMixture(3, 2, dtype=torch.float64)
    for base in (mixture, mixture.as_distribution(), Counting()):
        flow = LUFlow(make(3, 2), base)
        for call in (flow.rsample, flow.rsample_and_log_prob):
            with pytest.raises(
                NotImplementedError, match=f"base must have rsample, and {type(base).__name__}"
            ):
                call(4)


def test_reparametrised_draws_given_a_context() -> None:
    net = ConditionalLUNet(make(3, 2), 2)
    torch.nn.init.normal_(net.conditioner.weight, std=0.3)
    flow, context = LUFlow(net), normal(5, 2).requires_grad_()
    x, log_prob = flow.rsample_and_log_prob((), context)
    assert x.shape == (5, 3)
    torch.testing.assert_close(log_prob, flow.log_prob(x, context))
    assert all(bool(g.any()) for g in torch.autograd.grad(log_prob.sum(), [context, net.conditioner.weight]))

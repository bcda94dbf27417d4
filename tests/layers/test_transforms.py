"""What PyTorch does to modules: compile, export, autocast, copies, torch.func, meta, second derivatives."""

from __future__ import annotations

import copy
import functools
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import truth
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vjp, vmap

from lunet_fast import GeneralizedLeakySoftplus, LeakySoftplus, LUDense, LUFlow, LUNet

METHODS = ["forward", "inverse", "forward_and_logabsdet", "inverse_and_logabsdet"]
methods = pytest.mark.parametrize("method", METHODS)
D = 5


def make_layer(
    activation: nn.Module | None, dtype: torch.dtype, *, permuted: bool = True, seed: int = 3
) -> LUDense:
    permutation = torch.tensor([2, 0, 1, 4, 3]) if permuted else None
    layer = LUDense(D, activation=activation, dtype=dtype, permutation=permutation)
    truth.randomise(layer, seed)
    return layer


def make_net(dtype: torch.dtype, seed: int = 3) -> LUNet:
    net = LUNet(D, 3, LeakySoftplus(0.2, learnable=True), dtype=dtype)
    for index, layer in enumerate(net.layers):
        truth.randomise(layer, seed + index, coupling=0.3)
    return net


MODULES: dict[str, Callable[[torch.dtype], nn.Module]] = {
    "linear": lambda dtype: make_layer(None, dtype),
    "leaky": lambda dtype: make_layer(LeakySoftplus(0.2), dtype),
    "learnable": lambda dtype: make_layer(
        GeneralizedLeakySoftplus(2.0, 0.3, learnable=True).to(dtype), dtype
    ),
    "net": make_net,
}
modules = pytest.mark.parametrize("kind", MODULES)
ACTIVATIONS: dict[str, Callable[[torch.dtype], nn.Module]] = {
    "activation": lambda dtype: LeakySoftplus(0.2),
    "learnable activation": lambda dtype: GeneralizedLeakySoftplus(2.0, 0.3, learnable=True).to(dtype),
}
EVERYTHING = MODULES | ACTIVATIONS


class Call(nn.Module):
    """One method of a module as a module: what torch.export and functional_call want."""

    def __init__(self, module: nn.Module, method: str) -> None:
        super().__init__()
        self.module = module
        self.method = method

    def forward(self, x: Tensor) -> Any:
        return getattr(self.module, self.method)(x)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    rng = torch.Generator().manual_seed(seed + 2)
    return torch.randn(shape, generator=rng, dtype=torch.float64).to(dtype)


def as_tuple(result: Any) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def weights(like: Tensor) -> Tensor:
    """Different numbers of the shape of a tensor; not random, which vmap does not allow."""
    numbers = torch.cos(1.0 + 2.0 * torch.arange(like.numel(), dtype=torch.float64))
    return numbers.to(like.dtype).reshape(like.shape)


def loss_of(result: Any) -> Tensor:
    """A scalar in which every element of every output weighs differently."""
    return sum((v * weights(v)).sum() for v in as_tuple(result))


def check_equal(found: Any, expected: Any, tolerance: float = 1e-10) -> None:
    for f, e in zip(as_tuple(found), as_tuple(expected), strict=True):
        assert f.dtype == e.dtype
        torch.testing.assert_close(f, e, rtol=tolerance, atol=tolerance)


# ---- torch.compile


@pytest.fixture
def fresh_dynamo() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("kind", EVERYTHING)
@methods
def test_compile_in_one_graph(kind: str, method: str) -> None:
    """Forward and backward of one graph equal eager mode's, without a break."""
    module = EVERYTHING[kind](torch.float64)
    compiled = torch.compile(Call(module, method), fullgraph=True, backend="aot_eager")
    for rows in (3, 2 * D):
        x = normal(rows, D).requires_grad_()
        found, expected = compiled(x), getattr(module, method)(x)
        check_equal(found, expected)
        leaves = [x, *module.parameters()]
        check_equal(
            torch.autograd.grad(loss_of(found), leaves, allow_unused=True, materialize_grads=True),
            torch.autograd.grad(loss_of(expected), leaves, allow_unused=True, materialize_grads=True),
        )


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("kind", ["leaky", "net"])
@methods
def test_compile_does_not_recompile_for_each_batch_size(kind: str, method: str) -> None:
    """Sizes below, at and above D share one graph: nothing in it branches on the batch."""
    module = MODULES[kind](torch.float64)
    graphs = []

    def count(graph: torch.fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, example_inputs)

    compiled = torch.compile(Call(module, method), fullgraph=True, backend=count)
    for rows in (3, 4, D, D + 1, 2 * D, 64, 17, 2):
        x = normal(rows, D, seed=rows).requires_grad_()
        found, expected = compiled(x), getattr(module, method)(x)
        check_equal(found, expected)
        check_equal(torch.autograd.grad(loss_of(found), x), torch.autograd.grad(loss_of(expected), x))
    # One for the first size, one for all others.
    assert len(graphs) <= 2


@pytest.mark.usefixtures("fresh_dynamo")
def test_compile_of_a_training_step() -> None:
    module = make_net(torch.float32)
    eager = copy.deepcopy(module)

    def loss(net: LUNet, x: Tensor) -> Tensor:
        z, logabsdet = net.forward_and_logabsdet(x)
        return (0.5 * z.square().sum(-1) - logabsdet).mean()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.01) for net in (module, eager)]
    for step in range(5):
        x = normal(16 + step, D, seed=step, dtype=torch.float32)
        losses = []
        for function, net, optimizer in zip((compiled, loss), (module, eager), optimizers, strict=True):
            optimizer.zero_grad()
            value = function(net, x)
            value.backward()
            optimizer.step()
            losses.append(value.item())
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    for found, expected in zip(module.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("method", ["forward", "inverse"])
def test_compile_under_no_grad_and_unbatched(method: str) -> None:
    module = make_net(torch.float64)
    compiled = torch.compile(Call(module, method), fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for shape in ((D,), (2, 3, D), (0, D)):
            x = normal(*shape)
            check_equal(compiled(x), getattr(module, method)(x))


@pytest.mark.usefixtures("fresh_dynamo")
@methods
def test_double_backward_under_compile_raises(method: str) -> None:
    """PyTorch cannot do it; what must not happen is a second derivative with terms missing."""
    module = MODULES["leaky"](torch.float64)
    compiled = torch.compile(Call(module, method), fullgraph=True, backend="aot_eager")
    x = normal(4, D).requires_grad_()
    (gradient,) = torch.autograd.grad(loss_of(compiled(x)), x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(gradient.square().sum(), x)


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.slow
@methods
def test_compile_with_the_default_backend(method: str) -> None:
    module = make_net(torch.float32)
    compiled = torch.compile(Call(module, method), fullgraph=True)
    x = normal(40, D, dtype=torch.float32).requires_grad_()
    found, expected = compiled(x), getattr(module, method)(x)
    check_equal(found, expected, 1e-4)
    check_equal(torch.autograd.grad(loss_of(found), x), torch.autograd.grad(loss_of(expected), x), 1e-4)


# ---- torch.export


@pytest.mark.parametrize("kind", EVERYTHING)
@methods
def test_export_with_a_dynamic_batch(kind: str, method: str) -> None:
    module = EVERYTHING[kind](torch.float32)
    dynamic = ({0: torch.export.Dim("batch")},)
    program = torch.export.export(
        Call(module, method), (normal(4, D, dtype=torch.float32),), dynamic_shapes=dynamic
    )
    loaded = program.module()
    for rows in (0, 1, 2, D, D + 1, 100):
        x = normal(rows, D, seed=rows, dtype=torch.float32)
        check_equal(loaded(x), getattr(module, method)(x), 1e-5)


def test_export_survives_saving() -> None:
    net = make_net(torch.float32)
    dynamic = ({0: torch.export.Dim("batch")},)
    program = torch.export.export(net, (normal(4, D, dtype=torch.float32),), dynamic_shapes=dynamic)
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    x = normal(33, D, dtype=torch.float32)
    check_equal(torch.export.load(buffer).module()(x), net(x), 1e-5)


# ---- autocast


@modules
def test_autocast(kind: str) -> None:
    """The forward direction has nn.Linear's dtype, log-determinants and the inverse keep float32."""
    module = MODULES[kind](torch.float32)
    linear = nn.Linear(D, D)
    for rows in (3, 40):
        x = normal(rows, D, dtype=torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            expected_dtype = linear(x).dtype
            y = module(x)
            pair, logabsdet = module.forward_and_logabsdet(x)
            back, inverse_logabsdet = module.inverse_and_logabsdet(pair)
            single = module.inverse(y)
        assert y.dtype == pair.dtype == expected_dtype
        assert logabsdet.dtype == torch.float32
        assert back.dtype == inverse_logabsdet.dtype == single.dtype == torch.float32
        exact, exact_logabsdet = module.forward_and_logabsdet(x)
        assert (y.float() - exact).norm() <= 0.03 * exact.norm()
        assert (logabsdet - exact_logabsdet).abs().max() <= 0.1
        # The inverse is computed in float32 from the y it was given.
        check_equal(back, module.inverse(pair.float()), 1e-5)
        check_equal(inverse_logabsdet, module.inverse_and_logabsdet(pair.float())[1], 1e-5)


@methods
def test_autocast_gradients_have_the_parameters_dtype(method: str) -> None:
    module = make_net(torch.float32)
    x = normal(40, D, dtype=torch.float32).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        result = getattr(module, method)(x)
    leaves = [x, *module.parameters()]
    found = torch.autograd.grad(loss_of(result), leaves)
    exact = torch.autograd.grad(loss_of(getattr(module, method)(x)), leaves)
    for f, e in zip(found, exact, strict=True):
        assert f.dtype == torch.float32
        assert f.isfinite().all()
        assert (f - e).norm() <= 0.1 * (e.norm() + 1)


def test_autocast_leaves_float64_alone() -> None:
    module = make_net(torch.float64)
    x = normal(6, D)
    with torch.autocast("cpu", torch.bfloat16):
        results = [*module.forward_and_logabsdet(x), *module.inverse_and_logabsdet(x)]
    check_equal(results, [*module.forward_and_logabsdet(x), *module.inverse_and_logabsdet(x)])


@methods
def test_autocast_switched_off_inside(method: str) -> None:
    module = make_net(torch.float32)
    x = normal(6, D, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", enabled=False):
        result = getattr(module, method)(x)
    check_equal(result, getattr(module, method)(x), 1e-6)


@pytest.mark.usefixtures("fresh_dynamo")
def test_autocast_under_compile() -> None:
    module = make_net(torch.float32)
    compiled = torch.compile(Call(module, "forward_and_logabsdet"), fullgraph=True, backend="aot_eager")
    x = normal(40, D, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = compiled(x), module.forward_and_logabsdet(x)
    check_equal(found, expected, 0.02)


# ---- copies


@pytest.mark.parametrize("kind", EVERYTHING)
@pytest.mark.parametrize("duplicate", ["deepcopy", "pickle", "torch.save"])
def test_copies_are_equal_and_independent(kind: str, duplicate: str) -> None:
    module = EVERYTHING[kind](torch.float64)
    if duplicate == "deepcopy":
        other = copy.deepcopy(module)
    elif duplicate == "pickle":
        other = pickle.loads(pickle.dumps(module))
    else:
        buffer = io.BytesIO()
        torch.save(module, buffer)
        buffer.seek(0)
        other = torch.load(buffer, weights_only=False)
    x = normal(7, D)
    before = [v.detach().clone() for m in METHODS for v in as_tuple(getattr(module, m)(x))]
    check_equal([v for m in METHODS for v in as_tuple(getattr(other, m)(x))], before, 1e-15)
    with torch.no_grad():
        for tensor in other.parameters():
            tensor.add_(0.5)
        for tensor in other.buffers():
            if tensor.is_floating_point():
                tensor.neg_()
    check_equal([v for m in METHODS for v in as_tuple(getattr(module, m)(x))], before, 1e-15)
    if list(other.parameters()):
        assert not torch.allclose(other(x), module(x))


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
def test_flows_and_transforms_can_be_copied(duplicate: Callable) -> None:
    flow = LUFlow(make_net(torch.float64))
    x = normal(7, D)
    check_equal(duplicate(flow).log_prob(x), flow.log_prob(x), 1e-15)
    check_equal(duplicate(flow.net.as_transform())(x), flow.net(x), 1e-15)


def test_copy_after_a_backward() -> None:
    """A leaf with a gradient, and nothing kept that cannot be copied."""
    module = make_net(torch.float64)
    module.inverse(module(normal(9, D))).sum().backward()
    copy.deepcopy(module)
    pickle.dumps(module)


# ---- torch.func


@pytest.mark.parametrize("kind", EVERYTHING)
@methods
def test_vmap_over_x(kind: str, method: str) -> None:
    module = EVERYTHING[kind](torch.float64)
    function = getattr(module, method)
    for shape in ((7, D), (4, 3, D), (2, 9, D), (2, 3, 4, D)):
        x = normal(*shape)
        expected = function(x)
        check_equal(vmap(function)(x), expected)
    x = normal(3, D, 6)
    check_equal(vmap(function, in_dims=2)(x), function(x.permute(2, 0, 1)))
    check_equal(vmap(vmap(function))(normal(2, 3, 4, D)), function(normal(2, 3, 4, D)))
    check_equal(vmap(function, chunk_size=2)(normal(5, 3, D)), function(normal(5, 3, D)))


@pytest.mark.parametrize("kind", EVERYTHING)
@methods
def test_vmap_over_stacked_parameters(kind: str, method: str) -> None:
    """An ensemble in one call: parameters and buffers stacked, x shared or one each."""
    members = [EVERYTHING[kind](torch.float64) for _ in range(3)]
    with torch.no_grad():
        for index, member in enumerate(members):
            for parameter in member.parameters():
                parameter.add_(0.1 * index)
    calls = [Call(m, method) for m in members]
    parameters, buffers = stack_module_state(calls)
    base = copy.deepcopy(calls[0])
    x = normal(3, 4, D)

    def run(p: dict, b: dict, v: Tensor) -> Any:
        return functional_call(base, (p, b), (v,))

    if parameters or buffers:
        shared = vmap(run, in_dims=(0, 0, None))(parameters, buffers, x[0])
        for index, call in enumerate(calls):
            check_equal(tuple(v[index] for v in as_tuple(shared)), as_tuple(call(x[0])))
    each = vmap(run)(parameters, buffers, x)
    for index, call in enumerate(calls):
        check_equal(tuple(v[index] for v in as_tuple(each)), as_tuple(call(x[index])))
    if parameters:
        # Gradients of the members together equal those of each alone.
        together = vmap(grad(lambda p, b, v: loss_of(run(p, b, v))))(parameters, buffers, x)
        for index, call in enumerate(calls):
            names, leaves = zip(*call.named_parameters(), strict=True)
            alone = torch.autograd.grad(
                loss_of(call(x[index])), leaves, allow_unused=True, materialize_grads=True
            )
            for name, gradient in zip(names, alone, strict=True):
                torch.testing.assert_close(together[name][index], gradient, rtol=1e-9, atol=1e-10)


def test_vmap_over_stacked_permutations() -> None:
    """Members whose rows are in different orders."""
    members = [LUDense(D, permutation=torch.randperm(D), dtype=torch.float64) for _ in range(3)]
    for index, member in enumerate(members):
        truth.randomise(member, index)
    x = normal(4, D)
    for method in METHODS:
        calls = [Call(m, method) for m in members]
        parameters, buffers = stack_module_state(calls)
        base = copy.deepcopy(calls[0])
        found = vmap(functools.partial(functional_call, base), in_dims=((0, 0), None))(
            (parameters, buffers), x
        )
        for index, call in enumerate(calls):
            check_equal(tuple(v[index] for v in as_tuple(found)), as_tuple(call(x)))


@modules
@methods
def test_functional_call_with_other_parameters(kind: str, method: str) -> None:
    module, other = MODULES[kind](torch.float64), MODULES[kind](torch.float64)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.2)
    x = normal(6, D)
    call = Call(module, method)
    state = {f"module.{k}": v for k, v in other.state_dict().items()}
    check_equal(functional_call(call, state, (x,)), getattr(other, method)(x))


@pytest.mark.parametrize("kind", EVERYTHING)
@methods
def test_func_grad_and_per_sample_gradients(kind: str, method: str) -> None:
    module = EVERYTHING[kind](torch.float64)
    call = Call(module, method)
    parameters = dict(call.named_parameters())
    x = normal(6, D)

    def loss(p: dict, v: Tensor) -> Tensor:
        return loss_of(functional_call(call, p, (v,)))

    by_x = grad(loss, argnums=1)(parameters, x)
    leaf = x.clone().requires_grad_()
    check_equal(by_x, torch.autograd.grad(loss_of(call(leaf)), leaf))
    if not parameters:
        return
    per_sample = vmap(grad(loss), in_dims=(None, 0))(parameters, x)
    for index in range(6):
        alone = torch.autograd.grad(
            loss_of(call(x[index])), list(parameters.values()), allow_unused=True, materialize_grads=True
        )
        for name, gradient in zip(parameters, alone, strict=True):
            torch.testing.assert_close(per_sample[name][index], gradient, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("kind", EVERYTHING)
@pytest.mark.parametrize("method", ["forward", "inverse"])
def test_jacrev_jacfwd_and_jvp(kind: str, method: str) -> None:
    module = EVERYTHING[kind](torch.float64)
    function = getattr(module, method)
    x, tangent = normal(D), normal(D, seed=1)
    exact = torch.autograd.functional.jacobian(function, x)
    check_equal(jacrev(function)(x), exact)
    check_equal(jacfwd(function)(x), exact)
    value, derivative = jvp(function, (x,), (tangent,))
    check_equal(value, function(x))
    check_equal(derivative, exact @ tangent)
    _, pullback = vjp(function, x)
    check_equal(pullback(tangent)[0], exact.T @ tangent)
    # The log-determinant is that of this very Jacobian.
    logabsdet = getattr(module, f"{method}_and_logabsdet")(x)[1]
    torch.testing.assert_close(logabsdet, torch.linalg.slogdet(exact)[1], rtol=1e-8, atol=1e-9)
    batch = normal(4, D)
    jacobians = vmap(jacrev(function))(batch)
    for index in range(4):
        check_equal(jacobians[index], torch.autograd.functional.jacobian(function, batch[index]))


@pytest.mark.parametrize("kind", EVERYTHING)
@methods
def test_jvp_by_parameters(kind: str, method: str) -> None:
    """Forward-mode derivatives by x and every parameter at once, against reverse mode."""
    module = EVERYTHING[kind](torch.float64)
    call = Call(module, method)
    names = [n for n, _ in call.named_parameters()]
    values = [p.detach().clone() for p in call.parameters()]

    def function(x: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        return as_tuple(functional_call(call, dict(zip(names, parameters, strict=True)), (x,)))

    primals = (normal(4, D), *values)
    tangents = tuple(normal(*p.shape, seed=i + 1) for i, p in enumerate(primals))
    outputs, derivatives = jvp(function, primals, tangents)
    expected, pullback = vjp(function, *primals)
    check_equal(outputs, expected)
    for index, output in enumerate(outputs):
        cotangents = [torch.zeros_like(o) for o in outputs]
        cotangents[index] = normal(*output.shape, seed=20)
        by_reverse = sum((g * t).sum() for g, t in zip(pullback(tuple(cotangents)), tangents, strict=True))
        by_forward = (cotangents[index] * derivatives[index]).sum()
        torch.testing.assert_close(by_forward, by_reverse, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("kind", EVERYTHING)
@methods
def test_forward_mode_with_dual_numbers(kind: str, method: str) -> None:
    module = EVERYTHING[kind](torch.float64)
    function = getattr(module, method)
    x, tangent = normal(3, D), normal(3, D, seed=1)
    with forward_ad.dual_level():
        duals = as_tuple(function(forward_ad.make_dual(x, tangent)))
        found = [forward_ad.unpack_dual(v).tangent for v in duals]
    step = 1e-6
    differences = [
        (p - m) / (2 * step)
        for p, m in zip(
            as_tuple(function(x + step * tangent)), as_tuple(function(x - step * tangent)), strict=True
        )
    ]
    for f, d in zip(found, differences, strict=True):
        f = torch.zeros_like(d) if f is None else f
        torch.testing.assert_close(f, d, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", EVERYTHING)
@methods
def test_hessian(kind: str, method: str) -> None:
    """torch.func's Hessian (forward over reverse) against reverse over reverse."""
    module = EVERYTHING[kind](torch.float64)

    def scalar(x: Tensor) -> Tensor:
        return sum((v.square() * weights(v)).sum() for v in as_tuple(getattr(module, method)(x)))

    x = normal(D)
    exact = torch.autograd.functional.hessian(scalar, x)
    check_equal(hessian(scalar)(x), exact, 1e-8)
    check_equal(jacrev(jacrev(scalar))(x), exact, 1e-8)
    # And central differences of the gradient, which share no formula with either.
    step = 1e-5
    for index in range(D):
        e = torch.zeros(D, dtype=torch.float64)
        e[index] = step
        difference = (grad(scalar)(x + e) - grad(scalar)(x - e)) / (2 * step)
        torch.testing.assert_close(exact[index], difference, rtol=1e-6, atol=1e-6)


# ---- second derivatives in eager mode


@modules
@methods
def test_gradgradcheck(kind: str, method: str) -> None:
    """By x and every parameter; batches that go through the composed matrix and through its factors."""
    module = MODULES[kind](torch.float64)
    call = Call(module, method)
    names = [n for n, _ in call.named_parameters()]
    values = [p.detach().clone().requires_grad_() for p in call.parameters()]

    def function(x: Tensor, *parameters: Tensor) -> Any:
        return functional_call(call, dict(zip(names, parameters, strict=True)), (x,))

    for rows in (2, D + 2) if kind != "net" else (2,):
        x = normal(rows, D).requires_grad_()
        fast = {"fast_mode": True, "atol": 1e-5}
        assert torch.autograd.gradcheck(function, (x, *values), **fast)
        assert torch.autograd.gradgradcheck(function, (x, *values), **fast)


def test_gradcheck_of_forward_mode_and_batched_gradients() -> None:
    """gradcheck's own tests of forward mode, vmapped backward and undefined gradients."""
    layer = make_layer(LeakySoftplus(0.2), torch.float64)
    for method in METHODS:
        for rows in (2, 7):
            x = normal(rows, D).requires_grad_()
            assert torch.autograd.gradcheck(
                getattr(layer, method),
                (x,),
                check_forward_ad=True,
                check_batched_grad=True,
                check_batched_forward_grad=True,
                check_undefined_grad=True,
            )


def test_a_gradient_penalty_reaches_the_parameters() -> None:
    """The use people have for double backward: |dy/dx|^2 in a loss."""
    net = make_net(torch.float64)
    x = normal(6, D).requires_grad_()
    names, leaves = zip(*net.named_parameters(), strict=True)

    def penalty() -> Tensor:
        (gradient,) = torch.autograd.grad(loss_of(net.forward_and_logabsdet(x)), x, create_graph=True)
        return gradient.square().sum()

    found = dict(
        zip(
            names,
            torch.autograd.grad(penalty(), leaves, allow_unused=True, materialize_grads=True),
            strict=True,
        )
    )
    step = 1e-6
    for name, leaf in zip(names, leaves, strict=True):
        with torch.no_grad():
            index = int(found[name].abs().argmax())
            leaf.view(-1)[index] += step
        above = penalty().item()
        with torch.no_grad():
            leaf.view(-1)[index] -= 2 * step
        below = penalty().item()
        with torch.no_grad():
            leaf.view(-1)[index] += step
        expected = (above - below) / (2 * step)
        assert float(found[name].view(-1)[index]) == pytest.approx(expected, rel=1e-4, abs=1e-5)


# ---- meta


@pytest.mark.parametrize(
    "make",
    [lambda: LUDense(D, device="meta", activation=LeakySoftplus(0.1)), lambda: LUNet(D, 3, device="meta")],
)
def test_meta_modules_have_shapes_and_no_memory(make: Callable[[], nn.Module]) -> None:
    module = make()
    assert all(p.is_meta for p in module.parameters())
    assert all(b.is_meta for b in module.buffers())
    x = torch.empty(4, 2, D, device="meta")
    for method in METHODS:
        result = as_tuple(getattr(module, method)(x))
        assert result[0].is_meta
        assert result[0].shape == (4, 2, D)
        if len(result) == 2:
            assert result[1].shape == (4, 2)


@pytest.mark.parametrize("layers", [1, 3])
def test_to_empty_and_reset_parameters(layers: int) -> None:
    """The way large models are made: on meta, then memory, then values; memory comes poisoned here."""
    with torch.device("meta"):
        net = LUNet(D, layers)
    net.to_empty(device="cpu")
    net.reset_parameters()
    x = 0.1 * normal(9, D, dtype=torch.float32)
    assert (net(x) - x).norm() < 0.5 * layers * x.norm()
    torch.testing.assert_close(net.inverse(net(x)), x, rtol=1e-4, atol=1e-5)
    assert all(p.isfinite().all() for p in net.parameters())
    layer = LUDense(D, device="meta")
    layer.to_empty(device="cpu")
    layer.reset_parameters()
    assert layer(x).isfinite().all()


def test_a_flow_made_on_meta_gets_its_base_back() -> None:
    """to_empty leaves nothing of the base's mean and scale unless they are set again."""
    with torch.device("meta"):
        flow = LUFlow(LUNet(D, 2))
    source = LUFlow(LUNet(D, 2))
    flow.to_empty(device="cpu")
    flow.load_state_dict(source.state_dict())
    x = normal(4, D, dtype=torch.float32)
    check_equal(flow.log_prob(x), source.log_prob(x), 1e-6)


def test_meta_state_by_assignment() -> None:
    source = make_net(torch.float32)
    with torch.device("meta"):
        target = LUNet(D, 3, LeakySoftplus(0.2, learnable=True))
    target.load_state_dict(source.state_dict(), assign=True)
    x = normal(6, D, dtype=torch.float32)
    check_equal(target(x), source(x), 1e-6)


# ---- hooks and parametrisations that expect a usual module


def test_fake_tensors() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        net = LUNet(D, 2, dtype=torch.float32)
        x = torch.randn(7, D)
        y, logabsdet = net.forward_and_logabsdet(x)
        back, inverse_logabsdet = net.inverse_and_logabsdet(y)
    assert y.shape == back.shape == (7, D)
    assert logabsdet.shape == inverse_logabsdet.shape == (7,)
    assert logabsdet.dtype == torch.float32


def test_forward_hooks_and_checkpointing() -> None:
    from torch.utils.checkpoint import checkpoint

    net = make_net(torch.float64)
    seen = []
    net.layers[0].register_forward_hook(lambda module, args, output: seen.append(output.shape))
    x = normal(6, D).requires_grad_()
    plain = torch.autograd.grad(loss_of(net(x)), [x, *net.parameters()])
    again = torch.autograd.grad(loss_of(checkpoint(net, x, use_reentrant=False)), [x, *net.parameters()])
    check_equal(again, plain, 1e-13)
    assert seen[0] == (6, D)

"""Layers under what PyTorch does to modules in combination, where a Function of one's own can go wrong."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

from lunet_fast import GeneralizedLeakySoftplus, LeakySoftplus, LUDense, LUFlow, LUNet, functional
from lunet_fast.ops.values import flatten

D = 4


def layer(learnable: bool = False) -> LUDense:
    made = LUDense(D, activation=LeakySoftplus(0.2, learnable=learnable)).double()
    nn.init.normal_(made.lu, std=0.3)
    nn.init.normal_(made.bias)
    return made


def sample(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize("method", ["forward", "inverse"])
@pytest.mark.parametrize("trained", [True, False])
def test_compiled_function_transforms(method: str, trained: bool) -> None:
    call = getattr(layer().requires_grad_(trained), method)
    x = sample(5, D)
    for transformed in (
        lambda z: grad(lambda q: call(q).sum())(z),
        lambda z: jacrev(call)(z),
        lambda z: vjp(call, z)[1](torch.ones_like(z))[0],
    ):
        torch.compiler.reset()
        # In one graph: where PyTorch before 2.13 breaks it amid a transform, a derivative is silently zero.
        compiled = torch.compile(transformed, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), transformed(x))


@pytest.mark.parametrize("method", ["forward", "inverse"])
def test_function_transforms_of_an_operation(method: str) -> None:
    """As an exported program calls it."""
    own = layer().requires_grad_(False)
    operation = getattr(torch.ops.lunet_fast, f"layer_{method}")
    values = flatten((own._matrix(), own._fused()))

    def call(x: Tensor) -> Tensor:
        return operation(x, *values, False, True)[0]

    x = sample(5, D)
    torch.testing.assert_close(jacrev(call)(x), jacrev(getattr(own, method))(x))


@pytest.mark.parametrize("method", ["forward", "forward_and_logabsdet", "inverse", "inverse_and_logabsdet"])
@pytest.mark.parametrize("activation", [LeakySoftplus, GeneralizedLeakySoftplus])
def test_compile_with_learnable_activations_and_dynamic_shapes(method: str, activation: type) -> None:
    net = LUNet(6, 3, activation(0.3, learnable=True)).double()

    class Call(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
            return getattr(self.net, method)(x)

    compiled = torch.compile(Call(), fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (3, 50):
        x = sample(rows, 6)
        torch.testing.assert_close(compiled(x), getattr(net, method)(x))


@pytest.mark.parametrize("made", [layer(), LUDense(D).double(), LeakySoftplus(0.3)])
def test_results_may_be_modified_in_place(made: nn.Module) -> None:
    x = sample(3, D).requires_grad_()
    (expected,) = torch.autograd.grad((made(x) + x).relu().sum(), x)
    y = made(x)
    y += x
    (found,) = torch.autograd.grad(y.relu_().sum(), x)
    torch.testing.assert_close(found, expected)
    # The inverse's gradient is computed from its result, as that of torch.exp is: then PyTorch says so.
    y = made.inverse(x)
    y += x
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    with torch.no_grad():
        assert torch.equal(made.inverse(x).add_(1.0), made.inverse(x) + 1.0)


def test_forward_mode_of_forward_mode_is_refused() -> None:
    def loss(call: object) -> object:
        return lambda q: call(q).square().sum()  # type: ignore[operator]

    made = layer()
    for call in (made, made.inverse, made.activation, made.activation.inverse):
        torch.testing.assert_close(hessian(loss(call))(sample(D)).shape, torch.Size([D, D]))
        with pytest.raises(NotImplementedError, match="take the inner or the outer one in reverse mode"):
            jacfwd(jacfwd(loss(call)))(sample(D))


@pytest.mark.parametrize("trained", [True, False])
def test_forward_mode_of_an_exported_layer_is_refused(trained: bool) -> None:
    exported = torch.export.export(layer().requires_grad_(trained), (sample(3, D),)).module()
    with pytest.raises((NotImplementedError, RuntimeError)):
        jvp(exported, (sample(3, D),), (sample(3, D),))
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="exported or compiled"):
        exported(forward_ad.make_dual(sample(3, D), sample(3, D)))


def test_vmap_of_vjp_without_grad_mode() -> None:
    made = layer()
    x, cotangents = sample(5, D), sample(5, D)
    with torch.no_grad():
        found = vmap(lambda row, ct: vjp(made, row)[1](ct)[0])(x, cotangents)
    leaf = x.requires_grad_()
    (expected,) = torch.autograd.grad(made(leaf), leaf, cotangents)
    torch.testing.assert_close(found, expected)


def test_a_result_that_is_not_used_has_no_gradient_to_give() -> None:
    made = layer(learnable=True)
    x = sample(7, D).requires_grad_()
    inputs = [x, *made.parameters()]
    for method in ("forward_and_logabsdet", "inverse_and_logabsdet"):
        both = getattr(made, method)(x)
        for used in (0, 1):
            loss = both[used].square().sum()
            found = torch.autograd.grad(loss, inputs, retain_graph=True, allow_unused=True)
            whole = torch.autograd.grad(loss + 0.0 * both[1 - used].sum(), inputs, retain_graph=True)
            for a, b in zip(found, whole, strict=True):
                torch.testing.assert_close(torch.zeros_like(b) if a is None else a, b)


def test_weight_and_second_derivatives_keep_their_precision_under_autocast() -> None:
    made = LUDense(32, activation=LeakySoftplus(0.2))
    nn.init.normal_(made.lu, std=0.1)
    x = torch.randn(9, 32, requires_grad=True)
    plain_weight = made.weight
    (plain,) = torch.autograd.grad(made.inverse(x).sum(), x)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(made.weight, plain_weight)
        (found,) = torch.autograd.grad(made.inverse(x).sum(), x, create_graph=True)
    torch.testing.assert_close(found, plain)


def test_partial_state_keeps_the_permutation() -> None:
    pivoted = LUDense.from_linear(nn.Linear(8, 8))
    weight = pivoted.weight
    assert pivoted.permutation is not None
    pivoted.load_state_dict({"bias": torch.zeros(8)}, strict=False)
    torch.testing.assert_close(pivoted.weight, weight)
    nn.Sequential(pivoted, nn.Linear(8, 8)).load_state_dict({"1.bias": torch.zeros(8)}, strict=False)
    torch.testing.assert_close(pivoted.weight, weight)
    with pytest.raises(RuntimeError, match=r"permutation: permutation must be 4 integers"):
        LUDense(4).load_state_dict(pivoted.state_dict())


def test_learnable_activations_start_again() -> None:
    net = LUNet(5, 3, GeneralizedLeakySoftplus(0.7, 0.4, learnable=True))
    fresh = {name: p.clone() for name, p in net.named_parameters() if "raw" in name}
    assert [p.shape for p in fresh.values()] == [(1,)] * 4
    for parameter in net.parameters():
        nn.init.constant_(parameter, float("nan"))
    net.reset_parameters()
    assert all(torch.equal(dict(net.named_parameters())[name], p) for name, p in fresh.items())
    assert all(bool(p.isfinite().all()) for p in net.parameters())
    meta = LUDense(D, device="meta", activation=LeakySoftplus(0.3, learnable=True).to("meta"))
    assert "alpha=0.3" in repr(meta)


def test_half_precision_learnable_parameters_stay_finite() -> None:
    activation = GeneralizedLeakySoftplus(100.0, 0.1, learnable=True).half()
    assert float(activation.alpha.detach()) == pytest.approx(100.0, rel=0.1)


def test_wrong_arguments_are_named() -> None:
    x, lu = torch.randn(3, D), torch.zeros(D, D)
    tensor = torch.tensor(0.3, requires_grad=True)
    cases = [
        (
            TypeError,
            "x must be a floating-point tensor",
            lambda: functional.lu_dense(torch.ones(3, D).int(), lu),
        ),
        (TypeError, "x must be a floating-point tensor", lambda: LeakySoftplus()(torch.arange(4))),
        (TypeError, "slopes must be three floats", lambda: functional.leaky_softplus(x, (tensor, 0.7, 1.0))),
        (ValueError, r"slopes must be \[3\]", lambda: functional.leaky_softplus(x, torch.ones(2))),
        (ValueError, "bias must have shape", lambda: functional.lu_dense(x, lu, torch.zeros(1))),
        (ValueError, "sign must have shape", lambda: functional.lu_dense(x, lu, sign=torch.ones(1))),
        (
            ValueError,
            "sign must not require",
            lambda: functional.lu_dense(x, lu, sign=torch.ones(D).requires_grad_()),
        ),
        (ValueError, "permutation must be", lambda: functional.lu_dense(x, lu, permutation=torch.arange(3))),
        (
            ValueError,
            "lu must be square",
            lambda: functional.lu_dense(torch.zeros(0, 2, D), torch.zeros(0, D, D)),
        ),
    ]
    for kind, message, call in cases:
        with pytest.raises(kind, match=message):
            call()


def test_flow_as_a_module() -> None:
    flow = LUFlow(LUNet(3, 2))
    x = torch.randn(5, 3)
    torch.testing.assert_close(flow(x), flow.log_prob(x))
    low = flow.base.log_prob(torch.randn(4, 3).bfloat16())
    assert low.dtype == torch.float32

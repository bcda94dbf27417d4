"""The library on its kernels: layers, nets and the recommender's training under backend "triton".

What the kernels compute alone is tested beside this file; here it is what a user calls.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.library import opcheck

from harness import LIMIT, normwise
from lunet_fast import GeneralizedLeakySoftplus, LeakySoftplus, LUDense, LUNet, functional
from lunet_fast.ops import dispatch, triton

lib = torch.ops.lunet_fast


@pytest.fixture(autouse=True)
def on_kernels() -> Iterator[None]:
    before = dispatch.get_backend()
    dispatch.set_backend("triton")
    yield
    dispatch.set_backend(before)


def disturbed(module: Any) -> Any:
    """The module with its matrices away from the identity."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() > 1:
                parameter.add_(torch.randn_like(parameter) * (0.3 / parameter.shape[-1] ** 0.5))
    return module


def results(module: nn.Module, method: str, x: Tensor, cotangents: list[Tensor]) -> list[Tensor]:
    """Outputs and gradients, of x first."""
    module.zero_grad()
    x = x.clone().requires_grad_()
    outputs = getattr(module, method)(x)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    sum((o * c).sum() for o, c in zip(outputs, cotangents, strict=False)).backward()
    return [*(o.detach() for o in outputs), x.grad, *(p.grad.clone() for p in module.parameters())]


def conditions(module: Any, x: Tensor) -> float:
    """The product over the layers of κ₂(W) and the slopes' ratio."""
    worst = 1.0
    for layer in module.layers if isinstance(module, LUNet) else [module]:
        worst *= float(torch.linalg.cond(layer.weight.detach().double()))
        if layer.activation is not None:
            a, c, _ = layer.activation.slope_values()
            worst *= (a + c) / a
    return worst


ACTIVATIONS: list[Callable[[], Any]] = [
    lambda: None,
    lambda: LeakySoftplus(0.1),
    lambda: GeneralizedLeakySoftplus(2.0, 0.2),
    lambda: LeakySoftplus(0.3, learnable=True),
    lambda: GeneralizedLeakySoftplus(1.5, 0.3, learnable=True),
]


def compare(module: Any, method: str, x: Tensor) -> None:
    """Outputs and gradients within the limit of those of the reference in float64."""
    leading = x.shape[:-1]
    cotangents = [torch.randn(x.shape), torch.randn(leading)]
    ours = results(module, method, x, cotangents)
    assert dispatch.get_backend() == "triton"
    theirs = results(module.double(), method, x.double(), [c.double() for c in cotangents])
    limit = LIMIT * (conditions(module, x) if "inverse" in method else 1.0)
    for index, (mine, exact) in enumerate(zip(ours, theirs, strict=True)):
        # A learnt slope's gradient is one sum over everything, which may cancel.
        slack = 50.0 if exact.numel() == 1 else 4.0
        assert normwise(mine, exact) <= slack * limit, f"{method}, result {index} of {list(exact.shape)}"


METHODS = ["forward", "forward_and_logabsdet", "inverse", "inverse_and_logabsdet"]


@given(
    st.integers(1, 70),
    st.integers(1, 90),
    st.sampled_from(ACTIVATIONS),
    st.sampled_from(METHODS),
    st.booleans(),
)
def test_layer(D: int, N: int, activation: Any, method: str, permuted: bool) -> None:
    layer = LUDense(D, activation=activation(), permutation=torch.randperm(D) if permuted else None)
    compare(disturbed(layer), method, torch.randn(N, D))


@pytest.mark.parametrize("method", ["forward_and_logabsdet", "inverse_and_logabsdet"])
def test_layer_beyond_what_is_computed_again(method: str) -> None:
    """From D = 129 the forward saves h, and the inverse of many rows may take W⁻¹."""
    compare(disturbed(LUDense(130, activation=LeakySoftplus(0.1))), method, torch.randn(140, 130))


@given(st.integers(1, 40), st.integers(1, 70), st.sampled_from(ACTIVATIONS[1:]), st.sampled_from(METHODS))
def test_net(D: int, N: int, activation: Any, method: str) -> None:
    compare(disturbed(LUNet(D, 3, activation())), method, torch.randn(N, D))


def test_a_net_is_one_operation_and_its_layers_agree_with_it() -> None:
    net, x = disturbed(LUNet(12, 4)), torch.randn(20, 12)
    called = []

    class Names(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            called.append(str(func))
            return func(*args, **(kwargs or {}))

    with Names(), torch.no_grad():
        y, total = net.forward_and_logabsdet(x)
    assert [name for name in called if "lunet_fast" in name] == ["lunet_fast.net_forward.default"]
    net.layers[1].register_forward_hook(lambda *_: None)  # who hooks a layer wants it called
    with Names(), torch.no_grad():
        z, share = net.forward_and_logabsdet(x)
    assert [name for name in called if "lunet_fast.layer" in name] == ["lunet_fast.layer_forward.default"] * 4
    torch.testing.assert_close(z, y)
    torch.testing.assert_close(share, total)
    assert normwise(net.inverse(y), x.double()) <= 1e-4


def test_stacked_layers() -> None:
    x, lu, bias = torch.randn(3, 20, 9), torch.randn(3, 9, 9) * 0.2, torch.randn(3, 9)
    for function in (functional.lu_dense_and_logabsdet, functional.lu_dense_inverse_and_logabsdet):
        y, total = function(x, lu, bias, slopes=(0.1, 0.9, 1.0))
        exact, exact_total = function(x.double(), lu.double(), bias.double(), slopes=(0.1, 0.9, 1.0))
        assert normwise(y, exact) <= 2e-5
        assert normwise(total, exact_total) <= 2e-5


@pytest.mark.parametrize("rows", [5, 20])
def test_stacked_layers_are_differentiated_whatever_the_backend(rows: int) -> None:
    """With few rows the kernels form no W; what backward is given must not be memory that nobody wrote."""
    given = torch.randn(2, rows, 8), torch.randn(2, 8, 8) * 0.2, torch.randn(2, 8)

    def gradients(first: str, second: str, dtype: torch.dtype) -> list[Tensor]:
        leaves = [t.clone().to(dtype).requires_grad_() for t in given]
        slopes = torch.tensor([0.1, 0.9, 1.0], dtype=dtype, requires_grad=True)
        dispatch.set_backend(first)
        y, total = functional.lu_dense_and_logabsdet(*leaves, slopes=slopes)
        dispatch.set_backend(second)
        (y.sum() + total.sum()).backward()
        assert all(leaf.grad.is_contiguous() for leaf in leaves)
        return [leaf.grad for leaf in [*leaves, slopes]]

    exact = gradients("reference", "reference", torch.float64)
    for backends in (("triton", "triton"), ("triton", "reference"), ("reference", "triton")):
        for mine, expected in zip(gradients(*backends, torch.float32), exact, strict=True):
            assert normwise(mine, expected) <= 1e-5


def test_any_strides_and_leading_shapes() -> None:
    layer = disturbed(LUDense(8, activation=LeakySoftplus(0.1)))
    plain = torch.randn(5, 3, 8)
    expected = layer(plain)
    strided = torch.empty(8, 3, 5).permute(2, 1, 0).copy_(plain)
    assert not strided.is_contiguous()
    torch.testing.assert_close(layer(strided), expected)
    torch.testing.assert_close(layer(plain[0, 0]), expected[0, 0])
    row = plain[0, 0].expand(4, 8).requires_grad_()  # stride 0 in, and stride 0 back from the sum
    layer(row).sum().backward()
    assert row.grad is not None
    assert layer(plain[:0]).shape == (0, 3, 8)


def test_second_derivatives_are_those_of_the_formulas() -> None:
    layer, x = disturbed(LUDense(4, activation=LeakySoftplus(0.2))), torch.randn(6, 4)

    def penalty(module: nn.Module, rows: Tensor) -> Tensor:
        rows = rows.clone().requires_grad_()
        (slope,) = torch.autograd.grad(module(rows).sum(), rows, create_graph=True)
        module.zero_grad()
        slope.square().sum().backward()
        return module.lu.grad.clone()

    ours = penalty(layer, x)
    assert normwise(ours, penalty(layer.double(), x.double())) <= 1e-5


def test_gradcheck_in_float32() -> None:
    """Finite differences of the kernels themselves: float64 would not reach them."""
    layer = disturbed(LUDense(3, activation=LeakySoftplus(0.3)))

    def run(x: Tensor, lu: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        return functional.lu_dense_and_logabsdet(x, lu, bias, slopes=(0.3, 0.7, 1.0))

    arguments = (
        torch.randn(2, 3, requires_grad=True),
        layer.lu.detach().requires_grad_(),
        torch.randn(3, requires_grad=True),
    )
    assert torch.autograd.gradcheck(run, arguments, eps=1e-2, atol=2e-3, rtol=2e-2, nondet_tol=0.0)


def test_operations_keep_their_schemas() -> None:
    x, lu, bias = torch.randn(6, 5), torch.randn(5, 5) * 0.2, torch.randn(5)
    fixed = ("leaky_softplus", None, (0.1, 0.9, 1.0))
    leaf = [t.clone().requires_grad_() for t in (x, lu, bias)]
    for name in ("layer_forward", "layer_inverse"):
        opcheck(
            getattr(lib, name).default,
            (leaf[0], leaf[1], None, None, leaf[2], *fixed, True, True),
            test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
        )
    for name in ("activation_forward", "activation_inverse"):
        opcheck(getattr(lib, name).default, (leaf[0], *fixed, True))
    nets = torch.stack([lu, lu])
    learnt = ("leaky_softplus", torch.rand(1, 3), ())
    for forward, backward in (
        (lib.net_forward, lib.net_backward),
        (lib.net_inverse, lib.net_inverse_backward),
    ):
        opcheck(forward.default, (x, nets, None, None, torch.stack([bias, bias]), *fixed, True))
        opcheck(
            backward.default,
            (x, torch.randn(6), x, nets, None, None, None, *learnt, True, True, False),
        )
    y, total, h, weight = lib.layer_forward(x, lu, None, None, bias, *fixed, True, True)
    assert h.numel() == 0  # computed again by the kernel
    opcheck(
        lib.layer_backward.default,
        (y, total, x, h, weight, lu, None, None, bias, *fixed, True, True, True),
    )
    start, total, h = lib.layer_inverse(y, lu, None, None, bias, *fixed, True, True)
    opcheck(
        lib.layer_inverse_backward.default,
        (y, total, start, h, lu, None, None, bias, *fixed, True, True, True),
    )


@pytest.mark.parametrize("build", [lambda: LUDense(6, activation=LeakySoftplus(0.1)), lambda: LUNet(6, 3)])
def test_compiled_without_a_graph_break(build: Callable[[], Any]) -> None:
    module, x = disturbed(build()), torch.randn(9, 6)
    cotangents = [torch.randn(9, 6), torch.randn(9)]
    expected = results(module, "forward_and_logabsdet", x, cotangents)
    module.forward_and_logabsdet = torch.compile(
        module.forward_and_logabsdet, fullgraph=True, backend="aot_eager"
    )
    for mine, plain in zip(results(module, "forward_and_logabsdet", x, cotangents), expected, strict=True):
        torch.testing.assert_close(mine, plain)
    torch.compiler.reset()


def test_exported() -> None:
    net, x = disturbed(LUNet(6, 3)), torch.randn(9, 6)
    program = torch.export.export(net, (x,), dynamic_shapes=({0: torch.export.Dim("N")},))
    torch.testing.assert_close(program.module()(x), net(x))
    torch.testing.assert_close(program.module()(x[:4]), net(x[:4]))


def test_a_backend_changed_between_forward_and_backward() -> None:
    layer, x = disturbed(LUDense(7, activation=LeakySoftplus(0.1))), torch.randn(20, 7)
    expected = results(layer, "forward", x, [torch.ones(20, 7)])
    for first, second in (("triton", "reference"), ("reference", "triton")):
        for rows in (20, 3):
            dispatch.set_backend(first)
            layer.zero_grad()
            y = layer(x[:rows])
            dispatch.set_backend(second)
            y.sum().backward()
            if rows == 20:
                torch.testing.assert_close(layer.lu.grad, expected[2])
            assert bool(layer.lu.grad.isfinite().all())


def test_bfloat16_under_autocast() -> None:
    layer, x = disturbed(LUDense(20, activation=LeakySoftplus(0.1))), torch.randn(30, 20)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
        back = layer.inverse(y)
    assert y.dtype == torch.bfloat16
    assert back.dtype == torch.float32
    assert normwise(y, layer.double()(x.double())) <= 1e-2


def test_precision_follows_pytorch() -> None:
    x = torch.zeros(1)
    before = torch.get_float32_matmul_precision()
    try:
        for setting, arithmetic in (("highest", "tf32x3"), ("high", "tf32"), ("medium", "tf32")):
            torch.set_float32_matmul_precision(setting)
            assert triton.precision_of(x) == arithmetic
    finally:
        torch.set_float32_matmul_precision(before)


def test_the_recommender_trains_on_the_kernels() -> None:
    """A few steps of the MovieLens model give what the reference gives."""
    from lunet_fast.recsys.data.ratings import from_frame
    from lunet_fast.recsys.model.config import TrainConfig
    from lunet_fast.recsys.model.training import train

    frame = (
        pytest.importorskip("pandas")
        .DataFrame(
            {
                "user": [f"u{i % 11}" for i in range(60)],
                "item": [f"i{i * 7 % 13}" for i in range(60)],
                "rating": [1.0 + i * i % 5 for i in range(60)],
            }
        )
        .drop_duplicates(["user", "item"])
    )
    config = TrainConfig(
        members=2, embedding_size=3, layers=2, epochs=2, batch_size=16, mlp=False, net_learning_rate=5e-3
    )

    def trained(backend: str) -> dict[str, Tensor]:
        dispatch.set_backend(backend)
        ratings = from_frame(frame, timestamp=None)
        return train(ratings, config).trained.model.state_dict()

    ours, theirs = trained("triton"), trained("reference")
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        if value.is_floating_point():
            torch.testing.assert_close(value, theirs[name], rtol=1e-3, atol=1e-4, msg=name)

"""The registered operations: schema, fake tensors and autograd by PyTorch's own checks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

import lunet_fast
from lunet_fast import LeakySoftplus, LUNet, functional
from lunet_fast.ops import dispatch, reference
from lunet_fast.ops.values import Matrix

lib = torch.ops.lunet_fast
FIXED = ("leaky_softplus", None, (0.1, 0.9, 1.0))
D = 5


def layer(rows: int, stacked: bool = False) -> dict[str, Tensor]:
    lead = (3,) if stacked else ()
    return {
        "x": torch.randn(*lead, rows, D),
        "lu": torch.randn(*lead, D, D) * 0.3,
        "sign": torch.ones(*lead, D),
        "bias": torch.randn(*lead, D),
    }


@pytest.mark.parametrize(
    "activation",
    [FIXED, ("leaky_softplus", torch.tensor([0.2, 0.8, 1.5]), ())],
    ids=["fixed", "learnt"],
)
@pytest.mark.parametrize("logabsdet", [True, False])
def test_activation(activation: tuple[Any, ...], logabsdet: bool) -> None:
    x = torch.randn(4, D)
    for op, backward in (
        (lib.activation_forward, lib.activation_backward),
        (lib.activation_inverse, lib.activation_inverse_backward),
    ):
        opcheck(op.default, (x.clone().requires_grad_(), *activation, logabsdet))
        opcheck(backward.default, (x, torch.randn(4) if logabsdet else None, x, *activation))


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("save", [True, False])
@pytest.mark.parametrize("rows", [2, 40])
def test_layer(rows: int, save: bool, stacked: bool) -> None:
    t = layer(rows, stacked)
    permutation = None if stacked else torch.randperm(D)
    for name in ("layer_forward", "layer_inverse"):
        arguments = (t["x"], t["lu"], t["sign"], permutation, t["bias"], *FIXED, True, save)
        # Autograd saves h and A whatever `save` says, so their shapes are checked where it is true.
        for each in (t["x"], t["lu"], t["bias"]):
            each.requires_grad_(save)
        utils = (
            ("test_schema", "test_faketensor") if not save else ("test_schema", "test_autograd_registration")
        )
        opcheck(getattr(lib, name).default, arguments, test_utils=utils)


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("rows", [2, 40])
def test_layer_backward(rows: int, stacked: bool) -> None:
    t = layer(rows, stacked)
    y, logabsdet, h, weight = lib.layer_forward(
        t["x"], t["lu"], t["sign"], None, t["bias"], *FIXED, True, True
    )
    values = (t["lu"], t["sign"], None, t["bias"], *FIXED)
    opcheck(lib.layer_backward.default, (y, logabsdet, t["x"], h, weight, *values, True, True, True))
    opcheck(lib.layer_backward.default, (y, None, t["x"], h, weight, *values, False, False, False))
    # A forward that Triton did saves A alone, and may not have saved h.
    saved = lib.layer_backward(y, None, t["x"], h, weight, *values, True, True, True)
    if not stacked:
        weight = reference.lu_weight(t["lu"], t["sign"])
    again = lib.layer_backward(y, None, t["x"], h.new_empty(0), weight, *values, True, True, True)
    torch.testing.assert_close(again, saved)
    x, logabsdet, h = lib.layer_inverse(y, *values, True, True)
    opcheck(lib.layer_inverse_backward.default, (y, logabsdet, x, h, *values, True, True, True))
    opcheck(lib.layer_inverse_backward.default, (y, None, x, h, *values, False, False, False))


def test_operation_called_directly_has_gradients() -> None:
    """As an exported program calls it: no Function of ours in between."""
    t = {name: v.double().requires_grad_(name != "sign") for name, v in layer(7).items()}

    def forward(x: Tensor, lu: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        return lib.layer_forward(x, lu, t["sign"], None, bias, *FIXED, True, False)[:2]

    def inverse(y: Tensor, lu: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        return lib.layer_inverse(y, lu, t["sign"], None, bias, *FIXED, True, False)[:2]

    for function in (forward, inverse):
        assert torch.autograd.gradcheck(function, (t["x"], t["lu"], t["bias"]))


def test_exported_program_trains() -> None:
    net = LUNet(6, 3, LeakySoftplus(0.2))
    batch = torch.export.Dim("batch")
    program = torch.export.export(net, (torch.randn(5, 6),), dynamic_shapes=({0: batch},))
    exported = program.module()
    for rows in (3, 90):  # fewer and more rows than columns: the two ways through a layer
        x = torch.randn(rows, 6)
        exported.zero_grad()
        exported(x).square().sum().backward()
        found = {name: p.grad.clone() for name, p in exported.named_parameters() if p.grad is not None}
        net.zero_grad()
        net(x).square().sum().backward()
        assert len(found) == 6
        for name, parameter in net.named_parameters():
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-4)


def test_autocast_does_not_lower_the_precision_inside() -> None:
    """W is formed, and triangles are solved, in float32 under bfloat16 autocast."""
    t = layer(50)
    expected = lib.layer_inverse(t["x"], t["lu"], t["sign"], None, t["bias"], *FIXED, True, False)
    with torch.autocast("cpu", torch.bfloat16):
        found = lib.layer_inverse(t["x"], t["lu"], t["sign"], None, t["bias"], *FIXED, True, False)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_backends() -> None:
    assert lunet_fast.get_backend() in dispatch.BACKENDS
    before = lunet_fast.get_backend()
    try:
        lunet_fast.set_backend("reference")
        assert lunet_fast.get_backend() == "reference"
        with pytest.raises(ValueError, match="backend must be one of auto, reference, triton, got 'cuda'"):
            lunet_fast.set_backend("cuda")
        assert lunet_fast.get_backend() == "reference"
    finally:
        lunet_fast.set_backend(before)


@pytest.mark.parametrize("inverse", [False, True])
def test_net_in_pytorch(inverse: bool) -> None:
    """What an exported net runs where there are no kernels: its layers one by one, and their gradients."""
    net = LUNet(D, 3).double()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    x = torch.randn(4, D, dtype=torch.float64, requires_grad=True)
    lu, bias, sign = (
        torch.stack([getattr(layer, name) for layer in net.layers]) for name in ("lu", "bias", "sign")
    )
    leaves = [x, lu.detach().requires_grad_(), bias.detach().requires_grad_()]

    def run(x: Tensor, lu: Tensor, bias: Tensor) -> tuple[Tensor, Tensor | None]:
        matrix, activation = Matrix(lu, sign, None, bias), functional.activation_of((0.1, 0.9, 1.0))
        return functional.net(x, matrix, activation, inverse=inverse, logabsdet=True)

    expected = (net.inverse_and_logabsdet if inverse else net.forward_and_logabsdet)(x)
    torch.testing.assert_close(run(*leaves), expected)
    assert torch.autograd.gradcheck(run, leaves)

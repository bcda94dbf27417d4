"""What torch.jit.trace and both of ONNX's exporters record of the layers: right for other rows than those
that were recorded, in every direction; what ONNX Runtime computes is held against float64."""

from __future__ import annotations

import copy
import io
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lunet_fast import GeneralizedLeakySoftplus, LeakySoftplus, LUDense, LUNet

METHODS = ("forward", "inverse", "forward_and_logabsdet", "inverse_and_logabsdet")


class Calls(nn.Module):
    """A module whose forward is another's method, its results as a tuple."""

    def __init__(self, module: nn.Module, method: str) -> None:
        super().__init__()
        self.module = module
        self.method = method

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        found = getattr(self.module, self.method)(x)
        return found if isinstance(found, tuple) else (found,)


def modules() -> dict[str, Any]:
    """Each with D; parameters moved away from where they start."""
    torch.manual_seed(0)
    order = torch.randperm(33)
    own = LeakySoftplus(0.2, learnable=True, features=33)
    general = GeneralizedLeakySoftplus(1.3, 0.2, learnable=True)
    made = {
        "affine": (LUDense(8), 8),
        "one feature, no bias": (LUDense(1, bias=False, activation=LeakySoftplus(0.1)), 1),
        "permuted, slopes of each column": (LUDense(33, activation=own, permutation=order), 33),
        "small net": (LUNet(8, 2), 8),
        "reversible net, learnt slopes": (LUNet(12, 3, general, memory="reversible"), 12),
        "net": (LUNet(200, 2, permutation="random", signs="random"), 200),
    }
    with torch.no_grad():
        for module, D in made.values():
            for parameter in module.parameters():
                parameter.add_(0.1 / D**0.5 * torch.randn_like(parameter))
    return made


MODULES = modules()


def check(run: Any, calls: Calls, x: Tensor, tolerance: float) -> None:
    """Results of ``run`` at x beside those of ``calls`` in float64, relative to the largest number."""
    with torch.no_grad():
        truths = copy.deepcopy(calls).double()(x.double())
        for found, truth in zip(run(x), truths, strict=True):
            found = torch.as_tensor(found)
            assert found.shape == truth.shape
            assert (found - truth).abs().max() <= tolerance * truth.abs().max().clamp_min(1.0)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", MODULES)
def test_a_jit_trace_computes_the_layer(name: str, method: str) -> None:
    module, D = MODULES[name]
    calls = Calls(module, method)
    with warnings.catch_warnings():
        warnings.simplefilter("error", torch.jit.TracerWarning)
        traced = torch.jit.trace(calls, torch.randn(3, D))
    stored = io.BytesIO()
    torch.jit.save(traced, stored)
    stored.seek(0)
    loaded = torch.jit.load(stored)
    for shape in ((3, D), (300, D), (1, D)):
        check(loaded, calls, torch.randn(shape), 1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_a_jit_trace_can_be_trained(method: str) -> None:
    module, D = MODULES["reversible net, learnt slopes"]
    module = copy.deepcopy(module).double()
    calls = Calls(module, method)
    traced = torch.jit.trace(calls, torch.randn(3, D, dtype=torch.float64))
    x = torch.randn(5, D, dtype=torch.float64, requires_grad=True)
    inputs = [x, *module.parameters()]
    gradients = [
        torch.autograd.grad(sum(y.sin().sum() for y in run(x)), inputs, allow_unused=True)
        for run in (calls, traced)
    ]
    for expected, found in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_a_jit_trace_takes_a_row_and_leading_dimensions() -> None:
    module, D = MODULES["affine"]
    for shape in ((D,), (2, 3, D)):
        for method in METHODS:
            calls = Calls(module, method)
            check(torch.jit.trace(calls, torch.randn(shape)), calls, torch.randn(shape), 1e-5)


def test_a_jit_trace_of_an_activation() -> None:
    for method in METHODS:
        calls = Calls(LeakySoftplus(0.1), method)
        check(torch.jit.trace(calls, torch.randn(3, 5)), calls, 5 * torch.randn(7, 5), 1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("dynamo", [False, True], ids=["legacy", "dynamo"])
@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
@pytest.mark.parametrize("name", MODULES)
def test_onnx_runtime_computes_the_layer(name: str, inverse: bool, dynamo: bool) -> None:
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript" if dynamo else "onnx")
    module, D = MODULES[name]
    calls = Calls(module, "inverse_and_logabsdet" if inverse else "forward_and_logabsdet")
    model, x = io.BytesIO(), torch.randn(3, D)
    if dynamo:
        rows = {0: torch.export.Dim("rows")}
        torch.onnx.export(calls, (x,), dynamo=True, verbose=False, dynamic_shapes=(rows,)).save(model)
    else:
        torch.onnx.export(
            calls, (x,), model, dynamo=False, input_names=["x"], dynamic_axes={"x": {0: "rows"}}
        )
    session = runtime.InferenceSession(model.getvalue())
    (given,) = session.get_inputs()
    for rows_given in (3, 40):
        check(lambda x: session.run(None, {given.name: x.numpy()}), calls, torch.randn(rows_given, D), 1e-5)

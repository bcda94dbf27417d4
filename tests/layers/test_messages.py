"""What the layers say of arguments that they cannot take: the argument, the value and the fix."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from lunet_fast import (
    ConditionalLUNet,
    GeneralizedLeakySoftplus,
    LeakySoftplus,
    LUDense,
    LUFlow,
    LUNet,
    MonotoneSpline,
    NormalMixture,
    StandardNormal,
    functional,
)

METHODS = ["forward", "inverse", "forward_and_logabsdet", "inverse_and_logabsdet"]


def test_arguments_that_are_no_tensors_or_sizes() -> None:
    jagged = torch.nested.nested_tensor([torch.randn(2, 4), torch.randn(3, 4)], layout=torch.jagged)
    for method in METHODS:
        name = "y" if "inverse" in method else "x"
        for module in (LUDense(4), LeakySoftplus(0.3), LUNet(4, 2)):
            with pytest.raises(
                TypeError, match=rf"{name} must be a torch.Tensor, got numpy.ndarray; use torch.from"
            ):
                getattr(module, method)(torch.zeros(2, 4).numpy())
            with pytest.raises(TypeError, match=f"{name} is a nested tensor"):
                getattr(module, method)(jagged)
    cases = {
        "in_features must be an int, got 4.0": lambda: LUDense(4.0),
        "layers must be an int, got 2.0": lambda: LUNet(4, 2.0),
        "features must be an int, got '4'": lambda: LUNet("4", 2),
        "features must be an int, got 2.5": lambda: LeakySoftplus(0.1, True, 2.5),
        "dtype is torch.complex64": lambda: LUDense(4, dtype=torch.complex64),
        "linear.weight is torch.complex64": lambda: LUDense.from_linear(
            nn.Linear(4, 4, dtype=torch.complex64)
        ),
        "dtype is torch.int64": lambda: LUDense(4, dtype=torch.int64),
        "dtype is float32": lambda: LUNet(4, 2, dtype="float32"),
        "dtype is torch.complex128": lambda: LUDense(4).to(torch.complex128),
        "alpha must be a number, got '0.1' of type str": lambda: LeakySoftplus("0.1"),
        "beta must be a number, got 1j": lambda: GeneralizedLeakySoftplus(1.0, 1j),
        "low must be a number, got None": lambda: MonotoneSpline(4, low=None),
        "permutation must be a torch.Tensor, got builtins.list": lambda: LUDense(4, permutation=[0, 1, 2, 3]),
        "components must be an int, got 2.0": lambda: LUFlow.for_data(torch.randn(9, 4), components=2.0),
        "batch_size must be an int, got 8.0": lambda: LUFlow(LUNet(4, 2)).fit(
            torch.randn(9, 4), batch_size=8.0
        ),
        "context must be a floating-point tensor, got torch.int64": lambda: ConditionalLUNet(
            LUNet(4, 2), 3
        ).given(torch.zeros(2, 3, dtype=torch.int64)),
    }
    for message, call in cases.items():
        with pytest.raises(TypeError, match=message):
            call()
    fit = LUFlow(LUNet(4, 2)).fit
    for message, call in {
        "batch_size must be at least 1, got 0": lambda: fit(torch.randn(9, 4), batch_size=0),
        "learning_rate must be above 0, got -0.1": lambda: fit(torch.randn(9, 4), learning_rate=-0.1),
        "components must be at least 1, got 0": lambda: LUFlow.for_data(torch.randn(9, 4), components=0),
        r"context must have 3 features in its last dimension, got shape \(2, 4\)": lambda: ConditionalLUNet(
            LUNet(4, 2), 3
        ).given(torch.zeros(2, 4)),
        "x is on cpu and lu on meta": lambda: LUNet(4, 2, device="meta")(torch.zeros(2, 4)),
        "x is on meta and lu on cpu": lambda: LUNet(4, 2)(torch.zeros(2, 4, device="meta")),
        "sign is on meta and lu on cpu": lambda: functional.lu_dense(
            torch.zeros(2, 4), torch.zeros(4, 4), sign=torch.ones(4, device="meta")
        ),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("features", [4, 200])
def test_distributed_tensors_are_refused(tmp_path: Path, features: int) -> None:
    from torch.distributed.tensor import DTensor, Shard, distribute_module, distribute_tensor
    from torch.distributed.tensor.device_mesh import init_device_mesh

    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'meeting'}", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        x, net = torch.randn(5, features), LUNet(features, 2)
        rows = distribute_tensor(x, mesh, [Shard(0)])
        distributed = distribute_module(LUNet(features, 2), mesh)
        assert isinstance(rows, DTensor)
        for method in METHODS:
            for module, given, name in (
                (net, rows, "[xy]"),
                (distributed, x, "lu"),
                (distributed, rows, "[xy]"),
            ):
                with pytest.raises(TypeError, match=rf"^{name} is a DTensor.*x.to_local\(\)"):
                    getattr(module, method)(given)
        assert torch.equal(net(rows.to_local()), net(x))
    finally:
        dist.destroy_process_group()


def test_what_takes_rows_refuses_what_are_none() -> None:
    """Complex numbers above all, whose imaginary part ``whiten`` and ``fit_range`` dropped."""
    net, spline = LUNet(4, 2), MonotoneSpline(4, 3)
    own = [
        net.whiten,
        net.condition,
        spline.fit_range,
        spline.log_derivative,
        LeakySoftplus(0.2).log_derivative,
    ]
    flow = LUFlow(net, NormalMixture(4, 2))
    bases = [StandardNormal(4).log_prob, flow.base.log_prob]
    for call in (*own, *bases, net, net.inverse, flow.log_prob, flow.fit, LUFlow.for_data):
        with pytest.raises(TypeError, match=r"[xyz] must be real, got torch.complex64; pass its real part"):
            call(torch.zeros(5, 4, dtype=torch.complex64))
        with pytest.raises(
            TypeError, match=r"[xyz] must be a torch.Tensor, got numpy.ndarray; use torch.from_"
        ):
            call(torch.zeros(5, 4).numpy())
    rows, lu = torch.zeros(5, 4), torch.zeros(4, 4)
    for name, call in {
        "x must be a torch.Tensor, got numpy.ndarray": lambda: functional.lu_dense(rows.numpy(), lu),
        "y must be a torch.Tensor, got builtins.list": lambda: functional.lu_dense_inverse(rows.tolist(), lu),
        "lu must be a torch.Tensor, got numpy.ndarray": lambda: functional.lu_dense(rows, lu.numpy()),
        "x must be a torch.Tensor, got builtins.float": lambda: functional.leaky_softplus(
            0.5, (0.1, 0.9, 1.0)
        ),
    }.items():
        with pytest.raises(TypeError, match=name):
            call()

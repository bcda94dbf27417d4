"""Every kernel as it is compiled for sm_80 and sm_90, executed: against float64, and no race, no access out
of bounds, nothing read before it was written, no barrier that a part of a program reaches.

``make ptx-check`` runs the thorough ones too, and ``tests/kernels/interpreted`` on the compiled code.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks.gpu.common import normwise
from tests.ptx.cases import CASES, INVERSE, SCORES, Case, findings, fixed, layer, learnt, spline
from tests.ptx.launch import executed, kernels

pytest.importorskip("triton")

from lunet_fast.kernels import tiles
from lunet_fast.kernels.layer import layer_forward

ARCHITECTURES = (80, 90)

_launched: dict[int, set[str]] = {architecture: set() for architecture in ARCHITECTURES}


def cases(*, thorough: bool) -> list[Any]:
    return [
        pytest.param(case, id=str(case), marks=[pytest.mark.ptx] if thorough else [])
        for case in [*CASES, *SCORES]
        if case.thorough == thorough
    ]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("case", [*cases(thorough=False), *cases(thorough=True)])
def test_against_float64_and_without_findings(case: Any, architecture: int) -> None:
    runs, errors = case.errors(architecture=architecture)
    assert runs, "no kernel was launched"
    if not case.thorough:
        _launched[architecture] |= {run.launch.kernel for run in runs}
    assert findings(runs) == []
    wrong = [f"{what}: {error:.2e} > {limit:.2e}" for what, error, limit in errors if not error <= limit]
    assert wrong == [], f"{case}, sm_{architecture}"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    ("D", "activation"),
    [
        (40, fixed),
        (64, fixed),
        (48, learnt),
        pytest.param(33, spline(33), marks=pytest.mark.ptx),
        pytest.param(112, fixed, marks=pytest.mark.ptx),
    ],
)
def test_the_inverse_of_many_rows(
    D: int, activation: Callable[[], Any], architecture: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By W⁻¹, with φ⁻¹ in its launch; the rows here would be too few for it."""
    monkeypatch.setattr(tiles, "INVERSE_WEIGHT_NUMBERS", 0)
    case = Case("layer", layer(D, activation), 150, D, INVERSE, gradients=False)
    runs, errors = case.errors(architecture=architecture)
    assert "inverse_product_kernel" in {run.launch.kernel for run in runs}
    assert findings(runs) == []
    assert [(what, error, limit) for what, error, limit in errors if not error <= limit] == []


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_tf32_is_rounded_to_nearest(architecture: int) -> None:
    """A cut would be wrong by 7e-4, and as biased; where nothing cancels, roundings to nearest do."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(1, 96, 64, generator=generator)
    weight = torch.rand(1, 64, 64, generator=generator) / 64
    with executed(architecture=architecture):
        found, _, _ = layer_forward(x, weight, None, None, logabsdet=False, save=False, precision="tf32")
    exact = x.double() @ weight.double().mT
    assert normwise(found, exact) <= 3.2e-4
    assert abs(float((found - exact).mean() / exact.mean())) <= 1e-5


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_kernel_was_executed(architecture: int, request: pytest.FixtureRequest) -> None:
    """After the tests above: one that no quick case launches is in none of them."""
    selected = [item.name for item in request.session.items if item.path == request.path]
    if len(selected) < len(ARCHITECTURES) * (1 + len(cases(thorough=False))):
        pytest.skip("only some cases were selected")
    assert _launched[architecture] == kernels(), "cases.py has no quick case that launches it"

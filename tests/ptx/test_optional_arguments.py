"""Every combination of optional arguments, executed: without a bias a kernel is another program than with it.

The calls are those of ``tests/kernels/front_end.py``, on tensors with data. Only what the machine watches is
looked at, not the values: races, bounds, reads before writes, barriers. Each architecture has 800
combinations and takes half an hour.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from benchmarks.gpu.kernel_calls import Setting
from benchmarks.gpu.kernel_resources import specialised, standing_in
from tests.kernels import front_end
from tests.ptx.cases import findings
from tests.ptx.launch import How, Run, StandIn

pytestmark = pytest.mark.ptx
pytest.importorskip("triton")


class Filled(Setting):
    """The tensors of a call with random numbers in them, integers counted up: a permutation, or offsets."""

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        if dtype == torch.int64:
            return torch.arange(math.prod(shape)).view(shape)
        # Small enough for every matrix, packed or not, to have an inverse.
        return (torch.randn(shape) * (0.3 / math.sqrt(shape[-1]))).to(dtype)


class FirstOfEach:
    """Executes the first launch of a kernel with some arguments missing and some switches set, no other."""

    def __init__(self, kernel: Any, how: How, runs: list[Run], done: set[Any]) -> None:
        self.kernel, self.done, self.execute = kernel, done, StandIn(kernel, how, runs)

    def __getitem__(self, grid: Any) -> Any:
        def start(*args: Any, **kwargs: Any) -> None:
            launch = specialised(self.kernel, dict(zip(self.kernel.arg_names, args, strict=False)) | kwargs)
            kind = (launch.kernel, front_end.switches_of(launch))
            if kind not in self.done:
                self.done.add(kind)
                self.execute[grid](*args, **kwargs)

        return start


def ends(programs: int) -> range:
    """Two programs: the first and the last."""
    return range(0, programs, max(programs - 1, 1))


#: What has been executed, by architecture: kernels with their missing arguments and switches.
_executed: dict[int, set[Any]] = {}


@pytest.fixture
def small() -> Iterator[None]:
    """Few programs, so that each walks over several tiles; tensors of zeros where no launch has written."""
    with (
        mock.patch("lunet_fast.kernels.tiles.programs", return_value=2),
        mock.patch("lunet_fast.kernels.tiles.stack_programs", return_value=2),
        mock.patch.object(torch, "empty", torch.zeros),
        mock.patch.object(torch, "empty_like", torch.zeros_like),
        mock.patch.object(front_end, "Setting", Filled),
    ):
        yield


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("kind", front_end.SLOPES)
@pytest.mark.parametrize(("D", "arithmetic"), front_end.SETTINGS)
@pytest.mark.parametrize("architecture", [80, 90])
def test_nothing_is_wrong(D: int, arithmetic: str, kind: str | None, architecture: int) -> None:
    how = How(architecture, exact_sums=True, programs=ends)
    runs: list[Run] = []
    done = _executed.setdefault(architecture, set())
    with standing_in(architecture, lambda kernel: FirstOfEach(kernel, how, runs, done)):
        front_end.call_all(Filled(D, arithmetic, {} if kind in (None, "floats") else {"slopes": kind}), kind)
    assert done
    assert findings(runs) == []

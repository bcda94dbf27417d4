"""The page ``docs/explanation/composition.md``: its tests are there, some of them here."""

from __future__ import annotations

import ast
import copy
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lunet_fast import LeakySoftplus, LUFlow, LUNet, MonotoneSpline, NormalMixture

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "explanation" / "composition.md").read_text(encoding="utf-8")
NAMED = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", PAGE)


def flow(seed: int) -> LUFlow:
    torch.manual_seed(seed)
    net = LUNet(5, 3, MonotoneSpline(5, 4), permutation="random", signs="random", structure_seed=seed)
    return LUFlow(net, NormalMixture(5, 2))


@pytest.mark.parametrize(("file", "name"), NAMED, ids=[name for _, name in NAMED])
def test_named_tests_are_there(file: str, name: str) -> None:
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_every_row_names_one() -> None:
    rows = [line for line in PAGE.splitlines() if line.startswith("| ")][1:]
    assert len(rows) == len(NAMED)


def test_safetensors(tmp_path: Path) -> None:
    from safetensors.torch import load_model, save_model

    saved, loaded = flow(0), flow(1)
    x = torch.randn(7, 5)
    assert not torch.allclose(saved(x), loaded(x))
    save_model(saved, str(tmp_path / "flow.safetensors"))
    load_model(loaded, tmp_path / "flow.safetensors")
    assert torch.equal(saved(x), loaded(x))


def test_distributed_checkpoint(tmp_path: Path) -> None:
    import torch.distributed.checkpoint as dcp

    saved, loaded = flow(0), flow(1)
    x = torch.randn(7, 5)
    dcp.save(saved.state_dict(), checkpoint_id=tmp_path, no_dist=True)
    state = loaded.state_dict()
    dcp.load(state, checkpoint_id=tmp_path, no_dist=True)
    loaded.load_state_dict(state)
    assert torch.equal(saved(x), loaded(x))


class BothWays(torch.nn.Module):
    """Each method's result, for one program."""

    def __init__(self, net: LUNet) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return *self.net.forward_and_logabsdet(x), *self.net.inverse_and_logabsdet(y)


LOADS = """
import sys, torch
{imported}
run = torch._inductor.aoti_load_package(sys.argv[1])
x, y = torch.load(sys.argv[2], weights_only=True)
torch.save(run(x, y), sys.argv[3])
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor compiles with a C++ compiler")
def test_packages_of_aotinductor(tmp_path: Path) -> None:
    torch.manual_seed(0)
    activation = LeakySoftplus(0.2, learnable=True)
    net = LUNet(6, 3, activation, permutation="random", signs="random", input=MonotoneSpline(6, 4))
    batch = {0: torch.export.Dim("batch", min=2, max=4096)}
    examples = (torch.randn(8, 6), torch.randn(8, 6))
    program = torch.export.export(BothWays(net), examples, dynamic_shapes=(batch, batch))
    package, rows, results = (str(tmp_path / name) for name in ("net.pt2", "rows.pt", "results.pt"))
    torch._inductor.aoti_compile_and_package(program, package_path=package)
    given = (torch.randn(33, 6), torch.randn(33, 6))
    torch.save(given, rows)

    def loaded(imported: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", LOADS.format(imported=imported), package, rows, results]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

    # What is missing is called by its name, lunet_fast.
    without = loaded("")
    assert without.returncode != 0
    assert "lunet_fast::" in without.stderr
    found = loaded("import lunet_fast.functional")
    assert found.returncode == 0, found.stderr
    expected = BothWays(copy.deepcopy(net).double())(*(t.double() for t in given))
    for ours, exact in zip(torch.load(results, weights_only=True), expected, strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-5)

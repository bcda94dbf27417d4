"""The page ``docs/explanation/composition.md``: its tests are there, some of them here."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import torch

from lunet_fast import LUFlow, LUNet, MonotoneSpline, NormalMixture

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

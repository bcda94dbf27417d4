"""Tiles that someone tuned stand in the table's place, and nothing else does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lunet_fast.kernels import tiles
from lunet_fast.kernels.tiles import Tile

OTHER = Tile(32, 16, 16, 4, 2)
CALL = "layer_tile(64, torch.float32, tf32x3, 90)"


@pytest.fixture(autouse=True)
def the_table_comes_back() -> Iterator[None]:
    yield
    tiles.use_tuned({})


def test_a_tuned_tile_answers_its_own_call_alone() -> None:
    before = tiles.layer_tile(64, torch.float32, "tf32x3", 90)
    assert before != OTHER
    tiles.use_tuned({CALL: OTHER})
    assert tiles.layer_tile(64, torch.float32, "tf32x3", 90) == OTHER
    assert tiles.layer_tile(64, torch.float32, "tf32x3", 80) == before
    assert tiles.layer_tile(63, torch.float32, "tf32x3", 90) != OTHER
    tiles.use_tuned({})
    assert tiles.layer_tile(64, torch.float32, "tf32x3", 90) == before


def test_a_file_of_tiles(tmp_path: Path) -> None:
    path = tmp_path / "tiles.json"
    path.write_text(json.dumps({"device": "a GPU", "tiles": {CALL: list(OTHER)}}))
    assert tiles.read_tuned(path) == {CALL: OTHER}
    code = (
        "import torch; from lunet_fast.kernels import tiles;"
        "print(list(tiles.layer_tile(64, torch.float32, 'tf32x3', 90)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "LUNET_FAST_TILES": str(path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout) == list(OTHER)


@pytest.mark.parametrize(
    "text",
    [
        *("", "[]", "{}", '{"tiles": 1}', '{"tiles": {"x": [1, 2]}}'),
        *('{"tiles": {"x": [64, 64, 32, 4, -1]}}', '{"tiles": {"x": [64, 64, 32, 4, 2.5]}}'),
        '{"tiles": {"x": "64"}}',
    ],
)
def test_what_is_no_file_of_tiles_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "tiles.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"tiles\.json"):
        tiles.read_tuned(path)


@pytest.mark.parametrize("installed", [True, False])
def test_a_machine_without_triton_never_notices(installed: bool) -> None:
    """Nor is it imported where it is installed and nothing needs it."""
    code = """
import sys
if sys.argv[1] == "False":
    sys.modules["triton"] = None  # importing it raises ModuleNotFoundError
import torch, lunet_fast
net = lunet_fast.LUNet(4, 2)
net(torch.randn(3, 4)).sum().backward()
net.inverse(torch.randn(3, 4))
assert sys.modules.get("triton") is None
"""
    subprocess.run([sys.executable, "-c", code, str(installed)], check=True, timeout=120)

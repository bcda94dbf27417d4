from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from lunet_fast.recsys.report import save_loss_figure, table_2

METRICS = {
    "dataset": "ml-100k",
    "recipe": "best",
    "test_mse": 0.80004,
    "reconstruction_error": 1.26e-11,
    "mlp_test_mse": 0.9,
    "mlp_reconstruction_error": 0.01234,
}
PAPER = [
    ("paper: classic MLP", "ML-100K", "0.9200", "0.0050"),
    ("paper: invertible model", "ML-100K", "0.8880", "0.0000"),
    ("paper: invertible model", "ML-1M", "0.7955", "0.0000"),
]


def test_table_sets_ours_beside_the_papers() -> None:
    assert table_2(METRICS) == [
        *PAPER,
        ("ours: classic MLP", "ML-100K", "0.9000", "0.0123"),
        ("ours: LU-Net, recipe best", "ML-100K", "0.8000", "1.3e-11"),
    ]


def test_table_without_control_or_test_part() -> None:
    own = {"dataset": "mine", "recipe": "paper", "test_mse": 1.0, "reconstruction_error": 0.0}
    assert table_2(own) == [*PAPER, ("ours: LU-Net, recipe paper", "mine", "1.0000", "0.0e+00")]
    assert table_2({"dataset": "mine"}) == PAPER


@pytest.mark.parametrize(
    ("train", "test"), [([1.2, 0.9, 0.8], [1.1, 0.95, 0.93]), ([1.2], [1.1]), ([2.0] * 60, [])]
)
def test_figure(tmp_path: Path, train: list[float], test: list[float]) -> None:
    path = tmp_path / "loss.png"
    save_loss_figure(path, "ML-100K", train, test)
    data = path.read_bytes()
    width, height = struct.unpack(">II", data[16:24])
    assert (data[:8], width, height) == (b"\x89PNG\r\n\x1a\n", 960, 600)
    pixels = imread(path)[..., :3]
    blue, orange = (
        int((np.abs(pixels - np.array(colour) / 255).max(-1) < 0.02).sum())
        for colour in ((0x1F, 0x5F, 0x99), (0xD1, 0x66, 0x2B))
    )
    assert blue > 100
    assert (orange > 100) == bool(test)
    assert [child.name for child in tmp_path.iterdir()] == ["loss.png"]
    save_loss_figure(tmp_path / "again.png", "ML-100K", train, test)
    assert (tmp_path / "again.png").read_bytes() == data

"""The tables of real data: differences paired over rows, and bold for the least loss, whoever has it."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.machine import RESULTS

ROWS = 50


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(RESULTS.parent)
    return importlib.import_module("tables_of_real_data")


def row(tables: Any, family: str, losses: np.ndarray, **more: Any) -> dict[str, Any]:
    stored = {"float32": tables.packed(losses)}
    return {"family": family, "test": float(losses.mean()), "test_losses": stored, **more}


def test_differences_are_paired_over_rows(tables: Any, tmp_path: Path) -> None:
    hard = np.linspace(0, 100, ROWS)  # what makes rows differ is in both, and no error of their difference
    about = {"table": "t", "features": 3, "train_rows": 1000, "unit": "nats", "parameters": 7}
    rows = [
        row(tables, "LU-Net", hard + 1, **about),
        row(tables, "better", hard + 0.5 + 0.1 * (np.arange(ROWS) % 2), **about),
    ]
    (tmp_path / "density-tables.json").write_text(json.dumps({"machine": {"commit": "1"}, "rows": rows}))
    *_, line = tables.real_table(tmp_path)
    error = 0.1 * 0.5 * np.sqrt(ROWS / (ROWS - 1)) / np.sqrt(ROWS)
    assert line == f"| t | 1,000 × 3 | nats | 7 | 51.000 | **-0.450 ± {error:.3f}** |"


def test_the_mean_over_classes(tables: Any, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    noise = {label: generator.normal(size=400) for label in range(3)}
    rows = [
        row(tables, family, shift + label + (noise[label] if shift else 0 * noise[label]), label=label)
        for label in noise
        for family, shift in (("LU-Net", 0.0), ("other", 2.0))
    ]
    (tmp_path / "density-fashion.json").write_text(json.dumps({"machine": {"commit": "1"}, "rows": rows}))
    *_, mean = tables.fashion_table(tmp_path)
    more = np.mean([2.0 + noise[label].mean() for label in noise])
    error = np.sqrt(sum(noise[label].var(ddof=1) / 400 for label in noise)) / 3
    assert mean == f"| mean | **1.000** | {more:+.3f} ± {error:.3f} |"

"""Where committed results lie, and how the scripts here write them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lunet_fast.bench.machine import describe, write_json, write_text

__all__ = ["RESULTS", "describe", "write", "write_text"]

RESULTS = Path(__file__).parent / "results"


def write(name: str, results: dict[str, Any]) -> Path:
    """Write ``results`` and the machine to benchmarks/results/NAME.json, whole or not at all."""
    return write_json(RESULTS / f"{name}.json", {"machine": describe(), **results})

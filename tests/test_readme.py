"""What the README says is what the committed results say, and its code runs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_numbers_are_those_of_the_committed_results() -> None:
    check = [sys.executable, str(ROOT / "benchmarks" / "readme.py"), "--check"]
    run = subprocess.run(check, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


def blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_layer_example_runs() -> None:
    exec(blocks()[0], {})


def test_density_example_runs() -> None:
    (block,) = (block for block in blocks() if "NormalMixture" in block)
    exec(block, {})


def test_recommender_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("safetensors")
    monkeypatch.chdir(tmp_path)
    people = ["ann", "bob", *(f"user{n}" for n in range(18))]
    books = ["dune", "solaris", *(f"book{n}" for n in range(18))]
    rows = [
        f"{p},{b},{1 + (i * 7 + j * 3) % 5}"
        for i, p in enumerate(people)
        for j, b in enumerate(books)
        if (i + j) % 9
    ]
    Path("ratings.csv").write_text("user,item,rating\n" + "\n".join(rows) + "\n")
    exec(blocks()[1], {})

"""Which code made a result."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from lunet_fast.training import machine


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package with the rooms that count, and those that do not."""
    files = {
        "__init__.py": "",
        "ops/cpu.py": "RATE = 0.1\n\n\ndef f(x):\n    return x\n",
        "kernels/product.py": "BLOCK = 16\n",
        "cli/train.py": "OPTION = 1\n",
        "recsys/report/tables.py": "DIGITS = 4\n",
        "recsys/model/loss.py": "WEIGHT = 1.0\n",
    }
    root = tmp_path / "lunet_fast"
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    shutil.move(root / "kernels", tmp_path / "kernels")
    (root / "kernels").symlink_to("../kernels")
    monkeypatch.setattr(machine.lunet_fast, "__file__", str(root / "__init__.py"))
    return root


def digest(*scripts: Path) -> str:
    machine._statements.cache_clear()
    return machine.code(*scripts)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("ops/cpu.py", "RATE = 0.2\n\n\ndef f(x):\n    return x\n"),
        ("ops/cpu.py", "RATE = 0.1\n\n\ndef f(x):\n    return -x\n"),
        ("kernels/product.py", "BLOCK = 32\n"),
        ("recsys/model/loss.py", "WEIGHT = 2.0\n"),
        ("recsys/model/new.py", "X = 1\n"),
    ],
)
def test_what_computes_changes_the_digest(package: Path, name: str, text: str) -> None:
    before = digest()
    (package / name).write_text(text)
    assert digest() != before


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("cli/train.py", "OPTION = 2\n"),
        ("recsys/report/tables.py", "DIGITS = 3\n"),
        ("kernels/product.py", '"""A product."""\n\nBLOCK = 16  # of rows\n"""Rows."""\n'),
        ("ops/cpu.py", 'RATE = 0.1\n\n\ndef f(x):\n    """It."""\n    return x  # the same\n'),
    ],
)
def test_what_computes_nothing_does_not(package: Path, name: str, text: str) -> None:
    before = digest()
    (package / name).write_text(text)
    assert digest() == before


def test_scripts_count(package: Path, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("STEPS = 10\n")
    before = digest(script)
    assert before != digest()
    script.write_text("STEPS = 20\n")
    assert digest(script) != before


def test_a_file_that_moves_its_constants_counts(package: Path) -> None:
    before = digest()
    (package / "recsys" / "model" / "loss.py").rename(package / "recsys" / "model" / "losses.py")
    assert digest() != before


def test_of_the_installed_package() -> None:
    assert len(machine.code()) == 64
    assert machine.code() == machine.code()

"""What is published: the sdist has every file that the tests need, and the wheel what runs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COMPLETE = ("lunet_fast", "kernels", "tests", "benchmarks", "docs")
FILES = ("pyproject.toml", "README.md", "LICENSE", "MANIFEST.in", "Makefile", "constraints.txt")
FILES += ("CHANGELOG.md", "CONTRIBUTING.md", "CITATION.cff", "mkdocs.yml")

pytest.importorskip("setuptools")


def build(folder: Path, kind: str) -> Path:
    """The sdist or the wheel of the project in ``folder``."""
    program = f"from setuptools import build_meta; print(build_meta.build_{kind}('dist'))"
    # Without this checkout on the path, whose copy it is that is built.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    return folder / "dist" / done.stdout.split()[-1]


@pytest.mark.slow
def test_sdist_and_wheel_are_complete(tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in FILES:
        shutil.copy(ROOT / name, copy)
    for name in COMPLETE:
        if (ROOT / name).is_dir():
            shutil.copytree(
                ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("*.pyc", ".*")
            )
    wanted = {
        str(path.relative_to(copy))
        for path in copy.rglob("*")
        if path.is_file() and path.suffix not in (".log", ".tmp")
    }
    with tarfile.open(build(copy, "sdist")) as sdist:
        there = {name.partition("/")[2] for name in sdist.getnames()}
        sdist.extractall(tmp_path, filter="data")
    assert sorted(wanted - there) == []
    assert {f"lunet_fast/{path.relative_to(ROOT)}" for path in (ROOT / "kernels").glob("*.py")} <= there
    unpacked = next(tmp_path.glob("lunet_fast-*"))
    with zipfile.ZipFile(build(unpacked, "wheel")) as wheel:
        names = set(wheel.namelist())
    runs = {name for name in there if name.startswith("lunet_fast/") and (unpacked / name).is_file()}
    assert sorted(runs - names) == []

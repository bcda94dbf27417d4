"""What is published: the sdist has every file that the tests need, and the wheel what runs."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[1]
COMPLETE = ("lunet_fast", "kernels", "tests", "benchmarks", "docs")
FILES = ("pyproject.toml", "README.md", "LICENSE", "MANIFEST.in", "Makefile", "constraints.txt")
FILES += ("CHANGELOG.md", "CONTRIBUTING.md", "CITATION.cff", "mkdocs.yml")

#: What advisories on what we depend on ask for: CVE-2025-68146 and CVE-2026-22701; CVE-2023-47248;
#: CVE-2024-5206; CVE-2025-27516; CVE-2021-41495; CVE-2023-25399; CVE-2026-34445 and others.
FLOORS = {"filelock": "3.20.3", "pyarrow": "14.0.1", "scikit-learn": "1.5", "jinja2": "3.1.6"}
FLOORS |= {"numpy": "1.22.2", "scipy": "1.10", "onnx": "1.21"}

pytest.importorskip("setuptools")


@pytest.mark.parametrize("name", FLOORS)
def test_lower_bounds_that_advisories_ask_for(name: str) -> None:
    lines = re.findall(rf'^    "({name}(?![\w-]).*)",$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert lines
    for line in lines:
        lowest = [each.version for each in Requirement(line).specifier if each.operator == ">="]
        assert lowest, f"{line} has no lower bound"
        assert Version(lowest[0]) >= Version(FLOORS[name])


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

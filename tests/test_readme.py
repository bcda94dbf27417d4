"""README and docs say what the committed results say; README's code runs, its links lead somewhere."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from tests.docs.pages import run_page

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
REPOSITORY = re.compile(
    r"https://(?:github\.com/lunet-fast/lunet-fast/(?:blob|tree)|"
    r"raw\.githubusercontent\.com/lunet-fast/lunet-fast)/main/([^)\s#]+)"
)


def test_tables_are_those_of_the_committed_results() -> None:
    check = [sys.executable, str(ROOT / "benchmarks" / "readme.py"), "--check"]
    run = subprocess.run(check, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


def test_readme_is_short() -> None:
    assert len(README.splitlines()) <= 150


def test_links_are_absolute() -> None:
    # The long description on the package index has no folder to be relative to.
    assert all(target.startswith("https://") for target in re.findall(r"\]\(([^)]+)\)", README))


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))], ids=lambda p: p.stem
)
def test_links_into_the_repository_name_what_is_there(page: Path) -> None:
    for path in REPOSITORY.findall(page.read_text()):
        assert (ROOT / path).exists(), path


def test_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("safetensors")
    monkeypatch.chdir(tmp_path)
    people = ["ann", "bob", *(f"user{n}" for n in range(18))]
    books = ["dune", "solaris", *(f"book{n}" for n in range(18))]
    rows = [
        (person, book, 1 + (i * 7 + j * 3) % 5)
        for i, person in enumerate(people)
        for j, book in enumerate(books)
        if (i + j) % 9
    ]
    pd.DataFrame(rows, columns=["user", "item", "rating"]).to_csv("ratings.csv", index=False)
    numbers = np.random.default_rng(0).normal(size=(200, 3))
    pd.DataFrame(numbers, columns=list("abc")).to_csv("table.csv", index=False)
    run_page(ROOT / "README.md")

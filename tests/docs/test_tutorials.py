"""Every page that shows code shows code that runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.docs.pages import FENCE, ROOT, run_page

PAGES = [page for page in sorted((ROOT / "docs").rglob("*.md")) if FENCE.search(page.read_text())]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("typer")
    monkeypatch.chdir(tmp_path)
    run_page(page)


def test_all_tutorials_have_code_that_runs() -> None:
    silent = [page.stem for page in (ROOT / "docs" / "tutorials").glob("*.md") if page not in PAGES]
    assert not silent

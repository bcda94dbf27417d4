"""Every kernel in Triton's interpreter: the files of ``interpreted/``, each in a process of its own.

TRITON_INTERPRET is read when Triton is imported, so those tests cannot run in this process.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted((Path(__file__).parent / "interpreted").glob("test_*.py"))


def run(file: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest) -> Iterator[dict[str, Future[subprocess.CompletedProcess[str]]]]:
    """The selected files' runs, two at a time, the largest first: a late start of the longest costs most."""
    pytest.importorskip("triton")
    selected = {item.name for item in request.session.items if item.path == request.path}
    files = [file for file in FILES if f"test_kernels[{file.stem}]" in selected]
    pool = ThreadPoolExecutor(2)
    yield {file.stem: pool.submit(run, file) for file in sorted(files, key=lambda file: -file.stat().st_size)}
    pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("name", [file.stem for file in FILES])
def test_kernels(runs: dict[str, Future[subprocess.CompletedProcess[str]]], name: str) -> None:
    done = runs[name].result()
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"\b\d+ passed\b", done.stdout), f"no test ran:\n{done.stdout}"

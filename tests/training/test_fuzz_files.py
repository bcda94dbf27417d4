"""A few of the hostile files of ``tests/fuzz/files.py``, in this process; ``make fuzz`` reads 20,000."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.fuzz.files import MOST_WAITING, SHARES, Files, _hangs
from tests.fuzz.reader import Failure

pytest.importorskip("optuna")
pytest.importorskip("pyarrow")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("fuzz"))


def test_each_ends_in_a_result_or_in_our_error(made: Files) -> None:
    found = [made.ending(number, seed=1)[:2] for number in range(120)]
    assert {kind for kind, _ in found} == set(SHARES)
    # Most are refused, and some changes do no harm: otherwise nothing would be tried.
    results = sum(ending == "result" for _, ending in found)
    assert 0 < results < len(found) / 2


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 8))
def test_more(seed: int, made: Files) -> None:
    for number in range(400):
        made.ending(number, seed)


@pytest.mark.parametrize(
    "error", [TypeError("x"), MemoryError(), RecursionError(), ValueError("names no file"), KeyError("x")]
)
def test_another_ending_is_told(error: Exception, made: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(file: Path) -> None:
        raise error

    monkeypatch.setattr(
        made, "kinds", {name: kind._replace(read=broken) for name, kind in made.kinds.items()}
    )
    with pytest.raises(Failure):
        made.ending(0, seed=0)


def test_a_hang_is_told_from_waiting_for_the_processor() -> None:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        now = time.monotonic()
        assert not _hangs(process.pid, now - 31.0, 0.0, 30.0)
        assert _hangs(process.pid, now, -31.0, 30.0)  # as if it had computed for so long
        assert _hangs(process.pid, now - 30.0 * MOST_WAITING - 1.0, 0.0, 30.0)
    finally:
        process.kill()
        process.wait()
    assert not _hangs(process.pid, now - 1e6, 0.0, 30.0)

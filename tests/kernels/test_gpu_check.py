"""``benchmarks/gpu/check.py``: all of it in the interpreter on tiny sizes, and what it makes of its rows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def start(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu.check", "--tiny", *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=300,
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], Path]:
    pytest.importorskip("triton")
    folder = tmp_path_factory.mktemp("results")
    return start("--out", str(folder)), folder


def test_every_stage_runs_and_every_check_holds(
    run: tuple[subprocess.CompletedProcess[str], Path],
) -> None:
    done, folder = run
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads(next(folder.glob("*.json")).read_text(encoding="utf-8"))
    rows = results["rows"]
    assert {"torch", "triton", "commit", "date", "before", "after"} <= set(results["machine"])
    assert not [row for row in rows if row["kind"] in ("failure", "skipped")]
    checks = [row for row in rows if row["kind"] == "check"]
    assert len(checks) > 100
    assert all(row["ok"] for row in checks)
    times = [row for row in rows if row["kind"] == "time"]
    assert not [row for row in times if row.get("wrong") or row.get("failed")]
    # The interpreter has no times to give.
    assert all(row["ms"] is None for row in times)
    stages = {row["stage"] for row in rows}
    assert {stage for stage in stages if stage.startswith("check")} > {
        "check stack",
        "check public functions",
    }
    assert {stage for stage in stages if stage.startswith("time")} > {"time layer", "time training"}


def test_the_report_is_readable(run: tuple[subprocess.CompletedProcess[str], Path]) -> None:
    text = next(run[1].glob("*.md")).read_text(encoding="utf-8")
    for heading in ("## What was to be reached", "## Ceilings", "## Times", "## Checks"):
        assert heading in text
    assert "not measured" in text
    lines = [line for line in text.splitlines() if line.startswith("| layer with log-det |")]
    assert {line.count("|") for line in lines} == {11}


def test_a_stage_by_itself_one_that_fails_and_one_that_hangs() -> None:
    """As the whole run starts them: a process gives its rows, or the reason why it has none."""
    pytest.importorskip("triton")
    program = """
import json, os
os.environ["TRITON_INTERPRET"] = "1"
from benchmarks.gpu import check
found = [check.child("time launches", 200.0), check.child("no such stage", 200.0)]
print(json.dumps([*found, check.child("check stack", check.GRACE * -0.99)]))
"""
    command = [sys.executable, "-c", program]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    launches, nothing, late = json.loads(done.stdout)
    assert {row["kind"] for row in launches} == {"time"}
    assert [row["kind"] for row in nothing] == ["failure"]
    assert "no such stage" in nothing[0]["error"]
    assert [(row["kind"], row["error"]) for row in late] == [("failure", "stopped: out of time")]


def test_tuning_ends_in_time(tmp_path: Path) -> None:
    """In its time there is none for another tile than the table's."""
    pytest.importorskip("triton")
    options = ["--features", "16", "--rows", "64", "--tiny", "--minutes", "0"]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu.tune_kernels", str(tmp_path / "tiles.json"), *options],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.count("the table's tile stays") == 3
    assert done.stderr.count("not tried") == 3
    assert json.loads((tmp_path / "tiles.json").read_text(encoding="utf-8"))["tiles"] == {}


def test_what_fails_a_run() -> None:
    """Ours wrong or raising; others may run out of memory."""
    from benchmarks.gpu import check

    rows = [
        time_row("ours", 1.0),
        time_row("ours, substitution", None, wrong=True),
        time_row("ours", None, failed="OutOfResources: shared memory"),
        time_row("eager", None, failed="out of memory"),
        time_row("ours", 1.0, graph=True),
        time_row("ours", 2.0, graph=False),
        time_row("eager", 2.0, graph=False),
        {"kind": "note", "what": "nothing"},
    ]
    failures = check.failures_of(rows)
    assert [row["error"] for row in failures] == [
        "wrong result",
        "OutOfResources: shared memory",
        "it cannot be captured as a CUDA graph",
    ]
    assert "ours, substitution" in failures[0]["what"]


def test_a_stage_ends_at_its_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.gpu import check

    def endless(place: Any) -> Any:
        while True:
            yield {"kind": "note", "what": "still here"}

    monkeypatch.setattr(check, "stages", lambda: {"check endless": endless})
    rows = list(check.run_stage("check endless", tiny=True, measure=False, seconds=0.05, share=(0, 1)))
    assert [row["kind"] for row in rows[-2:]] == ["note", "skipped"]


def time_row(contender: str, ms: float | None, **changed: Any) -> dict[str, Any]:
    row = {"kind": "time", "what": "inverse, affine", "D": 64, "B": 65_536, "precision": "highest"}
    return {**row, "bytes": 10**9, "flops": 10**9, "contender": contender, "ms": ms, **changed}


def test_floors_and_ratios() -> None:
    from benchmarks.gpu import check

    rows = [
        {"kind": "ceiling", "what": "copy", "rate": 1000.0},
        {"kind": "ceiling", "what": "tf32", "rate": 300.0},
        time_row("ours", 2.0),
        time_row("torch.linalg.solve_triangular", 11.0),
        time_row("ours", 1.0, precision="high", flops=10**12),
        time_row("torch.linalg.solve_triangular", 4.0, precision="high", flops=10**12),
        time_row("torch.linalg.solve_triangular", 1.0, B=1000),
        time_row("late", None),
    ]
    check.floors(rows)
    check.ratios(rows)
    # 1 GB at 1000 GB/s; 1 TFLOP in tf32 at 300 TFLOP/s, in three products of it at 100.
    assert rows[2]["floor ms"] == pytest.approx(1.0)
    assert rows[2]["floor / time"] == pytest.approx(0.5)
    assert rows[4]["floor ms"] == pytest.approx(10.0 / 3.0)
    assert rows[3]["× ours"] == pytest.approx(5.5)
    assert rows[7]["× ours"] is None
    reached = {row["what"]: row for row in check.targets(rows)}
    inverse = reached["inverse, affine, D ≤ 256: torch.linalg.solve_triangular over ours"]
    assert (inverse["least"], inverse["ok"]) == (pytest.approx(4.0), False)
    assert reached["layer with log-det, D ≤ 256: eager over ours"]["ok"] is None

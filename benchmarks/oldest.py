"""The layers' tests on the oldest PyTorch, Triton and NumPy that the package promises to work with.

    make test-oldest      builds the environment and runs this file in it

Writes benchmarks/results/oldest-versions.md: what was run, with what, and what came of it. Exits with 1 if
anything failed.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from machine import RESULTS, describe, write_text

ROOT = Path(__file__).parents[1]
FILES = ("tests/layers", "tests/ops", "tests/kernels")
PACKAGES = ("torch", "triton", "numpy")
COUNTS = ("passed", "failed", "error", "skipped")


def run(file: str) -> tuple[dict[str, int], list[str]]:
    """Counts of one file's tests, and its failures by name."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-rfE", file],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    print(done.stdout[-1500:], done.stderr[-500:], flush=True)
    lines = done.stdout.splitlines()
    last = lines[-1] if lines else ""
    counts = {name: sum(map(int, re.findall(rf"(\d+) {name}", last))) for name in COUNTS}
    if done.returncode not in (0, 1) or not any(counts.values()):
        counts["error"] += 1
    return counts, [line for line in lines if line.startswith(("FAILED ", "ERROR "))]


def main() -> None:
    machine = describe()  # now: the commit that is tested
    rows, wrong = [], []
    for file in FILES:
        counts, failures = run(file)
        rows.append(f"| {file} | " + " | ".join(str(counts[name]) for name in COUNTS) + " |")
        wrong += failures or [f"{file} did not run"] * bool(counts["error"])
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    text = [
        "# The oldest versions",
        "",
        f"Python {platform.python_version()}, {versions}; {machine['date']}, commit {machine['commit']}, "
        "`make test-oldest`.",
        "",
        "| tests | " + " | ".join(COUNTS) + " |",
        "|---" * (1 + len(COUNTS)) + "|",
        *rows,
        "",
        *(f"- {failure}" for failure in wrong),
    ]
    print(f"written to {write_text(RESULTS / 'oldest-versions.md', chr(10).join(text).rstrip() + chr(10))}")
    if wrong:
        raise SystemExit(1)


if __name__ == "__main__":
    main()

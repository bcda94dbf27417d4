"""Reading results files to be quoted: only what a commit made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

TRIALS = Path(__file__).resolve().parents[1] / "runs"

NAMELESS: set[str] = set()
"""Committed results of before scripts named the commit. May only shrink: whoever measures one again takes it
out."""


def commits(values: dict[str, Any]) -> set[str]:
    """The commits that made a results file: its own, "" where it names none, and those of single parts."""
    parts = [*values.get("rows", []), *values.get("parts", {}).values()]
    rows = [part for part in parts if "commit" in part]
    return {str(each.get("commit", "")) for each in (values.get("machine", {}), *rows)}


def read_results(path: Path) -> dict[str, Any]:
    """A results file to be quoted; ends the script where no commit holds the code that measured it.

    A trial's file, below ``runs``, is read whatever made it: no page quotes one.
    """
    values: dict[str, Any] = json.loads(path.read_text())
    for name in () if path.is_relative_to(TRIALS) else commits(values):
        if name.endswith("-dirty"):
            lacking = name.removesuffix("-dirty")
            raise SystemExit(f"{path.name}: measured with changes that commit {lacking} lacks; run it again")
        if not name and path.name not in NAMELESS:
            raise SystemExit(f"{path.name}: names no commit that measured it; run it again")
    return values

"""The frame of the scripts here: their options, the machine, and the results that they write.

A results file names the commit that made it. So a script that writes one refuses to start where tracked files
differ from the commit (documents and results apart); with ``--allow-dirty`` it runs, and its files go to
``runs/benchmarks`` instead.

    python benchmarks/machine.py      exits with 1 where a script would refuse
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lunet_fast.training import files
from lunet_fast.training.machine import code, commit, describe

__all__ = ["RESULTS", "Results", "describe", "kept_bytes", "open_results", "parser", "where", "write_text"]

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
TRIALS = ROOT / "runs" / "benchmarks"

SHOWING = ("tables*.py", "*_report.py", "committed.py")
"""Modules here that compute no result."""


def parser(doc: str | None, *, data: bool = False) -> argparse.ArgumentParser:
    """The options that scripts share: ``--allow-dirty``, and with ``data`` ``--data-dir``."""
    found = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument(
        "--allow-dirty", action="store_true", help="with changed files too; results go to runs/benchmarks"
    )
    if data:
        found.add_argument(
            "--data-dir",
            default=os.environ.get("LUNET_FAST_DATA"),
            help="folder with the MovieLens files (default: $LUNET_FAST_DATA, or found or fetched)",
        )
    return found


def refusal() -> str:
    """Why no results may be written from this tree, "" where they may."""
    found = commit()
    if found and not found.endswith("-dirty"):
        return ""
    name = found.removesuffix("-dirty")
    what = f"tracked files differ from commit {name}" if name else "this is no checkout"
    return f"{what}: no commit could be named that made the results. Commit first, or try --allow-dirty"


@dataclass(frozen=True)
class Results:
    """Where a script's files go, and what they say of the machine and the command."""

    folder: Path
    machine: dict[str, Any]
    command: str
    code: str = ""
    """Digest of all code and constants that compute: what was kept of another is measured again."""

    def path(self, name: str) -> Path:
        return self.folder / name

    def write(self, name: str, values: dict[str, Any], text: str | None = None) -> None:
        """Write NAME.json, and ``text`` beside it as NAME.md, each whole or not at all."""
        path = self.path(f"{name}.json")
        files.write_json(path, {"machine": self.machine, "command": self.command, **values})
        if text is not None:
            files.write_text(path.with_suffix(".md"), text)
        print(f"written to {path}" + " and .md" * (text is not None), file=sys.stderr, flush=True)


def open_results(options: argparse.Namespace, *, threads: int | None = None) -> Results:
    """Where to write, for a script that will measure on ``threads`` CPU threads; ends it if refused."""
    if threads is not None:
        torch.set_num_threads(threads)
    reason = refusal()
    if reason and not options.allow_dirty:
        raise SystemExit(reason)
    folder = TRIALS if options.allow_dirty else RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    return Results(folder, describe(), _command(options), code(*_scripts()))


def _scripts() -> list[Path]:
    """The modules of this folder that a script consists of."""
    names = (getattr(module, "__file__", None) for module in list(sys.modules.values()))
    paths = {Path(name).resolve() for name in names if name}
    here = [path for path in paths if path.parent == ROOT / "benchmarks"]
    return [path for path in here if not any(path.match(pattern) for pattern in SHOWING)]


def _command(options: argparse.Namespace) -> str:
    """What was typed, without the places of this machine."""
    typed = [word for word in sys.argv[1:] if word != "--allow-dirty"]
    data_dir = getattr(options, "data_dir", None)
    typed = [word for word in typed if word not in ("--data-dir", f"--data-dir={data_dir}", data_dir)]
    script = Path(sys.argv[0]).resolve()
    place = script.relative_to(ROOT) if script.is_relative_to(ROOT) else Path("benchmarks", script.name)
    return shlex.join(["python", place.as_posix(), *typed])


def where(results: dict[str, Any]) -> str:
    """The machine, the date and the command of a results file in words."""
    machine = results["machine"]
    threads = f"{machine['threads']} thread" + "s" * (machine["threads"] > 1)
    return (
        f"{machine['processor']}, {threads}, torch {machine['torch']}, {machine['date']}, commit "
        f"{machine['commit']}; `{results['command']}`"
    )


def write_text(path: Path, text: str) -> Path:
    """Write a text file, whole or not at all; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_text(path, text)
    return path


def kept_bytes(call: Any, module: nn.Module) -> int:
    """Bytes of the tensors that ``call()`` saves for backward, the module's own apart."""
    own = {t.untyped_storage().data_ptr() for t in (*module.parameters(), *module.buffers())}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = call()
    total = sum(kept.values())
    del result  # until here it holds what was kept, so that no address is used twice
    return total


if __name__ == "__main__":
    raise SystemExit(refusal() or 0)

"""What a result is measured on: the machine, the versions, and the memory of this process."""

from __future__ import annotations

import ast
import contextlib
import hashlib
import importlib.metadata
import os
import platform
import subprocess
from datetime import datetime, timezone
from functools import cache
from pathlib import Path
from typing import Any

import numpy
import torch

import lunet_fast


def describe(device: torch.device | str = "cpu") -> dict[str, Any]:
    """Processor, cores, threads, versions, commit and date; on a GPU its name and CUDA's version too."""
    found: dict[str, Any] = {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "lunet_fast": lunet_fast.__version__,
        "commit": commit(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
    }
    if torch.device(device).type == "cuda":
        found |= {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
    return found


def commit() -> str:
    """The commit of the checkout that this package lies in, "" for an installed copy.

    It ends in ``-dirty`` where a tracked file differs from that commit. Documents and results do not count:
    they change nothing that is measured, and writing results must not make the next ones dirty.
    """
    root = Path(lunet_fast.__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return ""
    git = ["git", "-C", str(root)]
    name = subprocess.run([*git, "describe", "--always"], capture_output=True, text=True, check=False)
    apart = [":(exclude)benchmarks/results", ":(exclude)*.md"]
    changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", ".", *apart], check=False).returncode
    return name.stdout.strip() + "-dirty" * bool(changed)


ROOMS_THAT_SHOW = ("cli", "bench", "recsys/report")
"""What takes no part in a result that is stored: commands, timings, reports."""


def code(*scripts: Path) -> str:
    """SHA-256 of the source that computes a result: this package and ``scripts``, with all their constants.

    A stored result is valid for one such digest. Comments and docstrings change none, nor do the rooms of
    ROOMS_THAT_SHOW.
    """
    root = Path(lunet_fast.__file__).resolve().parent
    # rglob does not follow the link to the kernels in every Python.
    files = {
        path.relative_to(root).as_posix(): path for path in (*root.rglob("*.py"), *root.glob("kernels/*.py"))
    }
    shown = tuple(f"{room}/" for room in ROOMS_THAT_SHOW)
    own = [files[name] for name in sorted(files) if not name.startswith(shown)]
    return hashlib.sha256("\n".join(map(_statements, [*own, *sorted(scripts)])).encode()).hexdigest()


@cache
def _statements(path: Path) -> str:
    """The syntax tree of a file, without its docstrings."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            # Of attributes too, which stand below them.
            node.body = [line for line in node.body if not _is_text(line)]
    return f"{path.name}: {ast.dump(tree)}"


def _is_text(line: ast.stmt) -> bool:
    return isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant)


def version_of(distribution: str) -> str:
    """The version of an installed distribution, "" where there is none of that name."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""


def flat_versions(*more: str) -> dict[str, str]:
    """Versions of what computes a result, and of the distributions ``more``, as keys of ``metrics.json``."""
    return {
        "version_lunet_fast": lunet_fast.__version__,
        "version_python": platform.python_version(),
        "version_torch": torch.__version__,
        "version_numpy": numpy.__version__,
        **{f"version_{name}": version_of(name) for name in more},
    }


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


# Memory of the process --------------------------------------------------------------------------------------


def process_memory() -> dict[str, int]:
    """Bytes that this process holds (``VmRSS``), of those mapped files (``RssFile``), and the most that it
    has held (``VmHWM``); {} off Linux."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return {}
    fields = (line.split() for line in lines if line.startswith(("VmRSS:", "RssFile:", "VmHWM:")))
    return {name.rstrip(":"): 1024 * int(count) for name, count, _ in fields}


def reset_peak() -> int | None:
    """Forget the most that was held so far; the bytes that are held now, None off Linux."""
    # Where it cannot be reset, a peak of the start is counted too, which has little but the data.
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return process_memory().get("VmRSS")

"""The code of a page, run from top to bottom as a reader would.

```python   runs here, in one namespace a page; with title="NAME" it is written to that file instead
```bash     runs line by line: `lunet-fast …` in this process, `[NAME=VALUE …] python …` in another
```sh, ```text and other blocks are to be read only.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

ROOT = Path(__file__).parents[2]
FENCE = re.compile(r'^```(python|bash)(?: title="([^"]+)")?\n(.*?)^```$', re.DOTALL | re.MULTILINE)


def run_page(page: Path) -> None:
    """Execute every block of ``page`` in the current folder; the first that fails raises."""
    text = page.read_text()
    names: dict[str, Any] = {"__name__": "__main__"}
    for found in FENCE.finditer(text):
        language, title, code = found.groups()
        line = text.count("\n", 0, found.start()) + 1
        if language == "bash":
            for command in code.replace("\\\n", " ").splitlines():
                run_command(command)
        elif title:
            Path(title).write_text(code)
        else:
            # Blank lines before it make the line of a traceback that of the page.
            exec(compile("\n" * line + code, str(page), "exec"), names)


def run_command(command: str) -> None:
    words = shlex.split(command, comments=True)
    if not words:
        return
    if words[0] == "lunet-fast":
        from lunet_fast.cli import app

        result = CliRunner().invoke(app, words[1:])
        assert result.exit_code == 0, f"{command}\n{result.output}\n{result.exception!r}"
        return
    settings = dict(word.split("=", 1) for word in words if re.fullmatch(r"[A-Z_]+=.*", word))
    program, *arguments = words[len(settings) :]
    assert program == "python", f"a page may run lunet-fast and python, not {command!r}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **settings}
    result = subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"

"""What the pages of mkdocs need besides Markdown: pictures, the command line, formulas without JavaScript."""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

import latex2mathml.converter
import typer
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from typer.cli import get_docs_for_click

ROOT = Path(__file__).parent.parent


def on_files(files: Files, config: Any, **_: Any) -> Files:
    """Add pictures/ from benchmarks/results, and the page of the command line."""
    for picture in sorted((ROOT / "benchmarks" / "results").glob("*.png")):
        files.append(File.generated(config, f"pictures/{picture.name}", abs_src_path=str(picture)))
    files.append(File.generated(config, "reference/command-line.md", content=command_line()))
    return files


def command_line() -> str:
    """The page on ``lunet-fast``, from the commands' own help."""
    from lunet_fast.cli import app

    command = typer.main.get_command(app)
    text = get_docs_for_click(
        obj=command, ctx=typer.Context(command), name="lunet-fast", title="Command line"
    )
    # The program is a heading of its own, below the page's.
    return text.replace("\n## ", "\n### ").replace(
        "# Command line\n", "# Command line\n\n## `lunet-fast`\n", 1
    )


def _say_whole(command: Any) -> None:
    """Let lists of commands have the first sentence of each, not its first 45 characters."""
    command.short_help = (command.help or "").partition("\n\n")[0].replace("\n", " ")
    for each in getattr(command, "commands", {}).values():
        _say_whole(each)


def on_page_content(content: str, page: Page, **_: Any) -> str:
    """Formulas that arithmatex has marked as MathML, which browsers show by themselves; results in a box."""

    def converted(found: re.Match[str]) -> str:
        display = "block" if found[1] == "div" else "inline"
        return latex2mathml.converter.convert(html.unescape(found[2].strip()[2:-2]), display=display)

    content = re.sub(r'<(div|span) class="arithmatex">(.*?)</\1>', converted, content, flags=re.DOTALL)
    if not page.url.startswith("results/"):
        return content
    # The style sheet keeps figures on one line, which would not do for long names.
    content = re.sub(r"(<tr>\s*)<td>(?=[^<]{25})", r'\1<td class="long">', content)
    return f'<div class="results">{content}</div>'

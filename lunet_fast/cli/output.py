"""What commands print and write: errors, tables, CSV and JSON."""

from __future__ import annotations

import csv
import json
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NoReturn, TextIO

import typer
from rich.console import Console
from rich.text import Text

from lunet_fast.cli.words import in_options
from lunet_fast.recsys.data.spreadsheet import spreadsheet_safe


def fail(error: Exception, code: int) -> NoReturn:
    """Print the error and leave with the exit code."""
    typer.echo(f"Error: {harmless(in_options(str(error)))}", err=True)
    raise typer.Exit(code)


@contextmanager
def errors_told() -> Iterator[None]:
    """Lets what a user can put right end the command with one message and exit code 2."""
    try:
        yield
    except BrokenPipeError:  # whoever read the output has seen enough; Typer ends quietly
        raise
    except (OSError, ValueError, ImportError) as error:
        fail(error, 2)


@dataclass(frozen=True)
class Output:
    """How much a command tells."""

    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="No progress and no notes: the result and errors alone.")
    ] = False

    @property
    def told(self) -> bool:
        """Whether progress and remarks are told."""
        return not self.quiet

    def note(self, text: str) -> None:
        """A remark beside the result, on stderr."""
        if self.told:
            typer.echo(harmless(in_options(text)), err=True)

    def line(self, text: str) -> None:
        """A line for people."""
        if self.told:
            typer.echo(harmless(text))


@dataclass(frozen=True)
class FigureOutput(Output):
    """The same of a command whose result are figures, which a program may read."""

    as_json: Annotated[
        bool, typer.Option("--json", help="For programs: the result as one JSON object, and nothing else.")
    ] = False

    @property
    def told(self) -> bool:
        return not (self.quiet or self.as_json)

    def figures(self, values: Mapping[str, Any], show: Callable[[], None]) -> None:
        """The result: as JSON, or as ``show`` shows it."""
        if self.as_json:
            text = json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False)
            typer.echo(text.encode("utf-8", "replace").decode())  # a file's name may be no text
        else:
            show()


@contextmanager
def interruption_told(text: str) -> Iterator[None]:
    """Ctrl-C ends the command with ``text``, which says what is kept."""
    try:
        yield
    except KeyboardInterrupt:
        typer.echo(f"\nInterrupted{text}", err=True)
        raise typer.Exit(130) from None


class Terminal(Console):
    """rich's console for texts that may come from files: in a ``str`` nothing is markup or an emoji's name,
    and control characters are written out. ``Text`` has the style that the program gave it."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(harmless(text), **options)


def wide_console() -> Console:
    """A console as wide as the terminal, or wide enough for a table where there is none."""
    console = Terminal()
    return console if console.is_terminal else Terminal(width=120)


def harmless(text: str) -> str:
    """Lines for a terminal: as :func:`printable`, but for the ends of lines."""
    return "\n".join(map(printable, text.split("\n")))


def printable(value: object) -> str:
    """An id or a title for a terminal: control characters, which could steer it, are written out."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(value))


def given_text(option: str, text: str) -> str:
    """A text of the command line without white space around it; ValueError where it is not UTF-8."""
    if any("\ud800" <= c <= "\udfff" for c in text):  # what Python makes of other bytes
        raise ValueError(f"{option} {printable(text)}: is not UTF-8: set the terminal to UTF-8")
    return text.strip()


def plain(value: Any) -> Any:
    """A number of NumPy's as one of Python's, which JSON knows; anything else as it is."""
    return value.item() if hasattr(value, "item") else value


def shortest(value: Any) -> float:
    """A float32 as the float with the fewest digits that tells it from every other float32."""
    return float(str(value))


# Files ------------------------------------------------------------------------------------------------------


def prepare_out(out: Path | None) -> None:
    """Make the folder of ``--out`` and see that a file can be written there; ``ValueError`` if not."""
    if out is None:
        return
    if out.is_dir():
        raise ValueError(f"--out {out}: is a folder: name a file, such as {out / 'ratings.csv'}")
    if out.exists() and not out.is_file():
        raise ValueError(f"--out {out}: is not a plain file: leave --out away to write to the output")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out.parent):
            pass
    except OSError as error:
        raise ValueError(f"--out {out}: cannot write there ({error}): choose another place") from error


def write_out(out: Path | None, write: Callable[[TextIO], None]) -> None:
    """Let ``write`` fill the file, which appears when it is whole, or write to the output without one."""
    from lunet_fast.training.files import write_atomically

    def whole(temporary: Path) -> None:
        with temporary.open("w", encoding="utf-8", newline="") as stream:
            write(stream)

    if out is None:
        write(sys.stdout)
    else:
        write_atomically(out, whole)


def write_csv(stream: TextIO, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """RFC 4180 with line feeds; texts are :func:`spreadsheet_safe`, None is empty. A row at a time."""
    stream.write(",".join(header) + "\n")
    # csv quotes a field with a carriage return only where that is part of the line end, so it is taken off.
    writer = csv.writer(_WithoutReturn(stream), lineterminator="\r\n")
    for row in rows:
        writer.writerow([spreadsheet_safe(value) for value in row])


class _WithoutReturn:
    """Ends lines that end in CR LF with LF."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, line: str) -> None:
        self.stream.write(line.removesuffix("\r\n") + "\n")


def write_json(stream: TextIO, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """A list with an object a row, each on a line of its own. A row at a time."""
    stream.write("[")
    for n, row in enumerate(rows):
        stream.write((",\n" if n else "\n") + _json_object(header, row))
    stream.write("\n]\n")


def write_json_lines(stream: TextIO, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """An object a line. A row at a time."""
    for row in rows:
        stream.write(_json_object(header, row) + "\n")


def _json_object(header: Sequence[str], row: Sequence[Any]) -> str:
    return json.dumps(dict(zip(header, row, strict=True)), ensure_ascii=False, allow_nan=False)


WRITERS = {"csv": write_csv, "json": write_json, "jsonl": write_json_lines}
"""Formats of a file, which are also its extensions."""

"""The parts of a report; ``render`` writes them as a page and as Markdown.

Texts are a small part of Markdown: ``**bold**``, ```code```, and a backslash before a character that is to be
taken as it is. Whatever comes from data goes through :func:`literal`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

MARK = re.compile(r"\\(?P<escaped>.)|`(?P<code>[^`]*)`|\*\*(?P<strong>.+?)\*\*", re.DOTALL)
"""What has a meaning within a text."""

_SPECIAL = re.compile(r"([\\`*_{}\[\]<>#|!~$&])")
_LINK = re.compile(r"(?<!!)\[([^\]]*)\]\([^)\s]*\)")
_PICTURE = re.compile(r"!\[([^\]]*)\]\(([^)\s]*)\)")
_EMPHASIS = re.compile(r"(?<![\w*\\])\*(?![\s*])([^*\n]+?)(?<![\s*\\])\*(?![\w*])")
_NUMBER = re.compile(r"[-+−]?[\d,]*\.?\d+(e[-+]?\d+)?( ?±.*)?( ?%| s)?", re.IGNORECASE)


def signed(value: float, digits: int = 4) -> str:
    """A change, with its sign."""
    return f"{value:+.{digits}f}".replace("-", "−")


def literal(text: object) -> str:
    """``text`` as a text of a report that shows exactly that, on one line."""
    return _SPECIAL.sub(r"\\\1", " ".join(str(text).split()))


@dataclass(frozen=True)
class Cell:
    """A cell of a table."""

    text: str
    value: float | None = None
    """What takes part in the choice of the column's best; None for a cell that does not."""


@dataclass(frozen=True)
class Column:
    """A column of a table."""

    title: str
    number: bool = True
    """Numbers stand at the right."""
    best: Literal["", "lowest", "highest"] = ""
    """Which cells are set in bold, whosever they are."""
    group: str = ""
    """What stands above this column and its neighbours of the same group."""


def numbers(*titles: str, best: Literal["", "lowest", "highest"] = "", group: str = "") -> list[Column]:
    """Columns of figures."""
    return [Column(title, best=best, group=group) for title in titles]


def texts(*titles: str) -> list[Column]:
    """Columns of words."""
    return [Column(title, number=False) for title in titles]


@dataclass(frozen=True)
class Row:
    """A row of a table; ``ours`` sets it off."""

    cells: Sequence[Cell]
    ours: bool = False


def row(*cells: Cell | str, ours: bool = False) -> Row:
    """A row whose texts are cells that do not take part in any choice."""
    return Row([cell if isinstance(cell, Cell) else Cell(cell) for cell in cells], ours)


@dataclass(frozen=True)
class Table:
    """Rows of cells under columns, with a title that names units and ±, and a remark below."""

    caption: str
    columns: Sequence[Column]
    rows: Sequence[Row]
    note: str = ""

    def bold(self, row: int, column: int) -> bool:
        """Whether a cell has the best value of its column: of two or more, as they are printed."""
        best = self.columns[column].best
        values = [cell.value for r in self.rows if (cell := r.cells[column]).value is not None]
        own = self.rows[row].cells[column]
        if not best or len(values) < 2 or own.value is None:
            return False
        first = (min if best == "lowest" else max)(v for v in values if v is not None)
        # Equal as printed is equal: nobody can see the difference.
        return own.value == first or _printed(own.text) in {
            _printed(r.cells[column].text) for r in self.rows if r.cells[column].value == first
        }


def _printed(text: str) -> str:
    return text.split("±")[0].strip()


@dataclass(frozen=True)
class Paragraph:
    text: str


@dataclass(frozen=True)
class Heading:
    """A heading within a section."""

    text: str


@dataclass(frozen=True)
class Bullets:
    items: Sequence[str]


@dataclass(frozen=True)
class Code:
    """Lines to be shown, or typed, as they are."""

    text: str


@dataclass(frozen=True)
class NotMeasured:
    """Stands for a part that the folder of results has nothing of."""

    what: str
    command: str


@dataclass(frozen=True)
class Warned:
    """A remark that must not be overlooked."""

    text: str


@dataclass(frozen=True)
class Curve:
    """Values by epoch, from epoch 1."""

    name: str
    values: Sequence[float]
    look: int
    """The same number is the same colour and dashes wherever it occurs: 0, 1 or 2."""


@dataclass(frozen=True)
class Panel:
    """Curves over one pair of axes; ``level`` is a named value to draw across."""

    title: str
    curves: Sequence[Curve]
    level: tuple[str, float] | None = None


@dataclass(frozen=True)
class Panels:
    """A figure of panels side by side."""

    caption: str
    panels: Sequence[Panel]


@dataclass(frozen=True)
class Dot:
    """A line of a :class:`Dots`: a change, and its standard error where there is one."""

    name: str
    change: float
    error: float | None


@dataclass(frozen=True)
class Dots:
    """Changes as dots with error bars around zero; ``better`` is the side on which a change is a gain."""

    caption: str
    dots: Sequence[Dot]
    better: Literal["left", "right"]
    limit: float
    """Larger changes are drawn at the edge, with an arrow and their value."""


@dataclass(frozen=True)
class Picture:
    """A PNG file's bytes, and what can be seen on it."""

    png: bytes
    alt: str
    file: str


@dataclass(frozen=True)
class Details:
    """Blocks that a reader opens."""

    summary: str
    blocks: Sequence[Block]


Block = (
    Paragraph | Heading | Bullets | Code | NotMeasured | Warned | Table | Panels | Dots | Picture | Details
)


@dataclass(frozen=True)
class Highlight:
    """A figure that matters, at the top."""

    value: str
    what: str
    beside: str
    """What to compare it with."""


@dataclass(frozen=True)
class Section:
    title: str
    blocks: Sequence[Block]

    @property
    def anchor(self) -> str:
        return re.sub(r"[^a-z0-9]+", "-", self.title.lower()).strip("-")


@dataclass(frozen=True)
class Document:
    """A report: title, a line below it, what matters and how to read it, and the sections."""

    title: str
    subtitle: str
    highlights: Sequence[Highlight]
    reading: Sequence[Block]
    sections: Sequence[Section] = field(default_factory=tuple)


def epochs_table(figure: Panels) -> Table:
    """The values of a figure's curves at the first, the last and a few epochs in between."""
    longest = max((len(c.values) for panel in figure.panels for c in panel.curves), default=0)
    shown = [e for e in (1, 2, 3, 5, 8, 12, 20, 30, 50, 100, 200) if e < longest] + [longest]
    columns = [*texts(""), *numbers(*(f"epoch {epoch}" for epoch in shown), "last")]
    rows = [
        row(
            f"{panel.title}, {curve.name}",
            *(f"{curve.values[e - 1]:.4f}" if e <= len(curve.values) else "" for e in shown),
            f"{curve.values[-1]:.4f}",
        )
        for panel in figure.panels
        for curve in panel.curves
        if curve.values
    ]
    return Table(figure.caption, columns, rows)


def from_markdown(text: str, folder: Path) -> list[Block]:
    """The blocks of a Markdown file of results: headings, paragraphs, lists, tables, code, PNG pictures.

    Pictures are read from ``folder``, by their name alone; the first heading, the file's title, and the
    targets of links are dropped.
    """
    blocks: list[Block] = []
    for chunk in re.split(r"\n\s*\n", text.replace("\r\n", "\n").strip()):
        lines = chunk.strip("\n").split("\n")
        while lines and lines[0].startswith("#"):
            level, _, title = lines.pop(0).partition(" ")
            if len(level) > 1:
                blocks.append(Heading(_plain(title)))
        if not lines:
            continue
        pictures = _PICTURE.findall(chunk)
        if pictures:
            blocks += [
                Picture((folder / Path(file).name).read_bytes(), alt, Path(file).name)
                for alt, file in pictures
                if file.endswith(".png") and (folder / Path(file).name).is_file()
            ]
        elif lines[0].startswith("|") and len(lines) > 1:
            blocks.append(_table(lines))
        elif lines[0].startswith("```"):
            blocks.append(Code("\n".join(line for line in lines if not line.startswith("```"))))
        elif lines[0].startswith(("- ", "* ")):
            items = re.split(r"\n[-*] ", "\n" + "\n".join(lines))[1:]
            blocks.append(Bullets([_plain(" ".join(item.split())) for item in items]))
        else:
            blocks.append(Paragraph(_plain(" ".join(line.strip() for line in lines))))
    return blocks


def _plain(text: str) -> str:
    """Without what only Markdown knows: links and emphasis."""
    return _EMPHASIS.sub(r"\1", _LINK.sub(r"\1", text))


def _table(lines: Sequence[str]) -> Table:
    found = [
        re.split(r"(?<!\\)\|", line.strip()[1:].removesuffix("|"))
        for line in lines
        if not re.fullmatch(r"\|?[\s:|-]+\|?", line)
    ]
    width = len(found[0])
    filled = []
    for line in found:
        # Too many cells: the bars of an |x| in the first one.
        more = max(0, len(line) - width)
        cells = ["|".join(line[: more + 1]), *line[more + 1 :], *[""] * (width - len(line))]
        filled.append([_plain(cell.strip()) for cell in cells])
    head, *body = filled

    def is_number(column: int) -> bool:
        cells = [line[column].strip("*") for line in body if line[column]]
        # A cell may hold several, one a seed.
        found = [_NUMBER.fullmatch(cell) or all(map(_NUMBER.fullmatch, cell.split())) for cell in cells]
        return bool(cells) and column > 0 and all(found)

    columns = [Column(title, number=is_number(c)) for c, title in enumerate(head)]
    return Table("", columns, [row(*cells) for cells in body])

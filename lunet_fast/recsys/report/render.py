"""A report as one HTML page, its style and pictures inside, no script, nothing fetched; and as Markdown.

The templates beside this module say how each part looks. What comes from data is escaped by jinja2, or by
markdown-it, which takes no HTML.
"""

from __future__ import annotations

import base64
import itertools
import re
from collections.abc import Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markdown_it import MarkdownIt
from markdown_it.token import Token
from markupsafe import Markup

from lunet_fast.recsys.report import chart
from lunet_fast.recsys.report.document import (
    MARK,
    Code,
    Column,
    Details,
    Document,
    Dots,
    Panels,
    Table,
    anchor,
    epochs_table,
)

_MARK = re.compile(MARK.format(r"(\d+)"))
_NUMBER = re.compile(r"([-+−]?[\d,]*\.?\d+(e[-+]?\d+)?( ?±.*)?( ?%| s)? *)+", re.IGNORECASE)


def environment() -> Environment:
    """Where the templates are; those of HTML escape what they are given."""
    found = Environment(
        loader=PackageLoader("lunet_fast.recsys.report"),
        autoescape=select_autoescape(["html.j2"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters |= {
        "anchor": anchor,
        "spans": spans,
        "cell": _cell,
        "bare": lambda text: Markup(spans(text)).striptags(),
        "piped": lambda text: re.sub(r"(?<!\\)\|", r"\\|", text),
        "groups": _groups,
        "values": epochs_table,
    }
    return found


def page(document: Document) -> str:
    """The whole page as a text."""
    templates, charts = environment(), itertools.count(1)
    blocks: Any = templates.get_template("parts.html.j2").module
    markdown_it = _markdown_it(document)

    def shown(body: str) -> Markup:
        html = markdown_it.render(body)
        return Markup(
            _MARK.sub(lambda mark: part(int(mark[1])), re.sub(rf"<p>({_MARK.pattern})</p>", r"\1", html))
        )

    def part(number: int) -> str:
        match document.parts[number]:
            case Table() as table:
                return str(blocks.table(table))
            case Panels() as figure:
                drawn = [Markup(chart.lines(panel, f"c{next(charts)}")) for panel in figure.panels]
                return str(blocks.panels(figure, drawn))
            case Dots() as figure:
                return str(blocks.dots(figure, Markup(chart.dots(figure, f"c{next(charts)}"))))
            case Code(text):
                return str(blocks.code(text))
            case Details(summary, body):
                return str(blocks.details(summary, shown(body)))

    return templates.get_template("page.html.j2").render(document=document, body=shown(document.body))


def markdown(document: Document) -> str:
    """The report as Markdown; of figures, the values at a few epochs."""
    templates = environment()
    blocks: Any = templates.get_template("parts.md.j2").module

    def shown(body: str) -> str:
        return _MARK.sub(lambda mark: part(int(mark[1])), body)

    def part(number: int) -> str:
        match document.parts[number]:
            case Table() as table:
                return str(blocks.table(table))
            case Panels() as figure:
                return str(blocks.table(epochs_table(figure)))
            case Dots():
                return ""  # the table beside it has the numbers
            case Code(text):
                fence = "`" * max(3, *(len(run) + 1 for run in re.findall("`+", text)), 3)
                return f"{fence}\n{text}\n{fence}"
            case Details(summary, body):
                return f"**{summary}**\n\n{shown(body)}"

    text = templates.get_template("page.md.j2").render(document=document, body=shown(document.body))
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def spans(text: str) -> Markup:
    """A text of the report as HTML."""
    return Markup(MarkdownIt("zero").enable(["escape", "backticks", "emphasis"]).renderInline(text))


def _cell(text: str) -> Markup:
    value, sign, spread = text.partition(" ± ")
    return spans(value) + (Markup(' <span class="sd">± {}</span>').format(spans(spread)) if sign else "")


def _groups(columns: Sequence[Column]) -> list[tuple[str, int]]:
    """The names of groups of neighbours, each with its number of columns."""
    return [(name, len(list(some))) for name, some in itertools.groupby(columns, lambda column: column.group)]


# Markdown as HTML -------------------------------------------------------------------------------------------


def _markdown_it(document: Document) -> MarkdownIt:
    """Markdown without HTML and without links, its pictures embedded, its tables in a part that scrolls."""
    found = MarkdownIt("commonmark", {"html": False}).enable("table").disable("autolink")
    found.core.ruler.push("report", _prepare)
    found.add_render_rule("image", lambda _, tokens, index, *__: _image(document, tokens[index]))
    scroll = '<div class="scroll" role="region" tabindex="0" aria-label="Table"><table>'
    for name, text in {
        "link_open": "",
        "link_close": "",
        "table_open": scroll,
        "table_close": "</table></div>\n",
    }.items():
        found.add_render_rule(name, lambda *_, text=text: text)  # type: ignore[misc]
    return found


def _prepare(state: Any) -> None:
    """Give sections their anchors, and columns of figures their class."""
    column = 0
    cells: dict[int, list[tuple[Token, str]]] = {}
    for token, inner in itertools.pairwise([*state.tokens, None]):
        if token.type == "heading_open" and token.tag == "h2":
            token.attrSet("id", anchor(inner.content))
        elif token.type == "table_open":
            cells = {}
        elif token.type == "tr_open":
            column = 0
        elif token.type in ("th_open", "td_open"):
            cells.setdefault(column, []).append((token, inner.content.replace("*", "").strip()))
            column += 1
        elif token.type == "table_close":
            for place, found in cells.items():
                texts = [text for each, text in found if each.tag == "td" and text]
                if place and texts and all(map(_NUMBER.fullmatch, texts)):
                    for each, _ in found:
                        each.attrSet("class", "n")


def _image(document: Document, token: Token) -> str:
    """A PNG file of the report's folder, by its name alone; nothing where it is not there."""
    name = str(token.attrs["src"]).rpartition("/")[2]
    path = None if document.pictures is None else document.pictures / name
    if path is None or path.suffix != ".png" or not path.is_file():
        return ""
    data = base64.b64encode(path.read_bytes()).decode()
    return Markup('<img src="data:image/png;base64,{}" alt="{}">').format(
        data, spans(token.content).striptags()
    )

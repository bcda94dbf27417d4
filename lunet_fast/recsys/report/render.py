"""A report as one HTML page, its style and figures inside, no script, nothing fetched; and as Markdown.

The templates beside this module say how each part looks; every text goes through one of the filters here.
"""

from __future__ import annotations

import base64
import itertools
import re
from collections.abc import Callable
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup, escape

from lunet_fast.recsys.report import chart
from lunet_fast.recsys.report.document import MARK, Column, Document, epochs_table, literal


def page(document: Document) -> str:
    """The whole page as a text."""
    charts = itertools.count(1)
    drawings: dict[str, Callable[..., Markup]] = {
        "curves": lambda panel: Markup(chart.lines(panel, f"c{next(charts)}")),
        "dots": lambda figure: Markup(chart.dots(figure, f"c{next(charts)}")),
    }
    return _render("report.html.j2", document, **drawings)


def markdown(document: Document) -> str:
    """The report as Markdown; of figures, the values at a few epochs."""
    return re.sub(r"\n{3,}", "\n\n", _render("report.md.j2", document)).strip() + "\n"


def spans(text: str) -> Markup:
    """A text of the report as HTML."""
    parts, end = [], 0
    for found in MARK.finditer(text):
        parts.append(escape(text[end : found.start()]))
        if found["escaped"] is not None:
            parts.append(escape(found["escaped"]))
        elif found["code"] is not None:
            parts.append(Markup("<code>{}</code>").format(found["code"]))
        else:
            parts.append(Markup("<strong>{}</strong>").format(spans(found["strong"])))
        end = found.end()
    return Markup("").join([*parts, escape(text[end:])])


def _cell(text: str) -> Markup:
    value, sign, spread = text.partition(" ± ")
    return spans(value) + (Markup(' <span class="sd">± {}</span>').format(spans(spread)) if sign else "")


def _bare(text: str) -> str:
    """A text without its marks."""
    return MARK.sub(lambda found: found["escaped"] or found["code"] or found["strong"] or "", text)


def _piped(text: str) -> str:
    """A text as a cell of a table of Markdown."""
    return re.sub(r"(?<!\\)\|", r"\\|", text)


def _groups(columns: list[Column]) -> list[tuple[str, int]]:
    """The names of groups of neighbours, each with its number of columns."""
    return [(name, len(list(some))) for name, some in itertools.groupby(columns, lambda column: column.group)]


def _render(template: str, document: Document, **more: Any) -> str:
    environment = Environment(
        loader=PackageLoader("lunet_fast.recsys.report"),
        autoescape=select_autoescape(["html.j2"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "spans": spans,
        "cell": _cell,
        "bare": _bare,
        "piped": _piped,
        "literal": literal,
        "base64": lambda data: base64.b64encode(data).decode(),
        "kind": lambda block: type(block).__name__,
        "groups": _groups,
        "values": epochs_table,
    }
    return environment.get_template(template).render(document=document, **more)

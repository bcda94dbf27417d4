"""A report as one HTML page: its style and pictures inside, no script, nothing fetched."""

from __future__ import annotations

import base64
import itertools
from collections.abc import Iterator, Sequence
from html import escape

from lunet_fast.recsys.report import chart
from lunet_fast.recsys.report.document import (
    MARK,
    Block,
    Bullets,
    Code,
    Details,
    Document,
    Dots,
    Heading,
    NotMeasured,
    Panels,
    Paragraph,
    Picture,
    Table,
    Warned,
    epochs_table,
)

_STYLE = """
:root {
  color-scheme: light dark;
  --paper: #fff; --ink: #1c2128; --soft: #57606a; --line: #d5dae0; --tint: #f4f6f8; --ours: #eef5fc;
  --link: #0b5cad; --look0: #0b5cad; --look1: #b34700; --look2: #00705c; --warn: #fff4d6; --edge: #b07a00;
  --gain: #00705c; --loss: #b32033;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #12161c; --ink: #e4e8ed; --soft: #a3adb8; --line: #343c46; --tint: #1a2028; --ours: #152536;
    --link: #7cb8ff; --look0: #6cb2ff; --look1: #f5a05c; --look2: #4fcbb0; --warn: #33290f; --edge: #d9a52b;
    --gain: #4fcbb0; --loss: #ff8b96;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; text-size-adjust: 100%; scroll-padding-top: 1rem; }
body {
  margin: 0; background: var(--paper); color: var(--ink);
  font: 1.0625rem/1.6 "Charter", "Bitstream Charter", "Georgia", "DejaVu Serif", serif;
}
.page { max-width: 68rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
p, ul { max-width: 42rem; }
main > ul:not(.cards) { max-width: 48rem; padding-left: 1.2rem; }
main > ul:not(.cards) li { margin: .55rem 0; }
h1, h2, h3, nav, table, figcaption, summary, .cards, .subtitle {
  font-family: system-ui, -apple-system, "Segoe UI", "Noto Sans", "DejaVu Sans", sans-serif;
}
h1 { font-size: clamp(1.6rem, 4.5vw, 2.3rem); line-height: 1.15; margin: 0 0 .4rem; letter-spacing: -.015em; }
h2 { font-size: 1.45rem; line-height: 1.25; margin: 3.2rem 0 .8rem; padding-top: 1.1rem;
  border-top: 1px solid var(--line); }
h3 { font-size: 1.08rem; line-height: 1.3; margin: 2rem 0 .5rem; }
.subtitle { color: var(--soft); margin: 0 0 1.8rem; font-size: .95rem; }
a { color: var(--link); }
:focus-visible { outline: 2px solid var(--link); outline-offset: 2px; }
.skip { position: absolute; left: -999rem; }
.skip:focus { left: 1rem; top: 1rem; background: var(--paper); padding: .5rem; }
.cards { list-style: none; margin: 0 0 1.6rem; padding: 0; max-width: none; display: grid; gap: .9rem;
  grid-template-columns: repeat(auto-fit, minmax(13rem, 1fr)); }
.cards li { background: var(--tint); border: 1px solid var(--line); border-radius: .6rem;
  padding: .9rem 1rem; }
.cards b { display: block; font-size: 1.9rem; line-height: 1.15; font-weight: 650; letter-spacing: -.02em;
  font-variant-numeric: tabular-nums; color: var(--look0); }
.cards span { display: block; font-size: .88rem; line-height: 1.4; }
.cards .beside { color: var(--soft); margin-top: .3rem; }
nav { margin: 2rem 0 0; font-size: .95rem; }
nav ol { margin: .3rem 0 0; padding-left: 1.4rem; columns: 16rem 2; column-gap: 2rem; }
nav li { break-inside: avoid; padding: .1rem 0; }
.scroll { overflow-x: auto; margin: 1.2rem 0 .3rem; max-width: 100%; }
table { border-collapse: collapse; font-size: .86rem; line-height: 1.4; min-width: 60%;
  font-variant-numeric: tabular-nums lining-nums; }
.caption { font: 650 .88rem/1.4 system-ui, "Segoe UI", "DejaVu Sans", sans-serif; margin: 1.4rem 0 .4rem; }
.caption + .scroll { margin-top: 0; }
th, td { padding: .34rem .6rem; text-align: left; vertical-align: top; }
th { font-weight: 600; color: var(--soft); vertical-align: bottom; border-bottom: 1.5px solid var(--ink); }
.groups th { text-align: center; border-bottom: 1px solid var(--line); color: var(--ink); }
.groups td { border: 0; }
tbody th { color: inherit; font-weight: 400; border: 0; vertical-align: top; min-width: 11.5rem; }
tbody tr > * { border-bottom: 1px solid var(--line); }
tbody tr:last-child > * { border-bottom: 1.5px solid var(--ink); }
tr.ours > * { background: var(--ours); }
.n { text-align: right; white-space: nowrap; }
th.n { white-space: normal; }
.wide td:not(.n), .wide tbody th { min-width: 13rem; }
td strong { font-weight: 720; }
.sd { color: var(--soft); font-size: .92em; font-weight: 400; }
.note { color: var(--soft); font-size: .88rem; line-height: 1.5; margin: .3rem 0 1.4rem; max-width: 46rem; }
code, pre { font-family: ui-monospace, "SFMono-Regular", "Menlo", "DejaVu Sans Mono", monospace;
  font-size: .86em; }
code { background: var(--tint); border-radius: .25rem; padding: .08em .3em; overflow-wrap: anywhere; }
pre { background: var(--tint); border: 1px solid var(--line); border-radius: .4rem; padding: .7rem .9rem;
  overflow-x: auto; line-height: 1.5; }
pre code { background: none; padding: 0; overflow-wrap: normal; }
figure { margin: 1.4rem 0; }
.panels { display: grid; gap: 1rem 1.5rem;
  grid-template-columns: repeat(auto-fit, minmax(min(24rem, 100%), 1fr)); }
.panels h4 { font: 600 .92rem/1.3 system-ui, "Segoe UI", "DejaVu Sans", sans-serif; margin: 0 0 .2rem; }
.dots { overflow-x: auto; }
.dots svg { min-width: 38rem; max-width: 52rem; }
svg { display: block; width: 100%; height: auto; }
svg text { font: 12px system-ui, "Segoe UI", "DejaVu Sans", sans-serif; fill: var(--soft);
  font-variant-numeric: tabular-nums; }
svg .label { font-weight: 600; paint-order: stroke; stroke: var(--paper); stroke-width: 4px; }
svg .level-label { fill: var(--ink); }
.grid { stroke: var(--line); fill: none; }
.zero { stroke: var(--soft); fill: none; }
.level { stroke: var(--ink); stroke-dasharray: 2 3; fill: none; }
.curve { fill: none; stroke-width: 2.2; stroke-linejoin: round; }
.curve.look0 { stroke: var(--look0); }
.curve.look1 { stroke: var(--look1); stroke-dasharray: 7 3; }
.curve.look2 { stroke: var(--look2); stroke-dasharray: 2 2.5; }
.end.look0, svg .label.look0 { fill: var(--look0); }
.end.look1, svg .label.look1 { fill: var(--look1); }
.end.look2, svg .label.look2 { fill: var(--look2); }
.bar { stroke-width: 2; fill: none; }
.bar.gain { stroke: var(--gain); } .bar.loss { stroke: var(--loss); } .bar.unsure { stroke: var(--soft); }
.dot.gain { fill: var(--gain); } .dot.loss { fill: var(--loss); }
.dot.unsure { fill: var(--paper); stroke: var(--soft); stroke-width: 1.6; }
figcaption { color: var(--soft); font-size: .88rem; line-height: 1.5; margin-top: .5rem; max-width: 46rem; }
figure img { max-width: 100%; height: auto; background: #fff; border-radius: .4rem; }
.missing, .warned { background: var(--warn); border-left: 4px solid var(--edge); padding: .6rem .9rem;
  border-radius: 0 .4rem .4rem 0; }
details { border: 1px solid var(--line); border-radius: .4rem; margin: .6rem 0; padding: .45rem .9rem; }
details[open] { padding-bottom: .8rem; }
summary { cursor: pointer; font-size: .92rem; font-weight: 600; }
@media (max-width: 40rem) {
  .page { padding: 1.4rem 1rem 3rem; }
  body { font-size: 1rem; }
  th, td { padding: .32rem .5rem; }
  tbody th { min-width: 8.5rem; }
  .wide td:not(.n), .wide tbody th { min-width: 9rem; }
  nav ol { columns: 1; }
}
@media print {
  :root { --paper: #fff; --ink: #000; --soft: #444; --line: #bbb; --tint: #f6f6f6; --ours: #f0f4f8;
    --link: #000; --look0: #0b5cad; --look1: #b34700; --look2: #00705c; --gain: #00705c; --loss: #b32033;
    --warn: #fff; --edge: #000; }
  body { font-size: 10pt; }
  .page { max-width: none; padding: 0; }
  nav, .skip { display: none; }
  h2, h3, .caption { break-after: avoid; }
  tr, figure, .cards li { break-inside: avoid; }
  .scroll, .dots, pre { overflow: visible; }
  table { font-size: 8pt; }
  a { text-decoration: none; }
}
"""


def page(document: Document) -> str:
    """The whole page as a text."""
    contents = "".join(f'<li><a href="#{s.anchor}">{spans(s.title)}</a></li>' for s in document.sections)
    cards = "".join(
        f"<li><b>{spans(h.value)}</b><span>{spans(h.what)}</span>"
        f'<span class="beside">{spans(h.beside)}</span></li>'
        for h in document.highlights
    )
    names = (f"figure{n}" for n in itertools.count(1))
    body = [
        f"<header><h1>{spans(document.title)}</h1>",
        f'<p class="subtitle">{spans(document.subtitle)}</p></header>',
        '<main id="content">',
        f'<ul class="cards">{cards}</ul>' if cards else "",
        *_elements(document.reading, names),
        f'<nav aria-label="Contents"><strong>Contents</strong><ol>{contents}</ol></nav>',
    ]
    for section in document.sections:
        body.append(f'<section id="{section.anchor}"><h2>{spans(section.title)}</h2>')
        body += [*_elements(section.blocks, names), "</section>"]
    body.append("</main>")
    head = (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(_bare(document.title))}</title>\n<style>{_STYLE}</style>\n</head>\n"
    )
    skip = '<a class="skip" href="#content">Skip to the content</a>'
    content = "\n".join(part for part in body if part)
    return f'{head}<body>\n{skip}\n<div class="page">\n{content}\n</div>\n</body>\n</html>\n'


def spans(text: str) -> str:
    """A text of the report as HTML."""
    parts, end = [], 0
    for found in MARK.finditer(text):
        parts.append(escape(text[end : found.start()]))
        if found["escaped"] is not None:
            parts.append(escape(found["escaped"]))
        elif found["code"] is not None:
            parts.append(f"<code>{escape(found['code'])}</code>")
        else:
            parts.append(f"<strong>{spans(found['strong'])}</strong>")
        end = found.end()
    return "".join(parts) + escape(text[end:])


def _bare(text: str) -> str:
    """A text without its marks."""
    return MARK.sub(lambda found: found["escaped"] or found["code"] or found["strong"] or "", text)


def _elements(blocks: Sequence[Block], names: Iterator[str]) -> Iterator[str]:
    for block in blocks:
        match block:
            case Paragraph(text):
                yield f"<p>{spans(text)}</p>"
            case Heading(text):
                yield f"<h3>{spans(text)}</h3>"
            case Bullets(items):
                yield "<ul>" + "".join(f"<li>{spans(item)}</li>" for item in items) + "</ul>"
            case Code(text):
                yield f'<pre tabindex="0"><code>{escape(text)}</code></pre>'
            case NotMeasured(what, command):
                run = f"not measured here: run <code>{escape(command)}</code>."
                yield f'<p class="missing">{spans(what)}: {run}</p>'
            case Warned(text):
                yield f'<p class="warned">{spans(text)}</p>'
            case Table():
                yield _table(block, names)
            case Panels(caption, panels):
                figures = "".join(
                    f"<div><h4>{spans(panel.title)}</h4>{chart.lines(panel, next(names))}</div>"
                    for panel in panels
                )
                values = f"<details><summary>Values</summary>{_table(epochs_table(block), names)}</details>"
                yield (
                    f'<figure><div class="panels">{figures}</div>'
                    f"<figcaption>{spans(caption)}</figcaption></figure>{values}"
                )
            case Dots(caption):
                picture = chart.dots(block, next(names))
                yield (
                    f'<figure><div class="dots" tabindex="0">{picture}</div>'
                    f"<figcaption>{spans(caption)}</figcaption></figure>"
                )
            case Picture(png, alt, _):
                data = base64.b64encode(png).decode()
                yield f'<figure><img src="data:image/png;base64,{data}" alt="{escape(alt)}"></figure>'
            case Details(summary, inner):
                content = "\n".join(_elements(inner, names))
                yield f"<details><summary>{spans(summary)}</summary>\n{content}\n</details>"


def _table(table: Table, names: Iterator[str]) -> str:
    kinds = [' class="n"' if column.number else "" for column in table.columns]
    titles = "".join(
        f'<th scope="col"{kind}>{spans(column.title)}</th>'
        for kind, column in zip(kinds, table.columns, strict=True)
    )
    head = f"{_group_row(table)}<tr>{titles}</tr>"
    apart = not all(row.ours for row in table.rows)
    body = []
    for r, row in enumerate(table.rows):
        cells = []
        for c, cell in enumerate(row.cells):
            content = _cell(cell.text)
            if table.bold(r, c):
                content = f"<strong>{content}</strong>"
            cells.append(f'<th scope="row">{content}</th>' if c == 0 else f"<td{kinds[c]}>{content}</td>")
        ours = ' class="ours"' if row.ours and apart else ""
        body.append(f"<tr{ours}>{''.join(cells)}</tr>")
    # Outside of the part that scrolls sideways, or a narrow screen would cut it off.
    name = next(names)
    caption = f'<p class="caption" id="{name}">{spans(table.caption)}</p>' if table.caption else ""
    label = f'aria-labelledby="{name}"' if table.caption else 'aria-label="Table"'
    wide = ' class="wide"' if sum(not column.number for column in table.columns) > 2 else ""
    element = (
        f'{caption}<div class="scroll" role="region" tabindex="0" {label}><table{wide}>'
        f"<thead>{head}</thead><tbody>{''.join(body)}</tbody></table></div>"
    )
    return element + (f'<p class="note">{spans(table.note)}</p>' if table.note else "")


def _group_row(table: Table) -> str:
    """The names of the groups, each above its columns; empty where there are none."""
    if not any(column.group for column in table.columns):
        return ""
    cells = [
        f'<th scope="colgroup" colspan="{len(list(columns))}">{spans(group)}</th>'
        if group
        else "<td></td>" * len(list(columns))
        for group, columns in itertools.groupby(table.columns, key=lambda column: column.group)
    ]
    return '<tr class="groups">' + "".join(cells) + "</tr>"


def _cell(text: str) -> str:
    value, sign, spread = text.partition(" ± ")
    return spans(value) + (f' <span class="sd">± {spans(spread)}</span>' if sign else "")

"""The report on the paper's experiments: trainings and committed results in, a document out.

What it says stands in ``templates/content.md.j2``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from lunet_fast.recsys.data.datasets import dataset_title
from lunet_fast.recsys.report import quoted, summary, tables
from lunet_fast.recsys.report.document import (
    MARK,
    Code,
    Details,
    Document,
    Dots,
    Panels,
    Part,
    Table,
    literal,
)
from lunet_fast.recsys.report.render import environment
from lunet_fast.recsys.report.results import Findings, Reproduction, is_dirty, machine_line


class _Parts:
    """The parts of a body in the making; what is called from the template gives the mark of a new one."""

    def __init__(self) -> None:
        self.all: list[Part] = []

    def show(self, part: Part, caption: str = "", note: str = "") -> str:
        if isinstance(part, Table | Panels | Dots) and caption:
            part = replace(part, caption=" ".join(caption.split()))
        if isinstance(part, Table) and note:
            part = replace(part, note=" ".join(note.split()))
        self.all.append(part)
        return f"\n\n{MARK.format(len(self.all) - 1)}\n\n"

    def code(self, text: str) -> str:
        return self.show(Code(text))

    def details(self, name: str, body: str) -> str:
        return self.show(Details(name, body))


def document(found: Reproduction) -> Document:
    """The report."""
    results = Findings(found, tables.NAMES, tables.TABLE_1)
    parts, committed = _Parts(), found.committed
    subtitle = (
        "S. Tamim, A. Radid, K. Rhofir, “Invertible Neural Networks for Matrix Factorization in "
        f"Recommendation Systems” (2026), run again by lunet-fast {literal(found.machine['lunet_fast'])} on "
        f"{literal(found.machine['date'])}"
    )
    body = (
        environment()
        .get_template("content.md.j2")
        .render(
            found=found,
            results=results,
            committed=committed,
            reading=summary.reading(found, results),
            show=parts.show,
            code=parts.code,
            opened=parts.details,
            **_VOCABULARY,
        )
    )
    name = "LU-Net for recommendation: the paper's experiments, run again"
    return Document(name, subtitle, summary.highlights(results), body, parts.all, committed.folder)


def _settings(runs: Sequence[Any]) -> tuple[str, list[str]]:
    """As JSON what the configurations of runs share, and the rest of each."""
    # Where the data lay is no setting.
    configs: list[Mapping[str, Any]] = [{n: v for n, v in r.config.items() if n != "source"} for r in runs]
    common = {n: v for n, v in configs[0].items() if all(config.get(n) == v for config in configs)}
    own = sorted({name for config in configs for name in config} - common.keys())
    rest = [json.dumps({n: c.get(n) for n in own}, ensure_ascii=False) for c in configs] if own else []
    return json.dumps(common, indent=1, ensure_ascii=False), rest


def _included(text: str) -> str:
    """A Markdown file as a part of a section: without its title, its headings a level lower."""
    return re.sub(r"^##", "###", re.sub(r"\A# .*\n", "", text), flags=re.MULTILINE)


#: What the template calls, whatever it reports on.
_VOCABULARY: dict[str, Any] = {
    "tables": tables,
    "quoted": quoted,
    "names": tables.NAMES,
    "literal": literal,
    "title": dataset_title,
    "machine": machine_line,
    "is_dirty": is_dirty,
    "settings": _settings,
    "included": _included,
}

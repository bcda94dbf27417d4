"""Numbers in the prose of README and docs/: which of them are measured, and the marks that results fill.

A measured number in a sentence stands between two comments, of which the first names an entry of
``figures.FIGURES``:

    A step takes <!--=step-ms-->6.17<!--=--> ms.

``python benchmarks/readme.py`` writes what the results say there. A number counts as measured where it has a
decimal point, thousands, a power of ten, or a unit behind it (seconds, bytes, bits, per cent, "times"), in
figures or in words. What is between the marks of a table, code, a formula, an address, a version, the
number of an equation, a size such as D = 64 or 8 × 8, or a name such as ML-100K is none. The few others that
are none are in ``NOT_MEASURED``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

MARKED = re.compile(r"<!--=([a-z0-9-]+)-->(.*?)<!--=-->")
_MARK = re.compile(r"<!--=.*?-->")
_FIRST = re.compile(r"^[ >*+-]*(?:\d+\. +)?<!--=", re.MULTILINE)

_NUMBER = r"\d+(?:,\d{3})*(?:\.\d+)?"
_WORD = (
    r"\b(?:two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|twenty|thirty|fifty|hundred|thousand)"
)
_UNIT = (
    r"(?:[nµum]?s|seconds?|min|minutes?|h|hours?|days?|bytes?|[kMGT]i?B|bits?|nats?|per cent|percent|points?|"
    r"times|fold|million|billion)\b"
)
_MEASURED = re.compile(
    rf"(?:(?<![\w.,]){_NUMBER}[\s*-]*|{_WORD}[\s*-]+){_UNIT}"  # 8 ms, six times, 2-fold
    rf"|(?<![\w.,]){_NUMBER}\s?(?:%|×|x\b)"
    r"|(?<![\w.])\d+(?:\.\d+)?e[+-]?\d+|(?<!\w)10[⁻⁰¹²³⁴-⁹]+"
    r"|(?<![\w.])\d*\.\d+|(?<![\w.,])\d{1,3}(?:,\d{3})+"
)

_NO_PROSE = [
    re.compile(r"<!-- ([a-z0-9-]+) -->\n.*?<!-- end \1 -->", re.DOTALL),
    re.compile(r"^( *)(```+).*?^\1\2 *$", re.DOTALL | re.MULTILINE),
    MARKED,
    re.compile(r"<!--.*?-->", re.DOTALL),
    re.compile(r"\$\$.*?\$\$", re.DOTALL),
    re.compile(r"(`+).+?\1", re.DOTALL),
    re.compile(r"\$[^$\n]+\$"),
    re.compile(r"\]\([^)]*\)|https?://[^\s)]+"),
]
_NO_MEASUREMENT = [
    re.compile(r"\b[A-Za-z]+-\d[\w.]*"),  # ML-100K, Apache-2.0
    re.compile(r"\b(?:Python|PyTorch|Triton|CUDA) [\d.]*\d(?: to [\d.]*\d)?"),
    re.compile(r"\(\d\.\d+\)"),  # an equation
    re.compile(rf"(?<!\w)\w [=≥≤<>] {_NUMBER}"),  # D = 64
    re.compile(rf"(?<![\w.,]){_NUMBER} × {_NUMBER}"),  # 8 × 8
]

NOT_MEASURED: dict[str, dict[str, str]] = {
    "docs/explanation/cost.md": {"± is its 95 % band": "what ± means"},
    "docs/explanation/mathematics.md": {
        "changes by less than 0.3 on unit data": "the threshold of the rule",
        "3,952 items and density 0.0447 for": "printed by the paper",
        "3,952 is the largest id; 3,706 items have ratings": "counts of the published file",
        "and 0.0447 is 1,000,209/(6,040 · 3,706)": "arithmetic with its counts",
        'the reading of "80 %"': "printed by the paper",
    },
    "docs/results/layers.md": {
        "would need more than 4 GB": "the limit of the suite",
        "within 8 minutes": "the limit of the command",
    },
    "docs/results/recommendation.md": {
        "80 % for training and 20 % for testing": "the split",
        "Ratings: 20 % of all ratings": "the split",
        "learning rate 0.001": "printed by the paper",
        "It trains on 80 % of what remains": "the split",
        "within 30 days": "the class of a pause",
        "20 % of the users kept": "the share drawn",
        "0.5 knows nothing, and below 0.5": "the AUROC of chance",
    },
    "docs/results/size.md": {"batch 8,192": "the setting"},
    "docs/tutorials/density-data.md": {
        "0.64 per cent is 64": "an example of the unit",
        "from its least value, −26,739": "of the published file",
        "20 % are drawn for the test": "the default",
    },
    "docs/tutorials/density.md": {"10 % of the rows": "the default", "20 % for the test": "the default"},
    "docs/tutorials/kernels.md": {"within 8 minutes": "the limit of the command"},
    "docs/tutorials/long-training.md": {"every two minutes": "the default"},
    "docs/tutorials/recommender.md": {
        "20 % of the ratings": "the default",
        "within 30 days": "the class of a pause",
    },
}
"""By page the words around a number that is a definition, or somebody else's with its source, and which.
May only shrink."""


def filled(text: str, figures: Mapping[str, Callable[[], str]]) -> str:
    """``text`` with every marked figure made anew; ``ValueError`` for a mark that cannot be filled."""
    first = _FIRST.search(text)
    if first:
        raise ValueError(f"{first[0]!r} begins a line, which hides it from Markdown: put a word before it")
    if len(_MARK.findall(text)) != 2 * len(MARKED.findall(text)):
        raise ValueError("<!--=NAME--> without <!--=--> on the same line, or the other way round")
    unknown = {name for name, _ in MARKED.findall(text)} - figures.keys()
    if unknown:
        raise ValueError(f"no figure is called {', '.join(sorted(unknown))}: add it to benchmarks/figures.py")
    return MARKED.sub(lambda found: f"<!--={found[1]}-->{figures[found[1]]()}<!--=-->", text)


def unmarked(text: str, not_measured: Mapping[str, str] = {}) -> list[str]:
    """The measured numbers of a page that have no mark, with the words around them.

    ``not_measured`` are words that stand for none; ``ValueError`` where some of them are not on the page.
    """
    for pattern in _NO_PROSE:
        text = pattern.sub(" ⋯ ", text)
    text = " ".join(text.split())
    for words in not_measured:
        if words not in text:
            raise ValueError(
                f"{words!r} is no longer there: take it out of NOT_MEASURED in benchmarks/prose.py"
            )
        text = text.replace(words, " ⋯ ")
    for pattern in _NO_MEASUREMENT:
        text = pattern.sub(" ⋯ ", text)
    return [text[max(found.start() - 30, 0) : found.end() + 20] for found in _MEASURED.finditer(text)]

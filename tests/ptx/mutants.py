"""Compiled code with one thing broken: a barrier, a wait or a fence left out, a mask taken away.

A mutant changes the PTX that is executed and nothing else. It is seen if the machine finds something, or if a
result is wrong.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

Change = Callable[[str], str]


class Mutant(NamedTuple):
    kind: str
    number: int
    change: Change


#: What is left out, by a pattern of its line.
LEFT_OUT = {
    "barrier": r"bar\.sync\b",
    "barrier of a warp": r"bar\.warp\.sync\b",
    "wait for copies": r"cp\.async\.wait_group\b",
    "wait for products": r"wgmma\.wait_group\b",
    "fence": r"fence\.proxy\.async\b",
}

#: Where a mask is: a guard before a load or a store, the number of bytes that a copy reads.
GUARDED = r"@!?%p\d+\s+(?=(?:ld|st)\.global)"
COPIED = r"(cp\.async\.c[ag]\.shared\.global .*?, 0x([0-9a-f]+)), %r\d+;"


def without(text: str, pattern: str, number: int) -> str:
    """The text without the line on which an instruction of this pattern stands for the number-th time."""
    lines = text.split("\n")
    at = [n for n, line in enumerate(lines) if re.match(rf"\s*{pattern}", line)]
    lines[at[number]] = ""
    return "\n".join(lines)


def replaced(text: str, pattern: str, new: str, number: int) -> str:
    match = list(re.finditer(pattern, text))[number]
    return text[: match.start()] + match.expand(new) + text[match.end() :]


def count(text: str, pattern: str) -> int:
    return len(re.findall(pattern, text))


def mutants(text: str) -> Iterator[Mutant]:
    """Every one of a kernel's text."""
    for kind, pattern in LEFT_OUT.items():
        for number in range(count(text, rf"(?m)^\s*{pattern}")):
            yield Mutant(kind, number, lambda t, p=pattern, n=number: without(t, p, n))
    for number in range(count(text, GUARDED)):
        yield Mutant("access without its mask", number, lambda t, n=number: replaced(t, GUARDED, "", n))
    for number in range(count(text, COPIED)):
        yield Mutant("copy without its mask", number, lambda t, n=number: replaced(t, COPIED, r"\1;", n))

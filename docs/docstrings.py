"""Docstrings as Markdown: roles become code, and a session of the interpreter a block of code."""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:class|meth|func|attr|mod|data|exc):`~?([^`]*)`")
SESSION = re.compile(r"^>>> .*?(?=\n\s*\n|\Z)", re.DOTALL | re.MULTILINE)


def as_markdown(text: str) -> str:
    text = ROLE.sub(lambda found: f"`{found[1].removeprefix('lunet_fast.').rpartition('.')[2]}`", text)
    text = re.sub(r" +# doctest: .*", "", text)
    text = text.replace("[*", r"[\*")  # the shape [*n, D] is no emphasis
    return SESSION.sub(lambda found: f"```pycon\n{found[0]}\n```", text)


class Docstrings(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)

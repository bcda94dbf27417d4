"""What the library says, in the words of the command line: ``gamma=0`` is ``--gamma 0`` there."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from typing import Any

import typer

ROLES = ("user", "item", "rating", "timestamp", "weight")
"""Arguments that name columns, whose options are ``--user-column`` and so on."""

_VALUE = r"'[^']*'|\"[^\"]*\"|\.\.\.|[\w+-]+(?:\.\w+)?(?:[+-]\d+)?|"
_ARGUMENT = re.compile(rf"(?<![\w.'\"/=-])([a-z]\w*)=({_VALUE})")


_apps: list[typer.Typer] = []


def speak_for(app: typer.Typer) -> None:
    """Let options be those of this app's commands; once, when it has them all."""
    _apps.append(app)


def in_options(text: str) -> str:
    """``text`` with options in place of the arguments that it names.

    ``out=`` becomes ``--out``, ``gamma=0`` ``--gamma 0``, ``header=False`` ``--no-header``, ``user=...``
    ``--user-column ...``. What no option is called stays. A setting that may be null may be ``none``.
    """
    return _ARGUMENT.sub(_as_option, text).replace(", or null", ", or none")


def _as_option(found: re.Match[str]) -> str:
    name, value = found.groups()
    if (name, value) == ("rating", "None"):  # the columns of a file without ratings follow from gamma there
        return "--gamma 0"
    if value == "..." and f"{name}_column" in _options():
        name = f"{name}_column"
    if name not in _options():
        return found[0]
    on, off = _options()[name]
    if value == "True" and off != on:
        return on
    if value == "False" and off not in (on, ""):
        return off
    if value == "None":
        value = "none"
    if re.fullmatch(r"'[\w.-]+'", value):
        value = value[1:-1]
    return f"{on} {value}".strip()


@functools.cache
def _options() -> dict[str, tuple[str, str]]:
    """By the name of an argument: the option, and what turns it off: "" where nothing does, itself where it
    has a value."""
    found: dict[str, tuple[str, str]] = {}
    for option in (each for app in _apps for each in _declared(typer.main.get_command(app))):
        first = next((word for word in option.opts if word.startswith("--")), None)
        if first is not None:
            off = next(iter(option.secondary_opts), "") if option.is_flag else first
            found.setdefault(option.name, (first, off))
    return {**found, **{role: found[f"{role}_column"] for role in ROLES}}


def _declared(command: Any) -> Iterator[Any]:
    """The options of a command, or of all below it."""
    below = getattr(command, "commands", None)
    if below is not None:
        for each in below.values():
            yield from _declared(each)
        return
    for parameter in command.get_params(typer.Context(command)):
        if parameter.param_type_name == "option":
            yield parameter

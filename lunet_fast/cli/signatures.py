"""Options that are declared once: groups that several commands share, and the settings of a configuration."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from types import NoneType
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin, get_type_hints

import typer
from typer.core import TyperCommand

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

Command = Callable[..., None]


def grouped(command: Command) -> Command:
    """Let each parameter of ``command`` whose type is a dataclass stand for the options that its fields are.

    All parameters of ``command`` are keywords.
    """
    groups: dict[str, Any] = {}
    shown: list[inspect.Parameter] = []
    hints = get_type_hints(command, include_extras=True)
    for name, parameter in inspect.signature(command).parameters.items():
        kind = hints[name]
        if dataclasses.is_dataclass(kind):
            groups[name] = kind
            types = get_type_hints(kind, include_extras=True)
            shown += [_parameter(f.name, types[f.name], f.default) for f in dataclasses.fields(kind)]
        else:
            shown.append(parameter.replace(annotation=kind))

    @functools.wraps(command)
    def called(**given: Any) -> None:
        for name, kind in groups.items():
            given[name] = kind(**{field.name: given.pop(field.name) for field in dataclasses.fields(kind)})
        command(**given)

    return _declared(called, shown)


def _parameter(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _declared(command: Command, parameters: Sequence[inspect.Parameter]) -> Command:
    """``command`` with the parameters that Typer is to see."""
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {each.name: each.annotation for each in parameters}
    return command


# Settings ---------------------------------------------------------------------------------------------------

_NAMES = {"learning_rate": ("--learning-rate", "--lr"), "conditional": ("--conditional/--unconditional",)}
"""Options that are not called as their setting alone is."""


def settings_command(
    configuration: str,
    panels: Mapping[str, Sequence[str]],
    defaults: Mapping[str, str] | None = None,
    further: str = "",
) -> type[TyperCommand]:
    """A kind of command with an option for each of these settings, whose function finds those that were given
    in ``context.obj``, by name.

    Type, choices, default and help of an option are those of the field. ``configuration``, "module:class", is
    imported when the command is parsed or explained: it needs pydantic, which would slow down all others.

    Args:
        panels: the names of the settings under each heading of the help.
        defaults: what the help calls a default that is not the configuration's, by the setting.
        further: another configuration, for the settings that the first does not have.
    """

    @functools.cache
    def fields() -> dict[str, FieldInfo]:
        known: dict[str, FieldInfo] = {}
        for place in filter(None, (further, configuration)):
            module, name = place.split(":")
            known |= getattr(importlib.import_module(module), name).model_fields
        return {name: known[name] for names in panels.values() for name in names}

    @functools.cache
    def options() -> list[Any]:
        headings = {name: panel for panel, names in panels.items() for name in names}
        shown = [
            _parameter(name, _option(name, field, headings[name], (defaults or {}).get(name)), None)
            for name, field in fields().items()
        ]
        app = typer.Typer(add_completion=False)
        app.command()(_declared(lambda **_: None, shown))
        return list(typer.main.get_command(app).params)

    class SettingsCommand(TyperCommand):
        def get_params(self, ctx: Any) -> list[Any]:
            every = super().get_params(ctx)
            return [*self.params, *options(), *every[len(self.params) :]]  # --help stays the last one

        def invoke(self, ctx: Any) -> Any:
            given = {name: ctx.params.pop(name) for name in fields()}
            ctx.obj = {
                name: None if value == "none" and _may_be_none(fields()[name]) else value
                for name, value in given.items()
                if value is not None
            }
            return super().invoke(ctx)

    return SettingsCommand


def _may_be_none(field: FieldInfo) -> bool:
    return NoneType in get_args(field.annotation)


def _option(name: str, field: FieldInfo, panel: str, default: str | None) -> Any:
    kind: Any = field.annotation
    choices: tuple[str, ...] = ()
    if _may_be_none(field):
        kind, *_ = (each for each in get_args(kind) if each is not NoneType)
    if get_origin(kind) is Literal:
        kind, choices = str, (*get_args(kind), *(["none"] if _may_be_none(field) else []))
    flag = "--" + name.replace("_", "-")
    names = _NAMES.get(name, (f"{flag}/--no-{flag[2:]}" if kind is bool else flag,))
    text = str(field.default).lower()
    if kind is bool:
        on, off = names[0].split("/")
        text = (on if field.default else off)[2:]
    option = typer.Option(
        *names,
        help=(field.description or "").replace("``", "`").replace("\n", " "),
        metavar="|".join(choices) or None,
        show_default=default or text,
        rich_help_panel=panel,
    )
    return Annotated[kind | None, option]


class SeveralValues(TyperCommand):
    """Takes ``--seeds 0 1 2`` as ``--seeds 0 --seeds 1 --seeds 2``, for options that may be repeated.

    For commands without arguments: all words up to the next option are the list's.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        lists = {name for param in self.params if getattr(param, "multiple", False) for name in param.opts}
        spread: list[str] = []
        option = ""
        for place, word in enumerate(args):
            if word.startswith("-") and not word[1:].isdigit():
                option = word if word in lists else ""
            elif option and args[place - 1] != option:
                spread.append(option)
            spread.append(word)
        return super().parse_args(ctx, spread)
